"""use: looks at the files before it writes params.yaml, says what it saw, and keeps raw data out of git."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.data.use import keep_out_of_git, use
from tests.components.small_world import PROJECT

EVENTS = "user_id,item_id,timestamp,label,device,price\n" + "".join(
    f"{i % 3},{i % 4},2024-03-0{1 + i % 2}T00:00:00Z,{int(i % 4 == 0)},tv,{i}.5\n" for i in range(8)
)
MAPPING = {"path": "events.csv", "columns": {}, "categorical": ["device"], "numeric": ["price"]}


@pytest.fixture
def params(tmp_path: Path) -> Path:
    copy = tmp_path / "params.yaml"
    copy.write_text((PROJECT / "params.yaml").read_text())
    return copy


@pytest.fixture
def movielens(tmp_path: Path) -> Path:
    folder = tmp_path / "ml"
    folder.mkdir()
    (folder / "ratings.dat").write_text("1::10::5::978300760\n2::10::1::978300761\n")
    (folder / "users.dat").write_text("1::F::1::10::4\n2::M::25::1::7\n")
    (folder / "movies.dat").write_text("10::A (1999)::Drama\n")
    return folder


@pytest.fixture
def mine(params: Path, tmp_path: Path) -> Path:
    """A folder of one's own, mapped in params.yaml."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "events.csv").write_text(EVENTS)
    map_events(params, MAPPING)
    return folder


def map_events(params: Path, mapping: dict[str, Any]) -> None:
    content = yaml.safe_load(params.read_text())
    content["ingest"]["files"]["events"] = mapping
    params.write_text(yaml.safe_dump(content))


def named(params: Path) -> tuple[str, str]:
    content = yaml.safe_load(params.read_text())["ingest"]
    return content["source"], content["raw"]


def test_its_values_are_written_and_every_comment_kept(params: Path, movielens: Path) -> None:
    before = params.read_text().splitlines()
    use("movielens", str(movielens), params)
    after = params.read_text().splitlines()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert [a.split()[0] for a, _ in changed] == ["source:", "raw:", "until:", "window_days:"]
    assert changed[0][1].startswith("  source: movielens ")
    assert changed[1][1].startswith(f"  raw: {movielens} ")
    assert changed[2][1].startswith('  until: "2001-01-01T00:00:00+00:00" ')  # the end of the day of the last rating
    assert changed[3][1].startswith("  window_days: null ")
    for a, b in changed:
        assert "#" in a and a.split("#")[1] == b.split("#")[1]


def test_the_simulator_again(params: Path, movielens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    before = [line.split("#")[0].rstrip() for line in params.read_text().splitlines()]
    use("movielens", str(movielens), params)
    use("simulator", None, params)
    assert [line.split("#")[0].rstrip() for line in params.read_text().splitlines()] == before


def test_what_is_used_already_is_not_written_again(params: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    before = params.stat()
    use("simulator", None, params)
    assert (params.stat().st_ino, params.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_simulator_whose_days_were_chosen_keeps_them(params: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    params.write_text(
        params.read_text().replace("2026-01-11T00", "2031-05-05T00").replace("window_days: 10", "window_days: 9 ")
    )
    before = params.read_bytes()
    use("simulator", None, params)
    assert params.read_bytes() == before


def test_a_source_without_times_has_no_until(mine: Path, params: Path) -> None:
    rows = "".join(f"{i % 3},{int(i % 4 == 0)},{'train' if i < 6 else 'valid'}\n" for i in range(8))
    (mine / "events.csv").write_text("item_id,label,split\n" + rows)
    map_events(params, MAPPING | {"categorical": [], "numeric": []})
    use("files", str(mine), params)
    assert yaml.safe_load(params.read_text())["ingest"]["until"] is None


def test_it_says_what_it_saw(mine: Path, params: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use("files", str(mine), params)
    said = capsys.readouterr().out
    for words in ("user_id", "int64", "device", "feature", "price", "number", "2024-03-01 to 2024-03-02", "25.0%"):
        assert words in said, words
    assert "Next: dvc repro" in said and named(params) == ("files", str(mine))
    ingest = yaml.safe_load(params.read_text())["ingest"]
    assert (ingest["until"], ingest["window_days"]) == ("2024-03-03T00:00:00+00:00", None)


def test_it_looks_at_the_last_file_too(mine: Path, params: Path) -> None:
    map_events(params, MAPPING | {"path": "*.csv"})
    (mine / "zz.csv").write_text("user_id,label\n1,0\n")
    with pytest.raises(ValueError, match=r"zz\.csv has no column 'device'"):
        use("files", str(mine), params)


def test_it_reads_no_more_than_it_needs(mine: Path, params: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mine / "events.csv").write_text(EVENTS + "1,1,2024-03-05T00:00:00Z,0,tv,1\n" * 5000)
    use("files", str(mine), params)
    assert re.search(r"rows looked at +1,000\n", capsys.readouterr().out)


def test_a_home_folder(mine: Path, params: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(mine.parent))
    use("files", "~/mine", params)
    assert named(params) == ("files", str(mine))


WRONG: dict[str, tuple[str, str | None, dict[str, Any] | None, str]] = {
    "an unknown source": ("kaggle", None, None, "unknown source 'kaggle'"),
    "no path": ("movielens", None, None, "movielens reads files: name their path with --raw PATH"),
    "an absent path": ("movielens", "no/such", None, "'no/such' is not there"),
    "a wrong folder": ("movielens", "{mine}", None, r"holds no ratings\.dat or ratings\.dat\.gz"),
    "a text": ("files", str(PROJECT / "README.md"), MAPPING, r"README\.md is a file; name its folder"),
    "no scheme": ("files", "zzz://x", MAPPING, "zzz://x/events.csv cannot be opened: .*zzz"),
    "no mapping": ("files", "{mine}", MAPPING | {"path": None}, "path is null.*components inspect .*mine` proposes"),
    "no such file": ("files", "{mine}", MAPPING | {"path": "e.csv"}, r"no file at .*mine/e\.csv"),
    "no such column": ("files", "{mine}", MAPPING | {"numeric": ["cost"]}, "no column 'cost'"),
    "no whole row": (
        "files", "{mine}", MAPPING | {"columns": {"label": "price"}, "numeric": []},
        r"no row of those looked at is whole \(price is neither 0 nor 1: 8\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_touches_nothing(name: str, params: Path, mine: Path) -> None:
    source, raw, mapping, message = WRONG[name]
    if name == "no whole row":
        (mine / "events.csv").write_text(EVENTS.replace(",0.5\n", ",x\n"))
    if mapping is not None:
        map_events(params, mapping)
    before = params.read_bytes()
    with pytest.raises(ValueError, match=message):
        use(source, raw and raw.format(mine=mine), params)
    assert params.read_bytes() == before
    assert {file.name for file in params.parent.iterdir()} == {"params.yaml", "mine"}


def test_a_params_file_with_the_section_is_needed(movielens: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"params\.yaml is not there"):
        use("movielens", str(movielens), tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("embed: {dim: 4}\n")
    with pytest.raises(ValueError, match="no section 'ingest'"):
        use("movielens", str(movielens), tmp_path / "params.yaml")


def test_raw_data_in_the_repository_stay_out_of_git(
    mine: Path, params: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = params.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    spaced = mine.rename(root / "my [raw] data")
    assert "my [raw] data" in git("status", "--porcelain")
    use("files", str(spaced), params)
    said = capsys.readouterr().out.replace("\n", "")
    assert r"lies in this git repository: /my\ \[raw]\ data/ was added to" in said and "info/exclude" in said
    assert "my [raw] data" not in git("status", "--porcelain")
    exclude = (root / ".git" / "info" / "exclude").read_text()
    use("files", str(spaced), params)  # ignored by now
    assert (root / ".git" / "info" / "exclude").read_text() == exclude
    git("add", "params.yaml")
    assert keep_out_of_git(str(params), params) is None  # git has it already, so somebody wants it there
    assert keep_out_of_git(str(root), params) is None and keep_out_of_git("/", params) is None
    assert keep_out_of_git("s3://bucket/data", params) is None
