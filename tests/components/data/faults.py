"""The fault corpus: what goes wrong with click data, planted one at a time, and the rule that must catch it.

A fault is planted before ingest in the tables that a source gives (`raw`), or after ingest in the canonical folder
(`folder`). `rule` is what must catch it, and `also` is what else it breaks. `stop ingest: …` and `stop read: …` are
errors of ingest and of a file that cannot be read, given by the start of their text. `quarantine …` names the reason.
All others name severity, table, and column or figure.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.common.contracts import ARRIVAL, TIMESTAMP, Canonical
from components.data import validate
from components.data.sources import RawTables, Window, simulator
from components.data.sources.simulator import EPOCH, World
from tests.components.small_world import SIMULATOR, VALIDATE, ingest_tables, with_column

DAYS, ROWS, HOUR = 14, 600, 3_600_000_000
FIRST = datetime(2024, 3, 1, tzinfo=UTC)
SIZES = {"users": 300, "items": 600, "impressions_per_day": ROWS, "text_dim": 24, "image_dim": 24}
CONFIG = replace(SIMULATOR, **SIZES, item_life=45, noise=0.3)
UNTIL = "2024-03-15T06:00:00+00:00"  # six hours after the last of the days
FUTURE = 4_070_908_800_000_000  # 2099
RULES = replace(VALIDATE, trailing_days=7, min_day_rows=200)

Raw = Callable[[RawTables], RawTables]
Folder = Callable[[Path], None]


@dataclass(frozen=True)
class Fault:
    name: str
    rule: str
    raw: Raw | None = None
    folder: Folder | None = None
    also: tuple[str, ...] = ()


def window(days: int) -> Window:
    """So many days from the first on."""
    return Window(since=FIRST, until=FIRST + timedelta(days=days))


@cache
def clean_tables() -> RawTables:
    """A simulated world whose events arrive an hour after they happen."""
    raw = simulator.read("", CONFIG, window(DAYS))
    time = raw.events["timestamp"]
    at = raw.events.column_names.index("device")
    events = raw.events.set_column(at, "device", raw.events["device"].cast(pa.string()))
    return replace(raw, events=events.append_column(ARRIVAL, pc.add(time, pa.scalar(HOUR, pa.duration("us")))))


class Corpus:
    """Plants faults and returns what validation finds. Only the tables that a fault changes are judged again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ingest_tables(clean_tables(), root / "clean", UNTIL)
        self.clean = self.suites(root / "clean")

    def suites(self, folder: Path) -> dict[str, Any]:
        facts = json.loads((folder / "source.json").read_text())
        return validate.suites(RULES, Canonical(folder), facts)

    def judge(self, tables: dict[str, Any]) -> set[str]:
        """What is broken, as `severity table.column`; a quarantine by its reasons."""
        verdicts = [v for v in validate.judge(tables, self.root / "docs") if not v["passed"]]
        reasons = {
            f"quarantine {e['reason']}" for v in verdicts if v["severity"] == "quarantine" for e in v["examples"]
        }
        return reasons | {f"{v['severity']} {v['table']}.{v['column']}" for v in verdicts if v["table"] != "quarantine"}

    def catch(self, fault: Fault) -> set[str]:
        folder = self.root / "planted"
        if folder.exists():
            shutil.rmtree(folder)
        try:
            if fault.raw:
                ingest_tables(fault.raw(clean_tables()), folder, UNTIL)
            else:
                shutil.copytree(self.root / "clean", folder)
        except ValueError as error:
            return {f"stop ingest: {error}"}
        if fault.folder:
            fault.folder(folder)
        try:
            found = self.suites(folder)
        except ValueError as error:
            return {f"stop read: {str(error).replace(f'{folder}/', '')}"}
        return self.judge({name: t for name, t in found.items() if not t[0].equals(self.clean[name][0])})


def said(rule: str, broken: set[str]) -> bool:
    """Whether a rule is among the broken ones. An error is recognised by the start of its text."""
    return any(one == rule or (": " in rule and one.startswith(rule)) for one in broken)


def table_of_faults(corpus: Corpus) -> list[tuple[str, str, str, bool]]:
    """For each fault: its name, rule, also, and whether exactly these rules caught it."""
    rows = []
    for fault in FAULTS:
        broken = corpus.catch(fault)
        rows.append((fault.name, fault.rule, ", ".join(fault.also), right(fault, broken)))
    return rows


def right(fault: Fault, broken: set[str]) -> bool:
    wanted = (fault.rule, *fault.also)
    return len(broken) == len(wanted) and all(said(rule, broken) for rule in wanted)


# ---- ways to plant ----------------------------------------------------------------------------------------------


def day_of(events: pa.Table) -> np.ndarray:
    day = events["timestamp"].to_numpy().astype("datetime64[D]")
    return (day - np.datetime64(FIRST.date())).astype(int)


def on(day: int, share: float = 1.0, seed: int = 0) -> Callable[[pa.Table], np.ndarray]:
    """Marks a share of a day's rows."""
    return lambda t: (day_of(t) == day) & (np.random.default_rng(seed).random(len(t)) < share)


def some(rows: int) -> Callable[[pa.Table], np.ndarray]:
    """Marks this many rows, spread over the table."""
    return lambda t: np.isin(np.arange(len(t)), np.linspace(5, len(t) - 1, rows).astype(int))


def put(table: pa.Table, column: str, mask: np.ndarray, values: Any) -> pa.Table:
    """The table with a column's marked rows replaced by one value, or by the values of an array of its length."""
    kind = table.schema.field(column).type
    new = pa.array(values, kind) if isinstance(values, list | np.ndarray) else pa.scalar(values, kind)
    return with_column(table, column, pc.if_else(pa.array(mask), new, table[column].combine_chunks()))


def events(change: Callable[[pa.Table], pa.Table]) -> Raw:
    return lambda raw: replace(raw, events=change(raw.events))


def cells(column: str, mask: Callable[[pa.Table], np.ndarray], values: Any) -> Raw:
    """Events whose marked rows have the value of a constant or of a function of the table."""
    return events(lambda t: put(t, column, mask(t), values(t) if callable(values) else values))


def users(change: Callable[[pa.Table], pa.Table]) -> Raw:
    return lambda raw: replace(raw, users=change(raw.users))


def items(change: Callable[[pa.Table], pa.Table]) -> Raw:
    return lambda raw: replace(raw, items=change(raw.items))


def vectors(name: str, change: Callable[[pa.Table], pa.Table]) -> Raw:
    return lambda raw: replace(raw, modalities=raw.modalities | {name: change(raw.modalities[name])})


def values(name: str, change: Callable[[list, np.ndarray], Any], rows: slice = slice(20, 23)) -> Raw:
    """A modality with the vectors of some rows changed one by one."""

    def spoil(table: pa.Table) -> pa.Table:
        found = table["vector"].to_pylist()
        for row in range(*rows.indices(len(found))):
            found[row] = list(change(found[row], np.random.default_rng(row)))
        return pa.table({"item_id": table["item_id"], "vector": pa.array(found, pa.list_(pa.float32()))})

    return vectors(name, spoil)


def is_new(raw: RawTables, table: pa.Table) -> np.ndarray:
    """Marks the vectors of items created in the judged days."""
    since = pa.scalar(np.datetime64(FIRST.date(), "us") + np.timedelta64(DAYS - 7, "D")).cast(TIMESTAMP)
    new = raw.items.filter(pc.greater_equal(raw.items["created_at"], since))["item_id"]
    return pc.is_in(table["item_id"], value_set=new.combine_chunks()).to_numpy()


def new_vectors(name: str, change: Callable[[np.ndarray, RawTables], np.ndarray]) -> Raw:
    """A modality with the new items' vectors replaced. `change` gets and returns all vectors [rows, dim]."""

    def spoil(raw: RawTables) -> RawTables:
        table = raw.modalities[name]
        x_ND = matrix(table)
        changed_ND = np.where(is_new(raw, table)[:, None], change(x_ND, raw), x_ND)
        return replace(raw, modalities=raw.modalities | {name: vector_table(table["item_id"], changed_ND)})

    return spoil


def matrix(table: pa.Table) -> np.ndarray:
    return np.array(table["vector"].to_pylist(), dtype=np.float32)


def vector_table(ids: Any, x_ND: np.ndarray) -> pa.Table:
    return pa.table({"item_id": ids, "vector": pa.array(x_ND.astype(np.float32).tolist(), pa.list_(pa.float32()))})


def other_modality(x_ND: np.ndarray, raw: RawTables) -> np.ndarray:
    """The text vectors of the images' items, in their order; an item without one gets another item's."""
    text = raw.modalities["text"]
    row = pc.index_in(raw.modalities["image"]["item_id"], value_set=text["item_id"].combine_chunks())
    return matrix(text)[row.fill_null(0).to_numpy()]


def drifted(x_ND: np.ndarray, raw: RawTables) -> np.ndarray:
    """Away from the mean of all, norms kept."""
    moved_ND = x_ND - 2 * x_ND.mean(axis=0)
    return moved_ND * np.linalg.norm(x_ND, axis=1, keepdims=True) / np.linalg.norm(moved_ND, axis=1, keepdims=True)


def another_encoder(x_ND: np.ndarray, raw: RawTables) -> np.ndarray:
    return x_ND @ np.linalg.qr(np.random.default_rng(1).normal(size=(x_ND.shape[1],) * 2))[0]


def rewrite(name: str, change: Callable[[pa.Table], pa.Table]) -> Folder:
    def spoil(folder: Path) -> None:
        pq.write_table(change(pq.ParquetFile(folder / name).read()), folder / name)

    return spoil


def part(day: int) -> str:
    return f"events/day={np.datetime64(FIRST.date()) + day}/part-0.parquet"


def cut(name: str, keep: float) -> Folder:
    """The file, cut short."""

    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return spoil


def shifted(hours: float, day: int, columns: tuple[str, ...] = ("timestamp",)) -> Raw:
    """A day's times moved."""

    def change(t: pa.Table) -> pa.Table:
        mask = on(day)(t)
        for column in columns:
            t = put(t, column, mask, t[column].cast(pa.int64()).to_numpy() + int(hours * HOUR))
        return t

    return events(change)


def spike(t: pa.Table) -> pa.Table:
    """Four more draws of the newest day."""
    newest = (FIRST - EPOCH).days + DAYS - 1
    day = World(CONFIG, range(newest, newest + 1)).day(newest, rows=4 * ROWS)
    day = day.append_column(ARRIVAL, day["timestamp"])
    return pa.concat_tables(
        [t, day.cast(pa.schema([t.schema.field(n) for n in day.column_names])).select(t.column_names)]
    )


def yesterday_again(t: pa.Table) -> pa.Table:
    """The newest day has the rows of the day before it, with its own date."""
    copy = t.filter(pa.array(on(DAYS - 2)(t)))
    for column in ("timestamp", ARRIVAL):
        copy = with_column(copy, column, copy[column].cast(pa.int64()).to_numpy() + 24 * HOUR)
    return pa.concat_tables([t.filter(pa.array(day_of(t) < DAYS - 1)), copy])


def new_ids(raw: RawTables) -> RawTables:
    """On the newest day users have the ids of another system."""
    mask = on(DAYS - 1)(raw.events)
    moved = put(raw.events, "user_id", mask, raw.events["user_id"].to_numpy() + 10_000_000)
    more = with_column(raw.users, "user_id", raw.users["user_id"].to_numpy() + 10_000_000)
    return replace(raw, events=moved, users=pa.concat_tables([raw.users, more]))


def garbled(share: float) -> Callable[[pa.Table], pa.Table]:
    """Titles with letters beyond ASCII, UTF-8 read as Windows-1252, in a share of the items."""

    def change(t: pa.Table) -> pa.Table:
        titles = [
            f"{title} à la crème".encode().decode("cp1252", "replace") if i < share * len(t) else f"{title} à la crème"
            for i, title in enumerate(t["title"].to_pylist())
        ]
        return with_column(t, "title", titles)

    return change


def append(column: str, make: Callable[[pa.Table], Any]) -> Raw:
    return events(lambda t: t.append_column(column, pa.array(make(t))))


def words(t: pa.Table) -> list[str]:
    return [f"value{i}" for i in range(len(t))]


def wrong_type(column: str, kind: pa.DataType) -> Raw:
    return events(lambda t: t.set_column(t.column_names.index(column), column, t[column].cast(kind)))


NEWEST, MIDDLE = DAYS - 1, DAYS - 3

FAULTS = [
    # schema and type
    Fault("a column is missing", "stop ingest: planted events: column 'label' (int8) is missing",
          events(lambda t: t.drop_columns("label"))),
    Fault("a column was renamed", "stop ingest: planted events: column 'user_id' (int64) is missing",
          events(lambda t: t.rename_columns({"user_id": "uid"}))),
    Fault("users have no id", "stop ingest: planted users: column 'user_id' (int64) is missing",
          users(lambda t: t.drop_columns("user_id"))),
    Fault("ids became text", "stop ingest: planted events: column 'item_id' is string",
          wrong_type("item_id", pa.string())),
    Fault("labels became floats", "stop ingest: planted events: column 'label' is double",
          wrong_type("label", pa.float64())),
    Fault("times lost their zone", "stop ingest: planted events: column 'timestamp' has times without a zone",
          wrong_type("timestamp", pa.timestamp("us"))),
    Fault("an extra column of numbers", "stop ingest: planted events: extra column 'price' is double",
          append("price", lambda t: np.ones(len(t)))),
    Fault("an extra column has a feature's name", "stop ingest: planted: extra columns ['views'] have a name",
          append("views", words)),
    Fault("vectors became text", "stop ingest: planted modality text: column 'vector' is string",
          vectors("text", lambda t: with_column(t, "vector", ["0.1 0.2"] * len(t), pa.string()))),
    Fault("a stray column beside the vectors", "stop ingest: planted modality image: unknown column 'model'",
          vectors("image", lambda t: t.append_column("model", pa.array(["clip"] * len(t))))),
    # files
    Fault("events cut short", "stop read: " + part(MIDDLE) + " is no whole parquet file",
          folder=cut(part(MIDDLE), 0.6)),
    Fault("vectors cut short", "stop read: modalities/text.parquet is no whole parquet file",
          folder=cut("modalities/text.parquet", 0.9)),
    Fault("an error page in place of a file", "stop read: items.parquet is no whole parquet file",
          folder=lambda f: (f / "items.parquet").write_text("<html>502 Bad Gateway</html>") and None),
    Fault("a file is empty", "stop read: users.parquet is no whole parquet file", folder=cut("users.parquet", 0)),
    # single rows, and too many of them
    Fault("a few labels are 2", "quarantine label is not 0 or 1", cells("label", some(9), 2)),
    Fault("a few labels are null", "quarantine label is not 0 or 1", cells("label", some(9), None)),
    Fault("a few times are null", "quarantine no timestamp", cells("timestamp", some(9), None)),
    Fault("a few users are null", "quarantine unknown user", cells("user_id", some(9), None)),
    Fault("a few users are unknown", "quarantine unknown user", cells("user_id", some(9), 4)),
    Fault("a few items are unknown", "quarantine unknown item", cells("item_id", some(9), 4)),
    Fault("half of the labels are null", "stop ingest: planted: 4200 of 8400 rows are broken",
          cells("label", some(4200), None)),
    Fault("the catalogue shrank to a half", "stop ingest: planted: ", items(lambda t: t.slice(300))),
    Fault("users were not delivered", "stop ingest: planted: 8400 of 8400 rows are broken",
          users(lambda t: t.slice(0, 0))),
    # ranges
    Fault("milliseconds read as microseconds", "stop events.timestamp",
          cells("timestamp", some(5), lambda t: t["timestamp"].cast(pa.int64()).to_numpy() // 1000)),
    Fault("times lie in the future", "quarantine happens after it arrived", cells("timestamp", some(9), FUTURE)),
    Fault("times without arrivals lie in the future", "quarantine later than tomorrow",
          events(lambda t: put(t, "timestamp", some(9)(t), FUTURE).drop_columns(ARRIVAL))),
    Fault("arrivals lie in the future", "quarantine later than tomorrow", cells(ARRIVAL, some(9), FUTURE)),
    Fault("a third of a day lies in the future", "stop ingest: planted: 177 of 8400 rows are broken",
          cells("timestamp", on(NEWEST, 0.3), FUTURE)),
    Fault("times after until come past ingest", "stop events.timestamp", also=("stop events.is_in_its_day",),
          folder=rewrite(part(NEWEST), lambda t: put(t, "timestamp", some(5)(t), FUTURE))),
    Fault("a probability of 1.5", "stop events.true_probability", cells("true_probability", some(3), 1.5)),
    Fault("rows lie in another day's partition", "stop events.is_in_its_day",
          folder=rewrite(part(MIDDLE), lambda t: put(
              t, "timestamp", some(5)(t), t["timestamp"].cast(pa.int64()).to_numpy() - 24 * HOUR))),
    # nulls and constants
    Fault("a context is null on one day", "stop figures.missing", cells("device", on(NEWEST), None)),
    Fault("a context is null in half of a day", "stop figures.missing", cells("device", on(NEWEST, 0.5), None)),
    Fault("an attribute was lost", "warn columns.values",
          users(lambda t: with_column(t, "region", [None] * len(t)))),
    Fault("items without created_at", "stop items.created_at",
          items(lambda t: put(t, "created_at", some(5)(t), None))),
    Fault("items without a title", "warn items.title", items(lambda t: put(t, "title", some(5)(t), None))),
    Fault("a context is constant on one day", "stop figures.mix", cells("device", on(NEWEST), "phone")),
    Fault("a context is constant on every day", "warn columns.values", cells("device", lambda t: day_of(t) >= 0, "tv")),
    Fault("new categories explode", "stop figures.mix", cells("device", on(NEWEST), words)),
    Fault("categories changed their case", "stop figures.mix",
          cells("device", on(NEWEST), lambda t: pc.utf8_upper(t["device"]).to_pylist())),
    # duplicates
    Fault("some rows are there twice", "warn events.is_first",
          folder=rewrite(part(MIDDLE), lambda t: pa.concat_tables([t, t.slice(0, 15)]))),
    Fault("a day is there twice", "stop figures.repeated", also=("warn events.is_first",),
          folder=rewrite(part(NEWEST), lambda t: pa.concat_tables([t, t]))),
    Fault("yesterday's file under today's date", "stop figures.repeated", events(yesterday_again)),
    Fault("a user is there twice", "stop users.user_id", users(lambda t: pa.concat_tables([t, t.slice(7, 1)]))),
    Fault("an item is there twice", "stop items.item_id", items(lambda t: pa.concat_tables([t, t.slice(7, 1)]))),
    Fault("a vector is there twice", "stop modality text.item_id",
          vectors("text", lambda t: pa.concat_tables([t, t.slice(7, 1)]))),
    # volume and time
    Fault("a day has a fifth of its rows", "stop figures.volume", also=("stop newest day.is_whole",),
          raw=events(lambda t: t.filter(pa.array(~on(NEWEST, 0.8)(t))))),
    Fault("a day has five times its rows", "stop figures.volume", events(spike)),
    Fault("a day is missing", "stop days.rows_if_judged", events(lambda t: t.filter(pa.array(~on(MIDDLE)(t))))),
    Fault("data are stale", "stop freshness.age_hours", also=("stop days.rows_if_judged", "stop newest day.is_whole"),
          raw=events(lambda t: t.filter(pa.array(day_of(t) < DAYS - 2)))),
    Fault("a day arrived three days late", "warn figures.late",
          cells(ARRIVAL, on(9), lambda t: t[ARRIVAL].cast(pa.int64()).to_numpy() + 72 * HOUR)),
    Fault("a clock runs two hours ahead", "stop events.happened_before_arrival", shifted(2, 9)),
    Fault("a day's times are eight hours off", "stop figures.hours", also=("stop newest day.is_whole",),
          raw=shifted(-8, NEWEST, ("timestamp", ARRIVAL))),
    Fault("items come after their events", "warn events.item_exists",
          items(lambda t: put(t, "created_at", np.arange(len(t)) % 4 == 0,
                              int(np.datetime64(FIRST.date(), "us").astype(int)) + 5 * 24 * HOUR))),
    # labels
    Fault("the label rate jumps", "stop figures.label_rate", cells("label", on(NEWEST, 0.5), 1)),
    Fault("labels are flipped", "stop figures.label_rate",
          cells("label", on(NEWEST), lambda t: 1 - t["label"].to_numpy())),
    Fault("no click on one day", "stop figures.label_rate", also=("stop days.label_rate",),
          raw=cells("label", on(NEWEST), 0)),
    Fault("all clicks on one day", "stop figures.label_rate", also=("stop days.label_rate",),
          raw=cells("label", on(NEWEST), 1)),
    Fault("no click at all", "stop days.label_rate", cells("label", lambda t: day_of(t) >= 0, 0)),
    Fault("a context is the label", "stop columns.tells_label",
          append("rank", lambda t: t["label"].cast(pa.string()))),
    Fault("a context nearly is the label", "stop columns.tells_label",
          append("rank", lambda t: np.where(some(700)(t), "x", np.where(t["label"].to_numpy() == 1, "a", "b")))),
    Fault("a context became the label today", "stop columns.tells_label", also=("stop figures.mix",),
          raw=cells("device", on(NEWEST), lambda t: np.where(t["label"].to_numpy() == 1, "phone", "tv"))),
    # ids
    Fault("users have new ids", "stop figures.returning", new_ids),
    Fault("one id stands for many users", "warn figures.top_user",
          cells("user_id", on(NEWEST, 0.25), lambda t: int(t["user_id"][0].as_py()))),
    Fault("one item fills a day", "warn figures.top_item",
          cells("item_id", on(NEWEST, 0.5), lambda t: int(t["item_id"][0].as_py()))),
    # texts
    Fault("titles decoded as Windows-1252", "stop items.is_readable", items(garbled(0.2))),
    Fault("titles with replacement signs", "stop items.is_readable",
          items(lambda t: put(t, "title", some(60)(t), "Caf\ufffd Stories"))),
    # vectors
    Fault("NaN in a vector", "stop modality text.non_finite_values",
          values("text", lambda v, _: [float("nan"), *v[1:]])),
    Fault("infinity in a vector", "stop modality image.non_finite_values",
          values("image", lambda v, _: [*v[:-1], float("inf")])),
    Fault("a vector of another length", "stop modality text.is_usual_length", values("text", lambda v, _: v[:-1])),
    Fault("an empty vector", "stop modality text.is_usual_length", also=("warn modality text.norm",),
          raw=values("text", lambda v, _: [])),
    Fault("a few zero vectors", "warn modality image.norm", values("image", lambda v, _: [0.0] * len(v))),
    Fault("many zero vectors", "stop modality image.norm", also=("warn modality image.norm",),
          raw=values("image", lambda v, _: [0.0] * len(v), slice(0, None, 5))),
    Fault("a vector of an unknown item", "stop modality image.item_is_known",
          vectors("image", lambda t: put(t, "item_id", some(1)(t), 4))),
    Fault("a few vectors are a million times as long", "stop modality text.off",
          values("text", lambda v, _: [1e6 * x for x in v])),
    Fault("a few vectors are next to nothing", "warn modality image.off",
          values("image", lambda v, _: [1e-6 * x for x in v])),
    Fault("new vectors' norms collapse", "stop new items text.norm", new_vectors("text", lambda x, _: x * 1e-3),
          also=("warn modality text.off",)),
    Fault("all vectors are one", "stop coverage image.alike",
          vectors("image", lambda t: vector_table(t["item_id"], 1 + 1e-3 * matrix(t)))),
    Fault("new vectors drift", "stop new items text.direction",
          new_vectors("text", drifted)),
    Fault("new images have text vectors", "stop new items image.directions", new_vectors("image", other_modality)),
    Fault("new vectors of another encoder", "stop new items text.directions", new_vectors("text", another_encoder)),
    Fault("new items have no image vector", "stop new items image.no_vector",
          lambda r: vectors("image", lambda t: t.filter(pa.array(~is_new(r, t))))(r)),
    Fault("most items have no image vector", "warn coverage image.missing_share",
          vectors("image", lambda t: t.filter(pa.array(np.arange(len(t)) % 3 == 0)))),
]  # fmt: skip
