"""Follower: keeps the index in step with folders, in a thread of its own.

It looks at the folders from time to time, and at once when a question wants it to. A file has
changed when its stamp is not the one that was indexed. A file that cannot be read is left out, with
its reason, and tried again when it changes.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from .index import Damaged, logger, opened, put, writing
from .passages import passages
from .reader import SUFFIXES, Unreadable, read

POLL = 30.0  # seconds between two looks where no question comes
STOP = 3.0  # seconds to wait for the file that is being read
NAMED = 20  # files that the state names; the log names all of those that are left out
NOT_FOLLOWED = "the folder is not followed at present, the log says why"

Found = dict[str, tuple[str, str]]  # by path: stamp, and the name that sources have


class Follower:
    """Reads `folders`, resolved paths by their names, into the index in `file`.

    A file of more than `max_file` bytes is left out.
    """

    def __init__(self, file: Path, folders: Mapping[str, Path], max_file: int) -> None:
        self.file, self.folders, self.max_file = file, folders, max_file
        self.state = "being read"  # how far it is, for a person to read
        self.unread = 1  # files that are still to be read, as far as is known
        self._waiting: list[threading.Event] = []  # of the questions that want a look
        self._wake, self._stopped = threading.Event(), False
        self._thread = threading.Thread(target=self._follow, name="rag", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()
        self._thread.join(STOP)

    def catch_up(self, patience: float) -> None:
        """Wait until the index says what the folders say now, for `patience` seconds at most."""
        looked = threading.Event()
        self._waiting.append(looked)
        self._wake.set()
        looked.wait(patience)

    def _follow(self) -> None:
        while not self._stopped:
            waiting, self._waiting = self._waiting, []
            try:
                self._look()
            except Exception as exc:  # a background task: the next look may do better
                if self.state != NOT_FOLLOWED:  # not at each look
                    logger.warning("folder is not followed: %s: %s", type(exc).__name__, exc)
                self.state = NOT_FOLLOWED
            for looked in waiting:
                looked.set()
            self._wake.wait(POLL)
            self._wake.clear()

    def _look(self) -> None:
        found = {
            path: (stamp, source)
            for name, folder in self.folders.items()
            for path, stamp, source in texts(folder, name)
        }
        with suppress(Damaged):
            return self._update(found)
        self._update(found)  # an index that is made anew

    def _update(self, found: Found) -> None:
        """Make the index say what the folders say."""
        with opened(self.file) as db:
            rows = db.execute("SELECT path, stamp FROM files")
            old = {os.fsdecode(path): stamp for path, stamp in rows}
            if gone := old.keys() - found.keys():
                with writing(db):
                    paths = [[os.fsencode(path)] for path in gone]
                    db.executemany("DELETE FROM files WHERE path = ?", paths)
            stale = sorted(path for path in found if old.get(path) != found[path][0])
            self.unread = len(stale)
            for path in stale:
                if self._stopped:
                    return
                self.state = f"{self.unread} of {len(found)} files are still to be read"
                self._read(db, path, *found[path])
                self.unread -= 1
            if self.state != (state := summary(db)):
                logger.info("folder is read: %s", state)
            self.state = state

    def _read(self, db: sqlite3.Connection, path: str, stamp: str, source: str) -> None:
        """Put one file into the index; one that cannot be read is remembered without passages."""
        name = os.fsencode(source).decode(errors="replace")  # so that it can be printed
        rows, guess, problem = cut(path, self.max_file)
        if problem:
            logger.warning("file is left out: %s: %s", name, problem)
        put(db, [os.fsencode(path), name, stamp, guess, problem], rows)


def cut(path: str, max_file: int) -> tuple[list[tuple[str, str]], str, str]:
    """Return a file's passages, the encoding that was guessed, and why it is left out, or ""."""
    try:
        if os.path.getsize(path) > max_file:
            raise Unreadable(f"has more than {max_file} bytes")
        blocks, guess = read(Path(path).read_bytes(), Path(path).suffix.lower())
        return list(passages(blocks)), guess, ""
    except Unreadable as exc:
        return [], "", str(exc)
    except Exception as exc:  # whatever a foreign parser raises for what is broken
        return [], "", getattr(exc, "strerror", None) or f"is broken: {exc!a}"


def summary(db: sqlite3.Connection) -> str:
    """Return how many files and passages there are, what was guessed, and what is left out."""
    count = "SELECT count(*), coalesce(sum(passages), 0) FROM files WHERE problem = ''"
    text = "{} files, {} passages".format(*db.execute(count).fetchone())
    for what, column in (("encoding guessed", "guess"), ("left out", "problem")):
        find = f"SELECT name, {column} FROM files WHERE {column} != '' ORDER BY name"
        names = [f"{name} ({why})" for name, why in db.execute(find)]
        more = [f"{len(names) - NAMED} more"] * (len(names) > NAMED)
        text += f", {what}: {', '.join(names[:NAMED] + more)}" if names else ""
    return text


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
