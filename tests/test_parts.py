"""A missing part is an error in CI; elsewhere the end of the run names it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parts import PARTS, need

PROJECT = Path(__file__).parents[1]
TEST = "tests/dags/test_scheduler.py"  # needs make


def run_without_make(folder: Path, ci: str) -> subprocess.CompletedProcess[str]:
    """PATH is an empty folder, so that no program is found."""
    words = ["-m", "pytest", "-p", "no:cacheprovider", "-k", "log_of_a_task", TEST]
    env = os.environ | {"PATH": str(folder), "CI": ci, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=PROJECT, env=env, capture_output=True, text=True, check=False)


def test_in_ci_a_missing_part_fails_the_run(tmp_path: Path) -> None:
    done = run_without_make(tmp_path, ci="true")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Airflow as `make airflow` starts it: no make; to get it: apt-get install make" in done.stdout


def test_elsewhere_the_last_lines_say_what_was_not_tested(tmp_path: Path) -> None:
    done = run_without_make(tmp_path, ci="")
    assert done.returncode == 0, done.stdout + done.stderr
    title, line, closing = done.stdout.splitlines()[-3:]
    assert "Not tested on this machine" in title
    assert line == "Airflow as `make airflow` starts it (1 skipped). To get it: apt-get install make"
    assert "1 skipped" in closing


@pytest.mark.parametrize("name", PARTS)
def test_every_part_that_ci_can_install_must_be_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.parts.which", lambda _: None)
    monkeypatch.setattr("tests.parts.find_spec", lambda _: None)
    part = PARTS[name]
    monkeypatch.setenv("CI", "true")
    expected = pytest.fail.Exception if part.everywhere else pytest.skip.Exception
    if part.everywhere or part.missing():  # a GPU or open_clip may be there
        with pytest.raises(expected, match=part.tests) as caught:
            need(name)
        assert part.install in str(caught.value)
    monkeypatch.delenv("CI")
    if part.missing():
        with pytest.raises(pytest.skip.Exception, match=part.tests):
            need(name)
