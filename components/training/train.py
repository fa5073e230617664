"""train: one ranker, with early stopping on the valid days.

A run's state is saved after every epoch, and after the current step when SIGTERM or Ctrl-C asks to stop. The same
command continues a run that was stopped or killed. On as many threads it ends in the same bytes as a run that nothing
stopped. The state lies outside of the outputs, under .scratch, and is removed when the run is done. For several
processes under torchrun see `components.training.parallel`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import models
from components.common.artifacts import file_hash, new_file, new_folder, write_json
from components.common.dataset import Dataset
from components.common.scoring import score
from components.training import calibration
from components.training.config import TrainConfig
from components.training.loop import SCRATCH, DivergenceError, Loop, TrainingError, enough_memory
from components.training.parallel import local_rank, ranks
from components.training.warm_start import Start, knows_valid_days, take_weights
from models.checkpoint import Calibration, Checkpoint, save
from models.families import build
from models.kernels import choice

SPEED = ("rows_per_second", "device", "processes", "kernels")


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
    device = device_of(f"train.{model}", config)
    begun = Start.read(weights)
    torch.manual_seed(config.seed)
    ranker = build(model, config.network, data.schema)
    with ranks(device) as among:
        taken = None
        if begun.checkpoint is not None:
            if seen := knows_valid_days(begun.checkpoint, data):
                said = f"cold start: the champion {begun.champion} {seen}"
            elif taken := take_weights(ranker, config.network, data, begun.checkpoint):
                said = f"starts from the champion {begun.champion}: {taken}"
            else:
                said = f"cold start: the champion {begun.champion} has another network: {begun.checkpoint.network}"
            among.say(f"{model}: {said}")
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
                    write_best(best, model, loop, data, facts(loop, champion))
                remedy = (
                    f". With another train.{model} it starts again from epoch 1; the best epoch so far, "
                    f"{state.progress.best_epoch}, is a checkpoint in {best}"
                )
            if isinstance(error, DivergenceError):  # as all processes do, and torchrun ends them with the first
                among.largest(0)
            raise type(error)(f"{error}{remedy}") from error
    progress = state.progress
    found = {
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "valid_auc": progress.best_auc,
        "parameters": sum(p.numel() for p in ranker.parameters()),
    }
    speed = speed_of(loop, seconds_an_epoch)
    if among.rank:
        return found | speed
    write_best(output, model, loop, data, facts(loop, champion))
    history.parent.mkdir(parents=True, exist_ok=True)
    with new_file(history) as scratch, scratch.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, progress.history[0])
        writer.writeheader()
        writer.writerows(progress.history)
    write_json(metrics, found)  # equal runs write equal bytes: what was fast today is in the stage's note alone
    shutil.rmtree(SCRATCH / model, ignore_errors=True)
    return found | speed


def summary(found: dict[str, Any]) -> dict[str, str]:
    return {
        "epochs": f"{found['epochs']}, the best is {found['best_epoch']}",
        "valid AUC": f"{found['valid_auc']:.4f}",
        "parameters": f"{found['parameters']:,}",
        **speed_summary(found),
    }


def measured(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in SPEED}


def speed_of(loop: Loop, seconds_an_epoch: float) -> dict[str, Any]:
    """What a run's steps cost: rows a second over the epochs that this process trained whole, and on what."""
    first, last = loop.data.splits["train"]
    cuda = loop.device.type == "cuda"
    return {
        "rows_per_second": round((last - first) / seconds_an_epoch) if seconds_an_epoch else None,
        "device": torch.cuda.get_device_name(loop.device) if cuda else f"cpu x {torch.get_num_threads()}",
        "processes": loop.ranks.size,
        "kernels": choice.chosen(),
    }


def speed_summary(found: dict[str, Any]) -> dict[str, str]:
    speed = found["rows_per_second"]
    return {
        "speed": f"{speed:,} rows/s on {found['device']}" if speed else "no whole epoch in this process",
        "kernels": ", ".join(f"{kernel} in {form}" for kernel, form in found["kernels"].items()) or "none needed",
    }


def facts(loop: Loop, champion: str | None) -> dict[str, Any]:
    """What a checkpoint says of its training. `train_until`: the weights and the epochs know no row from there on."""
    data, progress = loop.data, loop.state.progress
    first, last = data.splits["train"]
    return {
        "data_sha256": data.facts["data_sha256"],
        "best_epoch": progress.best_epoch,
        "valid_auc": progress.best_auc,
        "rates": [epoch["lr"] for epoch in progress.history[: progress.best_epoch]],
        "train": {key: value for key, value in asdict(loop.config).items() if key not in ("network", "device")},
        "train_rows": last - first,
        "train_until": data.midnight("test_from"),
        "configuration": configuration(loop),
        "warm_start": champion,
    }


def configuration(loop: Loop) -> str:
    """A hash of what a person may change of a model: settings, network, features and the code of the models. Two models
    of one configuration differ in their data and their seed alone. The rows decide the batch size of 0."""
    said = {key: value for key, value in asdict(loop.asked).items() if key not in ("seed", "device")}
    features = [(f.name, f.owner, f.kind, f.origin, f.numeric) for f in loop.data.schema.features]
    code = sorted(file for file in Path(str(models.__file__)).parent.rglob("*") if file.suffix in (".py", ".c"))
    parts = [loop.name, said, features, loop.data.schema.history_length, *map(file_hash, code)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_best(
    folder: Path, name: str, loop: Loop, data: Dataset, facts: dict[str, Any], calibrated: Calibration | None = None
) -> None:
    """The best epoch's checkpoint, whole or not at all; the model takes its weights.

    calibrated  the calibration; None fits it on the valid days
    """
    loop.model.load_state_dict(loop.state.best)
    if calibrated is None:
        calibrated = calibration.fit(*score(loop.model, loop.data, data.splits["valid"]))
    with new_folder(folder) as scratch:
        checkpoint = Checkpoint(
            family=name,
            network=loop.config.network,
            model=loop.model,
            encoder=data.encoder,
            catalog=data.catalog,
            schema_hash=data.facts["schema_hash"],
            facts=facts,
            calibration=calibrated,
        )
        save(scratch, checkpoint)


def device_of(section: str, config: TrainConfig) -> torch.device:
    """The device that a config names; `section` of params.yaml is where it is set. Raises ValueError on another."""
    wanted, local = config.device, local_rank()
    if local is not None and (config.compile or wanted not in ("auto", "cpu")):
        raise ValueError(
            f"{section}.device is {wanted!r} and compile is {config.compile}; under torchrun the first must be "
            "auto or cpu, and the second false"
        )
    if wanted == "auto":
        return torch.device("cuda", local or 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the second: this torch knows no CUDA
        raise ValueError(f"{section}.device is {wanted!r}: {error}; give auto, cpu or cuda:0") from None
    return device
