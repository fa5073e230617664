"""ctr_daily: the stages of dvc.yaml, once a day, one task each. `make airflow` starts Airflow with it.

dvc.yaml says what a stage runs and reads; this file says when, after what, how often again and where. A test holds
the two graphs together. The train tasks wait for slots of the pool `gpu`, which must exist (`make airflow` makes it;
elsewhere: `airflow pools set gpu 2 "training"`): its slots are the number of models that train at the same time.

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
DECISION = PROJECT / "artifacts/gate/decision.json"

TELEMETRY_OFF = {
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "BENTOML_DO_NOT_TRACK": "True",
}

DOC = """
Yesterday's clicks in, a served model out, with proof at every step.

| task | what it does | if it goes wrong |
| --- | --- | --- |
| `ingest` | raw files of the source to canonical events | red |
| `validate` | judges the data's contract | red, no retry: broken data stay broken |
| `embed`, `features`, `dataset` | item vectors, feature store, training arrays | red |
| `start` | the champion's weights, for the models with a warm start | red |
| `train_…` | one task a model, in the pool `gpu`; a retry resumes where it was killed | red |
| `evaluate_…` | test days, whole and by slice, beside the champion | red |
| `gate` | rules and champion: may a model ship? | a rejection is a verdict, not a failure |
| `approved` | reads the verdict | rejected: `package` and `smoke` are skipped, the run ends green |
| `package`, `smoke` | the approved model as a Bento, served and compared with its offline scores | red |
| `report` | the run's figures and plots: `artifacts/report.html` | |

Each task runs one stage of `dvc.yaml` with `dvc repro --single-item`: a stage whose inputs did not change ends in a
second, so clearing a task, or the whole run, is safe. Why the gate decided as it did stands in the log of `gate` and
in `artifacts/gate/decision.json`. Nothing here moves the champion: `make promote` does, by hand.
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
    """Whether the gate lets a model ship. Without a decision that says so in as many words, nothing does."""
    decision = json.loads(DECISION.read_text())
    for reason in decision["reasons"]:
        print(reason)
    return decision["verdict"] == "approve"


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
    doc_md=DOC,
    tags=["clickloop"],
)
def ctr_daily() -> None:
    training = {
        "pool": "gpu",
        "retries": 2,
        "retry_delay": timedelta(minutes=5),  # a device that another process fills may be free by then
        "execution_timeout": timedelta(hours=12),
    }
    trained = [stage("train@qin", **training), stage("train@sdcnv3", **training)]
    stage("start") >> trained
    chain(
        stage("ingest"),
        stage("validate", retries=0),
        stage("embed"),
        stage("features"),
        stage("dataset"),
        trained,
        [stage("evaluate@qin"), stage("evaluate@sdcnv3")],
        stage("gate"),
        approved(),
        stage("package"),
        stage("smoke", outlets=[Asset("ctr_ranker_bento")]),
        # None failed: also after a rejection, never after a failure
        run("report", "-m", "components", "report", trigger_rule="none_failed"),
    )


ctr_daily()
