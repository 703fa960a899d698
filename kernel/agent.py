"""Agent: the contract that plugins are written against, and all of ours that they import.

An agent is a folder in `plugins/` whose `agent.py` defines one subclass of `BaseAgent`. Every hook
is optional; `def` instead of `async def` is fine, it runs in a thread. What a hook assigns to
`self` stays in that request; what `setup` put there is shared by all, and read. First comes the
class, then what a hook may raise, then `Context`, then helpers for payloads in both dialects.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernel.client import OllamaClient

Payload = dict[str, Any]  # the body of a chat, in the client's dialect
Message = dict[str, Any]


class BaseAgent:
    """One plugin's agent: override what you need."""

    settings: Mapping[str, Any]  # the operator's, from config.json and osp.toml
    arguments: Mapping[str, Any]  # what this request asked for, defaults filled in, types checked
    context: Context  # this request
    innermost: bool = False  # next to the model: last to see the request, first to see the answer
    last: bool = False  # to see the request, but for the innermost, and to see the answer
    progress: str = ""  # of what `setup` began: set it on `self` there, GET /plugins shows it
    _data_dir: Path

    @property
    def data_dir(self) -> Path:
        """A folder of its own for what it keeps, made on first use."""
        self._data_dir.mkdir(parents=True, exist_ok=True)
        return self._data_dir

    async def setup(self) -> None:
        """Load what is needed once; an exception here lists the agent as failed."""

    async def on_request(self, payload: Payload) -> Payload:
        """Change the chat on its way to the model, and return it."""
        return payload

    async def on_response(self, response: str) -> str:
        """Change the whole text of the answer, and return it."""
        return response

    async def on_chunk(self, text: str) -> str:
        """Change one piece of a stream, instead of `on_response`; "" holds it back."""
        return text

    async def on_end(self) -> str:
        """Return what was held back, or what belongs under the answer."""
        return ""

    async def teardown(self) -> None:
        """Close what `setup` opened; called once, when the last request has ended."""


class Reply(Exception):
    """Raise `Reply("text")` in a hook to answer without the model."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class Abort(Exception):
    """Raise `Abort(403, "why")` in a hook to refuse the request; the status is 400 to 599."""

    def __init__(self, status: int, why: str) -> None:
        if not 400 <= status <= 599:
            raise ValueError(f"Abort: {status} is no error status, 400 to 599 are")
        super().__init__(why)
        self.status = status
        self.why = why


class Clock:
    """A hook's time limit, in seconds, which stands still while the hook waits for the model."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._waiting = 0
        self.restart()

    def restart(self) -> None:
        self._left, self._since = self.limit, time.monotonic()

    def left(self) -> float:
        """Return the seconds that are left; from zero on the time is up."""
        return self._left - (0 if self._waiting else time.monotonic() - self._since)

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Stop the clock inside the block; blocks may overlap."""
        self._left, self._waiting = self.left(), self._waiting + 1
        try:
            yield
        finally:
            self._waiting -= 1
            self._since = time.monotonic()


# A change of these makes Ollama load the model anew (api.Runner in its sources), so what an agent
# asks of the request's own model is asked with the request's own.
RUNNER_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread")


@dataclass(slots=True, kw_only=True)
class Context:
    """One request, as one agent sees it."""

    request_id: str
    dialect: str  # "ollama" or "openai"
    stream: bool
    asked: bool  # by the client; else the agent is always on
    user: str  # one name for each of `access.keys`; "" where no key is needed
    state: dict[str, Any]  # shared by the agents of this request
    log: logging.LoggerAdapter[logging.Logger]
    payload: Payload = field(repr=False)  # as the client sent it, less the commands
    client: OllamaClient = field(repr=False)
    clock: Clock = field(default_factory=lambda: Clock(0), repr=False)

    @property
    def model(self) -> str:
        return str(self.payload["model"])

    @property
    def continuation(self) -> bool:
        """Tell whether the turn goes on after a tool's result: then nothing new was asked."""
        return not is_user(self.payload["messages"][-1])

    async def chat(self, messages: list[Message], model: str | None = None, **options: Any) -> str:
        """Ask the model, without agents, and return the text of its answer.

        `messages` are Ollama's ({"role", "content", "images"?}). `think`, `format` and `tools` are
        fields of the request, all other options are the model's (`temperature=0`). Raises
        UpstreamError. Not for `on_chunk`: there the model is busy with the answer itself.
        """
        fields = {key: options.pop(key) for key in ("think", "format", "tools") if key in options}
        body = {"messages": messages, "stream": False, "think": False} | fields
        answer = await self._ask("/api/chat", model, body, options)
        return str(answer["message"]["content"])

    async def embed(self, texts: list[str], model: str | None = None) -> list[list[float]]:
        """Return one vector for each text. Raises UpstreamError."""
        answer = await self._ask("/api/embed", model, {"input": texts}, {})
        return list(answer["embeddings"])

    async def _ask(self, path: str, model: str | None, body: Payload, options: Payload) -> Any:
        if model in (None, self.model):
            asked = self.payload.get("options") or {}
            options = {key: asked[key] for key in RUNNER_OPTIONS if key in asked} | options
            body |= {key: self.payload[key] for key in ("keep_alive",) if key in self.payload}
        with self.clock.standing():
            body |= {"model": model or self.model, "options": options}
            return await self.client.ask(path, body)


def is_user(message: Message) -> bool:
    return str(message.get("role")).lower() == "user"  # Ollama lowers roles, too


def last_user(payload: Payload) -> Message | None:
    """Return the last message of the user, wherever it stands in the conversation."""
    messages: list[Message] = payload["messages"]
    return next(filter(is_user, reversed(messages)), None)


def text_part(message: Message) -> Message | None:
    """Return the first text of a content that is a list of parts."""
    return next((part for part in message["content"] if part.get("type") == "text"), None)


def text_of(message: Message) -> str:
    """Return a message's text; of a list of parts the first text is meant."""
    content = message.get("content")
    if isinstance(content, list):
        return str((text_part(message) or {}).get("text", ""))
    return content or ""


def set_text(message: Message, text: str) -> None:
    """Replace a message's text; images and other parts stay."""
    if not isinstance(message.get("content"), list):
        message["content"] = text
    elif part := text_part(message):
        part["text"] = text
    else:
        message["content"].insert(0, {"type": "text", "text": text})


def prompt(payload: Payload) -> str:
    """Return the text of the last user message, without its commands."""
    return text_of(last_user(payload) or {})


def set_prompt(payload: Payload, text: str) -> Payload:
    """Replace the text of the last user message; without one, add one."""
    message = last_user(payload)
    if message is None:
        message = {"role": "user"}
        payload["messages"].append(message)
    set_text(message, text)
    return payload


def add_system(payload: Payload, text: str) -> Payload:
    """Insert a system message at the front."""
    payload["messages"].insert(0, {"role": "system", "content": text})
    return payload


def add_context(payload: Payload, text: str) -> Payload:
    """Put text before that of the last user message, a blank line between."""
    return set_prompt(payload, f"{text}\n\n{prompt(payload)}")
