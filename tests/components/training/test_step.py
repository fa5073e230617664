"""Where the rows lie, and how exactly a step computes: streams, bfloat16, torch.compile, GPUs."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from components.common.dataset import Dataset
from components.training import loop as loop_module
from components.training.step import Step
from models.checkpoint import load as load_checkpoint
from models.families import FAMILIES
from tests.components.training.conftest import Run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_rows_that_stream_give_the_same_bytes(run, config, monkeypatch, model) -> None:
    asked = config(model, max_epochs=2)
    resident = run(asked, "resident", model)
    threads, gather = set(), Dataset._gather

    def noted(data: Dataset, *arguments: Any) -> Any:
        threads.add(threading.current_thread())
        return gather(data, *arguments)

    monkeypatch.setattr(Dataset, "_gather", noted)
    assert run(asked, "again", model) == resident
    assert threads == {threading.main_thread()}
    threads.clear()
    monkeypatch.setattr(loop_module, "fits", lambda *_: False)
    assert run(asked, "streamed", model) == resident
    assert threads and threading.main_thread() not in threads


def test_rows_lie_on_a_gpu_where_they_take_half_of_what_is_free(monkeypatch) -> None:
    assert loop_module.fits(10**18, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (200, 1000))
    assert loop_module.fits(100, torch.device("cuda"))
    assert not loop_module.fits(101, torch.device("cuda"))


def test_row_bytes_are_those_of_what_a_batch_reads(dataset) -> None:
    data = Dataset.open(dataset)
    assert data.row_bytes == 2600 * (3 * 4 + 4 + 4 + 1 + 1)


def valid_auc(run: Run, name: str) -> float:
    return json.loads((run.root / name / "metrics.json").read_text())["valid_auc"]


@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_bf16_ranks_as_well_as_fp32_and_keeps_fp32_weights(run, config, model) -> None:
    exact = run(config(model), "exact", model)
    rough = run(config(model, precision="bf16"), "rough", model)
    assert rough["model.safetensors"] != exact["model.safetensors"]
    assert valid_auc(run, "rough") == pytest.approx(valid_auc(run, "exact"), abs=0.02)
    saved = load_checkpoint(run.root / "rough" / model)
    assert {tensor.dtype for tensor in saved.model.parameters()} == {torch.float32}
    run.killed_after(20, config(model, precision="bf16"), "cut", model)
    assert run(config(model, precision="bf16"), "cut", model) == rough


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_a_compiled_model_learns_the_same(run, config, dropless, model) -> None:
    """Without dropout, whose masks torch.compile draws in its own way."""
    asked = config(model, network=dropless[model], max_epochs=2, batch_size=520)
    run(asked, "eager", model)
    run(replace(asked, compile=True), "compiled", model)
    assert any((run.root / ".scratch/inductor").iterdir())
    for eager, compiled in zip(run.history("eager"), run.history("compiled"), strict=True):
        assert compiled == pytest.approx(eager, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_a_gpu_ranks_as_well_however_the_rows_come(run, config, dropless, monkeypatch, model) -> None:
    """Without dropout: other masks alone move these AUCs by 0.05."""
    asked = config(model, network=dropless[model])
    run(asked, "cpu", model)
    for name, changes in {"fp32": {}, "bf16": {"precision": "bf16"}, "compiled": {"compile": True}}.items():
        run(replace(asked, device="cuda", **changes), name, model)
        assert valid_auc(run, name) == pytest.approx(valid_auc(run, "cpu"), abs=0.02)
    monkeypatch.setattr(loop_module, "fits", lambda *_: False)
    run(replace(asked, device="cuda"), "streamed", model)
    assert valid_auc(run, "streamed") == pytest.approx(valid_auc(run, "fp32"), abs=0.01)


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on_where_it_was_killed(run, config, dropless, monkeypatch, capsys) -> None:
    """The optimizer that is loaded has another tensor for its rate: the graph is recorded after that."""
    asked, real, calls = config(network=dropless["qin"], device="cuda", compile=True), Step.__call__, 0

    def killed(step: Step, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise KeyboardInterrupt
        return real(step, *arguments)

    run(asked, "whole")
    with monkeypatch.context() as patched:
        patched.setattr(Step, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            run(asked, "cut")
    run(asked, "cut")
    assert "continues after epoch" in capsys.readouterr().out
    whole, cut = run.history("whole"), run.history("cut")
    assert [line["lr"] for line in cut] == [line["lr"] for line in whole]
    assert valid_auc(run, "cut") == pytest.approx(valid_auc(run, "whole"), abs=0.02)
