"""First exercise of docs/add-a-slice.md: GET /api/agents/{name}. It fails until you write it."""

from __future__ import annotations

import httpx

from tests.support import ANSWER, House

KEY = {"x-api-key": "12345678"}


async def ask(house: House, name: str, *headers: dict[str, str]) -> list[httpx.Response]:
    """Ask for an agent of two, with each of these headers."""
    house.add("note other", response=ANSWER)
    async with house.open(keys={"laptop": {"key": KEY["x-api-key"]}}) as client:
        return [await client.get(f"/api/agents/{name}", headers=each) for each in headers]


async def test_one_agent_is_described(house: House) -> None:
    (answer,) = await ask(house, "note", KEY)

    about = {"name": "note", "status": "loaded", "description": "Is note."}
    assert answer.status_code == 200
    assert answer.json() == about | {"hooks": ["on_response"]}


async def test_an_unknown_name_is_answered_with_those_that_are_known(house: House) -> None:
    (answer,) = await ask(house, "nobody", KEY)

    assert answer.status_code == 404
    assert "note, other" in answer.text


async def test_a_browser_gets_a_page_and_neither_a_foreign_page_nor_a_stranger_gets_anything(
    house: House,
) -> None:
    foreign = {"origin": "http://evil.example"}

    answers = await ask(house, "note", KEY | {"accept": "text/html"}, KEY | foreign, {})

    assert [answer.status_code for answer in answers] == [200, 403, 401]
    assert "<pre>" in answers[0].text
