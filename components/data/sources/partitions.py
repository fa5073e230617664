"""The day that a file's path tells, and which files a window needs.

    day=2026-01-11/   dt=, ds= and date= too      hive's keys; also year=2026/month=1/day=11/
    clicks-2026-01-11.csv   clicks_20260111.csv   2026/01/11/part-0.parquet

Only what a glob stands for can tell a day: the path from its first folder with a `*` on. A file that is named without a
glob is always read, as is one whose path tells no day, or more than one.

The days are UTC days, and of two kinds: a file holds the rows that happened on its day, or those that arrived on it.
One rule is right for both. A file of a day that begins at `until` or later holds nothing that is known before `until`,
and a file of a day that ended before `since` holds nothing that happened after it. So neither is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta

from components.data.sources import Window

KEYS = re.compile(r"(?:^|/)(?:day|dt|ds|date)=(\d{4})[-_]?(\d\d)[-_]?(\d\d)(?=/)")
THREE_KEYS = re.compile(r"(?:^|/)year=(\d{4})/month=(\d\d?)/day=(\d\d?)(?=/)")
NAMES = re.compile(r"(?<![0-9A-Za-z])(\d{4})(?:[-_/]?)(\d\d)(?:[-_/]?)(\d\d)(?!\d)")


def day_of(path: str, pattern: str) -> date | None:
    """The day that a file's path tells, of a file that was found by this glob."""
    parts = pattern.split("/")
    glob = next((at for at, part in enumerate(parts) if set("*?[") & set(part)), len(parts))
    told = "/".join(path.split("/")[glob:])
    for form in (KEYS, THREE_KEYS, NAMES):
        if days := set(_days(form.findall(told))):
            return days.pop() if len(days) == 1 else None
    return None


def _days(found: Iterable[tuple[str, ...]]) -> Iterable[date]:
    for year, month, day in found:
        try:
            yield date(int(year), int(month), int(day))
        except ValueError:  # digits that are no day, such as 20260231
            continue


def is_needed(day: date | None, window: Window) -> bool:
    """Whether a file of this day may hold rows of the window."""
    if day is None:
        return True
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    begins_later = window.until is not None and start >= window.until
    ends_before = window.since is not None and start + timedelta(days=1) <= window.since
    return not (begins_later or ends_before)
