"""embed: the texts and images of an item -> one vector of `dim` float32.

Each modality is standardised and scaled to unit length; an item without it has zeros there, which after standardising
is the mean item. The modalities are put side by side, and PCA reduces them to `dim`. All of it is fitted only on items
shown in the training days.

Vectors that the source gives are taken as they are. Texts without vectors are embedded by TF-IDF and SVD, or by
`text_encoder`; if no item has a text, their titles are. Pictures are embedded by their colours and edges, or by
`image_encoder`.

The fit is saved with the names of the encoders that it was made for, and its hash is the embedding's version.
`embed.fit` takes an earlier one: new items are embedded without a refit, and vectors of two versions are never mixed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.common.artifacts import file_hash, new_folder, read_json, write_json
from components.common.contracts import IMAGE, Canonical, vector_matrix
from components.common.splits import SplitConfig, split_rows
from components.common.verdict import require
from components.data.pictures import decode
from components.features.encoders import Encoder, image_encoder, text_encoder

if TYPE_CHECKING:
    from PIL.Image import Image

FIT = "fit.safetensors"
FIT_BATCH = 8192  # items standardised at once
TEXT_BATCH = 1024  # texts encoded at once
GIVEN, COUNTED, TITLES = "vectors of the source", "TF-IDF", " of titles"
TFIDF: dict[str, Any] = {"sublinear_tf": True, "stop_words": "english"}


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """dim            width of the fused vector
    text_features  TF-IDF terms kept, if the source has texts or titles but no text vectors
    text_dim       width of the SVD of the TF-IDF matrix
    text_encoder   used instead of TF-IDF and SVD: a model of sentence-transformers, by folder or name on Hugging Face
    image_encoder  used instead of colours and edges: a model of open_clip, by folder or name on Hugging Face.
                   DVC watches neither model: after a change, run `dvc repro --force --single-item embed`
    seed           of the SVD
    fit            null: fit again, which gives the vectors a new version. A path to a copy of an earlier output of this
                   stage: embed with its fit, new items too, and keep its version
    """

    dim: int
    text_features: int
    text_dim: int
    text_encoder: str | None
    image_encoder: str | None
    seed: int
    fit: str | None

    def __post_init__(self) -> None:
        for name in ("dim", "text_features", "text_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def run(config: EmbedConfig, split: SplitConfig, canonical: Path, validation: Path, output: Path) -> dict[str, Any]:
    """Write item_embedding.parquet (item_id, created_at, embedding, has_NAME…), fit.safetensors and fit.json.

    Without any vector, text or picture every embedding is null, and models do without the item vector.
    """
    require(validation, canonical)
    data = Canonical(canonical)
    items = data.items()
    train = pc.is_in(items["item_id"], value_set=training_items(data, split)).to_numpy()
    if not train.any():
        raise ValueError("embed: no item is shown in the training days; check ingest and split in params.yaml")
    vectors = {name: _matrix(name, table, items["item_id"]) for name, table in data.modalities().items()}
    earlier = load_fit(Path(config.fit), config.dim) if config.fit is not None else None
    texts, of_titles = choose_texts(config, items, train, earlier) if "text" not in vectors else (None, "")
    pictures = data.count_pictures()
    for field, given in (("text_encoder", texts is not None), ("image_encoder", pictures)):
        if (model := getattr(config, field)) is not None and not given:
            what = field.removesuffix("_encoder")
            raise ValueError(
                f"embed.{field} is {model!r}, but {canonical} has no {what} to encode, or {what} vectors already; "
                "set it to null"
            )
    sentences = text_encoder(config.text_encoder) if config.text_encoder is not None else None
    images = image_encoder(config.image_encoder) if pictures else None
    encoders = dict.fromkeys(vectors, GIVEN)
    if texts is not None:
        encoders["text"] = (sentences.name if sentences else COUNTED) + of_titles
    if images is not None:
        encoders[IMAGE] = images.name
    if earlier is not None and earlier.encoders != encoders:
        raise ValueError(
            f"embed.fit: {config.fit} was fitted on {_listed(earlier.encoders)}, now it is {_listed(encoders)}; "
            "set embed.fit to null to fit again, or bring back what it was fitted on"
        )
    fit = earlier or Fit({}, [], encoders, 1.0)
    if texts is not None and sentences is not None:
        vectors["text"] = encode_texts(sentences, texts)
    elif texts is not None:
        fit = earlier or fit_texts(config, fit, texts, train)
        vectors["text"] = embed_texts(fit, texts)
    if images is not None:
        vectors[IMAGE] = encode_pictures(images, data, items["item_id"])
    for name, x_IE in vectors.items() if earlier is not None else ():
        if x_IE.shape[1] != (width := len(fit.arrays[f"{name}.mean"])):
            raise ValueError(
                f"embed.fit: vectors of {name} have {x_IE.shape[1]} values here, {config.fit} was fitted on {width}; "
                "set embed.fit to null to fit again, or bring back vectors of that length"
            )
    if earlier is None and vectors:
        fit = fit_fusion(config, fit, vectors, train)
    has = {f"has_{name}": ~np.isnan(x_IE[:, 0]) for name, x_IE in sorted(vectors.items())}
    nothing = ~np.any(list(has.values()), axis=0) if has else np.ones(len(items), dtype=bool)
    with new_folder(output) as folder:
        save_fit(fit, folder / FIT)
        facts: dict[str, Any] = {
            "version": file_hash(folder / FIT)[:16],
            "dim": config.dim if vectors else 0,
            "modalities": sorted(vectors),
            "encoders": encoders,
            "explained_variance": fit.explained,
            "items": len(items),
            "training_items": int(train.sum()),
            "missing": {name.removeprefix("has_"): int((~mask).sum()) for name, mask in has.items()},
            "missing_all": int(nothing.sum()),
        }
        write_json(folder / "fit.json", facts)
        embedding = pa.nulls(len(items), pa.list_(pa.float32(), config.dim))
        table = pa.table(
            {
                "item_id": items["item_id"],
                "created_at": items["created_at"],
                # An item with no modality at all has no vector: null, and not the mean item's.
                "embedding": _lists(fuse(fit, vectors), nothing) if vectors else embedding,
                **has,
            }
        )
        pq.write_table(table, folder / "item_embedding.parquet")
    return facts


def summary(facts: dict[str, Any]) -> dict[str, str]:
    """What was embedded, for a person."""
    items, missing = facts["items"], facts["missing"]
    if not missing:
        return {"items": f"{items:,}", "vector": "none: no vectors, texts or pictures, and titles share too few words"}
    return {
        "items": f"{items:,}, of which {facts['missing_all']:,} have no vector",
        "vector": f"{facts['dim']} values, {facts['explained_variance']:.1%} of the training items' variance",
        **{name: f"{facts['encoders'][name]}, {items - count:,} of {items:,} items" for name, count in missing.items()},
    }


def training_items(data: Canonical, split: SplitConfig) -> pa.Array:
    """Ids of the items shown in the training days."""
    events = data.training_events()
    return pc.unique(events["item_id"].slice(0, split_rows(events, split).valid_start))


@dataclass(frozen=True)
class Fit:
    """What makes vectors of one version.

    arrays     NAME.mean, NAME.std of each modality; pca.mean, pca.components, pca.scale; text.idf, text.svd of terms
    terms      of the TF-IDF, where texts are embedded by it
    encoders   modality -> what made its vectors
    explained  share of the training items' variance that the vectors keep
    """

    arrays: dict[str, np.ndarray]
    terms: list[str]
    encoders: dict[str, str]
    explained: float


def save_fit(fit: Fit, file: Path) -> None:
    """Everything that is needed to embed is in this one file, so its hash is the fit's identity."""
    from safetensors.numpy import save_file

    about = {"terms": fit.terms, "encoders": fit.encoders}
    arrays = {name: np.ascontiguousarray(values) for name, values in fit.arrays.items()}
    save_file(arrays, file, {"fit": json.dumps(about, sort_keys=True)})


def load_fit(folder: Path, dim: int) -> Fit:
    """The fit in an output of this stage. Raises ValueError if there is none, or if it has another width."""
    from safetensors import safe_open

    facts = read_json(folder / "fit.json", "embed")
    if not (folder / FIT).is_file() or file_hash(folder / FIT)[:16] != facts["version"]:
        raise ValueError(f"embed.fit: {folder} holds no {FIT} of version {facts['version']}; copy the folder whole")
    if facts["dim"] != dim:
        raise ValueError(f"embed.dim is {dim}, but the fit of {folder} has {facts['dim']}; set the one to the other")
    with safe_open(folder / FIT, "np") as opened:
        about = json.loads((opened.metadata() or {}).get("fit", "{}"))
        if not about:
            raise ValueError(f"embed.fit: {folder} does not say what encoded its items; set embed.fit to null")
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    return Fit(arrays, about["terms"], about["encoders"], facts["explained_variance"])


def fit_fusion(config: EmbedConfig, fit: Fit, vectors: dict[str, np.ndarray], train: np.ndarray) -> Fit:
    """`fit` with the standardisation of each modality and the PCA of all, over the training items.

    PCA by the eigenvectors of the covariance, which is summed in chunks: no joint matrix is ever made.
    """
    arrays = dict(fit.arrays)
    for name, x_IE in sorted(vectors.items()):
        rows = np.flatnonzero(train & ~np.isnan(x_IE[:, 0]))
        if not len(rows):  # not in the training days: it is taken as it is, and later items do not change the fit
            arrays[f"{name}.mean"], arrays[f"{name}.std"] = np.zeros(x_IE.shape[1]), np.ones(x_IE.shape[1])
            continue
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
    covariance_EE = products_EE / count - np.outer(mean_E, mean_E)
    if np.trace(covariance_EE) == 0:
        have = {name: int((train & ~np.isnan(x_IE[:, 0])).sum()) for name, x_IE in sorted(vectors.items())}
        raise ValueError(
            f"embed: the {count} training items have the same vector or none ({have}), so nothing can be fitted; give "
            "items that the training days show vectors, texts or pictures of their own, or give none to any item"
        )
    variance_E, axes_EE = np.linalg.eigh(covariance_EE)
    components_DE = axes_EE.T[::-1][: config.dim]
    strongest_D = np.abs(components_DE).argmax(axis=1)  # an axis and its opposite are equal: choose one
    components_DE = components_DE * np.sign(components_DE[np.arange(config.dim), strongest_D])[:, None]
    # One scale for all, so that the vectors enter a network with unit variance and keep their directions.
    scale = np.sqrt(max(variance_E[::-1][: config.dim].mean(), 0)) or 1.0
    arrays |= {"pca.mean": mean_E, "pca.components": components_DE, "pca.scale": np.array([scale])}
    explained = float(variance_E[::-1][: config.dim].sum() / variance_E.sum())
    return replace(fit, arrays=arrays, explained=explained)


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


# ---- texts and pictures -----------------------------------------------------------------------------------------


def choose_texts(
    config: EmbedConfig, items: pa.Table, train: np.ndarray, earlier: Fit | None
) -> tuple[pa.ChunkedArray | None, str]:
    """The items' texts, and what to add to their encoder's name. If no item has a text, their titles, if an earlier fit
    was made of titles or, without one, if titles have something in common; else None."""
    if items["text"].null_count < len(items):
        return items["text"], ""
    is_id = pc.equal(items["title"], items["item_id"].cast(pa.string()))  # what some sources write without a title
    titles = pc.if_else(is_id, pa.scalar(None, pa.string()), items["title"])
    if earlier is not None:
        usable = earlier.encoders.get("text", "").endswith(TITLES)
    elif config.text_encoder is not None:
        usable = titles.null_count < len(titles)
    else:
        usable = len(_tfidf(config, titles, train)[1]) > 1
    return (titles, TITLES) if usable else (None, "")


def fit_texts(config: EmbedConfig, fit: Fit, texts: pa.ChunkedArray, train: np.ndarray) -> Fit:
    """`fit` with TF-IDF and SVD, fitted on the training items' texts.

    Raises ValueError if these share too few words.
    """
    from sklearn.decomposition import TruncatedSVD

    tfidf_NT, terms, idf_T = _tfidf(config, texts, train)
    if len(terms) < 2:
        known = int((train & texts.is_valid().to_numpy()).sum())
        raise ValueError(
            f"embed: the training items' texts share {len(terms)} term(s), {known} items have a text; "
            "SVD needs 2 terms: give the source longer texts, or text vectors"
        )
    svd = TruncatedSVD(min(config.text_dim, min(tfidf_NT.shape) - 1), random_state=config.seed).fit(tfidf_NT)
    return replace(fit, arrays={"text.idf": idf_T, "text.svd": svd.components_}, terms=terms)


def _tfidf(config: EmbedConfig, texts: pa.ChunkedArray, train: np.ndarray) -> tuple[Any, list[str], np.ndarray]:
    """TF-IDF of the training items' texts, sparse [N, T]; the T terms that two or more of them have; their IDF [T]."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    known = train & texts.is_valid().to_numpy()
    tfidf = TfidfVectorizer(max_features=config.text_features, min_df=2, **TFIDF)
    try:
        tfidf_NT = tfidf.fit_transform(texts.fill_null("").to_numpy(zero_copy_only=False)[known])
    except ValueError:  # scikit-learn found no term
        return None, [], np.empty(0)
    return tfidf_NT, [str(term) for term in tfidf.get_feature_names_out()], tfidf.idf_


def embed_texts(fit: Fit, texts: pa.ChunkedArray) -> np.ndarray:
    """float64 [items, width] by the fit's terms. Items without a text are NaN rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    tfidf = TfidfVectorizer(vocabulary=fit.terms, **TFIDF)
    tfidf.idf_ = fit.arrays["text.idf"]
    known = texts.is_valid().to_numpy()
    vectors_IE = np.full((len(texts), len(fit.arrays["text.svd"])), np.nan)
    words = texts.drop_null().to_numpy(zero_copy_only=False)
    vectors_IE[known] = tfidf.transform(words) @ fit.arrays["text.svd"].T
    return vectors_IE


def encode_texts(encoder: Encoder[str], texts: pa.ChunkedArray) -> np.ndarray:
    """float32 [items, width]. Items without a text are NaN rows."""
    rows = np.flatnonzero(texts.is_valid().to_numpy())
    batches = (rows[start : start + TEXT_BATCH] for start in range(0, len(rows), TEXT_BATCH))
    return _filled(len(texts), len(rows), "texts", ((at, encoder.encode(texts.take(at).to_pylist())) for at in batches))


def encode_pictures(encoder: Encoder[Image], data: Canonical, item_ids: pa.ChunkedArray) -> np.ndarray:
    """float32 [items, width] in the order of `item_ids`; NaN rows where an item has no picture. A batch of files and
    one decoded picture are in memory at once."""
    known = item_ids.combine_chunks()
    encoded = (
        (
            pc.index_in(batch["item_id"], value_set=known).to_numpy(),
            encoder.encode(map(partial(decode, side=encoder.side), batch[IMAGE].to_pylist())),
        )
        for batch in data.pictures()
    )
    return _filled(len(item_ids), data.count_pictures(), "pictures", encoded)


def _filled(items: int, known: int, what: str, encoded: Iterator[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """float32 [items, width] of batches of (rows, vectors); NaN where there is none."""
    from tqdm import tqdm

    found = np.empty((0, 0), dtype=np.float32)
    with tqdm(total=known, desc=what, unit="item", disable=None) as shown:
        for rows, x_BE in encoded:
            if not found.size:
                found = np.full((items, x_BE.shape[1]), np.nan, dtype=np.float32)
            found[rows] = x_BE
            shown.update(len(rows))
    return found


def _listed(encoders: dict[str, str]) -> str:
    return ", ".join(f"{modality} by {name}" for modality, name in sorted(encoders.items())) or "nothing"


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
