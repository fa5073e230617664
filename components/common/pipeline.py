"""The pipeline's graph, as dvc.yaml tells it: stages, what they read and write, and what runs before what.

Needs PyYAML alone, so that the command line and the DAG can read it at every start.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
STOREYS = ("data", "features", "training", "release", "operations")  # in the order in which data flows


@dataclass(frozen=True)
class Stage:
    """One stage, or one item of a stage's matrix.

    name          train@qin
    item          the values of the matrix, such as {"model": "qin"}
    params        the sections of params.yaml that it reads
    deps, outs    paths, as in dvc.yaml; outs with metrics and plots
    """

    name: str
    desc: str
    item: Mapping[str, str]
    params: tuple[str, ...]
    deps: tuple[str, ...]
    outs: tuple[str, ...]

    @property
    def command(self) -> str:
        """Its name on the command line: train."""
        return self.name.partition("@")[0]

    def output(self, name: str) -> Path:
        """The output of this name, or the file of this name in the stage's one output folder."""
        for out in self.outs:
            if Path(out).name == name:
                return Path(out)
        (folder,) = (out for out in self.outs if not Path(out).suffix)
        return Path(folder, name)


@dataclass(frozen=True)
class Pipeline:
    """All stages by name, in the order of dvc.yaml."""

    stages: dict[str, Stage]

    def named(self, command: str) -> list[Stage]:
        """The items of a stage; one where it has no matrix."""
        return [stage for stage in self.stages.values() if stage.command == command]

    def commands(self) -> dict[str, str]:
        """Command -> what it does, a line a stage."""
        return {stage.command: stage.desc for stage in self.stages.values()}

    def storeys(self) -> dict[str, list[str]]:
        """Storey -> its stages, both in order. A stage lives in the file of its name, which it depends on."""
        found: dict[str, list[str]] = {}
        for storey in STOREYS:
            for name, stage in self.stages.items():
                if f"components/{storey}/{stage.command}.py" in stage.deps:
                    found.setdefault(storey, []).append(name)
        return found

    def before(self) -> dict[str, set[str]]:
        """Stage -> the stages that must end right before it: none of them is before another one of them."""
        direct = _direct(self.stages)
        every: dict[str, set[str]] = {}
        for name in TopologicalSorter(direct).static_order():
            every[name] = direct[name].union(*(every[other] for other in direct[name]))
        return {name: own - set().union(*(every[other] for other in own)) for name, own in direct.items()}


def read(root: Path = ROOT) -> Pipeline:
    """The pipeline of a project's folder. Raises ValueError where its dvc.yaml is missing or is no pipeline."""
    file = root / "dvc.yaml"
    try:
        declared = yaml.safe_load(file.read_text())["stages"]
        stages = {stage.name: stage for name, body in declared.items() for stage in _items(name, body)}
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no pipeline: {error!r}; run from the project's folder, or restore it") from None
    return Pipeline(stages)


def settings(section: str, root: Path = ROOT) -> dict[str, Any]:
    """A section of params.yaml, unchecked: for what no stage reads. Raises ValueError where it is not there."""
    file = root / "params.yaml"
    try:
        return dict(yaml.safe_load(file.read_text())[section])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{file} has no section {section}: {error!r}; restore it") from None


def _items(name: str, body: Mapping[str, Any]) -> Iterator[Stage]:
    """A stage for each value of its matrix. Only a matrix of one key is in use, and known here."""
    ((key, values),) = body.get("matrix", {"": [""]}).items()
    for value in values:

        def paths(kind: str, key: str = key, value: str = value) -> list[str]:
            listed = (next(iter(path)) if isinstance(path, dict) else path for path in body.get(kind, ()))
            return [re.sub(r"\$\{item\." + key + r"\}", value, path) for path in listed]

        yield Stage(
            name=f"{name}@{value}" if key else name,
            desc=body.get("desc", ""),
            item={key: value} if key else {},
            params=tuple(paths("params")),
            deps=tuple(paths("deps")),
            outs=(*paths("outs"), *paths("metrics"), *paths("plots")),
        )


def _direct(stages: Mapping[str, Stage]) -> dict[str, set[str]]:
    """Stage -> the stages that write what it reads."""

    def overlap(one: str, other: str) -> bool:
        return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")

    return {
        name: {
            other.name
            for other in stages.values()
            if any(overlap(dep, out) for dep in stage.deps for out in other.outs)
        }
        for name, stage in stages.items()
    }
