"""replay: whether past impressions have the same features in training and in an online store of their moment.

Offline is what `dataset` reads: Feast's point-in-time join over the sources that `features` wrote, and the click log.
Online is a store that replay makes, because nobody records what was served. For each impression, the events that were
known at its moment go through `features` and `publish` into a new store on SQLite. Replay reads this store
as the server does, with that moment as the time. It works out from the definition what was known, and does not take it
from the sources. So it finds a source that gives too much, or gives it too early. Only an item's vector comes from the
source; it is known from the item's `created_at`.

The store of a replay is never late. The one in service is late between two publications, unless clicks are pushed to
it: set `features.availability_lag_seconds` to 0 only if you use `push`.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from bento.store import served
from components.common.artifacts import read_json, write_json
from components.common.contracts import ARRIVAL, HISTORY, Canonical, read_parquet, write_days
from components.features import publish
from components.features.dataset import point_in_time
from components.features.publish import PublishConfig
from components.features.store import feature_store, scratch_store
from components.features.views import ONLINE_VIEWS, SECOND, FeaturesConfig, write_sources

if TYPE_CHECKING:
    from feast import FeatureStore

PUBLISH = PublishConfig(online_sample=1, keep=1)  # replay compares what the store serves itself


@dataclass(frozen=True)
class Mismatch:
    """One value of one impression; offline and online are Python values."""

    user_id: int
    item_id: int
    timestamp: datetime
    offline: Any
    online: Any


def run(
    config: FeaturesConfig, canonical: Path, features: Path, repo: Path, *, rows: int, seed: int
) -> dict[str, list[Mismatch]]:
    """Compare and print a table. Returns the features that differ, each with its mismatches.

    rows  impressions, drawn by `seed` from those after the first known event
    """
    read_json(features / "receipt.json", "features")
    data = Canonical(canonical)
    events = data.events()
    known = _known_from(config, events)
    drawn = draw(events, known, rows, seed)
    offline = derive_offline(config, features, repo, drawn)
    online = serve_again(config, data, features, events, known, repo, drawn)
    found: dict[str, list[Mismatch]] = {name: [] for name in offline[0]}
    for row, wanted, answer in zip(drawn.to_pylist(), offline, online, strict=True):
        for name, value in wanted.items():
            if not same(value, answer[name]):
                found[name].append(
                    Mismatch(row["user_id"], row["item_id"], row["event_timestamp"], value, answer[name])
                )
    show(found, len(drawn))
    return {name: mismatches for name, mismatches in found.items() if mismatches}


def draw(events: pa.Table, known: np.ndarray, rows: int, seed: int) -> pa.Table:
    """user_id, item_id and event_timestamp of impressions, in time order. Raises ValueError where none is past."""
    if rows < 1:
        raise ValueError(f"rows is {rows}; it must be at least 1")
    past = np.flatnonzero(events["timestamp"].cast(pa.int64()).to_numpy() >= known.min())
    if not len(past):
        raise ValueError("replay: no impression is later than the first known event; give more days")
    picked = np.sort(np.random.default_rng(seed).choice(past, min(rows, len(past)), replace=False))
    names = ["user_id", "item_id", "timestamp"]
    return events.select(names).take(picked).rename_columns(["user_id", "item_id", "event_timestamp"])


def derive_offline(config: FeaturesConfig, features: Path, repo: Path, drawn: pa.Table) -> list[dict[str, Any]]:
    """Feature -> value, an entry for each impression. The history is the item ids that its pointers name; an empty one
    is None, because a store has no row for it."""
    log = read_parquet(features / "click_log.parquet")["item_id"].to_pylist()
    with scratch_store(repo, features) as store:
        found = point_in_time(store, "training", drawn).drop_columns(drawn.column_names).to_pylist()
        vectors = point_in_time(store, "catalog", drawn)["embedding"].to_pylist()
    for row, vector in zip(found, vectors, strict=True):
        start, end = row.pop("clicks_start") or 0, row.pop("clicks_end") or 0
        row["history"] = log[max(start, end - config.history_length) : end] or None
        row["embedding"] = vector
    return found


def serve_again(
    config: FeaturesConfig,
    data: Canonical,
    features: Path,
    events: pa.Table,
    known: np.ndarray,
    repo: Path,
    drawn: pa.Table,
) -> Iterator[dict[str, Any]]:
    """Feature -> value, an entry for each impression, from a new store of what was known at its moment."""
    in_play = np.zeros(len(events), dtype=bool)
    for name in ("user_id", "item_id"):  # no other user or item is read
        in_play |= pc.is_in(events[name], value_set=drawn[name].combine_chunks()).to_numpy()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        canonical, output = scratch / "canonical", scratch / "data" / "features"
        _scratch(scratch, data, features, repo, drawn)
        for row in drawn.to_pylist():
            moment = row["event_timestamp"]
            then = known <= round(moment.timestamp() * 1e6)
            then &= in_play | (np.arange(len(then)) == np.flatnonzero(then)[-1])  # the last says which day it was
            for made in (canonical / "events", output):
                shutil.rmtree(made, ignore_errors=True)
            (output / "sources").mkdir(parents=True)
            write_days(events.filter(pa.array(then)), canonical / "events")
            write_sources(config, Canonical(canonical), scratch / "embedding", output)
            write_json(output / "receipt.json", {"known_until": moment.isoformat()})
            silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
            with silent[0], silent[1]:
                publish.fill(PUBLISH, output, scratch / "feature_repo", scratch / "store")
            with feature_store(scratch / "store") as store:
                answer = _read(store, row)
            yield answer


def _known_from(config: FeaturesConfig, events: pa.Table) -> np.ndarray:
    """Microseconds from which each event is known: its second is over, the lag has passed, and it has arrived. An event
    that brings its own history is known when it happens."""
    if HISTORY[0] in events.column_names:
        return events["timestamp"].cast(pa.int64()).to_numpy()
    second = events["timestamp"].cast(pa.int64()).to_numpy() // SECOND
    known = (second + 1 + config.availability_lag_seconds) * SECOND
    if ARRIVAL in events.column_names:
        known = np.maximum(known, events[ARRIVAL].cast(pa.int64()).fill_null(0).to_numpy())
    return known


def _scratch(root: Path, data: Canonical, features: Path, repo: Path, drawn: pa.Table) -> None:
    """The repo with SQLite as its online store, and the users and vectors in play."""
    (root / "canonical").mkdir()
    (root / "embedding").mkdir()
    shutil.copytree(repo, root / "feature_repo", ignore=shutil.ignore_patterns("__pycache__"))
    settings = yaml.safe_load((repo / "feature_store.yaml").read_text())
    settings["online_store"] = {"type": "sqlite", "path": "online.db"}
    (root / "feature_repo" / "feature_store.yaml").write_text(yaml.safe_dump(settings))
    users = data.users()
    pq.write_table(
        users.filter(pc.is_in(users["user_id"], value_set=drawn["user_id"].combine_chunks())),
        root / "canonical" / "users.parquet",
    )
    if data.histories() is not None:
        shutil.copy(data.root / "histories.parquet", root / "canonical" / "histories.parquet")
    items = data.items()
    vectors = read_parquet(features / "sources" / "item_embedding.parquet").drop_columns("event_timestamp")
    vectors = vectors.filter(pc.is_in(vectors["item_id"], value_set=drawn["item_id"].combine_chunks()))
    created = items["created_at"].take(pc.index_in(vectors["item_id"], value_set=items["item_id"].combine_chunks()))
    pq.write_table(vectors.append_column("created_at", created), root / "embedding" / "item_embedding.parquet")


def _read(store: FeatureStore, row: dict[str, Any]) -> dict[str, Any]:
    """What the store serves at the impression's moment."""
    found: dict[str, Any] = {}
    for name in ONLINE_VIEWS:
        view = store.get_feature_view(name)
        key = view.join_keys[0]
        ttl = dict.fromkeys((feature.name for feature in view.features), (view.ttl or timedelta()).total_seconds())
        names = [f"{name}:{feature}" for feature in ttl]
        found |= served(store, names, {key: row[key]}, ttl, row["event_timestamp"].timestamp())
    return found


def same(offline: Any, online: Any) -> bool:
    """Equal in value and in kind: 3 is not 3.0."""
    if isinstance(offline, list) and isinstance(online, list):
        return len(offline) == len(online) and all(map(same, offline, online))
    return type(offline) is type(online) and bool(offline == online)


def show(found: dict[str, list[Mismatch]], rows: int) -> None:
    """The table for the terminal."""
    table = Table("feature", "compared", "differ", "e.g.", title="Offline against online", title_justify="left")
    for name, mismatches in found.items():
        example = ""
        if mismatches:
            at = mismatches[0]
            example = (
                f"user {at.user_id}, item {at.item_id}, {at.timestamp:%Y-%m-%d %H:%M:%S.%f}: "
                f"{at.offline!r} offline, {at.online!r} online"
            )
        table.add_row(name, f"{rows:,}", f"{len(mismatches):,}", example)
    Console(stderr=True, highlight=False).print(table)
