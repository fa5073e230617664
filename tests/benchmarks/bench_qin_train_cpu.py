"""Rows a second of QIN's training steps on one thread: published configuration, batch 512, beside the published form.

The peer projects every history position, runs the item tower at every position, has the L2 of the whole tables in
autograd, torch's default dropout, and Adam with clipped gradients. `qin_train_cpu` trains in bfloat16 where the CPU
multiplies it natively (`precision: bf16`); `qin_train_cpu_fp32` in float32 whatever the CPU.
"""

from __future__ import annotations

from harness import one_thread, report, seconds

one_thread()

import torch  # noqa: E402 - one thread first
from worlds import Published, Training, microlens, native_bf16  # noqa: E402

BATCH = 512


def main() -> None:
    data = microlens(BATCH)
    precision = "bf16" if native_bf16() else "fp32"
    fast = Training("qin/microlens", data, precision=precision, batch_size=BATCH, device="cpu")
    plain = Training("qin/microlens", data, precision="fp32", batch_size=BATCH, device="cpu")
    published = Published("qin/microlens", data)
    rows = torch.arange(BATCH)
    own, own_fp32, other = seconds(lambda: fast.step(rows), lambda: plain.step(rows), lambda: published.step(rows))
    report("qin_train_cpu", BATCH / own, "rows/s", "published form", BATCH / other)
    report("qin_train_cpu_fp32", BATCH / own_fp32, "rows/s", "published form", BATCH / other)


if __name__ == "__main__":
    main()
