"""An endless, seeded world of users, items and clicks, whose true click probability is known.

    z_i     the topics of item i, on the unit sphere; text and image vectors are noisy linear views of it
    z_u(d)  the interests of user u on day d: a turn from one direction to the next, and so on, so that they drift
    logit P(click) = a_d + s·(z_u(d)·z_i) + quality_i + fashion_d·z_i + device
    an item is drawn by popularity (a power law), half of the time within a topic that the user likes
    propensity: the probability of that draw. A row is shown alone, so its position is 1

Day d follows from the seed and d alone: who arrives on a day is drawn by that day's own random numbers, lives for a
known time, and is needed by no other day. So a window costs what it is wide, however far it lies, and two windows agree
where they overlap. No day is harder than another: as many users and items are there on each, fashion turns and never
grows, and a_d gives every day the same click rate.

Some rows arrive late, and some labels are corrected: such a row comes first with the other label. The label that counts
in the end is drawn with P(click), and scoring with P(click) itself gives the oracle AUC: the ceiling of any model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa

from components.common.contracts import ARRIVAL, EVENTS, ORACLE, POSITION, PROPENSITY, TIMESTAMP
from components.data.sources import RawTables, Window
from components.data.sources.simulator_draws import BEFORE, SECOND, Cohorts, delays, draw, intercept, sphere
from components.data.sources.simulator_words import ADJECTIVES, FORMS, TOPICS

DEVICES = ("phone", "desktop", "tablet", "tv")
DEVICE_SHARE = (0.62, 0.22, 0.1, 0.06)
DEVICE_EFFECT = np.array([0.15, 0.0, 0.1, -0.5], dtype=np.float32)
AGE_GROUPS = ("18-24", "25-34", "35-44", "45-54", "55+")
REGIONS = ("north", "south", "east", "west")
FIRST_USER, FIRST_ITEM, STRIDE = 100_003, 5_000_011, 14  # raw ids are no indices: code that mixes them up fails
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)  # day 0
WAVES = 4  # of each topic's fashion
# What a stream of random numbers is for: it is seeded by the seed, one of these, and a day.
USERS, LEGS, ITEMS, TITLES, VIEWS, FASHION, IMPRESSIONS = range(7)


@dataclass(frozen=True, kw_only=True)
class SimulatorConfig:
    """Sizes and shapes of the world.

    seed           of everything
    users, items   who are there on any day
    user_life, item_life   days from the arrival of a user, an item, until they leave
    impressions_per_day    how much there is
    text_dim, image_dim    widths of the two modalities' vectors
    popularity     exponent of the power law of item popularity
    drift          radians that a user's interests turn in a day
    fashion        standard deviation of what fashion adds to the logits of a day's items, weighed by popularity
    fashion_days   days of one of its waves, more or less
    sharpness      s above: how much interests decide
    click_rate     share of clicks of each day
    late_share     share of impressions that arrive an hour to three days after they happened
    corrected_share   share of impressions whose label is wrong until it is corrected, an hour to three days later
    missing_text, missing_image   share of items without that vector
    noise          standard deviation of the views' noise, in units of the signal's
    """

    seed: int
    users: int
    items: int
    user_life: int
    item_life: int
    impressions_per_day: int
    text_dim: int
    image_dim: int
    popularity: float
    drift: float
    fashion: float
    fashion_days: float
    sharpness: float
    click_rate: float
    late_share: float
    corrected_share: float
    missing_text: float
    missing_image: float
    noise: float

    def __post_init__(self) -> None:
        for name in ("users", "items", "user_life", "item_life", "impressions_per_day", "text_dim", "image_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("late_share", "corrected_share", "missing_text", "missing_image"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share in [0, 1)")
        if not 0 < self.click_rate < 1:
            raise ValueError(f"click_rate is {self.click_rate}; it is a share in (0, 1)")
        if self.fashion_days <= 0:
            raise ValueError(f"fashion_days is {self.fashion_days}; it must be more than 0")


class World:
    """The users and items of some days. `day(k)` draws the impressions of one of these days; k counts from 1970.

    An array of users (U) or items (I) holds all who are there on any of the days, in the order of their arrival.
    """

    def __init__(self, config: SimulatorConfig, days: range) -> None:
        assert days.step == 1 and len(days) and days.start - max(config.user_life, config.item_life) > -BEFORE
        self.config, self.days = config, days
        self.user_cohorts = Cohorts(config.users, config.user_life)
        self.item_cohorts = Cohorts(config.items, config.item_life)
        self._draw_users()
        self._draw_items()
        rng = self._rng(FASHION)
        topics_waves = len(TOPICS), WAVES
        self.frequency_KW = 2 * np.pi / config.fashion_days * 2 ** rng.uniform(-1, 1, topics_waves)
        self.phase_KW = rng.uniform(0, 2 * np.pi, topics_waves)

    def _rng(self, *stream: int) -> np.random.Generator:
        """The random numbers of a stream, be its day before day 0."""
        kind, *days = stream
        return np.random.default_rng([self.config.seed, kind, *(day + BEFORE for day in days)])

    def _draw_users(self) -> None:
        """Interests turn along legs, a quarter of a turn each; only those are drawn that the days need."""
        config, cohorts = self.config, self.user_cohorts
        self.first_user = cohorts.first(cohorts.of(self.days).start)
        legs_a_day = config.drift / (np.pi / 2)
        drawn, legs, at = [], [], 0
        for born in cohorts.of(self.days):
            n = cohorts.first(born + 1) - cohorts.first(born)
            rng = self._rng(USERS, born)
            age = rng.integers(0, len(AGE_GROUPS), n)
            own = {"age": age, "region": rng.integers(0, len(REGIONS), n), "activity": rng.lognormal(0, 1, n)}
            ages = max(self.days.start - born, 0), min(self.days.stop - 1 - born, config.user_life - 1)
            first, last = int(ages[0] * legs_a_day), int(1 + ages[1] * legs_a_day) + 1
            # Few topics at a time, the young more of the even ones: so a user's age tells something for ever.
            lean_U1 = np.linspace(-0.7, 0.7, len(AGE_GROUPS))[age][:, None]
            liking_UK = 0.15 * (1 + lean_U1 * np.resize([1, -1], len(TOPICS)))
            legs += [sphere(self._rng(LEGS, born, leg).standard_gamma(liking_UK)) for leg in range(first, last + 1)]
            own |= {"born": np.full(n, born), "leg": rng.uniform(0, 1, n)}
            own |= {"row": at - first * n + np.arange(n), "next": np.full(n, n)}  # row of leg 0; rows from leg to leg
            at += n * (last + 1 - first)
            drawn.append(own)
        self.age_U, self.region_U, self.activity_U, self.born_U, self.leg_U, self.row_U, self.next_U = (
            np.concatenate([own[name] for own in drawn])
            for name in ("age", "region", "activity", "born", "leg", "row", "next")
        )
        self.legs_LK = np.concatenate(legs)

    def _draw_items(self) -> None:
        config, cohorts, k = self.config, self.item_cohorts, len(TOPICS)
        self.first_item = cohorts.first(cohorts.of(self.days).start)

        def laws(rng: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
            topic = rng.integers(0, k, n)
            z_IK = sphere(np.eye(k)[topic] + 0.45 * rng.normal(size=(n, k)) / np.sqrt(k) * 2)
            return topic, z_IK, rng.normal(0, 0.5, n).astype(np.float32)

        self.topics_I, self.z_IK, self.quality_I = self._by_cohort(ITEMS, laws)
        # Steps of the golden ratio fill [0, 1) evenly, whichever of them are there: each day has its few great hits.
        number_I = np.arange(len(self.topics_I), dtype=np.uint64) + np.uint64(self.first_item)
        rank_I = (number_I * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(11)) * (config.items * 2.0**-53)
        self.weight_I = (rank_I + 1) ** -config.popularity
        self.born_I = np.repeat(*self._born())

    def _born(self) -> tuple[np.ndarray, np.ndarray]:
        """The days on which the items arrive, and how many on each."""
        born = self.item_cohorts.of(self.days)
        return np.array(born), np.diff([self.item_cohorts.first(day) for day in (*born, born.stop)])

    def _by_cohort(
        self, kind: int, draw: Callable[[np.random.Generator, int], tuple[np.ndarray, ...]]
    ) -> tuple[np.ndarray, ...]:
        """What is drawn for the items of each day of arrival by its own random numbers, one after the other."""
        drawn = [draw(self._rng(kind, int(born)), int(n)) for born, n in zip(*self._born(), strict=True)]
        return tuple(np.concatenate(parts) for parts in zip(*drawn, strict=True))

    def interests(self, day: int | np.ndarray, users: np.ndarray | slice) -> np.ndarray:
        """z_u(day) of users who are there; `day` may be one for each: float32 [users, topics]."""
        leg_U = self.leg_U[users] + (day - self.born_U[users]) * (self.config.drift / (np.pi / 2))
        whole_U = np.floor(leg_U).astype(np.int64)
        angle_U1 = ((leg_U - whole_U) * (np.pi / 2)).astype(np.float32)[:, None]
        row_U = self.row_U[users] + whole_U * self.next_U[users]
        return sphere(
            np.cos(angle_U1) * self.legs_LK[row_U] + np.sin(angle_U1) * self.legs_LK[row_U + self.next_U[users]]
        )

    def fashion(self, day: int) -> np.ndarray:
        """The day's fashion, float32 [topics]: waves that come and go, and part the day's items as far on every day."""
        wave_K = np.cos(day * self.frequency_KW + self.phase_KW).sum(axis=1)
        items = self.items_of(day)
        share_I, effect_I = self.weight_I[items] / self.weight_I[items].sum(), self._effects(items, wave_K)
        spread = np.sqrt((share_I * effect_I**2).sum() - (share_I * effect_I).sum() ** 2)
        return (self.config.fashion / max(spread, 1e-6) * wave_K).astype(np.float32)

    def _effects(self, items: slice, fashion_K: np.ndarray) -> np.ndarray:
        """fashion·z_i. Summed without BLAS, whose last bits would depend on where the items lie."""
        return np.einsum("ik,k->i", self.z_IK[items], fashion_K)

    def users_of(self, day: int) -> slice:
        """Where the users of a day are in an array of users."""
        there = self.user_cohorts.there(day)
        return slice(there.start - self.first_user, there.stop - self.first_user)

    def items_of(self, day: int) -> slice:
        there = self.item_cohorts.there(day)
        return slice(there.start - self.first_item, there.stop - self.first_item)

    def day(self, day: int, rows: int | None = None) -> pa.Table:
        """One day's impressions in time order, with labels and the true click probability.

        A corrected impression has two rows. Where rows can be late or corrected, they say when they arrived.
        """
        assert day in self.days
        config, rng = self.config, self._rng(IMPRESSIONS, day)
        users, items, n = self.users_of(day), self.items_of(day), rows or config.impressions_per_day
        user_B = draw(rng, self.activity_U[users], n)
        is_here_U = np.zeros(config.users, dtype=bool)
        is_here_U[user_B] = True
        here_B = (np.cumsum(is_here_U) - 1)[user_B]
        z_HK = self.interests(day, users.start + np.flatnonzero(is_here_U))
        item_B, propensity_B = self._shown(rng, z_HK, here_B, items)
        device_B = draw(rng, np.array(DEVICE_SHARE), n).astype(np.int8)
        z_IK = self.z_IK[items]
        affinity_B = np.einsum("bk,bk->b", z_HK[here_B], z_IK[item_B])
        item_effect_I = self.quality_I[items] + self._effects(items, self.fashion(day))
        logit_B = config.sharpness * affinity_B + item_effect_I[item_B] + DEVICE_EFFECT[device_B]
        logit_B += intercept(logit_B[:20_000], config.click_rate)
        probability_B = (1 / (1 + np.exp(-logit_B))).astype(np.float32)
        milli_B = np.sort(rng.triangular(0, 72_000_000, 86_400_000, n).astype(np.int64))  # evenings are busier
        time_B = day * 86_400 * SECOND + milli_B * 1000
        table = pa.table(
            {
                "user_id": (self.first_user + users.start + user_B) * STRIDE + FIRST_USER,
                "item_id": (self.first_item + items.start + item_B) * STRIDE + FIRST_ITEM,
                "timestamp": pa.array(time_B).cast(TIMESTAMP),
                "label": (rng.random(n, dtype=np.float32) < probability_B).astype(np.int8),
                ORACLE: probability_B,
                PROPENSITY: propensity_B,
                POSITION: np.ones(n, dtype=np.int16),
                "device": pa.DictionaryArray.from_arrays(pa.array(device_B), pa.array(DEVICES)),
            }
        )
        return self._delivered(rng, table, time_B) if config.late_share or config.corrected_share else table

    def _delivered(self, rng: np.random.Generator, table: pa.Table, time_B: np.ndarray) -> pa.Table:
        """The rows with their time of arrival; before a corrected one, the same with the other label."""
        late, wrong = (
            np.flatnonzero(rng.random(len(table), dtype=np.float32) < share)
            for share in (self.config.late_share, self.config.corrected_share)
        )
        arrival_B = time_B.copy()
        arrival_B[late] += delays(rng, len(late))
        row_R, first = np.insert(np.arange(len(table)), wrong, wrong), wrong + np.arange(len(wrong))
        label_R, arrival_R = table["label"].to_numpy()[row_R], arrival_B[row_R]
        label_R[first] ^= 1
        arrival_R[first + 1] += delays(rng, len(wrong))
        table = table.take(pa.array(row_R))
        table = table.set_column(table.column_names.index("label"), "label", pa.array(label_R))
        return table.append_column(ARRIVAL, pa.array(arrival_R).cast(TIMESTAMP))

    def _shown(
        self, rng: np.random.Generator, z_HK: np.ndarray, here_B: np.ndarray, items: slice
    ) -> tuple[np.ndarray, np.ndarray]:
        """Half by popularity at large, half by popularity within a topic drawn from the user's interests: z_HK are
        those of the day's users, here_B the row of each impression's. Returns positions among the day's items, and the
        probability of each of these draws, float32."""
        topics_I = self.topics_I[items]
        order_I = np.argsort(topics_I, kind="stable")
        cumulative_I = np.cumsum(self.weight_I[items][order_I])
        last_K = np.searchsorted(topics_I[order_I], np.arange(len(TOPICS)), "right") - 1
        bounds_K1 = np.concatenate([[0.0], np.where(last_K >= 0, cumulative_I[last_K], 0.0)])
        taste_HK = np.cumsum(np.clip(z_HK, 0, None) ** 2 + 1e-3, axis=1)
        taste_HK /= taste_HK[:, -1:]
        n = len(here_B)
        topical = np.flatnonzero(rng.random(n, dtype=np.float32) < 0.5)
        topic = (taste_HK[here_B[topical]] < rng.random((len(topical), 1), dtype=np.float32)).sum(axis=1)
        low_B, high_B = np.zeros(n), np.full(n, cumulative_I[-1])
        low_B[topical] = bounds_K1[topic]
        # A topic of which no item is there has no width: take any item instead.
        wide = bounds_K1[topic + 1] > bounds_K1[topic]
        high_B[topical[wide]] = bounds_K1[topic[wide] + 1]
        drawn_B = np.searchsorted(cumulative_I, low_B + rng.random(n) * (high_B - low_B), "right")
        drawn_B = np.minimum(drawn_B, len(order_I) - 1)
        width_I, width_K = np.diff(cumulative_I, prepend=0), np.diff(bounds_K1)
        share_HK = np.diff(taste_HK, axis=1, prepend=0)
        at_large_I = width_I / cumulative_I[-1]
        no_item_H = share_HK[:, width_K <= 0].sum(axis=1)
        topic_B = topics_I[order_I[drawn_B]]
        within_B = share_HK[here_B, topic_B] * width_I[drawn_B] / width_K[topic_B]
        propensity_B = ((1 + no_item_H[here_B]) * at_large_I[drawn_B] + within_B) / 2
        return order_I[drawn_B], propensity_B.astype(np.float32)

    def users(self) -> pa.Table:
        """user_id, age_group, region: who of the world is there on some of the days."""
        return pa.table(
            {
                "user_id": (self.first_user + np.arange(len(self.age_U))) * STRIDE + FIRST_USER,
                "age_group": np.array(AGE_GROUPS)[self.age_U],
                "region": np.array(REGIONS)[self.region_U],
            }
        )

    def item_ids(self) -> np.ndarray:
        return (self.first_item + np.arange(len(self.topics_I))) * STRIDE + FIRST_ITEM

    def items(self) -> pa.Table:
        """item_id, created_at, a title and tags a person can read."""
        names, words = list(TOPICS), np.array(list(TOPICS.values()))
        sizes = words.shape[1], len(ADJECTIVES), len(FORMS)
        word_I, adjective_I, form_I = self._by_cohort(
            TITLES, lambda rng, n: tuple(rng.integers(0, size, n) for size in sizes)
        )
        others_IK = np.where(np.eye(len(names))[self.topics_I], -np.inf, self.z_IK)
        second_I = np.argmax(others_IK, axis=1)
        word_I, adjective_I, form_I = (
            words[self.topics_I, word_I],
            np.array(ADJECTIVES)[adjective_I],
            np.array(FORMS)[form_I],
        )
        return pa.table(
            {
                "item_id": self.item_ids(),
                "created_at": pa.array(self.born_I * 86_400 * SECOND).cast(TIMESTAMP),
                "title": [f"{a} {w} {f}" for a, w, f in zip(adjective_I, word_I, form_I, strict=True)],
                "tags": [
                    [names[t], names[s], f.lower()] for t, s, f in zip(self.topics_I, second_I, form_I, strict=True)
                ],
                "text": pa.nulls(len(form_I), pa.string()),
            }
        )

    def vectors(self, dim: int, missing: float, view: int) -> pa.Table:
        """A noisy linear view of the items' topics, the view-th; a share of items has none."""
        k = len(TOPICS)
        view_KE = self._rng(VIEWS, view).normal(size=(k, dim)) / np.sqrt(k)
        # Item by cohort, products too: of other shapes, they would differ in their last bits.
        cohorts, at, parts = self._born(), 0, []
        for born, n in zip(*cohorts, strict=True):
            rng, clean_IE = self._rng(VIEWS, view, int(born)), self.z_IK[at : at + n] @ view_KE
            noisy_IE = clean_IE + self.config.noise / np.sqrt(k) * rng.normal(size=clean_IE.shape)
            parts.append((noisy_IE.astype(np.float32), rng.random(n) >= missing))
            at += n
        noisy_IE, kept_I = (np.concatenate(part) for part in zip(*parts, strict=True))
        flat = pa.array(noisy_IE[kept_I].ravel())
        return pa.table({"item_id": self.item_ids()[kept_I], "vector": pa.FixedSizeListArray.from_arrays(flat, dim)})


def read(raw: str, config: SimulatorConfig, window: Window, rows: int | None = None) -> RawTables:
    """The rows of a window. With `rows`, so many of its first and its last day. `raw`, its code, is not read.

    Raises ValueError where the window has no bounds, for the world has none.
    """
    from tqdm import tqdm

    if window.since is None or window.until is None:
        raise ValueError(
            "simulator: its days have no first and no last; give both ingest.until, such as "
            "2026-01-11T00:00:00+00:00, and ingest.window_days"
        )
    last = (window.until - EPOCH - timedelta(microseconds=1)).days
    days = range((window.since - EPOCH).days, last + 1)
    if not days:
        raise ValueError(
            f"simulator: no time lies in the window from {window.since} to {window.until}; give a wider one"
        )
    world = World(config, days)
    if rows is None:
        events = pa.concat_tables([world.day(day) for day in tqdm(days, "simulate", unit="day", disable=None)])
    else:
        shown = min(rows, config.impressions_per_day)
        events = pa.concat_tables([world.day(day, shown) for day in sorted({days[0], days[-1]})])
    since, until = ((moment - EPOCH) // timedelta(microseconds=1) for moment in (window.since, window.until))
    time = events["timestamp"].cast(pa.int64()).to_numpy()
    start, stop = np.searchsorted(time, [since, until])
    events = events.slice(start, stop - start)
    assert set(EVENTS.names) <= set(events.column_names)
    return RawTables(
        events=events,
        users=world.users(),
        items=world.items(),
        modalities={
            "text": world.vectors(config.text_dim, config.missing_text, 0),
            "image": world.vectors(config.image_dim, config.missing_image, 1),
        },
        facts={"seed": config.seed},
    )
