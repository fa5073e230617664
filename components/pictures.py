"""Pictures of items: from wherever a source says that they lie, into the canonical data, if they can be read.

The bytes are copied as they are, so what is embedded today can be embedded again tomorrow, whatever became of the
place. A few pictures are in memory at once, however many there are.
"""

from __future__ import annotations

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.contracts import IMAGE, PICTURES

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")  # of the decoders that Pillow has, those that the web's pictures need
MAX_BYTES = 1 << 24
MAX_PIXELS = 1 << 25  # 100 MB as RGB
BATCH = 32  # fetched together, and a row group: as many of the largest are half a gigabyte
FETCHERS = 8
ABSENT = "cannot be opened"
LARGE = f"larger than {MAX_BYTES >> 20} MiB"
BROKEN = f"no whole {', '.join(FORMATS)}"
VAST = f"more than {MAX_PIXELS:,} pixels"
LEFT_OUT = pa.schema([("item_id", pa.int64()), (IMAGE, pa.string()), ("reason", pa.string()), ("error", pa.string())])


class UnreadableError(ValueError):
    """A picture that is left out: `reason` is one of a few, the text says what happened."""

    def __init__(self, reason: str, error: object) -> None:
        super().__init__(str(error))
        self.reason = reason


def copy(named: pa.Table, file: Path) -> pa.Table:
    """Write the pictures of `named` (item_id, image: a path or fsspec URL) to `file` as PICTURES, in their order.

    Returns those that cannot be read, LEFT_OUT.
    """
    from tqdm import tqdm

    left_out = []
    with (
        ThreadPoolExecutor(FETCHERS) as pool,
        pq.ParquetWriter(file, PICTURES, compression="none", use_dictionary=False) as writer,
        tqdm(total=len(named), desc="pictures", unit="item", disable=None) as shown,
    ):
        for start in range(0, len(named), BATCH):
            rows = named.slice(start, BATCH)
            ids, places = rows["item_id"].to_pylist(), rows[IMAGE].to_pylist()
            found = [_checked(picture) for picture in pool.map(_fetched, places)]  # one is decoded at a time
            kept = [(item, picture) for item, picture in zip(ids, found, strict=True) if isinstance(picture, bytes)]
            if kept:
                writer.write_table(pa.table([list(column) for column in zip(*kept, strict=True)], schema=PICTURES))
            left_out += [
                {"item_id": item, IMAGE: place, "reason": trouble.reason, "error": str(trouble)}
                for item, place, trouble in zip(ids, places, found, strict=True)
                if isinstance(trouble, UnreadableError)
            ]
            shown.update(len(rows))
    return pa.Table.from_pylist(left_out, LEFT_OUT)


def told(left_out: pa.Table) -> str:
    """Reason: how many, and the first of them."""
    said = []
    for reason in pc.unique(left_out["reason"]).to_pylist():
        rows = left_out.filter(pc.equal(left_out["reason"], reason))
        first = rows.slice(0, 1).to_pylist()[0]
        said.append(f"{reason}: {len(rows)}, e.g. {first[IMAGE]} of item {first['item_id']}: {first['error']}")
    return "; ".join(said)


def decode(picture: bytes, side: int | None = None) -> Image:
    """RGB, upright, on white where it is transparent; of a moving one the first frame.

    side  a JPEG may come smaller than it is, with at least this many pixels a side: a tenth of the time
    Raises UnreadableError.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is the stricter
            opened = Image.open(io.BytesIO(picture), formats=FORMATS)
        if opened.width * opened.height > MAX_PIXELS:
            raise UnreadableError(VAST, f"{opened.width} x {opened.height}")
        if side is not None:
            opened.draft(None, (side, side))
        upright = ImageOps.exif_transpose(opened)
        if not upright.has_transparency_data:
            return upright.convert("RGB")
        white = Image.new("RGBA", upright.size, "white")
        white.alpha_composite(upright.convert("RGBA"))
        return white.convert("RGB")
    except Image.DecompressionBombError as error:
        raise UnreadableError(VAST, error) from None
    except UnreadableError:
        raise
    except Exception as error:  # bytes can make a decoder raise anything
        raise UnreadableError(BROKEN, error) from None


def _fetched(place: str) -> bytes | UnreadableError:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(place)
        with system.open(path, "rb", cache_type="none") as opened:  # what is read, and no megabytes ahead
            picture = opened.read(MAX_BYTES + 1)
    except Exception as error:  # each filesystem of fsspec has errors of its own
        return UnreadableError(ABSENT, f"{type(error).__name__}: {error}")
    return UnreadableError(LARGE, "shrink it") if len(picture) > MAX_BYTES else bytes(picture)


def _checked(picture: bytes | UnreadableError) -> bytes | UnreadableError:
    if isinstance(picture, bytes):
        try:
            decode(picture, side=1)
        except UnreadableError as error:
            return error
    return picture
