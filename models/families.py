"""The model families: their configs and modules, and the settings of the published runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from models.layers import Ranker
from models.qin import QIN, QINConfig
from models.schema import Schema
from models.sdcnv3 import SDCNv3, SDCNv3Config


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

# The same names -> how that run was trained: keys of train.MODEL in params.yaml, beside its `network`. The published L2
# is that of a step, which is times the training rows here.
TRAINING: dict[str, dict[str, Any]] = {
    "qin/microlens": {
        "batch_size": 8192, "max_epochs": 100, "patience": 8, "lr": 2e-3, "lr_factor": 0.5, "lr_patience": 0,
        "min_lr": 1e-6, "embedding_l2": 2e-4 * 3_600_000, "network_l2": 0.0, "ema": 0.0, "clip_norm": 10.0,
    },
    "sdcnv3/ml-1m": {
        "batch_size": 4096, "max_epochs": 100, "patience": 2, "lr": 1e-3, "lr_factor": 0.1, "lr_patience": 0,
        "min_lr": 1e-6, "embedding_l2": 0.01 * 591_209, "network_l2": 0.0, "ema": 0.0, "clip_norm": 10.0,
    },
    "sdcnv3/criteo": {
        "batch_size": 4096, "max_epochs": 100, "patience": 2, "lr": 1e-3, "lr_factor": 0.1, "lr_patience": 0,
        "min_lr": 1e-6, "embedding_l2": 1e-5 * 36_672_493, "network_l2": 0.0, "ema": 0.0, "clip_norm": 10.0,
    },
}  # fmt: skip


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


def _known(family: str) -> str:
    if family not in FAMILIES:
        raise ValueError(f"family = {family!r}: give one of {sorted(FAMILIES)}")
    return family
