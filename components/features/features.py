"""features: the tables of Feast's views and the click log, from the canonical data and the item vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from components.common.artifacts import new_folder, read_json, write_json
from components.common.contracts import Canonical
from components.common.verdict import require
from components.features.views import VIEWS, FeaturesConfig, write_sources


def run(config: FeaturesConfig, canonical: Path, validation: Path, embedding: Path, output: Path) -> dict[str, Any]:
    """Write sources/, click_log.parquet and receipt.json. `publish` makes an online store of them."""
    require(validation, canonical)
    with new_folder(output) as folder:
        (folder / "sources").mkdir()
        log_until, known_until = write_sources(config, Canonical(canonical), embedding, folder)
        receipt = {
            "rows": {name: pq.ParquetFile(folder / "sources" / f"{name}.parquet").metadata.num_rows for name in VIEWS},
            "clicks": pq.ParquetFile(folder / "click_log.parquet").metadata.num_rows,
            "until": read_json(canonical / "source.json", "ingest")["until"] or log_until.isoformat(),
            "history_length": config.history_length,
            "log_until": log_until.isoformat(),
            "known_until": known_until.isoformat(),
            "embedding_version": read_json(embedding / "fit.json", "embed")["version"],
        }
        write_json(folder / "receipt.json", receipt)
    return receipt


def summary(receipt: dict[str, Any]) -> dict[str, str]:
    rows = ", ".join(f"{name} {rows:,}" for name, rows in receipt["rows"].items())
    return {"rows": rows, "clicks": f"{receipt['clicks']:,}", "newest event": receipt["log_until"]}
