"""The page of all runs: the champion day by day, and a line for each run with a link to its page.

It is made of the tags run/DAY, of the promotions in git, and of the figures that lie beside the pages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.common.artifacts import new_file
from components.operations.locks import hold
from components.operations.pages import tables
from components.operations.pages.plots import Line, bars, lines
from components.operations.pages.run import Plot
from components.operations.pages.template import render
from components.release import versions

INDEX, FIGURES = "index.html", ".figures.json"
SHOWN = 60  # newest days in the plots; the table has all
LOCK_SECONDS = 60
ASIDE = 0.06  # days by which the intervals of one day stand apart


def write(root: Path, folder: Path) -> Path:
    """Write index.html beside the pages of the runs in `folder`; root is the clone. Two runs may end at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder.parent / "locks/index.lock", "the index of the runs", wait=LOCK_SECONDS):
        found = collect(root, folder)
        champion = versions.champion(root)
        with new_file(folder / INDEX) as scratch:
            scratch.write_text(
                render(
                    "index.html.j2", champion=champion, days=found, plots=list(plots(found[-SHOWN:])),
                    runs=list(reversed([cells(one) for one in found])), columns=COLUMNS, colours=tables.COLOURS,
                ),
                encoding="utf-8",
            )  # fmt: skip
    return folder / INDEX


def collect(root: Path, folder: Path) -> list[dict[str, Any]]:
    """What is known of each day, the oldest first: figures of its page, facts of its tag, its promoted version."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob(f"*{FIGURES}")):
        found[file.name.removesuffix(FIGURES)] = json.loads(file.read_text())
    words = "--format=%(refname:strip=2)%00%(contents:subject)"
    for line in versions.git(root, "for-each-ref", words, "refs/tags/run").splitlines():
        tag, _, subject = line.partition("\0")
        day = tag.removeprefix(versions.RUN)
        if re.fullmatch(r"\d{4}-\d\d-\d\d", day) and subject.startswith("{"):
            facts = json.loads(subject)
            found[day] = {
                "verdict": facts.get("verdict"), "model": facts.get("model"), "rows": facts.get("rows"),
                "auc": facts.get("auc") and [facts["auc"]] * 3, **found.get(day, {}), "late": facts.get("late"),
            }  # fmt: skip
    promoted: dict[str, str] = {}
    for one in versions.history(root):
        promoted.setdefault(one.version.day, one.version.version)
    registered = {one.day: one.version for one in versions.versions(root)}
    return [
        {"day": day, "page": (folder / f"{day}.html").is_file(), "version": registered.get(day),
         "state": _state(found[day], day in promoted), **found[day]}
        for day in sorted(found)
    ]  # fmt: skip


def _state(run: dict[str, Any], promoted: bool) -> str:
    if promoted:
        return "promoted"
    if run.get("stopped"):
        return "failed"
    return {"approve": "approved", "reject": "rejected"}.get(run.get("verdict") or "", "not decided")


COLUMNS = ["day", "", "version", "model", "kind", "AUC", "champion", "difference", "cal. error", "rows", "late", "time"]


def cells(run: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The run, and its cells after the day's."""
    auc, champion = run.get("auc"), run.get("champion")
    seconds, error = run.get("seconds"), run.get("calibration_error")
    state = f"failed at {run['stopped']}" if run["state"] == "failed" else run["state"]
    return run, [
        state, run["version"] or "", run.get("model") or "", run.get("kind") or "",
        f"{auc[0]:.4f}" if auc else "",
        f"{champion['auc'][0]:.4f} ({champion['version']})" if champion else "",
        tables.signed(auc[0] - champion["auc"][0]) if auc and champion else "",
        "" if error is None else f"{error:.4f}",
        *("" if run.get(name) is None else f"{run[name]:,}" for name in ("rows", "late")),
        tables.duration(seconds) if seconds else "",
    ]  # fmt: skip


def plots(runs: list[dict[str, Any]]) -> Iterator[Plot]:
    """AUC of champion and new models, calibration error, rows, cost: by day."""
    names = [run["day"][5:] for run in runs]
    marks = {"promoted": "promoted", "rejected": "rejected"}
    new = [(place, run) for place, run in enumerate(runs) if run.get("auc")]
    old = [(place, run["champion"]["auc"]) for place, run in enumerate(runs) if run.get("champion")]
    if new:
        states = [marks.get(run["state"], "") for _, run in new]
        series = [
            _line("champion", "old", [(place - ASIDE, auc) for place, auc in old], [""] * len(old)),
            _line("new model", "s0", [(place + ASIDE, run["auc"]) for place, run in new], states),
        ]
        series = [one for one in series if one.points]
        yield Plot(
            "AUC on the test days of each run",
            lines(series, "day", "AUC", names=names),
            "A triangle was promoted, a cross was rejected. Each day has test rows of its own, so compare the two "
            "models of one day. The strokes are 95% intervals.",
            tuple((one.kind, one.label) for one in series),
        )
        errors = [(x, run["calibration_error"]) for x, run in new if run.get("calibration_error") is not None]
        if errors:
            drawn = lines([Line("", errors, "s0")], "day", "calibration error", names=names, zero=True)
            yield Plot("Calibration of the new model", drawn)
    if any(run.get("rows") for run in runs):
        yield Plot("Data of the window", bars([run.get("rows") for run in runs], names, "impressions"))
    if any(run.get("seconds") for run in runs):
        minutes = [run["seconds"] / 60 if run.get("seconds") else None for run in runs]
        yield Plot("Cost", bars(minutes, names, "minutes of all stages"))


def _line(label: str, kind: str, aucs: list[tuple[float, list[float]]], marks: list[str]) -> Line:
    points = [(place, auc[0]) for place, auc in aucs]
    return Line(label, points, kind, marks, [(auc[1], auc[2]) for _, auc in aucs])
