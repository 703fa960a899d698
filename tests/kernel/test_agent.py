"""The contract: helpers for payloads of every dialect, and what a context asks."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kernel.agent import Context, add_context, add_system, map_texts, prompt, set_prompt, texts
from kernel.errors import UpstreamError

IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
REMINDER = "<system-reminder>\nx\n</system-reminder>\n"
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": "rain"}


def text(content: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": content, **fields}


def chat(*messages: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


CACHED = text("q", cache_control={"type": "ephemeral"})
# Content of a message, its prompt, and the content after set_prompt "N" and after add_context "C"
CONTENTS: list[tuple[Any, str, Any, Any]] = [
    ("a", "a", "N", "C\n\na"),
    (None, "", "N", "C\n\n"),
    ([], "", [text("N")], [text("C\n\n")]),
    ([IMAGE], "", [text("N"), IMAGE], [text("C\n\n"), IMAGE]),
    ([IMAGE, text("a")], "a", [IMAGE, text("N")], [IMAGE, text("C\n\na")]),
    ([text("a"), IMAGE, text("b"), IMAGE], "a\n\nb", [IMAGE, text("N"), IMAGE],
     [text("a"), IMAGE, text("C\n\nb"), IMAGE]),
    ([text(REMINDER), CACHED], f"{REMINDER}\n\nq", [CACHED | {"text": "N"}],
     [text(REMINDER), CACHED | {"text": "C\n\nq"}]),
    ([text("q"), text(REMINDER)], f"q\n\n{REMINDER}", [text("N")],
     [text("C\n\nq"), text(REMINDER)]),
    ([text("a") | {"type": "output_text"}], "a", [text("N") | {"type": "output_text"}],
     [text("C\n\na") | {"type": "output_text"}]),
    ([RESULT, text("and?")], "and?", [RESULT, text("N")], [RESULT, text("C\n\nand?")]),
]  # fmt: skip
TAILS = [  # what may follow the last message of the user
    [],
    [("assistant", "b"), ("tool", "d"), ("system", "s")],
    [("assistant", [{"type": "tool_use", "id": "t"}]), ("user", [RESULT, text(REMINDER)])],
]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("content", "said", "after_set", "after_add"), CONTENTS)
def test_a_prompt_is_all_text_of_the_last_user_message_and_images_stay(
    content: Any, said: str, after_set: Any, after_add: Any, tail: list[tuple[str, Any]]
) -> None:
    def payload(content: Any) -> dict[str, Any]:
        own = [dict(part) for part in content] if isinstance(content, list) else content
        return chat(("user", "before"), ("assistant", "x"), ("User", own), *tail)

    given = payload(content)

    assert prompt(given) == said
    assert set_prompt(given, "N") is given and given == payload(after_set)
    assert add_context(payload(content), "C") == payload(after_add)


def test_where_the_user_said_nothing_a_message_is_added() -> None:
    for put in (set_prompt, add_context):
        assert prompt(put(chat(("system", "s")), "a")).strip() == "a"
    assert prompt(chat(("system", "s"))) == ""
    assert add_system(chat(("user", "a")), "s") == chat(("system", "s"), ("user", "a"))


def test_every_text_that_a_model_may_read_can_be_changed_and_nothing_else() -> None:
    """Capitals are texts; what is in lower case names, switches or encodes something."""
    schema = {"type": "object", "properties": {"type": {"type": "string", "enum": ["E"]}}}
    function = {"name": "F", "description": "D", "parameters": schema}
    call = {"id": "c", "type": "function", "function": {"name": "F", "arguments": {"X": ["A", 1]}}}
    blocks = [text("T", cache_control={"type": "ephemeral"}), RESULT | {"content": [text("R")]}]
    blocks += [{"type": "tool_use", "id": "t", "name": "F", "input": {"K": "V"}}, IMAGE]
    payload = {
        "model": "m",
        "stream": True,
        "keep_alive": "1h",
        "messages": [
            {"role": "Narrator", "content": "S", "images": ["aGk="]},
            {"role": "assistant", "content": "", "thinking": "H", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "O"},
            {"role": "user", "content": blocks},
            {"type": "function_call_output", "call_id": "c", "output": "O"},
        ],
        "tools": [{"type": "function", "function": function}],
        "options": {"stop": ["Z"], "num_ctx": 1},
        "unknown": {"deep": [None, "U"]},
    }
    before = repr(payload)

    found = texts(payload)
    changed = map_texts(payload, lambda given: f"<{given}>")

    properties = {"<type>": {"type": "string", "enum": ["<E>"]}}
    assert found == "Narrator S H F X A O T R F K V O F D type E Z U".split()
    assert texts(changed) == [f"<{each}>" for each in found]
    assert changed["tools"][0]["function"]["parameters"]["properties"] == properties
    assert changed["messages"][3]["content"][2]["input"] == {"<K>": "<V>"}
    assert str(changed).replace("<", "").replace(">", "") == before == repr(payload)


class Model:
    """What stands behind a context: it remembers what was asked."""

    def __init__(self, **answer: Any) -> None:
        self.answer = {"message": {"role": "assistant", "content": "hi"}, "done": True, **answer}
        self.asked: list[tuple[str, Any]] = []

    async def ask(self, path: str, body: Any) -> Any:
        self.asked.append((path, body))
        return self.answer

    async def listen(self, body: Any) -> AsyncIterator[str]:
        self.asked.append(("stream", body))
        yield "h"
        yield "i"

    def context(self) -> Context:
        options = {"num_ctx": 8192, "num_gpu": 1}
        return Context(
            request_id="r", model="m", dialect="ollama", streams=True, asked=True,
            continuation=False, user="", prompt="", explaining=False, state={},
            log=logging.LoggerAdapter(logging.getLogger("test"), {}),
            runner={"keep_alive": -1, "shift": False, "options": options},
            ask=self.ask, listen=self.listen,
        )  # fmt: skip


async def test_what_is_asked_keeps_the_runner_of_the_request_and_no_other_models() -> None:
    model = Model(embeddings=[[1.0]])
    context, messages = model.context(), [{"role": "user", "content": "q"}]

    assert await context.chat(messages, temperature=0, think=True, num_ctx=9) == "hi"
    assert (await context.message(messages, "other", tools=[1]))["role"] == "assistant"
    assert [piece async for piece in context.stream(messages)] == ["h", "i"] and context.stream
    assert await context.embed(["q"]) == [[1.0]]

    runner = {"num_ctx": 8192, "num_gpu": 1}
    own = {"model": "m", "keep_alive": -1, "shift": False, "options": runner}
    asks = {"messages": messages, "think": False, "stream": False}
    options = runner | {"num_ctx": 9, "temperature": 0}
    assert model.asked == [
        ("/api/chat", own | asks | {"think": True, "options": options}),
        ("/api/chat", asks | {"model": "other", "tools": [1], "options": {}}),
        ("stream", own | asks | {"stream": True}),
        ("/api/embed", own | {"input": ["q"]}),
    ]


async def test_an_answer_that_was_cut_off_is_an_error_unless_the_agent_limited_it() -> None:
    context = Model(done_reason="length").context()

    for ask in (context.chat, context.message):
        with pytest.raises(UpstreamError, match="full before its answer was complete"):
            await ask([])
        assert await ask([], num_predict=1)
    with pytest.raises(TypeError, match=r"context\.message takes tools"):
        await context.chat([], tools=[])
