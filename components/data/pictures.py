"""Pictures of items: from where a source says that they lie, into the canonical data, if they can be read.

The bytes are copied as they are, so what was embedded of this run's data can be embedded again, whatever became of the
place: DVC keeps the bytes of every run. A few pictures are in memory at once, however many there are.

Where they lie is data, and data may be anybody's: nothing is opened but http(s) URLs and what is below `ingest.raw`.
"""

from __future__ import annotations

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.common.contracts import IMAGE, PICTURES

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")  # of the decoders that Pillow has, those that the web's pictures need
MAX_BYTES = 1 << 24
MAX_PIXELS = 1 << 25  # 100 MB as RGB
BATCH = 32  # fetched together, and a row group: as many of the largest are half a gigabyte
FETCHERS = 8
TIMEOUT = 30  # seconds that a request for a URL may take
ABSENT = "cannot be opened"
OUTSIDE = "neither below ingest.raw nor http(s)"
LARGE = f"larger than {MAX_BYTES >> 20} MiB"
BROKEN = f"no whole {', '.join(FORMATS)}"
VAST = f"more than {MAX_PIXELS:,} pixels"
LEFT_OUT = pa.schema([("item_id", pa.int64()), (IMAGE, pa.string()), ("reason", pa.string()), ("error", pa.string())])


class UnreadableError(ValueError):
    """A picture that is left out: `reason` is one of a few, the text says what happened."""

    def __init__(self, reason: str, error: object) -> None:
        super().__init__(str(error))
        self.reason = reason


def copy(named: pa.Table, raw: str, file: Path) -> pa.Table:
    """Write the pictures of `named` (item_id, image: a path below `raw`, or an http(s) URL) to `file` as PICTURES, in
    their order.

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
            fetched = pool.map(_fetched, places, repeat(raw))
            found = [_checked(picture) for picture in fetched]  # one is decoded at a time
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
        if upright.mode.startswith("I"):  # 16 bits of grey, of which Pillow would make white
            grey_HW = np.asarray(upright)
            clear_HW = grey_HW == upright.info.get("transparency", -1)
            return Image.fromarray(np.where(clear_HW, 255, grey_HW >> 8).astype(np.uint8)).convert("RGB")
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


def _fetched(place: str, raw: str) -> bytes | UnreadableError:
    picture = bytearray()
    try:
        with _opened(place, raw) as opened:
            while chunk := opened.read(MAX_BYTES + 1 - len(picture)):  # a stream gives what it has
                picture += chunk
    except UnreadableError as error:
        return error
    except Exception as error:  # each filesystem of fsspec has errors of its own
        return UnreadableError(ABSENT, f"{type(error).__name__}: {error}; mend the path or the access to it")
    return UnreadableError(LARGE, "shrink it") if len(picture) > MAX_BYTES else bytes(picture)


def _opened(place: str, raw: str) -> IO[bytes]:
    """Raises UnreadableError where `place` is not for reading. `place` is never parsed as a chain of fsspec's (`::`),
    which would open anything by way of anything."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    options: dict[str, Any] = {"mode": "rb", "cache_type": "none"}  # what is read, and no megabytes ahead
    if place.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        web = fsspec.filesystem("https", client_kwargs={"timeout": ClientTimeout(total=TIMEOUT)})
        return web.open(place, **options)
    outside = UnreadableError(OUTSIDE, f"{place} is not read; move it below {raw}, or give an http(s) URL")
    system, root = fsspec.core.url_to_fs(raw)
    if isinstance(system, LocalFileSystem):
        local = place.removeprefix("file://")
        path = Path(local).resolve()
        if "://" in local or not path.is_relative_to(Path(root).resolve()):
            raise outside
        if not path.is_file():  # a pipe would never end
            raise UnreadableError(ABSENT, f"{path} is not there, or no regular file; mend the path")
        return path.open("rb")
    base = raw.rstrip("/") + "/"
    below = place.removeprefix(base)
    if not place.startswith(base) or ".." in below.split("/"):
        raise outside
    return system.open(f"{root}/{below}", **options)


def _checked(picture: bytes | UnreadableError) -> bytes | UnreadableError:
    if isinstance(picture, bytes):
        try:
            decode(picture, side=1)
        except UnreadableError as error:
            return error
    return picture
