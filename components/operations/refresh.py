"""refresh: the features of now into what serves, without training. The DAG feature_refresh runs it every hour.

It has a worktree of its own, .runs/refresh, and runs the stages up to `features` there: those whose inputs changed. A
store is made and switched to only if it would serve something else than the one that serves.
"""

from __future__ import annotations

from datetime import UTC, datetime
from hashlib import sha256
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
    from components.common.live import STORES, current, live_folder, locked, switch
    from components.features import clicks
    from components.features.publish import PublishConfig, fill

    features, live = worktree / FEATURES, live_folder()
    facts = read_json(features / "receipt.json", "features")
    if why := same(features, current(live)):
        return False, why
    config = load(worktree / "params.yaml", "publish", PublishConfig)
    name = sha256((features / "receipt.json").read_bytes() + (features / "click_log.parquet").read_bytes()).hexdigest()
    store = live / STORES / f"{facts['until'][:13].replace(':', '')}-{name[:12]}"
    if not (store / "receipt.json").is_file():
        fill(config, features, worktree / "feature_repo", store)
    clicks.replay(live, store)  # the many
    with locked(live):
        if why := same(features, current(live)):  # somebody published meanwhile
            return False, why
        clicks.replay(live, store)  # those that came meanwhile
        switch(live, store=store, why=f"features until {facts['until']}", who="refresh", keep=config.keep)
    return True, f"{facts['clicks']:,} clicks, the newest of {facts['log_until']}"


def same(features: Path, now: Any) -> str:
    """Why nothing is to be published; empty, if something is."""
    if now is None or now.store is None:
        return ""
    facts, has = read_json(features / "receipt.json", "features"), read_json(now.store / "receipt.json", "publish")
    if has["until"] > facts["until"]:
        return f"the store that serves has newer data, until {has['until']}"
    clock = ("until", "known_until")
    if all(has[key] == value for key, value in facts.items() if key not in clock) and (
        (features / "click_log.parquet").read_bytes() == (now.store / "click_log.parquet").read_bytes()
    ):
        return "nothing changed"
    return ""
