"""python -m components STAGE: every step of the pipeline as a program.

Each command reads its own section of params.yaml and takes its files as options. dvc.yaml binds the two; run
`dvc repro` for the whole pipeline, and a command here to see one step. A command imports its own step and no other.
"""

from __future__ import annotations

import errno
import inspect
import os
import resource
import shutil
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

app = typer.Typer(
    name="python -m components",
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console(stderr=True, highlight=False)


class Stage(TyperCommand):
    """A stage's command: its --help also tells the keys of its sections of params.yaml, from their configs."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        configs = [
            v
            for k, v in vars(import_module(f"components.{ROOM[str(self.name)]}.{self.name}")).items()
            if k.endswith("Config")
        ]
        print(" Keys in params.yaml:\n")
        for config in configs:
            print(textwrap.indent(f"{config.__name__}\n{inspect.getdoc(config)}\n", "   "))


Params = Annotated[Path, typer.Option(help="The file with every number, a section a stage.")]
Canonical = Annotated[Path, typer.Option(help="The canonical data, as `ingest` writes it.")]
Validation = Annotated[Path, typer.Option(help="report.json, as `validate` writes it; the data must have passed.")]
Features = Annotated[Path, typer.Option(help="Feast's sources and stores, as `features` writes them.")]
Repo = Annotated[Path, typer.Option(help="The Feast repo's folder.")]
Data = Annotated[Path, typer.Option(help="The training arrays, as `dataset` writes them.")]
Checkpoints = Annotated[Path, typer.Option(help="The folder that holds a checkpoint folder a model.")]
Champion = Annotated[Path, typer.Option(help="champion.json: which version serves now.")]
Weights = Annotated[Path, typer.Option(help="What training begins from, as `start` writes it for the model.")]
Output = Annotated[Path, typer.Option(help="What this step writes, whole or not at all.")]
Model = Annotated[str, typer.Argument(help="Its section under `train` in params.yaml: qin or sdcnv3.")]
PARAMS = Path("params.yaml")
SPEAKS = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, one
DISK_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "database or disk is full")  # the last is SQLite's


@app.command(cls=Stage)
def ingest(output: Output, params: Params = PARAMS) -> None:
    """The configured source's raw files -> canonical events by day, users, items, modalities."""
    from components.common.config import load
    from components.data import ingest as step

    facts = step.run(load(params, "ingest", step.IngestConfig), output)
    _say(facts, "impressions", "label_rate", "days", "first_day", "last_day", "users", "items", "oracle_auc")


@app.command(cls=Stage)
def validate(
    canonical: Canonical,
    output: Output,
    docs: Annotated[Path, typer.Option(help="Where Great Expectations' Data Docs go.")],
    params: Params = PARAMS,
) -> None:
    """Great Expectations judges the canonical data; a broken contract ends the run with the rows that broke it."""
    from components.common.config import load
    from components.data import validate as step

    report = step.run(load(params, "validate", step.ValidateConfig), canonical, output, docs)
    kept = sum(rule["passed"] for rule in report["rules"])
    console.print(f"{kept} of {len(report['rules'])} rules hold; Data Docs: {docs}/index.html")


@app.command(cls=Stage)
def embed(canonical: Canonical, validation: Validation, output: Output, params: Params = PARAMS) -> None:
    """Text and image -> one fused vector an item, with the fit that made it."""
    from components.common.config import load
    from components.common.splits import SplitConfig
    from components.features import embed as step

    config, split = load(params, "embed", step.EmbedConfig), load(params, "split", SplitConfig)
    _say(step.run(config, split, canonical, validation, output), "items", "dim", "explained_variance", "missing")


@app.command(cls=Stage)
def features(
    canonical: Canonical,
    validation: Validation,
    embedding: Annotated[Path, typer.Option(help="The item vectors, as `embed` writes them.")],
    repo: Repo,
    output: Output,
    params: Params = PARAMS,
) -> None:
    """Feast's sources, `feast apply`, materialization into the online store, read back and compared."""
    from components.common.config import load
    from components.features import features as step

    config = load(params, "features", step.FeaturesConfig)
    receipt = step.run(config, canonical, validation, embedding, repo, output)
    _say(receipt, "rows", "clicks", "online_values_compared")


@app.command(cls=Stage)
def dataset(
    canonical: Canonical, features: Features, repo: Repo, output: Output, params: Params = PARAMS
) -> None:  # fmt: skip
    """Feast's point-in-time join -> training arrays, schema, vocabularies, item catalog."""
    from components.common.config import load
    from components.common.splits import SplitConfig
    from components.features import dataset as step

    config, split = load(params, "dataset", step.DatasetConfig), load(params, "split", SplitConfig)
    _say(step.run(config, split, canonical, features, repo, output), "splits", "label_rate", "bytes_per_row")


@app.command(cls=Stage)
def start(champion: Champion, output: Output, params: Params = PARAMS) -> None:
    """What training begins from: nothing, or the champion's weights for models with a warm start."""
    from components.common.config import load
    from components.training import start as step

    for model, version in step.run(load(params, "start", step.StartConfig), champion, output).items():
        console.print(f"{model}: {f'a warm start from {version}' if version else 'a cold start'}")


@app.command(cls=Stage)
def train(
    model: Model,
    dataset: Data,
    weights: Weights,
    output: Output,
    metrics: Annotated[Path, typer.Option(help="A JSON of the run's figures.")],
    history: Annotated[Path, typer.Option(help="A CSV with one line an epoch.")],
    params: Params = PARAMS,
) -> None:
    """One ranker: early stopping on the valid days, resumed where it was stopped. Also under torchrun."""
    from components.common.config import load
    from components.training import train as step

    config = load(params, f"train.{model}", step.TrainConfig)
    found = step.run(config, model, dataset, weights, output, metrics, history)
    _say(found, "epochs", "best_epoch", "valid_auc", "rows_per_second")


@app.command(cls=Stage)
def evaluate(
    model: Model,
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint that `train` wrote.")],
    dataset: Data,
    champion: Champion,
    output: Output,
    params: Params = PARAMS,
) -> None:
    """The ranker on the test days, whole and by slice, beside the oracle and the champion."""
    from components.common.config import load
    from components.release import evaluate as step

    found = step.run(load(params, "evaluate", step.EvaluateConfig), model, checkpoint, dataset, champion, output)
    _say(found["test"], "auc", "group_auc", "logloss", "calibration_error", "oracle_auc")


@app.command(cls=Stage)
def gate(
    evaluations: Annotated[Path, typer.Option(help="The folder that holds an evaluation folder a model.")],
    checkpoints: Checkpoints,
    dataset: Data,
    champion: Champion,
    output: Output,
    params: Params = PARAMS,
) -> None:
    """Rules and champion -> decision.json, which names the bytes that were judged. A rejection is no failure."""
    from components.common.config import load
    from components.release import gate as step

    config = load(params, "gate", step.GateConfig)
    decision = step.run(config, evaluations, checkpoints, dataset, champion, output)
    console.print(f"{decision['verdict']}: {decision['model'] or 'nothing ships'}", style="bold")
    for reason in decision["reasons"]:
        console.print(f"  {reason}")


@app.command(cls=Stage)
def package(
    decision: Annotated[Path, typer.Option(help="decision.json, as `gate` writes it.")],
    checkpoints: Checkpoints,
    dataset: Data,
    features: Features,
    output: Output,
    params: Params = PARAMS,
) -> None:
    """The approved checkpoint -> a Bento with golden requests; nothing where the gate said no."""
    from components.common.config import load
    from components.release import package as step

    config = load(params, "package", step.PackageConfig)
    built = step.run(config, decision, checkpoints, dataset, features, output)
    console.print(f"built {built['tag']}" if built["built"] else "nothing built: the gate rejected")


@app.command(cls=Stage)
def smoke(
    package: Annotated[Path, typer.Option(help="The folder that `package` wrote.")],
    repo: Repo,
    output: Output,
    params: Params = PARAMS,
) -> None:
    """The Bento, served on loopback: readiness, golden scores, refusals, latency."""
    from components.common.config import load
    from components.release import smoke as step

    found = step.run(load(params, "smoke", step.SmokeConfig), package, repo, output)
    _say(found, "served", "golden", "refused", "latency_ms", "memory_mib")


@app.command()
def push(repo: Repo = Path("feature_repo"), params: Params = PARAMS) -> None:
    """Clicks from standard input, a JSON object a line, into the histories that are served, while they arrive.

    Where `features` makes the store anew meanwhile, the clicks after its newest event are pushed again.
    """
    from components.common.config import load
    from components.features.views import FeaturesConfig
    from components.operations import push as step

    console.print(f"pushed {step.run(load(params, 'features', FeaturesConfig), repo):,} clicks")


@app.command()
def replay(
    canonical: Canonical = Path("data/canonical"),
    features: Features = Path("data/features"),
    repo: Repo = Path("feature_repo"),
    params: Params = PARAMS,
    rows: Annotated[int, typer.Option(help="Past impressions, drawn at random, each at its own moment.")] = 30,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 7,
) -> None:
    """Whether past impressions have, by feature, the same values as training joins them and in an online store.

    The store is made anew, for each impression, of what was known at its moment, and read as the server reads.
    """
    from components.common.config import load
    from components.features.views import FeaturesConfig
    from components.operations import replay as step

    config = load(params, "features", FeaturesConfig)
    if step.run(config, canonical, features, repo, rows=rows, seed=seed):
        raise typer.Exit(1)


@app.command()
def report(output: Annotated[Path, typer.Option(help="The HTML page.")] = Path("artifacts/report.html")) -> None:
    """What the last run found, as a table here and as a page with plots."""
    from components.operations import report as step

    step.run(Path(), output)


@app.command()
def use(
    source: Annotated[str, typer.Argument(help="simulator, movielens, microlens or files.")],
    raw: Annotated[str | None, typer.Option(help="The path that the source reads, or for files a URL.")] = None,
    params: Params = PARAMS,
) -> None:
    """Point the pipeline at a source: checks it, and writes ingest.source and ingest.raw of params.yaml."""
    from components.data import sources

    sources.use(source, raw, params)


@app.command()
def promote(
    package: Annotated[Path, typer.Option(help="The folder that `package` wrote.")] = Path("artifacts/package"),
    smoke: Annotated[Path, typer.Option(help="smoke.json; it must have passed.")] = Path("artifacts/smoke/smoke.json"),
    champion: Champion = Path("champion.json"),
) -> None:
    """Make the packaged model the champion: a version and a stage as git tags (GTO), and champion.json."""
    from components.release import registry as step

    console.print(step.promote(package, smoke, champion))


@app.command()
def rollback(
    version: Annotated[str, typer.Argument(help="An earlier version, such as v1.0.0; `gto show` lists them.")],
    champion: Champion = Path("champion.json"),
) -> None:
    """Make an earlier version the champion again."""
    from components.release import registry as step

    console.print(step.rollback(version, champion))


def _say(facts: dict[str, Any], *names: str) -> None:
    """The named facts in one line on the terminal."""
    if not SPEAKS:
        return
    shown = (
        f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value:,}" if type(value) is int else
        f"{name} {value}" for name in names if (value := facts.get(name)) is not None
    )  # fmt: skip
    console.print("  ".join(shown))


@contextmanager
def _measured(name: str) -> Iterator[None]:
    """Seconds and peak memory of the step, said and noted under .scratch for the report."""
    start = time.perf_counter()
    try:
        yield
    except SystemExit as done:  # how Typer ends, well or not
        if done.code:
            raise
    if not SPEAKS:
        return
    seconds = time.perf_counter() - start
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    peak = max(own, children) / 1024
    console.print(f"{name}: {seconds:.1f} s, {peak:,.0f} MiB at most", style="green")
    from components.common.artifacts import write_json

    write_json(Path(".scratch/stages") / f"{name}.json", {"seconds": round(seconds, 1), "peak_mib": round(peak)})


def main(arguments: list[str]) -> int:
    """0, or 1 with one message that says what is wrong and what to do."""
    stage = " ".join(part for part in arguments[:2] if not part.startswith("-")).replace(" ", "@")
    try:
        if stage and arguments[0] in STAGES and "--help" not in arguments:
            with _measured(stage):
                app(arguments)
        else:
            app(arguments)
    except SystemExit as done:
        return int(done.code or 0)
    except ValueError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        console.print(f"[bold red]{stage or 'error'}:[/] ", end="")
        console.print(str(error), markup=False, soft_wrap=True)
        console.print(f"(raised at {frame.filename}:{frame.lineno})", style="dim", markup=False, soft_wrap=True)
        return 1
    except Exception as error:
        if not _disk_full(error):
            raise
        free = shutil.disk_usage(Path.cwd()).free / 2**20
        console.print(
            f"{stage}: the disk is full ({free:.0f} MiB free at {Path.cwd()}): {error}. Nothing half-written will be "
            "taken for whole. Free some space (`dvc gc --workspace` drops unused cache) and run it again",
            style="bold red", markup=False, soft_wrap=True,
        )  # fmt: skip
        return 1
    return 0


def _disk_full(error: BaseException | None) -> bool:
    """Whether it, or what led to it, says so: the engines have kinds of their own, and most carry no errno."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


STAGES: dict[str, Callable[..., None]] = {
    command.callback.__name__: command.callback
    for command in app.registered_commands
    if command.callback is not None and command.callback not in (push, replay, report, use, promote, rollback)
}

if __name__ == "__main__":
    # Telemetry off, in this process and in those it starts.
    os.environ |= {"GX_ANALYTICS_ENABLED": "false", "DVC_NO_ANALYTICS": "1", "BENTOML_DO_NOT_TRACK": "True"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what a step has started ends with it
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # DuckDB's binding prints a page of false leak warnings at interpreter exit
