"""airflow: Airflow on one machine. It prints its address and login once it is ready, and stops after Ctrl-C.

It replaces `airflow standalone` for three reasons. A Ctrl-C reaches standalone's scheduler twice, from the terminal and
from standalone, and leaves it hanging. A SIGTERM leaves all of its parts running. Its log servers listen on every
interface, and parts that share one disk need none. Settings come from the environment, as for every Airflow command.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

AIRFLOW = [sys.executable, "-m", "airflow"]
PARTS = {  # in the order in which they stop: tasks report to the API server how they ended
    "scheduler": ["--skip-serve-logs"],
    "triggerer": ["--skip-serve-logs"],
    "dag-processor": [],
    "api-server": [],
}
TRAINING_SLOTS = 2  # of the pool `gpu`: both models at the same time
READY_SECONDS, STOP_SECONDS = 900, 60  # a busy machine takes minutes to start


def run() -> None:
    """Prepare Airflow, start its parts, and stop them after Ctrl-C or SIGTERM. `make airflow` sets the environment.

    Raises ValueError where it does not get ready, or one of its parts ends.
    """
    if "AIRFLOW_HOME" not in os.environ:
        raise ValueError("AIRFLOW_HOME is not set; start Airflow with `make airflow`, which sets what it needs")
    # A shell starts background jobs with SIGINT ignored. Here it counts all the same, and SIGTERM does what it does.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    with suppress(KeyboardInterrupt):
        _serve(Path(os.environ["AIRFLOW_HOME"]), f"http://127.0.0.1:{os.environ.get('AIRFLOW__API__PORT', '8080')}")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _serve(home: Path, url: str) -> None:
    logs = home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    print(f"Airflow starts; its own logs are in {logs}", flush=True)
    for words in (["db", "migrate"], ["pools", "set", "gpu", str(TRAINING_SLOTS), "models that train at a time"]):
        done = subprocess.run([*AIRFLOW, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise ValueError(f"`airflow {' '.join(words)}` ended with {done.returncode}; it printed:\n{done.stdout}")
    with running(logs) as parts:
        deadline = time.monotonic() + READY_SECONDS
        while not healthy(url):
            if time.monotonic() > deadline:
                raise ValueError(f"Airflow is not ready after {READY_SECONDS} s; see {logs}")
            require_alive(parts, logs)
            time.sleep(0.5)
        passwords = home / "simple_auth_manager_passwords.json.generated"
        passwords.chmod(0o600)
        print(f"Airflow is ready: {url}  user and password: {passwords.read_text().strip()}", flush=True)
        print("Ctrl-C stops it, and the tasks that run; they are tried again after the next start", flush=True)
        while True:
            require_alive(parts, logs)
            time.sleep(1)


@contextmanager
def running(logs: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """All parts, while the block lasts. Each has its own session, so that a Ctrl-C reaches only this process."""
    parts: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, options in PARTS.items():
            with (logs / f"{name}.log").open("ab") as log:
                command = [*AIRFLOW, name, *options]
                parts[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        yield parts
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C must not leave half of them running
            signal.signal(number, signal.SIG_IGN)
        print("Airflow stops", flush=True)
        for name, part in parts.items():
            stop(name, part)


def stop(name: str, part: subprocess.Popen[bytes]) -> None:
    """End one part. A scheduler's tasks are ended too: it would wait for them, and a training takes hours."""
    part.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    asked: set[int] = set()
    while part.poll() is None and time.monotonic() < deadline:
        if name == "scheduler":
            for task in set(tasks(part.pid)) - asked:
                asked.add(task)
                with suppress(ProcessLookupError):
                    os.kill(task, signal.SIGTERM)  # Airflow's task process ends the command that it runs
        time.sleep(0.2)
    with suppress(ProcessLookupError):
        os.killpg(part.pid, signal.SIGKILL)
    part.wait()


def tasks(scheduler: int) -> list[int]:
    """The task processes: the children of LocalExecutor's workers, which are the scheduler's children."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, text=True, check=True).stdout
    children = defaultdict(list)
    for line in listed.splitlines():
        pid, parent = map(int, line.split())
        children[parent].append(pid)
    return [task for worker in children[scheduler] for task in children[worker]]


def healthy(url: str) -> bool:
    """Whether the API answers, and says that the scheduler and the DAG processor are alive."""
    try:
        with urllib.request.urlopen(f"{url}/api/v2/monitor/health", timeout=5) as answer:  # noqa: S310
            found = answer.read().decode()
    except (urllib.error.URLError, OSError):
        return False
    health = json.loads(found)
    return all(health[part]["status"] == "healthy" for part in ("metadatabase", "scheduler", "dag_processor"))


def require_alive(parts: dict[str, subprocess.Popen[bytes]], logs: Path) -> None:
    """Raises ValueError with the end of the log where a part has ended."""
    for name, part in parts.items():
        if part.poll() is not None:
            printed = (logs / f"{name}.log").read_text(errors="replace")[-2000:]
            raise ValueError(f"`airflow {name}` ended with {part.returncode}; end of its log:\n{printed}")
