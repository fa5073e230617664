"""start: the weights that training begins from: none or, for a model that asks for a warm start, the champion's.

    MODEL/start.json     the champion's version, or null
    MODEL/checkpoint/    its checkpoint, where training starts from it

This is a stage of its own because a DVC stage depends on a file always or never. What `start` writes changes with a
promotion only where `warm` is true and the champion is of that model. So a promotion alone trains nothing again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.artifacts import new_folder, write_json
from components.common.champion import fetched


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """warm  model -> whether its training starts from the champion's weights, where that has the same network"""

    warm: dict[str, bool]


def run(config: StartConfig, champion: Path, output: Path) -> dict[str, Any]:
    """Write a folder for each model. Returns model -> the champion's version, or None."""
    found = fetched(champion)
    versions: dict[str, Any] = {}
    with new_folder(output) as folder:
        for model, warm in config.warm.items():
            (folder / model).mkdir()
            versions[model] = None
            if warm and found is not None and found[0]["model"] == model:
                versions[model] = found[0]["version"]
                shutil.copytree(found[1], folder / model / "checkpoint")
            write_json(folder / model / "start.json", {"champion": versions[model]})
    return versions


def summary(found: dict[str, Any]) -> dict[str, str]:
    return {model: f"warm start from {version}" if version else "cold start" for model, version in found.items()}
