"""MkDocs hook: the pages reference.md and code.md, made from params.yaml, dvc.yaml and the code when the site is built.

A section of params.yaml is a dataclass `…Config`. Its docstring says what each key means, in lines such as
`key, key   meaning`; its annotations give the types, params.yaml the values. The sources are read and not imported, so
that the site builds without torch. A key without a meaning is a warning, which `mkdocs build --strict` makes an error.
"""

from __future__ import annotations

import ast
import json
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # mkdocs does not put the project's folder there

from components.common import pipeline  # noqa: E402

KEYS = re.compile(r"^([a-z]\w*(?:, [a-z]\w*)*)  +(\S.*)$")  # of a docstring's line: names, two spaces, meaning
INTRO = """# Reference: every parameter

Every number of the pipeline is a key in `params.yaml`. This page is made from that file and from the code when the site
is built. The value beside a key is the one in `params.yaml`.

A key that is unknown, missing or out of its range is an error, and the message names the key. Try a value without an
edit: `dvc exp run -S train.qin.lr=0.001`. `python -m components STAGE --help` shows the keys of one stage.
"""
STAGES = """
## The stages

`dvc repro` runs these stages. A stage runs again if its code, its inputs or its keys have changed.

| stage | what it does | keys | writes |
| --- | --- | --- | --- |
"""

CODE = """# Code map

Every file of the code, with the first sentence of its docstring. The rooms are explained in
[Architecture](architecture.md#the-rooms).
"""
FOLDERS = ("components", "models", "bento", "feature_repo", "dags")

log = logging.getLogger("mkdocs.hooks.reference")


@dataclass(frozen=True)
class Section:
    """A config dataclass as its source describes it.

    intro   what the docstring says before and after its keys
    types   key -> annotation
    says    key -> meaning
    """

    intro: str
    types: dict[str, str]
    says: dict[str, str]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "reference.md", content=page()))
    files.append(File.generated(config, "code.md", content=code_map()))
    return files


def page() -> str:
    """The page's Markdown."""
    known = {name.lower(): found for name, found in sections(ROOT / "components", ROOT / "models")}
    parts = [INTRO]
    for name, values in yaml.safe_load((ROOT / "params.yaml").read_text()).items():
        if name != "train":
            parts += _section(name, values, f"{name}config", known)
            continue
        parts += ["", "## train", "", "One section for each model, and one for its network."]
        for model, settings in values.items():
            network = settings.pop("network")
            parts += _section(f"train.{model}", settings, "trainconfig", known)
            parts += _section(f"train.{model}.network", network, f"{model}config", known)
    return "\n".join([*parts, *_stages(), ""])


def sections(*folders: Path) -> Iterator[tuple[str, Section]]:
    """The name and the content of every class `…Config` below the folders."""
    for file in sorted(path for folder in folders for path in folder.rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                types = {
                    part.target.id: ast.unparse(part.annotation)
                    for part in node.body
                    if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
                }
                yield node.name, _read(ast.get_docstring(node) or "", types)


def code_map() -> str:
    """The page's Markdown: for each folder what its `__init__.py` says, and a table of its files."""
    parts = [CODE]
    folders = {file.parent for name in FOLDERS for file in (ROOT / name).rglob("*.py")}
    for folder in sorted(folders, key=lambda folder: (FOLDERS.index(folder.relative_to(ROOT).parts[0]), folder)):
        says = {file.name: _first_sentence(file) for file in sorted(folder.glob("*.py"))}
        parts += ["", f"## {folder.relative_to(ROOT)}", "", _text(says.pop("__init__.py", "")), ""]
        if says:
            rows = [f"| {_code(name)} | {_text(sentence)} |" for name, sentence in says.items()]
            parts += ["| file | what it is |", "| --- | --- |", *rows]
    return "\n".join([*parts, ""])


def _first_sentence(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    found = re.match(r".*?[.!?](?= [A-Z`]|$)", paragraph)
    return found[0] if found else paragraph


def _read(docstring: str, types: dict[str, str]) -> Section:
    intro: list[str] = []
    says: dict[str, list[str]] = {}
    open_keys: list[str] = []
    for line in docstring.splitlines():
        found = KEYS.match(line)
        if found and set(names := found[1].split(", ")) <= set(types):
            open_keys = names
            says |= {name: [found[2]] for name in names}
        elif open_keys and line.startswith(" "):
            for name in open_keys:
                says[name].append(line.strip())
        else:
            open_keys = []
            intro.append(line)
    return Section("\n".join(intro).strip(), types, {name: " ".join(lines) for name, lines in says.items()})


def _section(name: str, values: dict[str, Any], config: str, known: dict[str, Section]) -> list[str]:
    """A heading and a table; then the same for each key that is a section itself."""
    if config not in known:
        log.warning("params.yaml has the section %s, and no class %s describes it", name, config)
        return []
    section = known[config]
    parts = ["", f"{'##' if '.' not in name else '###'} {name} {{ #{name} }}", "", _text(section.intro), ""]
    rows, inner = [], []
    for key, value in values.items():
        kind = section.types.get(key, "").lower()
        if key not in section.says:
            log.warning("%s.%s: the docstring of %s does not say what it means", name, key, config)
        if kind in known:
            inner += _section(f"{name}.{key}", value, kind, known)
        else:
            kind = f"<br>{_code(section.types.get(key, ''))}"
            meaning = _text(section.says.get(key, ""))
            cells = f'<code id="{name}.{key}">{key}</code>{kind}', _code(json.dumps(value)), meaning
            rows.append(f"| {' | '.join(cells)} |")
    if rows:
        parts += ["| key and type | value | meaning |", "| --- | --- | --- |", *rows, ""]
    return parts + inner


def _code(text: str) -> str:
    return f"<code>{_plain(text)}</code>"


def _text(text: str) -> str:
    """A docstring's words as Markdown: what stands between backticks is code, nothing else is markup."""
    return "".join(_code(part) if i % 2 else _plain(part) for i, part in enumerate(text.split("`")))


def _plain(text: str) -> str:
    return re.sub(r"[|*_{}\[\]]", lambda sign: f"&#{ord(sign[0])};", escape(text))


def _stages() -> list[str]:
    rows = [
        f"| {_code(name)} | {_text(stage.desc)} | {'<br>'.join(map(_code, stage.params))} | "
        f"{'<br>'.join(map(_code, stage.outs))} |"
        for name, stage in pipeline.read().stages.items()
    ]
    return [STAGES.rstrip(), *rows]
