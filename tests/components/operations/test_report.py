"""One page that stands alone, whatever has run so far."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from components.data.rules import SEVERITIES, STOP, WARN
from components.operations import report

SOURCE = {
    "source": "simulator", "impressions": 9000, "label_rate": 0.2, "days": 6, "first_day": "2026-10-01",
    "last_day": "2026-10-06", "users": 300, "items": 120,
}  # fmt: skip
CHAMPION_AUC, ORACLE_AUC = 0.6543, 0.8271


def evaluation(model: str, auc: float, champion: bool) -> dict[str, Any]:
    slices = {
        "new users": {"rows": 321, "auc": auc - 0.01},
        "new items": {"rows": 12, "auc": None},
    }
    test = {
        "rows": 1500, "auc": auc, "intervals": {"auc": [auc - 0.02, auc + 0.02]}, "group_auc": None, "logloss": 0.4321,
        "calibration_error": 0.0123, "oracle_auc": ORACLE_AUC, "oracle_logloss": 0.3111,
    }  # fmt: skip
    theirs = [{"version": "v0.0.4", "test": {**test, "auc": CHAMPION_AUC}}] if champion else []
    return {"model": model, "test": test, "slices": slices, "references": theirs}


# A rule as `validate` reports it, with the severities that it writes.
HOLDS = {
    "table": "events", "column": "label", "rule": "expect_column_values_to_be_in_set", "says": None, "limits": {},
    "severity": SEVERITIES[STOP], "passed": True, "broken_rows": 0, "observed": None, "examples": [],
}  # fmt: skip
STOPS = {
    **HOLDS, "passed": False, "says": "a label is 0 or 1", "broken_rows": 12345,
    "examples": [{"row": 7, "label": 9, "note": "[bold]" + "x" * 900}],
}  # fmt: skip
WARNS = {**HOLDS, "column": "is_first", "says": "no impression is there twice", "severity": SEVERITIES[WARN],
         "passed": False, "observed": 0.5}  # fmt: skip


class Project:
    """What the stages would have left, written a part at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, content: Any) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))

    def source(self) -> None:
        self.write("data/canonical/source.json", SOURCE)

    def validated(self, *broken: dict[str, Any]) -> None:
        """As `validate` writes it: a rule that holds, and those that are broken."""
        stopped = any(rule["severity"] == "stop" for rule in broken)
        report = {"passed": not stopped, "quarantined": {"no such user": 1234}, "rules": [HOLDS, *broken]}
        self.write("data/validation/report.json", report)

    def trained(self, model: str) -> None:
        self.write(f"artifacts/train/{model}.json", {"valid_auc": 0.6789})
        self.write(f"checkpoints/{model}/config.json", {"facts": {}})
        self.write(f"artifacts/train/{model}_history.csv", "epoch,valid_auc\n1,0.61\n2,0.66\n")

    def evaluated(self, model: str, auc: float, champion: bool = False) -> None:
        folder = f"artifacts/evaluate/{model}"
        self.write(f"{folder}/evaluation.json", evaluation(model, auc, champion))
        self.write(f"{folder}/calibration.csv", "predicted,observed,rows\n0.1,0.12,750\n0.4,0.35,750\n")
        self.write(f"{folder}/roc.csv", "false_positive_rate,true_positive_rate\n0,0\n0.5,0.8\n1,1\n")

    def everything(self) -> None:
        self.source()
        self.validated(WARNS)
        splits = {"train": [0, 6000], "valid": [6000, 7500], "test": [7500, 9000]}
        self.write("data/dataset/dataset.json", {"splits": splits, "bytes_per_row": 31})
        for model, auc in (("qin", 0.7123), ("sdcnv3", 0.6987)):
            self.trained(model)
            self.evaluated(model, auc, champion=True)
        rule = {"rule": "auc", "passed": False, "why": "0.6987 is not >= 0.7"}
        self.write("artifacts/gate/decision.json", {
            "verdict": "approve", "model": "qin", "reasons": ["qin passes <b>all</b> rules & more"],
            "candidates": {
                "qin": {"passed": True, "rules": [{**rule, "passed": None, "why": "one class alone"}]},
                "sdcnv3": {"passed": False, "rules": [rule]},
            },
        })  # fmt: skip
        self.write("artifacts/package/package.json", {"built": True, "tag": "ctr-ranker:qin-0123"})
        self.write("artifacts/smoke/smoke.json", {"served": True, "golden_requests": 20})
        smoke = {"seconds": 9.1, "latency_ms": {"p50": 3.21, "p99": 9.87}, "max_abs_error": 1.2e-7}
        self.write(".scratch/stages/smoke.json", smoke)
        train = {"seconds": 12.3, "peak_mib": 4567, "rows_per_second": 45678}
        self.write(".scratch/stages/train@qin.json", train)


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
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


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
                       "champion v0.0.4", "oracle", "9,000, 20.0% clicked", "2026-10-01 to 2026-10-06",
                       "1 of 2", "events.is_first", "no impression is there twice", "warning", "observed 0.5",
                       "1,234 no such user",
                       "train 6,000, valid 1,500, test 1,500; 31 bytes each",
                       "latency p50 3.2 ms, p99 9.9 ms", "12.3 s", "4,567 MiB", "ctr-ranker:qin-0123",
                       "qin passes <b>all</b> rules & more"):  # fmt: skip
            assert figure in text, figure
    assert "gate: approve qin" in table
    assert "new users 321 0.7023 0.6887" in page.text
    assert "new items 12" in page.text
    assert "sdcnv3 auc broken 0.6987 is not >= 0.7" in page.text
    assert "qin auc too few rows one class alone" in page.text
    assert page.tags.count("svg") == 4
    for caption in ("Valid AUC by epoch", "ROC on the test days", "Calibration on the test days", "AUC by slice"):
        assert caption in page.text


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
        assert "reject" in text and "auc 0.51 is not >= 0.6" in text
        assert "Bento" not in text


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
    assert page.tags.count("svg") == (0, 1, 4, 4)[parts]


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
    assert "stopped at validate" in page.text and "stopped at validate:" in said
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
        assert "stopped at train@qin" in text and error["error"] in text
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
