"""smoke: the Bento as it will run. It is served on loopback and gets the golden requests, bad ones, and many in a row.

"Passed" means that this Bento can be served and repeats the offline scores. The gate judges whether its model is good.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from components.common.artifacts import read_json, write_json
from components.features.online import drop
from components.features.publish import PublishConfig, fill
from components.release.server import Served

LATE = "store_unavailable"  # in `degraded`: the online store did not answer in time
TRIES = 5  # of a golden request: on a busy machine a healthy store may be late


@dataclass(frozen=True, kw_only=True)
class SmokeConfig:
    """tolerance           largest |served - offline| of a score
    latency_requests    requests timed, one after another
    latency_candidates  candidates in each
    """

    tolerance: float
    latency_requests: int
    latency_candidates: int

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}; it must be in (0, 1)")
        for name in ("latency_requests", "latency_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def run(
    config: SmokeConfig, publish: PublishConfig, package: Path, features: Path, repo: Path, output: Path
) -> dict[str, Any]:
    """Returns smoke.json and what was measured, which is no output: equal runs write equal bytes.

    The online store is the test's own, with the users that it asks for: what is published or pushed meanwhile changes
    nothing here, and nothing of the test stays in a store that serves.

    Raises ValueError that names the request, what was expected and what came.
    """
    built = read_json(package / "package.json", "package")
    if not built["built"]:
        report: dict[str, Any] = {"served": False, "reason": built["reason"]}
        write_json(output, report)
        return report
    if config.latency_candidates > built["max_candidates"]:
        raise ValueError(
            f"smoke.latency_candidates is {config.latency_candidates}, package.max_candidates "
            f"{built['max_candidates']}; do not ask for more than the server takes"
        )
    golden = read_json(package / "golden.json", "package")
    with ExitStack() as stack:
        users = {case["request"]["user_id"] for case in golden}
        store = stack.enter_context(own_store(publish, features, repo, users, output.with_name("store")))
        served = Served(package / "bento", store, output.with_name("server.log"))
        server = stack.enter_context(served.running())
        client = stack.enter_context(server.client())
        figures = check_golden(client, golden, built["version"], config.tolerance)
        report = {
            "served": True,
            "passed": True,
            "tag": built["tag"],
            "golden_requests": len(golden),
            "refused": check_refusals(client, golden[0]["request"], built),
        }
        figures |= {
            "ready_seconds": round(server.ready_seconds, 2),
            "latency_ms": measure_latency(client, golden, config),
            "memory_mib": server.peak_memory_mib(),
        }
    write_json(output, report)
    return report | {"measured": figures}


def measured(found: dict[str, Any]) -> dict[str, Any]:
    """For the stage's note."""
    return found.get("measured", {})


def summary(found: dict[str, Any]) -> dict[str, str]:
    """What `run` returns, for a person."""
    if not found["served"]:
        return {"served": "nothing: the gate rejected", "reasons": "; ".join(found["reason"])}
    figures, latency = found["measured"], found["measured"]["latency_ms"]
    error = f"scores differ by at most {figures['max_abs_error']:.1e}"
    return {
        "served": f"{found['tag']}, ready after {figures['ready_seconds']:.1f} s",
        "golden requests": f"{found['golden_requests']:,} answered; {error}",
        "late store": f"{figures['late']:,} golden answers came without it, and were asked for again",
        "bad requests": f"{len(found['refused']):,} refused, each with a 4xx",
        "latency": f"p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms",
        "memory": f"{figures['memory_mib']:,.0f} MiB at most",
    }


@contextmanager
def own_store(config: PublishConfig, features: Path, repo: Path, users: set[int], store: Path) -> Iterator[Path]:
    """An online store of these users, dropped when the block ends, and before it where a killed test left it."""
    if store.exists():
        drop(store)
    fill(config, features, repo, store, users)
    try:
        yield store
    finally:
        drop(store)


# ---- the checks -------------------------------------------------------------------------------------------------


def check_golden(client: httpx.Client, golden: list[dict[str, Any]], version: str, tolerance: float) -> dict[str, Any]:
    """Every golden request: version, degraded, each candidate's score, and the order of the answer.

    An answer that came before the online store did is asked for again, and counted as `late`.
    """
    largest, late = 0.0, 0
    for i, case in enumerate(golden):
        where = f"golden request {i} {case['request']}"
        answer = _answer(client, case["request"], where)
        for _ in range(TRIES - 1):
            if LATE not in answer["degraded"] or LATE in case["degraded"]:
                break
            late += 1
            answer = _answer(client, case["request"], where)
        for key, expected in (("version", version), ("degraded", case["degraded"])):
            if answer[key] != expected:
                raise ValueError(f"{where}: expected {key} {expected!r}, got {answer[key]!r}")
        offline = dict(zip(case["request"]["candidates"], case["scores"], strict=True))
        if sorted(answer["items"]) != sorted(offline):
            raise ValueError(f"{where}: expected the items {sorted(offline)}, got {sorted(answer['items'])}")
        for item, score in zip(answer["items"], answer["scores"], strict=True):
            error = abs(score - offline[item])
            largest = max(largest, error)
            if not error <= tolerance:  # a NaN is no match either
                raise ValueError(f"{where}: item {item}: expected {offline[item]}, got {score}: off by {error}")
        expected_order = [offline[item] for item in answer["items"]]
        for before, after in pairwise(expected_order):
            if after > before + 2 * tolerance:  # closer scores may change places
                raise ValueError(f"{where}: expected best first, got offline scores {expected_order}")
        if answer["scores"] != sorted(answer["scores"], reverse=True):
            raise ValueError(f"{where}: expected scores best first, got {answer['scores']}")
    return {"late": late, "max_abs_error": largest}


def check_refusals(client: httpx.Client, good: dict[str, Any], built: dict[str, Any]) -> dict[str, int]:
    """Each bad request must get a 4xx, and the server must answer afterwards. Returns name -> status."""
    item = good["candidates"][0]
    bad: dict[str, bytes] = {
        "unknown field": _body({**good, "colour": "red"}),
        "no user": _body({"candidates": [item]}),
        "no candidates": _body({**good, "candidates": []}),
        "too many candidates": _body({**good, "candidates": [item] * (built["max_candidates"] + 1)}),
        "a string for an id": _body({**good, "candidates": [str(item)]}),
        "an id beyond 64 bits": _body({**good, "user_id": 2**63}),
        "unknown context": _body({**good, "context": {"no such feature": "x"}}),
        "k of zero": _body({**good, "k": 0}),
        "broken JSON": b'{"user_id": 1, "candidates": [',
        "not UTF-8": b'{"user_id": "\xff\xfe"}',
        "too large a body": b" " * (built["max_body_bytes"] + 1),
    }
    refused = {}
    for name, body in bad.items():
        status = _post(client, body, f"bad request {name!r}").status_code
        if not 400 <= status < 500:
            raise ValueError(f"bad request {name!r} ({body[:200]!r}): expected a 4xx, got {status}")
        refused[name] = status
    _answer(client, good, "a good request after the bad ones")
    return refused


def measure_latency(client: httpx.Client, golden: list[dict[str, Any]], config: SmokeConfig) -> dict[str, float]:
    """Milliseconds as a client sees them, one request at a time, the users' histories read from the online store."""
    items = list(dict.fromkeys(item for case in golden for item in case["request"]["candidates"]))
    taken = []
    for i in range(config.latency_requests):
        like = golden[i % len(golden)]["request"]
        candidates = [items[(i + j) % len(items)] for j in range(config.latency_candidates)]
        request = {"user_id": like["user_id"], "context": like["context"], "candidates": candidates}
        begin = time.perf_counter()
        _answer(client, request, f"latency request {i} {request}")
        taken.append(1000 * (time.perf_counter() - begin))
    return {"p50": round(float(np.percentile(taken, 50)), 2), "p99": round(float(np.percentile(taken, 99)), 2)}


def _answer(client: httpx.Client, request: dict[str, Any], where: str) -> dict[str, Any]:
    response = _post(client, _body(request), where)
    if response.status_code != 200:
        raise ValueError(f"{where}: expected 200, got {response.status_code} {response.text[:500]}")
    return response.json()


def _post(client: httpx.Client, body: bytes, where: str) -> httpx.Response:
    try:
        return client.post("/rank", content=body)
    except httpx.TransportError as error:
        raise ValueError(f"{where}: expected an answer, got {error!r}") from error


def _body(request: dict[str, Any]) -> bytes:
    return json.dumps(request).encode()
