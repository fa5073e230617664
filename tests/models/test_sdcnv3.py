"""SDCNv3 equals the published network: same weights, same logits, same gradients; and has its number of parameters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from models.kernels import choice
from models.schema import Feature, Schema
from models.sdcnv3 import SDCNv3, SDCNv3Config
from tests.models.conftest import published_form, random_worlds, same_gradients
from tests.models.published import sdcnv3 as published_sdcnv3
from tests.parts import need

SMALL = {"dim": 4, "deep_layers": 2, "shallow_layers": 3}
STILL = {"deep_dropout": 0.0, "shallow_dropout": 0.0}
TABULAR = {"categoricals": 0, "sets": 0, "vector": 0, "history": 0}


def published_loss(deep_B, shallow_B, label_B):
    def log_loss(z_B):
        return (F.softplus(z_B) - label_B.to(z_B.dtype) * z_B).mean()

    if shallow_B is None:
        return log_loss(deep_B)
    whole, deep, shallow = log_loss((deep_B + shallow_B) * 0.5), log_loss(deep_B), log_loss(shallow_B)
    return whole + torch.clamp(deep - whole, min=0) * deep + torch.clamp(shallow - whole, min=0) * shallow


def compare(world, config, shaken, *, training, dtype=torch.float64, tolerance=1e-9, seed=0, differ=True):
    """Logits and every gradient beside the published form's, with the same dropout; the rows' logits `differ`."""
    model = SDCNv3(config, world.schema).to(dtype)
    shaken(model, seed)
    model.train(training)
    deep_B, shallow_B = published_form(published_sdcnv3, model, config, world)
    logits = model(world.batch, world.catalog, world.clicks_C)
    wanted_B = deep_B if shallow_B is None else (deep_B + shallow_B) * 0.5
    assert not differ or wanted_B.std() > 1e-3
    torch.testing.assert_close(logits.logit_B, wanted_B, rtol=tolerance, atol=tolerance)
    if shallow_B is None:
        assert logits.parts_B == ()
    else:
        torch.testing.assert_close(logits.parts_B, (deep_B, shallow_B), rtol=tolerance, atol=tolerance)
    loss, wanted_loss = model.loss(logits, world.batch.label_B), published_loss(deep_B, shallow_B, world.batch.label_B)
    torch.testing.assert_close(loss, wanted_loss, rtol=tolerance, atol=tolerance)
    return model, same_gradients(model, loss, wanted_loss, tolerance)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("norms", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_equals_the_published_form(make_world, shaken, training, heads, norms):
    layer_norm, batch_norm = norms
    config = SDCNv3Config(**SMALL, heads=heads, layer_norm=layer_norm, batch_norm=batch_norm)
    _, gradients = compare(make_world(), config, shaken, training=training)
    assert [name for name, gradient in gradients.items() if gradient.abs().max() == 0] == []


@pytest.mark.parametrize(
    "options",
    [
        {"vector": 0},
        {"sets": 0, "fields": 1},
        {"sets": 2, "categoricals": 3},
        {"history": 0},
        {"clicks": 0},
        {"categoricals": 0},
        TABULAR | {"fields": 1},
        TABULAR | {"fields": 5, "items": 2, "clicks": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("towers", ["both", "deep"])
def test_equals_the_published_form_on_every_kind_of_schema(make_world, shaken, options, towers):
    compare(make_world(**options), SDCNv3Config(**SMALL, **STILL, towers=towers), shaken, training=True)


@pytest.mark.parametrize("path", ["evaluation", "training", "training without C"])
def test_equals_the_published_form_in_float32(make_world, shaken, monkeypatch, path):
    if path == "training without C":
        monkeypatch.setattr(choice, "runs", lambda kernel, kind: "torch")
    elif path == "training":
        need("compiler")
    world, training = make_world(rows=40, dtype=torch.float32), path != "evaluation"
    compare(world, SDCNv3Config(**SMALL), shaken, training=training, dtype=torch.float32, tolerance=1e-5)


def test_equals_the_published_form_where_no_row_has_a_history(make_world, shaken):
    world = make_world()
    world = world._replace(batch=world.batch._replace(start_B=world.batch.end_B))
    assert len(world.clicks_C) and world.batch.end_B.any()
    compare(world, SDCNv3Config(**SMALL, **STILL), shaken, training=True)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    world=random_worlds(fields=1),
    seed=st.integers(0, 99),
    half=st.integers(1, 3),
    heads=st.integers(1, 3),
    deep=st.integers(1, 3),
    shallow=st.integers(1, 3),
    training=st.booleans(),
)
def test_equals_the_published_form_whatever_the_shapes(shaken, world, seed, half, heads, deep, shallow, training):
    config = SDCNv3Config(dim=2 * half, heads=heads, deep_layers=deep, shallow_layers=shallow)
    compare(world, config, shaken, training=training, seed=seed, differ=False)


def test_the_item_tower_sees_each_distinct_item_once(make_world):
    world = make_world(rows=50)
    model = SDCNv3(SDCNv3Config(**SMALL), world.schema).double().eval()
    seen = []
    model.items.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    model(world.batch, world.catalog, world.clicks_C)
    (rows,) = seen
    assert sorted(rows) == sorted(set(world.batch.item_B.tolist()))


def test_starts_as_published(make_world):
    """Biases of the gates are U[0, 1)."""
    model = SDCNv3(SDCNv3Config(dim=64), make_world().schema)
    biases = [gate.bias.detach() for tower in (model.deep, model.shallow) for gate in tower.gates]
    for bias in biases:
        assert bias.min() >= 0 and bias.max() < 1
        assert bias.mean().item() == pytest.approx(0.5, abs=0.06)  # four standard deviations
        assert bias.std().item() == pytest.approx(12**-0.5, abs=0.03)
    assert not torch.equal(biases[0], biases[1])
    assert model.deep.out.bias.abs().max() == 0
    table = model.items.categoricals[0].weight
    assert table[1:].std().item() == pytest.approx(1e-4, rel=0.2)
    assert table[0].abs().max() == 0


@pytest.mark.parametrize("clicks", ["none", "empty ranges"])
def test_an_empty_history_is_a_zero_vector(make_world, clicks):
    world = make_world()
    if clicks == "none":
        clicks_C, batch = world.clicks_C[:0], world.batch
    else:
        clicks_C, batch = world.clicks_C, world.batch._replace(start_B=world.batch.end_B)
    model = SDCNv3(SDCNv3Config(**SMALL), world.schema).double()
    seen = []
    model.deep.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(batch, world.catalog, clicks_C)
    halves = seen[0].unflatten(2, (2, -1, 2))  # [B, H, half, F', d/2]; the last two fields are the history's
    assert halves[..., -2:, :].abs().max() == 0
    assert halves[..., :-2, :].abs().max() > 0


def test_excluded_features_do_not_reach_the_model(make_world, shaken):
    world = make_world(fields=3)
    config = SDCNv3Config(**SMALL, exclude=("field_1", "item_id"))
    model, _ = compare(world, config, shaken, training=False)
    inputs = world.batch, world.catalog, world.clicks_C
    before_B = model(*inputs).logit_B
    world.batch.fields_BF[:, 1] = 1
    world.catalog.categorical_IG[1:, 0] = 1
    assert torch.equal(model(*inputs).logit_B, before_B)
    world.catalog.categorical_IG[1:, 1] = 1
    assert not torch.equal(model(*inputs).logit_B, before_B)


def test_detached_loss_weights_change_gradients_and_not_the_loss(make_world, shaken):
    world = make_world()
    losses, gradients = [], []
    for detach in (False, True):
        model = SDCNv3(SDCNv3Config(**SMALL, detach_loss_weights=detach), world.schema).double().eval()
        shaken(model)
        loss = model.loss(model(world.batch, world.catalog, world.clicks_C), world.batch.label_B)
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.deep.out.weight.grad)
    assert losses[0] == losses[1]
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 3),
        ("dim", 0),
        ("heads", 0),
        ("deep_layers", 0),
        ("shallow_layers", 1.5),
        ("deep_dropout", -0.1),
        ("shallow_dropout", 1),
        ("layer_norm", 1),
        ("batch_norm", "yes"),
        ("towers", "shallow"),
        ("detach_loss_weights", None),
        ("exclude", "item_id"),
    ],
)
def test_config_refuses_by_name_and_value(field, value):
    with pytest.raises(ValueError, match=rf"SDCNv3Config\.{field} = {value!r}: give"):
        SDCNv3Config(**{field: value})


def test_refuses_a_schema_with_nothing_left(make_world):
    world = make_world(**TABULAR, fields=1)
    with pytest.raises(ValueError, match="no feature left"):
        SDCNv3(SDCNv3Config(exclude=("field_0",)), world.schema)


def test_refuses_impression_features_that_are_no_categoricals():
    schema = Schema(features=(Feature(name="words", owner="impression", kind="multi", size=9),), history_length=0)
    with pytest.raises(ValueError, match="\\['words'\\]"):
        SDCNv3(SDCNv3Config(), schema)
