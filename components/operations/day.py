"""day: the steps of a run, each alone. `run` does them in their order, and so does Airflow, one task each.

    python -m components day open DAY              the worktree .runs/DAY, at the code of this commit
    python -m components day ready DAY             whether the day's raw files are there; --waited HOURS
    python -m components day stage DAY NAME        one stage of dvc.yaml in the worktree, such as train@qin
    python -m components day close DAY             report, commit, tag run/DAY, `dvc push`
    python -m components day ship DAY              register, then promote or publish; --promote --who --why
    python -m components day tidy                  retention: worktrees, tags of runs, DVC's cache and remote

DAY is a date such as 2026-01-11. Each step may be repeated: it ends in what it ended in before. Messages go to stderr.
`open`, `close` and `ship` print one JSON line on stdout, their facts; it is the last line.

Exit codes:
    0    done
    65   data, code or settings are wrong: the same again would fail again
    75   something is in the way that passes: a lock, a full disk, no remote, no Redis, a day that is not whole yet,
         a process that the system killed. Try again later
    1    unknown

Facts of `close`, which are also the message of the tag: day, verdict (approve or reject), model, reasons, auc, rows,
late, hashes (path of an output -> its hash in dvc.lock), code (the commit), uncommitted (files of the work tree that
the run did not take), airflow_run (from AIRFLOW_CTX_DAG_RUN_ID, or null). Beside them `report`, the path of the page.
Facts of `ship`: version or null, promoted (true or false), published (true or false), why.

With `promote: ask`, `ship` registers the version and promotes nothing. Who was asked and agrees runs
`ship --promote auto --who NAME`, or `python -m components registry promote VERSION`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from components.operations.locks import hold

PROMOTE, WHEN_MISSING = ("auto", "ask", "never"), ("fail", "go_on")
LOCK_SECONDS = 600  # what a step waits for a `tidy` that is at work


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """promote         auto: an approved model becomes the champion. ask: a person is asked first. never: it becomes a
                    version, and no more
    wait_hours      a run waits this long for raw files of its day that are not there yet
    when_missing    and then: fail, or go_on without them
    keep_runs       tags of the newest runs that are kept, with their data; versions are kept for ever
    keep_worktrees  worktrees of ended runs that are kept
    """

    promote: str
    wait_hours: float
    when_missing: str
    keep_runs: int
    keep_worktrees: int

    def __post_init__(self) -> None:
        if self.promote not in PROMOTE:
            raise ValueError(f"promote is {self.promote!r}; write {', '.join(PROMOTE[:-1])} or {PROMOTE[-1]}")
        if self.when_missing not in WHEN_MISSING:
            raise ValueError(f"when_missing is {self.when_missing!r}; write {' or '.join(WHEN_MISSING)}")
        for name, least in (("wait_hours", 0), ("keep_runs", 1), ("keep_worktrees", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")


@dataclass(frozen=True)
class Day:
    """The run of a day: root is the clone's folder."""

    root: Path
    date: date

    @classmethod
    def of(cls, root: Path, text: str) -> Day:
        """Raises ValueError where the text is no date."""
        try:
            return cls(root.resolve(), date.fromisoformat(text))
        except ValueError:
            raise ValueError(f"the day is {text!r}; write a date such as 2026-01-11") from None

    def __str__(self) -> str:
        return self.date.isoformat()

    @property
    def tag(self) -> str:
        return f"run/{self}"

    @property
    def until(self) -> datetime:
        """The end of the day: the first moment that the run does not see."""
        return datetime(self.date.year, self.date.month, self.date.day, tzinfo=UTC) + timedelta(days=1)

    @property
    def runs(self) -> Path:
        return self.root / ".runs"

    @property
    def worktree(self) -> Path:
        return self.runs / str(self)

    @property
    def lock(self) -> Path:
        return self.runs / "locks" / f"{self}.lock"

    @property
    def page(self) -> Path:
        return self.runs / "reports" / f"{self}.html"

    @contextmanager
    def locked(self, what: str, *, shared: bool = False) -> Iterator[Day]:
        """Hold the day's lock, and share the lock of the runs, so that `tidy` waits. Raises BusyError."""
        whose = f"{self}: {what}"
        with (
            hold(self.runs / "locks" / "runs.lock", whose, shared=True, wait=LOCK_SECONDS),
            hold(self.lock, whose, shared=shared),
        ):
            yield self
