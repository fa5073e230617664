"""An encoder folder comes back bit by bit."""

from __future__ import annotations

from dataclasses import replace

import torch

from models.encoder import load_encoder, save_encoder
from models.schema import Catalog, Encoder, Feature, Schema, schema_hash


def test_encoder_round_trip(make_world, tmp_path):
    world = make_world(dtype=torch.float32)
    save_encoder(tmp_path, world.encoder, world.catalog)
    encoder, catalog, found_hash = load_encoder(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["catalog.safetensors", "schema.json"]
    assert found_hash == world.hash == schema_hash(encoder.schema, encoder.integers, catalog)
    assert encoder.schema == world.schema
    for name, tensor in world.catalog.tensors().items():
        assert torch.equal(catalog.tensors()[name], tensor)
        assert catalog.tensors()[name].dtype == tensor.dtype


def test_encoder_round_trip_of_a_table_without_items(tmp_path):
    schema = Schema(
        features=(Feature(name="site", owner="impression", kind="categorical", size=3, vocab=("a",)),), history_length=0
    )
    catalog = Catalog(torch.full((2,), torch.iinfo(torch.int64).min), torch.zeros(2, 0, dtype=torch.int64), {}, None)
    save_encoder(tmp_path, Encoder(schema, {}), catalog)
    encoder, again, found_hash = load_encoder(tmp_path)
    assert encoder.encode("site", ["a", "b"]).tolist() == [2, 1]
    assert again.categorical_IG.shape == (2, 0)
    assert found_hash == schema_hash(schema, {}, catalog)


def test_tensors_that_share_memory_are_saved(make_world, tmp_path):
    world = make_world(dtype=torch.float32)
    ids = world.catalog.item_ids_I[2:]  # a view: the raw values of item_id are the catalog's own ids
    encoder = replace(world.encoder, integers=world.encoder.integers | {"item_id": ids})
    save_encoder(tmp_path, encoder, world.catalog)
    encoder, catalog, _ = load_encoder(tmp_path)
    assert torch.equal(encoder.integers["item_id"], ids)
    assert torch.equal(catalog.item_ids_I, world.catalog.item_ids_I)
