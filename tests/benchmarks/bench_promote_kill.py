"""Promotions and rollbacks killed before every step that changes something: what serves afterwards is never a mixture.

python tests/benchmarks/bench_promote_kill.py      two JSON lines; --steps prints each step too. Some minutes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from harness import one_thread, report

one_thread()


def main() -> None:
    from components.release import registry, versions
    from tests.components.release.kills import kill_everywhere, promote, rollback
    from tests.components.release.runs import ENVIRONMENT, close, repository

    os.environ |= ENVIRONMENT
    with tempfile.TemporaryDirectory() as folder:
        root = repository(Path(folder, "clone"))
        for day in ("2026-01-10", "2026-01-11"):
            close(root, day)
        registry.promote(root, root / ".live", "2026-01-10", "bench", "the first")
        versions.register(root, "run/2026-01-11")
        outcomes = kill_everywhere(root, promote, lambda steps: range(len(steps)))
        promote(root)
        outcomes += kill_everywhere(root, rollback, lambda steps: range(len(steps)))
    if "--steps" in sys.argv[1:]:
        for one in outcomes:
            print(f"{one.before} {one.after} {one.mixture or 'whole'}: {one.step}")
    mixtures = sum(bool(one.mixture) or one.after != "new" for one in outcomes)
    report("promote_mixtures", mixtures, "mixtures", "kills, each before another step", len(outcomes))
    if mixtures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
