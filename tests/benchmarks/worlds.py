"""Random data of the published shapes: what a step costs depends on shapes and popularity, not on what was clicked."""

from __future__ import annotations

import torch
from torch import Tensor

from models.schema import SPECIAL, Batch, Catalog, Feature, Schema

ITEMS, TAGS, TAGS_OF_AN_ITEM, VECTOR, HISTORY = 91_718, 11_740, 5, 128, 64
# Vocabularies of the authors' log of SDCNv3 on MovieLens-1M, and of the Criteo fields at FuxiCTR's min count of 10.
ML_1M = {"UserID": 6042, "Gender": 4, "Age": 9, "Occupation": 23}
ML_1M_ITEMS = {"MovieID": 3643, "Release": 10}


def microlens(rows: int, history: int = HISTORY, clicks: int = 1_000_000) -> tuple[Schema, Catalog, Tensor, Batch]:
    """MicroLens_1M_x1 as QIN's published run reads it; histories are full."""
    rng = torch.Generator().manual_seed(7)
    schema = Schema(
        features=(
            Feature(name="likes_level", owner="impression", kind="categorical", size=11),
            Feature(name="views_level", owner="impression", kind="categorical", size=11),
            Feature(name="item_id", owner="item", kind="categorical", size=ITEMS),
            Feature(name="item_tags", owner="item", kind="multi", size=TAGS, length=TAGS_OF_AN_ITEM),
            Feature(name="item_emb_d128", owner="item", kind="vector", size=VECTOR),
        ),
        history_length=history,
    )
    tags_IT = torch.randint(1, TAGS, (ITEMS, TAGS_OF_AN_ITEM), generator=rng)
    vector_IE = torch.randn(ITEMS, VECTOR, generator=rng)
    tags_IT[0], vector_IE[0] = 0, 0
    catalog = Catalog(
        torch.arange(ITEMS) - SPECIAL, torch.arange(ITEMS)[:, None].int(), {"item_tags": tags_IT.short()}, vector_IE
    )
    item = popular(clicks + rows, ITEMS, rng)
    end_B = torch.randint(history, clicks, (rows,), generator=rng)
    batch = Batch(
        torch.randint(1, 11, (rows, 2), generator=rng),
        item[clicks:],
        end_B - history,
        end_B,
        torch.randint(2, (rows,), generator=rng).float(),
    )
    return schema, catalog, item[:clicks].int(), batch


def ml_1m(rows: int) -> tuple[Schema, Catalog, Tensor, Batch]:
    """MovieLens-1M as SDCNv3's published run reads it: seven fields, no history."""
    rng = torch.Generator().manual_seed(7)
    genres = Feature(name="Genres", owner="item", kind="multi", size=20, length=5)
    schema = Schema(
        features=(
            *(Feature(name=n, owner="impression", kind="categorical", size=s) for n, s in ML_1M.items()),
            *(Feature(name=n, owner="item", kind="categorical", size=s) for n, s in ML_1M_ITEMS.items()),
            genres,
        ),
        history_length=0,
    )
    movies = ML_1M_ITEMS["MovieID"]
    columns = [torch.arange(movies), torch.randint(1, ML_1M_ITEMS["Release"], (movies,), generator=rng)]
    genres_IT = torch.randint(0, genres.size, (movies, genres.length), generator=rng)
    catalog = Catalog(
        torch.arange(movies) - SPECIAL, torch.stack(columns, 1).int(), {"Genres": genres_IT.short()}, None
    )
    nothing = torch.zeros(rows, dtype=torch.int64)
    batch = Batch(
        torch.stack([torch.randint(1, size, (rows,), generator=rng) for size in ML_1M.values()], 1),
        popular(rows, movies, rng),
        nothing,
        nothing,
        torch.randint(2, (rows,), generator=rng).float(),
    )
    return schema, catalog, nothing[:0].int(), batch


def popular(count: int, items: int, rng: torch.Generator) -> Tensor:
    """Catalog rows from 1 on, drawn with P ∝ rank^-0.8 as the simulator does."""
    mass = torch.arange(1, items, dtype=torch.float64).pow(-0.8).cumsum(0)
    drawn = torch.searchsorted(mass, torch.rand(count, generator=rng, dtype=torch.float64) * mass[-1])
    return 1 + torch.randperm(items - 1, generator=rng)[drawn.clamp(max=items - 2)]
