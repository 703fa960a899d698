"""Run it with: python -m pytest plugins/remember_agent"""

from pathlib import Path

from testkit import ask

HERE = Path(__file__).parent


def test_a_note_is_kept_without_the_model() -> None:
    answer = ask(HERE, "/remember that my bike is red")

    assert answer.text == "Noted as 1: my bike is red"
    assert answer.sent == []


def test_anything_else_is_not_noted_and_the_user_is_told() -> None:
    answer = ask(HERE, "/remember my bike is red", model="Fine.")

    assert answer.text.startswith("Fine.\n\n(Nothing was noted.")
    assert answer.sent[-1]["content"].startswith("None of my notes fits what follows")
