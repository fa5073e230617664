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

from models import checkpoint as module
from models.checkpoint import CHECKPOINT_FILES, Checkpoint, checkpoint_hash, load, save
from models.encoder import save_encoder
from models.families import FAMILIES, build

NETWORKS = {
    "qin": {"dim": 4, "attention_dim": 6, "layers": 2, "rows": 2, "exclude": ["kind_1"]},
    "sdcnv3": {"dim": 4, "heads": 2, "deep_layers": 1},
}
FACTS = {"data_hash": "abc", "best_epoch": 3, "valid_auc": 0.75, "slices": {"köln": [1, None]}}


@pytest.fixture
def checkpoint_of(make_world, shaken):
    def make(family: str = "qin") -> Checkpoint:
        world = make_world(dtype=torch.float32)
        model = build(family, NETWORKS[family], world.schema)
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
    save(tmp_path / "saved", checkpoint_of())
    return tmp_path / "saved"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_round_trip(checkpoint_of, make_world, tmp_path, family):
    checkpoint = checkpoint_of(family)
    save(tmp_path, checkpoint)
    random_before = torch.get_rng_state()
    again = load(tmp_path)
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
    save(tmp_path / "again", load(saved))
    assert checkpoint_hash(tmp_path / "again") == checkpoint_hash(saved)


def test_the_same_inputs_give_the_same_bytes_in_another_process(checkpoint_of, tmp_path):
    save(tmp_path / "here", checkpoint_of("sdcnv3"))
    program = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parents[2])!r}]
from pathlib import Path
from tests.models.conftest import random_world, shake
from models.checkpoint import Checkpoint, save
from models.families import build
import torch
world, network = random_world(dtype=torch.float32), {NETWORKS["sdcnv3"]!r}
model = build("sdcnv3", network, world.schema)
shake(model)
save(Path({str(tmp_path / "there")!r}), Checkpoint(
    family="sdcnv3", network=network, model=model, encoder=world.encoder, catalog=world.catalog,
    schema_hash=world.hash, facts={dict(reversed(FACTS.items()))!r}))
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    for name in CHECKPOINT_FILES:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_checkpoint_hash_is_that_of_the_shell_and_sees_every_file(saved):
    files = sorted(saved.iterdir())
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    hashes = {checkpoint_hash(saved)}
    assert hashes == {hashlib.sha256("".join(lines).encode()).hexdigest()}
    for name in CHECKPOINT_FILES:
        (saved / name).write_bytes((saved / name).read_bytes() + b" ")
        hashes.add(checkpoint_hash(saved))
    assert len(hashes) == 5
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no file \['model.safetensors'\]"):
        checkpoint_hash(saved)


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_refuses_a_folder_without_one_of_its_files(saved, name):
    (saved / name).unlink()
    with pytest.raises(ValueError, match=rf"saved: no file \['{name}'\]; give a folder"):
        load(saved)


def test_refuses_tampered_weights(saved):
    weights = bytearray((saved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (saved / "model.safetensors").write_bytes(weights)
    found = hashlib.sha256(weights).hexdigest()
    with pytest.raises(ValueError, match=rf"model\.safetensors: sha256 is {found}, config\.json says .*; restore"):
        load(saved)


def test_refuses_another_schema_hash(saved):
    edit_config(saved, schema_hash="f" * 64)
    with pytest.raises(ValueError, match=rf"config\.json says schema_hash = {'f' * 64}; restore"):
        load(saved)


def test_refuses_another_vocabulary_or_catalog(saved, make_world):
    original = (saved / "schema.json").read_text()
    (saved / "schema.json").write_text(original.replace("test-1", "test-2"))
    with pytest.raises(ValueError, match=r"schema\.json and catalog\.safetensors hash to"):
        load(saved)
    world = make_world(dtype=torch.float32, seed=1)
    save_encoder(saved, world.encoder, world.catalog)
    with pytest.raises(ValueError, match=r"schema\.json and catalog\.safetensors hash to"):
        load(saved)


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
        load(saved)


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_refuses_files_cut_short(saved, name):
    data = (saved / name).read_bytes()
    for size in (0, 5, len(data) // 2):
        (saved / name).write_bytes(data[:size])
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            load(saved)


def test_a_save_cut_short_over_an_older_checkpoint_does_not_load(saved, checkpoint_of, monkeypatch):
    def cut(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_encoder", cut)
    with pytest.raises(OSError, match="disk full"):
        save(saved, checkpoint_of("sdcnv3"))
    with pytest.raises(ValueError, match=r"no file \['config\.json'\]"):
        load(saved)


def test_save_refuses_parts_that_do_not_belong_together(checkpoint_of, make_world, tmp_path):
    checkpoint = checkpoint_of()
    with pytest.raises(ValueError, match="schema_hash = 0, but encoder and catalog hash to"):
        save(tmp_path, replace(checkpoint, schema_hash="0"))
    with pytest.raises(ValueError, match=r"tensor \S+ is .* want"):
        save(tmp_path, replace(checkpoint, network=NETWORKS["qin"] | {"dim": 6}))
    for facts in ({"auc": float("nan")}, {"auc": torch.ones(1)}):
        with pytest.raises(ValueError, match=r"facts = .*auc.*; give only values that JSON can hold"):
            save(tmp_path, replace(checkpoint, facts=facts))
    assert list(tmp_path.iterdir()) == []
