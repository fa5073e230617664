"""Losses against their definition, number by number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.losses import bce, tri_bce
from models.schema import Logits

LABEL_B = torch.tensor([1.0, 0.0, 1.0, 1.0])
RIGHT_B = torch.tensor([2.0, -1.0, 1.0, 3.0], dtype=torch.float64)
WRONG_B = -RIGHT_B


def plain(z_B: Tensor) -> Tensor:
    p_B = torch.sigmoid(z_B)
    return -(LABEL_B * p_B.log() + (1 - LABEL_B) * (1 - p_B).log()).mean()


def test_bce_is_the_mean_log_loss_and_takes_labels_of_another_dtype() -> None:
    torch.testing.assert_close(bce(Logits(RIGHT_B), LABEL_B), plain(RIGHT_B))
    torch.testing.assert_close(bce(Logits(RIGHT_B), LABEL_B.to(torch.int8)), plain(RIGHT_B))


def test_bce_stays_finite_where_the_sigmoid_saturates() -> None:
    assert bce(Logits(torch.tensor([-200.0])), torch.ones(1)).item() == pytest.approx(200.0)


def test_tri_bce_weighs_each_part_by_how_much_worse_it_is() -> None:
    logits = Logits(RIGHT_B / 2, (WRONG_B, RIGHT_B))  # the first part is worse than the whole, the second better
    whole, worse = plain(RIGHT_B / 2), plain(WRONG_B)
    assert plain(RIGHT_B) < whole < worse
    torch.testing.assert_close(tri_bce(logits, LABEL_B), whole + (worse - whole) * worse)


def test_tri_bce_without_parts_is_bce() -> None:
    assert tri_bce(Logits(RIGHT_B), LABEL_B) == bce(Logits(RIGHT_B), LABEL_B)


@pytest.mark.parametrize("detach", [False, True])
def test_detach_decides_whether_gradients_pass_the_weights(detach: bool) -> None:
    whole_B, part_B = (RIGHT_B / 2).requires_grad_(), WRONG_B.clone().requires_grad_()
    tri_bce(Logits(whole_B, (part_B,)), LABEL_B, detach).backward()
    whole, part = plain(whole_B), plain(part_B)
    d_whole = torch.autograd.grad(whole, whole_B, retain_graph=True)[0]
    d_part = torch.autograd.grad(part, part_B, retain_graph=True)[0]
    weight = (part - whole).item()
    # d(whole + w·part) with w = part − whole, held still or not
    torch.testing.assert_close(whole_B.grad, d_whole * (1 if detach else 1 - part.item()))
    torch.testing.assert_close(part_B.grad, d_part * (weight if detach else weight + part.item()))
