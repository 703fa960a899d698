"""RAG: does it find the right passage, and how fast?

    python plugins/rag_agent/bench/rag.py  # before the built-in stand-in
    python plugins/rag_agent/bench/rag.py --ollama http://127.0.0.1:11434 --model nomic-embed-text
    python plugins/rag_agent/bench/rag.py --chunks 1000 20000 --no-recall
    python plugins/rag_agent/bench/rag.py --store postgresql://user:password@host/empty_database

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
import json
import logging
import os
import random
import resource
import statistics
import sys
import tempfile
import time
import tomllib
from array import array
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))

import demo  # noqa: E402
from kernel.client import OllamaClient  # noqa: E402
from kernel.config import parse_upstream  # noqa: E402
from kernel.postgres import Postgres  # noqa: E402
from kernel.sqlite import SQLite  # noqa: E402
from plugins.rag_agent.agent import Rag  # noqa: E402
from plugins.rag_agent.vectors import normalised  # noqa: E402

K = 5
DIMS = 768
PASSAGES = 10  # in each of the made-up files
AT_ONCE = 500  # vectors
ROUNDS = 50  # of questions for one time
INVENTED = 30_000  # words of a made-up language


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


@asynccontextmanager
async def loaded(
    folder: Path, texts: dict[str, str], model: str, url: str | None
) -> AsyncIterator[Rag]:
    """Set the agent up over some texts, and yield it when it has read them."""
    (folder / "texts").mkdir()
    for name, text in texts.items():
        (folder / "texts" / name).write_text(text, encoding="utf-8")
    agent, config = Rag(), json.loads((HERE.parent / "config.json").read_text(encoding="utf-8"))
    agent.settings = config["settings"] | {"folder": str(folder / "texts"), "embed_model": model}
    agent.arguments = {"k": K, "in": ""}
    server = Postgres(url) if url else None
    file = SQLite("rag", folder / "data", agent.schema)
    store = server.store("rag", agent.schema) if server else file
    agent._store = lambda: store
    await agent.setup()
    while agent.follower.unread:
        await agent.follower.catch_up(1.0)
    yield agent
    await agent.teardown()
    if server:
        await server.close()


async def recall(folder: Path, url: str | None, model: str, store: str | None) -> None:
    """Print how many questions find their passage among the first five, by each ranking."""
    articles = tomllib.loads((HERE / "rag.toml").read_text(encoding="utf-8"))["articles"]
    texts = {article["name"]: article["text"] for article in articles}
    hits = defaultdict[tuple[str, str], list[bool]](list)
    async with (
        demo.serve(demo.create_app()) as stand_in,
        OllamaClient(parse_upstream(url or stand_in), 5.0) as client,
        loaded(folder, texts, model, store) as agent,
    ):

        async def embed(texts: list[str], model: str) -> Any:
            answer = await client.ask("/api/embed", {"model": model, "input": texts})
            return answer["embeddings"]

        context: Any = SimpleNamespace(embed=embed, log=logging.getLogger("bench"))
        await agent.vectors.begin(context)
        for question, answer, kind in itertools.chain(*(a["questions"] for a in articles)):
            vector = await agent.vectors.of_question(context, question)
            ways = {"words": (question, None), "both": (question, vector), "vectors": ("", vector)}
            for way, asked in ways.items():
                passages = await agent.search(*asked)
                found = " ".join(" ".join(p.text for p in passages).split())
                for group in (kind, "all"):
                    hits[way, group].append(" ".join(answer.split()) in found)
    say(f"recall@{K} over {len(articles)} articles, by ranking and by what a question shares")
    for (way, kind), some in hits.items():
        say(f"  {way:8} {kind:8} {sum(some)}/{len(some)} = {sum(some) / len(some):.2f}")


async def speed(folder: Path, count: int, rng: random.Random, store: str | None) -> None:
    """Print how fast `count` passages are read, and how long a question takes among them."""
    letters = "aeioubdfgklmnprst"
    words = ["".join(rng.choices(letters, k=rng.randint(3, 10))) for _ in range(INVENTED)]
    weights = list(itertools.accumulate(1 / (n + 50) for n in range(INVENTED)))

    def text(length: int) -> str:
        return " ".join(rng.choices(words, cum_weights=weights, k=length))

    def vector() -> array[float]:
        return normalised([rng.gauss(0, 1) for _ in range(DIMS)])

    texts = {
        f"{n}.md": "\n\n".join(f"## {text(4)}\n\n{text(130)[:890]}" for _ in range(PASSAGES))
        for n in range(count // PASSAGES)
    }
    began = time.perf_counter()
    async with loaded(folder, texts, "random", store) as agent:
        say(f"{count} passages: read in {time.perf_counter() - began:.1f} s")
        say(f"  question, words  {await times(agent, lambda: (text(8), None))}")
        began = time.perf_counter()
        ids = [row for (row,) in await agent.index.execute("SELECT rowid FROM words~")]
        for start in range(0, len(ids), AT_ONCE):
            some = ids[start : start + AT_ONCE]
            await agent.vectors.store(some, [vector() for _ in some])
        await agent.vectors.hasten()
        say(f"  vectors: kept in {time.perf_counter() - began:.1f} s")
        say(f"  question, both   {await times(agent, lambda: (text(8), vector()))}")
        say(f"  {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MB of memory")


async def times(agent: Rag, question: Callable[[], tuple[str, array[float] | None]]) -> str:
    """Ask ROUNDS questions as a request does; return median and worst in milliseconds."""
    took, work = [], []
    for asked in [question() for _ in range(ROUNDS)]:
        began, worked = time.perf_counter(), time.process_time()
        await agent.follower.catch_up(agent.settings["wait"])
        await agent.vectors.count()
        await agent.search(*asked)
        took.append((time.perf_counter() - began) * 1000)
        work.append((time.process_time() - worked) * 1000)
    middle = f"median {statistics.median(took):.1f} ms ({statistics.median(work):.1f} of processor)"
    return f"{middle}, worst {max(took):.1f} ms ({max(work):.1f})"


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ollama", metavar="URL", help="default: the built-in stand-in")
    parser.add_argument("--model", default="demo-embed", help="an embedding model")
    parser.add_argument("--chunks", type=int, nargs="*", default=[1000, 20_000], metavar="N")
    parser.add_argument("--store", metavar="URL", help="an empty PostgreSQL; default: SQLite")
    parser.add_argument("--no-recall", action="store_true", help="measure speed only")
    asked = parser.parse_args()
    if not asked.no_recall:
        with tempfile.TemporaryDirectory() as folder:
            await recall(Path(folder), asked.ollama, asked.model, asked.store)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for count in asked.chunks:
        with tempfile.TemporaryDirectory() as folder:
            await speed(Path(folder), count, random.Random(count), asked.store)


if __name__ == "__main__":
    asyncio.run(main())
