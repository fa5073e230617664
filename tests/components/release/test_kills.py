"""A promotion or rollback that is killed leaves the old champion or the new one, and the same command finishes it.

tests/benchmarks/bench_promote_kill.py kills before every step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from components.release import registry, versions
from tests.components.release.kills import kill_everywhere, promote, rollback

pytestmark = pytest.mark.slow


def some(steps: list[str]) -> list[int]:
    """A few while the release and the store are made, and those of the end: the tag, the links, the pointer."""
    tag = max(i for i, step in enumerate(steps) if step.startswith("start git") and " tag " in step)
    pointer = next(i for i, step in enumerate(steps) if "/.current.partial" in step and step.startswith("os.rename"))
    assert tag < pointer
    return [tag // 4, tag // 2, tag, tag + 1, *range(pointer, min(pointer + 2, len(steps)))]


@pytest.mark.parametrize("change", [promote, rollback])
def test_a_kill_leaves_the_old_champion_or_the_new_one(clone: Path, change: Callable[[Path], None]) -> None:
    live = clone / ".live"
    registry.promote(clone, live, "2026-01-10", "test", "the first")
    versions.register(clone, "run/2026-01-11")
    if change is rollback:
        promote(clone)
    outcomes = kill_everywhere(clone, change, some)
    assert len(outcomes) >= 5
    assert [one for one in outcomes if one.mixture] == []
    assert {one.after for one in outcomes} == {"new"}
    moved = next(at for at, one in enumerate(outcomes) if "/.current.partial" in one.step)
    assert {one.before for one in outcomes[: moved + 1]} == {"old"}  # until the pointer has been renamed
    assert {one.before for one in outcomes[moved + 1 :]} <= {"new"}


def test_what_is_not_finished_is_told(clone: Path) -> None:
    registry.promote(clone, clone / ".live", "2026-01-10", "test", "the first")
    versions.register(clone, "run/2026-01-11")
    versions.assign(clone, versions.find(clone, "v0.0.2"), "test", "better", None)  # and no more: it was killed here
    found = registry.standing(clone, clone / ".live")
    assert found["unfinished"].startswith(
        "v0.0.2 was promoted, but v0.0.1 serves. Finish it: `python -m components reg"
    )
    assert [row["state"] for row in found["versions"]] == ["champion", "serving"]
    promote(clone)
    assert registry.standing(clone, clone / ".live")["unfinished"] is None
    assert [one.number for one in versions.history(clone)] == [2, 1]
