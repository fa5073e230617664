"""What the models do otherwise on a GPU gives the scores and gradients of the CPU."""

from __future__ import annotations

import pytest
import torch

from models.families import build
from models.layers import distinct_rows, keep_mask
from models.schema import Batch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["qin", "sdcnv3"])
@pytest.mark.parametrize("rows", [5, 50])  # fewer and more than the catalog
@pytest.mark.parametrize("compiled", [False, True])
def test_gives_the_logits_and_gradients_of_the_cpu(make_world, shaken, family, rows, compiled):
    world = make_world(rows=rows)
    still = {"dropout": 0.0} if family == "qin" else {"deep_dropout": 0.0, "shallow_dropout": 0.0}
    found = []
    for device in ("cpu", "cuda"):
        model = build(family, {"dim": 4, **still}, world.schema).double()
        shaken(model)
        model.to(device)
        forward = torch.compile(model) if compiled and device == "cuda" else model
        batch = Batch(*(column if column is None else column.to(device) for column in world.batch))
        logits = forward(batch, world.catalog.to(device), world.clicks_C.to(device))
        model.loss(logits, batch.label_B).backward()
        found.append((logits.logit_B.detach().cpu(), [p.grad.cpu() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


def test_rows_are_found_without_waiting_for_the_device():
    rows_N = torch.tensor([5, 0, 5, 2], device="cuda")
    for size in (3 + 3, 3):
        rows_U, index_N = distinct_rows(rows_N.clamp(max=size - 1), size)
        assert torch.equal(rows_U[index_N], rows_N.clamp(max=size - 1))


def test_drops_at_its_rate():
    mask = keep_mask(torch.zeros(1000, 1000, device="cuda"), 0.3, None)
    assert (mask == 0).double().mean().item() == pytest.approx(0.3, abs=0.003)
    assert mask.mean().item() == pytest.approx(1.0, abs=0.005)
