"""package: what ships -> a Bento as a folder, with golden requests. It builds nothing if the gate rejects.

package.json    what was built, from which bytes and for which versions of the packages that serve
model_card.md   what ships and how good it is, for people; the Bento has it too, as its README
bento/          `bentoml serve "$PWD/artifacts/package/bento"`: BentoML doubles a relative path
golden.json     requests, and the scores that the model gives them without the server's code
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

import bento
from bento import ITEM_STATE, MAX_BODY_BYTES, MAX_CANDIDATES, SERVING
from bento.build import requirements
from components.common.artifacts import file_hash, folder_hash, new_folder, read_json, write_json
from components.common.contracts import read_parquet
from components.common.dataset import Dataset, popularity_level
from components.release import card
from models.checkpoint import CHECKPOINT_FILES, Checkpoint, checkpoint_hash, load
from models.schema import SPECIAL, UNKNOWN, Batch, Feature, bucket

GOLDEN_CANDIDATES = 20
CODE = Path(bento.__file__).parents[1]
NO_TIME = "1970-01-01T00:00:00+00:00"
NO_CACHES = shutil.ignore_patterns("__pycache__")


@dataclass(frozen=True, kw_only=True)
class PackageConfig:
    """name           the Bento's name
    max_candidates   ids that one request may hold
    golden_requests  requests whose scores the served Bento must repeat
    """

    name: str
    max_candidates: int
    golden_requests: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?", self.name):
            raise ValueError(f"name is {self.name!r}; use lower-case letters, digits, - and _, at most 63")
        if not 1 <= self.max_candidates <= MAX_CANDIDATES:
            raise ValueError(f"max_candidates is {self.max_candidates}; it must be in [1, {MAX_CANDIDATES}]")
        if self.golden_requests < 2:
            raise ValueError(
                f"golden_requests is {self.golden_requests}; give at least 2, one for each kind of history"
            )


def run(
    config: PackageConfig, decision: Path, evaluations: Path, checkpoint: Path, dataset: Path, features: Path,
    repo: Path, output: Path,
) -> dict[str, Any]:  # fmt: skip
    """Returns package.json. Raises ValueError where the bytes on disk are not those that the decision ships.

    decision     as `refit` writes it: the gate's, and `shipped`
    evaluations  a folder for each model; the model card has the figures of the judged one
    checkpoint   what ships: the refit, or the model that the gate judged

    The Bento's version is a hash of all that it serves from: model, item state, code, the versions of the packages that
    serve, and `repo`, the Feast repo whose definitions say what the online store returns.
    """
    judged = read_json(decision, "refit")
    if judged["verdict"] != "approve":
        with new_folder(output) as folder:
            package: dict[str, Any] = {"built": False, "reason": judged["reasons"]}
            write_json(folder / "package.json", package)
        return package
    data = Dataset.open(dataset)
    ranker = verify(judged, checkpoint, data, dataset)
    evaluation = evaluated(judged, evaluations)
    sources = Sources(features / "sources")
    with new_folder(output) as folder, tempfile.TemporaryDirectory(prefix="clickloop-bento-") as scratch:
        model = Path(scratch) / "model"
        model.mkdir()
        for name in CHECKPOINT_FILES:
            shutil.copy(checkpoint / name, model / name)
        save_file(item_state(ranker, sources.popularity), model / ITEM_STATE)
        code = Path(scratch) / "code"
        for part in ("bento", "models"):
            shutil.copytree(CODE / part, code / part, ignore=NO_CACHES)
        hashes = {
            "checkpoint_sha256": judged["shipped"]["checkpoint_sha256"],
            "data_sha256": judged["data_sha256"],
            "schema_sha256": ranker.schema_hash,
            "item_state_sha256": file_hash(model / ITEM_STATE),
            "code_sha256": folder_hash(code),
            "feature_repo_sha256": folder_hash(shutil.copytree(repo, Path(scratch) / "repo", ignore=NO_CACHES)),
            "packages": requirements(),
        }
        served = json.dumps([hashes, config.max_candidates], sort_keys=True)
        version = f"{judged['model']}-{hashlib.sha256(served.encode()).hexdigest()[:12]}"
        write_json(model / SERVING, {"version": version, "max_candidates": config.max_candidates})
        facts: dict[str, Any] = {"version": version, "model": judged["model"], **hashes}
        text = card.write(f"{config.name}:{version}", judged, evaluation, ranker, data, hashes)
        (folder / "model_card.md").write_text(text, encoding="utf-8")
        build_bento(config.name, version, model, code, folder.resolve() / "bento", facts, text, Path(scratch) / "home")
        write_json(folder / "golden.json", golden(config, ranker, data, sources))
        package = {
            "built": True,
            "tag": f"{config.name}:{version}",
            **facts,
            "judged_sha256": judged["checkpoint_sha256"],
            "train_until": judged["shipped"]["train_until"],
            "max_candidates": config.max_candidates,
            "max_body_bytes": MAX_BODY_BYTES,
            "model_bytes": _size(model),
            "bento_bytes": _size(folder / "bento"),
        }
        write_json(folder / "package.json", package)
    return package


def verify(judged: dict[str, Any], source: Path, data: Dataset, dataset: Path) -> Checkpoint:
    """The checkpoint, if the hashes say that it, the dataset and the decision belong together."""
    found, shipped = checkpoint_hash(source), judged["shipped"]["checkpoint_sha256"]
    if found != shipped:
        raise ValueError(f"{source} hashes to {found}, the decision ships {shipped}; run `dvc repro refit`")
    if data.facts["data_sha256"] != judged["data_sha256"]:
        raise ValueError(
            f"{dataset} holds data {data.facts['data_sha256']}, the gate judged on {judged['data_sha256']}; "
            "run `dvc repro gate`"
        )
    checkpoint = load(source)
    if checkpoint.schema_hash != data.facts["schema_hash"]:
        raise ValueError(
            f"{source} was trained under schema {checkpoint.schema_hash}, {dataset} has {data.facts['schema_hash']}; "
            "run `dvc repro`"
        )
    return checkpoint


def evaluated(judged: dict[str, Any], evaluations: Path) -> dict[str, Any]:
    """The evaluation of the model that the gate approved. Raises ValueError where it is of other bytes."""
    name = judged["model"]
    file = evaluations / name / "evaluation.json"
    found: dict[str, Any] = read_json(file, f"evaluate@{name}")
    if found["checkpoint_sha256"] != judged["checkpoint_sha256"]:
        raise ValueError(
            f"{file} is of checkpoint {found['checkpoint_sha256']}, the gate judged {judged['checkpoint_sha256']}; "
            "run `dvc repro gate`"
        )
    return found


class Sources:
    """What the online store was filled from: the newest row of each user and item."""

    def __init__(self, folder: Path) -> None:
        self.history = _newest(folder / "user_history.parquet", "user_id")["history"]
        self.profile = _newest(folder / "user_profile.parquet", "user_id")
        self.popularity = _newest(folder / "item_popularity.parquet", "item_id")


def _newest(path: Path, key: str) -> pd.DataFrame:
    frame = read_parquet(path).to_pandas().sort_values([key, "event_timestamp"], kind="stable")
    return frame.groupby(key).tail(1).set_index(key).drop(columns="event_timestamp")


def item_state(checkpoint: Checkpoint, popularity: pd.DataFrame) -> dict[str, Tensor]:
    """For each impression feature of origin "item": the index of each catalog row, int64 [I].

    popularity  counts by item id; the feature NAME_level is the level of its column NAME, or missing without a row
    """
    state: dict[str, Tensor] = {}
    rows = checkpoint.catalog.rows(torch.from_numpy(popularity.index.to_numpy(dtype=np.int64).copy()))
    known = rows != UNKNOWN
    for field in _origin(checkpoint, "item"):
        column = field.name.removesuffix("_level")
        if column == field.name or column not in popularity:
            raise ValueError(
                f"item_popularity has {list(popularity.columns)}, nothing for the feature {field.name!r}; "
                "an impression feature of origin item is the level of one of these"
            )
        levels = popularity_level(popularity[column].to_numpy()).tolist()
        state[field.name] = torch.zeros(len(checkpoint.catalog), dtype=torch.int64)
        state[field.name][rows[known]] = checkpoint.encoder.encode(field.name, levels)[known]
    return state


def _origin(checkpoint: Checkpoint, origin: str) -> list[Feature]:
    return [field for field in checkpoint.encoder.schema.impression_fields if field.origin == origin]


def build_bento(
    name: str, version: str, model: Path, code: Path, output: Path, facts: dict[str, Any], description: str, home: Path
) -> None:
    """Build with its own process, folder and BENTOML_HOME, so that the user's home and store stay as they are."""
    words = {
        "name": name,
        "version": version,
        "model": str(model),
        "output": str(output),
        "packages": facts["packages"],
        "labels": {"version": facts["version"], "model": facts["model"]},
        "metadata": facts,
        "description": description,
    }
    env = os.environ | {
        "BENTOML_HOME": str(home),
        "BENTOML_DO_NOT_TRACK": "True",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "bento.build", json.dumps(words)]
    done = subprocess.run(command, cwd=code, env=env, capture_output=True, text=True)
    if done.returncode or not (output / "bento.yaml").is_file():
        raise RuntimeError(f"the Bento was not built (exit {done.returncode}):\n{(done.stdout + done.stderr)[-4000:]}")
    for file in (output / "bento.yaml", *output.glob("models/*/*/model.yaml")):  # equal inputs build equal bytes
        file.write_text(re.sub(r"(creation_time: )'.*'", rf"\1'{NO_TIME}'", file.read_text()))


# ---- golden requests --------------------------------------------------------------------------------------------


def golden(config: PackageConfig, checkpoint: Checkpoint, data: Dataset, sources: Sources) -> list[dict[str, Any]]:
    """Requests, and what the server must answer. Every second one brings a history, the others use the online store's.

    Each is {request, scores in the candidates' order, degraded}. The histories come from the dataset: rows of the test
    days point at them. Users of the other requests have a history in the store, unless nobody has one.
    Every fifth request holds an item that the catalog does not know.
    """
    rng = np.random.default_rng(0)
    catalog, log = data.catalog, data.click_log
    start, end = data.splits["test"]
    test_rows = torch.from_numpy(rng.permutation(np.arange(start, end))[: config.golden_requests])
    pointers = data.batch(test_rows)
    users = data.user_ids(test_rows)
    in_store = sources.history if len(sources.history) else sources.profile
    stored = rng.permutation(in_store.index.to_numpy())[: config.golden_requests]
    item_ids = catalog.item_ids_I[SPECIAL:].numpy()
    asked = []
    for i in range(config.golden_requests):
        candidates = rng.choice(item_ids, min(GOLDEN_CANDIDATES, config.max_candidates, len(item_ids)), replace=False)
        if i % 5 == 0:
            candidates[-1] = item_ids.max() + 1
        context = {field.name: _some_value(checkpoint, field, rng) for field in _origin(checkpoint, "context")}
        request = {"candidates": candidates.tolist(), "context": context}
        if i % 2 == 0:
            row = (i // 2) % len(users)
            request["user_id"] = int(users[row])
            clicks_C = log[int(pointers.start_B[row]) : int(pointers.end_B[row])].long()
            request["history"] = catalog.item_ids_I[clicks_C[clicks_C != UNKNOWN]].tolist()
        else:
            request["user_id"] = int(stored[(i // 2) % len(stored)])
            history = sources.history.get(request["user_id"], np.empty(0))
            clicks_C = catalog.rows(torch.from_numpy(history.astype(np.int64)))
        clicks_C = clicks_C[clicks_C != UNKNOWN]
        asked.append(
            {
                "request": request,
                "scores": offline_scores(checkpoint, sources, request, clicks_C).tolist(),
                "degraded": ["unknown_items"] if i % 5 == 0 else [],
            }
        )
    return asked


def _some_value(checkpoint: Checkpoint, field: Feature, rng: np.random.Generator) -> str | None:
    """A value of the vocabulary as a client would send it, or None."""
    values = checkpoint.encoder.integers[field.name].tolist() if field.vocab is None else field.vocab
    at = int(rng.integers(-1, len(values)))
    if at < 0:
        return None
    if field.numeric and (level := int(values[at])) > 2:
        return str(math.exp(math.sqrt(level + 0.5)))  # in the middle of the bucket
    return str(values[at])


@torch.inference_mode()
def offline_scores(checkpoint: Checkpoint, sources: Sources, request: dict[str, Any], clicks_C: Tensor) -> Tensor:
    """Probabilities by the model's own forward pass; clicks_C are the catalog rows of the clicks, oldest first."""
    candidates, user = request["candidates"], request["user_id"]
    fields = []
    for field in checkpoint.encoder.schema.impression_fields:
        values: list[Any]
        if field.origin == "item":
            counts = sources.popularity[field.name.removesuffix("_level")].reindex(candidates)
            # an item that the catalog does not know has no state, even if it was counted
            values = [None if np.isnan(n) else int(popularity_level(np.array(n))) for n in counts]
        elif field.origin == "context":
            value = request["context"][field.name]
            values = [bucket(float(value)) if field.numeric and value else value] * len(candidates)
        elif field.name == "user_id":
            values = [user] * len(candidates)
        else:
            value = sources.profile[field.name].get(user)
            values = [None if pd.isna(value) else value] * len(candidates)
        fields.append(checkpoint.encoder.encode(field.name, values))
    B, C = len(candidates), len(clicks_C)
    batch = Batch(
        torch.stack(fields, 1) if fields else torch.zeros(B, 0, dtype=torch.int64),
        checkpoint.catalog.rows(torch.tensor(candidates)),
        torch.full((B,), max(0, C - checkpoint.encoder.schema.history_length)),
        torch.full((B,), C),
    )
    return checkpoint.calibration(checkpoint.model(batch, checkpoint.catalog, clicks_C).logit_B).double()


def summary(found: dict[str, Any]) -> dict[str, str]:
    """package.json for a person."""
    if not found["built"]:
        return {"Bento": "none: the gate rejected", "reasons": "; ".join(found["reason"])}
    return {
        "Bento": found["tag"],
        "size": f"{found['bento_bytes'] / 2**20:,.1f} MiB, {found['model_bytes'] / 2**20:,.1f} MiB of it the model",
        "a request": f"at most {found['max_candidates']:,} candidates and {found['max_body_bytes'] / 2**10:,.0f} KiB",
    }


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
