"""validate: Great Expectations judges the canonical data.

The rules are in `rules.py`. Facts that no single row tells (an item is known, a vector is finite, a day's volume beside
the days before it) are made columns here, and a rule is then a plain statement on that column.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from components.artifacts import folder_hash, new_folder, read_json, write_json
from components.contracts import Canonical
from components.ingest import parse_time

if TYPE_CHECKING:
    from great_expectations.expectations import Expectation

EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """label_rate         share of clicks that a judged day may have, [low, high]
    max_age_hours      age of the newest event at ingest.until
    volume_ratio       a judged day's rows over the median of the days before it, [low, high]
    volume_days        how many of the newest days are judged, and how many days make the median
    volume_floor       a median below this many rows says nothing: the day is not judged
    max_missing_share  items without a vector, per modality
    """

    label_rate: tuple[float, float]
    max_age_hours: float
    volume_ratio: tuple[float, float]
    volume_days: int
    volume_floor: int
    max_missing_share: float

    def __post_init__(self) -> None:
        for name in ("label_rate", "volume_ratio"):
            low, high = getattr(self, name)
            if not 0 <= low < high:
                raise ValueError(f"{name} is [{low}, {high}]; it must be [low, high] with 0 <= low < high")
        if self.volume_days < 1:
            raise ValueError(f"volume_days is {self.volume_days}; at least 1 day must be judged")


def run(config: ValidateConfig, canonical: Path, output: Path, docs: Path) -> dict[str, Any]:
    """Judge the canonical folder; write the report and the Data Docs either way.

    Raises ValueError that names table, column and rule, with three example rows, where a critical rule is broken.
    """
    from components import rules

    data = Canonical(canonical)
    facts = read_json(canonical / "source.json", "ingest")
    until = parse_time("until", facts["until"]) if facts["until"] else None
    frames = {
        "events": (event_frame(data), rules.event_rules(until)),
        "days": (day_frame(data, config, until), rules.day_rules(config)),
        "items": (item_frame(data), rules.item_rules()),
        "users": (data.users().to_pandas(), rules.user_rules()),
    }
    items = data.items()["item_id"]
    for name, table in data.modalities().items():
        frames[f"modality {name}"] = (vector_frame(table, items), rules.vector_rules(name))
        share = 1 - len(pc.unique(table["item_id"])) / max(len(items), 1)
        frames[f"coverage {name}"] = (pd.DataFrame({"missing_share": [share]}), rules.coverage_rules(config))
    if until is not None:
        newest = pc.max(data.events()["timestamp"]).as_py()
        age = (until - newest).total_seconds() / 3600
        frames["freshness"] = (pd.DataFrame({"newest": [newest], "age_hours": [age]}), rules.freshness_rules(config))
    verdicts = judge(frames, docs)
    broken = [v for v in verdicts if not v["passed"] and v["severity"] == "critical"]
    report = {
        "passed": not broken,
        "canonical_sha256": folder_hash(canonical),
        "rows": {name: len(frame) for name, (frame, _) in frames.items()},
        "not_judged": [] if until else ["freshness: ingest.until is null"],
        "rules": verdicts,
    }
    write_json(output, report)
    for verdict in verdicts:
        if not verdict["passed"] and verdict["severity"] != "critical":
            logging.getLogger(__name__).warning("%s", describe(verdict))
    if broken:
        told = "\n  ".join(describe(verdict) for verdict in broken)
        raise ValueError(f"{canonical} breaks {len(broken)} rule(s); Data Docs: {docs}/index.html\n  {told}")
    return report


def require(report: Path, canonical: Path) -> None:
    """Raises ValueError unless the report says that these very bytes passed."""
    content = read_json(report, "validate")
    if not content["passed"]:
        raise ValueError(f"{report}: the data did not pass; mend it and run `dvc repro validate`")
    if content["canonical_sha256"] != folder_hash(canonical):
        raise ValueError(f"{report} judged other data than {canonical} holds now; run `dvc repro validate`")


# ---- the frames they judge --------------------------------------------------------------------------------------


def event_frame(data: Canonical) -> pd.DataFrame:
    """One row an event, with the columns that say whether its item, user and day are right."""
    events = data.events()
    frame = events.select(["user_id", "item_id", "timestamp", "label"]).to_pandas()
    frame["item_is_known"] = pc.is_in(events["item_id"], value_set=data.items()["item_id"].combine_chunks()).to_numpy()
    frame["user_is_known"] = pc.is_in(events["user_id"], value_set=data.users()["user_id"].combine_chunks()).to_numpy()
    frame["is_in_its_day"] = (frame["timestamp"].dt.floor("D") == _partition_days(data)).to_numpy()
    frame["is_first"] = ~frame.duplicated(["user_id", "item_id", "timestamp"])
    return frame


def _partition_days(data: Canonical) -> pd.Series:
    rows = [_rows(data, day) for day in data.days()]
    return pd.Series(pd.to_datetime(data.days(), utc=True).repeat(rows))


def _rows(data: Canonical, day: str) -> int:
    import pyarrow.parquet as pq

    return pq.ParquetFile(data.root / "events" / f"day={day}" / "part-0.parquet").metadata.num_rows


def day_frame(data: Canonical, config: ValidateConfig, until: datetime | None) -> pd.DataFrame:
    """The newest `volume_days` days of the calendar, up to the last event or to the day before `until`."""
    events = data.events()
    clicks = pd.DataFrame({"day": _partition_days(data), "label": events["label"].to_numpy(zero_copy_only=False)})
    days = clicks.groupby("day")["label"].agg(["size", "mean"])
    last = days.index.max()
    if until is not None:
        last = max(last, pd.Timestamp(until).floor("D") - pd.Timedelta(days=1))
    calendar = pd.date_range(days.index.min(), last, freq="D")
    frame = pd.DataFrame({"day": calendar, "rows": days["size"].reindex(calendar, fill_value=0).to_numpy()})
    usual = frame["rows"].shift(1).rolling(config.volume_days, min_periods=1).median()
    judged = usual >= config.volume_floor
    frame["usual_rows"] = usual
    frame["rows_if_judged"] = frame["rows"].where(judged)
    frame["volume_ratio"] = (frame["rows"] / usual).where(judged & (frame["rows"] > 0))
    frame["label_rate"] = days["mean"].reindex(calendar).to_numpy()
    frame.loc[frame["rows"] < config.volume_floor, "label_rate"] = np.nan
    return frame.tail(config.volume_days).reset_index(drop=True)


def item_frame(data: Canonical) -> pd.DataFrame:
    return data.items().select(["item_id", "created_at", "title"]).to_pandas()


def vector_frame(table: pa.Table, items: pa.ChunkedArray) -> pd.DataFrame:
    """One row a vector that is there: its length, finiteness and norm, without a copy of its values."""
    table = table.filter(pc.is_valid(table["vector"]))
    vectors = table["vector"].combine_chunks()
    lengths = pc.list_value_length(vectors).to_numpy(zero_copy_only=False)
    flat = vectors.flatten().to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(vectors)), lengths)
    bad = np.bincount(row, weights=~np.isfinite(flat), minlength=len(vectors))
    squares = np.bincount(row, weights=np.nan_to_num(flat, posinf=0, neginf=0).astype(np.float64) ** 2,
                          minlength=len(vectors))  # fmt: skip
    usual = np.bincount(lengths).argmax() if len(lengths) else 0
    return pd.DataFrame(
        {
            "item_id": table["item_id"].to_numpy(),
            "item_is_known": pc.is_in(table["item_id"], value_set=items.combine_chunks()).to_numpy(),
            "length": lengths,
            "is_usual_length": (lengths == usual) & (lengths > 0),
            "non_finite_values": bad.astype(np.int64),
            "norm": np.sqrt(squares),
        }
    )


# ---- Great Expectations -----------------------------------------------------------------------------------------


def judge(frames: dict[str, tuple[pd.DataFrame, list[Expectation]]], docs: Path) -> list[dict[str, Any]]:
    """Run every suite in one file context of its own, and publish its Data Docs at `docs`."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig
    from tqdm import tqdm

    verdicts: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="clickloop-gx-") as root, new_folder(docs) as site:
        gx_logger = logging.getLogger("great_expectations")
        gx_logger.setLevel(logging.ERROR)
        context = gx.get_context(mode="file", project_root_dir=root)
        context.variables.progress_bars = ProgressBarsConfig(globally=False)  # ours says which table is judged
        source = context.data_sources.add_pandas("canonical")
        for name, (frame, rules) in tqdm(frames.items(), "validate", unit="table", disable=None):
            batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
            suite = context.suites.add(gx.ExpectationSuite(name=name, expectations=rules))
            definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
            checkpoint = context.checkpoints.add(
                gx.Checkpoint(
                    name=name,
                    validation_definitions=[definition],
                    result_format={"result_format": "SUMMARY", "partial_unexpected_count": EXAMPLES},
                )
            )
            for result in checkpoint.run(batch_parameters={"dataframe": frame}).run_results.values():
                verdicts += [_verdict(name, frame, one) for one in result.results]
        context.build_data_docs()
        built = Path(root) / "gx" / "uncommitted" / "data_docs" / "local_site"
        shutil.copytree(built, site, dirs_exist_ok=True)
    return verdicts


def _verdict(table: str, frame: pd.DataFrame, result: Any) -> dict[str, Any]:
    config, found = result.expectation_config, result.result
    if result.exception_info and result.exception_info.get("raised_exception"):
        raise ValueError(f"{table}: {config.type} could not be judged: {result.exception_info['exception_message']}")
    kwargs = {k: v for k, v in config.kwargs.items() if k not in ("column", "batch_id") and v is not None}
    verdict: dict[str, Any] = {
        "table": table,
        "column": config.kwargs.get("column"),
        "rule": config.type,
        "says": config.description,
        "limits": {k: v if isinstance(v, int | float | str | bool | list) else str(v) for k, v in kwargs.items()},
        "severity": str(getattr(config.severity, "value", config.severity)),
        "passed": bool(result.success),
        "broken_rows": int(found.get("unexpected_count") or 0),
        "observed": found.get("observed_value"),
        "examples": [],
    }
    if not result.success and (rows := found.get("partial_unexpected_index_list")):
        shown: Iterable[int] = rows[:EXAMPLES]
        verdict["examples"] = [
            {"row": int(row), **{k: _plain(v) for k, v in frame.iloc[int(row)].items()}} for row in shown
        ]
    return verdict


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float) and not np.isfinite(value)) or value is pd.NaT:
        return None
    return value if isinstance(value, int | float | str | bool) else str(value)


def describe(verdict: dict[str, Any]) -> str:
    """`events.label: expect_column_values_to_be_in_set {…}: 12 rows, e.g. row 5 {…}`."""
    where = verdict["table"] + (f".{verdict['column']}" if verdict["column"] else "")
    said = f" ({verdict['says']})" if verdict["says"] else ""
    text = f"{where}: {verdict['rule']} {verdict['limits']}{said}: "
    if not verdict["examples"]:
        return text + f"observed {verdict['observed']}"
    told = "; ".join(str(example) for example in verdict["examples"])
    return text + f"{verdict['broken_rows']} row(s), e.g. {told}"
