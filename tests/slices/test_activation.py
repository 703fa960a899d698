"""Activation: the ways to ask for agents, how they meet, and what is always on.

A header, a preset and what is typed; each agent here leaves its mark behind the prompt, so that the
prompt which the model got says who ran, in which order, with what.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import CHAT, PATHS, House, done, outcomes, said, write_agent

MARK = """v, n = self.arguments["v"], self.arguments["n"]
set_prompt(payload, f"{prompt(payload)} NAME={v}{n}")"""
ARGUMENTS = {"v": "", "n": 0}
PRESETS = {
    "p": {"model": "m", "agents": "/c:from-preset"},
    "again": {"model": "m", "agents": "/a:from-preset /b:n=3"},
    "unknown": {"model": "m", "agents": "/a /nope"},
    "wrong": {"model": "m", "agents": "/a:n=many"},
    "off": {"model": "m", "agents": "/a /off"},
}


@pytest.fixture
def agents(house: House) -> House:
    house.add("a b c d", MARK, arguments=ARGUMENTS)
    house.add("off", MARK, enabled=False)
    write_agent(house.plugins, "broken", "raise RuntimeError('key HUSH')")
    return house


@pytest.mark.parametrize(
    ("model", "header", "typed", "prompt"),
    [
        ("again", "/d:h /b:2", "/a:t x", "x d=h0 b=3 a=t0"),
        ("p", "/d:h", "/d:t /a x", "x d=t0 c=from-preset0 a=0"),
        ("m", None, "/a:1 /b /a:2 x", "x a=20 b=0"),
        ("m", "/a:h /b", "/a x", "x a=0 b=0"),  # the last arguments are none
        ("m", None, "/a /b&/a:2 x", "x a=20 b=0"),
        ("m", None, "/b /a /c&/a:2 x", "x b=0 a=20 c=0"),  # joined where it does not run
        ("m", '/C:v="two words",n=4\t/a /b', "x", "x c=two words4 a=0 b=0"),
        ("m", "", "x", "x"),
        ("m", "/a", "//a x", "//a x a=0"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
async def test_presets_header_and_prompt_ask_together_and_each_agent_runs_once(
    agents: House, path: str, model: str, header: str | None, typed: str, prompt: str
) -> None:
    async with agents.open(presets=PRESETS) as client:
        answer = await agents.post(client, path, typed, model=model, header=header)

    assert agents.sent[0][-1] == prompt.replace("//a x a", "/a x a")
    assert outcomes(answer) == ", ".join(f"{mark[0]};ok" for mark in prompt.split() if "=" in mark)
    assert "x-osp-agents" not in dict(agents.ollama.asked[0].headers)


@pytest.mark.parametrize(
    ("model", "header", "complaint"),
    [
        ("m", "/nope", "X-OSP-Agents: '/nope' is no known agent; known are: /a, /b, /broken, /c,"),
        ("m", "a", "X-OSP-Agents: 'a' is no known agent"),
        ("m", "/a&/nope", "X-OSP-Agents: '/a&/nope' is no known agent"),
        ("m", "/a hello", "X-OSP-Agents: 'hello' is no known agent"),
        ("m", "/a /explain", "X-OSP-Agents: '/explain' is no known agent"),
        ("unknown", None, "the preset unknown: '/nope' is no known agent; known are: /a, /b,"),
        ("m", "/a:n=many", "a: n must be a whole number, not 'many'"),
        ("wrong", None, "a: n must be a whole number, not 'many'"),
        ("m", "/b /a:colour=red", "a: 'colour=red' is no argument here; known are: v, n"),
        ("m", "/broken", "the agent broken failed to load: RuntimeError at "),
        ("off", None, "the agent off is disabled by the operator"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
async def test_what_a_program_asks_for_wrongly_is_a_400_that_says_what_is_right(
    agents: House, path: str, model: str, header: str | None, complaint: str
) -> None:
    async with agents.open(presets=PRESETS) as client:
        answer = await agents.post(client, path, "x", model=model, header=header)

    error = answer.json()["error"]
    assert str(error if path == CHAT else error["message"]).startswith(complaint)
    assert answer.status_code == 400 and "HUSH" not in answer.text and agents.sent == []


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_what_a_person_types_wrongly_is_an_answer_even_beside_a_preset(
    agents: House, path: str, stream: bool
) -> None:
    expected = {
        "/b:n=many x": "b: n must be a whole number, not 'many'\n\n/b: Is b.\n    v=''\n    n=0",
        "/explain /a:n=many x": "a: n must be a whole number, not 'many'\n\n/a: Is a.\n    v=",
        "/a /off x": "the agent off is disabled by the operator\n\n/off: is disabled",
        "/broken x": "the agent broken failed to load: RuntimeError at ",
        "/help b": "/b: Is b.",
    }

    async with agents.open(presets=PRESETS) as client:
        for typed, text in expected.items():
            answer = await agents.post(client, path, typed, model="again", stream=stream)
            assert answer.status_code == 200 and said(answer.content).startswith(text)
            assert "HUSH" not in answer.text and outcomes(answer) == ""

    assert agents.sent == []


async def test_header_and_preset_are_spelt_with_a_slash_whatever_is_typed(agents: House) -> None:
    for prefix, text in (("!", "!b: Is b."), ("::", "::b: Is b."), ("", "y")):
        async with agents.open(presets=PRESETS, commands={"prefix": prefix}) as client:
            await agents.post(client, CHAT, f"{prefix}b /a x", model="p", header="/d:h")
            answer = await agents.post(client, CHAT, f"{prefix}help b")
            assert said(answer.content).startswith(text)

    first = "/a x d=h0 c=from-preset0 b=0"
    assert agents.sent == [[first], [first], ["b /a x d=h0 c=from-preset0"], ["help b"]]


@pytest.mark.parametrize("path", PATHS)
async def test_an_always_on_agent_that_is_asked_for_keeps_its_place(
    agents: House, path: str
) -> None:
    for name, priority in (("late", 5), ("eta", 0), ("early", -0.5)):
        agents.add(name, MARK, always=True, priority=priority, arguments=ARGUMENTS)
    write_agent(agents.plugins, "fails", "raise RuntimeError", always=True)

    await agents.ask(path, "/b /late:t /eta:2 x", header="/late:h")

    assert agents.sent == [["x early=0 eta=20 late=t0 b=0"]]


@pytest.mark.parametrize("path", PATHS[:3])
async def test_loading_and_unloading_is_no_agents_turn(agents: House, path: str) -> None:
    agents.add("on", MARK, always=True, arguments=ARGUMENTS)
    agents.ollama.answers(done("", done_reason="load").strip(), kind="application/json")
    rests: list[dict[str, Any]] = [
        {},
        {"messages": []},
        {"messages": None, "keep_alive": 0, "stream": True},
    ]

    async with agents.open(presets=PRESETS) as client:
        for rest in rests:
            body, headers = {"model": "p", **rest}, {"x-osp-agents": "/a"}
            answer = await client.post(path, json=body, headers=headers)
            assert answer.content == done("", done_reason="load").strip()
            assert "x-osp-agents" not in answer.headers and agents.ollama.asked[-1].json == body
