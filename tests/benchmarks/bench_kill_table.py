"""The kill table: faults planted in a run, and what came of each. Every row ends, after a retry, in the hashes of a
run that nobody disturbed.

python tests/benchmarks/bench_kill_table.py             all rows, on the tiny world of the tests
python tests/benchmarks/bench_kill_table.py tag push    the rows whose names hold one of these words

Faults of Airflow's scheduler are in tests/components/operations/test_local_airflow.py, those of promote at each instant
in bench_promote_kill.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT, report
from rich.console import Console
from rich.table import Table

DAY = "2026-01-06"
ORPHANED = ("embed", "train@qin", "refit")  # here DVC dies alone, and the stage's own command lives on
CLOCKS = ("ingest", "validate", "features", "dataset")  # stages that once read the clock, or that know times
DOCS, MARK = ROOT / "docs" / "runs.md", "| step | fault | outcome |\n"


@dataclass(frozen=True)
class Fault:
    """act plants the fault and retries. It returns what is worth telling, and raises where the retry fails."""

    step: str
    name: str
    act: Callable[[], str]


class Plan:
    """Two copies of the project with caches of their own: one is left in peace, the other is not."""

    def __init__(self, folder: Path) -> None:
        from tests.conftest import copy_project

        self.calm = copy_project(folder / "calm/project", folder / "calm/cache")
        self.hurt = copy_project(folder / "hurt/project", folder / "hurt/cache")
        self.folder = folder
        self.calm.python("-m", "components", "run", DAY, "--promote", "auto")
        self.facts = self.tagged(self.calm)
        self.worktree = self.hurt.root / ".runs" / DAY
        notes = self.calm.root / ".runs" / DAY / ".scratch/stages"
        self.seconds = {note.stem: json.loads(note.read_text())["seconds"] for note in notes.glob("*.json")}

    def tagged(self, project: Any) -> dict[str, Any]:
        from components.operations.day import tagged

        return tagged(project.root, f"run/{DAY}")

    def day(self, *words: str, code: int = 0) -> str:
        return self.hurt.python("-m", "components", "day", *words, code=code)

    def require_hashes(self, stage: str | None = None) -> None:
        """Raises AssertionError where the outputs of a stage, or of the run, are not those of the undisturbed one."""
        import yaml

        if stage is None:
            assert self.tagged(self.hurt)["hashes"] == self.facts["hashes"], "other hashes"
            return
        lock = yaml.safe_load((self.worktree / "dvc.lock").read_text())["stages"][stage]
        for out in lock["outs"]:
            assert self.facts["hashes"][out["path"]] == out["md5"], f"other bytes in {out['path']}"

    # ---- the faults ----

    def killed(self, *words: str, at: str, when: str = "after") -> str:
        from tests.components.operations.kills import kill_at

        kill_at(self.hurt, at, *words, when=when)
        self.hurt.python("-m", "components", *words)
        return ""

    def stage_killed(self, stage: str) -> str:
        from tests.components.operations.kills import kill_stage

        orphan = stage in ORPHANED
        kill_stage(self.hurt, DAY, stage, self.seconds[stage] / 2, orphan=orphan)
        said = self.day("stage", DAY, stage)
        self.require_hashes(stage)
        return _told(said, "earlier attempt", "gone") if orphan else ""

    def disk_full(self) -> str:
        from tests.components.operations.kills import with_full_disk

        def act() -> None:
            self.day("stage", DAY, "arrivals")
            said = self.day("stage", DAY, "ingest", code=75)
            assert "disk is full" in said or "No space left" in said, said[-500:]

        with_full_disk(self.worktree / "data", act, "128k")
        self.day("stage", DAY, "arrivals")
        self.require_hashes("arrivals")
        return "exit code 75; the next row is the retry"

    def lock_left(self, content: str, words: str) -> str:
        """A lock of DVC that no DVC holds."""
        file = self.worktree / ".dvc/tmp/rwlock"
        file.write_text(content)
        os.utime(file, (time.time() - 86400,) * 2)  # older than every process here
        said = self.day("stage", DAY, "ingest")
        self.require_hashes("ingest")
        return _told(said, words)

    def lock_of_reused_number(self) -> str:
        out = str(self.worktree / "data/canonical")
        return self.lock_left(
            json.dumps({"write": {out: {"pid": os.getpid(), "cmd": "dvc repro"}}, "read": {}}), "gone"
        )

    def cut_dvc_lock(self) -> str:
        file = self.worktree / "dvc.lock"
        text = file.read_text()
        file.write_text(text[: len(text) * 2 // 3] + ": [")
        said = self.day("stage", DAY, "arrivals")
        self.hurt.python("-m", "components", "run", DAY, "--promote", "never")
        self.require_hashes()
        return _told(said, "not whole")

    def push_killed(self) -> str:
        from tests.components.operations.kills import kill_in

        kill_in(self.hurt, " push ", "day", "close", DAY)
        self.day("close", DAY)
        self.require_hashes()
        return ""

    def remote_gone(self) -> str:
        from tests.components.operations.kills import with_remote_gone

        with_remote_gone(self.hurt, lambda: _told(self.day("close", DAY, code=75), "dvc push"))
        self.day("close", DAY)
        self.require_hashes()
        return "exit code 75; the tag stays, a retry pushes"

    def two_runs(self) -> str:
        from tests.components.operations.kills import start

        first = start(self.hurt, "run", DAY, "--promote", "never")
        lock = self.hurt.root / ".runs/locks" / f"{DAY}.lock"
        while str(first.pid) not in lock.read_text():
            time.sleep(0.05)
            assert first.poll() is None
        done = subprocess.run(
            [sys.executable, "-m", "components", "run", DAY], cwd=self.hurt.root, env=self.hurt.env,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 75 and str(first.pid) in done.stderr, done.stderr
        assert first.wait() == 0
        self.require_hashes()
        return "the second ends with 75 and names the first"

    def other_clock(self, days: int) -> str:
        """Stages again, with another clock and time zone: nothing of them may be in an output."""
        from tests.components.operations.kills import clock

        library = clock(self.folder)
        env = self.hurt.env | {"LD_PRELOAD": library, "CLOCK_SHIFT": str(days * 86400), "TZ": "Pacific/Kiritimati"}
        said = subprocess.run([sys.executable, "-c", "import time; print(time.time())"], env=env, capture_output=True)
        assert abs(float(said.stdout) - time.time() - days * 86400) < 600, "the clock did not move"
        for stage in CLOCKS:
            command = [sys.executable, "-m", "dvc", "repro", "--force", "--single-item", stage]
            done = subprocess.run(command, cwd=self.worktree, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-500:] + done.stderr[-500:]
            self.require_hashes(stage)
        return f"{', '.join(CLOCKS)}: the same bytes at {days:+} days, in UTC+14"

    def faults(self) -> Iterator[Fault]:
        def fault(step: str, name: str, act: Callable[..., str], *arguments: Any, **named: Any) -> Fault:
            return Fault(step, name, lambda: act(*arguments, **named))

        opened, closed = ("day", "open", DAY), ("day", "close", DAY)
        shipped = ("day", "ship", DAY, "--promote", "auto")
        yield fault("worktree", "SIGKILL in `git worktree add`", self.killed, *opened, at="worktree add", when="during")
        yield fault("worktree", "SIGKILL before its settings", self.killed, *opened, at="reset --quiet --hard")
        yield fault("ingest", "the disk is full", self.disk_full)
        stages = [name for name in self.seconds if name != "arrivals"]
        order = [name for name in _order(self.calm.root) if name in stages]
        for stage in order:
            what = "SIGKILL of DVC alone, in the middle" if stage in ORPHANED else "SIGKILL in the middle"
            yield fault(stage, what, self.stage_killed, stage)
        yield fault("DVC's lock", "held by a process number that is in use again", self.lock_of_reused_number)
        yield fault("DVC's lock", "cut in two by a kill", self.lock_left, '{"write": {"/a', "not whole")
        yield fault("close", "SIGKILL between commit and tag", self.killed, *closed, at="commit-tree")
        yield fault("close", "SIGKILL between tag and push", self.killed, *closed, at="tag --force")
        yield fault("close", "SIGKILL in `dvc push`", self.push_killed)
        yield fault("close", "the remote is gone", self.remote_gone)
        yield fault("ship", "SIGKILL between version and promotion", self.killed, *shipped, at="@v0.0.1")
        yield fault("ship", "SIGKILL between store, tag and pointer", self.killed, *shipped, at="#champion#1")
        yield fault("dvc.lock", "cut in two by a kill", self.cut_dvc_lock)
        yield fault("run", "two runs of one day", self.two_runs)
        yield fault("clock", "40 days later", self.other_clock, 40)
        yield fault("clock", "a day earlier, across midnight", self.other_clock, -1)


def _order(root: Path) -> list[str]:
    from components.operations.day import Day
    from components.operations.run import order

    return order(Day.of(root, DAY))


def _told(said: str, *words: str) -> str:
    """The line of the output that holds one of the words."""
    lines = [line.strip() for line in said.splitlines() if any(word in line for word in words)]
    assert lines, f"nothing told of {words}: {said[-500:]}"
    return lines[0]


def main() -> None:
    sys.path[:0] = [str(ROOT)]
    from tests.components.operations.kills import GoneError

    chosen, rows = [word for word in sys.argv[1:] if not word.startswith("-")], []
    console = Console()
    with tempfile.TemporaryDirectory(prefix="clickloop-kills-") as folder:
        plan = Plan(Path(folder))
        if chosen:
            plan.hurt.python("-m", "components", "run", DAY, "--promote", "never")
        planted = recovered = 0
        for fault in plan.faults():
            if chosen and not any(word in f"{fault.step} {fault.name}" for word in chosen):
                continue
            planted += 1
            try:
                outcome = f"recovered. {fault.act()}".strip()
                recovered += 1
            except GoneError as error:
                planted, outcome = planted - 1, f"not planted: {error}"
            except BaseException as error:  # the row tells, and the next one runs  (pytest.fail is no Exception)
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcome = f"NOT recovered: {str(error)[-300:]}"
            rows.append((fault.step, fault.name, outcome))
            console.print(f"{fault.step}: {fault.name}: {outcome}", markup=False)
    table = Table("step", "fault", "outcome", title=f"{recovered} of {planted} faults end in the undisturbed hashes")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if "--write" in sys.argv[1:]:
        head, _, _ = DOCS.read_text().partition(MARK)
        DOCS.write_text(head + MARK + "| --- | --- | --- |\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows))
    report("kill_table_recovered", recovered, "faults", "planted", planted)
    if recovered < planted:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
