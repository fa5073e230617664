"""The page of one run: the verdict first, then what it rests on. Self-contained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from components.operations.pages import tables
from components.operations.pages.plots import Interval, Line, forest, lines
from components.operations.pages.template import render

KINDS = {"first": "the first model", "refresh": "a refresh of the champion", "change": "a change"}


class Plot(NamedTuple):
    """key: (class, name) of each line."""

    title: str
    svg: str
    note: str = ""
    key: tuple[tuple[str, str], ...] = ()


def page(found: dict[str, Any], day: str | None) -> str:
    """day: of a run's page, which links to the index beside it."""
    return render(
        "run.html.j2",
        day=day,
        found=found,
        verdict=verdict(found),
        tiles=list(tiles(found)),
        against=list(against(found)),
        quality=list(quality(found)),
        slices=list(slices(found)),
        earned=list(earned(found)),
        models=tables.models_table(found),
        calibration=tables.calibration_table(found),
        slices_table=tables.slices_table(found),
        gates=[(model, candidate["passed"], tables.gate_table(candidate))
               for model, candidate in candidates(found).items()],
        refit=tables.refit_table(found),
        broken=tables.rules_table(found),
        data=tables.data_table(found),
        stages=tables.stages_table(found),
    )  # fmt: skip


def candidates(found: dict[str, Any]) -> dict[str, Any]:
    """The judged models, what ships or was tried first at the front."""
    decision = found["decision"]
    judged = decision.get("candidates", {})
    return {name: judged[name] for name in sorted(judged, key=lambda name: (name != tried_first(found), name))}


def tried_first(found: dict[str, Any]) -> str | None:
    """What ships; else the model that the valid days and the cost put first; else the best on the test days."""
    decision, evaluate = found["decision"], found["evaluate"]
    if decision.get("model") in evaluate:
        return str(decision["model"])
    order = {name: one for name, one in decision.get("order", {}).items() if name in evaluate}
    if order:
        return min(order, key=lambda name: tables.preference(name, order[name]))
    return max(evaluate, key=lambda name: (evaluate[name]["test"]["auc"], name), default=None)


def verdict(found: dict[str, Any]) -> list[str]:
    """The head line, and what kind of model ships."""
    decision, shipped = found["decision"], found["shipped"]
    if not decision:
        return []
    if decision["verdict"] != "approve":
        return ["Rejected: nothing ships", f"{_serving(decision)}"]
    lines = [f"Approved: {decision['model']} ships"]
    said = KINDS.get(decision.get("kind", ""), "")
    champion = decision.get("champion")
    if said and champion and decision["kind"] != "first":
        said += f", judged beside {champion['version']}"
    lines.append(said[:1].upper() + said[1:])
    if shipped:
        until = f" It has seen the days until {shipped['train_until'][:10]}." if shipped.get("train_until") else ""
        what = "fitted again on all days" if shipped["kind"] == "refit" else "as the gate judged it"
        lines.append(f"What ships is the model {what}.{until}")
    return [line for line in lines if line]


def _serving(decision: dict[str, Any]) -> str:
    champion = decision.get("champion")
    return f"{champion['version']} stays the champion." if champion else "There is no champion yet."


def tiles(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(figure, what it is): the most important ones."""
    model = tried_first(found)
    if model:
        test = found["evaluate"][model]["test"]
        yield f"{test['auc']:.4f}", f"AUC of {model}"
        references = found["evaluate"][model]["references"]
        if references and (gained := references[0]["difference"]["auc"]):
            yield tables.signed(gained["value"]), f"AUC beside {references[0]['version']}"
        yield f"{test['calibration_error']:.4f}", "calibration error"
        yield f"{test['rows']:,}", "test rows"
    if found["source"]:
        yield f"{found['source']['impressions']:,}", "impressions"
    seconds = [
        cost["seconds"] for name, cost in found["stages"].items() if name in found["ended"] and "seconds" in cost
    ]
    if seconds:
        yield tables.duration(sum(seconds)), "all stages"


# ---- plots ------------------------------------------------------------------------------------------------------


def against(found: dict[str, Any]) -> Iterator[Plot]:
    """Each model beside the champion and the earlier versions, then all of them alone."""
    evaluate = found["evaluate"]
    rows = []
    for place, (model, metrics) in enumerate(evaluate.items()):
        rules = {rule["rule"]: rule for rule in candidates(found).get(model, {"rules": []})["rules"]}
        for at, other in enumerate(metrics["references"]):
            gained = other["difference"]["auc"]
            limit = rules.get(f"no worse than {other['version']}", {}).get("limit")
            if gained:
                label = f"{model}, {other['version']}"
                note = "champion" if at == 0 else "earlier version"
                rows.append(
                    Interval(label, note, gained["value"], gained["low"], gained["high"], limit, f"s{place % 3}")
                )
    if rows:
        note = "Above 0, the new model is better. 95% intervals of the test rows, paired, with users as units."
        if any(row.margin is not None for row in rows):
            note += " The red stroke is the margin: the lower end must not lie below it by rows and seeds together."
        drawn = forest(rows, "difference in AUC", line=0.0, signed=True)
        yield Plot("Difference in AUC, new model minus version", drawn, note)
    rows = [
        _auc(model, "", metrics["test"], f"s{place % 3}") for place, (model, metrics) in enumerate(evaluate.items())
    ]
    any_metrics = next(iter(evaluate.values()), None)
    for at, other in enumerate(any_metrics["references"] if any_metrics else ()):
        rows.append(_auc(other["version"], "earlier version" if at else "champion", other["test"], "old"))
    if any_metrics and "oracle_auc" in any_metrics["test"]:
        rows.append(Interval("oracle", "ceiling of any model", any_metrics["test"]["oracle_auc"], kind="old"))
    if rows:
        yield Plot("AUC on the test days", forest(rows, "AUC"), "With 95% intervals; users are the units.")


def earned(found: dict[str, Any]) -> Iterator[Plot]:
    """What each ranking would have earned, by the off-policy view, where the rows tell their propensities."""
    told = {model: metrics["policy"] for model, metrics in found["evaluate"].items() if metrics.get("policy")}
    if not told:
        return
    rows = [
        _clicks(model, f"{one['effective_rows']:,.0f} effective rows", one, f"s{place % 3}")
        for place, (model, one) in enumerate(told.items())
    ]
    one = next(iter(told.values()))
    if champion := one["champion"]:
        note = f"{champion['effective_rows']:,.0f} effective rows"
        rows.append(_clicks(f"champion {champion['version']}", note, champion, "old"))
    rows.append(_clicks("as logged", f"{one['rows']:,} rows", one["logged"], "old"))
    note = "An estimate from logged clicks, doubly robust, with 95% intervals. It is no reason to promote."
    yield Plot("Clicks a row that the ranking would earn", forest(rows, "clicks a row"), note)


def _clicks(label: str, note: str, told: dict[str, Any], kind: str) -> Interval:
    return Interval(label, note, told["value"], told["low"], told["high"], kind=kind)


def _auc(label: str, note: str, test: dict[str, Any], kind: str) -> Interval:
    low, high = test["intervals"]["auc"]
    return Interval(label, note, test["auc"], low, high, kind=kind)


def quality(found: dict[str, Any]) -> Iterator[Plot]:
    """Reliability, then learning curves."""
    places = {model: f"s{at % 3}" for at, model in enumerate({**found["train"], **found["evaluate"]})}
    curves = [
        Line(model, list(zip(frame["predicted"], frame["observed"], strict=True)), places[model])
        for model, frame in found["calibration"].items()
    ]
    if curves:
        yield Plot(
            "Reliability on the test days",
            lines(curves, "predicted click rate", "observed click rate", diagonal=True, percent=True),
            "Each point is a bin of equally many rows. On the dashed line, predictions are true.",
            tuple((one.kind, one.label) for one in curves),
        )
    curves = [
        Line(model, list(zip(frame["epoch"], frame["valid_auc"], strict=True)), places.setdefault(model, "s0"))
        for model, frame in found["history"].items()
    ]
    if curves:
        yield Plot("Learning curves", lines(curves, "epoch", "AUC on the valid days"), "",
                   tuple((one.kind, one.label) for one in curves))  # fmt: skip


def slices(found: dict[str, Any]) -> Iterator[Plot]:
    """A forest for the model that ships or was tried first: beside the champion, or alone where there is none."""
    model = tried_first(found)
    if model is None:
        return
    metrics = found["evaluate"][model]
    sizes = {name: f"{part['rows']:,} rows" for name, part in metrics["slices"].items()}
    if not sizes:
        return
    if metrics["references"]:
        champion = metrics["references"][0]
        rules = {rule["rule"]: rule for rule in candidates(found).get(model, {"rules": []})["rules"]}
        rows = []
        for name, size in sizes.items():
            one, rule = champion["slices"].get(name), rules.get(f"auc_loss on {name}")
            if one is None:
                rows.append(Interval(name, size, None))
                continue
            kind = {True: "s0", False: "bad", None: "old"}[rule["passed"]] if rule else "s0"
            margin = -rule["limit"] if rule else None
            rows.append(Interval(name, size, one["value"], one["low"], one["high"], margin, kind))
        drawn = forest(rows, "difference in AUC", line=0.0, signed=True)
        note = "95% intervals, not corrected for their number. A dash: one class alone, or no row."
        if rules:
            note += (
                " The red stroke is the loss that the gate allows. Red slices break the rule, grey ones have too few "
            )
            note += "rows to be judged."
        yield Plot(f"{model} minus {champion['version']}, AUC by slice", drawn, note)
    else:
        rows = [Interval(name, sizes[name], part["auc"]) for name, part in metrics["slices"].items()]
        yield Plot(f"AUC of {model} by slice", forest(rows, "AUC", line=metrics["test"]["auc"]),
                   "The dashed line is the AUC of all test rows. A dash: one class alone, or no row.")  # fmt: skip
