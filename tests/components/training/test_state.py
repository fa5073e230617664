"""A run that is stopped or killed, whenever that is, continues to the same bytes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import models
from components.common import dataset as dataset_module
from components.training import loop as loop_module
from components.training import state as state_module
from components.training.config import TrainConfig
from models.checkpoint import CHECKPOINT_FILES
from models.families import FAMILIES
from models.kernels import cross_step
from tests.components.training.conftest import Run

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.usefixtures("one_thread")


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
