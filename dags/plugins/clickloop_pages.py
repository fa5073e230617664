"""The reports of runs, inside of Airflow's own web server: /clickloop/runs/2026-01-11, its tag, and index.html.

Only who is logged in sees them, as with all of Airflow's pages.
"""

from __future__ import annotations

import html
import os
import re
import subprocess
from datetime import date
from pathlib import Path

from airflow.api_fastapi.core_api.security import get_user
from airflow.plugins_manager import AirflowPlugin
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import HTMLResponse, PlainTextResponse

PROJECT = Path(os.environ.get("CLICKLOOP_PROJECT") or Path(__file__).resolve().parents[2])

REPORTS = PROJECT / ".runs/reports"

pages = FastAPI(dependencies=[Depends(get_user)], openapi_url=None)


@pages.get("/index.html")
def index() -> HTMLResponse:
    """All runs, as the last one that ended wrote it."""
    file = REPORTS / "index.html"
    if not file.is_file():
        raise HTTPException(404, "no index of the runs here; it is made when a run closes")
    return HTMLResponse(file.read_text())


@pages.get("/{day}.html")
@pages.get("/{day}")
def report(day: date) -> HTMLResponse:
    """The run's page as `day close` wrote it, with a line above it that leads to the tag."""
    file = REPORTS / f"{day}.html"
    if not file.is_file():
        raise HTTPException(404, f"no report of {day} here; it is made when the run closes")
    strip = f'<p style="margin:1em">The tag of this run: <a href="{day}/tag">run/{day}</a></p>'
    return HTMLResponse(re.sub(r"(<body[^>]*>)", rf"\1{strip}", file.read_text(), count=1))


@pages.get("/{day}/tag")
def tag(day: date) -> PlainTextResponse:
    """What the tag says, and the commit that it names."""
    shown = subprocess.run(
        ["git", "show", "--stat", f"refs/tags/run/{day}"], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )
    if shown.returncode:
        raise HTTPException(404, html.escape(f"there is no tag run/{day}"))
    return PlainTextResponse(shown.stdout)


class ClickloopPages(AirflowPlugin):
    name = "clickloop_pages"
    fastapi_apps = [{"app": pages, "url_prefix": "/clickloop/runs", "name": "clickloop runs"}]  # noqa: RUF012
