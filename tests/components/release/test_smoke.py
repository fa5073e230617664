from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import httpx
import psutil
import pytest

from components.common.config import load
from components.release import package, smoke
from components.release.smoke import Served, SmokeConfig
from tests.bento.world import ITEM_IDS, USER_IDS, World, make_store, make_world

CONFIG = SmokeConfig(tolerance=1e-5, latency_requests=5, latency_candidates=20)


def servers() -> list[psutil.Process]:
    """Every process that serves a Bento of these tests, whatever its session or parent."""
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if "bentoml" in command and "clickloop-smoke-test" in command:
            found.append(process)
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("clickloop-smoke-test"))
    config = package.PackageConfig(name="ctr-ranker", max_candidates=25, golden_requests=10)
    output = world.root / "package"
    package.run(config, world.decision, world.checkpoints, world.dataset, world.features, output)
    return world


def test_the_projects_params_fit() -> None:
    load(Path(__file__).parents[3] / "params.yaml", "smoke", SmokeConfig)


@pytest.mark.parametrize("bad", [{"tolerance": 0.0}, {"latency_requests": 0}, {"latency_candidates": 0}])
def test_config_names_the_key(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SmokeConfig(**{"tolerance": 1e-5, "latency_requests": 1, "latency_candidates": 1, **bad})


def test_nothing_built_is_nothing_served(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text(json.dumps({"built": False, "reason": ["auc"]}))
    found = smoke.run(CONFIG, tmp_path, tmp_path, tmp_path / "smoke.json")
    assert found == {"served": False, "reason": ["auc"]}
    assert json.loads((tmp_path / "smoke.json").read_text()) == found


CASE = {"request": {"user_id": 1, "candidates": [7, 8]}, "scores": [0.25, 0.75], "degraded": []}
GOOD = {"version": "v", "items": [8, 7], "scores": [0.75, 0.25], "degraded": []}


def answering(answer: dict, status: int = 200) -> httpx.Client:
    transport = httpx.MockTransport(lambda request: httpx.Response(status, json=answer))
    return httpx.Client(transport=transport, base_url="http://x")


def test_golden_passes_within_the_tolerance() -> None:
    near = {**GOOD, "scores": [0.750009, 0.25]}
    assert smoke.check_golden(answering(near), [CASE], "v", 1e-5)["max_abs_error"] == pytest.approx(9e-6)


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
    repo = make_store(world)
    output = world.root / "smoke.json"
    found = smoke.run(CONFIG, world.root / "package", repo, output)
    assert json.loads(output.read_text()) == found
    assert found["served"] and found["passed"]
    assert found["golden"]["requests"] == 10
    assert found["golden"]["max_abs_error"] <= 1e-5
    assert set(found["refused"].values()) <= {400, 413}
    assert 0 < found["latency_ms"]["p50"] <= found["latency_ms"]["p99"]
    assert found["memory_mib"] > 100  # torch alone is more: the workers were seen, not just the supervisor
    assert not servers()


@pytest.mark.slow
def test_without_a_store_it_answers_degraded(world: World) -> None:
    golden = json.loads((world.root / "package" / "golden.json").read_text())
    server = Served(world.root / "package" / "bento", None, world.root / "server.log")
    with server.running(), server.client() as client:
        answer = client.post("/rank", json={"user_id": USER_IDS[0], "candidates": ITEM_IDS[:5]}).json()
        assert answer["degraded"] == ["store_unavailable", "missing_context"]
        assert sorted(answer["items"]) == ITEM_IDS[:5]
        open_ports = [c for p in server.processes.values() for c in p.net_connections("tcp") if c.status == "LISTEN"]
        assert {opened.laddr.ip for opened in open_ports} == {"127.0.0.1"}
        with pytest.raises(ValueError, match=r"golden request 0 .*degraded"):  # smoke would not let this pass
            smoke.check_golden(client, golden, answer["version"], 1e-5)
    assert not servers()


@pytest.mark.slow
def test_a_damaged_bento_does_not_get_ready(world: World) -> None:
    bento = world.root / "damaged"
    shutil.copytree(world.root / "package" / "bento", bento)
    (weights,) = bento.glob("models/ranker/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    server = Served(bento, None, world.root / "server.log")
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"(?s)cannot start.*sha256"), server.running():
        pass
    assert time.monotonic() - begin < smoke.READY_SECONDS / 2
    assert not servers()
