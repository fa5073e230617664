"""evaluate: the ranker on the test days, whole and by slice, beside the oracle and the champion on the same rows.

auc                 area under the ROC curve, with a 95% interval: users are resampled, for rows of one user are
                    not independent; where all rows are of one user (data without users), rows are
group_auc           mean of the users' own AUCs, weighted by their impressions; users with one class are left out.
                    Of data without users it is the AUC, of data in which no user has both classes there is none
calibration_error   mean |predicted - observed| over equally filled bins, weighted by rows
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from sklearn.metrics import log_loss, roc_auc_score, roc_curve

from components.common.artifacts import new_folder, write_json
from components.common.dataset import UNSEEN, Dataset, encode_column
from components.release import registry
from models.checkpoint import Checkpoint, checkpoint_hash, load
from models.schema import SPECIAL, UNKNOWN, Batch

SCORE_BATCH = 16_384  # rows scored at once
ROC_POINTS = 200


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """seed              of the resampling
    bootstrap         resamples of users (of rows, where there is one user) behind each interval
    calibration_bins  equally filled bins of the predicted probability
    min_slice_rows    a smaller slice is marked as small, and the gate does not judge it
    """

    seed: int
    bootstrap: int
    calibration_bins: int
    min_slice_rows: int

    def __post_init__(self) -> None:
        for name in ("bootstrap", "calibration_bins", "min_slice_rows"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 2")


def run(
    config: EvaluateConfig, model_name: str, checkpoint: Path, dataset: Path, champion: Path, output: Path
) -> dict[str, Any]:
    """Write evaluation.json, metrics.json (its headline), predictions.parquet, calibration.csv and roc.csv.

    Raises ValueError where the checkpoint was trained under another schema or data, or the test days hold one class.
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
    users = data.columns["user"][start:end].numpy()
    scores = predict(trained, data, (start, end))
    oracle = data.columns["oracle"][start:end].numpy() if "oracle" in data.columns else None
    slices = slice_masks(data)
    test = {**measure(config, labels, scores, users), **intervals(config, labels, users, auc=scores)}
    if oracle is not None:
        test["oracle_auc"] = float(roc_auc_score(labels, oracle))
        test["oracle_logloss"] = float(log_loss(labels, oracle.astype(np.float64)))
    found: dict[str, Any] = {
        "model": model_name,
        "checkpoint_sha256": checkpoint_hash(checkpoint),
        "data_sha256": data.facts["data_sha256"],
        "schema_hash": data.facts["schema_hash"],
        "test": test,
        "slices": {name: _slice(config, mask, labels, scores, users) for name, mask in slices.items()},
        "champion": None,
    }
    columns = {"user_id": data.user_ids(slice(start, end)).numpy(), "label": labels, "score": scores}
    current = registry.current(champion)
    if current is not None:
        with registry.checkpoint(current) as folder:
            theirs = predict_translated(load(folder), data, pq.read_table(dataset / UNSEEN), (start, end))
        columns["champion_score"] = theirs
        found["champion"] = {
            "version": current["version"],
            "checkpoint_sha256": current["checkpoint_sha256"],
            "test": measure(config, labels, theirs, users),
            "slices": {name: _slice(config, mask, labels, theirs, users) for name, mask in slices.items()},
            "difference": intervals(config, labels, users, auc=scores, minus=theirs),
        }
    with new_folder(output) as folder:
        write_json(folder / "evaluation.json", found)
        headline = ("auc", "group_auc", "logloss", "calibration_error", "oracle_auc")
        write_json(folder / "metrics.json", {name: test[name] for name in headline if name in test})
        pq.write_table(pa.table(columns), folder / "predictions.parquet")
        calibration_curve(labels, scores, config.calibration_bins).to_csv(folder / "calibration.csv", index=False)
        _roc(labels, scores).to_csv(folder / "roc.csv", index=False)
    return found


def require_same(trained: Checkpoint, data: Dataset, checkpoint: Path, dataset: Path) -> None:
    """Raises ValueError unless the checkpoint was trained on this dataset."""
    for name, theirs in (("schema_hash", trained.schema_hash), ("data_sha256", trained.facts.get("data_sha256"))):
        if theirs != data.facts[name]:
            raise ValueError(
                f"{checkpoint}: {name} is {theirs}, {dataset} has {data.facts[name]}: it was trained on other data. "
                f"Run `dvc repro train@{trained.family}`"
            )


# ---- scores -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(trained: Checkpoint, data: Dataset, rows: tuple[int, int]) -> np.ndarray:
    """Click probabilities, float32, of a range of rows."""
    found = []
    for start in range(rows[0], rows[1], SCORE_BATCH):
        batch = data.batch(slice(start, min(start + SCORE_BATCH, rows[1])))
        found.append(torch.sigmoid(trained.model(batch, data.catalog, data.click_log).logit_B))
    return torch.cat(found).float().numpy()


def predict_translated(champion: Checkpoint, data: Dataset, unseen: pa.Table, rows: tuple[int, int]) -> np.ndarray:
    """The same for a model of another day, by its own vocabularies and its own catalog, as it would serve now.

    unseen  the values that today's vocabularies do not hold (`dataset.unseen`), of these rows at least
    """
    item_of = champion.catalog.rows(data.catalog.item_ids_I)  # this catalog's rows -> the champion's
    item_of[:SPECIAL] = torch.arange(SPECIAL)
    tables: list[tuple[str | None, torch.Tensor]] = []
    mine = {feature.name: feature for feature in data.schema.impression_fields}
    for feature in champion.encoder.schema.impression_fields:
        if feature.name not in mine:
            tables.append((None, torch.zeros(1, dtype=torch.int64)))  # no longer collected: missing
            continue
        vocab = mine[feature.name].vocab
        raw: Any = list(vocab) if vocab is not None else data.encoder.integers[feature.name].tolist()
        known = encode_column(champion.encoder, feature.name, pa.chunked_array([pa.array(raw, _type(vocab))]))
        tables.append((feature.name, torch.cat([torch.tensor([0, UNKNOWN]), known])))
    known_to_them = {
        name: (theirs["row"].to_numpy(), encode_column(champion.encoder, name, theirs["value"]))
        for name, _ in tables
        if name is not None and len(theirs := unseen.filter(pc.equal(unseen["field"], name)))
    }
    log = item_of[data.click_log.long()]
    found = []
    with torch.inference_mode():
        for start in range(rows[0], rows[1], SCORE_BATCH):
            part = slice(start, min(start + SCORE_BATCH, rows[1]))
            batch = data.batch(part)
            fields = []
            for name, table in tables:
                if name is None:
                    fields.append(torch.zeros_like(batch.item_B))
                    continue
                fields.append(table[data.columns[f"field.{name}"][part].long()])
                if name in known_to_them:
                    row, index = known_to_them[name]
                    first, last = np.searchsorted(row, [part.start, part.stop])
                    fields[-1][row[first:last] - part.start] = index[first:last]
            fields_BF = torch.stack(fields, 1) if fields else batch.item_B.new_zeros(len(batch.item_B), 0)
            theirs = Batch(fields_BF, item_of[batch.item_B], batch.start_B, batch.end_B)
            found.append(torch.sigmoid(champion.model(theirs, champion.catalog, log).logit_B))
    return torch.cat(found).float().numpy()


def _type(vocab: tuple[str, ...] | None) -> pa.DataType:
    return pa.int64() if vocab is None else pa.string()


# ---- figures ----------------------------------------------------------------------------------------------------


def measure(config: EvaluateConfig, labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> dict[str, Any]:
    """rows, label_rate, auc, group_auc, logloss, calibration_error, base_logloss; None where a figure means nothing."""
    curve = calibration_curve(labels, scores, config.calibration_bins)
    both = 0 < labels.mean() < 1
    rate = labels.mean(dtype=np.float64)
    return {
        "rows": len(labels),
        "label_rate": float(rate),
        "auc": float(roc_auc_score(labels, scores)) if both else None,
        "group_auc": group_auc(labels, scores, users),
        "logloss": float(log_loss(labels, scores.astype(np.float64), labels=[0, 1])),
        "base_logloss": float(-rate * np.log(rate) - (1 - rate) * np.log1p(-rate)) if both else 0.0,
        "calibration_error": float(
            (curve["rows"] * (curve["predicted"] - curve["observed"]).abs()).sum() / len(labels)
        ),
    }


def group_auc(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float | None:
    """Users' own AUCs weighted by their impressions; None where no user has both classes."""
    frame = pd.DataFrame({"user": users, "label": labels.astype(np.int64), "score": scores})
    frame["rank"] = frame.groupby("user")["score"].rank()
    frame["clicked_rank"] = frame["rank"] * frame["label"]
    by_user = frame.groupby("user").agg(n=("label", "size"), p=("label", "sum"), ranks=("clicked_rank", "sum"))
    by_user = by_user[(by_user.p > 0) & (by_user.p < by_user.n)]
    if by_user.empty:
        return None
    area = (by_user.ranks - by_user.p * (by_user.p + 1) / 2) / (by_user.p * (by_user.n - by_user.p))
    return float((area * by_user.n).sum() / by_user.n.sum())


def calibration_curve(labels: np.ndarray, scores: np.ndarray, bins: int) -> pd.DataFrame:
    """predicted, observed, rows of equally filled bins of the predicted probability."""
    order = np.argsort(scores, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return pd.DataFrame(
        {
            "predicted": [scores[part].mean(dtype=np.float64) for part in parts],
            "observed": [labels[part].mean(dtype=np.float64) for part in parts],
            "rows": [len(part) for part in parts],
        }
    )


def intervals(
    config: EvaluateConfig, labels: np.ndarray, users: np.ndarray, *, auc: np.ndarray, minus: np.ndarray | None = None
) -> dict[str, Any]:
    """95% interval of the AUC, or of its difference to another score on the same rows.

    Users are resampled; rows where all are of one user.
    """
    rng = np.random.default_rng(config.seed)
    distinct, user = np.unique(users, return_inverse=True)
    if len(distinct) == 1:
        user = np.arange(len(users))
    found = []
    for _ in range(config.bootstrap):
        weights = rng.poisson(1, user.max() + 1)[user]  # as many resampled users as there are, on average
        kept = weights > 0
        if not labels[kept].any() or labels[kept].all():
            continue
        value = roc_auc_score(labels[kept], auc[kept], sample_weight=weights[kept])
        if minus is not None:
            value -= roc_auc_score(labels[kept], minus[kept], sample_weight=weights[kept])
        found.append(value)
    if not found:
        raise ValueError(
            f"evaluate.bootstrap is {config.bootstrap}: no resample of {user.max() + 1} users held both classes; "
            "raise it, or give more test days"
        )
    low, high = (float(v) for v in np.quantile(found, [0.025, 0.975]))
    if minus is None:
        return {"auc_low": low, "auc_high": high}
    whole = float(roc_auc_score(labels, auc) - roc_auc_score(labels, minus))
    return {"auc": whole, "auc_low": low, "auc_high": high}


def slice_masks(data: Dataset) -> dict[str, np.ndarray]:
    """Test rows by what is hard about them: bool [rows] each."""
    train, test = (slice(*data.splits[name]) for name in ("train", "test"))
    item, user = data.columns["item"].long(), data.columns["user"].long()
    seen_item = torch.zeros(len(data.catalog), dtype=torch.bool)
    seen_item[item[train]] = True
    seen_user = torch.zeros(int(user.max()) + 1, dtype=torch.bool)
    seen_user[user[train]] = True
    length = data.columns["length"][test].long()
    masks = {
        "new items": ~seen_item[item[test]],
        "new users": ~seen_user[user[test]],
        "history 0": length == 0,
        "history 1-4": (length >= 1) & (length <= 4),
        "history 5-19": (length >= 5) & (length <= 19),
        "history 20+": length >= 20,
    }
    if data.catalog.vector_IE is not None:
        masks["no item vector"] = ~(data.catalog.vector_IE != 0).any(1)[item[test]]
    return {name: mask.numpy() for name, mask in masks.items()}


def _slice(
    config: EvaluateConfig, mask: np.ndarray, labels: np.ndarray, scores: np.ndarray, users: np.ndarray
) -> dict[str, Any]:
    if not mask.any():
        return {"rows": 0, "small": True, "auc": None}
    return {
        **measure(config, labels[mask], scores[mask], users[mask]),
        "small": int(mask.sum()) < config.min_slice_rows,
    }


def _roc(labels: np.ndarray, scores: np.ndarray) -> pd.DataFrame:
    false, true, _ = roc_curve(labels, scores)
    at = np.linspace(0, 1, ROC_POINTS)
    return pd.DataFrame({"false_positive_rate": at, "true_positive_rate": np.interp(at, false, true)})
