"""Chain: the agents of one request, one after the other, each of which may fail alone.

An agent works on a payload of its own, parsed anew from the bytes that the one before it left; what
it returns counts only if it came in time and can be sent. Request hooks run in the order of the
runs: always-on agents first, then what was asked for. In the other direction, agents that only
respond are a pipe, left to right; agents with both hooks wrap around it and close in reverse;
always-on ones that only respond have the last word.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kernel.agent import Abort, BaseAgent, Clock, Payload, Reply
from kernel.dialects import dumps
from kernel.errors import Aborted, PluginExecutionError
from kernel.metrics import Metrics
from kernel.registry import Plugin, place_of

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Run:
    """One agent's part in one request, and what became of it."""

    plugin: Plugin
    agent: BaseAgent  # this request's own instance
    limit: float  # seconds for each hook
    metrics: Metrics
    outcome: str = "ok"  # or error, timeout, reply, abort
    seconds: float = 0.0
    due: bool = True  # its response hooks may run

    def has(self, *hooks: str) -> bool:
        return any(hook in self.plugin.hooks for hook in hooks)

    async def call(self, hook: str, *args: Any, accept: Callable[[Any], Any]) -> Any:
        """Run a hook and return what `accept` makes of its result.

        Raises Reply, PluginExecutionError where the chain goes on without it, and Aborted where
        the request ends.
        """
        clock = self.agent.context.clock = Clock(self.limit)
        began = time.perf_counter()
        try:
            result = await self.plugin.runner.run(getattr(self.agent, hook), *args, clock=clock)
            return accept(result)
        except Reply:
            self.outcome = "reply"
            raise
        except Abort as exc:
            self.outcome = "abort"
            raise Aborted(exc.why, exc.status) from exc
        except PluginExecutionError as exc:
            self.outcome = exc.outcome
            self._log(hook, exc)
            if self.plugin.config.on_error == "abort":
                text = f"the agent {self.plugin.name} failed, and its operator wants it or nothing"
                raise Aborted(text, exc.status) from exc
            raise
        finally:
            took = time.perf_counter() - began
            self.seconds += took
            failed = self.outcome in ("error", "timeout")
            self.metrics.hook(self.plugin.name, took, failed=failed)

    def _log(self, hook: str, exc: PluginExecutionError) -> None:
        fields = {"agent": self.plugin.name, "hook": hook, "error": str(exc)}
        fields["request_id"] = self.agent.context.request_id
        if exc.__cause__:
            fields["where"] = place_of(exc.__cause__, self.plugin.folder)
        logger.warning("agent failed", extra={"fields": fields})


async def run_requests(runs: Sequence[Run], payload: Payload) -> tuple[Payload, str | None]:
    """Return the payload as the hooks changed it, and the text of a Reply. Raises Aborted."""
    for run in runs:
        run.metrics.activated(run.plugin.name)
    body = dumps(payload)
    asking = [run for run in runs if run.has("on_request")]
    for run in asking:
        try:
            body = await run.call("on_request", json.loads(body), accept=partial(encoded, payload))
        except Reply as reply:
            for other in asking[asking.index(run) :]:
                other.due = False
            return json.loads(body), reply.text
        except PluginExecutionError:
            run.due = False
    return json.loads(body), None


def encoded(original: Payload, result: Any) -> bytes:
    """Return an agent's payload as bytes; `stream` stays what the client wanted."""
    if not isinstance(result, dict):
        kind = type(result).__name__
        raise PluginExecutionError(f"returned {kind}: on_request must return the payload")
    messages = result.get("messages")
    if not isinstance(messages, list) or not messages:
        raise PluginExecutionError("returned a payload without a list of messages")
    if not all(isinstance(message, dict) for message in messages):
        raise PluginExecutionError("returned a message that is not a dict")
    if "stream" in original:
        result["stream"] = original["stream"]
    else:
        result.pop("stream", None)
    try:
        return dumps(result)
    except (TypeError, ValueError, RecursionError) as exc:
        raise PluginExecutionError(f"returned what is no JSON: {exc}") from exc


def response_order(runs: Sequence[Run]) -> list[Run]:
    """Return the runs whose response hooks are due, in the order in which text goes through."""
    due = [run for run in runs if run.due and run.has("on_response", "on_chunk", "on_end")]
    wraps = [run for run in reversed(due) if run.has("on_request")]
    rest = [run for run in due if not run.has("on_request")]
    pipe = [run for run in rest if not run.plugin.config.always]
    last = [run for run in rest if run.plugin.config.always]
    return [*pipe, *wraps, *last]


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
