"""Peak memory of QIN's training on a CPU, published configuration: bytes a row, and how they grow.

Each point is a process of its own: its peak resident memory over three steps. `train_memory_batch` is the growth a
row of the batch, `train_memory_history` a row and history position, `train_memory_rows` a row of the dataset, each
over the upper half of its range; the peer is the lower half, so that a ratio of 1 is linear. `train_memory` is the
growth a row of the batch beside the published form's.
"""

from __future__ import annotations

import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from harness import one_thread, report

BATCHES, HISTORIES, ROWS = (1024, 2048, 4096), (64, 128, 192), (1_000_000, 4_000_000, 7_000_000)


def peak(batch: int, history: int = 64, rows: int = 4096, published: bool = False) -> int:
    """Bytes, in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, batch, history, rows, published).result()


def _peak(batch: int, history: int, rows: int, published: bool) -> int:
    one_thread()
    import torch
    from published import qin
    from worlds import Training, microlens

    from models.qin import QINConfig
    from models.schema import history_rows

    data = microlens(rows, history)
    training = Training("qin/microlens", data, device="cpu", precision="fp32")
    chosen = torch.arange(batch) * (rows // batch)
    for _ in range(3):
        if not published:
            training.step(chosen)
            continue
        found = data.batch(chosen)
        state = dict(training.model.named_parameters()) | dict(training.model.named_buffers())
        hist_BL = history_rows(data.click_log, found.start_B, found.end_B, history)
        logit_B = qin(state, QINConfig(), data.schema, found, data.catalog, hist_BL, training=True)
        training.state.optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(logit_B, found.label_B).backward()
        training.state.optimizer.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def slopes(points: tuple[int, ...], peaks: list[int]) -> tuple[float, float]:
    """Bytes a unit over the upper and over the lower half."""
    low, middle, high = points
    return (peaks[2] - peaks[1]) / (high - middle), (peaks[1] - peaks[0]) / (middle - low)


def main() -> None:
    by_batch = [peak(batch) for batch in BATCHES]
    upper, lower = slopes(BATCHES, by_batch)
    report("train_memory_batch", upper, "bytes/row of the batch", "lower half of the range", lower)
    per_position = [value / 2048 for value in (peak(2048, history) for history in HISTORIES)]
    upper, lower = slopes(HISTORIES, per_position)  # type: ignore[arg-type]
    report("train_memory_history", upper, "bytes/row and position", "lower half of the range", lower)
    upper, lower = slopes(ROWS, [peak(512, rows=rows) for rows in ROWS])
    report("train_memory_rows", upper, "bytes/row of the dataset", "lower half of the range", lower)
    published = [peak(batch, published=True) for batch in BATCHES[:2]]
    own = (by_batch[1] - by_batch[0]) / (BATCHES[1] - BATCHES[0])
    other = (published[1] - published[0]) / (BATCHES[1] - BATCHES[0])
    report("train_memory", own, "bytes/row of the batch", "published form", other)


if __name__ == "__main__":
    main()
