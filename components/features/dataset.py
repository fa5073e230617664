"""dataset: Feast's point-in-time join -> the training set: rows, vocabularies and the catalog of items.

`components/common/dataset.py` says what lies where, and reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from components.common.artifacts import file_hash, new_folder, read_json, write_json
from components.common.config import parse_time
from components.common.contracts import (
    EVENTS,
    HISTORY,
    ITEMS,
    LOGGED,
    ORACLE,
    TIMESTAMP,
    Canonical,
    attributes,
    read_parquet,
    vector_matrix,
)
from components.common.dataset import UNSEEN, encode_column, narrow, popularity_level
from components.common.splits import Split, SplitConfig, split_rows
from models.encoder import save_encoder
from models.schema import SPECIAL, UNKNOWN, Catalog, Encoder, Feature, Schema, schema_hash

if TYPE_CHECKING:
    from feast import FeatureStore

# No features: events' column -> dataset's.
LOGGED_COLUMNS = {ORACLE: "oracle"} | {name: name for name in LOGGED}


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """history_length  newest clicks of a user that a row points at
    min_count       a value gets an index of its own if it occurs in so many rows of the training days;
                    for a tag: items shown in those days that must have it
    max_tags        tags kept of an item
    """

    history_length: int
    min_count: int
    max_tags: int

    def __post_init__(self) -> None:
        if not 0 <= self.history_length < 2**15:
            raise ValueError(f"history_length is {self.history_length}; it must be in [0, 32767]")
        for name in ("min_count", "max_tags"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def run(
    config: DatasetConfig, split: SplitConfig, canonical: Path, features: Path, repo: Path, output: Path
) -> dict[str, Any]:
    """Join, encode and write. Raises ValueError where the join lost rows or the days cannot be split."""
    receipt = read_json(features / "receipt.json", "features")
    data = Canonical(canonical)
    events = data.training_events()  # all others are in the histories and the popularity that Feast joins
    until = read_json(canonical / "source.json", "ingest")["until"]
    joined, vectors = join(events, data.items(), features, repo, until)
    cut = split_rows(events, split)
    encoder, catalog = fit(config, joined, cut.valid_start, data, vectors, receipt["embedding_version"])
    columns = encode(config, joined, encoder, catalog)
    log = torch.from_numpy(read_parquet(features / "click_log.parquet")["item_id"].to_numpy().copy())
    columns["click_log"] = catalog.rows(log).to(torch.int32)
    narrowed = {name: narrow(column) for name, column in columns.items()}
    splits = cut.ranges(len(events))
    label = columns["label"].double()
    with new_folder(output) as folder:
        save_encoder(folder / "encoder", encoder, catalog)
        save_file(narrowed, folder / "rows.safetensors")
        facts = {
            "splits": splits,
            **first_days(cut, events),
            "label_rate": {name: float(label[start:end].mean()) for name, (start, end) in splits.items()},
            "items": len(catalog) - SPECIAL,
            "clicks": len(log),
            "bytes_per_row": sum(
                c.element_size() for n, c in narrowed.items() if n not in ("click_log", "user_ids")
            ),
            "schema_hash": schema_hash(encoder.schema, encoder.integers, catalog),
            "data_sha256": file_hash(folder / "rows.safetensors"),
        }  # fmt: skip
        pq.write_table(unseen(columns, joined.fields, splits["test"]), folder / UNSEEN)
        write_json(folder / "dataset.json", facts)
    return facts


def first_days(cut: Split, events: pa.Table) -> dict[str, str | int | None]:
    """The first valid day, the first test day, and the day after the newest row. None where times are made up.

    newest  the first row of the newest day; of the test rows, where times are made up
    """
    if HISTORY[0] in events.column_names:
        return {"valid_from": None, "test_from": None, "ends": None, "newest": cut.test_start}
    last = pc.max(events["timestamp"]).as_py()
    day = pa.scalar(last.replace(hour=0, minute=0, second=0, microsecond=0), events["timestamp"].type)
    return {
        "valid_from": cut.valid_day,
        "test_from": cut.test_day,
        "ends": f"{last + timedelta(days=1):%Y-%m-%d}",
        "newest": pc.sum(pc.less(events["timestamp"], day)).as_py(),
    }


def summary(facts: dict[str, Any]) -> dict[str, str]:
    lines = {
        name: f"{end - start:,} rows, {facts['label_rate'][name]:.1%} clicked"
        for name, (start, end) in facts["splits"].items()
    }
    return lines | {
        "size": f"{facts['bytes_per_row']} bytes a row, {facts['items']:,} items, {facts['clicks']:,} clicks"
    }


class Joined(NamedTuple):
    """Every impression with its features, in event order. `fields` are the impression's, `logged` are no features."""

    labels: np.ndarray
    logged: dict[str, np.ndarray]
    item_ids: np.ndarray
    user_ids: np.ndarray
    clicks_start: np.ndarray
    clicks_end: np.ndarray
    origin: dict[str, str]
    fields: dict[str, pa.ChunkedArray]


def join(
    events: pa.Table, items: pa.Table, features: Path, repo: Path, until: str | None = None
) -> tuple[Joined, np.ndarray]:
    """The point-in-time join of all impressions, and the items' vectors as known at the end of the data.

    events, items  canonical tables
    features       the folder that `features` wrote
    repo           the Feast repo
    until          `ingest.until`: the end of the data. Without it, that is the newest event or the newest item. An
                   item that is newer than all events has its vector too: for a new item a model has little else

    Returns the joined rows and float32 [items, width], zero where an item has no vector. Raises ValueError where Feast
    does not give back the rows that it was given.
    """
    from components.features.store import scratch_store
    from components.features.views import NO_ATTRIBUTES

    item_ids = items["item_id"]
    if until is not None:
        last = pa.scalar(parse_time("until", until) - timedelta(microseconds=1), TIMESTAMP)
    else:
        newest = (pc.max(events["timestamp"]), pc.max(items["created_at"]))
        last = pa.scalar(max(time.as_py() for time in newest if time.is_valid), TIMESTAMP)
    every_item = pa.table({"item_id": item_ids, "event_timestamp": pa.repeat(last, len(item_ids)).cast(TIMESTAMP)})
    impressions = events.select(["user_id", "item_id", "timestamp"]).rename_columns(
        ["user_id", "item_id", "event_timestamp"]
    )
    with scratch_store(repo, features) as store:
        print(f"point-in-time join of {len(events):,} impressions", flush=True)
        table = point_in_time(store, "training", impressions)
        known = point_in_time(store, "catalog", every_item)
    fields: dict[str, pa.ChunkedArray] = {"user_id": events["user_id"]}
    origin = {"user_id": "user"}
    profile = [
        name
        for name in table.column_names
        if name not in {*impressions.column_names, "clicks_start", "clicks_end", "views", "clicks", NO_ATTRIBUTES}
    ]
    for name in profile:
        fields[name], origin[name] = table[name], "user"
    for name in attributes(events, EVENTS):
        fields[name], origin[name] = events[name], "context"
    for name in ("views", "clicks"):
        if table[name].null_count == len(table):  # a source without times has no popularity
            continue
        counts = table[name].to_numpy(zero_copy_only=False)
        level = popularity_level(np.nan_to_num(counts.astype(np.float64)))
        fields[f"{name}_level"] = pa.chunked_array([pa.array(level, mask=pc.is_null(table[name]).to_numpy())])
        origin[f"{name}_level"] = "item"
    start, end = (table[n].fill_null(0).cast(pa.int64()).to_numpy() for n in ("clicks_start", "clicks_end"))
    known = known.filter(pc.is_valid(known["embedding"]))
    found = np.zeros((len(item_ids), 0), dtype=np.float32)
    if len(known):
        vectors = vector_matrix(known["embedding"].cast(pa.list_(pa.float32())), "Feast item_embedding")
        matrix = vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(known), -1)
        position = pc.index_in(item_ids, value_set=known["item_id"].combine_chunks()).fill_null(-1).to_numpy()
        found = np.zeros((len(item_ids), matrix.shape[1]), dtype=np.float32)
        found[position >= 0] = matrix[position[position >= 0]]
    joined = Joined(
        labels=events["label"].to_numpy(),
        logged={
            column: events[name].to_numpy() for name, column in LOGGED_COLUMNS.items() if name in events.column_names
        },
        item_ids=events["item_id"].to_numpy(),
        user_ids=events["user_id"].to_numpy(),
        clicks_start=start,
        clicks_end=end,
        origin=origin,
        fields=fields,
    )
    return joined, found


def point_in_time(store: FeatureStore, service: str, rows: pa.Table) -> pa.Table:
    """The rows, keys and event_timestamp, each with the features of a Feast service as known at its time.

    Raises ValueError where Feast does not give back the rows that it was given.
    """
    entities = rows.append_column("row_id", pa.array(np.arange(len(rows))))
    job = store.get_historical_features(entity_df=entities.to_pandas(), features=store.get_feature_service(service))
    table = job.to_arrow().sort_by("row_id")  # no offline store keeps the order
    if not np.array_equal(table["row_id"].to_numpy(), np.arange(len(rows))):
        raise ValueError(f"dataset: {len(rows)} rows went into Feast's join, {len(table)} came back")
    return table.drop_columns("row_id")


def fit(
    config: DatasetConfig, joined: Joined, train_rows: int, data: Canonical, vectors: np.ndarray, version: str
) -> tuple[Encoder, Catalog]:
    """Vocabularies of the first `train_rows` rows, and the catalog of all items under them.

    One user or one item in all of the data tells nothing apart, and is no feature; without clicks there is no history.
    """
    features: list[Feature] = []
    integers: dict[str, Tensor] = {}
    numbers = data.numeric()

    def add(name: str, values: pa.ChunkedArray, owner: Any, *, kind: Any = "categorical", length: int = 1) -> None:
        common = _frequent(values, config.min_count)
        if pa.types.is_integer(values.type):
            vocab, integers[name] = None, torch.tensor(common, dtype=torch.int64)
        else:
            vocab = tuple(str(value) for value in common)
        origin: Any = joined.origin.get(name) if owner == "impression" else None
        features.append(
            Feature(
                name=name, owner=owner, kind=kind, size=len(common) + SPECIAL, length=length, origin=origin,
                vocab=vocab, numeric=origin == "context" and name in numbers,
            )
        )  # fmt: skip

    for name, column in joined.fields.items():
        if name != "user_id" or len(data.users()) > 1:
            add(name, column.slice(0, train_rows), "impression")
    items = data.items().sort_by("item_id")
    order = np.argsort(data.items()["item_id"].to_numpy(), kind="stable")
    shown = pa.chunked_array([joined.item_ids[:train_rows]])
    position = pc.index_in(shown, value_set=items["item_id"].combine_chunks())
    if len(items) > 1:
        add("item_id", shown, "item")
    for name in attributes(items, ITEMS):
        add(name, items[name].take(position), "item")
    tags = pc.list_slice(items["tags"].combine_chunks(), 0, config.max_tags)
    length = pc.max(pc.list_value_length(tags)).as_py() or 0
    if length:
        shown_tags = pc.list_flatten(tags.take(pc.unique(position.combine_chunks())))
        add("tags", pa.chunked_array([shown_tags]), "item", kind="multi", length=length)
    if vectors.shape[1]:
        features.append(Feature(name="embedding", owner="item", kind="vector", size=vectors.shape[1]))
    history_length = config.history_length if joined.clicks_end.any() else 0
    schema = Schema(features=tuple(features), history_length=history_length, embedding_version=version)
    encoder = Encoder(schema, integers)

    ids = torch.from_numpy(items["item_id"].to_numpy().copy())
    nothing = torch.iinfo(torch.int64).min
    categorical = [encode_column(encoder, f.name, items[f.name]) for f in schema.item_fields]
    columns = torch.stack(categorical, 1) if categorical else torch.empty(len(items), 0, dtype=torch.int64)
    unknown = torch.full((SPECIAL, len(categorical)), UNKNOWN)
    unknown[0] = 0
    sets = {}
    if length:
        flat = encode_column(encoder, "tags", pa.chunked_array([pc.list_flatten(tags)]))
        row = torch.from_numpy(pc.list_parent_indices(tags).to_numpy().astype(np.int64))
        first = torch.searchsorted(row, row)
        sets["tags"] = torch.zeros(len(items) + SPECIAL, length, dtype=torch.int64)
        sets["tags"][row + SPECIAL, torch.arange(len(row)) - first] = flat
    vector_IE = torch.from_numpy(np.concatenate([np.zeros((SPECIAL, vectors.shape[1]), np.float32), vectors[order]]))
    catalog = Catalog(
        torch.cat([torch.tensor([nothing, nothing]), ids]),
        narrow(torch.cat([unknown, columns])),
        {name: narrow(values) for name, values in sets.items()},
        vector_IE if vectors.shape[1] else None,
    )
    return encoder, catalog


def encode(config: DatasetConfig, joined: Joined, encoder: Encoder, catalog: Catalog) -> dict[str, Tensor]:
    """The columns of rows.safetensors, not yet narrowed."""
    fields = (feature.name for feature in encoder.schema.impression_fields)
    columns = {f"field.{name}": encode_column(encoder, name, joined.fields[name]) for name in fields}
    columns["item"] = catalog.rows(torch.from_numpy(joined.item_ids.copy()))
    end, start = (torch.from_numpy(a.copy()) for a in (joined.clicks_end, joined.clicks_start))
    columns["end"], columns["length"] = end, (end - start).clamp(max=config.history_length)
    columns["label"] = torch.from_numpy(joined.labels.copy())
    user_ids, user = np.unique(joined.user_ids, return_inverse=True)
    columns["user"], columns["user_ids"] = torch.from_numpy(user), torch.from_numpy(user_ids)
    return columns | {name: torch.from_numpy(values.copy()) for name, values in joined.logged.items()}


def unseen(columns: dict[str, Tensor], fields: dict[str, pa.ChunkedArray], rows: tuple[int, int]) -> pa.Table:
    """The values (as text) of a range of rows that the vocabulary does not hold; `row` is that of the dataset."""
    # the first is for a dataset without impression features
    parts = [pa.schema([("field", pa.string()), ("row", pa.int64()), ("value", pa.string())]).empty_table()]
    for name in sorted(name.removeprefix("field.") for name in columns if name.startswith("field.")):
        at = np.flatnonzero(columns[f"field.{name}"][slice(*rows)].numpy() == UNKNOWN) + rows[0]
        values = fields[name].take(pa.array(at)).cast(pa.string())
        parts.append(pa.table({"field": pa.repeat(name, len(at)), "row": at, "value": values}))
    return pa.concat_tables(parts)


def _frequent(values: pa.ChunkedArray, min_count: int) -> Sequence[Any]:
    counts = pc.value_counts(values.drop_null().combine_chunks())
    kept = counts.field(0).filter(pc.greater_equal(counts.field(1), min_count))
    return sorted(kept.to_pylist())
