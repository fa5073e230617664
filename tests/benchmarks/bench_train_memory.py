"""Peak memory of a training step of QIN, published configuration: bytes that torch holds beyond what it held before.

`train_memory` is the growth a row of the batch beside the published form's. `train_memory_batch` is the growth a row of
the batch, `train_memory_history` a row and history position, each over the upper half of its range; the peer is the
lower half: a ratio of 1 is linear, below 1 less than that (more references share their items). `train_memory_rows` is
what a row of the dataset takes, which stays as long as training lasts; the peer is the goal.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from harness import one_thread, report

one_thread()

import torch  # noqa: E402 - one thread first
from published import qin  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from worlds import Training, microlens  # noqa: E402

from models.qin import QINConfig  # noqa: E402
from models.schema import history_rows  # noqa: E402

BATCHES, HISTORIES, GOAL = (1024, 2048, 4096), (48, 144, 240), 25


def peak(batch: int, history: int = 64, published: bool = False) -> int:
    """Bytes of a step, the second one: Adam's moments are there by then."""
    data = microlens(batch, history)
    training = Training("qin/microlens", data, device="cpu", precision="fp32")
    step = published_step(training) if published else lambda: training.step(slice(0, batch))
    step()
    training.state.optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
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
        training.state.optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(logit_B, batch.label_B).backward()
        training.state.optimizer.step()

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
    report("train_memory_rows", microlens(rows).row_bytes / rows, "bytes/row of the dataset", "goal", GOAL)


if __name__ == "__main__":
    main()
