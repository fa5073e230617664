"""MicroLens as the MM-CTR challenge gives it: the files of MicroLens_1M_x1, as they are.

    train.parquet, valid.parquet, [test.parquet]   user_id, item_id, item_seq [100], likes_level, views_level, label
    item_info.parquet                              item_id, item_tags [5], item_emb_d128
    ../item_feature.parquet                        item_id, item_title, txt_emb_BERT, img_emb_CLIPRN50: optional

Item 0 and tag 0 are padding. `ingest.raw` is that folder, or the one above it: then the titles, and the text and image
vectors in place of item_emb_d128, are read too.

There are no times; the histories and the split are given. Rows keep the order of the files (train, valid, test). The
history of a row is a range of one array that holds each sequence of a user once: where a longer sequence of the user
begins with it, both share the same range. A file without labels (the challenge kept those of test) is set aside.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.common.contracts import read_parquet, vector_matrix
from components.data.sources import RawTables, Window, timeless

FOLDER = "MicroLens_1M_x1"
MEMORY = "2GB"  # of the deduplication, which spills to disk beyond
MOST = 1 << 40  # rows: all of them
ROWS = {"user_id", "item_id", "item_seq", "likes_level", "views_level"}
MODALITIES = {"text": "txt_emb_BERT", "image": "img_emb_CLIPRN50"}

GIVEN = """
    create table given (split varchar, file int, row bigint, user_id bigint, item_id bigint, label tinyint,
                        likes_level varchar, views_level varchar, seq bigint[])
"""

ROWS_OF_A_FILE = """
    select ?, ?, file_row_number, user_id, item_id, label, likes_level, views_level,
           list_filter(item_seq, lambda i: i <> 0)
    from read_parquet(?, file_row_number = true)
    where file_row_number < ?
"""

# Sorted, a sequence lies directly before those that begin with it. A shared one adds nothing to the array. So the sum
# over the sequences before it is where it starts, inside the first longer one that is stored.
PLACED = """
    create table placed as
    with ordered as (
        select user_id, seq, row_number() over (order by user_id, seq) as id,
               coalesce(list_slice(lead(seq) over (partition by user_id order by seq), 1, len(seq)) = seq, false)
                   as shared
        from (select distinct user_id, seq from given where len(seq) > 0)
    )
    select *, coalesce(sum(if(shared, 0, len(seq))) over (
                  order by id rows between unbounded preceding and 1 preceding), 0)::bigint as start
    from ordered
"""

EVENTS = """
    select given.user_id, given.item_id, label, likes_level, views_level, split,
           coalesce(start, 0)::bigint as history_start, coalesce(start + len(given.seq), 0)::bigint as history_end
    from given left join placed on given.user_id = placed.user_id and given.seq = placed.seq
    order by file, row
"""


def read(raw: str, config: None, window: Window, rows: int | None = None) -> RawTables:
    """Events with their given histories and split, users, items, and vectors; with `rows`, of each file the first."""
    root = Path(raw)
    folder = root / FOLDER if (root / FOLDER).is_dir() else root
    files = {name: folder / f"{name}.parquet" for name in ("train", "valid", "test")}
    if not files["test"].is_file():
        del files["test"]
    labelled = {name: _columns(file, name) for name, file in files.items()}
    counts = {name: min(pq.read_metadata(file).num_rows, rows or MOST) for name, file in files.items()}
    with tempfile.TemporaryDirectory(prefix="clickloop-microlens-") as spill, duckdb.connect() as db:
        db.execute(f"set memory_limit = '{MEMORY}'; set temp_directory = '{spill}'")
        db.execute(GIVEN)
        for at, name in enumerate(name for name in files if labelled[name]):
            db.execute(f"insert into given {ROWS_OF_A_FILE}", [name, at, str(files[name]), counts[name]])
        db.execute(PLACED)
        events = db.sql(EVENTS).to_arrow_table()
        kept = db.sql("select seq from placed where not shared order by id").to_arrow_table()["seq"]
        given = db.sql("select coalesce(sum(len(seq)), 0)::bigint from given").fetchall()[0][0]
        aside = {
            f"{name} has no label": db.sql(
                "select user_id, item_id, file_row_number as row from read_parquet(?, file_row_number = true) "
                "where file_row_number < ?",
                params=[str(files[name]), counts[name]],
            ).to_arrow_table()
            for name in files
            if not labelled[name]
        }
    times = timeless(len(events))
    items, modalities = _items(folder / "item_info.parquet", root / "item_feature.parquet", times)
    histories = pa.table({"item_id": pc.list_flatten(kept).cast(pa.int64())})
    return RawTables(
        events=events.append_column("timestamp", times),
        users=pa.table({"user_id": pc.unique(events["user_id"])}).sort_by("user_id"),
        items=items,
        modalities=modalities,
        read=sum(counts.values()),
        histories=histories,
        set_aside=aside,
        facts={"history_items_given": given, "history_items_stored": len(histories)},
    )


def _columns(file: Path, name: str) -> bool:
    """Whether the rows have labels. Raises ValueError where the file is no whole one or lacks a column."""
    if not file.is_file():
        raise ValueError(f"ingest.raw: {file} is not there; name the folder that holds {FOLDER}, or that folder")
    try:
        names = set(pq.read_schema(file).names)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} is no whole parquet file: {error}. Download it again") from None
    missing = ROWS | ({"label"} if name != "test" else set())
    if missing := missing - names:
        raise ValueError(f"{file}: columns {sorted(missing)} are missing; it has {sorted(names)}. Download it again")
    return "label" in names


def _items(info: Path, feature: Path, times: pa.Array) -> tuple[pa.Table, dict[str, pa.Table]]:
    """The canonical items, and the vectors: text and image where item_feature.parquet has them, else item_emb_d128."""
    table = _item_file(info, {"item_id", "item_tags", "item_emb_d128"})
    ids = table["item_id"]
    tags = table["item_tags"].combine_chunks()
    real = pc.not_equal(tags.flatten(), 0)
    ends = np.concatenate([[0], np.cumsum(real.to_numpy(zero_copy_only=False))])
    bounds = np.concatenate([[0], np.cumsum(pc.list_value_length(tags).fill_null(0).to_numpy())])
    kept = pa.ListArray.from_arrays(pa.array(ends[bounds], pa.int32()), tags.flatten().filter(real).cast(pa.string()))
    titles, modalities = pa.nulls(len(ids), pa.string()), {}
    if feature.is_file():
        found = _item_file(feature, {"item_id", "item_title"})
        titles = found["item_title"].take(pc.index_in(ids, value_set=found["item_id"].combine_chunks()))
        columns = {name: column for name, column in MODALITIES.items() if column in found.column_names}
        modalities = {name: _vectors(found, column) for name, column in columns.items()}
    items = pa.table(
        {
            "item_id": ids,
            "created_at": pa.repeat(times[0], len(ids)),
            "title": pc.coalesce(titles, ids.cast(pa.string())),
            "tags": kept,
            "text": titles,
        }
    )
    return items.sort_by("item_id"), modalities or {"multimodal": _vectors(table, "item_emb_d128")}


def _item_file(file: Path, needed: set[str]) -> pa.Table:
    """The rows of real items: item 0 is padding."""
    table = read_parquet(file)
    if missing := needed - set(table.column_names):
        raise ValueError(
            f"{file}: columns {sorted(missing)} are missing; it has {table.column_names}. Download it again"
        )
    ids = table["item_id"].cast(pa.int64())
    return table.set_column(table.column_names.index("item_id"), "item_id", ids).filter(pc.not_equal(ids, 0))


def _vectors(table: pa.Table, column: str) -> pa.Table:
    """item_id and vector; a vector of zeros stands for none."""
    there = table.filter(pc.is_valid(table[column]))
    fixed = vector_matrix(there[column].cast(pa.list_(pa.float32())), column)
    real = fixed.flatten().to_numpy(zero_copy_only=False).reshape(len(there), -1).any(axis=1)
    return pa.table({"item_id": there["item_id"], "vector": fixed}).filter(pa.array(real))
