"""SDCNv3 on MovieLens-1M as its paper measures it, trained by this project's own trainer.

The paper's protocol (arXiv 2407.13349): ratings of 3 are dropped, a rating above 3 is a click; rows are split 80/10/10
at random; seven fields: user, gender, age, occupation, film, decade of release, genres (five at most, their mean). The
split itself was not published, so here it is `numpy.random.default_rng(SPLIT).permutation` over the file's order, and
anyone can draw the same. The weights with the best valid AUC are scored on the test rows, once.

    python tests/benchmarks/ml1m_random_split.py --data FOLDER                     # published settings, splits 1 2 3
    python tests/benchmarks/ml1m_random_split.py --data FOLDER --config best --split 1

FOLDER holds users.dat and movies.dat as GroupLens ships them, and either ratings.dat or
ratings_all_no_timestamps.parquet (UserID, MovieID, Rating). The data may not be redistributed: get it from
https://grouplens.org/datasets/movielens/1m/. One run takes minutes on one core.

Every run ends in a line of JSON, all of them in a table.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from frame import run, say
from harness import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

from components.common.dataset import Dataset
from components.training.config import TrainConfig
from models import families
from models.schema import SPECIAL, UNKNOWN, Catalog, Encoder, Feature, Schema, schema_hash

TRAIN, VALID = 591_209, 73_901  # rows; the published counts
GENRES = 5  # kept of a film
FOLDS = 10  # of the train rows, where there are histories
OLDEST = 1930  # films from before this decade are of it


@dataclass(frozen=True)
class Config:
    """A named configuration: what it is, and what differs from the published settings.

    history  clicks of the user that a row may see beside the seven fields; 0 is the paper's protocol
    """

    about: str
    history: int = 0
    train: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)


PUBLISHED = families.TRAINING["sdcnv3/ml-1m"] | {"device": "cpu", "precision": "fp32", "compile": False}
AVERAGED = {
    "batch_size": 2048, "lr": 7e-4, "lr_factor": 1.0, "embedding_l2": 0.005 * TRAIN, "network_l2": 3e-4 * TRAIN,
    "ema": 0.999,
}  # fmt: skip
CONFIGS = {
    "published": Config("the authors' best run: d = 16, 3 deep and 4 shallow layers"),
    "deep": Config("the deep tower alone (DCNv3, later ECN), the same settings", network={"towers": "deep"}),
    "best": Config("the same network; a running mean of weights, a constant rate, L2 on all of them", train=AVERAGED),
    "history": Config("best, and beside the seven fields 64 films that the user clicked", history=64, train=AVERAGED),
}


def main() -> None:
    asked = parse()
    table = Table("config", "split", "seed", "epochs", "seconds", "test AUC", "logloss", title="ML-1M, random split")
    for name in asked.config:
        chosen = CONFIGS[name]
        for split in asked.split:
            data = dataset(asked.data, split, chosen.history)
            for seed in asked.seed:
                config = TrainConfig(**{**PUBLISHED, **chosen.train, "seed": seed, "network": chosen.network})
                _, found = run(name, partial(families.build, "sdcnv3", chosen.network), config, data)
                say({"config": name, "split": split, **found, "machine": machine()})
                figures = (f"{found[key]:.5f}" for key in ("test_auc", "test_logloss"))
                table.add_row(name, str(split), str(seed), str(found["epochs"]), f"{found['seconds']:.0f}", *figures)
    Console(width=100).print(table)


def parse() -> argparse.Namespace:
    names = "\n".join(f"  {name:<12}{config.about}" for name, config in CONFIGS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"configs:\n{names}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the MovieLens-1M files")
    parser.add_argument("--config", nargs="+", choices=CONFIGS, default=["published"], help="default: published")
    parser.add_argument("--split", nargs="+", type=int, default=[1, 2, 3], help="seeds of the split (default: 1 2 3)")
    parser.add_argument(
        "--seed", nargs="+", type=int, default=[1], help="of initialisation, order and dropout (default: 1)"
    )
    return parser.parse_args()


def dataset(folder: Path, split: int, history: int) -> Dataset:
    """The split's rows, train first, then valid and test. Vocabularies and histories are of its train rows."""
    ratings = read_ratings(folder)
    ratings = ratings.filter(pc.not_equal(ratings["Rating"], 3))
    if len(ratings) <= TRAIN + VALID:
        raise ValueError(f"{folder}: {len(ratings)} ratings are not 3; MovieLens-1M has 739,012 of them")
    ratings = ratings.take(pa.array(np.random.default_rng(split).permutation(len(ratings))))
    users = read_dat(folder / "users.dat", ("id", "gender", "age", "occupation", "zip"))
    films = read_dat(folder / "movies.dat", ("id", "title", "genres"))
    user_ids, film_ids = (np.array(table["id"], dtype=np.int64) for table in (users, films))
    user_row, film_row = np.searchsorted(user_ids, ratings["UserID"]), np.searchsorted(film_ids, ratings["MovieID"])
    profile = {name: np.array(users[name])[user_row] for name in ("gender", "age", "occupation")}
    decade = np.array([str(max(OLDEST, int(title[-5:-1]) // 10 * 10)) for title in films["title"]])
    genres = [text.split("|")[:GENRES] for text in films["genres"]]

    features, integers = [], {}

    def add(name: str, shown: np.ndarray, owner: Any, *, kind: Any = "categorical", length: int = 1) -> None:
        values, vocab = np.unique(shown), None
        if np.issubdtype(values.dtype, np.integer):
            integers[name] = torch.from_numpy(values)
        else:
            vocab = tuple(values.tolist())
        origin: Any = "user" if owner == "impression" else None
        size = len(values) + SPECIAL
        features.append(
            Feature(name=name, owner=owner, kind=kind, size=size, length=length, origin=origin, vocab=vocab)
        )

    shown_films = np.unique(film_row[:TRAIN])
    add("user_id", user_ids[user_row[:TRAIN]], "impression")
    for name, column in profile.items():
        add(name, column[:TRAIN], "impression")
    add("item_id", film_ids[shown_films], "item")
    add("release", decade[shown_films], "item")
    add("genres", np.concatenate([genres[row] for row in shown_films]), "item", kind="multi", length=GENRES)
    encoder = Encoder(Schema(features=tuple(features), history_length=history), integers)

    def encode(name: str, values: np.ndarray) -> Tensor:
        distinct, index = np.unique(values, return_inverse=True)
        return encoder.encode(name, distinct.tolist())[torch.from_numpy(index)]

    no_film = torch.tensor([[0, 0], [UNKNOWN, UNKNOWN]])
    categorical = torch.stack([encode("item_id", film_ids), encode("release", decade)], 1)
    genre_IT = torch.zeros(len(films["id"]) + SPECIAL, GENRES, dtype=torch.int64)
    for row, names in enumerate(genres, SPECIAL):
        genre_IT[row, : len(names)] = encoder.encode("genres", names)
    nothing = torch.iinfo(torch.int64).min
    catalog = Catalog(
        torch.cat([torch.tensor([nothing, nothing]), torch.from_numpy(film_ids)]),
        torch.cat([no_film, categorical]),
        {"genres": genre_IT},
        None,
    )
    label = (ratings["Rating"].to_numpy() > 3).astype(np.uint8)
    click_log, end, length = histories(user_row, film_row + SPECIAL, label, history, split)
    columns = {f"field.{name}": encode(name, column) for name, column in profile.items()}
    columns |= {
        "field.user_id": encode("user_id", user_ids[user_row]),
        "user": torch.from_numpy(user_row),
        "item": torch.from_numpy(film_row + SPECIAL),
        "end": torch.from_numpy(end),
        "length": torch.from_numpy(length),
        "label": torch.from_numpy(label),
        "click_log": torch.from_numpy(click_log),
    }
    return Dataset(encoder, catalog, columns, {
        "splits": {"train": (0, TRAIN), "valid": (TRAIN, TRAIN + VALID), "test": (TRAIN + VALID, len(ratings))},
        "data_sha256": f"MovieLens-1M, split {split}, history {history}",
        "schema_hash": schema_hash(encoder.schema, integers, catalog),
    })  # fmt: skip


def histories(
    user: np.ndarray, item: np.ndarray, label: np.ndarray, length: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(click log, end, length) of every row: at most `length` clicks of the user among the train rows, in random order.

    The rows have no time, so no history can be "what came before". Were it all other clicks of the user, it would lack
    the row's own film exactly where the label is 1, and a model could read the label off. So train rows are dealt into
    FOLDS at random, and a row sees the clicks of the other folds, whatever its label. Valid and test rows see all.
    """
    rows = len(user)
    if length == 0:
        return np.zeros(0, np.int32), np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    fold = np.full(rows, FOLDS)
    fold[:TRAIN] = np.random.default_rng(seed).integers(FOLDS, size=TRAIN)
    clicks = np.flatnonzero(label[:TRAIN])
    seen = [(clicks[fold[clicks] != left_out], left_out) for left_out in range(FOLDS + 1)]
    row = np.concatenate([some for some, _ in seen])
    group = np.concatenate([user[some] * (FOLDS + 1) + left_out for some, left_out in seen])
    end = np.bincount(group, minlength=(user.max() + 1) * (FOLDS + 1)).cumsum()
    mine = user * (FOLDS + 1) + fold
    counts = np.diff(end, prepend=0)
    return item[row[np.argsort(group, kind="stable")]].astype(np.int32), end[mine], counts[mine].clip(max=length)


def read_ratings(folder: Path) -> pa.Table:
    """UserID, MovieID, Rating: int64, in the file's order."""
    whole = folder / "ratings_all_no_timestamps.parquet"
    if whole.is_file():
        return pq.read_table(whole)
    text = read_dat(folder / "ratings.dat", ("UserID", "MovieID", "Rating", "Timestamp"))
    return pa.table({name: np.array(text[name], dtype=np.int64) for name in ("UserID", "MovieID", "Rating")})


def read_dat(file: Path, columns: tuple[str, ...]) -> dict[str, list[str]]:
    """The columns of a file with `::` between its values, as GroupLens writes them."""
    if not file.is_file():
        raise SystemExit(f"{file} is not there; --data takes the folder of the unpacked ml-1m.zip")
    lines = file.read_text("latin-1").splitlines()
    return dict(zip(columns, map(list, zip(*(line.split("::") for line in lines), strict=True)), strict=True))


if __name__ == "__main__":
    main()
