"""The worktree of a run: the code of one commit, the settings of the person's work tree, the clone's cache and remote.

`.dvc/config.local` belongs to one worktree, so each run gets one of its own. Its paths are absolute: DVC reads a
relative path from the worktree's own folder. Outputs are links into the cache, where the file system allows it.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from components.common import pipeline
from components.common.artifacts import new_file
from components.common.causes import BusyError

AUTHOR = ("clickloop", "clickloop@localhost")  # of the commit of a run, where git knows nobody
GIT_SECONDS = 20  # a lock of git's is held for moments
TIES = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY"}
LINKS = "reflink,hardlink,copy"  # no stage writes into an output that is there: each makes a new one
# Settings that may be paths beside the code. The worktree lies elsewhere, and must still find them.
PATHS = (("ingest", "raw"), ("embed", "fit"), ("embed", "text_encoder"), ("embed", "image_encoder"))


def environment() -> dict[str, str]:
    """Of every process that works in a worktree: this Python first, no telemetry, and not the caller's repository."""
    kept = {name: value for name, value in os.environ.items() if name not in TIES}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return kept | {
        "PATH": path,
        "DVC_NO_ANALYTICS": "1",
        "GX_ANALYTICS_ENABLED": "false",
        "BENTOML_DO_NOT_TRACK": "True",
    }


def git(folder: Path, *arguments: str) -> str:
    """What git says. Waits for its locks. Raises BusyError for one that stays, ValueError for all that git refuses."""
    deadline = time.monotonic() + GIT_SECONDS
    while True:
        done = subprocess.run(
            ["git", *_author(folder, arguments), *arguments],
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
        )
        if not done.returncode:
            return done.stdout.strip()
        said = done.stderr.strip()
        if os.strerror(errno.ENOSPC) in said:
            raise BusyError(f"git {' '.join(arguments)}: the disk is full")
        locked = ".lock'" in said or "cannot lock ref" in said
        if not locked:
            raise ValueError(f"git {' '.join(arguments)}: {said}")
        if time.monotonic() > deadline:
            raise BusyError(f"git {' '.join(arguments)}: {said}. If no git is at work, remove the file that it names")
        time.sleep(0.2)


def _author(folder: Path, arguments: tuple[str, ...]) -> list[str]:
    """Settings for commits and tags: a server may have no name for git, and no hook or signature belongs to a run."""
    if arguments[0] not in ("commit-tree", "tag"):
        return []
    settings = ["commit.gpgsign=false", "tag.gpgsign=false", "gc.auto=0"]
    known = subprocess.run(["git", "var", "GIT_COMMITTER_IDENT"], cwd=folder, env=environment(), capture_output=True)
    if known.returncode:
        settings += [f"user.name={AUTHOR[0]}", f"user.email={AUTHOR[1]}"]
    return [word for setting in settings for word in ("-c", setting)]


def exists(root: Path, revision: str) -> bool:
    """Whether git knows a commit of this name."""
    command = ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    return not subprocess.run(command, cwd=root, env=environment(), capture_output=True).returncode


def make(root: Path, worktree: Path, commit: str) -> None:
    """The worktree at a commit, new or brought there. What git ignores stays: outputs, and DVC's state.

    dvc.lock stays too: it says what the outputs are. A worktree that was killed while git made it is made anew.
    """
    entry = _entry(worktree)
    if entry is None:
        shutil.rmtree(worktree, ignore_errors=True)
        # twice: also where git has a locked entry of it, which a killed `worktree add` leaves
        git(root, "worktree", "add", "--force", "--force", "--detach", "--quiet", str(worktree), commit)
        entry = _entry(worktree)
        assert entry is not None
    (entry / "index.lock").unlink(missing_ok=True)  # of a git that was killed: the run has this worktree alone
    lock = worktree / "dvc.lock"
    before = lock.read_bytes() if lock.is_file() else None
    git(worktree, "checkout", "--quiet", "--force", "--detach", commit)
    git(worktree, "reset", "--quiet", "--hard", commit)
    if before is not None:
        with new_file(lock) as scratch:
            scratch.write_bytes(before)


def _entry(worktree: Path) -> Path | None:
    """Git's own folder of the worktree; None where the worktree is not whole."""
    try:
        entry = Path((worktree / ".git").read_text().removeprefix("gitdir:").strip())
    except OSError:
        return None
    return entry if (entry / "HEAD").is_file() and not (entry / "locked").exists() else None


def uncommitted(root: Path) -> list[str]:
    """Code of the work tree that no commit has yet, so that no run takes it."""
    code = {Path(dep).parts[0] for stage in pipeline.read(root).stages.values() for dep in stage.deps}
    paths = sorted({"dvc.yaml", *code} - {"champion.json"})
    return [line.split(maxsplit=1)[1] for line in git(root, "status", "--porcelain", "--", *paths).splitlines()]


def configure(root: Path, worktree: Path) -> None:
    """The worktree's .dvc/config.local: all that the clone has set, its paths absolute."""
    from configobj import ConfigObj
    from dvc.config import Config

    known = Config(str(root / ".dvc"))
    written = ConfigObj(encoding="utf-8")
    written.filename = str(worktree / ".dvc/config.local")
    written["core"] = {"site_cache_dir": str(worktree / ".dvc/tmp/site")}
    written["cache"] = {**known["cache"], "dir": str(cache(root)), "type": LINKS}
    for name, remote in known["remote"].items():
        written[f'remote "{name}"'] = {key: str(value) for key, value in remote.items()}
    written.write()


def cache(root: Path) -> Path:
    """DVC's cache of a clone."""
    from dvc.config import Config

    return Path(Config(str(root / ".dvc"))["cache"].get("dir") or root / ".dvc/cache")


def settings(root: Path, worktree: Path, until: datetime) -> None:
    """params.yaml of the work tree, with `ingest.until`, and with paths that are right in the worktree too."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import RoundTripRepresenter

    class Representer(RoundTripRepresenter):
        """Ruamel's own, but a null is written as the word, as in params.yaml."""

    Representer.add_representer(type(None), lambda own, _: own.represent_scalar("tag:yaml.org,2002:null", "null"))
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 120
    yaml.Representer = Representer
    params = yaml.load(root / "params.yaml")
    params["ingest"]["until"] = until.isoformat()
    for section, key in PATHS:
        params[section][key] = _from(root, worktree, params[section][key])
    with new_file(worktree / "params.yaml") as scratch:
        yaml.dump(params, scratch)


def _from(root: Path, worktree: Path, value: Any) -> Any:
    """A path as the worktree reaches it. What git tracks is in the worktree too; URLs and names stay as they are."""
    if not isinstance(value, str) or "://" in value or Path(value).is_absolute() or not (root / value).exists():
        return value
    if git(root, "ls-files", "--", value):
        return value
    return os.path.relpath(root / value, worktree)
