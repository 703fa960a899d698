"""Folders: opens what lies in named folders, and nothing else.

A path is `NAME/folder/file`. Each step is opened relative to the step before it and without
following a link (`openat` with `O_NOFOLLOW`), so that nothing outside is opened, whatever a path
says and whoever moves folders meanwhile. What is not listed cannot be opened either: hidden files,
links, devices, and names with signs that nobody sees.
"""

from __future__ import annotations

import codecs
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE, S_ISDIR, S_ISREG

Parts = tuple[str, ...]  # of a path

# To read; a link is an error, a FIFO does not hang. Windows has none of these, and no `openat`.
FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY"))
# Controls, slashes, signs that are invisible or turn the direction, halves of characters
ODD = re.compile(r"[\0-\x1f\x7f-\x9f/\\\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
CONTROLS = bytes({*range(32)} - {*b"\t\n\v\f\r\x1b"})  # bytes that a text does not hold
LARGEST = 2_000_000  # bytes of a file


class Folders:
    """Folders by name; with `hidden` also what begins with a dot."""

    def __init__(self, roots: Mapping[str, str], *, hidden: bool) -> None:
        """Raises ValueError if one does not exist, OSError where this cannot work."""
        if os.open not in os.supports_dir_fd:
            raise OSError("this system, like Windows, cannot open a file relative to a folder")
        self.hidden = hidden
        self.roots = {name: Path(text).expanduser() for name, text in roots.items()}
        for name, root in self.roots.items():
            if not (self.shows(name) and root.is_absolute() and root.is_dir()):
                what = f"[agents.files.settings.folders] {name} = {roots[name]!r}"
                raise ValueError(f"{what}: it must be a name, and an existing folder like ~/notes")

    def parse(self, path: str) -> Parts:
        """Return the parts of a path; the name of a single folder may be left out."""
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if parts and parts[0] not in self.roots:
            if len(self.roots) > 1:
                raise FileNotFoundError(f"a path begins with {' or '.join(self.roots)}")
            parts = [*self.roots, *parts]
        return tuple(parts)

    def shows(self, name: str) -> bool:
        """Tell whether a name may be seen and opened."""
        hidden = name.startswith(".") and not self.hidden
        return not (hidden or name in ("", ".", "..") or ODD.search(name))

    @contextmanager
    def opened(self, parts: Parts) -> Iterator[int]:
        """Yield a descriptor of a file or folder.

        Raises FileNotFoundError, which says what is there; OSError if a root cannot be opened.
        """
        if not parts:
            raise FileNotFoundError(f"path is missing: it begins with {' or '.join(self.roots)}")
        at = os.open(self.roots[parts[0]], os.O_RDONLY | os.O_DIRECTORY)
        try:
            for depth, name in enumerate(parts[1:], 1):
                try:
                    below = os.open(name if self.shows(name) else "", FLAGS, dir_fd=at)
                except OSError as exc:
                    there = ", ".join(self.names(at))[:500] or "nothing"
                    text = (
                        f"{name[:200]!r}: {exc.strerror}; in {'/'.join(parts[:depth])} is: {there}"
                    )
                    raise FileNotFoundError(text) from exc
                os.close(at)
                at = below
            yield at
        finally:
            os.close(at)

    def names(self, at: int) -> list[str]:
        """Return what an open folder shows, sorted; names of folders end with a slash."""
        if not is_folder(at):
            raise ValueError("it is a file, not a folder")
        with os.scandir(at) as entries:
            kinds = ((e.name, e.is_dir(follow_symlinks=False), e) for e in entries)
            return sorted(
                name + "/" * folder
                for name, folder, entry in kinds
                if self.shows(name) and (folder or entry.is_file(follow_symlinks=False))
            )

    def entries(self, parts: Parts) -> list[str]:
        """Return what a folder shows, or the folders for (). Raises OSError, ValueError."""
        if not parts:
            return [f"{name}/" for name in self.roots]
        with self.opened(parts) as at:
            return self.names(at)

    def read(self, parts: Parts) -> tuple[str, str]:
        """Return a file's text, and what is to be said of it. Raises OSError, ValueError."""
        with self.opened(parts) as at:
            return text_of(at)

    def walk(self, parts: Parts) -> Iterator[tuple[str, str]]:
        """Yield all paths from one on, or all for (), each with its text or "". Raises OSError."""
        if parts:
            with self.opened(parts):  # or an error says what is there
                pass
        todo = [parts] if parts else [(name,) for name in reversed(self.roots)]
        while todo:
            parts, text = todo.pop(), ""
            with suppress(OSError, ValueError), self.opened(parts) as at:
                if is_folder(at):
                    todo += [(*parts, name.rstrip("/")) for name in reversed(self.names(at))]
                else:
                    text, _ = text_of(at)
            yield "/".join(parts), text

    def write(self, parts: Parts, data: bytes) -> int | None:
        """Put a file into a folder that exists, all of it or nothing; links are not followed.

        Return the size of the file that it replaces, or None. Raises OSError, ValueError.
        """
        if len(parts) < 2 or not self.shows(name := parts[-1]) or len(data) > LARGEST:
            raise ValueError(f"this is no name for a file, or it has more than {LARGEST} bytes")
        temporary, before = f".{secrets.token_hex(8)}.tmp", None
        with self.opened(parts[:-1]) as at:
            with suppress(FileNotFoundError):
                before = os.stat(name, dir_fd=at, follow_symlinks=False)
            if before and not S_ISREG(before.st_mode):
                raise ValueError("it is no file, and is not replaced")
            new = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=at)
            try:
                with open(new, "wb") as file:
                    file.write(data)
                    if before:
                        os.fchmod(new, S_IMODE(before.st_mode))
                    file.flush()
                    os.fsync(new)
                os.replace(temporary, name, src_dir_fd=at, dst_dir_fd=at)
            except BaseException:
                os.unlink(temporary, dir_fd=at)
                raise
        return before and before.st_size


def is_folder(at: int) -> bool:
    return S_ISDIR(os.fstat(at).st_mode)


def text_of(at: int) -> tuple[str, str]:
    if not S_ISREG(os.fstat(at).st_mode):
        raise ValueError(f"it is {'a folder: list it' if is_folder(at) else 'no file'}")
    with open(at, "rb", closefd=False) as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"it has more than {LARGEST} bytes")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace"), ""
    if len(data) - len(data.translate(None, CONTROLS)) > len(data) / 100:
        raise ValueError("it is no text")
    try:
        return data.decode("utf-8-sig"), ""
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace"), " (not UTF-8, read as Windows-1252)"
