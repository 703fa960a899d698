"""Agents at the same time: what can be merged, and what a member may not do."""

from __future__ import annotations

import logging

import anyio
import pytest

from tests.support import ADDS, ANSWER, NOTICE, PATHS, House, message, outcomes, parts, said

CHAT, COMPLETIONS, MESSAGES, RESPONSES = PATHS
MEETS = """both = self.context.state.setdefault("both", asyncio.Barrier(2))
await both.wait()
add_context(payload, "NAME")"""
SEES = 'add_context(payload, f"NAME saw {prompt(payload)!r}")'
TALK = [message("system", "s"), "one", message("assistant", "two")]
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize("path", PATHS)
async def test_agents_of_a_group_run_at_the_same_time_and_wrap_the_answer_as_typed(
    house: House, path: str
) -> None:
    """Each waits for the other one; `shout` and `on`, who have no part, do not part them."""
    house.add("a b", MEETS, ANSWER, timeout=3)
    house.add("on", "pass", ANSWER, always=True)
    house.add("shout", response=ANSWER)

    typed = await house.ask(path, "/a&/shout&/on&/b x")
    asked = await house.ask(path, "x", header="/a&/b")

    assert house.sent == [["a\n\nb\n\nx"]] * 2
    assert outcomes(typed) == "on;ok, a;ok, shout;ok, b;ok"
    assert said(typed.content) == "y shout> b> a> on>" and said(asked.content) == "y b> a> on>"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("first", "second", "sent"),
    [
        ("add_system(payload, 'A')", "add_system(payload, 'B')", "A B s one two x"),
        ("add_context(payload, 'A')", "add_context(payload, 'B')", "s one two A||B||x"),
        ("add_context(payload, 'A')", "add_system(payload, 'B')", "B s one two A||x"),
        ("set_prompt(payload, 'A ' + prompt(payload))", "pass", "s one two A_x"),
        ("add_context(add_system(payload, 'A'), 'A')", "pass", "A s one two A||x"),
        ("pass", "pass", "s one two x"),
    ],
)
async def test_what_was_added_is_merged_as_typed(
    house: House, path: str, first: str, second: str, sent: str
) -> None:
    house.add("first", first)
    house.add("second", second)

    answer = await house.ask(path, *TALK, "/first&/second x", temperature=1)

    asked = house.ollama.asked[0].json
    lead = [asked[key] for key in ("system", "instructions") if key in asked]
    texts = " ".join(text.replace(" ", "_") for text in [*lead, *house.sent[0]])
    expected = sent.replace("A B s", "A||B s") if lead else sent
    assert (texts.replace("\n", "|"), asked["temperature"]) == (expected, 1)
    assert outcomes(answer) == "first;ok, second;ok"


@pytest.mark.parametrize("path", PATHS)
async def test_text_is_put_before_what_the_user_typed_and_images_stay(
    house: House, path: str
) -> None:
    house.add("a b", ADDS)
    some, none = parts(path, "c", IMAGE, "x", IMAGE), [IMAGE]
    users = [{"content": some}, {"content": none}] if path != CHAT else [{"images": ["aGk="]}]

    for user in users:
        answer = await house.ask(path, {"role": "user", **user}, header="/a&/b")
        assert outcomes(answer) == "a;ok, b;ok"

    more = parts(path, "c", IMAGE, "a\n\nb\n\nx", IMAGE), parts(path, "a\n\nb\n\n", IMAGE)
    assert house.sent == ([["a\n\nb\n\n"]] if path == CHAT else [[content] for content in more])


CHANGES = [
    "payload['model'] = 'other'",
    "payload['options']['seed'] = 2",
    "payload['tools'] = []",
    "del payload['options']",
    "payload['messages'][1]['content'] = 'A one'",
    "payload['messages'].insert(2, {'role': 'tool', 'content': 'A'})",
    "payload['messages'].insert(0, {'role': 'user', 'content': 'A'})",
    "payload['messages'].append({'role': 'system', 'content': 'A'})",
    "set_prompt(payload, prompt(payload) + ' after')",
    "del payload['messages'][0]",
    "payload['messages'][-1]['images'] = ['aGk=']",
    "payload['messages'][-1]['role'] = 'system'",
    "add_system(payload, 'A')['model'] = 'other'",
]
FAILS = ["raise Reply('mine')", "return None", "await asyncio.Event().wait()"]


@pytest.mark.parametrize("code", CHANGES + FAILS)
async def test_what_cannot_be_merged_is_its_own_failure_and_the_others_stay(
    house: House, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    house.add("bad", code, timeout=0.3)
    house.add("a b", ADDS)

    answer = await house.ask(CHAT, *TALK, "/a&/bad&/b x", options={"seed": 1}, stream=False)

    bad = "timeout" if "wait" in code else "error"
    assert outcomes(answer) == f"a;ok, bad;{bad}, b;ok"
    assert said(answer.content) == "y" + NOTICE.format("bad")
    assert house.sent == [["s", "one", "two", "a\n\nb\n\nx"]]
    assert house.ollama.asked[0].json["options"] == {"seed": 1}
    (fields,) = (vars(r)["fields"] for r in caplog.records if r.message == "agent failed")
    if code in CHANGES:
        assert "agents joined by & may only add system messages" in fields["error"]
    assert ("type a space instead" in fields["error"]) == ("Reply" in code)


WAITS = """self.context.state["inside"] = self.context.state.get("inside", 0) + 1
try:
    await asyncio.Event().wait()
finally:
    self.context.log.info("cancelled")"""
ENDS = """while self.context.state.get("inside", 0) < 2:
    await asyncio.sleep(0)
"""


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("raise Abort(403, 'ends failed')", 403),
        ("raise Reply('secret')", 500),
        ("payload['n'] = 1", 500),
    ],
)
async def test_the_first_that_ends_the_request_cancels_the_others(
    house: House, path: str, how: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    house.add("a c", WAITS)
    house.add("ends", ENDS + how, on_error="abort")
    house.add("later", ADDS, ANSWER)

    answer = await house.ask(path, "/a&/ends&/c /later x")

    with anyio.fail_after(5):
        while [record.message for record in caplog.records].count("cancelled") < 2:
            await anyio.lowlevel.checkpoint()
    assert answer.status_code == status and "ends failed" in answer.text
    assert "secret" not in answer.text and house.sent == []
    assert "ends;" in outcomes(answer) and "later" not in outcomes(answer)


async def test_members_see_what_was_before_the_group_and_who_follows_what_it_made(
    house: House,
) -> None:
    """`shout` only responds, so it joins `c` to nobody."""
    house.add("first", ADDS)
    house.add("a b c", SEES)
    house.add("shout", response=ANSWER)

    await house.ask(CHAT, "/first /a&/b /shout&/c x")

    before = "'first\\n\\nx'"
    merged = f"a saw {before}\n\nb saw {before}\n\nfirst\n\nx"
    assert house.sent == [[f"c saw {merged!r}\n\n{merged}"]]
