"""What Feast knows: two entities, five views, and the services that training and serving read.

Run Feast's commands in this folder: the paths are relative to it. The stage `features` writes the sources and applies
this file. Every event_timestamp is the moment from which a row may be known, so the point-in-time join needs no lag.

A time to live (`ttl`) starts at that moment. In training it ends at an impression's time, in serving at the present
time. Set one if old values mislead, but only for current data: for last year's data, serving would know nothing.
"""

from datetime import timedelta

from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
from feast.types import Array, Float32, Int64

FOREVER = timedelta(0)  # no time to live: the newest row that may be known counts, however old
HISTORY_TTL = FOREVER  # since a user's newest click; one constant, so that training and serving forget at the same age


def _source(name: str) -> FileSource:
    return FileSource(name=name, path=f"../data/features/sources/{name}.parquet", timestamp_field="event_timestamp")


user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.INT64)

user_profile = FeatureView(  # its columns are the source's own user attributes, so Feast infers them
    name="user_profile", entities=[user], ttl=FOREVER, source=_source("user_profile")
)
user_clicks = FeatureView(  # a history is [clicks_start, clicks_end) of the click log, so training joins two integers
    name="user_clicks",
    entities=[user],
    ttl=HISTORY_TTL,
    schema=[Field(name="clicks_start", dtype=Int64), Field(name="clicks_end", dtype=Int64)],
    online=False,
    source=_source("user_clicks"),
)
user_history = FeatureView(  # the same history as item ids, oldest first: what the server reads
    name="user_history",
    entities=[user],
    ttl=HISTORY_TTL,
    schema=[Field(name="history", dtype=Array(Int64))],
    # `python -m components push` adds today's clicks; the next materialization reads them from the source
    source=PushSource(name="fresh_history", batch_source=_source("user_history")),
)
item_popularity = FeatureView(  # of the complete days before
    name="item_popularity",
    entities=[item],
    ttl=FOREVER,
    schema=[Field(name="views", dtype=Int64), Field(name="clicks", dtype=Int64)],
    source=_source("item_popularity"),
)
item_embedding = FeatureView(  # text and image fused
    name="item_embedding",
    entities=[item],
    ttl=FOREVER,
    schema=[Field(name="embedding", dtype=Array(Float32))],
    source=_source("item_embedding"),
)

training = FeatureService(name="training", features=[user_profile, user_clicks, item_popularity])
catalog = FeatureService(name="catalog", features=[item_embedding])
serving = FeatureService(name="serving", features=[user_profile, user_history])
