"""refresh: the features of now into what serves, without training. The DAG feature_refresh runs it every hour.

It has a worktree of its own, .runs/refresh, and runs the stages up to `features` there: those whose inputs changed. A
store is made and switched to only if it would serve something else than the one that serves.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.common import pipeline
from components.common.artifacts import read_json
from components.operations.day import Say, to_stderr
from components.operations.locks import hold
from components.operations.repro import repro
from components.operations.worktree import configure, git, make, settings

FEATURES = Path("data/features")


def run(root: Path, until: datetime, say: Say = to_stderr) -> dict[str, Any]:
    """Publish what was known before `until`. Returns {"until", "published", "why"}.

    Raises ValueError where a stage fails, BusyError where it may pass.
    """
    root, worktree = root.resolve(), root.resolve() / ".runs/refresh"
    with hold(root / ".runs/locks/refresh.lock", f"`refresh` until {until:%Y-%m-%d %H:%M} UTC"):
        make(root, worktree, git(root, "rev-parse", "HEAD^{commit}"))
        configure(root, worktree)
        settings(root, worktree, until)
        for name in needed(worktree):
            outcome = repro(worktree, name, say)
            say(f"{name}: {outcome.how}, {outcome.seconds:.1f} s")
        published, why = publish(worktree)
    say(f"refresh until {until:%Y-%m-%d %H:%M} UTC: {why}")
    return {"until": until.isoformat(), "published": published, "why": why}


def the_hour(now: datetime | None = None) -> datetime:
    """The last full hour."""
    return (now or datetime.now(UTC)).astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def needed(root: Path) -> list[str]:
    """`features` and the stages before it, in an order in which they can run."""
    before, found = pipeline.read(root).before(), list[str]()

    def add(name: str) -> None:
        for other in sorted(before[name]):
            add(other)
        if name not in found:
            found.append(name)

    add("features")
    return found


def publish(worktree: Path) -> tuple[bool, str]:
    """Fill a store and switch to it, unless the one that serves has the same. Returns whether it did, and why."""
    from components.common.config import load
    from components.common.live import live_folder
    from components.features import publish as step

    features, repo, live = worktree / FEATURES, worktree / "feature_repo", live_folder()
    if why := step.useless(features, repo, live):
        return False, why
    facts = read_json(features / "receipt.json", "features")
    config = load(worktree / "params.yaml", "publish", step.PublishConfig)
    if not step.publish(config, features, repo, live, f"features until {facts['until']}", who="refresh"):
        return False, "somebody published meanwhile"
    return True, f"{facts['clicks']:,} clicks, the newest of {facts['log_until']}"
