"""Training beside one busy neighbour: rows a second, as a share of the same training on a quiet machine.

    python tests/benchmarks/bench_busy_neighbour.py [--seconds 5] [--rounds 3]

The neighbour is one process that never waits. Training is SDCNv3's, as `python -m components train` sets its threads
(`components/common/threads.py`). The second line is for OpenMP's own way to wait, which that setting replaces. Quiet
and busy rounds take turns; "quiet" is true only of a machine on which nothing else runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from harness import report

from components.common.threads import environment

ROWS, BATCH, WARM_STEPS = 100_000, 1024, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of training, each time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        train_when_asked()
        return
    own = environment()
    spinning = {name: value for name, value in own.items() if name != "OMP_WAIT_POLICY"}
    trainers = {"busy_neighbour": Trainer(own), "busy_neighbour_spinning": Trainer(spinning)}
    quiet: list[float] = []
    busy: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(asked.rounds):
        quiet.append(trainers["busy_neighbour"].rate(asked.seconds))
        for name, trainer in trainers.items():
            neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            busy[name].append(trainer.rate(asked.seconds))
            neighbour.kill()
            neighbour.wait()
    for trainer in trainers.values():
        trainer.end()
    for name, rates in busy.items():
        report(name, statistics.median(rates), "rows/s", "the same without a neighbour", statistics.median(quiet))


class Trainer:
    """A process that trains when it is asked to. Only a process of its own can have its own OpenMP settings."""

    def __init__(self, settings: dict[str, str]) -> None:
        others = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child"], env=others | settings, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        self.rate(0.1)  # it is ready

    def rate(self, seconds: float) -> float:
        """Rows a second of so many seconds."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def train_when_asked() -> None:
    import torch
    from worlds import Training, ml_1m

    data = ml_1m(ROWS)
    training = Training("sdcnv3/ml-1m", data, precision="fp32", device="cpu", batch_size=BATCH)
    batches = torch.randperm(ROWS).split(BATCH)[:-1]
    for rows in batches[:WARM_STEPS]:
        training.step(rows)
    for asked in sys.stdin:
        begun, steps = time.perf_counter(), 0
        while (spent := time.perf_counter() - begun) < float(asked) or steps == 0:
            training.step(batches[steps % len(batches)])
            steps += 1
        print(steps * BATCH / spent, flush=True)


if __name__ == "__main__":
    main()
