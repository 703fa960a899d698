"""Messages: POST /v1/messages, as Anthropic's clients (Claude Code) speak it with Ollama.

The text of a streamed answer stands in `text_delta` frames of a block with an index; the frame that
stops a block does not say which type it had, so the last text frame decides. How the answer ended
comes later, in `message_delta`.
"""

from __future__ import annotations

import secrets

from kernel.agent import Message, Payload
from kernel.dialects import SSE, Chunk, Place, place_in, split_lead, table

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
        lead, rest = split_lead(payload.get("messages") or [], body.get("messages") or [])
        system = joined([message.get("content") or "" for message in lead])
        return payload | {"messages": rest, "system": system} if lead else payload

    def is_load(self, payload: Payload) -> bool:
        # An empty message is dropped before Ollama looks whether there is one (anthropic.go)
        return not any(table(m).get("content") for m in payload.get("messages") or [])

    def is_structured(self, payload: Payload) -> bool:
        form = table(payload.get("output_config")).get("format")
        return bool(form or payload.get("output_format"))

    def places(self, chunk: Chunk) -> list[Place]:
        holders = [chunk["delta"]] if chunk.get("type") == "content_block_delta" else []
        if chunk.get("type") == "message":
            holders = chunk["content"] or []
        texts = [holder for holder in holders if holder["type"] in ("text", "text_delta")]
        return [place for holder in texts for place in place_in(holder, "text")]

    def closes(self, chunk: Chunk, last: Chunk) -> bool:
        stops = chunk.get("type") == "content_block_stop"
        return stops and chunk.get("index") == last.get("index")

    def finish(self, chunk: Chunk) -> str | None:
        kind = chunk.get("type")
        if kind == "content_block_start":  # another block begins: text before it has ended
            return "tool_calls" if chunk["content_block"].get("type") == "tool_use" else None
        if kind not in ("message_delta", "message"):
            return None
        reason = str(chunk.get("delta", chunk).get("stop_reason") or "")
        return FINISHES.get(reason, reason)

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
    for content in contents:  # Ollama joins blocks with nothing
        text = [{"type": "text", "text": f"{content}\n\n"}]
        blocks += text if isinstance(content, str) else content
    return blocks
