"""What goes wrong before Airflow is ready. tests/dags/test_scheduler.py starts, kills and stops the real one."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from components.operations import local_airflow, local_postgres
from components.operations.local_airflow import MARK, Part

NO_DATABASE = "import sys; print('no database'); sys.exit(3)"
NO_SERVER = """
import sys, time
if sys.argv[1] == "api-server":
    sys.exit("no server")
"""


@pytest.fixture(autouse=True)
def kept_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AIRFLOW__API__PORT", "9")  # nobody answers
    monkeypatch.delenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", raising=False)
    return tmp_path / "home"


def test_an_environment_that_was_not_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIRFLOW_HOME", raising=False)
    with pytest.raises(ValueError, match=r"AIRFLOW_HOME is not set; start Airflow with `make airflow`"):
        local_airflow.run()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (NO_DATABASE, r"(?s)`airflow db migrate` ended with 3; it printed:.no database"),
        (NO_SERVER, r"(?s)api-server ended with 1, 6 times in a row; end of its log:.*no server"),
    ],
)
def test_a_part_that_ends_again_and_again_stops_the_others(
    home: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    parts = []
    started = local_airflow.subprocess.Popen

    def popen(*words, **options):
        parts.append(started(*words, **options))
        return parts[-1]

    monkeypatch.setattr(local_airflow, "AIRFLOW", [sys.executable, "-c", code])
    monkeypatch.setattr(local_airflow.subprocess, "Popen", popen)
    with pytest.raises(ValueError, match=said):
        local_airflow.run()
    assert parts and all(part.poll() is not None for part in parts)


def test_a_second_airflow_in_the_same_home(home: Path) -> None:
    home.mkdir()
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"Airflow runs in .*home already; stop it first"):
            local_airflow.run()


def test_a_part_that_is_killed_is_started_again_and_what_it_left_is_ended_before(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The child has a session of its own, as a task's command has, so that no signal to a group reaches it."""
    home.mkdir()
    code = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""
    log = tmp_path / "part.log"

    def ended() -> None:
        local_airflow.end(local_airflow.left_over("scheduler"))

    part = Part("scheduler", [sys.executable, "-c", code], log, ended=ended)
    part.start()
    assert part.process is not None
    try:
        first = _children(log, 1)[0]
        part.keep()
        assert psutil.Process(first).environ()[MARK] == "scheduler"
        os.kill(part.process.pid, signal.SIGKILL)
        part.process.wait()
        part.keep()
        assert not psutil.pid_exists(first)
        second = _children(log, 2)[1]
        assert part.process.poll() is None
        assert local_airflow.left_over("api-server") == []
        assert {process.pid for process in local_airflow.left_over()} == {part.process.pid, second}
    finally:
        part.stop()
        local_airflow.end(local_airflow.left_over())
    said = capsys.readouterr().out
    assert "scheduler ended by SIGKILL, and is started again" in said
    assert "ended 1 processes that a killed Airflow had left" in said
    assert local_airflow.left_over() == []


def _children(log: Path, count: int) -> list[int]:
    for _ in range(600):
        if log.is_file() and len(found := log.read_text().split()) >= count:
            return [int(pid) for pid in found]
        subprocess.run(["sleep", "0.1"], check=True)
    raise AssertionError(f"{count} children were never told: {log.read_text()}")


def test_a_postgres_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    assert local_postgres.prepare(tmp_path, "") is None
    assert local_postgres.prepare(tmp_path, "sqlite:////somewhere/airflow.db") is None
    assert local_postgres.prepare(tmp_path, "postgresql+psycopg2://me:word@db.example.com/airflow") is None
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_is_too_long_for_a_socket(tmp_path: Path) -> None:
    home = tmp_path / ("long" * 30)
    with pytest.raises(ValueError, match=r"too long for a socket; set AIRFLOW_HOME to a shorter path"):
        local_postgres.prepare(home, f"postgresql+psycopg2://airflow@/postgres?host={home}/postgres")


def test_the_unit_for_systemd_starts_the_command_that_make_starts() -> None:
    unit = Path(__file__).resolve().parents[3] / "deploy/clickloop-airflow.service"
    assert "ExecStart=/usr/bin/make airflow" in unit.read_text()
    if verify := local_postgres.shutil.which("systemd-analyze"):
        done = subprocess.run([verify, "verify", str(unit)], capture_output=True, text=True)
        said = [line for line in done.stderr.splitlines() if "clickloop" in line]
        assert said == [] and done.returncode == 0, done.stderr
