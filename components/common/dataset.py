"""The training set, as it lies on disk and in memory. `features/dataset.py` makes it; training and release read it.

    rows.safetensors      one entry a row, in time order: field.NAME, item, end, length, label, user, [oracle],
                          [propensity, position, [slate]] and click_log, user_ids; integers as narrow as they fit
    encoder/              schema.json and catalog.safetensors: what every index means
    unseen.parquet        field, row, value: values of the test rows that are UNKNOWN here, and a champion may know
    dataset.json          row ranges of train, valid and test, their first days, hashes, counts

A history is click_log[end - length : end]. Vocabularies are those of the training days alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from components.common.artifacts import file_hash, read_json
from models.encoder import load_encoder
from models.schema import Batch, Catalog, Encoder, Schema

if TYPE_CHECKING:
    import pyarrow as pa

ROWS, ENCODER, UNSEEN, FACTS = "rows.safetensors", "encoder", "unseen.parquet", "dataset.json"
TYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Dataset:
    """A dataset, its tensors memory-mapped until `to` moves them. Rows are in time order; `splits[name]` is a range.

    columns   the tensors of rows.safetensors
    facts     dataset.json
    streams   the rows stay on the host, and `batches` fetches one ahead; catalog and click log lie on the device
    """

    encoder: Encoder
    catalog: Catalog
    columns: dict[str, Tensor]
    facts: dict[str, Any]
    streams: bool = False

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """Raises ValueError where a file is missing or is not the one that dataset.json names."""
        facts = read_json(folder / "dataset.json", "dataset")
        if file_hash(folder / "rows.safetensors") != facts["data_sha256"]:
            raise ValueError(f"{folder}/rows.safetensors is not the file that was written; run `dvc repro dataset`")
        encoder, catalog, found = load_encoder(folder / "encoder")
        if found != facts["schema_hash"]:
            raise ValueError(f"{folder}/encoder is not the one that was written; run `dvc repro dataset`")
        with safe_open(folder / "rows.safetensors", framework="pt") as opened:
            columns = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        return cls(encoder, catalog, columns, facts)

    @property
    def schema(self) -> Schema:
        return self.encoder.schema

    @property
    def splits(self) -> dict[str, tuple[int, int]]:
        return {name: (start, end) for name, (start, end) in self.facts["splits"].items()}

    def midnight(self, fact: str) -> str | None:
        """When the day of `valid_from`, `test_from` or `ends` begins, as an ISO time; None where rows have no times."""
        day = self.facts[fact]
        return None if day is None else f"{day}T00:00:00+00:00"

    @property
    def newest_day(self) -> tuple[int, int]:
        """The rows of the newest day; the test rows where the source has no times."""
        return self.facts["newest"], len(self.columns["label"])

    @property
    def click_log(self) -> Tensor:
        return self.columns["click_log"]

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.click_log.device

    def to(self, device: torch.device, *, stream: bool = False) -> Dataset:
        """For batches on `device`: all that they read goes there, or, to `stream`, all but the rows."""
        moved = {"click_log"} if stream else {"click_log", *self._batch_columns}
        columns = {name: column.to(device) if name in moved else column for name, column in self.columns.items()}
        return Dataset(self.encoder, self.catalog.to(device), columns, self.facts, stream)

    @property
    def row_bytes(self) -> int:
        """Bytes of what batches read of the rows."""
        return sum(self.columns[name].nbytes for name in self._batch_columns)

    @property
    def _batch_columns(self) -> tuple[str, ...]:
        fields = (f"field.{feature.name}" for feature in self.schema.impression_fields)
        return (*fields, "item", "end", "length", "label")

    def batch(self, rows: Tensor | slice) -> Batch:
        """The rows (a slice, or int64 indices that lie where the rows do) as a batch."""
        return self._widen(self._gather(rows))

    def fetched(self, chunks: Iterable[Tensor | slice]) -> Iterator[list[Tensor]]:
        """For each chunk of rows, what `arranged` makes a batch of: its indices or, where the dataset streams, columns.

        A thread gathers those while the batch before is in use. To a CUDA device they also cross meanwhile, from pinned
        memory and on a stream of their own.
        """
        if not self.streams:
            for rows in chunks:
                assert isinstance(rows, Tensor)  # a CUDA graph reads them from where they lie
                yield [rows]
            return
        side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with ThreadPoolExecutor(1) as thread:
            fetching: Future[list[Tensor]] | None = None
            for chunk in (*chunks, None):
                fetched, fetching = fetching, None if chunk is None else thread.submit(self._gather, chunk, side)
                if fetched is None:
                    continue
                columns = fetched.result()
                if side is not None:
                    for column in columns:  # its memory is not for the next fetch before this stream is done with it
                        column.record_stream(torch.cuda.current_stream(self.device))
                yield columns

    def arranged(self, fetched: Sequence[Tensor]) -> Batch:
        """A batch of what was fetched."""
        return self._widen(list(fetched)) if self.streams else self.batch(fetched[0])

    def batches(self, chunks: Iterable[Tensor | slice]) -> Iterator[Batch]:
        """A batch for each chunk of rows, fetched ahead where the dataset streams."""
        return map(self.arranged, self.fetched(chunks)) if self.streams else map(self.batch, chunks)

    def _gather(self, rows: Tensor | slice, side: torch.cuda.Stream | None = None) -> list[Tensor]:
        """The batch's columns, as narrow as they lie, on the device; through pinned memory where on a side stream."""
        columns = [self.columns[name][rows] for name in self._batch_columns]
        if side is None:
            return [column.to(self.device) for column in columns]
        with torch.cuda.stream(side):
            arrived = [column.pin_memory().to(self.device, non_blocking=True) for column in columns]
        side.synchronize()  # the thread waits, the training stream does not
        return arrived

    def _widen(self, columns: list[Tensor]) -> Batch:
        *fields, item_B, end_B, length_B, label_B = columns
        item_B, end_B = item_B.long(), end_B.long()
        return Batch(
            torch.stack([field.long() for field in fields], 1) if fields else item_B.new_zeros(len(item_B), 0),
            item_B,
            end_B - length_B.long(),
            end_B,
            label_B.float(),
        )

    def user_ids(self, rows: Tensor | slice) -> Tensor:
        """Raw user ids, int64."""
        return self.columns["user_ids"][self.columns["user"][rows].long()]


def encode_column(encoder: Encoder, name: str, column: pa.ChunkedArray) -> Tensor:
    """int64 indices of an Arrow column: the encoder sees each distinct value once."""
    encoded = column.combine_chunks().dictionary_encode()
    index = torch.cat([encoder.encode(name, encoded.dictionary.to_pylist()), torch.zeros(1, dtype=torch.int64)])
    row = torch.from_numpy(encoded.indices.fill_null(len(index) - 1).to_numpy().astype(np.int64))
    return index[row]  # a null is PADDING


def popularity_level(counts: np.ndarray) -> np.ndarray:
    """floor(log2(1 + count)): 0, 1, 1, 2, 2, 2, 2, 3, … int64, any shape."""
    return np.floor(np.log2(1.0 + counts)).astype(np.int64)


def narrow(column: Tensor) -> Tensor:
    """The same integers in the narrowest type of TYPES; floats as they are."""
    if column.is_floating_point() or not column.numel():
        return column.contiguous()
    low, high = int(column.min()), int(column.max())
    kind = next(t for t in TYPES if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max)
    return column.to(kind).contiguous()
