"""A PostgreSQL that is thrown away: its own cluster, made with initdb, on a free port."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any

from psycopg import Connection

PLACES = os.pathsep.join([os.environ.get("PATH", ""), *glob("/usr/lib/postgresql/*/bin")])
INITDB = shutil.which("initdb", path=PLACES)


class Cluster:
    """A running server, `url` with its password, and programs to stop and start it."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.password = secrets.token_hex(8)
        self.runs = False
        # It refuses to run as root
        self.owner: dict[str, Any] = {"user": "nobody"} if os.geteuid() == 0 else {}

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://osp:{self.password}@127.0.0.1:{self.port}/{database}"

    def run(self, program: str, *arguments: str) -> None:
        assert INITDB
        command = [str(Path(INITDB).with_name(program)), "-D", str(self.folder / "data")]
        with open(self.folder / "said", "ab") as said:  # a pipe would stay open in the server
            subprocess.run(
                [*command, *arguments], check=True, stdout=said, stderr=said, cwd="/", **self.owner
            )

    def make(self) -> None:
        file = self.folder / "password"
        file.write_text(self.password)
        if self.owner:
            for path in (self.folder, file):
                shutil.chown(path, "nobody")
        self.run(
            "initdb", "-U", "osp", "-A", "scram-sha-256", f"--pwfile={file}", "-N", "-E", "UTF8"
        )

    def start(self) -> None:
        options = f"-F -c listen_addresses=127.0.0.1 -p {self.port} -k {self.folder}"
        self.run("pg_ctl", "start", "-w", "-o", options)
        self.runs = True

    def stop(self) -> None:
        """Stop it as a crash would."""
        self.run("pg_ctl", "stop", "-w", "-m", "immediate")
        self.runs = False

    def execute(self, sql: str, database: str = "postgres") -> list[Any]:
        with Connection.connect(self.url(database), autocommit=True) as link:
            cursor = link.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Run a cluster; where there are programs for one, see INITDB."""
    with tempfile.TemporaryDirectory(prefix="osp-pg-", dir="/tmp") as folder:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        made = Cluster(Path(folder), port)
        made.make()
        made.start()
        try:
            yield made
        finally:
            if made.runs:
                made.stop()
