"""evaluate: the ranker on the test days, whole and by slice, beside the oracle and the champion on the same rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from components.common.artifacts import new_folder, write_json
from components.common.champion import fetched_versions
from components.common.contracts import POSITION, PROPENSITY, SLATE
from components.common.dataset import UNSEEN, Dataset, encode_column
from components.common.scoring import SCORE_BATCH, score
from components.release import policy, slices, statistics
from components.release.measures import EvaluateConfig, calibration_curve, measure, roc_points
from models.checkpoint import Checkpoint, checkpoint_hash, load
from models.schema import SPECIAL, UNKNOWN, Batch, Feature

COST_CANDIDATES = 100  # of the request whose cost is counted


def run(
    config: EvaluateConfig, model: str, checkpoint: Path, dataset: Path, champion: Path, output: Path
) -> dict[str, Any]:
    """Write evaluation.json, metrics.json (its headline), predictions and valid.parquet, calibration and roc.csv.

    `policy` is what the ranking would have earned (`policy.py`), where the rows tell their propensities.
    `references` holds the champion and the versions before it that `champion` fetched, on the same rows: its figures,
    and what is added by this model (`difference`, with standard error and interval).

    Raises ValueError where the checkpoint was trained under another schema or data, a reference has seen the test days,
    or these hold one class.
    """
    data = Dataset.open(dataset)
    trained = load(checkpoint)
    require_same(trained, data, checkpoint, dataset)
    start, end = data.splits["test"]
    labels = data.columns["label"][start:end].numpy().astype(np.int8)
    if not 0 < labels.mean() < 1:
        raise ValueError(
            f"evaluate: the test days hold {int(labels.sum())} clicks in {len(labels)} rows; nothing to rank. "
            "Raise split.test_share or give more days"
        )
    users, unseen = data.columns["user"][start:end].numpy(), pq.read_table(dataset / UNSEEN)
    models = {"": predict(trained, data, (start, end))}
    references = []
    for current, folder in fetched_versions(champion):
        judge = load(folder)
        require_unseen(judge, current["version"], data)
        models[current["version"]] = predict_translated(judge, data, unseen, (start, end))
        references.append((current, judge))
    drawn = statistics.bootstrap(
        labels, models, users, bins=config.calibration_bins, resamples=config.bootstrap, seed=config.seed,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    masks = slices.masks(config.slices, data)
    judges = {"": trained} | {current["version"]: judge for current, judge in references[:1]}
    test = figures(config, labels, models[""], users, drawn[""])
    if "oracle" in data.columns:
        oracle = data.columns["oracle"][start:end].numpy()
        test["oracle_auc"] = float(roc_auc_score(labels, oracle))
        test["oracle_logloss"] = float(log_loss(labels, oracle.astype(np.float64)))
    newest = np.arange(start, end) >= data.facts["newest"]
    found: dict[str, Any] = {
        "model": model,
        "checkpoint_sha256": checkpoint_hash(checkpoint),
        "data_sha256": data.facts["data_sha256"],
        "schema_hash": data.facts["schema_hash"],
        "configuration": trained.facts["configuration"],
        "train_rows": trained.facts["train_rows"],
        "cost": cost(trained, data, (start, end)),
        "test": test,
        "policy": off_policy(config, data, judges, models, unseen),
        "slices": {name: _slice(config, mask, labels, models[""], users) for name, mask in masks.items()},
        "references": [
            {
                "version": current["version"],
                "checkpoint_sha256": current["judged_sha256"],
                "configuration": judge.facts["configuration"],
                "train_rows": judge.facts["train_rows"],
                "test": figures(config, labels, models[current["version"]], users, drawn[current["version"]]),
                "difference": differences(labels, models, current["version"], users, drawn),
                "newest": difference(newest, labels, models, current["version"], users),
                "score_drift": statistics.drift(models[current["version"]], models[""]),
                "slices": {
                    name: difference(mask, labels, models, current["version"], users) for name, mask in masks.items()
                },
            }
            for current, judge in references
        ],
    }
    columns = {"user_id": data.user_ids(slice(start, end)).numpy(), "label": labels, "score": models[""]}
    if references:
        columns["champion_score"] = models[references[0][0]["version"]]
    first, last = data.splits["valid"]
    valid = {
        "user_id": data.user_ids(slice(first, last)).numpy(),
        "label": data.columns["label"][first:last].numpy().astype(np.int8),
        "score": predict(trained, data, (first, last)),
    }
    with new_folder(output) as folder:
        write_json(folder / "evaluation.json", found)
        headline = ("auc", "group_auc", "logloss", "calibration_error", "oracle_auc")
        write_json(folder / "metrics.json", {name: test[name] for name in headline if name in test})
        pq.write_table(pa.table(columns), folder / "predictions.parquet")
        pq.write_table(pa.table(valid), folder / "valid.parquet")
        calibration_curve(labels, models[""], config.calibration_bins).to_csv(folder / "calibration.csv", index=False)
        roc_points(labels, models[""]).to_csv(folder / "roc.csv", index=False)
    return found


def summary(found: dict[str, Any]) -> dict[str, str]:
    test = found["test"]
    low, high = test["intervals"]["auc"]
    lines = {
        "test AUC": f"{test['auc']:.4f}, 95% interval {low:.4f} to {high:.4f}",
        "logloss": f"{test['logloss']:.4f}, {test['base_logloss']:.4f} for always predicting the click rate",
        "calibration": f"error {test['calibration_error']:.4f}, intercept {_signed(test['calibration_intercept'])}, "
        f"slope {_signed(test['calibration_slope'], '')}",
    }
    if "oracle_auc" in test:
        lines["oracle"] = f"AUC {test['oracle_auc']:.4f}, the ceiling of any model"
    if earned := found["policy"]:
        lines["off-policy"] = (
            f"{earned['value']:.4f} clicks a row, 95% interval {earned['low']:.4f} to {earned['high']:.4f}; "
            f"{earned['logged']['value']:.4f} were logged, {earned['effective_rows']:,.0f} effective rows"
        )
    for at, reference in enumerate(found["references"]):
        auc = reference["difference"]["auc"]
        lines[f"{'champion' if at == 0 else 'before'} {reference['version']}"] = (
            f"AUC {reference['test']['auc']:.4f}; this one's is {auc['value']:+.4f} from it, 95% interval "
            f"{auc['low']:+.4f} to {auc['high']:+.4f}"
        )
    return lines


def _signed(value: float | None, sign: str = "+") -> str:
    return "none" if value is None else f"{value:{sign}.3f}"


# ---- figures ----------------------------------------------------------------------------------------------------


def figures(
    config: EvaluateConfig, labels: np.ndarray, scores: np.ndarray, users: np.ndarray, drawn: dict[str, np.ndarray]
) -> dict[str, Any]:
    """What `measure` finds and the other figures of the resamples, and `intervals`: figure -> [low, high], or None."""
    found = {name: _known(values[0]) for name, values in drawn.items()} | measure(config, labels, scores, users)
    ends = {name: statistics.interval(values) for name, values in drawn.items()}
    return found | {"intervals": {name: [*map(_known, both)] if all(map(np.isfinite, both)) else None
                                  for name, both in ends.items()}}  # fmt: skip


def differences(
    labels: np.ndarray, models: dict[str, np.ndarray], version: str, users: np.ndarray,
    drawn: dict[str, dict[str, np.ndarray]],
) -> dict[str, Any]:  # fmt: skip
    """Figure -> value, se, low, high of this model's minus the version's, on the same resamples."""
    found: dict[str, Any] = {}
    for name in statistics.FIGURES:
        sample = drawn[""][name] - drawn[version][name]
        low, high = statistics.interval(sample)
        known = sample[1:][np.isfinite(sample[1:])]
        measurable = np.isfinite(sample[0]) and len(known) > 1
        found[name] = (
            {"value": float(sample[0]), "se": float(known.std(ddof=1)), "low": low, "high": high}
            if measurable else None
        )  # fmt: skip
    return found | {"auc": difference(np.ones(len(labels), bool), labels, models, version, users)}


def difference(
    mask: np.ndarray, labels: np.ndarray, models: dict[str, np.ndarray], version: str, users: np.ndarray
) -> dict[str, float] | None:
    """This model's AUC minus the version's on some of the rows; None where they hold one class, or one user's alone."""
    if not 0 < labels[mask].sum() < mask.sum():
        return None
    units = statistics.units_of(users[mask])
    found = statistics.auc(labels[mask], models[""][mask], units, minus=models[version][mask])
    low, high = found.interval()
    return {"value": found.value, "se": found.se, "low": low, "high": high}


def off_policy(
    config: EvaluateConfig, data: Dataset, judges: dict[str, Checkpoint], scores: dict[str, np.ndarray],
    unseen: pa.Table,
) -> dict[str, Any] | None:  # fmt: skip
    """What the rankings of the model ("") and of the champion would have earned on the test days: `policy.compared`.

    None where the rows tell no propensity, or none of them could be shown. The champion's scores are the outcome model
    of both, or else the model's.
    """
    if PROPENSITY not in data.columns:
        return None
    start, end = data.splits["test"]
    rng = np.random.default_rng(config.seed)
    logged = {name: data.columns[name][start:end].numpy() for name in (PROPENSITY, POSITION, SLATE) if name in
              data.columns}  # fmt: skip
    propensity = logged[PROPENSITY].astype(np.float64)
    outcome = list(judges)[-1]
    if SLATE in logged:
        at = np.arange(end - start)
        weighed = {
            name: policy.reranked(
                scores[name], scores[outcome], data.columns["label"][start:end].numpy(), propensity, logged[POSITION],
                logged[SLATE],
            )
            for name in judges
        }  # fmt: skip
    else:
        at = np.sort(rng.permutation(end - start)[: config.policy.rows])
        shown = policy.evenly_drawn(
            rng, data.columns["item"][start:end].numpy(), (len(at), policy.DRAWS * config.policy.candidates)
        )
        others = {
            name: predict_shown(
                judge, data, unseen, torch.from_numpy(start + at.repeat(shown.shape[1])),
                torch.from_numpy(start + shown.ravel()),
            ).reshape(shown.shape)
            for name, judge in judges.items()
        }  # fmt: skip
        weighed = {
            name: policy.best_of(
                rng, config.policy.candidates, scores[name][at], others[name], scores[outcome][at], others[outcome],
                propensity[at],
            )
            for name in judges
        }  # fmt: skip
    rows = slice(start, end)
    oracle = data.columns["oracle"][rows].numpy()[at] if "oracle" in data.columns else None
    found = policy.compared(
        data.columns["label"][rows].numpy()[at], weighed, statistics.units_of(data.columns["user"][rows].numpy()[at]),
        oracle, resamples=config.bootstrap, seed=config.seed,
    )  # fmt: skip
    if found is None:
        return None
    candidates = None if SLATE in logged else config.policy.candidates
    return {"candidates": candidates, "outcome_model": outcome or "its own", **found}


def cost(trained: Checkpoint, data: Dataset, rows: tuple[int, int]) -> int:
    """Multiplications and additions of scoring one user's COST_CANDIDATES candidates: what serving pays."""
    from torch.utils.flop_counter import FlopCounterMode

    batch = data.batch(slice(rows[1] - COST_CANDIDATES, rows[1]))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        trained.model(batch, data.catalog, data.click_log)
    return int(counter.get_total_flops())


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def require_same(trained: Checkpoint, data: Dataset, checkpoint: Path, dataset: Path) -> None:
    """Raises ValueError unless the checkpoint was trained on this dataset."""
    for name, theirs in (("schema_hash", trained.schema_hash), ("data_sha256", trained.facts.get("data_sha256"))):
        if theirs != data.facts[name]:
            raise ValueError(
                f"{checkpoint}: {name} is {theirs}, {dataset} has {data.facts[name]}: it was trained on other data. "
                f"Run `dvc repro train@{trained.family}`"
            )


def require_unseen(champion: Checkpoint, version: str, data: Dataset) -> None:
    """Raises ValueError where the champion has seen a test day: it would know what it is asked."""
    seen, test = champion.facts.get("train_until"), data.midnight("test_from")
    if seen is not None and test is not None and seen > test:
        raise ValueError(
            f"champion {version} has seen the days until {seen}, and today's test days begin at {test}: it knows the "
            "answers. Name an older version in champion.json, or run a day that is newer than the champion's"
        )


# ---- scores -----------------------------------------------------------------------------------------------------


def predict(trained: Checkpoint, data: Dataset, rows: tuple[int, int]) -> np.ndarray:
    """Click probabilities, float32, of a range of rows."""
    logit_B, _ = score(trained.model, data, rows)
    return trained.calibration(logit_B).numpy()


def predict_translated(champion: Checkpoint, data: Dataset, unseen: pa.Table, rows: tuple[int, int]) -> np.ndarray:
    """The same for a model of another day, by its own vocabularies and its own catalog, as it would serve now.

    unseen  the values that today's vocabularies do not hold (`dataset.unseen`), of these rows at least
    """
    row_B = torch.arange(*rows)
    return predict_shown(champion, data, unseen, row_B, row_B)


def predict_shown(
    champion: Checkpoint, data: Dataset, unseen: pa.Table, row_B: Tensor, item_row_B: Tensor
) -> np.ndarray:
    """Click probabilities, float32, had each row shown the item of another row, with what is known of that item there.

    row_B, item_row_B  int64, rows of `data`
    """
    batch_of = translated(champion, data, unseen)
    log = champion.catalog.rows(data.catalog.item_ids_I)
    log[:SPECIAL] = torch.arange(SPECIAL)
    log = log[data.click_log.long()]
    found = []
    with torch.inference_mode():
        for own, shown in zip(row_B.split(SCORE_BATCH), item_row_B.split(SCORE_BATCH), strict=True):
            logit_B = champion.model(batch_of(own, shown), champion.catalog, log).logit_B
            found.append(champion.calibration(logit_B))
    return torch.cat(found).float().numpy()


def translated(champion: Checkpoint, data: Dataset, unseen: pa.Table) -> Callable[[Tensor, Tensor], Batch]:
    """(rows, rows whose items are shown) -> a batch under the champion's vocabularies and catalog."""
    item_of = champion.catalog.rows(data.catalog.item_ids_I)  # this catalog's rows -> the champion's
    item_of[:SPECIAL] = torch.arange(SPECIAL)
    tables: list[tuple[Feature, Tensor | None]] = []
    mine = {feature.name: feature for feature in data.schema.impression_fields}
    for feature in champion.encoder.schema.impression_fields:
        if feature.name not in mine:
            tables.append((feature, None))  # no longer collected: missing
            continue
        vocab = mine[feature.name].vocab
        raw: Any = list(vocab) if vocab is not None else data.encoder.integers[feature.name].tolist()
        known = encode_column(champion.encoder, feature.name, pa.chunked_array([pa.array(raw, _type(vocab))]))
        tables.append((feature, torch.cat([torch.tensor([0, UNKNOWN]), known])))
    known_to_them = {
        feature.name: (torch.tensor(theirs["row"].to_numpy()), encode_column(champion.encoder, feature.name,
                                                                             theirs["value"]))
        for feature, table in tables
        if table is not None and len(theirs := unseen.filter(pc.equal(unseen["field"], feature.name)))
    }  # fmt: skip

    def batch_of(own: Tensor, shown: Tensor) -> Batch:
        batch, item_B = data.batch(own), item_of[data.columns["item"][shown].long()]
        fields = []
        for feature, table in tables:
            if table is None:
                fields.append(torch.zeros_like(item_B))
                continue
            at = shown if feature.origin == "item" else own
            fields.append(table[data.columns[f"field.{feature.name}"][at].long()])
            if feature.name in known_to_them:
                row, index = known_to_them[feature.name]
                place = torch.searchsorted(row, at).clamp(max=len(row) - 1)
                fields[-1] = torch.where(row[place] == at, index[place], fields[-1])
        fields_BF = torch.stack(fields, 1) if fields else item_B.new_zeros(len(item_B), 0)
        return Batch(fields_BF, item_B, batch.start_B, batch.end_B)

    return batch_of


def _type(vocab: tuple[str, ...] | None) -> pa.DataType:
    return pa.int64() if vocab is None else pa.string()


def _slice(
    config: EvaluateConfig, mask: np.ndarray, labels: np.ndarray, scores: np.ndarray, users: np.ndarray
) -> dict[str, Any]:
    return measure(config, labels[mask], scores[mask], users[mask]) if mask.any() else {"rows": 0, "auc": None}
