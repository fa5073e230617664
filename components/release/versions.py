"""The versions of the model, and which of them was the champion when: git tags, as GTO names them.

ctr-ranker@v1.2.0       a version, on the commit of the run that made it; its message is JSON, the facts of FACTS
ctr-ranker#champion#3   this version became the champion: who, why, when, override

The commit's dvc.lock names every byte that was trained on and shipped. `gto show` and `gto history` read the tags too.
A tag is made by git in one step, so it is whole or not there.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from components.common import stored

STAGE = "champion"
DECISION, PACKAGE, SMOKE = "artifacts/refit/decision.json", "artifacts/package", "artifacts/smoke/smoke.json"
RUN = "run/"
AUTHOR = ("clickloop", "clickloop@localhost")  # of a tag, where git knows nobody
# What a version's tag says of it. checkpoint_sha256 is what ships, judged_sha256 what the gate judged
FACTS = {
    "day", "run", "model", "checkpoint_sha256", "judged_sha256", "bento", "decision_sha256", "train_until", "figures",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version, such as v1.2.0, of the Bento `name`."""

    name: str
    version: str
    commit: str
    facts: dict[str, Any]

    @property
    def tag(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def day(self) -> str:
        return str(self.facts["day"])

    def pointer(self) -> dict[str, Any]:
        """What champion.json says of it."""
        said = ("day", "model", "checkpoint_sha256", "judged_sha256", "bento", "train_until")
        of = {name: self.facts[name] for name in said}
        return {"name": self.name, "version": self.version, "revision": self.tag, **of}


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """A version became the champion, the `number`th time that one did."""

    number: int
    version: Version
    who: str
    why: str
    when: str
    override: str | None


def versions(root: Path) -> list[Version]:
    """All, the oldest first. Tags of others are none of them."""
    found = []
    for tag, commit, subject in _tags(root, "*@v*"):
        name, _, version = tag.rpartition("@")
        facts = _json(subject)
        if re.fullmatch(r"v\d+\.\d+\.\d+", version) and facts.keys() == FACTS:  # `gto deprecate` writes v1.2.0!
            found.append(Version(name=name, version=version, commit=commit, facts=facts))
    return sorted(found, key=lambda one: (one.name, _order(one.version)))


def history(root: Path) -> list[Promotion]:
    """Every promotion and rollback, the newest first."""
    known = {(one.name, one.commit): one for one in versions(root)}
    found = []
    for tag, commit, subject in _tags(root, f"*#{STAGE}#*"):
        name, _, number = tag.split("#")
        said = _json(subject)  # nothing of what `gto assign` made
        if (version := known.get((name, commit))) and number.isdecimal():
            words = {key: str(said.get(key, "unknown")) for key in ("who", "why", "when")}
            found.append(Promotion(number=int(number), version=version, override=said.get("override"), **words))
    return sorted(found, key=lambda one: one.number, reverse=True)


def nights(root: Path, before: str) -> list[dict[str, Any]]:
    """What the gate measured on the runs of earlier days (`night` of decision.json), by day."""
    found = {}
    for tag, _, subject in _tags(root, f"{RUN}*"):
        day = tag.removeprefix(RUN)
        if re.fullmatch(r"\d{4}-\d\d-\d\d", day) and day < before and (night := _json(subject).get("night")):
            found[day] = night
    return [found[day] for day in sorted(found)]


def champion(root: Path) -> Version | None:
    """The version that was promoted last."""
    return next((one.version for one in history(root)), None)


def find(root: Path, text: str) -> Version:
    """The version of this name (v1.2.0), of this run (run/2026-01-11) or of this day (2026-01-11), the newest of them.

    Raises ValueError where there is none.
    """
    every = versions(root)
    for one in reversed(every):
        if text in (one.version, one.tag, one.facts["run"], one.day):
            return one
    known = ", ".join(f"{one.version} of {one.day}" for one in every) or "none yet"
    raise ValueError(f"no version {text!r}; there are: {known}")


def register(root: Path, run: str) -> str:
    """Make the run behind a tag, such as run/2026-01-11, a version. Returns it; where it is one already, the same.

    Raises ValueError where the gate rejected, nothing was built, or DVC does not have the run's files.
    """
    commit = git(root, "rev-parse", "--verify", f"{run}^{{commit}}")
    decision, package = decided(root, commit)
    name = package["tag"].partition(":")[0]
    judged = decision["candidates"][decision["model"]]
    facts = {
        "day": re.sub(r"\.\d+$", "", run.removeprefix(RUN)),
        "run": run,
        "model": decision["model"],
        "checkpoint_sha256": package["checkpoint_sha256"],
        "judged_sha256": decision["checkpoint_sha256"],
        "bento": package["tag"],
        "decision_sha256": sha256(stored.read(root, commit, DECISION)).hexdigest(),
        "train_until": decision["shipped"]["train_until"],
        "figures": {rule["rule"]: rule["value"] for rule in judged["rules"] if " on " not in rule["rule"]}
        | {"auc": judged["auc"]},
    }
    every = [one for one in versions(root) if one.name == name]
    for one in every:
        if one.facts == facts:
            return one.version
        if one.commit == commit:
            raise ValueError(f"{run}: its commit is {one.version} already, of {one.facts['run']}; run the day again")
    major, minor, patch = max((_order(one.version) for one in every), default=(0, 0, 0))
    version = f"v{major}.{minor}.{patch + 1}"
    _tag(root, f"{name}@{version}", commit, facts)
    return version


def decided(root: Path, revision: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """decision.json and package.json at a revision. Raises ValueError where the run was not approved."""
    decision = json.loads(stored.read(root, revision, DECISION))
    package = json.loads(stored.read(root, revision, f"{PACKAGE}/package.json"))
    if decision["verdict"] != "approve" or not package["built"]:
        raise ValueError(
            f"{revision}: the gate rejected this run, so nothing was built: {'; '.join(decision['reasons'])}. To ship "
            "it, change the limits under `gate` in params.yaml, with a reason in the commit, and run the day again"
        )
    return decision, package


def assign(root: Path, version: Version, who: str, why: str, override: str | None) -> int:
    """Make it the champion, by a tag. Returns the number of the promotion."""
    numbers = (tag.rpartition("#")[2] for tag, *_ in _tags(root, f"{version.name}#*"))
    number = max((int(number) for number in numbers if number.isdecimal()), default=0) + 1
    when = datetime.now(UTC).isoformat(timespec="seconds")
    said = {"version": version.version, "who": who, "why": why, "when": when, "override": override}
    _tag(root, f"{version.name}#{STAGE}#{number}", version.commit, said)
    return number


def git(root: Path, *arguments: str) -> str:
    """What git says. Raises ValueError with its words."""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _tag(root: Path, name: str, commit: str, said: dict[str, Any]) -> None:
    settings = ["-c", "tag.gpgsign=false"]
    if subprocess.run(["git", "var", "GIT_COMMITTER_IDENT"], cwd=root, capture_output=True).returncode:
        settings += ["-c", f"user.name={AUTHOR[0]}", "-c", f"user.email={AUTHOR[1]}"]
    git(root, *settings, "tag", "--annotate", "--message", json.dumps(said, sort_keys=True), name, commit)


def _tags(root: Path, pattern: str) -> list[tuple[str, str, str]]:
    """Name, commit and first line of each annotated tag."""
    words = "--format=%(refname:strip=2)%00%(*objectname)%00%(contents:subject)"
    lines = (line.split("\0") for line in git(root, "tag", "--list", words, pattern).splitlines())
    return [(tag, commit, subject) for tag, commit, subject in lines if commit]


def _json(text: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _order(version: str) -> tuple[int, int, int]:
    major, minor, patch = map(int, version[1:].split("."))
    return major, minor, patch
