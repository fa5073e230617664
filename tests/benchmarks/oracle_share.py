"""How much of what can be known the models learn: their share of the oracle's AUC - 0.5 on a simulated test day.

The oracle scores with the true click probability: it knows today's fashion and every user's interests of today, which
no log tells. The first table shows what that is worth: the shares of scorers who know the truth of the training days,
every item and all else, without noise; and, last, of one who must estimate each user from clicks and refusals.

    python tests/benchmarks/oracle_share.py --device cuda --seed 1 2 3          # 3.6M impressions, both models
    python tests/benchmarks/oracle_share.py --impressions 300000 --model qin    # a small one

Users and items grow with the impressions: 1,200 impressions a user, 2,400 an item. Ten days: eight train, one
validates, one tests. Then the same again on nine days, for as many epochs as the valid day chose, so that the test day
is the next after training, as it is for a model that is trained every day. What the models read is made by the
project's stages; training is the project's trainer.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from frame import ROOT, build, run, say, settings, with_history
from harness import machine
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from components.common.config import parse_time
from components.common.contracts import ORACLE
from components.common.dataset import Dataset
from components.data.ingest import IngestConfig
from components.data.sources.simulator import EPOCH, FIRST_ITEM, FIRST_USER, STRIDE, World
from components.features.dataset import DatasetConfig
from components.features.views import FeaturesConfig
from components.training.config import PRECISIONS, TrainConfig
from models import families

A_USER, AN_ITEM = 1200, 2400  # impressions: at 3.6M, the demo's 3,000 users and 1,500 items
DAYS = 10
SAMPLE, HALF_LIFE, STEPS = 300, 4, 80  # users, days and steps of the estimate of interests
HISTORY = {"qin": 64, "sdcnv3": 128}  # newest clicks that a model reads
# What differs from params.yaml, chosen by the AUC of the valid day.
SHARED = {"max_epochs": 6, "patience": 2, "ema": 0.999, "network_l2": 0.0}
OWN: dict[str, dict[str, Any]] = {
    "qin": {"batch_size": 2048, "lr": 0.002, "lr_factor": 0.5, "embedding_l2": 288.0},
    "sdcnv3": {"batch_size": 2048, "lr": 0.002, "lr_factor": 0.1, "embedding_l2": 28.8},
}
NETWORK: dict[str, dict[str, Any]] = {"qin": {"layers": 3, "rows": 3, "dropout": 0.1}, "sdcnv3": {"dim": 32}}
PUBLISHED = {"qin": "qin/microlens", "sdcnv3": "sdcnv3/criteo"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impressions", type=int, default=3_600_000, help="of all ten days together")
    parser.add_argument("--model", nargs="+", choices=list(NETWORK), default=list(NETWORK))
    parser.add_argument(
        "--sharpness", type=float, default=8.0, help="how much interests decide; the demo's world has 4"
    )
    parser.add_argument("--seed", nargs="+", type=int, default=[7], help="of the models; the world's stays 7")
    parser.add_argument("--device", default="cpu", help="on cuda steps are compiled")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument(
        "--published", action="store_true", help=f"the networks, batches and rates of {', '.join(PUBLISHED.values())}"
    )
    asked = parser.parse_args()

    source = world(asked.impressions, asked.sharpness)
    known = Table("what is known of the test day", "test share", title="Limits")
    for what, share in limits(source).items():
        known.add_row(what, f"{share:.1%}")
    Console(width=120).print(known)
    table = Table(title="Share of the oracle")
    headings = "model", "seed", "trained on", "valid share", "test share", "test AUC", "oracle", "epochs", "seconds"
    for heading in headings:
        table.add_column(heading)
    with tempfile.TemporaryDirectory() as scratch:
        data = build(source, *frame(), Path(scratch))
        for name, precision, seed in product(asked.model, asked.precision, asked.seed):
            config = settings(f"train.{name}", TrainConfig, **SHARED, **OWN[name])
            network = config.network | NETWORK[name]
            if asked.published:
                network, trained = families.PRESETS[PUBLISHED[name]], families.TRAINING[PUBLISHED[name]]
                config = replace(config, batch_size=trained["batch_size"], lr=trained["lr"], embedding_l2=28.8)
            compiled = asked.device != "cpu"
            config = replace(
                config, network=network, seed=seed, device=asked.device, precision=precision, compile=compiled
            )
            own = with_history(data, HISTORY[name])
            make = partial(families.build, name, network)
            _, chosen = run(name, make, config, own)
            _, found = run(name, make, replace(config, max_epochs=chosen["best_epoch"]), with_valid_day(own))
            for days, figures in ((DAYS - 2, chosen), (DAYS - 1, without_valid(found))):
                said = {"model": name, "days": days, "impressions": asked.impressions, "sharpness": asked.sharpness}
                said |= {"precision": precision, "published": asked.published}
                say(said | figures | {"machine": machine(asked.device)})
                table.add_row(
                    f"{name} {precision}", f"{seed}", f"{days} days",
                    f"{figures['valid_share']:.1%}" if "valid_share" in figures else "",
                    f"{figures['test_share']:.1%}", f"{figures['test_auc']:.4f}",
                    f"{figures['test_oracle']:.4f}", f"{figures['best_epoch']}", f"{figures['seconds']:.0f}",
                )  # fmt: skip
    Console(width=120).print(table)


def world(impressions: int, sharpness: float) -> IngestConfig:
    """The demo's laws at another size, and no row of it late or corrected."""
    code = str(ROOT / "components/data/sources/simulator.py")
    source = settings("ingest", IngestConfig, source="simulator", raw=code, window_days=DAYS, lead_days=0)
    simulator = replace(
        source.simulator,
        users=impressions // A_USER,
        items=impressions // AN_ITEM,
        impressions_per_day=impressions // DAYS,
        sharpness=sharpness,
        late_share=0.0,
        corrected_share=0.0,
    )
    return replace(source, simulator=simulator)


def with_valid_day(data: Dataset) -> Dataset:
    """The valid day's rows are trained on too. What they still choose is the last epoch, which knows them best."""
    splits = data.facts["splits"]
    both = [splits["train"][0], splits["valid"][1]]
    return replace(data, facts=data.facts | {"splits": splits | {"train": both}})


def without_valid(figures: dict[str, Any]) -> dict[str, Any]:
    """Of rows that were trained on, a figure says nothing."""
    return {key: value for key, value in figures.items() if not key.startswith("valid_")}


def limits(source: IngestConfig) -> dict[str, float]:
    """Shares of the true logit on the last day, where a part of it is not today's but as the training days had it.

    A user who was not there on a training day counts with the interests of the first day.
    """
    simulator = source.simulator
    today = (parse_time("ingest.until", str(source.until)) - EPOCH).days - 1
    world, trained = World(simulator, range(today - DAYS + 1, today + 1)), range(today - DAYS + 1, today - 1)
    events = world.day(today)
    user_B, item_B = positions(world, events)
    label_B, probability_B = events["label"].to_numpy(), events[ORACLE].to_numpy().astype(np.float64)
    z_BK = world.z_IK[item_B]

    def fashion(*days: int) -> np.ndarray:
        return z_BK @ np.mean([world.fashion(day) for day in days], axis=0)

    def interests(*days: int) -> np.ndarray:
        z_BK_of = [world.interests(np.maximum(day, world.born_U[user_B]), user_B) for day in days]
        return simulator.sharpness * np.einsum("bk,bk->b", np.mean(z_BK_of, axis=0), z_BK)

    without_B = np.log(probability_B / (1 - probability_B)) - fashion(today) - interests(today)
    known = {
        "all but today's fashion; yesterday's instead": fashion(today - 1) + interests(today),
        "the last training day's fashion, two days old": fashion(trained[-1]) + interests(today),
        "the mean fashion of the training days": fashion(*trained) + interests(today),
        "the mean interests of the training days": fashion(today) + interests(*trained),
        "the mean of both": fashion(*trained) + interests(*trained),
    }
    shares = {name: share(label_B, without_B + part_B, probability_B) for name, part_B in known.items()}
    sample = sampled(world, today)
    own_B = np.isin(user_B, sample)
    estimate_B = np.einsum("bk,bk->b", estimated_interests(world, today)[user_B[own_B] - sample.start], z_BK[own_B])
    score_B = (without_B + fashion(trained[-1]))[own_B] + estimate_B
    shares["the last training day's fashion; interests by estimate"] = share(
        label_B[own_B], score_B, probability_B[own_B]
    )
    return shares


def positions(world: World, events: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows' users and items are in the world's arrays."""
    user_B = (events["user_id"].to_numpy() - FIRST_USER) // STRIDE - world.first_user
    return user_B, (events["item_id"].to_numpy() - FIRST_ITEM) // STRIDE - world.first_item


def sampled(world: World, today: int) -> range:
    """SAMPLE users of today who were there on every day."""
    start = world.users_of(today).start
    assert start + SAMPLE <= world.users_of(world.days[0]).stop, "too few users are there on all days"
    return range(start, start + SAMPLE)


def share(label_B: np.ndarray, score_B: np.ndarray, oracle_B: np.ndarray) -> float:
    """(AUC - 0.5) over the oracle's."""
    return (roc_auc_score(label_B, score_B) - 0.5) / (roc_auc_score(label_B, oracle_B) - 0.5)


def estimated_interests(world: World, until: int) -> np.ndarray:
    """sharpness · z_u of the `sampled` users, [users, topics], by who knows all else of every day before `until`.

    The mode of the posterior under a Gaussian prior of the users' mean and covariance, none below zero; a day counts
    half as much as one HALF_LIFE days later. Steps with the logistic's curvature bound of 1/4 always climb.
    """
    sharpness, sample = world.config.sharpness, sampled(world, until)
    parts = []
    for day in range(world.days[0], until):
        events = world.day(day)
        user_B, item_B = positions(world, events)
        own_B = np.isin(user_B, sample)
        user_B, item_B = user_B[own_B], item_B[own_B]
        probability_B, label_B = (events[name].to_numpy().astype(np.float64)[own_B] for name in (ORACLE, "label"))
        z_BK = world.z_IK[item_B].astype(np.float64)
        affinity_B = sharpness * np.einsum("bk,bk->b", world.interests(day, user_B), z_BK)
        other_B = np.log(probability_B / (1 - probability_B)) - affinity_B
        weight_B = np.full(len(user_B), 0.5 ** ((until - 1 - day) / HALF_LIFE))
        parts.append((user_B - sample.start, z_BK, other_B, weight_B, label_B))
    user_B, z_BK, other_B, weight_B, label_B = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(user_B, kind="stable")
    user_B, z_BK, other_B, weight_B, label_B = (a[order] for a in (user_B, z_BK, other_B, weight_B, label_B))
    bounds = np.searchsorted(user_B, np.arange(SAMPLE + 1))

    def by_user(values_BK: np.ndarray) -> np.ndarray:
        total = np.concatenate([np.zeros_like(values_BK[:1]), np.cumsum(values_BK, axis=0)])
        return total[bounds[1:]] - total[bounds[:-1]]

    prior_UK = sharpness * world.interests(until, np.array(sample))
    topics = prior_UK.shape[1]
    mean_K, precision_KK = prior_UK.mean(axis=0), np.linalg.inv(np.cov(prior_UK.T) + 1e-3 * np.eye(topics))
    curvature_UKK = np.stack([by_user(z_BK * (z_BK[:, k] * weight_B / 4)[:, None]) for k in range(topics)], axis=1)
    step_UKK = np.linalg.inv(curvature_UKK + precision_KK)
    found_UK = np.tile(mean_K, (SAMPLE, 1)).astype(np.float64)
    for _ in range(STEPS):
        logit_B = np.einsum("bk,bk->b", found_UK[user_B], z_BK) + other_B
        gap_B = weight_B * (label_B - 1 / (1 + np.exp(-logit_B)))
        slope_UK = by_user(z_BK * gap_B[:, None]) - (found_UK - mean_K) @ precision_KK
        found_UK = np.maximum(found_UK + np.einsum("uij,uj->ui", step_UKK, slope_UK), 0)
    return found_UK


def frame() -> tuple[FeaturesConfig, DatasetConfig]:
    """Yesterday's views and clicks of an item instead of a week's: fashion moves every day."""
    length = max(HISTORY.values())
    featured = settings("features", FeaturesConfig, popularity_days=1, history_length=length)
    return featured, settings("dataset", DatasetConfig, history_length=length)


if __name__ == "__main__":
    main()
