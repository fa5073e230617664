"""The registry of versions: promote one, or roll back to one. Outside of the graph, because it changes the world.

Git tags are the registry (GTO): `ctr-ranker@v1.2.0` is a version, and `ctr-ranker#champion#3` makes one the champion.
The commit they stand on names, through dvc.lock, every byte that was trained on and shipped. champion.json is the
pointer in the work tree: the stage `champion` depends on it.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.common.artifacts import read_json, write_json
from components.common.champion import read_pointer
from components.training.champion import fetch

STAGE = "champion"
FACTS = {"model", "checkpoint_sha256", "bento"}  # what a version's tag says of it


def promote(package: Path, smoke: Path, pointer: Path) -> str:
    """Register the packaged model as the next version and make it the champion. Returns what was done.

    One Bento is one version: where it has been promoted before, that version becomes the champion again, and nothing
    is done where it is.

    Raises ValueError where nothing was built, the smoke test did not pass on it, or the run is not committed.
    """
    from gto.api import register
    from gto.exceptions import VersionExistsForCommit

    built, tested = read_json(package / "package.json", "package"), read_json(smoke, "smoke")
    if not built["built"]:
        raise ValueError(f"{package}: the gate rejected, nothing was built: {'; '.join(built['reason'])}")
    if not tested.get("passed") or tested.get("tag") != built["tag"]:
        raise ValueError(f"{smoke}: {built['tag']} has not passed the smoke test; run `dvc repro smoke`")
    if _git(
        "status",
        "--porcelain",
        "--",
        "dvc.lock",
        "params.yaml",
        "dvc.yaml",
        "components",
        "models",
        "bento",
        "feature_repo",
    ):
        raise ValueError(
            "promote: the run is not committed, so no tag could lead back to it; "
            "run `git add dvc.lock params.yaml && git commit`, and `dvc push`, first"
        )
    name = built["tag"].partition(":")[0]
    facts = {"model": built["model"], "checkpoint_sha256": built["checkpoint_sha256"], "bento": built["tag"]}
    with tempfile.TemporaryDirectory(prefix="clickloop-promote-") as scratch:
        # the commit leads to the bytes that were built, and not to those of another run
        fetch({"version": "to be", "revision": "HEAD", **facts}, Path(scratch) / built["model"])
    version = next((version for version, known in _versions(name).items() if known == facts), None)
    if version is None:
        try:
            version = register(repo=".", name=name, ref="HEAD", message=json.dumps(facts)).version
        except VersionExistsForCommit as error:
            raise ValueError(f"promote: {error}, of another Bento; commit the run that built {built['tag']}") from None
    return _point(pointer, name, version, facts)


def rollback(version: str, pointer: Path) -> str:
    """Make an earlier version the champion again. Raises ValueError where there is no such version."""
    champion = read_pointer(pointer)
    if champion is None:
        raise ValueError(f"{pointer}: there is no champion yet; `python -m components promote` makes the first")
    name = champion["name"]
    versions = _versions(name)
    if version not in versions:
        raise ValueError(f"rollback: no version {version!r} of {name}; there are {', '.join(versions)}")
    return _point(pointer, name, version, versions[version])


def _versions(name: str) -> dict[str, dict[str, Any]]:
    """Version -> model, checkpoint_sha256 and bento, as `promote` wrote them into its tag. Tags of others are none."""
    found: dict[str, dict[str, Any]] = {}
    for line in _git("tag", "--list", "--format=%(refname:strip=2) %(contents:subject)", f"{name}@*").splitlines():
        tag, _, subject = line.partition(" ")
        version = tag.removeprefix(f"{name}@")
        if not re.fullmatch(r"v\d+\.\d+\.\d+", version):  # `gto deprecate` writes v1.2.0!
            continue
        with suppress(ValueError):
            facts = json.loads(subject)
            if isinstance(facts, dict) and facts.keys() == FACTS:
                found[version] = facts
    return found


def _point(pointer: Path, name: str, version: str, facts: dict[str, Any]) -> str:
    """The stage tag, and then champion.json, which can be written again from the tags. Returns what was done."""
    from gto.api import assign

    champion = {"name": name, "version": version, "revision": f"{name}@{version}", **facts}
    if read_pointer(pointer) == champion:
        return f"{name} {version} ({facts['bento']}) is the champion already; nothing was done"
    assign(repo=".", name=name, version=version, stage=STAGE, force=True)  # also where it was the champion before
    write_json(pointer, champion)
    return f"{name} {version} ({facts['bento']}) is the champion; commit {pointer} and `git push --tags`"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()
