"""train: one ranker, with early stopping on the valid days.

A run's state is saved after every epoch, and after the current step when SIGTERM or Ctrl-C asks to stop. The same
command continues a run that was stopped or killed. On as many threads it ends in the same bytes as a run that nothing
stopped. The state lies outside of the outputs, under .scratch, and is removed when the run is done. For several
processes under torchrun see `components.training.parallel`.
"""

from __future__ import annotations

import csv
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from components.common.artifacts import new_file, new_folder, write_json
from components.common.dataset import Dataset
from components.training.config import TrainConfig
from components.training.loop import SCRATCH, DivergenceError, Loop, TrainingError, enough_memory
from components.training.parallel import local_rank, ranks
from components.training.state import State
from components.training.warm_start import Start, take_weights
from models.checkpoint import Checkpoint, save
from models.families import build
from models.kernels import choice
from models.layers import Ranker


def run(
    config: TrainConfig, model: str, dataset: Path, weights: Path, output: Path, metrics: Path, history: Path
) -> dict[str, Any]:
    """Train and write the checkpoint folder, the figures and the epochs.

    weights  what training begins from, as `start` writes it

    Raises ValueError on an unknown model or network key and a dataset that is not whole, and what `Loop.run` raises.
    After an OutOfMemoryError or DivergenceError the best epoch, where there was one, is a checkpoint under .scratch.
    """
    data = Dataset.open(dataset)
    valid = data.columns["label"][slice(*data.splits["valid"])]
    if not 0 < int(valid.sum()) < len(valid):
        raise ValueError(
            f"{dataset}: the valid days hold {int(valid.sum())} clicks in {len(valid)} rows, and training watches "
            "their AUC; raise split.valid_share or give more days"
        )
    device = _device(model, config)
    begun = Start.read(weights)
    torch.manual_seed(config.seed)
    ranker = build(model, config.network, data.schema)
    first, last = data.splits["train"]
    with ranks(device) as among:
        taken = None
        if begun.checkpoint is not None:
            taken = take_weights(ranker, config.network, data, begun.checkpoint)
            other = f"cold start: the champion {begun.champion} has another network: {begun.checkpoint.network}"
            among.say(f"{model}: {f'starts from the champion {begun.champion}: {taken}' if taken else other}")
        clock = time.perf_counter()
        champion = begun.champion if taken else None
        with enough_memory(model, device):
            loop = Loop(model, config, ranker.to(device), data, start=begun.sha256, ranks=among)
        state = loop.state
        try:
            seconds_an_epoch = loop.run()
        except TrainingError as error:
            remedy = ""
            if state.best:
                best = SCRATCH / model / "best"
                if among.rank == 0:
                    _write_best(best, loop.config, model, ranker, data, champion, state)
                remedy = (
                    f". With another train.{model} it starts again from epoch 1; the best epoch so far, "
                    f"{state.progress.best_epoch}, is a checkpoint in {best}"
                )
            if isinstance(error, DivergenceError):  # as all processes do, and torchrun ends them with the first
                among.largest(0)
            raise type(error)(f"{error}{remedy}") from error
        seconds = time.perf_counter() - clock
    progress = state.progress
    found = {
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "valid_auc": progress.best_auc,
        "parameters": sum(p.numel() for p in ranker.parameters()),
        "seconds": round(seconds, 2),
        # of the training steps alone, over the epochs that this process ran whole
        "rows_per_second": round((last - first) / seconds_an_epoch) if seconds_an_epoch else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}",
        "processes": among.size,
        "kernels": choice.chosen(),
    }
    if among.rank:
        return found
    _write_best(output, loop.config, model, ranker, data, champion, state)
    history.parent.mkdir(parents=True, exist_ok=True)
    with new_file(history) as scratch, scratch.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, progress.history[0])
        writer.writeheader()
        writer.writerows(progress.history)
    write_json(metrics, found)
    shutil.rmtree(SCRATCH / model, ignore_errors=True)
    return found


def summary(found: dict[str, Any]) -> dict[str, str]:
    speed = found["rows_per_second"]
    return {
        "epochs": f"{found['epochs']}, the best is {found['best_epoch']}",
        "valid AUC": f"{found['valid_auc']:.4f}",
        "parameters": f"{found['parameters']:,}",
        "speed": f"{speed:,} rows/s on {found['device']}" if speed else "no whole epoch in this process",
        "kernels": ", ".join(f"{kernel} in {form}" for kernel, form in found["kernels"].items()) or "none needed",
    }


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
