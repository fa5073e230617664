"""embed: the texts and images of an item -> one vector of `dim` float32.

Each modality is standardised and scaled to unit length; an item without it holds zeros there, which after
standardising is the mean item. The modalities lie side by side, PCA takes them to `dim`, and all of it is fitted on
items shown in the training days alone. A source with texts and no text vectors gets TF-IDF and SVD.

The fit is saved, and its hash is the embedding's version. `embed.fit` takes an earlier one: new items are embedded
without a refit, and vectors of two versions never meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.artifacts import file_hash, new_folder, read_json, write_json
from components.contracts import Canonical, vector_matrix
from components.splits import SplitConfig, split_rows
from components.validate import require

FIT = "fit.safetensors"
FIT_BATCH = 8192  # items standardised at once
TFIDF: dict[str, Any] = {"sublinear_tf": True, "stop_words": "english"}


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """dim            width of the fused vector
    text_features  TF-IDF terms kept, where texts must be embedded here
    text_dim       width of their SVD
    seed           of the SVD
    fit            null fits anew, which is a new version of the vectors; a copy of an earlier output of this stage
                   embeds by the fit in it, new items too, and keeps its version
    """

    dim: int
    text_features: int
    text_dim: int
    seed: int
    fit: str | None

    def __post_init__(self) -> None:
        for name in ("dim", "text_features", "text_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def run(config: EmbedConfig, split: SplitConfig, canonical: Path, validation: Path, output: Path) -> dict[str, Any]:
    """Write item_embedding.parquet (item_id, created_at, embedding, has_NAME…), fit.safetensors and fit.json.

    Without any vector or text every embedding is null, and models do without the item vector.
    """
    from safetensors.numpy import save_file

    require(validation, canonical)
    data = Canonical(canonical)
    items = data.items()
    train = pc.is_in(items["item_id"], value_set=training_items(data, split)).to_numpy()
    if not train.any():
        raise ValueError("embed: no item is shown in the training days; check ingest and split in params.yaml")
    vectors = {name: _matrix(name, table, items["item_id"]) for name, table in data.modalities().items()}
    words = None
    if "text" not in vectors and items["text"].null_count < len(items):
        words = items["text"]
    if config.fit is None:
        fit = fit_texts(config, words, train) if words is not None else Fit({}, [], 1.0)
    else:
        fit = load_fit(Path(config.fit), config.dim)
    if words is not None:
        vectors["text"] = embed_texts(fit, words)
    if config.fit is None and vectors:
        fit = fit_fusion(config, fit, vectors, train)
    if fit.modalities != sorted(vectors):
        raise ValueError(
            f"embed.fit: {config.fit} was fitted on {fit.modalities}, {canonical} has {sorted(vectors)}; "
            "set embed.fit to null, which fits anew"
        )
    has = {f"has_{name}": ~np.isnan(x_IE[:, 0]) for name, x_IE in sorted(vectors.items())}
    nothing = ~np.any(list(has.values()), axis=0) if has else np.ones(len(items), dtype=bool)
    with new_folder(output) as folder:
        save_file({name: np.ascontiguousarray(values) for name, values in fit.arrays.items()}, folder / FIT)
        facts = {
            "version": file_hash(folder / FIT)[:16],
            "dim": config.dim if vectors else 0,
            "modalities": sorted(vectors),
            "explained_variance": fit.explained,
            "items": len(items),
            "training_items": int(train.sum()),
            "missing": {name.removeprefix("has_"): int((~mask).sum()) for name, mask in has.items()},
            "missing_all": int(nothing.sum()),
        }
        write_json(folder / "fit.json", {**facts, "text_terms": fit.terms})
        embedding = pa.nulls(len(items), pa.list_(pa.float32(), config.dim))
        table = pa.table(
            {
                "item_id": items["item_id"],
                "created_at": items["created_at"],
                # An item with no modality at all has no vector: null, and never the mean item's.
                "embedding": _lists(fuse(fit, vectors), nothing) if vectors else embedding,
                **has,
            }
        )
        pq.write_table(table, folder / "item_embedding.parquet")
    return facts


def training_items(data: Canonical, split: SplitConfig) -> pa.Array:
    """Ids of the items shown in the training days."""
    events = data.events()
    return pc.unique(events["item_id"].slice(0, split_rows(events, split).valid_start))


@dataclass(frozen=True)
class Fit:
    """What makes vectors of one version.

    arrays     NAME.mean, NAME.std of each modality; pca.mean, pca.components, pca.scale; text.idf, text.svd of terms
    terms      of the TF-IDF, where texts are embedded here
    explained  share of the training items' variance that the vectors keep
    """

    arrays: dict[str, np.ndarray]
    terms: list[str]
    explained: float

    @property
    def modalities(self) -> list[str]:
        return sorted(name.removesuffix(".std") for name in self.arrays if name.endswith(".std"))


def load_fit(folder: Path, dim: int) -> Fit:
    """The fit in an output of this stage. Raises ValueError where it is none, or of another width."""
    from safetensors.numpy import load_file

    facts = read_json(folder / "fit.json", "embed")
    if not (folder / FIT).is_file() or file_hash(folder / FIT)[:16] != facts["version"]:
        raise ValueError(f"embed.fit: {folder} holds no {FIT} of version {facts['version']}; copy the folder whole")
    if facts["dim"] != dim:
        raise ValueError(f"embed.dim is {dim}, but the fit of {folder} has {facts['dim']}; set the one to the other")
    return Fit(load_file(folder / FIT), facts["text_terms"], facts["explained_variance"])


def fit_fusion(config: EmbedConfig, fit: Fit, vectors: dict[str, np.ndarray], train: np.ndarray) -> Fit:
    """`fit` with the standardisation of each modality and the PCA of all, over the training items.

    PCA by the eigenvectors of the covariance, which is summed in chunks: no joint matrix is ever made.
    """
    arrays = dict(fit.arrays)
    for name, x_IE in sorted(vectors.items()):
        known = train & ~np.isnan(x_IE[:, 0])
        if not known.any():
            known = ~np.isnan(x_IE[:, 0])
        rows = np.flatnonzero(known)
        mean_E = sum(x_BE.sum(axis=0) for x_BE in _chunks(x_IE, rows)) / len(rows)
        std_E = np.sqrt(sum(((x_BE - mean_E) ** 2).sum(axis=0) for x_BE in _chunks(x_IE, rows)) / len(rows))
        arrays[f"{name}.mean"], arrays[f"{name}.std"] = mean_E, np.where(std_E == 0, 1, std_E)
    width = sum(x_IE.shape[1] for x_IE in vectors.values())
    count = int(train.sum())
    if config.dim > (most := min(width, count)):
        raise ValueError(
            f"embed.dim is {config.dim}, but {width} values of {count} training items "
            f"span at most {most} dimensions; lower it to {most} or less"
        )
    sum_E, products_EE = np.zeros(width), np.zeros((width, width))
    for joint_BE in _joint(arrays, vectors, np.flatnonzero(train)):
        sum_E += joint_BE.sum(axis=0)
        products_EE += joint_BE.T @ joint_BE
    mean_E = sum_E / count
    variance_E, axes_EE = np.linalg.eigh(products_EE / count - np.outer(mean_E, mean_E))
    components_DE = axes_EE.T[::-1][: config.dim]
    strongest_D = np.abs(components_DE).argmax(axis=1)  # of an axis and its opposite one is chosen
    components_DE = components_DE * np.sign(components_DE[np.arange(config.dim), strongest_D])[:, None]
    # One scale for all, so that the vectors enter a network with unit variance and keep their directions.
    scale = np.sqrt(max(variance_E[::-1][: config.dim].mean(), 0)) or 1.0
    arrays |= {"pca.mean": mean_E, "pca.components": components_DE, "pca.scale": np.array([scale])}
    return Fit(arrays, fit.terms, float(variance_E[::-1][: config.dim].sum() / variance_E.sum()))


def fuse(fit: Fit, vectors: dict[str, np.ndarray]) -> np.ndarray:
    """float32 [items, dim]: (joint - pca.mean) · pca.componentsᵀ / pca.scale."""
    mean_E, components_DE, scale = (fit.arrays[f"pca.{name}"] for name in ("mean", "components", "scale"))
    rows = np.arange(len(next(iter(vectors.values()))))
    chunks = [(joint_BE - mean_E) @ components_DE.T / scale for joint_BE in _joint(fit.arrays, vectors, rows)]
    return np.concatenate(chunks).astype(np.float32)


def _joint(arrays: dict[str, np.ndarray], vectors: dict[str, np.ndarray], rows: np.ndarray) -> Iterator[np.ndarray]:
    """float64 [FIT_BATCH, width]: the modalities side by side, each standardised and of unit length or zero."""
    for parts in zip(*(_chunks(x_IE, rows) for _, x_IE in sorted(vectors.items())), strict=True):
        blocks = []
        for name, x_BE in zip(sorted(vectors), parts, strict=True):
            scaled_BE = np.nan_to_num((x_BE - arrays[f"{name}.mean"]) / arrays[f"{name}.std"])
            norm_B1 = np.linalg.norm(scaled_BE, axis=1, keepdims=True)
            blocks.append(scaled_BE / np.where(norm_B1 > 0, norm_B1, 1))
        yield np.concatenate(blocks, axis=1)


def _chunks(x_IE: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """float64, FIT_BATCH of the rows at a time."""
    for start in range(0, len(rows), FIT_BATCH):
        yield x_IE[rows[start : start + FIT_BATCH]].astype(np.float64)


def fit_texts(config: EmbedConfig, texts: pa.ChunkedArray, train: np.ndarray) -> Fit:
    """TF-IDF and SVD, fitted on the training items' texts. Raises ValueError where those share too few words."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    known = train & texts.is_valid().to_numpy()
    tfidf = TfidfVectorizer(max_features=config.text_features, min_df=2, **TFIDF)
    try:
        fitted = tfidf.fit_transform(texts.fill_null("").to_numpy(zero_copy_only=False)[known])
        terms = fitted.shape[1]
    except ValueError:  # scikit-learn found no term
        terms = 0
    if terms < 2:
        raise ValueError(
            f"embed: the training items' texts share {terms} term(s), {int(known.sum())} items have a text; "
            "SVD needs 2 terms: give the source longer texts, or text vectors"
        )
    svd = TruncatedSVD(min(config.text_dim, min(fitted.shape) - 1), random_state=config.seed).fit(fitted)
    arrays = {"text.idf": tfidf.idf_, "text.svd": svd.components_}
    return Fit(arrays, [str(term) for term in tfidf.get_feature_names_out()], 1.0)


def embed_texts(fit: Fit, texts: pa.ChunkedArray) -> np.ndarray:
    """float64 [items, width] by the fit's terms. Items without a text are NaN rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not fit.terms:
        raise ValueError("embed.fit: that fit knows no words, and the items have texts; set embed.fit to null")
    tfidf = TfidfVectorizer(vocabulary=fit.terms, **TFIDF)
    tfidf.idf_ = fit.arrays["text.idf"]
    known = texts.is_valid().to_numpy()
    vectors_IE = np.full((len(texts), len(fit.arrays["text.svd"])), np.nan)
    words = texts.drop_null().to_numpy(zero_copy_only=False)
    vectors_IE[known] = tfidf.transform(words) @ fit.arrays["text.svd"].T
    return vectors_IE


def _matrix(name: str, table: pa.Table, item_ids: pa.ChunkedArray) -> np.ndarray:
    """float32 [items, width] in the order of `item_ids`; NaN rows where the modality is missing."""
    table = table.filter(pc.is_valid(table["vector"]))
    fixed = vector_matrix(table["vector"], f"modality {name}")
    values = fixed.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    row = pc.index_in(item_ids, value_set=table["item_id"].combine_chunks()).fill_null(-1).to_numpy()
    found = np.full((len(item_ids), values.shape[1]), np.nan, dtype=np.float32)
    found[row >= 0] = values[row[row >= 0]]
    return found


def _lists(x_IE: np.ndarray, null: np.ndarray) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(x_IE, dtype=np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, x_IE.shape[1], mask=pa.array(null))
