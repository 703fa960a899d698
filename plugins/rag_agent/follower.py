"""Follower: keeps the index in step with folders, in a thread of its own.

It looks at the folders from time to time, and at once when a question wants it to. A file has
changed when its stamp is not the one that was indexed. A file that cannot be read is left out, with
its reason, and tried again when it changes and at the next start.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from .index import Damaged, Index, fields, forget, logger, put
from .passages import passages
from .reader import SUFFIXES, Unreadable, read

POLL = 5.0  # seconds between two looks, or more:
REST = 100  # times as long as a look took
DEAR = 20  # a question wants a look where as many of them fit into its patience
STOP = 3.0  # seconds to wait for the file that is being read
NAMED = 20  # files that the progress names; the log names all


class Follower:
    """Reads `folders`, resolved paths by their names, into `index`; `report` is told how far it is.

    A file of more than `max_file` bytes is left out.
    """

    def __init__(
        self,
        index: Index,
        folders: Mapping[str, Path],
        max_file: int,
        report: Callable[[str], None],
    ) -> None:
        self.index, self.folders, self.max_file, self.report = index, folders, max_file, report
        self.unread = 1  # files that are still to be read, as far as is known
        self._changed = threading.Condition()  # what follows has
        self._wanted, self._done = 1, 0  # looks: of how many the end is awaited, and was reached
        self._took = 0.0  # seconds, until a look knew what has changed
        self._fresh, self._stopped, self._failure = True, False, ""
        self._thread = threading.Thread(target=self._follow, name="rag", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped = True
        with self._changed:
            self._changed.notify_all()
        self._thread.join(STOP)

    def catch_up(self, patience: float) -> None:
        """Wait until the index says what the folders say now, for `patience` seconds at most."""
        if self._took * DEAR > patience:
            return
        with self._changed:
            self._wanted = wanted = self._wanted + 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._done >= wanted, patience)

    def _follow(self) -> None:
        while not self._stopped:
            wanted = self._wanted
            try:
                with suppress(Damaged):  # the next look begins with an empty index
                    self._look()
                    self._failure, self._done = "", wanted
            except Exception as exc:  # a background task: the next look may do better
                failure, self._done = f"{type(exc).__name__}: {exc}", wanted
                if failure != self._failure:  # not every few seconds
                    logger.warning("folder is not followed", extra=fields(error=failure))
                self._failure = failure
                self.report("the folder is not followed at present, the log says why")
            with self._changed:
                self._changed.notify_all()
                rest = max(POLL, self._took * REST)
                self._changed.wait_for(lambda: self._stopped or self._wanted > self._done, rest)

    def _look(self) -> None:
        """Make the index say what the folders say."""
        began = time.monotonic()
        found = {path: stamp for it in self.folders.values() for path, stamp in texts(it)}
        with self.index.open() as db:
            # At first those that were left out are tried again.
            find = "SELECT path, stamp FROM files WHERE problem = '' OR ?"
            old = {os.fsdecode(path): stamp for path, stamp in db.execute(find, [not self._fresh])}
            gone = old.keys() - found.keys()
            stale = sorted(path for path in found if old.get(path) != found[path])
            self.unread, self._took = len(stale), time.monotonic() - began
            if gone:
                forget(db, gone)
            for path in stale:
                if self._stopped:
                    return
                self.report(f"{self.unread} of {len(found)} files are still to be read")
                self._read(db, path, found[path])
                self.unread -= 1
            if self._fresh or gone or stale:
                self._sum_up(db)
            self._fresh = False

    def _read(self, db: sqlite3.Connection, path: str, stamp: str) -> None:
        """Put one file into the index; one that cannot be read is remembered without passages."""
        name = named(path, self.folders)
        rows, guess, problem = list[tuple[str, str]](), "", ""
        try:
            with open(path, "rb") as file:
                data = file.read(self.max_file + 1)
            if len(data) > self.max_file:
                raise Unreadable(f"has more than {self.max_file} bytes")
            blocks, guess = read(data, Path(path).suffix.lower())
            rows = list(passages(blocks))
        except FileNotFoundError:
            return  # deleted since
        except Exception as exc:  # whatever a foreign parser raises for what is broken
            known = str(exc) if isinstance(exc, Unreadable) else getattr(exc, "strerror", None)
            problem = known or f"is broken: {exc!a}"
            logger.warning("file is left out", extra=fields(file=name, why=problem))
        put(db, path, [name, stamp, guess, problem], rows)

    def _sum_up(self, db: sqlite3.Connection) -> None:
        find = "SELECT name, guess, problem, passages FROM files ORDER BY name"
        rows = db.execute(find).fetchall()
        notes = {
            "encoding guessed": [f"{name} ({guess})" for name, guess, _, _ in rows if guess],
            "left out": [f"{name} ({problem})" for name, _, problem, _ in rows if problem],
        }
        text = (
            f"{len(rows) - len(notes['left out'])} files, {sum(row[-1] for row in rows)} passages"
        )
        for what, names in notes.items():
            more = [f"{len(names) - NAMED} more"] * (len(names) > NAMED)
            text += f", {what}: {', '.join(names[:NAMED] + more)}" if names else ""
        logger.info("folder is read: %s", text)
        self.report(text)


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield path and stamp of each file that is to be read; what is hidden is not.

    Links to folders are not followed, and of links to files only those that stay in the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    for parent, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            path = os.path.join(parent, name)
            if name.lower().endswith(SUFFIXES) and (stamp := stamp_of(path, name, folder)):
                yield path, stamp


def stamp_of(path: str, name: str, folder: Path) -> str:
    """Return what differs once a file has changed; "" for what is not to be read."""
    try:
        info = os.lstat(path)
        if stat.S_ISLNK(info.st_mode) and Path(os.path.realpath(path)).is_relative_to(folder):
            info = os.stat(path)
    except OSError:  # deleted since, or a link to nowhere
        return ""
    if name.startswith(".") or not stat.S_ISREG(info.st_mode):
        return ""
    return f"{info.st_mtime_ns} {info.st_ctime_ns} {info.st_size}"


def named(path: str, folders: Mapping[str, Path]) -> str:
    """Return how sources name a file: seen from its folder, with slashes, and printable."""
    around = {name: it for name, it in folders.items() if Path(path).is_relative_to(it)}
    prefix = max(around, key=lambda name: len(around[name].parts))
    name = (prefix / Path(path).relative_to(around[prefix])).as_posix()
    return os.fsencode(name).decode(errors="replace")
