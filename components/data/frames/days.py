"""The newest days compared with the days before them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import pandas as pd
import pyarrow as pa

from components.common.contracts import ARRIVAL, HISTORY, Canonical
from components.data.frames.rows import features, partition_days
from components.data.thresholds import CHANCE, DAYS, FLOORS, SIGMA, WEEK, WEEKS, ValidateConfig

DAY = np.timedelta64(1, "D")
HOUR = np.timedelta64(1, "h")
BUCKETS = 4096  # counters of one feature's values; a feature with more values shares them


@dataclass(frozen=True)
class Recent:
    """The judged days and those that they are compared with. Shapes: D days, R rows of these days."""

    days: np.ndarray  # datetime64[D], every day of the calendar
    judged_D: np.ndarray  # bool: among the newest, and the days before it have enough rows
    enough_D: np.ndarray  # bool: among the newest, and it has enough rows
    rows_D: np.ndarray
    usual_D: np.ndarray  # median rows of the days before
    events: pa.Table  # of the days
    day_R: np.ndarray  # index into days
    returns_R: np.ndarray  # bool: the user has an event on an earlier day
    repeats_R: np.ndarray  # bool: an earlier event has the user, the item and the time of day

    def count(self, which_R: np.ndarray) -> np.ndarray:
        """How many rows of each day are marked: float64 [D]."""
        return np.bincount(self.day_R, weights=which_R, minlength=len(self.days))

    def table(self, code_R: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """How often each day has each code: float64 [D, codes]. Negative codes (missing) do not count."""
        code_R = np.where(code_R < 0, -1, code_R % BUCKETS)
        wide, has = int(code_R.max(initial=0)) + 1, code_R >= 0
        cell = self.day_R[has] * wide + code_R[has]
        found = np.bincount(cell, None if weights is None else weights[has], minlength=len(self.days) * wide)
        return found.reshape(len(self.days), wide).astype(np.float64)


def recent_days(data: Canonical, config: ValidateConfig, until: datetime | None) -> Recent:
    """The newest `trailing_days` complete days of the calendar, and the earlier days that show what is usual.

    If a source gives its own histories, its timestamps are only an order: all of its rows count as one day, with no day
    before it.
    """
    events, day, last = data.events(), partition_days(data), last_day(data, config, until)
    if HISTORY[0] in events.column_names:
        day = np.full(len(day), last)
    before = max(config.trailing_days, WEEK * WEEKS)
    first = min(last, max(day.min(), last - (config.trailing_days + before - 1) * DAY))
    days = np.arange(first, last + DAY)
    user = pd.factorize(events["user_id"].to_numpy())[0]
    start = np.flatnonzero(np.diff(np.maximum.accumulate(user), prepend=-1))  # events are in time order
    time = events["timestamp"].cast(pa.int64()).fill_null(0).to_numpy()
    key = {"user": user, "item": events["item_id"].to_numpy(), "time": time % (86_400 * 1_000_000)}
    recent = (day >= first) & (day <= last)
    day_R = ((day[recent] - first) // DAY).astype(np.int64)
    rows_D = np.bincount(day_R, minlength=len(days))
    usual_D = _before(rows_D.astype(float), config.trailing_days)[0]
    newest = np.arange(len(days)) >= len(days) - config.trailing_days
    return Recent(
        days=days,
        judged_D=newest & (usual_D >= config.min_day_rows),
        enough_D=newest & (rows_D >= config.min_day_rows),
        rows_D=rows_D,
        usual_D=usual_D,
        events=events.filter(pa.array(recent)),
        day_R=day_R,
        returns_R=(day[start[user]] < day)[recent],
        repeats_R=pd.DataFrame(key).duplicated().to_numpy()[recent],
    )


def last_day(data: Canonical, config: ValidateConfig, until: datetime | None) -> np.datetime64:
    """The newest day that is complete at `until`, even if it is empty. If `until` is None, the newest day with events,
    or the day before where its events end much earlier than those of other days: no clock says whether it is over.

    A day that is not complete has fewer rows and other hours, so it is not judged.
    """
    if until is not None:
        return np.datetime64(until.replace(tzinfo=None), "D") - DAY
    newest = np.array(data.days(), dtype="datetime64[D]")[-1]
    before = newest - (config.trailing_days + WEEK * WEEKS) * DAY
    return newest - DAY * bool(ends_early(data.events(str(before))["timestamp"], newest, config))


def day_frame(recent: Recent, config: ValidateConfig) -> pd.DataFrame:
    """One row for each of the newest `trailing_days` days: its rows and its share of clicks."""
    clicks = recent.count(recent.events["label"].fill_null(0).to_numpy())
    with np.errstate(invalid="ignore"):
        rate = clicks / recent.rows_D
    frame = pd.DataFrame({"day": recent.days, "rows": recent.rows_D, "usual_rows": recent.usual_D})
    frame["rows_if_judged"] = frame["rows"].where(recent.judged_D)
    frame["label_rate"] = np.where(recent.enough_D, rate, np.nan)
    return frame.tail(config.trailing_days).reset_index(drop=True)


def figure_frame(recent: Recent, data: Canonical, config: ValidateConfig) -> pd.DataFrame:
    """One row a judged day and figure: its `value`, the `usual` value, the difference that is `allowed`, and `off`, the
    difference divided by the allowed one. The rules judge `off`.

    The usual value is the median of the days before, or that of the same weekday in the weeks before, whichever is
    nearer: weekends differ from weekdays.
    """
    tables = []
    for figure, of, value_D, chance_D in _figures(recent, data, config.trailing_days):
        table = {"day": recent.days, "figure": figure, "of": of, **beside(figure, value_D, chance_D, config)}
        tables.append(pd.DataFrame(table)[recent.judged_D])
    return pd.concat(tables, ignore_index=True)


def beside(figure: str, value_D: np.ndarray, chance_D: np.ndarray, config: ValidateConfig) -> dict[str, np.ndarray]:
    """`value`, `usual`, `allowed` and `off` of a figure on each day; NaN if too few days before it have a value."""
    before = (_before(value_D, config.trailing_days), _before(value_D, WEEKS, WEEK))
    usual_BD, spread_BD = map(np.stack, zip(*before, strict=True))
    allowed_BD = FLOORS[figure] + config.spreads * SIGMA * spread_BD + CHANCE * chance_D
    off_BD = (value_D - usual_BD) / allowed_BD
    weekly_D = np.abs(off_BD[1]) < np.abs(off_BD[0])  # False if there are too few weeks
    found = {"usual": usual_BD, "allowed": allowed_BD, "off": off_BD}
    return {"value": value_D} | {name: np.where(weekly_D, weeks_D, days_D) for name, (days_D, weeks_D) in found.items()}


def newest_frame(recent: Recent, data: Canonical, config: ValidateConfig) -> pd.DataFrame:
    """One row: the newest day, and whether it `is_whole`. `why` says what is missing.

    A day without a row is missing. A day with far fewer rows than usual, or whose events end much earlier than usual,
    came in part. No row where the data begin later.
    """
    day, rows = recent.days[-1], int(recent.rows_D[-1])
    if str(day) < data.days()[0]:
        return pd.DataFrame({"day": [], "rows": [], "usual_rows": [], "is_whole": [], "why": []})
    why = "" if rows else "no event"
    if rows and recent.judged_D[-1]:
        rows_D = np.where(recent.rows_D, recent.rows_D, np.nan).astype(float)
        if beside("volume", np.log(rows_D), rows_D**-0.5, config)["off"][-1] < -1:
            why = f"{rows:,} rows, usually {recent.usual_D[-1]:,.0f}"
        else:
            why = ends_early(recent.events["timestamp"], day, config)
    found = {"day": day, "rows": rows, "usual_rows": recent.usual_D[-1], "is_whole": not why, "why": why}
    return pd.DataFrame([found])


def ends_early(times: pa.ChunkedArray, day: np.datetime64, config: ValidateConfig) -> str:
    """How much earlier than usual the events of a day end, or "" where they end about when they usually do."""
    time = times.drop_null().to_numpy().astype("datetime64[us]")
    day_R = time.astype("datetime64[D]")
    days = np.arange(day_R.min(), day + DAY)
    gap_D, rows_D = np.full(len(days), np.nan), np.full(len(days), np.nan)
    for at, one in enumerate(days):
        if len(own := time[day_R == one]):
            gap_D[at], rows_D[at] = (one + DAY - own.max()) / HOUR, len(own)
    found = beside("ends_early", gap_D, 24 / rows_D, config)
    if not found["off"][-1] > 1:
        return ""
    return f"its last event is {gap_D[-1]:.1f} hours before midnight, usually {found['usual'][-1]:.1f}"


def _figures(recent: Recent, data: Canonical, width: int) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """(figure, its column or "", its values [D], their standard deviations by the number of rows alone [D])."""
    events, rows_D = recent.events, np.where(recent.rows_D, recent.rows_D, np.nan).astype(float)
    clicks_D = recent.count(events["label"].fill_null(0).to_numpy())
    odds_D = (clicks_D + 0.5) / (rows_D - clicks_D + 0.5)
    rate = (clicks_D.sum() + 0.5) / (np.nansum(rows_D) + 1)
    yield "volume", "", np.log(rows_D), rows_D**-0.5
    yield "label_rate", "", np.log(odds_D), (rows_D * rate * (1 - rate)) ** -0.5
    time_R = events["timestamp"].cast(pa.int64()).fill_null(0).to_numpy()
    hours_D = recent.table(time_R // 3_600_000_000 % 24)
    item_R = pd.factorize(events["item_id"].to_numpy())[0]
    user_R = pd.factorize(events["user_id"].to_numpy())[0]
    shares = {
        "repeated": recent.count(recent.repeats_R) / rows_D,
        "returning": recent.count(recent.returns_R) / rows_D,
        "top_user": recent.table(user_R).max(axis=1) / rows_D,
        "top_item": recent.table(item_R).max(axis=1) / rows_D,
    }
    if ARRIVAL in events.column_names:
        arrival_R = events[ARRIVAL].fill_null(0).to_numpy().astype("datetime64[D]")
        shares["late"] = recent.count(arrival_R > recent.days[recent.day_R] + DAY) / rows_D
    for figure, share_D in shares.items():
        yield figure, "", share_D, (share_D * (1 - share_D) / rows_D) ** 0.5
    yield "hours", "", _distance(hours_D, width), 0 * rows_D
    for name, code_R in features(events, data):
        missing_D = recent.count(code_R < 0) / rows_D
        yield "missing", name, missing_D, (missing_D * (1 - missing_D) / rows_D) ** 0.5
        yield "mix", name, _distance(recent.table(code_R), width), 0 * rows_D


def _before(value_D: np.ndarray, width: int, step: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Median and median absolute deviation of the `width` days before each day, `step` days apart; NaN if fewer than
    `DAYS` of them have a value."""
    padded = np.concatenate([np.full(step * width, np.nan), value_D[:-1]])
    before_DW = np.lib.stride_tricks.sliding_window_view(padded, step * width)[:, ::step]
    enough = np.isfinite(before_DW).sum(axis=1) >= min(DAYS, width)
    median, spread = np.full((2, len(value_D)), np.nan)
    median[enough] = np.nanmedian(before_DW[enough], axis=1)
    spread[enough] = np.nanmedian(np.abs(before_DW[enough] - median[enough, None]), axis=1)
    return median, spread


def _distance(count_DV: np.ndarray, width: int) -> np.ndarray:
    """Total variation (0 to 1) between a day's distribution and that of the `width` days before it together."""
    total_DV = np.cumsum(count_DV, axis=0)
    before_DV = total_DV - count_DV
    before_DV[width + 1 :] -= total_DV[: -width - 1]
    with np.errstate(invalid="ignore"):
        now_DV, then_DV = (c / c.sum(axis=1, keepdims=True) for c in (count_DV, before_DV))
    return 0.5 * np.abs(now_DV - then_DV).sum(axis=1)
