"""start: the weights that training begins from: none, or the champion's, for a model that asks for a warm start.

    MODEL/start.json     the champion's version, or null
    MODEL/checkpoint/    its checkpoint, where there is one to start from

A stage of its own, because a DVC stage depends on a file or does not: what it writes changes with a promotion only
where `warm` is true and the champion is of that family, so that a promotion trains nothing else again. And `train`
reads files alone, on a machine without DVC and git.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.artifacts import new_folder, write_json
from components.release import registry


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """warm  model -> whether its training goes on from the champion's weights, where that has the same network"""

    warm: dict[str, bool]


def run(config: StartConfig, champion: Path, output: Path) -> dict[str, Any]:
    """Write a folder a model. Returns model -> the champion's version or None.

    Raises ValueError where champion.json is no pointer, or DVC does not have the champion's checkpoint.
    """
    current = registry.current(champion) if any(config.warm.values()) else None
    versions: dict[str, Any] = {}
    with new_folder(output) as folder:
        for model, warm in config.warm.items():
            ours = current if warm and current is not None and current["model"] == model else None
            (folder / model).mkdir()
            if ours is not None:
                with registry.checkpoint(ours) as files:
                    shutil.copytree(files, folder / model / "checkpoint")
            versions[model] = None if ours is None else ours["version"]
            write_json(folder / model / "start.json", {"champion": versions[model]})
    return versions
