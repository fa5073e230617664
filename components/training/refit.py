"""refit: the approved configuration on all days, the test days too. So what ships has seen the newest day.

The gate judges a model that has seen no test day. Once it is approved, there is nothing left to hold back: the same
network is fitted from the same start, with the same settings and seed, on every row, for as many epochs as the valid
days chose. Vocabularies and catalog stay, so package and serving see no difference. No rows are left to judge by. So
the new model is compared with the approved one on the newest day. If a check fails, the approved one ships, and the
decision says so.

    checkpoints/refit             what ships, either kind; refit.json alone where the gate rejected
    artifacts/refit/decision.json the gate's decision, and `shipped`: bytes, kind, train_until, checks, reasons

As in `train`, a run that was stopped or killed continues where it was, and ends in the same bytes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.common.artifacts import new_folder, read_json, write_json
from components.common.dataset import Dataset
from components.common.scoring import score
from components.training.config import TrainConfig
from components.training.loop import DivergenceError, Loop, enough_memory
from components.training.train import SPEED, device_of, speed_of, speed_summary, write_best
from components.training.warm_start import Start, take_weights
from models.checkpoint import CHECKPOINT_FILES, Checkpoint, checkpoint_hash, load
from models.families import build

SCRATCH = Path(".scratch/refit")
BINS = 10  # of equally many rows, by predicted probability


@dataclass(frozen=True, kw_only=True)
class RefitConfig:
    """enabled                false ships the model that the gate judged
    min_correlation        of the logits of both models on the newest day
    max_calibration_error  mean |predicted - clicked| over equally filled bins of that day's rows
    logloss_noise          standard errors by which the logloss may be above that of the approved model, which has not
                           seen these rows. Rows of one user count as one observation
    device                 as in `train`
    """

    enabled: bool
    min_correlation: float
    max_calibration_error: float
    logloss_noise: float
    device: str

    def __post_init__(self) -> None:
        if not -1 <= self.min_correlation <= 1:
            raise ValueError(f"min_correlation is {self.min_correlation}; a correlation lies in [-1, 1]")
        for name in ("max_calibration_error", "logloss_noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")


def run(
    config: RefitConfig, decision: Path, checkpoints: Path, starts: Path, dataset: Path, output: Path, shipped: Path
) -> dict[str, Any]:
    """Fit, check, and write the checkpoint that ships and the decision that names it. Returns the decision.

    starts  what the training of each model began from, as `start` writes it

    Raises ValueError where the bytes on disk are not those that the gate judged, and OutOfMemoryError.
    """
    judged = read_json(decision, "gate")
    name = judged["model"]
    if judged["verdict"] != "approve":
        with new_folder(output) as folder:
            write_json(folder / "refit.json", {"fitted": False, "reasons": judged["reasons"]})
        return _decide(shipped, judged, None)
    source, data = checkpoints / name, Dataset.open(dataset)
    approved = _verified(judged, source, data, dataset)
    checks: list[dict[str, Any]] = []
    speed: dict[str, Any] = {}
    if not config.enabled:
        reasons = ["refit.enabled is false: the model that the gate judged ships"]
    else:
        try:
            loop = begin(config, judged, approved, starts / name, data)
            speed = speed_of(loop, loop.run())
        except DivergenceError as error:
            reasons = [f"the refit failed, so the model that the gate judged ships: {error}"]
        else:
            checks = compare(config, data, approved, loop)
            reasons = list(_reasons(checks))
    fitted = bool(checks) and all(check["passed"] for check in checks)
    if fitted:
        known = dict(approved.facts) | {
            "train_rows": len(data.columns["label"]),
            "train_until": data.midnight("ends"),
            "refit_of": judged["checkpoint_sha256"],
        }
        write_best(output, name, loop, data, known, approved.calibration)  # no row is left to fit it on
    else:
        with new_folder(output) as folder:
            for file in CHECKPOINT_FILES:
                shutil.copyfile(source / file, folder / file)
    ships = {
        "checkpoint_sha256": checkpoint_hash(output),
        "kind": "refit" if fitted else "judged",
        "train_until": data.midnight("ends") if fitted else approved.facts["train_until"],
        "checks": checks,
        "reasons": reasons,
    }
    found = _decide(shipped, judged, ships)
    shutil.rmtree(SCRATCH / name, ignore_errors=True)
    return found | speed


def begin(config: RefitConfig, judged: dict[str, Any], approved: Checkpoint, start: Path, data: Dataset) -> Loop:
    """The approved model's training over again, on every row: a loop that was not run yet, or that was stopped."""
    name, epochs = approved.family, approved.facts["best_epoch"]
    asked = TrainConfig(**approved.facts["train"], network=dict(approved.network), device=config.device)
    asked = replace(asked, max_epochs=epochs, patience=epochs)
    device = device_of("refit", asked)
    whole = replace(data, facts=data.facts | {"splits": {"train": (0, len(data.columns["label"]))}})
    torch.manual_seed(asked.seed)
    ranker = build(name, asked.network, data.schema)
    if approved.facts["warm_start"] is not None:
        champion = Start.read(start).checkpoint
        assert champion is not None
        take_weights(ranker, asked.network, data, champion)
    with enough_memory(name, device):
        return Loop(
            name, asked, ranker.to(device), whole,
            start=judged["checkpoint_sha256"], rates=approved.facts["rates"], scratch=SCRATCH,
        )  # fmt: skip


# ---- checks -----------------------------------------------------------------------------------------------------


def compare(config: RefitConfig, data: Dataset, approved: Checkpoint, loop: Loop) -> list[dict[str, Any]]:
    """The fitted model beside the approved one on the newest day: each rule with its value, limit and verdict."""
    rows = data.newest_day
    fitted = build(approved.family, approved.network, data.schema)
    fitted.load_state_dict(loop.state.best)
    slope, intercept = approved.calibration
    label_B = data.columns["label"][slice(*rows)].double()
    old_B, new_B = (slope * score(m, data, rows)[0].double() + intercept for m in (approved.model, fitted))
    rise, error = logloss_rise(new_B, old_B, label_B, data.columns["user"][slice(*rows)].long())
    noise = config.logloss_noise * error
    correlation = float(torch.corrcoef(torch.stack((old_B, new_B)))[0, 1])
    return [
        _rule("correlation", correlation, ">=", config.min_correlation),
        _rule("calibration_error", calibration_error(new_B.sigmoid(), label_B), "<=", config.max_calibration_error),
        _rule("logloss_rise", rise, "<=", noise if math.isfinite(noise) else 0.0),
    ]


def calibration_error(score_B: Tensor, label_B: Tensor) -> float:
    """Mean |predicted - clicked| over BINS bins of the predicted probability, weighted by rows."""
    parts = torch.argsort(score_B, stable=True).tensor_split(BINS)
    return sum(abs(float((score_B[part] - label_B[part]).sum())) for part in parts) / len(score_B)


def logloss_rise(new_B: Tensor, old_B: Tensor, label_B: Tensor, user_B: Tensor) -> tuple[float, float]:
    """How much a row's mean logloss rose, and the standard error of that; rows of one user are no two observations."""
    new, old = (torch.nn.functional.softplus(logit_B) - label_B * logit_B for logit_B in (new_B, old_B))
    rise = float((new - old).mean())
    users = user_B if len(user_B.unique()) > 1 else torch.arange(len(user_B))  # data without users
    return rise, float(torch.bincount(users, new - old - rise).square().sum().sqrt()) / len(new_B)


def _rule(rule: str, value: float, must_be: str, limit: float) -> dict[str, Any]:
    """A value that is not finite does not pass, and JSON has no word for it."""
    known = value if math.isfinite(value) else None
    passed = known is not None and (known >= limit if must_be == ">=" else known <= limit)
    return {"rule": rule, "value": known, "must_be": must_be, "limit": limit, "passed": passed}


def _reasons(checks: list[dict[str, Any]]) -> Iterator[str]:
    broken = [check for check in checks if not check["passed"]]
    if not broken:
        yield f"the refit passes all {len(checks)} checks against the model that the gate judged"
    for check in broken:
        value = "cannot be measured" if check["value"] is None else f"is {check['value']:.4g}"
        yield f"the model that the gate judged ships: {check['rule']} of the refit {value}, not {check['must_be']} " + (
            f"{check['limit']:.4g}"
        )


# ---- files ------------------------------------------------------------------------------------------------------


def _verified(judged: dict[str, Any], source: Path, data: Dataset, dataset: Path) -> Checkpoint:
    """The approved checkpoint. Raises ValueError where it or the dataset is not what the gate judged."""
    on_disk = {
        "checkpoint_sha256": (source, checkpoint_hash(source)),
        "data_sha256": (dataset, data.facts["data_sha256"]),
    }
    for key, (path, found) in on_disk.items():
        if found != judged[key]:
            raise ValueError(f"{path}: {key} is {found}, the gate judged {judged[key]}; run `dvc repro gate`")
    return load(source)


def _decide(shipped: Path, judged: dict[str, Any], ships: dict[str, Any] | None) -> dict[str, Any]:
    decision = judged | {"shipped": ships}
    write_json(shipped, decision)
    return decision


def summary(found: dict[str, Any]) -> dict[str, str]:
    ships = found["shipped"]
    if ships is None:
        return {"ships": "nothing: the gate rejected"}
    lines = {
        "ships": f"the {'refit' if ships['kind'] == 'refit' else 'judged model'} of {found['model']}",
        "has seen": f"every day before {ships['train_until']}" if ships["train_until"] else "data without times",
    }
    for check in ships["checks"]:
        value = "not measurable" if check["value"] is None else f"{check['value']:.4g}"
        lines[check["rule"]] = f"{value}, must be {check['must_be']} {check['limit']:.4g}"
    lines["why"] = "; ".join(ships["reasons"])
    return lines | (speed_summary(found) if "device" in found else {})


def measured(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in SPEED if name in found}
