"""The agent summarize: a summary stands in place of a long conversation's older turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plugins.summarize_agent.agent import TITLE, cuts, parts_of, turns
from tests.support import CHAT, PATHS, FakeOllama, chat, done, running, said

PLUGINS = Path(__file__).parents[2] / "plugins"
SYSTEM = {"role": "system", "content": "Be kind."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
RESULT = {"role": "tool", "content": "y" * 50}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def model(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def history(count: int) -> list[dict[str, Any]]:
    said = [
        (user(f"question {n} {'x' * 100}"), CALL, RESULT, model("z" * 99)) for n in range(count)
    ]
    return [message for turn in said for message in turn]


def test_the_cut_moves_in_steps_and_never_in_a_turn() -> None:
    digests, sizes = [], []
    for count in range(1, 60):
        whole = [SYSTEM, *history(count), user("now?")]
        parts, first, end = parts_of(whole, 500, 2, "m")
        grown = parts_of([*whole, CALL, RESULT, CALL, RESULT], 500, 2, "m")
        assert (first, grown) == (1, (parts, first, end))
        assert whole[end]["role"] == "user" or not parts
        digests.append([digest for digest, _ in parts])
        sizes.append(len(json.dumps(whole[end:])) // 4)

    steps = [after for before, after in zip(digests, digests[1:], strict=False) if before != after]
    assert len(steps) < len(digests) / 3  # for the other turns the prompt's beginning is the same
    assert all(after[:-1] == before for before, after in zip(steps, steps[1:], strict=False))
    assert max(sizes[10:]) < 1000


@pytest.mark.parametrize(
    ("sizes", "limit", "keep", "found"),
    [
        ([], 100, 2, []),
        ([10] * 10, 100, 2, []),
        ([10] * 12, 100, 2, [6]),
        ([10] * 18, 100, 2, [6, 12]),
        ([500] * 5, 100, 2, [1, 2, 3]),
        ([500] * 5, 100, 9, []),
        ([500, 1, 1], 100, 1, [1]),
    ],
)
def test_half_of_the_limit_is_left_and_the_last_turns_stay(
    sizes: list[int], limit: int, keep: int, found: list[int]
) -> None:
    assert cuts(sizes, limit, keep) == found


@pytest.mark.parametrize(
    ("messages", "begin"),
    [
        ([SYSTEM, user("a"), model("b"), user("c")], [1, 3]),
        ([SYSTEM, model("hi"), user("a"), model("b"), user("c")], [1, 4]),
        ([user("a"), CALL, user("b"), RESULT, user("c")], [0, 4]),
        ([user("a"), CALL, user([{"type": "tool_result", "content": "r"}]), user("b")], [0, 3]),
        (
            [
                user("a"),
                {"type": "function_call", "call_id": "1"},
                user("b"),
                {"type": "function_call_output", "call_id": "1", "output": "x"},
                {"role": "assistant", "content": "c"},
                user("d"),
            ],
            [0, 5],
        ),
        ([SYSTEM], [0]),
    ],
)
def test_a_turn_begins_at_a_question_but_not_between_a_call_and_its_result(
    messages: list[Any], begin: list[int]
) -> None:
    assert turns(messages) == begin


@pytest.mark.parametrize("path", PATHS)
async def test_a_summary_is_made_once_in_any_dialect_and_none_where_it_is_explained(
    ollama: FakeOllama, ollama_url: str, tmp_path: Path, path: str
) -> None:
    def answer() -> None:
        asked = ollama.asked[-1]
        if asked.target == CHAT and "Sum up" in str(asked.json["messages"][0]):
            text = {"done_reason": "length"}
            ollama.answers(done("s" * 9999, **text), kind="application/json", before=again)
        else:
            ollama.says(path, "y", stream=False)
            ollama.before = again

    async def again() -> None:
        answer()

    talk = [m for m in history(12) if m["role"] == "user" or m["content"].startswith("z")]
    body = chat(path, *talk, "/summarize and now?", stream=False)
    explain = chat(path, *talk, "/explain /summarize and now?", stream=False)
    agents = {"summarize": {"settings": {"limit": 400, "keep": 2}}}
    ollama.answers(before=again)
    async with running(ollama_url, PLUGINS, tmp_path, agents=agents) as client:
        shown = said((await client.post(path, json=explain)).content)
        assert "one that the model would be asked for" in shown and ollama.asked == []
        answers = [await client.post(path, json=body) for _ in range(2)]
        *summaries, first, second = ollama.asked
        for file in (tmp_path / "summarize").iterdir():
            file.write_bytes(b"")  # as a power cut may leave it
        await client.post(path, json=body)

    assert [said(answer.content) for answer in answers] == ["y", "y"]
    assert ollama.asked[-1].body == first.body
    assert first.body == second.body  # so Ollama reads it once
    assert len([*(tmp_path / "summarize").iterdir()]) == len(summaries)
    assert all(asked.json["options"]["num_predict"] == 100 for asked in summaries)
    assert all(TITLE in asked.json["messages"][1]["content"] for asked in summaries[1:])
    assert json.dumps(f"{TITLE}{'s' * 400}") in json.dumps(first.json)
    assert json.dumps(first.json).count("question ") < 8
