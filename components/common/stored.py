"""What DVC holds of a commit: in its cache, or else on its remote. No work tree is read or changed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dvc.api import DVCFileSystem
    from dvc.repo import Repo


def repository(root: Path, commit: str) -> Repo:
    """DVC's view of a commit, with the cache and the remotes of the clone as it is now.

    Their paths are made absolute here. DVC itself takes a relative one of a commit's .dvc/config from the root of the
    file system, and would ask another remote. So do `dvc push --all-tags` and `dvc fetch --all-tags`: no text here
    advises them.
    """
    from dvc.config import Config
    from dvc.repo import Repo

    known = Config(str(root / ".dvc"))
    remotes = {name: {key: str(value) for key, value in remote.items()} for name, remote in known["remote"].items()}
    core = {"remote": remote} if (remote := known["core"].get("remote")) else {}
    cache = {"dir": str(known["cache"].get("dir") or root.resolve() / ".dvc/cache")}
    return Repo(str(root), rev=commit, config={"core": core, "remote": remotes, "cache": cache})


@lru_cache(maxsize=2)
def files(root: Path, commit: str) -> DVCFileSystem:
    """The files of a commit, git's and DVC's. A full hash, or a tag that stays: what is opened here is kept."""
    from dvc.api import DVCFileSystem  # half a second

    return DVCFileSystem(repo=repository(root, commit))


def read(root: Path, commit: str, path: str) -> bytes:
    """Raises ValueError where DVC does not have the file."""
    try:
        return files(root, commit).cat_file(path)
    except Exception as error:  # DVC raises a dozen kinds
        raise _gone(commit, path, error) from error


def get(root: Path, commit: str, path: str, folder: Path) -> None:
    """Copy a file or a folder of a commit to `folder`. Raises ValueError where DVC does not have all of it."""
    try:
        files(root, commit).get(path, str(folder), recursive=True)
    except Exception as error:
        raise _gone(commit, path, error) from error


def not_pushed(root: Path, commit: str, paths: Iterable[str]) -> list[str]:
    """Those of the outputs at a commit whose bytes are not all on DVC's default remote, each with what lacks."""
    with repository(root, commit) as repo:
        return [f"{path} ({lacks})" for path in paths if (lacks := _lacks(repo, path))]


def _lacks(repo: Repo, path: str) -> str | None:
    from dvc.exceptions import DvcException

    try:
        wanted = {one for used in repo.used_objs([path]).values() for one in used}
        status = repo.cloud.status(wanted)
    except (DvcException, OSError) as error:  # no such output, no remote, or nobody answers there
        return f"{type(error).__name__}: {error}"
    lost = status.new | status.missing
    return f"{len(lost)} of {len(wanted)} files" if lost else None


def _gone(commit: str, path: str, error: Exception) -> ValueError:
    return ValueError(
        f"DVC cannot give {path} at {commit}: {error}. Neither its cache nor its "
        "default remote has it: run `dvc push` in the clone that made it"
    )
