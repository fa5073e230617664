"""Sources: adapters that turn somebody's raw files into canonical tables.

An adapter is a module with `read(raw, config, window, rows=None) -> RawTables`, and a line in ADAPTERS. `raw` is
ingest.raw, `config` the adapter's own section of `ingest` in params.yaml, or None where it has none. It reads only what
may hold rows of the window. With `rows`, it looks at its files instead of reading them whole: about so many rows of the
first and the last file are enough.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from components.common.contracts import TIMESTAMP

SIMULATOR_RAW = "components/data/sources/simulator.py"  # it has no files: its code is its input
ADAPTERS = {
    "simulator": "components.data.sources.simulator",
    "movielens": "components.data.sources.movielens",
    "microlens": "components.data.sources.microlens",
    "files": "components.data.sources.files",
}
LONGEST = 200  # characters of a value in a message


@dataclass(frozen=True, kw_only=True)
class Window:
    """The times of the rows that a run reads: since <= timestamp < until; None is no bound."""

    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class RawTables:
    """What an adapter gives back; `ingest` checks it against the contract and writes it.

    items         may name their pictures in a column `image`: a path below ingest.raw, or an http(s) URL, or null
    modalities    name -> (item_id, vector); an item without a vector has no row
    read          the rows of the events' files, where the adapter counts them: none of them may be lost on the way
    histories     the item ids that the events' history_start and history_end point at, where the source gives them
    rejected      reason -> raw rows that are broken and are in no other table
    set_aside     reason -> raw rows that are whole and are left out on purpose
    vocabularies  users or items -> (id, text), where the source's ids are text (`text_id`)
    derived       users, items: those of these tables that the adapter made from the events' ids
    facts         what the source says about itself, JSON-able
    """

    events: pa.Table
    users: pa.Table
    items: pa.Table
    modalities: dict[str, pa.Table]
    read: int | None = None
    histories: pa.Table | None = None
    rejected: dict[str, pa.Table] = field(default_factory=dict)
    set_aside: dict[str, pa.Table] = field(default_factory=dict)
    vocabularies: dict[str, pa.Table] = field(default_factory=dict)
    derived: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def read(source: str, raw: str, config: Any, window: Window, rows: int | None = None) -> RawTables:
    """The raw tables of a source in a window; with `rows`, of a sample of its files.

    Raises ValueError where the path is not there or a raw file is broken.
    """
    check(source, raw)
    found: RawTables = import_module(ADAPTERS[source]).read(raw, config, window, rows=rows)
    return found


def check(source: str, raw: str) -> None:
    """Raises ValueError where the source is unknown or the raw path is not there."""
    if source not in ADAPTERS:
        raise ValueError(f"ingest.source: unknown source {source!r}; known are {', '.join(sorted(ADAPTERS))}")
    if not (source == "files" and "://" in raw) and not Path(raw).exists():
        raise ValueError(f"ingest.raw: {raw!r} is not there; name the path of the {source} files")


def timeless(rows: int) -> pa.Array:
    """Timestamps for rows that have an order and no times: one a second from 2000-01-01, in days of equal size."""
    row = np.arange(rows)
    days = max(1, -(-rows // 86_400))
    day = row * days // max(rows, 1)
    second = row - np.searchsorted(day, day)
    return pa.array(((10_957 + day) * 86_400 + second) * 1_000_000).cast(TIMESTAMP)


def brief(value: object) -> str:
    """The value as text for a message: at most LONGEST characters of it."""
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"
