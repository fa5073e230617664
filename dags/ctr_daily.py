"""ctr_daily: closes a day, every night. `make airflow` starts Airflow with it.

dvc.yaml says what a stage runs, and after which stages; components/operations/day.py has the other steps. This file
says when, where, and how often a task is tried again. The train tasks wait for slots of the pool `gpu`: its slots are
the number of models that train at the same time. The pool must exist. `make airflow` makes it; elsewhere run
`airflow pools set gpu 2 "training"`.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import Asset, CronDataIntervalTimetable, Param, TaskGroup, dag
from airflow.sdk.definitions.callback import SyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference
from clickloop_steps import (
    PIPELINE,
    SCHEDULE,
    Approval,
    Noted,
    Ready,
    Step,
    Webhook,
    day_of,
    late,
    report_url,
    training_threads,
)

DOC = """
The clicks of a day go in, and a version that serves comes out, with proof at every step.

A run closes the day on which its data interval begins. It works in a git worktree of its own, `.runs/DAY`, and ends
in the tag `run/DAY`. So runs of several days may run at the same time, and a run may be cleared and run again.

| task | what it does |
| --- | --- |
| `open` | makes the worktree, at the code of this commit |
| `ready` | waits for the raw files of the day, and holds no worker meanwhile |
{stages}
| `close` | writes the report, commits, sets the tag `run/DAY`, and pushes the data to the remote |
| `ask` | asks a person, if `run.promote` is `ask`; no answer in time counts as a no |
| `ship` | registers the version, and promotes it if it may; else publishes the day's features alone |
| `tidy` | removes what no version and none of the newest runs needs |

If the gate rejects every model, the run succeeds and ships nothing. Every other problem makes its task and the run
fail. Broken data are not tried again, because they stay broken. The note of a run says what came out, and links to its
report.
"""

ASK = """
{% set facts = ti.xcom_pull(task_ids="close") or {} %}
**{{ facts.get("model") }}** of {{ facts.get("day") }} passed the gate. AUC {{ facts.get("auc") }},
{{ facts.get("rows") }} rows.

{% for reason in facts.get("reasons", []) %}- {{ reason }}
{% endfor %}
The report with the gate's decision: {{ report_url(facts.get("day")) }}
"""

BY_COMMAND: dict[str, dict[str, Any]] = {
    "train": {
        "pool": "gpu",
        "threads": training_threads(),
        "retry_delay": timedelta(minutes=5),  # a device that another process fills may be free by then
        "execution_timeout": timedelta(hours=12),
    },
    "refit": {"pool": "gpu", "execution_timeout": timedelta(hours=12)},
}


def stage(name: str) -> Step:
    """The task of one stage. Task ids hold no @: train@qin is train_qin."""
    one = PIPELINE.stages[name]
    return Step(
        task_id=name.replace("@", "_"),
        words=lambda context: ("day", "stage", str(day_of(context)), name),
        doc_md=one.desc,
        **BY_COMMAND.get(one.command, {}),
    )


def shipped(context: Any) -> tuple[str, ...]:
    """What `ship` does after a person's answer; without one, run.promote decides."""
    words = ("day", "ship", str(day_of(context)))
    answer = context["ti"].xcom_pull(task_ids="ask")
    if answer is None:
        return (*words, "--who", "Airflow")
    promote, said = ("auto", "approved") if answer["approved"] else ("never", "not approved")
    return (*words, "--promote", promote, "--who", answer["who"], "--why", f"{said} in Airflow")


@dag(
    schedule=CronDataIntervalTimetable(SCHEDULE.daily, timezone="UTC"),
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=4,  # each in its own worktree; a backfill has a bound of its own, --max-active-runs
    params={
        "day": Param(
            None, type=["null", "string"], format="date", title="Day",
            description="The day that a manual run closes. Empty: yesterday.",
        ),
    },
    default_args={
        "retries": 3,  # only what may pass is tried again
        "retry_delay": timedelta(minutes=2),
        "execution_timeout": timedelta(hours=2),
        "weight_rule": "upstream",  # of several days, the one that is further along comes first
        "on_failure_callback": Webhook(),
    },
    deadline=DeadlineAlert(
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=timedelta(hours=SCHEDULE.deadline_hours),
        callback=SyncCallback(late),
    ),
    user_defined_macros={"report_url": report_url},
    doc_md=DOC.format(stages="\n".join(f"| `{name}` | {does} |" for name, does in PIPELINE.commands().items())),
    tags=["clickloop"],
)  # fmt: skip
def ctr_daily() -> None:
    ready = Ready(task_id="ready", poke_interval=timedelta(minutes=SCHEDULE.poll_minutes), doc_md=Ready.__doc__)
    Step(task_id="open", words=lambda context: ("day", "open", str(day_of(context)))) >> ready
    tasks: dict[str, Step] = {}
    for storey, names in PIPELINE.storeys().items():
        with TaskGroup(f"{storey}_stages", prefix_group_id=False, group_display_name=storey):
            tasks |= {name: stage(name) for name in names}
    close = Noted(task_id="close", words=lambda context: ("day", "close", str(day_of(context))))
    before = PIPELINE.before()
    for name, others in before.items():
        ([tasks[other] for other in others] or [ready]) >> tasks[name]
    last = tasks.keys() - set().union(*before.values())
    [tasks[name] for name in last] >> close
    ask = Approval(
        task_id="ask",
        subject="Shall the model of {{ (ti.xcom_pull(task_ids='close') or {}).get('day') }} become the champion?",
        body=ASK,
        response_timeout=timedelta(hours=SCHEDULE.answer_hours),
        notifiers=[Webhook("a model waits for your approval")],
        doc_md=Approval.__doc__,
    )
    ship = Noted(task_id="ship", words=shipped, trigger_rule="none_failed", outlets=[Asset("ctr_ranker")])
    close >> ask >> ship >> Step(task_id="tidy", words=lambda context: ("day", "tidy"))


ctr_daily()
