"""Two versions on one run's test rows, out of git and DVC."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from sklearn.metrics import log_loss, roc_auc_score

from components.common.dataset import UNSEEN, Dataset
from components.release import compare, evaluate, statistics
from components.release.measures import EvaluateConfig
from components.release.policy import PolicyConfig
from components.release.slices import SlicesConfig
from models.checkpoint import Checkpoint, load, save
from models.families import build
from models.schema import PADDING, schema_hash
from tests.components.release.runs import ENVIRONMENT, commit, dvc, git

CONFIG = EvaluateConfig(
    seed=1, bootstrap=60, calibration_bins=7, slices=SlicesConfig(history=[1], popularity=[], columns=[]),
    policy=PolicyConfig(rows=10, candidates=2),
)  # fmt: skip
DAYS = ("2026-01-10", "2026-01-11")  # each run tests on its own day
FACTS = dict.fromkeys(("checkpoint_sha256", "judged_sha256", "bento", "decision_sha256", "train_until"), "x")


@pytest.fixture(scope="module")
def clone(tmp_path_factory, raw_rows, write_dataset, networks) -> Iterator[Path]:
    """Two runs with data and checkpoints of their own; the first is v0.0.1, and the gate rejected the second."""
    root = tmp_path_factory.mktemp("compare") / "clone"
    root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        git(root, "init", "-q", "-b", "main")
        dvc(root, "init", "-q")
        (root / ".gitignore").write_text("/data/\n/checkpoints/\n")
        outputs = ["checkpoints/qin", "checkpoints/sdcnv3", "data/dataset"]
        (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"all": {"cmd": "true", "outs": outputs}}}))
        for at, day in enumerate(DAYS):
            for made in ("data", "checkpoints"):
                shutil.rmtree(root / made, ignore_errors=True)
            raw = replace(raw_rows(at, rows=1500), test_from=day, ends=f"2026-01-{11 + at}")
            data = Dataset.open(write_dataset(root / "data/dataset", raw))
            for model in networks:
                _save(root / "checkpoints" / model, model, networks[model], data, seed=at)
            commit(root, day, outputs=True)
            model = "sdcnv3" if at == 0 else None
            git(root, "tag", "-a", "-m", json.dumps({"day": day, "model": model}), f"run/{day}")
        version = {**FACTS, "day": DAYS[0], "run": f"run/{DAYS[0]}", "model": "sdcnv3", "figures": {}}
        git(root, "tag", "-a", "-m", json.dumps(version), "ctr-ranker@v0.0.1", f"run/{DAYS[0]}^{{commit}}")
        yield root


def _save(folder: Path, family: str, network: dict, data: Dataset, seed: int) -> None:
    torch.manual_seed(seed)
    model = build(family, network, data.schema)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight[PADDING] = 0
    facts = {"data_sha256": data.facts["data_sha256"], "train_until": data.midnight("test_from")}
    save(folder, Checkpoint(
        family=family, network=network, model=model.eval(), encoder=data.encoder, catalog=data.catalog,
        schema_hash=schema_hash(data.schema, data.encoder.integers, data.catalog), facts=facts,
    ))  # fmt: skip


def test_the_paired_table_is_that_of_the_scores(clone: Path, tmp_path: Path) -> None:
    """A version of another day by its own vocabularies, as the gate scores a champion."""
    git(clone, "diff", "--quiet")
    found = compare.run(clone, CONFIG, "v0.0.1", f"run/{DAYS[1]}@qin", None)
    assert found["rows"] == f"run/{DAYS[1]}" and found["test_rows"] == 300
    assert found["models"] == [{"name": "v0.0.1", "model": "sdcnv3"}, {"name": f"run/{DAYS[1]}@qin", "model": "qin"}]
    data = Dataset.open(clone / "data/dataset")  # the work tree is at the second run
    rows = data.splits["test"]
    labels, users = (data.columns[name][slice(*rows)].numpy() for name in ("label", "user"))
    git(clone, "-c", "advice.detachedHead=false", "checkout", "-q", f"run/{DAYS[0]}")
    dvc(clone, "checkout", "-q", "checkpoints/sdcnv3")
    old = load(clone / "checkpoints/sdcnv3")
    git(clone, "checkout", "-q", "main")
    dvc(clone, "checkout", "-q", "checkpoints/sdcnv3")
    unseen = pq.read_table(clone / "data/dataset" / UNSEEN)
    first = evaluate.predict_translated(old, data, unseen, rows)
    second = evaluate.predict(load(clone / "checkpoints/qin"), data, rows)
    assert found["first"]["auc"] == pytest.approx(roc_auc_score(labels, first), abs=1e-12)
    assert found["second"]["logloss"] == pytest.approx(log_loss(labels, second.astype(float)), abs=1e-9)
    expected = statistics.auc(labels, second, statistics.units_of(users), minus=first)
    gained = found["difference"]["auc"]
    assert (gained["value"], gained["se"]) == pytest.approx(expected, abs=1e-12)
    assert gained["low"] < gained["value"] < gained["high"]
    error = found["second"]["calibration_error"] - found["first"]["calibration_error"]
    assert found["difference"]["calibration_error"]["value"] == pytest.approx(error, abs=1e-9)
    assert found["slices"]["history 0"]["rows"] == int((data.columns["length"][slice(*rows)] == 0).sum())


def test_two_names_of_one_model_differ_in_nothing(clone: Path) -> None:
    found = compare.run(clone, CONFIG, "v0.0.1", f"run/{DAYS[0]}@sdcnv3", f"run/{DAYS[0]}")
    values = [one["value"] for one in found["difference"].values() if one]
    assert len(values) >= 6 and np.allclose(values, 0)


@pytest.mark.parametrize(
    ("second", "rows", "said"),
    [
        (f"run/{DAYS[1]}@qin", f"run/{DAYS[0]}", "it knows the answers. Name a newer run with --rows"),
        (f"run/{DAYS[1]}", None, f"the gate rejected it.*run/{DAYS[1]}@qin"),
        ("v9.9.9", None, "no version 'v9.9.9'; there are: v0.0.1 of 2026-01-10"),
        ("run/2020-01-01", None, "no run 'run/2020-01-01'"),
        (f"run/{DAYS[1]}@gpt", None, "DVC cannot give checkpoints/gpt"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_a_remedy(clone: Path, second, rows, said) -> None:
    with pytest.raises(ValueError, match=said):
        compare.run(clone, CONFIG, "v0.0.1", second, rows)


def test_the_command_prints_a_table_and_json(clone: Path, monkeypatch, capsys) -> None:
    from components.__main__ import main

    monkeypatch.chdir(clone)
    params = Path(compare.__file__).parents[2] / "params.yaml"
    asked = ["compare", "v0.0.1", f"run/{DAYS[1]}@qin", "--params", str(params)]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert f"300 test rows of run/{DAYS[1]}" in said and "v0.0.1 (sdcnv3)" in said and "history 20+" in said
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert f"{found['difference']['auc']['value']:+.4f}" in said
