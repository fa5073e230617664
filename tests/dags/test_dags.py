"""The DAGs' shape beside dvc.yaml's. tests/dags/test_scheduler.py runs them.

Airflow reads its settings when it is imported, so it is never imported here: each look at it is a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import networkx as nx
import pytest
from dvc.repo import Repo

if TYPE_CHECKING:
    from tests.conftest import Project

AROUND = ["open", "ready", "close", "ask", "ship", "tidy"]  # the steps before and after the stages

DESCRIBE = """
import json, sys
from airflow.dag_processing.dagbag import BundleDagBag
from airflow.serialization.serialized_objects import DagSerialization
from pendulum import datetime

bag = BundleDagBag(dag_folder=sys.argv[1], bundle_path=sys.argv[1], bundle_name="dags-folder")
written = {name: DagSerialization.to_dict(dag) for name, dag in bag.dags.items()}
read = {name: DagSerialization.from_dict(json.loads(json.dumps(dag))) for name, dag in written.items()}
shape = lambda d: {t.task_id: sorted(t.downstream_task_ids) for t in d.tasks}
def interval(dag):
    run = dag.timetable.infer_manual_data_interval(run_after=datetime(2026, 1, 12, 5, tz="UTC"))
    return [run.start.isoformat(), run.end.isoformat()]
json.dump({
    "errors": bag.import_errors, "dags": {name: {
        "catchup": dag.catchup, "runs": dag.max_active_runs, "edges": shape(dag), "edges_read": shape(read[name]),
        "interval": interval(read[name]), "periodic": read[name].timetable.periodic,
        "params": {key: dag.params.get_param(key).schema for key in dag.params},
        "groups": {group: sorted(child for child in found.children)
                   for group, found in dag.task_group.get_task_group_dict().items() if group},
        "tasks": {t.task_id: {
            "pool": t.pool, "retries": t.retries, "delay": t.retry_delay.total_seconds(), "rule": t.trigger_rule,
            "minutes": t.execution_timeout.total_seconds() / 60 if t.execution_timeout else None,
            "threads": getattr(t, "threads", None), "told": bool(t.on_failure_callback),
        } for t in dag.tasks},
    } for name, dag in bag.dags.items()},
}, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def project(new_project: Callable[[str], Project]) -> Project:
    return new_project("dags")


@pytest.fixture(scope="module")
def described(project: Project) -> dict[str, Any]:
    facts = project.root.with_name("described.json")
    project.python("-c", DESCRIBE, str(project.root / "dags"), str(facts), seconds=600)
    return json.loads(facts.read_text())


@pytest.fixture(scope="module")
def daily(described: dict[str, Any]) -> dict[str, Any]:
    return described["dags"]["ctr_daily"]


@pytest.fixture(scope="module")
def stages(project: Project) -> nx.DiGraph:
    """DVC's graph, an edge from each stage to those that read what it writes, without edges that others imply."""
    with Repo(str(project.root)) as repo:
        names = nx.relabel_nodes(repo.index.graph, lambda stage: stage.name.replace("@", "_"))
    return nx.transitive_reduction(nx.DiGraph(names).reverse())


def test_airflow_reads_the_folder_without_errors_and_keeps_the_dags_through_its_database(described) -> None:
    assert described["errors"] == {}
    assert sorted(described["dags"]) == ["ctr_daily", "feature_refresh"]
    for dag in described["dags"].values():
        assert dag["edges_read"] == dag["edges"]
        assert dag["catchup"] is False


def test_the_stages_have_the_edges_of_dvc_and_the_other_steps_stand_around_them(daily, stages) -> None:
    dag = nx.DiGraph(daily["edges"])
    assert set(dag) - set(stages) == set(AROUND)
    assert set(dag.subgraph(stages).edges) == set(stages.edges)
    first = {name for name in stages if not stages.in_degree(name)}
    last = {name for name in stages if not stages.out_degree(name)}
    around = {("open", "ready"), ("close", "ask"), ("ask", "ship"), ("ship", "tidy")}
    around |= {("ready", name) for name in first} | {(name, "close") for name in last}
    assert set(dag.edges) - set(stages.edges) == around


def test_stages_are_grouped_by_their_storey(daily, stages) -> None:
    assert list(daily["groups"]) == ["data_stages", "features_stages", "training_stages", "release_stages"]
    assert sorted(name for children in daily["groups"].values() for name in children) == sorted(stages)
    assert "train_qin" in daily["groups"]["training_stages"]


def test_a_run_closes_the_day_on_which_its_interval_begins_and_can_be_backfilled(described) -> None:
    daily, hourly = described["dags"]["ctr_daily"], described["dags"]["feature_refresh"]
    assert daily["interval"] == ["2026-01-11T00:00:00+00:00", "2026-01-12T00:00:00+00:00"]
    assert hourly["interval"] == ["2026-01-12T04:00:00+00:00", "2026-01-12T05:00:00+00:00"]
    assert daily["periodic"] and hourly["periodic"]
    assert daily["runs"] > 1, "runs work in worktrees of their own"
    assert daily["params"]["day"]["format"] == "date"


def test_training_waits_for_the_pool_and_every_failure_is_told(described, daily) -> None:
    tasks = daily["tasks"]
    trained = {name for name, task in tasks.items() if task["pool"] == "gpu"}
    assert {"train_qin", "train_sdcnv3"} <= trained <= {"train_qin", "train_sdcnv3", "refit"}
    assert all(tasks[name]["threads"] >= 1 for name in ("train_qin", "train_sdcnv3"))
    assert all(task["told"] for dag in described["dags"].values() for task in dag["tasks"].values())
    assert all(task["retries"] > 0 and task["delay"] >= 60 for task in tasks.values())
    assert {name for name, task in tasks.items() if task["minutes"] is None} == {"ask"}, "people have their own bound"
    assert tasks["ship"]["rule"] == "none_failed"
