"""Hooks: runs the code of agents, so that one that fails, hangs or lies harms only itself.

Each hook runs in an asyncio task of its own. It is waited for as long as its clock allows, and then
cancelled and left behind, because code that swallows its cancellation must not hold a request. A
`def` hook runs in a daemon thread, because a thread cannot be cancelled: it must hold neither the
loop nor the end of the process. What a hook returns or raises is foreign, too: values are copied to
the built-in types, and every exception ends inside the hook's task. `HookRunner` is the mechanism,
`Run` says what it means to a request.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from inspect import CO_COROUTINE, isawaitable
from typing import Any, TypeVar

from kernel import tools
from kernel.agent import BaseAgent, Clock, Reply, Tool
from kernel.dialects.calls import Result
from kernel.errors import Aborted, PluginExecutionError
from kernel.foreign import diagnosis, meaning, plain, safe_text
from kernel.log import RequestInfo
from kernel.metrics import Metrics
from kernel.plugin import Plugin

logger = logging.getLogger(__name__)

T = TypeVar("T")
Args = tuple[Any, ...]
Accept = Callable[[Any], T]
BLINK = 0.01  # seconds: while the clock is paused, how often it is looked at
# From Python 3.12 on the first step runs at once: a hook that never waits costs no task switch.
EAGER: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}
SLOW = ("on_request", "on_response")  # hooks that are a phase of the request
NO_REPLY = "raised Reply: only on_request may, and not joined by & (type a space instead)"


class HookRunner:
    """Runs the hooks of one plugin, one after the other."""

    waiting: Callable[[], Awaitable[None]] | None = None  # awaited before a hook is waited for

    def __init__(self, plugin: Plugin, limit: float) -> None:
        self.plugin = plugin
        self.clock = Clock(limit)
        self.loop = asyncio.get_running_loop()  # an eager task has to be told which (gh-154695)

    async def run(
        self, owner: object, name: str, args: Args = (), accept: Accept[Any] = lambda it: it
    ) -> Any:
        """Run the method `name` of `owner`; return what `accept` makes of its result.

        Raises Reply and Aborted with checked values, and PluginExecutionError for everything else
        that a hook can do.
        """
        self.clock.restart()
        task = asyncio.Task(self._attempt(owner, name, args, accept), loop=self.loop, **EAGER)
        if not task.done():
            await self._wait(task)
        if self.clock.left() <= 0:
            text = f"took longer than {self.clock.limit:g} seconds"
            raise PluginExecutionError(text, outcome="timeout")
        if task.cancelled():
            raise PluginExecutionError("CancelledError")
        result, error = task.result()
        if error:
            raise error
        return result

    async def _wait(self, task: asyncio.Task[Any]) -> None:
        """Wait for a hook as long as its clock allows, then cancel it and leave it behind."""
        try:
            await asyncio.sleep(0)  # without eager tasks: cheaper than asyncio.wait with its timer
            if self.waiting and not task.done():
                with self.clock.paused():
                    await self.waiting()
            while not task.done() and self.clock.left() > 0:
                await asyncio.wait({task}, timeout=max(self.clock.left(), BLINK))
        finally:
            if not task.done():
                task.cancel()
                self.plugin.left_behind.add(task)  # asyncio itself holds tasks weakly
                task.add_done_callback(self.plugin.left_behind.discard)

    async def _attempt(
        self, owner: object, name: str, args: Args, accept: Accept[Any]
    ) -> tuple[Any, Exception | None]:
        """Return a result or an error; no exception of foreign code leaves this function."""
        try:
            hook = getattr(owner, name)
            if getattr(getattr(hook, "__code__", None), "co_flags", 0) & CO_COROUTINE:
                result = await hook(*args)
            else:
                result = await self._in_thread(lambda: hook(*args))
                result = await result if isawaitable(result) else result
            return accept(plain(result)), None
        except BaseException as exc:  # also a CancelledError, SystemExit or group of its own
            return None, meaning(exc)

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        done: asyncio.Future[tuple[Any, BaseException | None]] = self.loop.create_future()

        def run() -> None:
            outcome: tuple[Any, BaseException | None]
            try:
                outcome = work(), None
            except BaseException as exc:  # belongs to the hook's task, not to this thread
                outcome = None, exc
            with suppress(RuntimeError):  # the loop was closed meanwhile
                self.loop.call_soon_threadsafe(finish, outcome)

        def finish(outcome: tuple[Any, BaseException | None]) -> None:
            self.plugin.places.release()
            if not done.done():
                done.set_result(outcome)

        await self.plugin.places.acquire()
        self.clock.restart()  # the wait for a place was not the hook's fault
        threading.Thread(target=run, daemon=True).start()
        result, error = await done
        if error is not None:  # its truth value is foreign code, too
            raise error
        return result


@dataclass(eq=False)
class Run(HookRunner):
    """One agent's part in one request, and what became of it."""

    plugin: Plugin
    agent: BaseAgent  # this request's own instance
    limit: float  # seconds for each hook
    metrics: Metrics
    known: RequestInfo
    asked: bool = False  # for by the client; else the agent is always on
    joined: bool = False  # runs at the same time as the one before it
    outcome: str = ""  # ok, error, timeout, reply, abort, unread; "": it never ran
    seconds: float = 0.0  # in its hooks
    due: bool = True  # its response hooks may run

    def __post_init__(self) -> None:
        super().__init__(self.plugin, self.limit)
        self.context = vars(self.agent)["context"]  # the agent cannot take it away from here
        self.context.clock = self.clock

    def has(self, *hooks: str) -> bool:
        return any(map(self.plugin.hooks.__contains__, hooks))

    async def call(self, hook: str, *args: Any, accept: Accept[T], may_reply: bool = True) -> T:
        """Run a hook and return what `accept` makes of its result, a copy of built-in types.

        Raises Reply with a text or an async iterator of texts, PluginExecutionError where the chain
        goes on without the agent, and Aborted where the request ends.
        """
        if hook in SLOW:
            self.known.enter(f"agent {self.plugin.name}")
        began = time.perf_counter()
        self.outcome = self.outcome or "ok"
        owner = self if hook == "reply" else self.agent  # a reply's pieces come like hooks' results
        try:
            result: T = await self.run(owner, hook, args, accept)
            return result
        except Reply as exc:
            if not may_reply:
                raise self._failed(hook, PluginExecutionError(NO_REPLY)) from exc
            self.outcome = "reply"
            raise Reply(exc.text if isinstance(exc.text, str) else self._pieces(exc.text)) from exc
        except Aborted:
            self.outcome = "abort"
            raise
        except PluginExecutionError as exc:
            raise self._failed(hook, exc) from exc
        finally:
            self.seconds += time.perf_counter() - began

    def tools(self) -> list[Tool]:
        """Return the tools that the agent offers; none, and that it failed, if they are wrong."""
        try:
            offered = tools.offered_by(self.agent)
        except PluginExecutionError as exc:
            if isinstance(failure := self._failed("tools", exc), Aborted):
                raise failure from exc
            return []
        self.plugin.tools = [tool["name"] for tool in offered] or self.plugin.tools
        return offered

    def needs_consent(self, tool: Tool) -> bool:
        """Tell whether the user is asked before a tool is called."""
        asks = self.plugin.config.settings.get("ask")
        return bool(tool.get("consent")) or (isinstance(asks, list) and tool["name"] in asks)

    async def use(self, tool: str, arguments: dict[str, Any]) -> Result:
        """Return what a tool returns, or how it failed. Raises Aborted."""
        self.known.enter(f"tool {self.plugin.name}: {tool}")
        began, outcome = time.perf_counter(), "ok"
        self.outcome = self.outcome or "ok"
        fields = {"agent": self.plugin.name, "tool": tool, "request_id": self.context.request_id}
        try:
            result: Result = await self.run(
                self.agent, "on_tool", (tool, arguments), tools.result_of
            )
        except (PluginExecutionError, Reply) as exc:
            cause = exc.__cause__
            where, _ = diagnosis(cause, self.plugin.folder)
            outcome = getattr(exc, "outcome", "error")
            fields |= {"error": str(exc), "where": where}
            text = safe_text(lambda: cause) if type(cause).__name__ == str(exc) else ""
            kind = "TimeoutError: " if outcome == "timeout" else ""
            result = f"failed: {kind}{exc}{': ' * bool(text)}{text}"
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.metrics.tool(self.plugin.name, tool, outcome, seconds)
        self.known.tools += ((self.plugin.name, tool, outcome, seconds),)
        fields |= {"outcome": outcome, "ms": round(seconds * 1000)}
        logger.info("tool called", extra={"fields": fields})
        return result

    def count(self) -> None:
        """Add the run to the metrics; called once, at the end of the request."""
        if self.seconds:
            failed = self.outcome in ("error", "timeout")
            self.metrics.hook(self.plugin.name, self.seconds, failed=failed)

    async def _pieces(self, pieces: AsyncIterator[Any]) -> AsyncIterator[str]:
        """Yield the texts of a streamed Reply. Raises Aborted if one fails or comes too late."""
        try:
            while piece := await self.call("reply", pieces, accept=text_only, may_reply=False):
                yield piece
        except PluginExecutionError as exc:
            raise Aborted(f"the agent {self.plugin.name} failed in its answer", exc.status) from exc

    async def reply(self, pieces: AsyncIterator[Any]) -> Any:
        """Return the next piece of a streamed Reply, "" at its end."""
        return await anext(pieces, "")

    def _failed(self, hook: str, exc: PluginExecutionError) -> PluginExecutionError | Aborted:
        """Note a failure, and return what it means to the request.

        Type, place and cure are logged; the text of an exception may hold a prompt: at debug only.
        """
        self.outcome, self.due = exc.outcome, False
        cause, name = exc.__cause__, self.plugin.name
        where, advice = diagnosis(cause, self.plugin.folder)
        fields = {"agent": name, "hook": hook, "request_id": self.context.request_id}
        fields |= {"error": f"{exc}{advice}"} | ({"where": where} if where else {})
        logger.warning("agent failed", extra={"fields": fields})
        if cause is not None:
            text = {"text": safe_text(lambda: cause)}
            logger.debug("an agent's exception", extra={"fields": fields | text})
        if self.plugin.config.on_error == "skip":
            return exc
        return Aborted(f"the agent {name} failed, and its operator wants it or nothing", exc.status)


def text_only(result: Any) -> str:
    if not isinstance(result, str):
        raise wrong(result, "a response hook must return text")
    return result


def wrong(result: Any, due: str) -> PluginExecutionError:
    """Return the failure of a hook that returned something of the wrong type."""
    kind = type(result).__name__
    missing = {"NoneType": "return", "coroutine": "await"}.get(kind)
    hint = f"; is a `{missing}` missing?" if missing else ""
    return PluginExecutionError(f"returned {kind}, but {due}{hint}")
