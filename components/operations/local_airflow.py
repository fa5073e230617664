"""airflow: Airflow on one machine. It prints its address and login once it is ready, and stops after Ctrl-C.

It replaces `airflow standalone` for these reasons. A Ctrl-C reaches standalone's scheduler twice, from the terminal and
from standalone, and leaves it hanging. A SIGTERM leaves all of its parts running. Its scheduler starts before the API
answers, so each queued task loses an attempt. A part that dies stays dead, and the tasks of a killed scheduler live on.
Its log servers listen on every interface, and parts that share one disk need none. Settings come from the environment,
as for every Airflow command.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from components.operations import local_postgres

AIRFLOW = [sys.executable, "-m", "airflow"]
# In the order in which they start. They stop in the opposite order, since tasks tell the API server how they ended.
PARTS = {
    "api-server": [],
    "dag-processor": [],
    "triggerer": ["--skip-serve-logs"],
    "scheduler": ["--skip-serve-logs"],
}
MARK = "CLICKLOOP_AIRFLOW_PART"  # in the environment of a part, and so of all that it starts
READY_SECONDS, STOP_SECONDS = 900, 60  # a busy machine takes minutes to start
STARTS, STARTS_SECONDS = 6, 900  # a part that ends more often than that is not started again


@dataclass
class Part:
    """One process that is kept alive. `ended` runs before it is started again."""

    name: str
    command: list[str]
    log: Path
    signal: int = signal.SIGTERM
    user: str | None = None
    ended: Callable[[], None] = lambda: None
    process: subprocess.Popen[bytes] | None = None
    starts: list[float] = field(default_factory=list)

    def start(self) -> None:
        """In a session of its own, so that a Ctrl-C reaches this program alone."""
        # SPT_NOENV: Airflow's processes rename themselves, and must not write their names over their environment
        environment = {**os.environ, MARK: self.name, "SPT_NOENV": "1"}
        self.starts = [*self.starts[1 - STARTS :], time.monotonic()]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
                user=self.user, group=self.user, extra_groups=[] if self.user else None,
            )  # fmt: skip

    def keep(self) -> None:
        """Start it again where it has ended. Raises ValueError, with the end of its log, where that does not help."""
        assert self.process is not None, "start() comes first"
        code = self.process.poll()
        if code is None:
            return
        if len(self.starts) == STARTS and time.monotonic() - self.starts[0] < STARTS_SECONDS:
            printed = self.log.read_text(errors="replace")[-2000:]
            raise ValueError(f"{self.name} ended with {code}, {STARTS} times in a row; end of its log:\n{printed}")
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with {code}"
        print(f"{self.name} ended {how}, and is started again; its log is {self.log}", flush=True)
        self.ended()
        self.start()

    def stop(self) -> None:
        """A scheduler's tasks are ended with it: it would wait for them, and a training takes hours."""
        if self.process is None:
            return
        self.process.send_signal(self.signal)
        deadline = time.monotonic() + STOP_SECONDS
        asked: set[int] = set()
        while self.process.poll() is None and time.monotonic() < deadline:
            for task in set(tasks(self.process.pid)) - asked if self.name == "scheduler" else ():
                asked.add(task)
                with suppress(ProcessLookupError):
                    os.kill(task, signal.SIGTERM)  # Airflow's task process ends the command that it runs
            time.sleep(0.2)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run() -> None:
    """Prepare Airflow, start its parts, keep them alive, and stop them after Ctrl-C or SIGTERM.

    `make airflow` sets the environment. Raises ValueError where it does not get ready, a part ends again and again, or
    another Airflow runs in the same AIRFLOW_HOME.
    """
    if "AIRFLOW_HOME" not in os.environ:
        raise ValueError("AIRFLOW_HOME is not set; start Airflow with `make airflow`, which sets what it needs")
    # A shell starts background jobs with SIGINT ignored. Here it counts all the same, and SIGTERM does what it does.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    home = Path(os.environ["AIRFLOW_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    with suppress(KeyboardInterrupt), _alone(home):
        _serve(home, f"http://127.0.0.1:{os.environ.get('AIRFLOW__API__PORT', '8080')}")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    with (home / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Airflow runs in {home} already; stop it first, or set another AIRFLOW_HOME") from None
        yield


def _serve(home: Path, url: str) -> None:
    logs = home / "logs"
    logs.mkdir(exist_ok=True)
    print(f"Airflow starts; its own logs are in {logs}", flush=True)
    end(left_over())  # of one that was killed
    database = local_postgres.prepare(home, os.environ.get("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", ""))
    with kept() as parts:

        def begin(part: Part) -> None:
            parts.append(part)
            part.start()

        def wait(ready: Callable[[], bool], what: str) -> None:
            deadline = time.monotonic() + READY_SECONDS
            while not ready():
                if time.monotonic() > deadline:
                    raise ValueError(f"{what} is not ready after {READY_SECONDS} s; see {logs}")
                for part in parts:
                    part.keep()
                time.sleep(0.5)

        if database:
            begin(Part("postgres", database.command, logs / "postgres.log", signal.SIGINT, database.user))
            wait(database.ready, "Postgres")
        airflow("db", "migrate")
        for name, options in PARTS.items():
            ended = (lambda: end(left_over("scheduler"))) if name == "scheduler" else lambda: None
            begin(Part(name, [*AIRFLOW, name, *options], logs / f"{name}.log", ended=ended))
            if name == "api-server":
                slots = os.environ.get("CLICKLOOP_TRAINING_SLOTS", "2")
                airflow("pools", "set", "gpu", slots, "models that train at a time")
                wait(lambda: healthy(url, "metadatabase"), "the API server")
        wait(lambda: healthy(url, "scheduler", "dag_processor"), "Airflow")
        passwords = home / "simple_auth_manager_passwords.json.generated"
        passwords.chmod(0o600)
        print(f"Airflow is ready: {url}  user and password: {passwords.read_text().strip()}", flush=True)
        print("Ctrl-C stops it, and the tasks that run; they are tried again after the next start", flush=True)
        while True:
            for part in parts:
                part.keep()
            time.sleep(1)


def airflow(*words: str) -> None:
    """One of Airflow's own commands. Raises ValueError with what it printed."""
    done = subprocess.run([*AIRFLOW, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise ValueError(f"`airflow {' '.join(words)}` ended with {done.returncode}; it printed:\n{done.stdout}")


@contextmanager
def kept() -> Iterator[list[Part]]:
    """A list of parts, all of which are stopped in the end, the last first."""
    parts: list[Part] = []
    try:
        yield parts
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C must not leave half of them running
            signal.signal(number, signal.SIG_IGN)
        print("Airflow stops", flush=True)
        for part in reversed(parts):
            part.stop()


def tasks(scheduler: int) -> list[int]:
    """The task processes: the children of LocalExecutor's workers, which are the scheduler's children."""
    with suppress(psutil.NoSuchProcess):
        return [task.pid for worker in psutil.Process(scheduler).children() for task in worker.children()]
    return []


def left_over(part: str | None = None) -> list[psutil.Process]:
    """The processes that a part started (None: any part) in this AIRFLOW_HOME, and that outlived it.

    A killed scheduler leaves its workers, their tasks, and the commands of those. Airflow starts these tasks anew.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            theirs = process.environ()
            mark = theirs.get(MARK) if theirs.get("AIRFLOW_HOME") == os.environ["AIRFLOW_HOME"] else None
            if mark is not None and part in (None, mark):
                found.append(process)
    return found


def end(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL: a task that is asked to stop would report an end of its own, and every step may be killed."""
    processes = list(processes)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=STOP_SECONDS)
    if processes:
        print(f"ended {len(processes)} processes that a killed Airflow had left", flush=True)


def healthy(url: str, *parts: str) -> bool:
    """Whether the API answers, and says that these parts are alive."""
    try:
        with urllib.request.urlopen(f"{url}/api/v2/monitor/health", timeout=5) as answer:  # noqa: S310
            health = json.loads(answer.read())
    except (urllib.error.URLError, OSError, ValueError):
        return False
    return all(health[part]["status"] == "healthy" for part in parts)
