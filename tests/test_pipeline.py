"""The pipeline as its users run it: one tiny project, `dvc repro` and what follows from it, in this order."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from components.common.artifacts import folder_hash
from components.common.champion import read_pointer
from components.training.champion import fetch
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
    return set(re.findall(r"Running stage '([^']+)'", said))


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
    assert ran(said) == {"arrivals"}  # which looks whether the raw files are the same
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


def test_make_serve_answers(project) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    request = dict(read(project, "artifacts/package/golden.json")[0]["request"])
    log = project.root.with_name("serve.log")
    with log.open("wb") as opened:
        server = subprocess.Popen(
            ["make", "-o", ".venv", "serve"],
            cwd=project.root,
            env=project.env | {"BENTOML_PORT": str(port)},
            stdout=opened,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                answer = httpx.post(f"http://127.0.0.1:{port}/rank", json=request, timeout=60)
                if "store_unavailable" not in answer.text:  # on a busy machine the store may be late
                    break
            except httpx.TransportError:
                pass
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        assert answer.status_code == 200, answer.text
        assert sorted(answer.json()["items"]) == sorted(request["candidates"])
        assert answer.json()["degraded"] == read(project, "artifacts/package/golden.json")[0]["degraded"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(300)


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
    assert "up to date" in dvc(clone, "status")
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


# ---- the champion -----------------------------------------------------------------------------------------------


def promoted(project: Project, run: str) -> dict[str, Any]:
    """Close the run that lies in the work tree, promote it, and let the work tree be judged against it. Its pointer."""
    git(project, "tag", "-m", "{}", f"run/{run}")
    dvc(project, "push")
    said = project.python("-m", "components", "registry", "promote", run, "--why", "test")
    assert "is the champion and serves" in said
    assert git(project, "status", "--porcelain") == ""  # a promotion changes nothing in the work tree
    project.python("-m", "components", "registry", "pin")
    return read(project, "champion.json")


def bytes_of(pointer: Path) -> str:
    """The hash of the champion's checkpoint, as DVC brings it back."""
    champion = read_pointer(pointer)
    assert champion is not None
    with tempfile.TemporaryDirectory() as scratch:
        fetch(champion, Path(scratch, "checkpoint"))
        return checkpoint_hash(Path(scratch, "checkpoint"))


def test_promote_measure_against_the_champion_and_roll_back(project, monkeypatch) -> None:
    monkeypatch.chdir(project.root)
    pointer = project.root / "champion.json"
    tag = read(project, "artifacts/package/package.json")["tag"]
    first = read(project, "artifacts/gate/decision.json")
    chosen, other = first["model"], ({"qin", "sdcnv3"} - {first["model"]}).pop()

    said = project.python("-m", "components", "registry", "promote", "one", "--why", "test", code=1)
    assert "no version 'one'; there are: none yet" in said and "Traceback" not in said
    git(project, "tag", "-m", "{}", "run/one")
    said = project.python("-m", "components", "registry", "promote", "one", "--why", "test", code=1)
    assert "DVC's remote does not have artifacts/package (" in said and "dvc push" in said
    git(project, "tag", "-d", "run/one", "ctr-ranker@v0.0.1")
    before = git(project, "rev-parse", "HEAD")
    one = promoted(project, "one")
    assert git(project, "rev-parse", "ctr-ranker@v0.0.1^{commit}") == before
    shipped = read(project, "artifacts/refit/decision.json")["shipped"]
    assert one == {
        "name": "ctr-ranker", "version": "v0.0.1", "revision": "ctr-ranker@v0.0.1", "day": "one", "model": chosen,
        "checkpoint_sha256": shipped["checkpoint_sha256"], "judged_sha256": first["checkpoint_sha256"], "bento": tag,
        "train_until": shipped["train_until"],
    }  # fmt: skip
    commit(project, "judged against v0.0.1")
    assert ran(dvc(project, "repro", "train@qin", "train@sdcnv3")) == {
        "champion",
        "start",
    }  # a promotion alone trains nothing

    # An edit of one model's rate runs that model, both evaluations (there is a champion now), and what follows.
    old = pq.read_table(project.root / f"artifacts/evaluate/{chosen}/predictions.parquet")["score"].to_numpy()
    project.set_params({f"train.{chosen}.lr": 0.0037})
    said = dvc(project, "repro")
    after = {f"train@{chosen}", "evaluate@qin", "evaluate@sdcnv3", "gate"}
    assert after <= ran(said) <= after | {"package", "smoke"}  # the other model may be the better one now
    assert f"train@{other}" not in ran(said)
    second = read(project, "artifacts/gate/decision.json")
    assert second["champion"] == one
    for model in ("qin", "sdcnv3"):
        rules = {rule["rule"]: rule for rule in second["candidates"][model]["rules"]}
        found = read(project, f"artifacts/evaluate/{model}/evaluation.json")
        (reference,) = found["references"]
        assert reference["version"] == "v0.0.1"
        gained = found["test"]["auc"] - reference["test"]["auc"]
        assert rules["no worse than v0.0.1"]["value"] == pytest.approx(gained, abs=1e-9)
        assert second["candidates"][model]["kind"] == "change"
        rows = pq.read_table(project.root / f"artifacts/evaluate/{model}/predictions.parquet")
        np.testing.assert_allclose(rows["champion_score"].to_numpy(), old, atol=1e-5)
    assert checkpoint_hash(project.root / f"checkpoints/{chosen}") != one["judged_sha256"]
    assert bytes_of(pointer) == one["judged_sha256"]  # by its tag, whatever lies in the work tree

    commit(project, "the second run")
    two = promoted(project, "two")
    assert (two["version"], two["judged_sha256"]) == ("v0.0.2", second["checkpoint_sha256"])
    assert bytes_of(pointer) == two["judged_sha256"] != one["judged_sha256"]
    commit(project, "judged against v0.0.2")

    said = project.python("-m", "components", "registry", "rollback", "v0.0.1", "--why", "test")
    assert "v0.0.1" in said and "the live store stays" in said
    project.python("-m", "components", "registry", "pin", "v0.0.1")
    assert read(project, "champion.json") == one
    assert bytes_of(pointer) == one["judged_sha256"]
    assert {f"ctr-ranker#champion#{number}" for number in (1, 2, 3)} < set(git(project, "tag").split())


def test_a_warm_start_goes_on_from_the_champion_that_dvc_brings_back(project) -> None:
    model = read(project, "champion.json")["model"]
    other = ({"qin", "sdcnv3"} - {model}).pop()
    dvc(project, "repro", "start")
    with changed(project, {f"start.warm.{model}": True}):
        said = dvc(project, "repro", f"train@{model}", f"train@{other}")
        assert ran(said) == {"start", f"train@{model}"}
        assert f"{model}: starts from the champion v0.0.1: 0 of " in said
        facts = read(project, f"checkpoints/{model}/config.json")["facts"]
        assert facts["warm_start"] == "v0.0.1"
        assert ran(dvc(project, "repro", f"train@{model}")) == set()
    assert read(project, f"checkpoints/{model}/config.json")["facts"]["warm_start"] is None


def test_other_bytes_than_the_champions_are_refused(project, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(project.root)
    champion = read_pointer(project.root / "champion.json")
    assert champion is not None
    with pytest.raises(ValueError, match=rf"v0\.0\.1: DVC holds checkpoint {champion['judged_sha256']} at"):
        fetch(champion | {"judged_sha256": "0" * 64}, tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"DVC cannot give checkpoints/\w+ at ctr-ranker@v9: .*run `dvc push` in the clone"
    ):
        fetch(champion | {"revision": "ctr-ranker@v9"}, tmp_path / "none")
    # the cache lost it, and no remote has it: told, and no half of a folder is used
    dvc(project, "remote", "modify", "--local", "local", "url", str(tmp_path / "nothing"))
    empty = tmp_path / "cache"
    settings = project.root / ".dvc" / "config.local"
    kept = settings.read_text()
    try:
        dvc(project, "cache", "dir", "--local", str(empty))
        with pytest.raises(ValueError, match=r"champion v0\.0\.1: .*run `dvc push` in the clone"):
            fetch(champion, tmp_path / "lost")
    finally:
        settings.write_text(kept)
    shutil.rmtree(empty, ignore_errors=True)
