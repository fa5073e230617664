"""What the stages would have left for a page, written by hand, a part at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from components.data.rules import SEVERITIES, STOP, WARN

SOURCE = {
    "source": "simulator", "impressions": 9000, "label_rate": 0.2, "days": 6, "first_day": "2026-10-01",
    "last_day": "2026-10-06", "users": 300, "items": 120, "until": "2026-10-07T00:00:00+00:00",
}  # fmt: skip
CHAMPION_AUC, ORACLE_AUC = 0.6543, 0.8271


def figures(auc: float) -> dict[str, Any]:
    """Of the test days, as `evaluate` writes them."""
    values = {
        "auc": auc, "group_auc": None, "logloss": 0.4321, "calibration_error": 0.0123, "calibration_slope": 0.97,
        "calibration_intercept": -0.021, "normalised_entropy": 0.91, "average_precision": 0.4,
    }  # fmt: skip
    ends = {name: None if value is None else [value - 0.02, value + 0.02] for name, value in values.items()}
    return values | {"rows": 1500, "label_rate": 0.2, "base_logloss": 0.5, "intervals": ends}


def difference(value: float, se: float = 0.002) -> dict[str, float]:
    return {"value": value, "se": se, "low": value - 1.96 * se, "high": value + 1.96 * se}


def evaluation(model: str, auc: float, champion: bool) -> dict[str, Any]:
    """The champion is v0.0.4; v0.0.3 was one before."""
    test = figures(auc) | {"oracle_auc": ORACLE_AUC, "oracle_logloss": 0.3111}
    slices = {"new users": {"rows": 321, "auc": auc - 0.01}, "new items": {"rows": 12, "auc": None}}
    slices |= {f"popularity {n}0%-{n + 1}0%": {"rows": 1000 * n, "auc": auc} for n in range(1, 4)}
    theirs = [
        {
            "version": version, "configuration": "c", "test": figures(of_theirs), "newest": difference(auc - of_theirs),
            "difference": {"auc": difference(auc - of_theirs)}, "score_drift": 0.01,
            "slices": {
                name: difference(auc - of_theirs, 0.004) if part["auc"] else None for name, part in slices.items()
            },
        }
        for version, of_theirs in (("v0.0.4", CHAMPION_AUC), ("v0.0.3", CHAMPION_AUC - 0.01))
    ]  # fmt: skip
    earned = {
        "rows": 1500, "effective_rows": 456.0, **difference(0.31, 0.01), "logged": difference(0.2, 0.005),
        "champion": {"version": "v0.0.4", "effective_rows": 400.0, **difference(0.3)} if champion else None,
    }  # fmt: skip
    return {"model": model, "test": test, "slices": slices, "references": theirs if champion else [], "policy": earned}


def rule(name: str, value: float | None, must_be: str, limit: Any, passed: bool | None, why: str,
         interval: Any = None) -> dict[str, Any]:  # fmt: skip
    return {"rule": name, "value": value, "interval": interval, "must_be": must_be, "limit": limit, "passed": passed,
            "why": why}  # fmt: skip


# A rule as `validate` reports it, with the severities that it writes.
HOLDS = {
    "table": "events", "column": "label", "rule": "expect_column_values_to_be_in_set", "says": None, "limits": {},
    "severity": SEVERITIES[STOP], "passed": True, "broken_rows": 0, "observed": None, "examples": [],
}  # fmt: skip
STOPS = {
    **HOLDS, "passed": False, "says": "a label is 0 or 1", "broken_rows": 12345,
    "examples": [{"row": 7, "label": 9, "note": "[bold]" + "x" * 900}],
}  # fmt: skip
WARNS = {**HOLDS, "column": "is_first", "says": "no impression is there twice", "severity": SEVERITIES[WARN],
         "passed": False, "observed": 0.5}  # fmt: skip


class Project:
    """What the stages would have left, written a part at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, content: Any) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))

    def source(self) -> None:
        self.write("data/canonical/source.json", SOURCE)

    def validated(self, *broken: dict[str, Any]) -> None:
        """As `validate` writes it: a rule that holds, and those that are broken."""
        stopped = any(rule["severity"] == "stop" for rule in broken)
        report = {"passed": not stopped, "quarantined": {"no such user": 1234}, "rules": [HOLDS, *broken]}
        self.write("data/validation/report.json", report)

    def trained(self, model: str) -> None:
        self.write(f"artifacts/train/{model}.json", {"valid_auc": 0.6789})
        self.write(f"checkpoints/{model}/config.json", {"facts": {}})
        self.write(f"artifacts/train/{model}_history.csv", "epoch,valid_auc\n1,0.61\n2,0.66\n")

    def evaluated(self, model: str, auc: float, champion: bool = False) -> None:
        folder = f"artifacts/evaluate/{model}"
        self.write(f"{folder}/evaluation.json", evaluation(model, auc, champion))
        self.write(f"{folder}/calibration.csv", "predicted,observed,rows\n0.1,0.12,750\n0.4,0.35,750\n")
        self.write(f"{folder}/roc.csv", "false_positive_rate,true_positive_rate\n0,0\n0.5,0.8\n1,1\n")

    def everything(self) -> None:
        self.source()
        self.validated(WARNS)
        splits = {"train": [0, 6000], "valid": [6000, 7500], "test": [7500, 9000]}
        self.write("data/dataset/dataset.json", {"splits": splits, "bytes_per_row": 31})
        for model, auc in (("qin", 0.7123), ("sdcnv3", 0.6987)):
            self.trained(model)
            self.evaluated(model, auc, champion=True)
        self.decided()
        package = {"built": True, "tag": "ctr-ranker:qin-0123", "judged_sha256": "j"}
        self.write("artifacts/package/package.json", package)
        self.write("artifacts/smoke/smoke.json", {"served": True, "golden_requests": 20})
        smoke = {"seconds": 9.1, "latency_ms": {"p50": 3.21, "p99": 9.87}, "max_abs_error": 1.2e-7}
        self.write(".scratch/stages/smoke.json", smoke)
        train = {"seconds": 12.3, "peak_mib": 4567, "rows_per_second": 45678}
        self.write(".scratch/stages/train@qin.json", train)

    def decided(self) -> None:
        """qin is approved as a refresh, and its refit ships; sdcnv3 fails a rule."""
        beside = "AUC +0.0580 beside v0.0.4, at least +0.0541; the margin is 0.0077"
        qin = [
            rule("test_rows", 1500, ">=", 1000, True, "1,500 is >= 1,000"),
            rule("auc_loss on new items", None, "<=", 0.02, None, "one class alone"),
            rule("no worse than v0.0.4", 0.058, "lower end >=", -0.0077, True, beside, [0.0541, 0.0619]),
        ]
        sdcnv3 = [
            rule("calibration_slope", 1.5, "within", [0.8, 1.25], False, "1.5 is not within 0.8 to 1.25", [1.4, 1.6])
        ]
        order = {"equal_to_best": True, "valid_auc": 0.7, "behind": 0.0, "sd": 0.001}
        decision = {
            "verdict": "approve", "model": "qin", "kind": "refresh", "reasons": ["qin passes <b>all</b> rules & more"],
            "checkpoint_sha256": "j", "champion": {"version": "v0.0.4"},
            "order": {"qin": order | {"cost": 5}, "sdcnv3": order | {"cost": 9}},
            "candidates": {
                "qin": {"kind": "refresh", "passed": True, "auc": 0.7123, "rules": qin},
                "sdcnv3": {"kind": "change", "passed": False, "auc": 0.6987, "rules": sdcnv3},
            },
        }  # fmt: skip
        self.write("artifacts/gate/decision.json", decision)
        checks = [{"rule": "correlation", "value": 0.987, "must_be": ">=", "limit": 0.5, "passed": True}]
        shipped = {"kind": "refit", "train_until": "2026-10-07T00:00:00+00:00", "checks": checks,
                   "reasons": ["the refit passes all 1 checks"]}  # fmt: skip
        self.write("artifacts/refit/decision.json", decision | {"shipped": shipped})
