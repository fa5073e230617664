"""The contract as Great Expectations suites: one function a table, a rule a line.

A rule is `critical`, which stops the run, unless it says that it is a `WARNING`. The columns that are not of the data
itself (`item_is_known`, `volume_ratio`, …) are made by `validate`, so that a rule stays a plain statement on a column.
"""

from __future__ import annotations

from datetime import UTC as ZONE
from datetime import datetime
from typing import TYPE_CHECKING

import great_expectations.expectations as gxe
from great_expectations.expectations import Expectation
from great_expectations.expectations.metadata_types import FailureSeverity

if TYPE_CHECKING:
    from components.validate import ValidateConfig


def event_rules(until: datetime | None) -> list[Expectation]:
    latest = until or datetime.now(ZONE)
    return [
        *(gxe.ExpectColumnValuesToNotBeNull(column=c) for c in ("user_id", "item_id", "timestamp", "label")),
        gxe.ExpectColumnValuesToBeInSet(column="label", value_set=[0, 1]),
        gxe.ExpectColumnValuesToBeBetween(
            column="timestamp", min_value=datetime(1990, 1, 1, tzinfo=ZONE), max_value=latest
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="item_is_known", value_set=[True], description="every event's item_id is in items"
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="user_is_known", value_set=[True], description="every event's user_id is in users"
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="is_in_its_day", value_set=[True], description="an event lies in the partition of its UTC day"
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="is_first",
            value_set=[True],
            mostly=0.999,  # two in one second can be honest
            description="no impression is there twice",
            severity=FailureSeverity.WARNING,
        ),
    ]


def day_rules(config: ValidateConfig) -> list[Expectation]:
    return [
        gxe.ExpectTableRowCountToBeBetween(min_value=1),
        gxe.ExpectColumnValuesToBeBetween(
            column="rows_if_judged", min_value=1, description="no day among the newest is empty"
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="volume_ratio",
            min_value=config.volume_ratio[0],
            max_value=config.volume_ratio[1],
            description="a day's rows over the median of the days before it",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="label_rate", min_value=config.label_rate[0], max_value=config.label_rate[1]
        ),
    ]


def item_rules() -> list[Expectation]:
    return [
        gxe.ExpectTableRowCountToBeBetween(min_value=1),
        *(gxe.ExpectColumnValuesToNotBeNull(column=c) for c in ("item_id", "created_at")),
        gxe.ExpectColumnValuesToBeUnique(column="item_id"),
        gxe.ExpectColumnValuesToNotBeNull(column="title", severity=FailureSeverity.WARNING),
    ]


def user_rules() -> list[Expectation]:
    return [gxe.ExpectColumnValuesToNotBeNull(column="user_id"), gxe.ExpectColumnValuesToBeUnique(column="user_id")]


def vector_rules(name: str) -> list[Expectation]:
    return [
        gxe.ExpectColumnValuesToNotBeNull(column="item_id"),
        gxe.ExpectColumnValuesToBeUnique(column="item_id"),
        gxe.ExpectColumnValuesToBeInSet(
            column="item_is_known", value_set=[True], description=f"every {name} vector's item_id is in items"
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="is_usual_length", value_set=[True], description=f"all {name} vectors have one length"
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="non_finite_values", max_value=0, description=f"no NaN or infinity in a {name} vector"
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="norm", min_value=0, strict_min=True, description=f"no {name} vector is all zeros",
            severity=FailureSeverity.WARNING,
        ),
    ]  # fmt: skip


def coverage_rules(config: ValidateConfig) -> list[Expectation]:
    return [
        gxe.ExpectColumnValuesToBeBetween(
            column="missing_share", max_value=config.max_missing_share, severity=FailureSeverity.WARNING
        )
    ]


def freshness_rules(config: ValidateConfig) -> list[Expectation]:
    return [gxe.ExpectColumnValuesToBeBetween(column="age_hours", max_value=config.max_age_hours)]
