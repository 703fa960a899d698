"""Activation: the four ways to ask for agents, how they meet, and what is always on.

A header, a suffix of the model, a preset and what is typed; each agent here leaves its mark behind
the prompt, so that the prompt which the model got says who ran, in which order, with what.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import FakeOllama, done, running, said, turn, write_agent

CHATS = ["/api/chat", "/v1/chat/completions"]
MARK = """
class Mark(BaseAgent):
    '''Leaves a mark.'''

    async def on_request(self, payload):
        v, n = self.arguments["v"], self.arguments["n"]
        return set_prompt(payload, f"{prompt(payload)} NAME={v}{n}")
"""
FILLS = """
class Fills(BaseAgent):
    async def on_request(self, payload):
        return set_prompt(payload, "filled")
"""
PRESETS = {
    "p": {"model": "m", "agents": "/c:from-preset"},
    "two": {"model": "m", "agents": "/c /d"},
    "again": {"model": "m", "agents": "/a:from-preset /b:n=3"},
    "hidden": {"model": "m", "agents": "/secret"},
    "unknown": {"model": "m", "agents": "/a /nope"},
    "wrong": {"model": "m", "agents": "/a:n=many"},
    "joined": {"model": "m", "agents": "/a&/b:n=many"},
    "broken": {"model": "m", "agents": "/broken"},
    "off": {"model": "m", "agents": "/a /off"},
}


def write_mark(folder: Path, name: str, **config: Any) -> Path:
    code = MARK.replace("NAME", name)
    return write_agent(folder, name, code, arguments={"v": "", "n": 0}, **config)


@pytest.fixture
def agents(plugins: Path) -> Path:
    for name in "abcd":
        write_mark(plugins, name)
    write_mark(plugins, "secret", typed=False)
    write_mark(plugins, "off", enabled=False)
    write_agent(plugins, "broken", "raise RuntimeError('key 4711')")
    return plugins


async def ask(
    client: httpx.AsyncClient, text: str, model: str = "m", header: str | None = None, **more: Any
) -> httpx.Response:
    headers = {} if header is None else {"X-OSP-Agents": header}
    path = more.pop("path", "/api/chat")
    return await client.post(path, json=turn(text, **more) | {"model": model}, headers=headers)


def prompts(ollama: FakeOllama) -> list[str]:
    return [asked.json["messages"][-1]["content"] for asked in ollama.asked]


def message(answer: httpx.Response) -> str:
    """Return the text of an error, in either dialect."""
    error = answer.json()["error"]
    return str(error if isinstance(error, str) else error["message"])


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("stream", [True, False])
async def test_header_suffix_preset_and_prompt_run_in_this_order(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str, stream: bool
) -> None:
    ollama.answers(done("ok"))

    async with running(ollama_url, agents, presets=PRESETS) as client:
        answer = await ask(client, "/a:t x", "again+b:s", "/d:h /c", path=path, stream=stream)
        await ask(client, "/d:t /a x", "p+b:s", header="/secret:h", path=path, stream=stream)

    assert prompts(ollama) == ["x d=h0 c=0 b=3 a=t0", "x secret=h0 b=s0 c=from-preset0 d=t0 a=0"]
    assert [asked.json["model"] for asked in ollama.asked] == ["m", "m"]
    names = [part.split(";")[0] for part in answer.headers["x-osp-agents"].split(", ")]
    assert names == ["d", "c", "b", "a"]


async def test_an_agent_named_twice_runs_once_at_its_first_place_with_its_last_arguments(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(done("ok"))
    asked: list[tuple[str, str, str | None, str]] = [
        ("/a:1 /b /a:2 x", "m", None, "x a=20 b=0"),
        ("/b /A:t x", "m+a:s", "/a:h", "x a=t0 b=0"),
        ("/a x", "m", "/a:h /b", "x a=0 b=0"),  # the last arguments are none
        ("/b:t x", "again", "/b:h", "x b=t0 a=from-preset0"),
        ("x", "again+a:s", None, "x a=from-preset0 b=3"),
        ("/c:t,n=5 /a x", "two", "/d", "x d=0 c=t5 a=0"),
        ("/a /b&/a:2 x", "m", None, "x a=20 b=0"),
        ("/b /a /c&/a:2 x", "m", None, "x b=0 a=20 c=0"),  # joined where it does not run
    ]

    async with running(ollama_url, agents, presets=PRESETS) as client:
        for text, model, header, _ in asked:
            await ask(client, text, model, header)

    assert prompts(ollama) == [sent for *_, sent in asked]


WRONG: list[tuple[str, str | None, str]] = [
    ("m", "/nope", "X-OSP-Agents: '/nope' is no known agent; known are: /a, /b, /broken, /c,"),
    ("m", "a", "X-OSP-Agents: 'a' is no known agent"),
    ("m", "/a hello", "X-OSP-Agents: 'hello' is no known agent"),
    ("m", "//a", "X-OSP-Agents: '/a' is no known agent"),
    ("m", "/help", "X-OSP-Agents: '/help' is no known agent"),
    ("m+nope", None, "the model's suffix: '/nope' is no known agent; known are: /a, /b,"),
    ("m+a+", None, "the model's suffix: '/' is no known agent"),
    ("m+", None, "the model's suffix: '/' is no known agent"),
    ("unknown", None, "the preset unknown: '/nope' is no known agent; known are: /a, /b,"),
    ("m", "/a:n=many", "a: n must be a whole number, not 'many'"),
    ("m+a:n=many", None, "a: n must be a whole number, not 'many'"),
    ("wrong", None, "a: n must be a whole number, not 'many'"),
    ("m", "/b /a:colour=red", "a: 'colour=red' is no argument here; known are: v, n"),
    ("joined", "/b", "b: n must be a whole number, not 'many'"),
    ("m+broken", None, "the agent broken failed to load: RuntimeError at "),
    ("broken", None, "the agent broken failed to load: RuntimeError at "),
    ("off", None, "the agent off is disabled by the operator"),
    ("m", "/a /off", "the agent off is disabled by the operator"),
]


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("stream", [True, False])
async def test_what_a_program_asks_for_wrongly_is_a_400_that_says_what_is_right(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str, stream: bool
) -> None:
    ollama.answers(done("ok"))

    async with running(ollama_url, agents, presets=PRESETS) as client:
        for model, header, complaint in WRONG:
            answer = await ask(client, "x", model, header, path=path, stream=stream)

            assert answer.status_code == 400, (model, header)
            assert message(answer).startswith(complaint) and "4711" not in answer.text

    assert ollama.asked == []


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("stream", [True, False])
async def test_what_a_person_types_wrongly_is_an_answer_even_beside_a_preset(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str, stream: bool
) -> None:
    answers = {
        "/b:n=many x": "b: n must be a whole number, not 'many'\n\n/b: Leaves a mark.",
        "/a:n=many x": "a: n must be a whole number, not 'many'\n\n/a: Leaves a mark.",
        "/off x": "the agent off is disabled by the operator",
        "/broken x": "the agent broken failed to load: RuntimeError at ",
    }

    async with running(ollama_url, agents, presets=PRESETS) as client:
        for text, expected in answers.items():
            answer = await ask(client, text, "again", path=path, stream=stream)

            assert answer.status_code == 200 and said(answer.content).startswith(expected)

    assert ollama.asked == []


async def test_an_agent_that_is_not_for_typing_is_text_in_a_prompt(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(done("ok"))
    body = b'{ "model":"m","messages":[{"role":"user","content":"/secret:1 x"}]}'

    async with running(ollama_url, agents, presets=PRESETS) as client:
        await client.post("/api/chat", content=body)
        for text, model, header in (
            ("x", "m", "/secret:h"),
            ("x", "m+secret:s", None),
            ("/secret x", "hidden", None),
            ("/a /secret x", "m", None),
            ("//secret x", "m", "/secret"),
        ):
            await ask(client, text, model, header)
        listed = said((await ask(client, "/help")).content)

    assert ollama.asked[0].body == body
    expected = ["x secret=h0", "x secret=s0", "/secret x secret=0", "/secret x a=0"]
    assert prompts(ollama)[1:] == [*expected, "//secret x secret=0"]
    assert "/secret: Leaves a mark. (by header, model suffix or preset only)" in listed


@pytest.mark.parametrize(("prefix", "typed"), [("!", "!a:t "), ("::", "::a:t "), ("", "")])
async def test_header_suffix_and_preset_are_spelt_with_a_slash_whatever_is_typed(
    ollama: FakeOllama, ollama_url: str, agents: Path, prefix: str, typed: str
) -> None:
    ollama.answers(done("ok"))

    async with running(ollama_url, agents, presets=PRESETS, commands={"prefix": prefix}) as client:
        await ask(client, f"{typed}/b x", "p+b:s", "/d:h")
        for text in ("/help", "/a x", "//a x"):
            await ask(client, text)
        refused = await ask(client, "x", header=f"{prefix or '+'}a")

    first = "/b x d=h0 b=s0 c=from-preset0" + (" a=t0" if typed else "")
    assert prompts(ollama) == [first, "/help", "/a x", "//a x"]
    assert refused.status_code == 400


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("stream", [True, False])
async def test_help_is_the_proxys_also_with_another_sign(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str, stream: bool
) -> None:
    async with running(ollama_url, agents, commands={"prefix": "!"}) as client:
        helped = [
            said((await ask(client, text, path=path, stream=stream)).content)
            for text in ("!help", " !HELP !b\n", "!help B", "!help off")
        ]

    assert "!a: Leaves a mark.\n    v=''\n    n=0\n!b: " in helped[0]
    assert helped[1] == helped[2] == "!b: Leaves a mark.\n    v=''\n    n=0"
    assert helped[3] == "!off: is disabled by the operator"
    assert ollama.asked == []


@pytest.mark.parametrize("path", CHATS)
async def test_help_is_the_proxys_also_where_header_suffix_or_preset_ask_for_agents(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str
) -> None:
    ollama.answers(done("ok"))

    async with running(ollama_url, agents, presets=PRESETS) as client:
        for model, header in (("p", None), ("m+a", None), ("m", "/a"), ("m", "")):
            answer = await ask(client, "/help b", model, header, path=path)

            assert said(answer.content).startswith("/b: Leaves a mark."), (model, header)

    assert ollama.asked == []


@pytest.mark.parametrize("path", CHATS)
async def test_no_prompt_at_all_is_answered_with_the_first_agents_help(
    ollama: FakeOllama, ollama_url: str, plugins: Path, path: str
) -> None:
    for name in ("first", "second"):
        about = f"Is {name}."
        write_agent(plugins, name, "class Idle(BaseAgent):\n    pass", description=about)
    presets = {"p": {"model": "m", "agents": "/first"}}

    async with running(ollama_url, plugins, presets=presets) as client:
        helped = [
            await ask(client, "/second", "p", path=path),
            await ask(client, "  ", "m+first", path=path),
            await ask(client, "/second ", "p", "/second", path=path),
            await ask(client, "/first&/second\n", path=path),
            await ask(client, "", "p", path=path, stream=True),
        ]

    names = [said(answer.content).split(":")[0] for answer in helped]
    assert names == ["/first", "/first", "/second", "/first", "/first"]
    assert ollama.asked == []


async def test_an_image_or_what_an_agent_fills_in_is_prompt_enough(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    write_agent(agents, "fills", FILLS)
    write_agent(agents, "idle", "class Idle(BaseAgent):\n    pass")
    ollama.answers(done("ok"))
    image = {"role": "user", "content": "/idle", "images": ["AAAA"]}
    parts = [{"type": "text", "text": "/idle"}, {"type": "image_url", "image_url": "data:,"}]

    async with running(ollama_url, agents) as client:
        await ask(client, "/fills")
        await client.post("/api/chat", json={"model": "m", "messages": [image]})
        part = {"role": "user", "content": parts}
        await client.post("/v1/chat/completions", json={"model": "m", "messages": [part]})

    assert prompts(ollama) == ["filled", "", [{"type": "text", "text": ""}, parts[1]]]


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("stream", [True, False])
async def test_what_is_always_on_runs_by_priority_then_by_name_and_keeps_its_place(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str, stream: bool
) -> None:
    for name, priority in (("late", 5), ("zeta", 0), ("eta", 0), ("early", -0.5)):
        write_mark(agents, name, always=True, priority=priority)
    write_mark(agents, "sleeps", always=True, enabled=False)
    write_agent(agents, "fails", "raise RuntimeError", always=True)
    ollama.answers(done("ok"))

    async with running(ollama_url, agents, presets=PRESETS) as client:
        await ask(client, "x", path=path, stream=stream)
        await ask(client, "/b /late:t x", "p+eta:s", "/late:h", path=path, stream=stream)

    assert prompts(ollama) == [
        "x early=0 eta=0 zeta=0 late=0",
        "x early=0 eta=s0 zeta=0 late=t0 c=from-preset0 b=0",
    ]


async def test_models_of_an_always_on_agent_are_meant_however_they_are_spelt(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write_mark(plugins, "plain", always=True, models=["Llama3.2"])
    full = "registry.ollama.ai/library/llama3.2:latest"
    write_mark(plugins, "tagged", always=True, models=[full])
    write_mark(plugins, "any", always=True, models=["*LLAMA*:*b", "hf.co/*"])
    ollama.answers(done("ok"))
    meant = {
        "llama3.2": "plain",
        "LLAMA3.2:Latest": "plain",
        "library/llama3.2": "plain",
        "Registry.Ollama.ai/library/llama3.2:latest": "plain",
        "https://registry.ollama.ai/library/llama3.2": "plain",
        "llama3.2:3B": "any",
        "me/codellama:7b": "any",
        "HF.co/me/x:Q4": "any",
        "me/llama3.2": "",
        "llama3": "",
        "fast": "plain",
        "fast+plain:s": "plain",
        "llama3.2+tagged": "plain",
    }
    presets = {"fast": {"model": "Llama3.2:latest"}, "llama3": {"model": "other"}}

    async with running(ollama_url, plugins, presets=presets) as client:
        for model in meant:
            await ask(client, "x", model)

    ran = [[mark.split("=")[0] for mark in sent.split()[1:]] for sent in prompts(ollama)]
    both = ["plain", "tagged"]
    assert ran == [both if names == "plain" else names.split() for names in meant.values()]


@pytest.mark.parametrize("path", CHATS)
async def test_what_asks_for_agents_is_taken_off_a_request_that_loads_or_unloads(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str
) -> None:
    write_mark(agents, "on", always=True)
    loaded = done("", done_reason="load").strip()
    ollama.answers(loaded, kind="application/json; charset=utf-8")
    rests: list[dict[str, Any]] = [
        {},
        {"messages": []},
        {"messages": None, "keep_alive": "0s"},
        {"keep_alive": 0, "messages": [], "stream": True, "options": None},
    ]
    headers = {"X-OSP-Agents": "/a"}

    async with running(ollama_url, agents, presets=PRESETS) as client:
        for rest in rests:
            for model in ("m+a:s+b", "p", "p+a", "m"):
                answer = await client.post(path, json={"model": model} | rest, headers=headers)
                assert answer.content == loaded and "x-osp-agents" not in answer.headers

    sent = [{"model": "m"} | rest for rest in rests for _ in range(4)]
    assert [asked.json for asked in ollama.asked] == sent
    assert not any(name == "x-osp-agents" for asked in ollama.asked for name, _ in asked.headers)


@pytest.mark.parametrize("path", CHATS)
async def test_an_empty_header_asks_for_nobody_and_goes_no_further(
    ollama: FakeOllama, ollama_url: str, agents: Path, path: str
) -> None:
    ollama.answers(done("ok"))

    async with running(ollama_url, agents) as client:
        answer = await ask(client, "x", header="", path=path)

    assert prompts(ollama) == ["x"] and answer.content == done("ok")
    assert not [name for name, _ in ollama.asked[0].headers if name == "x-osp-agents"]


async def test_header_and_suffix_know_names_in_any_case_and_values_in_quotes(
    ollama: FakeOllama, ollama_url: str, agents: Path
) -> None:
    ollama.answers(done("ok"))

    async with running(ollama_url, agents) as client:
        await ask(client, "x", "m:1b+A:n=2+B", '/C:v="two words",n=4')
        await ask(client, "x", header="/a:1&/b:2\t/c")

    assert prompts(ollama) == ["x c=two words4 a=2 b=0", "x c=0"]
    assert ollama.asked[0].json["model"] == "m:1b"
