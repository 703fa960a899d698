"""Hooks: runs the code of agents, so that one that fails, hangs or lies harms only itself.

Each hook runs in an asyncio task of its own. It is waited for as long as its clock allows, and then
cancelled and left behind, because code that swallows its cancellation must not hold a request. A
`def` hook runs in a daemon thread, because a thread cannot be cancelled: it must hold neither the
loop nor the end of the process. What a hook returns or raises is foreign, too: values are copied to
the built-in types, and every exception ends inside the hook's task. `run_hook` is the mechanism,
`Run` says what it means to a request.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from kernel.agent import BaseAgent, Clock, Reply
from kernel.errors import Aborted, PluginExecutionError
from kernel.foreign import diagnosis, meaning, plain, safe_text
from kernel.metrics import Metrics
from kernel.plugin import Plugin

logger = logging.getLogger(__name__)

T = TypeVar("T")
BLINK = 0.01  # seconds: while the clock is paused, how often it is looked at
# From Python 3.12 on the first step runs at once: a hook that never waits costs no task switch.
EAGER: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}
NO_REPLY = "raised Reply: only on_request may, and not joined by & (type a space instead)"


async def run_hook(
    plugin: Plugin,
    find: Callable[[], Callable[..., Any]],
    *args: Any,
    clock: Clock,
    accept: Callable[[Any], T],
    waiting: Callable[[], Awaitable[None]] | None = None,
) -> T:
    """Return what `accept` makes of the result of the hook that `find` returns.

    `waiting` is awaited once if the hook does not finish in its first step. Raises Reply and
    Aborted with checked values, and PluginExecutionError for everything else that a hook can do.
    """
    loop = asyncio.get_running_loop()
    work = attempt(plugin, find, args, clock, accept)
    # asyncio's debug mode logs the name of a task that blocks; an eager one hides in its caller's.
    eager = {} if loop.get_debug() else EAGER
    task = asyncio.Task(work, loop=loop, name=f"agent {plugin.name}", **eager)
    try:
        if not task.done():
            await asyncio.sleep(0)  # without eager tasks: cheaper than asyncio.wait with its timer
        if waiting and not task.done():
            with clock.paused():
                await waiting()
        while not task.done() and clock.left() > 0:
            await asyncio.wait({task}, timeout=max(clock.left(), BLINK))
    finally:
        if not task.done():
            task.cancel()
            plugin.left_behind.add(task)  # asyncio itself holds tasks weakly
            task.add_done_callback(plugin.left_behind.discard)
    if clock.left() <= 0:
        text = f"took longer than {clock.limit:g} seconds"
        raise PluginExecutionError(text, outcome="timeout")
    if task.cancelled():
        raise PluginExecutionError("CancelledError")
    result, error = task.result()
    if error:
        raise error
    return result  # type: ignore[return-value]  # None only where `accept` returns it


async def attempt(
    plugin: Plugin, find: Callable[[], Any], args: Any, clock: Clock, accept: Callable[[Any], T]
) -> tuple[T | None, Exception | None]:
    """Return a result or an error; no exception of foreign code leaves this function."""
    try:
        hook = find()
        if inspect.iscoroutinefunction(hook):
            result = await hook(*args)
        else:
            result = await in_thread(plugin, lambda: hook(*args), clock)
            result = await result if inspect.isawaitable(result) else result
        return accept(plain(result)), None
    except BaseException as exc:  # also a CancelledError, SystemExit or group of the agent's own
        return None, meaning(exc)


async def in_thread(plugin: Plugin, work: Callable[[], Any], clock: Clock) -> Any:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def run() -> None:
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = work(), None
        except BaseException as exc:  # belongs to the hook's task, not to this thread
            outcome = None, exc
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(finish, outcome)

    def finish(outcome: tuple[Any, BaseException | None]) -> None:
        plugin.places.release()
        if not done.done():
            done.set_result(outcome)

    await plugin.places.acquire()
    clock.restart()  # the wait for a place was not the hook's fault
    threading.Thread(target=run, daemon=True).start()
    result, error = await done
    if error is not None:  # its truth value is foreign code, too
        raise error
    return result


@dataclass(slots=True, eq=False)
class Run:
    """One agent's part in one request, and what became of it."""

    plugin: Plugin
    agent: BaseAgent  # this request's own instance
    limit: float  # seconds for each hook
    metrics: Metrics
    asked: bool = False  # for by the client; else the agent is always on
    joined: bool = False  # runs at the same time as the one before it
    outcome: str = ""  # ok, error, timeout, reply, abort, unread; "": it never ran
    seconds: float = 0.0  # in its hooks
    due: bool = True  # its response hooks may run
    waiting: Callable[[], Awaitable[None]] | None = None  # awaited before a hook is waited for
    context: Any = None  # the agent's, which its hooks cannot take away from here

    def __post_init__(self) -> None:
        self.context = vars(self.agent)["context"]

    def has(self, *hooks: str) -> bool:
        return any(hook in self.plugin.hooks for hook in hooks)

    async def call(
        self, hook: str, *args: Any, accept: Callable[[Any], T], may_reply: bool = True
    ) -> T:
        """Run a hook and return what `accept` makes of its result, a copy of built-in types.

        Raises Reply with a text or an async iterator of texts, PluginExecutionError where the chain
        goes on without the agent, and Aborted where the request ends.
        """
        return await self._run(hook, partial(getattr, self.agent, hook), args, accept, may_reply)

    async def _run(
        self, hook: str, find: Any, args: Any, accept: Callable[[Any], T], may_reply: bool
    ) -> T:
        began, clock = time.perf_counter(), Clock(self.limit)
        self.context.clock = clock
        self.outcome = self.outcome or "ok"
        try:
            return await run_hook(
                self.plugin, find, *args, clock=clock, accept=accept, waiting=self.waiting
            )
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
            took = time.perf_counter() - began
            self.seconds += took
            failed = self.outcome in ("error", "timeout")
            self.metrics.hook(self.plugin.name, took, failed=failed)

    async def _pieces(self, pieces: AsyncIterator[Any]) -> AsyncIterator[str]:
        """Yield the texts of a streamed Reply. Raises Aborted if one fails or comes too late."""

        async def next_piece() -> Any:
            return await anext(pieces, "")

        try:
            while piece := await self._run("Reply", lambda: next_piece, (), text_only, False):
                yield piece
        except PluginExecutionError as exc:
            raise Aborted(f"the agent {self.plugin.name} failed in its answer", exc.status) from exc

    def _failed(self, hook: str, exc: PluginExecutionError) -> PluginExecutionError | Aborted:
        """Note a failure, and return what it means to the request."""
        self.outcome, self.due = exc.outcome, False
        self._log(hook, exc)
        if self.plugin.config.on_error == "skip":
            return exc
        text = f"the agent {self.plugin.name} failed, and its operator wants it or nothing"
        return Aborted(text, exc.status)

    def _log(self, hook: str, exc: PluginExecutionError) -> None:
        """Log type, place and cure; the text of an exception may hold a prompt: at debug only."""
        cause = exc.__cause__
        where, advice = diagnosis(cause, self.plugin.folder)
        fields = {"agent": self.plugin.name, "hook": hook, "request_id": self.context.request_id}
        fields |= {"error": f"{exc}{advice}", **({"where": where} if where else {})}
        logger.warning("agent failed", extra={"fields": fields})
        if cause is not None:
            text = {"text": safe_text(lambda: cause)}
            logger.debug("an agent's exception", extra={"fields": fields | text})


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
