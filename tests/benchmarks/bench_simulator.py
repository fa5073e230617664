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
        seed=7, users=100_000, items=50_000, user_life=180, item_life=90, impressions_per_day=500_000,
        text_dim=8, image_dim=8, popularity=0.8, drift=0.04, fashion=0.5, fashion_days=120, sharpness=5.0,
        click_rate=0.2, late_share=0.02, corrected_share=0.002, missing_text=0.05, missing_image=0.15, noise=0.5,
    )  # fmt: skip
    days = range(20_000, 20_000 + ROUNDS + 1)
    world = World(config, days)
    world.day(days[0])
    seconds = []
    for day in days[1:]:
        start = time.perf_counter()
        world.day(day)
        seconds.append(time.perf_counter() - start)
    value = config.impressions_per_day / sorted(seconds)[ROUNDS // 2]  # the median round
    report("simulator", value, "impressions/s", "goal", GOAL)


if __name__ == "__main__":
    main()
