"""Checkpoints on disk: what was trained, with everything that scoring needs.

A checkpoint is a folder of four files. Equal inputs give equal bytes.

    config.json           family, network, calibration, schema hash, sha256 of the weights, facts of the training run
    model.safetensors     the weights
    schema.json, catalog.safetensors   the encoder folder, see `models.encoder`

Nothing is pickled. A checkpoint that is incomplete or was changed by hand does not load.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.encoder import CATALOG, SCHEMA, from_bytes, load_encoder, on_cpu, require_files, save_encoder, to_bytes
from models.families import build, network_config
from models.layers import Ranker
from models.schema import Catalog, Encoder, Schema, schema_hash

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CHECKPOINT_FILES = tuple(sorted((CONFIG, WEIGHTS, SCHEMA, CATALOG)))
CONFIG_KEYS = {"family", "network", "calibration", "schema_hash", "model_sha256", "facts"}


class Calibration(NamedTuple):
    """Logits -> probabilities: sigmoid(slope · logit + intercept) (Platt, 1999). A slope above 0 changes no order."""

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, logit_B: Tensor) -> Tensor:
        return torch.sigmoid(self.slope * logit_B + self.intercept)


UNCALIBRATED = Calibration()


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trained model with what its indices mean.

    network       as `build` takes it
    schema_hash   of `encoder` and `catalog`, as `models.schema.schema_hash` computes it
    calibration   what makes the model's logits probabilities
    facts         JSON-able facts of the training run: data hash, best epoch, valid AUC, …
    """

    family: str
    network: Mapping[str, Any]
    model: Ranker
    encoder: Encoder
    catalog: Catalog
    schema_hash: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration = UNCALIBRATED


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the four files, config.json last, so an interrupted save does not load.

    Raises ValueError if the parts of the checkpoint do not belong together.
    """
    encoder, catalog = checkpoint.encoder, checkpoint.catalog
    actual = schema_hash(encoder.schema, on_cpu(encoder.integers), catalog.to("cpu"))
    if actual != checkpoint.schema_hash:
        raise ValueError(
            f"schema_hash = {checkpoint.schema_hash}, but encoder and catalog hash to {actual}; "
            "save the encoder and catalog that the model was trained with"
        )
    state = checkpoint.model.state_dict()
    _require_same_tensors(str(folder), _blank(checkpoint.family, checkpoint.network, encoder.schema), state)
    weights = to_bytes(state)
    config = {
        "family": checkpoint.family,
        "network": asdict(network_config(checkpoint.family, checkpoint.network)),
        "calibration": checkpoint.calibration._asdict(),
        "schema_hash": actual,
        "model_sha256": hashlib.sha256(weights).hexdigest(),
        "facts": dict(checkpoint.facts),
    }
    try:
        text = json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"facts = {checkpoint.facts}: {error}; give only values that JSON can hold") from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    save_encoder(folder, encoder, catalog)
    (folder / WEIGHTS).write_bytes(weights)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def load(folder: Path) -> Checkpoint:
    """The checkpoint of a folder, verified, on the CPU, its model in eval mode.

    Raises ValueError if a file is missing, a key is unknown, the weights are not those that config.json names, the
    schema or the catalog is not the one of the training, or a tensor has another shape.
    """
    require_files(folder, CHECKPOINT_FILES)
    config = _read_config(folder / CONFIG)
    family, network = config["family"], config["network"]
    encoder, catalog, actual = load_encoder(folder)
    if actual != config["schema_hash"]:
        raise ValueError(
            f"{folder}: {SCHEMA} and {CATALOG} hash to {actual}, {CONFIG} says schema_hash = {config['schema_hash']}; "
            "restore the files that were saved together, or train again"
        )
    weights = (folder / WEIGHTS).read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    if digest != config["model_sha256"]:
        raise ValueError(
            f"{folder / WEIGHTS}: sha256 is {digest}, {CONFIG} says model_sha256 = {config['model_sha256']}; "
            "restore the weights that were saved together with it, or train again"
        )
    state = from_bytes(folder / WEIGHTS, weights)
    try:
        model = _blank(family, network, encoder.schema)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    _require_same_tensors(str(folder / WEIGHTS), model, state)
    model.load_state_dict(state, assign=True)
    return Checkpoint(
        family=family,
        network=network,
        model=model.eval(),
        encoder=encoder,
        catalog=catalog,
        schema_hash=actual,
        facts=config["facts"],
        calibration=_calibration(folder / CONFIG, config["calibration"]),
    )


def checkpoint_hash(folder: Path) -> str:
    """One sha256 for the four files; in a shell, inside the folder:

    sha256sum catalog.safetensors config.json model.safetensors schema.json | sha256sum
    """
    require_files(folder, CHECKPOINT_FILES)
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in CHECKPOINT_FILES]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _calibration(path: Path, said: Any) -> Calibration:
    try:
        found = Calibration(**{name: float(value) for name, value in said.items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: calibration = {said}: {error}; save the checkpoint again") from None
    if not (0 < found.slope < math.inf and math.isfinite(found.intercept)):
        raise ValueError(f"{path}: calibration = {said}; the slope is above 0, and both are finite: train again")
    return found


def _blank(family: str, network: Mapping[str, Any], schema: Schema) -> Ranker:
    """The model on the meta device: names and shapes without memory, and no random number is drawn."""
    with torch.device("meta"):
        return build(family, network, schema)


def _require_same_tensors(where: str, model: Ranker, state: Mapping[str, Tensor]) -> None:
    def described(tensors: Mapping[str, Tensor]) -> dict[str, str]:
        return {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}

    wanted, found = described(model.state_dict()), described(state)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{where}: tensor {name} is {found.get(name, 'missing')}, family, network and schema want "
                f"{wanted.get(name, 'none')}; use the network and schema that the weights were trained with"
            )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); save the checkpoint again") from None
    keys = set(config) if isinstance(config, dict) else set()
    if keys != CONFIG_KEYS:
        raise ValueError(f"{path}: keys {sorted(keys)}, wanted {sorted(CONFIG_KEYS)}; save the checkpoint again")
    return config
