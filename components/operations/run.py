"""run: close a day, or several. The steps are in day.py; here are their order, the progress and the closing table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.common import pipeline, threads
from components.common.artifacts import write_json
from components.common.causes import BusyError, StepError
from components.common.config import load, parse_time
from components.operations import day as step
from components.operations import report
from components.operations.day import Day, RunConfig
from components.operations.repro import Outcome
from components.operations.retention import disk, tidy
from components.operations.worktree import cache

POLL_SECONDS = 60.0  # between two looks for the day's files


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run in the closing table.

    seconds   from its start to its end
    overhead  seconds less those of the stages' own commands
    mib       by which DVC's cache grew meanwhile
    """

    day: str
    rows: int
    late: int
    verdict: str
    auc: float | None
    champion: str
    promoted: bool
    seconds: float
    overhead: float
    mib: float


def run(root: Path, name: str | None, first: str | None, last: str | None, *, jobs: int, promote: str | None) -> None:
    """Close a day, or all from `first` to `last`. Raises as the steps do; of several days, after all have ended."""
    console = Console(stderr=True, highlight=False)
    if first or last:
        if name or not (first and last):
            raise ValueError("give one DAY, or both --from and --to")
        if jobs > 1 and promote not in (None, "never"):
            raise ValueError(f"--jobs {jobs} --promote {promote}: a champion follows the one before it; use --jobs 1")
        rows = several(root, Day.of(root, first), Day.of(root, last), jobs, promote, console)
    else:
        day = Day.of(root, name) if name else newest(root)
        rows = [one(day, promote, console)]
        if day.worktree.is_dir():  # `tidy` keeps the newest
            report.run(day.worktree, day.page, str(day))
    console.print(table(rows))


def one(day: Day, promote: str | None, console: Console) -> Row:
    """All steps of a day, in their order. The row is also in .runs/reports/DAY.json."""
    config = load(day.root / "params.yaml", "run", RunConfig)
    say = _printer(console)
    begun, before, own = monotonic(), disk([cache(day.root)]), 0.0
    with day.locked(f"`run` since {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"):
        with _told("worktree", console):
            step.open_(day, say)
        waited = await_(day, config, say)
        for stage in order(day):
            with _told(stage, console) as note:
                outcome = _stage(day, stage, console)
                note.append(outcome.how)
                own += outcome.own
        with _told("close", console):
            facts = step.close(day, say)
        with _told("ship", console):
            shipped = step.ship(day, promote=promote, say=say)
    row = Row(
        day=str(day), rows=facts["rows"], late=facts["late"], verdict=_verdict(facts), auc=facts["auc"],
        champion=shipped.get("champion") or "", promoted=shipped["promoted"],
        seconds=monotonic() - begun - waited, overhead=monotonic() - begun - waited - own,
        mib=disk([cache(day.root)]) - before,
    )  # fmt: skip
    write_json(day.page.with_suffix(".json"), asdict(row))
    tidy(day.root, say)
    return row


def order(day: Day) -> list[str]:
    """The stages of the worktree's dvc.yaml in its order, but each after those that it needs."""
    before = pipeline.read(day.worktree).before()
    found: dict[str, None] = {}
    while left := [name for name in before if name not in found]:
        found[next(name for name in left if before[name] <= found.keys())] = None
    return list(found)


def await_(day: Day, config: RunConfig, say: step.Say) -> float:
    """Wait for the day's raw files. Returns the seconds that it took. Raises ValueError where they did not come."""
    begun = monotonic()
    told = ""
    while True:
        waited = monotonic() - begun
        try:
            step.ready(day, waited / 3600, say)
        except BusyError as error:
            if str(error) != told:
                told = str(error)
                say(f"{told}; this run waits up to {config.wait_hours:g} hours")
            sleep(min(POLL_SECONDS, max(0.0, config.wait_hours * 3600 - waited)) + 0.1)
        else:
            return monotonic() - begun if told else 0.0


def _stage(day: Day, name: str, console: Console) -> Outcome:
    """Its output goes to a log. Where the stage fails, the log's end is shown."""
    log = day.worktree / ".scratch/stages" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as opened:

        def say(line: str) -> None:
            opened.write(f"{line}\n")
            opened.flush()
            if line.startswith(("process ", "dvc.lock ", f"{name}: process", f"{name} waits")):
                console.print(line, markup=False, soft_wrap=True, style="yellow")

        try:
            return step.stage(day, name, say)
        except Exception:
            for line in log.read_text().splitlines()[-20:]:
                console.print(f"  {line}", markup=False, soft_wrap=True, style="dim")
            step.page(day)
            console.print(f"log: {log}\nreport: {day.page}", markup=False, soft_wrap=True, style="dim")
            raise


@contextmanager
def _told(name: str, console: Console) -> Iterator[list[str]]:
    """A line for a step: its name, seconds and how it went."""
    begun, note = monotonic(), list[str]()
    yield note
    console.print(f"{name:<16}{monotonic() - begun:7.1f} s  {' '.join(note)}", markup=False)


def _printer(console: Console) -> step.Say:
    return lambda line: console.print(line, markup=False, soft_wrap=True, style="dim")


def _verdict(facts: dict[str, Any]) -> str:
    return f"{facts['verdict']} {facts['model'] or ''}".strip()


# ---- several days -------------------------------------------------------------------------------------------------


def several(root: Path, first: Day, last: Day, jobs: int, promote: str | None, console: Console) -> list[Row]:
    """Every day of the range in a process of its own, `jobs` at a time, the oldest first.

    Raises after all have ended: BusyError where a second call may be enough, StepError else.
    """
    days = [Day(first.root, date.fromordinal(n)) for n in range(first.date.toordinal(), last.date.toordinal() + 1)]
    if not days:
        raise ValueError(f"--from {first} --to {last}: no day lies between; give the older day first")
    if jobs > 1:
        promote = "never" if promote is None else promote
    share = max(1, threads.usable_cores() // jobs)  # each day's libraries get their part of the cores
    failed: dict[Day, int] = {}

    def close(day: Day) -> Row | None:
        log = day.runs / "reports" / f"{day}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "components", "run", str(day), *(["--promote", promote] if promote else [])]
        with log.open("w") as opened:
            code = subprocess.run(
                command, cwd=root, env={"OMP_NUM_THREADS": str(share)} | dict(os.environ) if jobs > 1 else None,
                stdout=opened, stderr=subprocess.STDOUT,
            ).returncode  # fmt: skip
        if code:
            failed[day] = code
            reason = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
            console.print(f"{day}  failed: {reason} (log: {log})", markup=False, soft_wrap=True, style="red")
            return None
        row = Row(**json.loads(day.page.with_suffix(".json").read_text()))
        console.print(f"{day}  {row.verdict}, {row.seconds:.0f} s", markup=False)
        return row

    with ThreadPoolExecutor(jobs) as pool:
        rows = [row for row in pool.map(close, days) if row]
    if failed:
        if rows:
            console.print(table(rows))
        kind = BusyError if all(code == 75 for code in failed.values()) else StepError
        raise kind(f"{len(failed)} of {len(days)} days failed: {', '.join(map(str, failed))}")
    return rows


def newest(root: Path) -> Day:
    """The day that ends at ingest.until; where it is null, the newest whole day of the source."""
    from components.data.arrivals import newest_day
    from components.data.ingest import IngestConfig

    config = load(root / "params.yaml", "ingest", IngestConfig)
    if config.until is None:
        return Day(root.resolve(), newest_day(config))
    end = parse_time("ingest.until", config.until)
    if end.time() != time.min:
        raise ValueError(f"ingest.until is {end}, and no day ends there; name the day: python -m components run DAY")
    return Day(root.resolve(), end.date() - timedelta(days=1))


def table(rows: list[Row]) -> Table:
    found = Table(title="Runs", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    found.add_column("day", no_wrap=True)
    for column in ("rows", "late"):
        found.add_column(column, justify="right")
    for column in ("verdict", "champion"):
        found.add_column(column)
    for column in ("AUC", "seconds", "overhead", "MiB"):
        found.add_column(column, justify="right")
    for row in rows:
        auc = "" if row.auc is None else f"{row.auc:.4f}"
        figures = (auc, f"{row.seconds:,.0f}", f"{row.overhead:,.0f}", f"{row.mib:,.1f}")
        found.add_row(*map(Text, (row.day, f"{row.rows:,}", f"{row.late:,}", row.verdict, row.champion, *figures)))
    return found
