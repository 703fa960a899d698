"""Running foreign code: in a task, in a thread, or at once; and saying who held everybody up."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from kernel.agent import Clock
from kernel.errors import PluginExecutionError
from kernel.hooks import HookRunner


async def with_await() -> asyncio.Task[Any] | None:
    await asyncio.sleep(0)
    return asyncio.current_task()


async def without_await() -> asyncio.Task[Any] | None:
    return asyncio.current_task()


async def with_a_context() -> asyncio.Task[Any] | None:
    async with asyncio.Lock():
        return asyncio.current_task()


async def with_a_loop() -> asyncio.Task[Any] | None:
    async for _ in nothing():
        pass
    return asyncio.current_task()


async def nothing() -> Any:
    if nothing is None:
        yield


@pytest.mark.parametrize("hook", [with_await, with_a_context, with_a_loop])
async def test_what_may_wait_gets_a_task_of_its_own(hook: Any) -> None:
    task = await HookRunner().run(hook, clock=Clock(5))

    assert task not in (None, asyncio.current_task())


async def test_what_cannot_wait_needs_none() -> None:
    assert await HookRunner().run(without_await, clock=Clock(5)) is asyncio.current_task()


async def blocks() -> None:
    time.sleep(0.25)  # noqa: ASYNC251 - the mistake that the log is to name


async def blocks_in_its_second_step() -> None:
    await asyncio.sleep(0)
    time.sleep(0.25)  # noqa: ASYNC251 - the same mistake, later


@pytest.mark.parametrize("hook", [blocks, blocks_in_its_second_step])
async def test_who_holds_everybody_up_is_named_with_the_cure(
    hook: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await HookRunner().run(hook, clock=Clock(5))

    (record,) = (r for r in caplog.records if r.message == "agent held up everybody")
    assert f"def {hook.__name__}`, which runs in a thread" in record.fields["cure"]  # type: ignore[attr-defined]
    assert record.fields["where"] == f"{__file__}:{hook.__code__.co_firstlineno}"  # type: ignore[attr-defined]


async def test_a_def_hook_that_blocks_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    await HookRunner().run(time.sleep, 0.25, clock=Clock(5))

    assert not caplog.records


@pytest.mark.parametrize("hook", [blocks, blocks_in_its_second_step])
async def test_what_comes_too_late_does_not_count(hook: Any) -> None:
    with pytest.raises(PluginExecutionError, match=r"longer than 0\.1 seconds"):
        await HookRunner().run(hook, clock=Clock(0.1))


async def test_a_hook_can_tell_its_cancellation_from_its_own_errors() -> None:
    seen = []

    async def hook() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    with pytest.raises(PluginExecutionError):
        await HookRunner().run(hook, clock=Clock(0.05))
    await asyncio.sleep(0)

    assert seen == ["cancelled"]


async def test_a_request_that_is_cancelled_stays_cancelled() -> None:
    started = asyncio.Event()

    async def hook() -> None:
        started.set()
        await asyncio.Event().wait()

    request = asyncio.create_task(HookRunner().run(hook, clock=Clock(5)))
    await started.wait()
    request.cancel()

    with pytest.raises(asyncio.CancelledError):
        await request
