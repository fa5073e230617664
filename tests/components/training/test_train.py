"""Training learns by the published recipe, and refuses what it cannot train on."""

from __future__ import annotations

import hashlib
import json
import shutil
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import models
from components.common.dataset import Dataset
from components.common.scoring import score
from components.training import loop as loop_module
from components.training.config import TrainConfig
from components.training.loop import Loop
from components.training.state import Progress, State
from components.training.step import Step, adam
from models.checkpoint import load as load_checkpoint
from models.families import FAMILIES
from models.losses import bce, tri_bce
from models.schema import Batch, Logits, Part
from tests.models import published

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_learns_and_keeps_its_best_epoch(run, config, dataset, model) -> None:
    asked = config(model, max_epochs=12, patience=2, lr_patience=0)
    run(asked, "out", model)
    history = run.history("out")
    aucs = [row["valid_auc"] for row in history]
    best = int(np.argmax([row["valid_auc"] - row["valid_logloss"] for row in history])) + 1
    found = json.loads((run.root / "out/metrics.json").read_text())
    data = Dataset.open(dataset)
    start, end = data.splits["valid"]
    labels, ceiling = data.columns["label"][start:end].numpy(), data.columns["oracle"][start:end].numpy()
    assert max(aucs) > roc_auc_score(labels, ceiling) - 0.1
    assert max(aucs) > 0.7
    assert history[0]["train_loss"] > history[best - 1]["train_loss"]
    assert (found["best_epoch"], found["epochs"], found["valid_auc"]) == (best, len(history), aucs[best - 1])
    assert [row["epoch"] for row in history] == list(range(1, len(history) + 1))
    assert len(history) == 12 or len(history) == best + 2

    saved = load_checkpoint(run.root / "out" / model)
    scores, own_labels = score(saved.model, data, (start, end))
    assert np.array_equal(own_labels.numpy(), labels)
    assert roc_auc_score(labels, scores.numpy()) == pytest.approx(aucs[best - 1], abs=1e-9)
    assert saved.facts["data_sha256"] == data.facts["data_sha256"]
    assert saved.facts["best_epoch"] == best
    assert saved.facts["train"]["lr"] == asked.lr
    assert saved.facts["train_until"] == "2026-01-10T00:00:00+00:00"  # the first test day
    assert set(found) == {"epochs", "best_epoch", "valid_auc", "parameters"}  # no seconds: equal runs, equal bytes
    assert not (run.root / ".scratch/train" / model).exists()


def walk(config: TrainConfig, aucs: list[float]) -> tuple[list[float], list[bool], Progress]:
    progress, rates, better = Progress(lr=config.lr), [], []
    for auc in aucs:
        assert not progress.done(config)
        rates.append(progress.lr)
        better.append(progress.note(config, {"valid_auc": auc, "valid_logloss": 0.5}))
    return rates, better, progress


@pytest.mark.parametrize(
    ("lr_patience", "rates"),
    [(0, [0.8, 0.8, 0.8, 0.4, 0.4, 0.2, 0.1]), (1, [0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.4])],
)
def test_the_rate_is_cut_where_the_auc_does_not_rise(config, lr_patience, rates) -> None:
    asked = config(lr=0.8, lr_patience=lr_patience, max_epochs=7, patience=9)
    found, better, progress = walk(asked, [0.5, 0.6, 0.6, 0.7, 0.65, 0.65, 0.8])
    assert found == rates
    assert better == [True, True, False, True, False, False, True]  # a tie is no improvement
    assert (progress.best_epoch, progress.best_auc) == (7, 0.8)
    assert progress.done(asked)


def test_the_epoch_that_is_kept_has_no_logloss_that_rises_more_than_the_auc(config) -> None:
    """Figures of a run whose epoch 5 had the best AUC, and probabilities that were far too sure of themselves."""
    progress = Progress()
    for auc, logloss in ((0.70, 0.30), (0.72, 0.29), (0.74, 0.2816), (0.745, 0.295), (0.75, 0.3126)):
        progress.note(config(), {"valid_auc": auc, "valid_logloss": logloss})
    assert (progress.best_epoch, progress.best_auc, progress.stale) == (3, 0.74, 2)


@pytest.mark.parametrize(
    ("rows", "batch"), [(1_000, 64), (40_000, 512), (240_000, 1024), (591_209, 2048), (2_880_000, 4096)]
)
def test_the_batch_grows_with_the_root_of_the_rows_where_the_config_leaves_it_open(config, rows, batch) -> None:
    assert config(batch_size=0).for_rows(rows).batch_size == batch
    assert config(batch_size=96).for_rows(rows).batch_size == 96


def test_a_checkpoint_says_the_batch_size_that_was_used(run, config) -> None:
    run(config(batch_size=0, max_epochs=1), "out")
    facts = load_checkpoint(run.root / "out/qin").facts
    assert (facts["train_rows"], facts["train"]["batch_size"]) == (1560, 64)


def test_the_l2_of_a_step_is_a_training_rows_share_of_it(config, dataset) -> None:
    model = models.families.build("qin", config().network, Dataset.open(dataset).schema)
    groups = adam(config(embedding_l2=1000.0, network_l2=10.0), model, 50_000).param_groups
    assert [group["l2"] for group in groups] == [0.02, 0.0002]


def test_the_rate_has_a_floor_and_stale_epochs_an_end(config) -> None:
    asked = config(lr=0.8, min_lr=0.3, max_epochs=9, patience=3)
    rates, _, progress = walk(asked, [0.6, 0.5, 0.5, 0.5])
    assert rates == [0.8, 0.8, 0.4, 0.3]
    assert progress.done(asked)
    assert progress.best_epoch == 1


def published_loss(family: str, model: nn.Module, network: Any, data: Dataset, batch: Batch) -> Tensor:
    """Of the published form with the model's weights, in training. Losses are float32 whatever the weights."""
    hist_BL = published.histories(batch, data.click_log, data.schema.history_length)
    read = dict(model.named_parameters()), network, data.schema, batch, data.catalog, hist_BL
    if family == "qin":
        return bce(Logits(published.qin(*read, training=True).float()), batch.label_B)
    deep_B, shallow_B = published.sdcnv3(*read, training=True)
    assert shallow_B is not None
    both_B = ((deep_B + shallow_B) / 2).float()
    return tri_bce(Logits(both_B, (deep_B.float(), shallow_B.float())), batch.label_B)


def plain_training(
    family: str, config: TrainConfig, data: Dataset, model: nn.Module, rates: list[float]
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[bool]]:
    """An epoch at each of the rates, in torch's own words: the weights, their running mean, and what was clipped."""
    network = models.families.network_config(family, config.network)
    weights, (_, end) = dict(model.named_parameters()), data.splits["train"]
    tables = {name for name in weights if name.startswith(("fields", "items"))}
    mean = {name: tensor.detach().clone() for name, tensor in weights.items()}
    optimizer, clipped = torch.optim.Adam(model.parameters()), []
    for epoch, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        seed = int.from_bytes(hashlib.sha256(f"{config.seed} {epoch}".encode()).digest()[:6])
        order = torch.randperm(end, generator=torch.Generator().manual_seed(seed))
        for rows in order.split(config.batch_size):
            loss = published_loss(family, model, network, data, data.batch(rows))
            for name, tensor in weights.items():
                l2 = (config.embedding_l2 if name in tables else config.network_l2) / end
                loss = loss + l2 / 2 * tensor.square().sum()
            optimizer.zero_grad()
            loss.backward()
            clipped.append(bool(nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm) > config.clip_norm))
            optimizer.step()
            decay = min(config.ema, (1 + len(clipped)) / (10 + len(clipped)))
            for name, tensor in weights.items():
                mean[name] = decay * mean[name] + (1 - decay) * tensor.detach()
    return {name: tensor.detach() for name, tensor in weights.items()}, mean, clipped


@pytest.mark.parametrize("ema", [0.0, 0.8])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_trains_by_the_published_recipe(config, dropless, dataset, tmp_path, monkeypatch, family, ema) -> None:
    """Order, L2, clipping, Adam, its rate and the running mean, by the weights that they end in.

    The second epoch is told to be worse than the first, so that the third has half the rate. In float64, since Adam
    makes whole steps of gradients that are next to nothing, where the last bits decide the direction.
    """
    asked = config(
        family, network=dropless[family], max_epochs=3, batch_size=256, embedding_l2=80.0, network_l2=15.0, ema=ema,
        clip_norm=0.6,
    )  # fmt: skip
    data, aucs = Dataset.open(dataset), [0.7, 0.6, 0.8]
    torch.manual_seed(asked.seed)
    model = models.families.build(family, asked.network, data.schema).double()
    wanted, wanted_mean, clipped = plain_training(family, asked, data, deepcopy(model), [0.01, 0.01, 0.005])
    assert 0 < sum(clipped) < len(clipped) == 3 * 7
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop_module, "auc", lambda *_: aucs.pop(0))
    loop = Loop(family, asked, model, data)
    loop.run()
    state = loop.state
    kept = wanted_mean if ema else wanted
    torch.testing.assert_close(dict(state.model.named_parameters()), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close({name: state.best[name] for name in kept}, kept, rtol=1e-6, atol=1e-6)


def test_every_epoch_has_an_order_of_its_own_and_every_step_its_masks(run, config, monkeypatch) -> None:
    orders: list[list[int]] = [[], []]
    masks: list[bytes] = []
    step, dropout = Step.take, models.qin.dropout

    def noted_step(own: Step, loss: Any, fetched: list[Tensor], rows: int) -> Tensor:
        orders[own.state.progress.epoch] += fetched[0].tolist()
        masks.append(b"")
        return step(own, loss, fetched, rows)

    def noted_dropout(x: Tensor, rate: float, training: bool, part: Part | None) -> Tensor:
        out = dropout(x, rate, training, part)
        if training and not masks[-1]:
            masks[-1] = (out[:16] == 0).numpy().tobytes()
        return out

    monkeypatch.setattr(Step, "take", noted_step)
    monkeypatch.setattr(models.qin, "dropout", noted_dropout)
    run(config(max_epochs=2), "out")
    assert [sorted(order) for order in orders] == [list(range(1560))] * 2
    assert orders[0] != orders[1] and list(range(1560)) not in orders
    assert len(set(masks)) == len(masks) == 2 * 13


def test_the_running_mean_of_the_weights_is_what_is_judged_and_kept(config, dataset, tmp_path) -> None:
    asked = config("sdcnv3", ema=0.6)
    model = models.families.build("sdcnv3", asked.network, Dataset.open(dataset).schema)
    state = State(tmp_path, "", model, adam(asked, model, 1), asked)
    wanted = model.deep.out.weight.detach().clone()
    for step in range(1, 20):
        with torch.no_grad():
            model.deep.out.weight.add_(1.0)
            model.deep.gates[0].batch_norm.running_mean.add_(1.0)
        state.progress.steps = step
        state.follow(asked.ema)
        decay = min(0.6, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * model.deep.out.weight.detach()
    torch.testing.assert_close(state.scored.deep.out.weight, wanted)
    assert torch.equal(state.scored.deep.gates[0].batch_norm.running_mean, model.deep.gates[0].batch_norm.running_mean)
    assert not torch.allclose(wanted, model.deep.out.weight)


def test_a_last_batch_of_one_row_is_left_out(config, run) -> None:
    """1560 training rows: 1559 + 1. BatchNorm cannot take one row."""
    run(config("sdcnv3", batch_size=1559, max_epochs=1), "out", "sdcnv3")
    assert len(run.history("out")) == 1


# ---- what is refused --------------------------------------------------------------------------------------------


def test_unknown_names_are_refused(run, config, networks) -> None:
    with pytest.raises(ValueError, match=r"QINConfig: unknown key \['width'\]; it has \["):
        run(config(network=networks["qin"] | {"width": 3}), "out")
    with pytest.raises(ValueError, match=r"exclude: no feature \['colour'\] in the schema; it has"):
        run(config(network=networks["qin"] | {"exclude": ["colour"]}), "out")
    with pytest.raises(ValueError, match=r"family = 'deepfm': give one of \['qin', 'sdcnv3'\]"):
        run(config(), "out", "deepfm")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=rf"train\.qin\.device is '{device}': .*give auto, cpu or cuda:0"):
            run(config(device=device), "out")
    assert not (run.root / "out").exists()


@pytest.mark.parametrize("label", [0, 1])
def test_valid_days_of_one_class_are_refused(run, config, raw_rows, write_dataset, label) -> None:
    raw = raw_rows()
    start, end = raw.splits["valid"]
    raw.label[start:end] = label
    run.dataset = write_dataset(run.root / "dataset", raw)
    with pytest.raises(
        ValueError, match=rf"dataset: the valid days hold {label * 520} clicks in 520 rows.*valid_share"
    ):
        run(config(), "out")


def test_a_dataset_that_was_changed_is_refused(run, config, dataset) -> None:
    run.dataset = run.root / "dataset"
    shutil.copytree(dataset, run.dataset)
    rows = run.dataset / "rows.safetensors"
    rows.write_bytes(rows.read_bytes()[:-1] + b"\x07")
    with pytest.raises(
        ValueError, match=r"rows\.safetensors is not the file that was written; run `dvc repro dataset`"
    ):
        run(config(), "out")
