"""Words: finds passages by the words of a question, and makes one ranking of several.

FTS5 knows words by their stems and ranks by bm25: a word that stands in few passages says more.
"""

from __future__ import annotations

import re
import sqlite3
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import accumulate

# What has less than this part of the best score by words does not count beside vectors: or passages
# that share one common word, and are far down in both rankings, come before the best of one.
SHARE = 0.5
RANK = 60  # of reciprocal rank fusion: Cormack, Clarke and Buettcher, SIGIR 2009
WORDS = 40  # of a question that are looked up; a pasted text has thousands
ROWS = 10_000  # passages to rank, as often as a word is in one: what bounds the time
# Left out are words that mean something in the other language: may, will, war, man, hat.
STOP_WORDS = frozenset(
    "a about an and any are as at be been but by can could did do does for from had has have how i"
    " if in is it its me my of on or our s should so t that the their there they this to us was we"
    " were what when where which who whose why with would you your"
    " aber als am auf aus bei bin bist da das dem den der des die du ein eine einem einen einer er"
    " es für haben hatte ich ihr im ist kann können mit nach nicht noch oder sich sie sind und uns"
    " unser unsere vom von wann warum was welche welcher wer wie wir wird wo wurde zu zum zur über"
    "".split()
)


def ranked(db: sqlite3.Connection, question: str, near: Sequence[int], most: int) -> list[int]:
    """Return the ids of passages, the best first, by the question's words and by what is near."""
    words = by_words(db, question, most, SHARE if near else 0)
    return fused([words, near])


def by_words(db: sqlite3.Connection, question: str, most: int, share: float) -> list[int]:
    """Return the ids of up to `most` passages that share words with it, the best first.

    Those are left out whose score is less than `share` of the best one's.
    """
    find = "SELECT rowid, -rank FROM chunks WHERE chunks MATCH ? ORDER BY rank LIMIT ?"
    rows = db.execute(find, [query(db, question), most]).fetchall()
    return [row for row, score in rows if score >= share * rows[0][1]]


def query(db: sqlite3.Connection, question: str) -> str:
    """Return the question as an FTS5 query: its rarest words, one of which must be there.

    They are quoted, so that none is an operator. A question without words becomes the empty word,
    which finds nothing.
    """
    find = "SELECT count(*) FROM chunks WHERE chunks MATCH ?"
    quoted = [f'"{word}"' for word in telling(question)] or ['""']
    counted = sorted((db.execute(find, [word]).fetchone()[0], word) for word in quoted)
    sums = accumulate(count for count, _ in counted)
    few = [word for (_, word), sum_ in zip(counted, sums, strict=True) if sum_ <= ROWS]
    return " OR ".join(few or [counted[0][1]])


def telling(question: str) -> list[str]:
    """Return the words that say what is asked; of many, the longest."""
    words = dict.fromkeys(re.findall(r"\w+", unicodedata.normalize("NFC", question).lower()))
    chosen = [word for word in words if word not in STOP_WORDS] or list(words)
    return sorted(chosen, key=len, reverse=True)[:WORDS]


def fused(rankings: Iterable[Sequence[int]]) -> list[int]:
    """Return what stands in several rankings as one, by the sum of 1 / (RANK + place)."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for place, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + 1 / (RANK + place)
    return sorted(scores, key=scores.__getitem__, reverse=True)
