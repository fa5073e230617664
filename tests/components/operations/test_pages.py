"""The page of a run and the index of all runs, in a real browser, wide and narrow; and the plots' numbers."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from components.operations import report
from components.operations.pages import index
from components.operations.pages.plots import Interval, forest, said, ticks
from tests.components.operations.report_world import Project
from tests.parts import need

DAYS = ("2026-10-04", "2026-10-05", "2026-10-06")
# What the browser says of the page, at the end of the DOM that it dumps
LOOK = """<script>addEventListener("load", () => {
  const root = document.documentElement, asked = performance.getEntriesByType("resource").map(one => one.name);
  document.title = JSON.stringify({inner: innerWidth, scroll: root.scrollWidth, height: root.scrollHeight, asked});
})</script>"""


def git(root: Path, *arguments: str) -> None:
    names = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", *names, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with the pages of three runs: promoted, approved and not promoted, rejected."""
    project = Project(tmp_path_factory.mktemp("pages"))
    project.everything()
    git(project.root, "init", "-q")
    git(project.root, "commit", "-q", "--allow-empty", "-m", "code")
    for day, verdict in zip(DAYS, ("approve", "approve", "reject"), strict=True):
        decision = json.loads((project.root / "artifacts/gate/decision.json").read_text())
        project.write("artifacts/gate/decision.json", decision | {"verdict": verdict})
        report.write(project.root, project.root / f".runs/reports/{day}.html", day)
        facts = {"day": day, "verdict": verdict, "model": "qin", "auc": 0.7123, "rows": 9000, "late": 1234}
        git(project.root, "tag", "-a", "-m", json.dumps(facts), f"run/{day}")
    version = dict.fromkeys(
        ("model", "checkpoint_sha256", "judged_sha256", "bento", "decision_sha256", "train_until"), "x"
    )
    version |= {"day": DAYS[0], "run": f"run/{DAYS[0]}", "figures": {}}
    git(project.root, "tag", "-a", "-m", json.dumps(version), "ctr-ranker@v0.0.5")
    who = {"version": "v0.0.5", "who": "run", "why": "", "when": "2026-10-05T00:00:00+00:00", "override": None}
    git(project.root, "tag", "-a", "-m", json.dumps(who), "ctr-ranker#champion#1")
    return project.root


@pytest.fixture(scope="module")
def pages(root: Path) -> dict[str, Path]:
    return {"index": index.write(root, root / ".runs/reports"), "run": root / f".runs/reports/{DAYS[0]}.html"}


def chromium(profile: Path, *arguments: str) -> str:
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--hide-scrollbars", "--virtual-time-budget=2000", f"--user-data-dir={profile}", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def look(text: str, width: int, scratch: Path) -> dict[str, Any]:
    """What the browser says of a page in a window of this width: a frame, as its own is never below 500 pixels."""
    text = text.replace("</body>", LOOK.replace("document.title", "parent.document.title"))
    srcdoc = text.replace("&", "&amp;").replace('"', "&quot;")
    frame = scratch / "frame.html"
    frame.write_text(
        f'<title></title><iframe style="border:0" width="{width}" height="900" srcdoc="{srcdoc}"></iframe>'
    )
    dumped = chromium(scratch / "profile", f"--window-size={width + 100},1000", "--dump-dom", frame.as_uri())
    title = re.search(r"<title>(.*?)</title>", dumped)
    assert title
    seen: dict[str, Any] = json.loads(title[1].replace("&quot;", '"').replace("&amp;", "&"))
    assert seen["inner"] == width
    return seen


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["run", "index"])
def test_a_page_fits_the_window_and_asks_for_nothing(pages, tmp_path, name, width) -> None:
    need("chromium")
    seen = look(pages[name].read_text(), width, tmp_path)
    assert seen["scroll"] <= width
    assert seen["height"] > 600
    assert seen["asked"] == []


def test_the_look_sees_a_wide_page_and_a_request(tmp_path) -> None:
    need("chromium")
    seen = look(
        '<!doctype html><body><p style="width:2000px">wide</p><img src="http://127.0.0.1:9/x.png"></body>',
        390,
        tmp_path,
    )
    assert seen["scroll"] >= 2000 and seen["asked"] == ["http://127.0.0.1:9/x.png"]


def test_dark_and_light_are_the_readers_choice(pages, tmp_path) -> None:
    need("chromium")
    shots = []
    for at, more in enumerate(([], ["--force-dark-mode"])):
        shot = tmp_path / f"{at}.png"
        chromium(tmp_path / "profile", "--window-size=1280,900", f"--screenshot={shot}", *more, pages["run"].as_uri())
        shots.append(shot.read_bytes())
    assert min(map(len, shots)) > 20_000  # an empty page is a tenth of this
    assert shots[0] != shots[1]


def test_the_index_says_what_became_of_each_run(pages) -> None:
    text = pages["index"].read_text()
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr><td>.*?</tr>", text)]
    assert [row[:3] for row in rows] == [
        [DAYS[2], "rejected", "qin"], [DAYS[1], "approved", "qin"], [DAYS[0], "promoted", "v0.0.5"],
    ]  # fmt: skip
    for figure in ("0.7123", "0.6543", "(v0.0.4)", "+0.0580", "0.0123", "9,000", "1,234", "21.4"):
        assert all(figure in row for row in rows), figure
    assert re.findall(r'href="(.*?)"', text) == [f"{day}.html" for day in reversed(DAYS)]
    assert "Champion: v0.0.5" in text
    assert text.count("<svg") == 4 and text.count('class="mark ok"') == 1 and text.count('class="cross bad"') == 1
    page = pages["run"].read_text()
    assert 'href="index.html"' in page and f"run/{DAYS[0]}" in page


def test_the_same_runs_make_the_same_index(root, pages) -> None:
    before = pages["index"].read_bytes()
    assert index.write(root, root / ".runs/reports").read_bytes() == before


def test_a_run_without_a_page_or_a_tag_is_in_the_index_too(root, tmp_path) -> None:
    """Another clone has the tags alone; a run that failed has no tag."""
    folder = tmp_path / ".runs/reports"
    folder.mkdir(parents=True)
    stopped = {"stopped": "ingest", "verdict": None, "auc": None, "seconds": 3.0}
    (folder / "2026-10-07.figures.json").write_text(json.dumps(stopped))
    text = index.write(root, folder).read_text()
    assert "<td>2026-10-04</td>" in text and "failed at ingest" in text and "href" not in text


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0, 30000, ["0", "10,000", "20,000", "30,000"]),
        (0.6412, 0.7288, ["0.650", "0.675", "0.700", "0.725"]),
        (-0.0021, 0.0043, ["\N{MINUS SIGN}0.002", "0.000", "0.002", "0.004"]),
        (0.5, 0.5, ["0"]),
    ],
)
def test_axes_have_round_numbers(low, high, words) -> None:
    assert said(ticks(low, high, 4)) == words


def test_a_forest_draws_values_to_scale() -> None:
    rows = [
        Interval("a", "", 0.0, -1.0, 1.0),
        Interval("b & c", "12 rows", 0.5, 0.0, 1.0, margin=-0.5),
        Interval("d", "", None),
    ]
    svg = forest(rows, "difference", line=0.0, signed=True)
    (zero,) = {float(x) for x in re.findall(r'class="zero" x1="([\d.]+)"', svg)}
    centres = [float(x) for x in re.findall(r'cx="([\d.]+)"', svg)]
    ends = [[float(x) for x in pair] for pair in re.findall(r'class="interval s0" x1="([\d.]+)".*?x2="([\d.]+)"', svg)]
    unit = ends[0][1] - zero
    assert centres[0] == zero and len(centres) == 2
    assert centres[1] - zero == pytest.approx(unit / 2, abs=0.2)
    assert zero - ends[0][0] == pytest.approx(unit, abs=0.2)
    (margin,) = [float(x) for x in re.findall(r'class="margin" x1="([\d.]+)"', svg)]
    assert zero - margin == pytest.approx(unit / 2, abs=0.2)
    assert "b &amp; c" in svg and "12 rows" in svg and "+0.5000" in svg
