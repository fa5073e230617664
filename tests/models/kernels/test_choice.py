"""Which form of a kernel runs can be asked by name; it is logged once, with the reason if it is not the fast form."""

from __future__ import annotations

import logging
import os
import re
import sys

import pytest
import torch

from models.families import build
from models.kernels import choice, cross_step
from tests.parts import need

BROKEN_COMPILERS = {  # a shell script -> what the warning says
    "echo no such target >&2; exit 3": r"cc failed with exit code 3: no such target",
    "while [ $1 != -o ]; do shift; done; echo nothing >$2": r"the compiled library does not load: .*cross_step\.so",
}


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    """As in a process whose models have needed no kernel yet."""
    monkeypatch.setattr(choice, "_forms", {})
    cross_step.library.cache_clear()
    yield
    cross_step.library.cache_clear()


@pytest.fixture
def trained(make_world, shaken):
    """The loss and the gradients of an SDCNv3 in a training step, with dropout."""

    def train(dtype=torch.float64):
        world = make_world(rows=40, dtype=dtype)
        model = build("sdcnv3", {"dim": 4, "heads": 2}, world.schema).to(dtype)
        shaken(model)
        torch.manual_seed(1)
        loss = model.loss(model(world.batch, world.catalog, world.clicks_C), world.batch.label_B)
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    return train


def test_a_missing_compiler_is_logged_once_and_the_torch_form_gives_the_same_numbers(
    monkeypatch, tmp_path, caplog, trained
):
    monkeypatch.setenv("PATH", str(tmp_path))
    caplog.set_level(logging.INFO, "models")
    found = trained()
    trained()
    assert choice.chosen() == {"cross_step torch.float64": "torch"}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == (
        "cross_step for torch.float64 runs in plain torch, which is slower than c: "
        "there is no C compiler `cc` on PATH; install gcc or clang"
    )
    monkeypatch.undo()
    need("compiler")
    monkeypatch.setattr(choice, "_forms", {})
    wanted = trained()
    assert choice.chosen() == {"cross_step torch.float64": "c"}
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_the_fast_form_is_logged_once_for_each_dtype(caplog, trained):
    need("compiler")
    caplog.set_level(logging.INFO, "models")
    for dtype in (torch.float32, torch.float32, torch.float64):
        trained(dtype)
    assert caplog.messages == ["cross_step for torch.float32 runs in c", "cross_step for torch.float64 runs in c"]


@pytest.mark.parametrize(("script", "reason"), BROKEN_COMPILERS.items(), ids=["fails", "writes no library"])
def test_a_compiler_that_fails_is_logged_with_the_reason(monkeypatch, tmp_path, caplog, script, reason):
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    for _ in range(2):
        assert choice.runs("cross_step", torch.float32) == "torch"
    assert len(caplog.records) == 1
    assert re.search(reason, caplog.text)


def test_a_dtype_without_a_c_form_is_logged(caplog):
    assert choice.runs("cross_step", torch.bfloat16) == "torch"
    assert "it is written for torch.float32 and torch.float64" in caplog.text


@pytest.mark.parametrize(
    ("device", "cuda", "reason"),
    [
        ("mps", "12.8", "the kernel is written for CUDA"),
        ("cuda", None, "the kernel is written for CUDA"),
        ("cuda", "12.8", r"Triton cannot be imported (import of triton halted"),
    ],
)
def test_no_triton_is_logged(monkeypatch, caplog, device, cuda, reason):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setitem(sys.modules, "triton", None)  # so that its import fails
    monkeypatch.delitem(sys.modules, "models.kernels.pointer_pool", raising=False)
    assert choice.runs("pointer_pool", device) == "torch"
    assert f"pointer_pool for {device} runs in plain torch, which is slower than triton: {reason}" in caplog.text
    assert choice.chosen() == {f"pointer_pool {device}": "torch"}


def test_torch_compile_takes_the_answer_for_a_constant():
    torch.compiler.assume_constant_result(choice.runs)

    @torch.compile(fullgraph=True, backend="eager")
    def asked(x):
        return x + 1 if choice.runs("pointer_pool", "mps") == "torch" else x

    assert asked(torch.zeros(1)).item() == 1
    assert choice.chosen() == {"pointer_pool mps": "torch"}


def test_nothing_is_chosen_by_an_import_or_a_build(make_world):
    for family in ("qin", "sdcnv3"):
        build(family, {"dim": 4}, make_world().schema)
    assert choice.chosen() == {}
