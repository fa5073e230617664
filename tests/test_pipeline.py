"""The pipeline as its users run it: one tiny project, `dvc repro` and what follows from it, in this order."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from components.common.artifacts import folder_hash
from models.checkpoint import checkpoint_hash

if TYPE_CHECKING:
    from tests.conftest import Project

pytestmark = pytest.mark.slow

STAGES = {
    "arrivals", "ingest", "validate", "embed", "features", "dataset", "champion", "start", "train@qin", "train@sdcnv3",
    "evaluate@qin", "evaluate@sdcnv3", "gate", "refit", "package", "smoke",
}  # fmt: skip
# models of one epoch differ by more than luck
JUDGED = {"gate.margin": 1.0, "gate.alpha": None, "gate.max_slice_loss": None}


@pytest.fixture(scope="module")
def project(new_project: Callable[[str], Project]) -> Project:
    """After `dvc repro` and a commit of it."""
    project = new_project("pipeline")
    project.set_params(JUDGED)
    project.python("-m", "dvc", "repro")
    commit(project, "the first run")
    return project


def dvc(project: Project, *arguments: str, code: int | None = 0) -> str:
    return project.python("-m", "dvc", *arguments, code=code)


def git(project: Project, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=project.root, env=project.env, check=True, capture_output=True, text=True
    )
    return done.stdout


def commit(project: Project, message: str) -> None:
    git(project, "add", "dvc.lock", "params.yaml", "champion.json")
    git(project, "commit", "-q", "-m", message)


def ran(said: str) -> set[str]:
    """The stages that ran. `arrivals` looks at the raw files each time, so it does not count."""
    return set(re.findall(r"Running stage '([^']+)'", said)) - {"arrivals"}


def read(project: Project, path: str) -> Any:
    return json.loads((project.root / path).read_text())


def locked(project: Project, stage: str) -> dict[str, Any]:
    """Path -> hash of a stage's outputs."""
    lock = yaml.safe_load((project.root / "dvc.lock").read_text())["stages"][stage]
    return {out["path"]: out["md5"] for out in lock["outs"]}


@contextmanager
def changed(project: Project, values: dict[str, Any]) -> Iterator[None]:
    """Values in params.yaml while the block lasts; then everything is as it was committed."""
    project.set_params(values)
    try:
        yield
    finally:
        git(project, "checkout", "-q", "params.yaml", "dvc.lock")
        dvc(project, "checkout", "--force")


def test_one_command_runs_every_stage(project) -> None:
    assert set(yaml.safe_load((project.root / "dvc.lock").read_text())["stages"]) == STAGES
    decision, package = read(project, "artifacts/gate/decision.json"), read(project, "artifacts/package/package.json")
    assert decision["verdict"] == "approve"
    assert decision["champion"] is None
    assert set(decision["candidates"]) == {"qin", "sdcnv3"}
    for name, candidate in decision["candidates"].items():
        assert candidate["checkpoint_sha256"] == checkpoint_hash(project.root / "checkpoints" / name)
    shipped = read(project, "artifacts/refit/decision.json")["shipped"]
    assert (
        package["checkpoint_sha256"]
        == shipped["checkpoint_sha256"]
        == checkpoint_hash(project.root / "checkpoints/refit")
    )
    assert package["judged_sha256"] == decision["checkpoint_sha256"]
    smoke = read(project, "artifacts/smoke/smoke.json")
    assert smoke["passed"] and smoke["tag"] == package["tag"]
    assert git(project, "status", "--porcelain") == ""  # outputs are DVC's, not git's


def test_a_second_run_runs_nothing(project) -> None:
    before = (project.root / "dvc.lock").read_bytes()
    said = dvc(project, "repro")
    assert ran(said) == set()
    assert (project.root / "dvc.lock").read_bytes() == before


def test_dvc_shows_metrics_and_plots(project) -> None:
    said = dvc(project, "metrics", "show", "--json")
    shown = json.loads(said[said.index("{") :])[""]["data"]
    for model in ("qin", "sdcnv3"):
        test = read(project, f"artifacts/evaluate/{model}/evaluation.json")["test"]
        assert shown[f"artifacts/evaluate/{model}/metrics.json"]["data"]["auc"] == test["auc"]
        assert "valid_auc" in shown[f"artifacts/train/{model}.json"]["data"]
    dvc(project, "plots", "show")
    page = (project.root / "dvc_plots/index.html").read_text()
    for title in ("valid AUC by epoch", "calibration on the test days", "ROC on the test days"):
        for model in ("qin", "sdcnv3"):
            assert f"{model}, {title}" in page


def test_what_is_pushed_can_be_pulled_elsewhere(project, tmp_path) -> None:
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    dvc(project, "remote", "modify", "--local", "local", "url", str(remote))
    dvc(project, "push")
    clone = type(project)(tmp_path / "clone", project.env)
    git(project, "clone", "-q", str(project.root), str(clone.root))
    dvc(clone, "cache", "dir", "--local", str(cache))
    dvc(clone, "remote", "modify", "--local", "local", "url", str(remote))
    dvc(clone, "pull")
    for folder in ("data", "checkpoints", "artifacts/package"):
        assert folder_hash(clone.root / folder) == folder_hash(project.root / folder)
    assert dvc(clone, "status").split() == ["arrivals:", "always", "changed"]
    assert ran(dvc(clone, "repro", "--dry")) == set()
    assert git(clone, "status", "--porcelain") == ""
    assert read(clone, "artifacts/gate/decision.json") == read(project, "artifacts/gate/decision.json")


def test_an_experiment_runs_with_another_value(project) -> None:
    with changed(project, {}):
        said = dvc(project, "exp", "run", "--name", "faster", "-S", "train.qin.lr=0.0043", "evaluate@qin")
        assert ran(said) == {"train@qin", "evaluate@qin"}
        assert read(project, "artifacts/evaluate/qin/evaluation.json")["checkpoint_sha256"] == checkpoint_hash(
            project.root / "checkpoints/qin"
        )
    assert "faster" in dvc(project, "exp", "list")
    difference = dvc(project, "exp", "diff", "HEAD", "faster")
    assert re.search(r"train\.qin\.lr\W+0\.001\W+0\.0043", difference), difference
    assert re.search(r"evaluate/qin/metrics\.json\W+auc", difference), difference


def test_a_killed_run_is_finished_by_the_next(project) -> None:
    """SIGKILL to all of `dvc repro` after the first epoch: no output, no stale lock, and in the end the same hashes."""
    with changed(project, {"train.qin.max_epochs": 5, "train.qin.patience": 5, "train.qin.seed": 11}):
        state = project.root / ".scratch/train/qin/state.safetensors"
        assert not state.exists()
        before = locked(project, "train@qin")
        command = [sys.executable, "-m", "dvc", "repro", "train@qin"]
        process = subprocess.Popen(
            command, cwd=project.root, env=project.env, stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 600
            while not state.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert state.exists() and process.poll() is None, "it ended before it could be killed"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert not (project.root / "checkpoints/qin").exists()
        assert locked(project, "train@qin") == before

        said = dvc(project, "repro", "train@qin")
        assert ran(said) == {"train@qin"}
        assert "qin: continues after epoch " in said
        assert not state.exists()
        resumed = locked(project, "train@qin")
        assert resumed != before
        said = dvc(project, "repro", "--force", "--single-item", "train@qin")
        assert "qin epoch 1:" in said
        assert locked(project, "train@qin") == resumed
