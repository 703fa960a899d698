"""Messages: POST /v1/messages, as Anthropic's clients (Claude Code) speak it with Ollama.

The text of a streamed answer stands in `text_delta` frames of a block with an index; the frame that
stops a block does not say which type it had, so the last text frame decides. How the answer ended
comes later, in `message_delta`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from kernel.agent import Message, Payload, Tool
from kernel.dialects import SSE, Chunk, Place, dumps, place_in, split_lead, table
from kernel.dialects.calls import Made, ToolCall, function_of, joint

FINISHES = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}
FINISHES |= {"tool_use": "tool_calls"}
USAGE = {"input_tokens": 0, "output_tokens": 0}  # of a reply of our own


class Messages(SSE):
    """`system` is the payload's first message, and goes back as it came."""

    name = "anthropic"
    path = "/v1/messages"
    effort = "output_config"
    begins = ("message_start",)

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

    def missing(self, body: Payload, think: bool | str | None, keep_alive: Any) -> Payload:
        fields = super().missing(body, think, keep_alive)
        return {"thinking": {"type": "disabled"}} if fields and think is False else fields

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
        if kind not in ("message_delta", "message_stop", "message"):
            return None
        reason = str(chunk.get("delta", chunk).get("stop_reason") or "")
        return FINISHES.get(reason, reason)

    def piece(self, last: Chunk, text: str) -> Chunk:
        return last | {"delta": {"type": "text_delta", "text": text}}

    def alone(self, end: Chunk, text: str) -> list[Chunk]:
        return text_block(secrets.token_hex(4), text)

    # Tools

    def offer(self, tools: Sequence[Tool]) -> list[Chunk]:
        return [function_of(tool, "input_schema") for tool in tools]

    def take(self, chunk: Chunk, calls: dict[Any, ToolCall]) -> Chunk | None:
        kind, at = chunk.get("type"), chunk.get("index")
        if kind == "message":
            blocks = chunk["content"] or []
            uses = [block for block in blocks if block["type"] == "tool_use"]
            for block in uses:
                arguments = dumps(block["input"]).decode()
                calls[block["id"]] = ToolCall(block["name"], arguments, block["id"], block)
            chunk["content"] = [block for block in blocks if block["type"] != "tool_use"]
            return chunk if uses else None
        block = chunk.get("content_block") or {}
        if block.get("type") == "tool_use":
            calls[at] = ToolCall(block["name"], "", block["id"], block)
        elif at is None or at not in calls:
            return None
        calls[at].arguments += chunk.get("delta", {}).get("partial_json", "")
        return {}

    def thoughts(self, chunk: Chunk) -> str:
        holders = [chunk.get("delta") or {}, *(chunk.get("content") or [])]
        return "".join(holder.get("thinking", "") for holder in holders)

    def merge(self, earlier: Chunk, chunk: Chunk) -> None:
        super().merge(earlier, chunk)
        if earlier.get("content"):
            chunk["content"] = earlier["content"] + (chunk["content"] or [])

    def stop(self, chunk: Chunk) -> None:
        holder = chunk.get("delta", chunk)
        if "stop_reason" in holder:
            holder["stop_reason"] = "end_turn"

    def entry(self, call: ToolCall, number: int) -> Chunk:
        mine = {"type": "tool_use", "id": call.id, "name": call.name, "input": call.values()}
        return call.entry | mine

    def call(self, last: Chunk, calls: Sequence[ToolCall]) -> list[Chunk]:
        chunks: list[Chunk] = []
        for call in calls:
            delta = {"type": "input_json_delta", "partial_json": call.arguments or "{}"}
            chunks += block_of(call.id, self.entry(call, 0) | {"input": {}}, delta)
        return chunks

    def put(self, chunk: Chunk, calls: Sequence[ToolCall]) -> None:
        chunk["content"] += self.entries(calls)

    def spoken(self, text: str, thinking: str, calls: Sequence[ToolCall]) -> list[Message]:
        blocks: list[Message] = [{"type": "thinking", "thinking": thinking}] if thinking else []
        blocks += [{"type": "text", "text": text}] if text else []
        return [{"role": "assistant", "content": blocks + self.entries(calls)}]

    def results(self, results: Sequence[Made]) -> list[Message]:
        return [{"role": "user", "content": super().results(results)}]

    def result(self, call: ToolCall, text: str, images: list[Message]) -> Message:
        content = joint("text", text, map(source_of, images))
        return {"type": "tool_result", "tool_use_id": call.id, "content": content}

    def head(self, request: Payload) -> Chunk:
        head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant"}
        return head | {"model": request["model"], "content": [], "usage": USAGE}

    def speech(self, head: Chunk, text: str) -> list[Chunk]:
        return [
            {"type": "message_start", "message": head},
            *text_block(0, text),
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": USAGE},
            {"type": "message_stop"},
        ]

    def whole(self, head: Chunk, text: str) -> Chunk:
        said = {"content": [{"type": "text", "text": text}], "stop_reason": "end_turn"}
        return head | said | {"usage": {**USAGE}}


def block_of(at: int | str, block: Chunk, delta: Chunk) -> list[Chunk]:
    """Return the frames of a block; `at` is its index, or a name that `settle` makes one of."""
    return [
        {"type": "content_block_start", "index": at, "content_block": block},
        {"type": "content_block_delta", "index": at, "delta": delta},
        {"type": "content_block_stop", "index": at},
    ]


def text_block(at: int | str, text: str) -> list[Chunk]:
    return block_of(at, {"type": "text", "text": ""}, {"type": "text_delta", "text": text})


def source_of(image: Message) -> Message:
    source = {"type": "base64", "media_type": image["mimeType"], "data": image["data"]}
    return {"type": "image", "source": source}


def joined(contents: list[str | list[Message]]) -> str | list[Message]:
    """Join the contents of system messages: texts by blank lines, blocks as they are."""
    if all(isinstance(content, str) for content in contents):
        return "\n\n".join(map(str, contents))
    blocks: list[Message] = []
    for content in contents:  # Ollama joins blocks with nothing
        text = [{"type": "text", "text": f"{content}\n\n"}]
        blocks += text if isinstance(content, str) else content
    return blocks
