from __future__ import annotations

from dataclasses import replace

import pytest

from components.common.pipeline import ROOT
from components.common.schedule import read


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("daily", "@daily", r"daily is '@daily'; write a cron expression"),
        ("hourly", "0 * * *", r"hourly is '0 \* \* \*'; write a cron expression"),
        ("answer_hours", 0, r"answer_hours is 0; it must be more than 0"),
    ],
)
def test_a_schedule_that_cannot_be(name: str, value: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(read(ROOT), **{name: value})  # type: ignore[arg-type]
