"""When Airflow runs what: the section `schedule` of params.yaml. Needs PyYAML alone, as Airflow does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from components.common import pipeline


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """daily, hourly   cron expressions in UTC, of ctr_daily and feature_refresh
    poll_minutes    between two looks for the raw files of a day
    answer_hours    for a person to approve, where run.promote is ask; after that, the model is not promoted
    deadline_hours  if a run is not done this long after its start, the webhook gets a message
    """

    daily: str
    hourly: str
    poll_minutes: float
    answer_hours: float
    deadline_hours: float

    def __post_init__(self) -> None:
        for name in ("daily", "hourly"):
            if len(getattr(self, name).split()) != 5:
                raise ValueError(f'{name} is {getattr(self, name)!r}; write a cron expression such as "0 0 * * *"')
        for name in ("poll_minutes", "answer_hours", "deadline_hours"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be more than 0")


def read(root: Path) -> ScheduleConfig:
    return ScheduleConfig(**pipeline.settings("schedule", root))
