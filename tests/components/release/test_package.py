from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from bento import ITEM_STATE, SERVING
from bento.scorer import Scorer
from components.common.artifacts import folder_hash
from components.release import package
from components.release.package import PackageConfig
from models.checkpoint import CHECKPOINT_FILES, checkpoint_hash, save
from models.encoder import save_encoder
from models.families import build
from models.schema import Encoder, schema_hash
from tests.bento.world import ITEM_IDS, USER_IDS, World, make_world

CONFIG = PackageConfig(name="ctr-ranker", max_candidates=25, golden_requests=10)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def run(world: World, config: PackageConfig = CONFIG) -> dict:
    output = world.root / "package"
    return package.run(
        config, world.decision, world.evaluations, world.model, world.dataset, world.features, world.repo, output
    )


@pytest.fixture
def no_bento(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the model folder where the Bento would hold it, and spares the seconds of the build."""

    def keep(
        name: str, version: str, model: Path, code: Path, output: Path, facts: dict, description: str, home: Path
    ) -> None:
        shutil.copytree(model, output)

    monkeypatch.setattr(package, "build_bento", keep)


@pytest.mark.parametrize(
    "bad", [{"name": "CTR ranker"}, {"max_candidates": 0}, {"max_candidates": 10**6}, {"golden_requests": 1}]
)
def test_config_names_the_key(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        PackageConfig(**{"name": "x", "max_candidates": 5, "golden_requests": 2, **bad})


def test_builds_a_bento_that_stands_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    home = world.root / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("BENTOML_HOME", raising=False)
    built = run(world)
    folder = world.root / "package"
    assert built == json.loads((folder / "package.json").read_text())
    assert built["built"] and built["tag"] == f"ctr-ranker:{built['version']}"
    assert built["checkpoint_sha256"] == checkpoint_hash(world.model)
    assert not list(home.iterdir())  # the user's home and stores stay as they are

    bento = yaml.safe_load((folder / "bento" / "bento.yaml").read_text())
    assert (bento["name"], bento["version"]) == ("ctr-ranker", built["version"])
    assert bento["services"][0]["models"][0]["tag"] == f"ranker:{built['version']}"
    code = {str(file.relative_to(folder / "bento" / "src")) for file in (folder / "bento" / "src").rglob("*.py")}
    assert {
        str(f.relative_to(package.CODE)) for part in ("bento", "models") for f in (package.CODE / part).rglob("*.py")
    } == code
    model = folder / "bento" / "models" / "ranker" / built["version"]
    assert {file.name for file in model.iterdir()} == {*CHECKPOINT_FILES, ITEM_STATE, SERVING, "model.yaml"}
    assert yaml.safe_load((model / "model.yaml").read_text())["metadata"]["data_sha256"] == built["data_sha256"]
    assert json.loads((model / SERVING).read_text()) == {"version": built["version"], "max_candidates": 25}
    requirements = (folder / "bento" / "env" / "python" / "requirements.txt").read_text().split()
    assert sorted(requirements) == sorted(built["packages"])
    card = (folder / "model_card.md").read_text()
    assert (folder / "bento" / "README.md").read_text().strip() == card.strip()
    assert package.summary(built)["Bento"] == built["tag"] and "MiB of it the model" in package.summary(built)["size"]
    assert all("==" in line and "+" not in line for line in requirements)
    assert {line.split("==")[0] for line in requirements} >= {"torch", "safetensors", "bentoml", "feast[duckdb,redis]"}
    text = "".join(file.read_text() for file in folder.rglob("*") if file.suffix in (".yaml", ".json", ".md", ".txt"))
    assert str(world.root) not in text  # it can be moved to another machine


@pytest.mark.usefixtures("no_bento")
def test_golden_scores_are_those_of_the_scorer(world: World) -> None:
    run(world, replace(CONFIG, golden_requests=24))  # so that all twelve users are asked about
    golden = json.loads((world.root / "package" / "golden.json").read_text())
    scorer = Scorer(world.root / "package" / "bento")
    history = pq.read_table(world.features / "sources" / "user_history.parquet").to_pandas()
    profile = pq.read_table(world.features / "sources" / "user_profile.parquet").to_pandas()
    history, profile = (frame.set_index("user_id") for frame in (history, profile))
    assert ["history" in case["request"] for case in golden] == [True, False] * 12
    assert {case["request"]["user_id"] for case in golden[1::2]} == set(USER_IDS)
    assert {len(case["request"]["history"]) for case in golden[::2]} - {0}
    for case in golden:
        request = case["request"]
        user = request["user_id"]
        clicks = request.get("history", history["history"][user].tolist())
        found = scorer.rank(
            user, request["candidates"], clicks, {"gender": profile["gender"][user]}, request["context"]
        )
        assert found.tolist() == pytest.approx(case["scores"], abs=1e-6)
        assert case["degraded"] == ([] if set(request["candidates"]) <= set(ITEM_IDS) else ["unknown_items"])
        assert len(set(case["scores"])) > 1
    assert sum(bool(case["degraded"]) for case in golden) == 5


@pytest.mark.usefixtures("no_bento")
def test_where_nobody_has_a_history_golden_requests_ask_about_the_users_there_are(world: World) -> None:
    for name in ("user_history", "item_popularity"):
        file = world.features / "sources" / f"{name}.parquet"
        pq.write_table(pq.read_table(file).slice(0, 0), file)
    run(world, replace(CONFIG, golden_requests=24))
    golden = json.loads((world.root / "package" / "golden.json").read_text())
    scorer = Scorer(world.root / "package" / "bento")
    profile = pq.read_table(world.features / "sources" / "user_profile.parquet").to_pandas().set_index("user_id")
    assert {case["request"]["user_id"] for case in golden[1::2]} == set(USER_IDS)
    for case in golden[1::2]:
        user, context = case["request"]["user_id"], case["request"]["context"]
        found = scorer.rank(user, case["request"]["candidates"], [], {"gender": profile["gender"][user]}, context)
        assert found.tolist() == pytest.approx(case["scores"], abs=1e-6)


@pytest.mark.usefixtures("no_bento")
def test_a_model_without_impression_fields_has_golden_requests(world: World) -> None:
    theirs = world.checkpoint
    schema = theirs.encoder.schema.without([field.name for field in theirs.encoder.schema.impression_fields])
    encoder = Encoder(schema, {"item_id": theirs.encoder.integers["item_id"]})
    found = schema_hash(schema, encoder.integers, theirs.catalog)
    model = build("qin", theirs.network, schema).eval()
    save(world.model, replace(theirs, model=model, encoder=encoder, schema_hash=found))
    shutil.rmtree(world.dataset / "encoder")
    save_encoder(world.dataset / "encoder", encoder, theirs.catalog)
    shipped = json.loads(world.decision.read_text())["shipped"]
    for file, changed in (
        (world.dataset / "dataset.json", {"schema_hash": found}),
        (world.decision, {"shipped": shipped | {"checkpoint_sha256": checkpoint_hash(world.model)}}),
    ):
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    run(world)
    scorer = Scorer(world.root / "package" / "bento")
    history = pq.read_table(world.features / "sources" / "user_history.parquet").to_pandas().set_index("user_id")
    for case in json.loads((world.root / "package" / "golden.json").read_text()):
        request = case["request"]
        clicks = request.get("history", history["history"][request["user_id"]].tolist())
        scores = scorer.rank(request["user_id"], request["candidates"], clicks, {}, {})
        assert request["context"] == {} and scores.tolist() == pytest.approx(case["scores"], abs=1e-6)
        assert len(set(case["scores"])) > 1


@pytest.mark.usefixtures("no_bento")
def test_item_state_is_the_newest_popularity(world: World) -> None:
    run(world)
    state = load_file(world.root / "package" / "bento" / ITEM_STATE)
    rows = pd.read_parquet(world.features / "sources" / "item_popularity.parquet")
    newest = rows[rows["event_timestamp"] == rows["event_timestamp"].max()].set_index("item_id")
    for name in ("views", "clicks"):
        for row, item in enumerate(ITEM_IDS, start=2):
            # floor(log2(1 + count)) in integers; the vocabulary is 0 … 11, so an index is the level + 2
            expected = (int(newest[name][item]) + 1).bit_length() - 1 + 2 if item in newest.index else 0
            assert state[f"{name}_level"][row] == expected, (name, item)
        assert state[f"{name}_level"][:2].tolist() == [0, 0]
        assert torch.equal(state[f"{name}_level"][-1], torch.tensor(0))


@pytest.mark.usefixtures("no_bento")
def test_the_version_follows_the_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(world)["version"]
    assert first.startswith("qin-")
    assert run(world)["version"] == first
    popularity = world.features / "sources" / "item_popularity.parquet"
    table = pq.read_table(popularity)
    pq.write_table(table.set_column(1, "views", pa.array([9] * len(table))), popularity)
    second = run(world)["version"]
    assert second != first
    for part in ("bento", "models"):
        shutil.copytree(package.CODE / part, world.root / "code" / part)
    monkeypatch.setattr(package, "CODE", world.root / "code")
    assert run(world)["version"] == second
    with (world.root / "code" / "bento" / "scorer.py").open("a") as opened:
        opened.write("# mended\n")
    assert run(world)["version"] not in (first, second)


def test_equal_inputs_build_equal_bytes(world: World) -> None:
    run(world)
    first = folder_hash(world.root / "package")
    run(world)
    assert folder_hash(world.root / "package") == first


@pytest.mark.usefixtures("no_bento")
def test_an_upgrade_or_another_feature_repo_is_another_version(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `promote` would say that the champion serves already what was built with other packages."""
    first = run(world)
    named = {line.split("==")[0].split("[")[0] for line in first["packages"]}
    assert named >= {"torch", "feast", "bentoml", "safetensors", "pydantic"}
    found = {first["version"]}
    for name in named:
        with monkeypatch.context() as patch:
            upgraded = [f"{line}.1" if line.startswith(name) else line for line in first["packages"]]
            patch.setattr(package, "requirements", lambda upgraded=upgraded: upgraded)
            found.add(run(world)["version"])
    assert len(found) == 1 + len(named)
    (world.repo / "__pycache__").mkdir()
    (world.repo / "__pycache__" / "definitions.pyc").write_bytes(b"x")
    assert run(world) == first
    with (world.repo / "definitions.py").open("a") as opened:
        opened.write("# another time to live\n")
    changed = run(world)
    assert changed["version"] not in found
    assert changed["feature_repo_sha256"] != first["feature_repo_sha256"]


def test_a_rejection_builds_nothing(world: World) -> None:
    (world.root / "package" / "bento").mkdir(parents=True)  # yesterday's
    world.decision.write_text(json.dumps({"verdict": "reject", "model": None, "reasons": ["auc 0.5 < 0.6"]}))
    found = run(world)
    assert found == {"built": False, "reason": ["auc 0.5 < 0.6"]}
    assert package.summary(found) == {"Bento": "none: the gate rejected", "reasons": "auc 0.5 < 0.6"}
    assert [file.name for file in (world.root / "package").iterdir()] == ["package.json"]


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        ({"shipped": {"checkpoint_sha256": "0" * 64, "train_until": None}}, "dvc repro refit"),
        ({"data_sha256": "0" * 64}, "dvc repro gate"),
    ],
    ids=["checkpoint", "data"],
)
def test_refuses_bytes_that_the_decision_does_not_name(world: World, changed: dict, remedy: str) -> None:
    world.decision.write_text(json.dumps(json.loads(world.decision.read_text()) | changed))
    with pytest.raises(ValueError, match=rf"0000.*{remedy}"):
        run(world)
    assert not (world.root / "package").exists()


@pytest.mark.usefixtures("no_bento")
def test_ships_the_refit_and_not_what_was_judged(world: World) -> None:
    """The gate's own hash is of other bytes than those that are packaged."""
    decision = json.loads(world.decision.read_text())
    decision |= {"checkpoint_sha256": "1" * 64, "shipped": decision["shipped"] | {"train_until": "2026-01-11"}}
    world.decision.write_text(json.dumps(decision))
    evaluation = world.evaluations / "qin/evaluation.json"
    evaluation.write_text(json.dumps(json.loads(evaluation.read_text()) | {"checkpoint_sha256": "1" * 64}))
    built = run(world)
    assert built["checkpoint_sha256"] == checkpoint_hash(world.model)
    assert (built["judged_sha256"], built["train_until"]) == ("1" * 64, "2026-01-11")


def test_refuses_another_schema(world: World, tmp_path: Path) -> None:
    facts = json.loads((world.dataset / "dataset.json").read_text())
    other = make_world(tmp_path / "other")
    catalog = load_file(other.dataset / "encoder" / "catalog.safetensors")
    catalog["integers.hour"] = catalog["integers.hour"] + 1
    from safetensors.torch import save_file

    from models.encoder import load_encoder

    save_file(catalog, world.dataset / "encoder" / "catalog.safetensors")
    facts["schema_hash"] = load_encoder(world.dataset / "encoder")[2]
    (world.dataset / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="trained under schema"):
        run(world)


def test_a_failed_build_says_why_and_leaves_what_was_there(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (world.root / "package").mkdir()
    (world.root / "package" / "package.json").write_text("{}")
    code = world.root / "code"
    for name in ("bento", "models"):
        shutil.copytree(package.CODE / name, code / name)
    with (code / "bento" / "service.py").open("a") as opened:
        opened.write("\nraise SystemExit('no service today')\n")
    monkeypatch.setattr(package, "CODE", code)
    with pytest.raises(RuntimeError, match="no service today"):
        run(world)
    assert (world.root / "package" / "package.json").read_text() == "{}"
