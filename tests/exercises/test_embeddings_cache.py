"""Second exercise of docs/add-a-slice.md: a cache of embeddings. It fails until you write one."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.support import House

MOST = 256  # answers that are kept; then the oldest goes
LARGEST = 2**18  # bytes of a request or an answer that is kept
EMBED: dict[str, Any] = {
    "method": "POST",
    "url": "/api/embed",
    "json": {"model": "demo-embed", "input": "a"},
}
OTHERS: list[dict[str, Any]] = [
    *[{"json": EMBED["json"] | more} for more in ({"model": "other"}, {"input": "b"})],
    *[{"url": url} for url in ("/api/embeddings", "/api/embed?x=y")],
    *[{"headers": {name: "x"}} for name in ("accept-encoding", "authorization", "origin")],
    {"method": "HEAD"},
]


async def ask(house: House, *requests: dict[str, Any], **sections: Any) -> list[httpx.Response]:
    """Send EMBED, with these changes, to one app."""
    if house.ollama.may_say:
        house.ollama.answers(b"{}")
    async with house.open(**sections) as client:
        return [await client.request(**EMBED | request) for request in requests]


@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings", "/v1/embeddings"])
async def test_an_equal_request_gets_the_same_bytes_without_ollama(house: House, path: str) -> None:
    house.ollama.answers(b'{"embeddings":', b"[[1]]}", kind="application/json")

    answers = await ask(house, *[{"url": path, "headers": {"origin": "http://localhost"}}] * 3)

    assert [answer.status_code for answer in answers] == [200, 200, 200]
    times = len(house.ollama.asked)
    assert times == 1, f"Ollama was asked {times} times"
    assert {answer.content for answer in answers} == {b'{"embeddings":[[1]]}'}
    ids = {answer.headers.pop("x-request-id") for answer in answers}
    assert len(ids) == 3, "AccessLog writes an id into each message: send copies"
    first, *others = [answer.headers.raw for answer in answers]
    assert others == [first, first], "see `relayed` in kernel/log.py"


@pytest.mark.parametrize("changed", OTHERS, ids=str)
async def test_any_other_request_asks_ollama(house: House, changed: dict[str, Any]) -> None:
    await ask(house, {}, changed)

    assert len(house.ollama.asked) == 2


async def test_no_error_is_kept(house: House) -> None:
    house.ollama.statuses = [404, 500]

    answers = await ask(house, {}, {}, {})

    assert [answer.status_code for answer in answers] == [404, 500, 200]


async def test_an_answer_that_ollama_broke_off_is_not_kept(house: House) -> None:
    house.ollama.answers(b"{}")
    house.ollama.script = [(b"{", house.ollama.breaks)]

    async with house.open() as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.request(**EMBED)
        assert (await client.request(**EMBED)).content == b"{}"


async def test_an_answer_flows_while_it_is_copied(house: House) -> None:
    house.ollama.answers(b"first", house.ollama.pause, b"last")

    async with house.open() as client, client.stream(**EMBED) as answer:
        pieces = answer.aiter_raw()
        assert await anext(pieces) == b"first"
        house.ollama.go.set()
        assert await anext(pieces) == b"last"


async def test_so_many_answers_are_kept_and_then_the_oldest_goes(house: House) -> None:
    inputs = [str(number) for number in [*range(MOST + 1), MOST, 0]]

    await ask(house, *[{"json": {"model": "demo-embed", "input": text}} for text in inputs])

    assert [asked.json["input"] for asked in house.ollama.asked[MOST:]] == [f"{MOST}", "0"]


@pytest.mark.parametrize(("sent", "answered"), [(LARGEST, 2), (2, LARGEST + 1)])
async def test_what_is_too_large_is_not_kept(house: House, sent: int, answered: int) -> None:
    house.ollama.answers(b"x" * answered)

    answers = await ask(house, *[{"json": {"input": "x" * sent}}] * 2)

    assert [len(answer.content) for answer in answers] == [answered] * 2
    assert len(house.ollama.asked) == 2


async def test_a_key_gets_no_answer_of_a_model_that_it_may_not_ask(house: House) -> None:
    keys: dict[str, Any] = {
        "all": {"key": "all-12345"},
        "kids": {"key": "kids-1234", "models": ["other"]},
    }

    answers = await ask(house, *[{"auth": ("", keys[name]["key"])} for name in keys], keys=keys)

    assert [answer.status_code for answer in answers] == [200, 403]


async def test_each_app_has_a_cache_of_its_own(house: House) -> None:
    for _ in "12":
        await ask(house, {"headers": {"host": "localhost"}})  # else their ports would differ

    assert len(house.ollama.asked) == 2
