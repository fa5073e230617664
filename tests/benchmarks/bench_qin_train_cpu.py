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
from worlds import Training, microlens, native_bf16  # noqa: E402

from models.qin import QIN, QINConfig  # noqa: E402
from models.schema import history_rows  # noqa: E402

BATCH, LR, L2, CLIP = 512, 2e-3, 2e-4, 10.0


def main() -> None:
    data = microlens(BATCH)
    changes = {"lr": LR, "embedding_l2": L2, "clip_norm": CLIP, "device": "cpu"}
    fast = Training("qin/microlens", data, precision="bf16" if native_bf16() else "fp32", **changes)
    plain = Training("qin/microlens", data, precision="fp32", **changes)
    config, peer = QINConfig(), QIN(QINConfig(), data.schema)
    optimizer = torch.optim.Adam(peer.parameters(), LR)
    state = dict(peer.named_parameters()) | dict(peer.named_buffers())
    batch = data.batch(slice(0, BATCH))
    hist_BL = history_rows(data.click_log, batch.start_B, batch.end_B, data.schema.history_length)

    def published_step() -> None:
        logit_B = published_qin(state, config, data.schema, batch, data.catalog, hist_BL, training=True)
        penalty = sum((table**2).sum() for table in peer.regularised_parameters())
        loss = F.binary_cross_entropy_with_logits(logit_B, batch.label_B) + L2 / 2 * penalty
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(peer.parameters(), CLIP)
        optimizer.step()

    rows = slice(0, BATCH)
    own, own_fp32, other = seconds(lambda: fast.step(rows), lambda: plain.step(rows), published_step)
    report("qin_train_cpu", BATCH / own, "rows/s", "published form", BATCH / other)
    report("qin_train_cpu_fp32", BATCH / own_fp32, "rows/s", "published form", BATCH / other)


if __name__ == "__main__":
    main()
