"""The contract as Great Expectations suites: one function a table, a rule a line.

STOP        the run ends
QUARANTINE  the run goes on without some rows. Ingest leaves them out before anything reads them, writes them with their
            reason to canonical/quarantine, and stops if they are more than `ingest.max_rejected`. The rows that it
            keeps must follow the same rules with STOP, in case ingest misses a broken row
WARN        logged, and in the report

Columns that are not in the data (`item_is_known`, `off`, …) are made by `frames`, so that a rule stays a plain
statement on a column. The limits of rules on `off` are learnt from the data: a figure may differ from its usual value
by a fixed tolerance (`thresholds.FLOORS`), plus `validate.spreads` times its usual variation (median absolute
deviation), plus what chance explains.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import great_expectations.expectations as gxe
from great_expectations.expectations import Expectation
from great_expectations.expectations.metadata_types import FailureSeverity
from great_expectations.expectations.row_conditions import Column

from components.common.contracts import LOGGED, POSITION, PROPENSITY
from components.data.thresholds import ValidateConfig

STOP, QUARANTINE, WARN = FailureSeverity.CRITICAL, FailureSeverity.WARNING, FailureSeverity.INFO
SEVERITIES = {STOP: "stop", QUARANTINE: "quarantine", WARN: "warn"}


def is_true(column: str, description: str, severity: FailureSeverity = STOP, mostly: float = 1.0) -> Expectation:
    return gxe.ExpectColumnValuesToBeInSet(
        column=column, value_set=[True], description=description, severity=severity, mostly=mostly
    )


def event_rules(until: datetime | None, columns: Iterable[str]) -> list[Expectation]:
    rules: list[Any] = [
        *(gxe.ExpectColumnValuesToNotBeNull(column=c) for c in ("user_id", "item_id", "timestamp", "label")),
        gxe.ExpectColumnValuesToBeInSet(column="label", value_set=[0, 1]),
        gxe.ExpectColumnValuesToBeBetween(
            column="timestamp", min_value=datetime(1990, 1, 1, tzinfo=UTC), max_value=until
        ),
        is_true("item_is_known", "every event's item_id is in items"),
        is_true("user_is_known", "every event's user_id is in users"),
        is_true("is_in_its_day", "every event is in the partition of its UTC day"),
        is_true("is_first", "no impression occurs twice", WARN, mostly=0.999),  # two in one second are possible
        is_true("item_exists", "no event is earlier than its item's created_at", WARN, mostly=0.999),
        is_true("happened_before_arrival", "no event happens after it arrived: the clocks agree", mostly=0.999),
        gxe.ExpectColumnValuesToBeBetween(column="true_probability", min_value=0, max_value=1),
        *(gxe.ExpectColumnValuesToNotBeNull(column=c) for c in LOGGED),
        gxe.ExpectColumnValuesToBeBetween(column=PROPENSITY, min_value=0, strict_min=True, max_value=1),
        gxe.ExpectColumnValuesToBeBetween(column=POSITION, min_value=1),
    ]
    return [rule for rule in rules if rule.column in columns]


def newest_rules(missing_day: str) -> list[Expectation]:
    return [
        is_true(
            "is_whole",
            "the newest day before ingest.until is there, and whole: else run it when the rest has come, give an "
            "earlier ingest.until, or set ingest.missing_day to go_on",
            WARN if missing_day == "go_on" else STOP,
        )
    ]


def day_rules(config: ValidateConfig) -> list[Expectation]:
    return [
        gxe.ExpectTableRowCountToBeBetween(min_value=1),
        gxe.ExpectColumnValuesToBeBetween(
            column="rows_if_judged", min_value=1, description="no day among the newest is empty"
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="label_rate", min_value=config.label_rate[0], max_value=config.label_rate[1]
        ),
    ]


def figure_rules() -> list[Expectation]:
    return [
        learnt("volume", "a day has about as many rows as the days before it"),
        learnt("label_rate", "clicks are about as likely as on the days before"),
        learnt("repeated", "no day repeats the rows (user, item and time of day) of another"),
        learnt("hours", "rows spread over the hours as on the days before: no time zone is mixed up"),
        learnt("returning", "about as many rows belong to known users as on the days before: ids mean the same users"),
        learnt("missing", "a feature is missing about as often as on the days before"),
        learnt("mix", "a feature's values are about as frequent as on the days before"),
        learnt("top_user", "no single user has a large part of a day's rows", WARN),
        learnt("top_item", "no single item has a large part of a day's rows", WARN),
        learnt("late", "about as many rows arrive a day late as on the days before", WARN),
    ]


def learnt(figure: str, description: str, severity: FailureSeverity = STOP) -> Expectation:
    """|off| of one figure is at most 1."""
    return gxe.ExpectColumnValuesToBeBetween(
        column="off", min_value=-1, max_value=1, row_condition=Column("figure") == figure, meta={"figure": figure},
        description=description, severity=severity,
    )  # fmt: skip


def column_rules(config: ValidateConfig) -> list[Expectation]:
    return [
        gxe.ExpectColumnValuesToBeBetween(
            column="tells_label",
            max_value=config.max_label_leak,
            description="no column alone predicts the label: leave it out of the data if it is only known after the "
            "click, or raise validate.max_label_leak if it is known before",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="values", min_value=2, description="a feature has more than one value", severity=WARN
        ),
    ]


def item_rules() -> list[Expectation]:
    return [
        gxe.ExpectTableRowCountToBeBetween(min_value=1),
        *(gxe.ExpectColumnValuesToNotBeNull(column=c) for c in ("item_id", "created_at")),
        gxe.ExpectColumnValuesToBeUnique(column="item_id"),
        gxe.ExpectColumnValuesToNotBeNull(column="title", severity=WARN),
        is_true("is_readable", "texts were decoded with the right encoding: no “cafÃ©” for “café”", mostly=0.99),
    ]


def user_rules() -> list[Expectation]:
    return [gxe.ExpectColumnValuesToNotBeNull(column="user_id"), gxe.ExpectColumnValuesToBeUnique(column="user_id")]


def vector_rules(name: str) -> list[Expectation]:
    return [
        gxe.ExpectColumnValuesToNotBeNull(column="item_id"),
        gxe.ExpectColumnValuesToBeUnique(column="item_id"),
        is_true("item_is_known", f"every {name} vector's item_id is in items"),
        is_true("is_usual_length", f"all {name} vectors have one length"),
        gxe.ExpectColumnValuesToBeBetween(
            column="non_finite_values", max_value=0, description=f"no NaN or infinity in a {name} vector"
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="norm",
            min_value=0,
            strict_min=True,
            mostly=0.99,
            description=f"almost no {name} vector is zero",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="norm", min_value=0, strict_min=True, description=f"no {name} vector is all zeros", severity=WARN
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="off", max_value=1, description=f"no {name} vector is so long that it sets the scale of all others"
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="off", min_value=-1, description=f"no {name} vector is almost zero", severity=WARN
        ),
    ]


def cohort_rules(name: str) -> list[Expectation]:
    return [
        learnt("no_vector", f"new items have a {name} vector about as often as older items"),
        learnt("norm", f"new items' {name} vectors are about as long as those of older items"),
        learnt("direction", f"new items' {name} vectors point in about the same direction as those of older items"),
        learnt("directions", f"new items' {name} vectors vary in the same directions as those of older items"),
    ]


def coverage_rules(config: ValidateConfig) -> list[Expectation]:
    return [
        gxe.ExpectColumnValuesToBeBetween(column="missing_share", max_value=config.max_missing_share, severity=WARN),
        gxe.ExpectColumnValuesToBeBetween(
            column="alike", max_value=0.99, description="vectors differ: they do not all point in one direction"
        ),
    ]


def freshness_rules(config: ValidateConfig) -> list[Expectation]:
    return [gxe.ExpectColumnValuesToBeBetween(column="age_hours", max_value=config.max_age_hours)]


def quarantine_rules() -> list[Expectation]:
    return [
        gxe.ExpectColumnValuesToBeBetween(
            column="rows", max_value=0, description="ingest left out no broken row", severity=QUARANTINE
        )
    ]
