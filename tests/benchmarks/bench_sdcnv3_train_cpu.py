"""Rows a second of SDCNv3's training on one thread, data path included: published MovieLens-1M configuration.

The peer is the published form, L2 in autograd, Adam with clipped gradients, fed as the authors' framework feeds it:
a DataLoader with one worker process, which collates 4,096 rows. `sdcnv3_train_cpu` trains in bfloat16 where the CPU
multiplies it natively; `sdcnv3_train_cpu_fp32` in float32 whatever the CPU.
"""

from __future__ import annotations

from harness import one_thread, report, seconds

one_thread()

import torch  # noqa: E402 - one thread first
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from worlds import Training, ml_1m, native_bf16  # noqa: E402

from models.families import TRAINING  # noqa: E402
from models.losses import tri_bce  # noqa: E402
from models.schema import Batch, Catalog, Logits  # noqa: E402
from models.sdcnv3 import SDCNv3, SDCNv3Config  # noqa: E402
from tests.models.published import sdcnv3 as published_sdcnv3  # noqa: E402

TRAINED = TRAINING["sdcnv3/ml-1m"]
BATCH = TRAINED["batch_size"]
ROWS = 30 * BATCH


class Rows(Dataset[Tensor]):
    """One row an index: the fields, the movie's fields and genres, the label."""

    def __init__(self, values_BN: Tensor) -> None:
        self.values_BN = values_BN

    def __len__(self) -> int:
        return len(self.values_BN)

    def __getitem__(self, row: int) -> Tensor:
        return self.values_BN[row]


def main() -> None:
    data = ml_1m(ROWS)
    fast = Training("sdcnv3/ml-1m", data, precision="bf16" if native_bf16() else "fp32", device="cpu")
    plain = Training("sdcnv3/ml-1m", data, precision="fp32", device="cpu")
    config, peer = SDCNv3Config(), SDCNv3(SDCNv3Config(), data.schema)
    optimizer = torch.optim.Adam(peer.parameters(), TRAINED["lr"])
    state = dict(peer.named_parameters()) | dict(peer.named_buffers())

    def epoch(training: Training) -> None:
        for rows in torch.randperm(ROWS).split(BATCH):
            training.step(rows)

    every = data.batch(slice(0, ROWS))
    assert every.label_B is not None
    movie_B = every.item_B
    parts = [every.fields_BF, data.catalog.categorical_IG[movie_B], data.catalog.sets["Genres"][movie_B]]
    parts.append(every.label_B[:, None])
    widths = [part.shape[1] for part in parts]
    loader = DataLoader(Rows(torch.cat([part.double() for part in parts], 1)), BATCH, shuffle=True, num_workers=1)

    def published_epoch() -> None:
        for values_BN in loader:
            fields_BF, categorical_BG, genres_BT, label_B1 = values_BN.split(widths, 1)
            label_B, own_row_B = label_B1[:, 0].float(), torch.arange(len(values_BN))
            # A catalog of the batch's own rows: items are looked up once a row, as the authors do.
            movies = Catalog(own_row_B, categorical_BG.long(), {"Genres": genres_BT.long()}, None)
            batch = Batch(fields_BF.long(), own_row_B, own_row_B, own_row_B, label_B)
            deep_B, shallow_B = published_sdcnv3(state, config, data.schema, batch, movies, own_row_B, training=True)
            assert shallow_B is not None
            penalty = sum((table**2).sum() for table in peer.regularised_parameters())
            loss = (
                tri_bce(Logits((deep_B + shallow_B) / 2, (deep_B, shallow_B)), label_B)
                + TRAINED["embedding_l2"] / ROWS / 2 * penalty
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(peer.parameters(), TRAINED["clip_norm"])
            optimizer.step()

    own, own_fp32, other = seconds(lambda: epoch(fast), lambda: epoch(plain), published_epoch, rounds=3)
    report("sdcnv3_train_cpu", ROWS / own, "rows/s", "published form, DataLoader", ROWS / other)
    report("sdcnv3_train_cpu_fp32", ROWS / own_fp32, "rows/s", "published form, DataLoader", ROWS / other)


if __name__ == "__main__":
    main()
