"""Completions: POST /v1/chat/completions, as OpenAI's clients speak it with Ollama."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from kernel.agent import Payload
from kernel.dialects import SSE, Chunk, Place, dumps, place_in

USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}  # of a reply of our own


class Completions(SSE):
    """Frames are `data:` lines; the text of the first choice is the answer's."""

    name = "openai"
    path = "/v1/chat/completions"

    def encode(self, chunk: Chunk) -> bytes:
        return b"data: " + dumps(chunk) + b"\n\n"

    def is_structured(self, payload: Payload) -> bool:
        form = payload.get("response_format")
        return bool(form) and not (isinstance(form, dict) and form.get("type") == "text")

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

    def places(self, chunk: Chunk) -> list[Place]:
        return place_in(self.message(chunk), "content")

    def is_error(self, chunk: Chunk) -> bool:
        # An empty model is how Ollama hides an error in a stream (middleware/openai.go)
        return "error" in chunk or chunk.get("model") == ""

    def finish(self, chunk: Chunk) -> str | None:
        choice = self.choice(chunk)
        if reason := choice.get("finish_reason"):
            return str(reason)
        if self.message(chunk).get("tool_calls"):
            return "tool_calls"
        return None if choice else ""  # without a choice: the usage, which stands behind all text

    def piece(self, last: Chunk, text: str) -> Chunk:
        choice = {key: value for key, value in self.choice(last).items() if key != "logprobs"}
        # Without the role: the first delta said it, and clients join what deltas say.
        return last | {"choices": [choice | {"delta": {"content": text}, "finish_reason": None}]}

    def head(self, request: Payload) -> Chunk:
        now, options = datetime.now(UTC), request.get("stream_options")
        head: Chunk = {"id": f"chatcmpl-{now:%f}", "object": "chat.completion.chunk"}
        head |= {"created": int(now.timestamp()), "model": request["model"]}
        counts = isinstance(options, dict) and options.get("include_usage")
        return head | ({"usage": USAGE} if counts else {})

    def speech(self, head: Chunk, text: str) -> list[Chunk]:
        top = {key: value for key, value in head.items() if key != "usage"}
        steps = (
            ({"role": "assistant", "content": ""}, None),
            ({"content": text}, None),
            (dict[str, str](), "stop"),
        )
        choices = [{"index": 0, "delta": delta, "finish_reason": end} for delta, end in steps]
        chunks = [top | {"choices": [choice]} for choice in choices]
        return [*chunks, head | {"choices": []}] if "usage" in head else chunks

    def whole(self, head: Chunk, text: str) -> Chunk:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return head | {"object": "chat.completion", "choices": [choice], "usage": USAGE}

    def done(self) -> bytes:
        return b"data: [DONE]\n\n"
