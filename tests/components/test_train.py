"""Training learns, stops in time, ends in the same bytes whatever interrupts it, and says what is wrong."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score

import models
from components import train
from components.config import load
from components.dataset import Dataset
from components.train import Progress, TrainConfig
from models.registry import CHECKPOINT_FILES, FAMILIES
from models.registry import load as load_checkpoint

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, raw_rows, write_dataset) -> Path:
    return write_dataset(tmp_path_factory.mktemp("train") / "dataset", raw_rows())


@pytest.fixture
def config(networks) -> Callable[..., TrainConfig]:
    def make(model: str = "qin", **changes: Any) -> TrainConfig:
        values = {
            "seed": 1, "batch_size": 128, "max_epochs": 4, "patience": 4, "lr": 0.01, "lr_factor": 0.5,
            "lr_patience": 0, "min_lr": 1e-6, "embedding_l2": 1e-6, "clip_norm": 10.0, "device": "cpu",
            "network": networks[model],
        }  # fmt: skip
        return TrainConfig(**(values | changes))

    return make


class Run:
    """`train.run` in a work folder of its own."""

    def __init__(self, root: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.dataset, self.monkeypatch = root, dataset, monkeypatch
        self.state = root / ".scratch/train/qin/state.safetensors"

    def __call__(self, config: TrainConfig, name: str, model: str = "qin") -> dict[str, bytes]:
        """The checkpoint's bytes by file."""
        self.monkeypatch.chdir(self.root)
        out = self.root / name
        train.run(config, model, self.dataset, out / model, out / "metrics.json", out / "history.csv")
        return {file: (out / model / file).read_bytes() for file in CHECKPOINT_FILES}

    def history(self, name: str) -> list[dict[str, float]]:
        with (self.root / name / "history.csv").open() as opened:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(opened)]

    def killed_after(self, steps: int, config: TrainConfig, name: str, model: str = "qin") -> None:
        """The same run, ended by a Ctrl-C in front of an optimizer step."""
        step, done = torch.optim.Adam.step, 0

        def interrupted(optimizer: torch.optim.Adam, *arguments: Any) -> Any:
            nonlocal done
            done += 1
            if done > steps:
                raise KeyboardInterrupt
            return step(optimizer, *arguments)

        with self.monkeypatch.context() as patched:
            patched.setattr(torch.optim.Adam, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                self(config, name, model)


@pytest.fixture
def run(tmp_path, dataset, monkeypatch) -> Run:
    return Run(tmp_path, dataset, monkeypatch)


# ---- learning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_learns_and_keeps_its_best_epoch(run, config, dataset, model) -> None:
    asked = config(model, max_epochs=12, patience=2, lr_patience=0)
    run(asked, "out", model)
    history = run.history("out")
    aucs = [row["valid_auc"] for row in history]
    best = int(np.argmax(aucs)) + 1
    found = json.loads((run.root / "out/metrics.json").read_text())
    data = Dataset.open(dataset)
    start, end = data.splits["valid"]
    labels, ceiling = data.columns["label"][start:end].numpy(), data.columns["oracle"][start:end].numpy()
    assert max(aucs) > roc_auc_score(labels, ceiling) - 0.1
    assert max(aucs) > 0.7
    assert history[0]["train_loss"] > history[best - 1]["train_loss"]
    assert (found["best_epoch"], found["epochs"], found["valid_auc"]) == (best, len(history), max(aucs))
    assert [row["epoch"] for row in history] == list(range(1, len(history) + 1))
    assert len(history) == 12 or len(history) == best + 2

    saved = load_checkpoint(run.root / "out" / model)
    scores, own_labels = train.score(saved.model, data, (start, end))
    assert np.array_equal(own_labels.numpy(), labels)
    assert roc_auc_score(labels, scores.numpy()) == pytest.approx(max(aucs), abs=1e-9)
    assert saved.facts["data_sha256"] == data.facts["data_sha256"]
    assert saved.facts["best_epoch"] == best
    assert saved.facts["train"]["lr"] == asked.lr
    assert not (run.root / ".scratch/train" / model).exists()


def walk(config: TrainConfig, aucs: list[float]) -> tuple[list[float], list[bool], Progress]:
    progress, rates, better = Progress(lr=config.lr), [], []
    for auc in aucs:
        assert not progress.done(config)
        rates.append(progress.lr)
        better.append(progress.note(config, {"valid_auc": auc}))
    return rates, better, progress


@pytest.mark.parametrize(
    ("lr_patience", "rates"),
    [(0, [0.8, 0.8, 0.8, 0.4, 0.4, 0.2, 0.1]), (1, [0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.4])],
)
def test_the_rate_is_cut_where_the_auc_does_not_rise(config, lr_patience, rates) -> None:
    asked = config(lr=0.8, lr_patience=lr_patience, max_epochs=7, patience=9)
    found, better, progress = walk(asked, [0.5, 0.6, 0.6, 0.7, 0.65, 0.65, 0.8])
    assert found == rates
    assert better == [True, True, False, True, False, False, True]  # a tie is no improvement
    assert (progress.best_epoch, progress.best_auc) == (7, 0.8)
    assert progress.done(asked)


def test_the_rate_has_a_floor_and_stale_epochs_an_end(config) -> None:
    asked = config(lr=0.8, min_lr=0.3, max_epochs=9, patience=3)
    rates, _, progress = walk(asked, [0.6, 0.5, 0.5, 0.5])
    assert rates == [0.8, 0.8, 0.4, 0.3]
    assert progress.done(asked)
    assert progress.best_epoch == 1


def test_coupled_l2_moves_the_regularised_parameters_alone(config, dataset) -> None:
    """With gradients of zero, Adam's first step is -lr * sign(l2 * p); a decoupled decay would move by lr * l2 * p."""
    model = models.registry.build("qin", config().network, Dataset.open(dataset).schema)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.where(torch.rand_like(parameter) < 0.5, -0.5, 0.5))
    regularised = {id(parameter) for parameter in model.regularised_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    train.adam(config(lr=0.01, embedding_l2=0.1), model).step()
    moved = set()
    for name, parameter in model.named_parameters():
        if id(parameter) in regularised:
            torch.testing.assert_close(parameter.detach(), before[name] - 0.01 * before[name].sign())
            moved.add(name.split(".")[0])
        else:
            assert torch.equal(parameter, before[name]), name
    assert moved == {"fields", "items"}
    assert len(regularised) < len(before)


def test_a_last_batch_of_one_row_is_left_out(config, run) -> None:
    """1560 training rows: 1559 + 1. BatchNorm cannot take one row."""
    run(config("sdcnv3", batch_size=1559, max_epochs=1), "out", "sdcnv3")
    assert len(run.history("out")) == 1


# ---- the same bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(run, config, model) -> None:
    first = run(config(model, max_epochs=2), "first", model)
    torch.rand(7)  # what was drawn before does not matter
    assert run(config(model, max_epochs=2), "again", model) == first
    other = run(config(model, max_epochs=2, seed=2), "other", model)
    assert other["model.safetensors"] != first["model.safetensors"]
    assert other["schema.json"] == first["schema.json"]


@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_a_run_cut_in_the_middle_of_an_epoch_goes_on_to_the_same_bytes(run, config, model, capsys) -> None:
    asked = config(model)
    whole = run(asked, "whole", model)
    steps = -(-1560 // asked.batch_size)
    run.killed_after(2 * steps + steps // 2, asked, "cut", model)
    assert not (run.root / "cut").exists()
    capsys.readouterr()
    assert run(asked, "cut", model) == whole
    said = capsys.readouterr().out
    assert f"{model}: goes on after epoch 2" in said
    assert f"{model} epoch 2:" not in said
    assert run.history("cut") == run.history("whole")


@pytest.mark.slow
def test_a_killed_program_goes_on_to_the_same_bytes(run, config) -> None:
    asked = config(max_epochs=30, patience=30)
    (run.root / "params.yaml").write_text(yaml.safe_dump({"train": {"qin": asdict(asked)}}))
    out = run.root / "cut"
    command = [
        sys.executable, "-m", "components", "train", "qin", "--dataset", str(run.dataset), "--output", str(out / "qin"),
        "--metrics", str(out / "metrics.json"), "--history", str(out / "history.csv"),
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=run.root, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = next((line for line in process.stdout if line.startswith("qin epoch 3:")), None)
        assert seen, "the program ended before epoch 3"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    done = subprocess.run(command, cwd=run.root, env=env, capture_output=True, text=True, check=True)
    assert "qin: goes on after epoch " in done.stdout
    assert "qin epoch 2:" not in done.stdout
    assert {file: (out / "qin" / file).read_bytes() for file in CHECKPOINT_FILES} == run(asked, "whole")


def test_the_state_of_another_config_is_not_used(run, config, capsys) -> None:
    clean = run(config(lr=0.02), "clean")
    run.killed_after(30, config(lr=0.01), "cut")
    assert run.state.is_file()
    capsys.readouterr()
    assert run(config(lr=0.02), "out") == clean
    assert "goes on" not in capsys.readouterr().out


def test_the_state_of_another_dataset_is_not_used(run, config, raw_rows, write_dataset, capsys) -> None:
    run.killed_after(30, config(), "cut")
    run.dataset = write_dataset(run.root / "dataset", raw_rows(seed=1))
    capsys.readouterr()
    run(config(), "out")
    assert "goes on" not in capsys.readouterr().out
    assert run.history("out")[0]["epoch"] == 1


def test_the_state_of_other_code_is_not_used(run, config, monkeypatch, capsys) -> None:
    run.killed_after(30, config(), "cut")
    code = run.root / "models"
    shutil.copytree(ROOT / "models", code, ignore=shutil.ignore_patterns("__pycache__"))
    with (code / "qin.py").open("a") as opened:
        opened.write("# edited\n")
    monkeypatch.setattr(models, "__file__", str(code / "__init__.py"))
    capsys.readouterr()
    run(config(), "out")
    assert "goes on" not in capsys.readouterr().out


# ---- what goes wrong --------------------------------------------------------------------------------------------


def poison(model: torch.nn.Module) -> None:
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))


@pytest.mark.parametrize("when", ["before", "after"], ids=["in the epoch", "by its last step"])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_epoch_before(run, config, monkeypatch, when) -> None:
    whole = run(config(), "whole")
    real, kept = train.train_epoch, b""

    def spoilt(config: TrainConfig, model: Any, data: Any, optimizer: Any, epoch: int, name: str) -> float:
        nonlocal kept
        if epoch == 1 and when == "before":
            poison(model)
        if epoch == 1:
            kept = run.state.read_bytes()
        loss = real(config, model, data, optimizer, epoch, name)
        if epoch == 1:
            poison(model)
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(train, "train_epoch", spoilt)
        with pytest.raises(ValueError, match=r"qin: the loss is nan in epoch 2; .*Lower train\.qin\.lr \(0\.01\)"):
            run(config(), "out")
    assert not (run.root / "out").exists()
    assert run.state.read_bytes() == kept != b""
    assert run(config(), "out") == whole


def test_a_rate_that_is_far_too_high_is_told(run, config) -> None:
    with pytest.raises(ValueError, match=r"Lower train\.qin\.lr \(1e\+30\) or clip_norm \(1e\+30\)"):
        run(config(lr=1e30, clip_norm=1e30), "out")
    assert not (run.root / "out").exists()


def test_unknown_names_are_refused(run, config, networks) -> None:
    with pytest.raises(ValueError, match=r"QINConfig: unknown key \['width'\]; it has \["):
        run(config(network=networks["qin"] | {"width": 3}), "out")
    with pytest.raises(ValueError, match=r"exclude: no feature \['colour'\] in the schema; it has"):
        run(config(network=networks["qin"] | {"exclude": ["colour"]}), "out")
    with pytest.raises(ValueError, match=r"family = 'deepfm': give one of \['qin', 'sdcnv3'\]"):
        run(config(), "out", "deepfm")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=rf"train\.qin\.device is '{device}': .*give auto, cpu or cuda:0"):
            run(config(device=device), "out")
    assert not (run.root / "out").exists()


@pytest.mark.parametrize("label", [0, 1])
def test_valid_days_of_one_class_are_refused(run, config, raw_rows, write_dataset, label) -> None:
    raw = raw_rows()
    start, end = raw.splits["valid"]
    raw.label[start:end] = label
    run.dataset = write_dataset(run.root / "dataset", raw)
    with pytest.raises(
        ValueError, match=rf"dataset: the valid days hold {label * 520} clicks in 520 rows.*valid_share"
    ):
        run(config(), "out")


def test_a_dataset_that_was_changed_is_refused(run, config, dataset) -> None:
    run.dataset = run.root / "dataset"
    shutil.copytree(dataset, run.dataset)
    rows = run.dataset / "rows.safetensors"
    rows.write_bytes(rows.read_bytes()[:-1] + b"\x07")
    with pytest.raises(
        ValueError, match=r"rows\.safetensors is not the file that was written; run `dvc repro dataset`"
    ):
        run(config(), "out")


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_size": 0}, {"batch_size": 1}, {"max_epochs": 0}, {"patience": 0}, {"lr": 0.0}, {"lr": float("nan")},
        {"clip_norm": 0.0}, {"lr_factor": 0.0}, {"lr_factor": 1.5}, {"embedding_l2": -1.0}, {"lr_patience": -1},
        {"min_lr": -1.0}, {"min_lr": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_value_is_named(config, bad) -> None:
    ((key, value),) = bad.items()
    with pytest.raises(ValueError, match=rf"{key} is {value}"):
        config(**bad)


@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_the_projects_params_fit(model, dataset) -> None:
    config = load(ROOT / "params.yaml", f"train.{model}", TrainConfig)
    network = {**config.network, "exclude": []}  # the project's data have other features
    models.registry.build(model, network, Dataset.open(dataset).schema)
