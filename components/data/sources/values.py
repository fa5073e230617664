"""SQL for the values of a user's files: the canonical value of a column, and why a value is broken."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SPLITS = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test", "testing"),
}
OFFSET = r"(Z|[+-]\d{2}(:?\d{2})?)$"  # of a time in text: its zone
WHOLE = r"[+-]?\d+(\.0*)?"  # of an id in text: pandas writes 7.0 where another row has none
SECONDS = (-62_135_596_800, 253_402_300_800)  # of the years 1 to 9999, the only ones that Python's datetime knows
TIMES = "timestamptz '0001-01-01 00:00:00Z' and timestamptz '9999-12-31 23:59:59.999999Z'"
SAMPLE = 1000  # values that say whether a column of ids is text


def name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def text(words: str) -> str:
    return "'" + words.replace("'", "''") + "'"


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def given(column: str, kind: pa.DataType) -> str:
    """The value as the file has it. Empty text is no value."""
    return f"nullif(trim({column}), '')" if is_text(kind) else column


def has_text_ids(values: pa.ChunkedArray) -> bool:
    """Whether most of the first values of a column of ids are no whole numbers."""
    if not is_text(values.type):
        return False
    first = pc.utf8_trim_whitespace(values.slice(0, SAMPLE))
    first = first.filter(pc.not_equal(first, ""))
    whole = pc.sum(pc.match_substring_regex(first, f"^{WHOLE}$")).as_py() or 0
    return 2 * whole < len(first)


def text_id(words: str) -> str:
    """The id of a text: 63 bits of its MD5. So a text has the same id in every table and on every day."""
    return f"(md5_number_upper({words}::varchar) >> 1)::bigint"


def canonical(
    column: str, kind: pa.DataType, ours: str, *, numeric: bool = False, text_ids: bool = False
) -> tuple[str, dict[str, str]]:
    """The canonical value; and what is wrong with it -> the condition under which it is."""
    found = given(column, kind)
    number = f"try_cast({found} as double)"
    if numeric:
        bucket = f"try_cast(if({number} > 2, floor(ln({number}) ** 2), trunc({number})) as bigint)::varchar"
        wrong = {"no number": f"{found} is not null and {number} is null", "infinite": f"isinf({number})"}
        return f"if(isfinite({number}), {bucket}, null)", wrong
    match ours:
        case "user_id" | "item_id":
            wrong = {"missing": f"{found} is null"}
            if text_ids:
                return text_id(found), wrong
            value = f"try_cast({found} as bigint)"  # it rounds: 7.5 would be the id of something else
            whole = f"regexp_full_match({found}, '{WHOLE}')" if is_text(kind) else f"{value} = {found}"
            wrong["no whole number of 64 bits"] = f"{value} is null or not {whole}"
            if pa.types.is_floating(kind):
                most = 2 ** (np.finfo(kind.to_pandas_dtype()).nmant + 1)
                wrong["a float too large to be exact"] = f"abs({found}) >= {most}"
            return value, wrong
        case "label":
            value = f"coalesce({number}, try_cast({found}::varchar as boolean)::double)"  # false and true will do
            wrong = {"missing": f"{found} is null", "neither 0 nor 1": f"{value} is null or {value} not in (0, 1)"}
            return f"try_cast({value} as tinyint)", wrong
        case "timestamp" | "created_at":
            value, wrong = _time(found, kind)
            # an item may have no time of arrival; an event must have its time
            return value, {**({"missing": f"{found} is null"} if ours == "timestamp" else {}), **wrong}
        case "split":
            words = f"lower({found}::varchar)"
            cases = " ".join(f"when {words} in {known} then '{part}'" for part, known in SPLITS.items())
            value = f"case {cases} end"
            return value, {f"none of {', '.join(SPLITS)}": f"{value} is null"}
        case "propensity":
            wrong = {"missing": f"{found} is null", "not above 0 and at most 1": f"not coalesce({number} > 0 and "
                     f"{number} <= 1, false)"}  # fmt: skip
            return f"try_cast({number} as float)", wrong
        case "position" | "slate":
            kind_of, least = ("smallint", 1) if ours == "position" else ("bigint", -(2**63))
            value = f"try_cast({found} as {kind_of})"  # it rounds: 1.5 would be another place
            wrong = {"missing": f"{found} is null", f"no whole number from {least} on": f"{value} is null or "
                     f"{value} < {least} or {value} <> {number}"}  # fmt: skip
            return value, wrong
        case "tags" if pa.types.is_nested(kind):
            return f"{found}::varchar[]", {}
    return f"{found}::varchar", {}


def _time(found: str, kind: pa.DataType) -> tuple[str, dict[str, str]]:
    """A timestamp with a zone, an ISO text with one, or seconds since 1970."""
    value = f"try_cast({found} as timestamptz)"
    wrong = {}
    if pa.types.is_timestamp(kind):
        wrong["a time without a zone"] = "true" if kind.tz is None else "false"
    else:
        number = f"try_cast({found} as double)"
        seconds = f"{number} >= {SECONDS[0]} and {number} < {SECONDS[1]}"
        time = f"if({seconds}, make_timestamptz(round({number} * 1000000)::bigint), null)"
        if pa.types.is_floating(kind) and kind.bit_width < 64:
            wrong["a float of too few bits for a time"] = "true"
        wrong["too large for seconds since 1970: write seconds, not milliseconds"] = f"not ({seconds})"
        if is_text(kind):
            value = f"if({number} is null, {value}, {time})"
            wrong["a time without a zone"] = (
                f"{value} is not null and {number} is null and not regexp_matches({found}, '{OFFSET}')"
            )
        else:
            value = time
    wrong["no time"] = f"not coalesce({value} between {TIMES}, false)"
    return value, {reason: f"{found} is not null and {broken}" for reason, broken in wrong.items()}
