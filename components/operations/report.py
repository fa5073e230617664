"""report: what the last run found, as tables in the terminal and as one HTML page with plots.

Outside of the graph: it reads whatever the stages have written so far, and changes none of it.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from rich.console import Console
from rich.table import Table

from components.common.artifacts import new_file

STAGES = (
    "ingest validate embed features dataset start train@qin train@sdcnv3 evaluate@qin evaluate@sdcnv3 "
    "gate package smoke"
)


def run(root: Path, output: Path) -> None:
    """Print the tables and write the page. Raises ValueError where no stage has run yet."""
    found = collect(root)
    if not found["source"]:
        raise ValueError("report: no stage has written anything yet; run `dvc repro`")
    tables = [models_table(found), data_table(found), stages_table(found)]
    output.parent.mkdir(parents=True, exist_ok=True)
    with new_file(output) as scratch:
        scratch.write_text(page(found, tables), encoding="utf-8")
    console = Console(highlight=False)
    for title, columns, rows in tables:
        if rows:
            console.print(_rich(title, columns, rows))
    decision = found["decision"]
    if decision:
        colour = "green" if decision["verdict"] == "approve" else "red"
        console.print(f"[bold {colour}]gate: {decision['verdict']}[/] {decision['model'] or ''}")
        for reason in decision["reasons"]:
            console.print(f"  {reason}", markup=False)
    if found["package"].get("built"):
        console.print(f"Bento: {found['package']['tag']}   serve it: make serve", markup=False)
    console.print(f"report: {output.resolve()}", markup=False, soft_wrap=True)


def collect(root: Path) -> dict[str, Any]:
    """Every figure that is there; an empty mapping or frame for what is not."""

    def of(path: str) -> Any:
        file = root / path
        return json.loads(file.read_text()) if file.is_file() else {}

    def csv(path: str) -> pd.DataFrame:
        file = root / path
        return pd.read_csv(file) if file.is_file() else pd.DataFrame()

    decision, package, smoke = (
        of(f"artifacts/{name}.json") for name in ("gate/decision", "package/package", "smoke/smoke")
    )
    if package.get("checkpoint_sha256") != decision.get("checkpoint_sha256"):
        package = smoke = {}  # of an earlier run: what this gate decided on was not built
    models = sorted(folder.parent.name for folder in (root / "artifacts/evaluate").glob("*/evaluation.json"))
    return {
        "source": of("data/canonical/source.json"),
        "validation": of("data/validation/report.json"),
        "dataset": of("data/dataset/dataset.json"),
        "evaluate": {name: of(f"artifacts/evaluate/{name}/evaluation.json") for name in models},
        "train": {name: of(f"artifacts/train/{name}.json") for name in models},
        "history": {name: csv(f"artifacts/train/{name}_history.csv") for name in models},
        "calibration": {name: csv(f"artifacts/evaluate/{name}/calibration.csv") for name in models},
        "roc": {name: csv(f"artifacts/evaluate/{name}/roc.csv") for name in models},
        "decision": decision,
        "package": package,
        "smoke": smoke,
        "stages": {name: of(f".scratch/stages/{name}.json") for name in STAGES.split()},
    }


# ---- tables: title, columns, rows of strings --------------------------------------------------------------------

Content = tuple[str, list[str], list[list[str]]]


def models_table(found: dict[str, Any]) -> Content:
    """A line a model, then the champion, and the oracle: the ceiling of any model."""
    columns = ["model", "AUC", "±95%", "group AUC", "logloss", "cal. error", "rows/s", "gate"]
    rows = []
    judged = found["decision"].get("candidates", {})
    for name, metrics in found["evaluate"].items():
        test, speed = metrics["test"], found["train"][name].get("rows_per_second")
        verdict = "" if name not in judged else "passes" if judged[name]["passed"] else "fails"
        interval = f"{(test['auc_high'] - test['auc_low']) / 2:.4f}"
        rows.append([name, *_figures(test), f"{speed:,}" if speed else "", verdict])
        rows[-1].insert(2, interval)
    any_metrics = next(iter(found["evaluate"].values()), None)
    if any_metrics and (champion := any_metrics["champion"]):
        rows.append([f"champion {champion['version']}", *_figures(champion["test"]), "", ""])
        rows[-1].insert(2, "")
    if any_metrics and "oracle_auc" in any_metrics["test"]:
        test = any_metrics["test"]
        rows.append(["oracle", f"{test['oracle_auc']:.4f}", "", "", f"{test['oracle_logloss']:.4f}", "", "", ""])
    return "Models on the test days", columns, rows


def data_table(found: dict[str, Any]) -> Content:
    source, dataset = found["source"], found["dataset"]
    rules = found["validation"].get("rules", [])
    rows = [
        ["source", str(source["source"])],
        ["impressions", f"{source['impressions']:,}, {source['label_rate']:.1%} clicked"],
        ["days", f"{source['days']}, {source['first_day']} to {source['last_day']}"],
        ["users, items", f"{source['users']:,} and {source['items']:,}"],
    ]
    if rules:
        broken = [rule for rule in rules if not rule["passed"]]
        warned = "".join(f"; {r['severity']}: {r['table']}.{r['column']} ({r['says'] or r['rule']})" for r in broken)
        rows.append(["rules that hold", f"{len(rules) - len(broken)} of {len(rules)}{warned}"])
    if dataset:
        splits = sorted(dataset["splits"].items(), key=lambda split: split[1])
        counts = ", ".join(f"{name} {end - start:,}" for name, (start, end) in splits)
        rows.append(["rows", f"{counts}; {dataset['bytes_per_row']} bytes each"])
    if found["smoke"].get("served"):
        latency, error = found["smoke"]["latency_ms"], found["smoke"]["golden"]["max_abs_error"]
        times = f"latency p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms"
        rows.append(["served", f"golden scores within {error:.1e}; {times}"])
    return "Data", ["", ""], rows


def stages_table(found: dict[str, Any]) -> Content:
    stages = {name: cost for name, cost in found["stages"].items() if cost}
    rows = [[name, f"{cost['seconds']:.1f}", f"{cost['peak_mib']:,}"] for name, cost in stages.items()]
    return "Stages, when they last ran here", ["stage", "seconds", "peak MiB"], rows


def _figures(test: dict[str, Any]) -> list[str]:
    names = ("auc", "group_auc", "logloss", "calibration_error")
    return ["" if test[name] is None else f"{test[name]:.4f}" for name in names]


def _rich(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or not any(columns) else "right")
    for row in rows:
        table.add_row(*row)
    return table


# ---- the page ---------------------------------------------------------------------------------------------------


def page(found: dict[str, Any], tables: list[Content]) -> str:
    """The HTML page: self-contained, its plots inline SVG."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("report.html.j2").render(
        decision=found["decision"], package=found["package"], smoke=found["smoke"], source=found["source"],
        tables=[table for table in tables if table[2]], plots=plots(found), slices=slices_table(found),
    )  # fmt: skip


def slices_table(found: dict[str, Any]) -> Content:
    names = list(found["evaluate"])
    rows = []
    for part in found["evaluate"][names[0]]["slices"] if names else ():
        cells = [found["evaluate"][name]["slices"][part] for name in names]
        aucs = ["" if cell["auc"] is None else f"{cell['auc']:.4f}" for cell in cells]
        rows.append([part, f"{cells[0]['rows']:,}" + (" (small)" if cells[0]["small"] else ""), *aucs])
    return "AUC by slice of the test days", ["slice", "rows", *names], rows


def plots(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(caption, SVG): learning curves, ROC, calibration, AUC by slice."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "clickloop", "font.family": "sans-serif"})
    drawn = []

    def draw(caption: str, x: str, y: str) -> tuple[Any, Figure]:
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        drawn.append((caption, figure))
        return axes, figure

    if any(len(frame) for frame in found["history"].values()):
        axes, _ = draw("Valid AUC by epoch", "epoch", "valid AUC")
        for name, frame in found["history"].items():
            if frame.empty:  # evaluated here, trained elsewhere
                continue
            axes.plot(frame["epoch"], frame["valid_auc"], marker="o", label=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
    if any(len(frame) for frame in found["roc"].values()):
        axes, _ = draw("ROC on the test days", "false positive rate", "true positive rate")
        for name, frame in found["roc"].items():
            axes.plot(frame["false_positive_rate"], frame["true_positive_rate"], label=name)
        axes.plot([0, 1], [0, 1], color="0.7", lw=1, ls=":")
        axes.legend(frameon=False)
        axes, _ = draw("Calibration on the test days", "predicted click rate", "observed click rate")
        for name, frame in found["calibration"].items():
            axes.plot(frame["predicted"], frame["observed"], marker=".", label=name)
        top = max(frame[["predicted", "observed"]].max().max() for frame in found["calibration"].values())
        axes.plot([0, top], [0, top], color="0.7", lw=1, ls=":")
        axes.legend(frameon=False)
        axes, _ = draw("AUC by slice (none where one class alone)", "AUC", "")
        parts = list(next(iter(found["evaluate"].values()))["slices"])
        height = 0.8 / len(found["evaluate"])
        for i, (name, metrics) in enumerate(found["evaluate"].items()):
            values = [metrics["slices"][part]["auc"] or 0.5 for part in parts]
            at = [j + i * height for j in range(len(parts))]
            axes.barh(at, [v - 0.5 for v in values], height, left=0.5, label=name)
        axes.set_yticks([j + 0.4 - height / 2 for j in range(len(parts))], parts)
        axes.invert_yaxis()
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return [(caption, _svg(figure)) for caption, figure in drawn]


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
