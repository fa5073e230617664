"""What some tests need and not every machine has.

A test or a fixture calls `need("redis")`. Without the part, the test is skipped, and the end of the run says what was
not tested and how to install it. Where the environment variable CI is set, the test fails instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import pytest


@dataclass(frozen=True, kw_only=True)
class Part:
    """tests    what is not tested without the part
    install  how to get it
    missing  the names of what is not here; none, if the part is there
    everywhere  CI can install it; if not, its tests are skipped there too
    """

    tests: str
    install: str
    missing: Callable[[], list[str]]
    everywhere: bool = True


def absent(*, programs: tuple[str, ...] = (), modules: tuple[str, ...] = ()) -> Callable[[], list[str]]:
    return lambda: [
        *(program for program in programs if which(program) is None),
        *(f"Python's {module}" for module in modules if find_spec(module) is None),
    ]


def no_gpu() -> list[str]:
    import torch

    return [] if torch.cuda.is_available() else ["CUDA device"]


def no_clip() -> list[str]:
    try:
        import open_clip  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another build than torch's
        return [f"open_clip ({error})"]
    return []


PARTS = {
    "redis": Part(
        tests="the online store on Redis",
        install="apt-get install redis-server",
        missing=absent(programs=("redis-server",), modules=("redis",)),
    ),
    "postgres": Part(
        tests="Airflow on Postgres",
        install="apt-get install postgresql && uv pip install -r pyproject.toml --extra postgres -c requirements.lock",
        missing=lambda: [
            *([] if which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin/initdb")) else ["initdb"]),
            *absent(modules=("psycopg2", "asyncpg"))(),
        ],
    ),
    "spark": Part(
        tests="the offline store on Spark",
        install="apt-get install default-jre-headless && "
        "uv pip install -r pyproject.toml --extra spark -c requirements.lock",
        missing=absent(programs=("java",), modules=("pyspark",)),
    ),
    "s3": Part(
        tests="sources and DVC's remote on S3",
        install="uv pip install -r pyproject.toml --extra s3 --group s3 -c requirements.lock",
        missing=absent(modules=("s3fs", "dvc_s3", "moto", "flask", "flask_cors")),
    ),
    "triton": Part(
        tests="the Triton kernels",
        install="uv pip install --group triton -c requirements.lock",
        missing=absent(modules=("triton",)),
    ),
    "compiler": Part(
        tests="SDCNv3's layers in C",
        install="apt-get install gcc libc6-dev",
        missing=absent(programs=("cc",)),
    ),
    "make": Part(
        tests="Airflow as `make airflow` starts it", install="apt-get install make", missing=absent(programs=("make",))
    ),
    "chromium": Part(
        tests="the pages of runs in a browser",
        install="apt-get install chromium",
        missing=absent(programs=("chromium",)),
    ),
    "gpu": Part(tests="training and kernels on a GPU", install="a machine with CUDA", missing=no_gpu, everywhere=False),
    "open_clip": Part(
        tests="open_clip's encoders of pictures",
        install="uv pip install -r pyproject.toml --extra encoders -c requirements.lock (not beside torch's CPU build)",
        missing=no_clip,
        everywhere=False,
    ),
}


def need(name: str) -> None:
    """Skip the test that calls this, if the part is not there; where CI is set, fail it."""
    part = PARTS[name]
    missing = part.missing()
    if not missing:
        return
    reason = f"{part.tests}: no {', '.join(missing)}; to get it: {part.install}"
    if os.environ.get("CI") and part.everywhere:
        pytest.fail(f"CI is set, so a missing part is an error. Not tested: {reason}", pytrace=False)
    pytest.skip(reason)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        need("gpu")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """The last lines before the closing one: what was not tested, and how to get it."""
    yield
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", []) if report.longrepr]
    counts = {part: sum(reason.endswith(part.install) for reason in reasons) for part in PARTS.values()}
    if any(counts.values()):
        terminalreporter.section("Not tested on this machine")
    for part, count in counts.items():
        if count:
            terminalreporter.write_line(f"{part.tests} ({count} skipped). To get it: {part.install}")
