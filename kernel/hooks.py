"""Hooks: runs a plugin's code so that it can fail, hang or lie and harm nobody else.

Each hook runs in a plain asyncio task of its own, which is waited for as long as its clock allows
and then cancelled and left behind: code that swallows its cancellation cannot hold a request (nor
anyio's scopes, which cancel again and again). A `def` hook runs in a daemon thread, because a
thread cannot be cancelled at all and must hold neither the loop nor the end of the process. An
`async def` without an `await` can neither wait nor be cancelled: it needs no task, and so a stream
has none for each frame.
"""

from __future__ import annotations

import asyncio
import dis
import inspect
import logging
import threading
import time
import types
from collections.abc import Callable, Coroutine, Generator
from types import CodeType
from typing import Any

from kernel.agent import Abort, Clock, Reply
from kernel.errors import PluginExecutionError, UpstreamError

logger = logging.getLogger(__name__)

THREADS = 2  # for one plugin at the same time: one that hangs fills its own places only
BLINK = 0.01  # seconds: how soon after a pause of its clock a hook may be found late
HELD_UP = 0.2  # seconds without an await, after which the log says so: nobody is served meanwhile


# A plugin is foreign code: everything is caught. SystemExit would end the loop.
CAUGHT = (Exception, SystemExit, KeyboardInterrupt)


class HookRunner:
    """Runs the hooks of one plugin."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(THREADS)
        self._left_behind: set[asyncio.Task[Any]] = set()  # asyncio itself holds tasks weakly
        self._waits: dict[CodeType | None, bool] = {}

    async def run(self, hook: Callable[..., Any], *args: Any, clock: Clock) -> Any:
        """Return what `hook(*args)` returns, be it `def` or `async def`.

        Raises Reply and Abort as they come, and PluginExecutionError for everything else.
        """
        try:
            if self.may_wait(hook):
                result = await self._in_task(self._contained(hook, args, clock), clock)
            else:
                result = at_once(hook(*args))
        except asyncio.CancelledError as exc:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            raise PluginExecutionError("raised CancelledError") from exc
        except (Reply, Abort, PluginExecutionError):
            raise
        except CAUGHT as exc:
            raise failure(exc) from exc
        if clock.left() <= 0:
            raise late(clock)
        return result

    def may_wait(self, hook: Any) -> bool:
        """Tell whether a hook may suspend: it is a `def`, or has an `await`."""
        code = getattr(hook, "__code__", None)
        if code not in self._waits:
            self._waits[code] = not inspect.iscoroutinefunction(hook) or suspends(code)
        return self._waits[code]

    async def _in_task(self, work: Coroutine[Any, Any, Any], clock: Clock) -> Any:
        task = asyncio.create_task(work)
        try:
            while not task.done():
                if clock.left() <= 0:
                    raise late(clock)
                await asyncio.wait({task}, timeout=max(clock.left(), BLINK))
        finally:
            if not task.done():
                task.cancel()
                self._left_behind.add(task)
                task.add_done_callback(self._forget)
        return task.result()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._left_behind.discard(task)
        if not task.cancelled():
            task.exception()  # or asyncio complains that nobody asked

    async def _contained(self, hook: Callable[..., Any], args: Any, clock: Clock) -> Any:
        try:
            if inspect.iscoroutinefunction(hook):
                return await timed(hook(*args))
            result = await self._in_thread(lambda: hook(*args), clock)
            return await result if inspect.isawaitable(result) else result
        except (Reply, Abort, PluginExecutionError):
            raise
        except CAUGHT as exc:
            raise failure(exc) from exc

    async def _in_thread(self, work: Callable[[], Any], clock: Clock) -> Any:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

        def run() -> None:
            result, error = None, None
            try:
                result = work()
            except BaseException as exc:  # it belongs to whoever waits, not to this thread
                error = exc
            if not loop.is_closed():
                loop.call_soon_threadsafe(finish, result, error)

        def finish(result: Any, error: BaseException | None) -> None:
            self._places.release()
            if not done.done():
                done.set_result((result, error))

        await self._places.acquire()
        clock.restart()  # waiting for a place was not the hook's fault
        threading.Thread(target=run, daemon=True).start()
        result, error = await done
        if error:
            raise error
        return result


def suspends(code: CodeType | None) -> bool:
    if code is None:
        return True
    names = {instruction.opname for instruction in dis.get_instructions(code)}
    return not names.isdisjoint(("GET_AWAITABLE", "GET_ANEXT", "SEND"))


def at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that awaits nothing, and say in the log when it held everybody up."""
    began = time.perf_counter()
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    finally:
        if (took := time.perf_counter() - began) > HELD_UP:
            complain(coroutine.cr_code, took)  # type: ignore[attr-defined]


def failure(exc: BaseException) -> PluginExecutionError:
    status = 502 if isinstance(exc, UpstreamError) else 500
    return PluginExecutionError(f"{type(exc).__name__}: {exc}", status)


def late(clock: Clock) -> PluginExecutionError:
    return PluginExecutionError(f"took longer than {clock.limit:g} seconds", outcome="timeout")


@types.coroutine
def timed(coroutine: Any) -> Generator[Any, Any, Any]:
    """Run a hook, and say in the log when a step of it held everybody up."""
    step, value = coroutine.send, None
    while True:
        began = time.perf_counter()
        try:
            awaited = step(value)
        except StopIteration as stop:
            return stop.value
        finally:
            if (took := time.perf_counter() - began) > HELD_UP:
                complain(coroutine.cr_code, took)
        try:
            step, value = coroutine.send, (yield awaited)
        except BaseException as exc:  # a cancellation, say: the hook's to take
            step, value = coroutine.throw, exc


def complain(code: CodeType, took: float) -> None:
    cure = f"blocking code belongs into `def {code.co_name}`, which runs in a thread"
    place = f"{code.co_filename}:{code.co_firstlineno}"
    fields = {"where": place, "seconds": round(took, 1), "cure": cure}
    logger.warning("agent held up everybody", extra={"fields": fields})
