"""`python -m components serve`, over HTTP: it serves the champion, also after a worker died or another was promoted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from components.common.artifacts import read_json
from components.operations import serve
from components.release import registry
from components.release.server import _free_port
from tests.bento.world import ITEM_IDS, USER_IDS
from tests.components.release.runs import ENVIRONMENT, PROJECT, close, repository

pytestmark = pytest.mark.slow
REQUEST = {"user_id": USER_IDS[3], "candidates": ITEM_IDS[:5], "context": {"device": "tv", "hour": "3"}}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two runs whose Bentos can be served; the first one's is the champion."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        root = repository(tmp_path_factory.mktemp("served") / "clone")
        close(root, "2026-01-10", build=True)
        close(root, "2026-01-11", build=True)
        registry.promote(root, root / ".live", "2026-01-10", "test", "the first")
        yield root


class Server:
    """`python -m components serve` in the clone's folder, on a free port."""

    def __init__(self, root: Path, *words: str) -> None:
        port = _free_port()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        self.log = root.parent / "serve.log"
        env = {name: value for name, value in os.environ.items() if not name.startswith(("BENTOML", "CLICKLOOP"))}
        env |= {"PYTHONPATH": str(PROJECT), "BENTOML_PORT": str(port), "BENTOML_DO_NOT_TRACK": "True"}
        with self.log.open("wb") as opened:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "components", "serve", *words],
                cwd=root, env=env, stdout=opened, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def answer(self) -> dict[str, object]:
        response = self.client.post("/rank", json=REQUEST)
        assert response.status_code == 200, response.text
        return response.json()

    def answers(self, version: str) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.answer()["version"] == version
        except httpx.TransportError:
            return False

    def worker(self) -> psutil.Process:
        return next(p for p in self.family() if "_bentoml_impl.worker.service" in " ".join(p.cmdline()))

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def serving(root: Path, *words: str) -> Iterator[Server]:
    server = Server(root, *words)
    family: list[psutil.Process] = []
    try:
        yield server
        family = server.family()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait() == 0, server.log.read_text()
    finally:
        server.process.kill()
        server.process.wait()
        assert not psutil.wait_procs(family, timeout=120)[1]


def wait_until(condition: Callable[[], bool], server: Server) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.3)


def version(root: Path, release: str) -> str:
    return str(read_json(root / f".live/releases/ctr-ranker/{release}/package.json", "package")["version"])


def test_what_serves_is_the_champion(clone: Path) -> None:
    live = clone / ".live"
    first = version(clone, "v0.0.1")
    with serving(clone) as server:
        wait_until(lambda: server.answers(first), server)
        assert server.answer()["degraded"] == []  # the live store is read
        assert live / "releases/ctr-ranker/v0.0.1" in Path(server.worker().cwd()).parents
        for output in ("artifacts", "data", "checkpoints"):
            shutil.rmtree(clone / output)  # as a rejected run, or `dvc repro`, may
        worker = server.worker()
        worker.kill()
        wait_until(lambda: server.answers(first), server)
        assert server.worker().pid != worker.pid

        server.process.send_signal(signal.SIGSTOP)  # the watch sees nothing: the worker's own start must do
        registry.promote(clone, live, "2026-01-11", "test", "better")
        second = version(clone, "v0.0.2")
        assert first != second and server.answer()["version"] == first
        server.worker().kill()
        wait_until(lambda: server.answers(second), server)
        server.process.send_signal(signal.SIGCONT)

        wait_until(lambda: server.answers(second), server)
        registry.rollback(clone, live, "v0.0.1", "test", "it went wrong")
        wait_until(lambda: server.answers(first), server)  # nobody killed a worker
        assert server.answer()["degraded"] == []
        assert "v0.0.1 is the champion, by test: it went wrong; replacing the workers" in server.log.read_text()


def test_a_build_that_is_not_promoted(clone: Path) -> None:
    bento = clone / ".live/releases/ctr-ranker/v0.0.1/bento"
    with serving(clone, "--bento", str(bento.relative_to(clone))) as server:
        wait_until(lambda: server.answers(version(clone, "v0.0.1")), server)
        assert server.answer()["degraded"] == ["store_unavailable"]


def test_where_nothing_can_be_served(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no champion in .*run `python -m components run`, or name a folder"):
        serve.run(tmp_path / ".live", None, None)
    with pytest.raises(ValueError, match=r"is no Bento: it has no bento\.yaml"):
        serve.run(tmp_path / ".live", tmp_path, None)
    with pytest.raises(ValueError, match="--online goes with --bento"):
        serve.run(tmp_path / ".live", None, tmp_path)
