from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.components.live_world import Live, use_redis
from tests.components.small_world import Folders, hand_tables, prepare
from tests.parts import need


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a Redis of the tests' own."""
    need("redis")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    words = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    server = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL)
    try:
        import redis

        client = redis.Redis(port=port)
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert server.poll() is None, "redis-server ended"
                time.sleep(0.05)
        client.close()
        yield f"localhost:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="session", params=["sqlite", "redis"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folders]:
    """The small world up to its vectors, with SQLite or Redis as its online store."""
    made = prepare(hand_tables(), tmp_path_factory.mktemp(request.param))
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "redis":
            patch.setenv("CLICKLOOP_REDIS", request.getfixturevalue("redis_server"))
            use_redis(made.repo)
        yield made


@pytest.fixture(scope="module")
def served(prepared: Folders, tmp_path_factory: pytest.TempPathFactory) -> Live:
    """A live folder whose store serves."""
    live = Live.of(prepared, tmp_path_factory.mktemp("served") / "world")
    assert (live.store / "online.db").exists() == ("type: sqlite" in (live.store / "feature_store.yaml").read_text())
    return live
