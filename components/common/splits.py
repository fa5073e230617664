"""Which rows train, which validate, which test: whole days, the newest last, unless the source gives the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.common.contracts import SPLIT

NAMES = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """valid_share, test_share   the valid and test days are the fewest last whole days that hold this share
    of the rows"""

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
    """The first row and the first day of the valid days and of the test days. Rows are ordered by day.

    Where a source gives no test rows, models are judged on the valid rows, and test_start is valid_start.
    """

    valid_start: int
    test_start: int
    valid_day: str
    test_day: str

    def ranges(self, rows: int) -> dict[str, tuple[int, int]]:
        """train, valid and test as ranges of `rows` rows."""
        valid_end = self.test_start if self.test_start > self.valid_start else rows
        bounds = ((0, self.valid_start), (self.valid_start, valid_end), (self.test_start, rows))
        return dict(zip(NAMES, bounds, strict=True))


def split_rows(events: pa.Table, config: SplitConfig) -> Split:
    """The split of events in time order. Raises ValueError where they cannot be split, or are given out of order."""
    if SPLIT not in events.column_names:
        rows = rows_by_day(events)
        return split_days(list(rows), list(rows.values()), config)
    rank = pc.index_in(events[SPLIT], value_set=pa.array(NAMES)).fill_null(-1).to_numpy()
    train, valid, test = (int((rank == i).sum()) for i in range(3))
    if train + valid + test < len(rank) or not train or not valid:
        found = sorted(map(str, pc.unique(events[SPLIT]).to_pylist()))
        raise ValueError(
            f"split: the source's split column holds {found}; give train, valid and, where there are test rows, test"
        )
    if (np.diff(rank) < 0).any():
        raise ValueError(
            "split: the given split does not follow time, so training would know later days. Leave out the split "
            "column; or leave out the timestamps: then the split is kept, without histories and popularity"
        )
    starts = (train, train + valid if test else train)
    return Split(*starts, *(f"{events['timestamp'][row].as_py():%Y-%m-%d}" for row in starts))


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
