"""What ships has seen every row, or is the model that was judged; and the decision says which, and why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from components.common.artifacts import folder_hash, write_json
from components.common.dataset import Dataset
from components.common.scoring import score
from components.training import refit
from components.training.refit import RefitConfig
from components.training.state import State
from models.checkpoint import CHECKPOINT_FILES, checkpoint_hash, load, save
from tests.components.training.conftest import Run

ROOT = Path(__file__).resolve().parents[3]
CONFIG = RefitConfig(enabled=True, min_correlation=0.5, max_calibration_error=0.2, logloss_noise=2.0, device="cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


class Approved:
    """A trained model that a gate approved, and `refit` in the same folder."""

    def __init__(self, run: Run, config: Callable[..., Any], **changes: Any) -> None:
        self.root, self.dataset = run.root, run.dataset
        run(config(**changes), "checkpoints")
        self.source = self.root / "checkpoints/qin"
        self.judge()

    def judge(self) -> None:
        """The decision of the gate on what lies there now."""
        facts = json.loads((self.dataset / "dataset.json").read_text())
        self.decide(
            verdict="approve", model="qin", checkpoint_sha256=checkpoint_hash(self.source),
            data_sha256=facts["data_sha256"], reasons=["qin passes all 5 rules"],
        )  # fmt: skip

    def train_as(self, **facts: Any) -> None:
        """The same weights, with other facts of their training, approved."""
        old = load(self.source)
        save(self.root / "other", replace(old, facts=dict(old.facts) | facts))
        for file in CHECKPOINT_FILES:
            (self.root / "other" / file).replace(self.source / file)
        self.judge()

    def decide(self, **decision: Any) -> None:
        self.decision = decision
        write_json(self.root / "gate.json", decision)

    def paths(self, name: str) -> dict[str, Path]:
        return {
            "decision": self.root / "gate.json", "checkpoints": self.root / "checkpoints",
            "starts": self.root / "starts", "dataset": self.dataset,
            "output": self.root / name / "refit", "shipped": self.root / name / "decision.json",
        }  # fmt: skip

    def __call__(self, name: str = "out", config: RefitConfig = CONFIG) -> dict[str, Any]:
        """`shipped`, as the decision on disk says."""
        paths = self.paths(name)
        found = refit.run(config, **paths)
        on_disk = json.loads(paths["shipped"].read_text())
        assert {**self.decision, "shipped": on_disk["shipped"]} == on_disk  # the gate's decision stays
        assert on_disk.items() <= found.items()
        return on_disk["shipped"]

    def logits(self, folder: Path, split: str = "test") -> torch.Tensor:
        data = Dataset.open(self.dataset)
        return score(load(folder).model, data, data.splits[split])[0]


@pytest.fixture
def approved(run, config) -> Approved:
    return Approved(run, config, max_epochs=4)


def test_what_ships_has_seen_the_test_days(approved) -> None:
    ships = approved()
    folder = approved.root / "out/refit"
    assert ships["kind"] == "refit", ships
    assert ships["checkpoint_sha256"] == checkpoint_hash(folder) != checkpoint_hash(approved.source)
    assert [check["rule"] for check in ships["checks"]] == ["correlation", "calibration_error", "logloss_rise"]
    assert ships["reasons"] == ["the refit passes all 3 checks against the model that the gate judged"]
    old, new = load(approved.source), load(folder)
    assert new.schema_hash == old.schema_hash
    assert old.facts["train_until"] == "2026-01-10T00:00:00+00:00"
    assert new.facts["train_until"] == ships["train_until"] == "2026-01-11T00:00:00+00:00"
    assert (old.facts["train_rows"], new.facts["train_rows"]) == (1560, 2600)
    assert new.facts["refit_of"] == checkpoint_hash(approved.source)
    data = Dataset.open(approved.dataset)
    label_B = data.columns["label"][slice(*data.splits["test"])].float()
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    assert loss(approved.logits(folder), label_B) < loss(approved.logits(approved.source), label_B)
    assert not list((approved.root / ".scratch/refit").iterdir())


def test_every_row_is_trained_on_for_the_epochs_that_were_chosen(run, config, monkeypatch) -> None:
    approved = Approved(run, config, max_epochs=3, batch_size=100)
    seen: dict[int, list[int]] = {}
    take = refit.Loop.epoch

    def noted(loop: Any, pause: Any) -> float:
        step, epoch = loop.step, loop.state.progress.epoch
        rows = seen.setdefault(epoch, [])

        def stepped(fetched: Any, size: int) -> Any:
            rows.extend(fetched[0].tolist())
            return step(fetched, size)

        loop.step = stepped
        try:
            return take(loop, pause)
        finally:
            loop.step = step

    monkeypatch.setattr(refit.Loop, "epoch", noted)
    approved()
    best = load(approved.source).facts["best_epoch"]
    assert list(seen) == list(range(best))
    assert all(sorted(rows) == list(range(2600)) for rows in seen.values())


def test_it_goes_by_the_rates_that_training_found(run, config, monkeypatch) -> None:
    approved = Approved(run, config, max_epochs=4, lr=0.02, lr_factor=0.5)
    facts = dict(load(approved.source).facts)
    assert len(facts["rates"]) == facts["best_epoch"]
    planted = [0.02 / (epoch + 1) for epoch in range(facts["best_epoch"])]
    approved.train_as(rates=planted)
    used: list[float] = []
    set_rate = State.set_rate

    def noted(state: State, lr: float) -> None:
        used.append(lr)
        set_rate(state, lr)

    monkeypatch.setattr(State, "set_rate", noted)
    approved()
    assert used == planted


def test_it_begins_where_the_approved_model_began(run, config) -> None:
    """Both start from a champion and learn next to nothing, so both score as the champion does."""
    champion = run.root / "champion"
    run(config(max_epochs=4), "champion")
    old = load(champion / "qin")
    save(run.root / "starts/qin/checkpoint", replace(old, facts=dict(old.facts) | {"train_until": None}))
    write_json(run.root / "starts/qin/start.json", {"champion": "v1.2.0"})
    run.start = run.root / "starts/qin"
    approved = Approved(run, config, max_epochs=1, lr=1e-9, min_lr=0.0)
    assert load(approved.source).facts["warm_start"] == "v1.2.0"
    ships = approved(config=replace(CONFIG, logloss_noise=1e9))  # of next to no difference, any is more than noise
    assert ships["kind"] == "refit", ships
    assert load(approved.root / "out/refit").facts["warm_start"] == "v1.2.0"
    both = torch.stack([approved.logits(folder) for folder in (approved.root / "out/refit", champion / "qin")])
    assert torch.corrcoef(both)[0, 1] > 0.99  # the statistics of its batches are its own


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}], ids=["last weights", "running mean"])
def test_equal_runs_give_equal_bytes(run, config, changes) -> None:
    approved = Approved(run, config, max_epochs=2, **changes)
    approved("one")
    torch.rand(5)
    approved("two")
    assert folder_hash(approved.root / "one") == folder_hash(approved.root / "two")


def test_killed_it_goes_on_to_the_same_bytes(run, config) -> None:
    """The command that production runs, killed with SIGKILL once an epoch's state is saved."""
    approved = Approved(run, config, max_epochs=4, batch_size=16)
    assert approved.decision["model"] == "qin" and load(approved.source).facts["best_epoch"] >= 2
    approved("whole")
    (approved.root / "params.yaml").write_text(yaml.safe_dump({"refit": asdict(CONFIG)}))
    paths = [text for name, path in approved.paths("cut").items() for text in (f"--{name}", str(path))]
    command = [sys.executable, "-m", "components", "refit", *paths]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=approved.root, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("qin epoch 1:") for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (approved.root / "cut").exists()
    done = subprocess.run(command, cwd=approved.root, env=env, capture_output=True, text=True, check=True)
    assert "qin: continues after epoch " in done.stdout
    assert "ships" in done.stderr and "the refit of qin" in done.stderr
    assert folder_hash(approved.root / "cut") == folder_hash(approved.root / "whole")
    note = json.loads((approved.root / ".scratch/stages/refit.json").read_text())
    assert note["device"] == "cpu x 1" and note["seconds"] > 0


# ---- the judged model ships -------------------------------------------------------------------------------------


def judged_ships(approved: Approved, ships: dict[str, Any]) -> None:
    folder = approved.root / "out/refit"
    assert ships["kind"] == "judged"
    assert ships["checkpoint_sha256"] == checkpoint_hash(folder) == checkpoint_hash(approved.source)
    assert ships["train_until"] == "2026-01-10T00:00:00+00:00"
    assert {file.name for file in folder.iterdir()} == {*CHECKPOINT_FILES}


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("correlation", {"min_correlation": 1.0}),
        ("calibration_error", {"max_calibration_error": 0.0}),
    ],
)
def test_a_refit_that_fails_a_check_does_not_ship(approved, rule, changes) -> None:
    ships = approved(config=replace(CONFIG, **changes))
    judged_ships(approved, ships)
    assert [check["rule"] for check in ships["checks"] if not check["passed"]] == [rule]
    (reason,) = ships["reasons"]
    assert reason.startswith(f"the model that the gate judged ships: {rule} of the refit is ")


def test_a_refit_that_is_worse_on_the_newest_day_does_not_ship(approved) -> None:
    """At a rate of almost nothing, it learns almost nothing in the same epochs."""
    rates = load(approved.source).facts["rates"]
    approved.train_as(rates=[1e-9] * len(rates))
    ships = approved(config=replace(CONFIG, min_correlation=-1.0, max_calibration_error=1.0))
    judged_ships(approved, ships)
    rise = ships["checks"][2]
    assert not rise["passed"] and rise["value"] > rise["limit"] > 0


def test_a_refit_that_diverges_does_not_ship(approved) -> None:
    rates = load(approved.source).facts["rates"]
    approved.train_as(rates=[1e6] * len(rates))
    ships = approved()
    judged_ships(approved, ships)
    assert ships["checks"] == []
    assert "the refit failed" in ships["reasons"][0] and "Lower" in ships["reasons"][0]


def test_switched_off_it_ships_what_was_judged(approved) -> None:
    ships = approved(config=replace(CONFIG, enabled=False))
    judged_ships(approved, ships)
    assert ships["reasons"] == ["refit.enabled is false: the model that the gate judged ships"]


def test_a_rejection_writes_no_model(approved) -> None:
    approved()
    approved.decide(verdict="reject", model=None, checkpoint_sha256=None, reasons=["qin fails 1 of 5 rules"])
    assert approved() is None
    assert [file.name for file in (approved.root / "out/refit").iterdir()] == ["refit.json"]
    found = refit.run(CONFIG, **approved.paths("out"))
    assert refit.summary(found) == {"ships": "nothing: the gate rejected"}


@pytest.mark.parametrize("which", ["checkpoint", "data"])
def test_bytes_that_were_not_judged_are_refused(approved, which) -> None:
    approved.decide(**approved.decision | {f"{which}_sha256": "0" * 64})
    with pytest.raises(ValueError, match=rf"{which}_sha256 is \w+, the gate judged 0000.*dvc repro gate"):
        approved()
    assert not (approved.root / "out").exists()


# ---- figures ----------------------------------------------------------------------------------------------------


def test_the_calibration_error_is_that_of_equally_filled_bins() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.random(1007), (rng.random(1007) < 0.3).astype(float)
    parts = np.array_split(np.argsort(scores, kind="stable"), refit.BINS)
    expected = sum(len(p) * abs(scores[p].mean() - labels[p].mean()) for p in parts) / 1007
    found = refit.calibration_error(torch.from_numpy(scores), torch.from_numpy(labels))
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_noise_of_the_logloss_counts_users_and_not_rows() -> None:
    """Every row twice, of the same user, is no more evidence."""
    rng = torch.Generator().manual_seed(0)
    new, old = torch.randn(2, 400, generator=rng, dtype=torch.float64)
    label, user = (torch.rand(400, generator=rng) < 0.3).double(), torch.arange(400)
    rise, error = refit.logloss_rise(new, old, label, user)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    each = entropy(new, label, reduction="none") - entropy(old, label, reduction="none")
    assert rise == pytest.approx(float(each.mean()))
    assert error == pytest.approx(float(each.std(correction=0)) / 20)
    twice = refit.logloss_rise(new.repeat(2), old.repeat(2), label.repeat(2), user.repeat(2))
    assert twice == pytest.approx((rise, error))
    alone = refit.logloss_rise(new, old, label, torch.zeros(400, dtype=torch.int64))
    assert alone == pytest.approx((rise, error))  # data without users


@pytest.mark.parametrize(
    "bad", [{"min_correlation": 1.1}, {"max_calibration_error": -0.1}, {"logloss_noise": float("nan")}]
)
def test_config_names_the_key(bad) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        replace(CONFIG, **bad)
