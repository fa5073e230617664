"""ingest: a source's raw files -> canonical events by day, users, items, modalities.

What cannot be made canonical (a missing column, a wrong type, a time without a zone) stops here, before anything is
written. A row that is wrong by itself (an unknown item, a label of 2) goes to quarantine. What the rows say together,
and what is wrong with items and vectors, is judged by `validate`.

Every row that a source read is written to events, or is counted under the reason why not (`revisions.py`). Rows that
are left out lie in quarantine/, and rows before the window are counted in source.json. Rows that are not known before
`until` are counted in the terminal alone: so a day that is run again later, with more delivered, gives the same bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from components.common.artifacts import new_folder, read_json, write_json
from components.common.config import parse_time
from components.common.contracts import (
    EVENTS,
    HISTORIES,
    HISTORY,
    IMAGE,
    ITEMS,
    OPTIONAL,
    ORACLE,
    POSITION,
    PROPENSITY,
    SLATE,
    USERS,
    VECTORS,
    attributes,
    conform,
    write_days,
)
from components.data import pictures, sources
from components.data.revisions import OUTSIDE, UNKNOWN_YET, settle, unusual_days
from components.data.sources import RawTables, Window, brief
from components.data.sources.listing import listing
from components.data.sources.mapping import FilesConfig
from components.data.sources.simulator import SimulatorConfig

# Names that later steps give to features, or to columns of their joins.
RESERVED = {
    "user_id", "item_id", "row_id", "event_timestamp", "tags", "embedding", "history", "views", "clicks",
    "clicks_start", "clicks_end", "known", *OPTIONAL,
}  # fmt: skip
POPULARITY = {"views_level", "clicks_level"}  # features too, unless the source gives its histories itself
MISSING_DAY = ("fail", "go_on")
SHOWN = 14  # unusual days in the terminal; source.json has all


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """source         simulator, movielens, microlens or files
    raw            the path the source reads; the simulator has no files, its code is its input
    until          ISO time with a zone: events of later, or that arrived later, are left out, and freshness is
                   measured back from it; null takes every event, and then freshness is not judged
    window_days    the days before `until` whose rows are trained, validated and tested on; null takes all
    lead_days      days before those that are read for histories and popularity alone; without window_days, unused
    missing_day    what a run does where the newest day before `until` is missing or came in part: fail, or go_on
                   without the rest of it. The report says why it went on
    max_rejected   share of the known rows that may be broken and go to quarantine; beyond it, ingest stops
    picture_hosts  host names from which pictures by URL may be fetched; without any, no URL is fetched
    simulator      the world that the simulator draws
    files          your own tables, where the source is `files`
    """

    source: str
    raw: str
    until: str | None
    window_days: int | None
    lead_days: int
    missing_day: str
    max_rejected: float
    picture_hosts: list[str]
    simulator: SimulatorConfig
    files: FilesConfig

    def __post_init__(self) -> None:
        sources.check(self.source, self.raw)
        if self.until is not None:
            parse_time("ingest.until", self.until)
        if self.window_days is not None:
            if self.window_days < 1:
                raise ValueError(f"window_days is {self.window_days}; it must be at least 1, or null for all days")
            if self.until is None:
                raise ValueError(
                    f"window_days is {self.window_days}, but until is null, so the days have no end; "
                    "give until, or set window_days to null"
                )
        if self.lead_days < 0:
            raise ValueError(f"lead_days is {self.lead_days}; it must be 0 or more")
        if self.missing_day not in MISSING_DAY:
            raise ValueError(f"missing_day is {self.missing_day!r}; write {' or '.join(MISSING_DAY)}")
        if not 0 <= self.max_rejected < 1:
            raise ValueError(f"max_rejected is {self.max_rejected}; it is a share in [0, 1)")

    def train_from(self) -> datetime | None:
        """The start of the first day that is trained on; None: of the data. The day that `until` cuts counts whole."""
        if self.until is None or self.window_days is None:
            return None
        until = parse_time("ingest.until", self.until)
        midnight = datetime(until.year, until.month, until.day, tzinfo=UTC)
        return midnight + timedelta(days=(until > midnight) - self.window_days)

    def window(self) -> Window:
        """The times of the rows that are read."""
        first = self.train_from()
        return Window(
            since=None if first is None else first - timedelta(days=self.lead_days),
            until=None if self.until is None else parse_time("ingest.until", self.until),
        )

    def settings(self) -> Any:
        """The section of the source, where it has one."""
        return {"simulator": self.simulator, "files": self.files}.get(self.source)


def run(config: IngestConfig, output: Path, arrivals: Path | None = None) -> dict[str, Any]:
    """Write the canonical folder, and print what became of the rows. Returns its facts (`source.json`).

    With `arrivals`, raises ValueError where the files that were read are not those that it lists.
    """
    window, first = config.window(), config.train_from()
    raw = sources.read(config.source, config.raw, config.settings(), window)
    if arrivals is not None:
        _require_listed(config, window, arrivals)
    read = len(raw.events) + sum(map(len, (*raw.rejected.values(), *raw.set_aside.values())))
    if raw.read not in (None, read):
        raise ValueError(
            f"{config.source}: {raw.read} rows were read, and {read} came out of the adapter; it must give those that "
            "it leaves out as `rejected` or `set_aside`"
        )
    events = conform(raw.events, EVENTS, f"{config.source} events", optional=OPTIONAL)
    users = conform(raw.users, USERS, f"{config.source} users")
    items = conform(raw.items, ITEMS, f"{config.source} items", optional={IMAGE: pa.string()})
    items, named = take_pictures(config, raw, items)
    given = set(HISTORY) <= set(events.column_names)
    extra = [*attributes(events, EVENTS), *attributes(users, USERS), *attributes(items, ITEMS)]
    reserved = RESERVED if given else RESERVED | POPULARITY
    if clashing := sorted({name for name in extra if name in reserved or extra.count(name) > 1}):
        raise ValueError(
            f"{config.source}: extra columns {clashing} have a name that another table's column or a feature of the "
            "pipeline has; rename them where the data is written"
        )
    if given:
        _require_histories(config, raw, events)
    _require_whole_log(config, events)
    events, users, items = (trimmed(t, s) for t, s in ((events, EVENTS), (users, USERS), (items, ITEMS)))
    if window.until is not None and given:
        raise ValueError(f"ingest.until is {config.until!r}, but {config.source} has no times; set it to null")
    events, rejected, set_aside, beyond = settle(raw, events, users, items, window)
    later, outside = beyond[UNKNOWN_YET], beyond[OUTSIDE]
    left_out = rejected | set_aside
    ledger = {
        "read": read,
        "later": later,
        "outside": outside,
        "written": len(events),
        "left_out": {reason: len(rows) for reason, rows in left_out.items()},
    }
    assert read == later + outside + len(events) + sum(map(len, left_out.values())), f"rows were lost: {ledger}"
    broken = sum(map(len, rejected.values()))
    if broken > config.max_rejected * (read - later - outside):
        reasons = "; ".join(f"{reason}: {len(rows)}, e.g. {_first(rows)}" for reason, rows in rejected.items())
        raise ValueError(
            f"{config.source}: {broken} of {read - later - outside} rows are broken, more than ingest.max_rejected "
            f"({config.max_rejected}) of them ({reasons}); mend the files, or raise the limit"
        )
    if not len(events):
        since = f" from {window.since:%Y-%m-%d} on and" if window.since else ""
        raise ValueError(
            f"ingest: no event{since} before until={config.until!r} in {config.raw}; give a later time, or more days"
        )
    events = events.take(pc.sort_indices(events["timestamp"]))  # stable: ties stay as the source had them
    vocabularies = dict(raw.vocabularies)
    if "users" in raw.derived:
        users = named_by(events, users, "user_id", vocabularies)
    if "items" in raw.derived:
        items = named_by(events, items, "item_id", vocabularies)
    days = unusual_days(events, set_aside)
    with new_folder(output) as folder:
        written = write_days(events, folder / "events")
        pq.write_table(users, folder / "users.parquet")
        pq.write_table(items, folder / "items.parquet")
        (folder / "modalities").mkdir()
        for name, table in raw.modalities.items():
            vectors = conform(table, VECTORS, f"{config.source} modality {name}", extra_columns=False)
            file = folder / "modalities" / f"{name}.parquet"
            pq.write_table(vectors.sort_by("item_id"), file, use_dictionary=False)  # no float comes twice
        copied = copy_pictures(config, named, folder) if len(named) else None
        for name, words in vocabularies.items():
            pq.write_table(words, folder / f"{name}_vocabulary.parquet")
        if given and raw.histories is not None:
            pq.write_table(raw.histories, folder / "histories.parquet")
        if left_out:
            (folder / "quarantine").mkdir(exist_ok=True)
        for at, (reason, rows) in enumerate(left_out.items()):
            names = ["given reason" if name == "reason" else name for name in rows.column_names]
            marked = rows.rename_columns(names).append_column("reason", pa.repeat(reason, len(rows)))
            pq.write_table(marked, folder / "quarantine" / f"{at}-{re.sub(r'[^A-Za-z0-9]+', '-', reason)}.parquet")
        facts = {
            "source": config.source,
            "until": config.until,
            "missing_day": config.missing_day,
            "train_from": None if first is None else f"{first:%Y-%m-%d}",
            "impressions": len(events),
            "label_rate": float(pc.mean(events["label"]).as_py() or 0),
            "days": len(written),
            "first_day": written[0],
            "last_day": written[-1],
            "users": len(users),
            "items": len(items),
            "vectors": {name: len(table) for name, table in sorted(raw.modalities.items())},
            **({"pictures": copied} if copied else {}),
            "rows": ledger,
            "broken": {reason: len(rows) for reason, rows in rejected.items()},
            "unusual_days": days,
            **raw.facts,
        }
        if ORACLE in events.column_names:
            facts["oracle_auc"] = _auc(events["label"].to_numpy(), events[ORACLE].to_numpy())
        known = {name: rows for name, rows in ledger.items() if name not in ("read", "later")}
        write_json(folder / "source.json", facts | {"rows": {"known": read - later, **known}})
    show(ledger, days)
    return facts


def summary(facts: dict[str, Any]) -> dict[str, str]:
    lines = {
        "impressions": f"{facts['impressions']:,}, {facts['label_rate']:.1%} clicked",
        "days": f"{facts['days']:,}, {facts['first_day']} to {facts['last_day']}",
        "users, items": f"{facts['users']:,} and {facts['items']:,}",
    }
    if "oracle_auc" in facts:
        lines["oracle"] = f"AUC {facts['oracle_auc']:.4f}, the ceiling of any model"
    return lines


def named_by(events: pa.Table, table: pa.Table, key: str, vocabularies: dict[str, pa.Table]) -> pa.Table:
    """The rows of a derived table that the events name, and the same of its vocabulary: a later delivery adds none."""
    ids = pc.unique(events[key])
    name = {"user_id": "users", "item_id": "items"}[key]
    if words := vocabularies.get(name):
        vocabularies[name] = words.filter(pc.is_in(words[key], value_set=ids))
    return table.filter(pc.is_in(table[key], value_set=ids))


def trimmed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The extra columns as the server reads a request (`models.schema.trimmed`): no spaces (Unicode's Zs) around a
    value, and none where nothing is left."""
    for name in attributes(table, schema):
        column = pc.replace_substring_regex(table[name], r"^\p{Zs}+|\p{Zs}+$", "")
        column = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def take_pictures(config: IngestConfig, raw: RawTables, items: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The items without the column that names their pictures; and item_id and image of those that name one."""
    if IMAGE not in items.column_names:
        return items, pa.table({"item_id": [], IMAGE: []})
    named = items.select(["item_id", IMAGE]).filter(pc.is_valid(items[IMAGE])).sort_by("item_id")
    if len(named) and IMAGE in raw.modalities:
        raise ValueError(
            f"{config.source}: items name pictures in the column {IMAGE!r}, and there are vectors {IMAGE!r} too; "
            "give the one or the other"
        )
    return items.drop_columns(IMAGE), named


def copy_pictures(config: IngestConfig, named: pa.Table, folder: Path) -> dict[str, Any]:
    """Write pictures.parquet, and what could not be read to quarantine/. Returns the counts, for source.json.

    An item whose picture is left out has none, as one that names none. Raises ValueError where they are too many.
    """
    left_out = pictures.copy(named, config.raw, folder / "pictures.parquet", config.picture_hosts)
    refused = pc.sum(pc.is_in(left_out["reason"], value_set=pa.array(pictures.REFUSED))).as_py() or 0
    broken = len(left_out) - refused  # what was refused was not asked for, which says nothing of the picture
    if broken > config.max_rejected * len(named):
        raise ValueError(
            f"{config.source}: {broken} of {len(named)} pictures cannot be read, more than "
            f"ingest.max_rejected ({config.max_rejected}) of them ({pictures.describe(left_out)}); mend the files or "
            f"the column {IMAGE!r} of the items, or raise the limit"
        )
    if len(left_out):
        (folder / "quarantine").mkdir(exist_ok=True)
        pq.write_table(left_out, folder / "quarantine" / "pictures.parquet")
        message = f"{len(left_out)} of {len(named)} pictures left out: {pictures.describe(left_out)}"
        Console(stderr=True, highlight=False).print(message, markup=False)
    reasons = {count["values"]: count["counts"] for count in pc.value_counts(left_out["reason"]).to_pylist()}
    return {"named": len(named), "written": len(named) - len(left_out), "left_out": reasons}


def show(ledger: dict[str, Any], days: dict[str, dict[str, int]]) -> None:
    """The tables for the terminal."""
    counts = {"read": ledger["read"], UNKNOWN_YET: -ledger["later"], OUTSIDE: -ledger["outside"]}
    counts |= {reason: -rows for reason, rows in ledger["left_out"].items()}
    table = Table("rows", "", title="What became of the rows", title_justify="left")
    table.columns[1].justify = "right"
    for what, rows in {k: v for k, v in counts.items() if v}.items():
        table.add_row(what, f"{rows:,}")
    table.add_section()
    table.add_row("written", f"{ledger['written']:,}")
    console = Console(stderr=True, highlight=False)
    console.print(table)
    if days:
        names = list(dict.fromkeys(name for day in days.values() for name in day))
        table = Table("day", *names, title=f"Unusual days ({len(days)})", title_justify="left")
        for day, found in list(days.items())[-SHOWN:]:
            table.add_row(day, *(f"{found.get(name, 0):,}" for name in names))
        console.print(table)


def _require_listed(config: IngestConfig, window: Window, arrivals: Path) -> None:
    """Raises ValueError where files came, went or changed since `arrivals` was written."""
    listed = {file["path"]: file["hash"] for file in read_json(arrivals, "arrivals")["files"]}
    found = {file.path: file.hash for file in listing(config.source, config.raw, config.settings(), window).files}
    if changed := sorted({path for path in {*listed, *found} if listed.get(path) != found.get(path)}):
        raise ValueError(
            f"ingest.raw: {len(changed)} file(s) came, went or changed while they were read, e.g. {changed[0]}; "
            "run it again"
        )


def _require_histories(config: IngestConfig, raw: RawTables, events: pa.Table) -> None:
    """Raises ValueError where the events point outside of the histories that the source gives."""
    if raw.histories is None or raw.histories.schema != HISTORIES:
        raise ValueError(f"{config.source} events have {HISTORY}; give `histories`, a table of {HISTORIES}")
    start, end = (events[name].to_numpy() for name in HISTORY)
    if not ((start >= 0) & (start <= end) & (end <= len(raw.histories))).all():
        raise ValueError(f"{config.source}: {HISTORY} leave [0, {len(raw.histories)}]; mend the source")


def _require_whole_log(config: IngestConfig, events: pa.Table) -> None:
    """Raises ValueError where the events have a part of what the logging system tells."""
    there = [name for name in (PROPENSITY, POSITION, SLATE) if name in events.column_names]
    if there and there[:2] != [PROPENSITY, POSITION]:
        raise ValueError(
            f"{config.source} events have {there}; give {PROPENSITY!r} and {POSITION!r} both, or leave all of these out"
        )


def _first(rows: pa.Table) -> dict[str, str]:
    return {name: brief(value) for name, value in rows.slice(0, 1).to_pylist()[0].items() if value is not None}


def _auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores)) if 0 < labels.mean() < 1 else None
