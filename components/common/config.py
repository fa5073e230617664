"""params.yaml -> the typed config of one step. Every number of the pipeline lives in params.yaml, once."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

Config = TypeVar("Config")


def section(params: Path, name: str) -> dict[str, Any]:
    """The mapping under a dotted name such as `train.qin`. Raises ValueError where there is none."""
    try:
        found = yaml.safe_load(params.read_text())
    except FileNotFoundError:
        raise ValueError(f"{params} is not there; run from the project's root, or name it with --params") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{params} is no YAML: {error}") from None
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            keys = sorted(found) if isinstance(found, dict) else found
            raise ValueError(f"{params}: no section {name!r}: {part!r} is not among {keys}")
        found = found[part]
    if not isinstance(found, dict):
        raise ValueError(f"{params}: section {name!r} is {found!r}; it must be a mapping")
    return found


def load(params: Path, name: str, config: type[Config]) -> Config:
    """One section of params.yaml as its dataclass.

    Raises ValueError that names every key that is unknown, missing or of a wrong type, or the first out of its range.
    """
    raw = section(params, name)
    _forbid_unknown_keys(config)
    try:
        return TypeAdapter(config).validate_python(raw)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join([name, *(str(part) for part in problem["loc"])])
            match problem["type"]:
                case "unexpected_keyword_argument" | "extra_forbidden":
                    problems.append(f"{key}: unknown key; {_nearby(config, problem['loc'])}")
                case "missing" | "missing_argument" | "missing_keyword_only_argument":
                    problems.append(f"{key}: missing; add it")
                case "value_error":
                    problems.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}")
                case "string_type" if isinstance(problem["input"], date):
                    problems.append(f"{key} is {problem['input']}, which YAML takes for a time; put it in quotes")
                case _:
                    problems.append(f"{key} is {problem['input']!r}: {problem['msg']}")
        raise ValueError(f"{params}:\n  " + "\n  ".join(problems)) from None


def _forbid_unknown_keys(config: type) -> None:
    """The dataclasses themselves stay free of pydantic, so that models/ and the trainer need torch alone."""
    config.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    for kind in get_type_hints(config).values():
        if isinstance(kind, type) and is_dataclass(kind):
            _forbid_unknown_keys(kind)


def _nearby(config: type, location: tuple[int | str, ...]) -> str:
    for part in location[:-1]:
        config = get_type_hints(config)[str(part)]
    return f"known are {', '.join(sorted(f.name for f in fields(config)))}"  # type: ignore[arg-type]


def parse_time(name: str, text: str) -> datetime:
    """Raises ValueError where the text is no ISO time or has no zone."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}; write an ISO time such as 2026-01-31T00:00:00+00:00") from None
    if time.tzinfo is None:
        raise ValueError(f"{name} is {text!r}, a time without a zone; add one, e.g. {time.isoformat()}+00:00")
    return time.astimezone(UTC)
