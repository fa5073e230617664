"""The DAG: its shape beside dvc.yaml's, what it may import, and whole runs of a tiny world with each of three ends.

Airflow reads its settings when it is imported, so it is never imported here: each look at it is a process of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import pytest
from dvc.repo import Repo

if TYPE_CHECKING:
    from tests.conftest import Project

DAGS = Path(__file__).resolve().parents[2] / "dags"
NOT_A_STAGE = {"approved", "report"}
AFTER_VALIDATE = {
    "embed", "features", "dataset", "train_qin", "train_sdcnv3", "evaluate_qin", "evaluate_sdcnv3",
    "gate", "approved", "package", "smoke", "report",
}  # fmt: skip

DESCRIBE = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
from airflow.serialization.serialized_objects import DagSerialization

bag = DagBag(dag_folder=sys.argv[1])
dag = bag.dags["ctr_daily"]
written = DagSerialization.to_dict(dag)
read = DagSerialization.from_dict(json.loads(json.dumps(written)))
shape = lambda d: {t.task_id: sorted(t.downstream_task_ids) for t in d.tasks}
json.dump({
    "errors": bag.import_errors, "dags": sorted(bag.dags), "catchup": dag.catchup, "runs": dag.max_active_runs,
    "edges": shape(dag), "edges_read": shape(read), "params": sorted(dag.params),
    "tasks": {t.task_id: {
        "pool": t.pool, "retries": t.retries, "minutes": t.execution_timeout.total_seconds() / 60,
        "delay": t.retry_delay.total_seconds(), "command": getattr(t, "bash_command", None),
    } for t in dag.tasks},
}, open(sys.argv[2], "w"))
"""

RUN = """
import json, sys
from airflow.utils.db import initdb
initdb()
from airflow.dag_processing.dagbag import DagBag
from airflow.models.pool import Pool
Pool.create_or_update_pool("gpu", slots=2, description="", include_deferred=False)
run = DagBag(dag_folder=sys.argv[1]).dags["ctr_daily"].test()
states = {t.task_id: t.state for t in run.get_task_instances()}
json.dump({"state": run.state, "tasks": states}, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def project(new_project: Callable[[str], Project]) -> Project:
    return new_project("ctr-daily")


@pytest.fixture(scope="module")
def described(project: Project) -> dict[str, Any]:
    facts = project.root.with_name("described.json")
    project.python("-c", DESCRIBE, str(project.root / "dags"), str(facts), seconds=300)
    return json.loads(facts.read_text())


@pytest.fixture(scope="module")
def stages(project: Project) -> nx.DiGraph:
    """DVC's graph, an edge from each stage to those that read what it writes, without edges that others imply."""
    with Repo(str(project.root)) as repo:
        names = nx.relabel_nodes(repo.index.graph, lambda stage: stage.name.replace("@", "_"))
    return nx.transitive_reduction(nx.DiGraph(names).reverse())


def run_dag(project: Project) -> tuple[str, dict[str, str], set[str]]:
    """One run by `dag.test()`: its state, its tasks' states, and the DVC stages whose command ran."""
    facts = project.root.with_name("run.json")
    facts.unlink(missing_ok=True)
    said = project.python("-c", RUN, str(project.root / "dags"), str(facts))
    found = json.loads(facts.read_text())
    return found["state"], found["tasks"], set(re.findall(r"Running stage '([^']+)'", said))


# ---- shape ------------------------------------------------------------------------------------------------------


def test_airflow_reads_the_folder_without_errors_and_keeps_the_dag_through_its_database(described) -> None:
    assert described["errors"] == {}
    assert described["dags"] == ["ctr_daily"]
    assert described["edges_read"] == described["edges"]
    assert nx.is_directed_acyclic_graph(nx.DiGraph(described["edges"]))


def test_edges_are_those_of_dvc(described, stages) -> None:
    """Once `approved`, which stands between gate and package, is drawn together with gate, and `report` left out."""
    dag = nx.DiGraph(described["edges"])
    assert set(dag) - set(stages) == NOT_A_STAGE
    assert list(dag.predecessors("approved")) == ["gate"]
    assert list(dag.successors("approved")) == ["package"]
    assert list(dag.successors("report")) == []
    dag = nx.contracted_nodes(dag, "gate", "approved", self_loops=False)
    dag.remove_node("report")
    assert set(dag.edges) == set(stages.edges)


def test_each_task_runs_the_stage_of_its_name_and_nothing_from_a_run(described, stages) -> None:
    for name, task in described["tasks"].items():
        if name in NOT_A_STAGE:
            continue
        stage = re.sub("^(train|evaluate)_", r"\1@", name)
        assert task["command"].endswith(f"-m dvc --wait-for-lock repro --single-item {stage}")
        assert "{{" not in task["command"]
    assert described["tasks"]["report"]["command"].endswith("-m components report")
    assert described["params"] == []


def test_training_waits_for_the_gpu_and_resumes_and_broken_data_are_not_tried_again(described) -> None:
    tasks = described["tasks"]
    assert {name for name, task in tasks.items() if task["pool"] == "gpu"} == {"train_qin", "train_sdcnv3"}
    retries = {name: task["retries"] for name, task in tasks.items()}
    assert retries == dict.fromkeys(tasks, 1) | {"train_qin": 2, "train_sdcnv3": 2, "validate": 0}
    assert all(task["minutes"] > 0 and task["delay"] >= 60 for task in tasks.values())
    assert (described["catchup"], described["runs"]) == (False, 1)


# ---- whole runs, in this order: each builds on what the one before it left in the project ------------------------


@pytest.fixture(scope="module")
def approved(project: Project) -> tuple[str, dict[str, str], set[str]]:
    return run_dag(project)


@pytest.mark.slow
def test_an_approved_run_ships(project, approved, described) -> None:
    state, tasks, _ = approved
    assert tasks == dict.fromkeys(described["tasks"], "success")
    assert state == "success"
    decision = json.loads((project.root / "artifacts/gate/decision.json").read_text())
    package = json.loads((project.root / "artifacts/package/package.json").read_text())
    smoke = json.loads((project.root / "artifacts/smoke/smoke.json").read_text())
    assert decision["verdict"] == "approve"
    assert package["built"]
    assert package["checkpoint_sha256"] == decision["checkpoint_sha256"]
    assert smoke["passed"]
    assert smoke["tag"] == package["tag"]
    assert package["tag"] in (project.root / "artifacts/report.html").read_text()


@pytest.mark.slow
def test_if_the_gate_rejects_the_run_succeeds_ships_nothing_and_reports(project, approved, described) -> None:
    shipped = project.root / "artifacts/package/package.json"
    before = shipped.stat().st_mtime_ns
    report = project.root / "artifacts/report.html"
    report.unlink(missing_ok=True)
    project.set_params({"gate.min_auc": 0.999})
    try:
        state, tasks, ran = run_dag(project)
    finally:
        project.set_params({"gate.min_auc": 0.0})
    assert tasks == dict.fromkeys(described["tasks"], "success") | {"package": "skipped", "smoke": "skipped"}
    assert state == "success"
    assert ran == {"gate"}
    assert json.loads((project.root / "artifacts/gate/decision.json").read_text())["verdict"] == "reject"
    assert shipped.stat().st_mtime_ns == before
    assert "0.999" in report.read_text()


@pytest.mark.slow
def test_if_a_contract_is_broken_the_run_fails_and_nothing_comes_after_it(project, approved) -> None:
    report = project.root / "artifacts/report.html"
    report.unlink(missing_ok=True)
    project.set_params({"validate.label_rate": [0.9, 0.95]})
    try:
        state, tasks, ran = run_dag(project)
    finally:
        project.set_params({"validate.label_rate": [0.01, 0.95]})
    fine = dict.fromkeys(("ingest", "champion", "start"), "success")
    assert tasks == dict.fromkeys(AFTER_VALIDATE, "upstream_failed") | fine | {"validate": "failed"}
    assert state == "failed"
    assert ran == {"validate"}
    assert not report.exists()
