"""The command `push`, over SQLite and a real Redis: what it takes, what it refuses, and what it says."""

from __future__ import annotations

import json
import re
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from components.common.contracts import Canonical
from components.operations import push
from components.operations.push import Click, Histories
from tests.components.live_world import Live, Stream, line, wait_for
from tests.components.small_world import FEATURES, known_clicks, plain_rows

BAD_LINES = [
    b"", b"{", b'{"user_id": "\xff"}', b"[" * 100_000, b'"' + b"x" * 5000,
    b'{"user_id": 4321, "item_id": "3", "timestamp": "2024-04-01T00:00:00+00:00"}',
]  # fmt: skip


def test_a_stream_of_clicks(served: Live, tmp_path: Path) -> None:
    """Each click is served while the stream stays open, whatever lies between, and once, however often it comes.
    Another process can push only when the first has ended; it knows what the first one pushed."""
    stream = Stream(served.live, tmp_path / "push")
    fetch = served.reader()
    for n in range(3):
        stream.send(line(4321, n), *BAD_LINES[2 * n : 2 * n + 2], line(4321, 0, "2024-04-01T02:00:00+02:00"))
        wait_for(lambda n=n: fetch(4321)["history"] == list(range(n + 1)))
    with pytest.raises(ValueError, match=f"process {stream.process.pid} pushes into {served.live} already"):
        push.run(served.live, [])
    printed = stream.end()
    assert stream.process.returncode == 0, printed
    assert "push: 3 pushed, 3 repeated, 6 rejected" in printed
    assert fetch(4321)["history"] == [0, 1, 2]
    kept = [json.loads(one) for one in stream.rejected.read_text().splitlines()]
    assert [one["line"] for one in kept] == [2, 3, 6, 7, 10, 11]
    assert [one["text"] for one in kept[:3]] == ["", "{", '{"user_id": "\\xff"}']
    assert kept[-1]["error"] == "item_id is '3'; it takes an integer of 64 bits"
    shown = [one for one in printed.splitlines() if "is set aside" in one]
    assert len(shown) == push.SHOWN and max(map(len, shown)) < 2 * push.SHOWN_CHARACTERS + 50
    assert "push: line 2 is set aside: it is empty; write e.g. {" in printed
    assert push.run(served.live, [line(4321, n) for n in (2, 1, 3)], tmp_path / "rejected") == 1
    assert fetch(4321)["history"] == [0, 1, 2, 3]


def test_an_interrupted_stream_says_what_it_did(served: Live, tmp_path: Path) -> None:
    stream = Stream(served.live, tmp_path / "push")
    fetch = served.reader()
    stream.send(line(4322, 1), b"{")
    wait_for(lambda: fetch(4322)["history"] == [1])
    stream.process.send_signal(signal.SIGTERM)
    assert stream.process.wait() == 143
    assert "push: 1 pushed, 0 repeated, 1 rejected" in stream.end()


def test_a_click_of_the_log_is_not_pushed_again(served: Live) -> None:
    """A late click, which the log does not hold, is pushed."""
    rows = plain_rows(Canonical(served.folders.canonical).events())
    user = sorted({r.user for r in rows if r.label})[-1]
    before = known_clicks(rows, user, 10**18, FEATURES.availability_lag_seconds)
    seen = [r for r in rows if r.user == user and r.label]
    moments = [datetime.fromtimestamp(r.micro // 10**6, UTC) + timedelta(microseconds=r.micro % 10**6) for r in seen]
    histories = Histories(served.live)
    clicks = [Click(user, r.item, moment) for r, moment in zip(seen, moments, strict=True)]
    assert histories.add(clicks) == 0
    fetch = served.reader()
    assert fetch(user)["history"] == before[-FEATURES.history_length :]
    late = [Click(user, 987, moments[0]), Click(user, seen[0].item, moments[0] + timedelta(microseconds=1))]
    assert histories.add([*clicks, *late, *late]) == 2
    assert histories.add(late) == 0
    assert fetch(user)["history"] == [*before, 987, seen[0].item][-FEATURES.history_length :]


def test_without_a_store_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no store serves from .*; run `python -m components registry promote`"):
        push.run(tmp_path, [line(1, 1)])


def test_rejected_lines_take_a_bounded_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "REJECTED_BYTES", 1000)
    file = tmp_path / "deep" / "rejected.jsonl"
    for number in range(200):
        push.set_aside(file, number, b"x" * 100_000, "it is wrong", show=False)
        monkeypatch.setattr(push, "REJECTED_LINE", 50)
    kept = [json.loads(one)["line"] for name in ("rejected.jsonl.1", "rejected.jsonl") for one in
            (tmp_path / "deep" / name).read_text().splitlines()]  # fmt: skip
    assert kept == list(range(kept[0], 200)) and len(kept) < 50  # the newest
    assert sum(f.stat().st_size for f in (tmp_path / "deep").iterdir()) < 3000


@pytest.mark.parametrize(
    ("bad", "wrong"),
    [
        ("", "it is empty; write e.g."),
        ("7", "it is not a JSON object"),
        ("null", "it is not a JSON object"),
        ("{", "it is not JSON"),
        ('{"user_id": 1, "item_id": 2}', "timestamp is missing"),
        ('{"user_id": 1, "item_id": 2, "timestamp": 3}', "timestamp is 3; it takes an ISO time"),
        ('{"user_id": 1, "item_id": 2, "timestamp": "0001-01-01T00:00:00+05:00"}', "it takes an ISO time"),
        ('{"user_id": true, "item_id": 2, "timestamp": "2024-04-01T00:00:00+00:00"}', "user_id is True"),
        ('{"user_id": 1, "item_id": 2.0, "timestamp": "2024-04-01T00:00:00+00:00"}', "item_id is 2.0"),
        ('{"user_id": 1, "item_id": 9223372036854775808, "timestamp": "2024-04-01T00:00:00+00:00"}', "of 64 bits"),
        ('{"user_id": 1, "item_id": 2, "timestamp": "2024-04-01T00:00:00"}', "a time without a zone"),
    ],
)
def test_lines_that_are_no_clicks(bad: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=re.escape(wrong)):
        push.parse(bad.encode())
