"""Rows a second of SDCNv3's training on one thread, data path included: published MovieLens-1M configuration.

The peer is the published form, L2 in autograd, Adam with clipped gradients, fed as the authors' framework feeds it:
a DataLoader with one worker process, which collates 4,096 rows. `sdcnv3_train_cpu` trains in bfloat16 where the CPU
multiplies it natively; `sdcnv3_train_cpu_fp32` in float32 whatever the CPU.
"""

from __future__ import annotations

from harness import one_thread, report, seconds

one_thread()

import torch  # noqa: E402 - one thread first
from published import sdcnv3 as published_sdcnv3  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset, default_collate  # noqa: E402
from worlds import ml_1m  # noqa: E402

from components.train import adam  # noqa: E402
from models.losses import tri_bce  # noqa: E402
from models.schema import Batch, Catalog, Logits  # noqa: E402
from models.sdcnv3 import SDCNv3, SDCNv3Config  # noqa: E402

ROWS, BATCH, LR, L2, CLIP = 30 * 4096, 4096, 1e-3, 1e-2, 10.0


class Rows(Dataset[Tensor]):
    """One row an index: the fields, the movie's fields and genres, the label."""

    def __init__(self, values_BN: Tensor) -> None:
        self.values_BN = values_BN

    def __len__(self) -> int:
        return len(self.values_BN)

    def __getitem__(self, row: int) -> Tensor:
        return self.values_BN[row]


def main() -> None:
    schema, catalog, clicks_C, rows = ml_1m(ROWS)
    config = SDCNv3Config()
    assert rows.label_B is not None
    labels = rows.label_B
    own, peer = SDCNv3(config, schema), SDCNv3(config, schema)
    own_adam, peer_adam = adam(own, LR, L2), torch.optim.Adam(peer.parameters(), LR)
    state = dict(peer.named_parameters()) | dict(peer.named_buffers())

    def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    def epoch(bf16: bool) -> None:
        for chosen in torch.randperm(ROWS).split(BATCH):
            batch = Batch(*(column[chosen] for column in rows[:4]), labels[chosen])
            assert batch.label_B is not None
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = own.loss(own(batch, catalog, clicks_C), batch.label_B)
            update(own, own_adam, loss)

    item_B = rows.item_B
    parts = [rows.fields_BF, catalog.categorical_IG[item_B], catalog.sets["Genres"][item_B], labels[:, None]]
    loader = DataLoader(
        Rows(torch.cat([part.double() for part in parts], 1)), BATCH, shuffle=True, num_workers=1,
        collate_fn=default_collate,
    )  # fmt: skip
    widths = [part.shape[1] for part in parts]

    def published_epoch() -> None:
        for values_BN in loader:
            fields_BF, categorical_BG, genres_BT, label_B1 = values_BN.split(widths, 1)
            label_B, own_row_B = label_B1[:, 0].float(), torch.arange(len(values_BN))
            # A catalog of the batch's own rows: items are looked up once a row, as the authors do.
            movies = Catalog(own_row_B, categorical_BG.long(), {"Genres": genres_BT.long()}, None)
            batch = Batch(fields_BF.long(), own_row_B, own_row_B, own_row_B, label_B)
            deep_B, shallow_B = published_sdcnv3(state, config, schema, batch, movies, own_row_B, training=True)
            assert shallow_B is not None
            loss = tri_bce(Logits((deep_B + shallow_B) / 2, (deep_B, shallow_B)), label_B)
            penalty = sum((table**2).sum() for table in peer.regularised_parameters())
            update(peer, peer_adam, loss + L2 / 2 * penalty)

    native_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    fast, plain, peer_seconds = seconds(lambda: epoch(native_bf16), lambda: epoch(False), published_epoch, rounds=3)
    report("sdcnv3_train_cpu", ROWS / fast, "rows/s", "published form, DataLoader", ROWS / peer_seconds)
    report("sdcnv3_train_cpu_fp32", ROWS / plain, "rows/s", "published form, DataLoader", ROWS / peer_seconds)


if __name__ == "__main__":
    main()
