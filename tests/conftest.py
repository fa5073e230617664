"""A copy of the project, small enough to run whole: `new_project`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.parts import pytest_runtest_setup, pytest_terminal_summary  # noqa: F401  (hooks: what a test needs)

STATUS = pytest.StashKey[int]()
SOURCE = Path(__file__).resolve().parents[1]

TINY = {
    "ingest.source": "simulator",
    "ingest.raw": "components/data/sources/simulator.py",
    "ingest.until": "2026-01-07T00:00:00+00:00",
    "ingest.window_days": 6,
    "ingest.lead_days": 0,
    "ingest.simulator.users": 300,
    "ingest.simulator.items": 120,
    "ingest.simulator.impressions_per_day": 1500,
    "ingest.simulator.text_dim": 12,
    "ingest.simulator.image_dim": 8,
    "embed.dim": 12,
    "publish.online_sample": 20,
    "train.qin.max_epochs": 1,
    "train.qin.batch_size": 512,
    "train.qin.device": "cpu",
    "train.sdcnv3.max_epochs": 1,
    "train.sdcnv3.batch_size": 512,
    "train.sdcnv3.device": "cpu",
    "refit.device": "cpu",
    "evaluate.bootstrap": 20,
    # thresholds that a model of one epoch on a tiny world passes: tests of the gate set their own
    "gate.min_auc": 0.0,
    "gate.min_group_auc": 0.0,
    "gate.max_calibration_error": 1.0,
    "gate.max_logloss_ratio": 10.0,
    "gate.min_test_rows": 100,
    "gate.max_calibration_shift": None,
    "gate.calibration_slope": None,
    "gate.max_gain": None,
    "gate.max_score_drift": None,
    "package.golden_requests": 4,
    "smoke.latency_requests": 10,
}


@dataclass(frozen=True)
class Project:
    """root   the copy: a git and DVC repository of its own, one commit, no data
    env    of every process that works in it: nothing of the caller's Python path, Airflow or git, and no telemetry
    """

    root: Path
    env: dict[str, str]

    def set_params(self, values: dict[str, Any]) -> None:
        """Write values into the copy's params.yaml, by dotted name. A KeyError names a key that is not there."""
        file = self.root / "params.yaml"
        yaml = YAML()
        yaml.width = 120
        params = yaml.load(file)
        for name, value in values.items():
            *sections, key = name.split(".")
            section = params
            for part in sections:
                section = section[part]
            if key not in section:
                raise KeyError(f"params.yaml has no {name}; {'.'.join(sections)} has {list(section)}")
            section[key] = value
        yaml.dump(params, file)

    def python(self, *arguments: str, seconds: float = 2700, code: int | None = 0) -> str:
        """Run `python ARGUMENTS` in the copy as production does. Returns stdout and stderr together.

        Fails the test, with the end of the output, on another exit code than `code` (None: any) and after `seconds`.
        """
        command = [sys.executable, *arguments]
        log = self.root.with_name("last_command.log")
        with log.open("wb") as opened:
            process = subprocess.Popen(
                command, cwd=self.root, env=self.env, stdout=opened, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                found = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                pytest.fail(f"{' '.join(command)}: still running after {seconds:.0f} s; it said:\n{tail(log)}")
        if code is not None and found != code:
            pytest.fail(f"{' '.join(command)}: exit code {found}, expected {code}; it said:\n{tail(log)}")
        return log.read_text(errors="replace")


def tail(log: Path, characters: int = 6000) -> str:
    return log.read_text(errors="replace")[-characters:] if log.is_file() else f"({log} was never written)"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums in one order, so that bytes can be compared between processes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def new_project(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Project]:
    """`new_project("name")` copies this project, as it lies here, to a folder of its own with a tiny world.

    The copy holds what git tracks or would track, so never data. All copies of a session share DVC's cache: a stage
    that one of them ran with the same inputs is restored, not run again, in the others; change a param of the stages
    that a test is about to see them run.
    """
    cache = tmp_path_factory.mktemp("dvc-cache")
    return lambda name: copy_project(tmp_path_factory.mktemp(name) / "project", cache)


def copy_project(root: Path, cache: Path, values: dict[str, Any] | None = None) -> Project:
    """This project in a new folder, with the tiny world, or `values` over it, and DVC's cache in another one."""
    project = Project(root, environment(root))
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=SOURCE, env=project.env, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for path in filter(None, listed.stdout.split("\0")):
        if (SOURCE / path).is_file():  # a tracked file may be deleted in the work tree
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(SOURCE / path, root / path)
    (root / "champion.json").write_text('{"version": null}\n')  # the real one's tags are not copied
    (root / "dvc.lock").unlink(missing_ok=True)
    project.set_params(TINY | (values or {}))
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=root, env=project.env, check=True)
    project.python("-m", "dvc", "cache", "dir", "--local", str(cache))
    subprocess.run(["git", "add", "-A"], cwd=root, env=project.env, check=True)
    subprocess.run(["git", "commit", "-q", "-m", "copy"], cwd=root, env=project.env, check=True)
    return project


def environment(root: Path) -> dict[str, str]:
    """The caller's environment without what would tie a copy to the caller's project, git or Airflow."""
    ties = ("AIRFLOW", "BENTOML", "CLICKLOOP", "DVC", "FEAST", "GIT_", "GX_", "MAKE", "MFLAG", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ties)}
    return kept | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "AIRFLOW_HOME": str(root / ".airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(root / "dags"),
        "BENTOML_DO_NOT_TRACK": "True",
        "DVC_NO_ANALYTICS": "1",
        "GX_ANALYTICS_ENABLED": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
        # the user's settings (signing, hooks, templates) are none of a copy's business
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": "test", "GIT_AUTHOR_EMAIL": "test@localhost",
        "GIT_COMMITTER_NAME": "test", "GIT_COMMITTER_EMAIL": "test@localhost",
    }  # fmt: skip


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End before DuckDB's binding buries the closing line under a page of false leak warnings."""
    if STATUS in config.stash and "duckdb" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[STATUS])
