"""Agents of this project before a real model, in both dialects; and a client that hangs up."""

from __future__ import annotations

from typing import Any

import httpx
import ollama
import openai
import pytest

from tests.support import said

PATHS = ["/api/chat", "/v1/chat/completions"]
QUESTION = "what did we decide in May?"
SOURCES = "\n\nSources:\n- decisions.md"
ENDLESS = 100_000  # tokens: minutes


def body(text: str, model: str = "tiny", tokens: int = 12, **fields: Any) -> dict[str, Any]:
    """Return a chat that both dialects understand."""
    options = {"temperature": 0, "seed": 7, "num_predict": tokens}
    messages = [{"role": "user", "content": text}]
    v1 = {"temperature": 0, "max_tokens": tokens}
    return {"model": model, "messages": messages, "options": options, **v1, **fields}


def outcomes(answer: httpx.Response) -> list[list[str]]:
    """Return name and outcome of each agent in X-OSP-Agents."""
    return [part.split(";")[:2] for part in answer.headers["x-osp-agents"].split(", ")]


@pytest.mark.parametrize("path", PATHS)
def test_rag_names_its_sources_under_the_answer(
    http: httpx.Client, proxied: str, path: str
) -> None:
    for stream in (True, False):
        answer = http.post(proxied + path, json=body(f"/rag {QUESTION}", stream=stream))
        text, _, sources = said(answer.content).partition(SOURCES)

        assert (answer.status_code, outcomes(answer)) == (200, [["rag", "ok"]])
        assert text.strip() and "Meeting of 12 May 2026" in sources


@pytest.mark.parametrize("path", PATHS)
def test_rag_puts_the_passages_before_the_model(
    http: httpx.Client, direct: str, proxied: str, path: str
) -> None:
    def tokens(url: str, text: str) -> int:
        answer = http.post(url + path, json=body(text, stream=False)).json()
        count: int = answer.get("prompt_eval_count") or answer["usage"]["prompt_tokens"]
        return count

    assert tokens(proxied, f"/rag {QUESTION}") > tokens(direct, QUESTION) + 100


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("text", ["/translate:de hello", f"/rag /translate:de {QUESTION}"])
def test_translate_leaves_an_answer_whose_translation_was_cut_off(
    http: httpx.Client, proxied: str, path: str, text: str
) -> None:
    answer = http.post(proxied + path, json=body(text, stream=False))

    # The model's own num_predict cuts off whatever it is asked.
    assert ["translate", "error"] in outcomes(answer)
    assert said(answer.content).endswith("[without translate: it failed, the proxy's log says why]")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
def test_help_has_the_shape_of_an_answer_of_the_model(
    http: httpx.Client, direct: str, proxied: str, path: str, stream: bool
) -> None:
    answer = http.post(proxied + path, json=body("/help", stream=stream))
    model = http.post(direct + path, json=body("help", stream=stream))

    assert answer.status_code == 200
    assert answer.headers["content-type"] == model.headers["content-type"]
    assert "/rag: " in said(answer.content) and "/translate: " in said(answer.content)


@pytest.mark.parametrize("path", PATHS)
def test_a_model_that_is_missing_is_the_models_error_with_agents_too(
    http: httpx.Client, direct: str, proxied: str, path: str
) -> None:
    asked = body(f"/rag {QUESTION}", model="none")

    one, other = (http.post(url + path, json=asked) for url in (direct, proxied))

    assert (other.status_code, other.content) == (one.status_code, one.content)
    assert other.status_code == 404


@pytest.mark.parametrize("stream", [True, False])
def test_ollamas_client_gets_an_answer_with_agents(proxied: str, stream: bool) -> None:
    with ollama.Client(host=proxied) as client:
        answer: Any = client.chat(**ollama_body(f"/rag {QUESTION}"), stream=stream)
        parts = list(answer) if stream else [answer]

    assert SOURCES in "".join(part.message.content for part in parts)
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]


@pytest.mark.parametrize("stream", [True, False])
def test_openais_client_gets_an_answer_with_agents(proxied: str, stream: bool) -> None:
    with openai.OpenAI(base_url=f"{proxied}/v1", api_key="none", max_retries=0) as client:
        create: Any = client.chat.completions.create
        answer = create(**openai_body(f"/rag {QUESTION}"), stream=stream)
        choices = [part.choices[0] for part in (answer if stream else [answer])]

    texts = [(choice.delta if stream else choice.message).content or "" for choice in choices]
    assert SOURCES in "".join(texts)
    assert [c.finish_reason for c in choices if c.finish_reason] == ["length"]


def ollama_body(text: str) -> dict[str, Any]:
    return {key: body(text)[key] for key in ("model", "messages", "options")}


def openai_body(text: str) -> dict[str, Any]:
    return {key: body(text)[key] for key in ("model", "messages", "max_tokens", "temperature")}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("text", ["tell me a story", f"/rag {QUESTION}", "/translate:de hello"])
def test_the_first_frame_comes_at_once_and_hanging_up_stops_the_model(
    http: httpx.Client, direct: str, proxied: str, path: str, text: str
) -> None:
    asked = body(text, tokens=ENDLESS, stream=True)

    with http.stream("POST", proxied + path, json=asked, timeout=5) as answer:
        frames = answer.iter_raw()
        assert next(frames)

    assert is_idle(http, direct)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("text", ["tell me a story", "/translate:de hello"])
def test_giving_up_on_a_whole_answer_stops_the_model(
    http: httpx.Client, direct: str, proxied: str, path: str, text: str
) -> None:
    with pytest.raises(httpx.ReadTimeout):
        asked = body(text, tokens=ENDLESS, stream=False)
        http.post(proxied + path, json=asked, timeout=0.5)

    assert is_idle(http, direct)


def test_an_answer_under_way_keeps_the_next_request_waiting(
    http: httpx.Client, direct: str, proxied: str
) -> None:
    """Without this the two tests above would show nothing."""
    asked = body("tell me a story", tokens=ENDLESS, stream=True)

    with http.stream("POST", f"{proxied}/api/chat", json=asked) as answer:
        frames = answer.iter_raw()  # held, for letting go of it is hanging up
        assert next(frames)
        assert not is_idle(http, direct)

    assert is_idle(http, direct)


def is_idle(http: httpx.Client, direct: str) -> bool:
    """Tell whether the model, which does one thing at a time, answers the next request soon."""
    try:
        http.post(f"{direct}/api/chat", json=body("next", tokens=1), timeout=2).raise_for_status()
    except httpx.ReadTimeout:
        return False
    return True
