"""The cross step in C equals the torch form: values, gradients, running figures, dropout; and is done without."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from models import sdcnv3
from models.kernels import choice, cross_step
from models.schema import Part
from models.sdcnv3 import CrossLayer, SDCNv3Config
from tests.parts import need


@pytest.fixture(autouse=True)
def compiler():
    need("compiler")
    assert choice.runs("cross_step", torch.float32) == "c"


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def layer(heads=1, half=5, dtype=torch.float64, **norms):
    torch.manual_seed(1)
    made = CrossLayer(2 * half, SDCNv3Config(heads=heads, **norms)).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return made


def step(made, inputs, rate, monkeypatch=None):
    """Output, every gradient and the running figures; with `monkeypatch` by the torch form."""
    if monkeypatch is not None:
        monkeypatch.setattr(choice, "runs", lambda kernel, kind: "torch")
    leaves = [None if t is None else t.clone().requires_grad_() for t in inputs]
    made.zero_grad()
    torch.manual_seed(2)
    out = made(*leaves, rate, None)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    if monkeypatch is not None:
        monkeypatch.undo()
    gradients = [t.grad for t in (*leaves, *made.parameters()) if t is not None]
    return [out.detach(), *(g.clone() for g in gradients)], {k: v.clone() for k, v in made.state_dict().items()}


def world(rows, heads, half, deep, dtype=torch.float64):
    torch.manual_seed(0)
    wide = (rows, heads, 2 * half)
    first = None if deep else torch.randn(wide, dtype=dtype)
    return torch.randn(rows, heads, half, dtype=dtype) * 3 + 1, torch.randn(wide, dtype=dtype), first


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize(("rows", "heads", "half"), [(2, 1, 1), (9, 3, 5), (1100, 3, 7), (4096, 1, 56)])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_equals_the_torch_form(monkeypatch, threads, count, rate, deep, rows, heads, half, batch_norm):
    threads(count)
    inputs = world(rows, heads, half, deep)
    made = layer(heads, half, batch_norm=batch_norm)
    begin = {k: v.clone() for k, v in made.state_dict().items()}
    found, state = step(made, inputs, rate)
    made.load_state_dict(begin)
    wanted, wanted_state = step(made, inputs, rate, monkeypatch)
    assert wanted[0].std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, wanted_state, rtol=1e-12, atol=1e-12)
    if batch_norm:
        assert state["batch_norm.num_batches_tracked"] == 1


@pytest.mark.parametrize("deep", [True, False])
def test_equals_the_torch_form_in_float32(monkeypatch, deep):
    inputs = world(512, 1, 56, deep, torch.float32)
    made = layer(half=56, dtype=torch.float32)
    for found, wanted in zip(step(made, inputs, 0.2)[0], step(made, inputs, 0.2, monkeypatch)[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_a_part_of_a_batch_gets_its_rows_of_the_mask():
    p_BHK, x_BHD, _ = world(7, 2, 3, deep=True)
    made = layer(2, 3, batch_norm=False)
    torch.manual_seed(3)
    whole = made(p_BHK, x_BHD, None, 0.5, None)
    assert (whole == 0).any() and (whole != 0).any()
    for start, end in ((0, 3), (3, 7)):
        torch.manual_seed(3)
        part = made(p_BHK[start:end], x_BHD[start:end], None, 0.5, Part(start, 7))
        assert torch.equal(part, whole[start:end])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_no_number_stays_none(which, wrong):
    inputs = [t for t in world(4, 1, 3, deep=True) if t is not None]
    inputs[which][2, 0, 1] = wrong
    out = layer(half=3, batch_norm=False)(*inputs, None, 0.0, None)
    assert not out[2].isfinite().all()
    assert out[[0, 1, 3]].isfinite().all()


def test_bfloat16_products_alone_are_taken_in_float32(make_world, shaken, monkeypatch):
    """Under autocast x_1 is then bfloat16 itself."""
    world = make_world(categoricals=0, sets=0, fields=1, dtype=torch.float32)
    config = SDCNv3Config(dim=4, deep_dropout=0.0, shallow_dropout=0.0, exclude=("field_0",))
    model = sdcnv3.SDCNv3(config, world.schema)
    shaken(model)
    found = []
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(world.batch, world.catalog, world.clicks_C)
        model.loss(logits, world.batch.label_B).backward()
        found.append((logits.logit_B, model.items.project.weight.grad.clone()))
        monkeypatch.setattr(choice, "runs", lambda kernel, kind: "torch")
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-3)


def test_refuses_two_dtypes():
    p_BHK, x_BHD, _ = world(4, 1, 3, deep=True)
    with pytest.raises(TypeError, match=r"torch\.float32.*beside torch\.float64"):
        layer(half=3, dtype=torch.float32, batch_norm=False)(p_BHK, x_BHD, None, 0.0, None)


def test_arrays_that_do_not_lie_in_rows_are_read_as_they_are():
    inputs = [t for t in world(6, 2, 3, deep=False) if t is not None]
    strange = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in inputs]
    made = layer(2, 3, batch_norm=False)
    assert torch.equal(made(*strange, 0.0, None), made(*inputs, 0.0, None))


def test_a_second_derivative_is_refused():
    p_BHK, x_BHD, _ = world(4, 1, 3, deep=True)
    p_BHK.requires_grad_()
    (grad,) = torch.autograd.grad(layer(half=3)(p_BHK, x_BHD, None, 0.0, None).square().sum(), p_BHK, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_frozen_norm_keeps_its_figures(monkeypatch):
    inputs = world(9, 1, 3, deep=True)
    made = layer(half=3)
    made.batch_norm.eval()
    found, state = step(made, inputs, 0.0, None)
    wanted, _ = step(made, inputs, 0.0, monkeypatch)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert state["batch_norm.num_batches_tracked"] == 0


def test_a_forked_process_has_threads_of_its_own(threads):
    threads(2)
    inputs = world(4096, 1, 3, deep=True)
    made = layer(half=3, batch_norm=False)
    made(*inputs, 0.0, None)  # the parent's threads are there
    if (child := os.fork()) == 0:
        made(*inputs, 0.0, None)
        os._exit(0)
    deadline = time.monotonic() + 600
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)


def test_evaluation_and_other_types_do_without(monkeypatch):
    def refuse(*_):
        raise AssertionError("C was called")

    monkeypatch.setattr(cross_step, "_run", refuse)
    p_BHK, x_BHD, _ = world(4, 1, 3, deep=True)
    layer(half=3).eval()(p_BHK, x_BHD, None, 0.0, None)
    layer(half=3, layer_norm=False)(p_BHK, x_BHD, None, 0.0, None)
    layer(half=3, dtype=torch.bfloat16)(p_BHK.bfloat16(), x_BHD.bfloat16(), None, 0.0, None)
    with pytest.raises(AssertionError, match="C was called"):
        layer(half=3)(p_BHK, x_BHD, None, 0.0, None)
