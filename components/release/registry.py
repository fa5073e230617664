"""The registry: which version serves. Promote one, or roll back to one. Outside of the graph: it changes the world.

The versions and their history are git tags (versions.py), and what serves is the live folder (common/live.py). All that
is served comes out of DVC at the version's commit. A promotion makes the release folder and the online store first,
then the tag, and moves the pointer last. So a kill leaves the old champion serving, whole, or the new one. The same
command again finishes what was cut short.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from datetime import date, datetime, timedelta
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml

from components.common import stored
from components.common.artifacts import folder_hash, new_folder, read_json, write_json
from components.common.live import RELEASES, STORES, Deployment, current, locked, switch
from components.release import versions
from components.release.versions import DECISION, PACKAGE, SMOKE, Version

FEATURES, REPO, RECEIPT = "data/features", "feature_repo", "receipt.json"
AGES = (2, 4, 8, 16)  # days: the champions of then are judges too
NO_FEATURES = {"user_id", "item_id", "event_timestamp", "created_timestamp"}  # columns of the views' sources


def promote(root: Path, live: Path, version: str, who: str, why: str, override: str | None = None) -> str:
    """Make a version the champion, and serve it. Returns what was done.

    version   v1.2.0, run/2026-01-11 or 2026-01-11; an approved run that is no version yet becomes one
    override  a reason to go on though the smoke test did not pass, or DVC's remote lacks bytes. It stays in the history

    Raises ValueError where the version does not pass `verify`. No reason makes up for hashes that do not match.
    """
    if not why.strip() or (override is not None and not override.strip()):
        raise ValueError("promote: give a reason; it stays in the history")
    chosen = _find(root, version)
    with locked(live):
        if _serves(root, live, chosen):
            return f"{chosen.tag} ({chosen.facts['bento']}) is the champion already; nothing was done"
        overridden = verify(root, chosen)
        if overridden and override is None:
            raise ValueError(f"promote {chosen.tag}: {'; '.join(overridden)}; or give `--override REASON`")
        return _serve(root, live, chosen, who, why, override if overridden else None)


def rollback(root: Path, live: Path, version: str, who: str, why: str) -> str:
    """Make a version that was the champion once the champion again. The live store stays, if the version can read it.

    The remote is not asked: in an emergency, the cache is enough. Raises ValueError as `promote` does.
    """
    if not why.strip():
        raise ValueError("rollback: give a reason; it stays in the history")
    chosen = versions.find(root, version)
    if chosen not in (one.version for one in versions.history(root)):
        raise ValueError(
            f"rollback: {chosen.version} never was the champion; run `python -m components registry promote "
            f"{chosen.version}`"
        )
    with locked(live):
        if _serves(root, live, chosen):
            return f"{chosen.tag} ({chosen.facts['bento']}) is the champion already; nothing was done"
        verify(root, chosen, remote=False)  # what was overridden once stays so; hashes never are
        return _serve(root, live, chosen, who, why, None)


def verify(root: Path, version: Version, *, remote: bool = True) -> list[str]:
    """What speaks against serving a version, each with its remedy; an override may go on all the same.

    Raises ValueError where the gate did not approve it, or its tag, decision and package do not name the same bytes.
    """
    facts = version.facts
    decision, package = versions.decided(root, version.commit)
    named = {
        "the decision": (facts["decision_sha256"], sha256(stored.read(root, version.commit, DECISION)).hexdigest()),
        "what the gate judged": (facts["judged_sha256"], decision["checkpoint_sha256"]),
        "what the decision ships": (facts["checkpoint_sha256"], decision["shipped"]["checkpoint_sha256"]),
        "what the package holds": (facts["checkpoint_sha256"], package["checkpoint_sha256"]),
        "the Bento": (facts["bento"], package["tag"]),
    }
    for what, (tagged, found) in named.items():
        if tagged != found:
            raise ValueError(
                f"{version.tag}: its tag names {tagged}, {what} at its commit is {found}; no override helps: these are "
                "not the bytes that were approved. Delete the tag if it is not yours, and promote another version"
            )
    against = []
    smoke = json.loads(stored.read(root, version.commit, SMOKE))
    if not smoke.get("passed") or smoke.get("tag") != package["tag"]:
        against.append(f"{package['tag']} has not passed the smoke test; run the day again")
    ships = (PACKAGE, f"checkpoints/{facts['model']}", "checkpoints/refit", DECISION, SMOKE, FEATURES)
    if remote and (lacking := stored.not_pushed(root, version.commit, ships)):
        against.append(
            f"DVC's remote does not have {', '.join(lacking)}, so another clone could not use this champion; "
            f"run `dvc push` where the run's commit is checked out (of a day: .runs/{version.day})"
        )
    return against


def judge(root: Path, live: Path, day: str) -> dict[str, Any]:
    """champion.json of the run of a day: the version that a challenger is compared with, and may start from.

    A run that there is already keeps the judge that it had. Else it is the champion that serves, if it is of an
    earlier day; else the newest version of an earlier day that ever was the champion; else none. With it come the
    versions that were the champion AGES days ago, which small losses are found by, and what earlier nights measured.
    """
    try:
        return json.loads(versions.git(root, "show", f"{versions.RUN}{day}:champion.json"))
    except ValueError:
        pass  # no such run yet
    promoted = {one.version.tag: one.version for one in versions.history(root)}
    now = current(live)
    serving = next((one for one in promoted.values() if now and _released(live, one) == now.release), None)
    earlier = sorted((one for one in promoted.values() if one.day < day), key=lambda one: one.day)
    if not earlier:
        return {"version": None}
    chosen = serving if serving in earlier else earlier[-1]
    assert chosen is not None
    limits = [str(date.fromisoformat(day) - timedelta(days=age)) for age in AGES]
    before = [next((one for one in reversed(earlier) if one.day <= limit), None) for limit in limits]
    others = dict.fromkeys(one.tag for one in before if one is not None and one.day < chosen.day)
    return chosen.pointer() | {
        "earlier": [promoted[tag].pointer() for tag in others],
        "nights": versions.nights(root, day),
    }


def pin(root: Path, version: str | None) -> str:
    """Write champion.json of the work tree, so that its own `dvc repro` is judged against a version."""
    chosen = versions.find(root, version) if version else versions.champion(root)
    if chosen is None:
        raise ValueError("registry pin: there is no champion yet; name a version, or run `python -m components run`")
    write_json(root / "champion.json", chosen.pointer())
    return f"champion.json names {chosen.tag}: `dvc repro` compares with it; `git checkout champion.json` takes it back"


def standing(root: Path, live: Path) -> dict[str, Any]:
    """Every version with its state and its last promotion, the newest first, and what is not finished.

    champion  the last one that was promoted;  serving  the live folder's;  former  one that was the champion once
    """
    now, promotions = current(live), versions.history(root)
    rows = []
    for one in reversed(versions.versions(root)):
        last = next((promotion for promotion in promotions if promotion.version == one), None)
        serving = bool(now and now.release == _released(live, one))
        champion = bool(promotions) and promotions[0].version == one
        states = [word for word, holds in (("champion", champion), ("serving", serving)) if holds]
        rows.append(
            {
                "day": one.day, "version": one.version, "name": one.name, "model": one.facts["model"],
                "auc": one.facts["figures"]["auc"], "verdict": "approved", "run": one.facts["run"],
                "state": " ".join(states) or ("former" if last else ""),
                **{key: getattr(last, key, None) for key in ("who", "why", "when", "override")},
            }
        )  # fmt: skip
    return {"versions": rows, "unfinished": _unfinished(root, live, now), "store": _told(now)}


def shown(root: Path, live: Path, version: str) -> dict[str, Any]:
    """All that is known of a version."""
    one = versions.find(root, version)
    row = next(row for row in standing(root, live)["versions"] if row["version"] == one.version)
    promotions = [told(promotion) for promotion in versions.history(root) if promotion.version == one]
    return {**row, **one.facts, "tag": one.tag, "commit": one.commit, "promotions": promotions}


def told(promotion: versions.Promotion) -> dict[str, Any]:
    return {
        "number": promotion.number, "when": promotion.when, "version": promotion.version.version,
        "day": promotion.version.day, "who": promotion.who, "why": promotion.why, "override": promotion.override,
    }  # fmt: skip


# ---- the steps of a promotion -----------------------------------------------------------------------------------


def _find(root: Path, text: str) -> Version:
    """As versions.find. A run, or a day, is the one that its tag names now; it becomes a version if it is none yet."""
    run = text if text.startswith(versions.RUN) else f"{versions.RUN}{text}"
    if versions.git(root, "tag", "--list", run):
        text = versions.register(root, run)
    return versions.find(root, text)


def _serves(root: Path, live: Path, version: Version) -> bool:
    now = current(live)
    return versions.champion(root) == version and bool(now and now.release == _released(live, version))


def _released(live: Path, version: Version) -> Path:
    return live / RELEASES / version.name / version.version


def _serve(root: Path, live: Path, version: Version, who: str, why: str, override: str | None) -> str:
    """The release and the store, then the tag, then the pointer."""
    from components.features.online import drop
    from components.features.publish import PublishConfig

    settings = yaml.safe_load(versions.git(root, "show", f"{version.commit}:params.yaml"))
    config = PublishConfig(**settings["publish"])
    release = _release(root, live, version)
    store, kept = _store(root, live, version, config)
    if versions.champion(root) != version:  # else a promotion that was killed had come this far
        versions.assign(root, version, who, why, override)
    switch(live, release=release, store=store, why=why, who=who, keep=config.keep, drop=drop)
    data = f"the live store stays: {kept}" if kept else f"with the features of {version.day}"
    return f"{version.tag} ({version.facts['bento']}) is the champion and serves, {data}"


def _release(root: Path, live: Path, version: Version) -> Path:
    """The release folder, whole. Raises ValueError where the model in the Bento is not the one that ships."""
    from models.checkpoint import checkpoint_hash

    release = _released(live, version)
    try:
        known = read_json(release / "release.json", "package")
        if known["facts"] == version.facts and known["bento_sha256"] == folder_hash(release / "bento"):
            return release
    except ValueError:
        pass  # not there, or somebody changed it
    with new_folder(release) as folder:
        stored.get(root, version.commit, PACKAGE, folder / "package")
        for part in (folder / "package").iterdir():
            part.rename(folder / part.name)
        (folder / "package").rmdir()
        (model,) = (file.parent for file in (folder / "bento/models").rglob("model.safetensors"))
        if (found := checkpoint_hash(model)) != version.facts["checkpoint_sha256"]:
            raise ValueError(
                f"{version.tag}: the Bento holds the checkpoint {found}, its tag names "
                f"{version.facts['checkpoint_sha256']}; no override helps. Run the day again"
            )
        said = {"version": version.version, "facts": version.facts, "bento_sha256": folder_hash(folder / "bento")}
        write_json(folder / "release.json", said)
    return release


def _store(root: Path, live: Path, version: Version, config: Any) -> tuple[Path, str | None]:
    """The online store for a version, and why it is the live one, if it is.

    The live store is kept if its data are newer, or the same, and it serves the same features. A new store gets the
    clicks that were pushed and that its log does not hold.
    """
    from components.features import clicks, publish

    receipt, now = json.loads(stored.read(root, version.commit, f"{FEATURES}/{RECEIPT}")), current(live)
    serves = now.store if now and now.store and now.store.is_dir() else None
    has = read_json(serves / RECEIPT, "features") if serves else None
    columns = {view: set(names) for view, names in has["features"].items()} if has else {}
    readable = bool(has) and _features(root, version, columns) == columns
    if serves and has and readable and _age(has) > _age(receipt):
        return serves, f"its data until {has['until']} are newer"
    with tempfile.TemporaryDirectory(prefix="clickloop-promote-") as scratch:
        features, repo = Path(scratch, FEATURES), Path(scratch, REPO)  # as in a work tree
        features.parent.mkdir()
        stored.get(root, version.commit, FEATURES, features)
        stored.get(root, version.commit, REPO, repo)
        sources = publish.sources_hash(features)
        if serves and has and readable and _age(has) == _age(receipt) and has["sources_sha256"] == sources:
            return serves, "it has the same data"
        # named by its content: a fill that was killed is cleared away by the next, and a whole one is found
        name = sha256(json.dumps([receipt, sources, folder_hash(repo)], sort_keys=True).encode()).hexdigest()[:12]
        store = live / STORES / f"{receipt['until'][:10]}-{name}"
        if not (store / RECEIPT).is_file():
            publish.fill(config, features, repo, store)  # from nothing: a copy would ask for the lock that is held
    clicks.replay(live, store)
    return store, None


def _age(receipt: dict[str, Any]) -> tuple[datetime, datetime]:
    """The end of a store's data, and its newest event."""
    return datetime.fromisoformat(receipt["until"]), datetime.fromisoformat(receipt["log_until"])


def _features(root: Path, version: Version, views: Iterable[str]) -> dict[str, set[str]]:
    """View -> the features that the version's sources have, for some views."""
    import pyarrow.parquet as pq

    found = {}
    for view in views:
        content = stored.read(root, version.commit, f"{FEATURES}/sources/{view}.parquet")
        found[view] = set(pq.read_schema(BytesIO(content)).names) - NO_FEATURES
    return found


def _unfinished(root: Path, live: Path, now: Deployment | None) -> str | None:
    champion = versions.champion(root)
    if champion is None or (now and now.release == _released(live, champion)):
        return None
    serves = f"{now.version} serves" if now and now.version else "nothing serves here"
    return (
        f"{champion.version} was promoted, but {serves}. Finish it: "
        f"`python -m components registry promote {champion.version} --why REASON`"
    )


def _told(now: Deployment | None) -> dict[str, Any] | None:
    if now is None or now.store is None:
        return None
    receipt = read_json(now.store / RECEIPT, "features")
    return {"id": now.store.name, "until": receipt["until"], "since": now.when, "why": now.why}
