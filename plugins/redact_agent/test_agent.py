"""Run it with: python -m pytest plugins/redact_agent"""

from pathlib import Path

from testkit import ask

HERE = Path(__file__).parent


def test_the_model_never_sees_what_is_private_and_the_answer_still_has_it() -> None:
    answer = ask(HERE, "/redact write to ada@example.org", model="Dear [EMAIL_1], hello!")

    assert answer.sent[0]["content"] == "write to [EMAIL_1]"
    assert answer.text == "Dear ada@example.org, hello!"
