"""Runs that are closed, in a git and DVC repository with a remote: commit, tag run/DAY, outputs in DVC.

The world, its checkpoints and features are real; `package` builds the Bento where a test serves it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from components.common.artifacts import write_json
from models.checkpoint import CHECKPOINT_FILES, checkpoint_hash
from tests.bento.world import World, make_world

PROJECT = Path(__file__).resolve().parents[3]
OUTPUTS = ["artifacts/package", "artifacts/refit/decision.json", "artifacts/smoke/smoke.json", "checkpoints/qin",
           "checkpoints/refit", "data/features"]  # fmt: skip
ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    **{f"GIT_{role}_{what}": f"{what.lower()}@x" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    "DVC_NO_ANALYTICS": "1",
}


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def dvc(root: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, check=True, capture_output=True)


def repository(root: Path) -> Path:
    """A clone of the project, with a tiny world in it and no run. The caller sets ENVIRONMENT."""
    (root / "feature_repo").parent.mkdir(parents=True, exist_ok=True)
    git(root, "init", "-q", "-b", "main")
    dvc(root, "init", "-q")
    dvc(root, "remote", "add", "-q", "-d", "local", ".dvc-remote")
    world(root)
    shutil.copy(PROJECT / "params.yaml", root / "params.yaml")
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"all": {"cmd": "true", "outs": OUTPUTS}}}))
    write_json(root / "champion.json", {"version": None})
    (root / ".gitignore").write_text(
        "/.live/\n/.dvc-remote/\n/data/\n/checkpoints/\n/artifacts/\n/decision.json\n/evaluations/\n"
    )
    commit(root, "the project")
    return root


def world(root: Path) -> World:
    return make_world(root)


def commit(root: Path, message: str, *, outputs: bool = False) -> None:
    """With outputs: those that lie in the work tree, by dvc.lock."""
    if outputs:
        dvc(root, "commit", "-q", "-f")
    git(root, "add", "-A")
    git(root, "commit", "-q", "--allow-empty", "-m", message)


def features(root: Path, until: datetime) -> None:
    """What the stage `features` leaves for a day: here the same rows each day."""
    folder = root / "data/features"
    write_json(
        folder / "receipt.json",
        {
            "rows": {}, "clicks": 0, "until": until.isoformat(), "log_until": until.isoformat(),
            "known_until": until.isoformat(), "embedding_version": "test",
        },
    )  # fmt: skip
    none = pa.table({"user_id": pa.array([], pa.int64()), "item_id": pa.array([], pa.int64())})
    pq.write_table(none, folder / "click_log.parquet")


def close(root: Path, day: str, *, build: bool = False, push: bool = True, **changed: dict[str, Any]) -> str:
    """A run of the day that the gate approved, of which each day has another Bento. Returns its tag.

    changed  decision, package or smoke: keys to overwrite, for a run that must be refused
    """
    judged, shipped = root / "checkpoints/qin", root / "checkpoints/refit"
    for folder in (judged, shipped):
        facts = {"train_until": day, "is": folder.name}
        config = json.loads((root / "checkpoints/qin/config.json").read_text())
        shutil.copytree(judged, shipped, dirs_exist_ok=True) if folder == shipped else None
        write_json(folder / "config.json", config | {"facts": config.get("facts", {}) | facts})
    features(root, datetime.fromisoformat(day).replace(tzinfo=UTC) + timedelta(days=1))
    decision = json.loads((root / "decision.json").read_text()) | {
        "checkpoint_sha256": checkpoint_hash(judged),
        "candidates": {"qin": {"auc": 0.7 + int(day[-2:]) / 1000, "rules": [
            {"rule": "auc", "value": 0.7, "must_be": ">=", "limit": 0.6, "passed": True},
            {"rule": "calibration_error", "value": 0.01, "must_be": "<=", "limit": 0.1, "passed": True},
        ]}},
        "shipped": {"checkpoint_sha256": checkpoint_hash(shipped), "kind": "refit", "train_until": f"{day}T24:00:00",
                    "checks": [], "reasons": []},
    }  # fmt: skip
    write_json(root / "artifacts/refit/decision.json", decision | changed.get("decision", {}))
    evaluation = root / "evaluations/qin/evaluation.json"
    write_json(evaluation, json.loads(evaluation.read_text()) | {"checkpoint_sha256": decision["checkpoint_sha256"]})
    package = root / "artifacts/package"
    if build:
        tag = _build(root, package)
    else:
        tag = f"ctr-ranker:qin-{day}"
        model = package / "bento/models/ctr_ranker_model/qin"
        shutil.rmtree(package, ignore_errors=True)
        model.mkdir(parents=True)
        for name in CHECKPOINT_FILES:
            (model / name).parent.mkdir(exist_ok=True)
            shutil.copy(shipped / name, model / name)
        (package / "bento/bento.yaml").write_text(f"version: qin-{day}\n")
        write_json(package / "golden.json", [])
        facts = {"built": True, "tag": tag, "model": "qin", "checkpoint_sha256": checkpoint_hash(shipped)}
        write_json(package / "package.json", facts | changed.get("package", {}))
    write_json(root / "artifacts/smoke/smoke.json", {"passed": True, "tag": tag} | changed.get("smoke", {}))
    commit(root, f"run {day}", outputs=True)
    git(root, "tag", "-f", "-m", json.dumps({"day": day}), f"run/{day}")
    if push:
        dvc(root, "push", "-q")
    return f"run/{day}"


def _build(root: Path, output: Path) -> str:
    from components.release import package

    config = package.PackageConfig(name="ctr-ranker", max_candidates=40, golden_requests=4)
    decision, shipped = root / "artifacts/refit/decision.json", root / "checkpoints/refit"
    return str(
        package.run(
            config,
            decision,
            root / "evaluations",
            shipped,
            root / "data/dataset",
            root / "data/features",
            root / "feature_repo",
            output,
        )["tag"]
    )
