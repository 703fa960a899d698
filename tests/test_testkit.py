"""What authors of agents use: asking in every way, checking, and beginning a new one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernel.config import HOME
from kernel.dialects import Dialect
from kernel.dialects.every import DIALECTS
from testkit import answer_of, ask
from tests.slices.test_tools import chunks, recorded
from tests.support import RESPONSES, chat, write_agent
from tests.test_osp import CLEAN

SHOUT = """
class Shout(BaseAgent):
    async def on_response(self, response):
        return response.upper()
"""
HOOK = "class It(BaseAgent):\n  async def {}"
CONTEXT = """
class It(BaseAgent):
    async def on_request(self, payload):
        (vector,) = await self.context.embed(["x"])
        summary = await self.context.chat([{"role": "user", "content": "sum up"}])
        return add_system(payload, f"{self.settings['rule']} {summary} {len(vector)}")
"""
TOOLS = """
class It(BaseAgent):
    tools = [{"name": "w"}, {"name": "pay", "consent": True}]
    async def on_tool(self, name, arguments):
        text = f"{name} {arguments.get('z', 'nothing')}"
        image = {"type": "image", "data": "eA==", "mimeType": "image/png"}
        return [{"type": "text", "text": text}, image] if name == "pay" else text
"""


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def test_the_answer_and_what_the_model_was_sent_are_known(plugins: Path) -> None:
    answer = ask(write_agent(plugins, "shout", SHOUT), "/shout hello", model="hi")

    assert (answer.text, answer.status, answer.agents) == ("HI", 200, "shout;ok")
    assert answer.sent == [{"role": "user", "content": "hello"}]


def test_the_model_may_depend_on_what_it_is_asked_and_settings_go_over_the_files(
    plugins: Path,
) -> None:
    folder = write_agent(plugins, "it", CONTEXT, settings={"rule": "short"})

    answer = ask(
        folder,
        [{"role": "system", "content": "be"}, {"role": "user", "content": "/it ok"}],
        model=lambda messages: messages[-1]["content"].upper(),
        settings={"rule": "long"},
    )

    assert answer.text == "OK"
    assert answer.sent[0] == {"role": "system", "content": "long SUM UP 256"}


def test_fields_go_into_the_request_and_a_refusal_is_an_answer(plugins: Path) -> None:
    code = """
    class It(BaseAgent):
        async def on_request(self, payload):
            raise Abort(403, f"no {payload['seed']}")
    """

    answer = ask(write_agent(plugins, "it", code), "/it x", fields={"seed": 7})

    assert (answer.text, answer.status, answer.agents, answer.sent) == ("no 7", 403, "it;abort", [])


def test_all_that_the_model_was_sent_is_known_and_headers_ask_too(plugins: Path) -> None:
    folder = write_agent(plugins, "shout", SHOUT)

    answer = ask(folder, "x", headers={"X-OSP-Agents": "/shout"}, fields={"options": {"seed": 7}})

    assert answer.text == "AN ANSWER."
    assert answer.payload["options"] == {"seed": 7} and answer.payload["messages"] == answer.sent


def test_each_user_is_told_from_the_others_and_files_stay_in_data_dir(
    plugins: Path, tmp_path: Path
) -> None:
    code = """
    class It(BaseAgent):
        async def on_request(self, payload):
            file = self.data_dir / "users"
            users = {*file.read_text().split(), self.context.user} if file.exists() else {"?"}
            file.write_text(" ".join(sorted(users)))
            return payload
        async def on_response(self, response):
            return (self.data_dir / "users").read_text()
    """
    folder, data = write_agent(plugins, "it", code), tmp_path / "kept"
    data.mkdir()
    (data / "users").write_text("")

    first = ask(folder, "/it x", user="ada", data_dir=data)
    again = ask(folder, "/it x", user="ada", data_dir=data)
    other = ask(folder, "/it x", user="bob", data_dir=data)

    assert first.text == again.text != "" and len(other.text.split()) == 2


TWO = ["Let me look. ", call("w", z=1), call("w", z=2)]
SCRIPTS: list[tuple[Any, str, list[str]]] = [
    ({"name": "w"}, "", ["w nothing"] * 5),  # again and again, until it has no tools any more
    ([call("w", z=1), "Rain."], "Rain.", ["w 1"]),
    ([TWO, [" So: ", "rain."]], "Let me look.  So: rain.", ["w 1", "w 2"]),
    (("Hm. ", "Not said."), "Hm. ", []),
    ([call("w", z=1), call("w", z=[2]), "End."], "End.", ["w 1", "w [2]"]),
    (lambda messages: "End." if messages[1:] else TWO, "Let me look. End.", ["w 1", "w 2"]),
]


@pytest.mark.parametrize(("model", "text", "results"), SCRIPTS)
def test_a_model_can_be_scripted_that_calls_tools(
    plugins: Path, model: Any, text: str, results: list[str]
) -> None:
    answer = ask(write_agent(plugins, "it", TOOLS), "/it x", model=model)

    assert (answer.text, answer.results) == (text, results)
    assert [m["content"] for m in answer.sent if m["role"] == "tool"] == results


def test_in_a_list_an_entry_is_for_each_time_that_the_model_is_asked(plugins: Path) -> None:
    code = """
    class It(BaseAgent):
        async def on_response(self, response):
            assert response == "a"  # in each way of asking
            return response + await self.context.chat([{"role": "user", "content": "more"}])
    """

    assert ask(write_agent(plugins, "it", code), "/it x", model=["a", "b", "c"]).text == "ab"


def test_what_is_typed_is_answered_in_turn_and_a_yes_makes_the_call(plugins: Path) -> None:
    folder = write_agent(plugins, "it", TOOLS)
    model = [["Now. ", call("pay", z=5)], "Paid."]

    asking = ask(folder, "/it pay 5", model=model)
    paid = ask(folder, [{"role": "system", "content": "be"}, "/it pay 5", "/yes"], model=model)
    other = ask(folder, ["/it pay 5", "no", "/it again", "/yes"], model=[*model, *model], user="a")

    assert asking.text.startswith("Now. \n\nThis would be called:") and asking.results == []
    assert paid.text == "Paid." and paid.results == ["pay 5"]
    assert [m["role"] for m in paid.sent] == ["system", "user", "assistant", "assistant", "tool"]
    assert other.text == "Paid." and other.results == ["pay 5"]


def test_where_one_call_leads_to_another_each_is_asked_about(plugins: Path) -> None:
    model = [call("pay", z=1), call("pay", z=2), "Paid."]

    answer = ask(write_agent(plugins, "it", TOOLS), ["/it pay", "/yes", "/yes"], model=model)

    assert answer.results[-1:] == ["pay 2"]


def test_a_call_of_a_tool_that_was_not_offered_fails_the_test(plugins: Path) -> None:
    with pytest.raises(AssertionError, match=r"the model calls {'wx'}; its tools: {'(pay|w)', '"):
        ask(write_agent(plugins, "it", TOOLS), "/it x", model=[call("wx"), "Rain."])


def form(dialect: Dialect, body: bytes) -> list[Any]:
    """Return the frames of an answer: their types, text, calls, and how it ends."""
    found: list[Any] = []
    for chunk in chunks(dialect.path, body):
        calls: dict[Any, Any] = {}
        text, finish = bool(dialect.places(chunk)), dialect.finish(chunk)
        dialect.take(chunk, calls)
        made = [(each.name, each.arguments) for each in calls.values()]
        whole = chunk.get("response", chunk)
        blocks = len([*(whole.get("content") or []), *(whole.get("output") or [])])
        one = (chunk.get("type"), text, made, finish, blocks)
        if any(one) and one not in found[-1:]:  # pieces of a text are one
            found.append(one)
    return found


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("what", ["tagcall", "tagcalls"])
def test_scripted_calls_have_the_form_that_ollama_gives_them(
    dialect: Dialect, what: str, stream: bool
) -> None:
    said = "Let me look. " if what == "tagcall" else ""
    calls = [call("w", z="1"), call("w", z="2")][: 1 if said else 2]
    real = recorded(dialect.path, f"tools_tag_{what}", stream)
    drops = (
        dialect.path == RESPONSES and not stream
    )  # a text beside a call; this differs on purpose

    answer = answer_of(dialect, chat(dialect.path, "x", stream=stream), said * (not drops), calls)

    assert form(dialect, bytes(answer.body)) == form(dialect, real)


def test_an_unknown_argument_is_named(plugins: Path) -> None:
    with pytest.raises(TypeError, match="'seed'"):
        ask(write_agent(plugins, "shout", SHOUT), "/shout x", seed=7)  # type: ignore[call-arg]


FAILS = {
    "def on_request(self, payload): return payload['nope']": "error: KeyError, where: .*agent.py:5",
    "async def on_request(self, payload): pass": "is a `return` missing",
    "async def on_chunk(self, text): return text + '|'": "depends on the way of asking",
    "def setup(self): 1 / 0": "ZeroDivisionError",
}


@pytest.mark.parametrize("code", FAILS)
def test_an_agent_that_fails_fails_its_test(plugins: Path, code: str) -> None:
    folder = write_agent(plugins, "it", f"class It(BaseAgent):\n    {code}\n")

    with pytest.raises(AssertionError, match=FAILS[code]):
        ask(folder, "/it x")


def command(*arguments: str, cwd: Path = HOME, **env: str) -> subprocess.CompletedProcess[str]:
    line, env = [sys.executable, str(HOME / "testkit.py"), *arguments], CLEAN | env
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def osp_toml(tmp_path: Path, plugins: Path) -> Path:
    file = tmp_path / "osp.toml"
    file.write_text(f"[plugins]\ndirs = [{json.dumps(str(plugins))}]\n", encoding="utf-8")
    return file


LIMITER = """
class It(BaseAgent):
    def setup(self): self.users = []
    async def on_request(self, payload):
        self.users.append(self.context.user)
        if len(self.users) > 3: raise Reply("enough")
        return payload
"""
CHECKED = {  # code: verdict, what is said, exit status
    "class It(BaseAgnt): pass": ("FAILED", "NameError", 1),
    "class It(BaseAgent):\n  def setup(self): json.dumps({})": ("FAILED", "is `import json`", 1),
    "import no_such_thing\nclass It(BaseAgent): pass": ("FAILED", "-m pip install", 1),
    "from kernel.config import Config" + SHOUT: ("FAILED", "agent.py:4: from kernel.config", 1),
    HOOK.format("on_response(self, r): pass"): ("FAILED", "`return` missing", 1),
    HOOK.format("on_chunk(self, t): return t + '|'"): ("FAILED", "the way of asking", 1),
    HOOK.format("on_chunk(self, t): return ''"): ("FAILED", "does on_end return", 1),
    HOOK.format("on_reply(self, r): return r"): ("warning", "on_reply is no hook", 0),
    "class It(BaseAgent): pass": ("warning", "it has no hook", 0),
    "class It(BaseAgent): tools = [{'name': 'w'}]": ("warning", "tools, and no on_tool", 0),
    HOOK.format("on_tool(self, n, a): return n"): ("warning", "it has on_tool, and offered no", 0),
    HOOK.format("on_request(self, p): raise Reply('')\n  on_tool = len"): ("ok", "", 0),
    TOOLS: ("ok", "it (tools: 2, about 54 tokens)", 0),
    LIMITER: ("ok", "", 0),
}


@pytest.mark.parametrize("code", CHECKED)
def test_check_says_what_is_wrong(plugins: Path, osp_toml: Path, code: str) -> None:
    verdict, complaint, status = CHECKED[code]
    write_agent(plugins, "it", code)
    write_agent(plugins, "off", "1 / 0", enabled=False)
    write_agent(plugins, "shout", SHOUT)

    done = command("check", "--config", str(osp_toml))

    verdicts = [line.split()[:2] for line in done.stdout.splitlines() if line[0] != " "]
    assert verdicts == [[verdict, "it"], ["disabled", "off"], ["ok", "shout"]]
    assert complaint in done.stdout and done.returncode == status


@pytest.mark.parametrize("table", ["[server]\nprot = 1", "[agents.nope]\nenabled = true"])
def test_wrong_settings_end_it_with_one_line(osp_toml: Path, table: str) -> None:
    osp_toml.write_text(f"{osp_toml.read_text()}\n{table}\n", encoding="utf-8")

    done = command("check", "--config", str(osp_toml))

    assert done.returncode == 2
    assert done.stderr.startswith("testkit.py: ") and table[1:4] in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--tools"]])
def test_a_new_agent_works_has_a_test_and_is_never_written_twice(
    tmp_path: Path, plugins: Path, osp_toml: Path, flags: list[str]
) -> None:
    first = command("new", "my-greeter2", *flags, "--config", str(osp_toml), cwd=tmp_path)
    folder = plugins / "my-greeter2_agent"
    (folder / "agent.py").write_text((folder / "agent.py").read_text() + "# mine\n")
    second = command("new", "my-greeter2", *flags, "--config", str(osp_toml), cwd=tmp_path)

    assert first.returncode == 0 and "pytest plugins/my-greeter2_agent\n" in first.stdout
    assert second.returncode == 2 and "is there already" in second.stderr
    assert (folder / "agent.py").read_text().endswith("# mine\n")
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    assert subprocess.run(tests, cwd=HOME, timeout=60).returncode == 0
    checked = command("check", "--config", str(osp_toml)).stdout
    assert checked.startswith("ok       my-greeter2") and ("(tools: 1, " in checked) == bool(flags)


@pytest.mark.parametrize("name", ["help", "../x", "Upper", "a b", ""])
def test_a_name_that_can_be_no_command_is_refused(osp_toml: Path, name: str) -> None:
    done = command("new", name, "--config", str(osp_toml))

    assert done.returncode == 2
    assert "cannot be a command" in done.stderr
