"""One stage of dvc.yaml in a run's worktree: DVC's locks, what it prints, and why it failed.

DVC has two locks. Its first is free again when its process ends. Its second is a file with process numbers, for the
paths that a stage reads and writes: a second `dvc repro` waits 5 s for it and fails. Here it waits as long as the other
process works, up to a bound, and a lock that nobody holds any more is told and cleared.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from components.common.causes import BROKEN, TRY_AGAIN, BusyError, StepError
from components.operations.locks import hold
from components.operations.worktree import environment

LOCK_SECONDS = 1800  # what a stage waits for a DVC that works on the same paths
MARK = "CLICKLOOP_STAGE"  # in the environment of all that a stage starts: a later attempt finds what was left
POLL_SECONDS, END_SECONDS = 2.0, 20.0
BUSY = ("is busy, it is being blocked by", "Unable to acquire lock")
# What DVC says about git and its remote: a run commits and pushes by itself.
ADVICE = re.compile(
    r"To track the changes with git, run:|\s+git add .*|To enable auto staging, run:|\s+dvc config core\.autostage true"
    r"|Use `dvc push` to send your updates to remote storage\.|(Updating|Generating) lock file 'dvc\.lock'|\s*"
)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """how      ran, cached (DVC had the outputs of these inputs) or unchanged
    seconds  of the whole step
    own      of the stage's own command; 0 where it did not run
    """

    how: str
    seconds: float
    own: float


def repro(worktree: Path, name: str, say: Say) -> Outcome:
    """Run a stage if its inputs changed. `say` gets each line that it prints.

    Raises ValueError with the stage's reason, BusyError where it may pass, StepError where nobody knows.
    """
    begun = time.monotonic()
    with hold(worktree / ".scratch/locks" / name, f"stage {name}"):
        for line in (*end_orphans(worktree, name), *clear_stale(worktree)):
            say(line)
        note = worktree / ".scratch/stages" / f"{name}.json"
        while True:
            before = _noted(note)
            code, said = _dvc(worktree, name, say)
            if not code:
                break
            if not any(sign in said for sign in BUSY):
                raise _reason(name, said, _json(note) if _noted(note) != before else {})
            if time.monotonic() - begun > LOCK_SECONDS:
                raise BusyError(f"{name}: DVC's lock is taken for {LOCK_SECONDS // 60} min: {holders(worktree)}")
            say(f"{name} waits for DVC's lock: {holders(worktree)}")
            time.sleep(POLL_SECONDS)
            for line in clear_stale(worktree):
                say(line)
    how = "ran" if f"Running stage '{name}'" in said else "cached" if "is cached - skipping" in said else "unchanged"
    own = _json(note).get("seconds", 0.0) if how == "ran" else 0.0
    return Outcome(how, time.monotonic() - begun, own)


def _dvc(worktree: Path, name: str, say: Say) -> tuple[int, str]:
    """Exit code, and all that was printed. Whatever ends this process ends DVC and the stage with it."""
    # --wait-for-lock: stages side by side take turns at DVC's first lock, and hold it for moments
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
    process = subprocess.Popen(
        command, cwd=worktree, env=environment() | {MARK: _mark(worktree, name)}, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    lines = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if not ADVICE.fullmatch(line.rstrip("\n")):
                say(line.rstrip("\n"))
        return process.wait(), "".join(lines)
    finally:
        end([psutil.Process(process.pid)] if process.poll() is None else [])


def _reason(name: str, said: str, note: dict[str, Any]) -> Exception:
    """The error that tells why the stage failed: from the stage's own note, or else from what was printed."""
    if note.get("error"):
        kind = {BROKEN: ValueError, TRY_AGAIN: BusyError}.get(note.get("code", 1), StepError)
        return kind(f"{name}: {note['error']}")
    lines = [line for line in said.splitlines() if not ADVICE.fullmatch(line)]
    if full := next((line for line in lines if "disk is full" in line or "No space left on device" in line), None):
        return BusyError(f"{name}: {full.removeprefix(f'{name}: ')}")
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if killed := re.search(r"exited with (?:-(\d+)|1(2[89]|[3-5]\d)$)", "\n".join(errors), re.MULTILINE):
        number = int(killed[1] or f"1{killed[2]}") % 128
        return BusyError(f"{name}: killed by {signal.Signals(number).name}; the system may have run out of memory")
    if "missing data 'source'" in said or "does not exist" in " ".join(errors):
        return ValueError(f"{name}: {errors[-1] if errors else lines[-1]}")
    own = [line for line in lines if not line.startswith("ERROR: ")]
    return StepError(f"{name}: {(own or errors or ['it printed nothing'])[-1].strip()}")


def _noted(note: Path) -> int:
    return note.stat().st_mtime_ns if note.is_file() else 0


def _json(note: Path) -> dict[str, Any]:
    return json.loads(note.read_text()) if note.is_file() else {}


# ---- what a killed process leaves ---------------------------------------------------------------------------------


def end_orphans(worktree: Path, name: str) -> list[str]:
    """End what an earlier attempt at this stage left running: DVC, or the stage's own command. Returns what was done.

    The caller holds the stage's lock, so nobody waits for these processes any more, and they write the same files.
    """
    mark = _mark(worktree, name)
    found = [process for process in psutil.process_iter() if _environment(process).get(MARK) == mark]
    end(found)
    return [f"{name}: process {process.pid} of an earlier attempt was still at work: ended" for process in found]


def _mark(worktree: Path, name: str) -> str:
    return f"{worktree.resolve()}:{name}"


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}  # another user's, or it has just ended


def end(processes: list[psutil.Process]) -> None:
    """End processes and all that they started: asked first, then killed."""
    every = {one for process in processes for one in (process, *_children(process))}
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        for one in every:
            try:
                ask(one)
            except psutil.Error:
                continue
        _, alive = psutil.wait_procs(every, END_SECONDS)
        every = set(alive)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def clear_stale(worktree: Path) -> list[str]:
    """Drop DVC's locks that no DVC holds, and a dvc.lock that a kill cut in two. Returns what was done."""
    told = []
    lock = worktree / "dvc.lock"
    if lock.is_file() and not _whole(lock.read_text(errors="replace")):
        lock.unlink()
        told.append("dvc.lock was not whole: removed, DVC takes what it has from its cache")
    file = worktree / ".dvc/tmp/rwlock"
    if file.is_file():
        try:
            gone = [info for info in held(file) if not holds(info, file)]
        except ValueError:
            file.unlink()
            return [*told, f"{file} was not whole, a killed DVC left it: removed"]
        if gone:
            kept = _without(json.loads(file.read_text()), gone)
            file.write_text(json.dumps(kept))
            told += sorted({f"process {i['pid']} ({i['cmd']}) is gone, and left a lock of DVC: cleared" for i in gone})
    return told


def _whole(text: str) -> bool:
    try:
        return isinstance(yaml.safe_load(text), dict) and text.endswith("\n")
    except yaml.YAMLError:
        return False


def held(file: Path) -> list[dict[str, Any]]:
    """Who holds DVC's second lock. Raises ValueError where the file is not whole."""
    content = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no lock of DVC")
    readers = [info for infos in content.get("read", {}).values() for info in infos]
    return readers + [info for info in content.get("write", {}).values() if info]


def holds(info: dict[str, Any], file: Path) -> bool:
    """Whether the process is there and is that DVC: a number may be in use again, by a process that began later."""
    try:
        process = psutil.Process(info["pid"])
        return process.create_time() <= file.stat().st_mtime and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False


def _without(content: dict[str, Any], gone: list[dict[str, Any]]) -> dict[str, Any]:
    read = {path: [info for info in infos if info not in gone] for path, infos in content.get("read", {}).items()}
    write = {path: info for path, info in content.get("write", {}).items() if info and info not in gone}
    return {"read": {path: infos for path, infos in read.items() if infos}, "write": write}


def holders(worktree: Path) -> str:
    """Who holds DVC's locks, in words."""
    file = worktree / ".dvc/tmp/rwlock"
    try:
        found = sorted({f"process {info['pid']} ({info['cmd']})" for info in held(file)})
    except (OSError, ValueError):
        found = []
    return ", ".join(found) or "another DVC"
