"""Which days train, which validate, which test: whole days, the newest last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """valid_share, test_share   the fewest whole days, counted from the end, that hold this share of the rows"""

    valid_share: float
    test_share: float

    def __post_init__(self) -> None:
        for name in ("valid_share", "test_share"):
            if not 0 < getattr(self, name) < 0.5:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share of the rows in (0, 0.5)")


def rows_by_day(events: pa.Table) -> dict[str, int]:
    """UTC day -> impressions, in order of days."""
    counts = pc.value_counts(pc.strftime(events["timestamp"], format="%Y-%m-%d").combine_chunks())
    return dict(sorted(zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True)))


class Split(NamedTuple):
    """First row of the valid days and of the test days, in rows ordered by day; and those two days."""

    valid_start: int
    test_start: int
    valid_day: str
    test_day: str


def split_days(days: Sequence[str], rows: Sequence[int], config: SplitConfig) -> Split:
    """`rows[i]` impressions on `days[i]`, in order. Raises ValueError where fewer than three days are left."""
    test = _fewest_last(rows, len(days), config.test_share)
    valid = _fewest_last(rows, test, config.valid_share)
    if not 0 < valid < test:
        raise ValueError(
            f"split: {len(days)} days ({days[0]}..{days[-1]}) cannot be split into train, valid and test by days "
            f"with shares {config.valid_share} and {config.test_share}; give more days or smaller shares"
        )
    return Split(sum(rows[:valid]), sum(rows[:test]), days[valid], days[test])


def _fewest_last(rows: Sequence[int], stop: int, share: float) -> int:
    """The largest start for which days[start:stop] hold the share of all rows; 0 where none does."""
    wanted, held = share * sum(rows), 0
    for start in range(stop - 1, -1, -1):
        held += rows[start]
        if held >= wanted:
            return start
    return 0
