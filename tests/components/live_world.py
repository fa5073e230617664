"""A live folder with an online store of the small world, published as production publishes it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bento.store import Reader
from components.common.live import CURRENT, current
from components.features import features, publish
from components.features.publish import PublishConfig
from components.operations import push
from tests.components.small_world import FEATURES, PROJECT, Folders

PUBLISH = PublishConfig(online_sample=20, keep=2)
REDIS = """online_store:
  type: redis
  connection_string: ${CLICKLOOP_REDIS}
  skip_dedup: true
"""


def use_redis(repo: Path) -> None:
    """The lines that feature_store.yaml shows, in place of SQLite's."""
    file = repo / "feature_store.yaml"
    text = file.read_text()
    shown = "".join(line.removeprefix("# ") for line in text.splitlines(keepends=True) if line.startswith("# "))
    assert REDIS in shown
    start, end = text.index("online_store:\n  type: sqlite"), text.index("# In place of")
    file.write_text(text[:start] + REDIS + text[end:])


def make_features(folders: Folders, history_length: int = FEATURES.history_length) -> None:
    config = replace(FEATURES, history_length=history_length)
    features.run(config, folders.canonical, folders.report, folders.embedding, folders.features)


@dataclass(frozen=True)
class Live:
    folders: Folders

    live = property(lambda self: self.folders.root / ".live")
    online = property(lambda self: self.live / CURRENT / "online")

    @property
    def store(self) -> Path:
        deployed = current(self.live)
        assert deployed and deployed.store
        return deployed.store

    @classmethod
    def of(cls, prepared: Folders, root: Path, history_length: int = FEATURES.history_length) -> Live:
        """A live folder and features of its own, over what is prepared; a store serves."""
        made = Folders(root)
        (made.root / "data").mkdir(parents=True)
        shutil.copytree(prepared.repo, made.repo)
        for path in ("data/canonical", "data/report.json", "data/embedding"):
            (made.root / path).symlink_to(prepared.root / path)
        make_features(made, history_length)
        live = cls(made)
        live.publish()
        return live

    def publish(self) -> Path:
        """What `features` wrote, as if it were of a second later than the last time."""
        receipt = self.folders.features / "receipt.json"
        facts = json.loads(receipt.read_text())
        facts["until"] = (datetime.fromisoformat(facts["until"]) + timedelta(seconds=1)).isoformat()
        receipt.write_text(json.dumps(facts))
        with (self.folders.repo / "definitions.py").open("a") as definitions:
            definitions.write("# again\n")  # what is the same is not published twice
        assert publish.publish(PUBLISH, self.folders.features, self.folders.repo, self.live, "a test")
        return self.store

    def reader(self) -> Reader:
        """Reads users as the server does."""
        return Reader(str(self.online))


class Stream:
    """The command that production runs, with an open stream of lines."""

    def __init__(self, live: Path, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.rejected, pipe = folder / push.REJECTED, subprocess.PIPE
        env = os.environ | {"PYTHONPATH": str(PROJECT), "CLICKLOOP_LIVE": str(live)}
        words = [sys.executable, "-m", "components", "push"]
        with (folder / "printed").open("wb") as self.log:
            self.process = subprocess.Popen(words, cwd=folder, stdin=pipe, stderr=self.log, env=env)

    def send(self, *lines: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(b"".join(line + b"\n" for line in lines))
        self.process.stdin.flush()

    def end(self) -> str:
        """What it printed, once its lines have ended."""
        self.process.communicate()
        return Path(self.log.name).read_text()


def line(user: int, item: int, timestamp: str = "2024-04-01T00:00:00+00:00") -> bytes:
    return json.dumps({"user_id": user, "item_id": item, "timestamp": timestamp}).encode()


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("waited for 600 s")
        time.sleep(0.05)
