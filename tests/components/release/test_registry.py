"""Versions, promotion, rollback and their history, in a git and DVC repository with a remote."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from components.common.artifacts import folder_hash
from components.common.live import current
from components.release import registry, versions
from components.training.champion import fetch
from models.checkpoint import checkpoint_hash
from tests.components.release.runs import PROJECT, close, commit, dvc, git

pytestmark = pytest.mark.slow


def promote(root: Path, version: str, **words: Any) -> str:
    return registry.promote(root, root / ".live", version, "ann", "better", **words)


def rollback(root: Path, version: str) -> str:
    return registry.rollback(root, root / ".live", version, "bob", "it went wrong")


def serves(root: Path) -> tuple[str, str]:
    """Of the model and the store, by what a server reads."""
    live = root / ".live/current"
    words = (live / "bento/bento.yaml").read_text().split()
    return words[1], json.loads((live / "online/receipt.json").read_text())["until"][:10]


def states(root: Path) -> dict[str, str]:
    return {row["version"]: row["state"] for row in registry.standing(root, root / ".live")["versions"]}


def tags(root: Path) -> list[str]:
    return [tag for tag in git(root, "tag").split() if not tag.startswith("run/")]


def test_promote_and_roll_back(clone: Path) -> None:
    before = git(clone, "status", "--porcelain"), (clone / "champion.json").read_text()
    assert registry.standing(clone, clone / ".live") == {"versions": [], "unfinished": None, "store": None}
    assert versions.register(clone, "run/2026-01-10") == "v0.0.1" == versions.register(clone, "run/2026-01-10")
    assert tags(clone) == ["ctr-ranker@v0.0.1"]
    shutil.rmtree(clone / "artifacts")  # all comes out of DVC, at the tag's commit
    shutil.rmtree(clone / "data")

    said = promote(clone, "v0.0.1")
    assert said.startswith(
        "ctr-ranker@v0.0.1 (ctr-ranker:qin-2026-01-10) is the champion and serves, with the features of"
    )
    assert serves(clone) == ("qin-2026-01-10", "2026-01-11")
    release = clone / ".live/releases/ctr-ranker/v0.0.1"
    assert sorted(file.name for file in release.iterdir()) == ["bento", "golden.json", "package.json", "release.json"]
    whole = folder_hash(release)

    assert "v0.0.2" in promote(clone, "2026-01-11")  # a run that was no version yet
    assert serves(clone) == ("qin-2026-01-11", "2026-01-12")
    assert states(clone) == {"v0.0.2": "champion serving", "v0.0.1": "former"}
    assert "is the champion already; nothing was done" in promote(clone, "run/2026-01-11")

    assert "the live store stays: its data until 2026-01-12T00:00:00+00:00 are newer" in rollback(clone, "v0.0.1")
    assert serves(clone) == ("qin-2026-01-10", "2026-01-12")
    assert folder_hash(release) == whole
    assert states(clone) == {"v0.0.2": "former", "v0.0.1": "champion serving"}
    told = [registry.told(one) for one in versions.history(clone)]
    assert [(one["number"], one["version"], one["who"], one["why"], one["override"]) for one in told] == [
        (3, "v0.0.1", "bob", "it went wrong", None),
        (2, "v0.0.2", "ann", "better", None),
        (1, "v0.0.1", "ann", "better", None),
    ]
    assert (git(clone, "status", "--porcelain"), (clone / "champion.json").read_text()) == before
    now = current(clone / ".live")
    assert now and (now.who, now.why, now.version) == ("bob", "it went wrong", "v0.0.1")

    from gto.api import show  # GTO reads the tags as its own

    (row,) = show(str(clone), "ctr-ranker#champion")
    assert row["version"] == "v0.0.1"


def test_the_judge_of_a_day_is_of_an_earlier_day(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    live = clone / ".live"

    def judge(day: str) -> dict[str, Any]:
        """Without what earlier nights measured."""
        found = registry.judge(clone, live, day)
        return {name: value for name, value in found.items() if name not in ("earlier", "nights")}

    promote(clone, "2026-01-10")
    promote(clone, "2026-01-11")
    one, two = versions.versions(clone)
    assert judge("2026-01-12") == two.pointer()
    rollback(clone, "v0.0.1")
    assert judge("2026-01-12") == one.pointer()  # the one that serves
    shutil.rmtree(live)
    assert judge("2026-01-12") == two.pointer()  # the newest that ever was the champion
    assert judge("2026-01-09") == {"version": None}
    assert judge("2026-01-11") == {"version": None}  # what that run had
    git(clone, "tag", "-d", "run/2026-01-11")
    assert judge("2026-01-11") == one.pointer()
    assert one.pointer()["judged_sha256"] != one.pointer()["checkpoint_sha256"]
    fetch(one.pointer(), clone / "fetched")
    assert checkpoint_hash(clone / "fetched") == one.facts["judged_sha256"]
    assert "champion.json names ctr-ranker@v0.0.1" in registry.pin(clone, None)  # promoted last
    assert json.loads((clone / "champion.json").read_text()) == one.pointer()


def test_hashes_that_do_not_match_are_refused_whatever_the_reason(clone: Path) -> None:
    close(clone, "2026-01-12", package={"checkpoint_sha256": "another"})
    with pytest.raises(ValueError, match=r"what the decision ships at its commit is .*no override helps"):
        promote(clone, "2026-01-12", override="I know better")
    facts = versions.versions(clone)[-1].facts
    git(clone, "tag", "-d", "ctr-ranker@v0.0.1")
    close(clone, "2026-01-12")
    versions._tag(clone, "ctr-ranker@v0.0.1", "HEAD", facts | {"bento": "ctr-ranker:qin-2026-01-12"})
    with pytest.raises(ValueError, match=r"its tag names another, what the decision ships"):
        promote(clone, "v0.0.1", override="I know better")
    git(clone, "tag", "-d", "ctr-ranker@v0.0.1")
    versions.register(clone, "run/2026-01-12")
    good = versions.versions(clone)[-1].facts
    git(clone, "tag", "-d", "ctr-ranker@v0.0.1")
    versions._tag(clone, "ctr-ranker@v0.0.1", "HEAD", good | {"decision_sha256": "0"})
    with pytest.raises(ValueError, match="its tag names 0, the decision at its commit is"):
        promote(clone, "v0.0.1")
    assert current(clone / ".live") is None and tags(clone) == ["ctr-ranker@v0.0.1"]


def test_the_bytes_in_the_bento_are_those_that_ship(clone: Path) -> None:
    model = clone / "artifacts/package/bento/models/ctr_ranker_model/qin/config.json"
    model.write_text(model.read_text() + " ")
    commit(clone, "another package", outputs=True)
    git(clone, "tag", "-f", "-m", "again", "run/2026-01-11")
    dvc(clone, "push", "-q")
    with pytest.raises(ValueError, match=r"the Bento holds the checkpoint .*no override helps"):
        promote(clone, "2026-01-11", override="I know better")
    assert current(clone / ".live") is None
    assert not list((clone / ".live/releases/ctr-ranker").iterdir())


def test_what_an_override_goes_on_with_stays_in_the_history(clone: Path) -> None:
    close(clone, "2026-01-12", push=False, smoke={"tag": "ctr-ranker:another"})
    with pytest.raises(ValueError, match=r"or give `--override REASON`$") as refused:
        promote(clone, "2026-01-12")
    assert "ctr-ranker:qin-2026-01-12 has not passed the smoke test; run the day again" in str(refused.value)
    assert re.search(r"DVC's remote does not have artifacts/package \(\d+ of \d+ files\), ", str(refused.value))
    assert "run `dvc push` where the run's commit is checked out (of a day: .runs/2026-01-12)" in str(refused.value)
    with pytest.raises(ValueError, match="give a reason"):
        promote(clone, "2026-01-12", override=" ")
    promote(clone, "2026-01-12", override="the remote is down")
    assert versions.history(clone)[0].override == "the remote is down"
    dvc(clone, "push", "-q")
    promote(clone, "2026-01-11", override="not needed")
    assert versions.history(clone)[0].override is None


def test_after_a_push_another_clone_has_all_of_a_champion(clone: Path, tmp_path: Path) -> None:
    promote(clone, "2026-01-10")
    shutil.rmtree(clone / ".dvc/cache")  # the remote alone
    promote(clone, "2026-01-11")
    assert serves(clone) == ("qin-2026-01-11", "2026-01-12")


def test_a_rejected_run_is_no_version(clone: Path) -> None:
    reasons = {"verdict": "reject", "model": None, "reasons": ["qin fails 1 of 2 rules"]}
    close(clone, "2026-01-12", decision=reasons, package={"built": False})
    with pytest.raises(ValueError, match=r"nothing was built: qin fails 1 of 2 rules\. To ship it, change the limits"):
        promote(clone, "2026-01-12", override="I like it")
    with pytest.raises(ValueError, match=r"no version 'v9\.9\.9'; there are: none yet"):
        promote(clone, "v9.9.9")
    versions.register(clone, "run/2026-01-10")
    with pytest.raises(
        ValueError, match=r"v0\.0\.1 never was the champion; run `python -m components registry promote"
    ):
        rollback(clone, "v0.0.1")


def test_tags_of_others_are_no_versions(clone: Path) -> None:
    from gto.api import assign, deregister

    promote(clone, "2026-01-10")
    promote(clone, "2026-01-11")
    deregister(repo=str(clone), name="ctr-ranker", version="v0.0.1")  # as `gto deprecate ctr-ranker v0.0.1`
    for version, subject in (("v9.9.7", "words"), ("v9.9.8", "7"), ("v9.9.9", '{"note": "by hand"}')):
        commit(clone, version)
        git(clone, "tag", "-m", subject, f"ctr-ranker@{version}")
    git(clone, "tag", "light")
    assert [one.version for one in versions.versions(clone)] == ["v0.0.1", "v0.0.2"]
    assign(repo=str(clone), name="ctr-ranker", stage="champion", version="v0.0.2", force=True)  # by GTO's own command
    assert versions.history(clone)[0].version.version == "v0.0.2"


def test_the_command_line(clone: Path) -> None:
    def run(*words: str, code: int = 0) -> str:
        env = os.environ | {"PYTHONPATH": str(PROJECT), "CLICKLOOP_LIVE": str(clone / ".live"), "USER": "eve"}
        done = subprocess.run(
            [sys.executable, "-m", "components", "registry", *words], cwd=clone, env=env, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert "no version yet" in run("list")
    assert "Missing option '--why'" in run("promote", "2026-01-10", code=2)
    assert "is the champion and serves" in run("promote", "2026-01-10", "--why", "the first")
    assert run("register", "run/2026-01-11") == "v0.0.2\n"
    rows = json.loads(run("list", "--json"))["versions"]
    assert [(row["version"], row["day"], row["state"], row["who"], row["auc"]) for row in rows] == [
        ("v0.0.2", "2026-01-11", "", None, 0.711),
        ("v0.0.1", "2026-01-10", "champion serving", "eve", 0.71),
    ]
    table = run("list")
    assert "2026-01-10  v0.0.1   qin    0.7100  approved  champion serving  eve  the first" in table
    assert "live store: data until 2026-01-11T00:00:00+00:00" in table
    assert json.loads(run("show", "v0.0.1", "--json"))["promotions"][0]["why"] == "the first"
    assert "by eve: the first" in run("show", "2026-01-10")
    assert json.loads(run("history", "--json"))[0]["version"] == "v0.0.1"
    assert "the first" in run("history")
    assert "v0.0.2 never was the champion" in run("rollback", "v0.0.2", "--why", "x", code=1)
