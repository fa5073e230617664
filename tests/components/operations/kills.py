"""Faults of a run, planted in a real one: processes are killed, locks left, the remote taken away, the disk filled."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from tests.conftest import Project

# A git that kills the command which called it, at one of git's own commands: before its end or after it.
GIT = """#!/bin/sh
case "$*" in
*"$KILL_AT"*)
  if [ ! -e "$KILL_ONCE" ]; then
    : > "$KILL_ONCE"
    if [ "$KILL_WHEN" = during ]; then "$REAL_GIT" "$@" & sleep 0.03; kill -9 $!; else "$REAL_GIT" "$@"; fi
    kill -9 $PPID
    exit 137
  fi;;
esac
exec "$REAL_GIT" "$@"
"""


class GoneError(Exception):
    """The process ended before the fault was planted, so the fault was not planted."""


def start(project: Project, *words: str, **env: str) -> subprocess.Popen[bytes]:
    """A command of the project, in the background, its output in last_command.log."""
    log = project.root.with_name("last_command.log").open("wb")
    command = [sys.executable, "-m", "components", *words]
    return subprocess.Popen(command, cwd=project.root, env=project.env | env, stdout=log, stderr=subprocess.STDOUT)


def tree(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The process and all that it started."""
    try:
        own = psutil.Process(process.pid)
        return [own, *own.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def line_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def await_child(process: subprocess.Popen[bytes], words: str, seconds: float = 600) -> psutil.Process:
    """The process below it whose command line holds the words. Raises GoneError where it ends without one."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for child in tree(process)[1:]:
            if words in line_of(child) and "dvc" not in line_of(child).split():
                return child
        if process.poll() is not None:
            raise GoneError(f"no process of {words}")
        time.sleep(0.01)
    raise TimeoutError(f"{words} did not start")


def kill_stage(project: Project, day: str, stage: str, after: float, *, orphan: bool = False) -> None:
    """SIGKILL a stage `after` seconds of its own command: all its processes, or DVC and what started it alone.

    The orphan hangs: else it might end by itself before anybody looks for it.
    """
    process = start(project, "day", "stage", day, stage)
    command = await_child(process, f"components {stage.replace('@', ' ')} ")
    time.sleep(after)
    if not command.is_running() or command.status() == psutil.STATUS_ZOMBIE:
        process.wait()
        raise GoneError(f"{stage} was over")
    if orphan:
        command.suspend()
    for one in tree(process):
        if not (orphan and one.pid == command.pid):
            one.send_signal(signal.SIGKILL)
    process.wait()


def kill_at(project: Project, at: str, *words: str, when: str = "after") -> None:
    """SIGKILL a command at a git command that holds the words `at`: `during` it, or `after` it."""
    folder = project.root.with_name("killing-git")
    folder.mkdir(exist_ok=True)
    git = folder / "git"
    git.write_text(GIT)
    git.chmod(0o755)
    once = folder / "once"
    once.unlink(missing_ok=True)
    real = shutil.which("git", path=project.env["PATH"])
    assert real
    process = start(
        project, *words, PATH=f"{folder}{os.pathsep}{project.env['PATH']}", REAL_GIT=real, KILL_AT=at, KILL_WHEN=when,
        KILL_ONCE=str(once),
    )  # fmt: skip
    code = process.wait()
    if not once.exists():
        raise GoneError(f"git was not asked for {at!r}; exit code {code}")
    assert code == -signal.SIGKILL


def kill_in(project: Project, words_of_child: str, *words: str) -> None:
    """SIGKILL a command, and all that it started, while a child with these words works."""
    process = start(project, *words)
    deadline = time.monotonic() + 600
    while not any(words_of_child in line_of(child) for child in tree(process)[1:]):
        if process.poll() is not None:
            raise GoneError(f"no process of {words_of_child}")
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for one in tree(process):
        one.send_signal(signal.SIGKILL)
    process.wait()


def with_remote_gone(project: Project, act: Callable[[], None]) -> None:
    """Act while the remote's folder is a file."""
    remote, away = project.root / ".dvc-remote", project.root.with_name("remote-away")
    if remote.exists():
        remote.rename(away)
    remote.write_text("the remote is gone\n")
    try:
        act()
    finally:
        remote.unlink()
        if away.exists():
            away.rename(remote)


def with_full_disk(folder: Path, act: Callable[[], None], size: str = "256k") -> None:
    """Act while `folder` is a small file system of its own. Raises GoneError where mounts are refused."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise GoneError("this machine mounts nothing for us")
    try:
        act()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# The real-time clock, some seconds away: all of libc's ways to read it.
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static time_t shift(void) { const char *s = getenv("CLOCK_SHIFT"); return s ? atol(s) : 0; }
int clock_gettime(clockid_t id, struct timespec *t) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(id, t);
  if (!code && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) t->tv_sec += shift();
  return code;
}
int gettimeofday(struct timeval *t, void *zone) {
  struct timespec now; clock_gettime(CLOCK_REALTIME, &now);
  t->tv_sec = now.tv_sec; t->tv_usec = now.tv_nsec / 1000; return 0;
}
time_t time(time_t *out) {
  struct timespec now; clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
"""


def clock(folder: Path) -> str:
    """A library for LD_PRELOAD that moves the clock by CLOCK_SHIFT seconds."""
    (folder / "clock.c").write_text(CLOCK)
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(folder / "clock.so"), str(folder / "clock.c"), "-ldl"]
    subprocess.run(command, check=True)
    return str(folder / "clock.so")
