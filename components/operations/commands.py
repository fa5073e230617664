"""The commands of a run: `run`, and `day` with one command for each step. What they do is in day.py and run.py."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

DayName = Annotated[str, typer.Argument(metavar="DAY", help="A date such as 2026-01-11.")]
Promote = Annotated[str | None, typer.Option(help="auto, ask or never, in place of run.promote of params.yaml.")]

day = typer.Typer(
    help="The steps of a run, each alone, as Airflow runs them. Exit codes: 0 done, 65 data, code or settings are "
    "wrong, 75 something that passes is in the way (a lock, the disk, the remote), 1 unknown.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


def run(
    name: Annotated[str | None, typer.Argument(metavar="[DAY]", help="A date such as 2026-01-11.")] = None,
    first: Annotated[str | None, typer.Option("--from", help="The first of several days.")] = None,
    last: Annotated[str | None, typer.Option("--to", help="The last of them.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Days at a time, with --from and --to.")] = 1,
    promote: Promote = None,
) -> None:
    """Close a day: every stage in a worktree of its own, a commit with the tag run/DAY, and a version that serves.

    Without DAY: the day that ends at ingest.until of params.yaml, or the newest whole day of the source.
    Several days at a time promote nothing: `--promote auto` is for days in their order, one at a time.
    """
    from components.operations import run as step

    step.run(Path.cwd(), name, first, last, jobs=jobs, promote=promote)


def refresh(
    until: Annotated[str | None, typer.Option(help="ISO time; without it, the last full hour.")] = None,
) -> None:
    """The features of now into what serves, without training; only what changed. Airflow does it every hour."""
    from components.common.config import parse_time
    from components.operations import refresh as step

    _facts(step.run(Path.cwd(), parse_time("--until", until) if until else step.the_hour()))


@day.command("open")
def open_(name: DayName) -> None:
    """Make the worktree .runs/DAY at the code of this commit, with the settings of this work tree."""
    from components.operations import day as step

    with _day(name) as one:
        _facts(step.open_(one))


@day.command()
def ready(
    name: DayName,
    waited: Annotated[float, typer.Option(min=0, help="Hours that the run has waited so far.")] = 0,
) -> None:
    """Whether the day's raw files are there: 0 yes, 75 not yet; after run.wait_hours as ingest.missing_day says."""
    from components.operations import day as step

    step.ready(_named(name), waited)


@day.command()
def stage(name: DayName, stage: Annotated[str, typer.Argument(help="Of dvc.yaml, such as train@qin.")]) -> None:
    """Run one stage in the day's worktree. The last line is the reason where it fails."""
    from components.operations import day as step

    with _day(name, shared=True) as one:
        step.stage(one, stage)


@day.command()
def close(name: DayName) -> None:
    """The page, the commit, the tag run/DAY, and `dvc push`."""
    from components.operations import day as step

    with _day(name) as one:
        _facts(step.close(one))


@day.command()
def ship(
    name: DayName,
    promote: Promote = None,
    who: Annotated[str, typer.Option(help="Who or what promotes.")] = "run",
    why: Annotated[str, typer.Option(help="For the history.")] = "",
) -> None:
    """Register the day's model as a version, and promote it by run.promote; else publish the day's features alone."""
    from components.operations import day as step

    with _day(name) as one:
        _facts(step.ship(one, promote=promote, who=who, why=why))


@day.command()
def tidy() -> None:
    """Drop what no version and none of the newest runs needs: worktrees, tags of runs, data here and in the remote."""
    from components.operations import retention as step

    step.tidy(Path.cwd())


def _named(name: str) -> Any:
    from components.operations.day import Day

    return Day.of(Path.cwd(), name)


def _day(name: str, *, shared: bool = False) -> Any:
    """The day's lock while a step lasts: stages share it, every other step has the day alone."""
    return _named(name).locked(f"`day` since {datetime.now(UTC):%Y-%m-%d %H:%M}", shared=shared)


def _facts(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, sort_keys=True, ensure_ascii=False), flush=True)
