"""The journal of pushed clicks as files: what a kill, a full disk or a loss of power leaves of it. What a store gets
from it is in tests/components/operations/test_switches.py."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from components.features import clicks
from components.features.clicks import CLICK, RECORD, Journal


def some(count: int, start: int = 0) -> np.ndarray:
    rng = np.random.default_rng(start)
    made = np.empty(count, CLICK)
    made["user_id"] = rng.integers(-(2**63), 2**63 - 1, count)
    made["item_id"] = rng.integers(-(2**63), 2**63 - 1, count)
    made["us"] = np.arange(start, start + count) * 1_000_000
    return made


def plain(records: np.ndarray) -> list[tuple[int, ...]]:
    return records[list(CLICK.names or ())].tolist()


def test_what_is_written_is_read_by_another_process(tmp_path: Path) -> None:
    batches = [some(3), some(1, 10), some(2000, 20)]
    first = Journal(tmp_path)
    assert [first.append(batch) for batch in batches[:2]] == [1, 2]
    assert Journal(tmp_path).append(batches[2]) == 3
    found = clicks.read(tmp_path)
    assert plain(found) == [row for batch in batches for row in plain(batch)]
    assert np.unique(found["batch"], return_counts=True)[1].tolist() == [3, 1, 2000]


def test_an_empty_journal(tmp_path: Path) -> None:
    assert len(clicks.read(tmp_path)) == 0
    clicks.trim(tmp_path, 0)
    assert Journal(tmp_path).last == 0


def test_a_batch_is_there_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is cut at every byte of the last batch; a process that comes after it loses nothing more."""
    journal = Journal(tmp_path)
    journal.append(some(2))
    journal.append(some(3, 10))
    (part,) = clicks.parts(tmp_path)
    content = part.read_bytes()
    for length in range(2 * RECORD.itemsize, len(content)):
        part.write_bytes(content[:length])
        assert plain(clicks.read(tmp_path)) == plain(some(2))
        after = Journal(tmp_path)
        torn = length - 2 * RECORD.itemsize
        assert (f"the last {torn} bytes of {part} are no whole batch" in capsys.readouterr().err) == bool(torn)
        assert after.append(some(1, 20)) == 2
        assert plain(clicks.read(tmp_path)) == plain(some(2)) + plain(some(1, 20))
        clicks.parts(tmp_path)[1].unlink()


@pytest.mark.parametrize("where", [0, RECORD.itemsize, 3 * RECORD.itemsize - 1])
def test_zeros_and_other_damage_are_no_clicks(tmp_path: Path, where: int) -> None:
    """A file system may have the length of a file and not its bytes, after a loss of power."""
    journal = Journal(tmp_path)
    journal.append(some(2))
    journal.append(some(1, 10))
    (part,) = clicks.parts(tmp_path)
    content = bytearray(part.read_bytes())
    content[where] ^= 1
    part.write_bytes(content)
    assert plain(clicks.read(tmp_path)) == ([] if where < 2 * RECORD.itemsize else plain(some(2)))
    part.write_bytes(bytes(len(content)))
    assert len(clicks.read(tmp_path)) == 0


def test_a_batch_that_could_not_be_written_is_no_part_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    journal.append(some(2))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(clicks.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.append(some(4, 10))
    (part,) = clicks.parts(tmp_path)
    part.write_bytes(part.read_bytes()[: -RECORD.itemsize - 5])  # what had room
    assert journal.append(some(1, 20)) == 2
    assert plain(clicks.read(tmp_path)) == plain(some(2)) + plain(some(1, 20))


def test_parts_go_once_the_log_has_their_clicks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clicks, "PART_BYTES", 10 * RECORD.itemsize)
    journal = Journal(tmp_path)
    for start in range(0, 60, 5):
        journal.append(some(5, start))
    assert [int(part.stem) for part in clicks.parts(tmp_path)] == [1, 3, 5, 7, 9, 11]
    clicks.trim(tmp_path, clicks.micros(datetime(1970, 1, 1, 0, 0, 29, tzinfo=UTC)))
    assert [int(part.stem) for part in clicks.parts(tmp_path)] == [7, 9, 11]
    clicks.trim(tmp_path, clicks.micros(datetime(1971, 1, 1, tzinfo=UTC)))
    assert [int(part.stem) for part in clicks.parts(tmp_path)] == [11]  # it numbers the next batch
    assert Journal(tmp_path).append(some(1, 99)) == 13


def test_chunks_are_whole_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clicks, "BATCH", 10)
    journal = Journal(tmp_path)
    for start, count in enumerate((4, 4, 4, 9, 1, 1, 25, 2)):
        journal.append(some(count, 100 * start))
    chunks = list(clicks._chunks(clicks.read(tmp_path)))
    assert [sorted(set(chunk["batch"].tolist())) for chunk in chunks] == [[1, 2, 3], [4], [5, 6, 7], [8]]
