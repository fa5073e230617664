"""Item vectors one by one, and those of new items compared with those of older items."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from components.data.frames.rows import is_in
from components.data.thresholds import CHANCE, FEWEST, FLOORS, SIGMA

CHUNK = 8192  # vectors whose values are in memory as float64 at a time
SAMPLE = 20_000  # vectors that stand for all older or all new items


def vector_frame(table: pa.Table, items: pa.ChunkedArray, spreads: float) -> pd.DataFrame:
    """One row a vector that is not null: its length, its values that are not finite, its norm, and `off`, how far its
    norm is from the median of all norms, as in `days.figure_frame`; a vector of zeros has no `off`."""
    table = with_vectors(table)
    vectors = table["vector"].combine_chunks()
    lengths = pc.list_value_length(vectors).to_numpy(zero_copy_only=False)
    flat = vectors.flatten().to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths, dtype=np.int64)
    filled = np.flatnonzero(lengths)
    bad, squares = np.zeros(len(vectors), dtype=np.int64), np.zeros(len(vectors))
    for at in range(0, len(filled), CHUNK):
        rows = filled[at : at + CHUNK]
        starts = ends[rows] - lengths[rows]
        values = flat[starts[0] : ends[rows[-1]]].astype(np.float64)
        finite = np.isfinite(values)
        bad[rows] = np.add.reduceat(~finite, starts - starts[0], dtype=np.int64)
        values[~finite] = 0
        squares[rows] = np.add.reduceat(values * values, starts - starts[0])
    usual = np.bincount(lengths).argmax() if len(lengths) else 0
    norm = pd.Series(np.sqrt(squares))
    log = pd.Series(np.log(norm.where(norm > 0)))
    away = log - log.median()
    return pd.DataFrame(
        {
            "item_id": table["item_id"].to_numpy(),
            "item_is_known": is_in(table["item_id"], items),
            "length": lengths,
            "is_usual_length": (lengths == usual) & (lengths > 0),
            "non_finite_values": bad,
            "norm": norm,
            "off": away / (FLOORS["one_norm"] + spreads * SIGMA * away.abs().median()),
        }
    )


def cohort_frame(table: pa.Table, items: pa.Table, since: np.datetime64) -> pd.DataFrame:
    """The vectors of items created `since`, compared with those of older items. One row a figure: the share of items
    without a vector, the logarithm of the norm, the cosine to the older items' mean direction, and the share of a
    vector's square in the principal `directions` that hold 90% of the older vectors' squares.

    A figure has no row if there are fewer than 30 new or 30 older items. `off` as in `days.figure_frame`.
    """
    table = with_vectors(table)
    known = items.filter(pc.is_valid(items["created_at"])).group_by("item_id").aggregate([("created_at", "min")])
    is_new = known["created_at_min"].to_numpy() >= since
    has = is_in(known["item_id"], table["item_id"])
    found: list[dict[str, Any]] = []

    def compare(figure: str, new: np.ndarray, old: np.ndarray) -> None:
        if min(len(new), len(old)) >= FEWEST:
            allowed = FLOORS[figure] + CHANCE * float(old.std()) * (1 / len(new) + 1 / len(old)) ** 0.5
            value, usual = float(new.mean()), float(old.mean())
            found.append({"figure": figure, "items": len(new), "value": value, "usual": usual, "allowed": allowed,
                          "off": (value - usual) / allowed})  # fmt: skip

    compare("no_vector", (~has[is_new]).astype(float), (~has[~is_new]).astype(float))
    (new_ND, new_norm), (old_ND, old_norm) = (
        _unit_vectors(table, is_in(table["item_id"], known["item_id"].filter(pa.array(cohort))))
        for cohort in (is_new, ~is_new)
    )
    compare("norm", np.log(new_norm), np.log(old_norm))
    if len(old_ND) and new_ND.shape[1] == old_ND.shape[1]:
        mean_D = old_ND.mean(axis=0)
        mean_D = mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)
        compare("direction", new_ND @ mean_D, old_ND @ mean_D)
        energy_D, axes_DD = np.linalg.eigh(old_ND.T @ old_ND)
        held_D = np.cumsum(energy_D[::-1]) / energy_D.sum()
        axes_DK = axes_DD[:, ::-1][:, : int(np.searchsorted(held_D, 0.9)) + 1]
        compare("directions", *(((x_ND @ axes_DK) ** 2).sum(axis=1) for x_ND in (new_ND, old_ND)))
    return pd.DataFrame(found, columns=["figure", "items", "value", "usual", "allowed", "off"])


def coverage_frame(table: pa.Table, items: pa.ChunkedArray) -> pd.DataFrame:
    """One row: the share of items without a vector, and how `alike` the vectors are: the length of the mean of the unit
    vectors, 1 if all point in one direction."""
    table = with_vectors(table)
    unit_ND, _ = _unit_vectors(table, np.ones(len(table), dtype=bool))
    alike = float(np.linalg.norm(unit_ND.mean(axis=0))) if len(unit_ND) > 1 else np.nan
    missing = 1 - len(pc.unique(table["item_id"])) / max(len(items), 1)
    return pd.DataFrame({"missing_share": [missing], "alike": [alike]})


def with_vectors(table: pa.Table) -> pa.Table:
    """The rows that have a vector."""
    return table.filter(pc.is_valid(table["vector"])) if table["vector"].null_count else table


def _unit_vectors(table: pa.Table, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sample of the chosen vectors that have the usual length, are finite and not zero, as float32 [N, dim] of norm
    1; and their norms [N]. Vectors are in the order of item_id, so every k-th is a fair sample."""
    vectors = table["vector"].combine_chunks()
    lengths = pc.list_value_length(vectors).to_numpy(zero_copy_only=False)
    usual = int(np.bincount(lengths).argmax()) if len(lengths) else 0
    rows = np.flatnonzero(chosen & (lengths == usual))
    rows = rows[:: max(1, -(-len(rows) // SAMPLE))]
    x_ND = vectors.take(pa.array(rows)).flatten().to_numpy(zero_copy_only=False).reshape(len(rows), usual)
    norm_N = np.linalg.norm(x_ND, axis=1)
    whole = np.isfinite(norm_N) & (norm_N > 0)
    return x_ND[whole] / norm_N[whole, None], norm_N[whole]
