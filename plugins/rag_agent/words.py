"""Words: finds passages by their words, ranked by bm25.

SQLite's FTS5 has all that is needed. For PostgreSQL the words are stemmed by the same FTS5, an
index of GIN finds the passages, and the formula is that of FTS5: so both find the same in the same
order. There each word stands between two spaces of its own: a word is in a text as often as it can
be taken out.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from itertools import accumulate

from kernel.agent import beginning

from .index import Execute

ROWS = 5_000  # passages to rank, as often as a word is in one: what bounds the time
WORDS = 40  # of a question that are looked up; a pasted text has thousands
PLANNING = "SET LOCAL enable_seqscan TO off; SET LOCAL jit TO off"  # they take longer here
QUOTES = "':*"
LONGEST = 500  # characters of a word: PostgreSQL takes 2,046 bytes
# File names and headings say what a text is about: a word counts double there.
COUNT = "SELECT count(*) FROM words~ WHERE words~ MATCH ${}"
COUNT_THERE = "SELECT passages FROM counts~ WHERE word = trim(${}, '''')"
COUNT_ALIKE = "SELECT count(*) FROM words~ WHERE (title || body)::tsvector @@ ${}::tsquery"
FIND = "SELECT rowid FROM words~ WHERE words~ MATCH $1 AND rank MATCH 'bm25(2, 1)' ORDER BY rank"
FIND_THERE = f"""
SELECT rowid FROM (
  SELECT rowid, size, title || title || body AS words FROM words~
  WHERE (title || body)::tsvector @@ $1::tsquery LIMIT {2 * ROWS}
) AS found ORDER BY (
  SELECT sum(idf / (1 + 1.2 * (0.25 + 0.75 * size / $4::float8) / often))
  FROM unnest($2::text[], $3::float8[]) AS terms (term, idf), LATERAL (
    SELECT nullif(octet_length(words) - octet_length(replace(words, term, '')), 0)::float8
      / octet_length(term) AS often
  ) AS counted
) DESC, rowid
"""
TOTALS = "SELECT sum(passages), sum(words) FROM files~"


async def by_words(execute: Execute, words: Sequence[str], engine: str) -> list[int]:
    """Return the ids of the passages that hold one of the rarest of some words, the best first.

    A word that is nowhere in this form is looked for by its beginning.
    """
    longest = sorted(words, key=len, reverse=True)[:WORDS]
    exact, alike = map(list, zip(*terms(longest, engine), strict=True)) if longest else ([], [])
    one, more = (COUNT, COUNT) if engine == "sqlite" else (COUNT_THERE, COUNT_ALIKE)
    counts = await counted(execute, one, exact)
    others = [second for first, second in zip(exact, alike, strict=True) if not counts[first]]
    counts |= await counted(execute, more, others)
    found = sorted((term for term, count in counts.items() if count), key=counts.__getitem__)
    sums = accumulate(counts[term] for term in found)
    few = [term for term, total in zip(found, sums, strict=True) if total <= ROWS] or found[:1]
    if not few:
        return []
    if engine == "sqlite":
        return [row for (row,) in await execute(FIND, " OR ".join(few))]
    ((passages, size),) = await execute(TOTALS)
    rare = [math.log((passages - n + 0.5) / (n + 0.5)) for n in map(counts.__getitem__, few)]
    idf = [value if value > 0 else 1e-6 for value in rare]  # as FTS5 has it
    plain = [f" {term.strip(QUOTES)}{' ' * term.endswith(QUOTES[0])}" for term in few]
    await execute(PLANNING)
    values = " | ".join(few), plain, idf, size / passages
    return [row for (row,) in await execute(FIND_THERE, *values)]


async def counted(execute: Execute, sql: str, terms: Sequence[str]) -> dict[str, int]:
    """Return how many passages have each."""
    counts = ", ".join(f"coalesce(({sql.format(n)}), 0)" for n, _ in enumerate(terms, 1))
    rows = await execute(f"SELECT {counts}", *terms) if terms else [()]
    return dict(zip(terms, rows[0], strict=True))


def terms(words: Sequence[str], engine: str) -> list[tuple[str, str]]:
    """Return how each word is found, and how by its beginning. Quoted, none is an operator."""
    starts = map(beginning, words)
    if engine == "sqlite":
        return [(f'"{word}"', f'"{start}"*') for word, start in zip(words, starts, strict=True)]
    stems = [found[0] for found in stemmed([*words, *starts])]
    return [(f"'{a}'", f"'{b}':*") for a, b in zip(stems, stems[len(words) :], strict=False)]


def spaced(texts: Iterable[str]) -> list[str]:
    """Return the stems of texts as PostgreSQL has them, each between spaces of its own."""
    return ["".join(f" {stem} " for stem in stems) for stems in stemmed(texts)]


def stemmed(texts: Iterable[str]) -> list[list[str]]:
    """Return the stems of the words of each text, by the tokenizer of FTS5."""
    found: list[list[str]] = []
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE VIRTUAL TABLE words USING fts5 (text, tokenize = 'porter ascii')")
        db.execute("CREATE VIRTUAL TABLE stems USING fts5vocab (words, instance)")
        for number, text in enumerate(texts):
            db.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", [number, text])
            found.append([])
        for stem, number in db.execute("SELECT term, doc FROM stems"):
            found[number].append(stem[:LONGEST])
    return found
