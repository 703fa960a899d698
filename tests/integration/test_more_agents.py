"""The agents remember, cache and time before a real model, in both dialects."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.support import said

PATHS = ["/api/chat", "/v1/chat/completions"]


def body(text: str, seed: int = 7, **fields: Any) -> dict[str, Any]:
    """Return a chat that both dialects understand, with an answer that depends on the seed."""
    options = {"temperature": 1, "seed": seed, "num_predict": 12}
    v1 = {"temperature": 1, "seed": seed, "max_tokens": 12}
    messages = [{"role": "user", "content": text}]
    return {"model": "tiny", "messages": messages, "options": options, **v1, **fields}


def tokens(answer: httpx.Response) -> int:
    """Return how many tokens the model has read; 0 where none was asked."""
    whole = answer.json()
    usage = whole.get("usage", {})
    return int(whole.get("prompt_eval_count", usage.get("prompt_tokens", 0)))


@pytest.mark.parametrize("path", PATHS)
def test_a_note_is_kept_and_read_by_the_model_later(
    http: httpx.Client, proxied: str, path: str
) -> None:
    def ask(text: str) -> httpx.Response:
        return http.post(proxied + path, json=body(text, stream=False)).raise_for_status()

    noted = ask("/remember that my bike is red and stands behind the old house of the baker")
    plain, fitting = tokens(ask("what about my bike?")), ask("/remember what about my bike?")
    number = said(noted.content).removeprefix("Noted as ").partition(":")[0]
    forgotten = ask(f"/remember:forget={number}")

    assert tokens(noted) == tokens(forgotten) == 0
    assert said(fitting.content).strip() and tokens(fitting) > plain + 15
    assert said(forgotten.content).startswith("Forgotten: my bike is red")
    assert said(ask("/remember:list").content) == "There are no notes."


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
def test_the_same_question_is_answered_from_the_cache(
    http: httpx.Client, proxied: str, path: str, stream: bool
) -> None:
    def ask(text: str, seed: int = 7) -> tuple[str, str]:
        asked = body(text, seed, stream=stream, max_tokens=400, stop=[" new"])
        asked["options"] |= {"num_predict": 400, "stop": [" new"]}  # what is cut off is not kept
        answer = http.post(proxied + path, json=asked).raise_for_status()
        return said(answer.content), answer.headers["x-osp-agents"].split(";")[1]

    question = f"tell me about {path} {stream}"
    first, again, other = (ask(f"/cache {question}", seed) for seed in (7, 7, 8))
    fresh = ask(f"/cache:fresh=true {question}")

    assert first[0].strip() and first[1] == "ok"
    assert again == (first[0], "reply")
    assert other[1] == fresh[1] == "ok"


@pytest.mark.parametrize("path", PATHS)
def test_the_time_is_read_by_the_model(http: httpx.Client, proxied: str, path: str) -> None:
    plain, timed = (
        http.post(proxied + path, json=body(f"{command}hello", stream=False)).raise_for_status()
        for command in ("", "/time ")
    )

    assert tokens(timed) > tokens(plain) + 10
    assert said(timed.content).strip()
