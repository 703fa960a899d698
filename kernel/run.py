"""Run: one agent's part in one request, and what became of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kernel.agent import Abort, BaseAgent, Clock, Reply
from kernel.errors import Aborted, PluginExecutionError
from kernel.metrics import Metrics
from kernel.plugin import Plugin, cure, place_of

logger = logging.getLogger(__name__)

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


def wrong(result: Any, due: str) -> PluginExecutionError:
    """Return the failure of a hook that returned something of the wrong type."""
    kind = type(result).__name__
    missing = {"NoneType": "return", "coroutine": "await"}.get(kind)
    hint = f"; is a `{missing}` missing?" if missing else ""
    return PluginExecutionError(f"returned {kind}, but {due}{hint}")


def notice(runs: Sequence[Run]) -> str:
    """Return a line on the agents that were asked for and failed, or the empty string."""
    failed = [
        run for run in runs if run.agent.context.asked and run.outcome in ("error", "timeout")
    ]
    names = ", ".join(run.plugin.name for run in failed)
    return f"\n\n[without {names}: it failed, the proxy's log says why]" if names else ""
