"""validate: Great Expectations judges the canonical data.

The rules are in `rules.py`, the tables that they judge in `frames`. Facts that no single row shows (an item is known, a
day has as many rows as the days before it) are columns of these tables, so each rule is a plain statement on a column.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from components.common.artifacts import folder_hash, new_folder, read_json, write_json
from components.common.config import parse_time
from components.common.contracts import Canonical
from components.data.frames.columns import column_frame
from components.data.frames.days import DAY, day_frame, figure_frame, last_day, newest_frame, recent_days
from components.data.frames.rows import event_frame, item_frame, quarantine_frame
from components.data.frames.vectors import cohort_frame, coverage_frame, vector_frame
from components.data.thresholds import ValidateConfig

if TYPE_CHECKING:
    from great_expectations.expectations import Expectation

EXAMPLES = 3
OLD_DAYS = 3  # days since the newest event, from which on a person is told
ALWAYS = datetime(2000, 1, 1, tzinfo=UTC)  # in place of the time of the run: equal data are equal bytes
# What else differs between runs in the Data Docs: times of loading and building, and a number in the names of blocks
OF_THE_RUN = re.compile(
    r"(?<!\d)(?!20000101T)\d{8}T\d{6}\.\d{6}Z|(?<=collapse-body)-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
)
NOT_LIMITS = {"column", "batch_id", "row_condition"}  # arguments of a rule that are not part of its limits


def run(config: ValidateConfig, canonical: Path, output: Path, docs: Path) -> dict[str, Any]:
    """Judge the canonical folder; write the report and the Data Docs, whatever the result.

    Raises ValueError if a rule with severity `stop` is broken; it names table, column and rule, and shows three rows.
    """
    facts = read_json(canonical / "source.json", "ingest")
    tables = suites(config, Canonical(canonical), facts)
    verdicts = judge(tables, docs)
    broken = [v for v in verdicts if not v["passed"] and v["severity"] == "stop"]
    report = {
        "passed": not broken,
        "canonical_sha256": folder_hash(canonical),
        "rows": {name: len(frame) for name, (frame, _) in tables.items()},
        "quarantined": facts["broken"],
        "not_judged": not_judged(Canonical(canonical), tables),
        "rules": verdicts,
    }
    write_json(output, report)
    if note := old_data(facts):
        logging.getLogger(__name__).warning(note)
    for verdict in verdicts:
        if not verdict["passed"] and verdict["severity"] != "stop":
            logging.getLogger(__name__).warning("%s: %s", verdict["severity"], describe(verdict))
    if broken:
        rules = "\n  ".join(describe(verdict) for verdict in broken)
        raise ValueError(f"{canonical} breaks {len(broken)} rule(s); Data Docs: {docs}/index.html\n  {rules}")
    return report


def suites(
    config: ValidateConfig, data: Canonical, facts: dict[str, Any]
) -> dict[str, tuple[pd.DataFrame, list[Expectation]]]:
    """Table name -> the table that is judged, and its rules. `facts` is source.json."""
    from components.data import rules  # importing Great Expectations takes seconds

    until = parse_time("until", facts["until"]) if facts["until"] else None
    items = data.items()
    since = last_day(data, config, until) - (config.trailing_days - 1) * DAY
    tables: dict[str, tuple[pd.DataFrame, list[Expectation]]] = {}
    for name, table in data.each_modality():  # before the events are in memory
        judged = vector_frame(table, items["item_id"], config.spreads)
        tables[f"modality {name}"] = (judged, rules.vector_rules(name))
        tables[f"coverage {name}"] = (coverage_frame(table, items["item_id"]), rules.coverage_rules(config))
        tables[f"new items {name}"] = (cohort_frame(table, items, since), rules.cohort_rules(name))
        del table
    recent = recent_days(data, config, until)
    if until is not None:
        newest = newest_frame(recent, data, config)
        tables = {"newest day": (newest, rules.newest_rules(facts["missing_day"])), **tables}
        if facts["missing_day"] == "go_on" and not newest["is_whole"].all():  # half a day is judged by no other rule
            recent = recent_days(data, config, until - timedelta(days=1))
    events = event_frame(data)
    broken = quarantine_frame(data.root, facts["broken"], facts["rows"]["known"] - facts["rows"]["outside"])
    tables |= {
        "events": (events, rules.event_rules(until, events.columns)),
        "days": (day_frame(recent, config), rules.day_rules(config)),
        "figures": (figure_frame(recent, data, config), rules.figure_rules()),
        "columns": (column_frame(recent, data, config), rules.column_rules(config)),
        "items": (item_frame(data), rules.item_rules()),
        "users": (data.users().to_pandas(), rules.user_rules()),
        "quarantine": (broken, rules.quarantine_rules()),
    }
    if until is not None:
        last = events["timestamp"].max()
        frame = pd.DataFrame({"newest": [last], "age_hours": [(until - last).total_seconds() / 3600]})
        tables["freshness"] = (frame, rules.freshness_rules(config))
    return tables


def not_judged(data: Canonical, tables: dict[str, tuple[pd.DataFrame, list[Expectation]]]) -> list[str]:
    """What the rules could not judge, and why."""
    found = []
    if "freshness" not in tables:
        found.append("freshness: ingest.until is null")
    for _, newest in tables.get("newest day", (pd.DataFrame(), []))[0].iterrows():
        if not newest["is_whole"]:
            found.append(f"days: {newest['day']:%Y-%m-%d} is not whole ({newest['why']}): see ingest.missing_day")
    if np.datetime64(last := data.days()[-1]) > tables["days"][0]["day"].max():
        found.append(f"days: {last} is not complete")
    if tables["figures"][0].empty:
        found.append("figures: no day has enough days before it to know what is usual")
    return found


def old_data(facts: dict[str, Any]) -> str | None:
    """What to tell a person where `until` is null and the newest day is long over. It follows the clock, so no output
    has it."""
    now = datetime.now(UTC).date()
    days = (now - date.fromisoformat(facts["last_day"])).days
    if facts["until"] is not None or days < OLD_DAYS:
        return None
    return (
        f"the newest event is of {facts['last_day']}, {days:,} days ago, and ingest.until is null, so no rule judges "
        "its age: bring newer data, or give ingest.until"
    )


def summary(report: dict[str, Any]) -> dict[str, str]:
    kept = sum(rule["passed"] for rule in report["rules"])
    return {"rules": f"{kept} of {len(report['rules'])} hold"}


# ---- Great Expectations -----------------------------------------------------------------------------------------


def judge(tables: dict[str, tuple[pd.DataFrame, list[Expectation]]], docs: Path) -> list[dict[str, Any]]:
    """Run all suites in one Great Expectations context, and write its Data Docs to `docs`."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig
    from tqdm import tqdm

    verdicts: list[dict[str, Any]] = []
    with new_folder(docs) as site:
        gx_logger = logging.getLogger("great_expectations")
        gx_logger.setLevel(logging.ERROR)
        context = gx.get_context(mode="ephemeral")  # a file context writes all of its settings at every step
        pages = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(site.resolve())}
        index = {"class_name": "DefaultSiteIndexBuilder"}
        context.update_data_docs_site(
            "local_site", {"class_name": "SiteBuilder", "store_backend": pages, "site_index_builder": index}
        )
        context.variables.progress_bars = ProgressBarsConfig(globally=False)  # ours shows which table is judged
        source = context.data_sources.add_pandas("canonical")
        for name, (frame, rules) in tqdm(tables.items(), "validate", unit="table", disable=None):
            batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
            suite = context.suites.add(gx.ExpectationSuite(name=name, expectations=rules))
            definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
            result = definition.run(
                run_id=gx.RunIdentifier(run_time=ALWAYS),
                batch_parameters={"dataframe": frame},
                result_format={"result_format": "SUMMARY", "partial_unexpected_count": EXAMPLES},
            )
            verdicts += [_verdict(name, frame, one) for one in result.results]
        context.build_data_docs()
        for page in site.rglob("*.html"):
            page.write_text(OF_THE_RUN.sub("", page.read_text()))
    return verdicts


def _verdict(table: str, frame: pd.DataFrame, result: Any) -> dict[str, Any]:
    from great_expectations.expectations.metadata_types import FailureSeverity

    from components.data.rules import SEVERITIES

    config, found = result.expectation_config, result.result
    if result.exception_info and result.exception_info.get("raised_exception"):
        raise ValueError(f"{table}: {config.type} could not be judged: {result.exception_info['exception_message']}")
    kwargs = {k: v for k, v in config.kwargs.items() if k not in NOT_LIMITS and v is not None}
    verdict: dict[str, Any] = {
        "table": table,
        "column": (config.meta or {}).get("figure") or config.kwargs.get("column"),
        "rule": config.type,
        "says": config.description,
        "limits": {k: v if isinstance(v, int | float | str | bool | list) else str(v) for k, v in kwargs.items()},
        "severity": SEVERITIES[FailureSeverity(config.severity)],
        "passed": bool(result.success),
        "broken_rows": int(found.get("unexpected_count") or 0),
        "observed": found.get("observed_value"),
        "examples": [],
    }
    if not result.success and (rows := found.get("partial_unexpected_index_list")):
        shown: Iterable[int] = rows[:EXAMPLES]
        verdict["examples"] = [
            {"row": int(row), **{k: _plain(v) for k, v in frame.iloc[int(row)].items()}} for row in shown
        ]
    return verdict


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float) and not np.isfinite(value)) or value is pd.NaT:
        return None
    return value if isinstance(value, int | float | str | bool) else str(value)


def describe(verdict: dict[str, Any]) -> str:
    """`events.label: expect_column_values_to_be_in_set {…}: 12 rows, e.g. row 5 {…}`."""
    where = verdict["table"] + (f".{verdict['column']}" if verdict["column"] else "")
    meaning = f" ({verdict['says']})" if verdict["says"] else ""
    text = f"{where}: {verdict['rule']} {verdict['limits']}{meaning}: "
    if not verdict["examples"]:
        return text + f"observed {verdict['observed']}"
    examples = "; ".join(str(example) for example in verdict["examples"])
    return text + f"{verdict['broken_rows']} row(s), e.g. {examples}"
