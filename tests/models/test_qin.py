"""QIN equals the published network: same weights, same logits, same gradients; and has its number of parameters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from models.layers import distinct_rows
from models.qin import QIN, PointerPool, QINConfig, SparseTargetAttention, gathered_pool
from models.schema import PADDING
from tests.models.conftest import published_form, random_worlds, same_gradients
from tests.models.published import qin as published_qin

SMALL = {"dim": 4, "attention_dim": 6, "layers": 2, "rows": 3}


def compare(world, config, shaken, *, training, tolerance=1e-9, seed=0, differ=True):
    """Logits and every gradient beside the published form's, with the same dropout; the rows' logits `differ`."""
    vector_IE = world.catalog.vector_IE
    model = QIN(config, world.schema).to(torch.float64 if vector_IE is None else vector_IE.dtype)
    shaken(model, seed)
    model.train(training)
    wanted_B = published_form(published_qin, model, config, world)
    logits = model(world.batch, world.catalog, world.clicks_C)
    torch.testing.assert_close(logits.logit_B, wanted_B, rtol=tolerance, atol=tolerance)
    assert not differ or wanted_B.std() > 1e-3
    label_B = world.batch.label_B
    wanted = F.binary_cross_entropy_with_logits(wanted_B, label_B.to(wanted_B.dtype))
    return model, same_gradients(model, model.loss(logits, label_B), wanted, tolerance)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equals_the_published_form(make_world, shaken, training, dropout):
    _, gradients = compare(make_world(), QINConfig(**SMALL, dropout=dropout), shaken, training=training)
    still = [name for name, gradient in gradients.items() if gradient.abs().max() == 0]
    assert still == []


@pytest.mark.parametrize(
    "options",
    [
        {"vector": 0},
        {"sets": 0},
        {"sets": 2, "categoricals": 3},
        {"history": 0},
        {"history": 0, "vector": 0},
        {"fields": 0},
        {"fields": 3, "history": 1},
        {"clicks": 0},
        {"categoricals": 0, "sets": 0},
        {"categoricals": 0, "sets": 0, "vector": 0},
    ],
    ids=str,
)
def test_equals_the_published_form_on_every_kind_of_schema(make_world, shaken, options):
    compare(make_world(**options), QINConfig(**SMALL, dropout=0.0), shaken, training=True)


@pytest.mark.parametrize("training", [False, True])
def test_equals_the_published_form_in_float32(make_world, shaken, training):
    world = make_world(rows=40, dtype=torch.float32)
    compare(world, QINConfig(**SMALL, dropout=0.2), shaken, training=training, tolerance=1e-5)


def test_equals_the_published_form_where_no_row_has_a_history(make_world, shaken):
    world = make_world()
    world = world._replace(batch=world.batch._replace(start_B=world.batch.end_B))
    assert len(world.clicks_C) and world.batch.end_B.any()
    compare(world, QINConfig(**SMALL, dropout=0.0), shaken, training=True)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    world=random_worlds(fields=0),
    seed=st.integers(0, 99),
    dim=st.integers(1, 5),
    quadratic_rows=st.integers(1, 3),
    layers=st.integers(1, 2),
    training=st.booleans(),
)
def test_equals_the_published_form_whatever_the_shapes(shaken, world, seed, dim, quadratic_rows, layers, training):
    config = QINConfig(dim=dim, attention_dim=3, layers=layers, rows=quadratic_rows, dropout=0.2)
    compare(world, config, shaken, training=training, seed=seed, differ=False)


def test_padding_and_what_lies_before_the_history_change_nothing(make_world, shaken):
    world = make_world()
    model = QIN(QINConfig(**SMALL), world.schema).double().eval()
    shaken(model)
    before_B = model(world.batch, world.catalog, world.clicks_C).logit_B
    used = {
        p
        for a, b in zip(world.batch.start_B.tolist(), world.batch.end_B.tolist(), strict=True)
        for p in range(max(a, b - world.schema.history_length), b)
    }
    clicks_C = world.clicks_C.clone()
    unused = [p for p in range(len(clicks_C)) if p not in used]
    assert unused
    clicks_C[unused] = 1 + clicks_C[unused] % 11
    torch.testing.assert_close(model(world.batch, world.catalog, clicks_C).logit_B, before_B, rtol=0, atol=0)
    for row in model.items.categoricals:
        assert row.weight[PADDING].abs().max() == 0


def test_attention_leaves_masked_positions_out_whatever_they_hold():
    torch.manual_seed(0)
    attention = SparseTargetAttention(5, 7).double()
    target_BM, item_UM, index_BL = torch.randn(6, 5).double(), torch.randn(9, 5).double(), torch.randint(9, (6, 4))
    real_BL = torch.tensor([False, True, False, True]).expand(6, 4)
    found_BM = attention(target_BM, item_UM, index_BL, real_BL)
    torch.testing.assert_close(found_BM, attention(target_BM, item_UM, index_BL[:, 1::2], real_BL[:, 1::2]))
    assert not torch.allclose(found_BM, attention(target_BM, item_UM, index_BL, torch.ones_like(real_BL)))


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, 6), items=st.integers(1, 8), width=st.integers(1, 9), length=st.integers(1, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_pooling_by_pointers_equals_pooling_what_was_gathered(rows, items, width, length, seed):
    rng = torch.Generator().manual_seed(seed)
    q_BM, item_UM, grad_BM = (
        torch.randn(n, width, generator=rng, dtype=torch.float64, requires_grad=True) for n in (rows, items, rows)
    )
    index_BL = torch.randint(items, (rows, length), generator=rng)
    real_BL = torch.rand(rows, length, generator=rng) < 0.7
    pooled = [pool(q_BM, item_UM, index_BL, real_BL) for pool in (PointerPool.apply, gathered_pool)]
    torch.testing.assert_close(*pooled, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(found_BM, (q_BM, item_UM), grad_BM) for found_BM in pooled]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_the_item_tower_sees_each_distinct_row_once(make_world):
    world = make_world(rows=50)
    model = QIN(QINConfig(**SMALL), world.schema).double().eval()
    seen = []
    model.items.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(world.batch, world.catalog, world.clicks_C)
    assert len(seen) == 1
    assert len(seen[0]) == len(set(seen[0].tolist())) <= len(world.catalog)


def test_distinct_rows_are_those_of_unique():
    rows_N = torch.tensor([5, 0, 5, 2, 9, 0])
    rows_U, index_N = distinct_rows(rows_N, 10)
    wanted_U, wanted_N = torch.unique(rows_N, return_inverse=True)
    assert torch.equal(rows_U, wanted_U)
    assert torch.equal(index_N, wanted_N)


def test_excluded_features_do_not_reach_the_model(make_world, shaken):
    world = make_world(fields=3)
    config = QINConfig(**SMALL, exclude=("field_0", "kind_1", "vector"), dropout=0.0)
    model, _ = compare(world, config, shaken, training=False)
    inputs = world.batch, world.catalog, world.clicks_C
    before_B = model(*inputs).logit_B
    world.batch.fields_BF[:, 0] = 1
    world.catalog.categorical_IG[:, 1] = 1
    world.catalog.vector_IE.fill_(7)
    assert torch.equal(model(*inputs).logit_B, before_B)
    world.batch.fields_BF[:, 1] = 1
    assert not torch.equal(model(*inputs).logit_B, before_B)


def test_starts_as_published(make_world):
    model = QIN(QINConfig(dim=64), make_world(items=400).schema)
    table = model.items.categoricals[0].weight
    assert table[1:].std().item() == pytest.approx(1e-4, rel=0.05)
    assert table[PADDING].abs().max() == 0
    weight = model.attention.query.weight
    assert weight.std().item() == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.05)
    assert model.layers[0].project.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 0),
        ("dim", 2.0),
        ("attention_dim", -1),
        ("layers", 0),
        ("rows", True),
        ("dropout", 1.0),
        ("dropout", "0.1"),
        ("exclude", ["item_id"]),
    ],
)
def test_config_refuses_by_name_and_value(field, value):
    with pytest.raises(ValueError, match=rf"QINConfig\.{field} = .*{value!r}".replace("[", r"\[").replace("]", r"\]")):
        QINConfig(**{field: value})


def test_refuses_unknown_and_too_many_exclusions(make_world):
    schema = make_world().schema
    with pytest.raises(ValueError, match="no feature \\['colour'\\]"):
        QIN(QINConfig(exclude=("colour",)), schema)
    with pytest.raises(ValueError, match=r"QIN: no feature left \(exclude = \('field_0', "):
        QIN(QINConfig(exclude=("field_0", "field_1", "item_id", "kind_1", "set_0", "vector")), schema)
