"""The verdict of validation. Every step that reads canonical data asks for it first."""

from __future__ import annotations

from pathlib import Path

from components.common.artifacts import folder_hash, read_json


def require(report: Path, canonical: Path) -> None:
    """Raises ValueError unless the report says that exactly these bytes passed."""
    content = read_json(report, "validate")
    if not content["passed"]:
        raise ValueError(f"{report}: the data did not pass; correct them and run `dvc repro validate`")
    if content["canonical_sha256"] != folder_hash(canonical):
        raise ValueError(f"{report} is about other data than {canonical} holds now; run `dvc repro validate`")
