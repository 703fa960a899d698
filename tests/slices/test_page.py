"""GET /osp: what the server makes of the page. tests/test_browser.py looks at it in a browser."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256

import pytest

from kernel.config import HOME
from tests.support import CHAT, House, chat

SOURCE = (HOME / "slices" / "page.html").read_text(encoding="utf-8")
HOSTILE = "<img src=x onerror=alert(1)>\u202e'\"&"
SHOWN = "&lt;img src=x onerror=alert(1)&gt;⟨U+202E⟩&#x27;&quot;&amp;"


def rows(page: str) -> list[list[str]]:
    """Return the cells of the table, as they are written."""
    body = page.partition("<tbody>")[2].partition("</tbody>")[0]
    return [re.findall(r"<td[^>]*>([^<]*)", row) for row in body.split("<tr>")[1:]]


async def test_the_browser_is_told_to_run_nothing_but_the_pages_own(house: House) -> None:
    async with house.open() as client:
        page = await client.get("/osp")

    policy = dict(
        part.split(" ", 1) for part in page.headers["content-security-policy"].split("; ")
    )
    for tag in ("script", "style"):
        [text] = re.findall(f"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = b64encode(sha256(text.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["cache-control"] == "no-store"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["cross-origin-resource-policy"] == "same-origin"


def test_the_page_is_one_file_that_makes_no_markup_of_text() -> None:
    elsewhere = re.findall(r"(?:https?:)?//[\w.]+\.\w+", SOURCE)
    markup = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|\son\w+=|style="
    )

    assert elsewhere == ["http://www.w3.org"]  # a name, of SVG
    assert re.findall(markup, SOURCE) == []
    assert len(SOURCE.splitlines()) <= 450


async def test_without_script_it_is_a_table_of_the_latest_requests(house: House) -> None:
    house.add("tag", "set_prompt(payload, 'x')")
    async with house.open() as client:
        await house.post(client, CHAT, "/tag hello", model="first")
        await house.post(client, CHAT, "hello", model="second")
        page = (await client.get("/osp")).text

    second, first = rows(page)
    assert (second[1], second[2], second[4]) == ("second", "", "200 ok")
    assert (first[1], first[2]) == ("first", "tag ok") and first[3].startswith("python-httpx")
    assert re.fullmatch(r"\d\d:\d\d:\d\d", first[0]) and first[5].endswith(" ms")


async def test_hostile_texts_stay_texts(house: House) -> None:
    async with house.open(commands={"prefix": "'\"<"}) as client:
        headers = {"user-agent": HOSTILE.replace("\u202e", "")}
        await client.post(CHAT, json=chat(CHAT, "x", model=HOSTILE), headers=headers)
        page = (await client.get("/osp")).text

    [row] = rows(page)
    assert row[1] == SHOWN and row[3] == SHOWN.replace("⟨U+202E⟩", "")
    assert "<img" not in page and 'data-prefix="&#x27;&quot;&lt;" data-kept="200">' in page


@pytest.mark.parametrize(
    ("headers", "shown"),
    [
        ({}, []),
        ({"x-api-key": "wrong"}, []),
        ({"x-api-key": "sesame"}, ["secret"]),
        ({"authorization": "Bearer sesame"}, ["secret"]),
    ],
)
async def test_where_a_key_is_needed_the_page_comes_without_and_is_empty(
    house: House, headers: dict[str, str], shown: list[str]
) -> None:
    async with house.open(keys={"me": {"key": "sesame"}}) as client:
        body = chat(CHAT, "x", model="secret")
        await client.post(CHAT, json=body, headers={"x-api-key": "sesame"})
        page = await client.get("/osp", headers=headers)
        others = [await client.get(path) for path in ("/traces", "/osp/", "/osp/x", "/")]

    assert page.status_code == 200 and [row[1] for row in rows(page.text)] == shown
    assert [other.status_code for other in others] == [401] * 4


async def test_only_a_get_of_the_page_is_answered_and_a_closed_page_is_closed(house: House) -> None:
    async with house.open(keys={"me": {"key": "sesame"}}) as client:
        sent = await client.post("/osp")
    async with house.open(access={"deny": ["/osp"]}) as client:
        closed = await client.get("/osp")

    assert (sent.status_code, closed.status_code) == (405, 403)
    assert house.ollama.asked == []


async def test_the_root_stays_ollamas(demo_url: str, house: House) -> None:
    house.url = demo_url
    async with house.open() as client:
        assert (await client.get("/")).text == "Ollama is running"
