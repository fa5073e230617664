"""replay: a true world has no mismatch, and every planted fault is found, in the features that it touches."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from components.__main__ import main
from components.common.artifacts import folder_hash, write_json
from components.common.contracts import ARRIVAL, TIMESTAMP, Canonical
from components.data import ingest
from components.features import embed, features, views
from components.features.embed import EmbedConfig
from components.operations import replay
from tests.components.data.test_sources_microlens import layout, write
from tests.components.small_world import (
    DAY,
    FEATURES,
    SPLIT,
    Folders,
    hand_tables,
    ingest_config,
    new_repo,
    prepare,
    with_arrivals,
)

ROWS, SEED = 16, 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    made = prepare(with_arrivals(hand_tables()), tmp_path_factory.mktemp("replay"))
    features.run(FEATURES, made.canonical, made.report, made.embedding, made.features)
    return made


@pytest.fixture
def copy(world: Folders, tmp_path: Path) -> Folders:
    shutil.copytree(world.root, tmp_path / "copy")
    return Folders(tmp_path / "copy")


def differ(folders: Folders, rows: int = ROWS) -> set[str]:
    """The features that replay finds to differ."""
    found = replay.run(FEATURES, folders.canonical, folders.features, folders.repo, rows=rows, seed=SEED)
    return {name for name, mismatches in found.items() if mismatches}


def test_a_true_world_has_no_mismatch(world: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    assert differ(world, rows=50) == set()
    printed = capsys.readouterr().err
    assert all(name in printed for name in ("region", "views", "clicks", "history", "embedding"))
    events = Canonical(world.canonical).events()
    known = replay._known_from(FEATURES, events)
    drawn = replay.draw(events, known, 50, SEED)
    found = replay.derive_offline(FEATURES, world.features, world.repo, drawn)
    lengths = [len(row["history"] or ()) for row in found]
    assert min(lengths) == 0 and max(lengths) == FEATURES.history_length  # there is something to compare
    for name in ("views", "embedding"):
        assert {row[name] is None for row in found} == {True, False}


def ttl(view: str) -> Callable[[Folders], None]:
    def plant(folders: Folders) -> None:
        """A time to live that the other view of the same history has not."""
        file = folders.repo / "definitions.py"
        before, after = file.read_text().split(f'name="{view}"')
        after = after.replace("ttl=HISTORY_TTL", "ttl=timedelta(hours=20)", 1)
        file.write_text(f'{before}name="{view}"{after}')

    return plant


def dtype(folders: Folders) -> None:
    """The online store keeps counts as floats."""
    file = folders.repo / "definitions.py"
    file.write_text(file.read_text().replace('Field(name="views", dtype=Int64)', 'Field(name="views", dtype=Float32)'))


def late_data(folders: Folders) -> None:
    """The sources take every event as known when it happened, though some came days later."""
    events = folders.root / "in time"
    shutil.copytree(folders.canonical, events)
    for file in events.glob("events/*/*.parquet"):
        pq.write_table(pq.ParquetFile(file).read().drop_columns(ARRIVAL), file)
    views.write_sources(FEATURES, Canonical(events), folders.embedding, folders.features)


def rewritten(name: str, change: Callable[[pa.Table], pa.Table]) -> Callable[[Folders], None]:
    def plant(folders: Folders) -> None:
        file = folders.features / "sources" / f"{name}.parquet"
        pq.write_table(change(pq.read_table(file)), file)

    return plant


def moved(table: pa.Table, column: str, by: int) -> pa.Table:
    at, old = table.column_names.index(column), table[column]
    return table.set_column(at, column, pc.add(old.cast(pa.int64()), by).cast(old.type))


def one_second_early(folders: Folders) -> None:
    """The clicks of an impression's own second are in its history."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "CLICKS", views.CLICKS.replace("$second + 1)", "$second + 0)"))
        views.write_sources(FEATURES, Canonical(folders.canonical), folders.embedding, folders.features)


FAULTS: dict[str, tuple[Callable[[Folders], None], set[str]]] = {
    "ttl in training": (ttl("user_clicks"), {"history"}),
    "ttl in serving": (ttl("user_history"), {"history"}),
    "dtype": (dtype, {"views"}),
    "late data": (late_data, {"history", "views", "clicks"}),
    "one click too many": (rewritten("user_clicks", lambda t: moved(t, "clicks_end", 1)), {"history"}),
    "one click too few": (rewritten("user_clicks", lambda t: moved(t, "clicks_end", -1)), {"history"}),
    "a day early": (
        rewritten("item_popularity", lambda t: moved(t, "event_timestamp", -DAY * 1_000_000)), {"views", "clicks"}
    ),
    "vectors known late": (
        rewritten("item_embedding", lambda t: moved(t, "event_timestamp", 9 * DAY * 1_000_000)), {"embedding"}
    ),
    "other attributes": (
        rewritten("user_profile", lambda t: t.set_column(1, "region", pa.repeat("west", len(t)))), {"region"}
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A source that gives the histories itself, some of them empty after longer ones."""
    made = Folders(tmp_path_factory.mktemp("given"))
    new_repo(made)
    raw = write(layout(), made.root / "MicroLens_1M_x1")
    ingest.run(ingest_config("microlens", str(raw), until=None), made.canonical)
    write_json(made.report, {"passed": True, "canonical_sha256": folder_hash(made.canonical)})
    config = EmbedConfig(dim=16, text_features=10, text_dim=3, text_encoder=None, image_encoder=None, seed=1, fit=None)
    embed.run(config, SPLIT, made.canonical, made.report, made.embedding)
    features.run(FEATURES, made.canonical, made.report, made.embedding, made.features)
    return made


def test_given_histories_are_known_at_their_event(given: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """The impressions drawn are those of few users, so that their histories come and go."""
    events = Canonical(given.canonical).events()
    events = events.filter(pc.is_in(events["user_id"], pa.array([4, 5, 6]))).select(["user_id", "item_id", "timestamp"])
    drawn = events.rename_columns(["user_id", "item_id", "event_timestamp"]).slice(0, 20)
    lengths = [len(row["history"] or ()) for row in replay.derive_offline(FEATURES, given.features, given.repo, drawn)]
    assert min(lengths) == 0 and max(lengths) > 1
    monkeypatch.setattr(replay, "draw", lambda *_: drawn)
    assert differ(given) == set()
    rewritten("user_clicks", lambda t: moved(t, "event_timestamp", 1_000_000))(given)
    assert differ(given) == {"history"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, copy: Folders) -> None:
    plant, touched = FAULTS[fault]
    plant(copy)
    assert differ(copy) == touched


def test_a_click_of_the_same_second_is_found(copy: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """The impressions drawn are those for which it matters, for they are few."""
    events = Canonical(copy.canonical).events()
    lag = FEATURES.availability_lag_seconds
    second = events["timestamp"].cast(pa.int64()).to_numpy() // 1_000_000
    clicked = set(zip(events["user_id"].to_pylist(), second + lag, events["label"].to_pylist(), strict=True))
    rows = [at for at, user in enumerate(events["user_id"].to_pylist()) if (user, second[at], 1) in clicked]
    drawn = events.take(rows[:9]).select(["user_id", "item_id", "timestamp"])
    drawn = drawn.rename_columns(["user_id", "item_id", "event_timestamp"])
    monkeypatch.setattr(replay, "draw", lambda *_: drawn)
    assert len(drawn) == 9 and differ(copy) == set()
    one_second_early(copy)
    assert differ(copy) == {"history"}


def test_the_command(world: Folders, copy: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump({"features": asdict(FEATURES)}))

    def command(folders: Folders, *more: str) -> int:
        paths = {"canonical": folders.canonical, "features": folders.features, "repo": folders.repo, "params": params}
        words = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
        return main(["replay", *words, *more])

    assert command(world, "--rows", "3") == 0
    FAULTS["other attributes"][0](copy)
    assert command(copy, "--rows", "3", "--seed", "5") == 1
    assert "'west' offline" in " ".join(capsys.readouterr().err.split())
    assert command(world, "--rows", "0") == 1
    assert "rows is 0; it must be at least 1" in capsys.readouterr().err


def test_same_is_equal_in_kind() -> None:
    assert replay.same([1, 2], [1, 2]) and replay.same(None, None) and replay.same("a", "a")
    for offline, online in [([1], [1.0]), (1, 1.0), (1, True), (None, 0), ([], None), ([1], [1, 1]), ("1", 1)]:
        assert not replay.same(offline, online)


def test_nothing_past() -> None:
    events = pa.table({"timestamp": pa.array([5, 6], TIMESTAMP)})
    with pytest.raises(ValueError, match="no impression is later than the first known event"):
        replay.draw(events, np.array([7, 8]), 1, 0)
