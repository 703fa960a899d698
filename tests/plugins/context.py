"""What an agent is told of a request, for tests that call its hooks."""

from __future__ import annotations

import logging
from typing import Any

from kernel.agent import Context, Payload


async def no_model(path: str, body: Payload) -> Any:
    raise AssertionError("no model was to be asked")


def a_context(prompt: str, model: Any = no_model, **values: Any) -> Context:
    """Return the context of a prompt that was typed with the agent's command.

    `model` answers what the agent asks, from a path and a body.
    """
    fields: Any = {"request_id": "1", "model": "demo", "dialect": "ollama", "streams": True}
    fields |= {"asked": True, "continuation": False, "explaining": False, "user": "", "state": {}}
    fields["log"] = logging.LoggerAdapter(logging.getLogger("test"))
    return Context(**fields | {"prompt": prompt, "ask": model, "listen": no_model} | values)
