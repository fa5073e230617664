"""Impressions a second that the simulator draws on one thread, beside the goal. `make bench ONLY=simulator`."""

from __future__ import annotations

import time

from harness import one_thread, report

one_thread()

from components.data.sources.simulator import SimulatorConfig, World  # noqa: E402 - one thread, and this project's code

GOAL = 1_000_000  # impressions a second: an hour of a large site while a person waits
ROUNDS = 7


def main() -> None:
    config = SimulatorConfig(
        seed=7, start="2024-01-01", days=ROUNDS + 1, users=100_000, items=50_000, impressions_per_day=500_000,
        text_dim=8, image_dim=8, popularity=0.8, drift=0.08, sharpness=4.0, click_rate=0.2, new_share=0.1,
        missing_text=0.05, missing_image=0.15, noise=0.5,
    )  # fmt: skip
    world = World(config)
    world.day(0)
    seconds = []
    for day in range(1, ROUNDS + 1):
        start = time.perf_counter()
        world.day(day)
        seconds.append(time.perf_counter() - start)
    value = config.impressions_per_day / sorted(seconds)[ROUNDS // 2]  # the median round
    report("simulator", value, "impressions/s", "goal", GOAL)


if __name__ == "__main__":
    main()
