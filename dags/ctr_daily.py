"""ctr_daily: the stages of dvc.yaml, once a day, one task each. `make airflow` starts Airflow with it.

dvc.yaml says what a stage runs, and after which stages. This file says when, where, and how often it is tried again.
The train tasks wait for slots of the pool `gpu`: its slots are the number of models that train at the same time. The
pool must exist. `make airflow` makes it; elsewhere run `airflow pools set gpu 2 "training"`.

The project's folder is CLICKLOOP_PROJECT, or the one above this file's. Its Python is the one that runs Airflow.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import Asset, chain, dag, task

PROJECT = Path(os.environ.get("CLICKLOOP_PROJECT") or Path(__file__).resolve().parents[1])
sys.path.append(str(PROJECT))  # Airflow adds the DAG's folder alone

from components.common import pipeline  # noqa: E402 - it needs PyYAML alone, as Airflow does

PIPELINE = pipeline.read(PROJECT)
DECISION = PROJECT / PIPELINE.stages["gate"].output("decision.json")

TELEMETRY_OFF = {
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "BENTOML_DO_NOT_TRACK": "True",
}

DOC = """
Yesterday's clicks go in, and a served model comes out, with proof at every step.

| task | what it does |
| --- | --- |
{stages}
| `approved` | reads the gate's decision |
| `report` | writes the run's figures and plots to `artifacts/report.html`, also after a rejection |

If the gate rejects every model, the run succeeds and ships nothing: `package` and `smoke` are skipped. Every other
problem makes its task and the run fail. Broken data are not tried again, because they stay broken.

Each task runs one stage of `dvc.yaml` with `dvc repro --single-item`. A stage whose inputs did not change ends in a
second, so you can safely clear a task or the whole run. The log of `gate` and `artifacts/gate/decision.json` say why
the gate decided as it did. Nothing here changes the champion: `make promote` does, by hand.
"""


def run(task_id: str, *arguments: str, **options: Any) -> BashOperator:
    """A task that runs `python arguments` in the project, its output in the task's log.

    The operator gives the command a process group of its own and ends that group when the task is killed. The command
    holds constants alone: nothing of a run's conf reaches a shell.
    """
    # dvc.yaml says `python`: the one that runs Airflow, whether or not its environment was activated
    path = shlex.quote(str(Path(sys.executable).parent))
    return BashOperator(
        task_id=task_id,
        bash_command=f'PATH={path}:"$PATH" exec {shlex.join([sys.executable, *arguments])}',
        cwd=str(PROJECT),
        env=TELEMETRY_OFF,
        append_env=True,
        skip_on_exit_code=None,
        do_xcom_push=False,
        **options,
    )


def stage(name: str, **options: Any) -> BashOperator:
    """The task of one DVC stage. Task ids hold no @: train@qin is train_qin."""
    # --wait-for-lock: two stages at a time take turns at DVC's lock, and hold it before and after their command alone
    arguments = ["-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
    return run(name.replace("@", "_"), *arguments, **options)


@task.short_circuit(ignore_downstream_trigger_rules=False)  # `report` has a rule of its own
def approved() -> bool:
    """Whether the gate lets a model ship. Nothing ships without a decision that says `approve`."""
    decision = json.loads(DECISION.read_text())
    for reason in decision["reasons"]:
        print(reason)
    return decision["verdict"] == "approve"


OPTIONS: dict[str, dict[str, Any]] = {
    "validate": {"retries": 0},
    "train": {
        "pool": "gpu",
        "retries": 2,
        "retry_delay": timedelta(minutes=5),  # a device that another process fills may be free by then
        "execution_timeout": timedelta(hours=12),
    },
    "smoke": {"outlets": [Asset("ctr_ranker_bento")]},
}


@dag(
    schedule="@daily",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,  # the runs share one working tree
    default_args={
        "retries": 1,
        "retry_delay": timedelta(minutes=2),
        "execution_timeout": timedelta(hours=2),
    },
    doc_md=DOC.format(stages="\n".join(f"| `{name}` | {does} |" for name, does in PIPELINE.commands().items())),
    tags=["clickloop"],
)
def ctr_daily() -> None:
    tasks = {name: stage(name, **OPTIONS.get(one.command, {})) for name, one in PIPELINE.stages.items()}
    verdict = approved()
    for name, others in PIPELINE.before().items():
        for other in others:
            chain(tasks[other], *([verdict] if other == "gate" else []), tasks[name])
    # None failed: also after a rejection, never after a failure
    tasks["smoke"] >> run("report", "-m", "components", "report", trigger_rule="none_failed")


ctr_daily()
