"""The model families, and checkpoints on disk: what was trained, with everything that scoring needs.

A checkpoint is a folder of four files, the same bytes for the same inputs:

    config.json           family, network, schema hash, sha256 of the weights, facts of the training run
    model.safetensors     the weights
    schema.json           features, vocabularies, history length
    catalog.safetensors   `catalog.*`: the items; `integers.NAME`: raw values of integer features

`schema.json` and `catalog.safetensors` alone are an encoder folder: what a dataset hands to training.
Nothing is pickled. A checkpoint that was cut short or changed by hand does not load.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from models.layers import Ranker
from models.qin import QIN, QINConfig
from models.schema import Catalog, Encoder, Schema, schema_hash
from models.sdcnv3 import SDCNv3, SDCNv3Config

CONFIG, WEIGHTS, SCHEMA, CATALOG = "config.json", "model.safetensors", "schema.json", "catalog.safetensors"
ENCODER_FILES = (SCHEMA, CATALOG)
CHECKPOINT_FILES = tuple(sorted((CONFIG, WEIGHTS, SCHEMA, CATALOG)))
CONFIG_KEYS = {"family", "network", "schema_hash", "model_sha256", "facts"}


class Family(NamedTuple):
    """A kind of network: its config dataclass, and the module that takes (config, schema)."""

    config: type[Any]
    module: Callable[[Any, Schema], Ranker]


FAMILIES: dict[str, Family] = {
    "qin": Family(QINConfig, QIN),
    "sdcnv3": Family(SDCNv3Config, SDCNv3),
}

# FAMILY/DATASET -> the network of the best published run there
PRESETS: dict[str, dict[str, Any]] = {
    "qin/microlens": asdict(QINConfig()),
    "sdcnv3/ml-1m": asdict(SDCNv3Config()),
    "sdcnv3/criteo": asdict(SDCNv3Config(deep_dropout=0.1, shallow_dropout=0.2, batch_norm=False)),
}

# The same names -> how that run was trained: keys of train.MODEL in params.yaml, beside its `network`
TRAINING: dict[str, dict[str, Any]] = {
    "qin/microlens": {
        "batch_size": 8192, "max_epochs": 100, "patience": 8, "lr": 2e-3, "lr_factor": 0.5, "lr_patience": 0,
        "min_lr": 1e-6, "embedding_l2": 2e-4, "network_l2": 0.0, "ema": 0.0, "clip_norm": 10.0,
    },
    "sdcnv3/ml-1m": {
        "batch_size": 4096, "max_epochs": 100, "patience": 2, "lr": 1e-3, "lr_factor": 0.1, "lr_patience": 0,
        "min_lr": 1e-6, "embedding_l2": 0.01, "network_l2": 0.0, "ema": 0.0, "clip_norm": 10.0,
    },
    "sdcnv3/criteo": {
        "batch_size": 4096, "max_epochs": 100, "patience": 2, "lr": 1e-3, "lr_factor": 0.1, "lr_patience": 0,
        "min_lr": 1e-6, "embedding_l2": 1e-5, "network_l2": 0.0, "ema": 0.0, "clip_norm": 10.0,
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trained model with what its indices mean.

    network       as `build` takes it
    schema_hash   of `encoder` and `catalog`, as `models.schema.schema_hash` computes it
    facts         JSON-able facts of the training run: data hash, best epoch, valid AUC, …
    """

    family: str
    network: Mapping[str, Any]
    model: Ranker
    encoder: Encoder
    catalog: Catalog
    schema_hash: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def build(family: str, network: Mapping[str, Any], schema: Schema) -> Ranker:
    """A freshly initialised model. Raises ValueError on an unknown family, an unknown key or a bad value."""
    return FAMILIES[_known(family)].module(network_config(family, network), schema)


def network_config(family: str, network: Mapping[str, Any]) -> Any:
    """The family's config dataclass. Raises ValueError on an unknown family, an unknown key or a bad value."""
    config = FAMILIES[_known(family)].config
    known = [f.name for f in fields(config)]
    if unknown := sorted(set(network) - set(known)):
        raise ValueError(f"{config.__name__}: unknown key {unknown}; it has {known}")
    return config(**{key: tuple(value) if isinstance(value, list) else value for key, value in network.items()})


def save_encoder(folder: Path, encoder: Encoder, catalog: Catalog) -> None:
    """Writes schema.json and catalog.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    integers = {f"integers.{name}": values for name, values in encoder.integers.items()}
    (folder / SCHEMA).write_text(encoder.schema.to_json(), encoding="utf-8")
    (folder / CATALOG).write_bytes(_to_bytes(catalog.tensors() | integers))


def load_encoder(folder: Path) -> tuple[Encoder, Catalog, str]:
    """Encoder, catalog and their recomputed schema hash. Raises ValueError where a file is missing or unreadable."""
    _require_files(folder, ENCODER_FILES)
    try:
        schema = Schema.from_json((folder / SCHEMA).read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / SCHEMA}: no schema ({error!r}); write it again with save_encoder") from error
    tensors = _from_bytes(folder / CATALOG, (folder / CATALOG).read_bytes())
    try:
        catalog = Catalog.from_tensors(tensors)
    except KeyError as error:
        raise ValueError(f"{folder / CATALOG}: no tensor catalog.{error.args[0]}; write it with save_encoder") from None
    integers = {k.removeprefix("integers."): v for k, v in tensors.items() if k.startswith("integers.")}
    return Encoder(schema, integers), catalog, schema_hash(schema, integers, catalog)


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the four files, config.json last: a save that was cut short does not load.

    Raises ValueError where the parts of the checkpoint do not belong together.
    """
    encoder, catalog = checkpoint.encoder, checkpoint.catalog
    actual = schema_hash(encoder.schema, _on_cpu(encoder.integers), catalog.to("cpu"))
    if actual != checkpoint.schema_hash:
        raise ValueError(
            f"schema_hash = {checkpoint.schema_hash}, but encoder and catalog hash to {actual}; "
            "save the encoder and catalog that the model was trained with"
        )
    state = checkpoint.model.state_dict()
    _require_same_tensors(str(folder), _blank(checkpoint.family, checkpoint.network, encoder.schema), state)
    weights = _to_bytes(state)
    config = {
        "family": checkpoint.family,
        "network": asdict(network_config(checkpoint.family, checkpoint.network)),
        "schema_hash": actual,
        "model_sha256": hashlib.sha256(weights).hexdigest(),
        "facts": dict(checkpoint.facts),
    }
    try:
        text = json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"facts = {checkpoint.facts}: {error}; give what JSON can hold") from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    save_encoder(folder, encoder, catalog)
    (folder / WEIGHTS).write_bytes(weights)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def load(folder: Path) -> Checkpoint:
    """The checkpoint of a folder, verified, on the CPU, its model in eval mode.

    Raises ValueError, naming file, value and remedy, on a missing file, an unknown key, weights that are not those
    config.json names, a schema or catalog that is not the one trained with, and tensors of another shape.
    """
    _require_files(folder, CHECKPOINT_FILES)
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
    state = _from_bytes(folder / WEIGHTS, weights)
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
    )


def checkpoint_hash(folder: Path) -> str:
    """One sha256 for the four files; in a shell, inside the folder:

    sha256sum catalog.safetensors config.json model.safetensors schema.json | sha256sum
    """
    _require_files(folder, CHECKPOINT_FILES)
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in CHECKPOINT_FILES]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _known(family: str) -> str:
    if family not in FAMILIES:
        raise ValueError(f"family = {family!r}: give one of {sorted(FAMILIES)}")
    return family


def _blank(family: str, network: Mapping[str, Any], schema: Schema) -> Ranker:
    """The model without memory for its tensors: names and shapes alone, and no random number is drawn."""
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


def _require_files(folder: Path, names: tuple[str, ...]) -> None:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder}: no file {missing}; give a folder that holds {list(names)}")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}); save the checkpoint again") from None
    keys = set(config) if isinstance(config, dict) else set()
    if keys != CONFIG_KEYS:
        raise ValueError(f"{path}: keys {sorted(keys)}, wanted {sorted(CONFIG_KEYS)}; save the checkpoint again")
    return config


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    # clones, because safetensors refuses tensors that are views of one storage
    return safetensors.torch.save({k: v.contiguous().clone() for k, v in _on_cpu(tensors).items()})


def _from_bytes(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"{path}: no safetensors file ({error}); restore it or write it again") from None
