"""compare: any two versions on the same rows, for people. It measures as `evaluate` does, and decides nothing.

    python -m components compare v0.0.1 v0.0.3
    python -m components compare v0.0.3 run/2026-01-11@qin --rows run/2026-01-12

Both are taken as the gate judged them, before their refit. Checkpoints and rows come out of DVC at the tags, so the
work tree stays as it is. The rows are the test rows of a run. A model that has seen them is refused.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from components.common import stored
from components.common.dataset import UNSEEN, Dataset
from components.release import evaluate, slices, statistics, versions
from components.release.measures import EvaluateConfig
from models.checkpoint import Checkpoint, load


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two: its name, and the model of a commit."""

    name: str
    commit: str
    model: str


def run(root: Path, config: EvaluateConfig, first: str, second: str, rows: str | None) -> dict[str, Any]:
    """Figures of both, and second minus first with standard errors and intervals, whole and by slice.

    first, second  a version, such as v0.0.3, or a run with a model, such as run/2026-01-11@qin
    rows           the run whose test rows are scored; None: the newest

    Raises ValueError where there is no such version or run, or one of the two has seen the rows.
    """
    sides = [side(root, text) for text in (first, second)]
    tag = rows or newest(root)
    with tempfile.TemporaryDirectory(prefix="clickloop-compare-") as scratch:
        dataset = Path(scratch) / "dataset"
        stored.get(root, versions.git(root, "rev-parse", "--verify", f"{tag}^{{commit}}"), "data/dataset", dataset)
        data = Dataset.open(dataset)
        models = []
        for at, one in enumerate(sides):
            folder = Path(scratch) / str(at)
            stored.get(root, one.commit, f"checkpoints/{one.model}", folder)
            models.append(load(folder))
            require_unseen(models[-1], one.name, data, tag)
        return measured(config, dict(zip(("first", "second"), models, strict=True)), data, dataset) | {
            "rows": tag,
            "models": [{"name": one.name, "model": one.model} for one in sides],
        }


def side(root: Path, text: str) -> Side:
    """Raises ValueError where neither the versions nor the runs have it."""
    name, _, model = text.partition("@")
    if not name.startswith(versions.RUN):
        version = versions.find(root, text)
        return Side(name=version.version, commit=version.commit, model=version.facts["model"])
    facts = json.loads(versions.git(root, "tag", "--list", "--format=%(contents:subject)", name) or "null")
    if facts is None:
        raise ValueError(f"no run {name!r}; `git tag --list 'run/*'` names them")
    if not (model or facts.get("model")):
        raise ValueError(f"{name}: the gate rejected it, so it has no model that ships; name one, such as {name}@qin")
    commit = versions.git(root, "rev-parse", f"{name}^{{commit}}")
    return Side(name=text, commit=commit, model=model or facts["model"])


def newest(root: Path) -> str:
    """The tag of the newest run. Raises ValueError where there is none."""
    tags = versions.git(root, "tag", "--list", f"{versions.RUN}*").splitlines()
    days = [tag for tag in tags if re.fullmatch(r"run/\d{4}-\d\d-\d\d", tag)]
    if not days:
        raise ValueError("there is no run yet, so there are no rows to compare on: `python -m components run`")
    return max(days)


def require_unseen(trained: Checkpoint, name: str, data: Dataset, tag: str) -> None:
    """Raises ValueError where a model has seen the rows, or where nobody can tell."""
    if trained.facts.get("data_sha256") == data.facts["data_sha256"]:
        return  # its own test rows
    seen, test = trained.facts.get("train_until"), data.midnight("test_from")
    if seen is None or test is None:
        raise ValueError(f"{name} and {tag} are of data without times: nobody can tell whether it has seen these rows")
    if seen > test:
        raise ValueError(
            f"{name} has seen the days until {seen}, and the test rows of {tag} begin at {test}: it knows the answers. "
            "Name a newer run with --rows"
        )


def measured(config: EvaluateConfig, models: dict[str, Checkpoint], data: Dataset, dataset: Path) -> dict[str, Any]:
    start, end = data.splits["test"]
    labels = data.columns["label"][start:end].numpy().astype(np.int8)
    users = data.columns["user"][start:end].numpy()
    unseen = pq.read_table(dataset / UNSEEN)
    scores = {
        name: evaluate.predict(model, data, (start, end))
        if model.facts.get("data_sha256") == data.facts["data_sha256"]
        else evaluate.predict_translated(model, data, unseen, (start, end))
        for name, model in models.items()
    }
    drawn = statistics.bootstrap(
        labels, scores, users, bins=config.calibration_bins, resamples=config.bootstrap, seed=config.seed,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    paired = {"": scores["second"], "first": scores["first"]}  # `evaluate` takes this model's minus a version's
    drawn_pairs = {"": drawn["second"], "first": drawn["first"]}
    return {
        "test_rows": len(labels),
        **{name: _figures(drawn[name]) for name in models},
        "difference": evaluate.differences(labels, paired, "first", users, drawn_pairs),
        "score_drift": statistics.drift(scores["first"], scores["second"]),
        "slices": {
            name: {"rows": int(mask.sum()), "auc": evaluate.difference(mask, labels, paired, "first", users)}
            for name, mask in slices.masks(config.slices, data).items()
        },
    }


def _figures(drawn: dict[str, np.ndarray]) -> dict[str, float | None]:
    """On all rows, which come before the resamples; None where a figure means nothing."""
    return {name: float(found[0]) if np.isfinite(found[0]) else None for name, found in drawn.items()}
