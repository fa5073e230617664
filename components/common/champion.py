"""The champion is the version that serves now. champion.json points at it, and `data/champion` holds its checkpoint.

champion.json          name, version, revision, model, checkpoint_sha256, bento; version is null where there is none
data/champion/         a copy of champion.json, and the version's checkpoint/, as the stage `champion` fetched it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

POINTER, CHECKPOINT = "champion.json", "checkpoint"


def read_pointer(pointer: Path) -> dict[str, Any] | None:
    """What champion.json says; None before the first promotion.

    Raises ValueError where the file is missing or is no pointer.
    """
    try:
        content = json.loads(pointer.read_text())
        return content if content["version"] is not None else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{pointer}: {error!r}; it is in git: run `git checkout {pointer.name}`") from None


def fetched(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The champion of an output of the stage `champion`, and its checkpoint's folder; None where there is none."""
    champion = read_pointer(folder / POINTER)
    return None if champion is None else (champion, folder / CHECKPOINT)
