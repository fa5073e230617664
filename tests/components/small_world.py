"""Canonical folders for the tests of the data path, made by the code that production runs."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from components.common.artifacts import folder_hash, write_json
from components.common.config import parse_time
from components.common.contracts import ARRIVAL, TIMESTAMP
from components.common.dataset import Dataset
from components.common.splits import SplitConfig
from components.data import ingest, sources, validate
from components.data.ingest import IngestConfig
from components.data.sources import SIMULATOR_RAW, RawTables, Window
from components.data.sources.files import FilesConfig, TableConfig
from components.data.sources.simulator import SimulatorConfig
from components.data.validate import ValidateConfig
from components.features import embed
from components.features.embed import EmbedConfig
from components.features.publish import PublishConfig
from components.features.views import FeaturesConfig
from models.families import build
from models.metrics import auc

PROJECT = Path(__file__).resolve().parents[2]

SIMULATOR = SimulatorConfig(
    seed=3,
    users=150,
    items=80,
    user_life=60,
    item_life=40,
    impressions_per_day=400,
    text_dim=6,
    image_dim=5,
    popularity=0.8,
    drift=0.08,
    fashion=0.6,
    fashion_days=40,
    sharpness=4.0,
    click_rate=0.2,
    late_share=0.0,
    corrected_share=0.0,
    missing_text=0.1,
    missing_image=0.2,
    noise=0.5,
)
UNTIL = "2024-03-09T00:00:00+00:00"  # the midnight after the last day
WINDOW_DAYS = 8
WINDOW = Window(since=parse_time("since", "2024-03-01T00:00:00+00:00"), until=parse_time("until", UNTIL))

VALIDATE = ValidateConfig(
    label_rate=(0.01, 0.95),
    max_age_hours=36,
    trailing_days=5,
    spreads=5.0,
    min_day_rows=100,
    max_missing_share=0.5,
    max_label_leak=0.9,
)


NO_TABLE = TableConfig(path=None, columns={}, categorical=[], numeric=[])
NO_FILES = FilesConfig(events=NO_TABLE, users=NO_TABLE, items=NO_TABLE, vectors={}, separator="|")


def ingest_config(
    source: str = "simulator", raw: str | None = None, until: str | None = UNTIL, files: FilesConfig = NO_FILES,
    window_days: int | None = None, lead_days: int = 0,
) -> IngestConfig:  # fmt: skip
    """The simulator's window ends at `until` and has WINDOW_DAYS, unless another number is given."""
    if source == "simulator" and window_days is None:
        window_days = WINDOW_DAYS
    return IngestConfig(
        source=source, raw=raw or str(PROJECT / SIMULATOR_RAW), until=until, window_days=window_days,
        lead_days=lead_days, missing_day="fail", max_rejected=0.01, picture_hosts=[], simulator=SIMULATOR, files=files,
    )  # fmt: skip


def ingest_simulator(output: Path) -> Path:
    ingest.run(ingest_config(window_days=WINDOW_DAYS), output)
    return output


def ingest_tables(raw: RawTables, output: Path, until: str | None = None) -> dict[str, Any]:
    """Ingest through an adapter as a user writes one: a module with `read`, and a line in ADAPTERS."""
    module = ModuleType("planted_source")
    module.read = lambda path, config, window, rows=None: raw  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "planted_source", module)
        patch.setitem(sources.ADAPTERS, "planted", "planted_source")
        return ingest.run(ingest_config("planted", "/", until), output)  # pictures lie below, wherever they are


def validated(canonical: Path) -> Path:
    """The report of a canonical folder that passes."""
    report = canonical.with_name(f"{canonical.name}-report.json")
    validate.run(VALIDATE, canonical, report, canonical.with_name(f"{canonical.name}-docs"))
    return report


def learn(model: str, network: dict[str, Any], data: Dataset, epochs: int = 12) -> float:
    """The valid AUC of a small model after a few epochs of the training rows."""
    torch.manual_seed(0)
    ranker = build(model, network, data.schema)
    optimiser = torch.optim.Adam(ranker.parameters(), 0.02)
    (_, stop), (start, end) = data.splits["train"], data.splits["valid"]
    for _ in range(epochs):
        for rows in torch.randperm(stop).split(128):
            batch = data.batch(rows)
            assert batch.label_B is not None
            optimiser.zero_grad()
            ranker.loss(ranker(batch, data.catalog, data.click_log), batch.label_B).backward()
            optimiser.step()
    ranker.eval()
    batch = data.batch(slice(start, end))
    assert batch.label_B is not None
    with torch.no_grad():
        return auc(batch.label_B, ranker(batch, data.catalog, data.click_log).logit_B)


def with_column(table: pa.Table, name: str, values: Any, kind: pa.DataType | None = None) -> pa.Table:
    """The table with one column's values replaced."""
    at = table.column_names.index(name)
    return table.set_column(at, name, pa.array(values, kind or table.schema.field(name).type))


# ---- a world small enough to count by hand ----------------------------------------------------------------------

START = int(datetime(2024, 3, 1, tzinfo=UTC).timestamp())
DAYS, DAY = 9, 86_400
FEATURES = FeaturesConfig(availability_lag_seconds=30, popularity_days=3, history_length=6)
PUBLISH = PublishConfig(online_sample=50, keep=2)
SPLIT = SplitConfig(valid_share=0.15, test_share=0.2)


def hand_tables(seed: int = 0) -> RawTables:
    """Few users, few moments: clicks tie in a second, at midnights and with impressions; rows repeat; values are null.

    The last user and the last item occur in no event, the item before it in the first two days and the eighth;
    item 3 has no vector, and item 4 is created after the last event.
    """
    rng = np.random.default_rng(seed)
    users, items, rows = 9, 14, 55 * DAYS
    user_ids, item_ids = 7_000 + 13 * np.arange(users), 900_001 + 11 * rng.permutation(items)
    moments = np.concatenate([[0, 1, 29, 30, 31, DAY - 1], rng.integers(0, 4_000, 12)])
    day = np.repeat(np.arange(DAYS), 55)
    second = START + day * DAY + rng.choice(moments, rows)
    micro = second * 1_000_000 + rng.choice([0, 0, 300_000, 999_999], rows)
    item = np.where((day < 2) | (day == 7), rng.integers(0, items - 1, rows), rng.integers(0, items - 2, rows))
    item = np.where((day == 8) & (item > 9), 0, item)  # several leave the window of popularity
    device = rng.choice(["phone", "desktop", "tv", "once"], rows, p=[0.6, 0.29, 0.1, 0.01])
    events = pa.table(
        {
            "user_id": user_ids[rng.integers(0, users - 1, rows)],
            "item_id": item_ids[item],
            "timestamp": pa.array(micro).cast(TIMESTAMP),
            "label": rng.integers(0, 2, rows).astype(np.int8),
            "device": pa.array(device, mask=rng.random(rows) < 0.1),
        }
    )
    events = pa.concat_tables([events, events.slice(60, 5), events.slice(400, 5)])  # honest repetitions
    created = np.full(items, START - 5 * DAY)
    created[4] = START + 20 * DAY
    tags = [
        None
        if i == 2
        else []
        if i == 6
        else ["all", f"t{i % 3}", "pair" if i in (1, 7, 13) else f"own{i}", "late"][: 2 + i % 3]
        for i in range(items)
    ]
    vectors = rng.normal(size=(items, 4)).astype(np.float32).tolist()
    return RawTables(
        events=events,
        users=pa.table({"user_id": user_ids, "region": ["north", None, "south", "north"] + ["south"] * (users - 4)}),
        items=pa.table(
            {
                "item_id": item_ids,
                "created_at": pa.array(created * 1_000_000).cast(TIMESTAMP),
                "title": [f"Item {i}" for i in range(items)],
                "tags": pa.array(tags, pa.list_(pa.string())),
                "text": pa.nulls(items, pa.string()),
                "decade": [None if i == 5 else f"{1980 + 10 * (i % 3)}s" for i in range(items)],
            }
        ),
        modalities={
            "image": pa.table(
                {
                    "item_id": [int(v) for i, v in enumerate(item_ids) if i != 3],
                    "vector": pa.array([v for i, v in enumerate(vectors) if i != 3], pa.list_(pa.float32())),
                }
            )
        },
    )


def with_arrivals(raw: RawTables, seed: int = 0) -> RawTables:
    """Most rows arrive within the second, some hours or days late, some do not say when."""
    rng = np.random.default_rng(seed)
    micro = raw.events["timestamp"].cast(pa.int64()).to_numpy()
    delay = rng.choice(
        [0, 300_000, 2 * 3_600_000_000, DAY * 1_000_000, 3 * DAY * 1_000_000], len(micro), p=[0.4, 0.3, 0.1, 0.1, 0.1]
    )
    arrival = pa.array(micro + delay, mask=rng.random(len(micro)) < 0.1).cast(TIMESTAMP)
    return replace(raw, events=raw.events.append_column(ARRIVAL, arrival))


@dataclass(frozen=True)
class Folders:
    """A project's folders, as dvc.yaml lays them out; up to the embedding they are written."""

    root: Path

    canonical = property(lambda self: self.root / "data" / "canonical")
    report = property(lambda self: self.root / "data" / "report.json")
    embedding = property(lambda self: self.root / "data" / "embedding")
    features = property(lambda self: self.root / "data" / "features")
    dataset = property(lambda self: self.root / "data" / "dataset")
    repo = property(lambda self: self.root / "feature_repo")


def new_repo(folders: Folders) -> None:
    """A copy of the project's Feast repo."""
    folders.repo.mkdir(parents=True)
    for name in (".feastignore", "asof.py", "definitions.py", "feature_store.yaml", "spark.py"):
        shutil.copy(PROJECT / "feature_repo" / name, folders.repo / name)


def prepare(raw: RawTables, root: Path, until: str | None = None) -> Folders:
    """Ingested, embedded, with a Feast repo. The report is the one that validate writes of data that passed."""
    folders = Folders(root)
    new_repo(folders)
    ingest_tables(raw, folders.canonical, until)
    write_json(folders.report, {"passed": True, "canonical_sha256": folder_hash(folders.canonical)})
    config = EmbedConfig(dim=3, text_features=10, text_dim=3, text_encoder=None, image_encoder=None, seed=1, fit=None)
    embed.run(config, SPLIT, folders.canonical, folders.report, folders.embedding)
    return folders


@dataclass(frozen=True)
class Row:
    """One impression, in plain Python: microseconds and whole seconds since 1970."""

    user: int
    item: int
    micro: int
    label: int
    device: str | None

    second = property(lambda self: self.micro // 1_000_000)


def plain_rows(events: pa.Table) -> list[Row]:
    columns = (events["user_id"], events["item_id"], events["timestamp"].cast(pa.int64()), events["label"])
    return [Row(*values) for values in zip(*(c.to_pylist() for c in (*columns, events["device"])), strict=True)]


def known_clicks(rows: list[Row], user: int, micro: int, lag: int) -> list[int]:
    """Item ids of the user's clicks that may be known at a moment, oldest first, by the definition."""
    known = [r for r in rows if r.user == user and r.label == 1 and (r.second + 1 + lag) * 1_000_000 <= micro]
    return [r.item for r in sorted(known, key=lambda r: (r.micro, r.item))]


def known_counts(rows: list[Row], item: int, micro: int, lag: int, days: int) -> tuple[int, int] | None:
    """Views and clicks of the newest whole days that may be known at a moment; None before the item's first."""
    last = (micro - lag * 1_000_000) // (DAY * 1_000_000) - 1  # the newest whole day
    past = [r for r in rows if r.item == item and r.second // DAY <= last]
    if not past:
        return None
    window = [r for r in past if r.second // DAY > last - days]
    return len(window), sum(r.label for r in window)
