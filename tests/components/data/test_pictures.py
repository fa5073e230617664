"""pictures: what items name is copied to the byte, whatever cannot be read is told, and nothing of it is a feature."""

from __future__ import annotations

import io
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile
from PIL import Image

from components.common.artifacts import folder_hash, read_json
from components.common.contracts import PICTURES, Canonical
from components.common.dataset import Dataset
from components.data import ingest, pictures
from components.data.pictures import (
    ABSENT,
    BROKEN,
    LARGE,
    NOT_NAMED,
    NOT_PUBLIC,
    OUTSIDE,
    VAST,
    UnreadableError,
    decode,
)
from components.data.sources import RawTables
from components.data.sources.files import FilesConfig
from components.features import dataset, embed, features
from components.features.dataset import DatasetConfig
from components.features.embed import EmbedConfig
from components.features.encoders import describe
from tests.components.small_world import (
    FEATURES,
    NO_FILES,
    NO_TABLE,
    SPLIT,
    Folders,
    ingest_config,
    ingest_tables,
    new_repo,
    validated,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def drawn(seed: int, width: int = 48, height: int = 32) -> Image.Image:
    """A few rectangles."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist()))
    for _ in range(4):
        x, y = rng.integers(0, width), rng.integers(0, height)
        picture.paste(tuple(rng.integers(0, 256, 3).tolist()), (int(x), int(y), int(x) + 15, int(y) + 12))
    return picture


def header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says how large it would be."""
    content = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    size, end = struct.pack(">I", 13), b"\0\0\0\0IEND\xaeB`\x82"
    return b"\x89PNG\r\n\x1a\n" + size + content + struct.pack(">I", zlib.crc32(content)) + end


# ---- one picture ------------------------------------------------------------------------------------------------


def turned() -> bytes:
    """A red and blue flag that lies on its side, and says so."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by a quarter to the right
    flag = Image.new("RGB", (40, 20), RED)
    flag.paste(BLUE, (20, 0, 40, 20))
    return encoded(flag, exif=exif)


def translucent() -> bytes:
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0))  # black where nobody sees it
    picture.putpixel((0, 0), (255, 0, 0, 255))
    picture.putpixel((1, 0), (255, 0, 0, 102))
    return encoded(picture)


SEEN = {
    "upright": (turned(), (20, 40), {(10, 5): RED, (10, 35): BLUE}),
    "on white": (translucent(), (4, 4), {(0, 0): RED, (1, 0): (255, 153, 153), (3, 3): (255, 255, 255)}),
    "grey": (encoded(Image.new("L", (3, 2), 7)), (3, 2), {(1, 1): (7, 7, 7)}),
    "grey of 16 bits": (
        encoded(Image.fromarray(np.array([[0, 300, 32768], [65535, 65279, 256]], np.uint16))), (3, 2),
        {(0, 0): (0,) * 3, (1, 0): (1,) * 3, (2, 0): (128,) * 3, (0, 1): (255,) * 3, (1, 1): (254,) * 3},
    ),
    "grey of 16 bits with one through": (
        encoded(Image.fromarray(np.array([[300, 301, 0]], np.uint16)), transparency=300), (3, 1),
        {(0, 0): (255,) * 3, (1, 0): (1,) * 3, (2, 0): (0,) * 3},
    ),
    "palette with one colour through": (
        encoded(Image.new("P", (3, 2), 0), "GIF", transparency=0), (3, 2), {(1, 1): (255, 255, 255)},
    ),
    "moving": (
        encoded(Image.new("RGB", (3, 2), RED), "GIF", save_all=True, append_images=[Image.new("RGB", (3, 2), BLUE)]),
        (3, 2), {(1, 1): RED},
    ),
    "print colours": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), (8, 8), {(4, 4): (254, 0, 0)}),
    "webp": (encoded(Image.new("RGB", (8, 8), BLUE), "WEBP", lossless=True), (8, 8), {(4, 4): BLUE}),
}  # fmt: skip


@pytest.mark.parametrize("what", SEEN)
def test_a_picture_is_what_one_sees(what: str) -> None:
    picture, size, pixels = SEEN[what]
    found = decode(picture)
    assert (found.mode, found.size) == ("RGB", size)
    for at, colour in pixels.items():
        np.testing.assert_allclose(found.getpixel(at), colour, atol=1)


def test_a_jpeg_may_come_smaller() -> None:
    picture = encoded(drawn(1).resize((960, 640)), "JPEG", quality=95)
    assert decode(picture).size == (960, 640)
    small = decode(picture, side=64)
    assert 64 <= small.size[1] < 128
    np.testing.assert_allclose(describe([small]), describe([decode(picture)]), atol=0.05)


BAD = {
    "no bytes": (b"", BROKEN),
    "words": (b"<html>not found</html>", BROKEN),
    "a PNG cut short": (encoded(drawn(0))[:90], BROKEN),
    "a JPEG cut short": (encoded(drawn(0), "JPEG")[:-300], BROKEN),
    "no format for the web": (encoded(drawn(0), "TIFF"), BROKEN),
    "no pixel": (header(4, 4), BROKEN),
    "too many pixels": (header(8192, 4097), VAST),
    "more than Pillow warns of": (header(10_000, 10_000), VAST),
    "more than Pillow opens": (header(60_000, 60_000), VAST),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("side", [None, 64])
def test_a_picture_that_cannot_be_read(what: str, side: int | None, recwarn: pytest.WarningsRecorder) -> None:
    picture, reason = BAD[what]
    with pytest.raises(UnreadableError) as told:
        decode(picture, side)
    assert told.value.reason == reason
    assert not recwarn.list


def test_broken_bytes_raise_nothing_else() -> None:
    rng = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        whole = encoded(drawn(2), kind)
        for _ in range(150):
            broken = np.frombuffer(whole, np.uint8).copy()
            at = rng.integers(0, rng.choice([20, len(broken)]), rng.choice([1, 5, 20]))
            broken[at] = rng.integers(0, 256, len(at))
            try:
                decode(broken.tobytes(), 64)
                outcomes[True] += 1
            except UnreadableError:
                outcomes[False] += 1
    assert min(outcomes.values()) > 50


# ---- many -------------------------------------------------------------------------------------------------------


def named(places: dict[int, str]) -> pa.Table:
    return pa.table({"item_id": list(places), "image": list(places.values())})


def test_bytes_are_copied_in_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "BATCH", 5)
    contents = {100 + i: encoded(drawn(i), ["PNG", "JPEG"][i % 2]) for i in range(17)}
    for item, content in contents.items():
        (tmp_path / str(item)).write_bytes(content)
    file = tmp_path / "pictures.parquet"
    left_out = pictures.copy(named({item: str(tmp_path / str(item)) for item in contents}), str(tmp_path), file)
    assert len(left_out) == 0
    opened = pq.ParquetFile(file)
    assert opened.schema_arrow.equals(PICTURES)
    assert [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)] == [5, 5, 5, 2]
    assert Canonical(tmp_path).count_pictures() == 17
    found = pa.concat_tables(Canonical(tmp_path).pictures()).to_pylist()
    assert [(row["item_id"], row["image"]) for row in found] == list(contents.items())


def test_few_are_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written and read, Arrow holds a few batches and not the sixty there are."""
    size, batch = 100_000, 5
    monkeypatch.setattr(pictures, "BATCH", batch)
    (tmp_path / "a.png").write_bytes(encoded(drawn(0)).ljust(size, b"\0"))
    held, before = [], pa.total_allocated_bytes()

    def watched(picture: bytes, side: int | None = None) -> Image.Image:
        held.append(pa.total_allocated_bytes() - before)
        return decode(picture, side)

    monkeypatch.setattr(pictures, "decode", watched)
    places = dict.fromkeys(range(300), str(tmp_path / "a.png"))
    pictures.copy(named(places), str(tmp_path), tmp_path / "pictures.parquet")
    for _ in Canonical(tmp_path).pictures():
        held.append(pa.total_allocated_bytes() - before)
    assert len(held) == 300 + 60
    assert batch * size <= max(held) < 4 * batch * size


def test_what_cannot_be_read_is_left_out_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_BYTES", 2000)
    (tmp_path / "a.png").write_bytes(encoded(drawn(0)))
    (tmp_path / "words.png").write_bytes(b"words")
    (tmp_path / "vast.png").write_bytes(header(60_000, 60_000))
    (tmp_path / "just.png").write_bytes(encoded(drawn(1)).ljust(2000, b"\0"))
    (tmp_path / "large.png").write_bytes(encoded(drawn(1)).ljust(2001, b"\0"))
    places = {
        1: f"file://{tmp_path}/a.png", 2: f"{tmp_path}/no.png", 3: f"{tmp_path}/words.png",
        4: f"{tmp_path}/vast.png", 5: f"{tmp_path}/just.png", 6: f"{tmp_path}/large.png",
        7: "nosuch://there/b.png", 8: str(tmp_path), 9: str(tmp_path / "pipe.png"),
    }  # fmt: skip
    os.mkfifo(tmp_path / "pipe.png")  # who opens it waits for one who writes
    writes = threading.Timer(5, (tmp_path / "pipe.png").write_bytes, [encoded(drawn(2))])
    writes.daemon = True
    writes.start()
    left_out = pictures.copy(named(places), str(tmp_path), tmp_path / "pictures.parquet")
    writes.cancel()
    assert pq.read_table(tmp_path / "pictures.parquet")["item_id"].to_pylist() == [1, 5]
    reasons = {row["item_id"]: row["reason"] for row in left_out.to_pylist()}
    assert reasons == {2: ABSENT, 3: BROKEN, 4: VAST, 6: LARGE, 7: OUTSIDE, 8: ABSENT, 9: ABSENT}
    assert left_out["image"].to_pylist() == [places[item] for item in reasons]
    told = pictures.describe(left_out)
    assert (
        f"{ABSENT}: 3, e.g. {tmp_path}/no.png of item 2: {tmp_path}/no.png is not there" in told
        and f"{LARGE}: 1" in told
    )


def test_nothing_outside_of_raw_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by `..`, a link, another protocol or a chain of them, though a picture lies there."""
    raw, secret = tmp_path / "raw", tmp_path / "secret.png"
    (raw / "photos").mkdir(parents=True)
    for file in (secret, tmp_path / "raw-2.png", raw / "a.png", raw / "a::b.png"):
        file.write_bytes(encoded(drawn(0)))
    (raw / "inside.png").symlink_to(raw / "a.png")
    (raw / "link.png").symlink_to(secret)
    (raw / "up").symlink_to(tmp_path)
    (tmp_path / "refs.json").write_text(f'{{"version": 1, "refs": {{"a.png": ["file://{secret}"]}}}}')
    fsspec.filesystem("memory").pipe("/pictures-outside/a.png", encoded(drawn(0)))
    good = [f"{raw}/a.png", f"file://{raw}/a.png", f"{raw}/photos/../a.png", f"{raw}/inside.png", f"{raw}/a::b.png"]
    bad = [
        str(secret), f"{raw}/../secret.png", f"file://{secret}", f"{raw}/link.png", f"{raw}/up/secret.png",
        f"{raw}-2.png", f"local::{secret}", f"simplecache::file://{secret}", f"simplecache::file://{raw}/a.png",
        f"reference://a.png::file://{tmp_path}/refs.json", "memory://pictures-outside/a.png",
    ]  # fmt: skip
    for given in (str(raw), f"file://{raw}", f"{raw}/"):
        places = dict(enumerate(good + bad))
        left_out = pictures.copy(named(places), given, tmp_path / "pictures.parquet")
        assert left_out["image"].to_pylist() == bad
        assert set(left_out["reason"].to_pylist()) == {OUTSIDE}
        assert f"{secret} is not read; move it below {given}, or give an http(s) URL" in pictures.describe(left_out)
    monkeypatch.chdir(raw)
    left_out = pictures.copy(named({1: "a.png", 2: bad[-1], 3: "../secret.png"}), ".", tmp_path / "pictures.parquet")
    assert {row["item_id"]: row["reason"] for row in left_out.to_pylist()} == {2: OUTSIDE, 3: OUTSIDE}


def test_nothing_outside_of_raw_is_opened_behind_a_url(tmp_path: Path) -> None:
    place = "memory://pictures-bucket/raw"
    files = ("raw/a.png", "raw/a::b.png", "secret.png", "raw-2.png")
    fsspec.filesystem("memory").pipe({f"/pictures-bucket/{name}": encoded(drawn(0)) for name in files})
    (tmp_path / "a.png").write_bytes(encoded(drawn(0)))
    good = [f"{place}/a.png", f"{place}/a::b.png"]
    bad = [
        f"{place}/../secret.png", "memory://pictures-bucket/secret.png", f"{place}-2.png", f"{tmp_path}/a.png",
        f"file://{tmp_path}/a.png", f"simplecache::{place}/a.png",
    ]  # fmt: skip
    for given in (place, f"{place}/"):
        left_out = pictures.copy(named(dict(enumerate(good + bad))), given, tmp_path / "pictures.parquet")
        assert left_out["image"].to_pylist() == bad
        assert set(left_out["reason"].to_pylist()) == {OUTSIDE}


LOOPBACK = ["127.0.0.1"]


@contextmanager
def web(served: dict[str, bytes | str], asked: list[str] | None = None, address: str = "127.0.0.1") -> Iterator[str]:
    """A server of the files, sent bit by bit without their length; a str is a redirect. `asked` gets each request."""

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if asked is not None:
                asked.append(self.headers["Host"] + self.path)
            content = served.get(self.path, b"not found")
            self.send_response(302 if isinstance(content, str) else 200 if self.path in served else 404)
            self.send_header("Transfer-Encoding", "chunked")
            if isinstance(content, str):
                self.send_header("Location", content)
                content = b""
            self.end_headers()
            try:
                for start in range(0, len(content), 1000):
                    part = content[start : start + 1000]
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                    self.wfile.flush()
                    time.sleep(0.001)
                self.wfile.write(b"0\r\n\r\n")
            except ConnectionError:  # who has seen enough leaves
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer((address, 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{address}:{server.server_port}"
        server.shutdown()


def test_pictures_of_the_web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, however the server sends them, and no more than may be."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3)).astype(np.uint8)
    small, large = encoded(Image.fromarray(noise)), bytes(30_000)
    assert 10_000 < len(small) < 20_000
    monkeypatch.setattr(pictures, "MAX_BYTES", 20_000)
    with web({"/small.png": small, "/large.png": large}) as address:
        places = dict(enumerate([f"{address}/small.png", f"{address}/large.png", f"{address}/no.png"]))
        left_out = pictures.copy(named(places), str(tmp_path), tmp_path / "pictures.parquet", LOOPBACK)
    assert left_out["reason"].to_pylist() == [LARGE, ABSENT]
    assert next(Canonical(tmp_path).pictures()).to_pylist() == [{"item_id": 0, "image": small}]


def test_only_named_hosts_are_asked(tmp_path: Path) -> None:
    """By default none is, and the summary says once what to do."""
    asked: list[str] = []
    with web({"/a.png": encoded(drawn(0))}, asked) as address:
        places = {1: f"{address}/a.png", 2: f"{address}/a.png", 3: address.replace("//", "//127.0.0.1@localhost:1/#")}
        for hosts in ([], ["example.com"]):
            left_out = pictures.copy(named(places), str(tmp_path), tmp_path / "pictures.parquet", hosts)
            assert left_out["reason"].to_pylist() == [NOT_NAMED] * 3
            text = pictures.describe(left_out)
            assert f"{NOT_NAMED}: 3, e.g. {address}/a.png of item 1: 127.0.0.1 is not fetched from; if" in text
            assert text.count("add it to ingest.picture_hosts") == 1
        assert asked == []
        left_out = pictures.copy(named(places), str(tmp_path), tmp_path / "pictures.parquet", LOOPBACK)
        assert left_out["item_id"].to_pylist() == [3]  # what stands before the @ is no host
        assert len(asked) == 2


def test_an_address_that_is_not_public_must_be_named_itself(tmp_path: Path) -> None:
    """A named host whose name leads to the machine itself, or into its network, is not asked."""
    asked: list[str] = []
    file = tmp_path / "pictures.parquet"
    with web({"/a.png": encoded(drawn(0))}, asked) as address:
        places = {1: address.replace("127.0.0.1", "localhost") + "/a.png"}
        left_out = pictures.copy(named(places), str(tmp_path), file, ["localhost"])
        assert left_out["reason"].to_pylist() == [NOT_PUBLIC] and asked == []
        assert "127.0.0.1; if you trust it, add the address to ingest.picture_hosts too" in pictures.describe(left_out)
        assert len(pictures.copy(named(places), str(tmp_path), file, ["LOCALHOST", *LOOPBACK])) == 0
        assert asked[0].startswith("localhost:")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1", "fd00::1",
     "fe80::1%lo", "::ffff:127.0.0.1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not pictures._is_public(address)
    assert pictures._is_public("151.101.1.1") and pictures._is_public("2606:4700::1111")


def test_the_checked_address_is_the_one_that_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is looked up once: one that leads elsewhere the next time (DNS rebinding) is not looked up again."""
    lookups: list[str] = []
    real = socket.getaddrinfo

    def rebinding(host: str | bytes | None, *args: Any, **kwargs: Any) -> Any:
        if host not in ("pictures.example", b"pictures.example"):
            return real(host, *args, **kwargs)
        lookups.append("127.0.0.1" if not lookups else "127.0.0.2")
        return real(lookups[-1], *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    asked: list[str] = []
    with web({"/a.png": encoded(drawn(0))}, asked) as address:
        places = {1: address.replace("127.0.0.1", "pictures.example") + "/a.png"}
        hosts = ["pictures.example", *LOOPBACK]
        assert len(pictures.copy(named(places), str(tmp_path), tmp_path / "pictures.parquet", hosts)) == 0
        assert lookups == ["127.0.0.1"] and len(asked) == 1
        left_out = pictures.copy(named(places), str(tmp_path), tmp_path / "pictures.parquet", hosts)
    assert lookups == ["127.0.0.1", "127.0.0.2"] and len(asked) == 1
    assert left_out["reason"].to_pylist() == [NOT_PUBLIC]


def test_a_redirect_leads_to_named_hosts_alone(tmp_path: Path) -> None:
    inside: list[str] = []
    with web({"/secret.png": encoded(drawn(0))}, inside, "127.0.0.2") as secret:
        port = secret.rpartition(":")[2]
        redirects = {
            "/address.png": f"{secret}/secret.png",
            "/name.png": f"http://localhost:{port}/secret.png",
            "/file.png": "file:///etc/passwd",
            "/round.png": "/round.png",
            "/twice.png": "/address.png",
            "/good.png": "/a.png",
            "/a.png": encoded(drawn(1)),
        }
        with web(redirects) as address:
            places = {item: f"{address}{path}" for item, path in enumerate(redirects)}
            left_out = pictures.copy(named(places), str(tmp_path), tmp_path / "pictures.parquet", LOOPBACK)
    assert left_out["reason"].to_pylist() == [NOT_NAMED, NOT_NAMED, ABSENT, ABSENT, NOT_NAMED]
    assert inside == []
    assert next(Canonical(tmp_path).pictures())["item_id"].to_pylist() == [5, 6]


def test_a_server_that_says_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        patience = threading.Timer(300, server.shutdown, [socket.SHUT_RDWR])  # ends the test, if nobody leaves
        patience.start()
        place = f"http://127.0.0.1:{server.getsockname()[1]}/a.png"
        left_out = pictures.copy(named({1: place}), str(tmp_path), tmp_path / "pictures.parquet", LOOPBACK)
        assert patience.is_alive()
        patience.cancel()
    assert left_out["reason"].to_pylist() == [ABSENT]
    assert "correct the path or the access to it" in pictures.describe(left_out)


def test_of_a_vast_file_behind_a_url_no_more_is_fetched_than_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By fsspec's own file of ranges, which object stores and the web have, and which else reads megabytes ahead."""
    fetched = []

    class Ranges(AbstractBufferedFile):
        def _fetch_range(self, start: int, end: int) -> bytes:
            found = self.fs.cat_file(self.path, start, end)
            fetched.append(len(found))
            return found

    small = encoded(drawn(0))
    fsspec.filesystem("memory").pipe({"/pictures-far/a.png": small, "/pictures-far/vast.png": bytes(1 << 20)})
    monkeypatch.setattr(MemoryFileSystem, "_open", lambda *given, **options: Ranges(*given, **options))
    monkeypatch.setattr(pictures, "MAX_BYTES", 2000)
    places = {1: "memory://pictures-far/a.png", 2: "memory://pictures-far/vast.png"}
    left_out = pictures.copy(named(places), "memory://pictures-far", tmp_path / "pictures.parquet")
    assert left_out["reason"].to_pylist() == [LARGE]
    assert next(Canonical(tmp_path).pictures())["image"].to_pylist() == [small]
    assert sorted(fetched) == [len(small), 2001]


# ---- from files to a dataset ------------------------------------------------------------------------------------

START = datetime(2024, 3, 1, tzinfo=UTC)
ITEMS = 30


def world(raw: Path, pictures_of: dict[int, bytes], places: dict[int, str | None] | None = None) -> FilesConfig:
    """Nine days of impressions, and items whose pictures lie beside; item 29 names none."""
    rng = np.random.default_rng(0)
    rows = 9 * 120
    raw.mkdir(parents=True)
    events = pa.table(
        {
            "user_id": rng.integers(0, 20, rows),
            "item_id": rng.integers(0, ITEMS, rows),
            "timestamp": [START + timedelta(minutes=12 * i) for i in range(rows)],
            "label": rng.integers(0, 2, rows),
        }
    )
    pq.write_table(events, raw / "events.parquet")
    (raw / "photos").mkdir()
    for item, content in pictures_of.items():
        (raw / "photos" / f"{item}.png").write_bytes(content)
    named_so = {item: f"photos/{item}.png" if item < 29 else None for item in range(ITEMS)} | (places or {})
    items = {
        "item_id": list(named_so), "photo": list(named_so.values()), "kind": ["a", "b", "c"] * (ITEMS // 3),
        "text": [["the black rook", "a black gambit", "no rook, a gambit"][i % 3] for i in range(ITEMS)],
    }  # fmt: skip
    pq.write_table(pa.table(items), raw / "items.parquet")
    return replace(
        NO_FILES,
        events=replace(NO_TABLE, path="events.parquet"),
        items=replace(NO_TABLE, path="items.parquet", columns={"image": "photo"}, categorical=["kind"]),
    )


PHOTOS = {item: encoded(drawn(item)) for item in range(29)}
EMBED = EmbedConfig(dim=4, text_features=10, text_dim=3, text_encoder=None, image_encoder=None, seed=1, fit=None)


def test_from_files_to_a_dataset(tmp_path: Path) -> None:
    """Relative to ingest.raw and absolute; validated, embedded, and no feature is made of a path."""
    folders = Folders(tmp_path)
    mapping = world(tmp_path / "raw", PHOTOS, {1: str(tmp_path / "raw" / "photos" / "1.png")})
    config = ingest_config("files", f"{tmp_path}/raw/", None, mapping)
    facts = ingest.run(config, folders.canonical)
    again = ingest.run(config, tmp_path / "again")
    assert facts["pictures"] == {"named": 29, "written": 29, "left_out": {}}
    data = Canonical(folders.canonical)
    assert data.items().column_names == ["item_id", "created_at", "title", "tags", "text", "kind"]
    copied = pa.concat_tables(data.pictures()).to_pylist()
    assert [(row["item_id"], row["image"]) for row in copied] == list(PHOTOS.items())
    assert again == facts and folder_hash(tmp_path / "again") == folder_hash(folders.canonical)

    report = validated(folders.canonical)
    embedded = embed.run(EMBED, SPLIT, folders.canonical, report, folders.embedding)
    assert embedded["encoders"] == {"image": "descriptors 1", "text": "TF-IDF"}
    assert embedded["missing"] == {"image": 1, "text": 0}
    new_repo(folders)
    features.run(FEATURES, folders.canonical, report, folders.embedding, folders.features)
    made = DatasetConfig(history_length=4, min_count=1, max_tags=2)
    dataset.run(made, SPLIT, folders.canonical, folders.features, folders.repo, folders.dataset)
    schema = Dataset.open(folders.dataset).schema
    assert {feature.name for feature in schema.features} >= {"kind", "embedding"}
    assert "image" not in {feature.name for feature in schema.features}
    assert schema.embedding_version == embedded["version"]


def test_broken_pictures_are_counted_and_their_items_have_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = PHOTOS | {3: b"words", 7: header(60_000, 60_000)}
    del given[5]
    config = ingest_config("files", str(tmp_path / "raw"), None, world(tmp_path / "raw", given))
    told = r"files: 3 of 29 pictures cannot be read, more than ingest\.max_rejected \(0\.01\)"
    first = rf"{BROKEN}: 1, e\.g\. {tmp_path}/raw/photos/3\.png of item 3: .*mend the files or the column 'image'"
    with pytest.raises(ValueError, match=f"{told}.*{first}"):
        ingest.run(config, tmp_path / "canonical")
    assert not (tmp_path / "canonical").exists()
    facts = ingest.run(replace(config, max_rejected=0.2), tmp_path / "canonical")
    assert "3 of 29 pictures left out" in capsys.readouterr().err.replace("\n", " ")
    assert facts["pictures"] == {"named": 29, "written": 26, "left_out": {BROKEN: 1, ABSENT: 1, VAST: 1}}
    assert read_json(tmp_path / "canonical" / "source.json", "ingest")["pictures"] == facts["pictures"]
    kept = pq.read_table(tmp_path / "canonical" / "quarantine" / "pictures.parquet").to_pylist()
    assert {row["item_id"]: row["reason"] for row in kept} == {3: BROKEN, 5: ABSENT, 7: VAST}
    embedded = embed.run(EMBED, SPLIT, tmp_path / "canonical", validated(tmp_path / "canonical"), tmp_path / "vectors")
    assert embedded["missing"] == {"image": 4, "text": 0}
    table = pq.read_table(tmp_path / "vectors" / "item_embedding.parquet").to_pylist()
    assert [row["item_id"] for row in table if not row["has_image"]] == [3, 5, 7, 29]


def test_no_picture_at_all(tmp_path: Path) -> None:
    config = ingest_config("files", str(tmp_path / "raw"), None, world(tmp_path / "raw", {}, dict.fromkeys(range(29))))
    facts = ingest.run(config, tmp_path / "canonical")
    assert "pictures" not in facts and not (tmp_path / "canonical" / "pictures.parquet").exists()
    assert Canonical(tmp_path / "canonical").count_pictures() == 0


def test_pictures_and_image_vectors_are_one_too_many(tmp_path: Path) -> None:
    mapping = world(tmp_path / "raw", PHOTOS)
    vectors = pa.table({"item_id": [0, 1], "vector": [[1.0, 2.0], [2.0, 1.0]]})
    pq.write_table(vectors, tmp_path / "raw" / "vectors.parquet")
    config = ingest_config("files", str(tmp_path / "raw"), None, replace(mapping, vectors={"image": "vectors.parquet"}))
    with pytest.raises(
        ValueError, match=r"items name pictures in the column 'image', and there are vectors 'image' too"
    ):
        ingest.run(config, tmp_path / "canonical")


def test_a_source_of_ones_own_names_pictures(tmp_path: Path) -> None:
    """As the README tells: one more column of the items."""
    (tmp_path / "a.png").write_bytes(PHOTOS[0])
    tables = RawTables(
        events=pa.table({"user_id": [1, 1], "item_id": [5, 6], "timestamp": pa.array([START] * 2), "label": [0, 1]}),
        users=pa.table({"user_id": [1]}),
        items=pa.table(
            {
                "item_id": [5, 6], "created_at": pa.array([START] * 2), "title": ["A", "B"],
                "tags": pa.array([[], []], pa.list_(pa.string())), "text": pa.nulls(2, pa.string()),
                "image": [None, str(tmp_path / "a.png")],
            }
        ),
        modalities={},
    )  # fmt: skip
    facts = ingest_tables(tables, tmp_path / "canonical")
    assert facts["pictures"]["written"] == 1
    (batch,) = Canonical(tmp_path / "canonical").pictures()
    assert batch.to_pylist() == [{"item_id": 6, "image": PHOTOS[0]}]
