"""What the simulator's world is drawn by: who is there when, and what is drawn in many places."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BEFORE = 1_000_000  # days: more than lie between the year 1 and day 0, so that no index and no seed is negative
LATEST = 72  # hours that a late row or a correction takes at most; an hour at least
SECOND = 1_000_000  # microseconds


@dataclass(frozen=True)
class Cohorts:
    """Who arrives when: `size` are there on any day, each for `life` days. Their numbers follow their arrival."""

    size: int
    life: int

    def first(self, day: int) -> int:
        """The number of the first who arrives on this day, or on one after it."""
        return self.size * (day + BEFORE) // self.life

    def there(self, day: int) -> range:
        """The numbers of those who are there on this day: `size` of them."""
        return range(self.first(day - self.life + 1), self.first(day + 1))

    def of(self, days: range) -> range:
        """The days on which those arrive who are there on some of these days."""
        return range(days.start - self.life + 1, days.stop)


def sphere(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def draw(rng: np.random.Generator, weights: np.ndarray, n: int) -> np.ndarray:
    """n indices, each with probability proportional to its weight."""
    cumulative = np.cumsum(weights)
    return np.searchsorted(cumulative, rng.random(n) * cumulative[-1], "right")


def delays(rng: np.random.Generator, n: int) -> np.ndarray:
    """n times of an hour to LATEST, in microseconds: an hour or two as likely as a day or two."""
    return (3_600 * SECOND * LATEST ** rng.random(n)).astype(np.int64)


def intercept(logit_B: np.ndarray, rate: float) -> float:
    """What must be added to the logits for a mean probability of `rate`, by Newton's steps on the mean's logit."""
    found, goal = 0.0, np.log(rate / (1 - rate))
    for _ in range(8):
        p_B = 1 / (1 + np.exp(-logit_B - found))
        mean = p_B.mean()
        found += (goal - np.log(mean / (1 - mean))) * mean * (1 - mean) / (p_B * (1 - p_B)).mean()
    return float(found)
