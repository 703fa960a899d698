"""Follower: keeps the index in step with a folder, in a thread of its own.

It looks at the folder from time to time, and at once when a question wants it to. A file has
changed when its stamp is not the one that was indexed. A file that cannot be read is left out, with
its reason, and tried again when it changes and at the next start.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from .chunks import chunks
from .index import Damaged, Index, Row, counts, fields, forget, known, logger, put
from .reader import SUFFIXES, Unreadable, sections

POLL = 5.0  # seconds between two looks, or more:
REST = 100  # times as long as a look took
DEAR = 20  # a question wants a look where as many of them fit into its patience
STOP = 3.0  # seconds to wait for the file that is being read
NAMED = 20  # files that are left out and named in the progress; the log names all


class Follower:
    """Reads `folder`, a resolved path, into `index`, and tells `report` how far it is.

    A file of more than `max_file` bytes is left out.
    """

    def __init__(
        self, index: Index, folder: Path, max_file: int, report: Callable[[str], None]
    ) -> None:
        self.index = index
        self.folder = folder
        self.max_file = max_file
        self.report = report
        self.unread = 1  # files that are still to be read, as far as is known
        self._changed = threading.Condition()  # what follows has
        self._wanted = self._stopped = False
        self._begun = self._ended = 0  # looks
        self._since = 0.0  # when the last look began
        self._took = 0.0  # seconds, until it knew what has changed
        self._fresh = True  # no look has come to its end
        self._failure = ""  # why the last look failed
        self._thread = threading.Thread(target=self._follow, name="rag", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(STOP)

    def catch_up(self, patience: float) -> None:
        """Wait until the index says what the folder says now, for `patience` seconds at most.

        It does not wait where a look takes too long, or one is at work for that long already.
        """
        with self._changed:
            if self._took * DEAR > patience:
                return
            self._wanted, look = True, self._begun + 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended >= look or self._works(patience), patience)

    def _works(self, long: float) -> bool:
        return self._ended < self._begun and time.monotonic() - self._since > long

    def _follow(self) -> None:
        while self._is_due():
            self._since, self._begun = time.monotonic(), self._begun + 1
            try:
                self._look()
                self._failure = ""
            except Exception as exc:  # a background task: the next look may do better
                self._complain(f"{type(exc).__name__}: {exc}")
            with self._changed:
                self._ended = self._begun
                self._changed.notify_all()

    def _complain(self, failure: str) -> None:
        if failure != self._failure:  # not every few seconds
            logger.warning("folder is not followed", extra=fields(error=failure))
        self._failure = failure
        self.report("the folder is not followed at present, the log says why")

    def _is_due(self) -> bool:
        """Wait for the next look; false: there is none any more."""
        with self._changed:
            rest = max(POLL, self._took * REST) if self._begun else 0
            self._changed.wait_for(lambda: self._wanted or self._stopped, rest)
            self._wanted = False
            return not self._stopped

    def _look(self) -> None:
        with suppress(Damaged):
            return self._compare()
        self.unread = 1
        self._compare()  # with an empty index

    def _compare(self) -> None:
        """Make the index say what the folder says."""
        with self.index.open() as db:
            found = dict(texts(self.folder, self.max_file))
            old = known(db, with_left_out=not self._fresh)  # at first those are tried again
            gone = old.keys() - found.keys()
            stale = sorted(path for path in found if old.get(path) != found[path])
            self.unread, self._took = len(stale), time.monotonic() - self._since
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
        name, problem = self._name(path), ""
        rows: list[Row] = []
        try:
            rows = self._rows(path, name)
        except FileNotFoundError:
            return  # deleted since
        except OSError as exc:
            problem = exc.strerror or "cannot be read"
        except Exception as exc:  # whatever a foreign parser raises for what is broken
            problem = str(exc) if isinstance(exc, Unreadable) else f"is broken: {exc!a}"
        if problem:
            logger.warning("file is left out", extra=fields(file=name, why=problem))
        put(db, path, stamp, problem, rows)

    def _rows(self, path: str, name: str) -> list[Row]:
        with open(path, "rb") as file:
            data = file.read(self.max_file + 1)
        if len(data) > self.max_file:
            raise Unreadable(f"has more than {self.max_file} bytes")
        return [(name, *chunk) for chunk in chunks(sections(data, Path(path).suffix.lower()))]

    def _name(self, path: str) -> str:
        """Return how sources name a file: seen from the folder, with slashes, and printable."""
        return os.fsencode(Path(path).relative_to(self.folder).as_posix()).decode(errors="replace")

    def _sum_up(self, db: sqlite3.Connection) -> None:
        files, passages, problems = counts(db)
        seconds = round(time.monotonic() - self._since, 2)
        facts = fields(files=files, passages=passages, left_out=len(problems), seconds=seconds)
        logger.info("folder is read", extra=facts)
        names = [f"{self._name(path)} ({why})" for path, why in problems[:NAMED]]
        names += [f"{len(problems) - NAMED} more"] * (len(problems) > NAMED)
        left_out = f", left out: {', '.join(names)}" if names else ""
        self.report(f"{files} files, {passages} passages{left_out}")


def texts(folder: Path, max_file: int) -> Iterator[tuple[str, str]]:
    """Yield path and stamp of each file that is to be read; what is hidden is not.

    A stamp tells whether a file has changed, and on which side of the limit it is. Links to folders
    are not followed, and of links to files only those that stay in the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    folders = [str(folder)]
    while folders:
        parent = folders.pop()
        try:
            entries = list(os.scandir(parent))
        except PermissionError:
            yield parent, "closed"  # reading it will say so
            continue
        except FileNotFoundError:
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.name.lower().endswith(SUFFIXES) and not leads_out(entry, folder):
                yield from stamped(entry, max_file)


def leads_out(entry: os.DirEntry[str], folder: Path) -> bool:
    return entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(folder)


def stamped(entry: os.DirEntry[str], max_file: int) -> Iterator[tuple[str, str]]:
    with suppress(OSError):  # deleted since, or a link to nowhere
        is_ = entry.stat()
        if stat.S_ISREG(is_.st_mode):
            large = is_.st_size > max_file
            yield entry.path, f"{is_.st_mtime_ns} {is_.st_ctime_ns} {is_.st_size} {large}"
