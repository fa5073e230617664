"""More of Airflow's nights: each test closes a day or more, so the whole takes about half an hour.

    pytest tests/dags/long_nights.py

`make test` does not collect this file. Not all of its tests have been seen to pass.
"""

# ruff: noqa: F403, F405 - fixtures and helpers of the other file
from __future__ import annotations

import os
import shutil
import signal
import subprocess
from datetime import date

import httpx
import psutil
import pytest

from tests.dags.test_scheduler import *


def test_the_run_has_a_note_with_its_figures_and_a_link_to_its_report_and_that_one_to_the_tag(
    airflow: Airflow, night: str
) -> None:
    day = day_of(airflow, night)
    note = airflow.ask("GET", f"{RUNS}/{night}")["note"]
    facts = airflow.facts(night, "close")
    assert f"{day}: approve" in note
    assert f"AUC {facts['auc']:.4f}" in note
    assert f"{facts['rows']:,} rows" in note
    links = airflow.ask("GET", f"{RUNS}/{night}/taskInstances/close/links")["extra_links"]
    assert links["Report"] in note
    page = airflow.client.get(links["Report"])
    assert page.status_code == 200
    assert f'<a href="{day}/tag">run/{day}</a>' in page.text
    tag = airflow.client.get(f"{links['Report']}/tag")
    assert f"tag run/{day}" in tag.text and facts["model"] in tag.text
    assert httpx.get(links["Report"]).status_code == 401
    index = airflow.client.get("/clickloop/runs/index.html")
    assert f'href="{day}.html"' in index.text and airflow.client.get(f"{links['Report']}.html").text == page.text
    assert airflow.client.get(f"/clickloop/runs/{date(2020, 1, 1)}").status_code == 404


def test_if_nobody_answers_in_time_nothing_is_promoted(airflow: Airflow, night: str) -> None:
    """Cleared tasks of an ended run ask again. The settings are those of now."""
    airflow.project.set_params({"schedule.answer_hours": 0.001})
    airflow.ask(
        "POST",
        "dags/ctr_daily/clearTaskInstances",
        json={"dag_run_id": night, "task_ids": ["ask"], "include_downstream": True, "dry_run": False},
    )
    airflow.wait("the cleared tasks are there", lambda: airflow.ended(night) is None, RUN_SECONDS)
    airflow.wait("the run ends again", lambda: airflow.ended(night), RUN_SECONDS)
    assert airflow.ended(night) == "success"
    assert not airflow.facts(night, "ask")["approved"]
    assert not airflow.facts(night, "ship")["promoted"]


def test_if_the_gate_rejects_a_second_run_of_the_day_it_succeeds_ships_nothing_and_says_so(
    airflow: Airflow, night: str
) -> None:
    """The older commit of the day keeps a name."""
    day = day_of(airflow, night)
    before = git(airflow.project, "rev-parse", f"run/{day}^{{commit}}")
    airflow.project.set_params({"gate.min_auc": 0.999})
    try:
        run = airflow.ask("POST", RUNS, json={"logical_date": None, "conf": {"day": day}})["dag_run_id"]
        airflow.wait("the run ends", lambda: airflow.ended(run), RUN_SECONDS)
    finally:
        airflow.project.set_params({"gate.min_auc": 0.0})
    states = {name: task["state"] for name, task in airflow.tasks(run).items()}
    assert states == dict.fromkeys(states, "success") | {"ask": "skipped"}, airflow.said()
    assert airflow.facts(run, "close")["verdict"] == "reject"
    assert not airflow.facts(run, "ship")["promoted"]
    assert any(text.startswith(f"{day}: the gate rejected: ") for text in airflow.webhook.texts(run))
    assert git(airflow.project, "rev-parse", f"run/{day}.1^{{commit}}") == before


# ---- faults -------------------------------------------------------------------------------------------------------


def test_broken_data_fail_at_once_and_the_webhook_hears_it(airflow: Airflow, night: str) -> None:
    airflow.project.set_params({"validate.label_rate": [0.9, 0.95]})
    try:
        conf = {"day": day_of(airflow, night)}
        run = airflow.ask("POST", RUNS, json={"logical_date": None, "conf": conf})["dag_run_id"]
        airflow.wait("the run fails", lambda: airflow.ended(run), RUN_SECONDS)
    finally:
        airflow.project.set_params({"validate.label_rate": [0.01, 0.95]})
    assert airflow.ended(run) == "failed"
    tasks = airflow.tasks(run)
    assert (tasks["validate"]["state"], tasks["validate"]["try_number"]) == ("failed", 1)
    assert tasks["embed"]["state"] == tasks["close"]["state"] == "upstream_failed"
    (told,) = (text for text in airflow.webhook.texts(run) if "failed" in text)
    assert told.startswith("validate failed: validate: ")


def test_a_missing_day_holds_no_worker_and_the_run_goes_on_when_it_comes(airflow: Airflow, night: str) -> None:
    project = airflow.project
    incoming = project.root / "incoming"
    incoming.mkdir()
    (incoming / "clicks-2026-03-04.csv").write_text("user,item,time,click\n1,2,2026-03-04T10:00:00Z,1\n")
    before = (project.root / "params.yaml").read_bytes()
    columns = {"user_id": "user", "item_id": "item", "timestamp": "time", "label": "click"}
    project.set_params(
        {
            "ingest.source": "files",
            "ingest.raw": "incoming",
            "ingest.files.events.path": "clicks-*.csv",
            "ingest.files.events.columns": columns,
        }
    )
    try:
        run = airflow.ask("POST", RUNS, json={"logical_date": None, "conf": {"day": "2026-03-05"}})["dag_run_id"]
        airflow.wait("it waits", lambda: airflow.state(run, "ready") == "up_for_reschedule", RUN_SECONDS)
        assert not [task for task in airflow.tasks(run).values() if task["state"] == "running"]
        shutil.copy(incoming / "clicks-2026-03-04.csv", incoming / "clicks-2026-03-05.csv")
        airflow.wait("it goes on", lambda: airflow.state(run, "ready") == "success", RUN_SECONDS)
        airflow.ask("PATCH", f"{RUNS}/{run}", json={"state": "failed"})

        project.set_params({"run.wait_hours": 0})
        run = airflow.ask("POST", RUNS, json={"logical_date": None, "conf": {"day": "2026-03-06"}})["dag_run_id"]
        airflow.wait("it fails", lambda: airflow.ended(run), RUN_SECONDS)
        assert airflow.state(run, "ready") == "failed"
        (told,) = (text for text in airflow.webhook.texts(run) if "failed" in text)
        assert "2026-03-06" in told
    finally:
        (project.root / "params.yaml").write_bytes(before)


def test_a_manual_run_for_a_day_that_is_none_is_refused(airflow: Airflow, night: str) -> None:
    refused = airflow.client.post(f"/api/v2/{RUNS}", json={"logical_date": None, "conf": {"day": "$(reboot)"}})
    assert refused.status_code == 400, refused.text


def test_two_days_are_backfilled_at_once_and_a_killed_scheduler_comes_back(airflow: Airflow, night: str) -> None:
    """Its orphaned trainings are ended before their new attempts begin."""
    project = airflow.project
    endless = {"max_epochs": 1_000_000, "patience": 1_000_000}
    project.set_params({f"train.{model}.{name}": value for model in MODELS for name, value in endless.items()})
    days = ["2026-03-04", "2026-03-05"]
    made = ["make", "-o", ".venv", "backfill", f"FROM={days[0]}", f"TO={days[1]}", "DB=postgres"]
    home = f"AIRFLOW_HOME={project.env['AIRFLOW_HOME']}"
    subprocess.run([*made, home, "ARGS=--run-backwards"], cwd=project.root, env=project.env, check=True)
    airflow.wait("both runs are there", lambda: len(airflow.runs("backfill")) == 2, RUN_SECONDS)
    runs = airflow.runs("backfill")
    airflow.wait("two trainings run", lambda: len(training(project)) == 2, RUN_SECONDS)
    assert sorted(day_of(airflow, run) for run in runs) == days
    assert {path.name for path in (project.root / ".runs").glob("2026-03-*")} == set(days)
    threads = {psutil.Process(pid).environ()["OMP_NUM_THREADS"] for pid in training(project)}
    assert threads == {str(max(1, len(os.sched_getaffinity(0)) // 2))}

    orphans = set(training(project))
    parts = psutil.Process(airflow.process.pid).children(recursive=True)
    (scheduler,) = (one.pid for one in parts if one.pid == os.getsid(one.pid) and "scheduler" in one.cmdline())
    os.kill(scheduler, signal.SIGKILL)
    airflow.wait("it is told", lambda: "scheduler ended by SIGKILL" in airflow.output.read_text(), STOP_SECONDS)
    airflow.wait("the orphans are gone", lambda: not orphans & set(training(project)), STOP_SECONDS)
    airflow.wait("two trainings run again", lambda: len(training(project)) == 2, RUN_SECONDS)


def test_ctrl_c_leaves_nothing_running(airflow: Airflow) -> None:
    project = airflow.project
    os.killpg(airflow.process.pid, signal.SIGINT)  # Ctrl-C: to make and all that it started in the foreground
    try:
        airflow.process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        left = processes_of(project)
        pytest.fail(f"`make airflow` still runs {STOP_SECONDS} s after Ctrl-C: {left}\n{airflow.said()}")
    assert processes_of(project) == {}, airflow.said()
