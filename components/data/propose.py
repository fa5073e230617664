"""inspect: look at somebody's files, and propose the section `ingest.files` of params.yaml for them.

Names come first, values decide: a column called `click` is no label unless its values are 0 and 1. What the files
cannot be mapped to as they are (a rating in place of a label, times in milliseconds) is made by a few lines of SQL,
which the proposal has too.
"""

# ruff: noqa: S608 - the SQL is for a person to read and run
from __future__ import annotations

import posixpath
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import yaml

from components.data.sources import brief
from components.data.sources.reading import COMPRESSED, SEPARATORS, File
from components.data.sources.values import SPLITS

ROWS = 2000  # looked at in the first and in the last file of a table
FILES = 10_000  # looked at below a path
PREPARED = "events.parquet"
ENDINGS = (".parquet", *(ending + packed for ending in SEPARATORS for packed in ("", *COMPRESSED)))
NAMES = {
    "user_id": "user_id userid uid user visitor_id viewer_id customer_id member_id account_id reviewer_id session_id",
    "item_id": "item_id itemid iid item video_id movie_id news_id article_id product_id photo_id song_id track_id "
    "book_id doc_id content_id asin isbn sku poi_id ad_id creative_id",
    "timestamp": "timestamp event_timestamp event_time unix_review_time time_ms time datetime ts hour date",
    "label": "label click clicked is_click is_clicked target y purchase is_purchase conversion like is_like",
    "split": "split fold subset part",
    "created_at": "created_at upload_time publish_time published_at release_time",
    "title": "title name item_name caption headline",
    "tags": "tags genres genre categories keywords topics",
    "text": "text description abstract body summary overview",
    "image": "image image_url image_path img picture poster cover thumbnail",
}
GRADES = ("rating", "ratings", "stars", "score", "overall", "watch_ratio")
# What people do after an impression says what the label is, so none of it can be a feature of the impression.
AFTERWARDS = re.compile(
    r"(^|_)(like|follow|forward|share|comment|hate|click|purchase|conversion|converted|dwell|play|watch|view_time|"
    r"long_view|rating|stars|duration_ms|play_duration|play_time_ms|profile_enter)(_|$)"
)
CODES = re.compile(
    r"^c\d+$|(^|_)(id|ids|code|type|category|cat|ip|hash|zip|zipcode|pos|position|gender|age|occupation)$"
)
COUNTS = re.compile(r"^i\d+$")
FEW = 32  # distinct whole numbers that are codes


@dataclass
class _Group:
    """Files of one table: their path as `ingest.files` has it, and a sample of their rows."""

    path: str | list[str] | dict[str, Any]
    files: list[File]
    sample: pd.DataFrame
    kinds: dict[str, str] = field(default_factory=dict)
    separator: str | None = None


@dataclass(frozen=True)
class Proposal:
    """files: the section `ingest.files`; sql: what makes PREPARED first, or None; notes: what a person should know."""

    raw: str
    files: dict[str, Any]
    sql: str | None
    notes: list[str]

    def text(self) -> str:
        """What is printed: notes, the SQL, and the block to paste."""
        parts = [f"# {note}" for note in self.notes]
        if self.sql:
            parts += ["", "# First make the events (run this in `.venv/bin/python`):", "import duckdb", "", self.sql]
        block = yaml.dump(
            {"files": self.files}, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
        )
        parts += ["", "# Then paste this below `ingest:` in params.yaml, in place of `files`:"]
        parts += [f"  {line}" for line in block.rstrip().splitlines()]
        return "\n".join([*parts, "", "# Next:", f"python -m components use files --raw {shlex.quote(self.raw)}"])


def propose(path: str) -> Proposal:
    """Look at the parquet, CSV and TSV files below a path, a folder, a file or a URL.

    Raises ValueError where there is no such file, or none of them can be the events.
    """
    raw, groups = _groups(path)
    roles = [(_roles(group, raw), group) for group in groups]
    events = max(roles, key=lambda one: _likeness(*one))
    if _likeness(*events) < 2:
        seen = "; ".join(f"{group.path}: {', '.join(group.sample.columns[:12])}" for group in groups)
        raise ValueError(
            f"{path}: no file looks like impressions: none has a column of 0 and 1, such as `label` or `click`, or of "
            f"ratings. {brief(seen)}"
        )
    notes: list[str] = []
    table, sql = _events(*events, raw, notes)
    mapping: dict[str, Any] = {"events": table, "users": _none(), "items": _none(), "vectors": {}, "separator": "|"}
    for found, group in roles:
        if group is events[1]:
            continue
        vector = next((name for name, kind in group.kinds.items() if kind == "vector"), None)
        if vector == "vector" and "item_id" in group.sample.columns:
            stem = re.sub(r"\W+", "_", posixpath.basename(str(group.path)).split(".")[0])
            mapping["vectors"][stem.replace("item_", "")] = group.path
        elif "item_id" in found and mapping["items"]["path"] is None and _is_key(group, found["item_id"]):
            mapping["items"] = _described(group, found, ("item_id", "created_at", "title", "tags", "text", "image"))
            mapping["separator"] = _tag_separator(group, found.get("tags"))
        elif "user_id" in found and mapping["users"]["path"] is None and _is_key(group, found["user_id"]):
            mapping["users"] = _described(group, found, ("user_id",))
        else:
            notes.append(f"{group.path} is not used: it names no item and no user once")
    return Proposal(raw, mapping, sql, notes)


# ---- files ------------------------------------------------------------------------------------------------------


def _groups(path: str) -> tuple[str, list[_Group]]:
    """The folder that is ingest.raw, and the tables that lie in it."""
    place = path if "://" in path else str(Path(path).expanduser())
    try:
        system, root = fsspec.core.url_to_fs(place)
        is_file = system.isfile(root)
        found = [root] if is_file else sorted(system.find(root))[:FILES]
    except Exception as error:  # each filesystem of fsspec has errors of its own
        raise ValueError(f"{path} cannot be opened: {type(error).__name__}: {brief(error)}. Mend the path") from None
    raw = posixpath.dirname(place) or "." if is_file else place.rstrip("/")
    base = posixpath.dirname(root) if is_file else root.rstrip("/")
    data = [name for name in found if name.lower().endswith(ENDINGS)]
    if not data:
        what = f"it holds {', '.join(posixpath.basename(name) for name in found[:5])}" if found else "nothing is there"
        raise ValueError(f"{path} has no .parquet, .csv or .tsv file: {brief(what)}. Save your data as one of them")
    patterns: dict[str, list[str]] = {}
    for name in data:
        relative = name.removeprefix(base).lstrip("/")
        patterns.setdefault(re.sub(r"\d+([-_.]?\d+)*", "*", relative), []).append(name)
    parts: dict[str, dict[str, str]] = {}
    groups = []
    for pattern, names in patterns.items():
        shown = pattern if len(names) > 1 else names[0].removeprefix(base).lstrip("/")
        words = re.split(r"[\W_]+", pattern.lower())
        part = next((part for part, known in SPLITS.items() if set(known) & set(words)), None)
        if part:
            rest = "_".join(word for word in words if word not in SPLITS[part])
            parts.setdefault(rest, {})[part] = shown
        files = [File(system, name) for name in names]
        groups.append((rest if part else None, _Group(shown, files, _sample(files))))
    merged: list[_Group] = []
    for key in dict.fromkeys(key for key, _ in groups if key is not None):
        some = [group for other, group in groups if other == key]
        sample = pd.concat([group.sample for group in some], ignore_index=True)
        merged.append(_Group(parts[key], [file for group in some for file in group.files], sample))
    merged += [group for key, group in groups if key is None]
    for group in merged:
        group.kinds = {name: _kind(group.sample[name]) for name in group.sample.columns}
    return raw, merged


def _sample(files: list[File]) -> pd.DataFrame:
    frames = []
    for file in dict.fromkeys((files[0], files[-1])):
        batch = next(iter(file.batches(file.columns())), None)
        if batch is not None:
            frames.append(batch.rows.slice(0, ROWS).to_pandas())
    frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    for name in frame.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]]:
        if frame[name].map(type).isin([str, type(None)]).all():
            frame[name] = frame[name].str.strip().replace("", None)
    return frame


def _kind(values: pd.Series) -> str:
    """whole, number, binary, seconds, milliseconds (and finer), hours, time, naive, vector, list, text or empty."""
    known = values.dropna()
    if known.empty:
        return "empty"
    if isinstance(known.iloc[0], list | tuple | np.ndarray):
        return "vector" if len(known.iloc[0]) and isinstance(known.iloc[0][0], float | np.floating) else "list"
    if isinstance(known.dtype, pd.DatetimeTZDtype):
        return "time"
    if pd.api.types.is_datetime64_dtype(known.dtype):
        return "naive"
    if pd.api.types.is_bool_dtype(known.dtype) or set(known.astype(str).str.lower()) <= {"true", "false"}:
        return "binary"
    numbers = pd.to_numeric(known, errors="coerce")
    if numbers.notna().all():
        if set(numbers.unique()) <= {0, 1}:
            return "binary"
        whole = bool((numbers == numbers.round()).all())
        text = known.astype(str).str.removesuffix(".0")
        if whole and text.str.fullmatch(r"\d{8}").all() and _parses(text, "%y%m%d%H"):
            return "hours"
        for unit, size in {"seconds": 1, "milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9}.items():
            if (numbers / size).between(631_152_000, 2_524_608_000).all():  # 1990 to 2050
                return unit
        return "whole" if whole else "number"
    if known.astype(str).str.fullmatch(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d.*)?").all():
        return "time" if known.astype(str).str.contains(r"(?:Z|[+-]\d\d:?\d\d)$").all() else "naive"
    return "text"


def _parses(text: pd.Series, form: str) -> bool:
    return bool(pd.to_datetime(text, format=form, errors="coerce").notna().all())


# ---- roles ------------------------------------------------------------------------------------------------------

TIMES = ("seconds", "time", "naive", "hours", "milliseconds", "microseconds", "nanoseconds")


def _plain(name: str) -> str:
    """videoId, Video-ID, "video id" -> video_id."""
    return re.sub(r"\W+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)).lower().strip("_")


def _roles(group: _Group, raw: str) -> dict[str, str]:
    """Canonical name, or `grade` for ratings -> the column that can be it."""
    names = {_plain(name): name for name in reversed(group.sample.columns)}
    fits = {
        "user_id": ("whole", "text", "binary"), "item_id": ("whole", "text", "binary"), "timestamp": TIMES,
        "label": ("binary",), "created_at": ("seconds", "time"), "tags": ("text", "list"), "title": ("text",),
        "text": ("text",), "image": ("text",), "split": ("text",),
    }  # fmt: skip
    roles: dict[str, str] = {}
    for role, known in NAMES.items():
        for name in known.split():
            if name in names and group.kinds[names[name]] in fits[role] and names[name] not in roles.values():
                roles[role] = names[name]
                break
    if "split" in roles and not set(group.sample[roles["split"]].dropna().str.lower()) <= set(sum(SPLITS.values(), ())):
        del roles["split"]
    if "timestamp" in roles:  # of several times, one that can be read as it is
        times = [names[name] for name in NAMES["timestamp"].split() if name in names]
        roles["timestamp"] = min(
            (name for name in times if group.kinds[name] in TIMES), key=lambda name: TIMES.index(group.kinds[name])
        )
    if "label" not in roles:
        grade = next((names[g] for g in GRADES if g in names and group.kinds[names[g]] in ("whole", "number")), None)
        binary = [name for name, kind in group.kinds.items() if kind == "binary" and AFTERWARDS.search(_plain(name))]
        if binary:
            roles["label"] = binary[0]
        elif grade:
            roles["grade"] = grade
    return roles


def _likeness(roles: dict[str, str], group: _Group) -> int:
    """How much a table looks like impressions."""
    return (
        4 * ("label" in roles)
        + 3 * ("grade" in roles)
        + sum(name in roles for name in ("user_id", "item_id", "timestamp"))
    )


def _is_key(group: _Group, column: str) -> bool:
    return bool(group.sample[column].nunique() > 0.9 * len(group.sample))


def _none() -> dict[str, Any]:
    return {"path": None, "columns": {}, "categorical": [], "numeric": []}


def _described(group: _Group, roles: dict[str, str], wanted: tuple[str, ...]) -> dict[str, Any]:
    """The table of the items or of the users."""
    roles = {ours: theirs for ours, theirs in roles.items() if ours in wanted}
    categorical, numeric = _features(group, set(roles.values()), None)
    columns = {ours: theirs for ours, theirs in roles.items() if ours != theirs}
    return {"path": group.path, "columns": columns, "categorical": categorical, "numeric": numeric}


def _features(group: _Group, taken: set[str], notes: list[str] | None) -> tuple[list[str], list[str]]:
    """The categorical and the numeric features of a table; with notes, of impressions."""
    categorical, numeric, left = [], [], {}
    for name, kind in group.kinds.items():
        plain, values = _plain(name), group.sample[name]
        if name in taken:
            continue
        if kind in (*TIMES[1:], "vector", "list", "empty") or (kind == "seconds" and not CODES.search(plain)):
            left[name] = "a time, a list or empty"
        elif notes is not None and AFTERWARDS.search(plain) and not CODES.search(plain):
            left[name] = "known only after the impression"
        elif values.nunique() <= 1:
            left[name] = "one value"
        elif values.nunique() == len(values) > FEW and kind in ("text", "whole" if notes is not None else "text"):
            left[name] = "another value in every row"
        elif kind == "text" and values.dropna().str.len().mean() > 60:
            left[name] = "long texts"
        elif kind in ("text", "binary") or (not COUNTS.match(plain) and CODES.search(plain)):
            categorical.append(name)
        elif kind == "number" or COUNTS.match(plain) or values.nunique() > FEW:
            numeric.append(name)
        else:
            categorical.append(name)
    if notes is not None:
        for why in dict.fromkeys(left.values()):
            notes.append(f"no features ({why}): {', '.join(name for name in left if left[name] == why)}")
    return categorical, numeric


def _tag_separator(group: _Group, column: str | None) -> str:
    if column is None or group.kinds[column] != "text":
        return "|"
    text = group.sample[column].dropna().str.cat()
    return max("|,;", key=text.count)


# ---- events -----------------------------------------------------------------------------------------------------


def _events(roles: dict[str, str], group: _Group, raw: str, notes: list[str]) -> tuple[dict[str, Any], str | None]:
    """The table of the events, and the SQL that must make it first."""
    wanted = ("user_id", "item_id", "timestamp", "label", "split")
    known = {ours: theirs for ours, theirs in roles.items() if ours in wanted}
    taken = {*known.values(), *([roles["grade"]] if "grade" in roles else [])}
    categorical, numeric = _features(group, taken, notes)
    path, where = group.path, ""
    made: dict[str, str] = {}
    if isinstance(path, dict) and (timed := "timestamp" in known or not {"train", "valid"} <= set(path)):
        if timed and "timestamp" not in known:
            notes.append("no time, and no file for validation: name one whose rows are later than those of train")
        path = list(path.values())
    if "grade" in roles:
        grade = _sql(roles["grade"])
        numbers = pd.to_numeric(group.sample[roles["grade"]])
        high = (
            3
            if numbers.max() > 1 and numbers.max() <= 5 and numbers.min() >= 0.5
            else round(float(numbers.median()), 4)
        )
        made["label"] = f"({grade} > {high})::int"
        where = f" where {grade} <> {high}" if high == 3 else ""
        notes.append(f"{roles['grade']} is no label of 0 and 1: a click is proposed to be {roles['grade']} > {high}")
    if "timestamp" in known and group.kinds[known["timestamp"]] not in ("seconds", "time"):
        made["timestamp"] = _time(known["timestamp"], group.kinds[known["timestamp"]], notes)
    if "label" in known:
        rate = group.sample[known["label"]].astype(str).str.lower().isin(["1", "1.0", "true"]).mean()
        notes.append(f"label: {known['label']}, {rate:.1%} of the rows looked at")
    for name in ("user_id", "item_id"):
        if name not in known:
            notes.append(f"no column was found for {name}: all rows are of one")
    if "timestamp" not in known and "split" not in known and not isinstance(path, dict):
        notes.append("no time and no split: give a path for train, valid and test each, or a column for one of the two")
    sql = None
    if made:
        place = raw.replace("'", "''")
        files = ", ".join(f"'{place}/{one}'" for one in ([path] if isinstance(path, str) else list(path)))
        replaced = [known[name] for name in made if known.get(name) == name]
        star = f"* exclude ({', '.join(_sql(name) for name in replaced)})" if replaced else "*"
        added = ", ".join(f"{value} as {name}" for name, value in made.items())
        reader = "read_parquet" if group.files[0].ending == ".parquet" else "read_csv"
        sql = (
            f'duckdb.sql("""set timezone = \'UTC\'; copy (select {star}, {added}\n'
            f'    from {reader}([{files}]){where}) to \'{place}/{PREPARED}\'""")'
        )
        path = PREPARED
    columns = {ours: theirs for ours, theirs in known.items() if ours != theirs and ours not in made}
    return {"path": path, "columns": columns, "categorical": categorical, "numeric": numeric}, sql


def _sql(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _time(column: str, kind: str, notes: list[str]) -> str:
    """SQL for a time with a zone."""
    name = _sql(column)
    if kind in ("naive", "hours"):
        notes.append(f"{column} has no zone: it is taken for UTC; change the SQL if it is not")
    match kind:
        case "hours":
            return f"strptime({name}::varchar, '%y%m%d%H')::timestamptz"
        case "naive":
            return f"{name}::timestamp::timestamptz"
    notes.append(f"{column} is in {kind}")
    scale = {"milliseconds": " * 1000", "microseconds": "", "nanoseconds": " // 1000"}[kind]
    return f"make_timestamptz(({name}{scale})::bigint)"
