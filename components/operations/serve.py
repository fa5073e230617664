"""serve: the champion over HTTP, until Ctrl-C. What is served is the live folder's, and never a run's own outputs.

`bentoml serve` gets the pointer's path as it is. So every worker that it starts looks anew where the pointer leads, and
a worker that died comes back as the champion of that moment. A worker enters the release's folder when it starts, and
then reads all its files there: a switch meanwhile cannot give it one version's code and another one's model.

After a promotion or a rollback, the workers are replaced. The port stays open: requests wait until the new one is up.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from components.common.live import CURRENT, current
from components.release import server

LOOK_SECONDS = 1.0
WORKER = "_bentoml_impl.worker.service"  # in the command line of each
HOST, PORT = "127.0.0.1", "3000"


def run(live: Path, bento: Path | None, online: Path | None) -> int:
    """Serve the champion, or a Bento's folder that is not promoted. Returns the server's exit code.

    online  a store folder for such a Bento; without one, its answers are degraded

    Raises ValueError where there is nothing to serve.
    """
    folder: Path
    store: Path | None
    if bento is None:
        live = live.resolve()  # as the system names the folders of processes
        if online is not None:
            raise ValueError("serve: --online goes with --bento; the champion reads the live store")
        folder, store = live / CURRENT / "bento", live / CURRENT / "online"
        now = current(live)
        if now is None or now.release is None:
            raise ValueError(
                f"serve: there is no champion in {live} yet; run `python -m components run`, or name a folder: "
                "`python -m components serve --bento artifacts/package/bento`"
            )
        print(f"serve: {now.version}, promoted by {now.who}: {now.why}", flush=True)
    else:
        folder, store = bento.absolute(), online.absolute() if online else None
        if not (folder / "bento.yaml").is_file():
            raise ValueError(f"serve: {bento} is no Bento: it has no bento.yaml; name the folder that `package` built")
    host, port = (os.environ.get(f"BENTOML_{name}") or value for name, value in (("HOST", HOST), ("PORT", PORT)))
    # "." is the folder that a worker is started in, which is the pointer's at that moment
    command = ["bentoml", "serve", ".", "--working-dir", str(folder), "--host", host, "--port", port]
    guard = subprocess.Popen(
        [sys.executable, "-P", server.__file__, sys.executable, "-m", *command],
        stdin=subprocess.PIPE,  # closed when this process ends, whatever ends it: then the guard stops the server
        env=_environment(store),
        start_new_session=True,  # Ctrl-C comes here alone
    )
    assert guard.stdin is not None
    try:
        return _watch(guard, live if bento is None else None)
    except KeyboardInterrupt:
        return 0
    finally:
        guard.stdin.close()
        guard.wait()


def _environment(store: Path | None) -> dict[str, str]:
    """Not CLICKLOOP_ONLINE of the caller; and BENTOML_CONTAINERIZED would leave a worker dead that died."""
    ours = {
        name: value for name, value in os.environ.items() if name not in ("CLICKLOOP_ONLINE", "BENTOML_CONTAINERIZED")
    }
    return ours | ({"CLICKLOOP_ONLINE": str(store)} if store else {})


def _watch(guard: subprocess.Popen[bytes], live: Path | None) -> int:
    """Until the server ends: have its workers replaced where all of them are of another release than the pointer's."""
    told = None
    while guard.poll() is None:
        now = current(live) if live else None
        if now is not None and now.release is not None:
            with suppress(psutil.NoSuchProcess):
                server = psutil.Process(guard.pid)
                workers = [p for p in server.children(recursive=True) if WORKER in p.cmdline()]
                # the folder that a worker was started in tells its release, also where the pointer moved twice
                old = workers and not any(Path(worker.cwd()).is_relative_to(now.release) for worker in workers)
                if old and told != now:  # once: the new ones take a while to appear
                    told = now
                    said = f"{now.version} is the champion, by {now.who}: {now.why}"
                    print(f"serve: {said}; replacing the workers", flush=True)
                    for process in server.children():
                        process.send_signal(signal.SIGHUP)  # BentoML's supervisor starts new ones and ends the old
        time.sleep(LOOK_SECONDS)
    return guard.returncode
