"""The limits of validation: those that a project sets in params.yaml, and those that are fixed here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DAYS = 3  # days before a day that are needed to know what is usual
WEEK, WEEKS = 7, 4  # days in a week; earlier weeks whose same weekday also shows what is usual
FEWEST = 30  # items that are needed to compare new items with older ones
FEWEST_LABELS = 10  # rows of each label; with fewer, a value can match them by chance

# How far a figure may be from its usual value even if it never varied before. Shares and directions are compared by
# their difference, volumes and norms by the difference of logarithms (log 2: twice or half), label rates by that of
# log-odds.
FLOORS = {
    "volume": np.log(2),
    "label_rate": 0.5,
    "repeated": 0.01,
    "hours": 0.15,
    "returning": 0.25,
    "top_user": 0.05,
    "top_item": 0.1,
    "late": 0.05,
    "ends_early": 1.0,  # hours
    "missing": 0.1,
    "mix": 0.2,
    "no_vector": 0.2,
    "one_norm": np.log(4),
    "norm": 0.4,
    "direction": 0.1,
    "directions": 0.1,
}
SIGMA = 1.4826  # standard deviations in one median absolute deviation of a normal distribution
CHANCE = 4.0  # standard deviations of the error that a small number of rows or items gives a figure


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """label_rate         lowest and highest share of clicks on a judged day
    max_age_hours      age of the newest event at ingest.until
    trailing_days      how many of the newest complete days are judged. A day is compared with as many days before it,
                       and with the same weekday of the four weeks before
    spreads            how far a figure may be from its usual value: its fixed tolerance (FLOORS in thresholds.py) plus
                       this many times its usual variation (1.48 × the median absolute deviation)
    min_day_rows       a day with fewer rows is not judged, and neither is a day if the days before it have fewer
                       (their median)
    max_missing_share  share of items without a vector, per modality
    max_label_leak     how well one column alone may predict the label, from 0 (not at all) to 1 (exactly). A copy of
                       the label has 1; a user's or an item's id stays well below
    """

    label_rate: tuple[float, float]
    max_age_hours: float
    trailing_days: int
    spreads: float
    min_day_rows: int
    max_missing_share: float
    max_label_leak: float

    def __post_init__(self) -> None:
        low, high = self.label_rate
        if not 0 <= low < high:
            raise ValueError(f"label_rate is [{low}, {high}]; it must be [low, high] with 0 <= low < high")
        if self.trailing_days < 1:
            raise ValueError(f"trailing_days is {self.trailing_days}; at least 1 day must be judged")
        if self.spreads < 0:
            raise ValueError(f"spreads is {self.spreads}; it must be 0 or more, e.g. 5")
        if not 0 < self.max_label_leak <= 1:
            raise ValueError(f"max_label_leak is {self.max_label_leak}; it must be above 0 and at most 1, e.g. 0.9")
