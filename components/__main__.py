"""python -m components COMMAND: each stage of the pipeline as a program, and what is done with its results.

A stage reads its own section of params.yaml and takes its files as options. dvc.yaml binds the two: run `dvc repro`
for the whole pipeline, and a command here for one stage. A command imports its own stage and no other.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from components.common import causes, pipeline, threads
from components.operations import commands
from components.release.commands import compare, registry

console = Console(stderr=True, highlight=False)
PARAMS = Path("params.yaml")
MEASURED: dict[str, Any] = {}  # seconds and speed that the running stage found; equal inputs give equal outputs
SPEAKS = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, one
DISK_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "database or disk is full")  # the last is SQLite's
STAGES = pipeline.read().commands()

# What a stage's `run` takes beside its configs. The parameter's name is the option's.
FILES = {
    "arrivals": "arrivals.json, as `arrivals` writes it: the raw files that are read.",
    "canonical": "The canonical data, as `ingest` writes it.",
    "validation": "report.json, as `validate` writes it; the data must have passed.",
    "docs": "Where Great Expectations' Data Docs go.",
    "embedding": "The item vectors, as `embed` writes them.",
    "features": "The tables of Feast's views, as `features` writes them.",
    "repo": "The Feast repo's folder.",
    "dataset": "The training set, as `dataset` writes it.",
    "pointer": "champion.json, which names the version that serves now.",
    "champion": "That version's checkpoint, as `champion` writes it.",
    "starts": "The folder that holds what the training of each model begins from.",
    "weights": "What training begins from, as `start` writes it for the model.",
    "checkpoint": "A checkpoint's folder.",
    "checkpoints": "The folder that holds a checkpoint folder for each model.",
    "evaluations": "The folder that holds an evaluation folder for each model.",
    "decision": "decision.json, as `gate` writes it; for `package`, as `refit` does.",
    "shipped": "The same decision, and the bytes that ship.",
    "package": "The folder that `package` wrote.",
    "metrics": "A JSON of the run's figures.",
    "history": "A CSV with one line for each epoch.",
    "output": "What this stage writes, whole or not at all.",
}
MODEL = "Its section under `train` in params.yaml: qin or sdcnv3."


class Program(TyperGroup):
    """The stages of dvc.yaml, in their order, then the other commands. A stage's module is imported when it runs."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*STAGES, *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in STAGES:
            return super().get_command(ctx, cmd_name)
        return TyperCommand(cmd_name, help=STAGES[cmd_name], rich_help_panel=f"Stages: {storey(cmd_name)}")

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, stage_command(name) if name in STAGES else command, rest


class Stage(TyperCommand):
    """A stage's command: its --help also explains the keys of its sections of params.yaml, from their configs."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        configs = list(configs_of(module_of(str(self.name))).values())
        if configs:
            print(" Keys in params.yaml:\n")
        for config in configs:
            print(textwrap.indent(f"{config.__name__}\n{inspect.getdoc(config)}\n", "   "))


def storey(stage: str) -> str:
    """A stage lives in the file of its name: components/STOREY/STAGE.py."""
    here = Path(__file__).parent
    return next(name for name in pipeline.STOREYS if (here / name / f"{stage}.py").is_file())


def module_of(stage: str) -> ModuleType:
    return import_module(f"components.{storey(stage)}.{stage}")


def configs_of(step: ModuleType) -> dict[str, type[Any]]:
    """Parameter of the stage's `run` -> its config dataclass."""
    return {name: kind for name, kind in get_type_hints(step.run).items() if is_dataclass(kind)}  # type: ignore[misc]


def stage_command(stage: str) -> Any:
    """The command that follows from the signature of the stage's `run`.

    Configs come from params.yaml: `config` is the stage's own section (of its model, where it has one), another
    config the section of its parameter's name. `model` is an argument, and each path an option.
    """
    step = module_of(stage)
    configs = configs_of(step)
    wanted = inspect.signature(step.run).parameters

    def command(**given: Any) -> None:
        params = given.pop("params")
        if configs:
            from components.common.config import load

            own = ".".join([stage, *([given["model"]] if stage == "train" else [])])
            sections = {name: own if name == "config" else name for name in configs}
            given |= {name: load(params, sections[name], config) for name, config in configs.items()}
        found = step.run(**given)
        show(stage, step.summary(found))
        if hasattr(step, "measured"):
            MEASURED.update(step.measured(found))

    options: dict[str, Any] = {
        name: Annotated[str, typer.Argument(help=MODEL)] if name == "model"
        else Annotated[Path, typer.Option(help=FILES[name])]
        for name in wanted if name not in configs
    }  # fmt: skip
    options["params"] = Annotated[Path, typer.Option(help="The file with every number, a section for each stage.")]
    command.__annotations__ = options
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, annotation=kind,
                default=PARAMS if name == "params" else inspect.Parameter.empty,
            )
            for name, kind in options.items()
        ]
    )  # fmt: skip
    alone = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    alone.command(stage, cls=Stage, help=STAGES[stage])(command)
    return typer.main.get_command(alone)


def show(stage: str, lines: dict[str, str]) -> None:
    """What a stage found, for a person: aligned, in colour on a terminal alone."""
    if not SPEAKS:
        return
    table = Table.grid(padding=(0, 2))
    for label, text in lines.items():
        table.add_row(Text(label, style="dim"), Text(text))  # no markup: a text may hold [brackets]
    console.print(table)


app = typer.Typer(
    name="python -m components",
    cls=Program,
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
LIVE, REPORTS, RELEASES, SETUP = "Live clicks", "Reports and checks", "Releases", "Data and set-up"
RUNS = "Runs"

Params = Annotated[Path, typer.Option(help="The file with every number, a section for each stage.")]
Canonical = Annotated[Path, typer.Option(help=FILES["canonical"])]
Features = Annotated[Path, typer.Option(help=FILES["features"])]
Repo = Annotated[Path, typer.Option(help=FILES["repo"])]


app.command(rich_help_panel=RUNS)(commands.run)
app.command(rich_help_panel=LIVE)(commands.refresh)
app.add_typer(commands.day, name="day", rich_help_panel=RUNS)


@app.command(rich_help_panel=LIVE)
def push() -> None:
    """Clicks from standard input, a JSON object a line, into the histories that are served, while they arrive.

    Lines that are no click are set aside in .scratch/push/rejected.jsonl. A click that is delivered twice counts once.
    No click is lost where a new store is published meanwhile, or where this command is killed and started again with
    the same lines.
    """
    from components.common.live import live_folder
    from components.operations import push as step

    step.run(live_folder())


@app.command(rich_help_panel=LIVE)
def publish(
    features: Features = Path("data/features"), repo: Repo = Path("feature_repo"), params: Params = PARAMS
) -> None:
    """The newest features into what serves: a new online store, whole, with the clicks that were pushed; then a switch.

    Nothing is trained, and the model stays. What serves newer data, or the same, is left alone.
    """
    from components.common.config import load
    from components.common.live import live_folder
    from components.features import publish as step

    config = load(params, "publish", step.PublishConfig)
    if deployed := step.publish(config, features, repo, live_folder(), "publish"):
        console.print(f"{deployed.store.name} serves" if deployed.store else "")


@app.command(rich_help_panel=REPORTS)
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


@app.command(rich_help_panel=REPORTS)
def report(
    output: Annotated[Path, typer.Option(help="The HTML page.")] = Path("artifacts/report.html"),
    index: Annotated[bool, typer.Option("--index", help="Only write the page of all runs, .runs/reports.")] = False,
) -> None:
    """What the last run found, as a table here and as a page with plots."""
    from components.operations import report as step
    from components.operations.pages import index as of_all

    if index:
        print(of_all.write(Path.cwd(), Path(".runs/reports").resolve()))
    else:
        step.run(Path(), output)


@app.command(rich_help_panel=SETUP)
def airflow() -> None:
    """Airflow on this machine, until Ctrl-C; `make airflow` sets its environment."""
    from components.operations import local_airflow

    local_airflow.run()


@app.command("inspect", rich_help_panel=SETUP)
def inspect_files(
    path: Annotated[str, typer.Argument(help="A folder, a file or a URL of parquet, CSV or TSV.")],
) -> None:
    """Look at your files, and propose the section `ingest.files` of params.yaml for them, ready to paste."""
    from components.data.propose import propose

    print(propose(path).text())


@app.command(rich_help_panel=SETUP)
def use(
    source: Annotated[str, typer.Argument(help="simulator, movielens, microlens or files.")],
    raw: Annotated[str | None, typer.Option(help="The path that the source reads, or for files a URL.")] = None,
    params: Params = PARAMS,
) -> None:
    """Point the pipeline at a source: looks at its files, says what they hold, and writes it into params.yaml.

    The keys are source, raw, until (the end of its newest day) and window_days of ingest. Where the files are wrong,
    nothing is written.
    """
    from components.data import use as step

    step.use(source, raw, params)


app.add_typer(registry, name="registry", rich_help_panel=RELEASES)
app.command(rich_help_panel=RELEASES)(compare)


@app.command(rich_help_panel=RELEASES)
def serve(
    bento: Annotated[Path | None, typer.Option(help="A Bento's folder that is not promoted, to try it.")] = None,
    online: Annotated[Path | None, typer.Option(help="A store folder for that Bento.")] = None,
) -> None:
    """The champion over HTTP, until Ctrl-C. BENTOML_HOST and BENTOML_PORT say where; 127.0.0.1:3000 if not given."""
    from components.common.live import live_folder
    from components.operations import serve as step

    raise typer.Exit(step.run(live_folder(), bento, online))


@contextmanager
def _measured(name: str) -> Iterator[None]:
    """Notes the stage's seconds, peak memory, what it measured of itself, and its error under .scratch for the report.
    Prints the first two."""
    begun = time.perf_counter()
    MEASURED.clear()
    try:
        yield
    except SystemExit as done:  # how Typer ends, well or not
        if done.code:
            raise
    except Exception as error:
        if not _disk_full(error):
            _note(name, time.perf_counter() - begun, error=str(error)[:2000], code=causes.exit_code(error))
        raise
    _note(name, time.perf_counter() - begun)


def _note(name: str, seconds: float, **error: Any) -> None:
    if not SPEAKS:
        return
    from components.common.artifacts import write_json

    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    peak = max(own, children) / 1024
    if not error:
        console.print(f"{name}: {seconds:.1f} s, {peak:,.0f} MiB at most", style="green")
    note = {"seconds": round(seconds, 1), "peak_mib": round(peak), **MEASURED, **error}
    write_json(Path(".scratch/stages") / f"{name}.json", note)


def main(arguments: list[str]) -> int:
    """0, or 1 with one message that says what is wrong and what to do; `run` and `day`: a code of causes.py."""
    stage = " ".join(part for part in arguments[:2] if not part.startswith("-")).replace(" ", "@")
    steps = arguments[:1] in (["run"], ["day"])
    try:
        if stage and arguments[0] in STAGES and "--help" not in arguments:
            with _measured(stage):
                app(arguments)
        else:
            app(arguments)
    except SystemExit as done:
        return int(done.code or 0)
    except causes.StepError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        return 1
    except ValueError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        console.print(f"[bold red]{stage or 'error'}:[/] ", end="")
        console.print(str(error), markup=False, soft_wrap=True)
        if steps:
            return causes.exit_code(error)  # the last line of a step is its reason
        console.print(f"(raised at {frame.filename}:{frame.lineno})", style="dim", markup=False, soft_wrap=True)
        return 1
    except Exception as error:
        if not _disk_full(error):
            raise
        free = shutil.disk_usage(Path.cwd()).free / 2**20
        console.print(
            f"{stage}: the disk is full ({free:.0f} MiB free at {Path.cwd()}): {error}. Nothing half-written will be "
            "taken for whole. Free some space (`python -m components day tidy` drops what no version and none of the "
            "newest runs needs) and run it again",
            style="bold red", markup=False, soft_wrap=True,
        )  # fmt: skip
        return causes.TRY_AGAIN if steps else 1
    return 0


def _disk_full(error: BaseException | None) -> bool:
    """Whether the error, or one that led to it, says so. Engines have errors of their own, and most carry no errno."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    # Telemetry off, in this process and in those it starts.
    os.environ |= {"GX_ANALYTICS_ENABLED": "false", "DVC_NO_ANALYTICS": "1", "BENTOML_DO_NOT_TRACK": "True"}
    os.environ |= threads.environment() | dict(os.environ)  # before torch is imported; the caller's own values stay
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what a step has started ends with it
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # DuckDB's binding prints a page of false leak warnings at interpreter exit
