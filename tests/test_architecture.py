"""The house rules of the README, executed: who may import whom, and that a slice can be removed.

`complaints` reads the syntax trees of a folder like this one and says what breaks a rule and what
to do instead; `effects` imports every module of it and says what happened that should not.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

import demo
from kernel.config import HOME, Config, Key, PluginsConfig, ServerConfig, load
from kernel.plugin import scan
from tests.drawing import draw
from tests.support import running

IMPORTERS = ("import_module", "__import__")
ENVIRONMENT = {"environ", "environb", "expandvars", "getenv", "getenvb"}
OURS = {"osp", "demo", "testkit", "entry", "kernel", "slices", "plugins", "tests", "bench", "httpx"}
ALLOWED = {  # what each part may import of these
    "plugins": {"httpx"},
    "slices": {"kernel"},
    "kernel": {"kernel"},
    "demo": set(),
    "osp": {"kernel", "slices", "demo"},
    "testkit": {"kernel", "demo", "osp"},
    "entry": {"osp", "testkit"},
}
ADVICE = {
    "plugins": "of this project a plugin imports only kernel.agent, and its own files with a dot"
    " before them; it asks the model with self.context.chat, and what is missing there belongs into"
    " the contract, kernel/agent.py",
    "slices": "of this project a slice imports only kernel, so that every other slice can be"
    " deleted; write the few lines again, and when a third slice needs them, move them to kernel/",
    "kernel": "the kernel imports only the kernel; let osp.py hand over what is needed, as an"
    " argument",
    "demo": "demo.py imports nothing of this project: it stands for a server that knows nothing of"
    " it",
    "osp": "osp.py serves; what authors and tests need knows osp.py, and never the other way round",
    "testkit": "testkit.py is for authors of agents, who have no tests/ and no bench/",
    "httpx": "httpx is for agents and tests: ask OllamaClient instead",
}
ENVIRON = (
    "reads the environment, which only osp.py and testkit.py do: make it a setting (in"
    " kernel/config.py, or one of the agent), and take its value as an argument"
)
CIRCLE = (
    "a circle, even if it is for types alone: none of them can be understood without the others."
    " Let the one that should know less take values as arguments, or move what both need into a"
    " module below them"
)
GLOBAL = "is a global, which two proxies in one process would share: make it in {}"
MAKERS = {
    "plugins": "setup(), as an attribute of self",
    "slices": "routes(...), and hand it over as an argument",
}
IDEAS = (
    "{1} is a second idea beside {0}: neither uses the other, nor anything of this file that the"
    " other uses. Give it a file of its own in slices/, and its line in osp.py; or, if both are one"
    " idea, make them methods of one class"
)
DRAWN = "was out of date and is drawn anew: look at it, and run this again"
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
DEFINITION = FUNCTION | ast.ClassDef
EMPTY = {"[]", "{}", "dict()", "list()", "set()"}  # there to be filled
STATE = EMPTY | set(  # and what is there to be changed
    "ContextVar Counter Event Lock OrderedDict Queue RLock Semaphore WeakKeyDictionary"
    " WeakValueDictionary count defaultdict deque local".split()
)
CHANGES = set(
    "acquire add append appendleft clear discard extend insert move_to_end pop popitem popleft"
    " put_nowait remove reverse set setdefault sort subtract update".split()
)


def complaints(tree: Path) -> list[str]:
    """Return what breaks a rule, each as `file:line: what: what to do instead`."""
    files = dict(modules(tree))
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items()}
    state = STATE.union(*map(changing, trees.values()))
    found: list[str] = []
    graph: dict[str, dict[str, str]] = defaultdict(dict)  # who imports whom, and where
    for module, parsed in trees.items():
        part, place = module.partition(".")[0], files[module].relative_to(tree)
        for line, target in imports(parsed, module, files[module], files):
            if why := wrong(module, target):
                found.append(f"{place}:{line}: imports {target}: {why}")
            if module.startswith("kernel.") and target.startswith("kernel."):
                graph[module][target] = f"{place}:{line}: imports {target}"
        if module not in ("osp", "testkit"):
            found += [f"{place}:{line}: {ENVIRON}" for line in environment_reads(parsed)]
        maker = MAKERS.get(part, "create_app of osp.py, and hand it over as an argument")
        for name, line in dict([*global_state(parsed, state)][::-1]).items():
            if part == "plugins" and "." in name:  # each request has a copy of it
                continue
            found.append(f"{place}:{line}: {name} {GLOBAL.format(maker)}")
        first = ideas(parsed) if part == "slices" else []
        found += [f"{place}:{line}: {IDEAS.format(first[0][0], name)}" for name, line in first[1:]]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        steps = [graph[module][target] for module, target in pairwise(exc.args[1][::-1])]
        found.append(f"{', '.join(steps)}: {CIRCLE}")
    return list(dict.fromkeys(found))  # two names of one import are one mistake


def modules(tree: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and file of everything that runs in the proxy, so no plugin's tests and bench."""
    files = [tree / f"{name}.py" for name in ("osp", "demo", "testkit", "entry")]
    for folder in ("kernel", "slices", "plugins"):
        files += sorted((tree / folder).rglob("*.py"))
    for file in filter(Path.exists, files):
        if not file.name.startswith("test_") and file.parent.name != "bench":
            parts = file.relative_to(tree).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def imports(
    parsed: ast.AST, module: str, file: Path, known: dict[str, Path]
) -> Iterator[tuple[int, str]]:
    """Yield line and target of every import, at the top or inside of a function.

    A plugin's import of its own file begins with a dot.
    """
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    own = ".".join(module.split(".")[:2]) if module.startswith("plugins.") else "-"
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            if node.level and f"{base}.".startswith(f"{own}."):
                base = f".{base}"
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in known else base
        elif isinstance(node, ast.Call) and callee(node) in IMPORTERS:
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            yield from ((node.lineno, name) for name in names if isinstance(name, str))


def callee(call: ast.Call) -> str:
    """Return the last name of what is called."""
    return str(getattr(call.func, "attr", getattr(call.func, "id", "")))


def wrong(module: str, target: str) -> str:
    """Return what to do instead of this import, or nothing where it is right."""
    part, top = module.partition(".")[0], target.partition(".")[0]
    if top not in OURS - ALLOWED[part] or (part == "plugins" and target == "kernel.agent"):
        return ""
    return ADVICE["httpx" if top == "httpx" else part]


def environment_reads(parsed: ast.AST) -> Iterator[int]:
    nodes = [*ast.walk(parsed)]
    imported = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    systems = {"os", "os.path"} | {a.asname or "" for a in imported if a.name == "os"}
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT:
            yield from [node.lineno] * (ast.unparse(node.value) in systems)
        elif isinstance(node, ast.ImportFrom):
            reads = ENVIRONMENT & {alias.name for alias in node.names} and node.module in systems
            yield from [node.lineno] * bool(reads or node.module == "starlette.config")


def global_state(parsed: ast.Module, state: set[str]) -> Iterator[tuple[str, int]]:
    """Yield name and line of what a module keeps, and changes, for the whole process.

    That is what is made of a class in `state`, and whatever a function changes. A table that nobody
    changes is a constant. So is the cache of a pure function, as long as its size has a bound.
    """
    names = {node.name for node in parsed.body if isinstance(node, DEFINITION)}
    for node in outside(parsed):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= bound(node)
            if made_of(node.value) in state and not is_read_only(node):
                yield from ((name, node.lineno) for name in bound(node))
    for function in functions(parsed):
        seen = names - bound(function)
        cached = " ".join(map(ast.unparse, function.decorator_list))
        if re.search(r"\bcache$|maxsize=None|cache\(None", cached) and function.args.args:
            yield f"the cache of {function.name}", function.lineno
        for inner in ast.walk(function):
            if isinstance(inner, ast.Global):
                yield from ((name, inner.lineno) for name in inner.names)
            elif isinstance(inner, ast.expr) and (name := changed(inner)[0]) in seen:
                yield name, inner.lineno
    for kind in (node for node in ast.walk(parsed) if isinstance(node, ast.ClassDef)):
        made = [node for node in kind.body if isinstance(node, ast.Assign | ast.AnnAssign)]
        kept = {name for node in made if made_of(node.value) in state for name in bound(node)}
        shared = kept - own(kind)
        for inner in ast.walk(kind):
            if isinstance(inner, ast.expr) and (name := changed(inner)[1]) in shared:
                yield f"{kind.name}.{name}", inner.lineno


def outside(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all that stands outside of functions and classes."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, DEFINITION | ast.Lambda):
            yield child
            yield from outside(child)


def functions(parsed: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return functions and methods, without those inside of others."""
    holders = [node for node in ast.walk(parsed) if isinstance(node, ast.Module | ast.ClassDef)]
    return [node for holder in holders for node in holder.body if isinstance(node, FUNCTION)]


def bound(node: ast.AST) -> set[str]:
    """Return the names that code binds: variables and arguments."""
    inner = list(ast.walk(node))
    names = {n.id for n in inner if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names | {n.arg for n in inner if isinstance(n, ast.arg)}


def made_of(value: ast.expr | None) -> str:
    """Return an empty container as it is written, or the name of the class that is called."""
    text = re.sub(r"\[[^()]*\]\(", "(", ast.unparse(value)) if value else ""
    call = re.match(r"(?:\w+\.)*(\w+)\(", text)
    return text if text in EMPTY else call[1] if call else ""


def is_read_only(node: ast.Assign | ast.AnnAssign) -> bool:
    said = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
    return bool(re.match(r"Collection|Mapping|Sequence", said))


def own(kind: ast.ClassDef) -> set[str]:
    """Return the attributes that methods of a class give to `self`."""
    inner = [node for node in ast.walk(kind) if isinstance(node, ast.Attribute)]
    return {node.attr for node in inner if isinstance(node.ctx, ast.Store)}


def changing(parsed: ast.Module) -> set[str]:
    """Return the classes whose objects change: they set attributes of `self`."""
    classes = [node for node in ast.walk(parsed) if isinstance(node, ast.ClassDef)]
    return {each.name for each in classes if any(changed(n)[0] == "self" for n in ast.walk(each))}


def changed(node: ast.AST) -> tuple[str, str]:
    """Return what a statement or a call changes: its name, and the attribute with the change."""
    attribute = ""
    value: ast.AST | None = None
    if isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load):
        value = node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        value = node.func.value if node.func.attr in CHANGES else None
    while isinstance(value, ast.Subscript | ast.Attribute):
        attribute = value.attr if isinstance(value, ast.Attribute) else attribute
        value = value.value
    return (value.id if isinstance(value, ast.Name) else "", attribute)


def ideas(parsed: ast.Module) -> list[tuple[str, int]]:
    """Return name and line of each idea in a slice: definitions that name each other are one.

    `routes` names all of them, so it joins none; helpers that it calls and constants are no ideas.
    """
    defined: dict[str, ast.stmt] = {}
    for node in parsed.body:
        names = {node.name} if isinstance(node, DEFINITION) else bound(node)
        defined |= dict.fromkeys(names - {"logger"}, node)
    roots = [defined.pop(name) for name in ("routes", "endpoint") if name in defined]
    inner = [each for root in roots for each in ast.walk(root)]
    called = {ast.unparse(each.func) for each in inner if isinstance(each, ast.Call)}
    linked: dict[str, frozenset[str]] = {}
    for name, node in defined.items():
        near = {name} | {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & {*defined}
        group = frozenset(near).union(*(linked.get(other, ()) for other in near))
        linked |= dict.fromkeys(group, group)
    first: dict[frozenset[str], tuple[str, int]] = {}
    if "Forward" in called:  # an endpoint, too
        first[frozenset()] = "Forward", roots[0].lineno
    for name, node in defined.items():
        if isinstance(node, ast.ClassDef) or (isinstance(node, FUNCTION) and name not in called):
            first.setdefault(linked[name], (name, node.lineno))
    return list(first.values())


IMPORT_ALL = """
import importlib, logging, signal, sys, threading
import anyio, httpx, starlette.applications, uvicorn  # what these do at import is not ours

happened = []
WATCHED = ("socket.__new__", "subprocess.Popen", "os.putenv")

sys.addaudithook(lambda event, args: event in WATCHED and happened.append(event))
start = threading.Thread.start
threading.Thread.start = lambda thread: happened.append("a thread") or start(thread)

def state():
    loggers = {name: logging.getLogger(name) for name in ("root", "uvicorn")}
    seen = {f"logging of {n}": (log.level, len(log.handlers)) for n, log in loggers.items()}
    return seen | {"a signal": [signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)]}

for name in sys.argv[1:]:
    before = state()
    importlib.import_module(name)
    happened += [what for what, value in state().items() if before[what] != value]
    for what in dict.fromkeys(happened):
        sys.stdout.write(f"importing {name} does this: {what}; do it in a function\\n")
    happened.clear()
"""


def effects(tree: Path) -> str:
    """Import every module in a fresh process and return what it did, and what it printed."""
    names = [name for name, _ in modules(tree) if not name.startswith("plugins")]
    return python(tree, "-c", IMPORT_ALL, *names)


def python(tree: Path, *arguments: str) -> str:
    """Run Python in a tree and return all that it said."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("OSP_")}
    command = [sys.executable, "-B", *arguments]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_rules_of_the_house_are_kept() -> None:
    found = complaints(HOME)

    if found:
        pytest.fail("\n".join(found), pytrace=False)


def test_nothing_happens_at_import() -> None:
    assert effects(HOME) == ""


def test_the_drawn_imports_are_those_of_the_code() -> None:
    file, drawn = HOME / "docs" / "imports.svg", picture(HOME)

    if not file.exists() or file.read_bytes() != drawn.encode():
        file.write_bytes(drawn.encode())
        pytest.fail(f"docs/imports.svg {DRAWN}", pytrace=False)


def picture(tree: Path) -> str:
    """Draw who imports whom."""
    files = dict(modules(tree))
    kernel: dict[str, set[str]] = defaultdict(set)
    for module in filter(re.compile(r"kernel\.").match, files):
        parsed, name = ast.parse(files[module].read_text(encoding="utf-8")), module.split(".")[1]
        targets = [target for _, target in imports(parsed, module, files[module], files)]
        kernel[name] |= {t.split(".")[1] for t in targets if t.startswith("kernel.")} - {name}
    slices = [name[7:] for name in files if name.startswith("slices.")]
    return draw(kernel, slices, [name[8:-12] for name in files if name.endswith("_agent.agent")])


def test_the_tree_in_the_readme_is_that_of_the_folders() -> None:
    readme = (HOME / "README.md").read_text(encoding="utf-8")
    old = readme.replace("  health.py ", "  wealth.py ").replace("\nbench/ ", "\nbank/ ")

    assert not (wrong := [*unlike(HOME, readme)]), "\n".join(wrong)
    assert len([*unlike(HOME, old)]) == 4  # lacks two, and has two that are gone


def unlike(tree: Path, readme: str) -> Iterator[str]:
    """Yield what the tree in the README lacks, and what it has that is gone."""
    (block,) = re.findall(r"(?s)```\n(osp\.py .*?)```", readme)
    there, listed, top = set(), set(), ""
    for line in block.splitlines():
        names = re.findall(r"\S+(?:\.py|/)(?= |$)", line)
        top = top if line[0] == " " else names.pop(0)
        listed |= {top, *(top + name for name in names)}
    ignored = (tree / ".gitignore").read_text(encoding="utf-8").replace("/", "").split()
    for path in [*tree.iterdir(), *(tree / "kernel").rglob("*"), *(tree / "slices").iterdir()]:
        folder = "" if path.parent == tree else f"{path.relative_to(tree).parts[0]}/"
        name = f"{path.name}/" if path.is_dir() else path.name
        kept = name[0] not in "._" and not any(fnmatch(path.name, each) for each in ignored)
        if kept and name.endswith((".py", "/")):
            there.add(folder + name)
    place = 'README.md: the tree under "How it is built"'
    yield from (f"{place} lacks {name}: give it a line" for name in sorted(there - listed))
    yield from (f"{place} has {name}, which is gone: remove it" for name in sorted(listed - there))


TREE = {
    "osp.py": "import os\nimport demo\nfrom slices import chat, tags\nhome = os.environ",
    "demo.py": "import json",
    "testkit.py": "import os\nimport osp\nhome = os.environ",
    "kernel/__init__.py": "",
    "kernel/agent.py": "from kernel.client import Client",
    "kernel/client.py": "import json\nfrom kernel import errors",
    "kernel/errors.py": "",
    "slices/__init__.py": "",
    "slices/chat.py": "from kernel import agent\nfrom kernel.errors import E",
    "slices/tags.py": "from kernel.client import Client",
    "plugins/rag_agent/agent.py": "from kernel.agent import BaseAgent\nfrom .index import Index",
    "plugins/rag_agent/index.py": "import sqlite3\nfrom . import agent",
    "plugins/other_agent/agent.py": "import httpx\nimport kernel.agent",
}


def write_tree(folder: Path, **changed: str) -> Path:
    for name, code in {**TREE, **changed}.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code, encoding="utf-8")
    return folder


def test_a_tree_that_keeps_the_rules_gets_no_complaint(tmp_path: Path) -> None:
    assert complaints(write_tree(tmp_path)) == []


LATE = "def f():\n    {}"
AGENT = "plugins/rag_agent/agent.py"


@pytest.mark.parametrize(
    ("file", "code", "advice"),
    [
        (AGENT, "from kernel.client import OllamaClient", "plugins"),
        (AGENT, "from kernel import agent, errors", "plugins"),
        (AGENT, "import kernel", "plugins"),
        (AGENT, "from slices.chat import Turn", "plugins"),
        (AGENT, "from plugins.rag_agent.index import Index", "plugins"),
        (AGENT, "from ..other_agent import agent", "plugins"),
        ("plugins/rag_agent/index.py", LATE.format("import osp"), "plugins"),
        ("slices/tags.py", "from slices import chat", "slices"),
        ("slices/tags.py", "import slices.chat", "slices"),
        ("slices/tags.py", "from .chat import Turn", "slices"),
        ("slices/tags.py", LATE.format("from . import chat"), "slices"),
        ("slices/tags.py", "from tests.support import running", "slices"),
        ("kernel/client.py", LATE.format("import osp"), "kernel"),
        ("kernel/__init__.py", "from slices import tags", "kernel"),
        ("kernel/errors.py", "from kernel.agent import BaseAgent", CIRCLE),
        ("kernel/errors.py", LATE.format("from . import agent"), CIRCLE),
        ("demo.py", "from kernel.config import HOME", "demo"),
        ("osp.py", LATE.format("import testkit"), "osp"),
        ("testkit.py", "from tests import support", "testkit"),
        ("slices/tags.py", "import httpx", "httpx"),
        ("kernel/agent.py", LATE.format("from httpx import AsyncClient"), "httpx"),
        ("kernel/errors.py", "import os as o\nhome = o.environ['HOME']", ENVIRON),
        ("slices/tags.py", "from os import environ", ENVIRON),
        ("plugins/rag_agent/index.py", LATE.format("os.getenv('HOME')"), ENVIRON),
        ("kernel/errors.py", "def f():\n    global count\n    count = 1", "count is a global"),
        ("kernel/errors.py", "SEEN: dict[str, int] = {}", "create_app of osp.py"),
        ("slices/tags.py", "lock = asyncio.Lock()", "routes(...)"),
        (AGENT, "SEEN = set()", "setup(), as an"),
        ("slices/tags.py", "A = {1: 2}\ndef f(b):\n    A[b] = 3\n    del A[1]", "A is a global"),
        ("slices/tags.py", "A = [1]\nclass B:\n    def f(self):\n        A.pop()", "A is a"),
        ("slices/tags.py", "def f():\n    f.calls += 1", "f is a global"),
        ("slices/tags.py", "from kernel import b\ndef f(a):\n    b.c = a", "b is a global"),
        ("kernel/errors.py", "class A:\n    def f(self):\n        self.b = 1\nC = A()", "C is a"),
        (
            "slices/tags.py",
            "class A:\n    b = []\n    def f(self):\n        self.b.append(1)",
            "A.b is",
        ),
        ("slices/tags.py", "import importlib\nimportlib.import_module('slices.chat')", "slices"),
        ("slices/tags.py", "from starlette.config import Config", ENVIRON),
        (
            "slices/tags.py",
            "routes = lambda c: Forward(c)\nasync def a():\n    pass",
            "a is a second",
        ),
        ("kernel/errors.py", "@cache\ndef f(a):\n    pass", "the cache of f is a global"),
        (
            "slices/tags.py",
            "async def a():\n    pass\n\n\nclass B:\n    pass",
            "B is a second idea",
        ),
    ],
)
def test_every_broken_rule_is_caught(tmp_path: Path, file: str, code: str, advice: str) -> None:
    found = complaints(write_tree(tmp_path, **{file: code}))

    assert len(found) == 1 and ADVICE.get(advice, advice) in found[0], found


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import threading\nthreading.Thread(target=len, args=['']).start()", "a thread"),
        ("import socket\nsocket.socket().close()", "socket.__new__"),
        ("import logging\nlogging.basicConfig()", "logging of root"),
        ("import logging\nlogging.getLogger('uvicorn').setLevel(9)", "logging of uvicorn"),
        ("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)", "a signal"),
        ("import os\nos.environ['A'] = 'b'", "os.putenv"),
        ("import os, subprocess\nsubprocess.run('true')", "subprocess.Popen"),
        ("print('hello')", "hello"),
    ],
)
def test_what_happens_at_import_is_caught(tmp_path: Path, code: str, what: str) -> None:
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel" / "errors.py").write_text(code)

    assert what in effects(tmp_path)


# What each slice is there for. What is forwarded unread is forwarded without its slice, too.
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "/time what day is it?"}]}
PROBES: dict[str, tuple[str, str, Any]] = {
    "chat": ("POST", "/api/chat", CHAT),
    "embeddings": ("POST", "/api/embed", {"model": "demo-embed", "input": "a"}),
    "generate": ("POST", "/api/generate", {"model": "demo", "prompt": "a"}),
    "health": ("GET", "/health", None),
    "metrics": ("GET", "/metrics", None),
    "page": ("GET", "/osp", None),
    "passthrough": ("GET", "/api/version", None),
    "plugins": ("GET", "/plugins", None),
    "tags": ("GET", "/api/tags", None),
    "traces": ("GET", "/traces", None),
}
PARTS = {
    "Access": (),
    "Metrics": ("metrics",),
    "Presets": (),
    "Traces": ("traces", "page"),
}  # with the slices that need them
ASK = """
import asyncio, json, sys
import httpx, demo, osp
from kernel.config import load

async def main():
    async with demo.serve(demo.create_app()) as ollama:
        app = osp.create_app(load(None, {"OSP_UPSTREAM_URL": ollama}, {}))
        async with demo.serve(app) as url, httpx.AsyncClient(base_url=url) as client:
            answers = {
                name: await client.request(method, path, json=body)
                for name, (method, path, body) in json.loads(sys.argv[1]).items()
            }
    agents = {a.headers.get("x-osp-agents", "").partition(";")[0] for a in answers.values()}
    print(json.dumps([{name: a.status_code for name, a in answers.items()}, sorted(agents)]))

asyncio.run(main())
"""


def test_every_slice_has_its_probe() -> None:
    slices = {file.stem for file in (HOME / "slices").iterdir() if not file.stem.startswith("__")}

    assert set(PROBES) == slices, f"PROBES, above: {set(PROBES) ^ slices} is missing or gone"


@pytest.mark.parametrize("part", [*PROBES, *PARTS])
def test_any_part_can_be_left_out_and_all_else_works(tmp_path: Path, part: str) -> None:
    tree = without(part, tmp_path / "osp")
    gone = (part, *PARTS.get(part, ()))
    others = {key: probe for key, probe in PROBES.items() if key not in gone}

    said = python(tree, "-c", ASK, json.dumps(others))

    statuses, agents = json.loads(said.splitlines()[0])
    refused = {probe: status for probe, status in statuses.items() if status != 200}
    assert not refused, f"probes (PROBES, above) that were not answered with 200: {refused}"
    assert agents == ([""] if part == "chat" else ["", "time"])


async def test_a_foreign_page_gets_nothing_that_the_proxy_answers_itself(
    demo_url: str, plugins: Path
) -> None:
    ollamas = {route.path for route in demo.create_app().routes if isinstance(route, Route)}
    own = [path for method, path, _ in PROBES.values() if path not in ollamas]

    async with running(demo_url, plugins) as client:
        answers = [await client.get(path, headers={"origin": "http://evil.test"}) for path in own]

    statuses = {path: answer.status_code for path, answer in zip(own, answers, strict=True)}
    open_to_all = {path: status for path, status in statuses.items() if status != 403}
    assert own and not open_to_all, f"put these into `own` in osp.py: {open_to_all}"


def without(part: str, tree: Path) -> Path:
    """Copy the project without a part: a slice's file, and the lines of a part in osp.py."""
    for folder in ("kernel", "slices", "plugins"):
        shutil.copytree(HOME / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HOME / "demo.py", tree)
    shutil.copy(HOME / "demo.json", tree)
    (tree / "slices" / f"{part}.py").unlink(missing_ok=True)
    source = ast.parse((HOME / "osp.py").read_text(encoding="utf-8"))
    left = ast.unparse(Without(part).visit(source))
    missing = left == ast.unparse(ast.parse((HOME / "osp.py").read_text(encoding="utf-8")))
    assert not missing, f"osp.py does not know {part}: import it, and hand over its routes"
    (tree / "osp.py").write_text(left, encoding="utf-8")
    return tree


class Without(ast.NodeTransformer):
    """Takes a part's lines out of osp.py: its import, what is made of it, and where that goes."""

    def __init__(self, name: str) -> None:
        self.names = {name}

    def uses(self, *nodes: ast.AST) -> bool:
        inner = [name for node in nodes for name in ast.walk(node) if isinstance(name, ast.Name)]
        return any(name.id in self.names for name in inner)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        node.names = [alias for alias in node.names if alias.name not in self.names]
        return node if node.names else None

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        if isinstance(node.value, ast.Call) and self.uses(node.value.func, *node.value.args):
            wrapped = self.wraps(node.value, node.targets[0])
            self.names |= set() if wrapped else {ast.unparse(node.targets[0])}
            return None
        return self.generic_visit(node)

    def wraps(self, call: ast.Call, target: ast.expr) -> bool:
        """Tell whether a layer is put around what has its name, as in `app = Access(app)`."""
        return ast.unparse(target) in map(ast.unparse, call.args)

    def visit_List(self, node: ast.List) -> ast.List:
        self.generic_visit(node)
        node.elts = [item for item in node.elts if not self.uses(item)]
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node.keywords = [keyword for keyword in node.keywords if not self.uses(keyword)]
        return self.generic_visit(node)

    def visit_AsyncWith(self, node: ast.AsyncWith) -> ast.AST:
        node.items = [item for item in node.items if not self.uses(item)]
        return self.generic_visit(node)


KEY = {"OSP_KEY_LAPTOP": "12345678"}
SETTING = re.compile(r"^#(?! |$)", re.MULTILINE)  # prose has a space behind the sign


def test_the_example_of_osp_toml_has_every_setting_and_sets_nothing_by_itself(
    tmp_path: Path,
) -> None:
    example, file = (HOME / "osp.example.toml").read_text(encoding="utf-8"), tmp_path / "osp.toml"
    file.write_text(SETTING.sub("", example), encoding="utf-8")
    table, config = tomllib.loads(file.read_text(encoding="utf-8")), load(file, KEY, {})

    server, plugins = ServerConfig(data=tmp_path / "data"), tmp_path / "plugins"
    assert config == Config(
        server=server,
        plugins=PluginsConfig(dirs=(plugins,)),
        keys={"laptop": Key("12345678")},
        presets=config.presets,
        agents=config.agents,
    )
    assert list(table["keys"]["laptop"]) == [setting.name for setting in fields(Key)]
    for section in {*table} - {"keys", "presets", "agents"}:
        known = [setting.name for setting in fields(getattr(config, section))]
        assert list(table[section]) == known
    assert {*table} == {section.name for section in fields(Config)}
    assert not any(tomllib.loads(example).values())


def test_the_agents_of_the_example_are_ones_that_load() -> None:
    example = (HOME / "osp.example.toml").read_text(encoding="utf-8")
    agents = tomllib.loads(SETTING.sub("", example))["agents"]

    plugins = scan(PluginsConfig(), agents, {})

    assert agents and not any(plugins[name].error for name in agents)
