"""Dialects: the wire forms of a chat. This file has what they share, and Ollama's own dialect.

A frame is a chunk as it stands on the wire: a line of NDJSON, an event of SSE, or a whole answer
that is one JSON object. Frames are split on bytes, never on decoded text; an edited frame is the
upstream's own with a few values changed, its keys in their order.

A dialect reads a request into the payload that agents see and writes it back; it says where the
text of an answer stands and where it ends; and it words a reply that no model gave. It keeps no
state: what one answer needs to remember is its `AnswerState`, which the editor holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from kernel.agent import Message, Payload, Tool
from kernel.dialects.calls import AnswerState as AnswerState
from kernel.dialects.calls import Chunk as Chunk
from kernel.dialects.calls import Made, ToolCall, add, contents_of, function_of
from kernel.dialects.strict import dumps as dumps
from kernel.dialects.strict import loads as loads
from kernel.dialects.strict import loads_once as loads_once

Place = tuple[dict[str, Any], str]  # an object of a chunk, and the key under which text stands

JSON = b"application/json"
JSON_UTF8 = b"application/json; charset=utf-8"
LAST = frozenset(  # keys that only some frames have
    "logprobs done_reason total_duration load_duration prompt_eval_count prompt_eval_duration"
    " eval_count eval_duration usage".split()
)
SPOKEN = ("content", "thinking", "reasoning")  # keys of a message that hold what was said
KEYS = frozenset(  # that Ollama's decoder takes for its own in any case
    "model messages stream format keep_alive tools options think logprobs top_logprobs shift"
    " truncate response_format stream_options role content images tool_calls tool_name tool_call_id"
    " thinking type text input instructions system max_tokens max_output_tokens tool_choice"
    " reasoning reasoning_effort output_config".split()
)


class Dialect:
    """The form of a chat; this one is Ollama's own, POST /api/chat."""

    name = "ollama"
    path = "/api/chat"
    stream_type = b"application/x-ndjson"
    whole_type = JSON_UTF8
    streams_unasked = True  # what a request without `stream` gets
    takes_parts = False  # a message's content may be a list
    echoes = False  # an answer repeats what the client sent, which agents may have changed
    end = re.compile(rb"\n")  # of a frame
    bare = re.compile(rb"\s*")  # a frame that holds no JSON

    # Frames

    def span(self, frame: bytes) -> tuple[int, int]:
        """Return where in a frame its JSON stands."""
        return 0, len(frame.rstrip())

    def parse(self, frame: bytes) -> Chunk | None:
        """Return a frame's JSON object, or None for a frame that has none."""
        start, end = self.span(frame)
        try:
            chunk = loads(frame[start:end])
        except (ValueError, RecursionError):
            return None
        return chunk if isinstance(chunk, dict) else None

    def edit(self, frame: bytes, chunk: Chunk) -> bytes:
        """Return a frame with `chunk` in the place of its JSON."""
        start, end = self.span(frame)
        return frame[:start] + dumps(chunk) + frame[end:]

    def swap(self, frame: bytes, old: str, new: str) -> bytes | None:
        """Return a frame with `new` in the place of a text; None unless that is plain to see.

        It saves a fifth of what an edited frame costs.
        """
        text = dumps(old)
        plain = b"\\" not in frame and frame.count(text) == 1
        return frame.replace(text, dumps(new)) if plain else None

    def encode(self, chunk: Chunk) -> bytes:
        """Return a new frame of a stream."""
        return dumps(chunk) + b"\n"

    def encode_error(self, error: Chunk) -> bytes:
        """Return the frame of an error in a stream."""
        return self.encode(error)

    # The request

    def read(self, body: Payload) -> Payload:
        """Return the payload of a request that `check` has not seen yet."""
        return body

    def write(self, payload: Payload, body: Payload) -> Payload:
        """Return the request that says what the payload says; `body` is how the client said it.

        `write(read(body), body) == body`. Raises ValueError for what the dialect cannot say.
        """
        self.check(payload)
        return payload

    def check(self, payload: Payload) -> None:
        """Raise ValueError for a payload that Ollama would read differently than we do."""
        if misspelt(payload) or not isinstance(payload.get("options") or {}, dict):
            raise ValueError("a key must be in lower case, and options an object")
        for message in payload.get("messages") or []:
            check_message(message, parts=self.takes_parts)

    def missing(self, body: Payload, think: bool | str | None, keep_alive: Any) -> Payload:
        """Return the fields that say how to think and how long to stay loaded.

        A request that says it itself gets none, nor one that cannot say it; None says nothing.
        """
        fields = {"keep_alive": keep_alive} | ({} if self.is_load(body) else {"think": think})
        return {k: v for k, v in fields.items() if v is not None and body.get(k) is None}

    def is_load(self, payload: Payload) -> bool:
        """Tell whether a request only loads or unloads a model."""
        return not payload.get("messages")

    def is_structured(self, payload: Payload) -> bool:
        """Tell whether a request asks for an answer that must stay valid JSON."""
        return bool(payload.get("format"))

    def wants_stream(self, payload: Payload) -> bool:
        stream = payload.get("stream")
        return self.streams_unasked if stream is None else bool(stream)

    # The answer

    def message(self, chunk: Chunk) -> Message:
        return table(chunk.get("message"))

    def places(self, chunk: Chunk) -> list[Place]:
        """Return where new text stands in a frame, or in a whole answer."""
        return place_in(self.message(chunk), "content")

    def is_error(self, chunk: Chunk) -> bool:
        return "error" in chunk

    def closes(self, chunk: Chunk, last: Chunk) -> bool:
        """Tell whether a frame closes the text of `last` and a later one says how it finished."""
        return False

    def finish(self, chunk: Chunk) -> str | None:
        """Return how the answer finished (stop, length, ...) in a frame that ends text, or None.

        A frame that begins a call ends text, too: then it is "tool_calls".
        """
        if chunk.get("done") is True:
            return str(chunk.get("done_reason") or "")
        return "tool_calls" if self.message(chunk).get("tool_calls") else None

    def piece(self, last: Chunk, text: str) -> Chunk:
        """Return a new frame that says `text` and nothing else, made of another frame."""
        kept = {key: value for key, value in last.items() if key not in LAST}
        return kept | {"message": {"role": "assistant", "content": text}, "done": False}

    def alone(self, end: Chunk, text: str) -> list[Chunk]:
        """Return new frames that say `text` where no text is open, before the frame `end`."""
        return [self.piece(end, text)]

    def settle(self, chunk: Chunk, state: AnswerState) -> bool | None:
        """Make a frame agree with those that were sent before it; tell whether it changed.

        None: it is not sent, since the answer has begun in an earlier round.
        """
        return False

    # Tools: `ToolCall` and `Result` are the same in every dialect

    def offer(self, tools: Sequence[Tool]) -> list[Chunk]:
        """Return tools in the form in which a request has them."""
        return [{"type": "function", "function": function_of(tool, "parameters")} for tool in tools]

    def take(self, chunk: Chunk, calls: dict[Any, ToolCall]) -> Chunk | None:
        """Move the calls in a frame, or the piece of one, to `calls`.

        Return what is left of the frame, {} if that is nothing, and None if it has no call.
        """
        message = self.message(chunk)
        entries = message.pop("tool_calls", None)
        if not entries:
            return None
        for entry in entries:
            function, key = entry["function"], entry.get("index", len(calls))
            text = function.get("arguments") or ""
            text = text if isinstance(text, str) else dumps(text).decode()
            if key in calls:
                calls[key].arguments += text
            else:
                calls[key] = ToolCall(function["name"], text, entry.get("id", ""), entry)
        left = any(message.get(key) for key in SPOKEN) or self.ends(chunk)
        return chunk if left else {}

    def thoughts(self, chunk: Chunk) -> str:
        """Return the thinking in a frame."""
        message = self.message(chunk)
        return message.get("thinking") or message.get("reasoning") or ""

    def ends(self, chunk: Chunk) -> bool:
        """Tell whether a frame that holds no calls (`take`) belongs to the end of an answer."""
        return self.finish(chunk) is not None

    def merge(self, earlier: Chunk, chunk: Chunk) -> None:
        """Add to the end of a round, or to a whole answer, what an earlier one has."""
        old, new = self.message(earlier), self.message(chunk)
        for key in SPOKEN:
            if old.get(key):
                new[key] = old[key] + (new.get(key) or "")
        add(self.counts(earlier), self.counts(chunk))

    def counts(self, chunk: Chunk) -> dict[str, Any]:
        """Return the object that has Ollama's counters."""
        return chunk

    def stop(self, chunk: Chunk) -> None:
        """Let the end of an answer say that it stopped, where it said that it calls a tool."""

    def entry(self, call: ToolCall, number: int) -> Chunk:
        """Return a call as an answer has it; `number` counts the calls of the answer."""
        function = call.entry.get("function", {}) | {"name": call.name, "arguments": call.values()}
        if "index" in function:
            function["index"] = number
        return call.entry | {"id": call.id, "function": function}

    def entries(self, calls: Sequence[ToolCall]) -> list[Chunk]:
        return [self.entry(call, number) for number, call in enumerate(calls)]

    def call(self, last: Chunk, calls: Sequence[ToolCall]) -> list[Chunk]:
        """Return the frames of a stream that say calls, made of another frame."""
        chunks = [self.piece(last, "") for _ in calls]
        for chunk, entry in zip(chunks, self.entries(calls), strict=True):
            self.message(chunk)["tool_calls"] = [entry]
        return chunks

    def put(self, chunk: Chunk, calls: Sequence[ToolCall]) -> None:
        """Add calls to a whole answer."""
        self.message(chunk)["tool_calls"] = self.entries(calls)

    def spoken(self, text: str, thinking: str, calls: Sequence[ToolCall]) -> list[Message]:
        """Return what the model said in a round as messages of the payload."""
        said = {"content": text} | ({"thinking": thinking} if thinking else {})
        return [{"role": "assistant", **said, "tool_calls": self.entries(calls)}]

    def results(self, results: Sequence[Made]) -> list[Message]:
        """Return the results of calls as messages of the payload."""
        return [self.result(call, *contents_of(result)) for call, result in results]

    def result(self, call: ToolCall, text: str, images: list[Message]) -> Message:
        """Return one of `results`; the images are MCP's."""
        message: Message = {"role": "tool", "content": text, "tool_name": call.name}
        message |= {"images": [image["data"] for image in images]} if images else {}
        return message | {"tool_call_id": call.id}

    # A reply that no model gave

    def head(self, request: Payload) -> Chunk:
        """Return what all frames of a reply have in common."""
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        return {"model": request["model"], "created_at": now}

    def speech(self, head: Chunk, text: str) -> list[Chunk]:
        """Return the frames of a streamed reply that says `text` in one of them."""
        return [self.piece(head, text), self.whole(head, "")]

    def whole(self, head: Chunk, text: str) -> Chunk:
        message = {"role": "assistant", "content": text}
        return head | {"message": message, "done": True, "done_reason": "stop"}

    def encode_whole(self, chunk: Chunk) -> bytes:
        return dumps(chunk)

    def done(self) -> bytes:
        """Return the bytes that stand behind the last frame of a reply."""
        return b""


class SSE(Dialect):
    """What the dialects under /v1 have in common: their frames are server-sent events."""

    stream_type = b"text/event-stream"
    whole_type = JSON
    streams_unasked = False
    takes_parts = True
    effort = "reasoning"  # the object in which a request says how much to think
    end = re.compile(rb"\r?\n\r?\n")
    data = re.compile(rb"(?m)^data:[ ]?(.*?)\r?$")
    bare = re.compile(rb"(?:(?::|event:|id:|retry:)[^\n]*+|\s)*+(?:data:[ ]?\[DONE\]\s*)?")
    begins: tuple[str, ...] = ()  # types of the frames with which an answer begins
    index = "index"  # the key under which a frame has the number of its block

    def span(self, frame: bytes) -> tuple[int, int]:
        line = self.data.search(frame)  # a whole answer has no such line, an event has one
        return line.span(1) if line else super().span(frame)

    def encode(self, chunk: Chunk) -> bytes:
        return b"event: %s\ndata: %s\n\n" % (chunk["type"].encode(), dumps(chunk))

    def encode_whole(self, chunk: Chunk) -> bytes:
        return dumps(chunk) + b"\n"

    def missing(self, body: Payload, think: bool | str | None, keep_alive: Any) -> Payload:
        # A model that can think does so unasked: true needs no word
        holder = table(body.get(self.effort))
        is_said = holder.get("effort") or body.get("reasoning_effort") or body.get("thinking")
        if is_said or think in (None, True):
            return {}
        return {self.effort: holder | {"effort": think or "none"}}

    def settle(self, chunk: Chunk, state: AnswerState) -> bool | None:
        if state.round and chunk.get("type") in self.begins:
            state.places = {}
            return None
        at = chunk.get(self.index)
        if at is not None:
            chunk[self.index] = state.place(at)
        return at != chunk.get(self.index)

    def counts(self, chunk: Chunk) -> Chunk:
        return table(chunk.get("response", chunk).get("usage"))


def place_in(holder: dict[str, Any], key: str) -> list[Place]:
    """Return the place in an object if text that is not empty stands under the key."""
    return [(holder, key)] if isinstance(holder.get(key), str) and holder[key] else []


def table(value: Any) -> dict[str, Any]:
    """Return an object as it is, and anything else as an empty one."""
    return value if isinstance(value, dict) else {}


def check_message(message: Any, *, parts: bool) -> None:
    """Raise ValueError unless Ollama would read a message as we do; `parts`: it takes lists."""
    if not isinstance(message, dict) or misspelt(message):
        raise ValueError("a message must be an object with keys in lower case")
    content = message.get("content")
    if not isinstance(content, str | list | None if parts else str | None):
        kinds = "text or a list of parts" if parts else "text in this dialect"
        raise ValueError(f"a message's content must be {kinds}, not {type(content).__name__}")
    for part in content if isinstance(content, list) else ():
        readable = isinstance(part, dict) and isinstance(part.get("text"), str | None)
        if not readable or misspelt(part):
            raise ValueError("a part of a message must be an object, and its text a string")


def misspelt(table: Payload) -> bool:
    """Tell whether a known key stands there in another case, which Go would take for it."""
    strange = table.keys() - KEYS
    return bool(strange) and any(key.casefold() in KEYS for key in strange)


def split_lead(messages: list[Message], body: Sequence[Any]) -> tuple[list[Message], list[Message]]:
    """Split off the system messages at the front that do not stand in the body's own list."""
    count = max(0, leading(messages) - leading(body))
    return messages[:count], messages[count:]


def leading(messages: Sequence[Any]) -> int:
    """Count the system messages at the front."""
    roles = [table(message).get("role") for message in messages]
    return next((n for n, role in enumerate(roles) if role != "system"), len(roles))


def words(text: str) -> list[str]:
    """Cut a text into the pieces in which a model would have said it."""
    return re.findall(r"\s*\S+|\s+", text) or [""]


OPENAI_ERRORS = {400: "invalid_request_error", 404: "not_found_error"}
ANTHROPIC_ERRORS = OPENAI_ERRORS | {401: "authentication_error", 403: "permission_error"}
ANTHROPIC_ERRORS |= {429: "rate_limit_error", 503: "overloaded_error", 529: "overloaded_error"}


def error_object(path: str, status: int, message: str) -> dict[str, Any]:
    """Return an error in the dialect of a path, as Ollama words it."""
    if path.startswith("/v1/messages"):
        kind = ANTHROPIC_ERRORS.get(status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    if path.startswith("/v1/"):
        kind = OPENAI_ERRORS.get(status, "api_error")
        return {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return {"error": message}


def error(path: str, status: int, message: str) -> tuple[bytes, bytes]:
    """Return content type and body of an error in the dialect of a path."""
    body = dumps(error_object(path, status, message))
    return (JSON, body + b"\n") if path.startswith("/v1/") else (JSON_UTF8, body)
