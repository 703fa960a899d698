"""Chain: the agents of one request, one after the other or at once, each of which may fail alone.

An agent works on a payload of its own, parsed anew from the bytes that the one before it left; what
it returns counts only if it came in time and can be sent. Request hooks run in the order of the
runs: always-on agents first, then what was asked for. Agents that are joined by `&` run at once on
the same payload, and what they added is merged. In the other direction, agents that only
respond are a pipe, left to right; agents with both hooks wrap around it and close in reverse;
always-on ones that only respond have the last word. One that is `innermost` stands next to
the model, whatever was typed: the last to see the request, the first to see the answer. One that is
`last` sees what all others made of the request, and of the answer.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from asyncio import create_task, gather
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from kernel.agent import (
    Abort,
    BaseAgent,
    Clock,
    Message,
    Payload,
    Reply,
    last_user,
    set_text,
    text_of,
)
from kernel.dialects import dumps
from kernel.errors import Aborted, PluginExecutionError
from kernel.metrics import Metrics
from kernel.plugin import Plugin, cure, place_of

logger = logging.getLogger(__name__)

Trace = list[tuple["Run", bytes, bytes]]
ALONE = "agents joined by & may only add messages, and text before the prompt; type a space instead"


@dataclass(slots=True)
class Run:
    """One agent's part in one request, and what became of it."""

    plugin: Plugin
    agent: BaseAgent  # this request's own instance
    limit: float  # seconds for each hook
    metrics: Metrics
    joined: bool = False  # at the same time as the one before it
    outcome: str = "ok"  # or error, timeout, reply, abort
    seconds: float = 0.0
    due: bool = True  # its response hooks may run

    def has(self, *hooks: str) -> bool:
        return any(hook in self.plugin.hooks for hook in hooks)

    def waits(self, hook: str) -> bool:
        return self.plugin.runner.may_wait(getattr(self.agent, hook))

    async def call(
        self, hook: str, *args: Any, accept: Callable[[Any], Any], may_reply: bool = True
    ) -> Any:
        """Run a hook and return what `accept` makes of its result.

        Raises Reply, PluginExecutionError where the chain goes on without it, and Aborted where
        the request ends.
        """
        clock = self.agent.context.clock = Clock(self.limit)
        began = time.perf_counter()
        try:
            return accept(
                await self.plugin.runner.run(getattr(self.agent, hook), *args, clock=clock)
            )
        except Reply as exc:
            if may_reply:
                self.outcome = "reply"
                raise
            raise self._failed(hook, PluginExecutionError(f"raised Reply: {ALONE}")) from exc
        except Abort as exc:
            self.outcome = "abort"
            raise Aborted(exc.why, exc.status) from exc
        except PluginExecutionError as exc:
            raise self._failed(hook, exc) from exc
        finally:
            took = time.perf_counter() - began
            self.seconds += took
            failed = self.outcome in ("error", "timeout")
            self.metrics.hook(self.plugin.name, took, failed=failed)

    def _failed(self, hook: str, exc: PluginExecutionError) -> PluginExecutionError | Aborted:
        """Note a failure, and return what it means to the request."""
        self.outcome = exc.outcome
        self.due = False
        self._log(hook, exc)
        if self.plugin.config.on_error == "skip":
            return exc
        text = f"the agent {self.plugin.name} failed, and its operator wants it or nothing"
        return Aborted(text, exc.status)

    def _log(self, hook: str, exc: PluginExecutionError) -> None:
        folder, cause = self.plugin.folder, exc.__cause__
        fields = {"agent": self.plugin.name, "hook": hook, "error": str(exc)}
        fields["request_id"] = self.agent.context.request_id
        if cause:
            fields["error"] += cure(cause, folder)
            fields["where"] = place_of(cause, folder)
        logger.warning("agent failed", extra={"fields": fields})


async def run_requests(
    runs: Sequence[Run], payload: Payload, trace: Trace
) -> tuple[Payload, str | None]:
    """Return the payload as the hooks changed it, and the text of a Reply. Raises Aborted.

    `trace` is filled with each run, and the body as it came to the agent and as that left it.
    """
    for run in runs:
        run.metrics.activated(run.plugin.name)
    body = dumps(payload)
    waiting = groups(runs)
    while waiting:
        try:
            if len(waiting[0]) == 1:
                left = await ask(waiting[0][0], body, partial(encoded, payload))
                trace.append((waiting[0][0], body, left))
            else:
                left = await ask_together(waiting[0], body, payload, trace)
        except Reply as reply:
            for run in chain.from_iterable(waiting):
                run.due = False
            return json.loads(body), reply.text
        body = left
        del waiting[0]
    return json.loads(body), None


def groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the runs with a request hook, in order, those that run at the same time together."""
    together: list[list[Run]] = []
    for run in runs:
        if not run.joined:
            together.append([])
        if run.has("on_request"):
            together[-1].append(run)
    return [group for group in together if group]


async def ask(
    run: Run, body: bytes, accept: Callable[[Any], bytes], *, may_reply: bool = True
) -> bytes:
    """Return the body as an agent leaves it: after a failure as it was. Raises Reply, Aborted."""
    try:
        payload = json.loads(body)
        left = await run.call("on_request", payload, accept=accept, may_reply=may_reply)
        return bytes(left)
    except PluginExecutionError:
        return body


async def ask_together(group: Sequence[Run], body: bytes, original: Payload, trace: Trace) -> bytes:
    """Return the body with what each of a group added, as typed; the first Aborted ends all."""

    def mergeable(result: Any) -> bytes:
        left = encoded(original, result)
        Additions(body, left)
        return left

    tasks = [create_task(ask(run, body, mergeable, may_reply=False)) for run in group]
    try:
        bodies = await gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    trace += [(run, body, left) for run, left in zip(group, bodies, strict=True)]
    return merged(body, [Additions(body, left) for left in bodies])


class Additions:
    """What an agent added to a body: messages, and text before that of the last user message.

    Raises PluginExecutionError where it changed anything else.
    """

    def __init__(self, body: bytes, left: bytes) -> None:
        before, after = json.loads(body), json.loads(left)
        old, new = before.pop("messages"), after.pop("messages")
        user = last_user({"messages": old})
        self.inserted: defaultdict[int, list[Message]] = defaultdict(list)  # by what they precede
        self.text = ""
        at = len(old)
        for message in reversed(new):  # what is added is mostly older than what was asked
            if at and message == old[at - 1]:
                at -= 1
            elif at and old[at - 1] is user and (text := text_added(message, user)):
                self.text = text
                at -= 1
            else:
                self.inserted[at].insert(0, message)
        if before != after or at:
            raise PluginExecutionError(f"changed more than can be merged: {ALONE}")


def text_added(message: Message, user: Message) -> str:
    """Return what stands before the text of `user` in a message that is the same but for that."""
    text, old = text_of(message), text_of(user)
    same = copy.deepcopy(user)
    set_text(same, text)
    return text.removesuffix(old) if text.endswith(old) and same == message else ""


def merged(body: bytes, parts: Sequence[Additions]) -> bytes:
    payload = json.loads(body)
    if user := last_user(payload):
        if text := "".join(part.text for part in parts):
            set_text(user, text + text_of(user))
    old: list[Message] = payload["messages"]
    messages = payload["messages"] = []
    for at in range(len(old) + 1):
        for part in parts:
            messages += part.inserted[at]
        messages += old[at : at + 1]
    return dumps(payload)


def encoded(original: Payload, result: Any) -> bytes:
    """Return an agent's payload as bytes; `stream` stays what the client wanted."""
    if not isinstance(result, dict):
        raise wrong(result, "on_request must return the payload")
    messages = result.get("messages")
    if not isinstance(messages, list) or not messages:
        raise PluginExecutionError("returned a payload without a list of messages")
    if not isinstance(result.get("model"), str):
        raise PluginExecutionError("returned a payload without a model's name")
    for message in messages:
        if not isinstance(message, dict):
            raise PluginExecutionError("returned a message that is not a dict")
        if not is_message(message):
            raise wrong(message["content"], "a message's content is text or a list of parts")
    if "stream" in original:
        result["stream"] = original["stream"]
    else:
        result.pop("stream", None)
    try:
        return dumps(result)
    except (TypeError, ValueError, RecursionError) as exc:
        raise PluginExecutionError(f"returned what is no JSON: {exc}") from exc


def is_message(message: Any) -> bool:
    """Tell whether something is a message, as either dialect knows it."""
    content = message.get("content") if isinstance(message, dict) else 0
    if isinstance(content, list):
        return all(isinstance(p, dict) and isinstance(p.get("text", ""), str) for p in content)
    return content is None or isinstance(content, str)


def wrong(result: Any, due: str) -> PluginExecutionError:
    """Return the failure of a hook that returned something of the wrong type."""
    kind = type(result).__name__
    missing = {"NoneType": "return", "coroutine": "await"}.get(kind)
    hint = f"; is a `{missing}` missing?" if missing else ""
    return PluginExecutionError(f"returned {kind}, but {due}{hint}")


def response_order(runs: Sequence[Run]) -> list[Run]:
    """Return the runs whose response hooks are due, in the order in which text goes through."""
    responding = [run for run in runs if run.due and run.plugin.responds]
    inner = [run for run in reversed(responding) if run.agent.innermost]
    end = [run for run in reversed(responding) if run.agent.last and not run.agent.innermost]
    due = [run for run in responding if not (run.agent.innermost or run.agent.last)]
    wraps = [run for run in reversed(due) if run.has("on_request")]
    rest = [run for run in due if not run.has("on_request")]
    pipe = [run for run in rest if not run.plugin.config.always]
    last = [run for run in rest if run.plugin.config.always]
    return [*inner, *pipe, *wraps, *last, *end]


def summary(runs: Sequence[Run]) -> str:
    """Return what X-OSP-Agents says: `rag;ok;12ms, translate;error;3ms`."""
    return ", ".join(f"{r.plugin.name};{r.outcome};{r.seconds * 1000:.0f}ms" for r in runs)


def notice(runs: Sequence[Run]) -> str:
    """Return a line on the agents that were asked for and failed, or the empty string."""
    failed = [
        run for run in runs if run.agent.context.asked and run.outcome in ("error", "timeout")
    ]
    names = ", ".join(run.plugin.name for run in failed)
    return f"\n\n[without {names}: it failed, the proxy's log says why]" if names else ""
