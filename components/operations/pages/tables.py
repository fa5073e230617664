"""The tables of a run, for the terminal and for its page: the same words and figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

EXAMPLE_CHARACTERS = 200
VERDICTS = {True: "holds", False: "broken", None: "not judged"}
COLOURS = {
    "holds": "ok", "passes": "ok", "done": "ok", "promoted": "ok", "broken": "bad", "fails": "bad", "failed": "bad",
    "stops the run": "bad", "rejected": "bad", "not judged": "unsure", "warning": "unsure",
}  # fmt: skip
MINUS = "\N{MINUS SIGN}"
WORDS = {">=": "\N{GREATER-THAN OR EQUAL TO}", "<=": "\N{LESS-THAN OR EQUAL TO}",
         "lower end >=": "lower end \N{GREATER-THAN OR EQUAL TO}",
         "lower end <=": "lower end \N{LESS-THAN OR EQUAL TO}"}  # fmt: skip


class Content(NamedTuple):
    """colours: word of a cell -> its class on the page."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    colours: dict[str, str] = COLOURS


def rules_table(found: dict[str, Any]) -> Content:
    """The rules that the data break, those that stop a run first, with an example of each."""
    rows = []
    broken = [rule for rule in found["validation"].get("rules", ()) if not rule["passed"]]
    for rule in sorted(broken, key=lambda rule: rule["severity"] != "stop"):
        examples, observed = rule.get("examples"), rule.get("observed")
        shown = ", ".join(f"{k} {v}" for k, v in examples[0].items()) if examples else f"observed {observed}"
        rows.append(
            [
                f"{rule['table']}.{rule['column']}" if rule["column"] else rule["table"],
                rule["says"] or rule["rule"],
                {"stop": "stops the run", "warn": "warning"}.get(rule["severity"], rule["severity"]),
                f"{rule.get('broken_rows', 0):,}",
                shown if len(shown) <= EXAMPLE_CHARACTERS else f"{shown[:EXAMPLE_CHARACTERS]}…",
            ]
        )
    return Content("Rules that the data break", ["column", "rule", "severity", "rows", "example"], rows)


def models_table(found: dict[str, Any]) -> Content:
    """A line for each model, then the champion, and the oracle: the ceiling of any model.

    The valid AUC is shown where a model has no figures of the test days yet.
    """
    columns = ["model", "valid AUC", "AUC", "±95%", "group AUC", "logloss", "cal. error", "rows/s", "gate"]
    rows = []
    judged, evaluate = found["decision"].get("candidates", {}), found["evaluate"]
    for name in dict.fromkeys([*found["train"], *evaluate]):
        trained, metrics = found["train"].get(name, {}), evaluate.get(name)
        auc, *others = _figures(metrics["test"]) if metrics else [""] * 4
        low, high = metrics["test"]["intervals"]["auc"] if metrics else (0.0, 0.0)
        interval = _figure((high - low) / 2) if metrics else ""
        valid = "" if found["train"].keys() <= evaluate.keys() else _figure(trained.get("valid_auc"))
        rate = found["stages"].get(f"train@{name}", {}).get("rows_per_second")
        speed = f"{rate:,}" if rate else ""
        verdict = "" if name not in judged else "passes" if judged[name]["passed"] else "fails"
        rows.append([name, valid, auc, interval, *others, speed, verdict])
    any_metrics = next(iter(evaluate.values()), None)
    for at, other in enumerate(any_metrics["references"] if any_metrics else ()):
        auc, *others = _figures(other["test"])
        rows.append([f"{'earlier' if at else 'champion'} {other['version']}", "", auc, "", *others, "", ""])
    if any_metrics and "oracle_auc" in any_metrics["test"]:
        test = any_metrics["test"]
        rows.append(["oracle", "", _figure(test["oracle_auc"]), "", "", _figure(test["oracle_logloss"]), "", "", ""])
    filled = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    title = "Models on the test days" if evaluate else "Models"
    return Content(title, [columns[i] for i in filled], [[row[i] for i in filled] for row in rows])


def data_table(found: dict[str, Any]) -> Content:
    from components.data.validate import old_data

    source, dataset, rows = found["source"], found["dataset"], []
    rules = found["validation"].get("rules", [])
    if source:
        rows += [
            ["source", str(source["source"])],
            ["impressions", f"{source['impressions']:,}, {source['label_rate']:.1%} clicked"],
            ["days", f"{source['days']:,}, {source['first_day']} to {source['last_day']}"],
            ["users, items", f"{source['users']:,} and {source['items']:,}"],
        ]
        if note := old_data(source):
            rows.append(["age", note])
    if unjudged := found["validation"].get("not_judged"):
        rows.append(["not judged", "; ".join(unjudged)])
    if aside := found["validation"].get("quarantined"):
        rows.append(["rows set aside", ", ".join(f"{count:,} {reason}" for reason, count in aside.items())])
    if rules:
        rows.append(["rules that hold", f"{sum(rule['passed'] for rule in rules):,} of {len(rules):,}"])
    if unusual := source.get("unusual_days"):
        late, corrected = (sum(day.get(what, 0) for day in unusual.values()) for what in ("late", "corrected later"))
        rows.append(["late rows", f"{late:,} came after their day; {corrected:,} were corrected later"])
    if dataset:
        splits = sorted(dataset["splits"].items(), key=lambda split: split[1])
        counts = ", ".join(f"{name} {end - start:,}" for name, (start, end) in splits)
        rows.append(["rows", f"{counts}; {dataset['bytes_per_row']:,} bytes each"])
    if found["smoke"].get("served"):
        said, measured = f"{found['smoke']['golden_requests']:,} golden requests", found["stages"]["smoke"]
        if latency := measured.get("latency_ms"):  # not there where DVC took smoke from its cache
            said = f"golden scores within {measured['max_abs_error']:.1e}"
            said += f"; latency p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms"
        rows.append(["served", said])
    return Content("Data", ["", ""], rows)


def stages_table(found: dict[str, Any]) -> Content:
    """Every stage of the pipeline, once one has run. A stage that DVC took from its cache has no time here."""
    stopped = found["stopped"][0] if found["stopped"] else None
    rows = []
    for name, cost in found["stages"].items():
        state = "failed" if name == stopped else "done" if name in found["ended"] else "not run"
        seconds, peak = cost.get("seconds"), cost.get("peak_mib")
        known = state != "not run"
        rows.append(
            [
                name,
                state,
                f"{seconds:,.1f} s" if known and seconds is not None else "",
                f"{peak:,} MiB" if known and peak is not None else "",
            ]
        )
    return Content(
        "Stages, when they last ran here",
        ["stage", "", "time", "peak memory"],
        rows if found["ended"] or stopped else [],
    )


def slices_table(found: dict[str, Any]) -> Content:
    """Rows and AUC of each model by slice and, where there is a champion, the difference to it."""
    evaluate = found["evaluate"]
    names = list(evaluate)
    beside = {name: evaluate[name]["references"][0] for name in names if evaluate[name]["references"]}
    rows = []
    for part in evaluate[names[0]]["slices"] if names else ():
        cells = [evaluate[name]["slices"][part] for name in names]
        row = [part, f"{cells[0]['rows']:,}", *(_figure(cell["auc"]) for cell in cells)]
        for reference in beside.values():
            one = reference["slices"].get(part)
            row += [signed(one["value"]), interval((one["low"], one["high"]))] if one else ["", ""]
        rows.append(row)
    columns = [
        text for name, one in beside.items() for text in (f"{name} \N{MINUS SIGN} {one['version']}", "95% interval")
    ]
    return Content("AUC by slice of the test days", ["slice", "rows", *names, *columns], rows)


def gate_table(candidate: dict[str, Any]) -> Content:
    """The rules of one model: broken ones first, slices last."""
    order = {False: 0, None: 2, True: 1}
    rules = sorted(candidate["rules"], key=lambda rule: (order[rule["passed"]], " on " in rule["rule"]))
    rows = [
        [rule["rule"].replace("_", " "), number(rule["value"]), interval(rule["interval"]), limit(rule),
         VERDICTS[rule["passed"]], rule["why"]]
        for rule in rules
    ]  # fmt: skip
    return Content("Rules of the gate", ["rule", "value", "interval", "limit", "", "why"], rows)


def refit_table(found: dict[str, Any]) -> Content:
    """The checks of the refit against the model that the gate judged, on the newest day."""
    rows = [
        [check["rule"].replace("_", " "), number(check["value"]), limit(check), VERDICTS[check["passed"]]]
        for check in found["shipped"].get("checks", ())
    ]
    return Content("Checks of the refit, on the newest day", ["check", "value", "limit", ""], rows)


def calibration_table(found: dict[str, Any]) -> Content:
    """How far predictions are from clicks: 0, 0 and 1 where they are true."""
    names = ("calibration_error", "calibration_intercept", "calibration_slope")
    rows = []
    for model, metrics in found["evaluate"].items():
        test = metrics["test"]
        rows.append(
            [model, *(text for name in names for text in (number(test[name]), interval(test["intervals"][name])))]
        )
    columns = ["model", "error", "95% interval", "shift of log-odds", "95% interval", "slope", "95% interval"]
    return Content("Calibration on the test days", columns, rows)


def preference(name: str, one: dict[str, Any]) -> tuple[int, float, str]:
    """The order in which the gate tried the models, as a key to sort by."""
    return (0, one["cost"], name) if one["equal_to_best"] else (1, -one["valid_auc"], name)


# ---- figures as text --------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}".replace("-", MINUS)


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", MINUS)


def interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{number(ends[0])} to {number(ends[1])}"


def limit(rule: dict[str, Any]) -> str:
    """What the value must be."""
    edge = rule["limit"]
    said = " to ".join(map(_plain, edge)) if isinstance(edge, list) else _plain(edge)
    return f"{WORDS.get(rule['must_be'], rule['must_be'])} {said}"


def _plain(edge: float) -> str:
    return (f"{edge:,}" if isinstance(edge, int) else f"{edge:.4g}").replace("-", MINUS)


def duration(seconds: float) -> str:
    """12.3 s, 4 min 5 s, 1 h 2 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def _figures(test: dict[str, Any]) -> list[str]:
    return [_figure(test[name]) for name in ("auc", "group_auc", "logloss", "calibration_error")]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def rich(content: Content) -> Table:
    table = Table(title=content.title, title_justify="left", show_header=any(content.columns))
    for i, column in enumerate(content.columns):
        words = i == 0 or not any(row[i][:1].isdigit() for row in content.rows) or not any(content.columns)
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    for row in content.rows:
        table.add_row(*map(Text, row))
    return table
