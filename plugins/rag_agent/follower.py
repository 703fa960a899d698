"""Follower: keeps the index in step with folders.

It looks at the folders from time to time, and at once when a question wants it to. A file has
changed when its stamp is not the one that was indexed, and its bytes are others: copies of a folder
on several machines are one. A file that cannot be read is left out, with its reason, and tried
again when it changes. Of all proxies one at a time writes; the others wait for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kernel.agent import StoreError, index_words

from .index import LEASE, UNUSED, Index, Taken, logger
from .passages import passages
from .reader import SUFFIXES, Unreadable, read
from .words import spaced

T = TypeVar("T")
POLL = 30.0  # seconds between two looks where no question comes
AGAIN = 0.1  # seconds between two looks while a question waits for what another proxy reads
STOP = 3.0  # seconds to wait for what is being written
NAMED = 20  # files that the state names; the log names all of those that are left out
NOT_FOLLOWED = "the folder is not followed at present, the log says why"
COUNT = "SELECT count(*), coalesce(sum(passages), 0) FROM files~ WHERE problem = ''"

Found = dict[str, tuple[str, str]]  # by path: stamp, and the name that sources have


class Cut(NamedTuple):
    """What is in a file: rows as the index has them, and why it is left out, or ""."""

    digest: str
    rows: Sequence[tuple[str, str, str, str]] = ()
    guess: str = ""  # the encoding that was guessed
    problem: str = ""
    words: int = 0


class Follower:
    """Reads `folders`, resolved paths by their names, into the index; `start` it on the loop.

    A file of more than `max_file` bytes is left out.
    """

    def __init__(self, index: Index, folders: Mapping[str, Path], max_file: int) -> None:
        self.index, self.folders, self.max_file = index, folders, max_file
        self.state = "being read"  # how far it is, for a person to read
        self.unread = 1  # files that are still to be read, as far as is known
        self._old: dict[str, tuple[str, str]] = {}  # stamps and digests in the index, by path
        self._version = -1  # of the index, at that time
        self._text, self._told = "", -1  # the state of a version, when all was read
        self._same: dict[str, str] = {}  # stamps of files whose bytes are those in the index
        self._waiting = set[asyncio.Event]()  # of the questions that want a look
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=STOP)

    async def catch_up(self, patience: float) -> None:
        """Wait until the index says what the folders say now, for `patience` seconds at most."""
        looked = asyncio.Event()
        self._waiting.add(looked)
        self._wake.set()
        with suppress(TimeoutError):
            await asyncio.wait_for(looked.wait(), patience)
        self._waiting.discard(looked)

    async def _follow(self) -> None:
        while True:
            waiting, pause = {*self._waiting}, POLL
            self._wake.clear()
            try:
                await self._look()
            except Taken:  # the questions still wait
                waiting, pause = set(), AGAIN if self._waiting else LEASE / 2
            except Exception as exc:  # a background task: the next look may do better
                if self.state != NOT_FOLLOWED:  # not at each look
                    logger.warning("folder is not followed: %s: %s", type(exc).__name__, exc)
                self.state = NOT_FOLLOWED
            for looked in waiting:
                looked.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)

    async def _look(self) -> None:
        found = await in_thread(files, self.folders)
        with suppress(StoreError):
            return await self._update(found)
        await self._update(found)  # a damaged file was removed: it is made anew

    async def _update(self, found: Found) -> None:
        """Make the index say what the folders say. Raises Taken while another proxy does."""
        idle = await self._read_index()
        todo, gone = await in_thread(self._changes, found)
        if todo or gone or idle > UNUSED / 2:
            self.unread = len(todo)
            self.state = f"{self.unread} of {len(found)} files are still to be read"
            async with self.index.leading("files"):
                await self._read_index()  # which another proxy may have changed since
                await self._write(found)
                await self.index.clean()
                await self._read_index()
        self.unread = 0
        if self._told != self._version:
            text, self._told = await self._summary(), self._version
            if text != self._text:
                logger.info("folder is read: %s", text)
            self._text = text
        self.state = self._text

    async def _read_index(self) -> float:
        """See which files are in the index, and return for how long nobody led it."""
        version, _, idle = await self.index.known()
        if version != self._version:
            rows = await self.index.execute("SELECT path, stamp, digest FROM files~")
            self._old = {os.fsdecode(path): (stamp, digest) for path, stamp, digest in rows}
            self._version = version
        return idle

    def _changes(self, found: Found) -> tuple[list[str], set[str]]:
        """Return the files that may have changed, and those that are gone."""
        both = {path: (self._old.get(path, ("",))[0], self._same.get(path)) for path in found}
        todo = sorted(path for path, stamps in both.items() if found[path][0] not in stamps)
        return todo, self._old.keys() - found.keys()

    async def _write(self, found: Found) -> None:
        todo, gone = await in_thread(self._changes, found)
        for path in gone:
            await self.index.forget(path)
        for self.unread, path in zip(range(len(todo), 0, -1), todo, strict=True):
            self.state = f"{self.unread} of {len(found)} files are still to be read"
            await self._read(path, *found[path])

    async def _read(self, path: str, stamp: str, source: str) -> None:
        """Put one file into the index; one that cannot be read is remembered without passages."""
        name = os.fsencode(source).decode(errors="replace")  # so that it can be printed
        old = self._old.get(path, ("", ""))[1]
        work = in_thread(cut, path, name, self.max_file, old, self.index.server)
        it = await self.index.during("files", work)
        if it.digest == old:
            self._same[path] = stamp
            return
        if it.problem:
            logger.warning("file is left out: %s: %s", name, it.problem)
        file = os.fsencode(path), name, stamp, it.digest, it.guess, it.problem
        await self.index.put(file, it.rows, it.words)

    async def _summary(self) -> str:
        """Return how many files and passages there are, what was guessed, what is left out."""
        async with self.index.transaction() as execute:
            text = "{} files, {} passages".format(*(await execute(COUNT))[0])
            for what, column in (("encoding guessed", "guess"), ("left out", "problem")):
                find = f"SELECT name, {column} FROM files~ WHERE {column} != '' ORDER BY name"
                names = [f"{name} ({why})" for name, why in await execute(find)]
                more = [f"{len(names) - NAMED} more"] * (len(names) > NAMED)
                text += f", {what}: {', '.join(names[:NAMED] + more)}" if names else ""
            return text


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Do work as asyncio.to_thread does, in a thread that the end of the process waits not for."""
    future = Future[T]()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work(*args))
        except Exception as exc:
            future.set_exception(exc)

    threading.Thread(target=run, name="rag", daemon=True).start()
    return await asyncio.wrap_future(future)


def cut(path: str, name: str, max_file: int, old: str, stems: bool) -> Cut:
    """Read and cut a file, unless its digest is `old`; its words are stems where that is wanted."""
    digest = ""
    try:
        if os.path.getsize(path) > max_file:
            raise Unreadable(f"has more than {max_file} bytes")
        data = Path(path).read_bytes()
        if (digest := hashlib.sha256(data).hexdigest()) == old:
            return Cut(digest)
        blocks, guess = read(data, Path(path).suffix.lower())
        texts = [(clean(heading), clean(text)) for heading, text in passages(blocks)]
    except Unreadable as exc:
        return Cut(digest or str(exc), problem=str(exc))
    except Exception as exc:  # whatever a foreign parser raises for what is broken
        problem = getattr(exc, "strerror", None) or f"is broken: {exc!a}"
        return Cut(digest or problem, problem=problem)
    title = os.path.splitext(name)[0]
    titles = [index_words(f"{title} {heading}") for heading, _ in texts]
    bodies = [index_words(text) for _, text in texts]
    count = len(" ".join(titles + bodies).split())
    if stems:
        titles, bodies = spaced(titles), spaced(bodies)
    rows = [(a, b, *row) for a, b, row in zip(titles, bodies, texts, strict=True)]
    return Cut(digest, rows, guess, words=count)


def clean(text: str) -> str:
    """Return what every store can keep: no half characters and no NUL."""
    return text.encode(errors="replace").decode().replace("\0", " ")


def files(folders: Mapping[str, Path]) -> Found:
    """Return the files that are to be read. Raises FileNotFoundError for a folder."""
    return {
        path: (stamp, source)
        for name, folder in folders.items()
        for path, stamp, source in texts(folder, name)
    }


def texts(folder: Path, name: str) -> Iterator[tuple[str, str, str]]:
    """Yield path, stamp and name of each file that is to be read.

    What is hidden is not, and no link is followed: it could lead out of the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    start, before = len(os.path.join(folder, "")), f"{name}/" if name else ""
    for parent, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for file in files:
            path = os.path.join(parent, file)
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                with suppress(OSError):  # deleted since
                    info = os.lstat(path)
                    stamp = f"{info.st_mtime_ns} {info.st_ctime_ns} {info.st_size}"
                    if stat.S_ISREG(info.st_mode):
                        yield path, stamp, before + path[start:].replace(os.sep, "/")
