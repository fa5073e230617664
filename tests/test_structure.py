"""What may import what, and dvc.yaml and params.yaml beside the code they speak of."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from models.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("components", "models", "bento", "dags", "feature_repo")
CODE = sorted(file.relative_to(ROOT) for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())

ALLOWED = {
    "dags": {"airflow"},
    "models": {"models", "torch", "triton", "safetensors"},
    "bento": {"bento", "models", "bentoml", "pydantic", "starlette", "torch", "safetensors", "feast", "numpy"},
    "feature_repo": {"feast", "ibis", "pandas", "pyarrow"},
}


def imported(file: Path, *, inside_functions: bool = True) -> Iterator[str]:
    """The modules that a file imports when it runs, as dotted names; `from a import b` gives a and a.b."""
    pending: list[ast.AST] = [ast.parse((ROOT / file).read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef) and not inside_functions:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


def top(names: Iterator[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names}


@pytest.mark.parametrize("file", CODE, ids=str)
def test_imports_go_one_way(file) -> None:
    found = top(imported(file))
    if (package := file.parts[0]) in ALLOWED:
        assert found <= ALLOWED[package]
    else:
        assert not found & {"dags", "feature_repo", "tests", "airflow"}


BLOCKED = {
    "pandas", "sklearn", "scipy", "duckdb", "feast", "great_expectations", "bentoml", "dvc", "pydantic", "typer",
    "rich", "yaml", "matplotlib", "jinja2", "httpx", "airflow",
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "needed"), [("components.training.train", {"components", "pyarrow"}), ("models.checkpoint", set())]
)
def test_training_needs_few_packages(module, needed) -> None:
    """A GPU machine has torch, numpy, pyarrow, safetensors and tqdm; the rest is refused here as if it were absent."""
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

# What a module takes from another does not reach what these stages write, and its edits should not run them again.
NOT_REACHED = {
    ("components/data/validate.py", "components/data/ingest.py"): "parse_time alone, and in validate alone",
    ("components/data/ingest.py", "components/data/pictures.py"): "the copy of pictures, which validate does not make",
    ("components/features/features.py", "components/data/validate.py"): "require, which the features stage calls first",
    (
        "components/features/dataset.py",
        "components/common/contracts.py",
    ): "names, for the join; a dataset is opened without them",
    ("components/features/dataset.py", "components/common/splits.py"): "for the join; a dataset is opened without them",
    # the families: encoders and hashes need none; who builds one declares all of models/
    ("models/families.py", "models/layers.py"): "Ranker",
    ("models/families.py", "models/qin.py"): "a family",
    ("models/families.py", "models/sdcnv3.py"): "a family",
}
BUILD_MODELS = {"train", "evaluate", "package"}


@cache
def local(file: str, *, inside_functions: bool) -> frozenset[str]:
    """The project's files behind a file's imports."""
    found = set()
    for name in imported(Path(file), inside_functions=inside_functions):
        path = name.replace(".", "/")
        found |= {f for f in (f"{path}.py", f"{path}/__init__.py") if Path(f) in CODE}
    return frozenset(found)


def reached(stage: str) -> dict[str, str]:
    """File -> who imports it, for all that a stage's code is made of: the step's every import, and what those load."""
    step = f"components/{stage}.py"
    found, pending = {step: "its own"}, [step]
    while pending:
        file = pending.pop()
        for other in sorted(local(file, inside_functions=file == step)):
            if other in found or (file != step and (file, other) in NOT_REACHED):
                continue
            if len(ast.parse((ROOT / other).read_text()).body) > 1:  # more than a docstring
                found[other] = file
                pending.append(other)
    return found


def covers(deps: list[str], file: str) -> bool:
    return any(file == dep or file.startswith(f"{dep}/") for dep in deps)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_that_it_runs(stage) -> None:
    deps = STAGES[stage]["deps"]
    missing = {file: importer for file, importer in reached(stage).items() if not covers(deps, file)}
    assert not missing, f"dvc.yaml, {stage}: deps lack {missing}"
    assert covers(deps, "components/common/config.py")  # the command line reads its section with it


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_no_code_that_it_does_not_run(stage) -> None:
    """A dep too many runs a stage, and all after it, for nothing."""
    known = {*reached(stage), "components/common/config.py"}
    idle = [dep for dep in STAGES[stage]["deps"] if dep.endswith(".py") and dep.startswith("components") and
            dep not in known]  # fmt: skip
    assert not idle


def test_who_builds_models_depends_on_all_of_them() -> None:
    builders = {stage for stage in STAGES if "components/features/dataset.py" in reached(stage) and stage != "dataset"}
    assert builders == BUILD_MODELS
    for stage in BUILD_MODELS:
        assert "models" in STAGES[stage]["deps"]
    assert "bento" in STAGES["package"]["deps"]  # copied, not only imported


def test_the_table_of_what_is_not_reached_has_no_dead_line() -> None:
    for importer, file in NOT_REACHED:
        assert file in local(importer, inside_functions=True), f"{importer} imports {file} no longer"


@pytest.mark.parametrize("stage", STAGES)
def test_every_path_of_a_command_is_declared_and_every_output_named(stage) -> None:
    """A file that a command reads is a dep; a file that it writes is an output, or inside the folder that it writes."""
    declared = STAGES[stage]
    written = [next(iter(out)) if isinstance(out, dict) else out for kind in ("outs", "metrics", "plots")
               for out in declared.get(kind, ())]  # fmt: skip
    options = dict(re.findall(r"--(\S+) (\S+)", declared["cmd"]))
    for option, path in options.items():
        writes = option in ("output", "docs", "metrics", "history")
        there = [*written] if writes else declared["deps"]
        inside = [p for p in there if p == path or p.startswith(f"{path}/") or path.startswith(f"{p}/")]
        assert inside, f"dvc.yaml, {stage}: --{option} {path} is in none of {there}"
    assert all(any(p == path or p.startswith(f"{path}/") for path in options.values()) for p in written)


def test_the_families_are_the_matrix() -> None:
    for stage in ("train", "evaluate"):
        assert set(STAGES[stage]["matrix"]["model"]) == set(FAMILIES)
    assert set(PARAMS["train"]) == set(FAMILIES)
    for stage in ("gate", "package"):
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


def config_of(name: str) -> type[Any]:
    step = {"split": "splits"}.get(name, name)
    return getattr(import_module(f"components.{step}"), f"{name.capitalize()}Config")


def require_same_keys(where: str, section: dict[str, Any], config: type[Any]) -> None:
    assert list(section) == [field.name for field in fields(config)], where
    for key, kind in get_type_hints(config).items():
        if isinstance(kind, type) and is_dataclass(kind):
            require_same_keys(f"{where}.{key}", section[key], kind)


@pytest.mark.parametrize("name", [name for name in PARAMS if name != "train"])
def test_a_section_has_the_keys_of_its_config_in_their_order(name) -> None:
    require_same_keys(name, PARAMS[name], config_of(name))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_has_the_keys_of_its_config(family) -> None:
    require_same_keys(f"train.{family}", PARAMS["train"][family], config_of("train"))
    network = PARAMS["train"][family]["network"]
    assert set(network) == {field.name for field in fields(FAMILIES[family].config)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_the_sections_that_it_reads(stage) -> None:
    """Those that its command in components/__main__.py loads."""
    tree = ast.parse((ROOT / "components/__main__.py").read_text())
    command = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == stage)
    loaded = set(re.findall(r"load\(params, f?['\"]([\w.{}]+)['\"]", ast.unparse(command)))
    declared = {name.replace("${item.model}", "{model}") for name in STAGES[stage]["params"]}
    assert loaded == declared
    assert loaded


# ---- what no file may hold --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", CODE, ids=str)
def test_nothing_unsafe(file) -> None:
    modules = {name.partition(".")[0] for name in imported(file)}
    bad = {"torch.load", "os.system", "eval", "exec", "shell=True"}
    if "yaml" in modules:  # PyYAML; ruamel's YAML().load makes nothing but data
        bad |= {"yaml.load", "yaml.unsafe_load"}
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        words = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name | ast.keyword) else ""
        assert words not in bad, f"{file}: {words}"
    assert not modules & {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
