"""Run it with: python -m pytest plugins/audit_agent"""

import json
from pathlib import Path

from testkit import ask


def test_each_chat_is_noted_with_digests_of_its_texts(tmp_path: Path) -> None:
    ask(Path(__file__).parent, "why is the sky blue?", model="It scatters.", data_dir=tmp_path)

    lines = (tmp_path / "audit.jsonl").read_text().splitlines()
    request, answer = map(json.loads, lines[:2])
    assert (request["event"], request["agents"]) == ("request", ["audit"])
    assert len(request["prompt"]) == len(answer["answer"]) == 64  # digits of SHA-256
    assert (answer["event"], answer["finish"], answer["id"]) == ("answer", "stop", request["id"])
