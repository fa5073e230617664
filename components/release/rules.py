"""The gate's rules: what each of them measures, its limit, and whether it passes.

A rule is {rule, value, interval, must_be, limit, passed, why}. `passed` is None where the rows are too few to judge:
that is no pass, but a slice that cannot be judged rejects nothing. A figure that could not be measured does not pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from scipy.special import ndtri

from components.release import evidence

if TYPE_CHECKING:
    from components.release.gate import GateConfig

Rule = dict[str, Any]
LEVEL = 0.05  # of each one-sided test, and of all slices together
NOT_MEASURABLE = {
    "group_auc": "no user of the test days has both a click and a row without one; if your data are like this, set "
    "gate.min_group_auc to null"
}


def absolute_rules(config: GateConfig, test: dict[str, Any]) -> Iterator[Rule]:
    """What a model must be, whatever serves now."""
    yield at_least("test_rows", test["rows"], config.min_test_rows)
    yield at_least("auc", test["auc"], config.min_auc, test["intervals"]["auc"])
    yield at_least("group_auc", test["group_auc"], config.min_group_auc, test["intervals"]["group_auc"])
    error = test["calibration_error"]
    yield at_most("calibration_error", error, config.max_calibration_error, test["intervals"]["calibration_error"])
    yield at_most("logloss_ratio", test["normalised_entropy"], config.max_logloss_ratio)
    shift, slope = test["calibration_intercept"], test["calibration_slope"]
    yield within(
        "calibration_shift", shift, None if config.max_calibration_shift is None else
        (-config.max_calibration_shift, config.max_calibration_shift), test["intervals"]["calibration_intercept"],
    )  # fmt: skip
    yield within("calibration_slope", slope, config.calibration_slope, test["intervals"]["calibration_slope"])


def guard_rails(config: GateConfig, metrics: dict[str, Any], champion: dict[str, Any]) -> Iterator[Rule]:
    """What no model may do beside the champion, whether it is a refresh or a change."""
    gained = champion["difference"]["auc"]
    yield at_most("auc_gain", gained["value"], config.max_gain, remedy="so large a gain is most likely a leak of the "
                  "label: look for a column that is written after the click")  # fmt: skip
    yield at_most("score_drift", champion["score_drift"], config.max_score_drift)
    if metrics["policy"] is not None:
        yield earns_no_less(config.max_policy_loss, metrics["policy"]["difference"])
    share = None if not champion["train_rows"] else metrics["train_rows"] / champion["train_rows"]
    yield at_least("training_rows_ratio", share, config.min_volume)
    yield from slices(config, {"group AUC": champion["difference"]["group_auc"], **champion["slices"]})


def earns_no_less(limit: float | None, found: dict[str, Any]) -> Rule:
    """Fails where the off-policy view proves a loss of more than the limit: its whole interval lies beyond."""
    loss, interval = -found["value"], [-found["high"], -found["low"]]
    passed = limit is not None and interval[0] <= limit
    why = f"{loss:+.4f} clicks a row less than the champion's ranking, from {interval[0]:+.4f} to {interval[1]:+.4f}"
    return _rule("policy_loss", loss, interval, "lower end <=", limit, passed, why)


def slices(config: GateConfig, differences: dict[str, dict[str, Any] | None]) -> Iterator[Rule]:
    """Each slice's AUC minus the champion's. Holm (Scandinavian Journal of Statistics 1979) corrects for their number.

    A slice fails if its loss is proven and is larger than the limit. It is judged if a loss of the limit would be found
    with a probability of 80%.
    """
    limit = config.max_slice_loss
    if limit is None:
        return
    level = LEVEL / max(1, len(differences))
    measured = {name: found for name, found in differences.items() if found is not None}
    by_size = sorted(measured, key=lambda name: measured[name]["value"] / max(measured[name]["se"], 1e-12))
    wanted = {name: -float(ndtri(LEVEL / (len(by_size) - place))) for place, name in enumerate(by_size)}
    for name, found in differences.items():
        rule = f"auc_loss on {name}" if name != "group AUC" else "group_auc_loss"
        if found is None:
            yield _rule(rule, None, None, "<=", limit, None, "one class alone, or no row: not judged")
            continue
        loss, se = -found["value"], found["se"]
        smallest = evidence.detectable(se, level)
        interval = [-found["high"], -found["low"]]
        if loss > limit and loss > wanted[name] * se:
            why = f"{loss:.4f} is more than {limit:g}, and more than chance explains"
            yield _rule(rule, loss, interval, "<=", limit, False, why, detectable=smallest)
        elif smallest > limit:
            why = f"too few rows to judge: only a loss of {smallest:.4f} or more would be found"
            yield _rule(rule, loss, interval, "<=", limit, None, why, detectable=smallest)
        else:
            yield _rule(rule, loss, interval, "<=", limit, True, f"{loss:.4f}", detectable=smallest)


def no_worse(config: GateConfig, reference: dict[str, Any], references: int, spread: float) -> Rule:
    """A refresh beside one version: the lower end of its difference must lie above minus the margin."""
    found = reference["difference"]["auc"]
    sd = evidence.sd(found["se"], spread)
    if config.margin == "auto":
        margin = evidence.margin(found["se"], spread, references)
        how = "the smallest that an equally good refresh passes on 95% of the nights"
    else:
        margin, how = config.margin, "as set"
    low = found["value"] - float(ndtri(1 - LEVEL)) * sd
    why = (
        f"AUC {found['value']:+.4f} beside {reference['version']}, at least {low:+.4f} with rows and seeds in mind; "
        f"the margin is {margin:.4f}, {how}"
    )
    interval = [low, found["value"] + float(ndtri(1 - LEVEL)) * sd]
    rule = f"no worse than {reference['version']}"
    return _rule(rule, found["value"], interval, "lower end >=", -margin, low >= -margin, why, margin=margin)


def proven(config: GateConfig, nights: Sequence[dict[str, Any]], number: int, spread: float) -> Rule:
    """A change: the evidence of all its nights, {difference, se, against} each, tonight's last."""
    assert config.alpha is not None
    wanted = evidence.wanted(config.alpha, number)
    if not nights:
        why = "cannot be measured: the newest day has one class alone"
        return _rule("better than the champion", None, None, ">=", wanted, False, why, change=number)
    total = 0.0
    for against in dict.fromkeys(night["against"] for night in nights):
        own = [night for night in nights if night["against"] == against]
        total += evidence.log_evidence([n["difference"] for n in own], [n["se"] for n in own], spread, config.gain)
    tonight = nights[-1]["difference"]
    why = (
        f"AUC {tonight:+.4f} tonight; the evidence of {len(nights)} night(s) for a gain of {config.gain:g} is "
        f"{total:+.2f}, and {wanted:.2f} is wanted of change {number} within {config.look_back} days"
    )
    return _rule("better than the champion", total, None, ">=", wanted, total >= wanted, why, change=number)


# ---- plain limits -----------------------------------------------------------------------------------------------


def at_least(rule: str, value: float | None, limit: float | None, interval: Any = None) -> Rule:
    return _limited(rule, value, ">=", limit, interval, value is not None and limit is not None and value >= limit)


def at_most(rule: str, value: float | None, limit: float | None, interval: Any = None, remedy: str = "") -> Rule:
    passed = value is not None and limit is not None and value <= limit
    return _limited(rule, value, "<=", limit, interval, passed, remedy)


def within(rule: str, value: float | None, limits: tuple[float, float] | None, interval: Any) -> Rule:
    """Fails where the whole interval lies outside: a figure of few rows may lie there by chance."""
    passed = False
    if value is not None and limits is not None and interval is not None:
        passed = interval[1] >= limits[0] and interval[0] <= limits[1]
    return _limited(rule, value, "within", limits and list(limits), interval, passed)


def _limited(
    rule: str, value: float | None, must_be: str, limit: Any, interval: Any, passed: bool, remedy: str = ""
) -> Rule:
    if value is None:
        why = f"cannot be measured: {NOT_MEASURABLE.get(rule, 'the test days do not have it')}"
    elif limit is None:
        why = "left out"
    else:
        said = " to ".join(f"{edge:g}" for edge in limit) if isinstance(limit, list) else number(limit)
        why = f"{number(value, limit if not isinstance(limit, list) else None)} is {'' if passed else 'not '}{must_be} "
        why += said + (f"; {remedy}" if remedy and not passed else "")
    return _rule(rule, value, interval, must_be, limit, passed, why)


def _rule(
    rule: str, value: Any, interval: Any, must_be: str, limit: Any, passed: bool | None, why: str, **more: Any
) -> Rule:
    return {"rule": rule, "value": value, "interval": interval, "must_be": must_be, "limit": limit, "passed": passed,
            "why": why, **more}  # fmt: skip


def broken(rules: Iterable[Rule]) -> list[Rule]:
    return [rule for rule in rules if rule["passed"] is False]


def number(value: float, limit: float | None = None) -> str:
    """12,345 or four digits of a fraction; more digits where four would read like the limit that it is not."""
    if isinstance(value, int):
        return f"{value:,}"
    texts = (f"{value:,.{digits}g}" for digits in range(4, 18))
    return next((text for text in texts if value == limit or float(text.replace(",", "")) != limit), str(value))
