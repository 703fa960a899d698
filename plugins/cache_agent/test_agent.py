"""Run it with: python -m pytest plugins/cache_agent"""

from pathlib import Path

from testkit import ask


def test_the_model_is_asked_once_in_each_dialect() -> None:
    asked = []

    def model(messages: list[dict[str, str]]) -> str:
        asked.append(messages)
        return "It scatters light."

    answer = ask(Path(__file__).parent, "/cache why is the sky blue?", model=model)

    assert answer.text == "It scatters light."
    assert len(asked) == 4  # once in each dialect: streamed and not are the same question
