"""Completions: POST /v1/chat/completions, as OpenAI's clients speak it with Ollama."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from kernel.agent import Message, Payload
from kernel.dialects import LAST, SSE, AnswerState, Chunk, dumps, table
from kernel.dialects.calls import ToolCall, data_url, joint

USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}  # of a reply of our own


class Completions(SSE):
    """Frames are `data:` lines; the text of the first choice is the answer's."""

    name = "openai"
    path = "/v1/chat/completions"

    def encode(self, chunk: Chunk) -> bytes:
        return b"data: " + dumps(chunk) + b"\n\n"

    def is_structured(self, payload: Payload) -> bool:
        form = payload.get("response_format")
        return bool(form) and table(form).get("type") != "text"

    def choice(self, chunk: Chunk) -> Chunk:
        """Return the first choice, or an empty one."""
        choices: list[Chunk] = chunk.get("choices") or []
        return next((choice for choice in choices if choice.get("index", 0) == 0), {})

    def message(self, chunk: Chunk) -> Message:
        choice = self.choice(chunk)
        return table(choice.get("delta") or choice.get("message"))

    def is_error(self, chunk: Chunk) -> bool:
        # An empty model is how Ollama hides an error in a stream (middleware/openai.go)
        return "error" in chunk or chunk.get("model") == ""

    def finish(self, chunk: Chunk) -> str | None:
        choice = self.choice(chunk)
        if not choice:
            return ""  # the usage, which stands behind all text
        reason: str | None = choice.get("finish_reason")
        return reason or super().finish(chunk)

    def piece(self, last: Chunk, text: str) -> Chunk:
        kept = {key: value for key, value in last.items() if key not in LAST}
        choice = {key: value for key, value in self.choice(last).items() if key not in LAST}
        # Without the role: the first delta said it, and clients join what deltas say.
        new = {"index": 0, **choice, "delta": {"content": text}, "finish_reason": None}
        return kept | {"choices": [new]}

    def settle(self, chunk: Chunk, state: AnswerState) -> bool | None:
        if state.frames and not state.round:  # most frames
            return False
        changed = state.continues(chunk, ("id", "created"))
        delta = self.choice(chunk).get("delta")
        ours = state.round or state.last is None  # else the first text that Ollama sent
        if delta and ours and not state.frames:  # the first one alone says the role
            changed = changed or "role" not in delta
            delta.setdefault("role", "assistant")
        elif delta and changed:
            delta.pop("role", None)
        state.frames += bool(delta)
        return changed

    # Tools

    def stop(self, chunk: Chunk) -> None:
        if choice := self.choice(chunk):
            choice["finish_reason"] = "stop"

    def entry(self, call: ToolCall, number: int) -> Chunk:
        function = {"name": call.name, "arguments": call.arguments or "{}"}
        mine = {"id": call.id, "index": number, "type": "function", "function": function}
        return call.entry | mine

    def spoken(self, text: str, thinking: str, calls: Sequence[ToolCall]) -> list[Message]:
        [message] = super().spoken(text, "", calls)
        # Older versions of Ollama overlook calls beside a text, even an empty one (openai.go)
        thought = {"reasoning": thinking} if thinking else {}
        return [message | {"content": text or None} | thought]

    def result(self, call: ToolCall, text: str, images: list[Message]) -> Message:
        urls = ({"type": "image_url", "image_url": {"url": data_url(image)}} for image in images)
        return {"role": "tool", "tool_call_id": call.id, "content": joint("text", text, urls)}

    def head(self, request: Payload) -> Chunk:
        now = datetime.now(UTC)
        head: Chunk = {"id": f"chatcmpl-{now:%f}", "object": "chat.completion.chunk"}
        head |= {"created": int(now.timestamp()), "model": request["model"]}
        counts = table(request.get("stream_options")).get("include_usage")
        return head | ({"usage": USAGE} if counts else {})

    def speech(self, head: Chunk, text: str) -> list[Chunk]:
        top = {key: value for key, value in head.items() if key != "usage"}
        begun = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        ended = {"index": 0, "delta": {}, "finish_reason": "stop"}
        first = top | {"choices": [begun]}
        chunks = [first, self.piece(first, text), top | {"choices": [ended]}]
        return [*chunks, head | {"choices": []}] if "usage" in head else chunks

    def whole(self, head: Chunk, text: str) -> Chunk:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return head | {"object": "chat.completion", "choices": [choice], "usage": {**USAGE}}

    def done(self) -> bytes:
        return b"data: [DONE]\n\n"
