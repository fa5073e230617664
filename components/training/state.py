"""The state of a training run: everything that it needs to go on after a stop or a kill."""

from __future__ import annotations

import hashlib
import json
import math
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

import models
from components.common import dataset, scoring
from components.common.artifacts import file_hash, new_file
from components.common.dataset import Dataset
from components.training.config import TrainConfig
from models.layers import Ranker


@dataclass
class Progress:
    """Where a run stands: JSON-able, saved with the tensors.

    epoch, step   whole epochs, and steps of the epoch after them
    steps         of all epochs
    best_epoch, best_auc   the best epoch so far and its valid AUC
    best          its valid AUC − logloss, which epochs are compared by
    stale, lr_stale  epochs since the best one, and since the rate was last cut
    """

    epoch: int = 0
    step: int = 0
    steps: int = 0
    lr: float = 0.0
    best_epoch: int = 0
    best_auc: float = 0.0
    best: float = -math.inf
    stale: int = 0
    lr_stale: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def note(self, config: TrainConfig, found: dict[str, float]) -> bool:
        """Take an epoch's figures in. Returns whether it is the best so far; without valid figures every epoch is."""
        self.epoch, self.step = self.epoch + 1, 0
        self.history.append({"epoch": self.epoch, "lr": self.lr, **found})
        if "valid_auc" not in found:
            self.best_epoch = self.epoch
            return True
        worth = found["valid_auc"] - found["valid_logloss"]
        if worth > self.best:
            self.best, self.best_auc, self.best_epoch = worth, found["valid_auc"], self.epoch
            self.stale, self.lr_stale = 0, 0
            return True
        self.stale, self.lr_stale = self.stale + 1, self.lr_stale + 1
        if self.lr_stale > config.lr_patience:
            self.lr, self.lr_stale = max(self.lr * config.lr_factor, config.min_lr), 0
        return False

    def done(self, config: TrainConfig) -> bool:
        return self.epoch >= config.max_epochs or self.stale >= config.patience


class State:
    """What a run goes on from. On disk it is state.safetensors: weights, best weights, Adam's moments and the losses of
    the current epoch, and the progress in the file's JSON header.

    loss_S  float64: for each step of the current epoch, the sum of the loss over its rows
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

    def set_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # where a CUDA graph reads it
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def keep_best(self) -> None:
        """The scored weights are the best so far."""
        self.best = {key: value.detach().cpu().clone() for key, value in self.scored.state_dict().items()}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the running mean after a step. At first its memory is shorter, to forget the initial weights."""
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


def fingerprint(name: str, config: TrainConfig, data: Dataset, start: str) -> str:
    """A hash of all that decides a run's weights. A saved state with another fingerprint is not used.

    Threads, processes and the C compiler are not in it: they change the last bits only, and a run may go on with
    others.
    """
    code = [Path(str(part.__file__)) for part in (dataset, scoring)]
    code += sorted(Path(__file__).parent.glob("*.py"))
    code += sorted(file for file in Path(str(models.__file__)).parent.rglob("*.*") if file.suffix in (".py", ".c"))
    facts = [data.facts[key] for key in ("data_sha256", "schema_hash", "splits")]
    parts = [name, asdict(config), *facts, start, torch.__version__]
    return hashlib.sha256(json.dumps([*parts, *map(file_hash, code)], sort_keys=True).encode()).hexdigest()
