"""inspect: sets as they are published, in small, get a mapping that `use` takes as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest
import yaml

from components.data.propose import Proposal, propose
from components.data.use import use
from tests.components.small_world import PROJECT

ROWS = 300


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., Proposal]:
    """`look(name=frame, …)`: the proposal for these files, which was pasted and taken by `use`."""

    def run(files: dict[str, pd.DataFrame]) -> Proposal:
        raw = tmp_path / "raw"
        for name, frame in files.items():
            (raw / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".parquet"):
                frame.to_parquet(raw / name, index=False)
            else:
                frame.to_csv(raw / name, index=False, sep="\t" if name.endswith(".tsv") else ",")
        found = propose(str(raw))
        if found.sql:
            exec(found.sql, {"duckdb": duckdb})
        block = found.text().split("in place of `files`:\n")[1].split("\n\n")[0]
        params = tmp_path / "params.yaml"
        content = yaml.safe_load((PROJECT / "params.yaml").read_text())
        content["ingest"] |= yaml.safe_load(block)
        params.write_text(yaml.safe_dump(content))
        use("files", str(raw), params)
        return found

    return run


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_movielens_ratings(look: Any, capsys: pytest.CaptureFixture[str]) -> None:
    draw = rng()
    ratings = pd.DataFrame(
        {
            "userId": draw.integers(1, 40, ROWS), "movieId": draw.integers(1, 60, ROWS),
            "rating": draw.choice([0.5, 2.0, 3.0, 4.0, 5.0], ROWS),
            "timestamp": 964_982_703 + draw.integers(0, 9_000_000, ROWS),
        }
    )  # fmt: skip
    movies = pd.DataFrame(
        {"movieId": range(1, 60), "title": [f"Film {i} (1999)" for i in range(1, 60)], "genres": ["Drama|War"] * 59}
    )
    found = look({"ratings.csv": ratings, "movies.csv": movies})
    assert found.files["events"] == {
        "path": "events.parquet", "columns": {"user_id": "userId", "item_id": "movieId"}, "categorical": [],
        "numeric": [],
    }  # fmt: skip
    assert found.files["items"]["columns"] == {"item_id": "movieId", "tags": "genres"}
    assert found.files["separator"] == "|" and '("rating" > 3)::int as label' in str(found.sql)
    assert "rating is no label of 0 and 1: a click is proposed to be rating > 3" in found.notes
    kept = ratings[ratings["rating"] != 3]
    assert f"{(kept['rating'] > 3).mean():.1%}" in capsys.readouterr().out


def test_criteo_by_parts(look: Any) -> None:
    def part(seed: int) -> pd.DataFrame:
        draw = np.random.default_rng(seed)
        columns: dict[str, Any] = {"label": draw.integers(0, 2, ROWS)}
        columns |= {f"I{i}": draw.integers(0, 4 * i, ROWS) for i in range(1, 4)}
        columns |= {f"C{i}": [f"{v:08x}" for v in draw.integers(0, 9, ROWS) * 7919] for i in range(1, 4)}
        return pd.DataFrame(columns)

    found = look({"train.csv": part(1), "valid.csv": part(2), "test.csv": part(3)})
    assert found.files["events"] == {
        "path": {"test": "test.csv", "train": "train.csv", "valid": "valid.csv"}, "columns": {},
        "categorical": ["C1", "C2", "C3"], "numeric": ["I1", "I2", "I3"],
    }  # fmt: skip
    assert found.sql is None


def test_avazu_hours(look: Any, capsys: pytest.CaptureFixture[str]) -> None:
    draw = rng()
    frame = pd.DataFrame(
        {
            "id": draw.integers(10**15, 9 * 10**15, ROWS), "click": draw.integers(0, 2, ROWS),
            "hour": 14_102_100 + draw.integers(0, 24, ROWS) + 100 * draw.integers(0, 3, ROWS),
            "C1": 1005, "banner_pos": draw.integers(0, 3, ROWS), "site_id": draw.choice(["1fbe01fe", "85f751fd"], ROWS),
            "C14": draw.integers(15_000, 15_200, ROWS),
        }
    )  # fmt: skip
    found = look({"train.csv": frame})
    events = found.files["events"]
    assert events["categorical"] == ["banner_pos", "site_id", "C14"] and events["columns"] == {"label": "click"}
    assert "no features (another value in every row): id" in found.notes
    assert "hour has no zone: it is taken for UTC; change the SQL if it is not" in found.notes
    assert "2014-10-21 to 2014-10-23" in capsys.readouterr().out


def test_kuairec_of_several_times_takes_the_one_that_can_be_read(look: Any) -> None:
    draw = rng()
    matrix = pd.DataFrame(
        {
            "user_id": draw.integers(0, 40, ROWS), "video_id": draw.integers(0, 60, ROWS),
            "play_duration": draw.integers(0, 90_000, ROWS), "video_duration": draw.integers(5_000, 90_000, ROWS),
            "time": pd.date_range("2020-07-05", periods=ROWS, freq="7min").astype(str), "date": 20_200_705,
            "timestamp": 1_593_878_400 + np.arange(ROWS) * 420.5, "watch_ratio": draw.random(ROWS) * 3,
        }
    )  # fmt: skip
    users = pd.DataFrame({"user_id": range(40), "degree": ["full", "high"] * 20, "follow_num": range(0, 400, 10)})
    found = look({"big_matrix.csv": matrix, "user_features.csv": users})
    assert found.files["events"]["columns"] == {"item_id": "video_id"}
    assert found.files["events"]["numeric"] == ["video_duration"]
    assert found.files["users"] == {
        "path": "user_features.csv", "columns": {}, "categorical": ["degree"], "numeric": ["follow_num"],
    }  # fmt: skip
    assert "no features (known only after the impression): play_duration" in found.notes


@pytest.mark.parametrize(("unit", "scale"), [("milliseconds", 10**3), ("microseconds", 10**6), ("nanoseconds", 10**9)])
def test_a_time_in_another_unit_is_made_seconds(
    unit: str, scale: int, look: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = rng()
    frame = pd.DataFrame(
        {
            "user_id": draw.integers(0, 40, ROWS), "video_id": draw.integers(0, 60, ROWS),
            "time_ms": (1_649_600_000 + np.arange(ROWS) * 60) * scale, "is_click": draw.integers(0, 2, ROWS),
            "is_like": draw.integers(0, 2, ROWS), "tab": draw.integers(0, 5, ROWS),
        }
    )  # fmt: skip
    found = look({"log.parquet": frame})
    assert f"time_ms is in {unit}" in found.notes and found.files["events"]["categorical"] == ["tab"]
    assert "no features (known only after the impression): is_like" in found.notes
    assert "2022-04-10" in capsys.readouterr().out


def test_mind_with_text_ids_and_a_file_a_day(look: Any) -> None:
    draw = rng()

    def day(number: int) -> pd.DataFrame:
        times = pd.date_range(f"2019-11-0{number}", periods=ROWS, freq="1min", tz="UTC")
        return pd.DataFrame(
            {
                "user_id": [f"U{v}" for v in draw.integers(1000, 1040, ROWS)],
                "news_id": [f"N{v}" for v in draw.integers(5000, 5060, ROWS)],
                "time": [time.isoformat() for time in times], "click": draw.integers(0, 2, ROWS),
            }
        )  # fmt: skip

    news = pd.DataFrame(
        {
            "news_id": [f"N{v}" for v in range(5000, 5060)], "category": ["sports", "news", "food"] * 20,
            "title": [f"Head line {i}, a story" for i in range(60)],
            "abstract": ["long " * 20 + str(i) for i in range(60)],
        }
    )  # fmt: skip
    vectors = pd.DataFrame({"item_id": news["news_id"], "vector": [[0.5, float(i)] for i in range(60)]})
    days = {f"behaviors/2019-11-0{number}.tsv": day(number) for number in (1, 2)}
    found = look({**days, "news.tsv": news, "item_image.parquet": vectors})
    assert found.files["events"] == {
        "path": "behaviors/*.tsv", "columns": {"item_id": "news_id", "timestamp": "time", "label": "click"},
        "categorical": [], "numeric": [],
    }  # fmt: skip
    assert found.files["items"] == {
        "path": "news.tsv", "columns": {"item_id": "news_id", "text": "abstract"}, "categorical": ["category"],
        "numeric": [],
    }  # fmt: skip
    assert found.files["vectors"] == {"image": "item_image.parquet"} and found.sql is None


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"README\.md has no .*file: it holds README\.md\. Save your data as one of"):
        propose(str(PROJECT / "README.md"))
    with pytest.raises(ValueError, match=r"zzz://x cannot be opened: .*zzz.*Mend the path"):
        propose("zzz://x")
    with pytest.raises(ValueError, match="nothing is there"):
        propose(str(tmp_path / "absent"))
    (tmp_path / "a.csv").write_text("name,age\nann,3\nbob,4\n")
    with pytest.raises(ValueError, match=r"no file looks like impressions.*a\.csv: name, age"):
        propose(str(tmp_path))
    assert not (tmp_path / "params.yaml").exists()
