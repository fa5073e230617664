"""What the rules judge: the canonical tables, and what no single row tells, made rows and columns.

`event_frame`, `item_frame`, `vector_frame` have a row a row of their table; `day_frame` a row a day; `figure_frame` a
row a figure of a day beside the same figure of earlier days; `column_frame` a row a feature; `cohort_frame` a row a
figure of the newest items' vectors beside those of the items before them; `quarantine_frame` a row a reason for which
ingest left rows out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC as ZONE
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.common.contracts import ARRIVAL, EVENTS, HISTORY, ITEMS, ORACLE, USERS, Canonical, attributes

if TYPE_CHECKING:
    from components.data.validate import ValidateConfig

DAY = np.timedelta64(1, "D")
CHUNK = 8192  # vectors whose values are in memory as float64 at a time
SAMPLE = 20_000  # vectors that a cohort is measured by
FEWEST = 30  # items that make a cohort
DAYS = 3  # before a day, that can tell what is usual
WEEK, WEEKS = 7, 4  # days, and the weeks whose same weekday can tell it too
BUCKETS = 4096  # values of a feature that are counted apart; beyond it they share counts

# The UTF-8 bytes of a letter or a dash read as Latin-1 or Windows-1252, and the sign for what could not be read.
MOJIBAKE = "[ÂÃ][\u0080-\u00bfŒœŠšŸŽžƒˆ˜–—‘’‚“”„†‡•…‰‹›€™]|â[\u0080€][\u0080-\u00bf™œž“”˜¦¢]|\ufffd"

# How far a figure may lie from what is usual before the days' own spread is counted. The shares and the direction are
# differences, volume and norms differences of logarithms (log 2: twice or half), the label rate one of log-odds.
FLOORS = {
    "volume": np.log(2),
    "label_rate": 0.5,
    "repeated": 0.01,
    "hours": 0.15,
    "returning": 0.25,
    "top_user": 0.05,
    "top_item": 0.1,
    "late": 0.05,
    "missing": 0.1,
    "mix": 0.2,
    "no_vector": 0.2,
    "one_norm": np.log(4),
    "norm": 0.4,
    "direction": 0.1,
    "directions": 0.1,
}
SIGMA = 1.4826  # standard deviations in a median absolute deviation of a normal distribution
CHANCE = 4.0  # standard deviations of what a day's number of rows does to a figure


# ---- a row a row ------------------------------------------------------------------------------------------------


def event_frame(data: Canonical) -> pd.DataFrame:
    """One row an event, with the columns that say whether its item, user, day and times are right."""
    events, items = data.events(), data.items()
    own = [name for name in (*EVENTS.names, ORACLE) if name in events.column_names]
    frame = events.select(own).to_pandas()
    if ORACLE in own:  # of float32 Great Expectations judges one value at a time
        frame[ORACLE] = frame[ORACLE].astype(np.float64)
    row = pc.index_in(events["item_id"], value_set=items["item_id"].combine_chunks(), skip_nulls=True)
    created = items["created_at"].take(row.combine_chunks())
    frame["item_is_known"] = pc.is_valid(row).to_numpy()
    frame["item_exists"] = pc.greater_equal(events["timestamp"], created).fill_null(True).to_numpy()
    frame["user_is_known"] = _is_in(events["user_id"], data.users()["user_id"])
    frame["is_in_its_day"] = events["timestamp"].to_numpy().astype("datetime64[D]") == _partition_days(data)
    frame["is_first"] = ~frame.duplicated(["user_id", "item_id", "timestamp"])
    if ARRIVAL in events.column_names:
        happened = pc.less_equal(events["timestamp"], events[ARRIVAL])
        frame["happened_before_arrival"] = happened.fill_null(True).to_numpy()
    return frame


def item_frame(data: Canonical) -> pd.DataFrame:
    items = data.items()
    frame = items.select(["item_id", "created_at", "title"]).to_pandas()
    frame["is_readable"] = True
    for name in ("title", "text", *attributes(items, ITEMS)):
        frame["is_readable"] &= ~pc.match_substring_regex(items[name], MOJIBAKE).fill_null(False).to_numpy()
    return frame


def vector_frame(table: pa.Table, items: pa.ChunkedArray, spreads: float) -> pd.DataFrame:
    """One row a vector that is there: its length, finiteness and norm, and how far `off` the median of all norms this
    one lies, as in `figure_frame`; none for a vector of zeros."""
    table = there(table)
    vectors = table["vector"].combine_chunks()
    lengths = pc.list_value_length(vectors).to_numpy(zero_copy_only=False)
    flat = vectors.flatten().to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths, dtype=np.int64)
    filled = np.flatnonzero(lengths)
    bad, squares = np.zeros(len(vectors), dtype=np.int64), np.zeros(len(vectors))
    for at in range(0, len(filled), CHUNK):
        rows = filled[at : at + CHUNK]
        starts = ends[rows] - lengths[rows]
        values = flat[starts[0] : ends[rows[-1]]].astype(np.float64)
        finite = np.isfinite(values)
        bad[rows] = np.add.reduceat(~finite, starts - starts[0], dtype=np.int64)
        values[~finite] = 0
        squares[rows] = np.add.reduceat(values * values, starts - starts[0])
    usual = np.bincount(lengths).argmax() if len(lengths) else 0
    norm = pd.Series(np.sqrt(squares))
    log = pd.Series(np.log(norm.where(norm > 0)))
    away = log - log.median()
    return pd.DataFrame(
        {
            "item_id": table["item_id"].to_numpy(),
            "item_is_known": _is_in(table["item_id"], items),
            "length": lengths,
            "is_usual_length": (lengths == usual) & (lengths > 0),
            "non_finite_values": bad,
            "norm": norm,
            "off": away / (FLOORS["one_norm"] + spreads * SIGMA * away.abs().median()),
        }
    )


def quarantine_frame(root: Path, broken: dict[str, int], known: int) -> pd.DataFrame:
    """One row a reason for which ingest found rows broken: how many, their share of the known rows, and one of them."""
    rows = []
    for file in sorted((root / "quarantine").glob("*.parquet")):
        first = next(pq.ParquetFile(file).iter_batches(1)).to_pylist()[0]
        if (reason := first.pop("reason")) in broken:
            example = str({name: str(value) for name, value in first.items()})
            rows.append({"reason": reason, "rows": broken[reason], "share": broken[reason] / known, "example": example})
    return pd.DataFrame(rows, columns=["reason", "rows", "share", "example"])


# ---- a day beside earlier days ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recent:
    """The days that are judged and those that they are beside; shapes: D days, R rows of theirs."""

    days: np.ndarray  # datetime64[D], every day of the calendar
    judged_D: np.ndarray  # bool: among the newest, and days with enough rows before it
    enough_D: np.ndarray  # bool: among the newest, and with enough rows of its own
    rows_D: np.ndarray
    usual_D: np.ndarray  # median rows of the days before
    events: pa.Table  # of the days
    day_R: np.ndarray  # index into days
    returns_R: np.ndarray  # bool: the user has an event on an earlier day
    repeats_R: np.ndarray  # bool: an earlier event has the user, the item and the time of day

    def count(self, which_R: np.ndarray) -> np.ndarray:
        """How many rows of a day are marked: int64 [D]."""
        return np.bincount(self.day_R, weights=which_R, minlength=len(self.days))

    def table(self, code_R: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """How often a day has a code: float64 [D, codes]; a negative code is none."""
        code_R = np.where(code_R < 0, -1, code_R % BUCKETS)
        wide, has = int(code_R.max(initial=0)) + 1, code_R >= 0
        cell = self.day_R[has] * wide + code_R[has]
        found = np.bincount(cell, None if weights is None else weights[has], minlength=len(self.days) * wide)
        return found.reshape(len(self.days), wide).astype(np.float64)


def recent_days(data: Canonical, config: ValidateConfig, until: datetime | None) -> Recent:
    """The newest `trailing_days` days of the calendar that are over, and those that tell what is usual on them.

    The times of a source that gives its histories are an order and no more: all of its rows are one day, with none
    before it.
    """
    events, day, last = data.events(), _partition_days(data), last_day(data, until)
    if HISTORY[0] in events.column_names:
        day = np.full(len(day), last)
    before = max(config.trailing_days, WEEK * WEEKS)
    first = min(last, max(day.min(), last - (config.trailing_days + before - 1) * DAY))
    days = np.arange(first, last + DAY)
    user = pd.factorize(events["user_id"].to_numpy())[0]
    start = np.flatnonzero(np.diff(np.maximum.accumulate(user), prepend=-1))  # events lie in time order
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


def last_day(data: Canonical, until: datetime | None) -> np.datetime64:
    """The newest day that is over at `until`, be it empty; where that is null, the newest with events that is over now.

    A part of a day has neither the rows nor the hours of a day.
    """
    over = np.datetime64((until or datetime.now(ZONE)).replace(tzinfo=None), "D") - DAY
    return over if until else min([over, *np.array(data.days()[-1:], dtype="datetime64[D]")])


def day_frame(recent: Recent, config: ValidateConfig) -> pd.DataFrame:
    """The newest `trailing_days` days: rows, clicked share."""
    clicks = recent.count(recent.events["label"].fill_null(0).to_numpy())
    with np.errstate(invalid="ignore"):
        rate = clicks / recent.rows_D
    frame = pd.DataFrame({"day": recent.days, "rows": recent.rows_D, "usual_rows": recent.usual_D})
    frame["rows_if_judged"] = frame["rows"].where(recent.judged_D)
    frame["label_rate"] = np.where(recent.enough_D, rate, np.nan)
    return frame.tail(config.trailing_days).reset_index(drop=True)


def figure_frame(recent: Recent, data: Canonical, config: ValidateConfig) -> pd.DataFrame:
    """One row a judged day and figure: `value`, what is `usual`, how far it is `allowed` to lie from it, and `off`, its
    distance in units of that. The last is what the rules judge.

    Usual is the median of the days before or, where the day is nearer to it, that of the same weekday in the weeks
    before: a week has its rhythm.
    """
    tables = []
    for figure, of, value_D, chance_D in _figures(recent, data, config.trailing_days):
        beside = (_before(value_D, config.trailing_days), _before(value_D, WEEKS, WEEK))
        usual_BD, spread_BD = map(np.stack, zip(*beside, strict=True))
        allowed_BD = FLOORS[figure] + config.spreads * SIGMA * spread_BD + CHANCE * chance_D
        off_BD = (value_D - usual_BD) / allowed_BD
        weekly_D = np.abs(off_BD[1]) < np.abs(off_BD[0])  # False where too few weeks are there
        told = {"day": recent.days, "figure": figure, "of": of, "value": value_D}
        for name, (days_D, weeks_D) in {"usual": usual_BD, "allowed": allowed_BD, "off": off_BD}.items():
            told[name] = np.where(weekly_D, weeks_D, days_D)
        tables.append(pd.DataFrame(told)[recent.judged_D])
    return pd.concat(tables, ignore_index=True)


def _figures(recent: Recent, data: Canonical, width: int) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """(figure, the column that it is of, its value [D], a standard deviation that its number of rows gives it [D])."""
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


def column_frame(recent: Recent, data: Canonical) -> pd.DataFrame:
    """One row a feature: its `values`, and how well it alone `tells_label` on the day where it does so best, of those
    with enough rows: Cramér's V, 0 to 1, less what its number of values gives it by chance (Bergsma 2013)."""
    label_R = recent.events["label"].fill_null(0).to_numpy().astype(float)
    found = []
    for name, code_R in features(recent.events, data):
        code_R = code_R + 1  # a missing value can tell it too
        rows_DV, clicks_DV = recent.table(code_R), recent.table(code_R, label_R)
        n_D, values_D = rows_DV.sum(axis=1), (rows_DV > 0).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            rate_D1 = clicks_DV.sum(axis=1, keepdims=True) / n_D[:, None]
            parts_DV = np.nan_to_num((clicks_DV - rows_DV * rate_D1) ** 2 / rows_DV)
            phi_D = parts_DV.sum(axis=1) / (n_D * (rate_D1 * (1 - rate_D1))[:, 0]) - (values_D - 1) / (n_D - 1)
            freedom_D = np.minimum(values_D - 1 - (values_D - 1) ** 2 / (n_D - 1), 1 - 1 / (n_D - 1))
            told_D = np.where(freedom_D > 1e-9, np.clip(phi_D, 0, None) / freedom_D, 0.0)
        told_D = np.nan_to_num(told_D[recent.enough_D])
        found.append({"column": name, "values": int((rows_DV.sum(axis=0) > 0).sum()),
                      "tells_label": float(min(told_D.max(initial=0.0), 1.0) ** 0.5)})  # fmt: skip
    return pd.DataFrame(found, columns=["column", "values", "tells_label"])


def features(events: pa.Table, data: Canonical) -> Iterator[tuple[str, np.ndarray]]:
    """(name, one code an event, -1 where the value is missing) for contexts and attributes of users and items."""
    owners = ((events, EVENTS, None), (data.users(), USERS, "user_id"), (data.items(), ITEMS, "item_id"))
    for table, schema, key in owners:
        for name in attributes(table, schema):
            codes = table[name].combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy()
            if key is not None:
                row = pc.index_in(events[key], value_set=table[key].combine_chunks()).fill_null(-1).to_numpy()
                codes = np.where(row < 0, -1, codes[row])
            yield name, codes


def _before(value_D: np.ndarray, width: int, step: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Median, and median absolute deviation, of `width` days before each day, `step` days apart; NaN where fewer than
    `DAYS` have a value."""
    padded = np.concatenate([np.full(step * width, np.nan), value_D[:-1]])
    before_DW = np.lib.stride_tricks.sliding_window_view(padded, step * width)[:, ::step]
    tells = np.isfinite(before_DW).sum(axis=1) >= min(DAYS, width)
    median, spread = np.full((2, len(value_D)), np.nan)
    median[tells] = np.nanmedian(before_DW[tells], axis=1)
    spread[tells] = np.nanmedian(np.abs(before_DW[tells] - median[tells, None]), axis=1)
    return median, spread


def _distance(count_DV: np.ndarray, width: int) -> np.ndarray:
    """Total variation (0 to 1) between a day's distribution and that of the `width` days before it together."""
    total_DV = np.cumsum(count_DV, axis=0)
    before_DV = total_DV - count_DV
    before_DV[width + 1 :] -= total_DV[: -width - 1]
    with np.errstate(invalid="ignore"):
        now_DV, then_DV = (c / c.sum(axis=1, keepdims=True) for c in (count_DV, before_DV))
    return 0.5 * np.abs(now_DV - then_DV).sum(axis=1)


# ---- the newest items beside those before them ------------------------------------------------------------------


def cohort_frame(table: pa.Table, items: pa.Table, since: np.datetime64) -> pd.DataFrame:
    """Figures of the vectors of items created `since`, beside those of the items before: the share without a vector,
    the logarithm of the norm, the cosine to the mean direction of the items before, and the share of a vector's
    square that lies in the `directions` which hold 90% of theirs.

    No row where either cohort has fewer than 30 items. `off` as in `figure_frame`.
    """
    table = there(table)
    known = items.filter(pc.is_valid(items["created_at"])).group_by("item_id").aggregate([("created_at", "min")])
    is_new = known["created_at_min"].to_numpy() >= since
    has = _is_in(known["item_id"], table["item_id"])
    found: list[dict[str, Any]] = []

    def tell(figure: str, new: np.ndarray, old: np.ndarray) -> None:
        if min(len(new), len(old)) >= FEWEST:
            allowed = FLOORS[figure] + CHANCE * float(old.std()) * (1 / len(new) + 1 / len(old)) ** 0.5
            value, usual = float(new.mean()), float(old.mean())
            found.append({"figure": figure, "items": len(new), "value": value, "usual": usual, "allowed": allowed,
                          "off": (value - usual) / allowed})  # fmt: skip

    tell("no_vector", (~has[is_new]).astype(float), (~has[~is_new]).astype(float))
    (new_ND, new_norm), (old_ND, old_norm) = (
        _unit_vectors(table, _is_in(table["item_id"], known["item_id"].filter(pa.array(cohort))))
        for cohort in (is_new, ~is_new)
    )
    tell("norm", np.log(new_norm), np.log(old_norm))
    if len(old_ND) and new_ND.shape[1] == old_ND.shape[1]:
        mean_D = old_ND.mean(axis=0)
        mean_D = mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)
        tell("direction", new_ND @ mean_D, old_ND @ mean_D)
        energy_D, axes_DD = np.linalg.eigh(old_ND.T @ old_ND)
        held_D = np.cumsum(energy_D[::-1]) / energy_D.sum()
        axes_DK = axes_DD[:, ::-1][:, : int(np.searchsorted(held_D, 0.9)) + 1]
        tell("directions", *(((x_ND @ axes_DK) ** 2).sum(axis=1) for x_ND in (new_ND, old_ND)))
    return pd.DataFrame(found, columns=["figure", "items", "value", "usual", "allowed", "off"])


def coverage_frame(table: pa.Table, items: pa.ChunkedArray) -> pd.DataFrame:
    """One row: the share of items without a vector, and how `alike` the vectors are: the length of the mean of the unit
    vectors, 1 where all point in one direction."""
    table = there(table)
    unit_ND, _ = _unit_vectors(table, np.ones(len(table), dtype=bool))
    alike = float(np.linalg.norm(unit_ND.mean(axis=0))) if len(unit_ND) > 1 else np.nan
    missing = 1 - len(pc.unique(table["item_id"])) / max(len(items), 1)
    return pd.DataFrame({"missing_share": [missing], "alike": [alike]})


def there(table: pa.Table) -> pa.Table:
    """The rows that have a vector."""
    return table.filter(pc.is_valid(table["vector"])) if table["vector"].null_count else table


def _unit_vectors(table: pa.Table, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sample of the chosen vectors that have the usual length, are finite and not zero, as float32 [N, dim] of norm
    1; and their norms [N]. Vectors come by item_id: every k-th is a fair sample."""
    vectors = table["vector"].combine_chunks()
    lengths = pc.list_value_length(vectors).to_numpy(zero_copy_only=False)
    usual = int(np.bincount(lengths).argmax()) if len(lengths) else 0
    rows = np.flatnonzero(chosen & (lengths == usual))
    rows = rows[:: max(1, -(-len(rows) // SAMPLE))]
    x_ND = vectors.take(pa.array(rows)).flatten().to_numpy(zero_copy_only=False).reshape(len(rows), usual)
    norm_N = np.linalg.norm(x_ND, axis=1)
    whole = np.isfinite(norm_N) & (norm_N > 0)
    return x_ND[whole] / norm_N[whole, None], norm_N[whole]


# ---- both -------------------------------------------------------------------------------------------------------


def _is_in(column: pa.ChunkedArray, known: pa.ChunkedArray) -> np.ndarray:
    return pc.is_in(column, value_set=known.combine_chunks(), skip_nulls=True).to_numpy()


def _partition_days(data: Canonical) -> np.ndarray:
    """The day of the folder that each event lies in: datetime64[D]."""
    files = (data.root / "events" / f"day={day}" / "part-0.parquet" for day in data.days())
    rows = [pq.ParquetFile(file).metadata.num_rows for file in files]
    return np.array(data.days(), dtype="datetime64[D]").repeat(rows)
