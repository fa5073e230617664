"""Peak memory of a training step of QIN, published configuration: bytes that torch holds beyond what it held before.

`train_memory` is the growth a row of the batch beside the published form's. `train_memory_batch` is the growth a row of
the batch, `train_memory_history` a row and history position, each over the upper half of its range; the peer is the
lower half: a ratio of 1 is linear, below 1 less than that (more references share their items).

`train_memory_rows` is what a row of the dataset adds to an epoch's peak: its columns and its place in the epoch's
order. The peer is the lower half again. It is measured on SDCNv3, which is faster: a step knows nothing of the rows
beside its own. `train_memory_dataset` is the columns alone; the peer is the goal.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from harness import one_thread, report

one_thread()

import torch  # noqa: E402 - one thread first
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from worlds import Training, microlens, ml_1m  # noqa: E402

from models.qin import QINConfig  # noqa: E402
from models.schema import history_rows  # noqa: E402
from tests.models.published import qin  # noqa: E402

BATCHES, HISTORIES, ROWS, GOAL = (1024, 2048, 4096), (48, 144, 240), (100_000, 200_000, 400_000), 25


def peak(batch: int, history: int = 64, published: bool = False) -> int:
    """Bytes of a step, the second one: Adam's moments are there by then."""
    data = microlens(batch, history)
    training = Training("qin/microlens", data, device="cpu", precision="fp32")
    step = published_step(training) if published else lambda: training.step(torch.arange(batch))
    step()
    training.loop.state.optimizer.zero_grad()
    return most(step)


def epoch_peak(rows: int) -> int:
    """Bytes of an epoch of so many rows, these included."""
    data = ml_1m(rows)
    training = Training("sdcnv3/ml-1m", data, device="cpu", precision="fp32", batch_size=4096)
    training.step(torch.arange(4096))
    training.loop.state.optimizer.zero_grad()
    return data.row_bytes + most(training.epoch)


def most(run: Callable[[], object]) -> int:
    """The most bytes that torch holds at a time beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def published_step(training: Training) -> Callable[[], object]:
    """One step of the published form on the same weights."""
    data, model = training.data, training.model
    batch = data.batch(slice(0, len(data.columns["item"])))
    hist_BL = history_rows(data.click_log, batch.start_B, batch.end_B, data.schema.history_length)
    state = dict(model.named_parameters()) | dict(model.named_buffers())

    def step() -> None:
        logit_B = qin(state, QINConfig(), data.schema, batch, data.catalog, hist_BL, training=True)
        training.loop.state.optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(logit_B, batch.label_B).backward()
        training.loop.state.optimizer.step()

    return step


def slopes(points: tuple[int, ...], peaks: list[float]) -> tuple[float, float]:
    """Bytes a unit over the upper and over the lower half."""
    low, middle, high = points
    return (peaks[2] - peaks[1]) / (high - middle), (peaks[1] - peaks[0]) / (middle - low)


def main() -> None:
    batches = [float(peak(batch)) for batch in BATCHES]
    published = [peak(batch, published=True) for batch in BATCHES[:2]]
    upper, lower = slopes(BATCHES, batches)
    report("train_memory", lower, "bytes/row", "published form", (published[1] - published[0]) / BATCHES[0])
    report("train_memory_batch", upper, "bytes/row", "lower half of the range", lower)
    rows = BATCHES[0]
    upper, lower = slopes(HISTORIES, [peak(rows, history) / rows for history in HISTORIES])
    report("train_memory_history", upper, "bytes/row and position", "lower half of the range", lower)
    upper, lower = slopes(ROWS, [float(epoch_peak(rows)) for rows in ROWS])
    report("train_memory_rows", upper, "bytes/row of the dataset", "lower half of the range", lower)
    report("train_memory_dataset", microlens(rows).row_bytes / rows, "bytes/row of the dataset", "goal", GOAL)


if __name__ == "__main__":
    main()
