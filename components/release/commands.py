"""The commands of the registry: `registry list`, `show`, `promote`, `rollback`, `history`, `pin`, `register`.

And `compare`, which measures two of its versions.
"""

from __future__ import annotations

import getpass
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.common.live import live_folder

registry = typer.Typer(
    help="The versions of the model: which one serves, which ones did, who promoted them and why.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
VersionName = Annotated[str, typer.Argument(metavar="VERSION", help="v1.2.0, run/2026-01-11 or 2026-01-11.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
Why = Annotated[str, typer.Option(help="The reason, for the history.")]
Who = Annotated[str | None, typer.Option(help="Who or what does it; you, if not given.")]
COLUMNS = {"day": "day", "version": "version", "model": "model", "auc": "AUC", "verdict": "verdict", "state": "state",
           "who": "by", "why": "why"}  # fmt: skip


@registry.command("list")
def list_(as_json: Json = False) -> None:
    """Every version, the newest first, with its day, model, AUC, state, and who promoted it and why."""
    from components.release import registry as step

    found = step.standing(Path.cwd(), live_folder())
    if as_json:
        return _json(found)
    if not found["versions"]:
        print("no version yet: `python -m components run` makes the first")
    else:
        _table(COLUMNS, found["versions"])
    if found["store"]:
        print(f"live store: data until {found['store']['until']}, since {found['store']['since']}")
    if found["unfinished"]:
        print(found["unfinished"])


@registry.command()
def show(version: VersionName, as_json: Json = False) -> None:
    """All that is known of a version: figures, hashes, promotions."""
    from components.release import registry as step

    found = step.shown(Path.cwd(), live_folder(), version)
    if as_json:
        return _json(found)
    table = Table.grid(padding=(0, 2))
    for name, value in found.items():
        if name == "promotions":
            value = "\n".join(f"{one['when']} by {one['who']}: {one['why']}{_override(one)}" for one in value)
        elif isinstance(value, dict):
            value = ", ".join(f"{key} {_text(one)}" for key, one in value.items())
        table.add_row(Text(name, style="dim"), Text(_text(value)))
    _console().print(table)


@registry.command()
def history(as_json: Json = False) -> None:
    """Every promotion and rollback, the newest first."""
    from components.release import registry as step
    from components.release import versions

    rows = [step.told(promotion) for promotion in versions.history(Path.cwd())]
    if as_json:
        return _json(rows)
    _table({name: name for name in ("number", "when", "version", "day", "who", "why", "override")}, rows)


@registry.command()
def promote(
    version: VersionName,
    why: Why,
    who: Who = None,
    override: Annotated[
        str | None, typer.Option(help="A reason to go on without a passed smoke test or a pushed remote.")
    ] = None,
) -> None:
    """Make a version the champion, and serve it. The same command again finishes one that was cut short."""
    from components.release import registry as step

    print(step.promote(Path.cwd(), live_folder(), version, who or _user(), why, override))


@registry.command()
def rollback(version: VersionName, why: Why, who: Who = None) -> None:
    """Make a version that was the champion before the champion again. The online store stays."""
    from components.release import registry as step

    print(step.rollback(Path.cwd(), live_folder(), version, who or _user(), why))


@registry.command()
def register(run: Annotated[str, typer.Argument(help="The tag of an approved run: run/2026-01-11.")]) -> None:
    """Make an approved run a version, and no champion."""
    from components.release import versions

    print(versions.register(Path.cwd(), run))


@registry.command()
def pin(version: Annotated[str | None, typer.Argument(help="v1.2.0; the champion, if not given.")] = None) -> None:
    """Write champion.json of this work tree, so that its own `dvc repro` is judged against a version."""
    from components.release import registry as step

    print(step.pin(Path.cwd(), version))


def compare(
    first: Annotated[str, typer.Argument(metavar="VERSION", help="v1.2.0, or run/2026-01-11@qin.")],
    second: Annotated[str, typer.Argument(metavar="VERSION", help="The other one, likewise.")],
    rows: Annotated[
        str | None, typer.Option(help="The run whose test rows are scored; the newest, if not given.")
    ] = None,
    as_json: Json = False,
    params: Annotated[Path, typer.Option(help="The file with every number; its section evaluate.")] = Path(
        "params.yaml"
    ),
) -> None:
    """Two versions on the same rows: figures of both, and the second minus the first with 95% intervals.

    Both are taken as the gate judged them, before their refit. A model that has seen the rows is refused.
    """
    from components.common.config import load
    from components.release import compare as step
    from components.release.measures import EvaluateConfig

    found = step.run(Path.cwd(), load(params, "evaluate", EvaluateConfig), first, second, rows)
    if as_json:
        return _json(found)
    one, other = (f"{side['name']} ({side['model']})" for side in found["models"])
    _table_of(f"{found['test_rows']:,} test rows of {found['rows']}", ["figure", one, other], _compared(found))
    _table_of("AUC by slice", ["slice", "rows"], [
        [name, f"{part['rows']:,}", *_gain(part["auc"])] for name, part in found["slices"].items()
    ])  # fmt: skip


def _compared(found: dict[str, Any]) -> list[list[str]]:
    from components.release.card import NAMES

    return [
        [words, *(_text(found[side][name]) for side in ("first", "second")), *_gain(found["difference"][name])]
        for name, words in NAMES.items()
    ]


def _gain(one: dict[str, float] | None) -> list[str]:
    return (
        ["not measurable", ""] if one is None else [f"{one['value']:+.4f}", f"{one['low']:+.4f} to {one['high']:+.4f}"]
    )


def _table_of(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Words on the left, figures on the right; the last two columns are a difference and its interval."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for at, column in enumerate([*columns, "difference", "95% interval"]):
        table.add_column(column, justify="left" if at == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    _console().print(table)


def _table(columns: dict[str, str], rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in columns.values():
        table.add_column(title, overflow="fold")
    for row in rows:
        style = "green" if "serving" in str(row.get("state")) else ""
        table.add_row(
            *(Text(_text(row[name]) + (_override(row) if name == "why" else "")) for name in columns), style=style
        )
    _console().print(table)


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def _override(row: dict[str, Any]) -> str:
    return f" (override: {row['override']})" if row.get("override") and "number" not in row else ""


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _json(found: Any) -> None:
    print(json.dumps(found, indent=2))


def _user() -> str:
    return os.environ.get("USER") or getpass.getuser()
