"""What the DAGs share: the project, tasks that run its commands, a person's approval, and messages to a webhook.

A task runs `python -m components …` in the project's folder: a list of words, never a shell. The command's exit code
says whether to try again: 65 (data, code or settings are wrong) fails at once, everything else is tried again. The log
of a task is what its command said, and ends with the reason.

The project's folder is CLICKLOOP_PROJECT, or the one above this file's. Its Python is the one that runs Airflow.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, date, timedelta
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import BaseNotifier, BaseOperator, BaseOperatorLink, BaseSensorOperator
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException
from airflow.sdk.timezone import utcnow

PROJECT = Path(os.environ.get("CLICKLOOP_PROJECT") or Path(__file__).resolve().parents[1])
sys.path.append(str(PROJECT))  # Airflow adds the DAGs' folder alone

from components.common import pipeline, schedule, threads  # noqa: E402 - they need PyYAML alone, as Airflow does

PIPELINE = pipeline.read(PROJECT)
SCHEDULE = schedule.read(PROJECT)
TRAINING_SLOTS = int(os.environ.get("CLICKLOOP_TRAINING_SLOTS", "2"))  # of the pool `gpu`
BROKEN, NOT_YET = 65, 75  # exit codes of `day`: the same again would fail again; something passes
MARK = "CLICKLOOP_TASK"  # in the environment of a task's command: which task it belongs to
KILL_SECONDS = 30
APPROVE, REJECT = "Approve", "Reject"
ENVIRONMENT = {
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "BENTOML_DO_NOT_TRACK": "True",
    # dvc.yaml says `python`: the one that runs Airflow, whether or not its environment was activated
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
}


def day_of(context: Mapping[str, Any]) -> date:
    """The day that a run closes.

    Of a scheduled or backfilled run, the day on which its data interval begins. Of a manual run, the day that it was
    asked for, else the day before it. A conf that is no date is a ValueError here, before a command sees it.
    """
    run = context["dag_run"]
    asked = context["params"].get("day")
    if run.run_type != "manual":
        return context["data_interval_start"].astimezone(UTC).date()
    return date.fromisoformat(asked) if asked else run.run_after.astimezone(UTC).date() - timedelta(days=1)


def report_url(day: str) -> str:
    """The page of a run, as dags/plugins/clickloop_pages.py serves it."""
    return f"{conf.get('api', 'base_url', fallback='').rstrip('/')}/clickloop/runs/{day}"


# ---- commands -----------------------------------------------------------------------------------------------------


class Command:
    """What both kinds of tasks need to run a command; of an operator."""

    process: subprocess.Popen[str] | None = None
    log: Any

    def call(self, context: Mapping[str, Any], *words: str, **environment: str) -> tuple[int, str, dict[str, Any]]:
        """Run `python -m components WORDS`. Returns its exit code, the last line that it said, and its facts.

        Facts are the JSON object on the last line of its standard output, if it prints one.
        """
        task = context["ti"]
        mark = f"{task.dag_id}/{task.run_id}/{task.task_id}"
        if left := end_marked(mark):
            self.log.info("ended %d processes that an earlier attempt had left", left)
        environment |= {
            **ENVIRONMENT,
            MARK: mark,
            "AIRFLOW_CTX_DAG_ID": task.dag_id,
            "AIRFLOW_CTX_DAG_RUN_ID": task.run_id,
        }
        reason = ""
        with TemporaryFile("w+", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "components", *words], cwd=PROJECT, env={**os.environ, **environment},
                stdout=output, stderr=subprocess.PIPE, text=True, errors="backslashreplace", start_new_session=True,
            )  # fmt: skip
            assert self.process.stderr is not None
            for line in self.process.stderr:
                if said := line.rstrip():
                    self.log.info("%s", said)
                    reason = said
            code = self.process.wait()
            output.seek(0)
            printed = output.read().strip().splitlines()
        facts: dict[str, Any] = {}
        with suppress(IndexError, ValueError):
            found = json.loads(printed[-1])
            facts = found if isinstance(found, dict) else {}
        if code < 0:
            reason = f"killed by {signal.Signals(-code).name}; after SIGKILL, look whether memory ran out. {reason}"
        return code, reason, facts

    def on_kill(self) -> None:
        """The command and all that it started."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(KILL_SECONDS)
            os.killpg(self.process.pid, signal.SIGKILL)


class Step(Command, BaseOperator):
    """One command of a run.

    words    what follows `python -m components`: the task's words, given its context
    threads  of OpenMP and PyTorch; None: as many as there are cores
    """

    def __init__(
        self,
        *,
        words: Callable[[Any], Sequence[str]],
        threads: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.words, self.threads = words, threads

    def execute(self, context: Any) -> dict[str, Any] | None:
        environment = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        code, reason, facts = self.call(context, *self.words(context), **environment)
        if code == BROKEN:
            raise AirflowFailException(reason)
        if code:
            raise AirflowException(reason)
        return facts or None


class ReportLink(BaseOperatorLink):
    """A button on the task's page: the run's report."""

    name = "Report"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        return report_url(str(day_of(ti_key.get_template_context())))


class Noted(Step):
    """A step whose facts go into the run's note, and that has a button for the report."""

    operator_extra_links = (ReportLink(),)

    def execute(self, context: Any) -> dict[str, Any]:
        facts = super().execute(context) or {}
        known = {**(context["ti"].xcom_pull(task_ids="close") or {}), **facts}
        note = summary(known)
        self.log.info("%s", note)
        try:
            write_note(context, note)
        except (OSError, ValueError) as error:  # a note is a help, no part of the run
            self.log.warning("the run has no note: %s", error)
        if facts.get("verdict") == "reject":
            Webhook(f"{facts['day']}: the gate rejected: {'; '.join(facts.get('reasons', []))}")(context)
        return facts


class Ready(Command, BaseSensorOperator):
    """Waits for the raw files of the day, and holds no worker meanwhile. `day ready` knows how long, and what then."""

    def __init__(self, **options: Any) -> None:
        super().__init__(mode="reschedule", timeout=timedelta(days=365), **options)

    def poke(self, context: Any) -> bool:
        begun = context["ti"].get_first_reschedule_date(context)
        hours = (utcnow() - begun).total_seconds() / 3600 if begun else 0.0
        code, reason, _ = self.call(context, "day", "ready", str(day_of(context)), "--waited", f"{hours:.4f}")
        if code not in (0, NOT_YET):
            raise (AirflowFailException if code == BROKEN else AirflowException)(reason)
        return code == 0


def end_marked(mark: str) -> int:
    """SIGKILL for the processes of an earlier attempt at a task, which outlived it. Returns how many there were."""
    marked, ended = f"{MARK}={mark}".encode(), 0
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it ended, or is another user's
            if marked in file.read_bytes().split(b"\0"):
                os.kill(int(file.parent.name), signal.SIGKILL)
                ended += 1
    return ended


# ---- people -------------------------------------------------------------------------------------------------------


class Approval(HITLOperator):
    """Asks a person whether the approved model becomes the champion, where `run.promote` is `ask`.

    No answer in time counts as a no. Returns {"approved": …, "who": …}.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(options=[APPROVE, REJECT], defaults=[REJECT], execution_timeout=None, **options)

    def execute(self, context: Any) -> Any:
        facts = context["ti"].xcom_pull(task_ids="close") or {}
        promote = pipeline.settings("run", PROJECT)["promote"]
        for nobody, why in (
            (promote != "ask", f"run.promote is {promote}"),
            (facts.get("verdict") != "approve", "the gate rejected"),
            (context["dag_run"].run_type == "backfill", "a backfilled day is not promoted"),
        ):
            if nobody:
                raise AirflowSkipException(f"nobody is asked: {why}")
        return super().execute(context)

    def execute_complete(self, context: Any, event: dict[str, Any]) -> dict[str, Any]:
        answer = super().execute_complete(context, event)
        person = answer["responded_by_user"]
        approved = answer["chosen_options"] == [APPROVE]
        self.log.info(
            "%s", f"{person['name']} said {answer['chosen_options'][0]}" if person else "nobody answered in time"
        )
        return {"approved": approved, "who": person["name"] if person else "nobody, the time was over"}


class Webhook(BaseNotifier):
    """POSTs text, dag, run, task and url as JSON to CLICKLOOP_WEBHOOK. Without that, it does nothing."""

    def __init__(self, text: str = "") -> None:
        super().__init__()
        self.text = text

    def notify(self, context: Any) -> None:
        task, error = context.get("ti"), context.get("exception")
        facts = {
            "text": self.text or f"{task.task_id} failed: {error}",
            "dag": task.dag_id,
            "run": task.run_id,
            "task": task.task_id,
            "url": f"{conf.get('api', 'base_url', fallback='').rstrip('/')}/dags/{task.dag_id}/runs/{task.run_id}",
        }
        send(facts)


def send(facts: Mapping[str, Any]) -> None:
    """A message to CLICKLOOP_WEBHOOK. Slack, Teams, Mattermost and others show its `text`."""
    if address := os.environ.get("CLICKLOOP_WEBHOOK"):
        ask("POST", address, facts)


def late(context: Mapping[str, Any], **_: Any) -> None:
    """Of the deadline: a run that is not done by then. The context is not a task's, it has the run alone."""
    run = context["dag_run"]
    text = f"{run['dag_run_id']} is not done {SCHEDULE.deadline_hours} hours after its start"
    send({"text": text, "dag": run["dag_id"], "run": run["dag_run_id"]})


# ---- what a person sees of a run ----------------------------------------------------------------------------------


def summary(facts: Mapping[str, Any]) -> str:
    """A run's note, in Markdown."""
    day = facts["day"]
    auc, rows, promoted = facts.get("auc"), facts.get("rows"), "champion" if facts.get("promoted") else "not promoted"
    lines = [
        f"**{day}: {facts.get('verdict')}**" + (f", {facts['model']}" if facts.get("model") else ""),
        *([f"AUC {auc:.4f}"] if isinstance(auc, float) else []),
        *([f"{rows:,} rows"] if isinstance(rows, int) else []),
        *([f"version {facts['version']}, {promoted}"] if facts.get("version") else []),
        f"[report]({report_url(day)}), tag `run/{day}`",
        *([str(facts["why"])] if facts.get("why") else []),
        *facts.get("reasons", []),
    ]
    return "\n\n".join(lines)[:1000]  # Airflow takes no more


def write_note(context: Any, note: str) -> None:
    """Raises OSError or ValueError where the API says no. Tasks have no way to it but Airflow's own login."""
    url = conf.get("api", "base_url", fallback="").rstrip("/")
    logins = Path(os.environ["AIRFLOW_HOME"], "simple_auth_manager_passwords.json.generated")
    (user, password), *_ = json.loads(logins.read_text()).items()
    token = ask("POST", f"{url}/auth/token", {"username": user, "password": password})["access_token"]
    run = context["dag_run"]
    path = f"{url}/api/v2/dags/{run.dag_id}/dagRuns/{urllib.parse.quote(run.run_id)}?update_mask=note"
    ask("PATCH", path, {"note": note}, authorization=f"Bearer {token}")


def ask(method: str, url: str, body: Mapping[str, Any], **headers: str) -> Any:
    """One HTTP request with a JSON body. Returns the answer's JSON, or None."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url!r} is no http address; set CLICKLOOP_WEBHOOK or AIRFLOW__API__BASE_URL to one")
    request = urllib.request.Request(  # noqa: S310
        url, json.dumps(body).encode(), {"content-type": "application/json", **headers}, method=method
    )
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        found = answer.read()
    with suppress(ValueError):
        return json.loads(found)
    return None


def training_threads() -> int:
    """Of one training, where as many train at the same time as the pool has slots."""
    return max(1, threads.usable_cores() // TRAINING_SLOTS)
