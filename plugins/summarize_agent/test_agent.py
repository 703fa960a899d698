"""Run it with: python -m pytest plugins/summarize_agent"""

from pathlib import Path

from testkit import ask

LONG = [
    {"role": role, "content": f"{role} {number}: {'word ' * 40}"}
    for number in range(10)
    for role in ("user", "assistant")
]
QUESTION = {"role": "user", "content": "/summarize and now?"}


def model(messages: list[dict[str, str]]) -> str:
    return "It was about words." if "Sum up" in str(messages[0]) else "Now it is late."


def test_older_turns_become_a_summary_and_the_last_ones_stay() -> None:
    settings = {"limit": 500, "keep": 2}
    answer = ask(Path(__file__).parent, [*LONG, QUESTION], model=model, settings=settings)

    assert answer.text == "Now it is late."
    assert answer.sent[0] == {
        "role": "system",
        "content": "Summary of the conversation so far:\nIt was about words.",
    }
    assert answer.sent[1:-1] == LONG[-len(answer.sent[1:-1]) :]
    assert answer.sent[-1] == {"role": "user", "content": "and now?"}
