"""Run it with: python -m pytest plugins/translate_agent"""

from pathlib import Path

from testkit import ask

SPOKEN = "<think>Colours.</think>It *scatters*, see `sky.py`:\n\n```py\nprint('blue')\n```\n"


def model(messages: list[dict[str, str]]) -> str:
    """Translate into capitals."""
    if messages[0]["content"].startswith("You are a translator. Translate what the user sends"):
        return messages[-1]["content"].upper()
    return SPOKEN


def test_the_answer_is_translated_and_its_code_is_not() -> None:
    answer = ask(Path(__file__).parent, "/translate:de why is the sky blue?", model=model)

    assert answer.text == "IT *SCATTERS*, SEE `sky.py`:\n\n```py\nprint('blue')\n```\n"
