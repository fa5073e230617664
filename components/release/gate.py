"""gate: may this ship? Rules and the champion -> decision.json, which names the bytes that were judged.

A rejection is a verdict, not a failure: the run ends well, and nothing ships. Every model is judged by every rule; of
those that pass, the one with the highest test AUC is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.common.artifacts import read_json, write_json
from components.common.champion import POINTER, read_pointer

NOT_MEASURABLE = {
    "group_auc": "cannot be measured: no user of the test days has both a click and a row without one; where that is "
    "as it should be, set gate.min_group_auc to null"
}


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """min_auc, min_group_auc, min_test_rows, max_calibration_error   absolute thresholds on the test days
    max_logloss_ratio   of the logloss of always predicting the test days' click rate
    max_auc_loss        the most that AUC may fall behind the champion's on the same rows
    max_slice_auc_loss  the same for every slice that is not small

    null leaves a rule out, and the decision says so: for a figure that the data cannot give.
    """

    min_auc: float | None
    min_group_auc: float | None
    max_calibration_error: float | None
    max_logloss_ratio: float | None
    max_auc_loss: float | None
    max_slice_auc_loss: float | None
    min_test_rows: int | None

    def __post_init__(self) -> None:
        for name in ("min_auc", "min_group_auc"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; an AUC lies in [0, 1]")

    @property
    def left_out(self) -> list[str]:
        """The rules that are null."""
        return [name for name, limit in asdict(self).items() if limit is None]


def run(
    config: GateConfig, evaluations: Path, checkpoints: Path, dataset: Path, champion: Path, output: Path
) -> dict[str, Any]:
    """Judge every evaluated model. Raises ValueError where an evaluation is not of the checkpoint or data on disk."""
    from models.checkpoint import checkpoint_hash

    data = read_json(dataset / "dataset.json", "dataset")
    current = read_pointer(champion / POINTER)
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
        rules = judge(config, metrics)
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
        "reasons": list(reasons(config, chosen, candidates, current)),
    }
    write_json(output, decision)
    return decision


def summary(decision: dict[str, Any]) -> dict[str, str]:
    verdict = f"{decision['verdict']}: {decision['model'] or 'nothing ships'}"
    return {"verdict": verdict, "because": "\n".join(decision["reasons"])}


def judge(config: GateConfig, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Each rule that has a limit, with its value and its verdict. A figure that could not be measured does not pass."""
    return [rule for rule in _rules(config, metrics) if rule["limit"] is not None]


def _rules(config: GateConfig, metrics: dict[str, Any]) -> Iterator[dict[str, Any]]:
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


def reasons(
    config: GateConfig, chosen: str | None, candidates: dict[str, Any], champion: dict[str, Any] | None
) -> Iterator[str]:
    """The verdict in sentences."""
    if champion is None:
        yield "no champion yet: absolute thresholds alone"
    if config.left_out:
        yield f"left out, for they are null in params.yaml: {', '.join(f'gate.{name}' for name in config.left_out)}"
    for name, candidate in candidates.items():
        broken = [rule for rule in candidate["rules"] if not rule["passed"]]
        if broken:
            told = "; ".join(map(_broken, broken))
            yield f"{name} fails {len(broken)} of {len(candidate['rules'])} rules: {told}"
        else:
            best = ", the highest AUC of those that pass" if name == chosen else ""
            yield f"{name} passes all {len(candidate['rules'])} rules with AUC {candidate['auc']:.4f}{best}"


def _broken(rule: dict[str, Any]) -> str:
    if rule["value"] is None:
        return f"{rule['rule']} {NOT_MEASURABLE.get(rule['rule'], 'cannot be measured')}"
    return f"{rule['rule']} {rule['value']:.4g} is not {rule['must_be']} {rule['limit']:g}"


def _at_least(rule: str, value: float | None, limit: float | None) -> dict[str, Any]:
    return {"rule": rule, "value": value, "must_be": ">=", "limit": limit,
            "passed": value is not None and limit is not None and value >= limit}  # fmt: skip


def _at_most(rule: str, value: float | None, limit: float | None) -> dict[str, Any]:
    return {"rule": rule, "value": value, "must_be": "<=", "limit": limit,
            "passed": value is not None and limit is not None and value <= limit}  # fmt: skip
