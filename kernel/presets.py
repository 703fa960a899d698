"""Presets: models that the operator describes and Ollama is asked to make.

So a preset stands under its own name in every list, dialect and endpoint: a manifest of a few
hundred bytes, no copy of weights. The chat slice adds what a model cannot hold: agents, `think`
and `keep_alive`. `presets.json` in the data folder notes what OSP made, and only that is ever
changed or removed. What keeps a preset from being made is logged once, with the cure, and the
preset is tried again. Ollama checks no parameter until a model is asked.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from kernel.client import OllamaClient, whole
from kernel.config import Preset
from kernel.errors import ConfigError, OSPError, UpstreamError
from kernel.models import canonical

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 60.0  # seconds between two attempts
Table = dict[str, Any]  # by the canonical name of a model

CURRENT = "as the settings say"
FOREIGN = "Ollama has a model of this name that OSP did not make, and it stays as it is"
LEFT = "no longer in the settings: `presets --prune` removes it"
CURE = "mend [presets.{0}], allow /api/create if a proxy forbids it, or type `ollama create {0}`"


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
            # One that is made from another comes after it
            for name, logged in sorted(waiting.items(), key=lambda each: len(self.names(each[0]))):
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

    async def states(self, client: OllamaClient) -> dict[str, str]:
        """Return how each preset is, by its name: those in the settings, and others of OSP's here.

        Raises OSPError.
        """
        models, notes = await listed(client), self._read()
        names = {**self._table, **{name: () for name in notes if name in models}}
        return {name: self._state(name, models, notes) for name in names}

    async def remove(self, client: OllamaClient, names: Iterable[str]) -> None:
        """Remove what is LEFT from Ollama, and forget it. Raises OSPError."""
        for name in names:
            models, notes = await listed(client), self._read()
            if self._state(name, models, notes) == LEFT:  # still: a user may have taken long
                body = json.dumps({"model": name}).encode()
                answer = await client.forward("DELETE", b"/api/delete", [], body)
                text = (await whole(answer)).decode(errors="replace")
                if answer.status != 200:
                    raise UpstreamError(f"/api/delete answered {answer.status}: {text}")
                self._write({key: note for key, note in notes.items() if key != name})

    def _state(self, name: str, models: Table, notes: Table) -> str:
        made, (asked, digest) = models.get(name, {}).get("digest"), notes.get(name, (None, None))
        in_settings = name in self._table
        if made and digest != made and not (in_settings and digest == ""):
            return FOREIGN
        if not made:
            return "not made: the next start tries, and the log says what is in the way"
        if not in_settings:
            return LEFT
        base = models.get(canonical(self._table[name][1].model), {}).get("digest")
        same = digest == made and asked == [self._body(name), base or asked[1]]
        return CURRENT if same else "changed, it or its model: the next start makes it anew"

    def _body(self, name: str) -> Table:
        shown, preset = self._table[name]
        body = {"model": shown, "from": preset.model, "stream": False}
        return body | {"system": preset.system, "parameters": preset.options}

    async def _make(self, client: OllamaClient, name: str) -> None:
        """Make a preset that Ollama does not have or that has changed. Raises OSPError."""
        shown, preset = self._table[name]
        models, notes = await listed(client), self._read()
        state, base = self._state(name, models, notes), models.get(canonical(preset.model))
        if state == CURRENT:
            return
        if state == FOREIGN:
            raise ConfigError(f"{FOREIGN}: rename the preset, or type `ollama rm {shown}`")
        if not base:
            raise ConfigError(f"Ollama has no {preset.model}: type `ollama pull {preset.model}`")
        asked = [self._body(name), base["digest"]]
        self._write(notes | {name: [asked, ""]})  # stopped from here on, it is OSP's own still
        try:
            await client.ask("/api/create", asked[0] | remote(base))
        except UpstreamError as exc:
            if (await listed(client)).get(name) == models.get(name):  # Ollama made nothing
                self._write(notes)
            raise ConfigError(f"{exc}: {CURE.format(shown)}") from exc
        self._write(notes | {name: [asked, (await listed(client))[name]["digest"]]})
        logger.info("preset made", extra={"fields": {"preset": shown, "from": preset.model}})

    def _read(self) -> Table:
        """Return what was asked for and the digest of what Ollama made, for each preset."""
        file = self._data / "presets.json"
        try:
            return dict(json.loads(file.read_bytes())) if file.exists() else {}
        except (OSError, ValueError, TypeError) as exc:
            raise ConfigError(f"{file} cannot be read ({exc}): mend or delete it") from exc

    def _write(self, notes: Table) -> None:
        """Note what was made; the digest "" is one not yet known."""
        self._data.mkdir(parents=True, exist_ok=True)
        fresh = self._data / "presets.new"
        fresh.write_text(json.dumps(notes), encoding="utf-8")
        fresh.replace(self._data / "presets.json")


async def listed(client: OllamaClient) -> Table:
    """Return what Ollama says of each model that it has, by its canonical name."""
    try:
        models = (await client.ask("/api/tags"))["models"] or []
        return {canonical(model["name"]): model for model in models}
    except (LookupError, TypeError) as exc:
        raise UpstreamError(f"what answers at {client.upstream.url} is not Ollama") from exc


def remote(base: Table) -> Table:
    """Return what a model of a cloud model needs: Ollama before 0.20 does not add it itself."""
    host = base.get("remote_host")
    return {"from": base["remote_model"], "remote_host": host} if host else {}
