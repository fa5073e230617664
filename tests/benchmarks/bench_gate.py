"""Does the gate let through what it should, and stop what it should? Trials on a pool of models, a line of JSON each.

    python tests/benchmarks/bench_gate.py [--models 10] [--pool FOLDER]        `make bench ONLY=gate`

Retrained: the pool, SDCNv3 with so many seeds on 240,000 rows of the simulator, scored on the 420,000 rows after them.
--pool keeps the scores, so that a second call trains nothing. Resampled: the test rows of each trial, by users. A trial
draws its champion and its challengers out of the pool. A model that lost some AUC is one of the pool with noise on its
log-odds. A resample's AUC is taken from the users' placement values (`statistics.placements`), which is exact up to
1 / users; the trial `gate_coverage` does it the long way.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frame import ROOT, build, run, settings
from harness import report

from components.common.config import parse_time
from components.common.contracts import SPLIT
from components.common.dataset import Dataset
from components.common.scoring import score
from components.data import sources
from components.data.ingest import IngestConfig
from components.data.sources import RawTables, Window, simulator
from components.data.sources.simulator import SimulatorConfig
from components.features.dataset import DatasetConfig
from components.features.views import FeaturesConfig
from components.release import evaluate, evidence, gate, rules, slices, statistics
from components.release.gate import GateConfig
from components.release.measures import EvaluateConfig
from components.release.registry import AGES
from components.training import calibration
from components.training.config import TrainConfig
from models import families

DAYS = {"train": 4, "valid": 1, "test": 7}
WORLD = {"users": 12_000, "items": 4000, "impressions_per_day": 60_000}
NIGHTS = 30
DEMO_ROWS = 30_000


# ---- the pool ---------------------------------------------------------------------------------------------------


def read(raw: str, config: SimulatorConfig, window: Window, rows: int | None = None) -> RawTables:
    """The simulator's rows with the split of DAYS."""
    found = simulator.read(raw, config, window, rows)
    assert window.until is not None
    starts = [window.until - timedelta(days=DAYS["test"] + ahead) for ahead in (DAYS["valid"], 0)]
    times = found.events["timestamp"].to_numpy()
    part = np.searchsorted(np.array([start.replace(tzinfo=None) for start in starts], times.dtype), times, "right")
    return replace(found, events=found.events.append_column(SPLIT, [np.array(["train", "valid", "test"])[part]]))


def dataset(folder: Path) -> Dataset:
    source: IngestConfig = settings("ingest", IngestConfig, source="simulator", raw=str(ROOT / sources.SIMULATOR_RAW))
    until = parse_time("until", str(source.until)) + timedelta(days=DAYS["valid"] + DAYS["test"])
    world = replace(source.simulator, **WORLD, late_share=0.0, corrected_share=0.0)
    source = replace(source, until=until.isoformat(), window_days=sum(DAYS.values()), simulator=world)
    before = sources.ADAPTERS["simulator"]
    sources.ADAPTERS["simulator"] = Path(__file__).stem
    try:
        return build(source, settings("features", FeaturesConfig), settings("dataset", DatasetConfig), folder)
    finally:
        sources.ADAPTERS["simulator"] = before


class Pool:
    """labels, users [rows]; logits of each seed's model [models, rows]; slices; and faults of the first model."""

    def __init__(self, folder: Path, models: int) -> None:
        file = folder / "pool.npz"
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(file, **train(folder, models))
        stored = np.load(file)
        self.labels, self.users, self.logits = stored["labels"], stored["users"], stored["logits"]
        self.faults = {name.removeprefix("fault "): stored[name] for name in stored.files if name.startswith("fault ")}
        self.masks = {name.removeprefix("slice "): stored[name] for name in stored.files if name.startswith("slice ")}
        self.units = statistics.units_of(self.users)
        self.noise = np.random.default_rng(5).normal(size=self.logits.shape[1])
        self.parts = np.stack([self.part(logits) for logits in self.logits])
        self.aucs = np.array([value for value, _ in self.parts_of()])

    def part(self, logits: np.ndarray) -> np.ndarray:
        """Each user's share of the AUC's deviation, and the AUC at the end: [users + 1]."""
        placed = statistics.placements(self.labels, logits)
        click = self.labels.astype(bool)
        value = placed[click].mean()
        weight = np.where(click, 1 / click.sum(), 1 / (~click).sum())
        return np.append(np.bincount(self.units, (placed - value) * weight), value)

    def parts_of(self) -> list[tuple[float, np.ndarray]]:
        return [(float(part[-1]), part[:-1]) for part in self.parts]

    def worse(self, model: int, loss: float) -> np.ndarray:
        """The model's logits with so much noise that its AUC falls by `loss`."""
        low, high = 0.0, 4.0
        for _ in range(22):
            middle = (low + high) / 2
            logits = self.logits[model] + middle * self.noise
            low, high = (middle, high) if self.aucs[model] - self.part(logits)[-1] < loss else (low, middle)
        return self.logits[model] + low * self.noise


def train(folder: Path, models: int) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        data = dataset(Path(scratch))
    first, last = data.splits["test"]
    config: TrainConfig = settings("train.sdcnv3", TrainConfig, device="cpu", max_epochs=5)
    found, logits = {}, []
    for seed in range(models):
        seeded = replace(config, seed=seed)
        model, figures = run("sdcnv3", partial(families.build, "sdcnv3", config.network), seeded, data)
        platt = calibration.fit(*score(model, data, data.splits["valid"]))

        def scored(from_: Dataset, model: Any = model, platt: Any = platt) -> np.ndarray:
            return (platt.slope * score(model, from_, (first, last))[0] + platt.intercept).numpy()

        logits.append(scored(data))
        print(json.dumps({"name": "pool", "seed": seed, **figures}), flush=True)
        if seed == 0:
            found |= {f"fault {name}": scored(broken) for name, broken in faulty(data).items()}
    masks = slices.masks(settings("evaluate", EvaluateConfig).slices, data)
    views = torch.bincount(data.columns["item"][slice(*data.splits["train"])].long(), minlength=len(data.catalog))
    item_B = data.columns["item"][first:last].long()
    found["fault popularity shortcut"] = np.log1p(views[item_B].numpy()).astype(np.float32) - 4
    return found | {f"slice {name}": mask for name, mask in masks.items()} | {
        "labels": data.columns["label"][first:last].numpy().astype(np.int8),
        "users": data.columns["user"][first:last].numpy(),
        "logits": np.stack(logits),
    }  # fmt: skip


def faulty(data: Dataset) -> dict[str, Dataset]:
    """The same rows as a broken server or pipeline would give them to the model."""
    generator = torch.Generator().manual_seed(0)
    vector = data.catalog.vector_IE
    assert vector is not None
    turned = torch.linalg.qr(torch.randn(vector.shape[1], vector.shape[1], generator=generator))[0]
    lost = torch.minimum(data.columns["length"].long(), torch.tensor(12)).to(data.columns["end"].dtype)
    older = {
        "end": data.columns["end"] - lost,
        "length": (data.columns["length"].long() - lost).to(data.columns["length"].dtype),
    }
    return {
        "stale embeddings": replace(data, catalog=replace(data.catalog, vector_IE=vector @ turned)),
        "yesterday's features": replace(data, columns={**data.columns, **older}),
    }


# ---- nights -----------------------------------------------------------------------------------------------------


class Night:
    """One night's resample: what the gate would measure of any two models of it, with so many test rows."""

    def __init__(self, pool: Pool, rng: np.random.Generator, rows: int | None = None) -> None:
        users = pool.parts.shape[1] - 1
        drawn = users if rows is None else round(users * rows / len(pool.labels))
        self.weight = np.bincount(rng.integers(0, users, drawn), minlength=users) * (users / drawn) - 1
        self.scale = np.sqrt(users / drawn)

    def difference(self, ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
        part = ours - theirs
        own, value = part[:-1], part[-1]
        se = float(np.sqrt((own**2).sum()) * self.scale)
        found = float(value + self.weight @ own)
        return {"value": found, "se": se, "difference": found, "against": "champion"}


def reference(version: str, found: dict[str, Any]) -> dict[str, Any]:
    return {"version": version, "difference": {"auc": found}}


def refresh_passes(
    config: GateConfig, night: Night, ours: np.ndarray, versions: list[np.ndarray], spread: float
) -> bool:
    return all(
        rules.no_worse(config, reference("", night.difference(ours, theirs)), len(versions), spread)["passed"]
        for theirs in versions
    )


def share(trial: Callable[[np.random.Generator], bool], count: int) -> float:
    return float(np.mean([trial(np.random.default_rng(seed)) for seed in range(count)]))


def two(rng: np.random.Generator, pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    one, other = rng.choice(len(pool.parts), 2, replace=False)
    return pool.parts[one], pool.parts[other]


def first_night(
    config: GateConfig, pool: Pool, rng: np.random.Generator, champion: np.ndarray, challengers: list[np.ndarray],
    spread: float, nights: int = NIGHTS, rows: int | None = None,
) -> int:  # fmt: skip
    """The night on which a change is promoted, 1 …; nights + 1 where it is on none."""
    seen: list[dict[str, Any]] = []
    for at in range(nights):
        ours = challengers[rng.integers(len(challengers))]
        seen.append(Night(pool, rng, rows).difference(ours, champion))
        if rules.proven(config, seen, 1, spread)["passed"]:
            return at + 1
    return nights + 1


# ---- trials -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--pool", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        pool = Pool(asked.pool or Path(scratch), asked.models)
    config: GateConfig = settings("gate", GateConfig)
    every = np.arange(len(pool.parts))
    spread = float(np.std(pool.aucs, ddof=1))
    one = Night(pool, np.random.default_rng(0)).difference(pool.parts[0], pool.parts[1])
    few = Night(pool, np.random.default_rng(0), DEMO_ROWS).difference(pool.parts[0], pool.parts[1])
    print(json.dumps({
        "name": "gate_noise", "models": len(every), "rows": len(pool.labels), "spread": spread, "auc": pool.aucs.mean(),
        "se": one["se"], "se_demo": few["se"],
        "margin": evidence.margin(one["se"], spread, len(AGES) + 1),
        "margin_demo": evidence.margin(few["se"], spread, len(AGES) + 1),
    }), flush=True)  # fmt: skip
    aa(config, pool, spread)
    ratchet(config, pool, spread)
    gain(config, pool, spread)
    report("gate_refresh", refreshes(config, pool, spread), "share of equal refreshes that pass", "goal", 0.95)
    report("gate_refresh_demo", refreshes(config, pool, spread, DEMO_ROWS), "the same of 30,000 rows", "goal", 0.95)
    planted(config, pool, spread)
    report("gate_coverage", coverage(pool), "share of 95% intervals that hold the truth", "goal", 0.95)
    seconds(pool)


def aa(config: GateConfig, pool: Pool, spread: float) -> None:
    """Changes that change nothing."""

    def single(rng: np.random.Generator) -> bool:
        ours, theirs = two(rng, pool)
        return bool(rules.proven(config, [Night(pool, rng).difference(ours, theirs)], 1, spread)["passed"])

    def month(rng: np.random.Generator, spread: float = spread) -> bool:
        champion = int(rng.integers(len(pool.parts)))
        others = [pool.parts[at] for at in range(len(pool.parts)) if at != champion]
        return first_night(config, pool, rng, pool.parts[champion], others, spread) <= NIGHTS

    def naive(rng: np.random.Generator) -> bool:
        ours, theirs = two(rng, pool)
        found = Night(pool, rng).difference(ours, theirs)
        return bool(found["value"] > 1.645 * found["se"])

    report("gate_aa_change", 400 * share(single, 400), "false promotions of 400", "goal, at most", 12)
    report("gate_aa_months", share(month, 100), "months with a false promotion", "goal, at most", 0.05)
    report("gate_aa_naive", 400 * share(naive, 400), "false promotions without seeds in mind", "goal, at most", 12)


def ratchet(config: GateConfig, pool: Pool, spread: float) -> None:
    """A loss of .001 a night: the AUC below the first champion's when a refresh is stopped for the first time."""
    losing = {(m, k): pool.part(pool.worse(m, k / 1000)) for m in range(3) for k in range(1, NIGHTS + 1)}

    def stopped_at(rng: np.random.Generator) -> float:
        champions = [pool.parts[rng.integers(len(pool.parts))]]
        for k in range(1, NIGHTS + 1):
            ours = losing[int(rng.integers(3)), k]
            versions = list({max(len(champions) - age, 0): None for age in (1, *AGES)})
            if not refresh_passes(config, Night(pool, rng), ours, [champions[at] for at in versions], spread):
                return (k - 1) / 1000
            champions.append(ours)
        return NIGHTS / 1000

    se = Night(pool, np.random.default_rng(0)).difference(pool.parts[0], pool.parts[1])["se"]
    allowed = evidence.margin(se, spread, len(AGES) + 1) + 0.002
    lost = np.array([stopped_at(np.random.default_rng(seed)) for seed in range(200)])
    print(json.dumps({"name": "gate_ratchet_lost", "median": float(np.median(lost)), "most": float(lost.max()),
                      "allowed": allowed}), flush=True)  # fmt: skip
    report("gate_ratchet", float(np.mean(lost <= allowed)), "months stopped in time", "goal", 0.95)


def gain(config: GateConfig, pool: Pool, spread: float) -> None:
    """A change that is better by .002: on how many nights it is promoted, and what another alpha would do."""
    champions = [pool.part(pool.worse(at, 0.002)) for at in range(len(pool.parts))]

    def nights(rng: np.random.Generator, config: GateConfig = config) -> int:
        at = int(rng.integers(len(champions)))
        others = [part for other, part in enumerate(pool.parts) if other != at]
        return first_night(config, pool, rng, champions[at], others, spread)

    for alpha in (0.01, 0.05, 0.2):
        asked = replace(config, alpha=alpha)
        needed = np.array([nights(np.random.default_rng(seed), asked) for seed in range(200)])
        curve = {f"within {n} nights": float(np.mean(needed <= n)) for n in (1, 3, 7, 14, 30)}
        print(json.dumps({"name": "gate_gain_curve", "alpha": alpha, **curve}), flush=True)
        if alpha == config.alpha:
            report("gate_gain", curve["within 7 nights"], "promoted within 7 nights", "goal", 0.8)


def refreshes(config: GateConfig, pool: Pool, spread: float, rows: int | None = None) -> float:
    def passes(rng: np.random.Generator) -> bool:
        chosen = rng.choice(len(pool.parts), min(len(AGES) + 2, len(pool.parts)), replace=False)
        ours, *versions = (pool.parts[at] for at in chosen)
        return refresh_passes(config, Night(pool, rng, rows), ours, versions, spread)

    return share(passes, 400)


# ---- planted faults ---------------------------------------------------------------------------------------------

EXPECTED = {  # fault -> the rules of which one must reject it
    "slice damaged": ("auc_loss on ",),
    "odds times 1.3": ("calibration_shift",),
    "stale embeddings": ("no worse than", "auc_loss on "),
    "label leak": ("auc_gain",),
    "popularity shortcut": ("group_auc_loss", "group_auc"),
    "yesterday's features": ("no worse than",),
}


def planted(config: GateConfig, pool: Pool, spread: float) -> None:
    found = 0
    for name, logits in planted_faults(pool).items():
        judged = gate.judge(config, measured(pool, logits, pool.logits[1]), [], spread)
        broken = [rule["rule"] for rule in rules.broken(judged["rules"])]
        right = any(rule.startswith(EXPECTED[name]) for rule in broken)
        found += right
        print(json.dumps({"name": "gate_fault", "fault": name, "rejected": right, "by": broken[:6]}), flush=True)
    clean = gate.judge(config, measured(pool, pool.logits[0], pool.logits[1]), [], spread)
    print(json.dumps({"name": "gate_fault", "fault": "none", "rejected": not clean["passed"],
                      "by": [rule["rule"] for rule in rules.broken(clean["rules"])]}), flush=True)  # fmt: skip
    report("gate_planted", found / len(EXPECTED), "faults rejected by the right rule", "goal", 1.0)


def planted_faults(pool: Pool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    clean = pool.logits[0]
    damaged = clean.copy()
    slice_ = pool.masks["new users"] if pool.masks["new users"].sum() > 2000 else pool.masks["history 1-4"]
    damaged[slice_] = rng.permutation(damaged[slice_])
    return {
        "slice damaged": damaged,
        "odds times 1.3": clean + np.log(1.3),
        "label leak": clean + 1.5 * pool.labels * (rng.random(len(clean)) < 0.3),
        **pool.faults,
    }


def measured(pool: Pool, ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """evaluation.json of a refresh, as `evaluate` writes it, as far as the gate reads it."""
    config = replace(settings("evaluate", EvaluateConfig), bootstrap=100)
    models = {"": 1 / (1 + np.exp(-ours)), "champion": 1 / (1 + np.exp(-theirs))}
    drawn = statistics.bootstrap(
        pool.labels, models, pool.users, bins=config.calibration_bins, resamples=config.bootstrap, seed=0,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    every = {name: evaluate.difference(mask, pool.labels, models, "champion", pool.users)
             for name, mask in pool.masks.items()}  # fmt: skip
    differences = evaluate.differences(pool.labels, models, "champion", pool.users, drawn)
    return {
        "configuration": "c", "checkpoint_sha256": "", "data_sha256": "", "schema_hash": "", "train_rows": 1,
        "test": evaluate.figures(config, pool.labels, models[""], pool.users, drawn[""]),
        "policy": None,
        "references": [{
            "version": "champion", "configuration": "c", "train_rows": 1, "difference": differences,
            "newest": differences["auc"], "score_drift": statistics.drift(models["champion"], models[""]),
            "slices": every,
        }],
    }  # fmt: skip


# ---- intervals and time -----------------------------------------------------------------------------------------


def coverage(pool: Pool, trials: int = 300, users: int = 600) -> float:
    """How often intervals of a sample of users hold the figure of all users: AUC by placement values, the others by
    the bootstrap."""
    rng = np.random.default_rng(1)
    models = {"a": 1 / (1 + np.exp(-pool.logits[0])), "b": 1 / (1 + np.exp(-pool.worse(1, 0.003)))}
    figures = ("group_auc", "logloss", "average_precision", "normalised_entropy")
    count = pool.parts.shape[1] - 1
    truth = statistics.bootstrap(pool.labels, models, pool.users, bins=20, resamples=1, seed=0)
    held: dict[str, list[bool]] = {name: [] for name in ("auc", *figures)}
    for _ in range(trials):
        chosen = np.zeros(count, bool)
        chosen[rng.choice(count, users, replace=False)] = True
        rows = chosen[pool.units]
        labels, own = pool.labels[rows], pool.units[rows]
        some = {name: scores[rows] for name, scores in models.items()}
        low, high = statistics.auc(labels, some["a"], statistics.units_of(own), minus=some["b"]).interval()
        held["auc"].append(low <= truth["a"]["auc"][0] - truth["b"]["auc"][0] <= high)
        drawn = statistics.bootstrap(labels, some, own, bins=20, resamples=200, seed=int(rng.integers(2**31)))
        for name in figures:
            low, high = statistics.interval(drawn["a"][name] - drawn["b"][name])
            held[name].append(low <= truth["a"][name][0] - truth["b"][name][0] <= high)
    shares = {name: float(np.mean(values)) for name, values in held.items()}
    print(json.dumps({"name": "gate_coverage_of", "trials": trials, **shares}), flush=True)
    return min(shares.values(), key=lambda value: -abs(value - 0.95))


def seconds(pool: Pool) -> None:
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(pool.labels))[:400_000]
    models = {name: 1 / (1 + np.exp(-pool.logits[at][rows])) for at, name in enumerate("ab")}
    begun = time.perf_counter()
    statistics.bootstrap(
        pool.labels[rows], models, pool.users[rows], bins=20, resamples=1000, seed=0,
        threads=len(os.sched_getaffinity(0)),
    )  # fmt: skip
    took = time.perf_counter() - begun
    report("gate_bootstrap_seconds", took, "s, 1,000 resamples of 400,000 rows, two models", "goal, at most", 30)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"name": "gate_bootstrap_mib", "value": round(peak), "goal": 2048}), flush=True)


if __name__ == "__main__":
    main()
