"""clicks: the journal of the clicks that were pushed, and how an online store gets them.

Feast's push writes a user's whole history, and histories hold no times. So the journal is what knows the clicks: which
came already, and which a new store lacks.

live/clicks/000000000042.clicks   the batches from number 42 on, one after another, until the part is large enough
a store's pushed.json             the last batch that the store has, and the histories that were written for it

A batch is in the journal whole or not at all. What a kill or a full disk leaves of one is not read. A store's
pushed.json is written before the histories are. Whoever finds it writes them again, which changes nothing where they
were written. So after a kill, too, each click is in the served history once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.common.artifacts import new_file, read_json, sync_entries
from components.common.live import CLICKS

if TYPE_CHECKING:
    from feast import FeatureStore

CLICK = np.dtype([("user_id", "<i8"), ("item_id", "<i8"), ("us", "<i8")])  # microseconds since 1970
# left: how many records of the batch come after this one
RECORD = np.dtype([*CLICK.descr, ("batch", "<u8"), ("left", "<u4"), ("check", "<u4")])
ODD = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F],
               np.uint64)  # fmt: skip
PART_BYTES = 2**20
BATCH = 10_000  # clicks: the most that `push` adds at once, and about what a store is given at once
SECOND = 1_000_000
SOURCE = "fresh_history"  # the push source of feature_repo/definitions.py
PUSHED = "pushed.json"


# ---- the journal ------------------------------------------------------------------------------------------------


class Journal:
    """The journal of a live folder, open to append. Only one process may have it open: `push` sees to that."""

    def __init__(self, live: Path) -> None:
        self.folder = live / CLICKS
        self.folder.mkdir(parents=True, exist_ok=True)
        self.last, self.part = 0, Path()
        for part in parts(live):
            records, torn = _read(part)
            self.last = max(self.last, int(records["batch"][-1]) if len(records) else 0)
            if torn:
                print(f"push: the last {torn} bytes of {part} are no whole batch; left out", file=sys.stderr)

    def append(self, clicks: np.ndarray) -> int:
        """Write a batch of at least one CLICK, and wait until it is on the disk. Returns its number."""
        records = np.empty(len(clicks), RECORD)
        for name in CLICK.names or ():
            records[name] = clicks[name]
        records["batch"], records["left"] = self.last + 1, np.arange(len(clicks))[::-1]
        records["check"] = _check(records)
        if new := not self.part.is_file() or self.part.stat().st_size >= PART_BYTES:
            self.part = self.folder / f"{self.last + 1:012d}.clicks"
        part, self.part = self.part, Path()  # after an error, the next batch begins a new part
        with part.open("wb" if new else "ab") as opened:
            opened.write(records.tobytes())
            opened.flush()
            os.fsync(opened.fileno())
        if new:
            sync_entries(self.folder)
        self.last, self.part = self.last + 1, part
        return self.last


def read(live: Path) -> np.ndarray:
    """All whole batches as RECORDs, in the order in which they came."""
    return np.concatenate([np.empty(0, RECORD), *(_read(part)[0] for part in parts(live))])


def parts(live: Path) -> list[Path]:
    return sorted((live / CLICKS).glob("*.clicks"))


def trim(live: Path, until: int) -> None:
    """Drop the parts without a click after `until`, the log_until of the store that serves: its log holds them, or
    knows better. The newest part stays, as it numbers the batches."""
    for part in parts(live)[:-1]:
        if not (_read(part)[0]["us"] > until).any():
            part.unlink()


def micros(time: datetime) -> int:
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // (datetime.resolution)


def _read(part: Path) -> tuple[np.ndarray, int]:
    """A part's whole batches, and how many bytes come after them."""
    content = part.read_bytes()
    records = np.frombuffer(content, RECORD, len(content) // RECORD.itemsize)
    good = np.append(_check(records) == records["check"], False)
    whole = records[: np.argmin(good)]
    ends = np.flatnonzero(whole["left"] == 0)
    whole = whole[: ends[-1] + 1] if len(ends) else whole[:0]
    return whole, len(content) - whole.nbytes


def _check(records: np.ndarray) -> np.ndarray:
    """A sum of each record, which zeros do not pass."""
    words = records.view("<u8").reshape(-1, len(ODD)).copy()
    words[:, -1] &= np.uint64(2**32 - 1)  # without the check itself
    mixed = (words * ODD).sum(axis=1, dtype=np.uint64) + ODD[0]
    mixed = (mixed ^ (mixed >> np.uint64(31))) * ODD[1]
    return (mixed >> np.uint64(32)).astype("<u4")


# ---- a store ----------------------------------------------------------------------------------------------------


def replay(live: Path, folder: Path) -> int:
    """Give a store that does not serve yet the journal's clicks that it lacks: those after its log's newest event.
    Returns how many.

    Call it before the live folder is locked, for the many, and again within the lock, for those that came meanwhile.
    """
    given = catch_up(live, folder, open_store(folder))
    _note(folder, {**_noted(folder), "rows": []})  # they are written
    return given


def open_store(folder: Path) -> FeatureStore:
    """Feast's store of a store folder."""
    os.environ.setdefault("CLICKLOOP_REDIS", "localhost:6379")  # feature_store.yaml may name it
    from feast import FeatureStore

    return FeatureStore(repo_path=str(folder.resolve()))


def catch_up(live: Path, folder: Path, store: FeatureStore) -> int:
    """Give a store all that is in the journal and not in it: before it serves, and after a kill. Returns how many.

    Of the clicks that were pushed before the store was made, its log knows those up to its newest event better.
    """
    clicks = read(live)
    if not (noted := _noted(folder)):
        noted = {"made": int(clicks["batch"].max(initial=0)), "batch": 0, "rows": []}
        _note(folder, noted)
    _push(store, noted["rows"])
    clicks = clicks[clicks["batch"] > noted["batch"]]
    old = clicks["us"] <= log_until(folder)
    clicks = clicks[~(old & (clicks["batch"] <= noted["made"])) & ~in_the_log(folder, clicks)]
    for some in _chunks(clicks):
        give(folder, store, some, int(some["batch"][-1]))
    return len(clicks)


def give(folder: Path, store: FeatureStore, clicks: np.ndarray, batch: int) -> None:
    """Add clicks, in their order, to the histories that a store serves. Of each, the newest stay, as many as the
    store's receipt says.

    A history is known from now on, or, as in training, once the second of its newest click is over.
    """
    length = receipt(folder)["history_length"]
    now = micros(datetime.now(UTC))
    fresh: dict[int, list[int]] = {}
    known = dict.fromkeys(clicks["user_id"].tolist(), now)
    for user, item, us in clicks[list(CLICK.names or ())].tolist():
        fresh.setdefault(user, []).append(item)
        known[user] = max(known[user], (us // SECOND + 1) * SECOND)
    served = histories(store, list(fresh))
    rows = [[user, known[user], [*served[user], *items][-length:]] for user, items in fresh.items()]
    _note(folder, {**_noted(folder), "batch": batch, "rows": rows})
    _push(store, rows)


def histories(store: FeatureStore, users: list[int]) -> dict[int, list[int]]:
    """The item ids, oldest first, that are served of each user."""
    if not users:
        return {}
    entities = [{"user_id": user} for user in users]
    found = store.get_online_features(features=["user_history:history"], entity_rows=entities).to_dict()["history"]
    return {user: list(history or ()) for user, history in zip(users, found, strict=True)}


def in_the_log(folder: Path, clicks: np.ndarray) -> np.ndarray:
    """Whether the store's click log holds each click. DuckDB reads the parts of the file that may have it."""
    found = np.zeros(len(clicks), bool)
    old = np.flatnonzero(clicks["us"] <= log_until(folder))
    if not len(old):
        return found
    import duckdb
    import pyarrow as pa
    import pyarrow.parquet as pq

    log = folder / "click_log.parquet"
    if "us" not in pq.read_schema(log).names:  # the source gives the histories, and no times of their clicks
        return found
    asked = {name: np.ascontiguousarray(clicks[name][old]) for name in CLICK.names or ()}
    with duckdb.connect() as db:
        db.register("asked", pa.table({**asked, "position": old}))
        held = db.sql(
            "select position from asked where exists (from read_parquet($log) as log where log.user_id = asked.user_id "
            "and log.item_id = asked.item_id and log.us = asked.us)",
            params={"log": str(log)},
        ).fetchnumpy()
    found[held["position"]] = True
    return found


def log_until(folder: Path) -> int:
    """Microseconds of the newest event that a store was made from."""
    return micros(datetime.fromisoformat(receipt(folder)["log_until"]))


def receipt(folder: Path) -> dict[str, Any]:
    return read_json(folder / "receipt.json", "features")


def _chunks(clicks: np.ndarray) -> Iterator[np.ndarray]:
    """Whole batches, about BATCH clicks at once."""
    begins = np.flatnonzero(np.diff(clicks["batch"], prepend=np.uint64(0)))
    turns = begins[np.flatnonzero(np.diff(begins // BATCH, prepend=0))]
    yield from (some for some in np.split(clicks, turns) if len(some))


def _noted(folder: Path) -> dict[str, Any]:
    """pushed.json, empty where there is none.

    made   the last batch of the journal when the store was made
    batch  the last batch that the store has, once the rows are written
    rows   [user, microsecond from which it is known, history]
    """
    file = folder / PUSHED
    return json.loads(file.read_text()) if file.is_file() else {}


def _note(folder: Path, noted: dict[str, Any]) -> None:
    with new_file(folder / PUSHED) as scratch:
        scratch.write_text(json.dumps(noted))


def _push(store: FeatureStore, rows: list[list[Any]]) -> None:
    if not rows:
        return
    import pandas as pd
    from feast.data_source import PushMode

    users, known, items = zip(*rows, strict=True)
    times = pd.to_datetime(list(known), unit="us", utc=True)
    frame = pd.DataFrame({"user_id": users, "history": list(items), "event_timestamp": times})
    store.push(SOURCE, frame, to=PushMode.ONLINE)
