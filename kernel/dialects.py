"""Dialects: the wire forms of a chat, and what an error looks like.

A frame is a chunk as it stands on the wire: a line of NDJSON (Ollama), an event of SSE (OpenAI),
or a whole answer that is one JSON object. Frames are split on bytes, never on decoded text; an
edited frame is the upstream's own with one string changed, its keys in their order. Anthropic and
OpenAI's Responses are spoken only as far as errors go.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any, NoReturn

Chunk = dict[str, Any]  # a frame's JSON object

JSON = b"application/json"
JSON_UTF8 = b"application/json; charset=utf-8"

# What clients take for the end of a line inside of a string (httpx does), and what UTF-8 cannot say
UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def dumps(value: Any) -> bytes:
    """Encode JSON on one line, readable, and safe for clients that split on more than a newline.

    Raises ValueError for NaN and infinity, TypeError for what is no JSON.
    """
    text = ENCODER.encode(value)
    if not text.isascii() or "\x7f" in text:
        text = UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return text.encode()


def loads(data: bytes) -> Any:
    """Decode strict JSON: UTF-8 without BOM, no NaN, no infinity. Raises ValueError and
    RecursionError."""
    return DECODER.decode(data.decode())


def reject(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def finite(text: str) -> float:
    number = float(text)
    return reject(text) if number in (float("inf"), float("-inf")) else number


# Made once: json.dumps and json.loads make one for each call that wants something special.
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
DECODER = json.JSONDecoder(parse_constant=reject, parse_float=finite)


def words(text: str) -> list[str]:
    """Cut a text into the pieces in which a model would have said it."""
    return re.findall(r"\s*\S+|\s+", text) or [""]


class Dialect:
    """The form of a chat; this one is Ollama's own, POST /api/chat. It keeps no state."""

    name = "ollama"
    stream_type = b"application/x-ndjson"  # the content type of a stream
    streams_unasked = True  # what a request without `stream` gets
    end = re.compile(rb"\n")  # of a frame
    # A piece of text as Ollama writes it, and nothing else: what stands before, in and behind it
    piece = re.compile(
        rb'(\{"model":"[ !#-\[\]-~]+","created_at":"[ !#-\[\]-~]*",'
        rb'"message":\{"role":"assistant","content":")([^"\\\x00-\x1f]+)("\},"done":false\}\n)'
    )

    def split(self, frame: bytes) -> tuple[bytes, str, bytes] | None:
        """Return text, and the frame before and behind it, of a frame that need not be parsed."""
        found = self.piece.fullmatch(frame)
        try:
            return (found[1], found[2].decode(), found[3]) if found else None
        except UnicodeDecodeError:
            return None

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

    def encode(self, chunk: Chunk) -> bytes:
        """Return a new frame of a stream."""
        return dumps(chunk) + b"\n"

    def message(self, chunk: Chunk) -> dict[str, Any]:
        """Return the object whose `content` is the text of a chunk; empty if there is none."""
        message = chunk.get("message")
        return message if isinstance(message, dict) else {}

    def text(self, chunk: Chunk) -> str:
        content = self.message(chunk).get("content")
        return content if isinstance(content, str) else ""

    def is_error(self, chunk: Chunk) -> bool:
        return "error" in chunk

    def ends_text(self, chunk: Chunk) -> bool:
        """Tell whether what is added to the text belongs before this chunk."""
        return chunk.get("done") is True or bool(self.message(chunk).get("tool_calls"))

    def with_text(self, chunk: Chunk, text: str) -> Chunk:
        """Return a copy of a text chunk that says `text` and nothing else."""
        kept = {key: value for key, value in chunk.items() if key != "logprobs"}
        role = self.message(chunk).get("role", "assistant")
        return kept | {"message": {"role": role, "content": text}, "done": False}

    def is_structured(self, payload: dict[str, Any]) -> bool:
        """Tell whether a request asks for an answer that must stay valid JSON."""
        return bool(payload.get("format"))

    def wants_stream(self, payload: dict[str, Any]) -> bool:
        stream = payload.get("stream")
        return self.streams_unasked if stream is None else bool(stream)

    def answer(self, payload: dict[str, Any], text: str) -> tuple[bytes, list[bytes]]:
        """Return content type and frames of an answer that no model gave."""
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        message = {"role": "assistant", "content": text}
        chunk = {"model": payload["model"], "created_at": now, "message": message}
        last = {"done": True, "done_reason": "stop"}
        if not self.wants_stream(payload):
            return JSON_UTF8, [dumps(chunk | last)]
        said = [message | {"content": word} for word in words(text)]
        chunks = [chunk | {"message": piece, "done": False} for piece in said]
        chunks.append(chunk | {"message": message | {"content": ""}} | last)
        return self.stream_type, [*map(self.encode, chunks)]


class OpenAI(Dialect):
    """POST /v1/chat/completions."""

    name = "openai"
    stream_type = b"text/event-stream"
    streams_unasked = False
    end = re.compile(rb"\r?\n\r?\n")
    piece = re.compile(
        rb'(data: \{"id":"[ !#-\[\]-~]*","object":"chat.completion.chunk",(?:"created":\d+,)?'
        rb'"model":"[ !#-\[\]-~]+",(?:"system_fingerprint":"\w*",)?"choices":\[\{"index":0,'
        rb'"delta":\{(?:"role":"assistant",)?"content":")([^"\\\x00-\x1f]+)'
        rb'("\},"finish_reason":null\}\]\}\n\n)'
    )
    data = re.compile(rb"(?m)^data:[ ]?(.*?)\r?$")

    def span(self, frame: bytes) -> tuple[int, int]:
        lines = list(self.data.finditer(frame))
        # A whole answer has no such line; an event of several lines Ollama never sends.
        return lines[0].span(1) if len(lines) == 1 else super().span(frame)

    def encode(self, chunk: Chunk) -> bytes:
        return b"data: " + dumps(chunk) + b"\n\n"

    def choice(self, chunk: Chunk) -> dict[str, Any]:
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else []:
            if isinstance(choice, dict) and choice.get("index", 0) == 0:
                return choice
        return {}

    def message(self, chunk: Chunk) -> dict[str, Any]:
        choice = self.choice(chunk)
        message = choice.get("delta", choice.get("message"))
        return message if isinstance(message, dict) else {}

    def is_error(self, chunk: Chunk) -> bool:
        # An empty model is how Ollama hides an error in a stream (middleware/openai.go)
        return "error" in chunk or chunk.get("model") == ""

    def ends_text(self, chunk: Chunk) -> bool:
        choice = self.choice(chunk)  # none: the usage, which stands behind all text
        calls = self.message(chunk).get("tool_calls")
        return not choice or bool(choice.get("finish_reason") or calls)

    def with_text(self, chunk: Chunk, text: str) -> Chunk:
        choice = {key: value for key, value in self.choice(chunk).items() if key != "logprobs"}
        # Without the role: the first delta said it, and clients join what deltas say.
        return chunk | {"choices": [choice | {"delta": {"content": text}, "finish_reason": None}]}

    def is_structured(self, payload: dict[str, Any]) -> bool:
        form = payload.get("response_format")
        return bool(form) and not (isinstance(form, dict) and form.get("type") == "text")

    def answer(self, payload: dict[str, Any], text: str) -> tuple[bytes, list[bytes]]:
        now = datetime.now(UTC)
        top: Chunk = {"id": f"chatcmpl-{now:%f}", "object": "chat.completion"}
        top |= {"created": int(now.timestamp()), "model": payload["model"]}
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        if not self.wants_stream(payload):
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return JSON, [dumps(top | {"choices": [choice], "usage": usage}) + b"\n"]
        top["object"] = "chat.completion.chunk"
        deltas = [{"content": word} for word in words(text)]
        deltas[0] = {"role": "assistant"} | deltas[0]
        said = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
        last = {"index": 0, "delta": {}, "finish_reason": "stop"}
        chunks = [top | {"choices": [choice]} for choice in [*said, last]]
        options = payload.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            chunks.append(top | {"choices": [], "usage": usage})
        return self.stream_type, [*map(self.encode, chunks), b"data: [DONE]\n\n"]


OLLAMA = Dialect()
OPENAI = OpenAI()


class FrameSplitter:
    """Cuts a stream into frames, however its bytes are split."""

    OVERLAP = 3  # how much of an end (\r\n\r\n at most) may already have come

    def __init__(self, end: re.Pattern[bytes]) -> None:
        self._end = end
        self._buffer = bytearray()
        self._searched = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Return the frames that `data` completes, each with its end."""
        self._buffer += data
        cut, frames = 0, []
        for found in self._end.finditer(self._buffer, self._searched):
            frames.append(bytes(self._buffer[cut : found.end()]))
            cut = found.end()
        del self._buffer[:cut]
        self._searched = max(0, len(self._buffer) - self.OVERLAP)
        return frames

    def rest(self) -> bytes:
        """Return what came behind the last end."""
        return bytes(self._buffer)


OPENAI_ERRORS = {400: "invalid_request_error", 404: "not_found_error"}
ANTHROPIC_ERRORS = OPENAI_ERRORS | {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


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
