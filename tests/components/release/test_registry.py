"""Promotion and rollback in a git and DVC repository: versions, stage tags, the pointer. A whole run: test_pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gto.api import deregister

from components.common.artifacts import write_json
from components.release import registry
from components.training.champion import fetch
from models.checkpoint import CHECKPOINT_FILES, checkpoint_hash

POINTER, PACKAGE, SMOKE = Path("champion.json"), Path("package"), Path("smoke.json")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def built(bento: str, weights: str) -> None:
    """A run that ended in this Bento, with its checkpoint in DVC, committed. The checkpoint's contents are not read."""
    folder = Path("checkpoints/qin")
    folder.mkdir(parents=True, exist_ok=True)
    for name in CHECKPOINT_FILES:
        (folder / name).write_text(f"{name} {weights}")
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", str(folder)], check=True)
    facts: dict[str, Any] = {"built": True, "tag": f"ctr-ranker:{bento}", "model": "qin"}
    write_json(PACKAGE / "package.json", facts | {"checkpoint_sha256": checkpoint_hash(folder)})
    write_json(SMOKE, {"passed": True, "tag": f"ctr-ranker:{bento}"})
    commit(bento)


def commit(message: str) -> None:
    git("add", "-A")
    git("commit", "-q", "--allow-empty", "-m", message)


def promote() -> str:
    return registry.promote(PACKAGE, SMOKE, POINTER)


def tags() -> list[str]:
    return git("tag").split()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "test")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "test@localhost")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    git("init", "-q")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], check=True)
    POINTER.write_text('{"version": null}\n')
    built("qin-one", "1")
    return tmp_path


def test_one_bento_is_one_version(repository: Path) -> None:
    assert "ctr-ranker v0.0.1 (ctr-ranker:qin-one) is the champion; commit" in promote()
    first = ["ctr-ranker#champion#1", "ctr-ranker@v0.0.1"]
    one = POINTER.read_text()
    assert tags() == first and json.loads(one)["version"] == "v0.0.1"
    already = "ctr-ranker v0.0.1 (ctr-ranker:qin-one) is the champion already; nothing was done"
    assert promote() == already  # on the same commit
    commit("v0.0.1 is the champion")
    assert promote() == already  # and on a later one
    assert registry.rollback("v0.0.1", POINTER) == already
    assert tags() == first and POINTER.read_text() == one

    built("qin-two", "2")
    assert "ctr-ranker v0.0.2 (ctr-ranker:qin-two) is the champion; " in promote()
    built("qin-one", "1")  # the params were put back: the Bento of the first version again
    assert "ctr-ranker v0.0.1 (ctr-ranker:qin-one) is the champion; " in promote()
    assert POINTER.read_text() == one
    assert [tag for tag in tags() if "@" in tag] == ["ctr-ranker@v0.0.1", "ctr-ranker@v0.0.2"]
    fetch(json.loads(one), repository / "fetched")
    assert (repository / "fetched/model.safetensors").read_text() == "model.safetensors 1"


def test_tags_of_others_are_no_versions(repository: Path) -> None:
    promote()
    built("qin-two", "2")
    promote()
    deregister(repo=".", name="ctr-ranker", version="v0.0.1")  # as `gto deprecate ctr-ranker v0.0.1`
    for version, subject in (("v9.9.7", "words"), ("v9.9.8", "7"), ("v9.9.9", '{"note": "by hand"}')):
        commit(version)  # GTO takes one version of a commit
        git("tag", "-m", subject, f"ctr-ranker@{version}")
    git("tag", "ctr-ranker@stable", "ctr-ranker@v0.0.2")  # another name of that tag, with its subject
    assert "ctr-ranker@v0.0.1!" in tags()
    with pytest.raises(ValueError, match=r"no version 'v9\.9\.9' of ctr-ranker; there are v0\.0\.1, v0\.0\.2$"):
        registry.rollback("v9.9.9", POINTER)
    assert promote() == "ctr-ranker v0.0.2 (ctr-ranker:qin-two) is the champion already; nothing was done"
    built("qin-three", "3")
    assert "(ctr-ranker:qin-three) is the champion; " in promote()
    assert "ctr-ranker v0.0.2 (ctr-ranker:qin-two) is the champion; " in registry.rollback("v0.0.2", POINTER)


def test_a_promotion_that_was_cut_short_is_finished_by_the_next(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            promote()
    assert json.loads(POINTER.read_text()) == {"version": None}
    assert "ctr-ranker v0.0.1 (ctr-ranker:qin-one) is the champion; " in promote()
    assert json.loads(POINTER.read_text())["version"] == "v0.0.1"
    assert [tag for tag in tags() if "@" in tag] == ["ctr-ranker@v0.0.1"]


def test_a_commit_holds_one_version(repository: Path) -> None:
    """Another Bento of the same checkpoint, whose run was never committed."""
    promote()
    write_json(PACKAGE / "package.json", json.loads((PACKAGE / "package.json").read_text()) | {"tag": "ctr-ranker:new"})
    write_json(SMOKE, {"passed": True, "tag": "ctr-ranker:new"})
    with pytest.raises(ValueError, match=r"in this commit with version 'v0\.0\.1', .*run that built ctr-ranker:new"):
        promote()
    assert tags() == ["ctr-ranker#champion#1", "ctr-ranker@v0.0.1"]
