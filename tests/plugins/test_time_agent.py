"""The agent time: the model is told the date and the time where the proxy runs."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from plugins.time_agent.agent import Time
from tests.support import PATHS, House, message


@pytest.fixture
def in_india(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "IST-5:30")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the zone cannot be changed here")
@pytest.mark.parametrize("path", PATHS)
async def test_the_zone_is_that_of_the_machine_and_only_the_last_question_changes(
    in_india: None, house: House, path: str
) -> None:
    house.link("time")

    await house.ask(path, "/time hi", message("assistant", "hello"), "/time and now?")

    first, second, last = house.sent[0]
    assert (first, second) == ("hi", "hello")
    assert last.startswith("It is ") and last.endswith(" IST (UTC+0530).\n\nand now?")


async def test_where_it_is_a_guard_it_says_the_time_once() -> None:
    agent = Time()

    once = await agent.on_request({"messages": [{"role": "user", "content": "and now?"}]})
    again = await agent.on_request({"messages": [dict(once["messages"][0])]})

    assert again == once and once["messages"][0]["content"].count("It is ") == 1
