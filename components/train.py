"""train: one ranker, Adam, early stopping on the valid days.

The whole dataset lies on the device, and a batch is a gather. Every epoch draws its order and its dropout from
(seed, epoch), and its state is saved, so a run that was killed goes on from its last epoch and ends in the same bytes.
The state lies outside of the outputs, under .scratch, and is dropped when the run is done.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

import models
from components.artifacts import file_hash, new_file, new_folder, write_json
from components.dataset import Dataset
from models.layers import Ranker
from models.metrics import auc
from models.registry import Checkpoint, build, save

SCORE_BATCH = 16_384  # rows scored at once
SCRATCH = Path(".scratch/train")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """seed          of initialisation, order and dropout
    batch_size    rows a step
    max_epochs, patience   epochs at most; epochs without a better valid AUC before stopping
    lr, lr_factor, lr_patience, min_lr   Adam's rate, and its cut after epochs that do not improve
    embedding_l2  coupled L2 on embeddings and the vector projection (Adam's weight decay)
    clip_norm     gradient norm at most
    device        auto, cpu, or a CUDA device such as cuda:0
    network       the model's own config, see models/
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
    clip_norm: float
    device: str
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
        for name in ("embedding_l2", "lr_patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr is {self.min_lr}; it must be in [0, lr], and lr is {self.lr}")


@dataclass
class Progress:
    """Where a run stands after an epoch: JSON-able, saved with the tensors."""

    epoch: int = 0
    lr: float = 0.0
    best_epoch: int = 0
    best_auc: float = -math.inf
    stale: int = 0
    lr_stale: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def note(self, config: TrainConfig, found: dict[str, float]) -> bool:
        """Take an epoch's figures in. Returns whether it is the best so far."""
        self.epoch += 1
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


def run(
    config: TrainConfig, model_name: str, dataset: Path, output: Path, metrics: Path, history: Path
) -> dict[str, Any]:
    """Train and write the checkpoint folder, the figures and the epochs.

    Raises ValueError on an unknown model or network key, a dataset that is not whole, and a loss that is not finite.
    """
    data = Dataset.open(dataset)
    valid = data.columns["label"][slice(*data.splits["valid"])]
    if not 0 < int(valid.sum()) < len(valid):
        raise ValueError(
            f"{dataset}: the valid days hold {int(valid.sum())} clicks in {len(valid)} rows, and training watches "
            "their AUC; raise split.valid_share or give more days"
        )
    device = _device(model_name, config.device)
    torch.manual_seed(config.seed)
    model = build(model_name, config.network, data.schema).to(device)
    start = time.perf_counter()
    progress, best, steps_seconds = fit(config, model, data.to(device), SCRATCH / model_name, model_name)
    seconds = time.perf_counter() - start
    model.load_state_dict(best)
    first, last = data.splits["train"]
    facts = {
        "data_sha256": data.facts["data_sha256"],
        "best_epoch": progress.best_epoch,
        "valid_auc": progress.best_auc,
        "train": {key: value for key, value in asdict(config).items() if key not in ("network", "device")},
        "train_rows": last - first,
    }
    with new_folder(output) as folder:
        checkpoint = Checkpoint(
            family=model_name,
            network=config.network,
            model=model,
            encoder=data.encoder,
            catalog=data.catalog,
            schema_hash=data.facts["schema_hash"],
            facts=facts,
        )
        save(folder, checkpoint)
    history.parent.mkdir(parents=True, exist_ok=True)
    with new_file(history) as scratch, scratch.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, progress.history[0])
        writer.writeheader()
        writer.writerows(progress.history)
    found = {
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "valid_auc": progress.best_auc,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 2),
        # Of the training steps alone, over the epochs that this process ran.
        "rows_per_second": round((last - first) / steps_seconds) if steps_seconds else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}",
    }
    write_json(metrics, found)
    shutil.rmtree(SCRATCH / model_name, ignore_errors=True)
    return found


def _device(name: str, wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the second: this torch knows no CUDA
        raise ValueError(f"train.{name}.device is {wanted!r}: {error}; give auto, cpu or cuda:0") from None
    return device


def fit(
    config: TrainConfig, model: Ranker, data: Dataset, scratch: Path, name: str
) -> tuple[Progress, dict[str, Tensor], float]:
    """Epochs until the valid AUC stops rising. Returns progress, the best weights, mean seconds of an epoch's steps."""
    optimizer = adam(config, model)
    fingerprint = hashlib.sha256(
        json.dumps(
            [name, asdict(config), data.facts["data_sha256"], data.facts["schema_hash"], _code()], sort_keys=True
        ).encode()
    ).hexdigest()
    state = State(scratch, fingerprint)
    progress, best = state.load(model, optimizer) or (Progress(lr=config.lr), {})
    if progress.epoch:
        print(f"{name}: goes on after epoch {progress.epoch}", flush=True)
    seconds: list[float] = []
    start, end = data.splits["train"]
    while not progress.done(config):
        for group in optimizer.param_groups:
            group["lr"] = progress.lr
        begun = time.perf_counter()
        loss = train_epoch(config, model, data, optimizer, progress.epoch, name)
        seconds.append(time.perf_counter() - begun)
        score_B, label_B = score(model, data, data.splits["valid"])
        found = {
            "train_loss": loss,
            "valid_auc": auc(label_B, score_B),
            "valid_logloss": float(nn.functional.binary_cross_entropy_with_logits(score_B, label_B)),
        }
        _require_finite(config, name, progress.epoch, found["valid_logloss"])  # the last step may have spoilt it
        if progress.note(config, found):
            best = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
        state.save(model, optimizer, progress, best)
        print(
            f"{name} epoch {progress.epoch}: loss {loss:.4f}, valid AUC {found['valid_auc']:.4f}, "
            f"logloss {found['valid_logloss']:.4f}, {(end - start) / seconds[-1]:,.0f} rows/s",
            flush=True,
        )
    return progress, best, sum(seconds) / len(seconds) if seconds else 0.0


def adam(config: TrainConfig, model: Ranker) -> torch.optim.Adam:
    """Adam with the published coupled L2 on the regularised parameters alone."""
    regularised = model.regularised_parameters()
    ids = {id(p) for p in regularised}
    others = [p for p in model.parameters() if id(p) not in ids]
    groups = [{"params": regularised, "weight_decay": config.embedding_l2}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.Adam(groups, lr=config.lr, fused=True)


def train_epoch(
    config: TrainConfig, model: Ranker, data: Dataset, optimizer: torch.optim.Adam, epoch: int, name: str
) -> float:
    """One pass in an order of its own. Returns the mean loss of a row."""
    seed = int.from_bytes(hashlib.sha256(f"{config.seed} {epoch}".encode()).digest()[:6])
    torch.manual_seed(seed)
    start, end = data.splits["train"]
    device = data.click_log.device
    order = torch.randperm(end - start, generator=torch.Generator().manual_seed(seed)).to(device)
    model.train()
    total, rows_seen = torch.zeros((), dtype=torch.float64, device=device), 0
    steps = tqdm(
        list(_chunks(order, config.batch_size)), f"{name} epoch {epoch + 1}", unit="step", disable=None, leave=False
    )
    for rows in steps:
        batch = data.batch(rows + start)
        assert batch.label_B is not None
        loss = model.loss(model(batch, data.catalog, data.click_log), batch.label_B)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        total += loss.detach().double() * len(rows)
        rows_seen += len(rows)
    mean = float(total) / rows_seen
    _require_finite(config, name, epoch, mean)
    return mean


def _require_finite(config: TrainConfig, name: str, epoch: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"{name}: the loss is {loss} in epoch {epoch + 1}; the epoch before it is kept. "
            f"Lower train.{name}.lr ({config.lr}) or clip_norm ({config.clip_norm})"
        )


@torch.inference_mode()
def score(model: Ranker, data: Dataset, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Logits and labels, float32, of a range of rows."""
    model.eval()
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    for start in range(rows[0], rows[1], SCORE_BATCH):
        batch = data.batch(slice(start, min(start + SCORE_BATCH, rows[1])))
        logits.append(model(batch, data.catalog, data.click_log).logit_B.float())
        assert batch.label_B is not None
        labels.append(batch.label_B)
    return torch.cat(logits), torch.cat(labels)


def _chunks(order: Tensor, size: int) -> Iterator[Tensor]:
    """Batches of an order; a last one of a single row is left out, for BatchNorm has no variance of it."""
    return (chunk for chunk in order.split(size) if len(chunk) > 1)


def _code() -> list[str]:
    """Hashes of what computes an epoch: weights that other code trained are no start for this one."""
    files = [Path(__file__), *sorted(Path(models.__file__ or "").parent.glob("*.py"))]
    return [torch.__version__, *(file_hash(file) for file in files)]


class State:
    """A run's state on disk: state.safetensors with weights, best weights and Adam's moments, and its JSON header."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.file = folder / "state.safetensors"
        self.fingerprint = fingerprint

    def save(self, model: Ranker, optimizer: torch.optim.Adam, progress: Progress, best: dict[str, Tensor]) -> None:
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"best.{k}": v for k, v in best.items()}
        for i, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{k}": v for k, v in moments.items()}
        header = {"fingerprint": self.fingerprint, "progress": json.dumps(asdict(progress))}
        with new_file(self.file) as scratch:
            safetensors.torch.save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, scratch, header)

    def load(self, model: Ranker, optimizer: torch.optim.Adam) -> tuple[Progress, dict[str, Tensor]] | None:
        """None where there is no state, or it is of another config, dataset or code."""
        if not self.file.is_file():
            return None
        with safetensors.safe_open(self.file, framework="pt") as opened:
            header = opened.metadata()
            if header["fingerprint"] != self.fingerprint:
                return None
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
        model.load_state_dict(_under(tensors, "model."))
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _under(tensors, "adam.").items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return Progress(**json.loads(header["progress"])), _under(tensors, "best.")


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
