"""Who may import what, and dvc.yaml and params.yaml beside the code that they name.

Storeys and circles are held by import-linter: see `[tool.importlinter]` in pyproject.toml.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import grimp
import pytest
import yaml

from components.__main__ import configs_of, module_of, storey
from components.common.config import load
from components.common.pipeline import read
from components.common.schedule import ScheduleConfig
from components.features.publish import PublishConfig
from components.operations.day import RunConfig
from models.families import FAMILIES, network_config

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = read()
COMMANDS = sorted(PIPELINE.commands())
STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
PACKAGES = ("components", "models", "bento")

# What each folder may import beside the standard library. `components` may import all but these folders' own users.
ALLOWED = {
    "dags": {"airflow", "components", "clickloop_steps"},
    "models": {"models", "torch", "triton", "safetensors"},
    "bento": {"bento", "models", "bentoml", "pydantic", "starlette", "torch", "safetensors", "feast", "numpy"},
    "feature_repo": {"feast", "ibis", "pandas", "pyarrow"},
}


@cache
def graph(*packages: str) -> grimp.ImportGraph:
    return grimp.build_graph(
        *packages, exclude_type_checking_imports=True, include_external_packages=True, cache_dir=None
    )


def imported_by(folder: str) -> set[str]:
    """Top-level packages that a folder's files import. dags and feature_repo are folders of scripts, not packages."""
    if folder in PACKAGES:
        found = graph(*PACKAGES)
        names = {
            name for module in found.modules if module.partition(".")[0] == folder
            for name in found.find_modules_directly_imported_by(module)
        }  # fmt: skip
    else:
        code = "\n".join(file.read_text() for file in (ROOT / folder).glob("*.py"))
        names = set(re.findall(r"^\s*(?:from|import) ([\w.]+)", code, re.MULTILINE))
    return {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names}


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_what_it_may(folder) -> None:
    assert imported_by(folder) <= ALLOWED[folder]


def test_the_steps_import_neither_dags_nor_tests_nor_the_feast_repo() -> None:
    assert not imported_by("components") & {"dags", "feature_repo", "tests", "airflow"}


def test_the_dags_read_the_graph_and_the_cores_and_nothing_else_of_the_steps() -> None:
    code = "\n".join(file.read_text() for file in (ROOT / "dags").glob("*.py"))
    assert re.findall(r"^from (components\S*) import (.*?)(?:  #.*)?$", code, re.MULTILINE) == [
        ("components.common", "pipeline, schedule, threads")
    ]
    for module in ("pipeline", "schedule", "threads"):
        assert graph(*PACKAGES).find_modules_directly_imported_by(f"components.common.{module}") <= {
            *sys.stdlib_module_names, "yaml", "components.common.pipeline"
        }  # fmt: skip


BLOCKED = {
    "pandas", "sklearn", "scipy", "duckdb", "feast", "great_expectations", "bentoml", "dvc", "pydantic", "typer",
    "rich", "yaml", "matplotlib", "jinja2", "httpx", "airflow",
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "needed"),
    [
        ("components.training.train", {"components", "pyarrow"}),
        ("models.checkpoint", set()),
        ("models.families", set()),
    ],
)
def test_training_needs_few_packages(module, needed) -> None:
    """A GPU machine has torch, numpy, pyarrow, safetensors and tqdm. The rest is refused here as if it were absent."""
    code = f"""
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED | ({"components", "pyarrow"} - needed)}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
import {module}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- dvc.yaml ---------------------------------------------------------------------------------------------------


@cache
def code_of(stage: str) -> frozenset[str]:
    """The files that a stage's module is made of: its own, and those of all that it imports, however far."""
    found = graph(*PACKAGES)
    step = f"components.{storey(stage)}.{stage}"
    modules = {step, *(m for m in found.find_upstream_modules(step) if m.partition(".")[0] in PACKAGES)}
    paths = (Path(*module.split(".")) for module in modules)
    return frozenset(str(path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")) for path in paths)


def covers(deps: list[str], file: str) -> bool:
    return any(file == dep or file.startswith(f"{dep}/") for dep in deps)


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_stage_depends_on_the_code_that_it_runs(stage) -> None:
    deps = STAGES[stage]["deps"]
    # A package's own file holds its docstring alone, or is covered with the package
    missing = {file for file in code_of(stage) if not covers(deps, file)} - {f"{p}/__init__.py" for p in PACKAGES}
    assert not missing, f"dvc.yaml, {stage}: deps lack {sorted(missing)}"
    assert covers(deps, "components/common/config.py") == bool(configs_of(module_of(stage)))  # reads its sections


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_stage_depends_on_no_code_that_it_does_not_run(stage) -> None:
    """A dep too many runs a stage, and all after it, for nothing."""
    known = {*code_of(stage), "components/common/config.py"}
    assert not [
        dep for dep in STAGES[stage]["deps"] if re.match(r"(components|models)/.*\.py$", dep) and dep not in known
    ]


def test_an_edit_of_the_join_or_of_the_gate_trains_nothing_again() -> None:
    for stage in ("train", "champion", "start"):
        assert not [file for file in code_of(stage) if re.search(r"/(data|features|release|operations)/", file)]


def test_what_is_copied_into_the_bento_is_declared() -> None:
    assert {"bento", "models"} <= set(STAGES["package"]["deps"])


@pytest.mark.parametrize("stage", COMMANDS)
def test_every_path_of_a_command_is_declared_and_every_output_named(stage) -> None:
    """A file that a command reads is a dep. A file that it writes is an output, or lies in its output folder."""
    for one in PIPELINE.named(stage):
        command = STAGES[stage]["cmd"]
        for key, value in one.item.items():
            command = command.replace(f"${{item.{key}}}", value)
        options = dict(re.findall(r"--(\S+) (\S+)", command))
        for option, path in options.items():
            there = one.outs if option in ("output", "docs", "metrics", "history", "shipped") else one.deps
            inside = [p for p in there if p == path or p.startswith(f"{path}/") or path.startswith(f"{p}/")]
            assert inside, f"dvc.yaml, {stage}: --{option} {path} is in none of {there}"
        assert all(any(p == path or p.startswith(f"{path}/") for path in options.values()) for p in one.outs)


def test_the_families_are_the_matrix() -> None:
    for stage in ("train", "evaluate"):
        assert set(STAGES[stage]["matrix"]["model"]) == set(FAMILIES)
    assert set(PARAMS["train"]) == set(FAMILIES)
    for stage in ("gate", "refit"):
        assert {f"checkpoints/{name}" for name in FAMILIES} <= set(STAGES[stage]["deps"])


def test_outputs_are_all_in_dvcs_cache() -> None:
    """git ignores data/, checkpoints/ and artifacts/: what the cache did not hold, a clone could not get."""
    ignored = (ROOT / ".gitignore").read_text().split()
    for declared in STAGES.values():
        for kind in ("outs", "metrics", "plots"):
            for out in declared.get(kind, ()):
                ((path, settings),) = out.items() if isinstance(out, dict) else [(out, {})]
                assert settings.get("cache", True), f"{path}: cache: false"
                assert f"/{path.split('/')[0]}/" in ignored


# ---- params.yaml ------------------------------------------------------------------------------------------------


def sections() -> dict[str, type[Any]]:
    """Section of params.yaml -> its config, for all stages, and for the commands that read one of their own."""
    found: dict[str, type[Any]] = {"publish": PublishConfig, "run": RunConfig, "schedule": ScheduleConfig}
    for stage in COMMANDS:
        for name, config in configs_of(module_of(stage)).items():
            if stage == "train":
                found |= {f"train.{family}": config for family in FAMILIES}
            else:
                found[stage if name == "config" else name] = config
    return found


def require_same_keys(where: str, section: dict[str, Any], config: type[Any]) -> None:
    assert list(section) == [field.name for field in fields(config)], where
    for key, kind in get_type_hints(config).items():
        if isinstance(kind, type) and is_dataclass(kind):
            require_same_keys(f"{where}.{key}", section[key], kind)


def test_the_sections_are_those_that_are_read() -> None:
    assert {name.partition(".")[0] for name in sections()} == set(PARAMS)


@pytest.mark.parametrize(("name", "config"), sections().items(), ids=sections())
def test_a_section_fits_its_config_and_has_its_keys_in_their_order(name, config) -> None:
    section = PARAMS
    for part in name.split("."):
        section = section[part]
    require_same_keys(name, section, config)
    loaded = load(ROOT / "params.yaml", name, config)
    if family := name.partition("train.")[2]:
        network_config(family, loaded.network)
        assert set(loaded.network) == {field.name for field in fields(FAMILIES[family].config)}


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_stage_declares_the_sections_that_it_reads(stage) -> None:
    own = "train.${item.model}" if stage == "train" else stage
    read_by = {own if name == "config" else name for name in configs_of(module_of(stage))}
    assert set(STAGES[stage].get("params", ())) == read_by
