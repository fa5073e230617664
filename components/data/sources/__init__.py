"""Sources: adapters that turn somebody's raw files into canonical tables. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from components.common.artifacts import new_file
from components.common.config import section
from components.common.contracts import UTC

if TYPE_CHECKING:
    from components.data.ingest import IngestConfig

SIMULATOR_RAW = "components/data/sources/simulator.py"  # it has no files: its code is its input
SOURCES = {
    "simulator": "components.data.sources.simulator",
    "movielens": "components.data.sources.movielens",
    "microlens": "components.data.sources.microlens",
    "files": "components.data.sources.files",
}


@dataclass(frozen=True, kw_only=True)
class RawTables:
    """What an adapter gives back; `ingest` checks it against the contract and writes it.

    items       may name their pictures in a column `image`: a path below ingest.raw, or an http(s) URL; null: none
    modalities  name -> (item_id, vector); an item without a vector has no row
    read        the rows of the events' files, where the adapter counts them: none of them may be lost on the way
    histories   the item ids that the events' history_start and history_end point at, where the source gives them
    rejected    reason -> raw rows that are broken and are in no other table
    set_aside   reason -> raw rows that are whole, and left out all the same
    facts       what the source says of itself, JSON-able
    """

    events: pa.Table
    users: pa.Table
    items: pa.Table
    modalities: dict[str, pa.Table]
    read: int | None = None
    histories: pa.Table | None = None
    rejected: dict[str, pa.Table] = field(default_factory=dict)
    set_aside: dict[str, pa.Table] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def read(config: IngestConfig) -> RawTables:
    """The raw tables of the configured source. Raises ValueError on an absent path or a broken raw file."""
    check(config.source, config.raw)
    adapter: Callable[[IngestConfig], RawTables] = import_module(SOURCES[config.source]).read
    return adapter(config)


def timeless(rows: int) -> pa.Array:
    """Timestamps for rows that have an order and no times: one a second from 2000-01-01, in days of equal size."""
    row = np.arange(rows)
    days = max(1, -(-rows // 86_400))
    day = row * days // max(rows, 1)
    second = row - np.searchsorted(day, day)
    return pa.array(((10_957 + day) * 86_400 + second) * 1_000_000).cast(UTC)


def use(source: str, raw: str | None, params: Path) -> None:
    """Write `ingest.source` and `ingest.raw` of params.yaml, comments kept. Raises ValueError as `check` does."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import RoundTripRepresenter

    class Representer(RoundTripRepresenter):
        """Ruamel's own, but a null is written as the word, as in params.yaml."""

    Representer.add_representer(type(None), lambda own, _: own.represent_scalar("tag:yaml.org,2002:null", "null"))

    if source in SOURCES and raw is None:
        if source != "simulator":
            raise ValueError(f"{source} reads files: name their path with --raw PATH")
        raw = SIMULATOR_RAW
    check(source, str(raw))
    section(params, "ingest")
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 120
    yaml.Representer = Representer
    content = yaml.load(params)
    if (content["ingest"]["source"], content["ingest"]["raw"]) != (source, raw):
        content["ingest"]["source"], content["ingest"]["raw"] = source, raw
        with new_file(params) as scratch:
            yaml.dump(content, scratch)


def check(source: str, raw: str) -> None:
    """Raises ValueError on an unknown source or a raw path that is absent."""
    if source not in SOURCES:
        raise ValueError(f"ingest.source: unknown source {source!r}; known are {', '.join(sorted(SOURCES))}")
    if not (source == "files" and "://" in raw) and not Path(raw).exists():
        raise ValueError(f"ingest.raw: {raw!r} is not there; name the path of the {source} files")
