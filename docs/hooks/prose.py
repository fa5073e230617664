"""python docs/hooks/prose.py FILE_OR_FOLDER…: checks the prose of Markdown files. MkDocs runs it too, on every page.

Three tools find the mistakes: proselint (wordiness, clichés, old-fashioned words), our own checks in proselint's form
(long sentences and the phrases of style.yml) and codespell (typing errors). Code and links' addresses are not prose:
markdown-it parses each file, and the first two see only its text. As a hook of MkDocs it also checks the pages
that are made when the site is built, and so the docstrings that they quote. A mistake is a warning there, which
`mkdocs build --strict` makes an error.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from markdown_it import MarkdownIt
from mkdocs.structure.pages import Page
from proselint.checks import __register__ as proselint_checks
from proselint.config import Config
from proselint.registry import CheckRegistry
from proselint.registry.checks import Check, CheckResult, types
from proselint.registry.checks.engine import Padding
from proselint.tools import LintFile

log = logging.getLogger("mkdocs.hooks.prose")
STYLE = yaml.safe_load((Path(__file__).parent / "style.yml").read_text())
OFF = {
    "restricted",  # a word list of its own for children's texts
    "typography",  # asks for signs that a keyboard does not have
    "uncomparables",  # "more equal": here that is said of measured figures
    "weasel_words",  # "very", and every "many"
}
CHECKS = {name: name not in OFF for name in sorted({check.path.split(".")[0] for check in proselint_checks})}
SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!vs)[.!?:](?=[\s)\"'”]|$)")
WORD = re.compile(r"[A-Za-z0-9][\w'’.,%-]*")


def sentences(text: str, check: Check) -> Iterator[CheckResult]:
    """A result for each sentence of more than `max_words` words. A blank line ends a sentence too."""
    start = 0
    for paragraph in re.finditer(r"(?:[^\n]+\n?)+", text):
        start = paragraph.start()
        ends = [start + end.end() for end in SENTENCE_END.finditer(paragraph.group())] + [paragraph.end()]
        for end in ends:
            words = len(WORD.findall(text[start:end]))
            if words > STYLE["max_words"]:
                yield CheckResult(check.path, check.message.format(words, STYLE["max_words"]), (start, end), None)
            start = end


HOUSE = (
    Check(check_type=sentences, path="house.sentence", message="{} words in one sentence; write at most {}"),
    *(
        Check(
            check_type=types.Existence(items=(phrase,), padding=Padding.WORDS_IN_TEXT),
            path="house.phrase",
            message=f"'{{}}': write instead: {better}",
        )
        for phrase, better in STYLE["phrases"].items()
    ),
)

CheckRegistry().register_many((*proselint_checks, *HOUSE))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> None:
    """MkDocs' hook."""
    if page.file.generated_by:  # the others are checked by name before the build
        for problem in problems(page.file.src_uri, markdown):
            log.warning(problem)


def prose(markdown: str) -> tuple[str, list[int]]:
    """The text of some Markdown, its blocks apart, and for each line of that text its line number in the Markdown."""
    lines: list[str] = []
    numbers: list[int] = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type != "inline" or token.map is None:
            continue
        text = "".join(
            "code" if part.type == "code_inline" else "\n" if part.type.endswith("break") else part.content
            for part in token.children or ()
            if part.type not in ("html_inline", "image")
        )
        block = text.split("\n")
        lines += [*block, "", "·", ""]  # so that a word at the end of a block is not followed by the next block's
        numbers += [token.map[0] + 1 + i for i in range(len(block))] + [token.map[1]] * 3
    return "\n".join(lines), numbers


def problems(name: str, markdown: str) -> list[str]:
    """`name:line: check: message`, in the order of the lines."""
    text, numbers = prose(markdown)
    file = LintFile(name, text or " ")
    found = {
        (
            file.content[: result.check_result.span[0]].count("\n"),
            result.check_result.check_path,
            result.check_result.message,
        )
        for result in file.lint(Config(max_errors=10_000, checks=CHECKS | {"house": True}))
    }
    return [f"{name}:{numbers[max(line - 1, 0)]}: {check}: {message}" for line, check, message in sorted(found)]


def main(paths: list[str]) -> int:
    """0, or 1 with a line for each mistake."""
    files = sorted({file for path in map(Path, paths) for file in (path.rglob("*.md") if path.is_dir() else [path])})
    if not files:
        raise SystemExit(f"no Markdown in {paths}; name files, or folders that hold some")
    found = [problem for file in files for problem in problems(str(file), file.read_text())]
    print("\n".join(found), end="\n" if found else "")
    spelling = subprocess.run([sys.executable, "-m", "codespell_lib", "--builtin", "clear,rare", *map(str, files)])
    print(f"{len(files)} files: {len(found)} sentences or phrases to mend")
    return 1 if found or spelling.returncode else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
