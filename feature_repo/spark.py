"""Feast's Spark offline store over the same files, for data too large for one machine; feature_store.yaml names it.

Feast's own Spark store differs from the default store in four ways. It takes only Spark sources. It looks up relative
paths in the folder in which its JVM started. It writes time limits as UTC without a zone, and Spark reads them in the
session's zone. And it returns rows through pandas, so an integer that may be missing becomes a float, and times lose
their zone. Here the repo's sources stay files, and rows come back as from the default store.
"""

import warnings
from copy import copy
from pathlib import Path
from typing import Any

import pyarrow as pa
from feast import FileSource
from feast.data_source import DataSource
from feast.feature_view import FeatureView
from feast.infra.offline_stores.contrib.spark_offline_store.spark import (
    SparkOfflineStore,
    SparkOfflineStoreConfig,
    SparkRetrievalJob,
    get_spark_session_or_start_new_with_repoconfig,
)
from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SparkSource
from feast.infra.offline_stores.offline_store import RetrievalJob
from feast.repo_config import RepoConfig

warnings.filterwarnings("ignore", "The spark .* experimental", RuntimeWarning)  # Feast repeats it for every view


class SparkFilesOfflineStoreConfig(SparkOfflineStoreConfig):
    """The settings of Feast's Spark store; `spark_conf` is Spark's own."""

    type: str = "spark.SparkFilesOfflineStore"


class SparkFilesOfflineStore(SparkOfflineStore):
    """Feast's Spark store, reading files for joins and for the newest rows."""

    @staticmethod
    def get_historical_features(
        config: RepoConfig, feature_views: list[FeatureView], *rest: Any, **named: Any
    ) -> RetrievalJob:
        _open(config)
        views = [copy(view) for view in feature_views]  # a copy of a view has a projection of its own
        for view in views:
            view.batch_source = _on_spark(view.batch_source, config)
        return _Job(SparkOfflineStore.get_historical_features(config, views, *rest, **named))

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig, data_source: DataSource, *rest: Any, **named: Any
    ) -> RetrievalJob:
        _open(config)
        source = _on_spark(data_source, config)
        return _Job(SparkOfflineStore.pull_latest_from_table_or_query(config, source, *rest, **named))


class _Job(SparkRetrievalJob):
    """Feast's job, which returns its rows through Arrow."""

    def __init__(self, job: RetrievalJob) -> None:
        vars(self).update(vars(job))

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self.to_spark_df().toArrow()


def _open(config: RepoConfig) -> None:
    """Start the session if there is none, and let it read and return times in UTC."""
    session = get_spark_session_or_start_new_with_repoconfig(config.offline_store)
    session.conf.set("spark.sql.session.timeZone", "UTC")


def _on_spark(source: DataSource | None, config: RepoConfig) -> SparkSource:
    """A file source as Spark's; a relative path is the repo's."""
    assert isinstance(source, FileSource), "the repo's sources are files"
    path = FileSource.get_uri_for_file_path(config.repo_path, source.path)
    return SparkSource(
        name=source.name,
        path=path if "://" in path else f"file://{Path(path).resolve()}",
        file_format="parquet",
        timestamp_field=source.timestamp_field,
        created_timestamp_column=source.created_timestamp_column,
        field_mapping=source.field_mapping,
    )
