"""Every rule can reject, what could not be measured does not pass, and only the bytes on disk are judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.common.artifacts import write_json
from components.release import gate
from components.release.gate import GateConfig
from models.checkpoint import checkpoint_hash

CONFIG = GateConfig(
    min_auc=0.6, min_group_auc=0.55, max_calibration_error=0.05, max_logloss_ratio=1.0, max_auc_loss=0.002,
    max_slice_auc_loss=0.02, min_test_rows=1000,
)  # fmt: skip
POINTER = {"name": "ctr-ranker", "version": "v0.0.3", "model": "qin", "checkpoint_sha256": "c" * 64}


def figures(**changed: Any) -> dict[str, Any]:
    return {
        "rows": 1000, "auc": 0.7, "group_auc": 0.6, "calibration_error": 0.02, "logloss": 0.5, "base_logloss": 0.52,
    } | changed  # fmt: skip


class Run:
    """Checkpoints, evaluations, dataset and champion as the stages before would have left them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "dataset").mkdir()
        (root / "dataset" / "dataset.json").write_text(json.dumps({"data_sha256": "d" * 64, "schema_hash": "s" * 64}))
        self.champion(None)

    def champion(self, pointer: dict[str, Any] | None) -> None:
        write_json(self.root / "champion/champion.json", pointer or {"version": None})

    def add(self, model: str, champion: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
        folder = self.root / "checkpoints" / model
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors", "schema.json", "catalog.safetensors"):
            (folder / name).write_text(f"{name} of {model}")
        found = {
            "model": model, "checkpoint_sha256": checkpoint_hash(folder), "data_sha256": "d" * 64,
            "schema_hash": "s" * 64, "test": figures(**changed), "champion": champion,
            "slices": {
                "new users": {"auc": 0.65, "small": False, "rows": 500},
                "new items": {"auc": 0.5, "small": True, "rows": 9},
                "history 0": {"auc": None, "small": False, "rows": 300},
            },
        }  # fmt: skip
        self.write(model, found)
        return found

    def write(self, model: str, found: dict[str, Any]) -> None:
        file = self.root / "evaluate" / model / "evaluation.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))

    def __call__(self, config: GateConfig = CONFIG) -> dict[str, Any]:
        root = self.root
        output = root / "decision.json"
        decision = gate.run(
            config, root / "evaluate", root / "checkpoints", root / "dataset", root / "champion", output
        )
        assert json.loads(output.read_text()) == decision
        return decision


def measured(**changed: Any) -> dict[str, Any]:
    """A champion as `evaluate` measured it on the same rows."""
    slices = {
        "new users": {"auc": 0.65, "small": False, "rows": 500},
        "new items": {"auc": 0.9, "small": True, "rows": 9},
        "history 0": {"auc": None, "small": False, "rows": 300},
    }
    return {"version": "v0.0.3", "test": figures(**changed), "slices": slices}


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


def broken(decision: dict[str, Any], model: str = "qin") -> list[str]:
    return [rule["rule"] for rule in decision["candidates"][model]["rules"] if not rule["passed"]]


def test_the_first_run_is_judged_by_absolute_thresholds(run) -> None:
    found = run.add("qin")
    decision = run()
    assert decision["verdict"] == "approve"
    assert decision["model"] == "qin"
    assert decision["champion"] is None
    for name in ("checkpoint_sha256", "data_sha256", "schema_hash"):
        assert decision[name] == decision["candidates"]["qin"][name] == found[name]
    rules = {rule["rule"]: (rule["value"], rule["must_be"], rule["limit"]) for rule in
             decision["candidates"]["qin"]["rules"]}  # fmt: skip
    assert rules == {
        "test_rows": (1000, ">=", 1000), "auc": (0.7, ">=", 0.6), "group_auc": (0.6, ">=", 0.55),
        "calibration_error": (0.02, "<=", 0.05), "logloss_ratio": (0.5 / 0.52, "<=", 1.0),
    }  # fmt: skip
    assert decision["reasons"] == [
        "there is no champion yet: only the absolute thresholds are judged",
        "qin passes all 5 rules with AUC 0.7000, the highest AUC of those that pass",
    ]


@pytest.mark.parametrize(
    ("rule", "at_limit", "beyond"),
    [
        ("test_rows", {"rows": 1000}, {"rows": 999}),
        ("auc", {"auc": 0.6}, {"auc": 0.5999}),
        ("group_auc", {"group_auc": 0.55}, {"group_auc": 0.5499}),
        ("calibration_error", {"calibration_error": 0.05}, {"calibration_error": 0.0501}),
        ("logloss_ratio", {"logloss": 0.52}, {"logloss": 0.5201}),
    ],
)
def test_each_rule_rejects_beyond_its_limit_alone(run, rule, at_limit, beyond) -> None:
    run.add("qin", **at_limit)
    assert run()["verdict"] == "approve"
    run.add("qin", **beyond)
    decision = run()
    assert broken(decision) == [rule]
    assert (decision["verdict"], decision["model"], decision["checkpoint_sha256"]) == ("reject", None, None)
    assert decision["reasons"][1].startswith(f"qin fails 1 of 5 rules: {rule} ")


@pytest.mark.parametrize(
    ("figure", "value", "rules"),
    [
        ("auc", None, ["auc", "auc_loss"]),
        ("auc", float("nan"), ["auc", "auc_loss"]),
        ("group_auc", None, ["group_auc"]),
        ("calibration_error", float("nan"), ["calibration_error"]),
        ("logloss", float("nan"), ["logloss_ratio"]),
    ],
)
def test_what_could_not_be_measured_does_not_pass(figure, value, rules) -> None:
    champion = measured()
    metrics = {"test": figures(**{figure: value}), "champion": champion, "slices": champion["slices"]}
    assert [found["rule"] for found in gate.judge(CONFIG, metrics) if not found["passed"]] == rules


def test_the_reason_says_what_is_not_measurable_and_what_to_do(run) -> None:
    run.add("qin", group_auc=None)
    assert run()["reasons"][1] == (
        "qin fails 1 of 5 rules: group_auc cannot be measured: no user of the test days has both a click and a row "
        "without one; if your data are like this, set gate.min_group_auc to null"
    )


LIMITS = {
    "min_auc": ({"auc": 0.1}, "auc"),
    "min_group_auc": ({"group_auc": None}, "group_auc"),
    "max_calibration_error": ({"calibration_error": 0.9}, "calibration_error"),
    "max_logloss_ratio": ({"logloss": 9.0}, "logloss_ratio"),
    "min_test_rows": ({"rows": 3}, "test_rows"),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_null_leaves_a_rule_out_and_the_decision_says_so(run, limit) -> None:
    beyond, rule = LIMITS[limit]
    run.add("qin", **beyond)
    assert broken(run()) == [rule]
    decision = run(replace(CONFIG, **{limit: None}))
    assert decision["verdict"] == "approve"
    assert [r["rule"] for r in decision["candidates"]["qin"]["rules"] if r["rule"] == rule] == []
    assert decision["reasons"][1] == f"not judged, because they are null in params.yaml: gate.{limit}"
    assert decision["reasons"][2].startswith("qin passes all 4 rules")


def test_null_leaves_the_champions_rules_out(run) -> None:
    run.champion(POINTER)
    theirs = measured(auc=0.9)
    theirs["slices"]["new users"]["auc"] = 0.9
    run.add("qin", champion=theirs)
    assert broken(run()) == ["auc_loss", "auc_loss on new users"]
    assert broken(run(replace(CONFIG, max_auc_loss=None))) == ["auc_loss on new users"]
    decision = run(replace(CONFIG, max_auc_loss=None, max_slice_auc_loss=None))
    assert decision["verdict"] == "approve"
    assert decision["reasons"][0].endswith("null in params.yaml: gate.max_auc_loss, gate.max_slice_auc_loss")


def test_falling_behind_the_champion_rejects(run) -> None:
    run.champion(POINTER)
    run.add("qin", champion=measured(auc=0.7019))
    decision = run()
    assert decision["verdict"] == "approve"
    assert decision["champion"] == POINTER
    assert "no champion yet" not in " ".join(decision["reasons"])
    run.add("qin", champion=measured(auc=0.7021))
    assert broken(run()) == ["auc_loss"]
    assert run(replace(CONFIG, max_auc_loss=0.003))["verdict"] == "approve"


def test_a_slice_that_falls_behind_rejects_unless_it_is_small(run) -> None:
    run.champion(POINTER)
    theirs = measured()
    theirs["slices"]["new users"]["auc"] = 0.6699
    found = run.add("qin", champion=theirs)
    rules = [rule["rule"] for rule in run()["candidates"]["qin"]["rules"]]
    assert run()["verdict"] == "approve"  # though the champion's 0.9 on the small slice is far better
    assert rules[5:] == ["auc_loss", "auc_loss on new users"]
    found["champion"]["slices"]["new users"]["auc"] = 0.6701
    run.write("qin", found)
    assert broken(run()) == ["auc_loss on new users"]
    found["slices"]["new users"]["small"] = True
    run.write("qin", found)
    assert run()["verdict"] == "approve"


def test_the_best_of_those_that_pass_is_chosen(run) -> None:
    run.add("qin", auc=0.70)
    run.add("sdcnv3", auc=0.72)
    assert run()["model"] == "sdcnv3"
    run.add("qin", auc=0.73)
    decision = run()
    assert decision["model"] == "qin"
    assert decision["checkpoint_sha256"] == checkpoint_hash(run.root / "checkpoints/qin")
    run.add("qin", auc=0.80, calibration_error=0.3)  # better, and not allowed
    decision = run()
    assert (decision["verdict"], decision["model"]) == ("approve", "sdcnv3")
    assert [decision["candidates"][name]["passed"] for name in ("qin", "sdcnv3")] == [False, True]
    run.add("sdcnv3", auc=0.5)
    decision = run()
    assert (decision["verdict"], decision["model"]) == ("reject", None)
    assert len(decision["reasons"]) == 3


def test_only_the_bytes_on_disk_are_judged(run) -> None:
    found = run.add("qin")
    for key in ("checkpoint_sha256", "data_sha256", "schema_hash"):
        run.write("qin", {**found, key: "0" * 64})
        with pytest.raises(
            ValueError, match=rf"{key} is 0{{64}}, on disk is {found[key]}; run `dvc repro evaluate@qin`"
        ):
            run()
    run.write("qin", found)
    (run.root / "checkpoints/qin/model.safetensors").write_text("other weights")
    with pytest.raises(ValueError, match=r"checkpoint_sha256 is .*run `dvc repro evaluate@qin`"):
        run()
    assert not (run.root / "decision.json").exists()


def test_another_champion_than_now_is_refused(run) -> None:
    run.add("qin")
    run.champion(POINTER)
    with pytest.raises(ValueError, match=r"measured against no champion, .*champion names v0\.0\.3; .*evaluate@qin"):
        run()
    run.add("qin", champion=measured() | {"version": "v0.0.2"})
    with pytest.raises(ValueError, match=r"measured against v0\.0\.2, .*champion names v0\.0\.3"):
        run()
    run.champion(None)
    with pytest.raises(ValueError, match=r"measured against v0\.0\.2, .*champion names no champion"):
        run()


def test_nothing_evaluated_is_no_verdict(run) -> None:
    with pytest.raises(ValueError, match=r"evaluate holds no evaluation; run `dvc repro evaluate`"):
        run()


@pytest.mark.parametrize("key", ["min_auc", "min_group_auc"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_bad_value_is_named(key, value) -> None:
    with pytest.raises(ValueError, match=rf"{key} is {value}; an AUC lies in \[0, 1\]"):
        replace(CONFIG, **{key: value})


def test_figures_are_readable(run) -> None:
    assert [gate.number(n) for n in (123456, 0.61234, 1.0)] == ["123,456", "0.6123", "1"]
    assert gate.number(0.5999999, 0.6) == "0.5999999"  # 0.6 is not >= 0.6 would help nobody
    run.add("qin", rows=9_999)
    assert "test_rows 9,999 is not >= 10,000" in run(replace(CONFIG, min_test_rows=10_000))["reasons"][1]


def test_the_summary_is_the_verdict_in_words(run) -> None:
    run.add("qin")
    run.add("sdcnv3", auc=0.5)
    assert gate.summary(run(replace(CONFIG, min_group_auc=None))) == {
        "verdict": "approved: qin",
        "champion": "none yet: only the absolute thresholds are judged",
        "not judged": "gate.min_group_auc (null)",
        "qin": "passes all 4 rules with AUC 0.7000",
        "sdcnv3": "fails 1 of 4 rules: auc 0.5 is not >= 0.6",
    }
    run.champion(POINTER)
    for model in ("qin", "sdcnv3"):
        run.add(model, auc=0.5, champion=measured())
    found = gate.summary(run())
    assert found["verdict"] == "rejected: no model passes, so nothing ships"
    assert found["champion"] == "v0.0.3" and found["qin"].startswith("fails 2 of 7 rules: auc 0.5 is not >= 0.6; auc")
