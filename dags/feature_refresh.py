"""feature_refresh: new clicks into what serves, every hour, without training. ctr_daily makes the models."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import CronDataIntervalTimetable, dag
from clickloop_steps import SCHEDULE, Step, Webhook


def words(context: Any) -> tuple[str, ...]:
    """A manual run has no interval: it publishes what is known now, to the last full hour."""
    until = context.get("data_interval_end")
    return ("refresh", "--until", until.isoformat()) if until else ("refresh",)


@dag(
    schedule=CronDataIntervalTimetable(SCHEDULE.hourly, timezone="UTC"),
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,  # an hour that is late makes the next one wait; the newest one is enough
    default_args={
        "retries": 2,
        "retry_delay": timedelta(minutes=2),
        "execution_timeout": timedelta(minutes=50),
        "on_failure_callback": Webhook(),
    },
    doc_md=__doc__
    + """
It runs the stages up to `features` in a worktree of its own, `.runs/refresh`: those whose inputs changed. Then it fills
an online store and switches what serves to it, unless the store that serves has the same.
""",
    tags=["clickloop"],
)
def feature_refresh() -> None:
    Step(
        task_id="refresh",
        words=words,
        priority_weight=1000,  # minutes of work, which hours of training must not hold up
        weight_rule="absolute",
        doc_md="Runs the stages up to `features`, and publishes what changed.",
    )


feature_refresh()
