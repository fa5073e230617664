"""Plain tabular data, without users, items or times, through every stage to a served Bento, by the project's params."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from components.common.artifacts import write_json
from components.common.config import load
from components.common.splits import SplitConfig
from components.data import ingest, validate
from components.data.sources.files import TableConfig
from components.data.validate import ValidateConfig
from components.features import dataset, embed, features
from components.features.dataset import DatasetConfig
from components.features.embed import EmbedConfig
from components.features.publish import PublishConfig
from components.features.views import FeaturesConfig
from components.release import evaluate, gate, package, smoke
from components.release.evaluate import EvaluateConfig
from components.release.gate import GateConfig
from components.release.package import PackageConfig
from components.release.server import Served
from components.release.smoke import SmokeConfig
from components.training import refit, start, train
from components.training.config import TrainConfig
from components.training.refit import RefitConfig
from components.training.start import StartConfig
from tests.components.small_world import NO_FILES, PROJECT, Folders, ingest_config, new_repo

pytestmark = pytest.mark.slow

MODELS = ("qin", "sdcnv3")
ROWS = {"train": 12_000, "valid": 3_000, "test": 5_000}
CRITEO = TableConfig(
    path={part: f"{part}.csv" for part in ROWS}, columns={}, categorical=["C1", "C2", "C3"], numeric=["I1", "I2"]
)


def tabular(part: str) -> pa.Table:
    """Like Criteo: a label, numbers with a long tail and hashed categories, many missing. C1, C2 and I1 tell."""
    rng = np.random.default_rng(list(ROWS).index(part))
    n = ROWS[part]
    c1, c2, i1 = rng.integers(0, 8, n), rng.integers(0, 8, n), np.exp(rng.normal(2, 2, n))
    logit = 2 * (c2 % 2) + 1.5 * (c1 > 3) + (i1 > 20) - 2.5
    return pa.table(
        {
            "label": (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(np.int8),
            "I1": pa.array(np.round(i1, 2), mask=rng.random(n) < 0.1),
            "I2": rng.integers(-2, 400, n),
            "C1": [f"{value:08x}" for value in c1],
            "C2": pa.array([f"{value:08x}" for value in 7 * c2], mask=rng.random(n) < 0.05),
            "C3": [f"{value:08x}" for value in rng.zipf(2, n) % 2**31],  # some are new in the test rows
        }
    )


class World(NamedTuple):
    folders: Folders
    decision: dict[str, Any]
    refit: dict[str, Any]
    smoke: dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Every stage in its order. But for smaller batches of so few rows, the numbers are those of params.yaml."""
    params = PROJECT / "params.yaml"
    made = Folders(tmp_path_factory.mktemp("tabular"))
    raw, evaluations, checkpoints = (made.root / name for name in ("raw", "evaluate", "checkpoints"))
    champion, decision, built = made.root / "champion", made.root / "decision.json", made.root / "package"
    write_json(champion / "champion.json", {"version": None})
    raw.mkdir()
    for part in ROWS:
        csv.write_csv(tabular(part), raw / f"{part}.csv")
    new_repo(made)
    split = load(params, "split", SplitConfig)
    ingest.run(ingest_config("files", str(raw), None, replace(NO_FILES, events=CRITEO)), made.canonical)
    validate.run(load(params, "validate", ValidateConfig), made.canonical, made.report, made.root / "docs")
    embed.run(load(params, "embed", EmbedConfig), split, made.canonical, made.report, made.embedding)
    features.run(load(params, "features", FeaturesConfig), made.canonical, made.report, made.embedding, made.features)
    dataset.run(
        load(params, "dataset", DatasetConfig), split, made.canonical, made.features, made.repo, made.dataset
    )  # fmt: skip
    start.run(load(params, "start", StartConfig), champion, made.root / "start")
    with contextlib.chdir(made.root):  # training keeps its state in .scratch
        for model in MODELS:
            config = replace(load(params, f"train.{model}", TrainConfig), device="cpu", batch_size=128)
            figures, history = made.root / f"{model}.json", made.root / f"{model}.csv"
            train.run(config, model, made.dataset, made.root / "start" / model, checkpoints / model, figures, history)
            judged = load(params, "evaluate", EvaluateConfig)
            evaluate.run(judged, model, checkpoints / model, made.dataset, champion, evaluations / model)
        decided = gate.run(load(params, "gate", GateConfig), evaluations, checkpoints, made.dataset, champion, decision)
        every_row = replace(load(params, "refit", RefitConfig), device="cpu")
        shipped, ships = made.root / "refit.json", checkpoints / "refit"
        refitted = refit.run(every_row, decision, checkpoints, made.root / "start", made.dataset, ships, shipped)[
            "shipped"
        ]
        judged_ships = replace(every_row, enabled=False)  # its scores are those that were measured
        refit.run(judged_ships, decision, checkpoints, made.root / "start", made.dataset, ships, shipped)
    package.run(
        load(params, "package", PackageConfig), shipped, evaluations, ships, made.dataset, made.features,
        made.repo, built,
    )  # fmt: skip
    asked = replace(load(params, "smoke", SmokeConfig), latency_requests=20)
    published = load(params, "publish", PublishConfig)
    served = smoke.run(asked, published, built, made.features, made.repo, made.root / "smoke.json")
    return World(made, decided, refitted, served)


def test_both_models_are_judged_and_one_ships(world: World) -> None:
    assert world.decision["verdict"] == "approve", world.decision["reasons"]
    for model in MODELS:
        rules = {rule["rule"]: rule for rule in world.decision["candidates"][model]["rules"]}
        assert rules["auc"]["value"] > 0.7
        assert rules["group_auc"]["value"] == pytest.approx(rules["auc"]["value"], abs=1e-9)  # all rows are one user's
        assert world.decision["candidates"][model]["passed"], world.decision["reasons"]
    assert world.smoke["passed"]
    assert world.refit["kind"] == "refit", world.refit["reasons"]  # rows without times and users are refitted too
    assert world.refit["train_until"] is None


def test_a_row_is_served_the_score_that_was_measured(world: World) -> None:
    """Rows of the test file as they lie there, numbers and all, against the predictions of the evaluation."""
    rows = tabular("test").slice(0, 300)
    model = world.decision["model"]
    predicted = pq.read_table(world.folders.root / "evaluate" / model / "predictions.parquet")
    assert predicted["label"].slice(0, 300).to_pylist() == rows["label"].to_pylist()
    offline = predicted["score"].slice(0, 300).to_numpy()
    asked = rows.drop_columns("label").to_pylist()
    assert any(None in row.values() for row in asked)
    server = Served(world.folders.root / "package" / "bento", None, world.folders.root / "server.log")
    online = []
    with server.running(), server.client() as client:
        for row in asked:
            context = {name: None if value is None else str(value) for name, value in row.items()}
            answer = client.post("/rank", json={"user_id": 0, "candidates": [0], "context": context})
            assert answer.status_code == 200, answer.text
            # there is nothing to know of a user, and no store was asked
            assert answer.json()["degraded"] == [] and answer.json()["items"] == [0]
            online += answer.json()["scores"]
        wrong = client.post("/rank", json={"user_id": 0, "candidates": [0], "context": {"I1": "many"}})
        assert wrong.status_code == 400 and "I1 is 'many'; it takes a number" in wrong.text
    np.testing.assert_allclose(online, offline, atol=1e-5)
    assert np.std(online) > 0.1
