"""Run it with: python -m pytest, and this folder."""

from pathlib import Path

from testkit import ask


def test_it_asks_for_a_short_answer_and_signs_it() -> None:
    answer = ask(Path(__file__).parent, "/sample:sign=me what is a proxy?", model="A go-between.")

    assert answer.text == "A go-between. (me)"
    assert answer.sent[0] == {"role": "system", "content": "Answer in one sentence."}
