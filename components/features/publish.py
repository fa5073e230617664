"""publish: the newest features -> a new online store, whole; then what serves is switched to it.

A store is a folder that needs no other: feature_store.yaml, registry.db, online.db (SQLite; Redis has its rows under a
project name of the store's own), click_log.parquet and, last, receipt.json. Nothing is changed where a server reads.

On SQLite a new store begins as a copy of the one that serves, and only the rows that differ are written. In Redis all
rows are written anew, under the new name: nothing there says which rows a push has changed since.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from components.common.artifacts import file_hash, folder_hash, new_folder, read_json, sync, write_json
from components.common.contracts import read_parquet
from components.common.live import DEPLOYED, STORES, Deployment, current, locked, read, switch
from components.features import clicks, online
from components.features.online import drop
from components.features.sqlite_store import ROWS
from components.features.store import apply, check_online, feature_store, read_settings
from components.features.views import ONLINE_VIEWS

SETTINGS, RECEIPT = "feature_store.yaml", "receipt.json"
LEFT_SECONDS = 86_400  # a store that never served is dropped this long after it was made


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


def publish(
    config: PublishConfig, features: Path, repo: Path, live: Path, why: str, who: str | None = None
) -> Deployment | None:
    """Fill a store from what `features` wrote, give it the clicks that were pushed, and switch what serves to it.

    Returns None, and says why, where the store that serves has the same data, or newer ones.
    """
    if reason := useless(features, repo, live):
        print(f"publish: {reason}; nothing is switched", flush=True)
        return None
    day, serves = read_json(features / RECEIPT, "features")["until"][:10], current(live)
    store = live / STORES / f"{day}-{secrets.token_hex(4)}"
    fill(config, features, repo, store, like=serves.store if serves else None)
    clicks.replay(live, store)  # the many, while others may change the live folder
    with locked(live):
        if reason := useless(features, repo, live):  # by now
            print(f"publish: {reason}; nothing is switched", flush=True)
            drop(store)
            return None
        clicks.replay(live, store)  # those that came meanwhile
        deployed = switch(live, store=store, why=why, who=who, keep=config.keep, drop=drop)
        _clear(live)
        return deployed


def useless(features: Path, repo: Path, live: Path) -> str | None:
    """Why the store that serves stays; None where it should not."""
    serves = current(live)
    if serves is None or serves.store is None or not serves.store.is_dir():
        return None
    new, has = (read_json(folder / RECEIPT, "features") for folder in (features, serves.store))
    age, other = ([datetime.fromisoformat(found[name]) for name in ("until", "log_until")] for found in (new, has))
    if age < other:
        return f"the store that serves has newer data, until {has['until']}"
    if has.get("sources_sha256") == sources_hash(features) and has.get("feature_repo_sha256") == repo_hash(repo):
        return "nothing changed"
    return None


def _clear(live: Path) -> None:
    """Drop what killed publications left. A young store may be another's, who is about to switch to it."""
    served = [read(file.parent).store for file in (live / DEPLOYED).glob("*/deployment.json")]
    for store in (live / STORES).iterdir():
        if store not in served and time.time() - store.stat().st_mtime > LEFT_SECONDS:
            drop(store)


def fill(
    config: PublishConfig,
    features: Path,
    repo: Path,
    store: Path,
    users: Iterable[int] | None = None,
    like: Path | None = None,
) -> dict[str, Any]:
    """Make a store folder, whole or not there, and read a sample of it back. Returns its receipt.

    features  the folder that the stage `features` wrote
    repo      the Feast repo: its definitions, and the type of its online store
    store     the new folder. It may be renamed later, and read through a link
    users     where given, the store serves these users alone, and no items
    like      a store that this one may begin as a copy of, if it serves the same features

    Raises ValueError where the online store serves other values than `features` has.
    """
    features, repo, store = features.resolve(), repo.resolve(), store.absolute()
    facts = read_json(features / RECEIPT, "features")
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
    }
    with new_folder(store) as folder, tempfile.TemporaryDirectory(prefix="clickloop-publish-") as scratch:
        sources = features if users is None else only(features, users, Path(scratch))
        (folder / SETTINGS).write_text(yaml.safe_dump(own, sort_keys=False))
        placed = {"project": own["project"], "registry": str(folder / "registry.db"), "online_store": dict(kind)}
        if kind["type"] == "sqlite":
            placed["online_store"]["path"] = str(folder / "online.db")
        with feature_store(repo, **placed) as opened:
            apply(opened, sources)
            views = {
                view: [feature.name for feature in opened.get_feature_view(view).features] for view in ONLINE_VIEWS
            }
            receipt = {
                **facts,
                "project": own["project"],
                "features": views,
                "sources_sha256": sources_hash(features) if users is None else None,
                "feature_repo_sha256": repo_hash(repo),
            }
            try:
                like = like if like and _alike(like, receipt) else None
                receipt["rows_written"] = online.write(opened, sources / "sources", until, folder, like)
                receipt["values_compared"] = check_online(opened, sources / "sources", config.online_sample, until)
            except BaseException:
                online.forget(opened)
                raise
        shutil.copy(features / "click_log.parquet", folder / "click_log.parquet")
        sync(folder)
        write_json(folder / RECEIPT, receipt)
    return receipt


def _alike(store: Path, receipt: dict[str, Any]) -> bool:
    """Whether a new store may begin as a copy of this one."""
    try:
        has = read_json(store / RECEIPT, "publish")
    except ValueError:
        return False
    same = all(has.get(name) == receipt[name] for name in ("project", "features", "feature_repo_sha256"))
    return same and all((store / ROWS / f"{view}.parquet").is_file() for view in ONLINE_VIEWS)


def only(features: Path, users: Iterable[int], folder: Path) -> Path:
    """A copy of the sources in `folder`, with these users' rows and no items. Returns the folder."""
    wanted = pa.array(sorted(set(users)), pa.int64())
    (folder / "sources").mkdir()
    for file in (features / "sources").glob("*.parquet"):
        table = read_parquet(file)
        own = pc.is_in(table["user_id"], value_set=wanted) if "user_id" in table.column_names else []
        pq.write_table(table.filter(own) if len(own) else table.slice(0, 0), folder / "sources" / file.name)
    return folder


def sources_hash(features: Path) -> str:
    """Of all that a store is made of. An hour in which nobody clicked has another receipt, and nothing else."""
    return sha256(
        f"{folder_hash(features / 'sources')} {file_hash(features / 'click_log.parquet')}".encode()
    ).hexdigest()


def repo_hash(repo: Path) -> str:
    """Of the repo's definitions and settings, as in package.json: a store of another one serves other features."""
    with tempfile.TemporaryDirectory() as scratch:
        return folder_hash(shutil.copytree(repo, Path(scratch, "repo"), ignore=shutil.ignore_patterns("__pycache__")))
