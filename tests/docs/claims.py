"""Claims: what a page says, as far as a test can tell.

In prose a page names in `backticks` what exists: files, tests, names of the code, settings,
endpoints, commands. Its numbers are *facts*: phrases with a hole, and the function that computes
what stands in it. `wrong` returns what is neither.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from keyword import iskeyword
from pathlib import Path

import pytest

import demo
import osp
from kernel.commands import EXPLAIN, HELP, YES
from kernel.config import HOME, Config, PluginsConfig
from kernel.registry import PluginRegistry
from tests.test_size import code_lines

Facts = Mapping[str, Callable[[], object]]

WORDS = "no one two three four five six seven eight nine ten eleven twelve".split()
TENS = r"\w+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|dozen|hundred|thousand"
NUMBER = re.compile(rf"\d[\d,.]*|\b(?:{'|'.join(WORDS[3:])}|{TENS})\b", re.IGNORECASE)
BLOCK = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)
IN_FILE = re.compile(r"`([\w.]+)` in `([\w/]+\.py)`")
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
NUMBERING = re.compile(r"^(?:#+ |\| ?)?\d+(?:–\d+)?(?:\. | *\|)", re.MULTILINE)
RUN = ("README.md", "CONTRIBUTING.md", "plugins/README.md")  # whose commands other tests run
OPEN = ("agents", "keys", "presets")  # sections of osp.toml whose keys the user makes up
CODE = ("*.py", "kernel/**/*.py", "slices/*.py", "plugins/*/*.py", "tests/*.py", "bench/*.py")


def text_of(page: str) -> str:
    return (HOME / page).read_text(encoding="utf-8")


def blocks_of(page: str) -> str:
    return "\n".join(block[0] for block in BLOCK.finditer(text_of(page)))


def word(number: int) -> str:
    """Return a number as it stands in a sentence."""
    return WORDS[number] if number < len(WORDS) else f"{number:,}"


def lines(*patterns: str) -> str:
    """Return how many lines of code some files have."""
    found = [file for pattern in patterns for file in HOME.glob(pattern)]
    assert found, patterns
    return f"{sum(code_lines(file.read_text(encoding='utf-8')) for file in found):,}"


def check(page: str, facts: Facts) -> None:
    """Fail with what a page says and no test can vouch for."""
    if found := wrong(page, facts):
        pytest.fail("\n".join(found), pytrace=False)


def wrong(page: str, facts: Facts) -> list[str]:
    """Return what a page says and no test can vouch for; a tuple fills more than one hole."""
    text, folder = text_of(page), (HOME / page).parent
    run = "\n".join([text_of(".ci/run"), *map(blocks_of, [page, *RUN])])
    prose = " ".join(NUMBERING.sub("", BLOCK.sub("", text)).split())
    said = [f"`{name}` is nowhere" for name in SPAN.findall(prose) if not is_known(name, run)]
    said += [f"{file} has no {name}" for name, file in IN_FILE.findall(prose) if lacks(file, name)]
    said += [f"a dead link: {to}" for to in LINK.findall(prose) if not (folder / to).exists()]
    for phrase, value in facts.items():
        found = value()
        fact = phrase.format(*(found if isinstance(found, tuple) else [found]))
        said += [] if fact in prose else [f"it should say: {fact}"]
        prose = prose.replace(fact, "")
    prose = SPAN.sub(lambda span: NUMBER.sub("_", span[0]), LINK.sub("]", prose))
    for number in NUMBER.finditer(prose):
        said.append(f"no fact has {number[0]}: ... {prose[max(0, number.start() - 40) :][:80]} ...")
    return [f"{page}: {each}" for each in said]


def is_known(name: str, run: str) -> bool:
    """Tell whether what stands in backticks exists, or stands in what is `run`."""
    if stands_in(name, run):
        return True
    file, _, test = name.partition("::")
    if test:
        return f"def {test}(" in text_of(file)
    if name[0] == "/":
        return is_typed(name)
    return any(HOME.glob(name)) or is_typed(name) or is_code(name)


def lacks(file: str, name: str) -> bool:
    """Tell whether a file is there that neither defines a name nor a member of that name."""
    found = definitions().get(file, set())
    return (HOME / file).exists() and not {*name.split(".")} <= found


def stands_in(name: str, text: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text))


def is_typed(text: str) -> bool:
    """Tell whether a text is a command in a chat, or an endpoint, with its method or without."""
    agents = [folder.name.removesuffix("_agent") for folder in HOME.glob("plugins/*_agent")]
    command = re.match(r"/+(\w+)", text)
    method, _, path = text.partition("?")[0].rpartition(" ")
    is_command = command is not None and command[1] in [*agents, EXPLAIN, HELP, YES]
    return is_command or any(method in ("", *known) for known in endpoints().get(path, ()))


@cache
def endpoints() -> dict[str, list[set[str]]]:
    """Return the methods of each path, at the proxy and at Ollama."""
    app = osp.create_app(Config(), PluginRegistry(PluginsConfig(only=()), {}, HOME, {}))
    found: dict[str, list[set[str]]] = defaultdict(list)
    for route in [*app.app.app.routes, *demo.create_app().routes]:  # type: ignore[attr-defined]
        found[route.path].append(route.methods or {"POST"})
    return found


def is_code(text: str) -> bool:
    """Tell whether the code has a name, or the setting that a text sets."""
    match = re.fullmatch(r"""[\["@.]*([\w.-]+)["\]]*(?:\(.*\))?(?:\s*[=:].*)?""", text)
    if match is None:  # a message, or the beginning of a statement
        said = any(stands_in(text, each) for each in identifiers() if " " in each)
        return said or iskeyword(text.split()[0])
    name = match[1]
    owner, _, last = name.removeprefix("self.").rpartition(".")
    if not owner or name in identifiers():
        spelt = {name, last, name.lower() if "-" in name else name}  # a header, in any case
        return bool(spelt & identifiers()) or iskeyword(name)
    settings = getattr(Config(), owner, None)
    is_setting = is_dataclass(settings) and last in [each.name for each in fields(settings)]
    owned = definitions().get(owner.rpartition(".")[2], ())
    return is_setting or owner in OPEN or last in owned or is_library(text, owner)


def is_library(text: str, module: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), text[len(module) + 1 :])
    except ImportError:
        return False


def trees() -> Iterator[tuple[str, ast.Module]]:
    for file in (file for part in CODE for file in sorted(HOME.glob(part))):
        yield str(file.relative_to(HOME)), ast.parse(file.read_text(encoding="utf-8"))


@cache
def definitions() -> dict[str, set[str]]:
    """Return what each class, module and file defines, by the last part of its name, or its path.

    A file also has what its classes define.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for file, tree in trees():
        owners = {Path(file).stem: tree.body}
        owners |= {n.name: n.body for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
        for owner, body in owners.items():
            found[owner].update(named(body))
            found[file].update(named(body))
    return found


def named(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (each.id for each in targets if isinstance(each, ast.Name))


@cache
def identifiers() -> set[str]:
    """Return all names in the code, and its strings."""
    found = {name for names in definitions().values() for name in names} | definitions().keys()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
                found |= {text} if len(text) < 300 else set()
            elif isinstance(node, ast.Name | ast.arg | ast.alias | ast.Attribute | ast.keyword):
                found |= {getattr(node, key, None) or "" for key in ("id", "arg", "name", "attr")}
    return found
