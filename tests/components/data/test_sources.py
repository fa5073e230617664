"""The simulator's world is the one its docstring promises; MovieLens files become the literature's rows."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.common.artifacts import folder_hash
from components.common.contracts import ORACLE, Canonical
from components.data import ingest, sources
from components.data.sources.simulator import DEVICE_SHARE, DEVICES, FIRST_ITEM, FIRST_USER, STRIDE, TOPICS, World
from tests.components.small_world import PROJECT, SIMULATOR, ingest_config

BIG = replace(SIMULATOR, users=2000, items=1000, days=6, impressions_per_day=20_000, text_dim=24, image_dim=16)


def draw(world: World) -> pd.DataFrame:
    return pa.concat_tables([world.day(day) for day in range(world.config.days)]).to_pandas()


@pytest.fixture(scope="module")
def world() -> World:
    return World(BIG)


@pytest.fixture(scope="module")
def events(world: World) -> pd.DataFrame:
    return draw(world)


@pytest.fixture(scope="module")
def items(world: World) -> pd.DataFrame:
    return world.items().to_pandas()


# ---- the simulator ----------------------------------------------------------------------------------------------


def test_a_seed_decides_every_byte(tmp_path: Path) -> None:
    for name, seed in {"one": 3, "again": 3, "other": 4}.items():
        config = replace(ingest_config(), simulator=replace(SIMULATOR, seed=seed))
        ingest.run(config, tmp_path / name)
    assert folder_hash(tmp_path / "one") == folder_hash(tmp_path / "again")
    one, other = Canonical(tmp_path / "one"), Canonical(tmp_path / "other")
    for column in ("user_id", "item_id", "timestamp", "label", ORACLE, "device"):
        assert not one.events()[column].equals(other.events()[column]), column
    for name, table in one.modalities().items():
        assert not table["vector"].equals(other.modalities()[name]["vector"]), name
    assert not one.items()["title"].equals(other.items()["title"])
    assert not one.users()["region"].equals(other.users()["region"])


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.6])
def test_click_rate_is_the_configured_one(rate: float) -> None:
    first = World(replace(BIG, click_rate=rate)).day(0)
    assert first[ORACLE].to_numpy().mean() == pytest.approx(rate, rel=0.05)
    assert first["label"].to_numpy().mean() == pytest.approx(rate, rel=0.1)


def test_labels_are_drawn_with_the_true_probability(events: pd.DataFrame) -> None:
    bins = pd.qcut(events[ORACLE], 10)
    told = events.groupby(bins, observed=True).agg(p=(ORACLE, "mean"), y=("label", "mean"), n=("label", "size"))
    error = np.sqrt(told.p * (1 - told.p) / told.n)
    assert (abs(told.y - told.p) < 4 * error).all()
    assert told.p.max() > 4 * told.p.min()


def test_oracle_auc_is_told_and_leaves_room_above_chance(tmp_path: Path) -> None:
    facts = ingest.run(ingest_config(), tmp_path / "canonical")
    table = Canonical(tmp_path / "canonical").events()
    label, score = table["label"].to_numpy(), table[ORACLE].to_numpy()
    clicked, other = score[label == 1][:, None], score[label == 0][None, :]  # Mann and Whitney, pair by pair
    wins = sum(((a > other).sum() + (a == other).sum() / 2) for a in np.array_split(clicked, 20))
    assert facts["oracle_auc"] == pytest.approx(wins / clicked.size / other.size, abs=1e-9)
    assert 0.7 < facts["oracle_auc"] < 0.95


@pytest.mark.parametrize("exponent", [0.5, 1.1])
def test_popularity_is_a_power_law(exponent: float) -> None:
    counts = np.sort(draw(World(replace(BIG, popularity=exponent)))["item_id"].value_counts().to_numpy())[::-1]
    rank = np.arange(5, 300)
    slope = np.polyfit(np.log(rank), np.log(counts[rank - 1]), 1)[0]
    assert -slope == pytest.approx(exponent, abs=0.15)


def test_activity_of_users_is_skewed(events: pd.DataFrame) -> None:
    counts = events["user_id"].value_counts()
    assert counts.iloc[:200].sum() > 0.25 * len(events)  # a tenth of the users


def test_interests_drift_by_the_configured_angle(world: World) -> None:
    first, next_, last = (world.interests(day) for day in (0, 1, BIG.days - 1))
    assert np.linalg.norm(first, axis=1) == pytest.approx(1, abs=1e-5)
    one, all_ = ((first * z).sum(axis=1).mean() for z in (next_, last))
    assert all_ < one - 0.02 < 0.99  # a little each day, in one direction
    still = World(replace(BIG, drift=0.0))
    assert np.array_equal(still.interests(0), still.interests(BIG.days - 1))
    # and they are somebody's: another user's interests are further than one's own at the end
    assert (first * last).sum(axis=1).mean() > (first * np.roll(first, 1, axis=0)).sum(axis=1).mean() + 0.2


def test_interests_of_some_are_theirs_among_all(world: World) -> None:
    some = np.array([3, 5, 8, BIG.users - 1])
    assert np.array_equal(world.interests(2, some), world.interests(2)[some])


def test_clicks_follow_todays_interests(world: World, events: pd.DataFrame) -> None:
    last = events[events["timestamp"].dt.day == events["timestamp"].dt.day.max()]
    user = (last["user_id"].to_numpy() - FIRST_USER) // STRIDE
    item = (last["item_id"].to_numpy() - FIRST_ITEM) // STRIDE
    affinity = (world.interests(BIG.days - 1)[user] * world.z_IK[item]).sum(axis=1)
    clicked = last["label"].to_numpy() == 1
    assert affinity[clicked].mean() > affinity[~clicked].mean() + 0.1


def test_nothing_is_shown_before_it_arrived(world: World, events: pd.DataFrame, items: pd.DataFrame) -> None:
    shown = events.merge(items, on="item_id", how="left", validate="many_to_one")
    assert (shown["timestamp"] >= shown["created_at"]).all()
    users = world.users().to_pandas()["user_id"]
    arrival = pd.Series(world.arrival_U, index=users)
    day = (events["timestamp"] - events["timestamp"].min().floor("D")).dt.days
    assert (day >= events["user_id"].map(arrival)).all()
    expected = BIG.new_share * (BIG.days - 1) / BIG.days
    assert (world.arrival_I > 0).mean() == pytest.approx(expected, abs=0.03)
    assert (world.arrival_U > 0).mean() == pytest.approx(expected, abs=0.03)
    late = items.loc[world.arrival_I == BIG.days - 1, "item_id"]
    assert events["item_id"].isin(late).any()  # who arrives late is shown at last


def test_every_day_is_whole_and_in_time_order(world: World) -> None:
    for day in range(BIG.days):
        table = world.day(day).to_pandas()
        assert len(table) == BIG.impressions_per_day
        assert table["timestamp"].is_monotonic_increasing
        assert (table["timestamp"].dt.floor("D") == pd.Timestamp(BIG.start, tz="UTC") + pd.Timedelta(days=day)).all()


def test_devices_come_in_their_shares(events: pd.DataFrame) -> None:
    assert events["device"].value_counts(normalize=True)[list(DEVICES)].to_numpy() == pytest.approx(
        DEVICE_SHARE, abs=0.01
    )


def test_vectors_are_missing_in_the_configured_share_and_carry_the_topics(world: World) -> None:
    from sklearn.linear_model import LogisticRegression

    for dim, missing in ((24, 0.05), (16, 0.3)):
        table = world.vectors(dim, missing)
        assert 1 - len(table) / BIG.items == pytest.approx(missing, abs=0.04)
        x = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, dim)
        assert x.dtype == np.float32
        topic = world.topics_I[(table["item_id"].to_numpy() - FIRST_ITEM) // STRIDE]
        half = len(x) // 2
        probe = LogisticRegression(max_iter=500).fit(x[:half], topic[:half])
        assert probe.score(x[half:], topic[half:]) > 0.6  # chance is 1/16
        shuffled = LogisticRegression(max_iter=500).fit(x[:half], np.roll(topic[:half], 7))
        assert shuffled.score(x[half:], topic[half:]) < 0.2


def test_titles_and_tags_are_words_of_the_items_topic(world: World, items: pd.DataFrame) -> None:
    names = list(TOPICS)
    for topic, title, tags in zip(world.topics_I, items["title"], items["tags"], strict=True):
        assert len(title.split()) == 3 and title.replace("-", "").replace(" ", "").isalpha()
        assert title.split()[1] in TOPICS[names[topic]]
        assert tags[0] == names[topic] and tags[1] in names and tags[1] != tags[0]
        assert tags[2] == title.split()[2].lower()


def test_ids_are_no_indices(world: World, items: pd.DataFrame, events: pd.DataFrame) -> None:
    users = world.users().to_pandas()
    assert items["item_id"].is_unique and users["user_id"].is_unique
    assert items["item_id"].min() > len(items) and users["user_id"].min() > len(users)
    assert not set(items["item_id"]) & set(users["user_id"])
    assert set(events["item_id"]) <= set(items["item_id"]) and set(events["user_id"]) <= set(users["user_id"])


def test_a_topic_that_has_no_item_yet_breaks_nothing() -> None:
    few = World(replace(SIMULATOR, items=5, users=4, new_share=0.8))
    table = draw(few)
    arrival = few.arrival_I[(table["item_id"].to_numpy() - FIRST_ITEM) // STRIDE]
    assert (arrival <= np.repeat(np.arange(SIMULATOR.days), SIMULATOR.impressions_per_day)).all()


# ---- MovieLens --------------------------------------------------------------------------------------------------

RATINGS = """\
2::10::4::978300760
1::20::5::978300760
1::10::3::978300761
2::30::1::978300762
1::30::2::978387162
4::20::3::978300000
"""
USERS = "1::F::1::10::48067\n2::M::56::16::70072\n3::M::25::15::55117\n4::F::77::0::00000\n"
MOVIES = (
    "10::Caf\xe9 Society (1995)::Comedy|Romance\n20::2001: Odd One (1968)::Sci-Fi\n30::No Year::Drama|Film-Noir|War\n"
)
NAMES = ("ratings.dat", "users.dat", "movies.dat")


@pytest.fixture
def movielens(tmp_path: Path) -> Callable[..., Path]:
    """A folder in the ml-1m layout; contents by file name, plain or gzipped."""

    def write(*, packed: bool = False, **contents: str) -> Path:
        folder = tmp_path / "ml"
        folder.mkdir(exist_ok=True)
        given = dict(zip(NAMES, (RATINGS, USERS, MOVIES), strict=True)) | {f"{k}.dat": v for k, v in contents.items()}
        for name, text in given.items():
            data = text.encode("latin-1")
            (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
        return folder

    return write


def ingested(raw: Path) -> tuple[dict, Canonical]:
    output = raw.with_name("canonical")
    return ingest.run(ingest_config("movielens", str(raw), until=None), output), Canonical(output)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_movielens(packed: bool, movielens: Callable[..., Path]) -> None:
    facts, data = ingested(movielens(packed=packed))
    rows = [(e["user_id"], e["item_id"], e["label"]) for e in data.events().to_pylist()]
    # 3 stars are dropped; by time, then user, then item
    assert rows == [(1, 20, 1), (2, 10, 1), (2, 30, 0), (1, 30, 0)]
    assert [t.timestamp() for t in data.events()["timestamp"].to_pylist()] == [
        978300760, 978300760, 978300762, 978387162,
    ]  # fmt: skip
    assert data.days() == ["2000-12-31", "2001-01-01"]
    assert facts["rows"] == {"read": 6, "later": 0, "written": 4, "left_out": {"rating of 3": 2}}
    aside = pq.read_table(data.root / "quarantine" / "0-rating-of-3.parquet").to_pylist()
    assert [(row["user_id"], row["item_id"], row["rating"]) for row in aside] == [(1, 10, 3), (4, 20, 3)]
    assert facts["label_rate"] == 0.5
    items = data.items().to_pylist()
    assert [i["item_id"] for i in items] == [10, 20, 30]
    assert [i["title"] for i in items] == ["Café Society (1995)", "2001: Odd One (1968)", "No Year"]
    assert [i["decade"] for i in items] == ["1990s", "1960s", None]
    assert [i["tags"] for i in items] == [["Comedy", "Romance"], ["Sci-Fi"], ["Drama", "Film-Noir", "War"]]
    assert {i["created_at"].timestamp() for i in items} == {978300760}
    assert {i["text"] for i in items} == {None}
    assert data.modalities() == {}
    assert data.users().to_pylist() == [  # who is in no event is no user here
        {"user_id": 1, "gender": "F", "age": "under 18", "occupation": "10"},
        {"user_id": 2, "gender": "M", "age": "56+", "occupation": "16"},
    ]


def test_movielens_with_texts_and_images(movielens: Callable[..., Path]) -> None:
    raw = movielens()
    pq.write_table(pa.table({"item_id": [30, 10, 99], "text": ["war", "coffee", "?"]}), raw / "item_text.parquet")
    vectors = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float64()))
    pq.write_table(pa.table({"item_id": [20, 10], "vector": vectors}), raw / "item_image.parquet")
    facts, data = ingested(raw)
    assert data.items()["text"].to_pylist() == ["coffee", None, "war"]
    assert list(data.modalities()) == ["image"]
    assert data.modalities()["image"].to_pylist() == [
        {"item_id": 10, "vector": [3.0, 4.0]},
        {"item_id": 20, "vector": [1.0, 2.0]},
    ]
    assert facts["vectors"] == {"image": 2}


def test_movielens_of_an_unknown_age_keeps_the_code(movielens: Callable[..., Path]) -> None:
    _, data = ingested(movielens(ratings=RATINGS + "4::20::5::978300009\n"))
    assert data.users().to_pylist()[-1]["age"] == "77"


@pytest.mark.parametrize("name", NAMES)
def test_movielens_without_a_file(name: str, movielens: Callable[..., Path]) -> None:
    raw = movielens()
    (raw / name).unlink()
    with pytest.raises(ValueError, match=f"{raw} holds no {name} or {name}.gz; it must be a folder in the ml-1m"):
        ingested(raw)
    assert not raw.with_name("canonical").exists()


@pytest.mark.parametrize(
    ("contents", "told"),
    [
        ({"ratings": RATINGS + "5::10::4\n"}, r"ratings\.dat: .*Row #7: Expected 4 columns, got 3.*Mend the file"),
        ({"ratings": RATINGS + "5::ten::4::978300760\n"}, r"ratings\.dat: .*Row #7: .*'ten'"),
        ({"ratings": ""}, r"ratings\.dat: .*Empty"),
        ({"users": "1::F::1\n"}, r"users\.dat: .*user_id::gender::age.*Row #1: Expected 5 columns, got 3"),
        ({"movies": "10::A::B::C\n"}, r"movies\.dat: .*Row #1: Expected 3 columns, got 4"),
    ],
)
def test_movielens_with_a_broken_line(contents: dict[str, str], told: str, movielens: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=told):
        ingested(movielens(**contents))


def test_movielens_without_a_rating(movielens: Callable[..., Path]) -> None:
    """Such a row is neither 3 nor another number, and told all the same."""
    with pytest.raises(ValueError, match=r"movielens: 1 of 7 rows are broken.*label is not 0 or 1: 1, e\.g\. .*'4'"):
        ingested(movielens(ratings=RATINGS + "4::30::::978300760\n"))


def test_movielens_with_a_file_cut_short(movielens: Callable[..., Path]) -> None:
    raw = movielens(packed=True)
    whole = (raw / "ratings.dat.gz").read_bytes()
    (raw / "ratings.dat.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"ratings\.dat\.gz cannot be read whole.*Copy it again"):
        ingested(raw)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("4::30::0::978300760", "rating is not 1 to 5"),
        ("4::30::9::978300760", "rating is not 1 to 5"),
        ("4::30::5::-5", "time is not in the years 1970 to 9999"),
        ("4::30::5::978300760000", "time is not in the years 1970 to 9999"),
    ],
)
def test_movielens_with_a_value_that_cannot_be(line: str, reason: str, movielens: Callable[..., Path]) -> None:
    raw = movielens(ratings=RATINGS + line + "\n")
    config = replace(ingest_config("movielens", str(raw), until=None), max_rejected=0.2)
    facts = ingest.run(config, raw.with_name("canonical"))
    assert facts["rows"]["left_out"] == {reason: 1, "rating of 3": 2}
    assert Canonical(raw.with_name("canonical")).events().num_rows == 4
    with pytest.raises(ValueError, match=rf"movielens: 1 of 7 rows are broken.*{reason}: 1, e\.g\. "):
        ingested(raw)


REAL = PROJECT.parent / "shared" / "data" / "ml-1m"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the ml-1m files at {REAL}; they may not be redistributed")
def test_movielens_as_published(tmp_path: Path) -> None:
    facts = ingest.run(ingest_config("movielens", str(REAL), until=None), tmp_path / "canonical")
    assert facts["rows"]["read"] - facts["rows"]["left_out"]["rating of 3"] == facts["impressions"]
    assert Canonical(tmp_path / "canonical").events().num_rows == facts["impressions"]
    assert facts["impressions"] == 360_434
    assert facts["label_rate"] == pytest.approx(0.774, abs=0.0005)


# ---- which source -----------------------------------------------------------------------------------------------


def test_unknown_source_and_absent_path() -> None:
    with pytest.raises(ValueError, match=r"ingest\.source: unknown source 'kaggle'; known are files, microlens, mov"):
        sources.check("kaggle", ".")
    with pytest.raises(ValueError, match=r"ingest\.raw: 'no/such' is not there; name the path of the movielens files"):
        sources.check("movielens", "no/such")
    with pytest.raises(ValueError, match=r"'s3://bucket/data' is not there; name the path of the microlens files"):
        sources.check("microlens", "s3://bucket/data")
    sources.check("files", "s3://bucket/data")  # opened when it is read
