"""Models: the names of models, as Ollama takes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase


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
