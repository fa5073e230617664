"""What the quality benchmarks share: a dataset of a source at any size, one training run, its figures.

The stages are the project's own, run in this process, but for one: Feast's join, which takes minutes a million rows.
DuckDB's ASOF join takes its place; on ML-1M both give the same bytes, so the figures are those of the pipeline.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import duckdb  # noqa: E402 - one thread first, and this project's code
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.compute as pc  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from sklearn.metrics import log_loss, roc_auc_score  # noqa: E402

from components import dataset, embed, features, ingest, train, validate  # noqa: E402
from components.artifacts import file_hash, write_json  # noqa: E402
from components.config import load  # noqa: E402
from components.contracts import EVENTS, ORACLE, Canonical, attributes, read_parquet  # noqa: E402
from components.dataset import Dataset, DatasetConfig, Joined  # noqa: E402
from components.evaluate import group_auc  # noqa: E402
from components.features import FeaturesConfig  # noqa: E402
from components.parallel import Ranks  # noqa: E402
from components.splits import SplitConfig, split_rows  # noqa: E402
from models.layers import Ranker  # noqa: E402
from models.registry import save_encoder  # noqa: E402
from models.schema import Schema, schema_hash  # noqa: E402

PARAMS = ROOT / "params.yaml"


def settings(section: str, config: type[Any], **changes: Any) -> Any:
    """A section of the project's params.yaml with these fields changed."""
    with chdir(ROOT):  # the paths in it are relative to the project's root
        return replace(load(PARAMS, section, config), **changes)


def build(source: ingest.IngestConfig, featured: FeaturesConfig, rows: DatasetConfig, folder: Path) -> Dataset:
    """A source's dataset by ingest, validate, embed, the features' sources, the join, and the dataset's encoding.

    Writes canonical/, report.json, embedding/, features/ and dataset/ below `folder`.
    """
    split, canonical = settings("split", SplitConfig), folder / "canonical"
    with chdir(ROOT):
        ingest.run(source, canonical)
    rules = settings("validate", validate.ValidateConfig)
    validate.run(rules, canonical, folder / "report.json", folder / "docs")
    embedding = embed.run(
        settings("embed", embed.EmbedConfig), split, canonical, folder / "report.json", folder / "embedding"
    )
    sources = folder / "features"
    (sources / "sources").mkdir(parents=True)
    features.write_sources(featured, Canonical(canonical), folder / "embedding", sources)

    data = Canonical(canonical)
    events = data.events()
    joined = join(events, sources / "sources")
    cut = split_rows(events, split)
    encoder, catalog = dataset.fit(
        rows, joined, cut.valid_start, data, item_vectors(data, folder / "embedding"), embedding["version"]
    )
    columns = dataset.encode(rows, joined, encoder, catalog)
    log = torch.from_numpy(read_parquet(sources / "click_log.parquet")["item_id"].to_numpy().copy())
    columns["click_log"] = catalog.rows(log).to(torch.int32)
    made = folder / "dataset"
    save_encoder(made / "encoder", encoder, catalog)
    save_file({name: dataset._narrow(column) for name, column in columns.items()}, made / "rows.safetensors")
    facts = {
        "splits": cut.ranges(len(events)),
        "schema_hash": schema_hash(encoder.schema, encoder.integers, catalog),
        "data_sha256": file_hash(made / "rows.safetensors"),
    }
    write_json(made / "dataset.json", facts)
    return Dataset.open(made)


def join(events: pa.Table, sources: Path) -> Joined:
    """What `components.dataset.join` gives, without Feast: of each view the newest row that was known at the event."""
    rows = pa.table(
        {
            "row": np.arange(len(events)),
            "user_id": events["user_id"],
            "item_id": events["item_id"],
            "us": events["timestamp"].cast(pa.int64()),
        }
    )
    with duckdb.connect() as db:
        db.register("events", rows)
        for view in ("user_clicks", "item_popularity", "user_profile"):
            known = f"create view {view} as select *, epoch_us(event_timestamp) as us from '{sources / view}.parquet'"
            db.execute(known)
        table = db.sql(
            "select clicks_start, clicks_end, views, clicks, profile.* exclude (user_id, event_timestamp, us) "
            "from events "
            "asof left join user_clicks using (user_id, us) "
            "asof left join item_popularity using (item_id, us) "
            "left join user_profile profile on events.user_id = profile.user_id "
            "order by events.row"
        ).to_arrow_table()
    assert len(table) == len(events), "a join must neither drop nor repeat a row"
    fields, origin = {"user_id": events["user_id"]}, {"user_id": "user"}
    for name in table.column_names[4:]:
        fields[name], origin[name] = table[name], "user"
    for name in attributes(events, EVENTS):
        fields[name], origin[name] = events[name], "context"
    for name in ("views", "clicks"):
        counts = table[name].to_numpy(zero_copy_only=False).astype(np.float64)
        level = features.popularity_level(np.nan_to_num(counts))
        fields[f"{name}_level"] = pa.chunked_array([pa.array(level, mask=np.isnan(counts))])
        origin[f"{name}_level"] = "item"
    start, end = (table[name].fill_null(0).to_numpy() for name in ("clicks_start", "clicks_end"))
    return Joined(
        labels=events["label"].to_numpy(),
        oracle=events[ORACLE].to_numpy() if ORACLE in events.column_names else None,
        item_ids=events["item_id"].to_numpy(),
        user_ids=events["user_id"].to_numpy(),
        clicks_start=start,
        clicks_end=end,
        origin=origin,
        fields=fields,
    )


def item_vectors(data: Canonical, embedding: Path) -> np.ndarray:
    """float32 [items, width] in the order of the canonical items, as known at the last event; zero without a vector."""
    table = read_parquet(embedding / "item_embedding.parquet")
    last = pc.max(data.events()["timestamp"])
    table = table.filter(pc.and_(pc.is_valid(table["embedding"]), pc.less_equal(table["created_at"], last)))
    vectors = table["embedding"].combine_chunks()
    found = vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    items = data.items()["item_id"]
    position = pc.index_in(items, value_set=table["item_id"].combine_chunks()).fill_null(-1).to_numpy()
    matrix = np.zeros((len(items), found.shape[1]), dtype=np.float32)
    matrix[position >= 0] = found[position[position >= 0]]
    return matrix


def with_history(data: Dataset, length: int) -> Dataset:
    """The same rows with the newest `length` clicks of each history alone; 0 leaves no history."""
    encoder = replace(data.encoder, schema=replace(data.schema, history_length=length))
    return replace(data, encoder=encoder, columns={**data.columns, "length": data.columns["length"].clamp(max=length)})


def run(
    name: str, make: Callable[[Schema], Ranker], config: train.TrainConfig, data: Dataset
) -> tuple[Ranker, dict[str, Any]]:
    """Train as the stage does, early stopping on the valid days. Returns the best epoch's model and its figures."""
    torch.manual_seed(config.seed)
    model = make(data.schema)
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch):  # the run's state, which is of no use later
        began = time.perf_counter()
        state, pass_seconds = train.fit(config, model, data, "cold", name, Ranks())
        spent = time.perf_counter() - began
    model.load_state_dict(state.best)
    first, last = data.splits["train"]
    return model, {
        "seed": config.seed,
        "rows": last - first,
        "seconds": round(spent, 1),
        "rows_per_second": round((last - first) / pass_seconds),
        "epochs": state.progress.epoch,
        "best_epoch": state.progress.best_epoch,
        **{f"valid_{key}": value for key, value in figures(model, data, "valid").items()},
        **{f"test_{key}": value for key, value in figures(model, data, "test").items()},
    }


def figures(model: Ranker, data: Dataset, split: str) -> dict[str, float]:
    """AUC, group AUC (by user) and logloss of the rows of a split; with an oracle, its AUC and the share reached."""
    rows = data.splits[split]
    part = slice(*rows)
    logits, _ = train.score(model, data, rows)
    scores, labels = torch.sigmoid(logits).numpy().astype(np.float64), data.columns["label"][part].numpy()
    grouped = group_auc(labels, scores, data.columns["user"][part].numpy())
    found = {"auc": roc_auc_score(labels, scores), "group_auc": grouped or 0.5, "logloss": log_loss(labels, scores)}
    if "oracle" in data.columns:
        found["oracle"] = roc_auc_score(labels, data.columns["oracle"][part].numpy())
        found["share"] = (found["auc"] - 0.5) / (found["oracle"] - 0.5)
    return {key: round(float(value), 5) for key, value in found.items()}


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)
