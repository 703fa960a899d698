"""Agents at the same time: what `&` means, what can be merged, and what a member may not do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

import demo
from kernel.commands import Command, Grammar
from tests.slices.test_chain import ANSWER, PATHS, SENT, write
from tests.support import FakeOllama, done, running, said, turn, write_agent

GRAMMAR = Grammar("/", {"a", "b", "c", "d"}.__contains__)
NOTICE = "\n\n[without NAME: it failed, the proxy's log says why]"

PLAIN = """
class Plain(BaseAgent):
    async def on_request(self, payload):
        return add_context(payload, "NAME")
"""
SEES = """
class Sees(BaseAgent):
    async def on_request(self, payload):
        return add_context(payload, f"NAME saw {prompt(payload)!r}")
"""
WRAPS = """
class Wraps(BaseAgent):
    async def on_request(self, payload):
        return payload

    async def on_response(self, response):
        return f"{response} NAME>"
"""
MEETS = """
class Meets(BaseAgent):
    async def on_request(self, payload):
        both = self.context.state.setdefault("both", asyncio.Event())
        here = self.context.state.setdefault("here", [])
        here.append(self)
        if len(here) == 2:
            both.set()
        await both.wait()
        return add_context(payload, "NAME")
"""
MEETS_IN_THREADS = """
import threading

class Meets(BaseAgent):
    def on_request(self, payload):
        self.context.state.setdefault("both", threading.Barrier(2)).wait(2)
        return add_context(payload, "NAME")
"""
WAITS = """
class Waits(BaseAgent):
    async def on_request(self, payload):
        self.context.log.info("began")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.context.log.info("cancelled")
            raise
"""


@pytest.fixture
def ollama() -> FakeOllama:
    fake = FakeOllama()
    fake.answers(done("y"))
    return fake


def write_hook(folder: Path, name: str, code: str, **config: Any) -> None:
    """Write an agent whose request hook is one line."""
    head = "class It(BaseAgent):\n    async def on_request(self, payload):\n"
    write_agent(folder, name, f"{head}        {code}\n        return payload\n", **config)


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


@dataclass
class House:
    """A proxy that many tests share, and what stands in for Ollama behind it."""

    client: httpx.AsyncClient
    ollama: FakeOllama

    async def ask(
        self, body: dict[str, Any], path: str = PATHS[0], **headers: str
    ) -> httpx.Response:
        """Send one chat; `ollama` remembers no other."""
        self.ollama.asked.clear()
        return await self.client.post(path, json=body, headers=headers)


@asynccontextmanager
async def housed(plugins: Path, **sections: Any) -> AsyncIterator[House]:
    fake = FakeOllama()
    fake.answers(done("y"))
    async with demo.serve(fake) as url, running(url, plugins, **sections) as client:
        yield House(client, fake)


async def ask(
    url: str, plugins: Path, body: dict[str, Any], path: str = PATHS[0], **headers: str
) -> httpx.Response:
    """Send one chat through a proxy with the agents in `plugins`."""
    spelled = {name.replace("_", "-"): value for name, value in headers.items()}
    async with running(url, plugins) as client:
        return await client.post(path, json=body, headers=spelled)


def outcomes(answer: httpx.Response) -> list[str]:
    """Return what X-OSP-Agents says, without the times."""
    return [said.rpartition(";")[0] for said in answer.headers["x-osp-agents"].split(", ")]


@pytest.mark.parametrize(
    ("text", "commands", "rest"),
    [
        ("/a&/b hi", "a &b", "hi"),
        ("/a:k=1&/b:x hi", "a:k=1 &b:x", "hi"),
        ("/a&/b&/c hi", "a &b &c", "hi"),
        ("/a&/b /c&/d hi", "a &b c &d", "hi"),
        (" \n/A&/B\thi", "a &b", "hi"),
        ('/a:"x"&/b:“y” hi', 'a:"x" &b:“y”', "hi"),
        ("/a:x&y&/b hi", "a:x&y &b", "hi"),
        ("/a:&/b", "a &b", ""),
        ("/a&/b //c hi", "a &b", "/c hi"),
        ("/c /a&/nope hi", "c", "/a&/nope hi"),
        ("//a&/b hi", "", "/a&/b hi"),
    ],
)
def test_a_sign_between_commands_joins_them(text: str, commands: str, rest: str) -> None:
    found, left = GRAMMAR.split(text)

    spelled = [f"{'&' * bool(c.together)}{c.name}:{c.arguments}".rstrip(":") for c in found]
    assert (" ".join(spelled), left) == (commands, rest)


@pytest.mark.parametrize(
    "text",
    [
        "/a& /b hi",
        "/a &/b hi",
        "/a&b hi",
        "/a&&/b hi",
        "/a& hi",
        "/a&",
        "&/a hi",
        "/a&/nope hi",
        "/a&/b&/nope hi",
        "/nope&/a hi",
        "/a&/b, hi",
        "/a&//b hi",
        "/a&/help hi",
    ],
)
def test_what_is_no_group_is_text(text: str) -> None:
    commands, rest = GRAMMAR.split(text)

    assert [command.name for command in commands] == (["a"] if text.startswith("/a &") else [])
    assert rest == text.removeprefix("/a " if commands else "")


def test_a_group_begins_each_command_with_the_prefix() -> None:
    grammar = Grammar("!", {"a", "b"}.__contains__)

    assert grammar.split("!a&!b hi") == ([Command("a"), Command("b", together=("a",))], "hi")
    assert grammar.split("!a&/b hi") == ([], "!a&/b hi")


@pytest.mark.parametrize(("code", "path"), [(MEETS, PATHS[0]), (MEETS_IN_THREADS, PATHS[1])])
async def test_agents_of_a_group_run_at_the_same_time(
    ollama: FakeOllama, ollama_url: str, plugins: Path, code: str, path: str
) -> None:
    """Each waits for the other one, so one after the other would never end."""
    write(plugins, code, "a", "b", timeout=3)

    answer = await ask(ollama_url, plugins, turn("/a&/b x"), path)

    assert outcomes(answer) == ["a;ok", "b;ok"]
    assert ollama.asked[0].json["messages"] == [message("user", "a\n\nb\n\nx")]


@pytest.mark.parametrize(("model", "header"), [("demo", "/a&/b"), ("demo+a&+b", ""), ("both", "")])
async def test_header_suffix_and_preset_have_groups_too(
    ollama: FakeOllama, ollama_url: str, plugins: Path, model: str, header: str
) -> None:
    write(plugins, MEETS, "a", "b", timeout=1)
    presets = {"both": {"model": "demo", "agents": "/a&/b"}}
    headers = {"x-osp-agents": header} if header else {}

    async with running(ollama_url, plugins, presets=presets) as client:
        answer = await client.post(PATHS[0], json=turn("x") | {"model": model}, headers=headers)

    assert answer.status_code == 200, answer.text
    assert outcomes(answer) == ["a;ok", "b;ok"]
    assert ollama.asked[0].json == {"model": "demo", "messages": [message("user", "a\n\nb\n\nx")]}


async def test_a_header_with_an_unknown_member_is_refused(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write(plugins, PLAIN, "a")

    answer = await ask(ollama_url, plugins, turn("x"), x_osp_agents="/a&/nope")

    assert answer.status_code == 400 and "/a&/nope" in answer.text and "/a" in answer.text
    assert ollama.asked == []


async def test_groups_are_taken_out_of_the_history(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write(plugins, PLAIN, "a", "b")
    talk = [message("user", "/a&/b one"), message("assistant", "/a&/b"), message("user", "two")]

    answer = await ask(ollama_url, plugins, turn("") | {"messages": talk})

    texts = [said["content"] for said in ollama.asked[0].json["messages"]]
    assert texts == ["one", "/a&/b", "two"] and "x-osp-agents" not in answer.headers


TALK = [message("system", "s"), message("user", "one"), message("assistant", "two")]
INSERT = "payload['messages'].insert({at}, {{'role': 'tool', 'content': '{text}'}})"
RECALLS = (
    "payload['messages'][3:3] = [{'role': 'user', 'content': 'x'},"
    " {'role': 'assistant', 'content': 'then'}]"
)


MERGES = [
    ("add_system(payload, 'A')", "add_system(payload, 'B')", "A B s one two x"),
    (INSERT.format(at=2, text="A"), INSERT.format(at=2, text="B"), "s one A B two x"),
    (INSERT.format(at=3, text="A"), INSERT.format(at=1, text="B"), "s B one two A x"),
    (INSERT.format(at=4, text="A"), INSERT.format(at=9, text="B"), "s one two x A B"),
    (INSERT.format(at=4, text="A"), "add_system(payload, 'B')", "B s one two x A"),
    ("add_context(payload, 'A')", "add_context(payload, 'B')", "s one two A||B||x"),
    ("add_context(payload, 'A')", "add_system(payload, 'B')", "B s one two A||x"),
    ("set_prompt(payload, 'A ' + prompt(payload))", "pass", "s one two A_x"),
    ("add_context(add_system(payload, 'A'), 'A')", "pass", "A s one two A||x"),
    ("payload['messages'].insert(0, payload['messages'][0])", "pass", "s s one two x"),
    ("payload['messages'] += payload['messages']", "pass", "s one two x s one two x"),
    (RECALLS, "add_context(payload, 'B')", "s one two x then B||x"),
    ("pass", "pass", "s one two x"),
]


@pytest.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    """All agents of `MERGES`, two for each, and all of `FAILURES`."""
    plugins = tmp_path_factory.mktemp("parallel") / "plugins"
    for number, (first, second, _) in enumerate(MERGES):
        write_hook(plugins, f"first{number}", first)
        write_hook(plugins, f"second{number}", second)
    for number, code in enumerate(FAILURES.values()):
        write_hook(plugins, f"bad{number}", code, timeout=0.3)
    write(plugins, PLAIN, "a", "b")
    async with housed(plugins) as house:
        yield house


@pytest.mark.parametrize("number", range(len(MERGES)))
async def test_what_was_added_is_merged_as_typed(house: House, number: int) -> None:
    user = message("user", f"/first{number}&/second{number} x")

    answer = await house.ask(turn("") | {"messages": [*TALK, user], "options": {"seed": 1}})

    sent = house.ollama.asked[0].json
    texts = [said["content"].replace(" ", "_").replace("\n", "|") for said in sent["messages"]]
    assert outcomes(answer) == [f"first{number};ok", f"second{number};ok"]
    assert " ".join(texts) == MERGES[number][2]
    assert sent["options"] == {"seed": 1} and sent["model"] == "demo"


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
PARTS = [{"type": "text", "text": "x"}, IMAGE, {"type": "text", "text": "more"}]


@pytest.mark.parametrize(
    ("path", "user", "expected"),
    [
        (PATHS[0], {"content": "x", "images": ["aGk="]}, {"content": "a\n\nb\n\nx", "images": ["aGk="]}),  # noqa: E501
        (PATHS[0], {"content": "", "images": ["aGk="]}, {"content": "a\n\nb\n\n", "images": ["aGk="]}),  # noqa: E501
        (PATHS[0], {"images": ["aGk="]}, {"images": ["aGk="], "content": "a\n\nb\n\n"}),
        (PATHS[1], {"content": PARTS}, {"content": [{"type": "text", "text": "a\n\nb\n\nx"}, *PARTS[1:]]}),  # noqa: E501
        (PATHS[1], {"content": [IMAGE]}, {"content": [{"type": "text", "text": "a\n\nb\n\n"}, IMAGE]}),  # noqa: E501
        (PATHS[1], {"content": None}, {"content": "a\n\nb\n\n"}),
    ],
)  # fmt: skip
async def test_text_is_put_before_that_of_the_user_and_images_stay(
    ollama: FakeOllama,
    ollama_url: str,
    plugins: Path,
    path: str,
    user: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    write(plugins, PLAIN, "a", "b")
    body = turn("") | {"messages": [{"role": "user", **user}]}

    answer = await ask(ollama_url, plugins, body, path, x_osp_agents="/a&/b")

    assert outcomes(answer) == ["a;ok", "b;ok"]
    assert ollama.asked[0].json["messages"] == [{"role": "user", **expected}]


FAILURES = {
    "the model": "payload['model'] = 'other'",
    "an option": "payload['options']['seed'] = 2",
    "a new field": "payload['tools'] = []",
    "a field less": "del payload['options']",
    "another message": "payload['messages'][1]['content'] = 'changed'",
    "text before another message": "payload['messages'][1]['content'] = 'A one'",
    "text after the prompt": "set_prompt(payload, prompt(payload) + ' after')",
    "another prompt": "set_prompt(payload, 'other')",
    "text around the prompt": "set_prompt(payload, 'A ' + prompt(payload) + ' A')",
    "a message less": "del payload['messages'][0]",
    "another order": "payload['messages'].reverse()",
    "an image": "payload['messages'][-1]['images'] = ['aGk=']",
    "text and an image": "add_context(payload, 'A')['messages'][-1]['images'] = ['aGk=']",
    "a role": "payload['messages'][-1]['role'] = 'system'",
    "an addition and a change": "add_system(payload, 'A')['model'] = 'other'",
    "a number for a text": "payload['messages'][-1]['content'] = 5",
    "a list for a text": "payload['messages'][-1]['content'] = ['x']",
    "a number in parts": "payload['messages'][-1]['content'] = [{'type': 'text', 'text': 5}]",
    "a reply": "raise Reply('mine')",
    "an exception": "raise ValueError('secret')",
    "nothing": "return None",
    "no messages": "return {}",
    "a hang": "await asyncio.Event().wait()",
}


@pytest.mark.parametrize("what", FAILURES)
async def test_what_cannot_be_merged_is_its_own_failure_and_the_others_stay(
    house: House, what: str
) -> None:
    bad = f"bad{list(FAILURES).index(what)}"
    user = message("user", f"/a&/{bad}&/b x")
    fields = {"model": "demo", "options": {"seed": 1}, "stream": False}

    answer = await house.ask({"messages": [*TALK, user], **fields})

    outcome = "timeout" if what == "a hang" else "error"
    assert outcomes(answer) == ["a;ok", f"{bad};{outcome}", "b;ok"]
    sent = [*TALK, message("user", "a\n\nb\n\nx")]
    assert house.ollama.asked[0].json == {"messages": sent, **fields}


@pytest.mark.parametrize(
    ("code", "said_so"),
    [
        (FAILURES["the model"], "changed more than can be merged"),
        (FAILURES["text after the prompt"], "changed more than can be merged"),
        (FAILURES["a reply"], "raised Reply"),
    ],
)
async def test_the_log_says_what_a_member_may_not_do_and_what_to_type(
    ollama_url: str, plugins: Path, code: str, said_so: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_hook(plugins, "bad", code)
    write(plugins, PLAIN, "a")
    body = turn("") | {"messages": [*TALK, message("user", "/a&/bad x")]}

    await ask(ollama_url, plugins, body)

    (fields,) = (r.fields for r in caplog.records if r.message == "agent failed")  # type: ignore[attr-defined]
    assert (fields["agent"], fields["hook"]) == ("bad", "on_request")
    assert said_so in fields["error"] and "type a space instead" in fields["error"]


@pytest.mark.parametrize(("path", "stream"), [(PATHS[0], True), (PATHS[1], False)])
async def test_members_that_failed_are_named_under_the_answer_as_typed(
    demo_url: str, plugins: Path, path: str, stream: bool
) -> None:
    write_hook(plugins, "slow", "await asyncio.Event().wait()", timeout=0.1)
    write_hook(plugins, "bad", "raise Reply('mine')")
    write(plugins, PLAIN, "good")

    answer = await ask(demo_url, plugins, turn("/slow&/good&/bad x", stream=stream), path)

    notice = NOTICE.replace("NAME", "slow, bad")
    assert said(answer.content) == f"{SENT}[user] good\n\nx{notice}"


async def test_a_reply_outside_of_a_group_still_answers(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write_hook(plugins, "knows", "raise Reply('known: ' + prompt(payload))")
    write(plugins, PLAIN, "a", "b")

    answer = await ask(ollama_url, plugins, turn("/a&/b /knows x"))

    assert said(answer.content) == "known: a\n\nb\n\nx" and ollama.asked == []


# Ends the request once two others wait
ONCE_TWO_WAIT = """
class Ends(BaseAgent):
    async def on_request(self, payload):
        while self.context.state.get("inside", 0) < 2:
            await asyncio.sleep(0)
        HOW
"""
INSIDE = WAITS.replace(
    'self.context.log.info("began")',
    'self.context.state["inside"] = self.context.state.get("inside", 0) + 1',
)


@pytest.mark.parametrize(
    ("path", "how", "config", "status", "why"),
    [
        (PATHS[0], "raise Abort(403, 'not here')", {}, 403, "not here"),
        (PATHS[1], "raise Abort(403, 'not here')", {}, 403, "not here"),
        (PATHS[0], "raise ValueError('secret')", {"on_error": "abort"}, 500, "ends failed"),
        (PATHS[1], "raise Reply('secret')", {"on_error": "abort"}, 500, "ends failed"),
        (PATHS[0], "return payload | {'n': 1}", {"on_error": "abort"}, 500, "ends failed"),
    ],
)
async def test_the_first_that_ends_the_request_cancels_the_others(
    ollama: FakeOllama,
    ollama_url: str,
    plugins: Path,
    path: str,
    how: str,
    config: dict[str, Any],
    status: int,
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    write(plugins, INSIDE, "a", "c")
    write_agent(plugins, "ends", ONCE_TWO_WAIT.replace("HOW", how), **config)
    write(plugins, PLAIN, "later")

    async with running(ollama_url, plugins) as client:
        answer = await client.post(path, json=turn("/a&/ends&/c /later x"))
        await logged(caplog, "cancelled", times=2)

    assert (answer.status_code, why in answer.text) == (status, True)
    assert "secret" not in answer.text and ollama.asked == []
    assert ("x-should-retry" in answer.headers) == (status == 500)
    assert any(said.startswith("ends;") for said in outcomes(answer))


async def logged(caplog: pytest.LogCaptureFixture, text: str, times: int = 1) -> None:
    with anyio.fail_after(5):
        while [record.getMessage() for record in caplog.records].count(text) < times:
            await anyio.lowlevel.checkpoint()


async def test_a_client_that_leaves_cancels_all_of_a_group(
    ollama: FakeOllama, ollama_url: str, plugins: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write(plugins, WAITS, "a", "b")

    async with running(ollama_url, plugins) as client:
        asking = asyncio.create_task(client.post(PATHS[0], json=turn("/a&/b x")))
        await logged(caplog, "began", times=2)
        asking.cancel()
        await logged(caplog, "cancelled", times=2)

    assert ollama.asked == []


async def test_who_follows_a_group_sees_what_was_merged_and_its_members_what_was_before(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write(plugins, PLAIN, "first")
    write(plugins, SEES, "a", "b", "last")

    await ask(ollama_url, plugins, turn("/first /a&/b /last x"))

    before = "'first\\n\\nx'"
    merged = f"a saw {before}\n\nb saw {before}\n\nfirst\n\nx"
    expected = f"last saw {merged!r}\n\n{merged}"
    assert ollama.asked[0].json["messages"][0]["content"] == expected


@pytest.mark.parametrize(
    ("typed", "header"),
    [("/a /shout&/b x", ""), ("/a /on&/b x", ""), ("/a /c&/b x", "/c"), ("/c /a /c&/b x", "")],
)
async def test_whose_partner_runs_elsewhere_joins_nobody_else(
    ollama: FakeOllama, ollama_url: str, plugins: Path, typed: str, header: str
) -> None:
    """`shout` only responds, `on` and `c` have run before: `a` and `b` were never joined."""
    write(plugins, PLAIN, "a")
    write(plugins, SEES, "b")
    write(plugins, WRAPS, "c")
    write(plugins, WRAPS, "on", always=True)
    write(plugins, ANSWER, "shout")

    await ask(ollama_url, plugins, turn(typed), **({"x_osp_agents": header} if header else {}))

    sent = ollama.asked[0].json["messages"][0]["content"]
    assert sent == "b saw 'a\\n\\nx'\n\na\n\nx"


@pytest.mark.parametrize(
    "typed", ["/shout&/a&/b x", "/a&/shout&/b x", "/on&/a&/b x", "/a&/on&/b x"]
)
async def test_who_has_no_part_in_a_group_does_not_part_it(
    ollama: FakeOllama, ollama_url: str, plugins: Path, typed: str
) -> None:
    write(plugins, MEETS, "a", "b", timeout=1)
    write(plugins, WRAPS, "on", always=True)
    write(plugins, ANSWER, "shout")

    answer = await ask(ollama_url, plugins, turn(typed))

    assert {"a;ok", "b;ok"} <= set(outcomes(answer))


async def test_an_always_on_agent_in_a_group_keeps_its_place_and_takes_its_arguments(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write(plugins, SEES, "a", "b")
    code = "add_context(payload, f\"on {self.arguments['k']} {self.context.asked}\")"
    write_hook(plugins, "on", code, always=True, arguments={"k": 0})

    answer = await ask(ollama_url, plugins, turn("/a&/on:5&/b x"))

    before = "'on 5 True\\n\\nx'"
    sent = ollama.asked[0].json["messages"][0]["content"]
    assert sent == f"a saw {before}\n\nb saw {before}\n\non 5 True\n\nx"
    assert outcomes(answer) == ["on;ok", "a;ok", "b;ok"]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("/one&/two x", "y one> two>"),
        ("/two&/one x", "y two> one>"),
        ("/mask&/veil x", "y veil> mask>"),
        ("/mask&/veil&/one x", "y one> veil> mask>"),
        ("/mask&/bad&/one x", "y one> mask>" + NOTICE.replace("NAME", "bad")),
    ],
)
async def test_response_hooks_run_as_if_typed_in_sequence(
    ollama_url: str, plugins: Path, typed: str, expected: str
) -> None:
    write(plugins, ANSWER, "one", "two")
    write(plugins, WRAPS, "mask", "veil")
    write(plugins, WRAPS.replace("return payload", "raise Reply('mine')"), "bad")

    answer = await ask(ollama_url, plugins, turn(typed))

    assert said(answer.content) == expected


async def test_a_member_named_twice_runs_once_with_its_last_arguments(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write_hook(plugins, "a", "add_context(payload, self.arguments['w'])", arguments={"w": ""})
    write(plugins, PLAIN, "b")

    answer = await ask(ollama_url, plugins, turn("/a:one&/b&/a:two x"))

    assert outcomes(answer) == ["a;ok", "b;ok"]
    assert ollama.asked[0].json["messages"] == [message("user", "two\n\nb\n\nx")]


async def test_a_wrong_argument_in_a_group_gets_help_and_nobody_runs(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write(plugins, PLAIN, "a")
    write(plugins, PLAIN, "b", arguments={"k": 1})

    answer = await ask(ollama_url, plugins, turn("/a&/b:many x"))

    assert said(answer.content).startswith("b: k must be a whole number, not 'many'\n\n/b:")
    assert ollama.asked == [] and "x-osp-agents" not in answer.headers
