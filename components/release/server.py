"""A served Bento: started, ready, stopped with every process that it started, also where its user is killed.

`Served` starts a guard, which is this file as a program of its own, and the guard starts the server. The guard stops
the server once its standard input is closed. The system closes it when the process of `Served` ends, whatever ended
it. So there is one way to stop a server, and a SIGKILL takes it too.

This file imports nothing of the project: the guard runs outside of it.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

READY_SECONDS = 600.0  # a busy machine takes minutes to import what the server needs
STOP_SECONDS = 60.0
LOOK_SECONDS = 0.2
WORKER_FAILED = "Initializing service error"  # BentoML's words in the log; the deadline holds without them too
LEFT_RUNNING = 3  # the guard's exit code


class Served:
    """`bentoml serve FOLDER` on a free loopback port, with a BENTOML_HOME of its own.

    online  a store folder, or a link to one; None serves without an online store
    log     what the server prints, kept; an error shows the end of it
    """

    def __init__(self, bento: Path, online: Path | None, log: Path) -> None:
        self.bento, self.online, self.log = bento, online, log
        self.ready_seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[Served]:
        """Ready inside the block. Raises ValueError where it does not get ready, or does not stop by itself."""
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        env = {k: v for k, v in os.environ.items() if k != "CLICKLOOP_ONLINE"}
        if self.online is not None:
            env["CLICKLOOP_ONLINE"] = str(self.online.absolute())
        server = [sys.executable, "-m", "bentoml", "serve", str(self.bento.resolve()), "--port", str(port)]
        # -P: the modules beside this file must not hide those of the standard library
        command = [sys.executable, "-P", __file__, *server]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as opened:
            self.guard = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=opened, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        try:
            self._wait_until_ready()
            yield self
            if self._stop() == LEFT_RUNNING:
                raise ValueError(f"{self.bento}: the server did not stop, or left processes behind; they are killed")
        except ValueError as error:
            self._stop()
            raise ValueError(f"{error}\nEnd of {self.log}:\n{self._printed()[-3000:]}") from error
        finally:
            self._stop()

    def client(self) -> httpx.Client:
        headers = {"content-type": "application/json"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)

    def processes(self) -> list[psutil.Process]:
        """The server's own processes, as they are now."""
        return psutil.Process(self.guard.pid).children(recursive=True)

    def peak_memory_mib(self) -> float:
        """Largest resident memory of each of the server's processes so far, summed; shared pages count for each."""
        return round(sum(_peak_bytes(process) for process in self.processes()) / 2**20, 1)

    def _wait_until_ready(self) -> None:
        begin = time.monotonic()
        with self.client() as client:
            while time.monotonic() - begin < READY_SECONDS:
                if (code := self.guard.poll()) is not None:
                    raise ValueError(f"{self.bento}: the server ended with exit code {code}")
                if WORKER_FAILED in self._printed():  # BentoML would start it again and again
                    raise ValueError(f"{self.bento}: the server's worker cannot start")
                try:
                    if client.get("/readyz", timeout=1).status_code == 200:
                        self.ready_seconds = time.monotonic() - begin
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
        raise ValueError(f"{self.bento}: not ready after {READY_SECONDS:.0f} s")

    def _stop(self) -> int:
        assert self.guard.stdin is not None
        self.guard.stdin.close()
        return self.guard.wait()

    def _printed(self) -> str:
        return self.log.read_text(errors="replace")


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def _peak_bytes(process: psutil.Process) -> int:
    try:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return process.memory_info().rss  # no /proc, as on a Mac: what it holds now
    except (OSError, psutil.Error):
        return 0


# ---- the guard --------------------------------------------------------------------------------------------------


def guard(command: list[str]) -> int:
    """Run a command until it ends, or until standard input is closed; then stop it with all that it started.

    Returns the command's exit code where it ended by itself, else 0, or LEFT_RUNNING where something had to be killed.
    """
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    processes: dict[int, psutil.Process] = {}
    ended, killed = None, False
    with tempfile.TemporaryDirectory(prefix="clickloop-serve-", ignore_cleanup_errors=True) as home:
        settings = {"BENTOML_HOME": home, "BENTOML_DO_NOT_TRACK": "True", "PYTHONDONTWRITEBYTECODE": "1"}
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=home, env=os.environ | settings)
        try:
            processes[server.pid] = psutil.Process(server.pid)
            while not asked and (ended := server.poll()) is None:
                _see(processes)
                if select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
                    break
        finally:
            killed = _end(server, processes)
    return ended or (LEFT_RUNNING if killed else 0)


def _see(processes: dict[int, psutil.Process]) -> None:
    """Note the descendants of those that are known: BentoML's workers have sessions of their own, so no process group
    holds them all, and one whose parent has ended belongs to nobody."""
    for known in list(processes.values()):
        with suppress(psutil.NoSuchProcess):
            processes |= {child.pid: child for child in known.children(recursive=True)}


def _end(server: subprocess.Popen[bytes], processes: dict[int, psutil.Process]) -> bool:
    """Ask the server to stop, and kill what is left after STOP_SECONDS. Returns whether anything was left."""
    _see(processes)
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(STOP_SECONDS)
    with suppress(psutil.NoSuchProcess):
        processes[server.pid].suspend()  # or it would start a worker while they are counted
    _see(processes)
    left = [process for process in processes.values() if _runs(process)]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            print(f"still running, killed: {process.pid} {' '.join(process.cmdline())}", file=sys.stderr, flush=True)
            process.kill()  # psutil checks that the id is still the same process
    server.wait()
    psutil.wait_procs(left, timeout=STOP_SECONDS)
    return bool(left)


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))
