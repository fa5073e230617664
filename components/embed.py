"""embed: the texts and images of an item -> one vector of `dim` float32.

Each modality is standardised and scaled to unit length; an item without it holds zeros there, which after
standardising is the mean item. The modalities lie side by side, PCA takes them to `dim`, and all of it is fitted on
items shown in the training days alone. A source with texts and no text vectors gets TF-IDF and SVD.

The fit is saved, so that new items are embedded without a refit, and its hash is the embedding's version.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.artifacts import file_hash, new_folder, write_json
from components.contracts import Canonical, vector_matrix
from components.splits import SplitConfig, rows_by_day, split_days
from components.validate import require

FIT_BATCH = 8192  # items transformed at once


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """dim            width of the fused vector
    text_features  TF-IDF terms kept, where texts must be embedded here
    text_dim       width of their SVD
    seed           of the SVD
    """

    dim: int
    text_features: int
    text_dim: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("dim", "text_features", "text_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def run(config: EmbedConfig, split: SplitConfig, canonical: Path, validation: Path, output: Path) -> dict[str, Any]:
    """Write item_embedding.parquet (item_id, created_at, embedding, has_NAME…), fit.safetensors and fit.json."""
    from safetensors.numpy import save_file

    require(validation, canonical)
    data = Canonical(canonical)
    items = data.items()
    shown = training_items(data, split)
    train = pc.is_in(items["item_id"], value_set=shown).to_numpy()
    if not train.any():
        raise ValueError("embed: no item is shown in the training days; check ingest and split in params.yaml")
    vectors = {name: _matrix(name, table, items["item_id"]) for name, table in data.modalities().items()}
    fit: dict[str, np.ndarray] = {}
    if "text" not in vectors and items["text"].null_count < len(items):
        vectors["text"], fit["text.idf"], fit["text.svd"], terms = embed_texts(config, items["text"], train)
    else:
        terms = []
    if not vectors:
        raise ValueError(f"embed: {canonical} has neither vectors nor texts; give the source at least one modality")
    blocks: list[np.ndarray] = []
    for name, x_IE in sorted(vectors.items()):
        scaled_IE, fit[f"{name}.mean"], fit[f"{name}.std"] = standardise(x_IE, train)
        blocks.append(scaled_IE)
    joint_IE = np.concatenate(blocks, axis=1)
    most = min(joint_IE.shape[1], int(train.sum()))
    if config.dim > most:
        raise ValueError(
            f"embed.dim is {config.dim}, but {joint_IE.shape[1]} values of {int(train.sum())} training items "
            f"span at most {most} dimensions; lower it to {most} or less"
        )
    embedding_IE, pca, explained = reduce(config, joint_IE, train)
    fit |= pca
    has = {f"has_{name}": ~np.isnan(x_IE[:, 0]) for name, x_IE in sorted(vectors.items())}
    nothing = ~np.any(list(has.values()), axis=0)
    with new_folder(output) as folder:
        save_file({name: np.ascontiguousarray(values) for name, values in fit.items()}, folder / "fit.safetensors")
        facts = {
            "version": file_hash(folder / "fit.safetensors")[:16],
            "dim": config.dim,
            "modalities": sorted(vectors),
            "explained_variance": explained,
            "items": len(items),
            "training_items": int(train.sum()),
            "missing": {name.removeprefix("has_"): int((~mask).sum()) for name, mask in has.items()},
            "missing_all": int(nothing.sum()),
        }
        write_json(folder / "fit.json", {**facts, "text_terms": terms})
        table = pa.table(
            {
                "item_id": items["item_id"],
                "created_at": items["created_at"],
                # An item with no modality at all has no vector: null, and never the mean item's.
                "embedding": _lists(embedding_IE, nothing),
                **has,
            }
        )
        pq.write_table(table, folder / "item_embedding.parquet")
    return facts


def training_items(data: Canonical, split: SplitConfig) -> pa.Array:
    """Ids of the items shown in the training days."""
    events = data.events()
    rows = rows_by_day(events)
    cut = split_days(list(rows), list(rows.values()), split)
    return pc.unique(events["item_id"].slice(0, cut.valid_start))


def standardise(x_IE: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Zero mean and unit variance over the training items, then unit length; NaN rows (missing) become zeros."""
    known = train & ~np.isnan(x_IE[:, 0])
    if not known.any():
        known = ~np.isnan(x_IE[:, 0])
    mean_E, std_E = x_IE[known].mean(axis=0), x_IE[known].std(axis=0)
    std_E[std_E == 0] = 1
    scaled_IE = np.nan_to_num((x_IE - mean_E) / std_E)
    norm_I1 = np.linalg.norm(scaled_IE, axis=1, keepdims=True)
    return scaled_IE / np.where(norm_I1 > 0, norm_I1, 1), mean_E, std_E


def reduce(
    config: EmbedConfig, joint_IE: np.ndarray, train: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    """PCA to `dim` fitted on the training items. Returns vectors, the fit and the share of variance kept.

    A vector is (joint - pca.mean) · pca.componentsᵀ / pca.scale.
    """
    from sklearn.decomposition import PCA

    pca = PCA(config.dim, svd_solver="covariance_eigh").fit(joint_IE[train])
    chunks = [pca.transform(joint_IE[i : i + FIT_BATCH]) for i in range(0, len(joint_IE), FIT_BATCH)]
    embedding_IE = np.concatenate(chunks).astype(np.float32)
    # One scale for all, so that the vectors enter a network with unit variance and keep their directions.
    scale = embedding_IE[train].std() or np.float32(1)
    fit = {"pca.mean": pca.mean_, "pca.components": pca.components_, "pca.scale": np.array([scale])}
    return embedding_IE / scale, fit, float(pca.explained_variance_ratio_.sum())


def embed_texts(
    config: EmbedConfig, texts: pa.ChunkedArray, train: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """TF-IDF and SVD, fitted on the training items' texts. Items without a text are NaN rows."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    known = texts.is_valid().to_numpy()
    words = texts.fill_null("").to_numpy(zero_copy_only=False)
    tfidf = TfidfVectorizer(max_features=config.text_features, sublinear_tf=True, stop_words="english", min_df=2)
    try:
        fitted = tfidf.fit_transform(words[train & known])
        terms = fitted.shape[1]
    except ValueError:  # scikit-learn found no term
        terms = 0
    if terms < 2:
        raise ValueError(
            f"embed: the training items' texts share {terms} term(s), {int((train & known).sum())} items have a text; "
            "SVD needs 2 terms: give the source longer texts, or text vectors"
        )
    width = min(config.text_dim, min(fitted.shape) - 1)
    svd = TruncatedSVD(width, random_state=config.seed).fit(fitted)
    vectors_IE = np.full((len(words), width), np.nan, dtype=np.float64)
    vectors_IE[known] = svd.transform(tfidf.transform(words[known]))
    return vectors_IE, tfidf.idf_, svd.components_, [str(term) for term in tfidf.get_feature_names_out()]


def _matrix(name: str, table: pa.Table, item_ids: pa.ChunkedArray) -> np.ndarray:
    """float64 [items, width] in the order of `item_ids`; NaN rows where the modality is missing."""
    table = table.filter(pc.is_valid(table["vector"]))
    fixed = vector_matrix(table["vector"], f"modality {name}")
    values = fixed.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    row = pc.index_in(item_ids, value_set=table["item_id"].combine_chunks()).fill_null(-1).to_numpy()
    found = np.full((len(item_ids), values.shape[1]), np.nan)
    found[row >= 0] = values[row[row >= 0]]
    return found


def _lists(x_IE: np.ndarray, null: np.ndarray) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(x_IE, dtype=np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, x_IE.shape[1], mask=pa.array(null))
