"""Locks that end with their process: a file that the kernel locks, with a line that says who holds it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.common.causes import BusyError

POLL_SECONDS = 0.2


@contextmanager
def hold(file: Path, what: str, *, shared: bool = False, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock while the block lasts: alone, or with others that share it. `what` tells others who holds it.

    Raises BusyError with the holder's line where it is not free within `wait` seconds.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait
    with file.open("a+") as opened:
        while True:
            try:
                fcntl.flock(opened, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = file.read_text().strip() or "another process"
                    raise BusyError(f"{what}: {holder} is at work; wait for its end, or end it") from None
                time.sleep(POLL_SECONDS)
        opened.truncate(0)
        opened.write(f"{what} (process {os.getpid()})\n")
        opened.flush()
        yield
