"""A split that the source gives is kept, or refused by name."""

from __future__ import annotations

import pyarrow as pa
import pytest

from components.common.splits import SplitConfig, split_rows
from components.data.sources import timeless

CONFIG = SplitConfig(valid_share=0.1, test_share=0.1)


def events(*parts: str | None) -> pa.Table:
    return pa.table({"timestamp": timeless(len(parts)), "split": pa.array(parts, pa.string())})


def test_the_given_rows() -> None:
    table = events(*["train"] * 5, "valid", "valid", "test")
    cut = split_rows(table, CONFIG)
    assert cut.ranges(8) == {"train": (0, 5), "valid": (5, 7), "test": (7, 8)}
    assert (cut.valid_day, cut.test_day) == ("2000-01-01", "2000-01-01")


def test_without_test_rows_valid_is_judged() -> None:
    assert split_rows(events("train", "train", "valid"), CONFIG).ranges(3) == {
        "train": (0, 2), "valid": (2, 3), "test": (2, 3),
    }  # fmt: skip


@pytest.mark.parametrize(
    "parts", [("train", "test"), ("valid", "test"), ("train", "valid", "dev"), ("train", None, "valid")]
)
def test_other_parts(parts: tuple[str | None, ...]) -> None:
    with pytest.raises(ValueError, match=r"split column holds \[.*\]; give train, valid and, where"):
        split_rows(events(*parts), CONFIG)


@pytest.mark.parametrize("parts", [("valid", "train"), ("train", "test", "valid"), ("train", "valid", "train")])
def test_a_split_that_does_not_follow_time(parts: tuple[str, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"the given split does not follow time.*Leave out the split column; or leave out the ti"
    ):
        split_rows(events(*parts), CONFIG)


def test_whole_days_where_none_is_given() -> None:
    table = pa.table({"timestamp": pa.array(range(10)).cast(pa.timestamp("s", tz="UTC"))})
    later = pa.array([day * 86_400 for day in (0, 0, 0, 0, 1, 1, 2, 2, 2, 3)]).cast(pa.timestamp("s", tz="UTC"))
    with pytest.raises(ValueError, match="1 days"):
        split_rows(table, CONFIG)
    cut = split_rows(pa.table({"timestamp": later}), CONFIG)
    assert cut.ranges(10) == {"train": (0, 6), "valid": (6, 9), "test": (9, 10)}
