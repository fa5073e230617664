"""The lock, CI and the commit hook: what is installed is checked, and what CI runs is pinned."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def workflow() -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())


def test_every_package_of_the_lock_has_a_hash() -> None:
    packages = re.split(r"\n(?=\S)", LOCK.strip())
    assert len(packages) > 300
    for package in packages:
        assert re.match(r"\S+==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", package), package


def test_the_lock_is_of_both_builds_of_torch() -> None:
    """Its hashes are those of PyPI and of the CPU wheel, and no package of CUDA is in it."""
    (cpu,) = re.findall(r"^TORCH_CPU := (\w{64})$", MAKEFILE, re.MULTILINE)
    (torch,) = re.findall(r"^torch==2\.13\.0 \\\n((?:    --hash\S+.*\n)+)", LOCK, re.MULTILINE)
    assert cpu in torch and torch.count("--hash") > 1
    assert not re.search(r"^(\S+\+cpu|cuda-|triton=|nvidia-(cu|nc|nv))", LOCK, re.MULTILINE)


@pytest.mark.parametrize("right", [True, False])
def test_a_hash_is_checked_for_a_build_with_a_local_version(tmp_path: Path, right: bool) -> None:
    """`make .venv` relies on it: `torch==2.13.0` with hashes installs 2.13.0+cpu, if one of the hashes is its own."""
    wheel = tmp_path / "tiny-1.0+cpu-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as opened:
        opened.writestr("tiny.py", "")
        opened.writestr("tiny-1.0+cpu.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0+cpu\n")
        opened.writestr(
            "tiny-1.0+cpu.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        opened.writestr("tiny-1.0+cpu.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes() if right else b"").hexdigest()
    (tmp_path / "lock").write_text(f"tiny==1.0 \\\n    --hash=sha256:{'0' * 64} \\\n    --hash=sha256:{digest}\n")
    options = ["--verify-hashes", "--no-index", "--find-links", str(tmp_path), "--target", str(tmp_path / "made")]
    done = subprocess.run(
        [sys.executable, "-m", "uv", "pip", "install", *options, "-r", str(tmp_path / "lock")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == right, done.stderr
    assert right or "Hash mismatch" in done.stderr
    assert "--verify-hashes -r requirements.lock" in MAKEFILE


def test_ci_may_read_and_nothing_else() -> None:
    assert workflow()["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in workflow()["jobs"].values())


def test_actions_are_pinned_by_commit() -> None:
    lines = re.findall(r"uses: (.*)", (ROOT / ".github/workflows/ci.yml").read_text())
    assert lines
    for line in lines:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line), line


def test_a_commit_runs_what_ci_runs() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"  # no network
    assert [hook["entry"] for hook in repository["hooks"]] == ["make lint"]
    assert re.search(r"^test: lint\b", MAKEFILE, re.MULTILINE)
    assert "make test" in (ROOT / ".ci/run").read_text()
