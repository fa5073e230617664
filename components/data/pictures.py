"""Pictures of items: from where the items' data say they are, into the canonical data, if they can be read.

The bytes are copied as they are, so the pictures of this run can be embedded again later, even if they are gone from
their first place: DVC keeps the bytes of every run. Only a few pictures are in memory at once.

Where a picture is, is data, and data may come from anybody. Only two kinds of places are read: files below
`ingest.raw`, and http(s) URLs of the hosts that `ingest.picture_hosts` names.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ipaddress import ip_address
from itertools import repeat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.common.contracts import IMAGE, PICTURES

if TYPE_CHECKING:
    from aiohttp import ClientHandlerType, ClientRequest, ClientResponse, ClientSession
    from aiohttp.abc import ResolveResult
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")  # of the formats that Pillow decodes, those that the web uses for pictures
MAX_BYTES = 1 << 24
MAX_PIXELS = 1 << 25  # 100 MB as RGB
BATCH = 32  # pictures fetched together, and in one row group; 32 of the largest are half a gigabyte
FETCHERS = 8
TIMEOUT = 30  # seconds that one URL may take, redirects and all
ABSENT = "cannot be opened"
OUTSIDE = "neither below ingest.raw nor an http(s) URL"
NOT_NAMED = "host is not in ingest.picture_hosts"
NOT_PUBLIC = "address is not public"
REFUSED = (NOT_NAMED, NOT_PUBLIC)  # reasons that say nothing of the picture: it was not asked for
LARGE = f"larger than {MAX_BYTES >> 20} MiB"
BROKEN = f"not a whole {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
VAST = f"more than {MAX_PIXELS:,} pixels"
LEFT_OUT = pa.schema([("item_id", pa.int64()), (IMAGE, pa.string()), ("reason", pa.string()), ("error", pa.string())])


class UnreadableError(ValueError):
    """A picture that is left out: `reason` is one of a few, the text says what happened."""

    def __init__(self, reason: str, error: object) -> None:
        super().__init__(str(error))
        self.reason = reason


def copy(named: pa.Table, raw: str, file: Path, hosts: Collection[str] = ()) -> pa.Table:
    """Write the pictures of `named` (item_id, image: a path below `raw`, or an http(s) URL) to `file` as PICTURES, in
    their order.

    hosts  host names and addresses from which URLs may be fetched; without any, no URL is fetched. A private, loopback
           or other address that is not public must be named itself, even if the host at that address is named

    Returns the pictures that are left out, as LEFT_OUT.
    """
    from tqdm import tqdm

    left_out = []
    with (
        _web(hosts) as download,
        ThreadPoolExecutor(FETCHERS) as pool,
        pq.ParquetWriter(file, PICTURES, compression="none", use_dictionary=False) as writer,
        tqdm(total=len(named), desc="pictures", unit="item", disable=None) as shown,
    ):
        for start in range(0, len(named), BATCH):
            rows = named.slice(start, BATCH)
            ids, places = rows["item_id"].to_pylist(), rows[IMAGE].to_pylist()
            fetched = pool.map(_fetched, places, repeat(raw), repeat(download))
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


def describe(left_out: pa.Table) -> str:
    """Each reason with its number of pictures, and the first of them with what to do about it."""
    parts = []
    for reason in pc.unique(left_out["reason"]).to_pylist():
        rows = left_out.filter(pc.equal(left_out["reason"], reason))
        first = rows.slice(0, 1).to_pylist()[0]
        parts.append(f"{reason}: {len(rows)}, e.g. {first[IMAGE]} of item {first['item_id']}: {first['error']}")
    return "; ".join(parts)


def decode(picture: bytes, side: int | None = None) -> Image:
    """The picture as RGB: upright, on white where it is transparent, the first frame if it moves.

    side  a JPEG may be decoded smaller than it is, but with at least this many pixels a side: a tenth of the time
    Raises UnreadableError.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is stricter
            opened = Image.open(io.BytesIO(picture), formats=FORMATS)
        if opened.width * opened.height > MAX_PIXELS:
            raise UnreadableError(VAST, f"{opened.width} x {opened.height}")
        if side is not None:
            opened.draft(None, (side, side))
        upright = ImageOps.exif_transpose(opened)
        if upright.mode.startswith("I"):  # 16 bits of grey, which Pillow would turn into white
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


def _fetched(place: str, raw: str, download: Callable[[str], bytearray]) -> bytes | UnreadableError:
    try:
        if place.startswith(("http://", "https://")):
            picture = download(place)
        else:
            with _opened(place, raw) as opened:
                picture = bytearray()
                while chunk := opened.read(MAX_BYTES + 1 - len(picture)):  # a stream may give less than it is asked for
                    picture += chunk
    except UnreadableError as error:
        return error
    except Exception as error:  # each filesystem of fsspec, and aiohttp, has errors of its own
        return UnreadableError(ABSENT, f"{type(error).__name__}: {error}; correct the path or the access to it")
    return UnreadableError(LARGE, "make it smaller") if len(picture) > MAX_BYTES else bytes(picture)


@contextmanager
def _web(hosts: Collection[str]) -> Iterator[Callable[[str], bytearray]]:
    """A function that fetches a URL's bytes, at most MAX_BYTES + 1 of them, from the named hosts.

    Each request is checked, that of a redirect too: its host must be named. And each address is checked: it must be
    public or named. The checked address is the one that is connected to, so a name that changes its address between
    the check and the connection gains nothing.
    """
    from aiohttp import ClientSession, ClientTimeout, TCPConnector, ThreadedResolver
    from fsspec.asyn import get_loop, sync

    allowed = {host.lower() for host in hosts}

    class Resolver(ThreadedResolver):  # is not asked about URLs that hold an address: their host is the address
        async def resolve(self, host: str, *args: Any, **kwargs: Any) -> list[ResolveResult]:
            found = await super().resolve(host, *args, **kwargs)
            good = [one for one in found if one["host"] in allowed or _is_public(one["host"])]
            if not good:
                at = ", ".join(sorted({one["host"] for one in found}))
                raise UnreadableError(
                    NOT_PUBLIC, f"{host} is at {at}; if you trust it, add the address to ingest.picture_hosts too"
                )
            return good

    async def check(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        if request.url.host not in allowed:
            raise UnreadableError(
                NOT_NAMED, f"{request.url.host} is not fetched from; if you trust it, add it to ingest.picture_hosts"
            )
        return await handler(request)

    async def start() -> ClientSession:
        connector, limit = TCPConnector(resolver=Resolver()), ClientTimeout(total=TIMEOUT)
        return ClientSession(connector=connector, timeout=limit, middlewares=[check])

    async def fetch(url: str) -> bytearray:
        picture = bytearray()
        async with session.get(url) as answer:
            answer.raise_for_status()
            while chunk := await answer.content.read(MAX_BYTES + 1 - len(picture)):
                picture += chunk
        return picture

    session = sync(get_loop(), start)
    try:
        yield lambda url: sync(get_loop(), fetch, url)
    finally:
        sync(get_loop(), session.close)


def _is_public(address: str) -> bool:
    found = ip_address(address)
    return found.is_global and not found.is_multicast


def _opened(place: str, raw: str) -> IO[bytes]:
    """A file below `raw`. Raises UnreadableError if `place` is not below it. `place` is never parsed as one of fsspec's
    chains (`::`), which could open anything through anything."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    outside = UnreadableError(OUTSIDE, f"{place} is not read; move it below {raw}, or give an http(s) URL")
    system, root = fsspec.core.url_to_fs(raw)
    if isinstance(system, LocalFileSystem):
        local = place.removeprefix("file://")
        path = Path(local).resolve()
        if "://" in local or not path.is_relative_to(Path(root).resolve()):
            raise outside
        if not path.is_file():  # a pipe would never end
            raise UnreadableError(ABSENT, f"{path} is not there, or not a regular file; correct the path")
        return path.open("rb")
    base = raw.rstrip("/") + "/"
    below = place.removeprefix(base)
    if not place.startswith(base) or ".." in below.split("/"):
        raise outside
    opened: IO[bytes] = system.open(f"{root}/{below}", "rb", cache_type="none")  # only what is read, no megabytes ahead
    return opened


def _checked(picture: bytes | UnreadableError) -> bytes | UnreadableError:
    if isinstance(picture, bytes):
        try:
            decode(picture, side=1)
        except UnreadableError as error:
            return error
    return picture
