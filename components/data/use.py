"""use: point the pipeline at a source, after a look at its files.

The look reads the first and the last file of each table, as `ingest` will. What would stop `ingest` in its first rows
stops here, and params.yaml stays as it was. Where neither files nor their names tell days, all events are read once for
the newest one's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from components.common.artifacts import new_file
from components.common.config import load, parse_time, section
from components.common.contracts import EVENTS, HISTORY, IMAGE, ITEMS, OPTIONAL, USERS, attributes, conform
from components.data import sources
from components.data.arrivals import newest_day
from components.data.ingest import IngestConfig
from components.data.sources import RawTables, Window, brief
from components.data.sources.mapping import FilesConfig
from components.data.sources.simulator import SimulatorConfig

ROWS = 1000  # of a file
SIMULATED = {"until": "2026-01-11T00:00:00+00:00", "window_days": 10, "lead_days": 7}
SETTINGS: dict[str, type] = {"simulator": SimulatorConfig, "files": FilesConfig}


def use(source: str, raw: str | None, params: Path) -> None:
    """Look at a source's files, print what they hold, and write it into the section `ingest` of params.yaml: `source`
    and `raw`, `until`, the end of its newest whole day, and `window_days`, all of its days.

    The simulator has days without end: it gets those of SIMULATED, or keeps its own.
    Comments of params.yaml are kept. Raw data that lie in this git repository are added to .git/info/exclude.
    Raises ValueError where the path, the files or the mapping are wrong; then nothing is written.
    """
    if raw is None and source in sources.ADAPTERS:
        if source != "simulator":
            raise ValueError(f"{source} reads files: name their path with --raw PATH")
        raw = sources.SIMULATOR_RAW
    raw = str(Path(str(raw)).expanduser()) if str(raw).startswith("~") else str(raw)
    sources.check(source, raw)
    ingest = section(params, "ingest")
    settings: Any = load(params, f"ingest.{source}", SETTINGS[source]) if source in SETTINGS else None
    if isinstance(settings, FilesConfig):
        _require_mapping(raw, settings.events.path)
    days: dict[str, Any] = {} if ingest["source"] == "simulator" else SIMULATED
    window = _window(ingest | days) if source == "simulator" else Window()
    found = sources.read(source, raw, settings, window, rows=ROWS)
    events = conform(found.events, EVENTS, f"{source} events", optional=OPTIONAL)
    if not len(events):
        reasons = ", ".join(f"{reason}: {len(rows)}" for reason, rows in found.rejected.items() if len(rows))
        raise ValueError(f"{source}: no row of those looked at is whole ({reasons}); mend the files or the mapping")
    conform(found.users, USERS, f"{source} users")
    conform(found.items, ITEMS, f"{source} items")
    if source != "simulator":
        days = {"until": None, "window_days": None}
        if not set(HISTORY) <= set(events.column_names):  # it has times
            day = newest_day(_config(source, raw, params))
            days["until"] = f"{day + timedelta(days=1)}T00:00:00+00:00"
    _write({"source": source, "raw": raw, **days}, params)
    console = Console(highlight=False)
    _show(console, source, raw, events, found)
    if note := keep_out_of_git(raw, params):
        console.print(note, markup=False, soft_wrap=True)
    console.print(f"{params} now names this source. Next: dvc repro", markup=False, soft_wrap=True)


def _config(source: str, raw: str, params: Path) -> IngestConfig:
    """Of the source alone: the rest of the section may be of another one."""
    return IngestConfig(
        source=source, raw=raw, until=None, window_days=None, lead_days=0, missing_day="fail", max_rejected=0,
        picture_hosts=[], simulator=load(params, "ingest.simulator", SimulatorConfig),
        files=load(params, "ingest.files", FilesConfig),
    )  # fmt: skip


def _window(ingest: dict[str, Any]) -> Window:
    """The days that are trained on, as the section has them."""
    if ingest["until"] is None or ingest["window_days"] is None:
        return Window()
    until = parse_time("ingest.until", ingest["until"])
    return Window(since=until - timedelta(days=ingest["window_days"]), until=until)


def _require_mapping(raw: str, events: str | list[str] | dict[str, Any] | None) -> None:
    if "://" not in raw and Path(raw).is_file():
        file = Path(raw)
        raise ValueError(
            f"ingest.raw: {raw} is a file; name its folder: --raw {file.parent}, and in params.yaml "
            f"ingest.files.events.path: {file.name}. `python -m components inspect {raw}` proposes the mapping"
        )
    if events is None:
        raise ValueError(
            "ingest.files.events.path is null, so nobody knows which files are your impressions. "
            f"`python -m components inspect {raw}` proposes the mapping: paste it into params.yaml, then run this again"
        )


def _write(values: dict[str, Any], params: Path) -> None:
    """Set keys of `ingest`. The file stays as it is where they have these values already."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import RoundTripRepresenter
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    class Representer(RoundTripRepresenter):
        """Ruamel's own, but a null is written as the word, as in params.yaml."""

    Representer.add_representer(type(None), lambda own, _: own.represent_scalar("tag:yaml.org,2002:null", "null"))
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 120
    yaml.Representer = Representer
    content = yaml.load(params)
    changed = {name: value for name, value in values.items() if content["ingest"][name] != value}
    if changed:
        if changed.get("until"):  # YAML would take it for a time
            changed["until"] = DoubleQuotedScalarString(changed["until"])
        content["ingest"].update(changed)
        with new_file(params) as scratch:
            yaml.dump(content, scratch)


def _show(console: Console, source: str, raw: str, events: pa.Table, found: RawTables) -> None:
    """The columns of the tables, and the figures of the rows that were looked at."""
    table = Table("table", "column", "type", "use", "example", title=escape(f"{source}: {raw}"), title_justify="left")
    numeric = found.facts.get("numeric", [])
    tables = {"events": (events, EVENTS), "users": (found.users, USERS), "items": (found.items, ITEMS)}
    for name, (rows, schema) in tables.items():
        features = set(attributes(rows, schema)) - {IMAGE}
        for column in rows.column_names:
            values = rows[column].drop_null()
            use = ("number, in buckets" if column in numeric else "feature") if column in features else "canonical"
            example = brief(values[0].as_py())[:40] if len(values) else "null"
            table.add_row(name, column, str(rows[column].type), use, escape(example))
        table.add_section()
    console.print(table)
    facts: dict[str, Any] = {"rows looked at": f"{len(events):,}"}
    if not set(HISTORY) <= set(events.column_names):
        first, last = (f"{moment.as_py():%Y-%m-%d}" for moment in pc.min_max(events["timestamp"]).values())
        facts["days"] = f"{first} to {last}"
    facts["label rate"] = f"{pc.mean(events['label']).as_py() or 0:.1%}"
    facts["users, items"] = f"{len(found.users):,} and {len(found.items):,}"
    facts |= {f"vectors {name}": f"{len(vectors):,}" for name, vectors in found.modalities.items()}
    facts |= {f"ids of {name}": f"text, encoded: see {name}_vocabulary.parquet" for name in found.vocabularies}
    facts |= {f"left out: {reason}": f"{len(rows):,}" for reason, rows in found.rejected.items() if len(rows)}
    width = max(map(len, facts))
    for name, value in facts.items():
        console.print(f"{name:<{width}}  {value}", markup=False)


def keep_out_of_git(raw: str, params: Path) -> str | None:
    """Where raw data lie in the repository of params.yaml and git would take them up: exclude them. Says so, or None.

    .git/info/exclude is this clone's own, as the data are: no file of the project changes.
    """
    here = params.resolve().parent
    if "://" in raw or not shutil.which("git"):
        return None

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)

    top = git("rev-parse", "--show-toplevel")
    path = Path(raw).resolve()
    root = Path(top.stdout.strip()).resolve()
    if top.returncode or path == root or not path.is_relative_to(root):
        return None
    if git("check-ignore", "--quiet", str(path)).returncode == 0 or git("ls-files", "--", str(path)).stdout:
        return None
    exclude = here / git("rev-parse", "--git-path", "info/exclude").stdout.strip()
    name = "/" + re.sub(r"([\\*?\[ ])", r"\\\1", path.relative_to(root).as_posix()) + ("/" if path.is_dir() else "")
    exclude.parent.mkdir(parents=True, exist_ok=True)
    before = exclude.read_text() if exclude.is_file() else ""
    exclude.write_text(before + ("" if before.endswith("\n") or not before else "\n") + name + "\n")
    return f"{raw} lies in this git repository: {name} was added to {exclude}, so that git does not take up the data."
