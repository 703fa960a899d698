"""Foreign: makes safe what the code of agents hands over: values, refusals, exceptions.

A subclass of str or dict may lie, an exception's text may fail or hold a prompt, an attribute may
be code that exits. Nothing here raises for that reason but PluginExecutionError.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from kernel import agent as contract
from kernel.agent import Abort, Reply, StoreError
from kernel.errors import Aborted, OSPError, PluginExecutionError, PluginLoadError, UpstreamError

PACKAGES = {"markdown_it": "markdown-it-py", "bs4": "beautifulsoup4", "yaml": "PyYAML"}
PACKAGES |= {"PIL": "pillow", "sklearn": "scikit-learn"}  # modules whose package has another name
PACKAGES |= {"psycopg": "'psycopg[binary]'"}
# A header that an agent may set: neither its name nor its value can change how an answer is framed
HEADER = re.compile(
    r"(?!(?:connection|content-|transfer-|upgrade|trailer|keep-alive|date|x-osp-))"
    r"[\w!#$%&'*+.^`|~-]+: [\t -~]*",
    re.ASCII | re.IGNORECASE,
)


def meaning(exc: BaseException) -> Exception:
    """Return what an exception of foreign code means; the exception itself is the cause."""
    kind, foreign = type(exc), cast(Any, exc)  # isinstance would believe a false __class__
    error: Exception = PluginExecutionError(safe_text(lambda: kind.__name__))
    try:
        if issubclass(kind, PluginExecutionError):
            return cast(Exception, exc)
        if issubclass(kind, UpstreamError | StoreError):  # no text of the agent's, and no prompt
            status = 502 if issubclass(kind, UpstreamError) else 500
            error = PluginExecutionError(f"{error}: {exc}", status)
        elif issubclass(kind, Reply):
            streams = hasattr(type(foreign.text), "__anext__")
            error = Reply(foreign.text if streams else text_of(foreign.text, "a Reply"))
        elif issubclass(kind, Abort):
            error = refusal_of(foreign)
    except PluginExecutionError as wrong_value:
        error = wrong_value
    except BaseException:  # their attributes may be code, too: the exception is a plain failure
        pass
    error.__cause__ = exc
    return error


def refusal_of(exc: Abort) -> Aborted:
    """Return an agent's refusal. Raises PluginExecutionError for values that cannot be sent."""
    status = int.__pos__(exc.status)
    if not 400 <= status <= 599:
        raise PluginExecutionError(f"Abort: {status} is no error status, 400 to 599 are")
    lines = [f"{plain(name)}: {plain(value)}" for name, value in plain(exc.headers).items()]
    if not all(map(HEADER.fullmatch, lines)):
        raise PluginExecutionError("Abort: a header has a name or a value that cannot be sent")
    pairs = [line.encode().split(b": ", 1) for line in lines]
    headers = [(name.lower(), value) for name, value in pairs]
    return Aborted(text_of(exc.why, "Abort's reason"), status, headers)


def text_of(value: Any, what: str) -> str:
    if not issubclass(type(value), str):
        raise PluginExecutionError(f"{what} must be text, not {type(value).__name__}")
    return str.__str__(value)


def plain(value: Any) -> Any:
    """Copy texts, dicts and lists to the built-in types: a subclass's methods may say anything."""
    kind = type(value)
    if issubclass(kind, str):
        return str.__str__(value)
    if issubclass(kind, dict):
        return {plain(key): plain(item) for key, item in dict.items(value)}
    if issubclass(kind, list | tuple):
        items = list.__iter__ if issubclass(kind, list) else tuple.__iter__
        return [plain(item) for item in items(value)]
    return value


def safe_text(make: Callable[[], Any]) -> str:
    """Return the text of what `make` returns, "" if foreign code fails at that."""
    try:
        return str.__str__(str(make()))
    except BaseException:
        return ""


def load_error(exc: Exception, folder: Path) -> PluginLoadError:
    """Return what `run_hook` raised as GET /plugins shows it: type, text, the plugin's own line."""
    cause = exc if exc.__cause__ is None else exc.__cause__
    ours = issubclass(type(cause), OSPError)
    kind = "PluginLoadError" if ours else safe_text(lambda: type(cause).__name__)
    where, advice = diagnosis(cause, folder)
    text = f"{safe_text(lambda: cause)}{advice}"
    return PluginLoadError(text, kind, where or str(folder / "agent.py"))


def diagnosis(exc: BaseException | None, folder: Path) -> tuple[str, str]:
    """Return `file:line` in `folder` and what mends a usual mistake, both "" where unknown."""
    return safe_text(lambda: place_of(exc, folder)), safe_text(lambda: cure(exc, folder))


def last_frame(exc: BaseException | None, folder: Path) -> traceback.FrameSummary | None:
    """Return the last place inside of `folder` that an exception came through."""
    frames = traceback.extract_tb(exc.__traceback__ if exc is not None else None)
    return next((f for f in reversed(frames) if f.filename.startswith(str(folder))), None)


def place_of(exc: BaseException | None, folder: Path) -> str:
    if isinstance(exc, SyntaxError) and str(exc.filename).startswith(str(folder)):
        return f"{exc.filename}:{exc.lineno}"
    frame = last_frame(exc, folder)
    return f"{frame.filename}:{frame.lineno}" if frame else ""


def cure(exc: BaseException | None, folder: Path) -> str:
    """Return what would mend the usual mistakes of an agent's author, or nothing.

    A name that is not known here is said only if the agent's code has it: a prompt is data.
    """
    frame, name = last_frame(exc, folder), getattr(exc, "name", None) or ""
    first, _, inner = name.partition(".")
    if isinstance(exc, NameError):
        ours = getattr(vars(contract).get(name), "__module__", "") == contract.__name__
        if ours or name in ("Message", "Payload"):
            return f"; is `from kernel.agent import {name}` missing?"
        return f"; is `import {name}` missing?" if name in sys.stdlib_module_names else ""
    if isinstance(exc, ModuleNotFoundError):
        if first and ((folder / f"{first}.py").exists() or (folder / first).is_dir()):
            return f"; what is beside agent.py is imported with a dot: from .{first} import ..."
        if inner:
            return "; there is no such file there"
        named = frame and first in re.findall(r"\w+", frame.line or "")
        pip = f"{sys.executable} -m pip install"
        if not find_spec("pip"):  # an environment that uv made
            pip = f"uv pip install --python {sys.executable}"
        line = f"{pip} {PACKAGES.get(first, first) if named else ''}".rstrip()
        return f"; install it for the Python that runs the proxy: {line}"
    if isinstance(exc, TypeError) and "__init__() missing" in str(exc) and not frame:
        return "; an agent is made without arguments, what it needs is in self.settings"
    return ""
