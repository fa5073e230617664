"""A small dataset on disk with something to learn, as `dataset` would have written it: `raw_rows`, `write_dataset`.

A user has a taste (some users: none known), an item a kind; a click is likely where both are the same.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from components.common.artifacts import file_hash
from components.common.dataset import UNSEEN, encode_column
from components.features.dataset import unseen
from models.encoder import save_encoder
from models.schema import SPECIAL, Catalog, Encoder, Feature, Schema, schema_hash
from tests.parts import need

TASTES = ("jazz", "folk", "rock", "pop")
TAGS = ("live", "mono", "slow", "solo", "vocal")
HISTORY = 6
NETWORKS: dict[str, dict[str, Any]] = {
    "qin": {"dim": 8, "attention_dim": 8, "layers": 1, "rows": 2, "dropout": 0.1},
    "sdcnv3": {"dim": 8, "heads": 1, "deep_layers": 1, "shallow_layers": 1},
}


@dataclass(frozen=True)
class RawRows:
    """Impressions in time order, with raw ids; row i's history is click_items[end[i] - length[i] : end[i]].

    valid_from, test_from, ends   days, as dataset.json has them
    """

    user: np.ndarray
    item: np.ndarray
    hour: np.ndarray
    taste: list[str | None]
    label: np.ndarray
    oracle: np.ndarray
    click_items: np.ndarray
    end: np.ndarray
    length: np.ndarray
    splits: dict[str, tuple[int, int]]
    valid_from: str | None = "2026-01-09"
    test_from: str | None = "2026-01-10"
    ends: str | None = "2026-01-11"
    propensity: np.ndarray | None = None


def kind(item: int) -> str:
    return TASTES[item % 4]


def tags(item: int) -> list[str | None]:
    """Two of them or, for every third item, one; then None."""
    return [TAGS[item % 5], TAGS[(item + 2) % 5] if item % 3 else None, None]


def vector(item: int) -> list[float]:
    """Of width 3; every fifth item has none."""
    rng = np.random.default_rng(item)
    return [0.0] * 3 if item % 5 == 0 else rng.normal(size=3).astype(np.float32).tolist()


def draw_rows(seed: int = 0, rows: int = 2600, users: int = 80, items: int = 50) -> RawRows:
    """The last users and items are seen in the test rows alone."""
    rng = np.random.default_rng(seed)
    valid, test = int(rows * 0.6), int(rows * 0.8)
    late = np.arange(rows) >= test
    user = 1000 + 3 * rng.integers(0, np.where(late, users, users - 8))
    item = 50 + rng.integers(0, np.where(late, items, items - 6))
    taste = [None if u % 11 == 0 else TASTES[int(u) % 4] for u in user]
    same = np.array([TASTES[int(u) % 4] == kind(int(i)) for u, i in zip(user, item, strict=True)])
    oracle = np.where(same, 0.8, 0.1).astype(np.float32)
    label = (rng.random(rows) < oracle).astype(np.int8)
    clicks: dict[int, list[int]] = {int(u): [] for u in sorted(set(user.tolist()))}
    before = np.zeros(rows, dtype=np.int64)
    for row in range(rows):
        before[row] = len(clicks[int(user[row])])
        if label[row]:
            clicks[int(user[row])].append(int(item[row]))
    first = dict(zip(clicks, np.cumsum([0, *(len(own) for own in clicks.values())]), strict=False))
    return RawRows(
        user, item, rng.integers(0, 24, rows), taste, label, oracle,
        np.array([i for own in clicks.values() for i in own], dtype=np.int64),
        np.array([first[int(u)] for u in user]) + before, np.minimum(before, HISTORY),
        {"train": (0, valid), "valid": (valid, test), "test": (test, rows)},
    )  # fmt: skip


def make_encoder(
    users: Sequence[int],
    hours: Sequence[int],
    tastes: Sequence[str],
    items: Sequence[int],
    name: str = "today",
    known_tags: Sequence[str] = TAGS,
) -> tuple[Encoder, Catalog]:
    """Over these raw values; `name` is the embedding version. Integers are sorted first, strings are taken as given."""
    users, hours, items, words = sorted(users), sorted(hours), sorted(items), tuple(known_tags)

    def field(name: str, size: int, origin: Any, vocab: tuple[str, ...] | None = None) -> Feature:
        return Feature(
            name=name, owner="impression", kind="categorical", size=size + SPECIAL, origin=origin, vocab=vocab
        )

    schema = Schema(
        features=(
            field("user_id", len(users), "user"),
            field("taste", len(tastes), "user", tuple(tastes)),
            field("hour", len(hours), "context"),
            Feature(name="item_id", owner="item", kind="categorical", size=len(items) + SPECIAL),
            Feature(name="kind", owner="item", kind="categorical", size=len(TASTES) + SPECIAL, vocab=TASTES),
            Feature(name="tags", owner="item", kind="multi", size=len(words) + SPECIAL, length=3, vocab=words),
            Feature(name="embedding", owner="item", kind="vector", size=3),
        ),
        history_length=HISTORY,
        embedding_version=name,
    )
    integers = {"user_id": torch.tensor(users), "hour": torch.tensor(hours), "item_id": torch.tensor(items)}
    encoder = Encoder(schema, integers)
    nothing, nothing_T = torch.iinfo(torch.int64).min, torch.zeros(3, dtype=torch.int64)
    rows = torch.arange(len(items)) + SPECIAL
    kinds = torch.tensor([TASTES.index(kind(item)) + SPECIAL for item in items])
    catalog = Catalog(
        torch.tensor([nothing, nothing, *items]),
        torch.cat([torch.tensor([[0, 0], [1, 1]]), torch.stack([rows, kinds], 1)]),
        {"tags": torch.stack([nothing_T, nothing_T, *(encoder.encode("tags", tags(item)) for item in items)])},
        torch.tensor([[0.0] * 3, [0.0] * 3, *(vector(item) for item in items)]),
    )
    return encoder, catalog


def encoder_of(raw: RawRows) -> tuple[Encoder, Catalog]:
    """Vocabularies of the training rows, and a catalog of all items."""
    train = slice(*raw.splits["train"])
    return make_encoder(
        sorted(set(raw.user[train].tolist())), range(24), TASTES, sorted(set(raw.item.tolist()))
    )  # fmt: skip


def write(folder: Path, raw: RawRows, encoder: Encoder, catalog: Catalog) -> Path:
    """The dataset folder. Labels may be changed first: the click log is the one that was drawn."""

    users, user = np.unique(raw.user, return_inverse=True)
    values = {"user_id": raw.user, "taste": pa.array(raw.taste, pa.string()), "hour": raw.hour}
    fields = {name: pa.chunked_array([column]) for name, column in values.items()}
    columns = {
        **{f"field.{name}": encode_column(encoder, name, column).to(torch.int32) for name, column in fields.items()},
        "item": catalog.rows(torch.from_numpy(raw.item)).to(torch.int32),
        "end": torch.from_numpy(raw.end).to(torch.int32),
        "length": torch.from_numpy(raw.length).to(torch.uint8),
        "label": torch.from_numpy(raw.label).to(torch.uint8),
        "oracle": torch.from_numpy(raw.oracle),
        "user": torch.from_numpy(user).to(torch.int32),
        "user_ids": torch.from_numpy(users),
        "click_log": catalog.rows(torch.from_numpy(raw.click_items)).to(torch.int32),
    }
    if raw.propensity is not None:
        columns["propensity"] = torch.from_numpy(raw.propensity)
        columns["position"] = torch.ones(len(raw.label), dtype=torch.uint8)
    save_encoder(folder / "encoder", encoder, catalog)
    save_file(columns, folder / "rows.safetensors")
    pq.write_table(unseen(columns, fields, raw.splits["test"]), folder / UNSEEN)
    facts = {
        "splits": raw.splits,
        "valid_from": raw.valid_from,
        "test_from": raw.test_from,
        "ends": raw.ends,
        "newest": (raw.splits["test"][0] + raw.splits["test"][1]) // 2,
        "bytes_per_row": 20,
        "data_sha256": file_hash(folder / "rows.safetensors"),
        "schema_hash": schema_hash(encoder.schema, encoder.integers, catalog),
    }
    (folder / "dataset.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="session")
def raw_rows() -> Callable[..., RawRows]:
    return draw_rows


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., Path]:
    """`write_dataset(folder, raw, encoder=None)`; without an encoder, that of the training rows."""

    def make(folder: Path, raw: RawRows, encoder: tuple[Encoder, Catalog] | None = None) -> Path:
        return write(folder, raw, *(encoder or encoder_of(raw)))

    return make


@pytest.fixture(scope="session")
def encoder_over() -> Callable[..., tuple[Encoder, Catalog]]:
    return make_encoder


@pytest.fixture(scope="session")
def networks() -> dict[str, dict[str, Any]]:
    return NETWORKS


@pytest.fixture(scope="session")
def dropless() -> dict[str, dict[str, Any]]:
    """The networks without dropout: what they learn hangs on no mask."""
    rates = {"qin": ("dropout",), "sdcnv3": ("deep_dropout", "shallow_dropout")}
    return {model: network | dict.fromkeys(rates[model], 0.0) for model, network in NETWORKS.items()}


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a Redis of these tests' own."""
    need("redis")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path_factory.mktemp("redis"))]
    server = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL)
    try:
        import redis

        with redis.Redis(port=port) as client:
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    assert server.poll() is None, "redis-server ended"
                    time.sleep(0.05)
        yield f"localhost:{port}"
    finally:
        server.terminate()
        server.wait()
