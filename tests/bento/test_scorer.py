from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bento import ITEM_STATE
from bento.scorer import Scorer
from models.schema import Batch
from tests.bento.world import ITEM_IDS, LENGTH, NOT_AN_ITEM, World, make_world

CONTEXT = {"device": "tv", "hour": "7"}


@pytest.fixture(scope="module", params=["qin", "sdcnv3"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), request.param)


@pytest.fixture(scope="module")
def scorer(world: World) -> Scorer:
    folder = world.root / "model"
    shutil.copytree(world.model, folder)
    rows = torch.arange(len(world.checkpoint.catalog))
    save_file({"views_level": rows % 7, "clicks_level": rows % 5}, folder / ITEM_STATE)
    return Scorer(folder)


def test_scores_are_the_models_own(world: World, scorer: Scorer) -> None:
    # by hand: user 103 is value 2 of 10, "m" value 1, "tv" value 1, hour 7 value 7; each index is 2 higher
    candidates = [ITEM_IDS[4], ITEM_IDS[0], ITEM_IDS[29]]
    rows = [6, 2, 31]
    batch = Batch(
        torch.tensor([[4, 3, 3, 9, row % 7, row % 5] for row in rows]),
        torch.tensor(rows),
        torch.tensor([1, 1, 1]),
        torch.tensor([4, 4, 4]),
    )
    with torch.inference_mode():
        logit_B = world.checkpoint.model(batch, world.checkpoint.catalog, torch.tensor([30, 10, 11, 12])).logit_B
    found = scorer.rank(103, candidates, [ITEM_IDS[8], ITEM_IDS[9], ITEM_IDS[10]], {"gender": "m"}, CONTEXT)
    torch.testing.assert_close(found, torch.sigmoid(logit_B))
    assert found.unique().numel() == 3


def test_candidates_do_not_touch_each_other(scorer: Scorer) -> None:
    history = ITEM_IDS[3:7]
    together = scorer.rank(103, ITEM_IDS, history, {"gender": "f"}, CONTEXT)
    alone = torch.cat([scorer.rank(103, [item], history, {"gender": "f"}, CONTEXT) for item in ITEM_IDS])
    torch.testing.assert_close(together, alone)


def test_history_keeps_the_newest_known_items(scorer: Scorer) -> None:
    newest = ITEM_IDS[:LENGTH]

    def rank(history: list[int]) -> torch.Tensor:
        return scorer.rank(103, ITEM_IDS[10:14], history, {}, CONTEXT)

    assert torch.equal(rank([*ITEM_IDS[20:24], *newest]), rank(newest))
    # unknown items are dropped before the newest are taken: they push nothing out
    assert torch.equal(rank([*newest[:2], NOT_AN_ITEM, *newest[2:], NOT_AN_ITEM]), rank(newest))
    assert not torch.allclose(rank(newest), rank(ITEM_IDS[20:25]))
    assert torch.equal(rank([NOT_AN_ITEM]), rank([]))
    assert not torch.allclose(rank(newest), rank([]))


def test_unknown_candidates_score_alike(scorer: Scorer) -> None:
    scores = scorer.rank(103, [NOT_AN_ITEM, ITEM_IDS[0], -(2**63), 2**63 - 1], ITEM_IDS[:3], {}, CONTEXT)
    assert scores[0] == scores[2] == scores[3]
    assert scores[0] != scores[1]
    assert scorer.known([NOT_AN_ITEM, ITEM_IDS[0], 2**63 - 1]).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "changed",
    [{"user_id": 104}, {"profile": {"gender": "f"}}, {"context": {"device": "phone", "hour": "7"}},
     {"context": {"device": "tv"}}],
)  # fmt: skip
def test_every_input_counts(scorer: Scorer, changed: dict) -> None:
    asked = {"user_id": 103, "candidates": ITEM_IDS[:4], "history": [], "profile": {"gender": "m"}, "context": CONTEXT}
    assert not torch.allclose(scorer.rank(**asked), scorer.rank(**{**asked, **changed}))


@pytest.mark.parametrize(
    ("given", "meant"),
    [({"device": " tv\u3000", "hour": " 7 "}, CONTEXT), ({"device": "", "hour": " "}, {"device": None, "hour": None})],
)
def test_spaces_around_a_context_value_are_none_of_it(scorer: Scorer, given: dict, meant: dict) -> None:
    def rank(context: dict) -> torch.Tensor:
        return scorer.rank(103, ITEM_IDS[:4], [], {}, context)

    assert torch.equal(rank(given), rank(meant))
    assert not torch.allclose(rank(given), rank({"device": "fridge", "hour": "99"}))  # which are not known


def test_a_context_value_of_a_wrong_kind(scorer: Scorer) -> None:
    with pytest.raises(ValueError, match="hour"):
        scorer.rank(103, ITEM_IDS[:1], [], {}, {"hour": "noon"})


@pytest.mark.parametrize("state", [{"views_level": torch.zeros(32).long()}, {
    "views_level": torch.zeros(32).long(), "clicks_level": torch.zeros(31).long()}])  # fmt: skip
def test_item_state_must_cover_features_and_catalog(world: World, tmp_path: Path, state: dict) -> None:
    shutil.copytree(world.model, tmp_path, dirs_exist_ok=True)
    save_file(state, tmp_path / ITEM_STATE)
    with pytest.raises(ValueError, match="clicks_level"):
        Scorer(tmp_path)


def test_needs_torch_and_models_alone() -> None:
    code = "import sys, bento.scorer; print({'bentoml', 'feast', 'pydantic', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "set()", done.stderr
