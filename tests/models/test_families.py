"""Families are built by name, and the published runs have the published numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.families import FAMILIES, PRESETS, TRAINING, build
from models.schema import Batch, Feature, Part, Schema


def test_build_refuses_unknown_keys_and_families(make_world):
    schema = make_world().schema
    with pytest.raises(ValueError, match=r"SDCNv3Config: unknown key \['rows'\]"):
        build("sdcnv3", {"rows": 4}, schema)
    with pytest.raises(ValueError, match="family = 'QIN'"):
        build("QIN", {}, schema)


def rank_one_by_one(model, world):
    """Eval-mode logits by `forward` and by `ranking`, each row as a user of its own with its own candidate."""
    batch, length = world.batch, world.schema.history_length
    ranking = model.eval().ranking(world.catalog)
    found = []
    for row in range(len(batch.item_B)):
        start, end = int(batch.start_B[row]), int(batch.end_B[row])
        hist_K = world.clicks_C[max(start, end - length) : end].long() if length else world.clicks_C[:0].long()
        found.append(ranking(batch.fields_BF[row, None], batch.item_B[row, None].long(), hist_K))
    return model(batch, world.catalog, world.clicks_C).logit_B, torch.cat(found)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(
    "options",
    [
        {}, {"history": 0}, {"fields": 0}, {"vector": 0}, {"sets": 2}, {"clicks": 0},
        {"categoricals": 0, "sets": 0, "vector": 0}, {"categoricals": 0, "sets": 0, "vector": 0, "history": 0},
    ],
    ids=str,
)  # fmt: skip
def test_ranking_gives_the_scores_of_the_model(make_world, shaken, family, options):
    world = make_world(**options)
    model = build(family, {"dim": 4, **({"rows": 3} if family == "qin" else {"heads": 2})}, world.schema).double()
    shaken(model)
    wanted_B, found_B = rank_one_by_one(model, world)
    assert wanted_B.std() > 1e-3
    torch.testing.assert_close(found_B, wanted_B, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_ranking_scores_many_candidates_at_once_and_keeps_its_weights(make_world, shaken, family):
    world = make_world(rows=7)
    model = build(family, {"dim": 4}, world.schema).double().eval()
    shaken(model)
    ranking = model.ranking(world.catalog)
    hist_K = world.clicks_C[:3].long()
    together_N = ranking(world.batch.fields_BF, world.batch.item_B.long(), hist_K)
    shaken(model, seed=9)
    alone = [ranking(world.batch.fields_BF[i : i + 1], world.batch.item_B[i : i + 1].long(), hist_K) for i in range(7)]
    torch.testing.assert_close(together_N, torch.cat(alone), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_regularises_tables_and_projection_alone(make_world, family):
    model = build(family, {"dim": 4}, make_world().schema)
    covered = {id(p) for p in model.regularised_parameters()}
    assert {name for name, p in model.named_parameters() if id(p) in covered} == {
        "fields.tables.0.weight",
        "fields.tables.1.weight",
        "items.categoricals.0.weight",
        "items.categoricals.1.weight",
        "items.sets.0.weight",
        "items.project.weight",
    }


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_parts_of_a_batch_draw_the_dropout_of_the_whole(make_world, shaken, family, compiled):
    world = make_world(rows=12)
    model = build(family, {"dim": 4}, world.schema).double()
    shaken(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()  # a row's logit then depends on its own row alone

    torch._dynamo.reset()
    forward = torch.compile(model, backend="aot_eager", dynamic=False) if compiled else model

    def logits(rows: slice, part: Part | None) -> torch.Tensor:
        batch = Batch(*(column[rows] for column in world.batch[:-1]), part=part)
        torch.manual_seed(1)
        return forward(batch, world.catalog, world.clicks_C).logit_B

    whole_B = logits(slice(0, 12), None)
    assert torch.equal(logits(slice(0, 12), Part(0, 12)), whole_B)
    for rows in (slice(0, 5), slice(5, 12)):
        torch.testing.assert_close(logits(rows, Part(rows.start, 12)), whole_B[rows], rtol=1e-9, atol=1e-9)
    alone_B = logits(slice(5, 12), None)
    assert not torch.allclose(alone_B, whole_B[5:])


def impressions(**sizes: int) -> list[Feature]:
    return [Feature(name=name, owner="impression", kind="categorical", size=size) for name, size in sizes.items()]


# Vocabularies as the authors' logs give them, padding and the unknown value among them
CRITEO = impressions(
    I1=44, I2=99, I3=122, I4=41, I5=220, I6=112, I7=80, I8=69, I9=92, I10=6, I11=27, I12=37, I13=72,
    C1=1_446, C2=554, C3=157_339, C4=117_822, C5=306, C6=18, C7=11_882, C8=630, C9=5, C10=39_530, C11=5_131,
    C12=156_656, C13=3_176, C14=28, C15=11_043, C16=148_913, C17=12, C18=4_560, C19=2_003, C20=5, C21=154_564,
    C22=18, C23=17, C24=53_031, C25=82, C26=40_955,
)  # fmt: skip
PUBLISHED = {
    "qin/microlens": Schema(
        features=(
            *impressions(likes_level=11, views_level=11),
            Feature(name="item_id", owner="item", kind="categorical", size=91_718),
            Feature(name="item_tags", owner="item", kind="multi", size=11_740, length=5),
            Feature(name="item_emb_d128", owner="item", kind="vector", size=128),
        ),
        history_length=64,
    ),
    "sdcnv3/ml-1m": Schema(
        features=(
            *impressions(UserID=6_042, Gender=4, Age=9, Occupation=23),
            Feature(name="MovieID", owner="item", kind="categorical", size=3_643),
            Feature(name="Release", owner="item", kind="categorical", size=10),
            Feature(name="Genres", owner="item", kind="multi", size=20, length=5),
        ),
        history_length=0,
    ),
    "sdcnv3/criteo": Schema(features=tuple(CRITEO), history_length=0),
}


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        ("qin/microlens", {}, 31_244_293),
        ("qin/microlens", {"rows": 3}, 27_045_893),
        ("sdcnv3/ml-1m", {}, 201_728),
        ("sdcnv3/criteo", {}, 15_944_754),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, changes, count):
    with torch.device("meta"):
        model = build(name.split("/")[0], PRESETS[name] | changes, PUBLISHED[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_presets_have_the_published_rates_of_dropout():
    rates = {name: {k: v for k, v in network.items() if "dropout" in k} for name, network in PRESETS.items()}
    assert rates == {
        "qin/microlens": {"dropout": 0.1},
        "sdcnv3/ml-1m": {"deep_dropout": 0.2, "shallow_dropout": 0.1},
        "sdcnv3/criteo": {"deep_dropout": 0.1, "shallow_dropout": 0.2},
    }


def test_presets_are_trained_as_published():
    """Batch, patience, rate and its cut, L2 of embeddings (a step's, times the training rows); the rest is the same."""
    keys = ("batch_size", "patience", "lr", "lr_factor", "embedding_l2")
    assert {name: tuple(settings[key] for key in keys) for name, settings in TRAINING.items()} == {
        "qin/microlens": (8192, 8, 2e-3, 0.5, 2e-4 * 3_600_000),
        "sdcnv3/ml-1m": (4096, 2, 1e-3, 0.1, 0.01 * 591_209),
        "sdcnv3/criteo": (4096, 2, 1e-3, 0.1, 1e-5 * 36_672_493),
    }
    rest = {"max_epochs": 100, "lr_patience": 0, "min_lr": 1e-6, "network_l2": 0.0, "ema": 0.0, "clip_norm": 10.0}
    for settings in TRAINING.values():
        assert {key: value for key, value in settings.items() if key not in keys} == rest
