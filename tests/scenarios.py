"""Scenarios: what a model says that calls tools, and what a client should make of it.

A round is what a real Ollama said, in each dialect: names of RECORDED, as one, and the tools that
it calls. Clients tell an answer as one list (`Answer`); how it ended is each client's own word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel.dialects import AnswerState, Dialect
from kernel.editor import FrameSplitter
from kernel.rounds import Rounds
from tests import support
from tests.support import COMPLETIONS, DONE, RESPONSES, FakeOllama, House
from tests.test_recordings import RECORDINGS, raw

Answer = list[Any]  # text, thinking, calls (name, arguments), tokens (read, written), how it ended
Talk = Callable[[str, tuple[str, ...]], Awaitable[list[Answer]]]  # at a URL, of what the user types
SCHEMA = {"type": "object", "properties": {"z": {"type": "string"}}, "required": ["z"]}
OWN, SET = "alarm", "alarm is set"  # the client's own tool, and what it says
AGENTS: dict[str, Any] = {"sky": {"name": "weather"}, "sea": {"name": "tide"}}
AGENTS["home"] = {"name": "heat", "consent": True}
CODE = """
class It(BaseAgent):
    tools = [{}]

    async def on_tool(self, name, arguments):
        return f"{{name}} is {{arguments['z']}}"
"""
ASKS = r"This would be called:\n\n```\n.*\n```\n\nType /yes to do it, or anything else. \(osp:\w+\)"
RECORDED = {
    "think": "think_think",  # with a text
    "thought": "tools_think_thinkcall",  # and a call
    "call": "tools_tag_tagcall",  # behind a text
    "calls": "tools_tag_tagcalls",  # two
}
SIGNS = 'is "30\\" — 雨 ☔\r\n'  # in the place of a word, so that no byte may differ
SEEN, LOOK = f"It {SIGNS}", "Let me look. "
THINK, MUST = "Let me see.", "I must call."
LAST = (SEEN, THINK, "", [7, 8])


def body_of(path: str, said: str, stream: bool) -> bytes:
    """Return what Ollama answers in a round."""
    dialect, way = support.BY_PATH[path], "stream" if stream else "whole"
    kind = dict(zip(support.PATHS, ("chat", "v1chat", "messages", "responses"), strict=True))[path]
    names, _, tools = said.partition(": ")
    recorded = [f"rc_{kind}_{RECORDED[name]}_{way}" for name in names.split()]
    bodies = [raw(RECORDINGS[name]["answer"]["body"]) for name in recorded]
    joint = Rounds(dialect, whole=not stream, unread=lambda: None)
    state, frames = AnswerState({}), list[bytes]()
    for body in bodies:
        if joint.is_complete:
            joint.go_on()
            state.round += 1
        split = FrameSplitter(dialect.end).feed(body) if stream else [body]
        taken = [each for frame in split for each in joint.take(frame)]
        frames += settled(dialect, state, taken)
    frames += settled(dialect, state, joint.finish([*joint.calls.values()]))
    body = b"".join(frames) if len(bodies) > 1 else bodies[0]
    ids = dict.fromkeys(re.findall(rb'"(call_\w{8})"', body))
    for name, tool in zip(ids, tools.split(), strict=True):
        body = re.sub(rb'(%s"[^}]*?"name":")\w' % name, rb"\1" + tool.encode(), body)
    if path == COMPLETIONS and stream:
        read, wrote = 7 * len(bodies), 6 * len(bodies) + 2 * names.split().count("think")
        top = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        usage = {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}
        end = support.dumped({**top, "choices": [], "usage": usage})
        body = body.replace(DONE, b"data: " + end + b"\n" + DONE)
    return body.replace(b"is.", json.dumps(SIGNS, ensure_ascii=False)[1:-1].encode())


def settled(dialect: Dialect, state: AnswerState, frames: list[bytes]) -> Iterator[bytes]:
    """Yield frames of several rounds as those of one answer."""
    for frame in frames:
        chunk = dialect.parse(frame)
        changed = False if chunk is None else dialect.settle(chunk, state)
        if changed is not None:
            yield dialect.edit(frame, chunk) if chunk and changed else frame


@dataclass(frozen=True)
class Scenario:
    """What the user types, and what comes of it."""

    prompts: tuple[str, ...]
    rounds: tuple[str, ...]
    results: tuple[str, ...]  # of tools, that stand in each request to the model
    answers: tuple[tuple[str, str, str, list[int]], ...]  # with "?" for a question, z for a call

    async def play(self, house: House, path: str, stream: bool, talk: Talk) -> list[Answer]:
        """Return what a client is told that talks to the proxy."""
        self.prepare(house.ollama, house.plugins, path, stream)
        async with house.open() as proxy:
            answers = await talk(str(proxy.base_url).rstrip("/"), self.prompts)
        return [[re.sub(ASKS, "?", text), *rest] for text, *rest in answers]

    def prepare(self, ollama: FakeOllama, plugins: Path, path: str, stream: bool) -> None:
        """Write the agents, and let `ollama` say the rounds."""
        for name, tool in AGENTS.items():
            support.write_agent(plugins, name, CODE.format(tool | {"parameters": SCHEMA}))
        ids = rb'"(rs|msg|fc|call)_(?=\w{5})'  # no two answers share one
        bodies = [body_of(path, each, stream) for each in self.rounds]
        bodies = [re.sub(ids, rb'"\1_%d' % n, body) for n, body in enumerate(bodies)]
        ollama.says_in_turn(path, *bodies, stream=stream)

    def expected(self, path: str, stream: bool, ends: tuple[str, str]) -> list[Answer]:
        """Return what a client should be told; `ends`: its words, the second for one with calls."""
        answers = []
        for text, thinking, calls, tokens in self.answers:
            if path == RESPONSES and not stream:  # where Ollama leaves out a text beside a call
                text = text.replace(LOOK, "")
            made = [[OWN, {"z": z}] for z in calls]
            answers.append([text, thinking, made, tokens, ends[bool(calls)]])
        return answers

    def check(self, ollama: FakeOllama, *, drops_ids: bool = False) -> None:
        """Check what the model was asked; `drops_ids`: our calls beside the client's are lost."""
        bodies = [asked.body.decode() for asked in ollama.asked]
        found = [", ".join(sorted(re.findall(r"\w+ is (?:\d|set)", body))) for body in bodies]
        lost = r", weather is \d" if drops_ids and SET in self.results[1] else "nothing"
        assert found == [re.sub(lost, "", each) for each in self.results]
        assert not re.search(r"_osp_|/yes|osp:", "".join(bodies))
        asked = [each.json for each in ollama.asked]
        messages = [each for body in asked for each in body.get("messages") or body["input"]]
        assert {each.get("role", "user") for each in messages} <= {"user", "assistant", "tool"}


RAIN, BOTH = "weather is 1", "tide is 2, weather is 1"
SCENARIOS = {
    "rounds": Scenario(
        ("/sky /sea what now?",),
        ("think calls: weather tide", "thought: tide", "call: weather", "think"),
        ("", BOTH, f"tide is 1, {BOTH}", f"tide is 1, {BOTH}, weather is 1"),
        ((f"{SEEN}{LOOK}{SEEN}", f"{THINK}{MUST}{THINK}", "", [35, 34]),),
    ),
    "own tool": Scenario(
        ("/sky wake me if it rains",),
        ("think calls: weather alarm", "call: alarm", "calls: alarm weather", "think"),
        (
            "",
            f"{SET}, {RAIN}",
            f"{SET}, {SET}, {RAIN}",
            f"{SET}, {SET}, {SET}, {RAIN}, weather is 2",
        ),
        ((SEEN, THINK, "2", [14, 14]), (LOOK, "", "1", [7, 6]), ("", "", "1", [7, 6]), LAST),
    ),
    "consent": Scenario(
        ("/home warm it", "/yes", "/yes", "thanks"),
        ("thought: heat", "think call: heat", "think", "think"),
        ("", "heat is 1", "heat is 1", ""),
        (("?", MUST, "", [7, 6]), (f"{SEEN}{LOOK}\n\n?", THINK, "", [14, 14]), LAST, LAST),
    ),
}
