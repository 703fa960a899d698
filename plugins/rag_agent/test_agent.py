"""Run it with: python -m pytest plugins/rag_agent"""

from pathlib import Path

from testkit import ask

HERE = Path(__file__).parent
SETTINGS = {"folder": "sample", "wait": 20, "base_url": "https://club.example/files"}
ANSWER = """\
A barrel.

Sources:
- decisions.md, Decisions > Meeting of 12 May 2026 <https://club.example/files/decisions.md>"""


def test_the_model_reads_the_passage_and_the_user_its_source() -> None:
    answer = ask(HERE, "/rag:k=1 who buys a barrel?", model="A barrel.", settings=SETTINGS)

    assert answer.text == ANSWER
    assert "We decided to buy the second rain barrel" in answer.sent[-1]["content"]


def test_small_talk_is_no_search() -> None:
    answer = ask(HERE, "/rag thanks!", model="You are welcome.", settings=SETTINGS)

    assert answer.text == "You are welcome."
    assert answer.sent == [{"role": "user", "content": "thanks!"}]
