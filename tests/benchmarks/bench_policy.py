"""The off-policy view beside the truth: how far off it is on a simulated day, and how often its intervals hold it.

    make bench ONLY=policy

Each world is the demo's with another seed, and a day of it is logged. Two models rank: one knows what users like, the
other how good items are and a little of the first. The truth is known, because every item's click probability is: what
the best of five items earns, for every user of the day and every choice of five. A line of JSON each for the doubly
robust value, for SNIPS, and for the difference of the two models: coverage of the 95% interval, root of the mean
squared error, bias. The clicks that were logged are there for comparison.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np

from components.common.config import load
from components.common.contracts import ORACLE, PROPENSITY
from components.data.ingest import IngestConfig
from components.data.sources.simulator import (
    DEVICE_EFFECT,
    DEVICE_SHARE,
    DEVICES,
    FIRST_ITEM,
    FIRST_USER,
    STRIDE,
    World,
)
from components.release import policy
from components.release.measures import EvaluateConfig
from tests.components.small_world import PROJECT

WORLDS, DAY, RESAMPLES = 40, 20_463, 300


def logit(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1 - p))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def trial(seed: int) -> list[tuple[str, float, float, float, float]]:
    """(figure, its value, low, high, truth) of one world's day."""
    params = PROJECT / "params.yaml"
    config = load(params, "ingest", IngestConfig).simulator
    settings = load(params, "evaluate", EvaluateConfig).policy
    world = World(replace(config, seed=seed, late_share=0, corrected_share=0), range(DAY, DAY + 1))
    rows, rng = world.day(DAY), np.random.default_rng(seed)
    user_B, item_B = (
        (rows[name].to_numpy() - first) // STRIDE - start
        for name, first, start in (
            ("user_id", FIRST_USER, world.first_user),
            ("item_id", FIRST_ITEM, world.first_item),
        )
    )
    likes_UI = config.sharpness * world.interests(DAY, np.arange(config.users)) @ world.z_IK.T
    good_I = world.quality_I + world._effects(slice(None), world.fashion(DAY))
    device_B = np.array([DEVICES.index(name) for name in rows["device"].to_pylist()])
    oracle_B = rows[ORACLE].to_numpy().astype(np.float64)
    known_B = likes_UI[user_B, item_B] + good_I[item_B] + DEVICE_EFFECT[device_B]
    shift = float(np.median(logit(oracle_B) - known_B))
    true_UI = sum(
        share * sigmoid(likes_UI + good_I + effect + shift)
        for share, effect in zip(DEVICE_SHARE, DEVICE_EFFECT, strict=True)
    )
    scores = {"": sigmoid(0.7 * likes_UI + shift), "old": sigmoid(0.5 * likes_UI + good_I + shift)}
    best_I = np.diff((np.arange(config.items + 1) / config.items) ** settings.candidates)
    weight_U = world.activity_U / world.activity_U.sum()
    truth = {
        name: float(weight_U @ (np.take_along_axis(true_UI, np.argsort(score_UI, 1), 1) @ best_I))
        for name, score_UI in scores.items()
    }
    at = np.sort(rng.permutation(len(rows))[: settings.rows])
    shown = item_B[policy.evenly_drawn(rng, item_B, (len(at), policy.DRAWS * settings.candidates))]
    user, item = user_B[at], item_B[at]
    weighed = {
        name: policy.best_of(
            rng, settings.candidates, score_UI[user, item], score_UI[user[:, None], shown], scores["old"][user, item],
            scores["old"][user[:, None], shown], rows[PROPENSITY].to_numpy()[at].astype(np.float64),
        )
        for name, score_UI in scores.items()
    }  # fmt: skip
    units = np.unique(user, return_inverse=True)[1]
    found = policy.compared(rows["label"].to_numpy()[at], weighed, units, oracle_B[at], resamples=RESAMPLES, seed=seed)
    assert found is not None
    return [
        (name, told["value"], told["low"], told["high"], wanted)
        for name, told, wanted in (
            ("policy_value", found, truth[""]),
            ("policy_snips", found["snips"], truth[""]),
            ("policy_difference", found["difference"], truth[""] - truth["old"]),
            ("policy_logged", found["logged"], truth[""]),
            ("policy_effective_rows", dict.fromkeys(("value", "low", "high"), found["effective_rows"]), len(at)),
        )
    ]


def main() -> None:
    trials = [trial(seed) for seed in range(WORLDS)]
    for found in zip(*trials, strict=True):
        value, low, high, truth = np.array([one[1:] for one in found]).T
        name = found[0][0]
        if name == "policy_effective_rows":
            print(json.dumps({"name": name, "value": round(float(value.mean())), "of": int(truth[0])}))
            continue
        told = {
            "name": name,
            "value": round(float(np.sqrt(np.mean((value - truth) ** 2))), 5),
            "unit": "root mean squared error, clicks a row",
            "bias": round(float((value - truth).mean()), 5),
            "coverage": round(float(((low <= truth) & (truth <= high)).mean()), 3),
            "truth": round(float(truth.mean()), 4),
            "worlds": WORLDS,
        }
        print(json.dumps(told))


if __name__ == "__main__":
    main()
