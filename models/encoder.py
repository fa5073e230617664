"""The encoder folder: what a dataset hands to training. It tells what each index means.

    schema.json           features, vocabularies, history length
    catalog.safetensors   `catalog.*`: the items; `integers.NAME`: raw values of integer features

Needs no model family, so an edit of a family does not change what this file does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from models.schema import Catalog, Encoder, Schema, schema_hash

SCHEMA, CATALOG = "schema.json", "catalog.safetensors"
ENCODER_FILES = (SCHEMA, CATALOG)


def save_encoder(folder: Path, encoder: Encoder, catalog: Catalog) -> None:
    """Writes schema.json and catalog.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    integers = {f"integers.{name}": values for name, values in encoder.integers.items()}
    (folder / SCHEMA).write_text(encoder.schema.to_json(), encoding="utf-8")
    (folder / CATALOG).write_bytes(to_bytes(catalog.tensors() | integers))


def load_encoder(folder: Path) -> tuple[Encoder, Catalog, str]:
    """Encoder, catalog and their recomputed schema hash. Raises ValueError if a file is missing or unreadable."""
    require_files(folder, ENCODER_FILES)
    try:
        schema = Schema.from_json((folder / SCHEMA).read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / SCHEMA}: not a schema ({error!r}); write it again with save_encoder") from error
    tensors = from_bytes(folder / CATALOG, (folder / CATALOG).read_bytes())
    try:
        catalog = Catalog.from_tensors(tensors)
    except KeyError as error:
        raise ValueError(f"{folder / CATALOG}: no tensor catalog.{error.args[0]}; write it with save_encoder") from None
    integers = {k.removeprefix("integers."): v for k, v in tensors.items() if k.startswith("integers.")}
    return Encoder(schema, integers), catalog, schema_hash(schema, integers, catalog)


def require_files(folder: Path, names: tuple[str, ...]) -> None:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder}: no file {missing}; give a folder that holds {list(names)}")


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    # clones, because safetensors refuses tensors that are views of one storage
    return safetensors.torch.save({k: v.contiguous().clone() for k, v in on_cpu(tensors).items()})


def from_bytes(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error}); restore it or write it again") from None
