"""What goes wrong before Airflow is ready. tests/dags/test_scheduler.py starts, interrupts and stops the real one."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from components.operations import local_airflow

NO_DATABASE = "import sys; print('no database'); sys.exit(3)"
NO_SCHEDULER = """
import sys, time
if sys.argv[1] == "scheduler":
    sys.exit("no scheduler")
if sys.argv[1] not in ("db", "pools"):
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def kept_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_an_environment_that_was_not_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIRFLOW_HOME", raising=False)
    with pytest.raises(ValueError, match=r"AIRFLOW_HOME is not set; start Airflow with `make airflow`"):
        local_airflow.run()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (NO_DATABASE, r"(?s)`airflow db migrate` ended with 3; it printed:.no database"),
        (NO_SCHEDULER, r"(?s)`airflow scheduler` ended with 1; end of its log:.no scheduler"),
    ],
)
def test_a_part_that_ends_stops_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    parts = []
    started = local_airflow.subprocess.Popen

    def popen(*words, **options):
        parts.append(started(*words, **options))
        return parts[-1]

    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AIRFLOW__API__PORT", "9")  # nobody answers
    monkeypatch.setattr(local_airflow, "AIRFLOW", [sys.executable, "-c", code])
    monkeypatch.setattr(local_airflow.subprocess, "Popen", popen)
    with pytest.raises(ValueError, match=said):
        local_airflow.run()
    assert parts and all(part.poll() is not None for part in parts)
