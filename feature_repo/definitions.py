"""What Feast knows: two entities, five views, and the two services that training and serving read.

Run Feast in this folder: the paths are relative to it. The stage `features` writes the sources and applies this file.
Every event_timestamp is the moment from which a row may be known, so the point-in-time join needs no further lag.

A time to live is measured from there: to an impression's time in training, to the clock in serving. Give one where
old values mislead, and only to data of today: on last year's, serving would know nothing.
"""

from datetime import timedelta

from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
from feast.types import Array, Float32, Int64

FOREVER = timedelta(0)  # no time to live: the newest row that may be known counts, however old
HISTORY_TTL = FOREVER  # since a user's newest click; one number, so that training and serving forget alike


def _source(name: str) -> FileSource:
    return FileSource(name=name, path=f"../data/features/sources/{name}.parquet", timestamp_field="event_timestamp")


user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.INT64)

user_profile = FeatureView(  # its columns are the source's own user attributes, so Feast infers them
    name="user_profile", entities=[user], ttl=FOREVER, source=_source("user_profile")
)
user_clicks = FeatureView(  # a history as [clicks_start, clicks_end) of the click log: training moves two integers
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
    # `python -m components push` adds the clicks of the day; the next materialization has them from the source
    source=PushSource(name="fresh_history", batch_source=_source("user_history")),
)
item_popularity = FeatureView(  # of the whole days before
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
