"""Servers: starts an MCP server on first use, and keeps its session in a task of its own.

The SDK's cancel scopes must be left in the task that entered them, and a hook's task may be
cancelled at any time: hooks wait for a session and send through it, no more. A session that ends
fails the calls that it has; the next use starts another one. The transport for processes is our
own, because the SDK's has no limit for what a process sends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
from mcp import Client, ClientSession, MCPError, types
from mcp.client.stdio import get_default_environment
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage
from pydantic import ValidationError

from kernel.agent import Tool

from .rules import ToolError, offerable

logger = logging.getLogger("plugins.mcp")  # this module's own name differs from start to start

PAGES, TOOLS = 50, 500  # of one server's list
PAUSE = 30.0  # seconds after a start that failed until the next one
LARGEST = 16 << 20  # bytes of one message
FLOOD = 2000  # lines in a second: more are no conversation
PATIENCE = 1.0  # seconds to list tools again; to end by itself; to end when it is told to
PIPES: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)


class Server:
    """One MCP server; it runs from its first use on."""

    def __init__(self, name: str, config: Mapping[str, Any], limit: float) -> None:
        self.name, self.config, self.limit = name, config, limit
        self.tools: dict[str, Tool] = {}  # by the server's own names, as it listed them last
        self.session: ClientSession | None = None  # while it answers
        self.failure = ""  # why it does not
        self._task: asyncio.Task[None] | None = None
        self.said = ""  # the last line that it wrote to stderr at its start
        self.settled, self._ending = asyncio.Event(), asyncio.Event()
        self._paused = -math.inf  # until when

    @property
    def status(self) -> str:
        if self.session:
            size = len(json.dumps([*self.tools.items()], ensure_ascii=False)) // 4
            return f"answers, {len(self.tools)} tools, about {size} tokens"
        if self.failure:
            return f"failed: {self.failure}"
        return "is starting" if self._task else "not started"

    async def refresh(self) -> None:
        """Start the server if it does not run, or list its tools again, which may have changed."""
        if session := self.session:
            try:
                async with asyncio.timeout(PATIENCE):  # it may be busy: then the old list counts
                    await self._list(session)
            except (MCPError, TimeoutError) as exc:
                if isinstance(exc, MCPError) and self.session is session:
                    await self.stop()  # it was started anew, say, and does not know the session
        await self._connected()

    async def call(self, tool: str, arguments: dict[str, Any]) -> Any:
        """Return the CallToolResult of a call. Raises ToolError."""
        session = await self._connected()
        params = types.CallToolRequestParams(name=tool, arguments=arguments)
        try:
            # session.call_tool would run the server's regular expressions over the result.
            return await session.send_request(
                types.CallToolRequest(params=params), types.CallToolResult
            )
        except (MCPError, ValidationError) as exc:
            raise ToolError(f"{self.name}: {self.failure or reason(exc)}") from exc

    async def stop(self) -> None:
        """End the session, and with it the server's process."""
        if self._task:
            self._ending.set()
            self._scope.deadline = anyio.current_time() + (PATIENCE if self.session else 0)
            await asyncio.wait({self._task})

    def fail(self, why: str) -> None:
        """Say that the session is over, and why."""
        self.failure, self.session = why, None

    async def _connected(self) -> ClientSession:
        """Return the session, one for all who wait for it. Raises ToolError."""
        if self._task and self.failure and self.settled.is_set():
            await asyncio.wait({self._task})  # its process is being ended
        if (not self._task or self._task.done()) and time.monotonic() > self._paused:
            self.failure, self.said = "", ""
            self.settled, self._ending = asyncio.Event(), asyncio.Event()
            self._scope = anyio.CancelScope(deadline=anyio.current_time() + self.limit)
            self._task = asyncio.create_task(self._live())
        await self.settled.wait()
        if self.session is None:
            raise ToolError(f"{self.name}: {self.failure}")
        return self.session

    async def _live(self) -> None:
        """Keep a session open until it ends, or is told to."""
        with self._scope:
            # Some processes of before 2026 end when they are asked what they speak ("auto").
            for mode in ("auto", "legacy"):
                try:
                    await self._hold(mode)
                except Exception as exc:  # whatever the SDK raises ends this session, and no more
                    ended = self.failure
                    self.fail(ended or reason(exc))
                    if ended and not self.settled.is_set():
                        continue
                break
        late = f"did not answer within {self.limit:g} seconds"
        self.fail(self.failure or ("" if self._ending.is_set() else late))
        if not self.settled.is_set():
            self._paused = time.monotonic() + PAUSE
        self.settled.set()
        if self.failure:
            fields = {"server": self.name, "error": self.failure, "said": self.said}
            logger.warning("MCP server failed", extra={"fields": fields})

    async def _hold(self, mode: str) -> None:
        streams = http(self.config) if "url" in self.config else stdio(self)
        async with Client(streams, mode=mode, cache=None) as client:
            await self._list(client.session)
            self.session, self.failure, self._scope.deadline = client.session, "", math.inf
            self.settled.set()
            await self._ending.wait()

    async def _list(self, session: ClientSession) -> None:
        """Ask for all tools, and keep those that can be offered."""
        cursor, found = None, dict[str, Tool | None]()
        for _ in range(PAGES):
            page = await session.list_tools(params=types.PaginatedRequestParams(cursor=cursor))
            for tool in page.tools[: TOOLS - len(found)]:
                found.setdefault(tool.name, offerable(self.config, tool))
            if not (cursor := page.next_cursor):
                break
        self.tools = {name: tool for name, tool in found.items() if tool}


@asynccontextmanager
async def http(config: Mapping[str, Any]) -> AsyncIterator[Any]:
    """Connect to a server that speaks streamable HTTP."""
    import httpx2  # comes with mcp: where that is missing, an import at the top would hide it

    url, timeout = config["url"], httpx2.Timeout(30, read=300)  # a stream may pause
    async with httpx2.AsyncClient(headers=config.get("headers"), timeout=timeout) as client:
        async with streamable_http_client(url, http_client=client) as streams:
            yield streams


@asynccontextmanager
async def stdio(server: Server) -> AsyncIterator[Any]:
    """Run a server's process, and end it and its children afterwards."""
    config, env = server.config, get_default_environment() | server.config.get("env", {})
    command = [config["command"], *config.get("args", ())]
    command[0] = shutil.which(command[0], path=env.get("PATH")) or command[0]
    options: dict[str, Any] = {**PIPES, "env": env, "cwd": config.get("cwd")}
    process = await asyncio.create_subprocess_exec(
        *command, limit=LARGEST, start_new_session=True, **options
    )
    incoming, read = anyio.create_memory_object_stream[Any](0)
    write, outgoing = anyio.create_memory_object_stream[Any](0)
    try:
        async with incoming, read, write, outgoing, anyio.create_task_group() as group:
            group.start_soon(log, process.stderr, server)
            group.start_soon(receive, process, incoming, server)
            group.start_soon(send, process.stdin, outgoing)
            yield read, write
            group.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await end(process)


async def receive(process: Any, incoming: Any, server: Server) -> None:
    """Hand on each line as a message. Raises ToolError when there will be no more."""
    lines, since, why = 0, time.monotonic(), f"sent more than {LARGEST >> 20} MiB in one message"
    with suppress(ValueError):  # of readline: more than LARGEST
        while line := await process.stdout.readline():
            now = time.monotonic()
            lines, since = (lines + 1, since) if now < since + 1 else (1, now)
            if lines > FLOOD:
                why = f"sent more than {FLOOD} lines in a second"
                break
            # Some print what is no message, and some speak on while they are ended.
            with suppress(ValidationError, anyio.BrokenResourceError):
                message = types.jsonrpc_message_adapter.validate_json(line, by_name=False)
                await incoming.send(SessionMessage(message))
        else:
            with anyio.move_on_after(PATIENCE):
                await process.wait()
            why = f"ended (exit status {process.returncode})"
    server.fail(why)
    raise ToolError(why)


async def send(stdin: Any, outgoing: Any) -> None:
    with suppress(OSError):  # the process has ended, which `receive` says
        async for sent in outgoing:
            text = sent.message.model_dump_json(by_alias=True, exclude_unset=True)
            stdin.write(text.encode() + b"\n")
            await stdin.drain()


async def log(stderr: Any, server: Server) -> None:
    """Log what a process says on stderr, at debug: it may hold what it was asked."""
    while chunk := await stderr.read(4096):
        for line in chunk.decode(errors="replace").splitlines():
            fields = {"server": server.name, "line": line}
            logger.debug("MCP server says", extra={"fields": fields})
            if line and not server.settled.is_set():  # it was asked nothing yet
                server.said = line[:300]


async def end(process: Any) -> None:
    """Close a process's stdin, which tells it to end; kill it and its children if it does not."""
    process.stdin.close()
    for number in (15, 9, 9):  # SIGTERM, SIGKILL
        with anyio.move_on_after(PATIENCE):
            await process.wait()
            break
        with suppress(OSError):
            getattr(os, "killpg", os.kill)(process.pid, number)  # Windows has no groups
    process._transport.close()  # its pipes, where their end was not read


def reason(exc: BaseException) -> str:
    """Say in a line why a session failed, without values that a server may have been told."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    if isinstance(exc, ValidationError):
        first = exc.errors()[0]
        return f"it does not speak MCP: {'.'.join(map(str, first['loc']))}: {first['msg']}"[:300]
    return f"{getattr(exc, 'strerror', None) or exc or type(exc).__name__}"[:300]


def silence() -> None:
    """Keep the SDK from the log: it would note whole messages, and URLs with their query."""
    for name in ("mcp", "client", "httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
