"""One whole night of the tiny world: the first run of a clone, cut short on its way, and run again."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from components.common.live import current
from components.operations.day import tagged
from components.operations.worktree import git
from tests.components.operations.kills import kill_at, kill_stage, with_remote_gone

if TYPE_CHECKING:
    from tests.conftest import Project

pytestmark = pytest.mark.slow
DAY = "2026-01-06"


@pytest.fixture(scope="module")
def night(new_project: Callable[[str], Project]) -> Project:
    """After the run of a day. Before it: an `open` and a stage were killed, and the stage left its command running."""
    project = new_project("night")
    kill_at(project, "reset --quiet --hard", "day", "open", DAY)
    project.python("-m", "components", "day", "open", DAY)
    project.python("-m", "components", "day", "stage", DAY, "arrivals")
    kill_stage(project, DAY, "ingest", 0.3, orphan=True)
    (project.root / "said").write_text(project.python("-m", "components", "run", DAY))
    return project


def test_the_run_ends_in_a_tag_and_a_version_that_serves(night: Project) -> None:
    said = (night.root / "said").read_text()
    facts = tagged(night.root, f"run/{DAY}")
    assert facts["verdict"] == "approve" and facts["rows"] > 5000 and facts["late"] > 0
    assert {"data/dataset", "checkpoints/refit", "artifacts/package"} <= facts["hashes"].keys()
    assert facts["code"] == git(night.root, "rev-parse", "HEAD")
    assert git(night.root, "tag", "--list", "ctr-ranker@*") == "ctr-ranker@v0.0.1"
    now = current(night.root / ".live")
    assert now and now.version == "v0.0.1" and now.store
    assert "process" in said and "of an earlier attempt was still at work" in said
    assert "v0.0.1" in said and f"{facts['rows']:,}" in said  # the closing table
    page = (night.root / f".runs/reports/{DAY}.html").read_text()
    assert facts["model"] in page and f"run/{DAY}" in page and 'href="index.html"' in page
    index = (night.root / ".runs/reports/index.html").read_text()
    assert f'<a href="{DAY}.html">{DAY}</a></td><td class="ok">promoted</td><td>v0.0.1</td>' in index


def test_the_work_tree_is_as_it_was(night: Project) -> None:
    (night.root / "said").unlink(missing_ok=True)
    assert git(night.root, "status", "--porcelain") == ""
    assert not (night.root / "dvc.lock").exists()


def test_the_bytes_are_in_the_remote(night: Project) -> None:
    command = ["python", "-m", "dvc", "status", "--cloud", "--json"]
    tree = night.root / ".runs" / DAY
    done = subprocess.run(command, cwd=tree, env=night.env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {}


def test_a_close_that_was_killed_or_has_no_remote_is_closed_again(night: Project) -> None:
    """The hashes are those of the run that nobody disturbed."""
    before = git(night.root, "rev-parse", f"run/{DAY}^{{tree}}")
    git(night.root, "tag", "--delete", f"run/{DAY}")
    for at in ("commit-tree", "tag --force"):
        kill_at(night, at, "day", "close", DAY)
    with_remote_gone(night, lambda: night.python("-m", "components", "day", "close", DAY, code=75))
    facts = json.loads(night.python("-m", "components", "day", "close", DAY).splitlines()[-1])
    assert facts["report"].endswith(f"{DAY}.html")
    assert git(night.root, "rev-parse", f"run/{DAY}^{{tree}}") == before


def test_the_same_run_again_changes_nothing(night: Project) -> None:
    tag, deployed = git(night.root, "rev-parse", f"run/{DAY}"), current(night.root / ".live")
    said = night.python("-m", "components", "run", DAY)
    assert git(night.root, "rev-parse", f"run/{DAY}") == tag
    assert current(night.root / ".live") == deployed
    stages = [line for line in said.splitlines() if line.endswith(" ran")]
    assert [line.split()[0] for line in stages] == ["arrivals"]  # it looks at the files each time


def test_an_older_day_changes_nothing_that_serves(night: Project) -> None:
    """Its stages stay unrun here: `ship` alone decides. The tag of the newer day is what makes it old."""
    git(night.root, "tag", "-a", "-m", json.dumps(tagged(night.root, f"run/{DAY}") | {"day": "2026-01-05"}),
        "run/2026-01-05", f"run/{DAY}^{{commit}}")  # fmt: skip
    before = current(night.root / ".live")
    facts = json.loads(night.python("-m", "components", "day", "ship", "2026-01-05").splitlines()[-1])
    assert (facts["promoted"], facts["published"], facts["version"]) == (False, False, None)
    assert f"{DAY} is closed already" in facts["why"] or "newer" in facts["why"]
    assert current(night.root / ".live") == before
