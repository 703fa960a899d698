"""systemd: what it passes to a service, and what it wants to be told.

inherited      sockets that it opened, sd_listen_fds(3). They stay open while the service starts
               again: new connections wait in their queue, and a restart drops no client
tell           the state of the service, sd_notify(3)
for_journal    lines of the log as the journal takes them, sd-daemon(3)
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

from kernel.errors import ConfigError

Line = Callable[[float, str, str, Mapping[str, Any]], str]  # time, level, event, fields

FIRST = 3  # SD_LISTEN_FDS_START: the file descriptor of the first socket
PASSED = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
SUITABLE = "it must be a listening TCP socket: ListenStream=127.0.0.1:11435 with Accept=no"
PRIORITIES = {"debug": "<7>", "info": "<6>", "warning": "<4>", "error": "<3>", "critical": "<2>"}


def inherited(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """Return the sockets that systemd opened for this process. Raises ConfigError.

    The variables are taken out of `environ`: they are not meant for children.
    """
    pid, count, *_ = [environ.pop(name, "") for name in PASSED]
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    return [adopt(number) for number in range(FIRST, FIRST + int(count))]


def adopt(number: int) -> socket.socket:
    """Return the listening socket that a file descriptor is. Raises ConfigError."""
    try:
        listener = socket.socket(fileno=number)
        tcp = listener.type == socket.SOCK_STREAM and listener.family != socket.AF_UNIX
        if not (tcp and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
            raise OSError("it does not listen for TCP")
    except OSError as exc:
        why = exc.strerror or exc
        raise ConfigError(f"LISTEN_FDS: file descriptor {number}: {why}; {SUITABLE}") from exc
    listener.set_inheritable(False)
    return listener


def tell(address: str, state: str) -> None:
    """Tell systemd the state, where it gave an address; one that begins with @ is abstract."""
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), address.replace("@", "\0", 1))


def for_journal(line: Line, stream: int, journal: str) -> Line:
    """Return `line` with a priority and without a time, if `stream` goes to the journal.

    `journal` is $JOURNAL_STREAM, device and inode of what systemd reads: see systemd.exec(5).
    """
    stat = os.fstat(stream)
    if journal != f"{stat.st_dev}:{stat.st_ino}":
        return line

    def prefixed(created: float, level: str, event: str, fields: Mapping[str, Any]) -> str:
        sign = PRIORITIES.get(level, "<6>")
        return sign + line(0, level, event, fields).replace("\n", f"\n{sign}")

    return prefixed
