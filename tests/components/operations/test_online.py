"""The online store, SQLite and a real Redis: what is published, pushed and expired is what the server reads."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from components.common.contracts import Canonical
from components.features.store import scratch_store
from components.operations.push import Click, Histories
from tests.components.live_world import Live
from tests.components.small_world import FEATURES, Row, known_clicks, plain_rows

FOREVER = 10**18
LAG, LENGTH = FEATURES.availability_lag_seconds, FEATURES.history_length


@pytest.fixture
def rows(served: Live) -> list[Row]:
    return plain_rows(Canonical(served.folders.canonical).events())


def test_what_is_served_is_what_was_counted_by_hand(served: Live, rows: list[Row]) -> None:
    fetch = served.reader()
    for user in Canonical(served.folders.canonical).users().to_pylist():
        history = known_clicks(rows, user["user_id"], FOREVER, LAG)
        assert fetch(user["user_id"]) == {"history": history[-LENGTH:] or None, "region": user["region"]}
    assert fetch(1) == {"history": None, "region": None}


def test_pushed_clicks_are_served(served: Live, rows: list[Row]) -> None:
    """In the order of their times, after what was there, and no more than are kept."""
    users = sorted({r.user for r in rows if r.label})
    before = {user: known_clicks(rows, user, FOREVER, LAG) for user in users}
    when = datetime(2024, 4, 1, tzinfo=UTC)
    clicks = [Click(user, 900 + n, when + timedelta(seconds=5 - n)) for user in (users[0], 77) for n in (1, 2)]
    histories = Histories(served.live)
    histories.add(clicks)
    histories.add([Click(users[1], 5, when), Click(users[1], 5, when + timedelta(microseconds=1))])
    histories.add([Click(users[0], 903, when)])  # a click that comes late stands where it came
    fetch = served.reader()
    assert fetch(users[0])["history"] == [*before[users[0]], 902, 901, 903][-LENGTH:]
    assert fetch(77)["history"] == [902, 901]
    assert fetch(users[1])["history"] == [*before[users[1]], 5, 5][-LENGTH:]
    assert fetch(users[2])["history"] == before[users[2]][-LENGTH:]
    assert fetch(users[0])["region"] is not None


def test_old_histories_are_forgotten_alike(served: Live, tmp_path: Path) -> None:
    """With a time to live, training and serving know no click that is older; Feast's online read alone would."""
    short = Live.of(served.folders, tmp_path / "short")
    file = short.folders.repo / "definitions.py"
    file.write_text(file.read_text().replace("HISTORY_TTL = FOREVER", "HISTORY_TTL = timedelta(days=2)"))
    newest = pq.read_table(short.folders.features / "sources" / "user_history.parquet").to_pylist()[0]
    user, known = newest["user_id"], newest["event_timestamp"]
    with scratch_store(short.folders.repo, short.folders.features) as store:
        moments = [known, known + timedelta(days=2), known + timedelta(days=2, microseconds=1)]
        entities = pd.DataFrame({"user_id": user, "item_id": 1, "event_timestamp": moments})
        job = store.get_historical_features(entity_df=entities, features=["user_clicks:clicks_end"])
        table = job.to_arrow().sort_by("event_timestamp")
        assert pc.is_valid(table["clicks_end"]).to_pylist() == [True, True, False]
    short.publish()
    Histories(short.live).add([Click(55, 1, datetime.now(UTC))])
    fetch = short.reader()
    assert fetch(user)["history"] is None and fetch(user)["region"] is not None  # the profile lives on
    assert fetch(55)["history"] == [1]
