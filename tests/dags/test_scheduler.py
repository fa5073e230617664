"""Days closed by the real scheduler, on a real Postgres, in one Airflow that `make airflow` started.

The tests go in their order: a night ends and waits for a person; it is asked again; a day fails; two days are
backfilled while the scheduler is killed; and Ctrl-C leaves nothing.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from tests.parts import need

if TYPE_CHECKING:
    from tests.conftest import Project

pytestmark = pytest.mark.slow

MODELS = ("qin", "sdcnv3")
START_SECONDS, RUN_SECONDS, STOP_SECONDS = 900, 2700, 600
RUNS = "dags/ctr_daily/dagRuns"


@dataclass
class Webhook:
    """An HTTP server that keeps what it is told."""

    server: ThreadingHTTPServer
    told: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        told = self.told

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server.RequestHandlerClass = Handler
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def texts(self, run: str) -> list[str]:
        return [message["text"] for message in self.told if message.get("run") == run]


@dataclass(frozen=True)
class Airflow:
    project: Project
    process: subprocess.Popen[bytes]
    client: httpx.Client
    output: Path
    webhook: Webhook

    def ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer = self.client.request(method, f"/api/v2/{path}", **options)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}\n{self.said()}"
        return answer.json() if answer.content else {}

    def tasks(self, run: str) -> dict[str, dict[str, Any]]:
        found = self.ask("GET", f"{RUNS}/{run}/taskInstances")["task_instances"]
        return {task["task_id"]: task for task in found}

    def state(self, run: str, task: str) -> str | None:
        return self.tasks(run)[task]["state"]

    def facts(self, run: str, task: str) -> dict[str, Any]:
        """What a task returned."""
        found = self.ask("GET", f"{RUNS}/{run}/taskInstances/{task}/xcomEntries/return_value")["value"]
        return json.loads(found) if isinstance(found, str) else found

    def log(self, run: str, task: str, attempt: int = 1) -> list[str]:
        found = self.ask("GET", f"{RUNS}/{run}/taskInstances/{task}/logs/{attempt}")
        return [str(line["event"]) for line in found["content"]]

    def runs(self, kind: str) -> list[str]:
        found = self.ask("GET", RUNS, params={"order_by": "id"})["dag_runs"]
        return [run["dag_run_id"] for run in found if run["run_type"] == kind]

    def ended(self, run: str) -> str | None:
        state = self.ask("GET", f"{RUNS}/{run}")["state"]
        return state if state in ("success", "failed") else None

    def wait(self, what: str, done: Callable[[], Any], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if self.process.poll() is not None:
                pytest.fail(f"{what}: `make airflow` ended with {self.process.returncode}\n{self.said()}")
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: not after {seconds:.0f} s\n{self.said()}")
            time.sleep(0.5)

    def said(self) -> str:
        """The ends of what Airflow's parts and the newest tasks wrote."""
        logs = Path(self.project.env["AIRFLOW_HOME"], "logs")
        newest = sorted((file for file in logs.rglob("*.log")), key=lambda file: file.stat().st_mtime)[-6:]
        files = [self.output, *newest]
        return "\n".join(f"==> {file} <==\n{file.read_text(errors='replace')[-2500:]}" for file in files)


def processes_of(project: Project) -> dict[int, str]:
    """Processes that live and belong to the project: they work in its folder, or carry its AIRFLOW_HOME."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            here = process.environ().get("AIRFLOW_HOME") == project.env["AIRFLOW_HOME"]
            if here or Path(process.cwd()).is_relative_to(project.root):
                found[process.pid] = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def training(project: Project) -> dict[int, tuple[str, str]]:
    """Process -> (day, model) of what trains now."""
    found = {}
    for pid, line in processes_of(project).items():
        for model in MODELS:
            if f"-m components train {model}" in line and "/sh" not in line.split()[0]:
                with_day = Path(psutil.Process(pid).cwd()).name if psutil.pid_exists(pid) else ""
                found[pid] = (with_day, model)
    return found


def git(project: Project, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=project.root, env=project.env, check=True, capture_output=True, text=True
    ).stdout.strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def webhook() -> Iterator[Webhook]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    yield Webhook(server)
    server.shutdown()


@pytest.fixture(scope="module")
def project(new_project: Callable[[str], Project]) -> Iterator[Project]:
    """Of weights that no other test has trained: from train on, every stage runs and none is restored."""
    need("make")
    need("postgres")
    copy = new_project("scheduler")
    copy.set_params({f"train.{model}.seed": 11 for model in MODELS} | {
        "run.promote": "ask", "schedule.deadline_hours": 0.01, "schedule.poll_minutes": 0.02,
    })  # fmt: skip
    # Postgres refuses root, and the user that runs it in place of root cannot enter pytest's folders
    home = Path(tempfile.mkdtemp(prefix="clickloop-", dir="/tmp"))
    home.chmod(0o711)
    copy.env["AIRFLOW_HOME"] = str(home)
    yield copy
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def airflow(project: Project, webhook: Webhook) -> Iterator[Airflow]:
    port = free_port()
    output = project.root.with_name("make_airflow.log")
    home = f"AIRFLOW_HOME={project.env['AIRFLOW_HOME']}"
    # -o: the environment is this one
    command = [
        "make", "-o", ".venv", "airflow", "DB=postgres", home, f"AIRFLOW__API__PORT={port}",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION=True",  # one DAG is enough work
    ]  # fmt: skip
    env = project.env | {"CLICKLOOP_WEBHOOK": f"http://127.0.0.1:{webhook.server.server_port}/hook"}
    with output.open("wb") as opened:
        process = subprocess.Popen(
            command, cwd=project.root, env=env, stdout=opened, stderr=subprocess.STDOUT, start_new_session=True
        )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False)
    started = Airflow(project, process, client, output, webhook)
    try:
        started.wait("Airflow is ready", lambda: "Airflow is ready" in output.read_text(), START_SECONDS)
        told = next(line for line in output.read_text().splitlines() if "Airflow is ready" in line)
        assert f"http://127.0.0.1:{port} " in told
        ((user, password),) = json.loads(told[told.index("{") :]).items()
        assert client.get("/api/v2/dags").status_code == 401
        token = client.post("/auth/token", json={"username": user, "password": password})
        assert token.is_success, f"{token.status_code} {token.text}"
        client.headers["authorization"] = f"Bearer {token.json()['access_token']}"
        started.wait("the DAG is there", lambda: client.get("/api/v2/dags/ctr_daily").is_success, START_SECONDS)
        started.ask("PATCH", "dags/ctr_daily", json={"is_paused": False})
        yield started
    finally:
        client.close()
        for pid in processes_of(project):  # none, where the test of the stop was reached and passed
            try:
                psutil.Process(pid).kill()
            except psutil.NoSuchProcess:
                continue
        process.wait()


# ---- a night ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def night(airflow: Airflow) -> str:
    """The run that the schedule starts by itself in an Airflow that is new. It waits for a person, who approves."""
    airflow.wait("the night begins", lambda: airflow.runs("scheduled"), RUN_SECONDS)
    run = airflow.runs("scheduled")[0]
    airflow.wait(
        "a person is asked",
        lambda: airflow.ended(run) or airflow.state(run, "ask") == "awaiting_input",
        RUN_SECONDS,
    )
    assert airflow.ended(run) is None, airflow.said()
    detail = airflow.ask("GET", f"{RUNS}/{run}/taskInstances/ask/-1/hitlDetails")
    assert f"/clickloop/runs/{day_of(airflow, run)}" in detail["body"]
    assert detail["defaults"] == ["Reject"]
    answer(airflow, run, "Approve")
    airflow.wait("the night ends", lambda: airflow.ended(run), RUN_SECONDS)
    return run


def answer(airflow: Airflow, run: str, word: str) -> None:
    path = f"{RUNS}/{run}/taskInstances/ask/-1/hitlDetails"
    airflow.ask("PATCH", path, json={"chosen_options": [word], "params_input": {}})


def day_of(airflow: Airflow, run: str) -> str:
    return airflow.ask("GET", f"{RUNS}/{run}")["data_interval_start"][:10]


def test_a_night_closes_the_day_before_and_ends_in_its_tag(airflow: Airflow, night: str) -> None:
    tasks = airflow.tasks(night)
    states = {name: task["state"] for name, task in tasks.items()}
    assert states == dict.fromkeys(tasks, "success"), airflow.said()
    assert {"open", "ready", "train_qin", "train_sdcnv3", "package", "smoke", "close", "ship", "tidy"} <= set(tasks)
    day = day_of(airflow, night)
    interval = airflow.ask("GET", f"{RUNS}/{night}")
    assert interval["data_interval_end"][:10] == str(date.fromisoformat(day) + timedelta(days=1))
    facts = json.loads(git(airflow.project, "tag", "--list", "--format=%(contents:subject)", f"run/{day}"))
    assert facts["day"] == day
    assert facts["airflow_run"] == night
    assert git(airflow.project, "show", f"run/{day}:params.yaml").count(str(interval["data_interval_end"][:10])) == 1


def test_both_models_train_at_the_same_time_on_their_share_of_the_cores(airflow: Airflow, night: str) -> None:
    tasks = airflow.tasks(night)
    qin, sdcnv3 = tasks["train_qin"], tasks["train_sdcnv3"]
    assert qin["pool"] == sdcnv3["pool"] == "gpu"
    assert max(qin["start_date"], sdcnv3["start_date"]) < min(qin["end_date"], sdcnv3["end_date"])
    assert qin["try_number"] == sdcnv3["try_number"] == 1


def test_no_task_lost_an_attempt_at_the_start(airflow: Airflow, night: str) -> None:
    assert {name: task["try_number"] for name, task in airflow.tasks(night).items()} == dict.fromkeys(
        airflow.tasks(night), 1
    )


def test_a_person_who_approves_makes_the_champion(airflow: Airflow, night: str) -> None:
    assert airflow.facts(night, "ask") == {"approved": True, "who": "admin"}
    assert airflow.facts(night, "ship")["promoted"], airflow.log(night, "ship")
    assert "a model waits for your approval" in airflow.webhook.texts(night)


def test_a_run_that_is_late_is_told(airflow: Airflow, night: str) -> None:
    assert f"{night} is not done 0.01 hours after its start" in airflow.webhook.texts(night)


def test_the_log_of_a_task_is_short_and_ends_with_what_its_command_said(airflow: Airflow, night: str) -> None:
    for task, words in {"train_qin": "train@qin: ", "gate": "gate: ", "close": "AUC"}.items():
        log = airflow.log(night, task)
        assert any(words in line for line in log[-4:]), f"{task}:\n" + "\n".join(log)
        assert len(log) < 80, f"{task}:\n" + "\n".join(log)
        assert not any("git add" in line for line in log)
