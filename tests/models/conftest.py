"""Small random worlds: a schema with its catalog, click log and one batch; and a model beside its published form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from models.layers import Ranker, dropout
from models.schema import SPECIAL, Batch, Catalog, Encoder, Feature, Schema, schema_hash
from tests.models.published import histories


class World(NamedTuple):
    schema: Schema
    encoder: Encoder
    catalog: Catalog
    clicks_C: Tensor
    batch: Batch

    @property
    def hash(self) -> str:
        return schema_hash(self.schema, self.encoder.integers, self.catalog)


def random_world(
    *,
    seed: int = 0,
    rows: int = 9,
    items: int = 12,
    fields: int = 2,
    categoricals: int = 2,
    sets: int = 1,
    vector: int = 5,
    history: int = 4,
    clicks: int = 40,
    dtype: torch.dtype = torch.float64,
) -> World:
    """`items` counts rows 0 and 1. Histories range from empty to longer than L; some sets and vectors are missing."""
    rng = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=rng)

    names = ["item_id", *(f"kind_{i}" for i in range(1, categoricals))][:categoricals]
    features = [
        *(Feature(name=f"field_{i}", owner="impression", kind="categorical", size=4 + i) for i in range(fields)),
        *(Feature(name=name, owner="item", kind="categorical", size=items) for name in names),
        *(Feature(name=f"set_{i}", owner="item", kind="multi", size=6, length=3) for i in range(sets)),
    ]
    if vector:
        features.append(Feature(name="vector", owner="item", kind="vector", size=vector))
    schema = Schema(features=tuple(features), history_length=history, embedding_version="test-1")

    item_ids_I = torch.cat((torch.full((SPECIAL,), torch.iinfo(torch.int64).min), 100 + 7 * torch.arange(items - 2)))
    categorical_IG = integers(items, items, categoricals)
    if categoricals:
        categorical_IG[:, 0] = torch.arange(items)
    vector_IE = None
    if vector:
        vector_IE = torch.randn(items, vector, generator=rng, dtype=dtype)
        vector_IE[3::4] = 0
    catalog = Catalog(
        item_ids_I,
        categorical_IG,
        {f"set_{i}": integers(6, items, 3) * integers(2, items, 3) for i in range(sets)},
        vector_IE,
    )
    for tensor in (catalog.categorical_IG, *catalog.sets.values(), *([] if vector_IE is None else [vector_IE])):
        tensor[0] = 0  # the contract: catalog row 0 is padding

    end_B = integers(clicks + 1, rows)
    length_B = integers(history + 3, rows)
    length_B[::4] = 0
    batch = Batch(
        fields_BF=torch.stack([integers(4 + i, rows) for i in range(fields)], 1)
        if fields
        else torch.zeros(rows, 0, dtype=torch.int64),
        item_B=integers(items, rows, low=1).int(),
        start_B=(end_B - length_B).clamp(min=0).int(),
        end_B=end_B.int(),
        label_B=integers(2, rows).float(),
    )
    raw_values = {f.name: torch.arange(f.size - SPECIAL) * 3 for f in features if f.kind != "vector"}
    return World(schema, Encoder(schema, raw_values), catalog, integers(items, clicks, low=1).int(), batch)


def random_worlds(fields: int) -> st.SearchStrategy[World]:
    """Worlds of all shapes, with at least so many impression fields."""
    return st.builds(
        random_world,
        seed=st.integers(0, 99),
        rows=st.integers(2, 12),
        items=st.integers(3, 20),
        fields=st.integers(fields, 4),
        sets=st.integers(0, 2),
        vector=st.sampled_from([0, 1, 6]),
        history=st.integers(0, 5),
    )


def published_form(form: Callable[..., Any], model: Ranker, config: Any, world: World) -> Any:
    """What the published `form` gives for the model's weights. The model's next forward pass draws the same dropout."""
    state = dict(model.named_parameters()) | {k: v.clone() for k, v in model.named_buffers()}
    hist_BL = histories(world.batch, world.clicks_C, world.schema.history_length)
    replayed = {"training": model.training, "dropout": partial(dropout, part=None)}
    torch.manual_seed(0)
    wanted = form(state, config, world.schema, world.batch, world.catalog, hist_BL, **replayed)
    torch.manual_seed(0)
    return wanted


def same_gradients(model: Ranker, loss: Tensor, wanted_loss: Tensor, tolerance: float) -> dict[str, Tensor]:
    """The loss's gradient of every parameter, by name, once each is known to be that of the wanted loss."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found, wanted = (torch.autograd.grad(of, parameters, materialize_grads=True) for of in (loss, wanted_loss))
    for name, a, b in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
    return dict(zip(names, found, strict=True))


def shake(model: nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Weights and running statistics far from their start, so that every term of the network counts."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype) * scale)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
        for module in model.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.weight[0] = 0


@pytest.fixture(autouse=True, scope="module")
def small_tensors(one_thread: None) -> None:
    """Tensors this small only lose time between threads."""


@pytest.fixture(scope="session")
def make_world() -> Callable[..., World]:
    return random_world


@pytest.fixture(scope="session")
def shaken() -> Callable[..., None]:
    return shake
