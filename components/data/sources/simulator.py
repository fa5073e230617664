"""A seeded world of users, items and clicks, whose true click probability is known.

    z_i     the topics of item i, on the unit sphere; text and image vectors are noisy linear views of it
    z_u(d)  the interests of user u on day d: a turn in the plane of two directions, so that they drift
    logit P(click) = a + s·(z_u(d)·z_i) + quality_i + fashion_d·z_i + device
    a candidate is drawn by popularity (a power law), half of the time within a topic that the user likes

Scoring with P(click) itself gives the oracle AUC: the ceiling of any model that reads this world.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa

from components.common.contracts import EVENTS, ORACLE, TIMESTAMP
from components.data.sources import RawTables, Window

TOPICS = {
    "cooking": ("Sourdough", "Noodle", "Pepper", "Skillet", "Harvest"),
    "hiking": ("Ridge", "Summit", "Trailhead", "Canyon", "Alpine"),
    "jazz": ("Midnight", "Saxophone", "Bluenote", "Swing", "Cellar"),
    "chess": ("Gambit", "Endgame", "Rook", "Sicilian", "Tempo"),
    "gardens": ("Orchid", "Compost", "Hedgerow", "Greenhouse", "Moss"),
    "cycling": ("Velodrome", "Gravel", "Peloton", "Sprint", "Cobble"),
    "space": ("Orbit", "Nebula", "Lander", "Eclipse", "Perihelion"),
    "knitting": ("Cable", "Merino", "Purl", "Lace", "Skein"),
    "films": ("Matinee", "Director", "Reel", "Noir", "Premiere"),
    "surfing": ("Reef", "Swell", "Longboard", "Offshore", "Tide"),
    "robots": ("Servo", "Actuator", "Gripper", "Lidar", "Firmware"),
    "history": ("Empire", "Archive", "Voyage", "Treaty", "Dynasty"),
    "coffee": ("Espresso", "Roast", "Crema", "Pour-over", "Arabica"),
    "dogs": ("Shepherd", "Puppy", "Terrier", "Fetch", "Kennel"),
    "finance": ("Ledger", "Dividend", "Index", "Bond", "Budget"),
    "yoga": ("Lotus", "Breath", "Sunrise", "Balance", "Stillness"),
}
FORMS = ("Guide", "Stories", "Challenge", "Basics", "Diary", "Review", "Live", "Secrets", "Weekly", "Masterclass")
ADJECTIVES = ("Quiet", "Bold", "Hidden", "Classic", "Modern", "Tiny", "Grand", "Honest", "Slow", "Bright")
DEVICES = ("phone", "desktop", "tablet", "tv")
DEVICE_SHARE = (0.62, 0.22, 0.1, 0.06)
DEVICE_EFFECT = np.array([0.15, 0.0, 0.1, -0.5], dtype=np.float32)
AGE_GROUPS = ("18-24", "25-34", "35-44", "45-54", "55+")
REGIONS = ("north", "south", "east", "west")
FIRST_USER, FIRST_ITEM, STRIDE = 100_003, 5_000_011, 7  # raw ids are no indices: code that mixes them up fails


@dataclass(frozen=True, kw_only=True)
class SimulatorConfig:
    """Sizes and shapes of the world.

    seed           of everything
    days, users, items, impressions_per_day   how much there is
    text_dim, image_dim   widths of the two modalities' vectors
    start          first day, YYYY-MM-DD (UTC)
    popularity     exponent of the power law of item popularity
    drift          radians that a user's interests turn in a day
    sharpness      s above: how much interests decide
    click_rate     share of clicks that the intercept a is set to
    new_share      share of users and of items that arrive after the first day
    missing_text, missing_image   share of items without that vector
    noise          standard deviation of the views' noise, in units of the signal's
    """

    seed: int
    start: str
    days: int
    users: int
    items: int
    impressions_per_day: int
    text_dim: int
    image_dim: int
    popularity: float
    drift: float
    sharpness: float
    click_rate: float
    new_share: float
    missing_text: float
    missing_image: float
    noise: float

    def __post_init__(self) -> None:
        for name in ("days", "users", "items", "impressions_per_day", "text_dim", "image_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("click_rate", "new_share", "missing_text", "missing_image"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share in [0, 1)")
        try:
            datetime.strptime(self.start, "%Y-%m-%d")
        except ValueError:
            raise ValueError(f"start is {self.start!r}; write a day such as 2026-01-01") from None


class World:
    """Users and items of a config, drawn once; `day(d)` draws that day's impressions."""

    def __init__(self, config: SimulatorConfig) -> None:
        self.config = config
        rng = self.rng = np.random.default_rng(config.seed)
        k = len(TOPICS)
        self.topics_I = rng.integers(0, k, config.items)
        self.z_IK = _sphere(np.eye(k)[self.topics_I] + 0.45 * rng.normal(size=(config.items, k)) / np.sqrt(k) * 2)
        self.quality_I = rng.normal(0, 0.5, config.items).astype(np.float32)
        self.weight_I = (rng.permutation(config.items) + 1.0) ** -config.popularity
        self.arrival_I = self._arrivals(config.items)
        # Two directions a user turns between: a handful of liked topics each, the second unlike the first.
        self.first_UK, self.second_UK = (_sphere(rng.dirichlet(np.full(k, 0.15), config.users)) for _ in range(2))
        self.phase_U = rng.uniform(0, np.pi / 2, config.users)
        self.activity_U = rng.lognormal(0, 1, config.users)
        self.arrival_U = self._arrivals(config.users)
        self.fashion_DK = np.cumsum(0.25 * rng.normal(size=(config.days, k)), axis=0).astype(np.float32)
        self.start = datetime.fromisoformat(config.start).replace(tzinfo=UTC)
        self.intercept = 0.0
        self.intercept = self._solve_intercept()

    def interests(self, day: int, users: np.ndarray | slice = slice(None)) -> np.ndarray:
        """z_u(day) of these users, or of all: float32 [users, topics]."""
        angle_U1 = (self.phase_U[users] + self.config.drift * day)[:, None]
        return _sphere(np.cos(angle_U1) * self.first_UK[users] + np.sin(angle_U1) * self.second_UK[users])

    def day(self, day: int, rows: int | None = None) -> pa.Table:
        """One day's impressions in time order, with labels and the true click probability."""
        rng = np.random.default_rng([self.config.seed, day])
        n = rows or self.config.impressions_per_day
        user_B = _draw(rng, np.where(self.arrival_U <= day, self.activity_U, 0), n)
        is_here_U = np.zeros(self.config.users, dtype=bool)
        is_here_U[user_B] = True
        z_HK, here_B = self.interests(day, np.flatnonzero(is_here_U)), (np.cumsum(is_here_U) - 1)[user_B]
        item_B = self._candidates(rng, z_HK, here_B, day)
        device_B = _draw(rng, np.array(DEVICE_SHARE), n).astype(np.int8)
        affinity_B = np.einsum("bk,bk->b", z_HK[here_B], self.z_IK[item_B])
        item_effect_I = self.quality_I + self.z_IK @ self.fashion_DK[day]
        logit_B = self.intercept + self.config.sharpness * affinity_B + item_effect_I[item_B] + DEVICE_EFFECT[device_B]
        probability_B = (1 / (1 + np.exp(-logit_B))).astype(np.float32)
        second_B = np.sort(rng.triangular(0, 72_000, 86_400, n).astype(np.int64))  # evenings are busier
        start = int((self.start + timedelta(days=day)).timestamp())
        return pa.table(
            {
                "user_id": user_B * STRIDE + FIRST_USER,
                "item_id": item_B * STRIDE + FIRST_ITEM,
                "timestamp": pa.array((start + second_B) * 1_000_000).cast(TIMESTAMP),
                "label": (rng.random(n, dtype=np.float32) < probability_B).astype(np.int8),
                ORACLE: probability_B,
                "device": pa.DictionaryArray.from_arrays(pa.array(device_B), pa.array(DEVICES)),
            }
        )

    def _candidates(self, rng: np.random.Generator, z_HK: np.ndarray, here_B: np.ndarray, day: int) -> np.ndarray:
        """Half by popularity at large, half by popularity within a topic drawn from the user's interests: z_HK are
        those of the day's users, here_B the row of each impression's."""
        weight_I = np.where(self.arrival_I <= day, self.weight_I, 0)
        order_I = np.argsort(self.topics_I, kind="stable")
        cumulative_I = np.cumsum(weight_I[order_I])
        last_K = np.searchsorted(self.topics_I[order_I], np.arange(len(TOPICS)), "right") - 1
        bounds_K1 = np.concatenate([[0.0], np.where(last_K >= 0, cumulative_I[last_K], 0.0)])
        taste_HK = np.cumsum(np.clip(z_HK, 0, None) ** 2 + 1e-3, axis=1)
        taste_HK /= taste_HK[:, -1:]
        n = len(here_B)
        topical = np.flatnonzero(rng.random(n, dtype=np.float32) < 0.5)
        topic = (taste_HK[here_B[topical]] < rng.random((len(topical), 1), dtype=np.float32)).sum(axis=1)
        low_B, high_B = np.zeros(n), np.full(n, cumulative_I[-1])
        low_B[topical] = bounds_K1[topic]
        # A topic none of whose items has arrived yet has no width: take any item instead.
        wide = bounds_K1[topic + 1] > bounds_K1[topic]
        high_B[topical[wide]] = bounds_K1[topic[wide] + 1]
        drawn_B = np.searchsorted(cumulative_I, low_B + rng.random(n) * (high_B - low_B), "right")
        return order_I[np.minimum(drawn_B, len(order_I) - 1)]

    def _arrivals(self, count: int) -> np.ndarray:
        """The day each arrives: most are there from the first."""
        late = self.rng.random(count) < self.config.new_share
        return np.where(late, self.rng.integers(0, self.config.days, count), 0)

    def _solve_intercept(self) -> float:
        """The intercept that gives the configured click rate on a sample of the first day."""
        sample = self.day(0, rows=20_000)[ORACLE].to_numpy().astype(np.float64)
        logit_B = np.log(sample / (1 - sample))
        low, high = -20.0, 20.0
        for _ in range(40):
            middle = (low + high) / 2
            if (1 / (1 + np.exp(-logit_B - middle))).mean() < self.config.click_rate:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def users(self) -> pa.Table:
        """user_id, age_group, region: drawn, with age leaning on the user's first direction."""
        lean_U = (self.first_UK[:, ::2].sum(axis=1) * 3 + self.rng.normal(size=self.config.users)).argsort().argsort()
        age_U = lean_U * len(AGE_GROUPS) // self.config.users
        return pa.table(
            {
                "user_id": np.arange(self.config.users) * STRIDE + FIRST_USER,
                "age_group": np.array(AGE_GROUPS)[age_U],
                "region": np.array(REGIONS)[self.rng.integers(0, len(REGIONS), self.config.users)],
            }
        )

    def items(self) -> pa.Table:
        """item_id, created_at, a title and tags a person can read."""
        names = list(TOPICS)
        rng, n = self.rng, self.config.items
        words = np.array(list(TOPICS.values()))
        others_IK = np.where(np.eye(len(names))[self.topics_I], -np.inf, self.z_IK)
        second_I = np.argmax(others_IK, axis=1)
        word_I = words[self.topics_I, rng.integers(0, words.shape[1], n)]
        adjective_I, form_I = (np.array(pool)[rng.integers(0, len(pool), n)] for pool in (ADJECTIVES, FORMS))
        created_I = int(self.start.timestamp()) + np.where(self.arrival_I > 0, self.arrival_I, -30) * 86_400
        return pa.table(
            {
                "item_id": np.arange(n) * STRIDE + FIRST_ITEM,
                "created_at": pa.array(created_I * 1_000_000).cast(TIMESTAMP),
                "title": [f"{a} {w} {f}" for a, w, f in zip(adjective_I, word_I, form_I, strict=True)],
                "tags": [
                    [names[t], names[s], f.lower()] for t, s, f in zip(self.topics_I, second_I, form_I, strict=True)
                ],
                "text": pa.nulls(n, pa.string()),
            }
        )

    def vectors(self, dim: int, missing: float) -> pa.Table:
        """A noisy linear view of the items' topics; a share of items has none."""
        rng = self.rng
        view_KE = rng.normal(size=(self.z_IK.shape[1], dim)) / np.sqrt(self.z_IK.shape[1])
        clean_IE = self.z_IK @ view_KE
        noisy_IE = clean_IE + self.config.noise * clean_IE.std() * rng.normal(size=clean_IE.shape)
        kept = np.flatnonzero(rng.random(self.config.items) >= missing)
        flat = pa.array(noisy_IE[kept].astype(np.float32).ravel())
        return pa.table({"item_id": kept * STRIDE + FIRST_ITEM, "vector": pa.FixedSizeListArray.from_arrays(flat, dim)})


def read(raw: str, config: SimulatorConfig, window: Window, rows: int | None = None) -> RawTables:
    """Every day of the world. With `rows`, so many rows of the first and the last day. `raw`, its code, is not read."""
    from tqdm import tqdm

    world = World(config)
    if rows is None:
        days = tqdm(range(config.days), "simulate", unit="day", disable=None)
        events = pa.concat_tables([world.day(day) for day in days])
    else:
        shown = min(rows, config.impressions_per_day)
        events = pa.concat_tables([world.day(day, shown) for day in sorted({0, config.days - 1})])
    assert set(EVENTS.names) <= set(events.column_names)
    return RawTables(
        events=events,
        users=world.users(),
        items=world.items(),
        modalities={
            "text": world.vectors(config.text_dim, config.missing_text),
            "image": world.vectors(config.image_dim, config.missing_image),
        },
        facts={"seed": config.seed},
    )


def _sphere(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def _draw(rng: np.random.Generator, weights: np.ndarray, n: int) -> np.ndarray:
    """n indices, each with probability proportional to its weight."""
    cumulative = np.cumsum(weights)
    return np.searchsorted(cumulative, rng.random(n) * cumulative[-1], "right")
