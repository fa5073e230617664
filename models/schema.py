"""What every model reads: the features and their vocabularies, the catalog of items, one batch of rows.

A row never carries item contents or history items. It carries a catalog row number and a (start, end)
range of the click log, so the training set stays small and a batch is a gather on the device.

Shape suffixes, in all of `models/` (`hist_BL` is rows × history positions):

    B  rows of a batch             I  catalog rows                L  history positions
    N  any rows                    U  catalog rows, each once     C  clicks in the log
    F  impression fields           G  categorical item fields     T  values of a multi-valued field
    P  parts of an item            M  width of an item, all parts V  values of a vocabulary
    E  width of the item's vector, or of a field                  d  width of an embedding
    D  width of a network's x; in SDCNv3 of a head's              H  heads
    K  clicks of one history; in SDCNv3 D/2                       A  width of the attention
    R  rows of a quadratic layer
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import inf, log
from typing import Literal, NamedTuple

import torch
from torch import Tensor

PADDING = 0
UNKNOWN = 1
SPECIAL = 2  # indices below this are not values: 0 is "missing or padding", 1 is "never seen in training"
SPACES = " \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
IDS = {"user_id", "item_id"}  # not features where the data has only one user or one item


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One input of a model.

    owner  "impression": a value per row (user attributes, context, popularity at that moment);
           "item": a value per catalog row, the same for candidates and for history positions.
    kind   "categorical": one index; "multi": `length` indices, 0-padded; "vector": `size` floats, frozen.
    origin where the server finds an impression feature: "user" (the online store's profile, or the user id),
           "context" (the request), "item" (a table of each item's state now). Unused for item features.
    size   vocabulary size with the two special indices, or the width of a vector.
    vocab  the string values of indices 2, 3, …; None where the raw values are integers (they lie sorted in
           `Encoder.integers[name]`) and for vectors.
    numeric  the context gives a number; `bucket` turns it into a value of `vocab`.
    """

    name: str
    owner: Literal["impression", "item"]
    kind: Literal["categorical", "multi", "vector"]
    size: int
    length: int = 1
    origin: Literal["user", "context", "item"] | None = None
    vocab: tuple[str, ...] | None = None
    numeric: bool = False

    @cached_property
    def index(self) -> dict[str, int]:
        """The index of each value of `vocab`."""
        return {value: i + SPECIAL for i, value in enumerate(self.vocab or ())}


def bucket(number: float) -> str | None:
    """The categorical value of a number x: floor(ln(x)²) above 2, else its whole part.

    None if x is not finite or is below −2⁶³. As in the Criteo challenge; `components/data/sources/files.py` has the
    same in SQL.
    """
    return str(int(log(number) ** 2 if number > 2 else number)) if -(2**63) <= number < inf else None


def trimmed(text: str) -> str | None:
    """A text without the spaces at its ends; None if nothing is left.

    `components/data/sources/files.py` has the same in SQL. A space is a character of Unicode's category Zs, so tabs and
    line ends stay.
    """
    return text.strip(SPACES) or None


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The ordered features of a dataset, the history length L, and the embedding version of the item vector."""

    features: tuple[Feature, ...]
    history_length: int
    embedding_version: str = ""

    def __post_init__(self) -> None:
        names = [feature.name for feature in self.features]
        if len(set(names)) != len(names):
            raise ValueError(f"schema: feature names {names} repeat; give every feature its own name")
        if sum(feature.kind == "vector" for feature in self.features) > 1:
            raise ValueError("schema: more than one vector feature; fuse the modalities into one")

    @property
    def impression_fields(self) -> tuple[Feature, ...]:
        return tuple(f for f in self.features if f.owner == "impression")

    @property
    def item_fields(self) -> tuple[Feature, ...]:
        """Categorical item features, `item_id` first: the columns of `Catalog.categorical_IG`."""
        return tuple(f for f in self.features if f.owner == "item" and f.kind == "categorical")

    @property
    def item_sets(self) -> tuple[Feature, ...]:
        """Multi-valued item features: the keys of `Catalog.sets`."""
        return tuple(f for f in self.features if f.owner == "item" and f.kind == "multi")

    @property
    def vector(self) -> Feature | None:
        return next((f for f in self.features if f.kind == "vector"), None)

    def without(self, names: Sequence[str]) -> Schema:
        """The schema without these features. `user_id` and `item_id` may be named even if they are not features here.

        Raises ValueError on any other unknown name.
        """
        known = {feature.name for feature in self.features}
        if missing := set(names) - known - IDS:
            raise ValueError(f"exclude: no feature {sorted(missing)} in the schema; it has {sorted(known)}")
        return replace(self, features=tuple(f for f in self.features if f.name not in set(names)))

    def to_json(self) -> str:
        raw = asdict(self)
        for feature in raw["features"]:
            if not feature["numeric"]:  # keeps the hash of schemas without numbers as it always was
                del feature["numeric"]
        return json.dumps(raw, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Schema:
        raw = json.loads(text)
        features = tuple(
            Feature(**{**f, "vocab": None if f["vocab"] is None else tuple(f["vocab"])}) for f in raw["features"]
        )
        return cls(**{**raw, "features": features})


@dataclass(frozen=True)
class Catalog:
    """The items a model knows, as tensors. Row 0 is padding, row 1 stands for any unknown item.

    item_ids_I        int64, sorted from row 2 on; rows 0 and 1 hold the smallest int64
    categorical_IG    int, the columns of `Schema.item_fields`
    sets              name -> int [I, T], 0-padded
    vector_IE         float32; a zero row means that the item has no vector
    """

    item_ids_I: Tensor
    categorical_IG: Tensor
    sets: dict[str, Tensor]
    vector_IE: Tensor | None

    def __len__(self) -> int:
        return self.item_ids_I.shape[0]

    def rows(self, item_ids: Tensor) -> Tensor:
        """Catalog rows of raw item ids (any shape, int64); an unknown id gets row 1."""
        return lookup(self.item_ids_I[SPECIAL:], item_ids)

    def to(self, device: torch.device | str) -> Catalog:
        return Catalog(
            self.item_ids_I.to(device),
            self.categorical_IG.to(device),
            {name: values.to(device) for name, values in self.sets.items()},
            None if self.vector_IE is None else self.vector_IE.to(device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Flat names for safetensors; `from_tensors` reads them back."""
        flat = {"item_ids": self.item_ids_I, "categorical": self.categorical_IG}
        flat |= {f"set.{name}": values for name, values in self.sets.items()}
        if self.vector_IE is not None:
            flat["vector"] = self.vector_IE
        return {f"catalog.{name}": tensor.contiguous() for name, tensor in flat.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Catalog:
        own = {k.removeprefix("catalog."): v for k, v in tensors.items() if k.startswith("catalog.")}
        sets = {k.removeprefix("set."): v for k, v in own.items() if k.startswith("set.")}
        return cls(own["item_ids"], own["categorical"], sets, own.get("vector"))


def lookup(sorted_values: Tensor, values: Tensor) -> Tensor:
    """Index (+2) of each value in a sorted int64 tensor; UNKNOWN if it is not in there."""
    if sorted_values.numel() == 0:
        return torch.full_like(values, UNKNOWN)
    position = torch.searchsorted(sorted_values, values).clamp_(max=sorted_values.numel() - 1)
    return torch.where(sorted_values[position] == values, position + SPECIAL, UNKNOWN)


@dataclass(frozen=True)
class Encoder:
    """Raw feature values -> indices, the same in the dataset, in evaluation and in the server.

    integers: feature name -> sorted int64 tensor of the raw values of indices 2, 3, …
    """

    schema: Schema
    integers: dict[str, Tensor]

    def encode(self, name: str, values: Sequence[str | int | None]) -> Tensor:
        """int64 indices of raw values; None -> PADDING, never seen -> UNKNOWN.

        Raises ValueError if the feature is unknown, or if it takes integers and a value is not an integer.
        """
        feature = next((f for f in self.schema.features if f.name == name), None)
        if feature is None or feature.kind == "vector":
            raise ValueError(f"no feature {name!r} to encode; the schema has {[f.name for f in self.schema.features]}")
        if feature.vocab is not None:
            found = [PADDING if v is None else feature.index.get(str(v), UNKNOWN) for v in values]
            return torch.tensor(found, dtype=torch.int64)
        try:
            raw = torch.tensor([0 if v is None else int(v) for v in values], dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: {error}; this feature takes integers that fit 64 bits") from None
        missing = torch.tensor([v is None for v in values], dtype=torch.bool)
        return lookup(self.integers[name], raw).masked_fill(missing, PADDING)


class Part(NamedTuple):
    """The place of a batch in a larger one that several processes share: its first row there, and all rows there."""

    first: int
    rows: int


class Batch(NamedTuple):
    """One batch. Catalog rows and click-log positions are int; labels float32 in {0, 1}.

    fields_BF   int64, the columns of `Schema.impression_fields`
    item_B      the candidate's catalog row
    start_B, end_B   the history is clicks_C[start:end], oldest first, at most L long
    label_B     None when scoring
    part        None where the batch is not a part of a larger one. Dropout reads it
    """

    fields_BF: Tensor
    item_B: Tensor
    start_B: Tensor
    end_B: Tensor
    label_B: Tensor | None = None
    part: Part | None = None


class Logits(NamedTuple):
    """The ranking logit, and the logits of a model's parts where its loss uses them (SDCNv3: deep, shallow)."""

    logit_B: Tensor
    parts_B: tuple[Tensor, ...] = ()


def history_rows(clicks_C: Tensor, start_B: Tensor, end_B: Tensor, length: int) -> Tensor:
    """hist_BL: catalog rows of the last `length` clicks of [start, end), PADDING first. int64."""
    position_BL = end_B[:, None] - torch.arange(length, 0, -1, device=end_B.device)
    inside_BL = position_BL >= start_B[:, None]
    if clicks_C.numel() == 0:
        return torch.zeros_like(position_BL)
    return torch.where(inside_BL, clicks_C[position_BL.clamp_(min=0)].long(), PADDING)


def schema_hash(schema: Schema, integers: dict[str, Tensor], catalog: Catalog) -> str:
    """sha256 over names, vocabularies and catalog: equal hashes mean that indices mean the same things."""
    digest = hashlib.sha256(schema.to_json().encode())
    named = catalog.tensors() | {f"integers.{k}": v for k, v in integers.items()}
    for name in sorted(named):
        tensor = named[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
