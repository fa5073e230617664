"""The command line: what it explains, what it loads, how it ends."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from components import __main__ as program

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "feast", "great_expectations", "duckdb", "pandas", "sklearn", "dvc", "bentoml", "matplotlib")
OTHERS = typer.main.get_command(program.app).commands  # type: ignore[attr-defined]
COMMANDS = {**{name: program.stage_command(name) for name in program.STAGES}, **OTHERS}


@pytest.fixture(autouse=True)
def wide(monkeypatch) -> None:
    """Rich wraps to the terminal."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(program.console, "width", 300)


def words(text: str) -> str:
    """Without the boxes, styles and line ends of the terminal."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[^\x00-\x7f]", " ", text.replace("`", "")).split())


def test_help_of_the_program_names_every_command_and_loads_no_engine() -> None:
    code = f"""
import json, os, runpy, sys
def note(code):
    print("LOADED", json.dumps([name for name in {HEAVY} if name in sys.modules]), flush=True)
    real(code)
real, os._exit = os._exit, note
sys.argv = ["components", "--help"]
runpy.run_module("components", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "300"}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.split("LOADED")[1]) == []
    for name in COMMANDS:
        assert re.search(rf"\b{name}\b", done.stdout)
    assert "dvc repro" in done.stdout


def test_the_commands_are_the_stages_of_dvc_and_what_lies_outside_the_graph() -> None:
    import yaml

    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert list(program.STAGES) == list(stages)
    assert not set(stages) & set(OTHERS)


def test_the_help_groups_the_commands_by_storey(capsys) -> None:
    assert program.main(["--help"]) == 0
    said = words(capsys.readouterr().out)
    places = [said.index(f"Stages: {storey}") for storey in ("data", "features", "training", "release")]
    assert places == sorted(places)
    assert said.index("ingest", places[0]) < places[1] < said.index("embed", places[1]) < places[2]


@pytest.mark.parametrize("name", sorted(program.STAGES))
def test_help_of_a_stage_names_every_key_of_its_sections(name, capsys) -> None:
    program.main([name, "--help"])
    said = capsys.readouterr().out
    configs = program.configs_of(program.module_of(name))
    assert bool(configs) == (name != "champion")
    for config in configs.values():
        for field in dataclasses.fields(config):
            assert field.name in said.split(config.__name__, 1)[1], f"{config.__name__}.{field.name} is not explained"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_a_command_explains_each_option(name, capsys) -> None:
    assert program.main([name, "--help"]) == 0
    said = words(capsys.readouterr().out)
    command = COMMANDS[name]
    assert words(command.help.split(".")[0])[:40] in said
    for parameter in command.params:
        if parameter.name == "help":
            continue
        assert parameter.help, f"{name} {parameter.name} has no help"
        assert words(parameter.help)[:40] in said
        shown = parameter.opts[0] if parameter.opts[0].startswith("--") else parameter.metavar or parameter.name
        assert words(shown) in said


def test_each_option_that_dvc_gives_is_taken() -> None:
    """dvc.yaml's commands parse: no stage is called with an option that it does not have, or without one it needs."""
    import shlex

    import yaml

    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items():
        given = shlex.split(stage["cmd"].replace("${item.model}", "qin"))
        assert given[:4] == ["python", "-m", "components", name]
        context = COMMANDS[name].make_context(name, given[4:])  # raises on what does not parse
        assert context.params["params"] == Path("params.yaml")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["shine"], "No such command 'shine'"),
        (["gate", "--colour", "red"], "No such option: --colour"),
        (["gate"], "Missing option"),
        (["train"], "Missing argument 'model'"),
    ],
)
def test_a_wrong_call_ends_with_code_2(arguments, says, capsys) -> None:
    assert program.main(arguments) == 2
    assert says in words(capsys.readouterr().err)


def gate(root: Path, params: Path = ROOT / "params.yaml") -> list[str]:
    return [
        "gate", "--evaluations", str(root / "e"), "--checkpoints", str(root), "--dataset", str(root / "nowhere"),
        "--champion", str(root / "champion"), "--output", str(root / "out.json"), "--params", str(params),
    ]  # fmt: skip


def test_a_mistake_ends_with_code_1_and_a_message_without_a_traceback(tmp_path, capsys) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "components", *gate(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "300"},
    )  # fmt: skip
    assert done.returncode == 1
    assert f"gate: {tmp_path}/nowhere/dataset.json is not there; run dvc repro dataset" in words(done.stderr)
    assert re.search(r"\(raised at \S+artifacts\.py:\d+\)", done.stderr)
    assert "Traceback" not in done.stderr


def test_a_bad_params_file_is_told_key_by_key(tmp_path, capsys) -> None:
    import yaml

    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["gate"] |= {"min_auk": 0.5, "min_test_rows": "many"}
    del params["gate"]["max_gain"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    assert program.main(gate(tmp_path, tmp_path / "params.yaml")) == 1
    said = words(capsys.readouterr().err)
    assert "gate.min_auk: unknown key; known are alpha, calibration_slope" in said
    assert "gate.max_gain: missing" in said
    assert "gate.min_test_rows is 'many'" in said


@pytest.mark.parametrize(
    ("model", "says"),
    [("deepfm", "no section 'train.deepfm': 'deepfm' is not among ['qin', 'sdcnv3']")],
)
def test_an_unknown_model_is_told(tmp_path, model, says, capsys) -> None:
    arguments = ["--dataset", "d", "--weights", "s", "--output", "o", "--metrics", "m", "--history", "h"]
    assert program.main(["train", model, *arguments, "--params", str(ROOT / "params.yaml")]) == 1
    said = words(capsys.readouterr().err)
    assert f"train@{model}: " in said
    assert says in said


def test_square_brackets_of_a_message_are_shown(tmp_path, capsys) -> None:
    """Rich would take [/x] for a style and fail."""
    shutil.copy(ROOT / "params.yaml", tmp_path / "[red]params.yaml")
    root = tmp_path / "[/x]"
    assert program.main(gate(root, tmp_path / "[red]params.yaml")) == 1
    assert f"{root}/nowhere/dataset.json is not there" in words(capsys.readouterr().err)


def test_a_stage_notes_its_cost_and_its_error(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    note = tmp_path / ".scratch/stages/smoke.json"
    (tmp_path / "package.json").write_text("{")
    files = {"package": ".", "features": "f", "repo": "r", "output": "smoke.json", "params": str(ROOT / "params.yaml")}
    call = ["smoke", *(word for name, path in files.items() for word in (f"--{name}", path))]
    assert program.main(call) == 1
    assert "package.json is not whole" in json.loads(note.read_text())["error"]
    (tmp_path / "package.json").write_text('{"built": false, "reason": ["auc"]}')
    assert program.main(call) == 0
    cost = json.loads(note.read_text())
    assert cost["seconds"] >= 0 and cost["peak_mib"] > 10 and "error" not in cost
    assert re.search(r"smoke: \d+\.\d s, [\d,]+ MiB at most", words(capsys.readouterr().err))


def test_an_error_of_the_program_itself_keeps_its_traceback(tmp_path, monkeypatch) -> None:
    from components.release import gate as step

    def broken(*_: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(step, "read_json", broken)
    with pytest.raises(KeyError, match="ours"):
        program.main(gate(tmp_path))
