"""gate: may a model ship? Rules and the champion -> decision.json, which names the bytes that were judged.

If the gate rejects every model, the run succeeds and ships nothing. Every model is judged by every rule. Of those that
pass, the gate chooses the one with the highest test AUC.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.common.artifacts import read_json, write_json
from components.common.champion import POINTER, read_pointer

NOT_MEASURABLE = {
    "group_auc": "cannot be measured: no user of the test days has both a click and a row without one; if your data "
    "are like this, set gate.min_group_auc to null"
}


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """min_auc, min_group_auc, min_test_rows, max_calibration_error   absolute thresholds on the test days
    max_logloss_ratio   of the logloss of always predicting the test days' click rate
    max_auc_loss        the most that the AUC may be below the champion's on the same rows
    max_slice_auc_loss  the same for every slice that is not small

    null leaves a rule out, and the decision says so. Use it for a figure that the data cannot give.
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
        measured, named = ((one or {}).get("version", "no champion") for one in (metrics["champion"], current))
        if measured != named:
            raise ValueError(
                f"{file}: measured against {measured}, {champion} names {named}; run `dvc repro evaluate@{name}`"
            )
        rules = judge(config, metrics)
        passed = all(rule["passed"] for rule in rules)
        candidates[name] = {**judged, "auc": metrics["test"]["auc"], "passed": passed, "rules": rules}
    if not candidates:
        raise ValueError(f"{evaluations} holds no evaluation; run `dvc repro evaluate`")
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
        "left_out": config.left_out,
    }
    decision["reasons"] = list(reasons(decision))
    write_json(output, decision)
    return decision


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


def reasons(decision: dict[str, Any]) -> Iterator[str]:
    """The verdict in sentences."""
    if decision["champion"] is None:
        yield "there is no champion yet: only the absolute thresholds are judged"
    if decision["left_out"]:
        names = ", ".join(f"gate.{name}" for name in decision["left_out"])
        yield f"not judged, because they are null in params.yaml: {names}"
    for name, candidate in decision["candidates"].items():
        best = ", the highest AUC of those that pass" if name == decision["model"] else ""
        yield f"{name} {_result(candidate)}{best}"


def _result(candidate: dict[str, Any]) -> str:
    count, broken = len(candidate["rules"]), [rule for rule in candidate["rules"] if not rule["passed"]]
    if broken:
        return f"fails {len(broken)} of {count} rules: {'; '.join(map(_broken, broken))}"
    return f"passes all {count} rules with AUC {candidate['auc']:.4f}"


def _broken(rule: dict[str, Any]) -> str:
    if rule["value"] is None:
        return f"{rule['rule']} {NOT_MEASURABLE.get(rule['rule'], 'cannot be measured')}"
    return f"{rule['rule']} {number(rule['value'], rule['limit'])} is not {rule['must_be']} {number(rule['limit'])}"


def number(value: float, limit: float | None = None) -> str:
    """12,345 or four digits of a fraction; more digits where four would read like the limit that it is not."""
    if isinstance(value, int):
        return f"{value:,}"
    texts = (f"{value:,.{digits}g}" for digits in range(4, 18))
    return next((text for text in texts if value == limit or float(text.replace(",", "")) != limit), str(value))


def summary(found: dict[str, Any]) -> dict[str, str]:
    """The decision for a person."""
    model, champion = found["model"], found["champion"]
    said = {
        "verdict": f"approved: {model}" if model else "rejected: no model passes, so nothing ships",
        "champion": champion["version"] if champion else "none yet: only the absolute thresholds are judged",
    }
    if found["left_out"]:
        said["not judged"] = ", ".join(f"gate.{name} (null)" for name in found["left_out"])
    return said | {name: _result(candidate) for name, candidate in found["candidates"].items()}


def _at_least(rule: str, value: float | None, limit: float | None) -> dict[str, Any]:
    return {"rule": rule, "value": value, "must_be": ">=", "limit": limit,
            "passed": value is not None and limit is not None and value >= limit}  # fmt: skip


def _at_most(rule: str, value: float | None, limit: float | None) -> dict[str, Any]:
    return {"rule": rule, "value": value, "must_be": "<=", "limit": limit,
            "passed": value is not None and limit is not None and value <= limit}  # fmt: skip
