"""One request's candidates -> click probabilities, in one pass of the model. Needs only torch and models/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from bento import ITEM_STATE
from models.checkpoint import load
from models.schema import UNKNOWN, bucket, trimmed


class Scorer:
    """A model folder on the CPU. Safe to call from several threads.

    Raises ValueError if a file is missing or changed, or has no value for a feature that the schema needs.
    """

    def __init__(self, folder: Path) -> None:
        checkpoint = load(folder)
        self.catalog, self.encoder = checkpoint.catalog, checkpoint.encoder
        self.ranking, self.calibration = checkpoint.model.ranking(checkpoint.catalog), checkpoint.calibration
        self.schema = self.encoder.schema
        self.fields = self.schema.impression_fields
        self.context_names = {f.name for f in self.fields if f.origin == "context"}
        self.needs_profile = any(f.origin == "user" and f.name != "user_id" for f in self.fields)
        self.needs_history = self.schema.history_length > 0
        self.item_state = safetensors.torch.load_file(folder / ITEM_STATE)
        for field in self.fields:
            if field.origin is None:
                raise ValueError(
                    f"{folder}: impression feature {field.name!r} has no origin; the server cannot find it"
                )
            if field.origin == "item":
                found = self.item_state.get(field.name)
                if found is None or found.shape != (len(self.catalog),):
                    shape = None if found is None else tuple(found.shape)
                    raise ValueError(
                        f"{folder / ITEM_STATE}: {field.name} is of shape {shape}, the catalog has "
                        f"{len(self.catalog)} rows; run `dvc repro package`"
                    )

    def known(self, item_ids: Sequence[int]) -> Tensor:
        """bool per item id: whether the catalog holds it."""
        return self._rows(item_ids) != UNKNOWN

    @torch.inference_mode()
    def rank(
        self,
        user_id: int,
        candidates: Sequence[int],
        history: Sequence[int],
        profile: Mapping[str, str | None],
        context: Mapping[str, str | None],
    ) -> Tensor:
        """Click probabilities, float32 [candidates], in the order of the candidates.

        history  raw item ids, oldest first; unknown ones are dropped, and the newest L are used
        profile  the user's attributes; here and in `context`, one that is absent is encoded as missing

        The context is encoded as it was for training: a text without the spaces at its ends, and as missing if nothing
        is left; a number by its bucket. A candidate that is not in the catalog is scored as an unknown item.
        Raises ValueError if a context value cannot be encoded.
        """
        item_B = self._rows(candidates)
        B = len(item_B)
        known_K = self._rows(history)
        known_K = known_K[known_K != UNKNOWN]
        hist_K = known_K[max(0, len(known_K) - self.schema.history_length) :]
        fields = []
        for field in self.fields:
            if field.origin == "item":
                fields.append(self.item_state[field.name][item_B])
                continue
            value: str | int | None
            if field.origin == "context":
                value = trimmed(context.get(field.name) or "")
            else:
                value = user_id if field.name == "user_id" else profile.get(field.name)
            if field.numeric and value is not None:
                try:
                    value = bucket(float(value))
                except ValueError:
                    raise ValueError(f"{field.name} is {value!r}; it takes a number") from None
            fields.append(self.encoder.encode(field.name, [value]).expand(B))
        fields_BF = torch.stack(fields, 1) if fields else torch.zeros(B, 0, dtype=torch.int64)
        return self.calibration(self.ranking(fields_BF, item_B, hist_K)).float()

    def _rows(self, item_ids: Sequence[int]) -> Tensor:
        return self.catalog.rows(torch.tensor(item_ids, dtype=torch.int64))
