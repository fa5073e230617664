"""An output is whole or not there: after a failure, after a SIGKILL, on a disk that is full."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from components.common.artifacts import file_hash, folder_hash, new_file, new_folder, read_json, write_json

ROOT = Path(__file__).resolve().parents[3]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def old(tmp_path) -> Path:
    """What a run before left: out/a, out/sub/b, and the file out.json."""
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "a").write_text("old a")
    (tmp_path / "out" / "sub" / "b").write_text("old b")
    (tmp_path / "out.json").write_text("old")
    return tmp_path


def test_a_new_folder_takes_the_place_of_the_old_one(old) -> None:
    with new_folder(old / "out") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "c").write_text("new")
        written = folder.stat().st_ino
        assert tree(old / "out") == {"a": b"old a", "sub/b": b"old b"}  # the old one, until the new one is whole
    assert tree(old) == {"out/deep/c": b"new", "out.json": b"old"}
    assert (old / "out").stat().st_ino == written


def test_a_new_file_takes_the_place_of_the_old_one(old) -> None:
    with new_file(old / "out.json") as scratch:
        scratch.write_text("new")
        assert (old / "out.json").read_text() == "old"
        written = scratch.stat().st_ino
    assert (old / "out.json").stat().st_ino == written  # renamed, in one step; a copy can be cut in its middle
    with new_file(old / "not" / "there" / "yet.json") as scratch:
        scratch.write_text("first")
    assert tree(old)["out.json"] == b"new"
    assert tree(old)["not/there/yet.json"] == b"first"
    assert not [name for name in tree(old) if "partial" in name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_output_and_no_other(old, error) -> None:
    before = tree(old)

    def spoil(file: Path) -> None:
        file.write_text("half")
        raise error

    with pytest.raises(error), new_folder(old / "out") as folder:
        spoil(folder / "a")
    with pytest.raises(error), new_file(old / "out.json") as scratch:
        spoil(scratch)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(old / "out.json", {"auc": float("nan")})
    assert tree(old) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from components.common.artifacts import new_file, new_folder
with {kind}(Path(sys.argv[1])) as scratch:
    file = scratch / "a" if scratch.is_dir() else scratch
    file.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("kind", "name"), [("new_folder", "out"), ("new_file", "out.json")])
@pytest.mark.parametrize("there", [True, False], ids=["over an old one", "for the first time"])
def test_a_kill_leaves_nothing_half_written_and_the_next_run_clears_up(old, kind, name, there) -> None:
    if not there:
        name = f"first_{name}"
    before = tree(old)
    done = subprocess.run([sys.executable, "-c", KILLED.format(kind=kind), str(old / name)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    after = tree(old)
    left = {file: after.pop(file) for file in set(after) - set(before)}
    assert after == before
    assert b"half" in left.values()
    assert all(".partial" in file for file in left)  # under a name that nobody reads
    if kind == "new_folder":
        with new_folder(old / name) as folder:
            (folder / "b").write_text("whole")
        assert tree(old / name) == {"b": b"whole"}  # nothing of the killed run is in it
    else:
        with new_file(old / name) as scratch:
            scratch.write_text("whole")
        assert (old / name).read_text() == "whole"
    assert not [file for file in tree(old) if ".partial" in file]


EVERY_INSTANT = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from components.common import artifacts

root, path = Path(sys.argv[1]), Path(sys.argv[1]) / "out"
if sys.argv[2] == "rename":
    artifacts.exchange = lambda *_: False  # as on a file system that cannot

def fill(folder, word):
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c"):
        (folder / name).write_text(word)

def found():
    files = {str(f.relative_to(path)): f.read_text() for f in path.rglob("*") if f.is_file()}
    words = {*files.values()}
    return words.pop() if len(files) == 3 and len(words) == 1 else f"broken: {files}"

for instant in itertools.count():
    shutil.rmtree(root)
    fill(path, "old")
    if (child := os.fork()) == 0:
        lines = itertools.count()

        def trace(frame, event, argument):
            if frame.f_code.co_filename in (artifacts.__file__, shutil.__file__):
                if event == "line" and next(lines) == instant:
                    os.kill(os.getpid(), signal.SIGKILL)
                return trace

        with artifacts.new_folder(path) as folder:
            fill(folder, "new")
            sys.settrace(trace)  # from where new_folder goes on
        os._exit(0)
    _, status = os.waitpid(child, 0)
    before = found()
    try:
        with artifacts.new_folder(path) as folder:
            raise InterruptedError  # the next run, which fails
    except InterruptedError:
        pass
    print(instant, os.WIFSIGNALED(status), before, found(), sorted(f.name for f in root.iterdir()), sep="|")
    if not os.WIFSIGNALED(status):
        break
"""


@pytest.mark.parametrize("way", ["exchange", "rename"])
def test_a_kill_at_any_instant_leaves_the_old_folder_or_the_new_one(tmp_path, way) -> None:
    """A process is killed at every line that puts the new folder in its place, one line after the other."""
    (tmp_path / "x").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", EVERY_INSTANT, str(tmp_path / "x"), way], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    instants = [line.split("|") for line in done.stdout.splitlines()]
    assert len(instants) > 20 and instants[-1][1:4] == ["False", "new", "new"]
    assert [killed for _, killed, *_ in instants[:-1]] == ["True"] * (len(instants) - 1)
    if way == "exchange":
        assert {before for _, _, before, *_ in instants} == {"old", "new"}
    assert {after for *_, after, _ in instants} == {"old", "new"}  # once the next run has begun
    assert {left for *_, left in instants} == {"['out']"}


def test_json_of_equal_contents_is_of_equal_bytes(tmp_path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": {"y": "köln", "x": None}})
    write_json(tmp_path / "b.json", {"a": {"x": None, "y": "köln"}, "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": {"x": None, "y": "köln"}, "b": 1}


def test_json_that_cannot_be_read_names_the_stage_that_writes_it(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"x\.json is not there; run `dvc repro gate`"):
        read_json(tmp_path / "x.json", "gate")
    for content in (b"", b'{"a": 1', b"\xff\xfe{}"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.json is not whole \(.+\); run `dvc repro --force gate`"):
            read_json(tmp_path / "x.json", "gate")


def test_the_hash_of_a_folder_sees_names_bytes_and_depth_and_no_order(tmp_path) -> None:
    def make(name: str, files: dict[str, str]) -> str:
        for path, content in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(content)
        return folder_hash(tmp_path / name)

    first = make("1", {"a": "x", "b": "y"})
    assert make("2", {"b": "y", "a": "x"}) == first
    others = [make("3", {"a": "y", "b": "x"}), make("4", {"a": "x", "c": "y"}), make("5", {"a": "x", "s/b": "y"})]
    assert len({first, *others}) == 4
    assert file_hash(tmp_path / "1" / "a") == hashlib.sha256(b"x").hexdigest()
    with pytest.raises(ValueError, match=r"nowhere is not there; run the stage"):
        folder_hash(tmp_path / "nowhere")


# ---- a full disk ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Callable[[], Path]:
    """A file system of one MiB, in this process's children alone: the mount is in a namespace of theirs."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs in a namespace (unshare -rm)")
    return lambda: tmp_path


FULL = """
mount -t tmpfs -o size=1m tmpfs "$1" && cd "$1" || exit 99
shift
"$@"
code=$?
echo "LEFT $(find . -type f | sort | tr '\\n' ' ')"
exit $code
"""

WRITERS = {
    "python": "(folder / 'x').write_bytes(bytes(2**21))",
    "safetensors": "import torch, safetensors.torch as s; s.save_file({'x': torch.zeros(2**19)}, folder / 'x')",
    "parquet": (
        "import numpy as np, pyarrow as pa, pyarrow.parquet as pq; "
        "pq.write_table(pa.table({'x': np.random.default_rng(0).random(2**18)}), folder / 'x')"
    ),
    "duckdb": (
        "import duckdb; "
        "duckdb.sql(f\"copy (select random() as x from range(1000000)) to '{folder / 'x'}' (format parquet)\")"
    ),
    "sqlite": (
        "import sqlite3; c = sqlite3.connect(folder / 'x'); c.execute('create table t (b blob)'); "
        "c.execute('insert into t values (zeroblob(3000000))'); c.commit()"
    ),
}

STAGE = """
import os, sys
from components import __main__ as program
from components.release import gate
from components.common.artifacts import new_folder
from pathlib import Path

def run(config: gate.GateConfig, output: Path):  # a stage that writes more than there is
    with new_folder(output) as folder:
        {write}

gate.run = run
code = program.main(["gate", "--output", "out", "--params", sys.argv[1]])
sys.stdout.flush()
os._exit(code)
"""


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_reported_in_a_sentence_and_leaves_nothing(small_disk, writer) -> None:
    program = STAGE.format(write=WRITERS[writer])
    done = subprocess.run(
        [
            "unshare", "-rm", "sh", "-c", FULL, "sh", str(small_disk()),
            sys.executable, "-c", program, str(ROOT / "params.yaml"),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "gate: the disk is full (" in done.stderr
    # with --workspace alone, the champion's checkpoint would go
    assert "(`python -m components day tidy` drops what no version" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout.strip() == "LEFT"


def test_another_error_of_the_system_is_not_called_a_full_disk() -> None:
    from components.__main__ import _disk_full

    assert not _disk_full(PermissionError(errno.EACCES, "Permission denied"))
    assert _disk_full(OSError(errno.EDQUOT, "quota"))
    wrapped = RuntimeError("the engine failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "full")
    assert _disk_full(wrapped)
