"""What is saved comes back bit by bit; what was changed, cut short or mixed up is refused by name."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from models import registry
from models.registry import FAMILIES, PRESETS, TRAINING, Checkpoint
from models.schema import Catalog, Feature, Schema, schema_hash

NETWORKS = {
    "qin": {"dim": 4, "attention_dim": 6, "layers": 2, "rows": 2, "exclude": ["kind_1"]},
    "sdcnv3": {"dim": 4, "heads": 2, "deep_layers": 1},
}
FACTS = {"data_hash": "abc", "best_epoch": 3, "valid_auc": 0.75, "slices": {"köln": [1, None]}}


@pytest.fixture
def checkpoint_of(make_world, shaken):
    def make(family: str = "qin") -> Checkpoint:
        world = make_world(dtype=torch.float32)
        model = registry.build(family, NETWORKS[family], world.schema)
        shaken(model)
        return Checkpoint(
            family=family,
            network=NETWORKS[family],
            model=model,
            encoder=world.encoder,
            catalog=world.catalog,
            schema_hash=world.hash,
            facts=FACTS,
        )

    return make


@pytest.fixture
def saved(checkpoint_of, tmp_path) -> Path:
    registry.save(tmp_path / "saved", checkpoint_of())
    return tmp_path / "saved"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_round_trip(checkpoint_of, make_world, tmp_path, family):
    checkpoint = checkpoint_of(family)
    registry.save(tmp_path, checkpoint)
    random_before = torch.get_rng_state()
    again = registry.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), random_before)
    assert (again.family, again.schema_hash, again.facts) == (family, checkpoint.schema_hash, FACTS)
    assert again.network == asdict(FAMILIES[family].config()) | NETWORKS[family] | {
        "exclude": NETWORKS[family].get("exclude", [])
    }
    assert again.encoder.schema == checkpoint.encoder.schema
    assert again.encoder.encode("field_1", [6, None, 7]).tolist() == [4, 0, 1]
    assert not again.model.training
    world = make_world(dtype=torch.float32)
    inputs = world.batch, world.clicks_C
    wanted = checkpoint.model.eval()(inputs[0], checkpoint.catalog, inputs[1])
    found = again.model(inputs[0], again.catalog, inputs[1])
    assert torch.equal(found.logit_B, wanted.logit_B)
    again.model.loss(found, world.batch.label_B).backward()
    assert all(parameter.grad is not None for parameter in again.model.parameters())


def test_a_loaded_checkpoint_saves_as_the_same_bytes(saved, tmp_path):
    registry.save(tmp_path / "again", registry.load(saved))
    assert registry.checkpoint_hash(tmp_path / "again") == registry.checkpoint_hash(saved)


def test_the_same_inputs_give_the_same_bytes_in_another_process(checkpoint_of, tmp_path):
    registry.save(tmp_path / "here", checkpoint_of("sdcnv3"))
    program = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parents[2])!r}]
from pathlib import Path
from tests.models.conftest import random_world, shake
from models import registry
import torch
world, network = random_world(dtype=torch.float32), {NETWORKS["sdcnv3"]!r}
model = registry.build("sdcnv3", network, world.schema)
shake(model)
registry.save(Path({str(tmp_path / "there")!r}), registry.Checkpoint(
    family="sdcnv3", network=network, model=model, encoder=world.encoder, catalog=world.catalog,
    schema_hash=world.hash, facts={dict(reversed(FACTS.items()))!r}))
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    for name in registry.CHECKPOINT_FILES:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_checkpoint_hash_is_that_of_the_shell_and_sees_every_file(saved):
    files = sorted(saved.iterdir())
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    hashes = {registry.checkpoint_hash(saved)}
    assert hashes == {hashlib.sha256("".join(lines).encode()).hexdigest()}
    for name in registry.CHECKPOINT_FILES:
        (saved / name).write_bytes((saved / name).read_bytes() + b" ")
        hashes.add(registry.checkpoint_hash(saved))
    assert len(hashes) == 5
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no file \['model.safetensors'\]"):
        registry.checkpoint_hash(saved)


def test_encoder_round_trip(make_world, tmp_path):
    world = make_world(dtype=torch.float32)
    registry.save_encoder(tmp_path, world.encoder, world.catalog)
    encoder, catalog, found_hash = registry.load_encoder(tmp_path)
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
    registry.save_encoder(tmp_path, registry.Encoder(schema, {}), catalog)
    encoder, again, found_hash = registry.load_encoder(tmp_path)
    assert encoder.encode("site", ["a", "b"]).tolist() == [2, 1]
    assert again.categorical_IG.shape == (2, 0)
    assert found_hash == schema_hash(schema, {}, catalog)


def test_tensors_that_share_memory_are_saved(make_world, tmp_path):
    world = make_world(dtype=torch.float32)
    ids = world.catalog.item_ids_I[2:]  # a view: the raw values of item_id are the catalog's own ids
    encoder = replace(world.encoder, integers=world.encoder.integers | {"item_id": ids})
    registry.save_encoder(tmp_path, encoder, world.catalog)
    encoder, catalog, _ = registry.load_encoder(tmp_path)
    assert torch.equal(encoder.integers["item_id"], ids)
    assert torch.equal(catalog.item_ids_I, world.catalog.item_ids_I)


@pytest.mark.parametrize("name", registry.CHECKPOINT_FILES)
def test_refuses_a_folder_without_one_of_its_files(saved, name):
    (saved / name).unlink()
    with pytest.raises(ValueError, match=rf"saved: no file \['{name}'\]; give a folder"):
        registry.load(saved)


def test_refuses_tampered_weights(saved):
    weights = bytearray((saved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (saved / "model.safetensors").write_bytes(weights)
    found = hashlib.sha256(weights).hexdigest()
    with pytest.raises(ValueError, match=rf"model\.safetensors: sha256 is {found}, config\.json says .*; restore"):
        registry.load(saved)


def test_refuses_another_schema_hash(saved):
    edit_config(saved, schema_hash="f" * 64)
    with pytest.raises(ValueError, match=rf"config\.json says schema_hash = {'f' * 64}; restore"):
        registry.load(saved)


def test_refuses_another_vocabulary_or_catalog(saved, make_world):
    original = (saved / "schema.json").read_text()
    (saved / "schema.json").write_text(original.replace("test-1", "test-2"))
    with pytest.raises(ValueError, match=r"schema\.json and catalog\.safetensors hash to"):
        registry.load(saved)
    world = make_world(dtype=torch.float32, seed=1)
    registry.save_encoder(saved, world.encoder, world.catalog)
    with pytest.raises(ValueError, match=r"schema\.json and catalog\.safetensors hash to"):
        registry.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {"dim": 4, "width": 5}}, r"config\.json: QINConfig: unknown key \['width'\]; it has \['dim',"),
        ({"network": {"dim": 0}}, r"config\.json: QINConfig\.dim = 0: give a whole number"),
        ({"network": {"exclude": ["colour"]}}, r"config\.json: exclude: no feature \['colour'\]"),
        ({"family": "deepfm"}, r"config\.json: family = 'deepfm': give one of \['qin', 'sdcnv3'\]"),
        ({"comment": ""}, r"config\.json: keys .*'comment'.*, wanted"),
        (
            {"network": NETWORKS["qin"] | {"attention_dim": 7}},
            r"tensor attention\.key\.weight is .*\[6, 12\].*\[7, 12\]",
        ),
        ({"network": NETWORKS["qin"] | {"layers": 3}}, r"tensor layers\.2\.\S+ is missing"),
        ({"network": NETWORKS["qin"] | {"layers": 1}}, r"tensor layers\.1\.\S+ is .* want none"),
    ],
    ids=["unknown key", "bad value", "unknown feature", "family", "top level", "shape", "missing", "too many"],
)
def test_refuses_a_config_that_does_not_fit(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        registry.load(saved)


@pytest.mark.parametrize("name", registry.CHECKPOINT_FILES)
def test_refuses_files_cut_short(saved, name):
    data = (saved / name).read_bytes()
    for size in (0, 5, len(data) // 2):
        (saved / name).write_bytes(data[:size])
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            registry.load(saved)


def test_a_save_cut_short_over_an_older_checkpoint_does_not_load(saved, checkpoint_of, monkeypatch):
    def cut(*_):
        raise OSError("disk full")

    monkeypatch.setattr(registry, "save_encoder", cut)
    with pytest.raises(OSError, match="disk full"):
        registry.save(saved, checkpoint_of("sdcnv3"))
    with pytest.raises(ValueError, match=r"no file \['config\.json'\]"):
        registry.load(saved)


def test_save_refuses_parts_that_do_not_belong_together(checkpoint_of, make_world, tmp_path):
    checkpoint = checkpoint_of()
    with pytest.raises(ValueError, match="schema_hash = 0, but encoder and catalog hash to"):
        registry.save(tmp_path, replace(checkpoint, schema_hash="0"))
    with pytest.raises(ValueError, match=r"tensor \S+ is .* want"):
        registry.save(tmp_path, replace(checkpoint, network=NETWORKS["qin"] | {"dim": 6}))
    for facts in ({"auc": float("nan")}, {"auc": torch.ones(1)}):
        with pytest.raises(ValueError, match=r"facts = .*auc.*; give what JSON can hold"):
            registry.save(tmp_path, replace(checkpoint, facts=facts))
    assert list(tmp_path.iterdir()) == []


def test_build_refuses_unknown_keys_and_families(make_world):
    schema = make_world().schema
    with pytest.raises(ValueError, match=r"SDCNv3Config: unknown key \['rows'\]"):
        registry.build("sdcnv3", {"rows": 4}, schema)
    with pytest.raises(ValueError, match="family = 'QIN'"):
        registry.build("QIN", {}, schema)


def impressions(**sizes: int) -> list[Feature]:
    return [Feature(name=name, owner="impression", kind="categorical", size=size) for name, size in sizes.items()]


# Vocabularies as the authors' logs give them, padding and the unknown value among them
CRITEO = impressions(
    I1=44, I2=99, I3=122, I4=41, I5=220, I6=112, I7=80, I8=69, I9=92, I10=6, I11=27, I12=37, I13=72,
    C1=1_446, C2=554, C3=157_339, C4=117_822, C5=306, C6=18, C7=11_882, C8=630, C9=5, C10=39_530, C11=5_131,
    C12=156_656, C13=3_176, C14=28, C15=11_043, C16=148_913, C17=12, C18=4_560, C19=2_003, C20=5, C21=154_564,
    C22=18, C23=17, C24=53_031, C25=82, C26=40_955,
)  # fmt: skip
PUBLISHED = {
    "qin/microlens": Schema(
        features=(
            *impressions(likes_level=11, views_level=11),
            Feature(name="item_id", owner="item", kind="categorical", size=91_718),
            Feature(name="item_tags", owner="item", kind="multi", size=11_740, length=5),
            Feature(name="item_emb_d128", owner="item", kind="vector", size=128),
        ),
        history_length=64,
    ),
    "sdcnv3/ml-1m": Schema(
        features=(
            *impressions(UserID=6_042, Gender=4, Age=9, Occupation=23),
            Feature(name="MovieID", owner="item", kind="categorical", size=3_643),
            Feature(name="Release", owner="item", kind="categorical", size=10),
            Feature(name="Genres", owner="item", kind="multi", size=20, length=5),
        ),
        history_length=0,
    ),
    "sdcnv3/criteo": Schema(features=tuple(CRITEO), history_length=0),
}


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        ("qin/microlens", {}, 31_244_293),
        ("qin/microlens", {"rows": 3}, 27_045_893),
        ("sdcnv3/ml-1m", {}, 201_728),
        ("sdcnv3/criteo", {}, 15_944_754),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, changes, count):
    with torch.device("meta"):
        model = registry.build(name.split("/")[0], PRESETS[name] | changes, PUBLISHED[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_presets_have_the_published_rates_of_dropout():
    rates = {name: {k: v for k, v in network.items() if "dropout" in k} for name, network in PRESETS.items()}
    assert rates == {
        "qin/microlens": {"dropout": 0.1},
        "sdcnv3/ml-1m": {"deep_dropout": 0.2, "shallow_dropout": 0.1},
        "sdcnv3/criteo": {"deep_dropout": 0.1, "shallow_dropout": 0.2},
    }


def test_presets_are_trained_as_published():
    """Batch, epochs without a better AUC before the end, rate and its cut, L2 of embeddings; the rest is the same."""
    keys = ("batch_size", "patience", "lr", "lr_factor", "embedding_l2")
    assert {name: tuple(settings[key] for key in keys) for name, settings in TRAINING.items()} == {
        "qin/microlens": (8192, 8, 2e-3, 0.5, 2e-4),
        "sdcnv3/ml-1m": (4096, 2, 1e-3, 0.1, 0.01),
        "sdcnv3/criteo": (4096, 2, 1e-3, 0.1, 1e-5),
    }
    rest = {"max_epochs": 100, "lr_patience": 0, "min_lr": 1e-6, "network_l2": 0.0, "ema": 0.0, "clip_norm": 10.0}
    for settings in TRAINING.values():
        assert {key: value for key, value in settings.items() if key not in keys} == rest
