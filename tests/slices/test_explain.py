"""/explain: what the model would have been sent, agent by agent; the model is not asked."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from tests import support
from tests.support import ANSWER, CHAT, COMPLETIONS, NOTICE, PATHS, House, outcomes, said

SENT = "\n\nThe model would have been sent:\n"
NEVER = "\n\nThe model would not have been asked. The answer would have been:\n"


@pytest.fixture
def agents(house: House) -> House:
    house.add("a b", support.ADDS, response=ANSWER)
    house.add("tag", support.TAG)
    house.add("note", "add_system(payload, 'be brief')")
    house.add("shout", response=ANSWER)
    return house


def explained(answer: httpx.Response) -> str:
    """Return what the answer says, its times as N."""
    assert answer.status_code == 200, answer.text
    return re.sub(r"\d+ ms", "N ms", said(answer.content))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream": False}])
async def test_each_agents_changes_are_shown_and_the_model_is_not_asked(
    agents: House, path: str, fields: dict[str, Any]
) -> None:
    limit = "\nmax_tokens: 999" if path == "/v1/messages" else ""
    stream = f"\nstream: {json.dumps(fields['stream'])}" if fields else ""
    agents.add("on", "add_context(payload, 'on')", "response + '!'", always=True)
    agents.add("says", "raise Reply('known: ' + prompt(payload))")

    answer = await agents.ask(path, "/shout old", "/explain /shout /note /tag x", **fields)
    reply = await agents.ask(path, "/explain /says /tag x", **fields)

    on = "/on (ok, N ms)\n- [user] x\n+ [user] on\n+ \n+ x\n\n"
    end = f'[system] be brief\n[user] old\n[user] on\n\nx <tag\nmodel: "demo"{limit}{stream}'
    tag = "/tag (ok, N ms)\n- [user] on\n- \n- x\n+ [user] on\n+ \n+ x <tag"
    assert explained(answer) == f"{on}/note (ok, N ms)\n+ [system] be brief\n\n{tag}{SENT}{end}"
    assert outcomes(answer) == "on;ok, note;ok, tag;ok"
    assert explained(reply) == f"{on}/says (reply, N ms)\nchanged nothing{NEVER}known: on\n\nx"
    assert agents.sent == [] and outcomes(reply) == "on;ok, says;reply"


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("del payload['messages'][0]", ["- [user] one"]),
        ("payload['messages'].pop(1)", ["- [assistant] two"]),
        ("payload['model'] = 'other'", ['- model: "demo"', '+ model: "other"']),
        ("payload['options'] = {'seed': 1}", ['+ options: {"seed": 1}']),
        ("set_prompt(payload, 'y\\nz')", ["- [user] x", "+ [user] y", "+ z"]),
        ("payload['messages'][2]['images'] = ['aGk=']",
         ["- [user] x", "+ [user] x", '+     images: ["aGk="]']),
        ("set_prompt(payload, '')", ["- [user] x", "+ [user] "]),
        ("set_prompt(payload, 'word ' * 2000)", ["- [user] x", "+ [user] " + "word " * 2000]),
        ("pass", ["changed nothing"]),
    ],
)  # fmt: skip
async def test_additions_and_removals_stand_behind_their_sign(
    house: House, code: str, lines: list[str]
) -> None:
    house.add("it", code)

    answer = await house.ask(CHAT, "one", support.message("assistant", "two"), "/explain /it x")

    assert explained(answer).partition(SENT)[0].split("\n") == ["/it (ok, N ms)", *lines]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "code",
    [
        "payload['messages'][-1]['content'] = 5",
        "raise ValueError('secret')",
        "await asyncio.Event().wait()",
    ],
)
async def test_a_failure_is_shown_without_its_text(agents: House, path: str, code: str) -> None:
    agents.add("bad", code, timeout=0.1)
    outcome = "timeout" if "wait" in code else "error"

    answer = await agents.ask(path, "/explain /bad&/note /a x")

    text = explained(answer)
    assert text.startswith(f"/bad ({outcome}, N ms)\nchanged nothing\n\n/note (ok, N ms)\n+ [sys")
    assert text.endswith(NOTICE.format("bad")) and "secret" not in text
    assert outcomes(answer) == f"bad;{outcome}, note;ok, a;ok" and agents.sent == []


@pytest.mark.parametrize("path", PATHS)
async def test_what_would_have_been_refused_is_refused(agents: House, path: str) -> None:
    agents.add("ends", "raise Abort(418, 'not here')")
    agents.add("fails", "1 / 0", on_error="abort")

    for name, status in (("ends", 418), ("fails", 500)):
        answer = await agents.ask(path, f"/explain /a&/{name} x")
        assert answer.status_code == status and agents.sent == []


@pytest.mark.parametrize(
    ("model", "header", "typed"),
    [
        ("demo", "/Explain\t/a /b", "x"),
        ("demo", "/explain /a", "/b x"),
        ("both", None, "/explain /b x"),
        ("why", None, "x"),
        ("demo", None, " \n/explain\n/a /b x"),
    ],
)
async def test_it_may_be_asked_for_wherever_agents_are(
    agents: House, model: str, header: str | None, typed: str
) -> None:
    presets = {"both": {"model": "demo", "agents": "/a /b"}}
    presets["why"] = {"model": "demo", "agents": "/explain /a /b"}

    async with agents.open(presets=presets) as client:
        answer = await agents.post(client, CHAT, typed, model=model, header=header)

    assert explained(answer).endswith(f'{SENT}[user] b\n\na\n\nx\nmodel: "{model}"')
    assert outcomes(answer) == "a;ok, b;ok" and agents.sent == []


@pytest.mark.parametrize("path", PATHS)
async def test_before_plain_text_it_is_text_and_passes_untouched(agents: House, path: str) -> None:
    typed = ["/explain", "/explain why", "/explain /nope x", "/explain /a&/nope x", "/explain&/a x"]

    async with agents.open() as client:
        for text in [*typed, "/explain:1 /a x", "/explainer /a x", "why /explain /a x"]:
            await agents.post(client, path, text)
            assert agents.sent.pop() == [text]


async def test_an_image_is_shortened(agents: House) -> None:
    long = "aGk=" * 2000
    image = {"type": "image_url", "image_url": {"url": long}}
    content = support.parts(COMPLETIONS, "/explain /note x", image)

    native = await agents.ask(CHAT, support.message("user", "/explain /note x", images=[long]))
    other = await agents.ask(COMPLETIONS, support.message("user", content))

    for answer in (native, other):
        text = explained(answer)
        assert "aGk=aGk=" in text and re.search(r"\.\.\. \(80\d\d characters\)", text)
        assert len(text) < 1000
