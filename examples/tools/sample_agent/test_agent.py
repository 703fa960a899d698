"""Run it with: python -m pytest, and this folder."""

from pathlib import Path

from testkit import ask


def test_the_model_calls_the_tool_and_is_told_how_many() -> None:
    call = {"name": "count_letter", "arguments": {"word": "Strawberry", "letter": "r"}}
    model = [call, "Three."]
    answer = ask(Path(__file__).parent, "/sample how many r are in strawberry?", model=model)

    assert answer.results == ["3"]
    assert answer.text == "Three."
