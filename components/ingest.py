"""ingest: a source's raw files -> canonical events by day, users, items, modalities.

What cannot be made canonical (a missing column, a wrong type, a time without a zone) stops here, before anything is
written; what is canonical in form but wrong in content (an unknown item, a NaN) is judged by `validate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC as ZONE
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components import sources
from components.artifacts import new_folder, write_json
from components.contracts import EVENTS, ITEMS, ORACLE, USERS, VECTORS, attributes, conform, write_days
from components.sources.simulator import SimulatorConfig

# Names that later steps give to features, or to columns of their joins.
RESERVED = {
    "user_id", "item_id", "row_id", "event_timestamp", "tags", "embedding", "history", "views", "clicks",
    "views_level", "clicks_level", "clicks_start", "clicks_end",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """source     simulator or movielens
    raw        the path the source reads; the simulator has no files, its code is its input
    until      ISO time with a zone: later events are left out, and freshness is measured back from it;
               null takes every event, and then freshness is not judged
    simulator  the world that the simulator draws
    """

    source: str
    raw: str
    until: str | None
    simulator: SimulatorConfig

    def __post_init__(self) -> None:
        sources.check(self.source, self.raw)
        if self.until is not None:
            parse_time("ingest.until", self.until)


def parse_time(name: str, text: str) -> datetime:
    """Raises ValueError where the text is no ISO time or has no zone."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}; write an ISO time such as 2026-01-31T00:00:00+00:00") from None
    if time.tzinfo is None:
        raise ValueError(f"{name} is {text!r}, a time without a zone; add one, e.g. {time.isoformat()}+00:00")
    return time.astimezone(ZONE)


def run(config: IngestConfig, output: Path) -> dict[str, Any]:
    """Write the canonical folder. Returns its facts (`source.json`)."""
    raw = sources.read(config)
    events = conform(raw.events, EVENTS, f"{config.source} events", optional={ORACLE: pa.float32()})
    if events["timestamp"].null_count:
        raise ValueError(f"{config.source} events: {events['timestamp'].null_count} rows have no timestamp; fill them")
    if config.until is not None:
        limit = pa.scalar(parse_time("ingest.until", config.until), EVENTS.field("timestamp").type)
        events = events.filter(pc.less(events["timestamp"], limit))
    if not len(events):
        raise ValueError(f"ingest: no event before until={config.until!r} in {config.raw}; give a later time")
    events = events.take(pc.sort_indices(events["timestamp"]))  # stable: ties stay as the source had them
    users = conform(raw.users, USERS, f"{config.source} users")
    items = conform(raw.items, ITEMS, f"{config.source} items")
    extra = [*attributes(events, EVENTS), *attributes(users, USERS), *attributes(items, ITEMS)]
    if clashing := sorted({name for name in extra if name in RESERVED or extra.count(name) > 1}):
        raise ValueError(
            f"{config.source}: extra columns {clashing} have a name that another table's column or a feature of the "
            "pipeline has; rename them where the data is written"
        )
    with new_folder(output) as folder:
        days = write_days(events, folder / "events")
        pq.write_table(users, folder / "users.parquet")
        pq.write_table(items, folder / "items.parquet")
        (folder / "modalities").mkdir()
        for name, table in raw.modalities.items():
            vectors = conform(table, VECTORS, f"{config.source} modality {name}", extra_columns=False)
            pq.write_table(vectors.sort_by("item_id"), folder / "modalities" / f"{name}.parquet")
        facts = {
            "source": config.source,
            "until": config.until,
            "impressions": len(events),
            "label_rate": float(pc.mean(events["label"]).as_py() or 0),
            "days": len(days),
            "first_day": days[0],
            "last_day": days[-1],
            "users": len(users),
            "items": len(items),
            "vectors": {name: len(table) for name, table in sorted(raw.modalities.items())},
            **raw.facts,
        }
        if ORACLE in events.column_names:
            facts["oracle_auc"] = _auc(events["label"].to_numpy(), events[ORACLE].to_numpy())
        write_json(folder / "source.json", facts)
    return facts


def _auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores)) if 0 < labels.mean() < 1 else None
