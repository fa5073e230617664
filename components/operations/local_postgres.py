"""A Postgres of Airflow's own, in AIRFLOW_HOME/postgres: for `make airflow DB=postgres` where no other one is named.

Only processes of this machine reach it, by a socket in that folder, and the folder's rights say which.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from shlex import join

SOCKET_BYTES = 107  # the longest path that Linux takes


@dataclass(frozen=True)
class Postgres:
    """command  runs it in the foreground
    user     who runs it; None: whoever runs this
    """

    programs: Path
    folder: Path
    user: str | None

    @property
    def command(self) -> list[str]:
        data, socket = self.folder / "data", self.folder
        return [
            str(self.programs / "postgres"), "-D", str(data), "-k", str(socket),
            "-c", "listen_addresses=", "-c", "unix_socket_permissions=0700",
        ]  # fmt: skip

    def ready(self) -> bool:
        asked = [str(self.programs / "pg_isready"), "-q", "-h", str(self.folder)]
        return subprocess.run(asked).returncode == 0


def prepare(home: Path, connection: str) -> Postgres | None:
    """The cluster that the connection names, made where it is not there yet; None where that is not in `home`.

    Postgres refuses to run as root. Then the user `postgres` runs it, and must be able to enter `home`. Raises
    ValueError, with the remedy, where it cannot be made.
    """
    folder = home / "postgres"
    if not connection.startswith("postgresql") or not connection.endswith(f"?host={folder}"):
        return None
    if len(os.fsencode(folder / ".s.PGSQL.5432")) > SOCKET_BYTES:
        raise ValueError(f"{folder} is too long for a socket; set AIRFLOW_HOME to a shorter path")
    postgres = Postgres(_programs(), folder, "postgres" if os.geteuid() == 0 else None)
    if not (folder / "data/PG_VERSION").is_file():
        shutil.rmtree(folder, ignore_errors=True)  # what a killed initdb left
        folder.mkdir(mode=0o700)
        if postgres.user:
            try:
                shutil.chown(folder, postgres.user, pwd.getpwnam(postgres.user).pw_gid)
            except (KeyError, LookupError):
                raise ValueError("Postgres refuses root, and there is no user `postgres`; be another user") from None
        _call(postgres, "initdb", "-A", "trust", "-U", "airflow", "-E", "UTF8", "-D", str(folder / "data"))
    elif (folder / "data/postmaster.pid").is_file():  # of an Airflow that was killed: a new one cannot have two
        _call(postgres, "pg_ctl", "stop", "-m", "fast", "-D", str(folder / "data"), check=False)
    return postgres


def _programs() -> Path:
    """Debian keeps them out of PATH. The newest version wins."""
    found = shutil.which("initdb")
    known = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda file: float(file.parts[-3]))
    if not found and not known:
        raise ValueError(
            "no initdb, so no Postgres is installed: `apt-get install postgresql`, or name a running one by "
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"
        )
    return Path(found).resolve().parent if found else known[-1].parent


def _call(postgres: Postgres, program: str, *words: str, check: bool = True) -> None:
    command = [str(postgres.programs / program), *words]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, user=postgres.user,
            group=postgres.user, cwd="/",
        )  # fmt: skip
        failed, said = done.returncode != 0, done.stdout
    except PermissionError as error:
        failed, said = True, str(error)
    if check and failed:
        hint = f" The user {postgres.user} must be able to enter {postgres.folder.parent}." if postgres.user else ""
        raise ValueError(f"`{join(command)}` failed.{hint} It printed:\n{said}")
