"""The champion that a run is judged against. champion.json names it, and `data/champion` holds its checkpoint.

A run writes champion.json into its own worktree. In a person's work tree, `registry pin` does.

champion.json          version, null where there is none; name, revision, day, model, bento, train_until;
                       checkpoint_sha256 (what ships) and judged_sha256 (what the gate judged, before its refit)
                       earlier: versions that were champion some days ago, which the gate looks back on
                       nights: what the gate measured on the nights before
data/champion/         a copy of champion.json, the judged checkpoint/, and earlier/VERSION/ likewise, as the stage
                       `champion` fetched them
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

POINTER, CHECKPOINT, EARLIER = "champion.json", "checkpoint", "earlier"


def read_pointer(pointer: Path) -> dict[str, Any] | None:
    """What champion.json says; None where it names no version.

    Raises ValueError where the file is missing or is no pointer.
    """
    try:
        content = json.loads(pointer.read_text())
        return content if content["version"] is not None else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{pointer}: {error!r}; it is in git: run `git checkout {pointer.name}`") from None


def fetched_versions(folder: Path) -> list[tuple[dict[str, Any], Path]]:
    """The champion and the versions before it, with their checkpoints' folders; none where there is no champion."""
    champion = read_pointer(folder / POINTER)
    if champion is None:
        return []
    before = [(one, folder / EARLIER / one["version"]) for one in champion.get("earlier", ())]
    return [(champion, folder / CHECKPOINT), *before]


def fetched(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The champion of an output of the stage `champion`, and its checkpoint's folder; None where there is none."""
    champion = read_pointer(folder / POINTER)
    return None if champion is None else (champion, folder / CHECKPOINT)
