"""Running foreign code: whatever a hook does is its agent's failure, and harms nothing else."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernel.agent import Abort, BaseAgent, Clock, Reply
from kernel.errors import Aborted, PluginExecutionError
from kernel.hooks import Run, run_hook, text_only
from kernel.metrics import Metrics
from kernel.plugin import AgentConfig, Plugin

SECRET = "my password is hunter2"


def run_of(agent: BaseAgent, limit: float = 5, **config: Any) -> Run:
    vars(agent)["context"] = SimpleNamespace(request_id="r1")
    plugin = Plugin("it", Path(__file__).parent, AgentConfig(**config), hooks=("on_request",))
    return Run(plugin, agent, limit, Metrics())


def agent_of(hook: Any) -> BaseAgent:
    """Return an agent whose on_request is `hook`, a function or anything else."""
    agent: BaseAgent = type("It", (BaseAgent,), {"on_request": hook})()
    return agent


def raises(exc: Callable[[], BaseException]) -> Any:
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


def group() -> BaseException:
    return BaseExceptionGroup("all", [asyncio.CancelledError(), SystemExit(), ValueError(SECRET)])


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


def awaitable(self: Any, payload: Any) -> Any:
    async def fails() -> Any:
        raise ValueError(SECRET)

    return fails()


FAILURES: dict[str, Any] = {
    **{
        kind.__name__: raises(partial(kind, SECRET))
        for kind in (ValueError, BaseException, GeneratorExit, KeyboardInterrupt, SystemExit)
    },
    "StopIteration": raises(lambda: StopIteration(SECRET)),
    "StopAsyncIteration": raises(StopAsyncIteration),
    "CancelledError": raises(asyncio.CancelledError),
    "a group": raises(group),
    "no text": raises(Mute),
    "no name": raises(Anonymous),
    "a false one": raises(False_),
    "a lying one": raises(Lying),
    "a lying one of ours": raises(OneOfOurs),
    "def: a false one": def_raises(False_()),
    "def: StopIteration": def_raises(StopIteration(SECRET)),
    "def: CancelledError": def_raises(asyncio.CancelledError()),
    "def: SystemExit": def_raises(SystemExit(SECRET)),
    "def: an awaitable that fails": awaitable,
    "cancels itself": cancels_itself,
    "cancels itself and waits": cancels_and_waits,
    "waits for a cancelled task": waits_for_a_cancelled_task,
    "a property": property(lambda self: 1 / 0),
    "a property that exits": property(lambda self: exit(SECRET)),
    "no function": 5,
    "None": None,
    "Reply(42)": raises(lambda: Reply(42)),  # type: ignore[arg-type]
    "Reply(bytes)": raises(lambda: Reply(b"x")),  # type: ignore[arg-type]
    "Reply without text": raises(lambda: NoText("x")),
    "Abort(450.5)": raises(lambda: Abort(450.5, "x")),  # type: ignore[arg-type]
    "Abort(200)": raises(lambda: Abort(200, "x")),
    "Abort(True)": raises(lambda: Abort(True, "x")),
    "Abort('403')": raises(lambda: Abort("403", "x")),  # type: ignore[arg-type]
    "Abort without why": raises(lambda: Abort(403, None)),  # type: ignore[arg-type]
    "Abort without arguments": raises(lambda: Abort()),  # type: ignore[call-arg]
    "Abort with a line in a header": raises(lambda: Abort(403, "x", {"a": "b\r\nc: d"})),
    "Abort with a framing header": raises(lambda: Abort(403, "x", {"Content-Length": "0"})),
    "Abort with a strange name": raises(lambda: Abort(403, "x", {"a b": "c"})),
    "Abort with no headers": raises(lambda: Abort(403, "x", 7)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", FAILURES)
async def test_whatever_a_hook_does_is_a_soft_failure_whose_text_is_not_logged(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for on_error, kind in (("skip", PluginExecutionError), ("abort", Aborted)):
        run = run_of(agent_of(FAILURES[name]), on_error=on_error)

        with pytest.raises(kind) as caught:
            await run.call("on_request", {}, accept=lambda result: result)

        assert (run.outcome, run.due) == ("error", False)
        assert "hunter2" not in str(caught.value)
    assert [r.message for r in caplog.records] == ["agent failed"] * 2
    assert "hunter2" not in str([vars(record)["fields"] for record in caplog.records])


async def test_a_failure_is_logged_with_type_and_place_and_its_text_at_debug_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hook = raises(lambda: ValueError(SECRET))
    with caplog.at_level(logging.DEBUG, "kernel.hooks"):
        with pytest.raises(PluginExecutionError):
            await run_of(agent_of(hook)).call("on_request", {}, accept=text_only)

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
    "nested": (
        Table(a=Table(b=List([Text("c"), (1, True, None)]))),
        {"a": {"b": ["c", [1, True, None]]}},
    ),
    "key": ({Text("k"): List()}, {"k": []}),
}


@pytest.mark.parametrize("name", COPIES)
async def test_a_result_is_copied_to_the_built_in_types(name: str) -> None:
    result, copy = COPIES[name]

    got = await run_of(agent_of(returns(result))).call("on_request", {}, accept=lambda got: got)

    assert repr(got) == repr(copy)


@pytest.mark.parametrize("form", ["async def", "def", "def that returns an awaitable"])
async def test_a_hook_may_have_any_form(form: str) -> None:
    hooks: dict[str, Any] = {
        "async def": returns("x"),
        "def": lambda self, payload: "x",
        "def that returns an awaitable": lambda self, payload: asyncio.sleep(0, "x"),
    }
    run = run_of(agent_of(hooks[form]))

    assert await run.call("on_request", {}, accept=text_only) == "x"
    assert run.outcome == "ok" and run.seconds > 0


async def test_a_reply_and_a_refusal_come_with_plain_values() -> None:
    replies = run_of(agent_of(raises(lambda: Reply(Text("x")))))
    refuses = run_of(
        agent_of(raises(lambda: Abort(429, Text("why"), {"Retry-After": 5})))  # type: ignore[dict-item]
    )

    with pytest.raises(Reply) as reply:
        await replies.call("on_request", {}, accept=text_only)
    with pytest.raises(Aborted) as refusal:
        await refuses.call("on_request", {}, accept=text_only)

    assert type(reply.value.text) is str and replies.outcome == "reply"
    assert (refusal.value.status, str(refusal.value)) == (429, "why")
    assert refusal.value.headers == [(b"retry-after", b"5")] and refuses.outcome == "abort"


async def test_a_reply_where_none_is_possible_is_a_failure() -> None:
    run = run_of(agent_of(raises(lambda: Reply("x"))))

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
    run = run_of(agent_of(raises(lambda: Reply(pieces(*given)))))
    got = []

    with pytest.raises(Reply) as reply:
        await run.call("on_request", {}, accept=text_only)
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
    run = run_of(agent_of(hook), limit=0.05)

    with pytest.raises(PluginExecutionError, match=r"took longer than 0\.05 seconds"):
        await run.call("on_request", {}, accept=lambda result: result)

    assert run.outcome == "timeout"


async def test_the_clock_stands_still_while_it_is_paused() -> None:
    async def hook(self: Any, payload: Any) -> str:
        with self.context.clock.paused():
            await asyncio.sleep(0.15)
        return "x"

    assert await run_of(agent_of(hook), limit=0.1).call("on_request", {}, accept=text_only) == "x"


async def test_a_def_hook_gets_one_of_two_places_and_its_clock_starts_there() -> None:
    go, inside, counts = threading.Event(), [0], []
    plugin = Plugin("it", Path())

    def hook() -> None:
        inside[0] += 1
        counts.append(inside[0])
        go.wait(5)
        if len(counts) == 3:
            time.sleep(0.5)  # too late for a clock that ran while it waited for its place
        inside[0] -= 1

    async def one() -> None:
        await run_hook(plugin, lambda: hook, clock=Clock(0.8), accept=lambda result: None)

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

    run = run_of(agent_of(hook))
    request = asyncio.create_task(run.call("on_request", {}, accept=text_only))
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

    run = run_of(agent_of(hook))
    run.waiting = flush
    await run.call("on_request", {}, accept=text_only)

    assert order == (["flush", "hook"] if waits else ["hook"])


async def test_a_hook_cannot_take_its_context_away_from_the_next_one() -> None:
    async def hook(self: Any, payload: Any) -> str:
        self.context = None
        return "x"

    run = run_of(agent_of(hook))

    assert [await run.call("on_request", {}, accept=text_only) for _ in range(2)] == ["x", "x"]


async def test_an_agent_that_never_ran_has_no_outcome() -> None:
    assert run_of(BaseAgent()).outcome == ""
