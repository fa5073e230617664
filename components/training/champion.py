"""champion: the champion's checkpoint, out of DVC, for all stages that compare with it or start from it.

It is the checkpoint that the gate judged, and not its refit: the refit has seen the days on which it would be compared.
It is fetched here once. So training and evaluation read files alone, and run on a machine without git and DVC.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from components.common import stored
from components.common.artifacts import new_folder
from components.common.champion import CHECKPOINT, EARLIER, POINTER, read_pointer
from models.checkpoint import checkpoint_hash


def run(pointer: Path, output: Path) -> dict[str, Any]:
    """Write a copy of champion.json, and the checkpoint's folder. Raises ValueError as `fetch` does."""
    champion = read_pointer(pointer)
    with new_folder(output) as folder:
        shutil.copyfile(pointer, folder / POINTER)
        if champion is not None:
            fetch(champion, folder / CHECKPOINT)
            for version in champion.get("earlier", ()):
                fetch(version, folder / EARLIER / version["version"])
    return champion or {}


def summary(found: dict[str, Any]) -> dict[str, str]:
    return {"champion": f"{found['version']}, {found['model']}" if found else "none yet"}


def fetch(champion: dict[str, Any], folder: Path) -> None:
    """The judged checkpoint of a version, out of DVC's cache or remote.

    Raises ValueError where DVC does not have it, or has other bytes than the version names.
    """
    version, revision, model = champion["version"], champion["revision"], champion["model"]
    try:
        stored.get(Path.cwd(), revision, f"checkpoints/{model}", folder)
    except ValueError as error:
        raise ValueError(f"champion {version}: {error}") from error
    if (found := checkpoint_hash(folder)) != champion["judged_sha256"]:
        raise ValueError(
            f"champion {version}: DVC holds checkpoint {found} at {revision}, but the champion's is "
            f"{champion['judged_sha256']}; run `git checkout champion.json`, or `dvc repro` and commit"
        )
