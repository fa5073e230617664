"""Runs by the real scheduler, in an Airflow that `make airflow` started: to the end, killed, and interrupted."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Airflow:
    project: Project
    process: subprocess.Popen[bytes]
    client: httpx.Client
    output: Path

    def ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer = self.client.request(method, f"/api/v2/{path}", **options)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}\n{self.said()}"
        return answer.json()

    def tasks(self, run: str) -> dict[str, dict[str, Any]]:
        found = self.ask("GET", f"dags/ctr_daily/dagRuns/{run}/taskInstances")["task_instances"]
        return {task["task_id"]: task for task in found}

    def wait(self, what: str, done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if self.process.poll() is not None:
                pytest.fail(f"{what}: `make airflow` ended with {self.process.returncode}\n{self.said()}")
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: not after {seconds:.0f} s\n{self.said()}")
            time.sleep(0.5)

    def said(self) -> str:
        """The ends of what Airflow's parts and the newest tasks wrote."""
        logs = self.project.root / ".airflow/logs"
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
            if here or Path(process.cwd()) == project.root:
                found[process.pid] = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def training(project: Project) -> set[str]:
    """The models whose training runs now."""
    lines = processes_of(project).values()
    return {model for model in MODELS if any(f"-m components train {model}" in line for line in lines)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def project(new_project: Callable[[str], Project]) -> Project:
    """Of weights that no other test has trained: from train on, every stage runs and none is restored."""
    need("make")
    copy = new_project("scheduler")
    copy.set_params({f"train.{model}.seed": 11 for model in MODELS})
    return copy


@pytest.fixture(scope="module")
def airflow(project: Project) -> Iterator[Airflow]:
    port = free_port()
    output = project.root.with_name("make_airflow.log")
    command = ["make", "-o", ".venv", "airflow", f"AIRFLOW__API__PORT={port}"]  # -o: the environment is this one
    with output.open("wb") as opened:
        process = subprocess.Popen(
            command, cwd=project.root, env=project.env, stdout=opened, stderr=subprocess.STDOUT, start_new_session=True
        )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False)
    started = Airflow(project, process, client, output)
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
        yield started
    finally:
        client.close()
        for pid in processes_of(project):  # none, where the test of the stop was reached and passed
            try:
                psutil.Process(pid).kill()
            except psutil.NoSuchProcess:
                continue
        process.wait()


@pytest.fixture(scope="module")
def finished(airflow: Airflow) -> str:
    """The id of the day's run, which the schedule starts by itself in an Airflow that is new; it has ended."""

    def first() -> dict[str, Any]:
        runs = airflow.ask("GET", "dags/ctr_daily/dagRuns", params={"order_by": "id"})["dag_runs"]
        return runs[0] if runs else {"state": "none"}

    airflow.wait("the day's run ends", lambda: first()["state"] in ("success", "failed"), RUN_SECONDS)
    assert first()["run_type"] == "scheduled"
    return first()["dag_run_id"]


def test_the_scheduler_runs_every_stage(airflow: Airflow, finished: str) -> None:
    tasks = airflow.tasks(finished)
    states = {name: task["state"] for name, task in tasks.items()}
    assert states == dict.fromkeys(tasks, "success"), airflow.said()
    assert {"train_qin", "train_sdcnv3", "package", "smoke", "report"} <= set(tasks)
    assert json.loads((airflow.project.root / "artifacts/smoke/smoke.json").read_text())["passed"]


def test_the_log_of_a_task_holds_what_its_command_said(airflow: Airflow, finished: str) -> None:
    expected = {"train_qin": "Running stage 'train@qin'", "gate": "approved: ", "approved": "passes all"}
    for task, words in expected.items():
        log = airflow.ask("GET", f"dags/ctr_daily/dagRuns/{finished}/taskInstances/{task}/logs/1")
        said = "\n".join(str(line["event"]) for line in log["content"])
        assert words in said, f"{task}:\n{said}"


def test_both_models_train_at_the_same_time(airflow: Airflow, finished: str) -> None:
    tasks = airflow.tasks(finished)
    qin, sdcnv3 = tasks["train_qin"], tasks["train_sdcnv3"]
    assert qin["pool"] == sdcnv3["pool"] == "gpu"
    assert max(qin["start_date"], sdcnv3["start_date"]) < min(qin["end_date"], sdcnv3["end_date"])


def test_a_killed_task_and_a_stopped_airflow_leave_nothing_running(airflow: Airflow, finished: str) -> None:
    project = airflow.project
    endless = {"max_epochs": 1_000_000, "patience": 1_000_000}
    project.set_params({f"train.{model}.{name}": value for model in MODELS for name, value in endless.items()})
    airflow.ask("POST", "dags/ctr_daily/dagRuns", json={"logical_date": None, "conf": {}})
    airflow.wait("both models train", lambda: training(project) == set(MODELS), RUN_SECONDS)

    # the one just triggered, but for a run that midnight puts before it
    (running,) = airflow.ask("GET", "dags/ctr_daily/dagRuns", params={"state": "running"})["dag_runs"]
    run = running["dag_run_id"]
    path = f"dags/ctr_daily/dagRuns/{run}/taskInstances/train_qin"
    airflow.ask("PATCH", path, json={"new_state": "failed"})
    airflow.wait("the training of qin is gone", lambda: "qin" not in training(project), STOP_SECONDS)
    assert training(project) == {"sdcnv3"}
    assert airflow.tasks(run)["train_qin"]["state"] == "failed"

    os.killpg(airflow.process.pid, signal.SIGINT)  # Ctrl-C: to make and all that it started in the foreground
    try:
        airflow.process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        left = processes_of(project)
        pytest.fail(f"`make airflow` still runs {STOP_SECONDS} s after Ctrl-C: {left}\n{airflow.said()}")
    assert processes_of(project) == {}, airflow.said()
