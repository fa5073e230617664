"""Rows a second of QIN's training steps on one thread: published configuration, batch 512, beside the published form.

The peer projects every history position, runs the item tower at every position, has the L2 of the whole tables in
autograd, torch's default dropout, and Adam with clipped gradients. `qin_train_cpu` trains in bfloat16 where the CPU
multiplies it natively (`precision: bf16`); `qin_train_cpu_fp32` in float32 whatever the CPU.
"""

from __future__ import annotations

from harness import one_thread, report, seconds

one_thread()

import torch  # noqa: E402 - one thread first
from published import qin as published_qin  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812
from worlds import microlens  # noqa: E402

from components.train import adam  # noqa: E402
from models.qin import QIN, QINConfig  # noqa: E402
from models.schema import history_rows  # noqa: E402

BATCH, LR, L2, CLIP = 512, 2e-3, 2e-4, 10.0


def main() -> None:
    schema, catalog, clicks_C, batch = microlens(BATCH)
    config = QINConfig()
    assert batch.label_B is not None
    label_B = batch.label_B
    own, peer = QIN(config, schema), QIN(config, schema)
    own_adam, peer_adam = adam(own, LR, L2), torch.optim.Adam(peer.parameters(), LR)
    state = dict(peer.named_parameters()) | dict(peer.named_buffers())
    hist_BL = history_rows(clicks_C, batch.start_B, batch.end_B, schema.history_length)

    def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    def step(bf16: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = own.loss(own(batch, catalog, clicks_C), label_B)
        update(own, own_adam, loss)

    def published_step() -> None:
        logit_B = published_qin(state, config, schema, batch, catalog, hist_BL, training=True)
        penalty = sum((table**2).sum() for table in peer.regularised_parameters())
        update(peer, peer_adam, F.binary_cross_entropy_with_logits(logit_B, label_B) + L2 / 2 * penalty)

    native_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    fast, plain, peer_seconds = seconds(lambda: step(native_bf16), lambda: step(False), published_step)
    report("qin_train_cpu", BATCH / fast, "rows/s", "published form", BATCH / peer_seconds)
    report("qin_train_cpu_fp32", BATCH / plain, "rows/s", "published form", BATCH / peer_seconds)


if __name__ == "__main__":
    main()
