"""What the quality benchmarks share: a source's dataset by the project's own stages, one training run, its figures."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import ROOT, one_thread

one_thread()

import numpy as np  # noqa: E402 - one thread first, and this project's code
import torch  # noqa: E402
from sklearn.metrics import log_loss, roc_auc_score  # noqa: E402

from components.common.config import load  # noqa: E402
from components.common.dataset import Dataset  # noqa: E402
from components.common.scoring import score  # noqa: E402
from components.common.splits import SplitConfig  # noqa: E402
from components.data import ingest, validate  # noqa: E402
from components.features import dataset, embed, features  # noqa: E402
from components.features.dataset import DatasetConfig  # noqa: E402
from components.features.views import FeaturesConfig  # noqa: E402
from components.release.measures import group_auc  # noqa: E402
from components.training.config import TrainConfig  # noqa: E402
from components.training.loop import Loop  # noqa: E402
from models.layers import Ranker  # noqa: E402
from models.schema import Schema  # noqa: E402

PARAMS = ROOT / "params.yaml"
torch.set_num_threads(1)  # a script may have imported torch before this


def settings(section: str, config: type[Any], **changes: Any) -> Any:
    """A section of the project's params.yaml with these fields changed."""
    with chdir(ROOT):  # the paths in it are relative to the project's root
        return replace(load(PARAMS, section, config), **changes)


def build(source: ingest.IngestConfig, featured: FeaturesConfig, rows: DatasetConfig, folder: Path) -> Dataset:
    """A source's dataset, by the project's stages from ingest to dataset. `folder` is laid out as the project is."""
    split, data = settings("split", SplitConfig), folder / "data"
    canonical, report, embedding = data / "canonical", data / "report.json", data / "embedding"
    with chdir(ROOT):
        ingest.run(source, canonical)
    validate.run(settings("validate", validate.ValidateConfig), canonical, report, data / "docs")
    embed.run(settings("embed", embed.EmbedConfig), split, canonical, report, embedding)
    repo = folder / "feature_repo"  # Feast's paths are relative to it
    shutil.copytree(ROOT / "feature_repo", repo, ignore=shutil.ignore_patterns("__pycache__"))
    features.run(featured, canonical, report, embedding, data / "features")
    dataset.run(rows, split, canonical, data / "features", repo, data / "dataset")
    return Dataset.open(data / "dataset")


def with_history(data: Dataset, length: int) -> Dataset:
    """The same rows with the newest `length` clicks of each history alone; 0 leaves no history."""
    encoder = replace(data.encoder, schema=replace(data.schema, history_length=length))
    return replace(data, encoder=encoder, columns={**data.columns, "length": data.columns["length"].clamp(max=length)})


def run(
    name: str, make: Callable[[Schema], Ranker], config: TrainConfig, data: Dataset
) -> tuple[Ranker, dict[str, Any]]:
    """Train as the stage does, early stopping on the valid days. Returns the best epoch's model and its figures."""
    torch.manual_seed(config.seed)
    torch._dynamo.reset()  # it compiles the same code for a few models only, and then no more
    model = make(data.schema).to(config.device)
    with tempfile.TemporaryDirectory() as scratch:  # of the run's state, which is of no use later
        began = time.perf_counter()
        loop = Loop(name, config, model, data, scratch=Path(scratch))
        pass_seconds = loop.run()
        spent = time.perf_counter() - began
    state = loop.state
    model.to("cpu").load_state_dict(state.best)
    first, last = data.splits["train"]
    return model, {
        "seed": config.seed,
        "rows": last - first,
        "seconds": round(spent, 1),
        "rows_per_second": round((last - first) / pass_seconds),
        "epochs": state.progress.epoch,
        "best_epoch": state.progress.best_epoch,
        **{f"valid_{key}": value for key, value in figures(model, data, "valid").items()},
        **{f"test_{key}": value for key, value in figures(model, data, "test").items()},
    }


def figures(model: Ranker, data: Dataset, split: str) -> dict[str, float]:
    """AUC, group AUC (by user) and logloss of the rows of a split; with an oracle, its AUC and the share reached."""
    rows = data.splits[split]
    part = slice(*rows)
    logits, _ = score(model, data, rows)
    scores, labels = torch.sigmoid(logits).numpy().astype(np.float64), data.columns["label"][part].numpy()
    grouped = group_auc(labels, scores, data.columns["user"][part].numpy())
    found = {"auc": roc_auc_score(labels, scores), "group_auc": grouped or 0.5, "logloss": log_loss(labels, scores)}
    if "oracle" in data.columns:
        found["oracle"] = roc_auc_score(labels, data.columns["oracle"][part].numpy())
        found["share"] = (found["auc"] - 0.5) / (found["oracle"] - 0.5)
    return {key: round(float(value), 5) for key, value in found.items()}


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)
