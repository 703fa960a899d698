"""Presets: models that the operator describes and Ollama is asked to make.

So a preset stands under its own name in every list, dialect and endpoint: a manifest of a few
hundred bytes, no copy of weights. The chat slice adds the preset's agents. `presets.json` in the
data folder notes what OSP made, and only that is ever changed. What keeps a preset from being made
is logged once, with the cure, and the preset is tried again.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from kernel.client import OllamaClient
from kernel.config import Preset
from kernel.errors import ConfigError, OSPError, UpstreamError
from kernel.models import canonical

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 60.0  # seconds between two attempts


class Presets:
    """The operator's presets, found as Ollama finds a model: `:latest` may be left out.

    `table` is [presets] of osp.toml, `data` the folder of the note, `pause` the seconds until the
    second attempt; later pauses are longer.
    """

    def __init__(
        self, table: Mapping[str, Preset], data: Path = Path(), pause: float = 5.0
    ) -> None:
        self._table = {canonical(name): (name, preset) for name, preset in table.items()}
        self._data = data
        self._pause = pause

    def find(self, model: str) -> Preset | None:
        """Return the preset of this name."""
        return self._table.get(canonical(model), ("", None))[1] if self._table else None

    def names(self, model: str) -> list[str]:
        """Return the model itself and, for a preset, what it is made from."""
        names = [model]
        while (preset := self.find(names[-1])) and preset.model not in names:
            names.append(preset.model)
        return names

    @asynccontextmanager
    async def kept(self, client: OllamaClient) -> AsyncIterator[None]:
        """Make the presets in the background for as long as the block runs."""
        task = asyncio.create_task(self._keep(client))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task}, timeout=1)

    async def _keep(self, client: OllamaClient) -> None:
        pause = self._pause
        waiting = dict.fromkeys(self._table, "")  # each with what was logged of it last
        while waiting:
            for name, logged in list(waiting.items()):
                try:
                    await self._make(client, name)
                    del waiting[name]
                except Exception as exc:  # whatever goes wrong with one preset, the others are made
                    waiting[name] = str(exc) if isinstance(exc, OSPError) else repr(exc)
                    if waiting[name] != logged:
                        fields = {"preset": self._table[name][0], "error": waiting[name]}
                        logger.warning("preset not made", extra={"fields": fields})
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _make(self, client: OllamaClient, name: str) -> None:
        """Make a preset that Ollama does not have or that has changed. Raises OSPError."""
        shown, preset = self._table[name]
        models, notes = await listed(client), self._read()
        made, base = models.get(name), models.get(canonical(preset.model))
        noted = notes.get(name, [None, None])
        if made and noted[1] not in (made, ""):
            raise ConfigError(
                "Ollama has a model of this name that OSP did not make, and it stays as it is:"
                f" give the preset another name, or type `ollama rm {shown}`"
            )
        body = {"model": shown, "from": preset.model, "stream": False}
        body |= {"system": preset.system, "parameters": preset.options}
        if made and (noted == [[body, base], made] or not base):
            return
        if not base:
            raise ConfigError(f"Ollama has no {preset.model}: type `ollama pull {preset.model}`")
        self._write(notes, name, [[body, base], ""])  # stopped from here on, it is OSP's own still
        try:
            await client.ask("/api/create", body)
        except UpstreamError as exc:
            if (await listed(client)).get(name) == made:  # Ollama made nothing
                self._write(notes, name, noted)
            cure = f"mend [presets.{shown}], allow /api/create, or type `ollama create {shown}`"
            raise ConfigError(f"{exc}: {cure}") from exc
        self._write(notes, name, [[body, base], (await listed(client))[name]])
        logger.info("preset made", extra={"fields": {"preset": shown, "from": preset.model}})

    def _read(self) -> dict[str, Any]:
        """Return what was asked for and the digest of what Ollama made, for each preset."""
        file = self._data / "presets.json"
        try:
            return dict(json.loads(file.read_bytes())) if file.exists() else {}
        except (OSError, ValueError, TypeError) as exc:
            raise ConfigError(f"{file} cannot be read ({exc}): mend or delete it") from exc

    def _write(self, notes: dict[str, Any], name: str, note: list[Any]) -> None:
        """Note a preset; the digest "" is one not yet known."""
        notes[name] = note
        self._data.mkdir(parents=True, exist_ok=True)
        fresh = self._data / "presets.new"
        fresh.write_text(json.dumps(notes), encoding="utf-8")
        fresh.replace(self._data / "presets.json")


async def listed(client: OllamaClient) -> dict[str, str]:
    """Return the digest of each model that Ollama has, by its canonical name."""
    models = (await client.ask("/api/tags"))["models"] or []
    return {canonical(model["name"]): model["digest"] for model in models}
