"""The documentation: it builds without a broken link, its pages load nothing from elsewhere, its prose is plain."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.common import pipeline

ROOT = Path(__file__).parents[1]
PROSE = ROOT / "docs/hooks/prose.py"
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "use": "href"}
LOADING_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch", "manifest"}


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Warnings are errors: broken links, missing anchors, pages that the menu does not have."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what the site is built from."""
    for name in ("docs", "components", "models", "bento", "feature_repo", "dags"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


class Page(HTMLParser):
    """What a page loads, and the ids that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids.add(values.get("id", ""))
        self.loads += [value for name, value in values.items() if name == LOADS.get(tag)]
        if tag == "link" and LOADING_LINKS & set(values.get("rel", "").split()):
            self.loads.append(values["href"])
        if "mermaid" in values.get("class", "").split():  # the theme would fetch it
            self.loads.append("https://mermaid")


def keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of a section's keys. Mappings that are values, such as start.warm, count as keys themselves."""
    for name, value in values.items():
        if isinstance(value, dict) and value and f"{prefix}{name}" != "start.warm":
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@pytest.mark.slow
def test_the_reference_has_every_parameter(site: Path) -> None:
    page = Page((site / "reference.html").read_text())
    missing = sorted(set(keys(yaml.safe_load((ROOT / "params.yaml").read_text()))) - page.ids)
    assert not missing


@pytest.mark.slow
def test_the_reference_and_the_picture_show_every_stage(site: Path) -> None:
    page, picture = (site / "reference.html").read_text(), (site / "images/pipeline.svg").read_text()
    stages = pipeline.read().stages
    assert [name for name in stages if f"<code>{name}</code>" not in page] == []
    assert [name for name in stages if f">{name}</text>" not in picture] == []


@pytest.mark.slow
def test_a_broken_link_is_an_error(copy: Path) -> None:
    with (copy / "docs/index.md").open("a") as page:
        page.write("\n[page](gone.md) [heading](data.md#gone) [key](reference.md#train.qin.gone)\n")
    done = build(copy, copy / "site")
    assert done.returncode == 1
    assert "a link 'gone.md'" in done.stderr
    assert "does not contain an anchor '#gone'" in done.stderr
    assert "does not contain an anchor '#train.qin.gone'" in done.stderr


@pytest.mark.slow
def test_the_prose_of_docstrings_is_checked_where_the_site_quotes_them(copy: Path) -> None:
    config = copy / "components/common/splits.py"
    config.write_text(config.read_text().replace("valid_share, test_share   ", "valid_share, test_share   methinks "))
    done = build(copy, copy / "site")
    assert done.returncode == 1
    assert "archaism" in done.stderr


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 10
    foreign = {(path.name, url) for path, page in pages.items() for url in page.loads if re.match(r"(https?:)?//", url)}
    styles = {
        (path.name, url)
        for path in [*site.rglob("*.css"), *site.rglob("*.svg"), *pages]
        for url in re.findall(r"(?:url\(|@import )\s*[\"']?((?:https?:)?//[^\"')\s]+)", path.read_text())
    }
    assert not foreign | styles


def test_the_readme_is_short_and_its_links_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    targets = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert len(targets) > 8
    assert [target for target in targets if not (ROOT / target.partition("#")[0]).exists()] == []


def test_the_docs_name_no_file_that_is_gone() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {
        (page.name, path)
        for page in pages
        for path in re.findall(r"`((?:components|models|bento|dags|feature_repo|tests)/[\w/]+\.\w+)`", page.read_text())
    }
    assert len(named) > 5
    assert sorted((page, path) for page, path in named if not (ROOT / path).exists()) == []


def prose(*paths: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROSE), *map(str, paths)], cwd=ROOT, capture_output=True, text=True)


def test_the_prose_is_plain() -> None:
    done = prose(*ROOT.glob("*.md"), "docs")
    assert done.returncode == 0, done.stdout


MISTAKES = [
    ("A rejected model ends green with nothing shipped.", "house.phrase: 'ends green'"),
    ("The same command\ngoes on there.", "house.phrase: 'goes on there'"),
    ("Texts and pictures need no vectors of yours.", "house.phrase: 'of yours'"),
    ("Spaces around a text are none of it.", "house.phrase: 'are none of'"),
    ("So but for that number nothing differs.", "house.phrase: 'So but'"),
    ("A second one acts as ever.", "house.phrase: 'as ever'"),
    ("It is no record of what was served.", "house.phrase: 'It is no record of'"),
    ("It may lie beyond the floor of its kind.", "house.phrase: 'the floor of its kind'"),
    ("It lists every habit.", "house.phrase: 'habit'"),
    ("It is a stage, since a DVC dependency has no condition.", "house.phrase: 'since a'"),
    ("Word " * 31 + "end.", "house.sentence: 32 words"),
    ("Methinks it works.", "archaism"),
    ("We recieve data.", "recieve ==> receive"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the prose check says of a page with all the mistakes, each a paragraph."""
    page = tmp_path_factory.mktemp("prose") / "page.md"
    page.write_text("\n\n".join(text for text, _ in MISTAKES) + "\n")
    done = prose(page)
    assert done.returncode == 1
    return [line for line in done.stdout.splitlines() if line.startswith(str(page))]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_the_prose_check_finds(found: list[str], number: int) -> None:
    text, message = MISTAKES[number]
    line = "\n\n".join(text for text, _ in MISTAKES[:number]).count("\n") + (3 if number else 1)
    lines = range(line, line + text.count("\n") + 1)
    assert any(message in problem for problem in found if int(problem.split(":")[1]) in lines), found


def test_the_prose_check_reads_prose_only(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\nRun `methinks`.\n\n```\n{'word ' * 40}\nmethinks\n```\n")
    assert prose(page).returncode == 0
