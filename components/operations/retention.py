"""tidy: drop what no version and none of the newest runs needs. What a version needs always stays.

In this order, so that a kill leaves too much and never too little: worktrees of ended runs, tags of runs, and then
DVC's data that neither a tag, nor a branch, nor a worktree names. `dvc gc --workspace` alone would drop the champion.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path

from components.common.causes import BusyError
from components.common.config import load
from components.operations.day import LOCKS, RUNS, Day, RunConfig, Say, to_stderr
from components.operations.locks import hold
from components.operations.repro import held, holds
from components.operations.worktree import cache, environment, exists, git

MIB = 2**20


def tidy(root: Path, say: Say = to_stderr) -> None:
    """Apply `run.keep_worktrees` and `run.keep_runs`, and free what nothing names any more, here and in the remote.

    Data are freed only while no run is at work; else the next call does it.
    """
    root = root.resolve()
    config = load(root / "params.yaml", "run", RunConfig)
    places = [cache(root), *own_remotes(root), root / RUNS]
    before = disk(places)
    open_ = drop_worktrees(root, config.keep_worktrees, say)
    drop_tags(root, config.keep_runs, say)
    try:
        with hold(root / RUNS / LOCKS / "runs.lock", "tidy"):
            if busy(root):
                raise BusyError("a `dvc repro` of the work tree is at work")
            collect(root, open_)
    except BusyError as error:
        say(f"tidy: no data are freed now: {error}")
    after, runs = disk(places), len(_runs(root))
    say(
        f"tidy: {max(0.0, before - after):,.1f} MiB freed; {after:,.1f} MiB in use by {runs} runs and their versions"
        + (f", {after / runs:,.1f} MiB each" if runs else "")
    )


def drop_worktrees(root: Path, keep: int, say: Say) -> list[Path]:
    """Remove worktrees of ended runs, but for the newest. Returns those that stay."""
    folders = sorted(path for path in (root / RUNS).glob("[0-9]*-*-*") if (path / ".git").is_file())
    ended = [path for path in folders if _ended(root, path)]
    for path in ended[: len(ended) - keep]:
        day = Day.of(root, path.name)
        try:
            with hold(day.lock, f"{day}: tidy"):
                git(root, "worktree", "remove", "--force", "--force", str(path))
                shutil.rmtree(path, ignore_errors=True)
        except BusyError:
            continue  # somebody uses it
        folders.remove(path)
    open_ = [path.name for path in folders if path not in ended]
    if open_:
        say(f"tidy: runs that have not ended keep their worktrees: {', '.join(open_)}")
    return folders


def _ended(root: Path, worktree: Path) -> bool:
    """Whether the worktree holds nothing that its run's tag does not have."""
    tag = f"run/{worktree.name}"
    head = git(worktree, "rev-parse", "HEAD^{commit}")
    return (
        exists(root, tag)
        and git(root, "rev-parse", f"{tag}^{{commit}}") == head
        and not git(worktree, "status", "--porcelain", "--untracked-files=no")
    )


def drop_tags(root: Path, keep: int, say: Say) -> None:
    """Delete the tags of older runs. A run that became a version keeps its tag: its commit has another one too."""
    runs = _runs(root)
    old = set(sorted(set(runs.values()))[:-keep])
    versions = {
        line.split()[1] or line.split()[0]
        for line in git(root, "tag", "--list", "--format=%(objectname) %(*objectname)", "*@v*").splitlines()
    }
    gone = [
        tag for tag, day in runs.items()
        if day in old and git(root, "rev-parse", f"{tag}^{{commit}}") not in versions
    ]  # fmt: skip
    if gone:
        git(root, "tag", "--delete", *gone)
        say(f"tidy: {len(gone)} tags of runs before the newest {keep} are gone")


def _runs(root: Path) -> dict[str, date]:
    """Tag of a run -> its day; with those that a later run of the same day has replaced."""
    tags = git(root, "tag", "--list", "run/*").splitlines()
    found = {tag: re.fullmatch(r"run/(\d{4}-\d\d-\d\d)(\.\d+)?", tag) for tag in tags}
    return {tag: date.fromisoformat(match[1]) for tag, match in found.items() if match}


def busy(root: Path) -> bool:
    """Whether a DVC works in the clone's own work tree. A lock that a killed one left does not count."""
    file = root / ".dvc/tmp/rwlock"
    try:
        return file.is_file() and any(holds(info, file) for info in held(file))
    except ValueError:  # cut in two by a kill
        return False


def collect(root: Path, worktrees: Iterable[Path]) -> None:
    """`dvc gc`, and all that a tag, a branch, the work tree or an open worktree names stays.

    In a remote too, if it lies in this clone. A remote elsewhere may be others' as well, and their tags are not here.
    Raises BusyError where DVC cannot do it now.
    """
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "gc", "--force", "--quiet"]
    command += ["--workspace", "--all-tags", "--all-branches"]
    if own_remotes(root):
        command.append("--cloud")
    projects = [str(path) for path in worktrees if (path / ".dvc").is_dir()]
    command += ["--projects", *projects] if projects else []
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise BusyError(f"`dvc gc` failed: {said[-1] if said else 'it said nothing'}")


def own_remotes(root: Path) -> list[Path]:
    """The default remote's folder, if it lies in the clone."""
    from dvc.config import Config

    known = Config(str(root / ".dvc"))
    url = known["remote"].get(known["core"].get("remote"), {}).get("url", "")
    return [Path(url)] if url and "://" not in url and Path(url).is_relative_to(root) else []


def disk(places: Iterable[Path]) -> float:
    """MiB on the disk below some folders. A file with several names counts once."""
    seen: dict[tuple[int, int], int] = {}
    for place in places:
        for folder, _, names in os.walk(place):
            for name in names:
                try:
                    found = os.lstat(f"{folder}/{name}")
                except OSError:
                    continue  # a run beside this one has moved it
                seen[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(seen.values()) / MIB
