"""A model folder and this code -> a Bento as a folder that `bentoml serve` takes. Needs no network and no Docker.

    python -m bento.build '{"name": …, "version": …, "model": …, "output": …, "packages": […], "labels": {…},
                            "metadata": {…}, "description": …}'

Run it in a folder that holds only bento/ and models/, with its own BENTOML_HOME: BentoML chooses its home, its model
store and the imported service once in a process.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import version
from typing import Any

from bento import MODEL

# What bento/ and models/ import. feature_store.yaml names DuckDB, which Feast checks when it opens a store.
REQUIREMENTS = ("bentoml", "feast[duckdb,redis]", "numpy", "pydantic", "safetensors", "starlette", "torch")


def build(
    *,
    name: str,
    version: str,
    model: str,
    output: str,
    packages: list[str],
    labels: dict[str, str],
    metadata: dict[str, Any],
    description: str,
) -> None:
    """model: the model folder; output: the folder to make; packages: what the Bento installs, as NAME==VERSION; labels
    and metadata go to the Bento and to the model; description: its README, in Markdown."""
    import bentoml  # makes its home on import: whoever reads `requirements` must not have one made

    added = [line for line in packages if not line.startswith("bentoml==")]  # BentoML adds itself
    with bentoml.models.create(f"{MODEL}:{version}", labels=labels, metadata=metadata) as stored:
        shutil.copytree(model, stored.path, dirs_exist_ok=True)
    bentoml.bentos.build(
        "bento.service:CtrRanker",
        name=name,
        version=version,
        labels=labels,
        description=description,
        include=["bento/**/*.py", "models/**/*.py"],
        python={"packages": added, "lock_packages": False},
    )
    bentoml.bentos.export_bento(f"{name}:{version}", output, output_format="folder")


def requirements() -> list[str]:
    """REQUIREMENTS with the installed versions, without a build's local part: torch==2.13.0, not torch==2.13.0+cpu."""
    return [f"{name}=={version(name.split('[')[0]).split('+')[0]}" for name in REQUIREMENTS]


if __name__ == "__main__":
    build(**json.loads(sys.argv[1]))
