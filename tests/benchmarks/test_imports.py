"""The benchmarks run by hand only, so a name that moves would break them unnoticed: each is imported here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.slow
def test_every_benchmark_finds_what_it_imports() -> None:
    names = sorted(file.stem for file in FOLDER.glob("*.py") if file != Path(__file__))
    program = f"""
import importlib, traceback
for name in {names}:
    try:
        importlib.import_module(name)
    except Exception:
        print(name, traceback.format_exc())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=FOLDER, capture_output=True, text=True, check=True)
    assert done.stdout == "", done.stdout
