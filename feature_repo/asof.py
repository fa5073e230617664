"""Feast's DuckDB offline store with DuckDB's own ASOF join; feature_store.yaml names it.

Feast's join pairs a row with every older feature row of its key and keeps the newest of them, so its time and memory
grow with the length of the past. An ASOF join finds the newest by sorting once. The result is the same, also for ties
and times to live. Two cases that an ASOF join cannot express are left to Feast's join: a cutoff by created timestamp,
and on-demand views.
"""

import ibis
import pandas as pd
from feast.feature_view import FeatureView
from feast.infra.offline_stores.duckdb import (
    DuckDBOfflineStore,
    DuckDBOfflineStoreConfig,
    _read_data_source,
    _write_data_source,
)
from feast.infra.offline_stores.ibis import IbisRetrievalJob
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import infer_event_timestamp_from_entity_df
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RepoConfig
from ibis.expr.types import Table

TIME = "{name}_of_the_view"  # names of a view's keys and times in the join, where both sides have such columns
UTC_TIME = "timestamp('UTC')"


class AsofOfflineStoreConfig(DuckDBOfflineStoreConfig):
    """The settings of Feast's DuckDB store."""

    type: str = "asof.AsofOfflineStore"


class AsofOfflineStore(DuckDBOfflineStore):
    """Feast's DuckDB store with another point-in-time join."""

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
    ) -> RetrievalJob:
        if not isinstance(entity_df, pd.DataFrame):
            raise ValueError(f"entity_df is {entity_df!r}; give a data frame")
        if filter_by_created_timestamp or OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry):
            return DuckDBOfflineStore.get_historical_features(
                config, feature_views, feature_refs, entity_df, registry, project, full_feature_names,
                filter_by_created_timestamp,
            )  # fmt: skip
        time = infer_event_timestamp_from_entity_df(dict(entity_df.dtypes))
        entity_df = entity_df.assign(**{time: pd.to_datetime(entity_df[time], utc=True)})
        table = ibis.memtable(entity_df)
        for view in feature_views:
            table = _newest(table, time, view, feature_refs, full_feature_names, str(config.repo_path))
        return IbisRetrievalJob(
            table,
            [],
            full_feature_names,
            metadata=RetrievalMetadata(
                features=feature_refs,
                keys=[name for name in entity_df.columns if name != time],
                min_event_timestamp=entity_df[time].min(),
                max_event_timestamp=entity_df[time].max(),
            ),
            data_source_writer=_write_data_source,
            staging_location=config.offline_store.staging_location,
            staging_location_endpoint_override=config.offline_store.staging_location_endpoint_override,
            repo_path=str(config.repo_path),
        )


def _newest(table: Table, time: str, view: FeatureView, refs: list[str], prefixed: bool, repo: str) -> Table:
    """The rows, each with the view's newest features that are not later than the row and still alive (`ttl`)."""
    source = view.batch_source
    assert source is not None, "a view that is joined has a source"
    features = _read_data_source(source, repo)
    features = features.rename({new: old for old, new in source.field_mapping.items() if old in features.columns})
    keys = view.projection.join_key_map or {column.name: column.name for column in view.entity_columns}
    wanted = [name for ref in refs if (name := ref.removeprefix(f"{view.projection.name_to_use()}:")) != ref]
    called = {name: f"{view.projection.name_alias or view.name}__{name}" if prefixed else name for name in wanted}
    if source.created_timestamp_column:  # of several rows with one time the last created counts, as in Feast's join
        same = ibis.window(
            group_by=[*keys, source.timestamp_field], order_by=ibis.desc(features[source.created_timestamp_column])
        )
        features = features.mutate(rank=ibis.row_number().over(same)).filter(ibis._.rank == 0)
    known = TIME.format(name=source.timestamp_field)
    right = features.select(
        **{TIME.format(name=own): features[name] for name, own in keys.items()},
        **{known: features[source.timestamp_field].cast(UTC_TIME)},
        **{called[name]: features[name] for name in wanted},
    )
    joined = table.asof_join(
        right,
        on=table[time] >= right[known],
        predicates=[table[own] == right[TIME.format(name=own)] for own in keys.values()],
    )
    if view.ttl:
        alive = joined[known] + ibis.literal(view.ttl) >= joined[time]
        joined = joined.mutate(**{name: alive.ifelse(joined[name], ibis.null()) for name in called.values()})
    return joined.select(*table.columns, *called.values())
