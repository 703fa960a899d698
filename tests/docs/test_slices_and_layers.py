"""docs/slices-and-layers.md: its layers answer as the slice does, and its numbers are counted."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from kernel.config import HOME
from kernel.dialects.every import DIALECTS
from tests.docs import claims
from tests.docs.claims import Facts, lines, text_of, word
from tests.docs.copies import change as replace
from tests.docs.copies import copied
from tests.test_architecture import python
from tests.test_size import code_lines

BLOCKS = re.findall(r"```python\n(.*?)```", text_of("docs/slices-and-layers.md"), re.DOTALL)
SLICE, *FILES, JOINED = BLOCKS
LAYERS = {file.partition("\n")[0].removeprefix("# "): file for file in FILES}
LOADED = "loaded(registry.plugins)}"
FAILED = "[p.name for p in self.registry.plugins.values() if p.error]"
CHANGE = {  # the answer also names the agents that failed: what stands in a file, what comes behind
    "slices/health.py": (LOADED, f" | {{'failed': {FAILED.replace('self.', '')}}}"),
    "schemas/health.py": (
        "agents: list[str] | None = None",
        "\n    failed: list[str] | None = None",
    ),
    "services/health.py": (
        ", agents=self.repository.agents()",
        ", failed=self.repository.failed()",
    ),
    "repositories/health.py": ("plugins)\n", f"\n    def failed(self):\n        return {FAILED}\n"),
}
CHANGED = [len(CHANGE.keys() - LAYERS.keys()), len(CHANGE.keys() & LAYERS.keys())]


def slices_with(text: str) -> str:
    """Return in how many slices a text stands."""
    return word(sum(text in file.read_text(encoding="utf-8") for file in HOME.glob("slices/*.py")))


CORE = ("kernel/**/*.py", "slices/*.py", "osp.py")
FACTS: Facts = {
    "The {} kinds of sharing": lambda: word(text_of("docs/slices-and-layers.md").count("\n### ")),
    "| files | 1 | {} |": lambda: len(LAYERS),
    "imports too | {} | {} |": lambda: (lines("slices/health.py"), sum(map(code_lines, FILES))),
    "name the agents that failed | {} | {} |": lambda: tuple(CHANGED),
    "{} slices answer with": lambda: slices_with("readable import answer").capitalize(),
    "{} slices use it": lambda: slices_with("import Forward"),
    "stands in {} slices": lambda: slices_with("KEYLESS ="),
    "{} slices make a `Route`": lambda: slices_with("Route(path, Forward(").capitalize(),
    "in {} dialects": lambda: word(len(DIALECTS)),
    "{} of {} lines of code": lambda: (lines(CORE[0]), lines(*CORE)),
    "has {} lines": lambda: lines("slices/chat.py"),
}


def test_the_page_is_true() -> None:
    claims.check("docs/slices-and-layers.md", FACTS)
    assert text_of("slices/health.py").endswith(f"\n{SLICE}")


ASK = """
import asyncio, sys
from dataclasses import replace
import demo, httpx, osp
from kernel.config import Key, load

async def main(upstream, keys):
    config = load(None, {"OSP_UPSTREAM_URL": upstream, "OSP_PLUGINS": "time"}, {})
    app = osp.create_app(replace(config, keys=keys))
    async with demo.serve(app) as url, httpx.AsyncClient(base_url=url) as client:
        for path, key in ("/health", "sesame"), ("/health", ""), ("/health?live", ""):
            answer = await client.get(path, headers={"x-api-key": key})
            print(answer.status_code, answer.headers["content-type"], answer.content)

for upstream in sys.argv[1:]:
    asyncio.run(main(upstream, {}))
    asyncio.run(main(upstream, {"me": Key("sesame")}))
"""


@pytest.mark.parametrize("change", [{}, CHANGE], ids=["as they stand", "changed"])
async def test_layers_answer_as_the_slice_does(
    tmp_path: Path, demo_url: str, change: dict[str, tuple[str, str]]
) -> None:
    trees = sliced, layered = copied(tmp_path / "sliced"), copied(tmp_path / "layered")
    put_layers(layered)
    python(layered, "-m", "ruff", "format", "--check", *LAYERS)
    for file, (old, more) in change.items():
        replace((layered if file in LAYERS else sliced) / file, old, old + more)

    asked = [asyncio.to_thread(python, tree, "-c", ASK, demo_url, "127.0.0.1:1") for tree in trees]
    said, by_layers = await asyncio.gather(*asked)

    assert by_layers == said
    assert re.findall("(?m)^[0-9]{3}", said) == 6 * ["200"] + 2 * ["503", "503", "200"]
    assert said.count('"agents":["time"]') == 6 and said.count('"failed":[]') == 6 * bool(change)


def put_layers(tree: Path) -> None:
    """Put the layers of the page in the place of the slice."""
    for name, block in LAYERS.items():
        (tree / name).parent.mkdir()
        (tree / name).write_text(block, encoding="utf-8")
    (tree / "slices" / "health.py").unlink()
    imports, line = JOINED.split("...\n")
    (made,) = re.findall(r" *\*health\.routes\(.*\n", text_of("osp.py"))
    replace(tree / "osp.py", made, line)
    replace(tree / "osp.py", "    health,\n", "")
    replace(tree / "osp.py", "from slices import", f"{imports}from slices import")
