"""gate: may a model ship? Rules, the champion and earlier versions -> decision.json, which names the judged bytes.

Each model is a *refresh*, if its configuration is the champion's (family, settings, features, code of the models), or
a *change*. A refresh must not be worse than the champion, nor than the earlier versions, by more than a margin. A
change must be better than the champion, by the evidence of all its nights. See `evidence.py` for both.

Which model is tried first, the valid days say; if their figures are as good as equal, the model that costs less. The
test days judge it. If it is a change that is not proven yet, the refresh may ship. If no model passes, the run succeeds
and ships nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from components.common.artifacts import read_json, write_json
from components.common.champion import POINTER, read_pointer
from components.release import evidence, statistics
from components.release.rules import absolute_rules, broken, guard_rails, no_worse, proven


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """min_auc, min_group_auc, min_test_rows, max_calibration_error   absolute limits on the test days
    max_logloss_ratio      of the logloss of always predicting the test days' click rate
    max_calibration_shift  the most that the log-odds may be off on average, up or down
    calibration_slope      lowest and highest slope of the labels on the log-odds
    margin           how much worse than another version a refresh may be; auto: the smallest margin with which an
                     equally good refresh passes 95% of the nights
    gain             the AUC over the champion's that the evidence for a change is computed for
    alpha            probability of promoting any change without a gain within `look_back` days; null: a change is
                     judged as a refresh
    spread           standard deviation of the AUC over seeds, as long as few nights have measured it
    look_back        days whose nights count for the evidence, for the number of changes and for the spread
    max_gain         more than this above the champion is no gain but a leak of the label
    max_slice_loss   the most that a slice's AUC may lose against the champion, and the same for group AUC
    max_score_drift  population stability index between the champion's scores and these, on the same requests
    max_policy_loss  clicks a row that the ranking may earn less than the champion's, by the off-policy view. Left out
                     where the rows tell no propensity
    min_volume       training rows as a share of the champion's

    null leaves a rule out, and the decision says so. Use it for a figure that the data cannot give.
    """

    min_auc: float | None
    min_group_auc: float | None
    min_test_rows: int | None
    max_calibration_error: float | None
    max_logloss_ratio: float | None
    max_calibration_shift: float | None
    calibration_slope: tuple[float, float] | None
    margin: float | Literal["auto"]
    gain: float
    alpha: float | None
    spread: float
    look_back: int
    max_gain: float | None
    max_slice_loss: float | None
    max_score_drift: float | None
    max_policy_loss: float | None
    min_volume: float | None

    def __post_init__(self) -> None:
        for name in ("min_auc", "min_group_auc"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; an AUC lies in [0, 1]")
        if self.alpha is not None and not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha is {self.alpha}; it is a probability in (0, 0.5)")
        for name in ("gain", "spread", "look_back"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")

    @property
    def left_out(self) -> list[str]:
        """The rules that are null."""
        return [name for name, limit in asdict(self).items() if limit is None]


def run(
    config: GateConfig, evaluations: Path, checkpoints: Path, dataset: Path, champion: Path, output: Path
) -> dict[str, Any]:
    """Judge every evaluated model. Raises ValueError where an evaluation is not of the checkpoint or data on disk."""
    data = read_json(dataset / "dataset.json", "dataset")
    current = read_pointer(champion / POINTER)
    measured = {}
    for file in sorted(evaluations.glob("*/evaluation.json")):
        found = read_json(file, f"evaluate@{file.parent.name}")
        require_same(found, file, checkpoints, data, current)
        measured[found["model"]] = found
    if not measured:
        raise ValueError(f"{evaluations} holds no evaluation; run `dvc repro evaluate`")
    nights = recent((current or {}).get("nights", []), data["ends"], config.look_back)
    spread = evidence.measured_spread(*_refreshes(nights), assumed=config.spread)
    order, preference = preferred(measured, evaluations, spread)
    candidates = {name: judge(config, measured[name], nights, spread) for name in order}
    chosen = next((name for name in order if candidates[name]["passed"]), None)
    decision = {
        "verdict": "approve" if chosen else "reject",
        "model": chosen,
        "kind": candidates[chosen]["kind"] if chosen else None,
        "checkpoint_sha256": candidates[chosen]["checkpoint_sha256"] if chosen else None,
        "data_sha256": data["data_sha256"],
        "schema_hash": data["schema_hash"],
        "champion": current and {key: value for key, value in current.items() if key not in ("nights", "earlier")},
        "candidates": candidates,
        "order": preference,
        "spread": {"value": spread, "nights": len(_refreshes(nights)[0]), "assumed": config.spread},
        "night": night(measured, candidates, data),
        "left_out": config.left_out,
        "no_propensities": current is not None
        and config.max_policy_loss is not None
        and all(found["policy"] is None for found in measured.values()),
    }
    decision["reasons"] = list(reasons(decision))
    write_json(output, decision)
    return decision


def recent(nights: list[dict[str, Any]], ends: str | None, look_back: int) -> list[dict[str, Any]]:
    """The nights of the last `look_back` days; none for data without times."""
    if ends is None:
        return []
    first = str(date.fromisoformat(ends) - timedelta(days=look_back))
    return [night for night in nights if night["ends"] and first < night["ends"] < ends]


def require_same(
    found: dict[str, Any], file: Path, checkpoints: Path, data: dict[str, Any], current: dict[str, Any] | None
) -> None:
    """Raises ValueError where an evaluation is of other bytes, or beside another champion."""
    from models.checkpoint import checkpoint_hash

    name = found["model"]
    on_disk = {
        "checkpoint_sha256": checkpoint_hash(checkpoints / name),
        "data_sha256": data["data_sha256"],
        "schema_hash": data["schema_hash"],
    }
    for key, wanted in on_disk.items():
        if found[key] != wanted:
            raise ValueError(f"{file}: {key} is {found[key]}, on disk is {wanted}; run `dvc repro evaluate@{name}`")
    versions = [reference["version"] for reference in found["references"]]
    wanted = [] if current is None else [version["version"] for version in (current, *current.get("earlier", ()))]
    if versions != wanted:
        raise ValueError(
            f"{file}: measured beside {versions or 'no champion'}, the champion and the versions before it are "
            f"{wanted or 'none'}; run `dvc repro evaluate@{name}`"
        )


def preferred(measured: dict[str, Any], evaluations: Path, spread: float) -> tuple[list[str], dict[str, Any]]:
    """The models in the order in which they are tried, and why.

    The valid days say which is best. Models as good as the best, as far as rows and seeds let us tell, come by cost.
    """
    scored = {name: pq.read_table(evaluations / name / "valid.parquet") for name in measured}
    table = next(iter(scored.values()))
    labels, units = table["label"].to_numpy(), statistics.units_of(table["user_id"].to_numpy())
    scores = {name: table["score"].to_numpy() for name, table in scored.items()}
    valid = {name: statistics.auc(labels, of_model, units).value for name, of_model in scores.items()}
    best = max(valid, key=lambda name: (valid[name], name))
    cost = {name: found["cost"] for name, found in measured.items()}
    behind = {}
    for name in valid:
        found = statistics.auc(labels, scores[best], units, minus=scores[name])
        behind[name] = {"valid_auc": valid[name], "behind": found.value, "sd": evidence.sd(found.se, spread),
                        "cost": cost[name]}  # fmt: skip
    equal = {name for name, one in behind.items() if one["behind"] <= one["sd"]}
    order = sorted(valid, key=lambda name: (0, cost[name], name) if name in equal else (1, -valid[name], name))
    return order, {name: behind[name] | {"equal_to_best": name in equal} for name in order}


def judge(config: GateConfig, metrics: dict[str, Any], nights: list[dict[str, Any]], spread: float) -> dict[str, Any]:
    """Every rule that has a limit, with its value and verdict."""
    test, references = metrics["test"], metrics["references"]
    rules = list(absolute_rules(config, test))
    kind = "first"
    if references:
        champion = references[0]
        kind = "refresh" if metrics["configuration"] == champion["configuration"] else "change"
        rules += guard_rails(config, metrics, champion)
        if kind == "refresh" or config.alpha is None:
            rules += [no_worse(config, reference, len(references), spread) for reference in references]
        else:
            rules.append(proven(config, *_history(metrics, nights), spread))
    rules = [rule for rule in rules if rule["limit"] is not None]
    return {
        "kind": kind,
        "configuration": metrics["configuration"],
        "checkpoint_sha256": metrics["checkpoint_sha256"],
        "data_sha256": metrics["data_sha256"],
        "schema_hash": metrics["schema_hash"],
        "auc": test["auc"],
        "passed": not broken(rules),
        "rules": rules,
    }


def night(measured: dict[str, Any], candidates: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """What later nights need of this one: each model's difference to the champion on the newest day's rows, which no
    earlier night has used."""
    models = [
        {
            "model": name,
            "kind": candidates[name]["kind"],
            "configuration": found["configuration"],
            "against": found["references"][0]["version"],
            "difference": found["references"][0]["newest"]["value"],
            "se": found["references"][0]["newest"]["se"],
        }
        for name, found in measured.items()
        if found["references"] and found["references"][0]["newest"] is not None
    ]
    return {"ends": data["ends"], "models": models}


def _history(metrics: dict[str, Any], nights: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The nights of a change's configuration, tonight last; and the how-manieth change it is."""
    changes = [one for night in nights for one in night["models"] if one["kind"] == "change"]
    known = list(dict.fromkeys(one["configuration"] for one in changes))
    mine = metrics["configuration"]
    own = [one for one in changes if one["configuration"] == mine]
    number = known.index(mine) + 1 if mine in known else len(known) + 1
    champion = metrics["references"][0]
    if champion["newest"] is not None:
        own = [*own, champion["newest"] | {"against": champion["version"], "difference": champion["newest"]["value"]}]
    return own, number


def _refreshes(nights: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Differences of refreshes to champions of their own configuration, and the standard errors of these."""
    found = [one for night in nights for one in night["models"] if one["kind"] == "refresh"]
    return [one["difference"] for one in found], [one["se"] for one in found]


def reasons(decision: dict[str, Any]) -> Iterator[str]:
    """The verdict in sentences."""
    if decision["champion"] is None:
        yield "there is no champion yet: only the absolute limits are judged"
    if decision["left_out"]:
        names = ", ".join(f"gate.{name}" for name in decision["left_out"])
        yield f"not judged, because they are null in params.yaml: {names}"
    for name, candidate in decision["candidates"].items():
        first = ", and it comes first by the valid days and by cost" if name == decision["model"] else ""
        yield f"{name}, {_KINDS[candidate['kind']]}, {_result(candidate)}{first}"
    if decision["no_propensities"]:
        yield "gate.max_policy_loss is not judged: the test rows have no propensities that can be used"


_KINDS = {"first": "the first of its kind", "refresh": "a refresh", "change": "a change"}


def _result(candidate: dict[str, Any]) -> str:
    rules = candidate["rules"]
    unjudged = sum(rule["passed"] is None for rule in rules)
    few = f" ({unjudged} cannot be judged with so few rows)" if unjudged else ""
    if failed := broken(rules):
        said = "; ".join(f"{rule['rule']}: {rule['why']}" for rule in failed)
        return f"fails {len(failed)} of {len(rules)} rules{few}: {said}"
    return f"passes {len(rules) - unjudged} of {len(rules)} rules{few} with AUC {candidate['auc']:.4f}"


def summary(found: dict[str, Any]) -> dict[str, str]:
    """The decision for a person."""
    model, champion = found["model"], found["champion"]
    said = {
        "verdict": f"approved: {model}, {_KINDS[found['kind']]}"
        if model
        else "rejected: no model passes, so nothing ships",
        "champion": champion["version"] if champion else "none yet: only the absolute limits are judged",
        "tried first": ", ".join(found["order"]),
    }
    if found["left_out"]:
        said["not judged"] = ", ".join(f"gate.{name} (null)" for name in found["left_out"])
    return said | {name: _result(candidate) for name, candidate in found["candidates"].items()}
