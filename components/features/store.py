"""Feast's stores: opened in the repo's folder, with the repo's definitions, and read back.

Some of this uses private parts of Feast. tests/components/features/test_feast_private.py names and checks them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from components.common.contracts import TIMESTAMP, read_parquet
from components.features.views import ONLINE_VIEWS

if TYPE_CHECKING:
    from feast import FeatureStore


def read_settings(repo: Path) -> dict[str, Any]:
    """feature_store.yaml as it is written: what it takes from the environment is still a name."""
    file = repo / "feature_store.yaml"
    if not file.is_file():
        raise ValueError(f"{file} is not there; name the Feast repo's folder")
    return yaml.safe_load(file.read_text())


@contextlib.contextmanager
def feature_store(repo: Path, **settings: Any) -> Iterator[FeatureStore]:
    """Feast's store, opened in the repo's folder as Feast's own command does: relative paths start there.

    settings  keys of feature_store.yaml that replace the file's
    """
    wanted = read_settings(repo) | settings
    logging.getLogger("feast").setLevel(logging.WARNING)
    os.environ.setdefault("CLICKLOOP_REDIS", "localhost:6379")  # feature_store.yaml may name it
    from feast import FeatureStore, RepoConfig

    warnings.filterwarnings("ignore", category=DeprecationWarning)  # Ibis warns of its own calls, once a query
    with contextlib.chdir(repo):
        sys.path.append(str(Path.cwd()))  # as Feast's own command does: feature_store.yaml names a class of asof.py
        try:
            config = RepoConfig(**yaml.safe_load(os.path.expandvars(yaml.safe_dump(wanted))), repo_path=Path.cwd())
            store = FeatureStore(config=config)
        finally:
            sys.path.pop()
        yield store


@contextlib.contextmanager
def scratch_store(repo: Path, features: Path) -> Iterator[FeatureStore]:
    """The repo's definitions and offline store over what `features` wrote. Registry and online store, which Feast wants
    too, are empty ones that go when the block ends: runs at the same time do not meet."""
    with tempfile.TemporaryDirectory(prefix="clickloop-feast-") as scratch:
        own = {
            "registry": f"{scratch}/registry.db",
            "online_store": {"type": "sqlite", "path": f"{scratch}/online.db"},
        }
        features = features.resolve()  # the block works in the repo's folder
        with feature_store(repo, **own) as store:
            apply(store, features)
            yield store


def apply(store: FeatureStore, features: Path) -> None:
    """Register the repo's definitions, as `feast apply` does, over the sources of `features`, an absolute path.

    Raises ValueError where a source that is defined is not there.
    """
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
        file = features / "sources" / f"{source.name}.parquet"
        if not file.is_file():
            raise ValueError(
                f"feature_repo: source {source.name} is read from {file}, which is not there; run `dvc repro "
                "features`, or name the source in feature_repo/definitions.py as its file is named"
            )
        source.file_options.uri = str(file)
    store.apply([*found.entities, *found.data_sources, *found.feature_views, *found.feature_services])


def newest_rows(sources: Path, view: str, key: str, until: datetime) -> pa.Table:
    """What an online store serves: of each entity (column `key`) the newest row that is known by then; of those with
    equal times, the last."""
    table = read_parquet(sources / f"{view}.parquet")
    table = table.filter(pc.less_equal(table["event_timestamp"], pa.scalar(until, TIMESTAMP)))
    ids = table[key]
    if len(table) == pc.count_distinct(ids).as_py():
        return table
    times = table["event_timestamp"].cast(pa.int64()).to_numpy()
    order = np.lexsort((times, ids.to_numpy()))
    sorted_ids = ids.to_numpy()[order]
    return table.take(pa.array(order[np.append(sorted_ids[1:] != sorted_ids[:-1], True)]))


def check_online(store: FeatureStore, sources: Path, sample: int, until: datetime) -> int:
    """Read a sample of users and items back and compare. Returns the values compared.

    Raises ValueError that names view, feature and entity where the online store serves something else.
    """
    compared = 0
    for view in ONLINE_VIEWS:
        key = store.get_feature_view(view).join_keys[0]
        newest = newest_rows(sources, view, key, until).sort_by(key)
        newest = newest.take(pa.array(np.arange(0, len(newest), max(1, len(newest) // sample))[:sample], pa.int64()))
        if not len(newest):
            continue
        names = [name for name in newest.column_names if name not in (key, "event_timestamp")]
        ids = newest[key].to_pylist()
        served = store.get_online_features(
            features=[f"{view}:{name}" for name in names], entity_rows=[{key: entity} for entity in ids]
        ).to_dict()
        for name in names:
            for entity, offline, online in zip(ids, newest[name].to_pylist(), served[name], strict=True):
                compared += 1
                if not _same(offline, online):
                    raise ValueError(
                        f"online store: {view}:{name} of {key} {entity} is {online!r}, offline {offline!r}; "
                        "nothing was switched; run it again, and report it if it comes again"
                    )
    return compared


def _same(offline: Any, online: Any) -> bool:
    if offline is None or online is None:
        return offline is None and online is None
    return bool(np.array_equal(np.asarray(offline), np.asarray(online, dtype=np.asarray(offline).dtype)))
