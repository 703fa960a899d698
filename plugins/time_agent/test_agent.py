"""Run it with: python -m pytest plugins/time_agent"""

from datetime import datetime, timedelta
from pathlib import Path

from testkit import ask


def test_the_model_is_told_the_time_before_the_question() -> None:
    answer = ask(Path(__file__).parent, "/time is it late?")

    time, _, question = answer.sent[0]["content"].partition("\n\n")
    then = datetime.strptime(" ".join(time.split()[:7]), "It is %A, %d %B %Y, %H:%M")
    assert timedelta(0) <= datetime.now() - then < timedelta(minutes=2)
    assert question == "is it late?"
