"""Training learns, stops in time, ends in the same bytes whatever interrupts it, and says what is wrong."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from copy import deepcopy
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import models
from components.common import dataset as dataset_module
from components.common.artifacts import folder_hash, write_json
from components.common.config import load
from components.common.dataset import Dataset
from components.common.scoring import score
from components.training import loop as loop_module
from components.training import state as state_module
from components.training import train
from components.training.config import TrainConfig
from components.training.loop import DivergenceError, Loop, OutOfMemoryError
from components.training.state import Progress, State
from components.training.step import Step, adam
from models.checkpoint import CHECKPOINT_FILES
from models.checkpoint import load as load_checkpoint
from models.families import FAMILIES, PRESETS, TRAINING
from models.kernels import cross_step
from models.losses import bce, tri_bce
from models.schema import Batch, Logits, Part
from tests.models import published

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, raw_rows, write_dataset) -> Path:
    return write_dataset(tmp_path_factory.mktemp("train") / "dataset", raw_rows())


class Run:
    """`train.run` in a work folder of its own."""

    def __init__(self, root: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.dataset, self.monkeypatch = root, dataset, monkeypatch
        self.start = root / "start"
        write_json(self.start / "start.json", {"champion": None})
        self.state = root / ".scratch/train/qin/state.safetensors"

    def __call__(self, config: TrainConfig, name: str, model: str = "qin") -> dict[str, bytes]:
        """The checkpoint's bytes by file."""
        self.monkeypatch.chdir(self.root)
        out = self.root / name
        train.run(config, model, self.dataset, self.start, out / model, out / "metrics.json", out / "history.csv")
        return {file: (out / model / file).read_bytes() for file in CHECKPOINT_FILES}

    def history(self, name: str) -> list[dict[str, float]]:
        with (self.root / name / "history.csv").open() as opened:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(opened)]

    def killed_after(self, steps: int, config: TrainConfig, name: str, model: str = "qin") -> None:
        """The same run, dead in front of an optimizer step, with no time to save anything."""
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
    best = int(np.argmax([row["valid_auc"] - row["valid_logloss"] for row in history])) + 1
    found = json.loads((run.root / "out/metrics.json").read_text())
    data = Dataset.open(dataset)
    start, end = data.splits["valid"]
    labels, ceiling = data.columns["label"][start:end].numpy(), data.columns["oracle"][start:end].numpy()
    assert max(aucs) > roc_auc_score(labels, ceiling) - 0.1
    assert max(aucs) > 0.7
    assert history[0]["train_loss"] > history[best - 1]["train_loss"]
    assert (found["best_epoch"], found["epochs"], found["valid_auc"]) == (best, len(history), aucs[best - 1])
    assert [row["epoch"] for row in history] == list(range(1, len(history) + 1))
    assert len(history) == 12 or len(history) == best + 2

    saved = load_checkpoint(run.root / "out" / model)
    scores, own_labels = score(saved.model, data, (start, end))
    assert np.array_equal(own_labels.numpy(), labels)
    assert roc_auc_score(labels, scores.numpy()) == pytest.approx(aucs[best - 1], abs=1e-9)
    assert saved.facts["data_sha256"] == data.facts["data_sha256"]
    assert saved.facts["best_epoch"] == best
    assert saved.facts["train"]["lr"] == asked.lr
    assert not (run.root / ".scratch/train" / model).exists()


def walk(config: TrainConfig, aucs: list[float]) -> tuple[list[float], list[bool], Progress]:
    progress, rates, better = Progress(lr=config.lr), [], []
    for auc in aucs:
        assert not progress.done(config)
        rates.append(progress.lr)
        better.append(progress.note(config, {"valid_auc": auc, "valid_logloss": 0.5}))
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


def test_the_epoch_that_is_kept_has_no_logloss_that_rises_more_than_the_auc(config) -> None:
    """Figures of a run whose epoch 5 had the best AUC, and probabilities that were far too sure of themselves."""
    progress = Progress()
    for auc, logloss in ((0.70, 0.30), (0.72, 0.29), (0.74, 0.2816), (0.745, 0.295), (0.75, 0.3126)):
        progress.note(config(), {"valid_auc": auc, "valid_logloss": logloss})
    assert (progress.best_epoch, progress.best_auc, progress.stale) == (3, 0.74, 2)


@pytest.mark.parametrize(
    ("rows", "batch"), [(1_000, 64), (40_000, 512), (240_000, 1024), (591_209, 2048), (2_880_000, 4096)]
)
def test_the_batch_grows_with_the_root_of_the_rows_where_the_config_leaves_it_open(config, rows, batch) -> None:
    assert config(batch_size=0).for_rows(rows).batch_size == batch
    assert config(batch_size=96).for_rows(rows).batch_size == 96


def test_a_checkpoint_says_the_batch_size_that_was_used(run, config) -> None:
    run(config(batch_size=0, max_epochs=1), "out")
    facts = load_checkpoint(run.root / "out/qin").facts
    assert (facts["train_rows"], facts["train"]["batch_size"]) == (1560, 64)


def test_the_l2_of_a_step_is_a_training_rows_share_of_it(config, dataset) -> None:
    model = models.families.build("qin", config().network, Dataset.open(dataset).schema)
    groups = adam(config(embedding_l2=1000.0, network_l2=10.0), model, 50_000).param_groups
    assert [group["l2"] for group in groups] == [0.02, 0.0002]


def test_the_rate_has_a_floor_and_stale_epochs_an_end(config) -> None:
    asked = config(lr=0.8, min_lr=0.3, max_epochs=9, patience=3)
    rates, _, progress = walk(asked, [0.6, 0.5, 0.5, 0.5])
    assert rates == [0.8, 0.8, 0.4, 0.3]
    assert progress.done(asked)
    assert progress.best_epoch == 1


def published_loss(family: str, model: nn.Module, network: Any, data: Dataset, batch: Batch) -> Tensor:
    """Of the published form with the model's weights, in training. Losses are float32 whatever the weights."""
    hist_BL = published.histories(batch, data.click_log, data.schema.history_length)
    read = dict(model.named_parameters()), network, data.schema, batch, data.catalog, hist_BL
    if family == "qin":
        return bce(Logits(published.qin(*read, training=True).float()), batch.label_B)
    deep_B, shallow_B = published.sdcnv3(*read, training=True)
    assert shallow_B is not None
    both_B = ((deep_B + shallow_B) / 2).float()
    return tri_bce(Logits(both_B, (deep_B.float(), shallow_B.float())), batch.label_B)


def plain_training(
    family: str, config: TrainConfig, data: Dataset, model: nn.Module, rates: list[float]
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[bool]]:
    """An epoch at each of the rates, in torch's own words: the weights, their running mean, and what was clipped."""
    network = models.families.network_config(family, config.network)
    weights, (_, end) = dict(model.named_parameters()), data.splits["train"]
    tables = {name for name in weights if name.startswith(("fields", "items"))}
    mean = {name: tensor.detach().clone() for name, tensor in weights.items()}
    optimizer, clipped = torch.optim.Adam(model.parameters()), []
    for epoch, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        seed = int.from_bytes(hashlib.sha256(f"{config.seed} {epoch}".encode()).digest()[:6])
        order = torch.randperm(end, generator=torch.Generator().manual_seed(seed))
        for rows in order.split(config.batch_size):
            loss = published_loss(family, model, network, data, data.batch(rows))
            for name, tensor in weights.items():
                l2 = (config.embedding_l2 if name in tables else config.network_l2) / end
                loss = loss + l2 / 2 * tensor.square().sum()
            optimizer.zero_grad()
            loss.backward()
            clipped.append(bool(nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm) > config.clip_norm))
            optimizer.step()
            decay = min(config.ema, (1 + len(clipped)) / (10 + len(clipped)))
            for name, tensor in weights.items():
                mean[name] = decay * mean[name] + (1 - decay) * tensor.detach()
    return {name: tensor.detach() for name, tensor in weights.items()}, mean, clipped


@pytest.mark.parametrize("ema", [0.0, 0.8])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_trains_by_the_published_recipe(config, dropless, dataset, tmp_path, monkeypatch, family, ema) -> None:
    """Order, L2, clipping, Adam, its rate and the running mean, by the weights that they end in.

    The second epoch is told to be worse than the first, so that the third has half the rate. In float64, since Adam
    makes whole steps of gradients that are next to nothing, where the last bits decide the direction.
    """
    asked = config(
        family, network=dropless[family], max_epochs=3, batch_size=256, embedding_l2=80.0, network_l2=15.0, ema=ema,
        clip_norm=0.6,
    )  # fmt: skip
    data, aucs = Dataset.open(dataset), [0.7, 0.6, 0.8]
    torch.manual_seed(asked.seed)
    model = models.families.build(family, asked.network, data.schema).double()
    wanted, wanted_mean, clipped = plain_training(family, asked, data, deepcopy(model), [0.01, 0.01, 0.005])
    assert 0 < sum(clipped) < len(clipped) == 3 * 7
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop_module, "auc", lambda *_: aucs.pop(0))
    loop = Loop(family, asked, model, data)
    loop.run()
    state = loop.state
    kept = wanted_mean if ema else wanted
    torch.testing.assert_close(dict(state.model.named_parameters()), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close({name: state.best[name] for name in kept}, kept, rtol=1e-6, atol=1e-6)


def test_every_epoch_has_an_order_of_its_own_and_every_step_its_masks(run, config, monkeypatch) -> None:
    orders: list[list[int]] = [[], []]
    masks: list[bytes] = []
    step, dropout = Step.take, models.qin.dropout

    def noted_step(own: Step, loss: Any, fetched: list[Tensor], rows: int) -> Tensor:
        orders[own.state.progress.epoch] += fetched[0].tolist()
        masks.append(b"")
        return step(own, loss, fetched, rows)

    def noted_dropout(x: Tensor, rate: float, training: bool, part: Part | None) -> Tensor:
        out = dropout(x, rate, training, part)
        if training and not masks[-1]:
            masks[-1] = (out[:16] == 0).numpy().tobytes()
        return out

    monkeypatch.setattr(Step, "take", noted_step)
    monkeypatch.setattr(models.qin, "dropout", noted_dropout)
    run(config(max_epochs=2), "out")
    assert [sorted(order) for order in orders] == [list(range(1560))] * 2
    assert orders[0] != orders[1] and list(range(1560)) not in orders
    assert len(set(masks)) == len(masks) == 2 * 13


def test_the_running_mean_of_the_weights_is_what_is_judged_and_kept(config, dataset, tmp_path) -> None:
    asked = config("sdcnv3", ema=0.6)
    model = models.families.build("sdcnv3", asked.network, Dataset.open(dataset).schema)
    state = State(tmp_path, "", model, adam(asked, model, 1), asked)
    wanted = model.deep.out.weight.detach().clone()
    for step in range(1, 20):
        with torch.no_grad():
            model.deep.out.weight.add_(1.0)
            model.deep.gates[0].batch_norm.running_mean.add_(1.0)
        state.progress.steps = step
        state.follow(asked.ema)
        decay = min(0.6, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * model.deep.out.weight.detach()
    torch.testing.assert_close(state.scored.deep.out.weight, wanted)
    assert torch.equal(state.scored.deep.gates[0].batch_norm.running_mean, model.deep.gates[0].batch_norm.running_mean)
    assert not torch.allclose(wanted, model.deep.out.weight)


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
    assert f"{model}: continues after epoch 2" in said
    assert f"{model} epoch 2:" not in said
    assert run.history("cut") == run.history("whole")


@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_a_run_on_two_threads_that_is_killed_goes_on_to_the_same_bytes(run, config, monkeypatch, model) -> None:
    asked = config(model, batch_size=1560, max_epochs=4)
    monkeypatch.setattr(cross_step, "ROWS_A_THREAD", 100)  # both take a part of every batch
    torch.set_num_threads(2)
    try:
        whole = run(asked, "whole", model)
        run.killed_after(2, asked, "cut", model)
        assert run(asked, "cut", model) == whole
    finally:
        torch.set_num_threads(1)


class Program:
    """`python -m components train qin` as production runs it, in a run's folder; `launcher` stands before -m."""

    def __init__(self, run: Run, config: TrainConfig, *launcher: str) -> None:
        self.run = run
        (run.root / "params.yaml").write_text(yaml.safe_dump({"train": {"qin": asdict(config)}}))
        self.out = run.root / "cut"
        self.command = [
            sys.executable, *launcher, "-m", "components", "train", "qin", "--dataset", str(run.dataset),
            "--weights", str(run.start), "--output", str(self.out / "qin"), "--metrics", str(self.out / "metrics.json"),
            "--history", str(self.out / "history.csv"),
        ]  # fmt: skip
        self.env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def signalled(self, signum: signal.Signals, after: str) -> tuple[int, str]:
        """Signalled soon after the line that starts so. Returns exit code and what it said."""
        said = ""
        with subprocess.Popen(
            self.command, cwd=self.run.root, env=self.env, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said += line
                if line.startswith(after):
                    break
            else:
                pytest.fail(f"the program ended before it said {after!r}: {said}")
            time.sleep(0.15)  # most often in the middle of an epoch; a busy machine may make it later
            process.send_signal(signum)
            said += process.stdout.read()
        assert not self.out.exists()
        return process.returncode, said

    def finish(self) -> tuple[str, dict[str, bytes]]:
        done = subprocess.run(
            self.command, cwd=self.run.root, env=self.env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, {file: (self.out / "qin" / file).read_bytes() for file in CHECKPOINT_FILES}


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_program_asked_to_stop_saves_its_step_and_goes_on_to_the_same_bytes(run, config, signum, code) -> None:
    asked = config(max_epochs=10, patience=10, batch_size=16)  # 98 steps an epoch
    program = Program(run, asked)
    returned, said = program.signalled(signal.Signals[signum], after="qin epoch 2:")
    assert returned == code, said
    stopped = re.search(rf"qin: stopped by {signum} in epoch (\d+) after step (\d+)", said)
    assert stopped, said
    epoch, step = map(int, stopped.groups())
    assert epoch > 2
    said, found = program.finish()
    assert f"qin: continues after epoch {epoch - 1}, step {step}\n" in said
    assert f"qin epoch {epoch - 1}:" not in said and f"qin epoch {epoch}:" in said
    assert found == run(asked, "whole")


@pytest.mark.slow
def test_a_killed_program_goes_on_from_its_last_epoch_to_the_same_bytes(run, config) -> None:
    asked = config(max_epochs=10, patience=10, batch_size=16)
    program = Program(run, asked)
    code, _ = program.signalled(signal.SIGKILL, after="qin epoch 2:")
    assert code == -signal.SIGKILL
    said, found = program.finish()
    assert re.search(r"qin: continues after epoch [2-9], step 0\n", said)
    assert found == run(asked, "whole")


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch, signum: int = signal.SIGTERM) -> None:
    """This process gets a signal within step `steps`, counted from now."""
    step, done = torch.optim.Adam.step, 0

    def signalled(optimizer: torch.optim.Adam, *arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == steps:
            os.kill(os.getpid(), signum)
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", signalled)


@pytest.mark.parametrize("model", sorted(FAMILIES))
@pytest.mark.parametrize("steps", [(1,), (12,), (13,), (14, 1, 1), (5, 20)], ids=str)
def test_a_run_stopped_after_any_step_goes_on_to_the_same_bytes(run, config, monkeypatch, capsys, model, steps) -> None:
    """13 steps an epoch; after several numbers the run is stopped several times."""
    asked = config(model, max_epochs=3, ema=0.9 if len(steps) == 3 else 0.0)
    whole = run(asked, "whole", model)
    total = 0
    for number in steps:
        with monkeypatch.context() as patched:
            stop_after(number, patched)
            with pytest.raises(SystemExit) as ended:
                run(asked, "cut", model)
        total += number
        epoch, step = (total - 1) // 13, (total - 1) % 13 + 1
        assert ended.value.code == 128 + signal.SIGTERM
        assert f"stopped by SIGTERM in epoch {epoch + 1} after step {step}. Run" in capsys.readouterr().out
    assert run(asked, "cut", model) == whole
    said = capsys.readouterr().out
    assert f"{model}: continues after epoch {epoch}, step {step}\n" in said
    # the rest of an epoch tells no speed
    assert ["rows/s" in line for line in said.splitlines() if " epoch " in line][1:] == [False, True, True][: 3 - epoch]
    assert run.history("cut") == run.history("whole")


def test_a_run_stopped_in_validation_does_not_train_the_epoch_again(run, config, monkeypatch, capsys) -> None:
    whole, real = run(config(), "whole"), loop_module.score_pieces

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loop_module, "score_pieces", signalled)
        with pytest.raises(SystemExit):
            run(config(), "cut")
    assert "in epoch 1 after step 13. Run" in capsys.readouterr().out
    taken, step = 0, torch.optim.Adam.step

    def counted(optimizer: torch.optim.Adam, *arguments: Any) -> Any:
        nonlocal taken
        taken += 1
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    assert run(config(), "cut") == whole
    assert taken == 3 * 13


def test_the_first_signal_is_noted_and_the_second_acts() -> None:
    before = signal.default_int_handler  # a test run in the background of a shell ignores SIGINT
    signal.signal(signal.SIGINT, before)
    with loop_module.asked_to_stop() as asked:
        assert asked() == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert asked() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with loop_module.asked_to_stop() as asked:
        assert asked() == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_the_state_of_another_config_is_not_used(run, config, capsys) -> None:
    clean = run(config(lr=0.02), "clean")
    run.killed_after(30, config(lr=0.01), "cut")
    assert run.state.is_file()
    capsys.readouterr()
    assert run(config(lr=0.02), "out") == clean
    assert "continues" not in capsys.readouterr().out


def test_the_state_of_another_dataset_is_not_used(run, config, raw_rows, write_dataset, capsys) -> None:
    run.killed_after(30, config(), "cut")
    run.dataset = write_dataset(run.root / "dataset", raw_rows(seed=1))
    capsys.readouterr()
    run(config(), "out")
    assert "continues" not in capsys.readouterr().out
    assert run.history("out")[0]["epoch"] == 1


@pytest.mark.parametrize(
    "edited",
    [
        None,
        "models/qin.py",
        "models/kernels/cross_step.c",
        "components/common/dataset.py",
        "components/training/loop.py",
    ],
)
def test_the_state_of_other_code_is_not_used(run, config, monkeypatch, capsys, edited) -> None:
    run.killed_after(30, config(), "cut")
    for package in ("models", "components"):
        shutil.copytree(ROOT / package, run.root / package, ignore=shutil.ignore_patterns("__pycache__"))
    if edited:
        with (run.root / edited).open("a") as opened:
            opened.write("\n")
    monkeypatch.setattr(models, "__file__", str(run.root / "models/__init__.py"))
    monkeypatch.setattr(state_module, "__file__", str(run.root / "components/training/state.py"))
    monkeypatch.setattr(dataset_module, "__file__", str(run.root / "components/common/dataset.py"))
    capsys.readouterr()
    run(config(), "out")
    assert ("continues" in capsys.readouterr().out) == (edited is None)


# ---- where the rows lie, and how exactly they are computed with -----------------------------------------------------


@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_rows_that_stream_give_the_same_bytes(run, config, monkeypatch, model) -> None:
    asked = config(model, max_epochs=2)
    resident = run(asked, "resident", model)
    threads, gather = set(), Dataset._gather

    def noted(data: Dataset, *arguments: Any) -> Any:
        threads.add(threading.current_thread())
        return gather(data, *arguments)

    monkeypatch.setattr(Dataset, "_gather", noted)
    assert run(asked, "again", model) == resident
    assert threads == {threading.main_thread()}
    threads.clear()
    monkeypatch.setattr(loop_module, "fits", lambda *_: False)
    assert run(asked, "streamed", model) == resident
    assert threads and threading.main_thread() not in threads


def test_rows_lie_on_a_gpu_where_they_take_half_of_what_is_free(monkeypatch) -> None:
    assert loop_module.fits(10**18, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (200, 1000))
    assert loop_module.fits(100, torch.device("cuda"))
    assert not loop_module.fits(101, torch.device("cuda"))


def test_row_bytes_are_those_of_what_a_batch_reads(dataset) -> None:
    data = Dataset.open(dataset)
    assert data.row_bytes == 2600 * (3 * 4 + 4 + 4 + 1 + 1)


def valid_auc(run: Run, name: str) -> float:
    return json.loads((run.root / name / "metrics.json").read_text())["valid_auc"]


@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_bf16_ranks_as_well_as_fp32_and_keeps_fp32_weights(run, config, model) -> None:
    exact = run(config(model), "exact", model)
    rough = run(config(model, precision="bf16"), "rough", model)
    assert rough["model.safetensors"] != exact["model.safetensors"]
    assert valid_auc(run, "rough") == pytest.approx(valid_auc(run, "exact"), abs=0.02)
    saved = load_checkpoint(run.root / "rough" / model)
    assert {tensor.dtype for tensor in saved.model.parameters()} == {torch.float32}
    run.killed_after(20, config(model, precision="bf16"), "cut", model)
    assert run(config(model, precision="bf16"), "cut", model) == rough


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_a_compiled_model_learns_the_same(run, config, dropless, model) -> None:
    """Without dropout, whose masks torch.compile draws in its own way."""
    asked = config(model, network=dropless[model], max_epochs=2, batch_size=520)
    run(asked, "eager", model)
    run(replace(asked, compile=True), "compiled", model)
    assert any((run.root / ".scratch/inductor").iterdir())
    for eager, compiled in zip(run.history("eager"), run.history("compiled"), strict=True):
        assert compiled == pytest.approx(eager, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_a_gpu_ranks_as_well_however_the_rows_come(run, config, dropless, monkeypatch, model) -> None:
    """Without dropout: other masks alone move these AUCs by 0.05."""
    asked = config(model, network=dropless[model])
    run(asked, "cpu", model)
    for name, changes in {"fp32": {}, "bf16": {"precision": "bf16"}, "compiled": {"compile": True}}.items():
        run(replace(asked, device="cuda", **changes), name, model)
        assert valid_auc(run, name) == pytest.approx(valid_auc(run, "cpu"), abs=0.02)
    monkeypatch.setattr(loop_module, "fits", lambda *_: False)
    run(replace(asked, device="cuda"), "streamed", model)
    assert valid_auc(run, "streamed") == pytest.approx(valid_auc(run, "fp32"), abs=0.01)


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on_where_it_was_killed(run, config, dropless, monkeypatch, capsys) -> None:
    """The optimizer that is loaded has another tensor for its rate: the graph is recorded after that."""
    asked, real, calls = config(network=dropless["qin"], device="cuda", compile=True), Step.__call__, 0

    def killed(step: Step, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise KeyboardInterrupt
        return real(step, *arguments)

    run(asked, "whole")
    with monkeypatch.context() as patched:
        patched.setattr(Step, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            run(asked, "cut")
    run(asked, "cut")
    assert "continues after epoch" in capsys.readouterr().out
    whole, cut = run.history("whole"), run.history("cut")
    assert [line["lr"] for line in cut] == [line["lr"] for line in whole]
    assert valid_auc(run, "cut") == pytest.approx(valid_auc(run, "whole"), abs=0.02)


# ---- what goes wrong --------------------------------------------------------------------------------------------


def poison(model: torch.nn.Module) -> None:
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))


@pytest.mark.parametrize(
    ("when", "said"),
    [("before", "in epoch 2, step 1"), ("after", "after epoch 2")],
    ids=["in the epoch", "by its last step"],
)
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_epoch_before(
    run, config, monkeypatch, when, said
) -> None:
    whole = run(config(), "whole")
    real, kept = Loop.epoch, b""

    def spoilt(own: Any, *arguments: Any) -> float:
        nonlocal kept
        epoch = own.state.progress.epoch
        if epoch == 1 and when == "before":
            poison(own.state.model)
        if epoch == 1:
            kept = run.state.read_bytes()
        loss = real(own, *arguments)
        if epoch == 1:
            poison(own.state.model)
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "epoch", spoilt)
        with pytest.raises(DivergenceError, match=rf"qin: the .*loss is nan {said}\. Lower train\.qin\.lr \(0\.01\)"):
            run(config(), "out")
    assert not (run.root / "out").exists()
    assert run.state.read_bytes() == kept != b""
    assert run(config(), "out") == whole


@pytest.mark.parametrize(
    ("when", "said"),
    [("before", "the loss is nan in epoch 2, step 5"), ("after", r"fields\.\S+ is not finite after epoch 2, step 5")],
    ids=["its loss", "its weights"],
)
def test_a_run_that_is_stopped_after_a_step_that_spoilt_it_keeps_the_state_before(
    run, config, monkeypatch, when, said
) -> None:
    whole, real, kept = run(config(), "whole"), Step.take, b""

    def spoilt(own: Any, *arguments: Any) -> Any:
        nonlocal kept
        now = (own.state.progress.epoch, own.state.progress.step) == (1, 4)
        if now:
            kept = run.state.read_bytes()
            os.kill(os.getpid(), signal.SIGTERM)
        if now and when == "before":
            poison(own.state.model)
        loss = real(own, *arguments)
        if now:
            poison(own.state.model)
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(Step, "take", spoilt)
        with pytest.raises(DivergenceError, match=f"qin: {said}"):
            run(config(), "out")
    assert run.state.read_bytes() == kept != b""
    assert run(config(), "out") == whole


def test_a_run_that_fails_leaves_its_best_epoch_as_a_checkpoint(run, config, monkeypatch) -> None:
    """The best is the second of three epochs, and the fourth spoils the weights. Another run, which ends none, leaves
    it as it is.
    """
    two, aucs, real = run(config(max_epochs=2), "two"), [0.6, 0.8, 0.7], Step.take
    best = run.root / ".scratch/train/qin/best"

    def spoilt(own: Any, *arguments: Any) -> Any:
        if own.state.progress.epoch == 3:
            poison(own.state.model)
        return real(own, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Step, "take", spoilt)
        patched.setattr(loop_module, "auc", lambda *_: aucs.pop(0))
        with pytest.raises(
            DivergenceError,
            match=r"With another train\.qin it starts again .*, 2, is a checkpoint in \.scratch/train/qin/best$",
        ):
            run(config(lr_patience=3), "out")
    assert (best / "model.safetensors").read_bytes() == two["model.safetensors"]
    found = load_checkpoint(best)
    assert (found.family, found.facts["best_epoch"], found.facts["valid_auc"]) == ("qin", 2, 0.8)
    kept = folder_hash(best)
    with monkeypatch.context() as patched:
        patched.setattr(Step, "take", lambda *_: torch.tensor(float("nan")))
        with pytest.raises(DivergenceError, match=r"clip_norm \(10\.0\)$"):
            run(config(lr=0.005), "out")
    assert folder_hash(best) == kept


def test_a_loss_that_is_not_finite_ends_a_long_epoch_early(run, config, monkeypatch) -> None:
    real, steps = Step.take, 0

    def spoilt(own: Any, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            poison(own.state.model)
        return real(own, *arguments)

    monkeypatch.setattr(Step, "take", spoilt)
    monkeypatch.setattr(loop_module, "CHECK_STEPS", 5)
    with pytest.raises(ValueError, match=r"the loss is nan in epoch 1, step 3"):
        run(config(), "out")
    assert steps == 5


@pytest.mark.parametrize(
    ("lr", "said"), [(1e30, r"the loss is (nan|inf)|\S+ is not finite"), (1.0, "the mean training loss is")]
)
def test_a_rate_that_is_too_high_is_told(run, config, lr, said) -> None:
    with pytest.raises(
        ValueError,
        match=rf"qin: ({said}).* Lower train\.qin\.lr \({lr}\) or clip_norm \(1e\+30\)".replace("e+", r"e\+"),
    ):
        run(config(lr=lr, clip_norm=1e30), "out")
    assert not (run.root / "out").exists()
    assert not run.state.exists()


def test_a_loss_that_jumps_ends_the_run_and_a_high_start_does_not(run, config, monkeypatch) -> None:
    """The second epoch computes losses a hundred times too high; the first, all of its steps, ends as it should."""
    real, factor = Step.take, {"start": 1.0, "jump": 1.0}

    def scaled(own: Any, *arguments: Any) -> Any:
        epoch, step = own.state.progress.epoch, own.state.progress.step
        return real(own, *arguments) * (factor["jump"] if epoch else factor["start"] / (step + 1))

    monkeypatch.setattr(Step, "take", scaled)
    factor["jump"] = 100.0
    with pytest.raises(ValueError, match=r"qin: the mean training loss is \d\S+ in epoch 2, after 0\.\d+\. Lower"):
        run(config(), "out")
    kept = run.state.read_bytes()
    with pytest.raises(ValueError, match="in epoch 2, after"):
        run(config(), "out")
    assert run.state.read_bytes() == kept
    factor["start"], factor["jump"] = 50.0, 1.0  # as of weights that start badly: falling, and far above a coin toss
    run(config(seed=2), "out")
    assert run.history("out")[0]["train_loss"] > 5


def of_the_allocator() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def of_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee the documentation")


def of_python() -> None:
    raise MemoryError("no memory")


@pytest.mark.parametrize("refusal", [of_the_allocator, of_cuda, of_python])
def test_too_little_memory_names_the_batch_and_keeps_the_last_epoch(run, config, monkeypatch, refusal) -> None:
    whole, real = run(config(), "whole"), Step.take

    def greedy(own: Any, *arguments: Any) -> Any:
        if own.state.progress.epoch == 2:
            refusal()
        return real(own, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Step, "take", greedy)
        with pytest.raises(
            OutOfMemoryError,
            match=r"qin: out of memory on cpu: .*\. train\.qin\.batch_size is 128; give 64, or free the device\. With ",
        ):
            run(config(), "out")
    assert load_checkpoint(run.root / ".scratch/train/qin/best").facts["best_epoch"] in (1, 2)
    assert run(config(), "out") == whole


@pytest.mark.parametrize("where", ["score_pieces", "adam"])
def test_too_little_memory_outside_of_a_step_does_not_name_the_batch(run, config, monkeypatch, where) -> None:
    monkeypatch.setattr(loop_module, where, lambda *_: of_the_allocator())
    with pytest.raises(OutOfMemoryError, match=r"batch_size does not matter; give a smaller train\.qin\.network"):
        run(config(), "out")


def test_any_other_error_keeps_its_kind(run, config, monkeypatch) -> None:
    monkeypatch.setattr(Step, "take", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        run(config(), "out")


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
        {"batch_size": -1}, {"batch_size": 1}, {"max_epochs": 0}, {"patience": 0}, {"lr": 0.0}, {"lr": float("nan")},
        {"clip_norm": 0.0}, {"lr_factor": 0.0}, {"lr_factor": 1.5}, {"embedding_l2": -1.0},
        {"network_l2": -1.0}, {"ema": 1.0}, {"lr_patience": -1},
        {"min_lr": -1.0}, {"min_lr": 0.5}, {"precision": "fp8"},
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_value_is_named(config, bad) -> None:
    ((key, value),) = bad.items()
    with pytest.raises(ValueError, match=rf"{key} is {value!r}"):
        config(**bad)


@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_the_projects_params_fit(model, dataset) -> None:
    config = load(ROOT / "params.yaml", f"train.{model}", TrainConfig)
    network = {**config.network, "exclude": []}  # the project's data have other features
    models.families.build(model, network, Dataset.open(dataset).schema)


@pytest.mark.parametrize("preset", sorted(TRAINING))
def test_the_published_settings_are_a_config(config, preset) -> None:
    """Beside what says where a run takes place and how exactly it computes, they have every key."""
    of_the_run = {"seed", "device", "precision", "compile", "network"}
    assert set(TRAINING[preset]) == {field.name for field in fields(TrainConfig)} - of_the_run
    config(**TRAINING[preset], network=PRESETS[preset])
