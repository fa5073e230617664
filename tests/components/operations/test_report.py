"""One page that stands alone, whatever has run so far."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from components.operations import report
from tests.components.operations.report_world import STOPS, WARNS, Project


class Page(HTMLParser):
    """Text, tags in order, and everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(v) for k, v in attributes if k in ("src", "href", "xlink:href", "data", "action")]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"] or data.isspace():
            self.words.append(data)

    @property
    def text(self) -> str:
        """With signs as a keyboard has them."""
        text = " ".join(" ".join(self.words).split())
        return text.translate({0x2212: "-", 0x2264: "<=", 0x2265: ">="})


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


def page_of(project: Project) -> Page:
    report.run(project.root, project.root / "out" / "report.html")
    text = (project.root / "out" / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    outside = re.sub(r'(?s)xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>', "", text)
    assert not re.findall(r"(?:https?:)?//\w[\w.]+|@import|url\((?!#)", outside)  # no request to anybody
    page = Page(text)
    assert all(target.startswith("#") for target in page.fetched)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    return page


def test_the_page_and_the_terminal_have_every_figure(project, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    project.everything()
    page, said = page_of(project), capsys.readouterr().out
    table = " ".join(re.sub(r"[^\x00-\x7f]", " ", said).split())
    for text in (page.text, table):
        for figure in ("0.7123", "0.6987", "0.0200", "0.4321", "0.0123", "45,678", "0.6543", "0.8271", "0.3111",
                       "champion v0.0.4", "earlier v0.0.3", "oracle", "9,000, 20.0% clicked",
                       "2026-10-01 to 2026-10-06",
                       "1 of 2", "events.is_first", "no impression is there twice", "warning", "observed 0.5",
                       "1,234 no such user",
                       "train 6,000, valid 1,500, test 1,500; 31 bytes each",
                       "latency p50 3.2 ms, p99 9.9 ms", "12.3 s", "4,567 MiB", "ctr-ranker:qin-0123",
                       "qin passes <b>all</b> rules & more"):  # fmt: skip
            assert figure in text, figure
    assert "gate: approve qin" in table
    assert "new users 321 0.7023 0.6887 +0.0580" in page.text
    assert "new items 12" in page.text
    for said in ("calibration slope 1.5000 1.4000 to 1.6000 within 0.8 to 1.25 broken 1.5 is not within",
                 "auc loss on new items <= 0.02 not judged one class alone",
                 "no worse than v0.0.4 0.0580 0.0541 to 0.0619 lower end >= -0.0077 holds",
                 "test rows 1,500", "Approved: qin ships A refresh of the champion, judged beside v0.0.4",
                 "fitted again on all days. It has seen the days until 2026-10-07", "correlation 0.9870",
                 "qin 0.0123 -0.0077 to 0.0323"):  # fmt: skip
        assert said in page.text, said
    assert page.tags.count("svg") == 6
    for caption in ("Difference in AUC", "AUC on the test days", "Learning curves", "Reliability on the test days",
                    "Clicks a row that the ranking would earn", "456 effective rows",
                    "qin minus v0.0.4, AUC by slice"):  # fmt: skip
        assert caption in page.text
    ships = page.text.index("Approved")  # the verdict comes first
    assert all(ships < page.text.index(word) for word in ("Against the champion", "Rules of the gate", "Stages"))


def test_the_same_figures_make_the_same_page(project) -> None:
    project.everything()
    page_of(project)
    before = (project.root / "out/report.html").read_bytes()
    page_of(project)
    assert (project.root / "out/report.html").read_bytes() == before


def test_a_rejection_is_shown_as_one(project, capsys) -> None:
    project.source()
    project.evaluated("qin", 0.51)
    project.write("artifacts/gate/decision.json", {
        "verdict": "reject", "model": None, "reasons": ["qin fails 1 of 5 rules: auc 0.51 is not >= 0.6"],
        "candidates": {"qin": {"passed": False, "rules": []}},
    })  # fmt: skip
    project.write("artifacts/package/package.json", {"built": False, "reason": ["auc"]})
    project.write("artifacts/smoke/smoke.json", {"served": False, "reason": ["auc"]})
    page, said = page_of(project), capsys.readouterr().out
    for text in (page.text, said):
        assert "reject" in text.lower() and "auc 0.51 is not >= 0.6" in text
        assert "Bento" not in text
    assert "Rejected: nothing ships" in page.text


@pytest.mark.parametrize("parts", [0, 1, 2, 3], ids=["ingested", "a model trained", "one evaluated", "one untrained"])
def test_a_run_that_got_only_so_far_has_a_report(project, parts, capsys) -> None:
    project.source()
    if parts >= 1:
        project.trained("qin")
    if parts >= 2:
        project.evaluated("qin", 0.7123)
    if parts >= 3:
        project.evaluated("sdcnv3", 0.6987)  # its training figures are not here: pulled, or dropped
    page, said = page_of(project), capsys.readouterr().out
    assert "2026-10-06" in page.text and "2026-10-06" in said
    assert ("0.6789" in page.text) == ("0.6789" in said) == (parts == 1)  # the valid AUC, until there is a test AUC
    assert ("0.7123" in page.text) == ("0.7123" in said) == (parts >= 2)
    assert ("0.6987" in page.text) == (parts >= 3)
    assert page.tags.count("svg") == (0, 1, 5, 5)[parts]


def test_nothing_run_has_a_page(project, capsys) -> None:
    page, said = page_of(project), capsys.readouterr().out
    assert "No stage has a result yet. Run dvc repro ." in page.text
    assert "No stage has a result yet; run `dvc repro`" in said
    assert "table" not in page.tags and "svg" not in page.tags


def test_data_that_break_a_rule(project, capsys, monkeypatch) -> None:
    """The page says where the run stopped and why, and shows nothing of an earlier run as if it were of this one."""
    monkeypatch.setenv("COLUMNS", "250")
    project.everything()
    project.validated(WARNS, STOPS)
    page, said = page_of(project), capsys.readouterr().out
    table = " ".join(re.sub(r"[^\x00-\x7f]", " ", said).split())
    for text in (page.text, table):
        for figure in ("the data break 1 of 3 rules", "events.label a label is 0 or 1 stops the run 12,345",
                       "row 7, label 9, note [bold]xxx", "events.is_first", "9,000, 20.0% clicked"):  # fmt: skip
            assert figure in text, figure
        for figure in ("0.7123", "0.6987", "passes", "Bento", "45,678", "train 6,000", "latency"):
            assert figure not in text, figure
        assert "x" * 300 not in text
    assert "Stopped at validate" in page.text and "stopped at validate:" in said
    assert page.text.index("events.label") < page.text.index("events.is_first")  # what stops comes first
    assert "svg" not in page.tags


def test_a_training_that_failed(project, capsys) -> None:
    project.everything()
    error = {"seconds": 3.2, "peak_mib": 800, "error": "qin: the loss of epoch 2 is [nan]; lower train.qin.lr"}
    project.write(".scratch/stages/train@qin.json", error)
    project.write("checkpoints/sdcnv3/config.json", {})
    shutil.rmtree(project.root / "checkpoints/qin")  # as DVC does before it runs a stage
    (project.root / "artifacts/train/qin.json").unlink()
    page, said = page_of(project), capsys.readouterr().out
    for text in (page.text, said):
        assert "stopped at train@qin" in text.lower() and error["error"] in text
        assert "passes" not in text and "0.7123" not in text  # of an earlier run
        assert "0.6987" in text  # the other model's are of this data
    assert "train@qin failed 3.2 s 800 MiB" in page.text
    project.trained("qin")  # it went well the next time, or DVC's cache had it
    assert "stopped" not in page_of(project).text


def test_figures_of_other_data_are_left_out(project) -> None:
    project.everything()
    dataset = json.loads((project.root / "data/dataset/dataset.json").read_text())
    project.write("data/dataset/dataset.json", {**dataset, "data_sha256": "new"})
    for path in ("artifacts/evaluate/qin/evaluation.json", "artifacts/gate/decision.json"):
        content = json.loads((project.root / path).read_text())
        project.write(path, {**content, "data_sha256": "old"})
    project.write("checkpoints/qin/config.json", {"facts": {"data_sha256": "old"}})
    text = page_of(project).text
    assert "0.7123" not in text and "passes" not in text and "Bento" not in text and "0.6987" in text
