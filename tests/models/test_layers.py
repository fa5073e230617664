"""Dropout by shared random numbers: the right rate, unbiased, independent, replayed by seed."""

from __future__ import annotations

import pytest
import torch

from models.layers import dropout, keep_mask
from models.schema import Part


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_drops_at_its_rate_and_keeps_the_mean(rate, dtype):
    torch.manual_seed(0)
    mask = keep_mask(torch.zeros(1000, 1000, dtype=dtype), rate, None).double()
    kept = mask > 0
    assert (~kept).double().mean().item() == pytest.approx(rate, abs=0.002)  # four standard deviations
    scale = mask[kept].unique()
    assert len(scale) == 1
    assert scale.item() == pytest.approx(1 / (1 - rate), rel=1e-2 if dtype == torch.bfloat16 else 1e-3)
    for step in range(1, 5):  # neighbours, which may share a random number
        flat = kept.flatten()
        both = (flat[step:] & flat[:-step]).double().mean().item()
        assert both == pytest.approx((1 - rate) ** 2, abs=0.003)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (5, 7), (2, 3, 5)])
def test_a_seed_replays_the_mask_whatever_the_shape(shape):
    x = torch.randn(shape)
    torch.manual_seed(1)
    first = dropout(x, 0.4, True, None)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.4, True, None), first)
    assert first.shape == x.shape


def test_parts_of_a_batch_get_their_rows_of_the_whole_mask():
    x = torch.zeros(7, 3, 5)
    torch.manual_seed(1)
    whole = keep_mask(x, 0.4, None)
    for start, end in ((0, 7), (0, 3), (3, 7), (6, 7), (4, 4)):
        torch.manual_seed(1)
        assert torch.equal(keep_mask(x[start:end], 0.4, Part(start, 7)), whole[start:end])


def test_does_nothing_in_eval_mode_or_at_rate_zero():
    x = torch.randn(5)
    assert dropout(x, 0.4, False, None) is x
    assert dropout(x, 0.0, True, None) is x


def test_a_rate_beside_one_keeps_an_entry_in_32768():
    torch.manual_seed(0)
    mask = keep_mask(torch.zeros(1000, 1000), 0.99999, None)
    assert 10 < (mask > 0).sum() < 60
    assert mask.max() == 2**15
