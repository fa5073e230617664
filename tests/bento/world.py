"""A tiny world on disk as the stages would have left it: dataset, checkpoint, decision, Feast sources.

users 101 …    user 101 has no gender, user 102's history holds an item that the catalog does not
items 1000 + 7 i    the last one has no popularity row
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from components.common.artifacts import file_hash
from models.checkpoint import Checkpoint, checkpoint_hash, save
from models.encoder import save_encoder
from models.families import build
from models.schema import PADDING, SPECIAL, Catalog, Encoder, Feature, Schema, schema_hash

torch.set_num_threads(1)

USERS, ITEMS, WIDTH, LENGTH = 12, 30, 4, 5
ITEM_IDS = [1000 + 7 * i for i in range(ITEMS)]
USER_IDS = list(range(101, 101 + USERS))
NOT_AN_ITEM = 999
NETWORKS = {
    "qin": {"dim": 4, "attention_dim": 8, "layers": 2, "rows": 2},
    "sdcnv3": {"dim": 4, "deep_layers": 1, "shallow_layers": 1},
}


@dataclass(frozen=True)
class World:
    root: Path
    checkpoint: Checkpoint

    @property
    def decision(self) -> Path:
        return self.root / "decision.json"

    @property
    def evaluations(self) -> Path:
        return self.root / "evaluations"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def dataset(self) -> Path:
        return self.root / "data" / "dataset"

    @property
    def features(self) -> Path:
        return self.root / "data" / "features"

    @property
    def repo(self) -> Path:
        return self.root / "feature_repo"

    @property
    def model(self) -> Path:
        return self.checkpoints / self.checkpoint.family


def make_world(root: Path, family: str = "qin") -> World:
    rng = torch.Generator().manual_seed(3)
    encoder, catalog = _encoder(rng)
    found = schema_hash(encoder.schema, encoder.integers, catalog)
    torch.manual_seed(3)
    model = build(family, NETWORKS[family], encoder.schema)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.2)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
                module.weight[PADDING] = 0
    checkpoint = Checkpoint(
        family=family, network=NETWORKS[family], model=model.eval(), encoder=encoder, catalog=catalog, schema_hash=found
    )
    world = World(root, checkpoint)
    world.repo.mkdir(parents=True)
    for name in ("asof.py", "definitions.py", "feature_store.yaml"):
        shutil.copy(Path(__file__).parents[2] / "feature_repo" / name, world.repo / name)
    save(world.model, checkpoint)
    _write_dataset(world, rng)
    _write_sources(world.features / "sources", rng)
    judged = checkpoint_hash(world.model)
    (world.evaluations / family).mkdir(parents=True)
    (world.evaluations / family / "evaluation.json").write_text(json.dumps(_evaluation(family, judged)))
    decision = {
        "verdict": "approve",
        "model": family,
        "checkpoint_sha256": judged,
        "data_sha256": file_hash(world.dataset / "rows.safetensors"),
        "reasons": [],
        "shipped": {
            "checkpoint_sha256": judged,
            "kind": "judged",
            "train_until": None,
            "reasons": ["it ships as judged"],
        },
    }
    world.decision.write_text(json.dumps(decision))
    return world


def _evaluation(family: str, judged: str) -> dict[str, object]:
    """As `evaluate` writes it, as far as the model card reads it."""
    beside = {"value": 0.0123, "se": 0.002, "low": 0.0084, "high": 0.0162}
    test = {"rows": 10, "label_rate": 0.5, "auc": 0.7123, "group_auc": None, "logloss": 0.4321,
            "calibration_error": 0.0321,
            "intervals": {"auc": [0.6923, 0.7323], "group_auc": None, "logloss": [0.41, 0.45],
                          "calibration_error": [0.02, 0.06]}}  # fmt: skip
    return {
        "model": family, "checkpoint_sha256": judged, "test": test,
        "policy": beside | {"value": 0.3123, "low": 0.3, "high": 0.32, "logged": beside},
        "slices": {"new items": {"rows": 4, "auc": 0.6012}, "history 0": {"rows": 2, "auc": None}},
        "references": [{"version": "v0.0.7", "test": {"auc": 0.7}, "difference": {"auc": beside},
                        "slices": {"new items": beside, "history 0": None}}],
    }  # fmt: skip


def _encoder(rng: torch.Generator) -> tuple[Encoder, Catalog]:
    def impression(name: str, origin: str, vocab: tuple[str, ...] | None, size: int) -> Feature:
        return Feature(
            name=name, owner="impression", kind="categorical", size=size + SPECIAL, origin=origin, vocab=vocab
        )

    schema = Schema(
        features=(
            impression("user_id", "user", None, USERS - 2),  # the last two users were never seen in training
            impression("gender", "user", ("f", "m"), 2),
            impression("device", "context", ("phone", "tv"), 2),
            impression("hour", "context", None, 24),
            impression("views_level", "item", None, 12),
            impression("clicks_level", "item", None, 12),
            Feature(name="item_id", owner="item", kind="categorical", size=ITEMS + SPECIAL),
            Feature(name="tags", owner="item", kind="multi", size=6, length=3, vocab=("a", "b", "c", "d")),
            Feature(name="embedding", owner="item", kind="vector", size=WIDTH),
        ),
        history_length=LENGTH,
        embedding_version="test",
    )
    integers = {
        "user_id": torch.tensor(USER_IDS[:-2]),
        "hour": torch.arange(24),
        "views_level": torch.arange(12),
        "clicks_level": torch.arange(12),
        "item_id": torch.tensor(ITEM_IDS),
    }
    nothing = torch.iinfo(torch.int64).min
    tags = torch.randint(0, 6, (ITEMS + SPECIAL, 3), generator=rng)
    vector = torch.randn(ITEMS + SPECIAL, WIDTH, generator=rng)
    tags[:SPECIAL], vector[:SPECIAL] = 0, 0
    item_ids = torch.tensor([nothing, nothing, *ITEM_IDS])
    return Encoder(schema, integers), Catalog(item_ids, torch.arange(len(item_ids))[:, None], {"tags": tags}, vector)


def _write_dataset(world: World, rng: torch.Generator) -> None:
    rows, clicks = 40, 60
    fields = world.checkpoint.encoder.schema.impression_fields
    end = torch.randint(0, clicks, (rows,), generator=rng)
    columns = {
        **{f"field.{f.name}": torch.zeros(rows, dtype=torch.uint8) for f in fields},
        "item": torch.randint(SPECIAL, ITEMS, (rows,), generator=rng),
        "end": end,
        "length": torch.minimum(torch.randint(0, LENGTH + 1, (rows,), generator=rng), end),
        "label": torch.randint(0, 2, (rows,), generator=rng),
        "user": torch.randint(0, USERS, (rows,), generator=rng),
        "user_ids": torch.tensor(USER_IDS),
        "click_log": torch.randint(SPECIAL, ITEMS, (clicks,), generator=rng).int(),
    }  # fmt: skip
    world.dataset.mkdir(parents=True)
    save_encoder(world.dataset / "encoder", world.checkpoint.encoder, world.checkpoint.catalog)
    save_file(columns, world.dataset / "rows.safetensors")
    facts = {
        "splits": {"train": (0, 20), "valid": (20, 30), "test": (30, 40)},
        "schema_hash": world.checkpoint.schema_hash,
        "data_sha256": file_hash(world.dataset / "rows.safetensors"),
    }
    (world.dataset / "dataset.json").write_text(json.dumps(facts))


def _write_sources(folder: Path, rng: torch.Generator) -> None:
    early, late = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
    time = pa.timestamp("us", tz="UTC")

    def write(name: str, times: list[datetime], **columns: pa.Array) -> None:
        pq.write_table(pa.table({**columns, "event_timestamp": pa.array(times, time)}), folder / f"{name}.parquet")

    def items(count: int) -> list[int]:
        return [ITEM_IDS[i] for i in torch.randint(0, ITEMS, (count,), generator=rng).tolist()]

    folder.mkdir(parents=True)
    histories = [items(1 + i % 9) for i in range(USERS)]  # shorter and longer than LENGTH
    histories[1] = [*items(4), NOT_AN_ITEM, *items(2)]
    users = pa.array(USER_IDS)
    lists = pa.list_(pa.int64())
    write("user_history", [late] * USERS, user_id=users, history=pa.array(histories, lists))
    genders = [None, *("fm"[i % 2] for i in range(USERS - 1))]
    write("user_profile", [early] * USERS, user_id=users, gender=pa.array(genders, pa.string()))
    zeros = pa.array([0] * USERS)
    write("user_clicks", [early] * USERS, user_id=users, clicks_start=zeros, clicks_end=zeros)
    views = torch.randint(1, 500, (2, ITEMS - 1), generator=rng)
    write(  # the older rows last: what counts is the time, not the place
        "item_popularity",
        [late] * (ITEMS - 1) + [early] * (ITEMS - 1),
        item_id=pa.array(ITEM_IDS[:-1] * 2),
        views=pa.array(views.flatten().tolist()),
        clicks=pa.array((views // 5).flatten().tolist()),
    )
    log = pa.table({"user_id": [USER_IDS[0]], "item_id": [ITEM_IDS[0]], "us": [int(early.timestamp() * 1e6)]})
    pq.write_table(log, folder.parent / "click_log.parquet")
    until = {name: late.isoformat() for name in ("until", "log_until", "known_until")}
    (folder.parent / "receipt.json").write_text(json.dumps({**until, "history_length": LENGTH}))
    vectors = pa.array([[0.0] * WIDTH] * ITEMS, pa.list_(pa.float32()))
    write("item_embedding", [early] * ITEMS, item_id=pa.array(ITEM_IDS), embedding=vectors)


def make_store(world: World, name: str = "store") -> Path:
    """A store folder, as production publishes it."""
    from components.features.publish import PublishConfig, fill

    store = world.root / "stores" / name
    fill(PublishConfig(online_sample=5, keep=1), world.features, world.repo, store)
    return store
