"""The simulator's world is the one its docstring promises; MovieLens files become the literature's rows."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from components.common.artifacts import folder_hash
from components.common.config import load
from components.common.contracts import ARRIVAL, ORACLE, POSITION, PROPENSITY, Canonical
from components.data import ingest, sources
from components.data.revisions import versions
from components.data.sources import Window
from components.data.sources.simulator import (
    DEVICE_SHARE,
    DEVICES,
    EPOCH,
    FIRST_ITEM,
    FIRST_USER,
    STRIDE,
    SimulatorConfig,
    World,
    read,
)
from components.data.sources.simulator_draws import Cohorts
from components.data.sources.simulator_words import TOPICS
from tests.components.small_world import PROJECT, SIMULATOR, WINDOW, WINDOW_DAYS, ingest_config

BIG = replace(SIMULATOR, users=2000, items=1000, impressions_per_day=20_000, text_dim=24, image_dim=16)
FIRST = (datetime(2024, 3, 1, tzinfo=UTC) - EPOCH).days
DAYS = range(FIRST, FIRST + 6)


def draw(world: World) -> pd.DataFrame:
    return pa.concat_tables([world.day(day) for day in world.days]).to_pandas()


def window(days: range) -> Window:
    return Window(since=EPOCH + timedelta(days=days.start), until=EPOCH + timedelta(days=days.stop))


def rows_of(table: pa.Table, name: str, ids: pa.Array) -> pa.Table:
    """The rows of these ids, in their order."""
    found: pa.Table = table.filter(pc.is_in(table[name], value_set=ids)).sort_by(name)
    return found


@pytest.fixture(scope="module")
def world() -> World:
    return World(BIG, DAYS)


@pytest.fixture(scope="module")
def events(world: World) -> pd.DataFrame:
    return draw(world)


@pytest.fixture(scope="module")
def items(world: World) -> pd.DataFrame:
    return world.items().to_pandas()


def users_of(world: World, events: pd.DataFrame) -> np.ndarray:
    return (events["user_id"].to_numpy() - FIRST_USER) // STRIDE - world.first_user


def items_of(world: World, events: pd.DataFrame) -> np.ndarray:
    return (events["item_id"].to_numpy() - FIRST_ITEM) // STRIDE - world.first_item


# ---- the simulator ----------------------------------------------------------------------------------------------


def test_a_seed_decides_every_byte(tmp_path: Path) -> None:
    for name, seed in {"one": 3, "again": 3, "other": 4}.items():
        config = replace(ingest_config(window_days=WINDOW_DAYS), simulator=replace(SIMULATOR, seed=seed))
        ingest.run(config, tmp_path / name)
    assert folder_hash(tmp_path / "one") == folder_hash(tmp_path / "again")
    one, other = Canonical(tmp_path / "one"), Canonical(tmp_path / "other")
    for column in ("user_id", "item_id", "timestamp", "label", ORACLE, "device"):
        assert not one.events()[column].equals(other.events()[column]), column
    for name, table in one.modalities().items():
        assert not table["vector"].equals(other.modalities()[name]["vector"]), name
    assert not one.items()["title"].equals(other.items()["title"])
    assert not one.users()["region"].equals(other.users()["region"])


def test_the_propensity_is_the_probability_of_the_draw(world: World) -> None:
    """By hand, item by item. And rows weighed by 1 / propensity show each item, and each topic, as often."""
    day, rows = FIRST + 3, world.day(FIRST + 3).to_pandas()
    there, of_topic = world.items_of(day), world.topics_I[world.items_of(day)]
    weight_I, found = world.weight_I[there], rows[PROPENSITY].to_numpy().astype(np.float64)
    assert (found > 0).all() and (found <= 1).all() and (rows[POSITION] == 1).all()
    users, items = users_of(world, rows), items_of(world, rows)
    for at in range(0, len(rows), 200):
        z_K = world.interests(day, np.array([users[at]]))[0].astype(np.float64)
        taste_K = np.clip(z_K, 0, None) ** 2 + 1e-3
        taste_K /= taste_K.sum()
        p_I = weight_I / weight_I.sum() / 2
        for topic in range(len(TOPICS)):
            own = of_topic == topic
            p_I += taste_K[topic] / 2 * (weight_I * own / weight_I[own].sum() if own.any() else 2 * p_I)
        assert p_I.sum() == pytest.approx(1, abs=1e-6)
        assert found[at] == pytest.approx(p_I[items[at] - there.start], rel=1e-4)
    assert (1 / found).mean() == pytest.approx(BIG.items, rel=0.03)
    topic_share = np.bincount(world.topics_I[items], 1 / found, len(TOPICS)) / (1 / found).sum()
    np.testing.assert_allclose(topic_share, np.bincount(of_topic, minlength=len(TOPICS)) / BIG.items, atol=0.012)


def test_the_propensity_has_changed_no_draw() -> None:
    """The hash of whole numbers and labels of a small world, as it was before rows told their propensity."""
    table = World(replace(SIMULATOR, late_share=0.1, corrected_share=0.05), range(FIRST, FIRST + 1)).day(FIRST)
    known = hashlib.sha256()
    for name in ("user_id", "item_id", "timestamp", "label", ARRIVAL):
        known.update(table[name].cast(pa.int64()).to_numpy().tobytes())
    assert known.hexdigest() == "adcdbbd78a2f2d1019702fa11afa31885137228ac07487d3c68c72295a2a4b01"


LIVELY = replace(SIMULATOR, late_share=0.1, corrected_share=0.05)


@pytest.mark.parametrize("ahead", [0, -60_000, 80_000], ids=["2024", "1859", "2243"])
def test_windows_agree_where_they_overlap(ahead: int) -> None:
    """Day by day, byte by byte, whatever lies before and after; of users, items and vectors too."""
    days = range(FIRST + ahead, FIRST + ahead + 20)
    whole = read("", LIVELY, window(days))
    for part in (days[:1], days[3:7], days[12:]):
        found = read("", LIVELY, window(part))
        times = whole.events["timestamp"].cast(pa.int64()).to_numpy() // (86_400 * 1_000_000)
        same = whole.events.filter(pa.array(np.isin(times, part)))
        assert found.events.combine_chunks().equals(same.combine_chunks())
        assert len(found.users) < len(whole.users) and len(found.items) < len(whole.items)
        assert found.users.sort_by("user_id").equals(rows_of(whole.users, "user_id", found.users["user_id"]))
        ids = found.items["item_id"]
        assert found.items.sort_by("item_id").equals(rows_of(whole.items, "item_id", ids))
        for name, table in found.modalities.items():
            assert table.sort_by("item_id").equals(rows_of(whole.modalities[name], "item_id", ids)), name


def test_a_window_costs_what_it_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many streams of random numbers are opened for a far day as for a near one, and few more for two days."""
    opened: list[tuple[int, ...]] = []
    rng = World._rng

    def counted(world: World, *stream: int) -> np.random.Generator:
        opened.append(stream)
        return rng(world, *stream)

    monkeypatch.setattr(World, "_rng", counted)
    counts = []
    for days in (range(FIRST, FIRST + 1), range(FIRST + 50_000, FIRST + 50_001), range(FIRST, FIRST + 2)):
        opened.clear()
        found = read("", SIMULATOR, window(days))
        counts.append(len(opened))
        assert len(found.events) == len(days) * SIMULATOR.impressions_per_day
    lives = SIMULATOR.user_life + SIMULATOR.item_life
    assert counts[0] == counts[1] < 6 * lives and counts[2] - counts[0] < 20


def test_a_window_of_hours_has_its_rows_alone() -> None:
    since, until = datetime(2024, 3, 2, 15, tzinfo=UTC), datetime(2024, 3, 4, 21, 30, tzinfo=UTC)
    found = read("", SIMULATOR, Window(since=since, until=until)).events
    whole = read("", SIMULATOR, WINDOW).events
    times = [since <= time < until for time in whole["timestamp"].to_pylist()]
    assert found.combine_chunks().equals(whole.filter(pa.array(times)).combine_chunks())
    assert 400 < len(found) < 3 * 400


def test_a_sample_is_of_the_first_and_the_last_day() -> None:
    found = read("", SIMULATOR, WINDOW, rows=50).events
    assert found["timestamp"].to_pandas().dt.strftime("%m-%d").value_counts().to_dict() == {"03-01": 50, "03-08": 50}


@pytest.mark.parametrize("bounds", [{}, {"since": WINDOW.since}, {"until": WINDOW.until}])
def test_a_window_without_bounds_is_told(bounds: dict) -> None:
    with pytest.raises(ValueError, match=r"no first and no last; give both ingest\.until.* and ingest\.window_days"):
        read("", SIMULATOR, Window(**bounds))


def test_rows_are_late_and_labels_are_corrected_at_the_known_rates(world: World) -> None:
    """What counts in the end is what a world draws that is never late and never wrong."""
    config = replace(BIG, late_share=0.1, corrected_share=0.03)
    delivered = World(config, DAYS)
    found = pa.concat_tables([delivered.day(day) for day in DAYS])
    counted, older = versions(found)
    assert counted.drop_columns(ARRIVAL).equals(pa.concat_tables([world.day(day) for day in DAYS]))
    n = BIG.impressions_per_day * len(DAYS)
    assert len(older["corrected later"]) / n == pytest.approx(0.03, rel=0.1) and not len(older["repeated"])
    table = found.to_pandas()
    is_second = table.duplicated(["user_id", "item_id", "timestamp"])
    hours = (table[ARRIVAL] - table["timestamp"]).dt.total_seconds() / 3600
    first = hours[~is_second]
    assert (first > 0).mean() == pytest.approx(0.1, rel=0.05)
    assert (first[first > 0] >= 1).all() and (first <= 72).all()
    assert 6 < first[first > 0].median() < 12
    at = np.flatnonzero(is_second)
    assert (table["label"].to_numpy()[at] != table["label"].to_numpy()[at - 1]).all()
    waited = hours.to_numpy()[at] - hours.to_numpy()[at - 1]
    assert (waited >= 1).all() and (waited <= 72).all()
    assert table["timestamp"].is_monotonic_increasing


def test_what_is_late_or_wrong_at_the_end_of_a_window_is_known_a_week_later(tmp_path: Path) -> None:
    config = replace(ingest_config(window_days=WINDOW_DAYS), simulator=LIVELY)
    then = ingest.run(config, tmp_path / "then")
    week = {"until": "2024-03-16T00:00:00+00:00", "window_days": WINDOW_DAYS + 7}
    later = ingest.run(replace(config, **week), tmp_path / "later")
    assert then["rows"]["later"] > 0 and then["rows"]["left_out"]["corrected later"] > 0
    known, all_ = (Canonical(tmp_path / name).events().to_pandas() for name in ("then", "later"))
    both = known.merge(all_, on=["user_id", "item_id", "timestamp"], how="left", validate="one_to_one")
    assert both["label_y"].notna().all() and (both["label_x"] != both["label_y"]).any()
    last = all_["timestamp"] >= pd.Timestamp("2024-03-08", tz="UTC")
    assert (
        (known["timestamp"] >= pd.Timestamp("2024-03-08", tz="UTC")).sum()
        < 400
        == (last & (all_["timestamp"] < pd.Timestamp("2024-03-09", tz="UTC"))).sum()
    )
    assert later["rows"]["written"] < (WINDOW_DAYS + 7) * 400  # of its own last days
    assert later["unusual_days"]["2024-03-03"]["corrected later"] > 0


def test_the_thirtieth_day_is_as_hard_as_the_first() -> None:
    """In the world of params.yaml: the oracle's AUC of days far apart differs by less than .01, the click rate by
    chance alone."""
    config = load(PROJECT / "params.yaml", "ingest.simulator", SimulatorConfig)
    config = replace(config, impressions_per_day=60_000, late_share=0.0, corrected_share=0.0)  # labels as they end
    first = (datetime(2026, 1, 11, tzinfo=UTC) - EPOCH).days
    long = World(config, range(first, first + 30))
    found = {}
    for day in (*long.days[::10], long.days[-1]):
        table = long.day(day)
        label, score = (table[name].to_numpy() for name in ("label", ORACLE))
        found[day] = roc_auc_score(label, score)
        assert label.mean() == pytest.approx(config.click_rate, abs=0.006)
    assert abs(found[long.days[-1]] - found[first]) < 0.01


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.6])
def test_click_rate_is_the_configured_one(rate: float) -> None:
    first = World(replace(BIG, click_rate=rate), DAYS).day(DAYS[0])
    assert first[ORACLE].to_numpy().mean() == pytest.approx(rate, rel=0.001)
    assert first["label"].to_numpy().mean() == pytest.approx(rate, rel=0.1)


def test_labels_are_drawn_with_the_true_probability(events: pd.DataFrame) -> None:
    bins = pd.qcut(events[ORACLE], 10)
    told = events.groupby(bins, observed=True).agg(p=(ORACLE, "mean"), y=("label", "mean"), n=("label", "size"))
    error = np.sqrt(told.p * (1 - told.p) / told.n)
    assert (abs(told.y - told.p) < 4 * error).all()
    assert told.p.max() > 4 * told.p.min()


def test_oracle_auc_is_told_and_leaves_room_above_chance(tmp_path: Path) -> None:
    facts = ingest.run(ingest_config(window_days=WINDOW_DAYS), tmp_path / "canonical")
    table = Canonical(tmp_path / "canonical").events()
    label, score = table["label"].to_numpy(), table[ORACLE].to_numpy()
    clicked, other = score[label == 1][:, None], score[label == 0][None, :]  # Mann and Whitney, pair by pair
    wins = sum(((a > other).sum() + (a == other).sum() / 2) for a in np.array_split(clicked, 20))
    assert facts["oracle_auc"] == pytest.approx(wins / clicked.size / other.size, abs=1e-9)
    assert 0.7 < facts["oracle_auc"] < 0.95


@pytest.mark.parametrize("exponent", [0.5, 1.1])
def test_popularity_is_a_power_law(exponent: float) -> None:
    drawn = draw(World(replace(BIG, popularity=exponent), DAYS))
    counts = np.sort(drawn["item_id"].value_counts().to_numpy())[::-1]
    rank = np.arange(5, 300)
    slope = np.polyfit(np.log(rank), np.log(counts[rank - 1]), 1)[0]
    assert -slope == pytest.approx(exponent, abs=0.15)


def test_activity_of_users_is_skewed(events: pd.DataFrame) -> None:
    counts = events["user_id"].value_counts()
    assert counts.iloc[:200].sum() > 0.25 * len(events)  # a tenth of the users


def test_interests_drift_by_the_configured_angle(world: World) -> None:
    there = world.users_of(DAYS[0])
    users = np.arange(max(there.start, world.users_of(DAYS[-1]).start), there.stop)  # on the first day and the last
    first, next_, last = (world.interests(day, users) for day in (DAYS[0], DAYS[1], DAYS[-1]))
    assert np.linalg.norm(first, axis=1) == pytest.approx(1, abs=1e-5)
    one, all_ = ((first * z).sum(axis=1).mean() for z in (next_, last))
    assert all_ < one - 0.02 < 0.99  # a little each day, in one direction
    still = World(replace(BIG, drift=0.0), DAYS)
    assert np.array_equal(still.interests(DAYS[0], users), still.interests(DAYS[-1], users))
    # and they are somebody's: another user's interests are further than one's own at the end
    assert (first * last).sum(axis=1).mean() > (first * np.roll(first, 1, axis=0)).sum(axis=1).mean() + 0.2


def test_interests_turn_for_ever_and_no_step_is_a_jump() -> None:
    """Over a whole life: a user turns on and on, at most the configured angle a day."""
    life = World(BIG, range(FIRST, FIRST + BIG.user_life))
    own = np.flatnonzero(life.born_U == FIRST)
    z_DUK = np.stack([life.interests(day, own) for day in life.days])
    step = np.arccos(np.clip((z_DUK[1:] * z_DUK[:-1]).sum(axis=2), -1, 1))
    assert step.max() < 2 * BIG.drift and step.mean() > BIG.drift / 2
    assert (z_DUK >= 0).all()  # nobody ever dislikes a topic
    apart = [(z_DUK[0] * z_DUK[ahead]).sum(axis=1).mean() for ahead in (0, 10, 40)]
    assert apart[0] > apart[1] + 0.1 and apart[1] > apart[2] + 0.2


def test_age_tells_of_interests_for_ever() -> None:
    """The young like even topics more: on the first days of a life and on its last."""
    life = World(BIG, range(FIRST, FIRST + 1))
    users = np.arange(len(life.age_U))[life.users_of(FIRST)]
    z_UK, age_U, old_U = life.interests(FIRST, users), life.age_U[users], FIRST - life.born_U[users]
    even = (z_UK[:, ::2] ** 2).sum(axis=1)
    for some in (old_U < 20, old_U > BIG.user_life - 20):
        assert abs(even[some & (age_U == 0)].mean() - even[some & (age_U == 4)].mean()) > 0.3


def test_interests_of_some_are_theirs_among_all(world: World) -> None:
    there = world.users_of(DAYS[2])
    some = np.array([3, 5, 8, BIG.users - 1])
    assert np.array_equal(world.interests(DAYS[2], there.start + some), world.interests(DAYS[2], there)[some])
    assert np.array_equal(
        world.interests(np.full(4, DAYS[2]), there.start + some), world.interests(DAYS[2], there)[some]
    )


def test_clicks_follow_todays_interests(world: World, events: pd.DataFrame) -> None:
    last = events[events["timestamp"].dt.day == events["timestamp"].dt.day.max()]
    affinity = (world.interests(DAYS[-1], users_of(world, last)) * world.z_IK[items_of(world, last)]).sum(axis=1)
    clicked = last["label"].to_numpy() == 1
    assert affinity[clicked].mean() > affinity[~clicked].mean() + 0.1


def test_users_and_items_come_and_go(world: World, events: pd.DataFrame, items: pd.DataFrame) -> None:
    """So many are there on any day, each for its life; who is not there is not shown."""
    shown = events.merge(items, on="item_id", how="left", validate="many_to_one")
    age = shown["timestamp"] - shown["created_at"]
    assert age.min() >= pd.Timedelta(0) and age.max() < pd.Timedelta(days=BIG.item_life)
    day = (events["timestamp"] - pd.Timestamp(EPOCH)).dt.days.to_numpy()
    lived = day - world.born_U[users_of(world, events)]
    assert lived.min() == 0 and lived.max() == BIG.user_life - 1
    for at in DAYS:
        for born, cohorts, life in (
            (world.born_U, world.user_cohorts, BIG.user_life),
            (world.born_I, world.item_cohorts, BIG.item_life),
        ):
            assert ((born <= at) & (at < born + life)).sum() == cohorts.size == len(cohorts.there(at))
    far = World(BIG, range(FIRST + 400, FIRST + 401))
    assert not set(far.items()["item_id"].to_pylist()) & set(items["item_id"])
    assert not set(far.users()["user_id"].to_pylist()) & set(world.users()["user_id"].to_pylist())


def test_fashion_turns_and_never_grows() -> None:
    days = FIRST, FIRST + 1, FIRST + 30, FIRST + 30_000, -FIRST
    fashion_DK = []
    for day in days:
        there = World(BIG, range(day, day + 1))
        items = there.items_of(day)
        fashion_DK.append(there.fashion(day))
        effect_I = there.z_IK[items] @ fashion_DK[-1]
        mean = np.average(effect_I, weights=there.weight_I[items])
        spread = np.average((effect_I - mean) ** 2, weights=there.weight_I[items])
        assert spread**0.5 == pytest.approx(BIG.fashion, rel=1e-3)
    like = np.corrcoef(fashion_DK)[0]
    assert 0.95 < like[1] < 1 and (abs(like[2:]) < 0.75).all()


def test_every_day_is_whole_and_in_time_order(world: World) -> None:
    for day in DAYS:
        table = world.day(day).to_pandas()
        assert len(table) == BIG.impressions_per_day
        assert table["timestamp"].is_monotonic_increasing
        assert (table["timestamp"].dt.floor("D") == pd.Timestamp(EPOCH) + pd.Timedelta(days=day)).all()


def test_devices_come_in_their_shares(events: pd.DataFrame) -> None:
    assert events["device"].value_counts(normalize=True)[list(DEVICES)].to_numpy() == pytest.approx(
        DEVICE_SHARE, abs=0.01
    )


def test_vectors_are_missing_in_the_configured_share_and_carry_the_topics(world: World) -> None:
    from sklearn.linear_model import LogisticRegression

    for view, (dim, missing) in enumerate(((24, 0.05), (16, 0.3))):
        table = world.vectors(dim, missing, view)
        assert 1 - len(table) / len(world.topics_I) == pytest.approx(missing, abs=0.04)
        x = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, dim)
        assert x.dtype == np.float32
        topic = world.topics_I[items_of(world, table.select(["item_id"]).to_pandas())]
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


@pytest.mark.parametrize("ahead", [0, -700_000, 2_900_000], ids=["2024", "the year 107", "the year 9964"])
def test_ids_are_no_indices(ahead: int) -> None:
    huge = replace(SIMULATOR, users=5_000_000, items=1_000_000)  # asked for their numbers alone
    for size, life, first in ((huge.users, huge.user_life, FIRST_USER), (huge.items, huge.item_life, FIRST_ITEM)):
        there = Cohorts(size, life).there(FIRST + ahead)
        assert len(there) == size
        assert size < there.start * STRIDE + first and there.stop * STRIDE + first < 2**53
    days = range(FIRST + ahead, FIRST + ahead + 2)
    raw = read("", SIMULATOR, window(days))
    users, items = (set(table.to_pylist()) for table in (raw.users["user_id"], raw.items["item_id"]))
    assert len(users) == len(raw.users) and len(items) == len(raw.items)
    assert set(raw.events["item_id"].to_pylist()) <= items and set(raw.events["user_id"].to_pylist()) <= users


def test_no_user_has_the_id_of_an_item() -> None:
    """On no day: they leave different remainders."""
    assert FIRST_USER % STRIDE != FIRST_ITEM % STRIDE


def test_a_topic_that_has_no_item_yet_breaks_nothing() -> None:
    few = World(replace(SIMULATOR, items=5, users=4, item_life=3, user_life=2), DAYS)
    table = draw(few)
    born = few.born_I[items_of(few, table)]
    day = np.repeat(DAYS, SIMULATOR.impressions_per_day)
    assert (born <= day).all() and (day < born + 3).all()


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
    assert facts["rows"] == {"read": 6, "later": 0, "outside": 0, "written": 4, "left_out": {"rating of 3": 2}}
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
