"""Models: the names of models, as Ollama takes them, and those that the operator gives.

A preset is a name that stands for a model and, in a chat, for agents.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from kernel.config import Preset


def canonical(model: str) -> str:
    """Return a model's name as Ollama takes it (ParseName in its types/model/name.go).

    A scheme, the registry, the library and the tag may be left out or be there, newer ones take
    `:local` for where it is, and no case is told from another.
    """
    name = model.strip().lower().removesuffix(":local")
    name = re.sub(r"^(?:.*?://)?(?:registry\.ollama\.ai/)?(?:library/)?", "", name)
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def matches(model: str, patterns: Sequence[str]) -> bool:
    """Tell whether one of the patterns means a model; none at all means every one."""
    name = canonical(model)
    names = {model.lower(), name, name.removesuffix(":latest")}
    exact = {canonical(pattern) for pattern in patterns if not set(pattern) & set("*?[")}
    meant = exact | {pattern.lower() for pattern in patterns}
    return not patterns or any(fnmatchcase(n, pattern) for n in names for pattern in meant)


class Presets:
    """The operator's names, found as Ollama finds a model's: `:latest` may be left out."""

    def __init__(self, presets: Mapping[str, Preset], max_body: int) -> None:
        self.named = dict(presets)
        self.max_body = max_body  # bytes of a body in which a name is looked for
        self._found = {canonical(name): preset for name, preset in presets.items()}

    def find(self, model: Any) -> Preset | None:
        known = self._found and isinstance(model, str)
        return self._found.get(canonical(model)) if known else None
