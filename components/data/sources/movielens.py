"""MovieLens in the ml-1m layout, with optional texts and image vectors beside it.

    ratings.dat[.gz]     UserID::MovieID::Rating::Timestamp
    users.dat            UserID::Gender::Age::Occupation::Zip
    movies.dat           MovieID::Title (Year)::Genre|Genre     (latin-1)
    item_text.parquet    item_id, text                          optional
    item_image.parquet   item_id, vector                        optional

The click label is that of the literature: ratings of 3 are set aside, label = rating > 3. A rating that is not 1 to 5
and a time before 1970 are broken.
"""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from components.common.contracts import END_OF_TIME, TIMESTAMP, conform, read_parquet
from components.data.sources import RawTables, Window, brief

AGES = {"1": "under 18", "18": "18-24", "25": "25-34", "35": "35-44", "45": "45-49", "50": "50-55", "56": "56+"}
NEUTRAL_RATING = 3
RATINGS = (1, 5)
NO_RATING = "rating is not 1 to 5"
NO_TIME = "time is not in the years 1970 to 9999"


def read(raw: str, config: None, window: Window, rows: int | None = None) -> RawTables:
    """Events, users (gender, age, occupation), items (decade; genres as tags), text and image.

    The files of this layout are small: `rows` is ignored.
    """
    folder = Path(raw)
    ratings = kept = _table(folder, "ratings.dat", ["user_id", "item_id", "rating", "seconds"], pa.int64())
    left_out = {}
    low, high = RATINGS
    for reason, found in {  # a row without a rating or a time stays: ingest finds and counts it
        NO_RATING: lambda t: pc.or_(pc.less(t["rating"], low), pc.greater(t["rating"], high)),
        NO_TIME: lambda t: pc.or_(pc.less(t["seconds"], 0), pc.greater_equal(t["seconds"], END_OF_TIME // 1_000_000)),
        f"rating of {NEUTRAL_RATING}": lambda t: pc.equal(t["rating"], NEUTRAL_RATING),
    }.items():
        is_so = found(kept).fill_null(False)
        left_out[reason] = kept.filter(is_so)
        kept = kept.filter(pc.invert(is_so))
    aside = left_out.pop(f"rating of {NEUTRAL_RATING}")
    events = pa.table(
        {
            "user_id": kept["user_id"],
            "item_id": kept["item_id"],
            "timestamp": pc.multiply(kept["seconds"], 1_000_000).cast(TIMESTAMP),
            "label": pc.greater(kept["rating"], NEUTRAL_RATING).cast(pa.int8()),
        }
    ).sort_by([("timestamp", "ascending"), ("user_id", "ascending"), ("item_id", "ascending")])
    users = _table(folder, "users.dat", ["user_id", "gender", "age", "occupation", "zip"], pa.string())
    movies = _table(folder, "movies.dat", ["item_id", "title", "genres"], pa.string())
    year = pc.struct_field(pc.extract_regex(movies["title"], r"\((?P<year>\d{4})\)\s*$"), "year")
    decade = pc.binary_join_element_wise(pc.utf8_slice_codeunits(year, 0, 3), "0s", "")
    items = pa.table(
        {
            "item_id": movies["item_id"].cast(pa.int64()),
            # The layout has no date of arrival: every title is there from the first rating on.
            "created_at": pa.repeat(pc.min(events["timestamp"]), len(movies)),
            "title": movies["title"],
            "tags": pc.split_pattern(movies["genres"], "|"),
            "decade": decade,
        }
    )
    texts = folder / "item_text.parquet"
    if texts.is_file():
        wanted = pa.schema([("item_id", pa.int64()), ("text", pa.string())])
        found = conform(read_parquet(texts), wanted, str(texts))
        at = pc.index_in(items["item_id"], value_set=found["item_id"].combine_chunks())
        items = items.append_column("text", found["text"].take(at))  # null where there is no text
    else:
        items = items.append_column("text", pa.nulls(len(items), pa.string()))
    images = folder / "item_image.parquet"
    return RawTables(
        events=events,
        users=pa.table(
            {
                "user_id": users["user_id"].cast(pa.int64()),
                "gender": users["gender"],
                "age": _rename(users["age"], AGES),
                "occupation": users["occupation"],
            }
        ).filter(pc.is_in(users["user_id"].cast(pa.int64()), value_set=pc.unique(events["user_id"]))),
        items=items.sort_by("item_id"),
        modalities={"image": read_parquet(images)} if images.is_file() else {},
        read=len(ratings),
        rejected=left_out,
        set_aside={f"rating of {NEUTRAL_RATING}": aside},
    )


def _table(folder: Path, name: str, columns: list[str], kind: pa.DataType) -> pa.Table:
    """A `::`-separated latin-1 file, plain or gzipped. Raises ValueError with the file and the line's trouble."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise ValueError(f"ingest.raw: {folder} holds no {name} or {name}.gz; it must be a folder in the ml-1m layout")
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            text = stream.read().decode("latin-1")
    except OSError as error:
        raise ValueError(f"{path} cannot be read whole: {error}. Copy it again") from None
    try:  # no byte of these files is a tab, and Arrow's reader takes one character as its separator
        return csv.read_csv(
            io.BytesIO(text.replace("::", "\t").encode()),
            csv.ReadOptions(column_names=columns, use_threads=False),  # one thread knows a broken line's number
            csv.ParseOptions(delimiter="\t", quote_char=False),
            csv.ConvertOptions(column_types=dict.fromkeys(columns, kind), strings_can_be_null=False),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not the ml-1m layout {'::'.join(columns)}: {brief(error)}. Mend the file") from None


def _rename(column: pa.ChunkedArray, names: dict[str, str]) -> pa.Array:
    encoded = column.combine_chunks().dictionary_encode()
    renamed = pa.array([names.get(value, value) for value in encoded.dictionary.to_pylist()])
    return renamed.take(encoded.indices)
