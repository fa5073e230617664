"""report: what the last run found, as tables in the terminal and as one HTML page with plots.

It is no stage: it reads what the stages have written so far and changes none of it. So a run that was stopped has a
page too. The page says where it stopped, and leaves out what is of an earlier run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.text import Text

from components.common import pipeline
from components.common.artifacts import new_file, write_json
from components.operations.pages import run as page
from components.operations.pages import tables
from components.operations.pages.index import FIGURES

# What says that a stage has ended, where it is not enough that its outputs are there.
ENDED = {"features": "receipt.json"}


def write(root: Path, output: Path, day: str | None = None) -> dict[str, Any]:
    """Write the page of the project, or of a run's worktree, whatever has run so far. Returns the figures.

    day  of a run: its page names the tag and links to the index, whose figures lie beside it in DAY.figures.json
    """
    found = collect(root)
    output.parent.mkdir(parents=True, exist_ok=True)
    if day is not None:
        write_json(output.with_suffix(FIGURES), figures(found))
    with new_file(output) as scratch:
        scratch.write_text(page.page(found, day), encoding="utf-8")
    return found


def run(root: Path, output: Path, day: str | None = None) -> None:
    """Print the tables and write the page, whatever has run so far."""
    found = write(root, output, day)
    console = Console(highlight=False)
    for make in (tables.rules_table, tables.models_table, tables.data_table, tables.stages_table):
        if (table := make(found)).rows:
            console.print(tables.rich(table))
    if found["stopped"]:
        name, reason = found["stopped"]
        console.print(f"[bold red]stopped at {name}:[/] ", Text(reason), sep="", soft_wrap=True)
    decision = found["decision"]
    if decision:
        colour = "green" if decision["verdict"] == "approve" else "red"
        console.print(f"[bold {colour}]gate: {decision['verdict']}[/] {decision['model'] or ''}")
        for reason in decision["reasons"]:
            console.print(f"  {reason}", markup=False)
    if found["package"].get("built"):
        console.print(f"Bento: {found['package']['tag']}   serve it: make serve", markup=False)
    if not found["ended"]:
        console.print("No stage has a result yet; run `dvc repro`")
    console.print(f"report: {output.resolve()}", markup=False, soft_wrap=True)


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """What the index says of a run; None for what there is not."""
    model, source = page.tried_first(found), found["source"]
    metrics = found["evaluate"].get(model)
    champion = metrics["references"][0] if metrics and metrics["references"] else None

    def auc(test: dict[str, Any]) -> list[float]:
        return [test["auc"], *test["intervals"]["auc"]]

    return {
        "stopped": found["stopped"] and found["stopped"][0],
        "verdict": found["decision"].get("verdict"),
        "kind": found["decision"].get("candidates", {}).get(model, {}).get("kind"),
        "model": model,
        "auc": metrics and auc(metrics["test"]),
        "calibration_error": metrics and metrics["test"]["calibration_error"],
        "champion": champion and {"version": champion["version"], "auc": auc(champion["test"])},
        "rows": source.get("impressions"),
        "last_day": source.get("last_day"),
        "seconds": sum(cost.get("seconds", 0) for name, cost in found["stages"].items() if name in found["ended"]),
    }


# ---- what is there ----------------------------------------------------------------------------------------------


def collect(root: Path) -> dict[str, Any]:
    """Every figure that is there; an empty mapping or frame for what is not, or is of an earlier run."""
    graph = pipeline.read(root if (root / "dvc.yaml").is_file() else pipeline.ROOT)
    stages = {name: _json(root / f".scratch/stages/{name}.json") for name in graph.stages}
    ended = {name for name, stage in graph.stages.items() if _has_ended(root, stage)}
    validation = _json(root / graph.stages["validate"].output("report.json"))
    stopped = _stopped(graph, stages, ended, validation)
    earlier = _after(graph, stopped[0]) if stopped else set()
    now = ended - earlier - ({stopped[0]} if stopped else set())

    def of(stage: str, name: str) -> Any:
        return {} if stage in earlier else _json(root / graph.stages[stage].output(name))

    def each(command: str, name: str, read: Any, empty: Any) -> dict[str, Any]:
        """Model -> a file of its stage; `name` may hold the model's."""
        files = [(stage, root / stage.output(name.format(**stage.item))) for stage in graph.named(command)]
        return {
            stage.item["model"]: read(file) if file.is_file() and stage.name not in earlier else empty
            for stage, file in files
        }

    dataset = of("dataset", "dataset.json")
    evaluate = each("evaluate", "evaluation.json", _json, {})
    evaluate = {model: metrics for model, metrics in evaluate.items() if metrics and _same_data(metrics, dataset)}
    checkpoints = each("train", "config.json", _json, {})
    trained = [model for model, config in checkpoints.items() if _same_data(config.get("facts", {}), dataset)]
    train = each("train", "{model}.json", _json, {})
    history = each("train", "{model}_history.csv", pd.read_csv, pd.DataFrame())
    decision, package = of("gate", "decision.json"), of("package", "package.json")
    refit = of("refit", "decision.json")
    smoke = of("smoke", "smoke.json")
    if not _same_data(decision, dataset):
        decision = {}
    if package.get("judged_sha256") != decision.get("checkpoint_sha256"):
        package = smoke = {}  # what this gate decided on was not built
    return {
        "source": of("ingest", "source.json"),
        "validation": {} if "validate" in earlier else validation,
        "dataset": dataset,
        "evaluate": evaluate,
        "train": {model: train[model] for model in trained if train[model]},
        "history": {model: history[model] for model in trained if len(history[model])},
        "calibration": _of(evaluate, each("evaluate", "calibration.csv", pd.read_csv, None)),
        "decision": decision,
        "shipped": refit.get("shipped") or {} if _same_decision(refit, decision) else {},
        "package": package,
        "smoke": smoke,
        "stages": stages,
        "stopped": stopped,
        "ended": now,
    }


def _json(file: Path) -> Any:
    return json.loads(file.read_text()) if file.is_file() else {}


def _of(models: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
    return {model: files[model] for model in models if files[model] is not None}


def _same_data(facts: dict[str, Any], dataset: dict[str, Any]) -> bool:
    """Whether it is of the training set that is there, as far as both say which that is."""
    ours, theirs = dataset.get("data_sha256"), facts.get("data_sha256")
    return ours is None or theirs is None or ours == theirs


def _same_decision(refit: dict[str, Any], decision: dict[str, Any]) -> bool:
    return bool(decision) and refit.get("checkpoint_sha256") == decision.get("checkpoint_sha256")


def _has_ended(root: Path, stage: pipeline.Stage) -> bool:
    paths = [Path(out) for out in stage.outs]
    if stage.name in ENDED:
        paths.append(stage.output(ENDED[stage.name]))
    return all((root / path).exists() for path in paths)


def _stopped(
    graph: pipeline.Pipeline, stages: dict[str, Any], ended: set[str], validation: dict[str, Any]
) -> tuple[str, str] | None:
    """The first stage that failed, and why. A later success, here or out of DVC's cache, has the stage's outputs."""
    for name in graph.stages:
        error = stages[name].get("error")
        if name == "validate" and validation and not validation["passed"]:
            broken = [rule for rule in validation["rules"] if not rule["passed"] and rule["severity"] == "stop"]
            return name, f"the data break {len(broken):,} of {len(validation['rules']):,} rules"
        if error and name not in ended:
            return name, error
    return None


def _after(graph: pipeline.Pipeline, stopped: str) -> set[str]:
    """The stages that need the stopped one: what there is of them is of an earlier run."""
    before, found = graph.before(), {stopped}
    for _ in before:
        found |= {name for name, needed in before.items() if needed & found}
    return found - {stopped}
