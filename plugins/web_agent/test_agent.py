"""Run it with: python -m pytest plugins/web_agent"""

from pathlib import Path

from testkit import ask

HERE = Path(__file__).parent


def test_without_a_page_it_says_how_it_is_used() -> None:
    answer = ask(HERE, "/web who holds hands?")

    assert answer.text.startswith("Put the page behind the command") and answer.sent == []


def test_a_host_that_is_not_listed_is_refused() -> None:
    answer = ask(HERE, "/web:https://example.com/ who?", settings={"hosts": ["example.org"]})

    assert answer.status == 403 and "that the operator lists in settings.hosts" in answer.text
