"""What the differences of one night, and of many nights, say about a challenger.

The difference of two AUCs on the same rows is uncertain for two reasons: other test rows would give another one
(`statistics.auc` has that standard error), and so would another seed of the training. The second is the *spread*: the
standard deviation of a model's AUC over seeds, on rows without end.

A change        must be better than the champion. It gets a test every night until it is promoted or given up, so a
                test of fixed level would pass sooner or later. The evidence is an e-process instead: the likelihood
                ratio of a gain against none, over all nights so far. If there is no gain, it passes 1/alpha at any
                night with a probability of at most alpha (Ville's inequality; Ramdas, Grünwald, Vovk & Shafer,
                Statistical Science 2023). All nights are compared with one champion, whose own seed was lucky or not:
                that part is common to all nights, and enters their covariance
                Several changes share alpha: the j-th within the days that are looked back on gets alpha / (j (j + 1)),
                and the sum of these is alpha
A refresh       must not be worse by more than a margin, beside each version of the last days. A version stays among
                them for days, so small losses cannot add up
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri

NIGHTS = 10.0  # what the assumed spread weighs beside the measured one, in nights


def sd(se: float, spread: float) -> float:
    """Of the difference of two models that were trained once each."""
    return float(np.hypot(se, np.sqrt(2) * spread))


def log_evidence(differences: Sequence[float], ses: Sequence[float], spread: float, gain: float) -> float:
    """Logarithm of the likelihood ratio of `gain` against none, of a change's AUC over one champion's.

    differences  one a night: each night's challenger was trained with a seed of its own, and judged on rows that no
                 earlier night has used
    ses          their standard errors from the test rows
    """
    # The covariance is diag(own) + spread² 11ᵀ. By Sherman and Morrison, its inverse needs two sums.
    own = np.square(ses) + spread**2
    sum_1, sum_d = float(np.sum(1 / own)), float(np.sum(differences / own))
    shared = 1 + spread**2 * sum_1
    return gain * sum_d / shared - gain**2 / 2 * sum_1 / shared


def wanted(alpha: float, number: int) -> float:
    """The log evidence that the `number`-th change (1, 2, …) needs."""
    return float(-np.log(alpha / (number * (number + 1))))


def margin(se: float, spread: float, references: int, coverage: float = 0.95) -> float:
    """The smallest margin with which an equally good refresh passes with probability `coverage`.

    It passes if the lower end of its interval lies above -margin beside every reference. The best of several references
    had a lucky seed: the expected largest of so many normal values (Blom 1958) comes on top.
    """
    z = float(ndtri(coverage))
    lucky = float(ndtri((references - 0.375) / (references + 0.25))) * spread if references > 1 else 0.0
    return 2 * z * sd(se, spread) + lucky


def measured_spread(differences: Sequence[float], ses: Sequence[float], assumed: float) -> float:
    """The spread over seeds, from nights on which a refresh was compared with a champion of the same configuration.

    What the differences vary by beyond their test rows' standard errors is twice the squared spread. Few nights say
    little, so the assumed value counts as NIGHTS nights.
    """
    n = len(differences)
    if n < 2:
        return assumed
    beyond = float(np.var(differences, ddof=1)) - float(np.mean(np.square(ses)))
    measured = max(0.0, beyond) / 2
    return float(np.sqrt((NIGHTS * assumed**2 + n * measured) / (NIGHTS + n)))


def detectable(se: float, level: float, power: float = 0.8) -> float:
    """The smallest loss that a one-sided test of this level finds with this power."""
    return float(ndtri(1 - level) + ndtri(power)) * se
