"""publish: the newest features -> a new online store, whole; then what serves is switched to it.

A store is a folder that needs no other: feature_store.yaml, registry.db, online.db (SQLite; Redis has its rows under a
project name of the store's own), click_log.parquet and, last, receipt.json. Nothing is changed where a server reads.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from components.common.artifacts import folder_hash, new_folder, read_json, sync, write_json
from components.common.contracts import read_parquet
from components.features import online
from components.features.store import apply, check_online, feature_store, read_settings
from components.features.views import ONLINE_VIEWS

SETTINGS = "feature_store.yaml"


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """online_sample  users and items read back from a new online store and compared
    keep           deployments that stay, with the one that serves; the stores of older ones are dropped
    """

    online_sample: int
    keep: int

    def __post_init__(self) -> None:
        for name in ("online_sample", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def fill(
    config: PublishConfig, features: Path, repo: Path, store: Path, users: Iterable[int] | None = None
) -> dict[str, Any]:
    """Make a store folder, whole or not there, and read a sample of it back. Returns its receipt.

    features  the folder that the stage `features` wrote
    repo      the Feast repo: its definitions, and the type of its online store
    store     the new folder. It may be renamed later, and read through a link
    users     where given, the store serves these users alone, and no items

    Raises ValueError where the online store serves other values than `features` has.
    """
    features, repo, store = features.resolve(), repo.resolve(), store.absolute()
    facts = read_json(features / "receipt.json", "features")
    until = datetime.fromisoformat(facts["known_until"])
    settings = read_settings(repo)
    kind, name = settings["online_store"], settings["project"]
    own = {
        "project": name if kind["type"] == "sqlite" else f"{name}_{secrets.token_hex(6)}",
        "provider": "local",
        "registry": {"path": "registry.db"},
        "offline_store": {"type": "duckdb"},
        "online_store": kind | ({"path": "online.db"} if kind["type"] == "sqlite" else {}),
        "entity_key_serialization_version": settings["entity_key_serialization_version"],
    }  # fmt: skip
    with new_folder(store) as folder, tempfile.TemporaryDirectory(prefix="clickloop-publish-") as scratch:
        sources = features if users is None else only(features, users, Path(scratch))
        (folder / SETTINGS).write_text(yaml.safe_dump(own, sort_keys=False))
        placed = {"project": own["project"], "registry": str(folder / "registry.db"), "online_store": dict(kind)}
        if kind["type"] == "sqlite":
            placed["online_store"]["path"] = str(folder / "online.db")
        with feature_store(repo, **placed) as opened:
            apply(opened, sources)
            online.write(opened, sources / "sources", until)
            compared = check_online(opened, sources / "sources", config.online_sample, until)
            columns = {
                name: [feature.name for feature in opened.get_feature_view(name).features] for name in ONLINE_VIEWS
            }
        shutil.copy(features / "click_log.parquet", folder / "click_log.parquet")
        receipt = {
            **facts,
            "project": own["project"],
            "features": columns,
            "feature_repo_sha256": repo_hash(repo),
            "values_compared": compared,
        }
        sync(folder)
        write_json(folder / "receipt.json", receipt)
    return receipt


def only(features: Path, users: Iterable[int], folder: Path) -> Path:
    """A copy of the sources in `folder`, with these users' rows and no items. Returns the folder."""
    wanted = pa.array(sorted(set(users)), pa.int64())
    (folder / "sources").mkdir()
    for file in (features / "sources").glob("*.parquet"):
        table = read_parquet(file)
        own = pc.is_in(table["user_id"], value_set=wanted) if "user_id" in table.column_names else []
        pq.write_table(table.filter(own) if len(own) else table.slice(0, 0), folder / "sources" / file.name)
    return folder


def repo_hash(repo: Path) -> str:
    """Of the repo's definitions and settings, as in package.json: a store of another one serves other features."""
    with tempfile.TemporaryDirectory() as scratch:
        return folder_hash(shutil.copytree(repo, Path(scratch, "repo"), ignore=shutil.ignore_patterns("__pycache__")))
