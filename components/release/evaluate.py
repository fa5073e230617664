"""evaluate: the ranker on the test days, whole and by slice, beside the oracle and the champion on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from sklearn.metrics import log_loss, roc_auc_score

from components.common.artifacts import new_folder, write_json
from components.common.champion import fetched
from components.common.dataset import UNSEEN, Dataset, encode_column
from components.common.scoring import SCORE_BATCH, score
from components.release.measures import EvaluateConfig, calibration_curve, intervals, measure, roc_points
from models.checkpoint import Checkpoint, checkpoint_hash, load
from models.schema import SPECIAL, UNKNOWN, Batch


def run(
    config: EvaluateConfig, model: str, checkpoint: Path, dataset: Path, champion: Path, output: Path
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
        "model": model,
        "checkpoint_sha256": checkpoint_hash(checkpoint),
        "data_sha256": data.facts["data_sha256"],
        "schema_hash": data.facts["schema_hash"],
        "test": test,
        "slices": {name: _slice(config, mask, labels, scores, users) for name, mask in slices.items()},
        "champion": None,
    }
    columns = {"user_id": data.user_ids(slice(start, end)).numpy(), "label": labels, "score": scores}
    if (serving := fetched(champion)) is not None:
        current, folder = serving
        judge = load(folder)
        require_unseen(judge, current["version"], data)
        theirs = predict_translated(judge, data, pq.read_table(dataset / UNSEEN), (start, end))
        columns["champion_score"] = theirs
        found["champion"] = {
            "version": current["version"],
            "checkpoint_sha256": checkpoint_hash(folder),  # as the gate judged it, and not its refit
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
        roc_points(labels, scores).to_csv(folder / "roc.csv", index=False)
    return found


def summary(found: dict[str, Any]) -> dict[str, str]:
    test = found["test"]
    lines = {
        "test AUC": f"{test['auc']:.4f}, 95% interval {test['auc_low']:.4f} to {test['auc_high']:.4f}",
        "logloss": f"{test['logloss']:.4f}, {test['base_logloss']:.4f} for always predicting the click rate",
        "calibration error": f"{test['calibration_error']:.4f}",
    }
    if "oracle_auc" in test:
        lines["oracle"] = f"AUC {test['oracle_auc']:.4f}, the ceiling of any model"
    if (champion := found["champion"]) is not None:
        difference = champion["difference"]
        lines[f"champion {champion['version']}"] = (
            f"AUC {champion['test']['auc']:.4f}; this one's is {difference['auc']:+.4f} from it, 95% interval "
            f"{difference['auc_low']:+.4f} to {difference['auc_high']:+.4f}"
        )
    return lines


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
    return logit_B.sigmoid().numpy()


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


# ---- slices ----------------------------------------------------------------------------------------------------


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
