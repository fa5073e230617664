"""`ingest.files` of params.yaml: how a user's columns map to the canonical ones."""

from __future__ import annotations

from dataclasses import dataclass

from components.common.contracts import ARRIVAL, EVENTS, IMAGE, ITEMS, LOGGED, SPLIT, USERS
from components.data.sources import values

NAMES = {
    "events": (*EVENTS.names, ARRIVAL, SPLIT, *LOGGED),
    "users": tuple(USERS.names),
    "items": (*ITEMS.names, IMAGE),
}
PARTS = tuple(values.SPLITS)
Paths = str | list[str]


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """path         a file, a glob or a list of them, below ingest.raw; for events also {train: …, valid: …, test: …};
                 null: no table
    columns      canonical name: the files' name, where they differ
    categorical  columns that become features as they are, whole numbers and strings alike
    numeric      columns that become features in buckets: floor(ln(x)²) above 2, else whole x (`models.schema.bucket`)
    """

    path: Paths | dict[str, Paths] | None
    columns: dict[str, str]
    categorical: list[str]
    numeric: list[str]

    def __post_init__(self) -> None:
        if isinstance(self.path, dict) and (not {"train", "valid"} <= set(self.path) <= set(PARTS)):
            raise ValueError(f"path has the parts {list(self.path)}; give train, valid and, if there is one, test")
        if self.path == []:
            raise ValueError("path is an empty list; name the files, or write null where there is no table")
        features = [*self.categorical, *self.numeric]
        if twice := sorted({name for name in features if features.count(name) > 1}):
            raise ValueError(f"columns {twice} are named twice; a column is categorical or numeric")


@dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """events, users, items  the tables; without users or items, they are those of the events
    vectors                modality: a parquet file or glob of item_id and vector
    separator              between the tags of an item, where they are one string
    """

    events: TableConfig
    users: TableConfig
    items: TableConfig
    vectors: dict[str, Paths]
    separator: str

    def __post_init__(self) -> None:
        for table, names in NAMES.items():
            found: TableConfig = getattr(self, table)
            if unknown := sorted(set(found.columns) - set(names)):
                raise ValueError(f"{table}.columns maps {unknown}; the canonical names are {', '.join(names)}")
            if table != "events" and isinstance(found.path, dict):
                raise ValueError(f"{table}.path is {found.path}; only the events have a path for each part")
