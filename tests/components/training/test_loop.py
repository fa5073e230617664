"""What goes wrong in training ends it with a message that says what to change, and keeps what is good."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from components.common.artifacts import folder_hash
from components.training import loop as loop_module
from components.training.loop import DivergenceError, Loop, OutOfMemoryError
from components.training.step import Step
from models.checkpoint import load as load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


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
