"""Messages: POST /v1/messages, as Anthropic's clients (Claude Code) speak it with Ollama.

The text of a streamed answer stands in `text_delta` frames of a block with an index; the frame that
stops a block does not say which type it had, so the last text frame decides. How the answer ended
comes later, in `message_delta`.
"""

from __future__ import annotations

import secrets

from kernel.agent import Message, Payload
from kernel.dialects import SSE, Chunk, Place, place_in, split_lead

FINISHES = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}
FINISHES |= {"tool_use": "tool_calls"}
USAGE = {"input_tokens": 0, "output_tokens": 0}  # of a reply of our own


class Messages(SSE):
    """`system` is the payload's first message, and goes back as it came."""

    name = "anthropic"
    path = "/v1/messages"

    def read(self, body: Payload) -> Payload:
        messages, system = body.get("messages") or [], body.get("system")
        if not messages or not system or not isinstance(system, str | list):
            return body
        payload = {key: value for key, value in body.items() if key != "system"}
        return payload | {"messages": [{"role": "system", "content": system}, *messages]}

    def write(self, payload: Payload, body: Payload) -> Payload:
        self.check(payload)
        if not payload.get("messages"):
            return payload
        lead, rest = split_lead(payload["messages"], body["messages"])
        system = {"system": joined([message.get("content") or "" for message in lead])}
        return payload | {"messages": rest} | (system if lead else {})

    def is_load(self, payload: Payload) -> bool:
        # An empty message is dropped before Ollama looks whether there is one (anthropic.go)
        return not any(message.get("content") for message in payload.get("messages") or [])

    def is_structured(self, payload: Payload) -> bool:
        config = payload.get("output_config")
        form = config.get("format") if isinstance(config, dict) else None
        return bool(form or payload.get("output_format"))

    def places(self, chunk: Chunk) -> list[Place]:
        if chunk.get("type") == "content_block_delta":
            delta = chunk.get("delta")
            is_text = isinstance(delta, dict) and delta.get("type") == "text_delta"
            return place_in(delta, "text") if is_text else []
        blocks = chunk.get("content") if chunk.get("type") == "message" else None
        texts = [block for block in blocks or [] if block.get("type") == "text"]
        return [place for block in texts for place in place_in(block, "text")]

    def is_error(self, chunk: Chunk) -> bool:
        return chunk.get("type") == "error" or "error" in chunk

    def closes(self, chunk: Chunk, last: Chunk) -> bool:
        stops = chunk.get("type") == "content_block_stop"
        return stops and chunk.get("index") == last.get("index")

    def finish(self, chunk: Chunk) -> str | None:
        kind = chunk.get("type")
        if kind in ("message_delta", "message"):
            holder = chunk["delta"] if kind == "message_delta" else chunk
            reason = str(holder.get("stop_reason") or "")
            return FINISHES.get(reason, reason)
        if kind == "content_block_start":  # another block begins: text before it has ended
            return "tool_calls" if chunk["content_block"].get("type") == "tool_use" else None
        return None

    def piece(self, last: Chunk, text: str) -> Chunk:
        return last | {"delta": {"type": "text_delta", "text": text}}

    def head(self, request: Payload) -> Chunk:
        head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant"}
        return head | {"model": request["model"], "content": [], "usage": USAGE}

    def speech(self, head: Chunk, text: str) -> list[Chunk]:
        block, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": text}
        return [
            {"type": "message_start", "message": head},
            {"type": "content_block_start", "index": 0, "content_block": block},
            {"type": "content_block_delta", "index": 0, "delta": delta},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": USAGE},
            {"type": "message_stop"},
        ]

    def whole(self, head: Chunk, text: str) -> Chunk:
        return head | {"content": [{"type": "text", "text": text}], "stop_reason": "end_turn"}


def joined(contents: list[str | list[Message]]) -> str | list[Message]:
    """Join the contents of system messages: texts by blank lines, blocks as they are."""
    if all(isinstance(content, str) for content in contents):
        return "\n\n".join(map(str, contents))
    blocks: list[Message] = []
    for n, content in enumerate(contents):
        end = "\n\n" if n < len(contents) - 1 else ""  # Ollama joins blocks with nothing
        texts = [{"type": "text", "text": content + end}] if isinstance(content, str) else content
        blocks += texts
    return blocks
