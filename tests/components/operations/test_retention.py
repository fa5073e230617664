"""Retention: forty runs later, a version can still be pulled into a fresh clone, and what nobody needs is gone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from components.operations import retention
from components.operations.day import Day
from components.operations.locks import hold
from components.operations.worktree import git
from tests.conftest import environment

RUNS, KEPT, VERSION = 40, 5, 3  # runs in all, tags that stay, and which run became a version
DVC = [sys.executable, "-m", "dvc"]


def dvc(folder: Path, *words: str) -> str:
    done = subprocess.run([*DVC, *words], cwd=folder, env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def day(number: int) -> str:
    return f"2026-{1 + number // 28:02}-{1 + number % 28:02}"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A clone after forty runs, each with one small output, its commit and its tag, in a worktree of its own."""
    before = dict(os.environ)
    root = tmp_path_factory.mktemp("retention") / "clone"
    os.environ |= environment(root)
    root.mkdir()
    git(root, "init", "-q", "-b", "main")
    shutil.copytree(Path(__file__).parents[3] / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache"))
    shutil.copy(Path(__file__).parents[3] / ".dvcignore", root)
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / ".gitignore").write_text("/.runs/\n/.dvc-remote/\n/.dvc/cache\n/.dvc/tmp\n/.dvc/config.local\n")
    (root / "params.yaml").write_text(
        yaml.safe_dump({"run": {"promote": "auto", "wait_hours": 1, "keep_runs": KEPT,
                                "keep_worktrees": 1}})
    )  # fmt: skip
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "base")
    # The bytes of all runs at once: DVC's start is what would take long
    (root / "data").mkdir()
    for number in range(RUNS):
        (root / f"data/n{number}").write_text(f"{number}\n" * 20_000)
    dvc(root, "add", *(f"data/n{number}" for number in range(RUNS)))
    dvc(root, "push")
    pointers = {number: (root / f"data/n{number}.dvc").read_text() for number in range(RUNS)}
    shutil.rmtree(root / "data")
    for number in range(RUNS):
        (root / "out.dvc").write_text(pointers[number].replace(f"path: n{number}", "path: out"))
        git(root, "add", "out.dvc")
        git(root, "checkout", "-q", "--detach")
        git(root, "commit", "-q", "-m", day(number))
        git(root, "tag", "-a", "-m", "{}", f"run/{day(number)}")
    git(root, "tag", "-a", "-m", "{}", "ctr-ranker@v1.0.0", f"run/{day(VERSION)}^{{commit}}")
    git(root, "checkout", "-q", "main")
    yield root
    os.environ.clear()
    os.environ.update(before)


def objects(folder: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder / "files"))


def test_forty_runs_later_a_version_can_be_pulled(clone: Path, tmp_path: Path) -> None:
    assert objects(clone / ".dvc/cache") == objects(clone / ".dvc-remote") == RUNS
    told: list[str] = []
    retention.tidy(clone, told.append)
    tags = git(clone, "tag", "--list", "run/*").splitlines()
    assert tags == [f"run/{day(n)}" for n in (VERSION, *range(RUNS - KEPT, RUNS))]
    assert objects(clone / ".dvc/cache") == objects(clone / ".dvc-remote") == KEPT + 1
    freed, _, after = told[-1].removeprefix("tidy: ").partition(" MiB freed; ")
    assert float(freed) > 0 and after.endswith("MiB each")

    fresh = tmp_path / "fresh"
    git(tmp_path, "clone", "-q", str(clone), "fresh")
    git(fresh, "checkout", "-q", "ctr-ranker@v1.0.0")
    dvc(fresh, "remote", "modify", "--local", "local", "url", str(clone / ".dvc-remote"))
    dvc(fresh, "pull")
    assert (fresh / "out").read_text() == f"{VERSION}\n" * 20_000


def test_no_data_are_freed_while_a_run_is_at_work(clone: Path) -> None:
    git(clone, "tag", "--delete", f"run/{day(RUNS - 1)}")
    before, told = objects(clone / ".dvc/cache"), list[str]()
    with Day.of(clone, day(RUNS)).locked("run"):
        retention.tidy(clone, told.append)
    assert objects(clone / ".dvc/cache") == before
    assert "no data are freed now" in told[0] and "run" in told[0]
    retention.tidy(clone, told.append)
    assert objects(clone / ".dvc/cache") == before - 1


def test_worktrees_of_ended_runs_go_but_for_the_newest_and_those_in_use(clone: Path) -> None:
    days = [Day.of(clone, day(n)) for n in range(RUNS - 5, RUNS - 1)]
    for one in days:
        git(clone, "worktree", "add", "-q", "--detach", str(one.worktree), one.tag)
    (days[0].worktree / "dvc.yaml").write_text("stages: {}  # a run that has not ended\n")
    told: list[str] = []
    with hold(days[1].lock, "a reader"):
        left = retention.drop_worktrees(clone, 1, told.append)
    assert [path.name for path in left] == [str(one) for one in (days[0], days[1], days[3])]
    assert not days[2].worktree.exists() and str(days[2].worktree) not in git(clone, "worktree", "list")
    assert str(days[0]) in told[0]


def test_a_remote_elsewhere_is_left_alone(clone: Path, tmp_path: Path) -> None:
    """Another clone may need what has no tag here."""
    elsewhere = tmp_path / "remote"
    shutil.copytree(clone / ".dvc-remote", elsewhere)
    count = objects(elsewhere)
    git(clone, "tag", "--delete", f"run/{day(RUNS - 3)}")
    dvc(clone, "remote", "modify", "--local", "local", "url", str(elsewhere))
    assert retention.own_remotes(clone) == []
    cached = objects(clone / ".dvc/cache")
    retention.tidy(clone, lambda line: None)
    assert objects(clone / ".dvc/cache") == cached - 1
    assert objects(elsewhere) == count


def test_a_dvc_at_work_in_the_work_tree_is_waited_for_and_a_killed_one_is_not(clone: Path) -> None:
    lock = clone / ".dvc/tmp/rwlock"
    for pid, busy in ((os.getpid(), True), (2**22 - 1, False)):
        lock.write_text(json.dumps({"write": {"/out": {"pid": pid, "cmd": "dvc repro"}}, "read": {}}))
        assert retention.busy(clone) == busy
    lock.write_text('{"write": {')
    assert not retention.busy(clone)
    lock.unlink()
