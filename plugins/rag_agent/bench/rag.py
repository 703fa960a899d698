"""RAG: does it find the right passage, and how fast?

    python plugins/rag_agent/bench/rag.py  # before the built-in stand-in
    python plugins/rag_agent/bench/rag.py --ollama http://127.0.0.1:11434 --model nomic-embed-text
    python plugins/rag_agent/bench/rag.py --chunks 1000 20000 --no-recall

The questions are those of `rag.toml`: a passage counts as found when it is one of the first five
and holds the words that answer the question. The stand-in's vectors are words too, and no meaning:
they show that it works, not how well. Speed is measured on one core, over made-up texts, without
the call of the embedding model: the vectors are random ones of 768 numbers. What other programs
take of that core is in the first numbers, not in those of the processor.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import os
import random
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT))

import demo  # noqa: E402
from kernel.address import parse_upstream  # noqa: E402
from kernel.client import OllamaClient  # noqa: E402
from kernel.config import PluginsConfig  # noqa: E402
from kernel.registry import PluginRegistry  # noqa: E402
from plugins.rag_agent.vectors import normalised  # noqa: E402

K = 5
DIMS = 768
PASSAGES = 10  # in each of the made-up files
ROUNDS = 50  # of questions for one time
INVENTED = 30_000  # words of a made-up language


class Embedder:
    """The part of an agent's context that finding passages needs."""

    log = logging.getLogger("bench")

    def __init__(self, client: OllamaClient) -> None:
        self.client = client

    async def embed(self, texts: list[str], model: str) -> list[list[float]]:
        answer = await self.client.ask("/api/embed", {"model": model, "input": texts})
        return list(answer["embeddings"])


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@asynccontextmanager
async def loaded(folder: Path, data: Path, model: str) -> AsyncIterator[Any]:
    """Load the agent as the proxy does, and yield it when it has read the folder."""
    settings = {"folder": str(folder), "embed_model": model}
    config = PluginsConfig(dirs=(ROOT / "plugins",), only=("rag",))
    async with PluginRegistry(config, {"rag": {"settings": settings}}, data, {}) as registry:
        plugin = registry.plugins["rag"]
        if plugin.agent is None:
            raise SystemExit(f"the agent cannot be loaded: {plugin.error}")
        agent: Any = plugin.agent
        agent.arguments = {"k": K, "in": ""}
        while agent.follower.unread:
            await asyncio.to_thread(agent.follower.catch_up, 1.0)
        yield agent


async def recall(agent: Any, context: Embedder) -> None:
    """Print how many questions find their passage among the first five, by each ranking."""
    articles = tomllib.loads((HERE / "rag.toml").read_text(encoding="utf-8"))["articles"]
    asked = [(a["name"], *question) for a in articles for question in a["questions"]]
    await agent.vectors.begin(context)
    hits: dict[tuple[str, str], list[bool]] = {}
    for name, question, answer, kind in asked:
        vector = await agent.vectors.of_question(context, question)
        found = {"FTS5 alone": agent.search(question, None)}
        if vector:
            found["both"] = agent.search(question, vector)
            found["vectors alone"] = agent.search("", vector)
        for way, passages in found.items():
            hit = any(p.name == name and holds(p.text, answer) for p in passages)
            hits.setdefault((way, kind), []).append(hit)
            hits.setdefault((way, "all"), []).append(hit)
    say(f"recall@{K} of {len(asked)} questions over {len(articles)} articles")
    for way in dict.fromkeys(way for way, _ in hits):
        parts = (f"{kind} {share(hits[way, kind])}" for kind in ("words", "meaning", "all"))
        say(f"  {way:14} {'   '.join(parts)}")


def holds(text: str, answer: str) -> bool:
    return " ".join(answer.split()) in " ".join(text.split())


def share(hits: Sequence[bool]) -> str:
    return f"{sum(hits)}/{len(hits)} = {sum(hits) / len(hits):.2f}"


def write_articles(folder: Path) -> None:
    for article in tomllib.loads((HERE / "rag.toml").read_text(encoding="utf-8"))["articles"]:
        (folder / article["name"]).write_text(article["text"], encoding="utf-8")


async def speed(folder: Path, count: int, rng: random.Random) -> None:
    """Print how fast `count` passages are read, and how long a question takes among them."""
    words, weights = language(rng)

    def text(length: int) -> str:
        return " ".join(rng.choices(words, cum_weights=weights, k=length))

    (folder / "texts").mkdir()
    for number in range(count // PASSAGES):
        parts = (f"## {text(4)}\n\n{text(130)[:890]}" for _ in range(PASSAGES))
        file = folder / "texts" / f"{number}.md"
        file.write_text("\n\n".join(parts), encoding="utf-8")
    began = time.perf_counter()
    async with loaded(folder / "texts", folder / "data", "random") as agent:
        took = time.perf_counter() - began
        say(f"{count} passages in {count // PASSAGES} files: read in {took:.1f} s")
        say(f"  question, FTS5 alone  {times(agent, lambda: text(8), None)}")
        store(agent, rng)
        say(f"  question, both        {times(agent, lambda: text(8), rng)}")


def language(rng: random.Random) -> tuple[list[str], list[float]]:
    """Return invented words and the sums of their frequencies: a language without stop words."""
    words = [
        "".join(rng.choices("aeioubdfgklmnprst", k=rng.randint(3, 10))) for _ in range(INVENTED)
    ]
    return words, list(itertools.accumulate(1 / (n + 50) for n in range(INVENTED)))


def store(agent: Any, rng: random.Random) -> None:
    """Give every passage a random vector."""
    with agent.index.open() as db:
        ids = [row for (row,) in db.execute("SELECT id FROM chunks")]
    for start in range(0, len(ids), 500):
        some = ids[start : start + 500]
        agent.vectors.store(some, [a_vector(rng) for _ in some])
    agent.vectors.load()


def a_vector(rng: random.Random) -> Any:
    return normalised([rng.gauss(0, 1) for _ in range(DIMS)])


def times(agent: Any, question: Callable[[], str], rng: random.Random | None) -> str:
    """Ask ROUNDS questions as a request does; return median and worst in milliseconds."""
    took, work = [], []
    for _ in range(ROUNDS):
        text, vector = question(), a_vector(rng) if rng else None
        began, worked = time.perf_counter(), time.process_time()
        agent.follower.catch_up(agent.settings["wait"])
        if vector:
            agent.vectors.load()
        agent.search(text, vector)
        took.append((time.perf_counter() - began) * 1000)
        work.append((time.process_time() - worked) * 1000)
    middle = f"median {statistics.median(took):.1f} ms ({statistics.median(work):.1f} of processor)"
    return f"{middle}, worst {max(took):.1f} ms ({max(work):.1f})"


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ollama", metavar="URL", help="default: the built-in stand-in")
    parser.add_argument("--model", default="demo-embed", help="an embedding model")
    parser.add_argument("--chunks", type=int, nargs="*", default=[1000, 20_000], metavar="N")
    parser.add_argument("--no-recall", action="store_true", help="measure speed only")
    asked = parser.parse_args()
    if not asked.no_recall:
        with tempfile.TemporaryDirectory() as folder:
            await measure_recall(Path(folder), asked.ollama, asked.model)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for count in asked.chunks:
        with tempfile.TemporaryDirectory() as folder:
            await speed(Path(folder), count, random.Random(count))


async def measure_recall(folder: Path, url: str | None, model: str) -> None:
    (folder / "texts").mkdir()
    write_articles(folder / "texts")
    async with demo.serve(demo.create_app()) as stand_in:
        async with OllamaClient(parse_upstream(url or stand_in), 5.0) as client:
            async with loaded(folder / "texts", folder / "data", model) as agent:
                await recall(agent, Embedder(client))


if __name__ == "__main__":
    asyncio.run(main())
