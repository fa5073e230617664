"""report: what the last run found, as tables in the terminal and as one HTML page with plots.

It is no stage: it reads what the stages have written so far and changes none of it. So a run that was stopped has a
page too. The page says where it stopped, and leaves out what is of an earlier run.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.common import pipeline
from components.common.artifacts import new_file

EXAMPLE_CHARACTERS = 200
VERDICTS = {True: "holds", False: "broken", None: "too few rows"}
# What says that a stage has ended, where it is not enough that its outputs are there.
ENDED = {"features": "receipt.json"}


def write(root: Path, output: Path) -> dict[str, Any]:
    """Write the page of the project, or of a run's worktree, whatever has run so far. Returns the figures."""
    found = collect(root)
    output.parent.mkdir(parents=True, exist_ok=True)
    with new_file(output) as scratch:
        scratch.write_text(page(found, _tables(found)), encoding="utf-8")
    return found


def _tables(found: dict[str, Any]) -> list[Content]:
    return [rules_table(found), models_table(found), data_table(found), stages_table(found)]


def run(root: Path, output: Path) -> None:
    """Print the tables and write the page, whatever has run so far."""
    found = write(root, output)
    tables = _tables(found)
    console = Console(highlight=False)
    for table in tables:
        if table.rows:
            console.print(_rich(table))
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
        "roc": _of(evaluate, each("evaluate", "roc.csv", pd.read_csv, None)),
        "decision": decision,
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


# ---- tables -----------------------------------------------------------------------------------------------------


class Content(NamedTuple):
    title: str
    columns: list[str]
    rows: list[list[str]]


def rules_table(found: dict[str, Any]) -> Content:
    """The rules that the data break, those that stop a run first, with an example of each."""
    rows = []
    broken = [rule for rule in found["validation"].get("rules", ()) if not rule["passed"]]
    for rule in sorted(broken, key=lambda rule: rule["severity"] != "stop"):
        examples, observed = rule.get("examples"), rule.get("observed")
        shown = ", ".join(f"{k} {v}" for k, v in examples[0].items()) if examples else f"observed {observed}"
        rows.append(
            [
                f"{rule['table']}.{rule['column']}" if rule["column"] else rule["table"],
                rule["says"] or rule["rule"],
                {"stop": "stops the run", "warn": "warning"}.get(rule["severity"], rule["severity"]),
                f"{rule.get('broken_rows', 0):,}",
                shown if len(shown) <= EXAMPLE_CHARACTERS else f"{shown[:EXAMPLE_CHARACTERS]}…",
            ]
        )
    return Content("Rules that the data break", ["column", "rule", "severity", "rows", "example"], rows)


def models_table(found: dict[str, Any]) -> Content:
    """A line for each model, then the champion, and the oracle: the ceiling of any model.

    The valid AUC is shown where a model has no figures of the test days yet.
    """
    columns = ["model", "valid AUC", "AUC", "±95%", "group AUC", "logloss", "cal. error", "rows/s", "gate"]
    rows = []
    judged, evaluate = found["decision"].get("candidates", {}), found["evaluate"]
    for name in dict.fromkeys([*found["train"], *evaluate]):
        trained, metrics = found["train"].get(name, {}), evaluate.get(name)
        auc, *others = _figures(metrics["test"]) if metrics else [""] * 4
        low, high = metrics["test"]["intervals"]["auc"] if metrics else (0.0, 0.0)
        interval = _figure((high - low) / 2) if metrics else ""
        valid = "" if found["train"].keys() <= evaluate.keys() else _figure(trained.get("valid_auc"))
        rate = found["stages"].get(f"train@{name}", {}).get("rows_per_second")
        speed = f"{rate:,}" if rate else ""
        verdict = "" if name not in judged else "passes" if judged[name]["passed"] else "fails"
        rows.append([name, valid, auc, interval, *others, speed, verdict])
    any_metrics = next(iter(evaluate.values()), None)
    for at, other in enumerate(any_metrics["references"] if any_metrics else ()):
        auc, *others = _figures(other["test"])
        rows.append([f"{'earlier' if at else 'champion'} {other['version']}", "", auc, "", *others, "", ""])
    if any_metrics and "oracle_auc" in any_metrics["test"]:
        test = any_metrics["test"]
        rows.append(["oracle", "", _figure(test["oracle_auc"]), "", "", _figure(test["oracle_logloss"]), "", "", ""])
    filled = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    title = "Models on the test days" if evaluate else "Models"
    return Content(title, [columns[i] for i in filled], [[row[i] for i in filled] for row in rows])


def data_table(found: dict[str, Any]) -> Content:
    from components.data.validate import old_data

    source, dataset, rows = found["source"], found["dataset"], []
    rules = found["validation"].get("rules", [])
    if source:
        rows += [
            ["source", str(source["source"])],
            ["impressions", f"{source['impressions']:,}, {source['label_rate']:.1%} clicked"],
            ["days", f"{source['days']:,}, {source['first_day']} to {source['last_day']}"],
            ["users, items", f"{source['users']:,} and {source['items']:,}"],
        ]
        if note := old_data(source):
            rows.append(["age", note])
    if unjudged := found["validation"].get("not_judged"):
        rows.append(["not judged", "; ".join(unjudged)])
    if aside := found["validation"].get("quarantined"):
        rows.append(["rows set aside", ", ".join(f"{count:,} {reason}" for reason, count in aside.items())])
    if rules:
        rows.append(["rules that hold", f"{sum(rule['passed'] for rule in rules):,} of {len(rules):,}"])
    if dataset:
        splits = sorted(dataset["splits"].items(), key=lambda split: split[1])
        counts = ", ".join(f"{name} {end - start:,}" for name, (start, end) in splits)
        rows.append(["rows", f"{counts}; {dataset['bytes_per_row']:,} bytes each"])
    if found["smoke"].get("served"):
        said, measured = f"{found['smoke']['golden_requests']:,} golden requests", found["stages"]["smoke"]
        if latency := measured.get("latency_ms"):  # not there where DVC took smoke from its cache
            said = f"golden scores within {measured['max_abs_error']:.1e}"
            said += f"; latency p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms"
        rows.append(["served", said])
    return Content("Data", ["", ""], rows)


def stages_table(found: dict[str, Any]) -> Content:
    """Every stage of the pipeline, once one has run. A stage that DVC took from its cache has no time here."""
    stopped = found["stopped"][0] if found["stopped"] else None
    rows = []
    for name, cost in found["stages"].items():
        state = "failed" if name == stopped else "done" if name in found["ended"] else "not run"
        seconds, peak = cost.get("seconds"), cost.get("peak_mib")
        known = state != "not run"
        rows.append(
            [
                name,
                state,
                f"{seconds:,.1f} s" if known and seconds is not None else "",
                f"{peak:,} MiB" if known and peak is not None else "",
            ]
        )
    return Content(
        "Stages, when they last ran here",
        ["stage", "", "time", "peak memory"],
        rows if found["ended"] or stopped else [],
    )


def slices_table(found: dict[str, Any]) -> Content:
    names = list(found["evaluate"])
    rows = []
    for part in found["evaluate"][names[0]]["slices"] if names else ():
        cells = [found["evaluate"][name]["slices"][part] for name in names]
        rows.append([part, f"{cells[0]['rows']:,}", *(_figure(cell["auc"]) for cell in cells)])
    return Content("AUC by slice of the test days", ["slice", "rows", *names], rows)


def gate_table(found: dict[str, Any]) -> Content:
    rows = [
        [
            model,
            rule["rule"],
            VERDICTS[rule["passed"]],
            rule["why"],
        ]
        for model, candidate in found["decision"].get("candidates", {}).items()
        for rule in candidate["rules"]
    ]
    return Content("Rules of the gate", ["model", "rule", "", "why"], rows)


def _figures(test: dict[str, Any]) -> list[str]:
    return [_figure(test[name]) for name in ("auc", "group_auc", "logloss", "calibration_error")]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _rich(content: Content) -> Table:
    table = Table(title=content.title, title_justify="left", show_header=any(content.columns))
    for i, column in enumerate(content.columns):
        words = i == 0 or not any(row[i][:1].isdigit() for row in content.rows) or not any(content.columns)
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    for row in content.rows:
        table.add_row(*map(Text, row))
    return table


# ---- the page ---------------------------------------------------------------------------------------------------


def page(found: dict[str, Any], tables: list[Content]) -> str:
    """The HTML page: self-contained, its plots inline SVG."""
    rules, models, data, stages = tables
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("report.html.j2").render(
        **{name: found[name] for name in ("decision", "package", "source", "stopped", "ended")},
        rules=rules, models=models, plots=list(plots(found)), slices=slices_table(found), data=data,
        gate=gate_table(found), stages=stages,
    )  # fmt: skip


def plots(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(caption, SVG): learning curves, ROC, calibration, AUC by slice."""
    import matplotlib as mpl

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "clickloop", "font.family": "sans-serif"})
    if found["history"]:
        axes = _axes("epoch", "valid AUC")
        for name, frame in found["history"].items():
            axes.plot(frame["epoch"], frame["valid_auc"], marker="o", label=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
        yield "Valid AUC by epoch", _svg(axes)
    if found["roc"]:
        axes = _axes("false positive rate", "true positive rate")
        for name, frame in found["roc"].items():
            axes.plot(frame["false_positive_rate"], frame["true_positive_rate"], label=name)
        axes.plot([0, 1], [0, 1], color="0.7", lw=1, ls=":")
        axes.legend(frameon=False)
        yield "ROC on the test days", _svg(axes)
    if found["calibration"]:
        axes = _axes("predicted click rate", "observed click rate")
        for name, frame in found["calibration"].items():
            axes.plot(frame["predicted"], frame["observed"], marker=".", label=name)
        top = max(frame[["predicted", "observed"]].max().max() for frame in found["calibration"].values())
        axes.plot([0, top], [0, top], color="0.7", lw=1, ls=":")
        axes.legend(frameon=False)
        yield "Calibration on the test days", _svg(axes)
    if found["evaluate"]:
        axes = _axes("AUC", "")
        parts = list(next(iter(found["evaluate"].values()))["slices"])
        height = 0.8 / len(found["evaluate"])
        for i, (name, metrics) in enumerate(found["evaluate"].items()):
            values = [metrics["slices"][part]["auc"] or 0.5 for part in parts]
            places = [j + i * height for j in range(len(parts))]
            axes.barh(places, [value - 0.5 for value in values], height, left=0.5, label=name)
        axes.set_yticks([j + 0.4 - height / 2 for j in range(len(parts))], parts)
        axes.invert_yaxis()
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        yield "AUC by slice (no bar where all rows have one label)", _svg(axes)


def _axes(x: str, y: str) -> Any:
    from matplotlib.figure import Figure

    axes = Figure(figsize=(5.2, 3.6), layout="constrained").subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _svg(axes: Any) -> str:
    text = io.StringIO()
    axes.figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
