"""features: the tables of Feast's views, `feast apply`, materialization into the online store, and a check of it."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from colorama import colorama_text

from components.common.artifacts import read_json, sync, write_json
from components.common.contracts import Canonical
from components.common.verdict import require
from components.features.store import apply, check_online, feature_store, forget, hastened
from components.features.views import ONLINE_VIEWS, VIEWS, FeaturesConfig, write_sources


def run(
    config: FeaturesConfig, canonical: Path, validation: Path, embedding: Path, repo: Path, output: Path
) -> dict[str, Any]:
    """Write sources/, click_log.parquet, registry.db, online.db and, last, receipt.json.

    Feast's stores are opened by the paths of feature_store.yaml, so they are made in their final place: a folder
    without receipt.json is not whole, and no later step takes it.

    Raises ValueError where the repo reads other sources than `output`'s, or the online store serves other values.
    """
    require(validation, canonical)
    output = output.resolve()  # Feast runs in the repo's folder
    shutil.rmtree(output, ignore_errors=True)
    (output / "sources").mkdir(parents=True)
    log_until, end = write_sources(config, Canonical(canonical), embedding, output)
    with feature_store(repo) as store:
        apply(store, output)
        print(f"materialize {', '.join(ONLINE_VIEWS)} until {end:%Y-%m-%d %H:%M:%S} UTC", flush=True)
        with hastened(store), colorama_text():  # Feast colours what it prints; on no terminal, the codes are dropped
            store.materialize(
                start_date=datetime(1990, 1, 1, tzinfo=UTC), end_date=end, feature_views=list(ONLINE_VIEWS)
            )
        forget(store, output / "sources")
        checked = check_online(store, output / "sources", config.online_sample)
    receipt = {
        "rows": {name: pq.ParquetFile(output / "sources" / f"{name}.parquet").metadata.num_rows for name in VIEWS},
        "clicks": pq.ParquetFile(output / "click_log.parquet").metadata.num_rows,
        "log_until": log_until.isoformat(),
        "materialized_until": end.isoformat(),
        "online_values_compared": checked,
        "embedding_version": read_json(embedding / "fit.json", "embed")["version"],
    }
    sync(output)
    write_json(output / "receipt.json", receipt)
    return receipt


def summary(receipt: dict[str, Any]) -> dict[str, str]:
    rows = ", ".join(f"{name} {rows:,}" for name, rows in receipt["rows"].items())
    return {
        "rows": rows,
        "clicks": f"{receipt['clicks']:,}",
        "online store": f"{receipt['online_values_compared']:,} values read back, all as written",
    }
