"""Feast's stores: opened in the repo's folder, applied, filled, and read back.

Some of this uses private parts of Feast. tests/components/features/test_feast_private.py names and checks them.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.common.contracts import read_parquet
from components.features.views import ONLINE_VIEWS

if TYPE_CHECKING:
    from feast import FeatureStore

TREES_KIB = 512 * 1024  # of the online store: two million users' keys
REDIS_BATCH = 10_000  # keys


@contextlib.contextmanager
def feature_store(repo: Path) -> Iterator[FeatureStore]:
    """Feast's store, opened in the repo's folder as Feast's own command does: its paths are relative to it."""
    if not (repo / "feature_store.yaml").is_file():
        raise ValueError(f"{repo}/feature_store.yaml is not there; name the Feast repo's folder")
    logging.getLogger("feast").setLevel(logging.WARNING)
    os.environ.setdefault("CLICKLOOP_REDIS", "localhost:6379")  # feature_store.yaml may name it
    from feast import FeatureStore

    warnings.filterwarnings("ignore", category=DeprecationWarning)  # Ibis warns of its own calls, once a query
    with contextlib.chdir(repo):
        sys.path.append(str(Path.cwd()))  # as Feast's own command does: feature_store.yaml names a class of asof.py
        try:
            store = FeatureStore(repo_path=".")
        finally:
            sys.path.pop()
        yield store


def apply(store: FeatureStore, output: Path) -> None:
    """Register the repo's definitions, as `feast apply` does. Raises ValueError where a source is not `output`'s."""
    from feast import FileSource, PushSource
    from feast.repo_operations import parse_repo

    sys.path.insert(0, str(Path.cwd()))
    known = set(sys.modules)
    try:
        found = parse_repo(Path.cwd())
    finally:
        sys.path.pop(0)
        for name in set(sys.modules) - known:  # a second store in this process reads its own definitions anew
            if str(getattr(sys.modules[name], "__file__", "")).startswith(f"{Path.cwd()}/"):
                del sys.modules[name]
    for source in found.data_sources:
        if isinstance(source, PushSource):  # Feast lists the file behind it too
            continue
        assert isinstance(source, FileSource), "the repo's sources are parquet files"
        wanted = (output / "sources" / f"{source.name}.parquet").resolve()
        if Path(source.path).resolve() != wanted:
            raise ValueError(
                f"feature_repo: source {source.name} is read from {source.path}, not from {wanted}; "
                "write to the folder that feature_repo/definitions.py reads, or mend the path there"
            )
    store.apply([*found.entities, *found.data_sources, *found.feature_views, *found.feature_services])


@contextlib.contextmanager
def hastened(store: FeatureStore) -> Iterator[None]:
    """For a store that is written at once. Feast makes millions of small objects, none of them in a cycle: looking for
    cycles takes a third of its time. In SQLite entities come in no order, so its trees stay in memory, and nothing is
    made to last before the receipt; any other online store is left as it is."""
    from feast.infra.online_stores.sqlite import SqliteOnlineStore

    online = store._get_provider().online_store
    if isinstance(online, SqliteOnlineStore):
        db = online._get_conn(store.config)
        for setting in (f"cache_size = -{TREES_KIB}", "journal_mode = memory", "synchronous = off"):
            db.execute(f"pragma {setting}")
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def forget(store: FeatureStore, sources: Path) -> None:
    """SQLite's file is made anew, Redis is written over: remove what its views still have of entities that left their
    sources. What was pushed to those goes too, as in SQLite; `push` gives a new store what its log does not have."""
    if store.config.online_store.type != "redis":
        return
    from feast.infra.online_stores.helpers import _mmh3, _redis_key_prefix

    online: Any = store._get_provider().online_store
    client = online._get_client(store.config.online_store)
    project = store.project.encode()
    for view in map(store.get_feature_view, ONLINE_VIEWS):
        known = read_parquet(sources / f"{view.name}.parquet")[view.join_keys[0]].to_numpy()
        # A key is what names the entity, the id's type and length (4 bytes each), the id, and the project.
        prefix = _redis_key_prefix(view.join_keys)
        found = client.scan_iter(prefix + b"*" + project, count=REDIS_BATCH)
        keys = np.array([key for key in found if len(key) == len(prefix) + 16 + len(project)], dtype=np.bytes_)
        ids = np.frombuffer(b"".join(key[len(prefix) + 8 :][:8] for key in keys.tolist()), "<i8")
        fields = [f"_ts:{view.name}", *(_mmh3(f"{view.name}:{feature.name}") for feature in view.features)]
        gone = keys[~np.isin(ids, known)].tolist()
        for start in range(0, len(gone), REDIS_BATCH):
            with client.pipeline(transaction=False) as pipe:
                for key in gone[start : start + REDIS_BATCH]:
                    pipe.hdel(key, *fields)
                pipe.execute()


def check_online(store: FeatureStore, sources: Path, sample: int) -> int:
    """Read a sample of users and items back and compare. Returns the values compared.

    Raises ValueError that names view, feature and entity where the online store serves something else.
    """
    compared = 0
    for view in ONLINE_VIEWS:
        table = read_parquet(sources / f"{view}.parquet")
        if not len(table):
            continue
        key = table.column_names[0]
        newest = table.to_pandas().sort_values("event_timestamp", kind="stable").groupby(key).tail(1)
        newest = newest.sort_values(key).iloc[:: max(1, len(newest) // sample)].head(sample)
        names = [name for name in newest.columns if name not in (key, "event_timestamp")]
        served = store.get_online_features(
            features=[f"{view}:{name}" for name in names], entity_rows=[{key: int(v)} for v in newest[key]]
        ).to_dict()
        for name in names:
            for entity, offline, online in zip(newest[key], newest[name], served[name], strict=True):
                compared += 1
                if not _same(offline, online):
                    raise ValueError(
                        f"online store: {view}:{name} of {key} {entity} is {online!r}, offline {offline!r}; "
                        "delete the store and run `dvc repro --force features`"
                    )
    return compared


def _same(offline: Any, online: Any) -> bool:
    if offline is None or online is None:
        return offline is None and online is None
    return bool(np.array_equal(np.asarray(offline), np.asarray(online, dtype=np.asarray(offline).dtype)))
