"""Agent: the contract that plugins are written against, and all that they import of the proxy.

An agent is a folder in `plugins/` whose `agent.py` defines one subclass of `BaseAgent`. Every hook
is optional; a `def` hook runs in a thread. What a hook assigns to `self` stays in that request;
what `setup` made is shared by all requests. First comes the class, then what a hook may raise, then
`Context`, then helpers for payloads, which are the same in every dialect.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernel.errors import StoreError as StoreError
from kernel.errors import UpstreamError

# Authors import all they need from here.
from kernel.store import Schema as Schema
from kernel.store import Store as Store
from kernel.text import beginning as beginning
from kernel.text import fold as fold
from kernel.text import index_words as index_words
from kernel.text import telling_words as telling_words

Payload = dict[str, Any]  # a chat: "model", "messages", and every other key as the client sent it
Message = dict[str, Any]  # {"role", "content"}; the content is text or a list of parts
# {"name", "description"?, "parameters"?: a JSON schema, "consent"?: true asks the user first}
Tool = dict[str, Any]
Call = dict[str, Any]  # {"id", "name", "arguments": {}, "agent": whose tool, "" is the client's}


class BaseAgent:
    """One plugin's agent: override what you need."""

    settings: Mapping[str, Any]  # the operator's, from config.json and osp.toml
    arguments: Mapping[str, Any]  # what this request asked for, defaults filled in, types checked
    context: Context  # this request
    innermost: bool = False  # runs last on the request and first on the answer (a cache)
    last: bool = False  # runs after all others in both directions, but for innermost ones (redact)
    progress: str = ""  # a status line for GET /plugins; set it in setup()
    tools: list[Tool] = []  # offered to the model in this request; set it here or in on_request()
    schema: Schema = Schema()  # the tables of `self.store`
    _data_dir: Path
    _store: Callable[[], Store]

    @property
    def data_dir(self) -> Path:
        """A folder for what the agent keeps, made on first use."""
        self._data_dir.mkdir(parents=True, exist_ok=True)
        return self._data_dir

    @property
    def store(self) -> Store:
        """Tables for what the agent keeps, made on first use: for `async def` hooks."""
        return self._store()

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

    async def on_tool(self, name: str, arguments: dict[str, Any]) -> str | list[Message]:
        """Return the result of one of `self.tools`, which the model called.

        It is text, or a list of MCP's contents: {"type": "text", "text"} and {"type": "image",
        "data" in base64, "mimeType"}. An exception is told to the model, by its type and its text.
        """
        raise NotImplementedError(name)

    async def on_calls(self, calls: list[Call]) -> list[Call]:
        """Change the calls of a round before they are made, the client's own ones too.

        One that is missing from what you return is refused; the model is told so.
        """
        return calls

    async def teardown(self) -> None:
        """Close what `setup` opened; called once, when the proxy stops."""


class Reply(Exception):
    """Raise `Reply("text")` in a hook to answer without the model.

    `text` may also be an async iterator of pieces, which then streams.
    """

    def __init__(self, text: str | AsyncIterator[str]) -> None:
        super().__init__("an answer without the model")
        self.text = text


class Abort(Exception):
    """Raise `Abort(403, "why")` in a hook to refuse the request; the status is 400 to 599."""

    def __init__(self, status: int, why: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(why)
        self.status = status
        self.why = why
        self.headers = dict(headers or {})


class Clock:
    """A hook's time limit, in seconds; it stands still while the hook waits for the model."""

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
    def paused(self) -> Iterator[None]:
        """Stop the clock inside the block; blocks may overlap."""
        self._left, self._waiting = self.left(), self._waiting + 1
        try:
            yield
        finally:
            self._waiting -= 1
            self._since = time.monotonic()


@dataclass(frozen=True, slots=True)
class Stream:
    """True if the client gets a stream; `stream(messages)` asks, and yields text in pieces."""

    context: Context

    def __bool__(self) -> bool:
        return self.context.streams

    async def __call__(
        self, messages: list[Message], model: str | None = None, **options: Any
    ) -> AsyncIterator[str]:
        body = self.context._body(messages, model, options)
        pieces = self.context.listen(body | {"stream": True})
        while True:
            with self.context.clock.paused():
                piece = await anext(pieces, None)
            if piece is None:
                return
            yield piece


# A change of one of these makes Ollama load the model anew (api.Runner and the llama server's
# options in its sources), so what an agent asks the request's model has the request's own values.
RUNNER_OPTIONS = "num_ctx num_batch num_gpu main_gpu use_mmap num_thread draft_num_predict".split()
RUNNER_FIELDS = ("keep_alive", "shift")
FIELDS = ("think", "format", "tools", "truncate", "logprobs", "top_logprobs")  # not the model's


@dataclass(slots=True, kw_only=True)
class Context:
    """One request, as one agent sees it: values, and copies of what others can change."""

    request_id: str
    model: str
    dialect: str  # "ollama", "openai", "anthropic" or "responses"
    streams: bool  # the client gets a stream
    asked: bool  # by the client itself; else the agent is always on, or stands in a preset
    continuation: bool  # the turn goes on after a tool's result: nothing new was asked
    user: str  # a name for each access key; "" where no key is needed
    prompt: str  # what the user typed, without commands
    explaining: bool  # under /explain: have no side effects
    agents: tuple[str, ...] = ()  # the names of those that take part, in their order
    finish: str = ""  # in on_response and on_end: stop, length, tool_calls; "": nobody knows
    state: dict[str, Any]  # shared by the agents of this request
    log: logging.LoggerAdapter[logging.Logger]
    runner: Payload = field(default_factory=dict, repr=False)  # of RUNNER_FIELDS and "options"
    ask: Callable[[str, Payload], Awaitable[Any]] = field(repr=False)  # path, body -> JSON
    listen: Callable[[Payload], AsyncIterator[str]] = field(repr=False)  # body -> pieces of text
    clock: Clock = field(default_factory=lambda: Clock(0), repr=False)

    async def chat(self, messages: list[Message], model: str | None = None, **options: Any) -> str:
        """Ask the model, without this request's agents but through its guards; return the text.

        `messages` are Ollama's ({"role", "content", "images"?}). `think` and `format` are fields of
        the request, other options are the model's (`temperature=0`). Raises UpstreamError, also
        when the answer was cut off at the context's end, unless `num_predict` limited it. Not for
        `on_chunk`: there the model is busy with the answer itself.
        """
        if "tools" in options:
            raise TypeError("context.chat returns text only; context.message takes tools")
        return str((await self.message(messages, model, **options)).get("content") or "")

    async def message(
        self, messages: list[Message], model: str | None = None, **options: Any
    ) -> Message:
        """Ask as `chat` does; return the message: "content", "tool_calls"?, "thinking"?."""
        body = self._body(messages, model, options)
        with self.clock.paused():
            answer = await self.ask("/api/chat", body | {"stream": False})
        if answer.get("done_reason") == "length" and "num_predict" not in body["options"]:
            raise UpstreamError("the model's context was full before its answer was complete")
        return dict(answer["message"])

    @property
    def stream(self) -> Stream:
        """As a value: the client gets a stream. Called as `chat` is: yields text in pieces."""
        return Stream(self)

    async def embed(self, texts: list[str], model: str | None = None) -> list[list[float]]:
        """Return one vector for each text. Raises UpstreamError."""
        body = self._same_runner(model) | {"input": texts}
        with self.clock.paused():
            return list((await self.ask("/api/embed", body))["embeddings"])

    def _body(self, messages: list[Message], model: str | None, options: Payload) -> Payload:
        """Return the request that asks a model; options that are no field of it are the model's."""
        fields = {key: options.pop(key) for key in FIELDS if key in options}
        body = self._same_runner(model) | {"messages": messages, "think": False} | fields
        return body | {"options": body.get("options", {}) | options}

    def _same_runner(self, model: str | None) -> Payload:
        own = self.runner if model in (None, self.model) else {}
        return {**own, "model": model or self.model}


# Helpers for payloads

TEXT = ("text", "input_text", "output_text")  # a part's types; the last two in an unusual role
REMINDER = re.compile(r"(?s)\s*(?:<system-reminder>.*</system-reminder>\s*)+")  # Claude Code's own


def text_parts(message: Message) -> list[Message]:
    """Return the parts of a message that hold text; a plain text is one part of its own."""
    content = message.get("content")
    if not isinstance(content, list):
        return [{"type": "text", "text": content or ""}]
    return [part for part in content if part.get("type") in TEXT and part.get("text")]


def text_of(message: Message) -> str:
    """Return all text of a message, its parts joined by blank lines."""
    return "\n\n".join(str(part["text"]) for part in text_parts(message))


def typed_part(message: Message) -> Message | None:
    """Return the last part with text that a person, and not the client, wrote."""
    parts = [part for part in text_parts(message) if not REMINDER.fullmatch(part["text"])]
    return parts[-1] if parts else None


def is_user(message: Message) -> bool:
    """Tell whether a person says something in a message: tool results are no such thing."""
    if str(message.get("role")).lower() != "user":  # Ollama lowers roles, too
        return False
    content = message.get("content")
    results = isinstance(content, list) and any(p.get("type") == "tool_result" for p in content)
    return not results or typed_part(message) is not None


def user_texts(payload: Payload) -> Iterator[str]:
    """Yield each text that stands in a message of the user; the payload may be malformed."""
    for message in payload.get("messages") or []:
        if isinstance(message, dict) and str(message.get("role")).lower() == "user":
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"text": content}]
            texts = [part.get("text") for part in parts if isinstance(part, dict)]
            yield from (text for text in texts if isinstance(text, str))


def last_user(payload: Payload) -> Message | None:
    """Return the last message of the user, wherever it stands in the conversation."""
    messages: list[Message] = payload["messages"]
    return next(filter(is_user, reversed(messages)), None)


def prompt(payload: Payload) -> str:
    """Return all text of the last user message, without its commands."""
    return text_of(last_user(payload) or {})


def set_prompt(payload: Payload, text: str) -> Payload:
    """Replace all text of the last user message; without one, add one. Images stay."""
    message = last_user(payload)
    if message is None:
        payload["messages"].append({"role": "user", "content": text})
    elif not isinstance(content := message.get("content"), list):
        message["content"] = text
    else:
        kept = typed_part(message) or {"type": "text"}
        kept["text"] = text
        parts = content if any(part is kept for part in content) else [kept, *content]
        message["content"] = [p for p in parts if p is kept or p.get("type") not in TEXT]
    return payload


def add_context(payload: Payload, text: str) -> Payload:
    """Put text before what the user typed, a blank line between."""
    return put_before(payload, f"{text}\n\n")


def put_before(payload: Payload, text: str) -> Payload:
    """Put text directly before what the user typed."""
    message = last_user(payload)
    if message is None or (part := typed_part(message)) is None:
        return set_prompt(payload, text)
    part["text"] = text + part["text"]
    if not isinstance(message.get("content"), list):
        message["content"] = part["text"]
    return payload


def add_system(payload: Payload, text: str) -> Payload:
    """Insert a system message at the front."""
    payload["messages"].insert(0, {"role": "system", "content": text})
    return payload


# Keys whose values no model reads: names that must match others, switches, and encoded bytes.
NOT_TEXT = frozenset(
    "model type id tool_call_id tool_use_id call_id item_id status stream keep_alive effort"
    " tool_choice media_type detail truncation service_tier encoding_format cache_control"
    " images image_url data file_data encrypted_content signature".split()
)
ROLES = ("system", "user", "assistant", "tool", "developer")


def map_texts(payload: Payload, change: Callable[[str], str]) -> Payload:
    """Return the payload with `change` applied to each text of it that a model may read.

    Those are messages and their parts, tool calls and results, tools with their names,
    descriptions and schemas, response formats, stop words, and every key that is not known here.
    """
    return {key: _mapped(key, value, change) for key, value in payload.items()}


def texts(payload: Payload) -> list[str]:
    """Return every text of the payload that `map_texts` would change."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    map_texts(payload, note)
    return found


def _mapped(key: str, value: Any, change: Callable[[str], str]) -> Any:
    if key in NOT_TEXT or (key == "role" and str(value).lower() in ROLES):
        return value
    if isinstance(value, str):
        return change(value) if value else value
    if isinstance(value, list):
        return [_mapped("", item, change) for item in value]
    if isinstance(value, dict):
        named = key in ("properties", "arguments", "input", "$defs", "definitions")  # free names
        return {
            change(k) if named and k else k: _mapped("" if named else k, v, change)
            for k, v in value.items()
        }
    return value
