"""The model card: what ships, what it has seen, how good it is, what it is for and where it is weak, in Markdown.

Its figures are those of the model that the gate judged. A refit has the same configuration and has seen more days, so
nothing is left to measure it by. The card says so. The same inputs give the same text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from components.common.dataset import Dataset
from models.checkpoint import Checkpoint

NAMES = {  # figures for a person, the most important first
    "auc": "AUC",
    "group_auc": "group AUC",
    "average_precision": "average precision",
    "logloss": "logloss",
    "normalised_entropy": "logloss as a share of the click rate's own",
    "calibration_error": "calibration error",
    "calibration_intercept": "calibration: shift of the log-odds",
    "calibration_slope": "calibration: slope",
}
WEAK_ROWS = 1000  # a slice with fewer is named as little tested
USE = """It ranks items for a user: it gives each candidate the probability of a click. It is meant for the choice of
what to show next to users and items like those of the data below. Compare scores within one request. As
probabilities, they hold for the mix of users, items and places of the data.
"""
NOT_FOR = (
    "Not for decisions about people, such as prices, credit, jobs or health.",
    "A click is no proof that a person liked an item. Whoever ranks by clicks alone may come to favour bait.",
    "The clicks were logged under earlier rankings. An item that was never shown, or shown far below, has few of them.",
)


def write(
    tag: str, decision: dict[str, Any], evaluation: dict[str, Any], shipped: Checkpoint, data: Dataset,
    hashes: dict[str, Any],
) -> str:  # fmt: skip
    """decision: as `refit` writes it. evaluation: of the judged model. hashes: what the Bento serves from."""
    parts = [
        f"# {tag}\n",
        USE,
        "## Data\n", _table(["what", "value"], _data(evaluation, shipped, data)),
        "## Model\n", _table(["setting", "value"], _settings(decision, shipped)),
        "## Figures\n", _measured_on(decision, evaluation),
        _table(["figure", "value", "95% interval"], _figures(evaluation)),
        *_versions(evaluation),
        "## Slices\n", _table(*_slices(evaluation)),
        "## Decision\n", _list(decision["reasons"] + decision["shipped"]["reasons"]),
        "## Limits\n", _list([*NOT_FOR, *_limits(evaluation)]),
        "## Bytes\n", _table(["of", "hash or version"], _hashes(hashes)),
    ]  # fmt: skip
    return "\n".join(parts)


def _data(evaluation: dict[str, Any], shipped: Checkpoint, data: Dataset) -> Iterator[tuple[str, str]]:
    counts = {name: end - start for name, (start, end) in sorted(data.splits.items(), key=lambda split: split[1])}
    until = shipped.facts.get("train_until")
    yield "has seen the rows until", until[:16].replace("T", " ") + " UTC" if until else "unknown: they have no times"
    yield "rows fitted on", f"{shipped.facts.get('train_rows', counts['train']):,}"
    rows = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    yield "rows of the judged model", rows
    for name, fact in (
        ("valid days begin", "valid_from"),
        ("test days begin", "test_from"),
        ("data end before", "ends"),
    ):
        if data.facts.get(fact):
            yield name, data.facts[fact]
    yield "test rows clicked", f"{evaluation['test']['label_rate']:.1%}"
    yield "items in the catalog", f"{len(data.catalog.item_ids_I):,}"


def _settings(decision: dict[str, Any], shipped: Checkpoint) -> Iterator[tuple[str, str]]:
    slope, intercept = shipped.calibration
    yield "family", shipped.family
    ships = decision["shipped"]["kind"]
    yield "ships", "the judged model, fitted again on all days" if ships == "refit" else "the judged model itself"
    yield "history", f"the last {shipped.encoder.schema.history_length:,} clicks of the user"
    yield "features", ", ".join(feature.name for feature in shipped.encoder.schema.features)
    yield "calibration", f"sigmoid({slope:.4f} · logit {'+' if intercept >= 0 else '-'} {abs(intercept):.4f})"
    for key, value in sorted(shipped.network.items()):
        yield f"network.{key}", str(value)
    if "best_epoch" in shipped.facts:
        yield "epochs", str(shipped.facts["best_epoch"])
    for key, value in sorted(shipped.facts.get("train", {}).items()):
        yield f"train.{key}", str(value)
    yield "started from", str(shipped.facts.get("warm_start") or "new weights")


def _measured_on(decision: dict[str, Any], evaluation: dict[str, Any]) -> str:
    said = f"On {evaluation['test']['rows']:,} rows of the test days. Users are the units of the intervals.\n"
    if decision["shipped"]["kind"] == "refit":
        said += (
            "These are figures of the judged model, which has not seen the test days. What ships was fitted on them\n"
        )
        said += "too, with the same settings.\n"
    return said


def _figures(evaluation: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    test = evaluation["test"]
    for name, words in NAMES.items():
        if test.get(name) is not None:
            yield words, f"{test[name]:.4f}", _between(test["intervals"].get(name))
    if "oracle_auc" in test:
        yield "AUC of the simulator's own click rates, the ceiling", f"{test['oracle_auc']:.4f}", ""
    if earned := evaluation.get("policy"):
        yield "clicks a row that it would earn, off-policy", f"{earned['value']:.4f}", _gain(earned)[1]
        logged = earned["logged"]
        yield "clicks a row as logged", f"{logged['value']:.4f}", _gain(logged)[1]


def _versions(evaluation: dict[str, Any]) -> Iterator[str]:
    rows = [
        (other["version"], f"{other['test']['auc']:.4f}", *_gain(gained))
        for other in evaluation["references"]
        if (gained := other["difference"]["auc"])
    ]  # fmt: skip
    if rows:
        yield "### Beside earlier versions, on the same rows\n"
        yield _table(["version", "its AUC", "difference", "95% interval"], rows)


def _slices(evaluation: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    champion = next(iter(evaluation["references"]), None)
    rows = []
    for name, part in evaluation["slices"].items():
        row = [name, f"{part['rows']:,}", "none: one class" if part["auc"] is None else f"{part['auc']:.4f}"]
        if champion:
            one = champion["slices"].get(name)
            row += _gain(one) if one else ["", ""]
        rows.append(tuple(row))
    beside = [f"beside {champion['version']}", "95% interval"] if champion else []
    return ["slice of the test days", "rows", "AUC", *beside], rows


def _limits(evaluation: dict[str, Any]) -> Iterator[str]:
    """What the figures themselves say of weak places."""
    test = evaluation["test"]
    known = {name: part for name, part in evaluation["slices"].items() if part["auc"] is not None}
    if known:
        worst = min(known, key=lambda name: (known[name]["auc"], name))
        yield f"It is weakest on {worst}: AUC {known[worst]['auc']:.4f}, and {test['auc']:.4f} on all rows."
    few = [name for name, part in evaluation["slices"].items() if part["rows"] < WEAK_ROWS]
    if few:
        yield f"Little tested, with fewer than {WEAK_ROWS:,} rows: {', '.join(few)}."
    yield f"Predicted and observed click rates differ by {test['calibration_error']:.4f} on average."
    yield "Behaviour changes. The older the model, the less these figures say."


def _hashes(hashes: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in sorted(hashes.items()):
        yield name, ", ".join(value) if isinstance(value, list) else str(value)


def _gain(one: dict[str, float]) -> tuple[str, str]:
    return f"{one['value']:+.4f}", _between((one["low"], one["high"]))


def _between(ends: Iterable[float] | None) -> str:
    return "" if ends is None else " to ".join(f"{end:.4f}" for end in ends)


def _table(columns: list[str], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _list(items: Iterable[str]) -> str:
    return "".join(f"- {item}\n" for item in items)
