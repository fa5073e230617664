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

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from components.common import pipeline
from components.common.artifacts import read_json, write_json
from components.common.causes import BusyError
from components.common.champion import POINTER
from components.common.config import load
from components.operations.locks import hold
from components.operations.repro import Outcome, Say, repro
from components.operations.worktree import configure, environment, exists, git, make, settings, uncommitted

PROMOTE = ("auto", "ask", "never")
LOCK_SECONDS = 600  # what a step waits for a `tidy` that is at work
RUNS, LOCKS = ".runs", "locks"
OPENED = ".scratch/run.json"  # of a worktree: the commit that it was opened at
RUN_FILES = ("dvc.lock", "params.yaml", POINTER)  # what the commit of a run adds to the code


# Facts of `ship` where nothing was done
NOTHING: dict[str, Any] = {"version": None, "promoted": False, "published": False, "champion": None}


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """promote         auto: an approved model becomes the champion. ask: a person is asked first. never: it only
                    becomes a version
    wait_hours      a run waits this long for raw files of its day that are not there yet
    keep_runs       tags of the newest runs that are kept, with their data; versions are always kept
    keep_worktrees  worktrees of ended runs that are kept
    """

    promote: str
    wait_hours: float
    keep_runs: int
    keep_worktrees: int

    def __post_init__(self) -> None:
        if self.promote not in PROMOTE:
            raise ValueError(f"promote is {self.promote!r}; write {', '.join(PROMOTE[:-1])} or {PROMOTE[-1]}")
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
        return self.root / RUNS

    @property
    def worktree(self) -> Path:
        return self.runs / str(self)

    @property
    def lock(self) -> Path:
        return self.runs / LOCKS / f"{self}.lock"

    @property
    def page(self) -> Path:
        return self.runs / "reports" / f"{self}.html"

    @contextmanager
    def locked(self, what: str, *, shared: bool = False) -> Iterator[Day]:
        """Hold the day's lock, and share the lock of the runs, so that `tidy` waits. Raises BusyError."""
        whose = f"{self}: {what}"
        with (
            hold(self.runs / LOCKS / "runs.lock", whose, shared=True, wait=LOCK_SECONDS),
            hold(self.lock, whose, shared=shared),
        ):
            yield self


# ---- the steps ------------------------------------------------------------------------------------------------------


def open_(day: Day, say: Say = to_stderr) -> dict[str, Any]:
    """The day's worktree at the code of HEAD, with the work tree's settings and the judge of the day."""
    root, worktree = day.root, day.worktree
    commit = git(root, "rev-parse", "HEAD^{commit}")
    own = {"code": commit, "uncommitted": uncommitted(root)}
    make(root, worktree, commit)
    configure(root, worktree)
    settings(root, worktree, day.until)
    from components.release.registry import judge

    if json.loads((worktree / POINTER).read_text()) != (named := judge(root, live(day), str(day))):
        write_json(worktree / POINTER, named)
    write_json(worktree / OPENED, own)
    say(f"{day}: {worktree.relative_to(root)}, code of {commit[:9]}, data until {day.until:%Y-%m-%d %H:%M} UTC")
    if own["uncommitted"]:
        shown = ", ".join(own["uncommitted"][:10])
        say(f"{day}: no commit has your changes of {shown}; the run uses the code of {commit[:9]}")
    return own | {"worktree": str(worktree)}


def ready(day: Day, waited: float, say: Say = to_stderr) -> bool:
    """Whether the raw files of the day are there. After `run.wait_hours`, `ingest.missing_day` decides.

    Raises BusyError where they are not there yet, ValueError where they did not come.
    """
    from components.data.arrivals import missing
    from components.data.ingest import IngestConfig

    params = day.root / "params.yaml"
    config, ingest = load(params, "run", RunConfig), load(params, "ingest", IngestConfig)
    reason = missing(ingest, day.date)
    if reason is None:
        return True
    if waited < config.wait_hours:
        raise BusyError(f"{day}: {reason}")
    if ingest.missing_day == "fail":
        raise ValueError(
            f"{day}: {reason}, after {waited:g} hours. Bring it and run the day again, or set ingest.missing_day: go_on"
        )
    say(f"{day}: {reason}, after {waited:g} hours; the run goes on without it (ingest.missing_day is go_on)")
    return False


def stage(day: Day, name: str, say: Say = to_stderr) -> Outcome:
    """One stage in the day's worktree; it runs if its inputs changed. Raises as `repro` does."""
    known = list(pipeline.read(opened(day).worktree).stages)
    if name not in known:
        raise ValueError(f"no stage {name!r}; dvc.yaml has {', '.join(known)}")
    return repro(day.worktree, name, say)


def opened(day: Day) -> Day:
    """Raises ValueError where the day has no worktree."""
    if not (day.worktree / OPENED).is_file():
        raise ValueError(f"{day.worktree} is no worktree of a run; run `python -m components day open {day}`")
    return day


def close(day: Day, say: Say = to_stderr) -> dict[str, Any]:
    """The page, the commit and its tag, and `dvc push`. Returns the facts that the tag has, and the page's path.

    Where the tag has the same files already, it stays. Else it moves, and the older commit gets run/DAY.1 (.2, …).
    Raises ValueError where the stages have not run, BusyError where the remote cannot be reached.
    """
    facts = _facts(opened(day), page(day))
    commit(day, facts, say)
    push(day)
    return tagged(day.root, day.tag) | {"report": str(day.page)}


def commit(day: Day, facts: dict[str, Any], say: Say = to_stderr) -> None:
    """The run's files as one commit on its code, and the tag on it. A kill at any point leaves a tag that is whole."""
    worktree = day.worktree
    git(worktree, "add", "--force", "--", *RUN_FILES)
    tree = git(worktree, "write-tree")
    if exists(day.root, day.tag) and git(day.root, "rev-parse", f"{day.tag}^{{tree}}") == tree:
        say(f"{day}: the same files as {day.tag} has, so the tag stays")
    else:
        subject = f"run {day}: {facts['verdict']} {facts['model'] or ''}".strip()
        made = git(worktree, "commit-tree", tree, "-p", facts["code"], "-m", subject)
        _tag(day, made, facts, say)
    git(worktree, "reset", "--quiet", "--soft", day.tag)


def page(day: Day) -> dict[str, Any]:
    """Write the run's page, whatever has run so far, and the index of all runs. Returns the run's figures."""
    from components.operations.report import write

    found = write(day.worktree, day.page, str(day))
    _index(day)
    return found


def _index(day: Day) -> None:
    from components.operations.pages import index

    index.write(day.root, day.page.parent)


def _facts(day: Day, found: dict[str, Any]) -> dict[str, Any]:
    decision, source = found["decision"], found["source"]
    if not decision:
        reason = f"{found['stopped'][0]} failed" if found["stopped"] else "the gate has not decided"
        raise ValueError(f"{day}: {reason}, so the run cannot be closed; run `python -m components run {day}`")
    lock = yaml.safe_load((day.worktree / "dvc.lock").read_text())["stages"]
    own = read_json(day.worktree / OPENED, "the run")
    models = found["evaluate"]
    aucs = {name: model["test"]["auc"] for name, model in models.items()}
    return own | {
        "day": str(day),
        "verdict": decision["verdict"],
        "model": decision["model"],
        "reasons": decision["reasons"],
        "night": decision["night"],
        "auc": aucs.get(decision["model"]) or max(aucs.values(), default=None),
        "rows": source["impressions"],
        "late": late(day),
        "hashes": {out["path"]: out["md5"] for stage in lock.values() for out in stage.get("outs", ())},
        "airflow_run": os.environ.get("AIRFLOW_CTX_DAG_RUN_ID"),
    }


def late(day: Day) -> int:
    """How many rows of earlier days arrived on this day; 0 where the source does not say when rows arrive."""
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

    events = ds.dataset(day.worktree / "data/canonical/events")
    if "created_at" not in events.schema.names:
        return 0
    begun = day.until - timedelta(days=1)
    return events.count_rows((pc.field("created_at") >= begun) & (pc.field("timestamp") < begun))


def _tag(day: Day, commit: str, facts: dict[str, Any], say: Say) -> None:
    """Point run/DAY at the commit. What it pointed at keeps a name, and what changed is said."""
    refs = Path(git(day.root, "rev-parse", "--path-format=absolute", "--git-common-dir")) / "refs/tags/run"
    for left in refs.glob(f"{day}*.lock"):
        left.unlink()  # of a git that was killed: nobody else writes this day's tags
    if exists(day.root, day.tag):
        old = git(day.root, "rev-parse", f"refs/tags/{day.tag}")
        names = git(day.root, "for-each-ref", "--format=%(objectname) %(refname:short)", f"refs/tags/{day.tag}.*")
        known = dict(line.split() for line in names.splitlines())
        kept = known.get(old) or f"{day.tag}.{len(known) + 1}"
        git(day.root, "update-ref", f"refs/tags/{kept}", old)
        before = tagged(day.root, day.tag)["hashes"]
        files = git(day.root, "diff", "--name-only", f"{day.tag}^{{commit}}", commit).splitlines()
        outputs = sorted(path for path, value in facts["hashes"].items() if before.get(path) != value)
        say(f"{day}: the run of this day differs from the one before, which is {kept} now")
        say(f"{day}: changed files: {', '.join(files[:10])}; changed outputs: {', '.join(outputs) or 'none'}")
    message = json.dumps(facts, sort_keys=True, ensure_ascii=False)
    git(day.root, "tag", "--force", "--annotate", "--message", message, day.tag, commit)
    say(f"{day}: {day.tag} is {commit[:9]}")


def tagged(root: Path, tag: str) -> dict[str, Any]:
    """The facts in the message of a run's tag."""
    return json.loads(git(root, "tag", "--list", "--format=%(contents:subject)", tag))


def push(day: Day) -> None:
    """The run's outputs into DVC's remote. Raises BusyError where that is not possible now."""
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "push", "--quiet"]
    done = subprocess.run(command, cwd=day.worktree, env=environment(), capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        reason = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "it said nothing")
        raise BusyError(f"{day}: `dvc push` failed: {reason}. {day.tag} is there; close the day again to push")


def ship(
    day: Day, *, promote: str | None = None, who: str = "run", why: str = "", say: Say = to_stderr
) -> dict[str, Any]:
    """Register an approved model as a version, then promote it, or publish the features alone.

    A day that is older than the newest one closed changes nothing that serves, unless `promote` is given.
    """
    found = _shipped(day, promote, who, why, say)
    _index(day)  # it says what was promoted
    return found


def _shipped(day: Day, promote: str | None, who: str, why: str, say: Say) -> dict[str, Any]:
    config = load(day.root / "params.yaml", "run", RunConfig)
    if promote not in (None, *PROMOTE):
        raise ValueError(f"--promote is {promote!r}; write {', '.join(PROMOTE[:-1])} or {PROMOTE[-1]}")
    if not exists(day.root, day.tag):
        raise ValueError(f"{day}: there is no tag {day.tag}; run `python -m components day close {day}`")
    facts = tagged(day.root, day.tag)
    newest = max(closed(day.root))
    if promote in (None, "never") and day.date < newest:
        say(f"{day}: {newest} is closed already, so this run promotes and publishes nothing")
        return NOTHING | {"why": f"{newest} is newer"}
    with hold(day.runs / LOCKS / "ship.lock", f"{day}: ship", wait=LOCK_SECONDS):  # versions are numbered one by one
        return _ship(day, facts, promote or config.promote, who, why, say)


def _ship(day: Day, facts: dict[str, Any], mode: str, who: str, why: str, say: Say) -> dict[str, Any]:
    from components.common.live import current
    from components.release import registry, versions

    folder, found = live(day), dict(NOTHING)
    if facts["verdict"] != "approve":
        why_not = "the gate rejected: " + "; ".join(facts["reasons"])
    else:
        version = found["version"] = versions.register(day.root, day.tag)
        if mode == "auto":
            say(registry.promote(day.root, folder, version, who, why or f"the gate approved {day.tag}"))
            found["promoted"] = True
        why_not = {
            "ask": f"{version} waits for a person: `python -m components registry promote {version} --why REASON`",
            "never": f"{version} is registered, and run.promote is never",
        }.get(mode, "")
    if not found["promoted"]:
        say(f"{day}: {why_not}")
        found["published"] = publish(day, say)
    serves = current(folder)
    return found | {"why": why or why_not, "champion": serves.version if serves else None}


def publish(day: Day, say: Say) -> bool:
    """The day's features into what serves, if they are newer. Returns whether they went there."""
    from components.features import publish as features

    config = load(day.root / "params.yaml", "publish", features.PublishConfig)
    sources, repo = day.worktree / "data/features", day.worktree / "feature_repo"
    done = features.publish(config, sources, repo, live(day), f"features of {day.tag}")
    if done:
        say(f"{day}: the features are published; {done.version or 'no model'} serves with them")
    return done is not None


def live(day: Day) -> Path:
    """CLICKLOOP_LIVE, or .live in the clone."""
    return day.root / os.environ.get("CLICKLOOP_LIVE", ".live")


def closed(root: Path) -> set[date]:
    """The days that have a run's tag, or a version."""
    found = set()
    for line in git(root, "tag", "--list", "--format=%(contents:subject)").splitlines():
        try:
            found.add(date.fromisoformat(json.loads(line)["day"]))
        except (ValueError, TypeError, KeyError):
            continue  # somebody else's tag
    return found
