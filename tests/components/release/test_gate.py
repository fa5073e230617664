"""Every rule can reject, what could not be measured does not pass, and only the bytes on disk are judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.common.artifacts import write_json
from components.release import gate, rules
from components.release.gate import GateConfig
from models.checkpoint import checkpoint_hash

CONFIG = GateConfig(
    min_auc=0.6, min_group_auc=0.55, min_test_rows=1000, max_calibration_error=0.05, max_logloss_ratio=1.0,
    max_calibration_shift=0.2, calibration_slope=(0.8, 1.25), margin="auto", gain=0.002, alpha=0.05, spread=0.0005,
    look_back=30, max_gain=0.03, max_slice_loss=0.02, max_score_drift=0.25, max_policy_loss=0.01, min_volume=0.5,
)  # fmt: skip
POINTER = {"name": "ctr-ranker", "version": "v0.0.3", "model": "qin", "judged_sha256": "c" * 64}
SE = 0.0003
ABSOLUTE = [
    "test_rows", "auc", "group_auc", "calibration_error", "logloss_ratio", "calibration_shift", "calibration_slope",
]  # fmt: skip


def figures(**changed: Any) -> dict[str, Any]:
    found = {
        "rows": 1000, "auc": 0.7, "group_auc": 0.6, "calibration_error": 0.02, "logloss": 0.5, "base_logloss": 0.52,
        "normalised_entropy": 0.96, "calibration_intercept": 0.01, "calibration_slope": 1.02, "average_precision": 0.4,
    } | changed  # fmt: skip
    ends = {name: None if found[name] is None else [found[name] - 0.01, found[name] + 0.01] for name in found}
    return found | {"intervals": ends}


def gained(value: float, se: float = SE) -> dict[str, float]:
    return {"value": value, "se": se, "low": value - 1.96 * se, "high": value + 1.96 * se}


def reference(auc: float = 0.0, version: str = "v0.0.3", **changed: Any) -> dict[str, Any]:
    """A version as `evaluate` measured it on the same rows; `auc` is what the model adds to it."""
    return {
        "version": version, "checkpoint_sha256": "c" * 64, "configuration": "as before", "train_rows": 9000,
        "test": figures(), "difference": {"auc": gained(auc), "group_auc": gained(auc)}, "newest": gained(auc),
        "score_drift": 0.01, "slices": {"new users": gained(auc, 0.004), "new items": gained(auc, 0.03), "tv": None},
    } | changed  # fmt: skip


class Run:
    """Checkpoints, evaluations, dataset and champion as the stages before would have left them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "dataset").mkdir()
        facts = {"data_sha256": "d" * 64, "schema_hash": "s" * 64, "ends": "2026-01-11"}
        (root / "dataset" / "dataset.json").write_text(json.dumps(facts))
        self.champion(None)

    def champion(self, pointer: dict[str, Any] | None, **more: Any) -> None:
        write_json(self.root / "champion/champion.json", pointer | more if pointer else {"version": None})

    def add(
        self, model: str, *references: dict[str, Any], skill: float = 1.0, cost: int = 100,
        configuration: str = "as before", policy: dict[str, Any] | None = None, **changed: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """skill  how well the scores of the valid days follow the labels"""
        folder = self.root / "checkpoints" / model
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors", "schema.json", "catalog.safetensors"):
            (folder / name).write_text(f"{name} of {model}")
        found = {
            "model": model, "checkpoint_sha256": checkpoint_hash(folder), "data_sha256": "d" * 64,
            "schema_hash": "s" * 64, "configuration": configuration, "train_rows": 10_000, "cost": cost,
            "test": figures(**changed), "policy": policy, "slices": {}, "references": list(references),
        }  # fmt: skip
        self.write(model, found)
        rng = np.random.default_rng(0)
        label = rng.integers(0, 2, 4000).astype(np.int8)
        score = 1 / (1 + np.exp(-skill * (label - 0.5) - rng.normal(size=4000)))
        table = pa.table({"user_id": np.arange(4000) // 8, "label": label, "score": score})
        pq.write_table(table, self.root / "evaluate" / model / "valid.parquet")
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


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def nightly(run) -> Run:
    """A run with a champion."""
    run.champion(POINTER)
    return run


def broken(decision: dict[str, Any], model: str = "qin") -> list[str]:
    return [rule["rule"] for rule in decision["candidates"][model]["rules"] if rule["passed"] is False]


# ---- absolute rules ---------------------------------------------------------------------------------------------


def test_the_first_run_is_judged_by_absolute_limits(run) -> None:
    found = run.add("qin")
    decision = run()
    assert (decision["verdict"], decision["model"], decision["kind"]) == ("approve", "qin", "first")
    assert decision["champion"] is None
    for name in ("checkpoint_sha256", "data_sha256", "schema_hash"):
        assert decision[name] == decision["candidates"]["qin"][name] == found[name]
    assert [rule["rule"] for rule in decision["candidates"]["qin"]["rules"]] == ABSOLUTE
    assert decision["reasons"] == [
        "there is no champion yet: only the absolute limits are judged",
        "qin, the first of its kind, passes 7 of 7 rules with AUC 0.7000, and it comes first by the valid days and by "
        "cost",
    ]


BEYOND = [
    ("test_rows", {"rows": 1000}, {"rows": 999}),
    ("auc", {"auc": 0.6}, {"auc": 0.5999}),
    ("group_auc", {"group_auc": 0.55}, {"group_auc": 0.5499}),
    ("calibration_error", {"calibration_error": 0.05}, {"calibration_error": 0.0501}),
    ("logloss_ratio", {"normalised_entropy": 1.0}, {"normalised_entropy": 1.0001}),
    ("calibration_shift", {"calibration_intercept": 0.205}, {"calibration_intercept": 0.22}),  # ± .01 of interval
    ("calibration_shift", {"calibration_intercept": -0.205}, {"calibration_intercept": -0.22}),
    ("calibration_slope", {"calibration_slope": 0.795}, {"calibration_slope": 0.78}),
]


@pytest.mark.parametrize(("rule", "at_limit", "beyond"), BEYOND)
def test_each_rule_rejects_beyond_its_limit_alone(run, rule, at_limit, beyond) -> None:
    run.add("qin", **at_limit)
    assert run()["verdict"] == "approve"
    run.add("qin", **beyond)
    decision = run()
    assert broken(decision) == [rule]
    assert (decision["verdict"], decision["model"], decision["checkpoint_sha256"]) == ("reject", None, None)
    assert decision["reasons"][1].startswith(f"qin, the first of its kind, fails 1 of 7 rules: {rule}: ")


@pytest.mark.parametrize(
    ("figure", "rule"),
    [
        ("auc", "auc"), ("group_auc", "group_auc"), ("calibration_error", "calibration_error"),
        ("normalised_entropy", "logloss_ratio"), ("calibration_intercept", "calibration_shift"),
        ("calibration_slope", "calibration_slope"),
    ],
)  # fmt: skip
def test_what_could_not_be_measured_does_not_pass(run, figure, rule) -> None:
    run.add("qin", **{figure: None})
    decision = run()
    assert broken(decision) == [rule]
    assert f"{rule}: cannot be measured" in decision["reasons"][1]


def test_null_leaves_a_rule_out_and_the_decision_says_so(run) -> None:
    run.add("qin", group_auc=None)
    assert "set gate.min_group_auc to null" in run()["reasons"][1]
    decision = run(replace(CONFIG, min_group_auc=None))
    assert decision["verdict"] == "approve"
    assert decision["reasons"][1] == "not judged, because they are null in params.yaml: gate.min_group_auc"


# ---- beside the champion ----------------------------------------------------------------------------------------


def test_a_refresh_may_be_worse_by_what_rows_and_seeds_explain(nightly) -> None:
    nightly.add("qin", reference(-0.0005))
    decision = nightly()
    assert (decision["verdict"], decision["kind"], decision["champion"]) == ("approve", "refresh", POINTER)
    (rule,) = [rule for rule in decision["candidates"]["qin"]["rules"] if rule["rule"] == "no worse than v0.0.3"]
    assert rule["margin"] == pytest.approx(2 * 1.6449 * np.hypot(SE, np.sqrt(2) * 0.0005), rel=1e-3)
    nightly.add("qin", reference(-0.002))
    assert broken(nightly()) == ["no worse than v0.0.3"]
    assert nightly(replace(CONFIG, margin=0.01))["verdict"] == "approve"
    nightly.add("qin", reference(-0.0005))
    assert broken(nightly(replace(CONFIG, margin=0.0005))) == ["no worse than v0.0.3"]


def test_small_losses_do_not_add_up(nightly) -> None:
    """As good as the champion, which is as good as the one before it: and much worse than that of eight days ago."""
    earlier = [{"version": "v0.0.1", "judged_sha256": "e" * 64}]
    nightly.champion(POINTER, earlier=earlier)
    nightly.add("qin", reference(-0.0004), reference(-0.004, "v0.0.1"))
    assert broken(nightly()) == ["no worse than v0.0.1"]
    nightly.add("qin", reference(-0.0004), reference(-0.0008, "v0.0.1"))
    assert nightly()["verdict"] == "approve"


def test_a_change_must_be_better_by_the_evidence_of_its_nights(nightly) -> None:
    nightly.add("qin", reference(0.001), configuration="new")
    decision = nightly()
    assert decision["candidates"]["qin"]["kind"] == "change"
    assert broken(decision) == ["better than the champion"]
    assert "the evidence of 1 night(s)" in decision["reasons"][0]
    model: dict[str, Any] = {
        "model": "qin",
        "kind": "change",
        "configuration": "new",
        "against": "v0.0.3",
        "difference": 0.002,
        "se": SE,
    }
    nightly.champion(POINTER, nights=[{"ends": f"2026-01-0{day}", "models": [model]} for day in range(5, 9)])
    nightly.add("qin", reference(0.0025), configuration="new")
    decision = nightly()
    assert (decision["verdict"], decision["kind"]) == ("approve", "change")
    assert decision["night"] == {"ends": "2026-01-11", "models": [model | {"difference": 0.0025}]}
    assert decision["champion"] == POINTER


def test_the_next_change_needs_more_evidence(nightly) -> None:
    other = {
        "model": "qin",
        "kind": "change",
        "configuration": "other",
        "against": "v0.0.3",
        "difference": 0.0,
        "se": SE,
    }
    nightly.add("qin", reference(0.004), configuration="new")
    first = nightly()["candidates"]["qin"]["rules"][-1]
    nightly.champion(POINTER, nights=[{"ends": "2026-01-10", "models": [other]}])
    second = nightly()["candidates"]["qin"]["rules"][-1]
    assert (first["change"], second["change"]) == (1, 2)
    assert (first["limit"], second["limit"]) == pytest.approx((np.log(40), np.log(120)))
    assert first["value"] == second["value"]


def test_a_change_that_is_not_proven_leaves_the_refresh_its_turn(nightly) -> None:
    nightly.add("qin", reference(0.001), configuration="new", skill=3.0)
    nightly.add("sdcnv3", reference(0.0))
    decision = nightly()
    assert list(decision["order"]) == ["qin", "sdcnv3"]
    assert (decision["model"], decision["kind"]) == ("sdcnv3", "refresh")


def test_the_spread_of_seeds_follows_the_nights(nightly) -> None:
    rng = np.random.default_rng(0)
    refresh = {"model": "qin", "kind": "refresh", "configuration": "as before", "against": "v", "se": SE}
    days = np.arange("2025-11-11", "2026-01-10", dtype="datetime64[D]").astype(str)
    nights = [{"ends": day, "models": [refresh | {"difference": float(d)}]}
              for day, d in zip(days.tolist(), rng.normal(0, 0.004, 60), strict=True)]  # fmt: skip
    nightly.add("qin", reference(-0.005))
    assert broken(nightly()) == ["no worse than v0.0.3"]
    nightly.champion(POINTER, nights=nights)
    decision = nightly(replace(CONFIG, look_back=100))
    assert decision["verdict"] == "approve"
    assert decision["spread"]["nights"] == 60
    assert nightly()["spread"]["nights"] == 28  # of the last 30 days
    assert 0.002 < decision["spread"]["value"] < 0.003


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"score_drift": 0.3}, "score_drift"),
        ({"train_rows": 50_000}, "training_rows_ratio"),
        ({"difference": {"auc": gained(0.05), "group_auc": gained(0.0)}}, "auc_gain"),
        ({"difference": {"auc": gained(0.0), "group_auc": gained(-0.03)}}, "group_auc_loss"),
        ({"slices": {"new users": gained(-0.03, 0.004)}}, "auc_loss on new users"),
    ],
)
def test_each_guard_rail_rejects(nightly, changed, rule) -> None:
    nightly.add("qin", reference(**changed))
    decision = nightly()
    assert broken(decision) == [rule]
    assert decision["verdict"] == "reject"


def earned(value: float, half: float) -> dict[str, Any]:
    """The off-policy view as `evaluate` gives it: what the model earns more than the champion."""
    return {"value": 0.2, "difference": {"value": value, "se": half / 2, "low": value - half, "high": value + half}}


def test_a_proven_loss_of_clicks_rejects(nightly) -> None:
    for value, half, passed in ((-0.03, 0.015, False), (-0.03, 0.025, True), (-0.008, 0.001, True), (0.5, 0.1, True)):
        nightly.add("qin", reference(), policy=earned(value, half))
        decision = nightly()
        (rule,) = [rule for rule in decision["candidates"]["qin"]["rules"] if rule["rule"] == "policy_loss"]
        assert (rule["value"], rule["limit"], rule["passed"]) == (-value, 0.01, passed)
        assert rule["interval"] == pytest.approx([-value - half, -value + half])
        assert (decision["verdict"] == "approve") is passed and not decision["no_propensities"]
    assert "clicks a row less than the champion's ranking" in rule["why"]


def test_a_gain_of_clicks_promotes_nothing(nightly) -> None:
    nightly.add("qin", reference(0.0), configuration="another", policy=earned(0.1, 0.01))
    assert broken(nightly()) == ["better than the champion"]


def test_without_propensities_or_limit_the_clicks_are_not_judged(nightly) -> None:
    nightly.add("qin", reference())
    decision = nightly()
    assert decision["no_propensities"] and decision["verdict"] == "approve"
    assert decision["reasons"][-1].startswith("gate.max_policy_loss is not judged: the test rows have no propensities")
    nightly.add("qin", reference(), policy=earned(-0.5, 0.01))
    decision = nightly(replace(CONFIG, max_policy_loss=None))
    assert "policy_loss" not in [rule["rule"] for rule in decision["candidates"]["qin"]["rules"]]
    assert decision["left_out"] == ["max_policy_loss"] and decision["verdict"] == "approve"


def test_a_slice_that_is_too_small_says_so_and_is_no_pass(nightly) -> None:
    nightly.add("qin", reference(slices={"new items": gained(-0.03, 0.03), "tv": None}))
    decision = nightly()
    by_name = {rule["rule"]: rule for rule in decision["candidates"]["qin"]["rules"]}
    assert by_name["auc_loss on new items"]["passed"] is None
    assert by_name["auc_loss on new items"]["why"].startswith("too few rows to judge: only a loss of 0.0")
    assert by_name["auc_loss on tv"]["passed"] is None
    assert "(2 cannot be judged with so few rows)" in decision["reasons"][0]
    assert decision["verdict"] == "approve"


def test_many_slices_are_corrected_for_their_number() -> None:
    """Of 40 slices without a loss, one in a twentieth of the nights may fail, and not two every night."""
    rng = np.random.default_rng(1)
    config = replace(CONFIG, max_slice_loss=0.001)
    nights = 0
    for _ in range(400):
        found = {str(at): gained(float(value), 0.002) for at, value in enumerate(rng.normal(0, 0.002, 40))}
        nights += bool(rules.broken(rules.slices(config, found)))
    assert nights / 400 <= 0.07


# ---- which model ------------------------------------------------------------------------------------------------


def test_the_valid_days_choose_and_the_cheaper_one_of_equals(run) -> None:
    run.add("qin", skill=1.0, cost=900, auc=0.7)
    run.add("sdcnv3", skill=2.0, cost=1000, auc=0.65)
    decision = run()
    assert decision["model"] == "sdcnv3"  # though its test AUC is lower: the test days judge, they do not choose
    assert not decision["order"]["qin"]["equal_to_best"]
    run.add("qin", skill=2.0, cost=900)
    assert run()["model"] == "qin"
    run.add("sdcnv3", skill=2.0, cost=800)
    assert run()["model"] == "sdcnv3"
    run.add("sdcnv3", skill=2.0, cost=800, calibration_error=0.3)  # better, and not allowed
    decision = run()
    assert (decision["verdict"], decision["model"]) == ("approve", "qin")
    run.add("qin", auc=0.5)
    decision = run()
    assert (decision["verdict"], decision["model"]) == ("reject", None)
    assert len(decision["reasons"]) == 3


# ---- bytes ------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"measured beside no champion, .*are \['v0\.0\.3'\]; .*evaluate@qin"):
        run()
    run.add("qin", reference(version="v0.0.2"))
    with pytest.raises(ValueError, match=r"measured beside \['v0\.0\.2'\], .*\['v0\.0\.3'\]"):
        run()
    run.champion(None)
    with pytest.raises(ValueError, match=r"measured beside \['v0\.0\.2'\], .*are none"):
        run()


def test_nothing_evaluated_is_no_verdict(run) -> None:
    with pytest.raises(ValueError, match=r"evaluate holds no evaluation; run `dvc repro evaluate`"):
        run()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("min_auc", 1.1, r"an AUC lies in \[0, 1\]"), ("min_group_auc", -0.1, r"an AUC lies in \[0, 1\]"),
        ("alpha", 0.0, "it is a probability"), ("gain", 0.0, "it must be above 0"), ("spread", -1.0, "above 0"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(key, value, message) -> None:
    with pytest.raises(ValueError, match=rf"{key} is {value}; .*{message}"):
        replace(CONFIG, **{key: value})


def test_equal_inputs_give_equal_bytes(nightly, tmp_path) -> None:
    nightly.add("qin", reference(0.0))
    nightly.add("sdcnv3", reference(0.001), configuration="new")
    nightly()
    first = (tmp_path / "decision.json").read_bytes()
    nightly()
    assert (tmp_path / "decision.json").read_bytes() == first


def test_the_summary_is_the_verdict_in_words(run) -> None:
    run.add("qin")
    run.add("sdcnv3", auc=0.5, skill=0.5)
    assert gate.summary(run(replace(CONFIG, min_group_auc=None))) == {
        "verdict": "approved: qin, the first of its kind",
        "champion": "none yet: only the absolute limits are judged",
        "tried first": "qin, sdcnv3",
        "not judged": "gate.min_group_auc (null)",
        "qin": "passes 6 of 6 rules with AUC 0.7000",
        "sdcnv3": "fails 1 of 6 rules: auc: 0.5 is not >= 0.6",
    }
    run.champion(POINTER)
    for model in ("qin", "sdcnv3"):
        run.add(model, reference(), auc=0.5)
    found = gate.summary(run())
    assert found["verdict"] == "rejected: no model passes, so nothing ships"
    assert found["champion"] == "v0.0.3" and "auc: 0.5 is not >= 0.6" in found["qin"]


def test_without_alpha_a_change_is_judged_as_a_refresh(nightly) -> None:
    nightly.add("qin", reference(-0.0005), configuration="new")
    assert nightly()["verdict"] == "reject"
    decision = nightly(replace(CONFIG, alpha=None))
    assert (decision["verdict"], decision["kind"]) == ("approve", "change")
    assert "gate.alpha" in decision["reasons"][0]
