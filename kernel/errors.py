"""Errors: everything the proxy raises on purpose, and the status a client gets for it.

    OSPError
    ├── ConfigError                      a setting is wrong: the start stops, exit status 2
    ├── ClientDisconnected               nobody is left to answer
    ├── BrokenAnswer                     an answer broke off, and so must the client's connection
    ├── PluginLoadError                  listed in GET /plugins; everything else goes on
    ├── PluginExecutionError        500  a hook failed; 502 where the model that it asked did
    ├── Aborted                 400-599  an agent refused, or failed and may not be left out
    ├── BadRequest                  400  the text says what would be right
    ├── NotAllowed                  403  401 where a key would help
    ├── StoreError                       what an agent keeps is out of reach, or SQL of it is wrong
    ├── Stopped                     503  somebody stopped the request at the proxy
    └── UpstreamError               502  Ollama broke off before it answered, or answered nonsense
        ├── UpstreamConnectionError 502  nobody listens there
        └── UpstreamTimeout         504  no connection in time

The kernel raises; the slice catches and decides what the client gets.
"""

from __future__ import annotations

from collections.abc import Sequence


class OSPError(Exception):
    """The root. `status` is what a client gets as long as nothing of an answer was sent."""

    status = 500

    def __init__(self, message: str = "", status: int | None = None) -> None:
        super().__init__(message)
        self.status = status or self.status


class ConfigError(OSPError): ...


class ClientDisconnected(OSPError): ...


class BrokenAnswer(OSPError):
    """Leaves the application on purpose: only then does uvicorn close without ending the answer."""


class PluginLoadError(OSPError):
    """`kind` is the type of what went wrong, `where` its file and line."""

    def __init__(self, message: str, kind: str = "PluginLoadError", where: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.where = where


class PluginExecutionError(OSPError):
    """The cause is chained; `outcome` is what X-OSP-Agents says: error or timeout."""

    def __init__(self, message: str, status: int = 500, outcome: str = "error") -> None:
        super().__init__(message, status)
        self.outcome = outcome


class Aborted(OSPError):
    """`headers` go to the client with the error."""

    def __init__(
        self, message: str, status: int = 500, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        super().__init__(message, status)
        self.headers = list(headers)


class BadRequest(OSPError):
    status = 400


class NotAllowed(OSPError):
    status = 403


class StoreError(OSPError): ...


class Stopped(OSPError):
    status = 503


class UpstreamError(OSPError):
    status = 502


class UpstreamConnectionError(UpstreamError): ...


class UpstreamTimeout(UpstreamError):
    status = 504
