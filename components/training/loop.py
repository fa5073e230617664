"""The training loop: epochs of shuffled batches, each followed by the valid days, until these stop getting better.

Rows without valid days are trained on for `max_epochs`, and the last epoch is the one that is kept: see `refit`.

A batch is a gather on the device, where the rows lie as long as they fit. Else they stay on the host, and the next
batch is fetched while this one is in use. Each epoch draws its order from (seed, epoch), and each step its dropout from
(seed, epoch, step). So no generator's state is kept, and a run that was stopped or killed goes on to the same bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn
from tqdm import tqdm

from components.common.dataset import Dataset
from components.common.scoring import SCORE_BATCH, score_pieces
from components.training.config import TrainConfig
from components.training.parallel import Ranks, with_whole_batch_norms
from components.training.state import State, fingerprint
from components.training.step import Step, adam
from models.layers import Ranker
from models.metrics import auc

SCRATCH = Path(".scratch/train")
CHECK_STEPS = 256  # the losses are looked at this often: each look waits for the device
COIN_TOSS = math.log(2)  # nats: the loss of always predicting 1/2


class TrainingError(ValueError):
    """A run that cannot go on: what is wrong, and what to change."""


class DivergenceError(TrainingError):
    """A loss or a weight that is not finite, or losses that jumped."""


class OutOfMemoryError(TrainingError):
    """Too little memory on the device or on the host."""


class Loop:
    """One training run of one model.

    name     the model's name in params.yaml
    data     on the host; it goes to the model's device, its rows too where they fit
    start    hash of what the weights were begun from
    rates    the learning rate of each epoch, where another run has found them
    scratch  holds the state, in a folder of the model's name; a run that was stopped there continues
    """

    def __init__(
        self,
        name: str,
        config: TrainConfig,
        model: Ranker,
        data: Dataset,
        *,
        start: str = "",
        rates: Sequence[float] = (),
        ranks: Ranks | None = None,
        scratch: Path = SCRATCH,
    ) -> None:
        first, last = data.splits["train"]
        self.asked, config = config, config.for_rows(last - first)
        self.name, self.config, self.model, self.ranks = name, config, model, ranks or Ranks()
        self.rates, self.device = rates, next(model.parameters()).device
        keep_freed_memory()
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        if self.ranks.size > 1:
            with_whole_batch_norms(model)
        self.data = data.to(self.device, stream=not fits(data.row_bytes, self.device))
        optimizer = adam(config, model, last - first)
        self.state = State(scratch / name, fingerprint(name, config, data, start), model, optimizer, config)
        self.step = Step(config, self.state, self.data, self.ranks)
        if self.state.load():
            at = self.state.progress
            self.ranks.say(f"{name}: continues after epoch {at.epoch}, step {at.step}")

    def run(self) -> float:
        """Train until the end. Returns the mean seconds of the epochs that this process trained whole, 0 if none.

        Raises OutOfMemoryError, and DivergenceError where the loss or a weight is not finite, or where an epoch's mean
        loss is more than twice that of the epoch before (in the first: of the first step), and more than a coin
        toss's. SystemExit (128 + signal) where it was asked to stop and has saved its state.
        """
        progress, seconds = self.state.progress, []
        first, last = self.data.splits["train"]
        with asked_to_stop() as asked:

            def pause() -> None:
                if signum := self.ranks.largest(asked()):
                    self.stop(signum)

            while not progress.done(self.config):
                if self.rates:
                    progress.lr = self.rates[progress.epoch]
                whole, begun = progress.step == 0, time.perf_counter()
                with enough_memory(self.name, self.device, self.config.batch_size):
                    loss = self.epoch(pause)
                if whole:
                    seconds.append(time.perf_counter() - begun)
                found = {"train_loss": loss}
                if "valid" in self.data.splits:
                    with enough_memory(self.name, self.device):
                        found |= self.validate(pause)
                if progress.note(self.config, found):
                    self.state.keep_best()
                if self.ranks.rank == 0:
                    self.state.save()
                judged = (
                    f", valid AUC {found['valid_auc']:.4f}, logloss {found['valid_logloss']:.4f}"
                    if "valid_auc" in found
                    else ""
                )
                speed = f", {(last - first) / seconds[-1]:,.0f} rows/s" if whole else ""
                self.ranks.say(f"{self.name} epoch {progress.epoch}: loss {loss:.4f}{judged}{speed}")
        return sum(seconds) / len(seconds) if seconds else 0.0

    def epoch(self, pause: Callable[[], None]) -> float:
        """One pass over the training days, from the state's step on. Returns the mean loss of a row.

        pause  called between two steps
        """
        config, state, progress = self.config, self.state, self.state.progress
        state.set_rate(progress.lr)
        start, end = self.data.splits["train"]
        rng = torch.Generator().manual_seed(_seed(config.seed, progress.epoch))
        order = torch.randperm(end - start, generator=rng).add_(start)
        chunks = _chunks(order.to(self.data.columns["item"].device), config.batch_size)
        if progress.step == 0:
            state.loss_S = torch.zeros(len(chunks), dtype=torch.float64, device=self.device)
        self.model.train()
        left = chunks[progress.step :]
        fetched = self.data.fetched(chunk[self.ranks.share(len(chunk))] for chunk in left)
        shown = tqdm(
            zip(left, fetched, strict=True), f"{self.name} epoch {progress.epoch + 1}", len(chunks), unit="step",
            leave=False, initial=progress.step, disable=True if self.ranks.rank else None,
        )  # fmt: skip
        for chunk, columns in shown:
            torch.manual_seed(_seed(config.seed, progress.epoch, progress.step))
            state.loss_S[progress.step] = self.step(columns, len(chunk)) * len(chunk)
            progress.step += 1
            progress.steps += 1
            state.follow(config.ema)
            if progress.step % CHECK_STEPS == 0:
                self.require_finite()
            pause()
        self.require_finite()
        mean = float(state.loss_S.sum()) / sum(len(chunk) for chunk in chunks)
        before = progress.history[-1]["train_loss"] if progress.history else float(state.loss_S[0]) / len(chunks[0])
        if mean > 2 * max(before, COIN_TOSS):
            where = f"epoch {progress.epoch + 1}, after {before:.3g}"
            raise self.diverged(f"the mean training loss is {mean:.3g} in {where}")
        return mean

    @torch.inference_mode()
    def validate(self, pause: Callable[[], None]) -> dict[str, float]:
        """AUC and logloss of the valid days. Each rank scores its share of the rows, and all get the whole."""
        start, end = self.data.splits["valid"]
        size = SCORE_BATCH * self.ranks.size
        starts = range(start, end, size)
        rows = [min(size, end - first) for first in starts]
        shares = [self.ranks.share(count) for count in rows]
        pieces = (slice(first + own.start, first + own.stop) for first, own in zip(starts, shares, strict=True))
        found: list[Tensor] = []
        for count, scored in zip(rows, score_pieces(self.state.scored, self.data, pieces), strict=True):
            found.append(self.ranks.whole(torch.stack(scored), count))
            pause()
        score_B, label_B = torch.cat(found, 1)
        logloss = float(nn.functional.binary_cross_entropy_with_logits(score_B, label_B))
        if not math.isfinite(logloss):  # of weights that are finite and too large
            raise self.diverged(f"the valid logloss is {logloss} after epoch {self.state.progress.epoch + 1}")
        return {"valid_auc": auc(label_B, score_B), "valid_logloss": logloss}

    def stop(self, signum: int) -> None:
        """Save the state and end the process: some rank was asked to stop."""
        progress = self.state.progress
        self.require_finite()
        if self.ranks.rank == 0:
            self.state.save()
        self.ranks.largest(0)  # torchrun ends all processes with the first: the state comes before
        where = f"epoch {progress.epoch + 1} after step {progress.step}"
        self.ranks.say(
            f"{self.name}: stopped by {signal.Signals(signum).name} in {where}. Run the same command to continue there"
        )
        raise SystemExit(128 + signum)

    def require_finite(self) -> None:
        """The losses of this epoch so far, and the weights after its last step. Raises DivergenceError."""
        epoch, step = self.state.progress.epoch + 1, self.state.progress.step
        finite = self.state.loss_S[:step].isfinite()
        if not finite.all():
            first = int(finite.logical_not().nonzero()[0])
            raise self.diverged(f"the loss is {float(self.state.loss_S[first])} in epoch {epoch}, step {first + 1}")
        for key, tensor in self.model.state_dict().items():
            if not tensor.isfinite().all():
                raise self.diverged(f"{key} is not finite after epoch {epoch}, step {step}")

    def diverged(self, what: str) -> DivergenceError:
        lr, clip_norm = self.config.lr, self.config.clip_norm
        return DivergenceError(f"{self.name}: {what}. Lower train.{self.name}.lr ({lr}) or clip_norm ({clip_norm})")


@contextmanager
def enough_memory(name: str, device: torch.device, batch_size: int | None = None) -> Iterator[None]:
    """Turns each kind of memory failure into OutOfMemoryError.

    batch_size  where the block is training steps: a smaller one helps only there
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        said = f"{name}: out of memory on {device}: {str(error).partition(chr(10))[0]}"
        if batch_size is None:
            remedy = f"It was no training step, so batch_size does not matter; give a smaller train.{name}.network"
        else:
            remedy = f"train.{name}.batch_size is {batch_size}; give {max(2, batch_size // 2)}"
        raise OutOfMemoryError(f"{said}. {remedy}, or free the device") from error


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], int]]:
    """Notes the first SIGTERM or Ctrl-C of the block: gives its number, else 0. The second one ends the process."""
    noted = 0

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal noted
        noted = signum
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: noted
    finally:
        restore()


def keep_freed_memory() -> None:
    """Make glibc keep what a step frees. Else the kernel takes it back, and clears and maps it again for the next."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(trim_threshold, 2**31 - 1)


def fits(row_bytes: int, device: torch.device) -> bool:
    """Whether the rows may lie on the device: in half of what is free, as weights, moments and a step come on top."""
    return device.type != "cuda" or row_bytes <= torch.cuda.mem_get_info(device)[0] / 2


def _seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()[:6])


def _chunks(order: Tensor, size: int) -> list[Tensor]:
    """Batches of an order. A last one of a single row is left out: BatchNorm has no variance of it."""
    return [chunk for chunk in order.split(size) if len(chunk) > 1]
