"""Running foreign code: whatever a hook does is its agent's failure, and harms nothing else."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernel.agent import Abort, BaseAgent, Reply
from kernel.errors import Aborted, PluginExecutionError
from kernel.hooks import HookRunner, Run, text_only
from kernel.log import RequestInfo
from kernel.metrics import Metrics
from kernel.plugin import AgentConfig, Plugin

SECRET = "my password is hunter2"


def run_of(hook: Any, limit: float = 5, **config: Any) -> Run:
    """Return the run of an agent whose on_request is `hook`, a function or anything else."""
    agent: BaseAgent = type("It", (BaseAgent,), {"on_request": hook})()
    vars(agent)["context"] = SimpleNamespace(request_id="r1")
    plugin = Plugin("it", Path(__file__).parent, AgentConfig(**config), hooks=("on_request",))
    return Run(plugin, agent, limit, Metrics(), RequestInfo("x"))


async def called(run: Run) -> Any:
    return await run.call("on_request", {}, accept=lambda result: result)


def raises(exc: Any) -> Any:
    async def hook(self: Any, payload: Any) -> Any:
        raise exc()

    return hook


def returns(value: Any) -> Any:
    async def hook(self: Any, payload: Any) -> Any:
        return value

    return hook


class Mute(Exception):
    """Its text is code that fails."""

    def __str__(self) -> str:
        raise SystemExit(SECRET)

    __repr__ = __str__


class Nameless(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise KeyboardInterrupt


class Anonymous(Exception, metaclass=Nameless): ...


class False_(Exception):
    def __bool__(self) -> bool:
        return False


class Lying(Exception):
    __class__ = Reply  # type: ignore[assignment]


class OneOfOurs(Exception):
    __class__ = PluginExecutionError  # type: ignore[assignment]


class NoText(Reply):
    text = property(lambda self: 1 / 0, lambda self, value: None)


def def_raises(exc: BaseException) -> Any:
    def hook(self: Any, payload: Any) -> Any:
        raise exc

    return hook


async def cancels_itself(self: Any, payload: Any) -> Any:
    task = asyncio.current_task()
    assert task
    task.cancel()
    return payload


async def cancels_and_waits(self: Any, payload: Any) -> Any:
    await cancels_itself(self, payload)
    await asyncio.sleep(0)


async def waits_for_a_cancelled_task(self: Any, payload: Any) -> Any:
    task = asyncio.create_task(asyncio.sleep(5))
    task.cancel()
    await task


EXCEPTIONS: list[Any] = [
    *(ValueError, BaseException, GeneratorExit, KeyboardInterrupt, SystemExit, StopIteration),
    *(StopAsyncIteration, asyncio.CancelledError, False_),
]
REFUSALS: list[Any] = [
    *((450.5, "x"), (200, "x"), (True, "x"), ("403", "x"), (403, None), (), (403, "x", 7)),
    *((403, "x", {"a": "b\r\nc: d"}), (403, "x", {"Content-Length": "0"})),
    (403, "x", {"a b": "c"}),
]
FAILURES: dict[str, Any] = {
    **{kind.__name__: raises(partial(kind, SECRET)) for kind in EXCEPTIONS},
    **{f"def: {kind.__name__}": def_raises(kind(SECRET)) for kind in EXCEPTIONS},
    **{f"Abort{values}": raises(partial(Abort, *values)) for values in REFUSALS},
    "Reply(42)": raises(partial(Reply, 42)),  # type: ignore[arg-type]
    "Reply(bytes)": raises(partial(Reply, b"x")),  # type: ignore[arg-type]
    "Reply without text": raises(lambda: NoText("x")),
    "a group": raises(lambda: BaseExceptionGroup("all", [SystemExit(), ValueError(SECRET)])),
    "no text": raises(Mute),
    "no name": raises(Anonymous),
    "a lying one": raises(Lying),
    "a lying one of ours": raises(OneOfOurs),
    "def: an awaitable that fails": lambda self, payload: raises(ValueError)(self, payload),
    "cancels itself": cancels_itself,
    "cancels itself and waits": cancels_and_waits,
    "waits for a cancelled task": waits_for_a_cancelled_task,
    "a property": property(lambda self: 1 / 0),
    "a property that exits": property(lambda self: exit(SECRET)),
    "no function": 5,
    "None": None,
}


@pytest.mark.parametrize("name", FAILURES)
async def test_whatever_a_hook_does_is_a_soft_failure_whose_text_is_not_logged(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for on_error, kind in (("skip", PluginExecutionError), ("abort", Aborted)):
        run = run_of(FAILURES[name], on_error=on_error)

        with pytest.raises(kind) as caught:
            await called(run)

        assert (run.outcome, run.due) == ("error", False)
        assert "hunter2" not in str(caught.value)
    assert [r.message for r in caplog.records] == ["agent failed"] * 2
    assert "hunter2" not in str([vars(record)["fields"] for record in caplog.records])


async def test_a_failure_is_logged_with_type_and_place_and_its_text_at_debug_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hook = raises(lambda: ValueError(SECRET))
    with caplog.at_level(logging.DEBUG, "kernel.hooks"), pytest.raises(PluginExecutionError):
        await called(run_of(hook))

    fields = {record.levelname: vars(record)["fields"] for record in caplog.records}
    line = hook.__code__.co_firstlineno + 1
    shown = {"agent": "it", "hook": "on_request", "request_id": "r1", "error": "ValueError"}
    assert fields["WARNING"] == shown | {"where": f"{__file__}:{line}"}
    assert fields["DEBUG"]["text"] == SECRET


class Text(str):
    def __str__(self) -> str:
        raise ValueError

    __repr__ = encode = __iter__ = __eq__ = __len__ = __str__  # type: ignore[assignment]
    __hash__ = str.__hash__


class Table(dict[str, Any]):
    def items(self) -> Any:
        raise SystemExit

    __iter__ = __len__ = keys = values = get = __getitem__ = items  # type: ignore[assignment]


class List(list[Any]):
    def __iter__(self) -> Any:
        while True:
            yield 1

    __len__ = __getitem__ = __iter__  # type: ignore[assignment]


COPIES: dict[str, tuple[Any, Any]] = {
    "text": (Text("x"), "x"),
    "nested": (Table(a=List([Text("c"), (1, True, None)])), {"a": ["c", [1, True, None]]}),
    "key": ({Text("k"): List()}, {"k": []}),
}


@pytest.mark.parametrize("name", COPIES)
async def test_a_result_is_copied_to_the_built_in_types(name: str) -> None:
    result, copy = COPIES[name]

    got = await called(run_of(returns(result)))

    assert repr(got) == repr(copy)


FORMS: dict[str, Any] = {
    "async def": returns("x"),
    "def": lambda self, payload: "x",
    "def that returns an awaitable": lambda self, payload: asyncio.sleep(0, "x"),
}


@pytest.mark.parametrize("form", FORMS)
async def test_a_hook_may_have_any_form(form: str) -> None:
    run = run_of(FORMS[form])

    assert await called(run) == "x"
    assert run.outcome == "ok" and run.seconds > 0


async def test_a_reply_and_a_refusal_come_with_plain_values() -> None:
    replies = run_of(raises(lambda: Reply(Text("x"))))
    headers: Any = {"Retry-After": 5}
    refuses = run_of(raises(lambda: Abort(429, Text("why"), headers)))

    with pytest.raises(Reply) as reply:
        await called(replies)
    with pytest.raises(Aborted) as refusal:
        await called(refuses)

    assert type(reply.value.text) is str and replies.outcome == "reply"
    assert (refusal.value.status, str(refusal.value)) == (429, "why")
    assert refusal.value.headers == [(b"retry-after", b"5")] and refuses.outcome == "abort"


async def test_a_reply_where_none_is_possible_is_a_failure() -> None:
    run = run_of(raises(lambda: Reply("x")))

    with pytest.raises(PluginExecutionError):
        await run.call("on_request", {}, accept=text_only, may_reply=False)

    assert run.outcome == "error"


async def pieces(*given: Any) -> Any:
    for piece in given:
        if isinstance(piece, BaseException):
            raise piece
        await asyncio.sleep(0)
        yield piece


@pytest.mark.parametrize("end", [None, ValueError(SECRET), SystemExit(), Reply("x"), 7])
async def test_a_streamed_reply_is_checked_piece_by_piece(end: Any) -> None:
    given = ["a", Text("b"), *([] if end is None else [end])]
    run = run_of(raises(lambda: Reply(pieces(*given))))
    got = []

    with pytest.raises(Reply) as reply:
        await called(run)
    try:
        async for piece in reply.value.text:  # type: ignore[union-attr]
            got.append(piece)
    except Aborted as exc:
        assert end is not None and "hunter2" not in str(exc)

    assert got == ["a", "b"] and [type(piece) for piece in got] == [str, str]
    assert run.outcome == ("reply" if end is None else "error")


async def hangs(self: Any, payload: Any) -> Any:
    await asyncio.Event().wait()


async def swallows(self: Any, payload: Any) -> Any:
    with suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
    await asyncio.sleep(0.2)  # on after its cancellation


def blocks_a_thread(self: Any, payload: Any) -> Any:
    threading.Event().wait(1)


async def blocks(self: Any, payload: Any) -> Any:
    time.sleep(0.1)  # noqa: ASYNC251 - the mistake that is meant


async def blocks_later(self: Any, payload: Any) -> Any:
    await asyncio.sleep(0)
    time.sleep(0.1)  # noqa: ASYNC251 - the same, later


@pytest.mark.parametrize("hook", [hangs, swallows, blocks_a_thread, blocks, blocks_later])
async def test_a_hook_that_takes_too_long_is_left_behind(hook: Any) -> None:
    run = run_of(hook, limit=0.05)

    with pytest.raises(PluginExecutionError, match=r"took longer than 0\.05 seconds"):
        await called(run)

    assert run.outcome == "timeout"


async def test_the_clock_stands_still_while_it_is_paused() -> None:
    async def hook(self: Any, payload: Any) -> str:
        with self.context.clock.paused():
            await asyncio.sleep(0.15)
        return "x"

    assert await called(run_of(hook, limit=0.1)) == "x"


async def test_a_def_hook_gets_one_of_two_places_and_its_clock_starts_there() -> None:
    go, inside, counts = threading.Event(), [0], []
    plugin = Plugin("it", Path())

    def hook() -> None:
        inside[0] += 1
        counts.append(inside[0])
        number = len(counts)
        go.wait(5)
        if number == 3:
            time.sleep(0.5)  # too late for a clock that ran while it waited for its place
        inside[0] -= 1

    async def one() -> None:
        await HookRunner(plugin, 0.8).run(SimpleNamespace(hook=hook), "hook")

    hooks = [asyncio.create_task(one()) for _ in range(3)]
    await asyncio.sleep(0.5)  # most of the time of each is over
    go.set()
    await asyncio.gather(*hooks)

    assert counts[:2] == [1, 2] and max(counts) == 2 and len(counts) == 3


async def test_a_request_that_is_cancelled_stays_so_and_its_hook_is_cancelled_too() -> None:
    seen: list[str] = []
    started = asyncio.Event()

    async def hook(self: Any, payload: Any) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("cancelled")

    run = run_of(hook)
    request = asyncio.create_task(called(run))
    await started.wait()
    request.cancel()

    with pytest.raises(asyncio.CancelledError):
        await request
    await asyncio.sleep(0)
    assert seen == ["cancelled"]


@pytest.mark.parametrize("waits", [False, True])
async def test_what_was_done_before_leaves_before_a_hook_is_waited_for(waits: bool) -> None:
    order: list[str] = []

    async def hook(self: Any, payload: Any) -> str:
        if waits:
            await asyncio.sleep(0.01)
        order.append("hook")
        return "x"

    async def flush() -> None:
        order.append("flush")

    run = run_of(hook)
    run.waiting = flush
    await called(run)

    assert order == (["flush", "hook"] if waits else ["hook"])


async def test_a_hook_cannot_take_its_context_away_from_the_next_one() -> None:
    async def hook(self: Any, payload: Any) -> str:
        self.context = None
        return "x"

    run = run_of(hook)

    assert [await called(run) for _ in range(2)] == ["x", "x"]
