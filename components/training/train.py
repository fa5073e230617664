"""train: one ranker, Adam, early stopping on the valid days.

A batch is a gather on the device, where the rows lie as long as they fit; else they stay on the host, and the next
batch is fetched meanwhile. Every step draws its dropout from (seed, epoch, step), and every epoch its order. A run's
state is saved after every epoch, and after the step under way when SIGTERM or Ctrl-C asks to stop. So a run that was
stopped or killed goes on with the same command, and on as many threads ends in the same bytes. The state lies outside
of the outputs, under .scratch, and is dropped when the run is done. Under torchrun see `components.training.parallel`.
"""

from __future__ import annotations

import csv
import ctypes
import hashlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

import models
from components.common.artifacts import file_hash, new_file, new_folder, write_json
from components.common.dataset import Dataset
from components.training.parallel import Ranks, local_rank, ranks, with_whole_batch_norms
from components.training.warm_start import Start, take_weights
from models.layers import Ranker, part_of_batch
from models.metrics import auc
from models.registry import Checkpoint, build, save
from models.schema import Logits

SCORE_BATCH = 16_384  # rows scored at once
SCRATCH = Path(".scratch/train")
INDUCTOR = Path(".scratch/inductor")
CHECK_STEPS = 256  # the losses are looked at this often: each look waits for the device
COIN_TOSS = math.log(2)  # nats: the loss of predicting 1/2 always
PRECISIONS = ("fp32", "bf16")
WARM_STEPS = 3  # before a step is recorded


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """seed          of initialisation, order and dropout
    batch_size    rows a step, of all processes together
    max_epochs, patience   epochs at most; epochs without a better valid AUC before stopping
    lr, lr_factor, lr_patience, min_lr   Adam's rate, and its cut after epochs that do not improve
    embedding_l2  L2 on embeddings and the vector projection, l2/2 · ‖p‖² in the loss: what is clipped has its gradient
    network_l2    the same on all other weights
    ema           0, or the decay a step of a running mean of the weights, which is then what is scored and kept
    clip_norm     gradient norm at most
    device        auto, cpu, or a CUDA device such as cuda:0; torchrun needs auto or cpu
    precision     fp32 (on CUDA its matrix products are TF32), or bf16: forward and backward under autocast. Weights,
                  loss and valid scores are fp32 in both
    compile       train through torch.compile, on CUDA each step as one CUDA graph; what it compiled is kept in
                  .scratch/inductor
    network       the model's own config, see models/

    The values of the published runs: `PRESETS` (network) and `TRAINING` (the rest) in models/registry.py.
    """

    seed: int
    batch_size: int
    max_epochs: int
    patience: int
    lr: float
    lr_factor: float
    lr_patience: int
    min_lr: float
    embedding_l2: float
    network_l2: float
    ema: float
    clip_norm: float
    device: str
    precision: str
    compile: bool
    network: dict[str, Any]

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.batch_size < 2:
            raise ValueError("batch_size is 1; BatchNorm needs 2 rows or more")
        for name in ("lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 < self.lr_factor <= 1:
            raise ValueError(f"lr_factor is {self.lr_factor}; it must be in (0, 1]")
        for name in ("embedding_l2", "network_l2", "lr_patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; it must be in [0, 1), and 0 keeps the last weights")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr is {self.min_lr}; it must be in [0, lr], and lr is {self.lr}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; it must be one of {', '.join(PRECISIONS)}")


@dataclass
class Progress:
    """Where a run stands: JSON-able, saved with the tensors.

    epoch, step   whole epochs, and steps of the one after them
    steps         of all epochs
    """

    epoch: int = 0
    step: int = 0
    steps: int = 0
    lr: float = 0.0
    best_epoch: int = 0
    best_auc: float = -math.inf
    stale: int = 0
    lr_stale: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def note(self, config: TrainConfig, found: dict[str, float]) -> bool:
        """Take an epoch's figures in. Returns whether it is the best so far."""
        self.epoch, self.step = self.epoch + 1, 0
        self.history.append({"epoch": self.epoch, "lr": self.lr, **found})
        better = found["valid_auc"] > self.best_auc
        if better:
            self.best_auc, self.best_epoch, self.stale, self.lr_stale = found["valid_auc"], self.epoch, 0, 0
            return True
        self.stale, self.lr_stale = self.stale + 1, self.lr_stale + 1
        if self.lr_stale > config.lr_patience:
            self.lr, self.lr_stale = max(self.lr * config.lr_factor, config.min_lr), 0
        return False

    def done(self, config: TrainConfig) -> bool:
        return self.epoch >= config.max_epochs or self.stale >= config.patience


class TrainingError(ValueError):
    """A run that cannot go on: what is wrong, and what to change. `state` is the run's; None where it had not begun."""

    def __init__(self, message: str, state: State | None) -> None:
        super().__init__(message)
        self.state = state


class DivergenceError(TrainingError):
    """A loss or a weight that is not finite, or losses that jumped."""


class OutOfMemoryError(TrainingError):
    """Too little memory on the device or on the host."""


def run(
    config: TrainConfig, model_name: str, dataset: Path, weights: Path, output: Path, metrics: Path, history: Path
) -> dict[str, Any]:
    """Train and write the checkpoint folder, the figures and the epochs.

    weights  what training begins from, as `start` writes it

    Raises ValueError on an unknown model or network key and a dataset that is not whole. OutOfMemoryError, and
    DivergenceError where the loss or a weight is not finite, or the loss is in the mean of an epoch more than twice
    what it was in the epoch before (in the first: at the first step), and than a coin toss: both leave the best epoch,
    where there was one, as a checkpoint under .scratch. SystemExit (128 + signal) where it was asked to stop and has
    saved its state.
    """
    data = Dataset.open(dataset)
    valid = data.columns["label"][slice(*data.splits["valid"])]
    if not 0 < int(valid.sum()) < len(valid):
        raise ValueError(
            f"{dataset}: the valid days hold {int(valid.sum())} clicks in {len(valid)} rows, and training watches "
            "their AUC; raise split.valid_share or give more days"
        )
    device = _device(model_name, config)
    begun = Start.read(weights)
    torch.manual_seed(config.seed)
    model = build(model_name, config.network, data.schema)
    first, last = data.splits["train"]
    with ranks(device) as here:
        taken = None
        if begun.checkpoint is not None:
            taken = take_weights(model, config.network, data, begun.checkpoint)
            other = f"cold start: the champion {begun.champion} has another network: {begun.checkpoint.network}"
            here.say(f"{model_name}: {f'starts from the champion {begun.champion}: {taken}' if taken else other}")
        clock = time.perf_counter()
        champion = begun.champion if taken else None
        try:
            with _enough_memory(model_name, device):
                state, seconds_a_pass = fit(config, model.to(device), data, begun.sha256, model_name, here)
        except TrainingError as failed:
            if failed.state is not None and failed.state.best:
                best = SCRATCH / model_name / "best"
                if here.rank == 0:
                    _write_best(best, config, model_name, model, data, champion, failed.state)
                told = f"the best one so far, {failed.state.progress.best_epoch}, is a checkpoint in {best}"
                failed.args = (f"{failed}. A changed train.{model_name} starts from epoch 1; {told}",)
            if isinstance(failed, DivergenceError):  # as all processes do, and torchrun ends them with the first
                here.largest(0)
            raise
        seconds = time.perf_counter() - clock
    progress = state.progress
    found = {
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "valid_auc": progress.best_auc,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 2),
        # Of the training steps alone, over the epochs that this process ran whole.
        "rows_per_second": round((last - first) / seconds_a_pass) if seconds_a_pass else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}",
        "processes": here.size,
    }
    if here.rank:
        return found
    _write_best(output, config, model_name, model, data, champion, state)
    history.parent.mkdir(parents=True, exist_ok=True)
    with new_file(history) as scratch, scratch.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, progress.history[0])
        writer.writeheader()
        writer.writerows(progress.history)
    write_json(metrics, found)
    shutil.rmtree(SCRATCH / model_name, ignore_errors=True)
    return found


def _write_best(
    folder: Path, config: TrainConfig, name: str, model: Ranker, data: Dataset, champion: str | None, state: State
) -> None:
    """The best epoch's checkpoint, whole or not at all; the model takes its weights."""
    model.load_state_dict(state.best)
    first, last = data.splits["train"]
    facts = {
        "data_sha256": data.facts["data_sha256"],
        "best_epoch": state.progress.best_epoch,
        "valid_auc": state.progress.best_auc,
        "train": {key: value for key, value in asdict(config).items() if key not in ("network", "device")},
        "train_rows": last - first,
        "warm_start": champion,
    }
    with new_folder(folder) as scratch:
        checkpoint = Checkpoint(
            family=name,
            network=config.network,
            model=model,
            encoder=data.encoder,
            catalog=data.catalog,
            schema_hash=data.facts["schema_hash"],
            facts=facts,
        )
        save(scratch, checkpoint)


def _device(name: str, config: TrainConfig) -> torch.device:
    wanted, local = config.device, local_rank()
    if local is not None and (config.compile or wanted not in ("auto", "cpu")):
        raise ValueError(
            f"train.{name}.device is {wanted!r} and compile is {config.compile}; under torchrun the first must be "
            "auto or cpu, and the second false"
        )
    if wanted == "auto":
        return torch.device("cuda", local or 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the second: this torch knows no CUDA
        raise ValueError(f"train.{name}.device is {wanted!r}: {error}; give auto, cpu or cuda:0") from None
    return device


@contextmanager
def _enough_memory(
    name: str, device: torch.device, state: State | None = None, batch_size: int | None = None
) -> Iterator[None]:
    """OutOfMemoryError for each of its kinds. `batch_size` where the block is training steps: it helps there alone."""
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
        raise OutOfMemoryError(f"{said}. {remedy}, or free the device", state) from error


def fit(config: TrainConfig, model: Ranker, data: Dataset, start: str, name: str, here: Ranks) -> tuple[State, float]:
    """Epochs until the valid AUC stops rising. Returns the last state, and mean seconds of an epoch's steps.

    data   on the host; it goes to the model's device, its rows too if they fit
    start  hash of what the weights were begun from
    """
    device = next(model.parameters()).device
    keep_freed_memory()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    data = data.to(device, stream=not fits(data.row_bytes, device))
    if here.size > 1:
        with_whole_batch_norms(model)
    state = State(SCRATCH / name, _fingerprint(config, data, start, name), model, adam(config, model), config)
    resumed = state.load()
    progress = state.progress
    if resumed:
        here.say(f"{name}: goes on after epoch {progress.epoch}, step {progress.step}")
    step = Step(config, state, data, here)
    seconds: list[float] = []
    first, last = data.splits["train"]
    with _asked_to_stop() as asked:

        def pause() -> None:
            """Between two pieces of work: end here if any of the processes was asked to."""
            if signum := here.largest(asked()):
                _require_finite(config, name, state)
                if here.rank == 0:
                    state.save()
                here.largest(0)  # torchrun ends all processes with the first: the state comes before
                where = f"epoch {progress.epoch + 1} after step {progress.step}"
                here.say(f"{name}: stopped by {signal.Signals(signum).name} in {where}; the same command goes on there")
                raise SystemExit(128 + signum)

        while not progress.done(config):
            whole, begun = progress.step == 0, time.perf_counter()
            with _enough_memory(name, device, state, config.batch_size):
                loss = train_epoch(config, state, step, data, here, name, pause)
            if whole:
                seconds.append(time.perf_counter() - begun)
            with _enough_memory(name, device, state):
                score_B, label_B = score(state.scored, data, data.splits["valid"], here, pause)
            logloss = float(nn.functional.binary_cross_entropy_with_logits(score_B, label_B))
            if not math.isfinite(logloss):  # of weights that are finite and too large
                raise _diverged(config, name, f"the valid logloss is {logloss} after epoch {progress.epoch + 1}", state)
            found = {"train_loss": loss, "valid_auc": auc(label_B, score_B), "valid_logloss": logloss}
            if progress.note(config, found):
                state.best = {key: value.detach().cpu().clone() for key, value in state.scored.state_dict().items()}
            if here.rank == 0:
                state.save()
            speed = f", {(last - first) / seconds[-1]:,.0f} rows/s" if whole else ""
            here.say(
                f"{name} epoch {progress.epoch}: loss {loss:.4f}, valid AUC {found['valid_auc']:.4f}, "
                f"logloss {logloss:.4f}{speed}"
            )
    return state, sum(seconds) / len(seconds) if seconds else 0.0


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees: else the kernel takes it back, and clears and maps it again for the next."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(trim_threshold, 2**31 - 1)


def fits(row_bytes: int, device: torch.device) -> bool:
    """Whether the rows may lie on the device: in half of what is free, for weights, moments and a step come on top."""
    return device.type != "cuda" or row_bytes <= torch.cuda.mem_get_info(device)[0] / 2


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], int]]:
    """The first SIGTERM or Ctrl-C is noted while the block lasts: its number, else 0. A second one acts as ever."""
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


def adam(config: TrainConfig, model: Ranker) -> torch.optim.Adam:
    """Adam over the regularised parameters and the others, each group with its `l2`, which `add_l2` reads."""
    regularised = model.regularised_parameters()
    ids = {id(p) for p in regularised}
    others = [p for p in model.parameters() if id(p) not in ids]
    groups = [
        {"params": regularised, "l2": config.embedding_l2},
        {"params": others, "l2": config.network_l2},
    ]
    device = next(model.parameters()).device
    if device.type != "cuda":
        return torch.optim.Adam(groups, lr=config.lr, fused=True)
    rate: Any = torch.tensor(config.lr, device=device)  # read by a CUDA graph, so where it lies it stays
    return torch.optim.Adam(groups, lr=rate, fused=True, capturable=True)


@torch.no_grad()
def add_l2(optimizer: torch.optim.Adam) -> None:
    """The gradient of l2/2 · ‖p‖² beside that of the loss. (Adam's own weight decay would come after the clipping.)"""
    for group in optimizer.param_groups:
        if group["l2"]:
            learning = [p for p in group["params"] if p.grad is not None]
            torch._foreach_add_([p.grad for p in learning], learning, alpha=group["l2"])


def train_epoch(
    config: TrainConfig,
    state: State,
    step: Step,
    data: Dataset,
    here: Ranks,
    name: str,
    pause: Callable[[], None],
) -> float:
    """One pass in an order of its own, from the state's step on. Returns the mean loss of a row."""
    model, optimizer, progress = state.model, state.optimizer, state.progress
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(progress.lr)
        else:
            group["lr"] = progress.lr
    start, end = data.splits["train"]
    rng = torch.Generator().manual_seed(_seed(config.seed, progress.epoch))
    order = torch.randperm(end - start, generator=rng).add_(start)
    chunks = _chunks(order.to(data.columns["item"].device), config.batch_size)
    if progress.step == 0:
        state.loss_S = torch.zeros(len(chunks), dtype=torch.float64, device=data.device)
    model.train()
    left = chunks[progress.step :]
    fetched = data.fetched(chunk[here.share(len(chunk))] for chunk in left)
    shown = tqdm(
        zip(left, fetched, strict=True), f"{name} epoch {progress.epoch + 1}", len(chunks), unit="step", leave=False,
        initial=progress.step, disable=True if here.rank else None,
    )  # fmt: skip
    for chunk, columns in shown:
        torch.manual_seed(_seed(config.seed, progress.epoch, progress.step))
        state.loss_S[progress.step] = step(columns, len(chunk)) * len(chunk)
        progress.step += 1
        progress.steps += 1
        state.follow(config.ema)
        if progress.step % CHECK_STEPS == 0:
            _require_finite(config, name, state)
        pause()
    _require_finite(config, name, state)
    mean = float(state.loss_S.sum()) / sum(len(chunk) for chunk in chunks)
    before = progress.history[-1]["train_loss"] if progress.history else float(state.loss_S[0]) / len(chunks[0])
    if mean > 2 * max(before, COIN_TOSS):
        where = f"epoch {progress.epoch + 1}, after {before:.3g}"
        raise _diverged(config, name, f"the mean training loss is {mean:.3g} in {where}", state)
    return mean


class Step:
    """One training step on what `Dataset.fetched` gives of a batch; returns the loss of all its rows, float64.

    With `compile`, batches of full size go through torch.compile, and on CUDA the whole step, from the gather to Adam,
    is recorded after WARM_STEPS as one CUDA graph: a replay is one call, where a step is hundreds of kernels that take
    the host longer to launch than the device to run. The last batch of an epoch, which is smaller, runs as it is
    written.
    """

    def __init__(self, config: TrainConfig, state: State, data: Dataset, here: Ranks) -> None:
        self.config, self.state, self.data, self.here = config, state, data, here
        self.compiled: Callable[[list[Tensor], int], Tensor] | None = None
        if config.compile:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(INDUCTOR.resolve())
            self.compiled = torch.compile(self.loss, dynamic=False)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = 0

    def __call__(self, fetched: list[Tensor], rows: int) -> Tensor:
        """`rows` of all processes together."""
        if self.compiled is None or rows < self.config.batch_size:
            return train_step(self.config, self.state, self.loss, self.here, fetched, rows)
        if self.data.device.type != "cuda":
            return train_step(self.config, self.state, self.compiled, self.here, fetched, rows)
        if self.graph is None:
            if self.warm == 0:
                self.stream = torch.cuda.Stream(self.data.device)
            self.warm += 1
            self.stream.wait_stream(torch.cuda.current_stream(self.data.device))
            if self.warm <= WARM_STEPS:  # kernels are compiled and moments made; a recording cannot do that
                with torch.cuda.stream(self.stream):
                    loss = train_step(self.config, self.state, self.compiled, self.here, fetched, rows)
                torch.cuda.current_stream(self.data.device).wait_stream(self.stream)
                return loss
            self.inputs = [column.clone() for column in fetched]
            self.state.optimizer.zero_grad(set_to_none=True)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.output = train_step(self.config, self.state, self.compiled, self.here, self.inputs, rows)
        for own, column in zip(self.inputs, fetched, strict=True):
            own.copy_(column)
        self.graph.replay()
        return self.output

    def loss(self, fetched: list[Tensor], rows: int) -> Tensor:
        model, here = self.state.model, self.here
        batch = self.data.arranged(fetched)
        assert batch.label_B is not None
        half = torch.autocast(self.data.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        with half, part_of_batch(here.share(rows).start, rows) if here.size > 1 else nullcontext():
            logits = model(batch, self.data.catalog, self.data.click_log)
        logits = Logits(logits.logit_B.float(), tuple(part_B.float() for part_B in logits.parts_B))
        return model.loss(*here.gather(logits, batch.label_B, rows))


def train_step(
    config: TrainConfig,
    state: State,
    loss_of: Callable[[list[Tensor], int], Tensor],
    here: Ranks,
    fetched: list[Tensor],
    rows: int,
) -> Tensor:
    """From the loss to Adam, for a batch of `rows` rows of which `fetched` are the rank's. The loss, float64."""
    loss = loss_of(fetched, rows)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    here.sum_gradients(state.model)
    add_l2(state.optimizer)
    nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_norm)
    state.optimizer.step()
    return loss.detach().double()


def _seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()[:6])


def _require_finite(config: TrainConfig, name: str, state: State) -> None:
    """The losses of the epoch under way, and the weights that its last step left."""
    epoch, step = state.progress.epoch + 1, state.progress.step
    finite = state.loss_S[:step].isfinite()
    if not finite.all():
        first = int(finite.logical_not().nonzero()[0])
        what = f"the loss is {float(state.loss_S[first])} in epoch {epoch}, step {first + 1}"
        raise _diverged(config, name, what, state)
    for key, tensor in state.model.state_dict().items():
        if not tensor.isfinite().all():
            raise _diverged(config, name, f"{key} is not finite after epoch {epoch}, step {step}", state)


def _diverged(config: TrainConfig, name: str, what: str, state: State) -> DivergenceError:
    return DivergenceError(
        f"{name}: {what}. Lower train.{name}.lr ({config.lr}) or clip_norm ({config.clip_norm})", state
    )


@torch.inference_mode()
def score(
    model: Ranker,
    data: Dataset,
    rows: tuple[int, int],
    here: Ranks | None = None,
    pause: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits and labels, float32, of a range of rows: each rank scores its share, and all have the whole."""
    here = here or Ranks()
    model.eval()
    pieces = [(start, min(start + SCORE_BATCH * here.size, rows[1])) for start in range(*rows, SCORE_BATCH * here.size)]
    shares = [(start, here.share(end - start)) for start, end in pieces]
    batches = data.batches(slice(start + own.start, start + own.stop) for start, own in shares)
    found: list[Tensor] = []
    for (start, end), batch in zip(pieces, batches, strict=True):
        logit_B = model(batch, data.catalog, data.click_log).logit_B.float()
        assert batch.label_B is not None
        found.append(here.whole(torch.stack((logit_B, batch.label_B)), end - start))
        if pause is not None:
            pause()
    logit_B, label_B = torch.cat(found, 1)
    return logit_B, label_B


def _chunks(order: Tensor, size: int) -> list[Tensor]:
    """Batches of an order; a last one of a single row is left out, for BatchNorm has no variance of it."""
    return [chunk for chunk in order.split(size) if len(chunk) > 1]


def _fingerprint(config: TrainConfig, data: Dataset, start: str, name: str) -> str:
    """Of all that a run's weights follow from: the state of another run is no state of this one.

    But for threads, processes and the C compiler, which decide last bits alone: a run may go on with others.
    """
    code = [Path(__file__), *(Path(__file__).with_name(f"{part}.py") for part in ("dataset", "parallel", "warm_start"))]
    code += sorted(file for file in Path(models.__file__ or "").parent.iterdir() if file.suffix in (".py", ".c"))
    parts = [name, asdict(config), data.facts["data_sha256"], data.facts["schema_hash"], start, torch.__version__]
    return hashlib.sha256(json.dumps([*parts, *map(file_hash, code)], sort_keys=True).encode()).hexdigest()


class State:
    """All that a run goes on from. On disk: state.safetensors with weights, best weights, Adam's moments and the losses
    of the epoch under way; progress in its JSON header.

    loss_S  float64: of each step of that epoch, the sum over its rows
    """

    def __init__(
        self, folder: Path, fingerprint: str, model: Ranker, optimizer: torch.optim.Adam, config: TrainConfig
    ) -> None:
        self.file = folder / "state.safetensors"
        self.fingerprint = fingerprint
        self.model, self.optimizer, self.progress = model, optimizer, Progress(lr=config.lr)
        self.mean = deepcopy(model).requires_grad_(False) if config.ema else None
        self.best: dict[str, Tensor] = {}
        self.loss_S = torch.zeros(0, dtype=torch.float64)

    @property
    def scored(self) -> Ranker:
        """The model that is judged and kept."""
        return self.model if self.mean is None else self.mean

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the running mean after a step, with a shorter memory at first: else it would hold on to the start."""
        if self.mean is None:
            return
        share = 1 - min(decay, (1 + self.progress.steps) / (10 + self.progress.steps))
        torch._foreach_lerp_(list(self.mean.parameters()), list(self.model.parameters()), share)
        for mean, now in zip(self.mean.buffers(), self.model.buffers(), strict=True):
            mean.copy_(now)

    def save(self) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()} | {"losses": self.loss_S}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        if self.mean is not None:
            tensors |= {f"mean.{k}": v for k, v in self.mean.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{k}": v for k, v in moments.items()}
        header = {"fingerprint": self.fingerprint, "progress": json.dumps(asdict(self.progress))}
        with new_file(self.file) as scratch:
            safetensors.torch.save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, scratch, header)

    def load(self) -> bool:
        """False where there is no state, or it is of another config, dataset, start or code."""
        if not self.file.is_file():
            return False
        with safetensors.safe_open(self.file, framework="pt") as opened:
            header = opened.metadata()
            if header["fingerprint"] != self.fingerprint:
                return False
            # clones: else they would lie in the file, which the next save replaces
            tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118 - no mapping
        self.model.load_state_dict(_under(tensors, "model."))
        if self.mean is not None:
            self.mean.load_state_dict(_under(tensors, "mean."))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in _under(tensors, "adam.").items():
            index, name = key.split(".", 1)
            moments.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.progress = Progress(**json.loads(header["progress"]))
        self.best = _under(tensors, "best.")
        self.loss_S = tensors["losses"].to(next(self.model.parameters()).device)
        return True


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
