"""/explain: what the model would have been sent, agent by agent; the model is not asked."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.slices.test_chain import ANSWER, PATHS, TAG, write
from tests.slices.test_parallel import PLAIN, House, housed, message, outcomes, write_hook
from tests.support import FakeOllama, done, running, said, turn, write_agent

LONG = "aGk=" * 2000  # an image, as the wire has it


@pytest.fixture
def ollama() -> FakeOllama:
    fake = FakeOllama()
    fake.answers(done("y"))
    return fake


async def ask(url: str, plugins: Path, body: dict[str, Any], path: str = PATHS[0]) -> Any:
    """Send one chat through a proxy of its own with the agents in `plugins`."""
    async with running(url, plugins) as client:
        return await client.post(path, json=body)


CHANGES = [
    ("del payload['messages'][0]", ["- [user] one"]),
    ("payload['messages'].pop(1)", ["- [assistant] two"]),
    ("payload['model'] = 'other'", ['- model: "demo"', '+ model: "other"']),
    ("payload['options'] = {'seed': 1}", ['+ options: {"seed": 1}']),
    ("set_prompt(payload, 'y\\nz')", ["- [user] x", "+ [user] y", "+ z"]),
    ("add_context(payload, 'found')", ["- [user] x", "+ [user] found", "+ ", "+ x"]),
    ("payload['messages'][2]['images'] = ['aGk=']", ['+     images: ["aGk="]']),
    ("set_prompt(payload, '@@ x @@')", ["- [user] x", "+ [user] @@ x @@"]),
    ("set_prompt(payload, '')", ["- [user] x", "+ [user] "]),
    ("pass", ["changed nothing"]),
]
ODDITIES = [
    ("payload['messages'][-1]['content'] = 5", "[user] 5"),
    ("payload['messages'][-1]['content'] = ['x']", "x"),
    ("payload['messages'][-1]['content'] = [{'type': 'text', 'text': 5}]", "5"),
    ("del payload['model']", '- model: "demo"'),
    ("payload['model'] = None", '- model: "demo"'),
    ("del payload['messages'][-1]['role']", "[user] x"),
    ("payload['format'] = 'json'", '+ format: "json"'),
    ("payload['tools'] = [{'type': 'function'}]", "+ tools:"),
]


@pytest.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    """The agents that many tests below share, and all of `CHANGES` and `ODDITIES`."""
    plugins = tmp_path_factory.mktemp("explain") / "plugins"
    for number, (code, _) in enumerate(CHANGES):
        write_hook(plugins, f"change{number}", code)
    for number, (code, _) in enumerate(ODDITIES):
        write_hook(plugins, f"odd{number}", code)
    write(plugins, PLAIN, "a", "b")
    write(plugins, TAG, "tag")
    write(plugins, ANSWER, "shout")
    write_hook(plugins, "note", "add_system(payload, 'be brief')")
    presets = {
        "both": {"model": "demo", "agents": "/a /b"},
        "why": {"model": "demo", "agents": "/explain /a /b"},
    }
    async with housed(plugins, presets=presets) as house:
        yield house


def explained(answer: httpx.Response) -> str:
    """Return what the answer says, its times as N."""
    assert answer.status_code == 200, answer.text
    return re.sub(r"\d+ ms", "N ms", said(answer.content))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream": False}])
async def test_each_agents_changes_are_shown_and_the_model_is_not_asked(
    house: House, path: str, fields: dict[str, Any]
) -> None:
    stream = f"\nstream: {json.dumps(fields['stream'])}" if fields else ""

    answer = await house.ask(turn("/explain /note /tag x", **fields), path)

    assert explained(answer) == (
        "/note (ok, N ms)\n+ [system] be brief\n\n"
        "/tag (ok, N ms)\n- [user] x\n+ [user] x <tag\n\n"
        f'The model would have been sent:\n[system] be brief\n[user] x <tag\nmodel: "demo"{stream}'
    )
    assert house.ollama.asked == []
    assert outcomes(answer) == ["note;ok", "tag;ok"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_it_comes_as_an_answer_of_the_dialect(house: House, path: str, stream: bool) -> None:
    answer = await house.ask(turn("/explain /a x", stream=stream), path)

    kinds = {PATHS[0]: "application/x-ndjson", PATHS[1]: "text/event-stream"}
    kind = kinds[path] if stream else "application/json"
    assert answer.headers["content-type"].startswith(kind)


@pytest.mark.parametrize("number", range(len(CHANGES)))
async def test_additions_and_removals_stand_behind_their_sign(house: House, number: int) -> None:
    last = message("user", f"/explain /change{number} x")
    talk = [message("user", "one"), message("assistant", "two"), last]

    answer = await house.ask(turn("") | {"messages": talk})

    first, *_ = explained(answer).split("\n\nThe model would have been sent:")
    assert first.split("\n") == [f"/change{number} (ok, N ms)", *CHANGES[number][1]]
    assert house.ollama.asked == []


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("number", range(len(ODDITIES)))
async def test_what_an_agent_makes_of_a_request_is_explained_however_odd(
    house: House, path: str, number: int
) -> None:
    """Perhaps as its failure; but the request does not break, and it is the client who asks."""
    answer = await house.ask(turn(f"/explain /odd{number} /note x"), path)

    text = explained(answer)
    assert "/note (ok, N ms)\n+ [system] be brief" in text
    assert ODDITIES[number][1] in text or f"/odd{number} (error" in text
    assert house.ollama.asked == []


async def test_of_a_group_each_members_part_is_shown_and_then_what_was_merged(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write(plugins, PLAIN, "a")
    write_hook(plugins, "b", "add_system(payload, 'b')")
    write_hook(plugins, "bad", "payload['model'] = 'other'")
    write(plugins, TAG, "tag")

    answer = await ask(ollama_url, plugins, turn("/explain /a&/b&/bad /tag x"))

    text, _, notice = explained(answer).partition("\n\n[without")
    assert text == (
        "/a (ok, N ms)\n- [user] x\n+ [user] a\n+ \n+ x\n\n"
        "/b (ok, N ms)\n+ [system] b\n\n"
        "/bad (error, N ms)\nchanged nothing\n\n"
        "/tag (ok, N ms)\n- x\n+ x <tag\n\n"
        'The model would have been sent:\n[system] b\n[user] a\n\nx <tag\nmodel: "demo"'
    )
    assert notice.startswith(" bad: it failed") and ollama.asked == []


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("raise ValueError('secret')", "error"),
        ("return None", "error"),
        ("await asyncio.Event().wait()", "timeout"),
    ],
)
async def test_a_failure_is_shown_without_its_text(
    ollama: FakeOllama, ollama_url: str, plugins: Path, code: str, outcome: str
) -> None:
    write_hook(plugins, "bad", code, timeout=0.1)
    write(plugins, PLAIN, "a")

    answer = await ask(ollama_url, plugins, turn("/explain /bad /a x"))

    text = explained(answer)
    assert text.startswith(f"/bad ({outcome}, N ms)\nchanged nothing\n\n/a (ok, N ms)\n")
    assert "secret" not in text and text.endswith(
        "[without bad: it failed, the proxy's log says why]"
    )
    assert outcomes(answer) == [f"bad;{outcome}", "a;ok"] and ollama.asked == []


@pytest.mark.parametrize("path", PATHS)
async def test_a_reply_is_what_the_answer_would_have_been(
    ollama: FakeOllama, ollama_url: str, plugins: Path, path: str
) -> None:
    write(plugins, PLAIN, "a", "later")
    write_hook(plugins, "knows", "raise Reply('known: ' + prompt(payload))")

    answer = await ask(ollama_url, plugins, turn("/explain /a /knows /later x"), path)

    parts = explained(answer).split("\n\nThe model would not have been asked.")
    assert parts[0].startswith("/a (ok, N ms)\n") and "/later" not in parts[0]
    assert parts[1] == " The answer would have been:\nknown: a\n\nx"
    assert ollama.asked == []


@pytest.mark.parametrize(
    ("code", "config", "status"),
    [
        ("raise Abort(403, 'not here')", {}, 403),
        ("raise ValueError", {"on_error": "abort"}, 500),
    ],
)
async def test_what_would_have_been_refused_is_refused(
    ollama: FakeOllama,
    ollama_url: str,
    plugins: Path,
    code: str,
    config: dict[str, Any],
    status: int,
) -> None:
    write_hook(plugins, "ends", code, **config)

    answer = await ask(ollama_url, plugins, turn("/explain /ends x"))

    assert answer.status_code == status and ollama.asked == []


async def test_response_hooks_see_nothing_of_an_explanation(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write(plugins, ANSWER, "shout")
    write(plugins, ANSWER, "on", always=True)
    code = PLAIN + "\n    async def on_end(self):\n        return 'END'\n"
    write(plugins, code, "both")

    answer = await ask(ollama_url, plugins, turn("/explain /both /shout x", stream=True))

    assert explained(answer).endswith('x\nmodel: "demo"\nstream: true')
    assert ollama.asked == []


@pytest.mark.parametrize("typed", ["/explain /a x", "/explain /a&/on x", "/explain /on /a x"])
async def test_agents_that_are_always_on_are_explained_at_their_place(
    ollama: FakeOllama, ollama_url: str, plugins: Path, typed: str
) -> None:
    write(plugins, PLAIN, "a")
    write_hook(plugins, "on", "add_system(payload, 'on')", always=True)

    answer = await ask(ollama_url, plugins, turn(typed))

    assert explained(answer).startswith("/on (ok, N ms)\n+ [system] on\n\n/a (ok, N ms)\n")
    assert ollama.asked == []


@pytest.mark.parametrize(
    ("model", "header", "typed"),
    [
        ("demo", "/explain /a /b", "x"),
        ("demo", "/Explain\t/a /b", "x"),
        ("demo", "/explain /a", "/b x"),
        ("demo", "/a", "/explain /b x"),
        ("demo+explain+a+b", "", "x"),
        ("demo+a", "", "/EXPLAIN /b x"),
        ("both", "", "/explain /b x"),
        ("why", "", "x"),
        ("demo", "", " \n/explain\n/a /b x"),
    ],
)
async def test_it_may_be_asked_for_wherever_agents_are(
    house: House, model: str, header: str, typed: str
) -> None:
    headers = {"x-osp-agents": header} if header else {}

    answer = await house.ask(turn(typed) | {"model": model}, **headers)

    assert outcomes(answer) == ["a;ok", "b;ok"]
    sent = 'The model would have been sent:\n[user] b\n\na\n\nx\nmodel: "demo"'
    assert explained(answer).endswith(sent) and house.ollama.asked == []


async def test_another_prefix_is_before_it_too(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write(plugins, PLAIN, "a")

    async with running(ollama_url, plugins, commands={"prefix": "!"}) as client:
        answers = [
            await client.post(PATHS[0], json=turn(f"{sign}explain {sign}a x")) for sign in "!/"
        ]

    assert "a (ok, N ms)" in explained(answers[0]) and explained(answers[1]) == "y"
    assert [asked.json for asked in ollama.asked] == [turn("/explain /a x")]


@pytest.mark.parametrize(
    "typed",
    [
        "/explain",
        "/explain ",
        "/explain why the sky is blue",
        "/explain /etc/passwd",
        "/explain /nope x",
        "/explain /nope&/a x",
        "/explain /a&/nope x",
        "/explain /a, x",
        "/explain/a x",
        "/explain&/a x",
        "/explain:1 /a x",
        "/explainer /a x",
        "explain /a x",
        "why /explain /a x",
    ],
)
@pytest.mark.parametrize("path", PATHS)
async def test_before_plain_text_it_is_text_and_passes_untouched(
    house: House, path: str, typed: str
) -> None:
    body = b'{"messages" : [{"content": %s, "role": "user"}], "model": "demo"}'
    body %= json.dumps(typed).encode()
    house.ollama.asked.clear()

    await house.client.post(path, content=body)

    assert house.ollama.asked[0].body == body


@pytest.mark.parametrize("header", ["/explain", "/a /explain"])
async def test_alone_in_a_header_it_is_no_agent(house: House, header: str) -> None:
    headers = {"x-osp-agents": header}

    answer = await house.ask(turn("x"), **headers)

    assert answer.status_code == 400 and "/explain" in answer.text
    assert house.ollama.asked == []


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (PATHS[0], {"format": "json"}),
        (PATHS[0], {"format": {"type": "object"}, "stream": False}),
        (PATHS[0], {"tools": [{"type": "function"}]}),
        (PATHS[1], {"tools": [{"type": "function"}], "stream": True}),
        (PATHS[1], {"response_format": {"type": "json_object"}}),
    ],
)
async def test_where_prose_would_be_no_answer_it_is_a_400(
    house: House, path: str, fields: dict[str, Any]
) -> None:
    answer = await house.ask(turn("/explain /a x", **fields), path)

    assert answer.status_code == 400
    assert isinstance(answer.json()["error"], str if path == PATHS[0] else dict)
    assert house.ollama.asked == []


async def test_it_is_taken_out_of_the_history_with_its_commands(house: House) -> None:
    asked = ["/explain /a&/b one", "/explain two", "three"]

    await house.ask(turn("") | {"messages": [message("user", text) for text in asked]})

    texts = [said["content"] for said in house.ollama.asked[0].json["messages"]]
    assert texts == ["one", "/explain two", "three"]


@pytest.mark.parametrize("path", PATHS)
async def test_no_command_is_part_of_what_would_be_sent(
    ollama: FakeOllama, ollama_url: str, plugins: Path, path: str
) -> None:
    write_hook(plugins, "it", "pass", arguments={"k": 1})
    talk = [message("user", "/it:2 one"), message("user", '/explain /it:"3" two')]

    answer = await ask(ollama_url, plugins, turn("") | {"messages": talk}, path)

    _, sent = explained(answer).split("The model would have been sent:\n")
    assert sent == '[user] one\n[user] two\nmodel: "demo"'


@pytest.mark.parametrize(
    ("path", "user"),
    [
        (PATHS[0], {"content": "/explain /a x", "images": [LONG]}),
        (
            PATHS[1],
            {
                "content": [
                    {"type": "text", "text": "/explain /a x"},
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{LONG}"}},
                ]
            },
        ),
    ],
)
async def test_images_are_shortened(house: House, path: str, user: dict[str, Any]) -> None:
    answer = await house.ask(turn("") | {"messages": [{"role": "user", **user}]}, path)

    text = explained(answer)
    assert "aGk=aGk=" in text and len(text) < 1000
    assert re.search(r"\.\.\. \(80\d\d characters\)", text) and house.ollama.asked == []


async def test_a_long_text_is_shown_in_full(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write_hook(plugins, "it", "add_system(payload, 'word ' * 2000)")

    answer = await ask(ollama_url, plugins, turn("/explain /it x"))

    assert explained(answer).count("word ") == 4000


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        ("/explain /a:many x", "a: k must be a whole number, not 'many'"),
        ("/explain /broken x", "the agent broken failed to load: RuntimeError at "),
        ("/explain /a /off x", "the agent off is disabled by the operator"),
    ],
)
async def test_a_command_that_cannot_be_obeyed_says_why_and_no_more(
    ollama: FakeOllama, ollama_url: str, plugins: Path, typed: str, why: str
) -> None:
    write(plugins, PLAIN, "a", arguments={"k": 1})
    write_agent(plugins, "broken", "raise RuntimeError('secret')")
    write(plugins, PLAIN, "off", enabled=False)

    answer = await ask(ollama_url, plugins, turn(typed))

    assert explained(answer).startswith(why) and "secret" not in answer.text
    assert "would have been sent" not in answer.text and ollama.asked == []


async def test_an_agent_without_a_request_hook_changes_nothing(house: House) -> None:
    answer = await house.ask(turn("/explain /shout x"))

    assert explained(answer) == 'The model would have been sent:\n[user] x\nmodel: "demo"'
    assert house.ollama.asked == []


async def test_what_an_agent_asks_of_the_model_it_asks(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    """The agents run as ever; it is the user's question that goes nowhere."""
    code = "add_context(payload, await self.context.chat([{'role': 'user', 'content': 'aside'}]))"
    write_hook(plugins, "asks", code)
    ollama.answers(done("found"), kind="application/json")

    answer = await ask(ollama_url, plugins, turn("/explain /asks x"))

    assert "+ [user] found" in explained(answer)
    assert [asked.json["messages"][0]["content"] for asked in ollama.asked] == ["aside"]
