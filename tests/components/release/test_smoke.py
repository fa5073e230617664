from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from components.common.live import CURRENT, locked, switch
from components.features.publish import PublishConfig
from components.release import package, server, smoke
from components.release.server import Served
from components.release.smoke import SmokeConfig
from tests.bento.world import ITEM_IDS, USER_IDS, World, make_store, make_world

PROJECT = Path(__file__).resolve().parents[3]
CONFIG = SmokeConfig(tolerance=1e-5, latency_requests=5, latency_candidates=20)
PUBLISH = PublishConfig(online_sample=5, keep=1)


MARK = "CLICKLOOP_SMOKE_TEST"  # in the environment of every process that these tests start, and of its children


@pytest.fixture(scope="module", autouse=True)
def mark() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, str(os.getpid()))
        yield


def started() -> set[psutil.Process]:
    """Every running process that these tests have started, whatever its session or parent. BentoML's supervisor
    writes its title over its environment: it is found as a child of the guard."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(os.getpid()):
                found |= {process, *process.children(recursive=True)}
    return {process for process in found if runs(process)}


def runs(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("clickloop-smoke-test"))
    config = package.PackageConfig(name="ctr-ranker", max_candidates=25, golden_requests=10)
    output = world.root / "package"
    package.run(
        config, world.decision, world.evaluations, world.model, world.dataset, world.features, world.repo, output
    )
    return world


@pytest.mark.parametrize("bad", [{"tolerance": 0.0}, {"latency_requests": 0}, {"latency_candidates": 0}])
def test_config_names_the_key(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SmokeConfig(**{"tolerance": 1e-5, "latency_requests": 1, "latency_candidates": 1, **bad})


def test_nothing_built_is_nothing_served(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text(json.dumps({"built": False, "reason": ["auc"]}))
    found = smoke.run(CONFIG, PUBLISH, tmp_path, tmp_path, tmp_path, tmp_path / "smoke.json")
    assert found == {"served": False, "reason": ["auc"]}
    assert smoke.summary(found) == {"served": "nothing: the gate rejected", "reasons": "auc"}
    assert json.loads((tmp_path / "smoke.json").read_text()) == found


CASE = {"request": {"user_id": 1, "candidates": [7, 8]}, "scores": [0.25, 0.75], "degraded": []}
GOOD = {"version": "v", "items": [8, 7], "scores": [0.75, 0.25], "degraded": []}


def answering(answer: dict, status: int = 200) -> httpx.Client:
    transport = httpx.MockTransport(lambda request: httpx.Response(status, json=answer))
    return httpx.Client(transport=transport, base_url="http://x")


def test_golden_passes_within_the_tolerance() -> None:
    near = {**GOOD, "scores": [0.750009, 0.25]}
    assert smoke.check_golden(answering(near), [CASE], "v", 1e-5)["max_abs_error"] == pytest.approx(9e-6)


@pytest.mark.parametrize("late", range(smoke.TRIES + 1))
def test_an_answer_before_the_store_is_asked_for_again_and_counted(late: int) -> None:
    answers = [{**GOOD, "degraded": [smoke.LATE]}] * late + [GOOD]
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=answers.pop(0)))
    with httpx.Client(transport=transport, base_url="http://x") as client:
        if late < smoke.TRIES:
            assert smoke.check_golden(client, [CASE], "v", 1e-5)["late"] == late
        else:
            with pytest.raises(ValueError, match="expected degraded"):
                smoke.check_golden(client, [CASE], "v", 1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": "other"},
        {"degraded": ["unknown_user"]},
        {"items": [8, 9]},
        {"items": [8]},
        {"scores": [0.7501, 0.25]},
        {"scores": [float("nan"), 0.25]},
        {"items": [7, 8], "scores": [0.25, 0.75]},
    ],
    ids=["version", "degraded", "another item", "an item less", "score", "NaN", "order"],
)
def test_golden_names_what_is_wrong(wrong: dict) -> None:
    body = json.dumps({**GOOD, **wrong})
    client = httpx.Client(
        transport=httpx.MockTransport(lambda request: httpx.Response(200, text=body)), base_url="http://x"
    )
    with pytest.raises(ValueError, match=r"golden request 0 .*expected"):
        smoke.check_golden(client, [CASE], "v", 1e-5)


@pytest.mark.parametrize("status", [200, 302, 500])
def test_a_bad_request_that_is_not_refused(status: int) -> None:
    built = {"max_candidates": 3, "max_body_bytes": 10}
    with pytest.raises(ValueError, match=f"bad request 'unknown field'.*got {status}"):
        smoke.check_refusals(answering(GOOD, status), CASE["request"], built)


@pytest.mark.slow
def test_smoke_serves_the_bento_with_its_store(world: World) -> None:
    output = world.root / "smoke.json"
    found = smoke.run(CONFIG, PUBLISH, world.root / "package", world.features, world.repo, output)
    figures = smoke.measured(found)
    assert json.loads(output.read_text()) | {"measured": figures} == found
    assert found["served"] and found["passed"]
    assert found["golden_requests"] == 10
    assert figures["max_abs_error"] <= 1e-5
    assert set(found["refused"].values()) <= {400, 413}
    assert 0 < figures["latency_ms"]["p50"] <= figures["latency_ms"]["p99"]
    assert smoke.summary(found)["served"].startswith(found["tag"])
    assert figures["memory_mib"] > 100  # torch alone is more: the workers were seen, not just the supervisor
    assert not started()


@pytest.mark.slow
def test_without_a_store_it_answers_degraded(world: World) -> None:
    golden = json.loads((world.root / "package" / "golden.json").read_text())
    served = Served(world.root / "package" / "bento", None, world.root / "server.log")
    with served.running(), served.client() as client:
        answer = client.post("/rank", json={"user_id": USER_IDS[0], "candidates": ITEM_IDS[:5]}).json()
        assert answer["degraded"] == ["store_unavailable", "missing_context"]
        assert sorted(answer["items"]) == ITEM_IDS[:5]
        open_ports = [c for p in served.processes() for c in p.net_connections("tcp") if c.status == "LISTEN"]
        assert {opened.laddr.ip for opened in open_ports} == {"127.0.0.1"}
        with pytest.raises(ValueError, match=r"golden request 0 .*degraded"):  # smoke would not let this pass
            smoke.check_golden(client, golden, answer["version"], 1e-5)
    assert not started()


@pytest.mark.slow
def test_switches_and_restarts_degrade_no_answer(world: World) -> None:
    """The store that a server began with is gone; its worker is killed, and comes back with the store that serves."""
    golden = json.loads((world.root / "package" / "golden.json").read_text())
    version = json.loads((world.root / "package" / "package.json").read_text())["version"]
    live, stores = world.root, [make_store(world, name) for name in ("first", "second", "third")]

    def serve(store: Path) -> None:
        with locked(live):
            switch(live, store=store, why="a test")

    serve(stores[0])
    served = Served(world.root / "package" / "bento", live / CURRENT / "online", world.root / "server.log")
    with served.running() as running, running.client() as client:
        for store in stores:
            serve(store)
            for _ in range(20):  # before and after the server has seen it
                smoke.check_golden(client, golden, version, 1e-5)
        assert not stores[0].exists()  # the switches have dropped it
        shutil.rmtree(stores[1])
        smoke.check_golden(client, golden, version, 1e-5)
        worker = next(one for one in running.processes() if "_bentoml_impl.worker.service" in " ".join(one.cmdline()))
        worker.kill()
        wait_until(lambda: worker.pid not in {one.pid for one in running.processes() if runs(one)})
        wait_until(lambda: answers(client))
        smoke.check_golden(client, golden, version, 1e-5)
    assert not started()


def answers(client: httpx.Client) -> bool:
    with suppress(httpx.TransportError):
        return client.get("/readyz").status_code == 200
    return False


@pytest.mark.slow
def test_a_damaged_bento_does_not_get_ready(world: World) -> None:
    bento = world.root / "damaged"
    shutil.copytree(world.root / "package" / "bento", bento)
    (weights,) = bento.glob("models/ranker/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    served = Served(bento, None, world.root / "server.log")
    with pytest.raises(ValueError, match=r"(?s)cannot start.*sha256"), served.running():  # not: not ready after …
        pass
    assert not started()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_smoke_leaves_no_server(world: World, tmp_path: Path, number: signal.Signals) -> None:
    """The command that production runs, killed once its server has a worker."""
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump({"smoke": asdict(CONFIG), "publish": asdict(PUBLISH)}))
    paths = {"package": world.root / "package", "features": world.features, "repo": world.repo}
    paths |= {"output": tmp_path / "smoke.json", "params": params}
    words = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    log = tmp_path / "smoke.log"
    with log.open("wb") as opened:
        command = subprocess.Popen(
            [sys.executable, "-m", "components", "smoke", *words], cwd=PROJECT, stdout=opened, stderr=opened
        )
    try:
        wait_until(lambda: len(started()) > 3 or command.poll() is not None)  # smoke, guard, supervisor, worker
        assert command.poll() is None, log.read_text()
        family = started()
        command.send_signal(number)
        assert command.wait() in (143, -number)
        wait_until(lambda: not started() and not any(map(runs, family)))
    finally:
        command.kill()
        command.wait()


def wait_until(condition: Callable[[], bool], seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


TREE = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = "import time; print('child', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
time.sleep(600)
"""


def test_what_does_not_stop_is_killed_with_its_children(tmp_path: Path) -> None:
    """A server that ignores SIGTERM, with a child in a session of its own."""
    code = f"import components.release.server as s; s.STOP_SECONDS = 0.5; s.guard([{sys.executable!r}, '-c', {TREE!r}])"
    words = [sys.executable, "-c", f"import sys; {code.replace('s.guard', 'sys.exit(s.guard')})"]
    guard = subprocess.Popen(words, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert guard.stdout and guard.stdout.readline() == b"child\n"
    assert len(started()) == 3
    _, said = guard.communicate()  # closes its standard input
    assert guard.returncode == server.LEFT_RUNNING
    assert said.count(b"still running, killed") == 2
    assert not started()
