"""Hooks: runs a plugin's code so that it can fail, hang or lie and harm nobody else.

Each hook runs in a plain asyncio task of its own, which is waited for as long as its clock allows
and then cancelled and left behind: code that swallows its cancellation cannot hold a request (nor
anyio's scopes, which cancel again and again). A `def` hook runs in a daemon thread, because a
thread cannot be cancelled at all and must hold neither the loop nor the end of the process.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any

from kernel.agent import Abort, Clock, Reply
from kernel.errors import PluginExecutionError, UpstreamError

THREADS = 2  # for one plugin at the same time: one that hangs fills its own places only
BLINK = 0.01  # seconds: how soon after a pause of its clock a hook may be found late


class HookRunner:
    """Runs the hooks of one plugin."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(THREADS)
        self._left_behind: set[asyncio.Task[Any]] = set()  # asyncio itself holds tasks weakly

    async def run(self, hook: Callable[..., Any], *args: Any, clock: Clock) -> Any:
        """Return what `hook(*args)` returns, be it `def` or `async def`.

        Raises Reply and Abort as they come, and PluginExecutionError for everything else.
        """
        task = asyncio.create_task(self._contained(hook, args, clock))
        try:
            while not task.done():
                if clock.left() <= 0:
                    text = f"took longer than {clock.limit:g} seconds"
                    raise PluginExecutionError(text, outcome="timeout")
                await asyncio.wait({task}, timeout=max(clock.left(), BLINK))
        finally:
            if not task.done():
                task.cancel()
                self._left_behind.add(task)
                task.add_done_callback(self._forget)
        if task.cancelled():
            raise PluginExecutionError("raised CancelledError")
        return task.result()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._left_behind.discard(task)
        if not task.cancelled():
            task.exception()  # or asyncio complains that nobody asked

    async def _contained(self, hook: Callable[..., Any], args: Any, clock: Clock) -> Any:
        try:
            if inspect.iscoroutinefunction(hook):
                return await hook(*args)
            result = await self._in_thread(lambda: hook(*args), clock)
            return await result if inspect.isawaitable(result) else result
        except (Reply, Abort, PluginExecutionError):
            raise
        # A plugin is foreign code: here everything is caught. SystemExit would end the loop.
        except (Exception, SystemExit, KeyboardInterrupt) as exc:
            status = 502 if isinstance(exc, UpstreamError) else 500
            raise PluginExecutionError(f"{type(exc).__name__}: {exc}", status) from exc

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
