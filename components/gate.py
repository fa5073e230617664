"""gate: may this ship? Rules and the champion -> decision.json, which names the bytes that were judged.

A rejection is a verdict, not a failure: the run ends well, and nothing ships. Every model is judged by every rule; of
those that pass, the one with the highest test AUC is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components import champion as registry
from components.artifacts import read_json, write_json


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """min_auc, min_group_auc, min_test_rows, max_calibration_error   absolute thresholds on the test days
    max_logloss_ratio   of the logloss of always predicting the test days' click rate
    max_auc_loss        the most that AUC may fall behind the champion's on the same rows
    max_slice_auc_loss  the same for every slice that is not small
    """

    min_auc: float
    min_group_auc: float
    max_calibration_error: float
    max_logloss_ratio: float
    max_auc_loss: float
    max_slice_auc_loss: float
    min_test_rows: int

    def __post_init__(self) -> None:
        for name in ("min_auc", "min_group_auc"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; an AUC lies in [0, 1]")


def run(
    config: GateConfig, evaluations: Path, checkpoints: Path, dataset: Path, champion: Path, output: Path
) -> dict[str, Any]:
    """Judge every evaluated model. Raises ValueError where an evaluation is not of the checkpoint or data on disk."""
    from models.registry import checkpoint_hash

    data = read_json(dataset / "dataset.json", "dataset")
    current = registry.current(champion)
    candidates: dict[str, Any] = {}
    for file in sorted(evaluations.glob("*/evaluation.json")):
        metrics = read_json(file, f"evaluate@{file.parent.name}")
        name = metrics["model"]
        judged = {
            "checkpoint_sha256": checkpoint_hash(checkpoints / name),
            "data_sha256": data["data_sha256"],
            "schema_hash": data["schema_hash"],
        }
        for key, on_disk in judged.items():
            if metrics[key] != on_disk:
                raise ValueError(
                    f"{file}: {key} is {metrics[key]}, on disk is {on_disk}; run `dvc repro evaluate@{name}`"
                )
        against, serves = ((one or {}).get("version", "no champion") for one in (metrics["champion"], current))
        if against != serves:
            raise ValueError(
                f"{file}: measured against {against}, {champion} names {serves}; run `dvc repro evaluate@{name}`"
            )
        rules = list(judge(config, metrics))
        passed = all(rule["passed"] for rule in rules)
        candidates[name] = {**judged, "auc": metrics["test"]["auc"], "passed": passed, "rules": rules}
    if not candidates:
        raise ValueError(f"{evaluations}: no model is evaluated; run `dvc repro evaluate`")
    passing = [name for name, candidate in candidates.items() if candidate["passed"]]
    chosen = max(passing, key=lambda name: candidates[name]["auc"]) if passing else None
    decision = {
        "verdict": "approve" if chosen else "reject",
        "model": chosen,
        "checkpoint_sha256": candidates[chosen]["checkpoint_sha256"] if chosen else None,
        "data_sha256": data["data_sha256"],
        "schema_hash": data["schema_hash"],
        "champion": current,
        "candidates": candidates,
        "reasons": list(reasons(chosen, candidates, current)),
    }
    write_json(output, decision)
    return decision


def judge(config: GateConfig, metrics: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each rule with its value, its limit and its verdict. A figure that could not be measured does not pass."""
    test = metrics["test"]
    yield _at_least("test_rows", test["rows"], config.min_test_rows)
    yield _at_least("auc", test["auc"], config.min_auc)
    yield _at_least("group_auc", test["group_auc"], config.min_group_auc)
    yield _at_most("calibration_error", test["calibration_error"], config.max_calibration_error)
    yield _at_most("logloss_ratio", test["logloss"] / test["base_logloss"], config.max_logloss_ratio)
    if (champion := metrics["champion"]) is None:
        return
    loss = None if test["auc"] is None else champion["test"]["auc"] - test["auc"]
    yield _at_most("auc_loss", loss, config.max_auc_loss)
    for name, theirs in champion["slices"].items():
        ours = metrics["slices"][name]
        if not ours["small"] and ours["auc"] is not None:
            yield _at_most(f"auc_loss on {name}", theirs["auc"] - ours["auc"], config.max_slice_auc_loss)


def reasons(chosen: str | None, candidates: dict[str, Any], champion: dict[str, Any] | None) -> Iterator[str]:
    """The verdict in sentences."""
    if champion is None:
        yield "no champion yet: absolute thresholds alone"
    for name, candidate in candidates.items():
        broken = [rule for rule in candidate["rules"] if not rule["passed"]]
        if broken:
            told = "; ".join(f"{r['rule']} {_figure(r['value'])} is not {r['must_be']} {r['limit']:g}" for r in broken)
            yield f"{name} fails {len(broken)} of {len(candidate['rules'])} rules: {told}"
        else:
            best = ", the highest AUC of those that pass" if name == chosen else ""
            yield f"{name} passes all {len(candidate['rules'])} rules with AUC {candidate['auc']:.4f}{best}"


def _figure(value: float | None) -> str:
    return "not measurable" if value is None else f"{value:.4g}"


def _at_least(rule: str, value: float | None, limit: float) -> dict[str, Any]:
    return {"rule": rule, "value": value, "must_be": ">=", "limit": limit,
            "passed": value is not None and value >= limit}  # fmt: skip


def _at_most(rule: str, value: float | None, limit: float) -> dict[str, Any]:
    return {"rule": rule, "value": value, "must_be": "<=", "limit": limit,
            "passed": value is not None and value <= limit}  # fmt: skip
