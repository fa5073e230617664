"""Promotions and rollbacks that are killed: before each of their steps that change something, one after the other.

A step is what Python is about to do to a file below the live folder (make, open for writing, rename, link, remove), or
a program that it is about to start (git, which makes the tags). Python's audit events tell them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.artifacts import folder_hash
from components.common.live import current
from components.release import registry, versions
from tests.components.release.runs import git

CHANGES = ("os.rename", "os.mkdir", "os.symlink", "os.link", "os.remove", "os.rmdir", "os.truncate", "os.chmod",
           "shutil.rmtree", "sqlite3.connect")  # fmt: skip
TEMPORARY = re.compile(r"[\w-]{22}\.tmp")  # DVC's names while it copies
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
Step = tuple[str, int]  # what it is, and how many of the same were before it


@dataclass(frozen=True)
class Outcome:
    """step      what the process was about to do when it was killed
    before    what served after the kill, after  and after the same command again
    mixture   what was half there; empty where nothing was
    """

    step: str
    before: str
    after: str
    mixture: str


def promote(root: Path) -> None:
    registry.promote(root, root / ".live", "v0.0.2", "test", "better")


def rollback(root: Path) -> None:
    registry.rollback(root, root / ".live", "v0.0.1", "test", "it went wrong")


def kill_everywhere(
    root: Path, change: Callable[[Path], None], choose: Callable[[list[str]], Iterable[int]]
) -> list[Outcome]:
    """One outcome for each chosen step of the change, which starts from the clone as it is and leaves it so.

    choose  the change's steps -> the indices of those before which it is killed
    """
    import dvc.api  # the children, which are forks, then have it imported
    import dvc.repo
    import feast

    assert dvc.repo and feast
    live, saved = root / ".live", root.parent / "saved"
    shutil.copytree(live, saved, symlinks=True)
    tags = set(git(root, "tag").split())
    whole = {"old": _serves(live)}

    def restore() -> None:
        shutil.rmtree(live)
        shutil.copytree(saved, live, symlinks=True)
        for tag in set(git(root, "tag").split()) - tags:
            git(root, "tag", "-d", tag)

    listed = root.parent / "steps.json"
    assert _child(root, change, None, listed) == 0
    whole["new"] = _serves(live)
    promotions = len(versions.history(root))
    steps = json.loads(listed.read_text())  # some run in threads, so their order may change, but not what they are
    outcomes = []
    for instant in choose(steps):
        restore()
        step = steps[instant], steps[:instant].count(steps[instant])
        code = _child(root, change, step, listed)
        assert code == -signal.SIGKILL, f"{step} was not reached: {code}"
        found = _serves(live)
        before = next((name for name, one in whole.items() if one == found), "mixture")
        mixture = "" if before != "mixture" else f"{found} is served"
        assert _child(root, change, None, listed) == 0
        after = next((name for name, one in whole.items() if one == _serves(live)), "mixture")
        if left := [str(file.relative_to(live)) for file in live.rglob(".*")]:
            mixture += f"; left: {left}"
        if registry.standing(root, live)["unfinished"] or len(versions.history(root)) != promotions:
            mixture += "; the history is not that of one promotion"
        outcomes.append(Outcome(steps[instant], before, after, mixture))
    restore()
    return outcomes


def _serves(live: Path) -> dict[str, Any]:
    """All that a server would read: the Bento's bytes, and the rows of the online store."""
    now = current(live)
    assert now and now.release and now.store
    receipt = json.loads((live / "current/online/receipt.json").read_text())
    with sqlite3.connect(f"file:{live / 'current/online/online.db'}?mode=ro", uri=True) as db:
        tables = [name for (name,) in db.execute("select name from sqlite_master where type = 'table' order by name")]
        rows = {name: db.execute(f'select count(*) from "{name}"').fetchone()[0] for name in tables}
    return {
        "version": now.version,
        "bento": folder_hash((live / "current/bento").resolve()),
        "until": receipt["until"],
        "rows": rows,
        "registry": (live / "current/online/registry.db").stat().st_size > 0,
    }


def _child(root: Path, change: Callable[[Path], None], step: Step | None, listed: Path) -> int:
    """Change in a process of its own, which is killed before a step, or tells its steps. Returns its code."""
    if (child := os.fork()) == 0:
        try:
            os.chdir(root)
            with (root.parent / "child.log").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            steps: list[str] = []
            sys.addaudithook(lambda event, words: _step(str(root / ".live"), event, words, steps, step))
            change(root)
            if step is None:
                listed.write_text(json.dumps(steps))
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code != 1, (root.parent / "child.log").read_text()
    return code


def _step(live: str, event: str, words: tuple[Any, ...], steps: list[str], last: Step | None) -> None:
    if event == "subprocess.Popen":
        step = f"start {' '.join(map(str, words[1][:6]))}"
    elif event in CHANGES or (event == "open" and isinstance(words[2], int) and words[2] & WRITES):
        paths = [os.fsdecode(word) for word in words if isinstance(word, str | bytes | os.PathLike)]
        if not any(path.startswith(live) for path in paths):
            return
        step = f"{event} {' '.join(TEMPORARY.sub('*.tmp', path.removeprefix(live)) for path in paths)}"
    else:
        return
    if last == (step, steps.count(step)):
        os.kill(os.getpid(), signal.SIGKILL)
    steps.append(step)
