"""arrivals: which raw files the window needs, and whether a day has arrived.

The stage lists the files with the hash of each, and runs each time. `ingest` depends on that list and not on the whole
of ingest.raw. So tomorrow's partition does not make today's run stale, and a late file of one of its days does.

What was there at an earlier listing is no property of the files, so late files are told and are not in the list.
"""

from __future__ import annotations

import posixpath
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from rich.console import Console

from components.common.artifacts import write_json
from components.common.config import parse_time
from components.common.contracts import HISTORY
from components.data import sources
from components.data.ingest import IngestConfig
from components.data.sources import Window, listing
from components.data.sources.mapping import FilesConfig
from components.data.sources.reading import File, find

MARKER = "_SUCCESS"  # the file that Spark and others write into a folder when it is whole
SHOWN = 5  # late files of a day that are named


def run(ingest: IngestConfig, output: Path) -> dict[str, Any]:
    """Write the list of files, and print what came late."""
    found = listing.listing(ingest.source, ingest.raw, ingest.settings(), ingest.window())
    facts = {"files": found.rows()}
    write_json(output, facts)
    for line in late(found):
        Console(stderr=True, highlight=False).print(line, markup=False, soft_wrap=True)
    return facts | {"skipped": found.skipped, "late": len(found.late)}


def summary(facts: dict[str, Any]) -> dict[str, str]:
    files = facts["files"]
    size = sum(file["bytes"] for file in files) / 2**20
    lines = {"files": f"{len(files):,}, {size:,.1f} MiB" if files else "none: the simulator has no files"}
    if facts["skipped"]:
        lines["other days"] = f"{facts['skipped']:,} files, not read"
    if facts["late"]:
        lines["late"] = f"{facts['late']:,} files came since an earlier run read their day"
    return lines


def late(found: listing.Listing) -> list[str]:
    """A line for each day of which files came, or changed, after an earlier listing of that day."""
    by_day: dict[str, list[str]] = {}
    for file in found.late:
        by_day.setdefault(str(file.day), []).append(file.path)
    return [
        f"late: {len(paths)} file(s) of {day} came or changed since an earlier run read that day: "
        f"{', '.join(paths[:SHOWN])}{' …' if len(paths) > SHOWN else ''}. To close {day} again: "
        f"python -m components run {day}"
        for day, paths in sorted(by_day.items())
    ]  # fmt: skip


def missing(config: IngestConfig, day: date) -> str | None:
    """Why the source does not have the day yet, or None where it has.

    Files by day: a file of the day must be there. Where folders of other days have the marker `_SUCCESS`, so must its
    own. Other files: an event of that day, or of a later one, must be in them.
    """
    if config.source == "simulator":
        return None
    files = _events(config)
    if any(file.day for file in files):
        return _missing_files(files, day)
    newest = newest_event(config)
    if newest.date() < day:
        return f"{config.raw} has no event of {day} or later; its newest is of {newest:%Y-%m-%d %H:%M} UTC"
    return None


def newest_day(config: IngestConfig) -> date:
    """The newest whole day of the source, as far as one can tell: of files by day, a day that is not `missing`; of
    others, the day of the newest event; of the simulator, the day that ends at ingest.until. Today is not over.

    Raises ValueError where the source has no times, or no whole day.
    """
    if config.source == "simulator":
        if config.until is None:
            raise ValueError("ingest.until is null, and the simulator has no newest day; name the day")
        return (parse_time("ingest.until", config.until) - timedelta(microseconds=1)).date()
    today = datetime.now(UTC).date()
    files = _events(config)
    if days := sorted({file.day for file in files if file.day}, reverse=True):
        if whole := next((day for day in days if day < today and not _missing_files(files, day)), None):
            return whole
        raise ValueError(f"{config.raw} has no whole day before {today}; its files are of {days[-1]} to {days[0]}")
    return min(newest_event(config).date(), today - timedelta(days=1))


def newest_event(config: IngestConfig) -> datetime:
    """The time of the newest event that is not later than now. Raises ValueError where the source has no times."""
    settings = config.settings()
    if isinstance(settings, FilesConfig):  # its features and other tables say nothing of times
        events = replace(settings.events, categorical=[], numeric=[])
        none = replace(events, path=None, columns={})
        settings = replace(settings, events=events, users=none, items=none, vectors={})
    rows = sources.read(config.source, config.raw, settings, Window()).events
    times = rows["timestamp"]
    newest: datetime | None = pc.max(times.filter(pc.less_equal(times, datetime.now(UTC)))).as_py()
    if set(HISTORY) <= set(rows.column_names) or newest is None:
        raise ValueError(f"{config.source} has no times, so it has no days; run `dvc repro` instead")
    return newest


def _events(config: IngestConfig) -> list[File]:
    """The files of the events, each with its day, where the source has its files by day."""
    settings = config.settings()
    path = settings.events.path if isinstance(settings, FilesConfig) else None
    paths = path.values() if isinstance(path, dict) else [path] if path else []
    return [file for one in paths for file in find(config.raw, "events", one)]


def _missing_files(files: list[File], day: date) -> str | None:
    folders: dict[date, set[str]] = {}
    for file in files:
        if file.day:
            folders.setdefault(file.day, set()).add(posixpath.dirname(file.path))
    if day not in folders:
        return f"there is no file of {day}; the newest files are of {max(folders)}"
    system = files[0].system
    unmarked = sorted(folder for folder in folders[day] if not system.exists(f"{folder}/{MARKER}"))
    others = set[str]().union(*folders.values()) - folders[day]
    if unmarked and any(system.exists(f"{folder}/{MARKER}") for folder in others):
        return f"{unmarked[0]} has no {MARKER} yet, and other days have one"
    return None
