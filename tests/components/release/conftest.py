"""`clone`: a clone whose runs of 2026-01-10 and -11 are closed and pushed. No version yet, nothing live."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.components.release.runs import ENVIRONMENT, close, repository


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        root = repository(tmp_path_factory.mktemp("runs") / "clone")
        close(root, "2026-01-10")
        close(root, "2026-01-11")
    return root


@pytest.fixture
def clone(two_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy for each test."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    shutil.copytree(two_runs, tmp_path / "clone", symlinks=True)
    return tmp_path / "clone"
