from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

os.environ["BENTOML_HOME"] = tempfile.mkdtemp(prefix="clickloop-test-bentoml-")  # BentoML makes its home on import
os.environ["BENTOML_DO_NOT_TRACK"] = "True"

from starlette.testclient import TestClient

from bento import ITEM_STATE, MAX_BODY_BYTES, MAX_HISTORY, SERVING, service
from bento.scorer import Scorer
from bento.store import THREADS, OnlineFeatures, feast_reader
from tests.bento.world import ITEM_IDS, NOT_AN_ITEM, make_world

MAX_CANDIDATES = 40
CONTEXT = {"device": "tv", "hour": "7"}
STORED: dict[int, dict[str, Any]] = {
    103: {"history": ITEM_IDS[:3], "gender": "m"},
    104: {"history": None, "gender": "f"},
}
UNKNOWN_USER = {"history": None, "gender": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_world(tmp_path_factory.mktemp("world"))
    folder = world.root / "model"
    shutil.copytree(world.model, folder)
    rows = torch.arange(len(world.checkpoint.catalog))
    save_file({"views_level": rows % 7, "clicks_level": rows % 5}, folder / ITEM_STATE)
    (folder / SERVING).write_text(json.dumps({"version": "qin-0", "max_candidates": MAX_CANDIDATES}))
    return folder


@pytest.fixture(scope="module")
def fetched() -> dict[str, Callable[[int], dict[str, Any]]]:
    return {"by": lambda user: STORED.get(user, UNKNOWN_USER)}


@pytest.fixture(scope="module")
def client(model: Path, fetched: dict[str, Any]) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service.CtrRanker.inner, "model", SimpleNamespace(path=str(model)))
        patch.setattr(service, "feast_reader", lambda repo: lambda user: fetched["by"](user))
        patch.setattr(service, "STORE_TIMEOUT", 5.0)  # on a busy machine a thread may wait for its turn
        with TestClient(service.CtrRanker.to_asgi(), raise_server_exceptions=False) as opened:
            yield opened


@pytest.fixture(scope="module")
def scorer(model: Path) -> Scorer:
    return Scorer(model)


def ask(client: TestClient, **request: Any) -> dict[str, Any]:
    response = client.post("/rank", json={"user_id": 103, "candidates": ITEM_IDS, "context": CONTEXT, **request})
    assert response.status_code == 200, response.text
    return response.json()


def test_ready(client: TestClient) -> None:
    assert client.get("/readyz").status_code == 200


def test_answers_best_first_with_the_stored_user(client: TestClient, scorer: Scorer) -> None:
    scores = scorer.rank(103, ITEM_IDS, ITEM_IDS[:3], {"gender": "m"}, CONTEXT).tolist()
    expected = sorted(range(len(ITEM_IDS)), key=lambda i: -scores[i])
    answer = ask(client)
    assert answer["version"] == "qin-0"
    assert answer["items"] == [ITEM_IDS[i] for i in expected]
    assert answer["scores"] == pytest.approx([scores[i] for i in expected], abs=1e-6)
    assert answer["degraded"] == []
    short = ask(client, k=3)
    assert short["items"] == answer["items"][:3]
    assert len(short["scores"]) == 3


def test_the_requests_history_goes_before_the_stores(client: TestClient, scorer: Scorer) -> None:
    scores = scorer.rank(103, ITEM_IDS, ITEM_IDS[7:9], {"gender": "m"}, CONTEXT)
    answer = ask(client, history=ITEM_IDS[7:9])
    assert answer["scores"] == pytest.approx(scores.sort(descending=True).values.tolist(), abs=1e-6)
    assert answer["items"] != ask(client)["items"]
    assert ask(client, history=[])["scores"] != answer["scores"]


def test_equal_scores_keep_the_requests_order(client: TestClient) -> None:
    unknown = [(17 * i) % 41 for i in range(MAX_CANDIDATES)]
    answer = ask(client, candidates=unknown)
    assert answer["items"] == unknown
    assert answer["degraded"] == ["unknown_items"]


def test_says_what_it_did_without(client: TestClient, scorer: Scorer) -> None:
    assert ask(client, user_id=1)["degraded"] == ["unknown_user"]
    assert ask(client, user_id=104)["degraded"] == []  # known, without a click
    assert ask(client, context={"device": "tv"})["degraded"] == ["missing_context"]
    both = ask(client, user_id=1, candidates=[NOT_AN_ITEM, ITEM_IDS[0]], context=None)
    assert both["degraded"] == ["unknown_user", "unknown_items", "missing_context"]
    expected = scorer.rank(1, ITEM_IDS, [], {}, CONTEXT).sort(descending=True).values
    assert ask(client, user_id=1)["scores"] == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("broken", ["raises", "hangs"])
def test_a_broken_store_degrades_in_time(client: TestClient, fetched: dict[str, Any], broken: str) -> None:
    healthy, release, waited = fetched["by"], threading.Event(), []

    def fail(user: int) -> dict[str, Any]:
        if broken == "raises":
            raise ConnectionError("no store")
        if not release.wait(120):
            waited.append(user)
        return {}

    fetched["by"] = fail
    try:
        answer = ask(client)
        assert not waited  # the answer came while the store still hung
        assert answer["degraded"] == ["store_unavailable"]
        assert len(answer["items"]) == len(ITEM_IDS)
    finally:
        fetched["by"] = healthy
        release.set()
    assert ask(client)["degraded"] == []  # and is used again once it is back


BAD = {
    "unknown field": {"colour": "red"},
    "no candidates": {"candidates": []},
    "too many candidates": {"candidates": [1] * (MAX_CANDIDATES + 1)},
    "a string for an id": {"candidates": ["1"]},
    "a float for an id": {"candidates": [1.0]},
    "a bool for an id": {"user_id": True},
    "beyond 64 bits": {"candidates": [2**63]},
    "far beyond 64 bits": {"candidates": [10**400]},
    "null user": {"user_id": None},
    "too long a history": {"history": [1] * (MAX_HISTORY + 1)},
    "context of a wrong kind": {"context": {"hour": "noon"}},
    "context beyond 64 bits": {"context": {"hour": str(2**64)}},
    "unknown context": {"context": {"weather": "x"}},
    "context value no string": {"context": {"hour": 7}},
    "k of zero": {"k": 0},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_requests_are_the_clients_error(client: TestClient, bad: dict[str, Any]) -> None:
    response = client.post("/rank", json={"user_id": 103, "candidates": ITEM_IDS, **bad})
    assert response.status_code == 400, response.text


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b'{"user_id": 1', "application/json", 400),
        (b"", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"user_id": "\xff"}', "application/json", 400),
        (b'{"\\ud800": 1}', "application/json", 400),
        (b" " * (MAX_BODY_BYTES + 1), "application/json", 413),
        (b"x", "multipart/form-data", 415),
        (b"x", "application/vnd.bentoml+pickle", 415),
    ],
    ids=["cut short", "empty", "a list", "deep", "not UTF-8", "half a surrogate", "too large", "a form", "a pickle"],
)
def test_bad_bodies_are_the_clients_error(client: TestClient, body: bytes, kind: str, status: int) -> None:
    assert client.post("/rank", content=body, headers={"content-type": kind}).status_code == status


def test_the_largest_request_fits_the_body_limit() -> None:
    from bento import MAX_CANDIDATES

    ids = [-(2**63)] * (MAX_CANDIDATES + MAX_HISTORY)
    assert len(json.dumps({"user_id": ids[0], "candidates": ids})) < MAX_BODY_BYTES


def test_a_model_that_scores_nan_does_not_get_ready(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.CtrRanker.inner, "model", SimpleNamespace(path=str(model)))
    monkeypatch.setattr(service, "feast_reader", lambda repo: None)
    monkeypatch.setattr(Scorer, "rank", lambda *_: torch.tensor([0.5, float("nan")]))
    with pytest.raises(ValueError, match="NaN"):
        service.CtrRanker.inner()


def test_hung_reads_hold_no_more_than_their_threads() -> None:
    release, calls, waited = threading.Event(), [], []

    def hang(user: int) -> dict[str, Any]:
        calls.append(user)
        if not release.wait(120):
            waited.append(user)
        return {"history": [1], "gender": "f"}

    online = OnlineFeatures(hang, timeout=0.02)
    try:
        rows = [online.read(user) for user in range(3 * THREADS)]
        assert not waited  # all reads ended while the store still hung
        assert {row.reason for row in rows} == {"store_unavailable"}
    finally:
        release.set()
    online._timeout = 600.0
    assert online.read(1).history == [1]
    assert len(calls) == THREADS + 1  # what timed out did not queue up behind the hung ones


def test_an_endless_body_is_not_read_to_its_end() -> None:
    read, sent = [], []

    async def receive() -> dict[str, Any]:
        read.append(1)
        assert len(read) < 10
        return {"type": "http.request", "body": b" " * (MAX_BODY_BYTES // 4), "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def app(*_: Any) -> None:
        raise AssertionError("the body went through")

    asyncio.run(service.Refuse(app)({"type": "http", "method": "POST", "headers": []}, receive, send))
    assert sent[0]["status"] == 413


def test_a_store_that_cannot_be_opened(tmp_path: Path) -> None:
    for path in (None, "", str(tmp_path)):  # not named; empty; no store
        assert OnlineFeatures(feast_reader(path), timeout=1).read(1).reason == "store_unavailable"
