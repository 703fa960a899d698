"""Turn: what one chat request asks for, read from its body, its headers and its model's name.

What is in doubt about a body (no strict JSON, a key in another case) is no turn: it goes to Ollama
as it is. The commands are taken out of the messages here, and each agent that is in play gets its
run; what the proxy answers itself (help, a wrong argument, an agent that failed to load) is the
turn's reply.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.types import Scope

from kernel.agent import Context, Payload, is_user, last_user, set_text, text_of
from kernel.client import OllamaClient
from kernel.dialects import OPENAI, Dialect, loads
from kernel.errors import BadRequest
from kernel.log import facts
from kernel.metrics import Metrics
from kernel.models import Presets
from kernel.plugin import Plugin, refusal
from kernel.registry import PluginRegistry
from slices.chat.chain import Run, is_message
from slices.chat.commands import EXPLAIN, Command, Grammar, help_text, parse_arguments, unavailable

AGENTS = b"x-osp-agents"
MODEL = re.compile(rb'"model"\s*:\s*"([^"\\+]+)"')
KNOWN_KEYS = frozenset(
    "model messages stream format keep_alive tools options think logprobs top_logprobs"
    " response_format stream_options role content images tool_calls tool_name tool_call_id".split()
)


@dataclass(slots=True)
class Turn:
    """One touched request: the payload without its commands, and the agents in play."""

    payload: Payload
    asked: Payload  # as the client meant it, whatever agents make of it
    commands: list[Command] = field(default_factory=list)  # asked for, each agent once
    runs: list[Run] = field(default_factory=list)  # always-on agents first
    explain: bool = False  # what the agents do is asked for, not the model's answer
    reply: str | None = None  # answered without the model

    def takes_replies(self, dialect: Dialect) -> bool:
        """Tell whether prose is a possible answer: the client wants no JSON and no tool call."""
        return not (dialect.is_structured(self.asked) or self.asked.get("tools"))


@dataclass(frozen=True, slots=True)
class TurnReader:
    """Reads the turns of one dialect."""

    client: OllamaClient
    registry: PluginRegistry
    metrics: Metrics
    dialect: Dialect
    typed: Grammar
    spelled: Grammar  # of header, suffix and presets, whatever is typed
    presets: Presets
    timeout: float  # of a hook whose plugin says nothing else

    def read(self, body: bytes | None, scope: Scope) -> Turn | None:
        """Return what is asked for, or None for a request that is forwarded as it is.

        A body of None is one that may not be read, or is too large.
        Raises BadRequest for an unknown agent or a wrong argument in header, suffix or preset, and
        NotAllowed where a guard would not see all of it.
        """
        if body and (model := self.passing(body, scope)):
            facts(scope).model = model
            return None
        payload = parse(body, self.dialect) if body else None
        if payload is None:
            self.registry.check_guards(None)
            return None
        facts(scope).model = payload["model"]
        headers = [v.decode("latin-1") for k, v in scope["headers"] if k == AGENTS]
        header = " ".join(headers) if headers else None
        named, suffix = split_model(payload["model"])
        preset = self.presets.find(named)
        payload["model"] = preset.model if preset else named
        marked = header is not None or suffix is not None or preset is not None
        strict = [*self.listed("X-OSP-Agents", header), *self.listed("the model's suffix", suffix)]
        if preset:
            strict += self.listed(f"the preset {named}", preset.agents)
        if not payload.get("messages"):  # it loads or unloads a model: nobody's turn
            return Turn(payload, payload) if marked else None
        guards = self.registry.guards(payload["model"])
        for guard in guards:
            blind = guard.responds and not edits(guard, payload, self.dialect)
            if guard.agent is None or blind:
                raise refusal(guard)
        about = self.typed.help_wanted(text_of(last_user(payload) or {}))
        typed, stripped = self.strip(payload)
        always = self.registry.always(payload["model"])
        if not (marked or stripped or always or about is not None):
            return None
        commands = [*strict, *typed]
        agents = [command for command in commands if command.name != EXPLAIN]
        turn = Turn(payload, payload, unique(agents), explain=len(agents) < len(commands))
        if about is not None:
            turn.reply = self.help(about)
        else:
            self.enlist(turn, always, strict, scope)
        return turn

    def passing(self, body: bytes, scope: Scope) -> str:
        """Return the model of a chat in which, at a glance, nothing can ask for an agent, else "".

        The sign of commands does not stand in it, nor an escape that might hide one, nor a +. To
        parse it would cost a good part of what forwarding it costs.
        """
        sign = self.typed.prefix.encode()
        if (sign and sign in body) or b"\\u" in body or body.count(b'"model"') != 1:
            return ""
        asked = any(name == AGENTS for name, _ in scope["headers"])
        if asked or self.presets.named or self.registry.always_on():
            return ""
        model = MODEL.search(body)
        return model[1].decode(errors="replace") if model else ""

    def listed(self, where: str, text: str | None) -> list[Command]:
        """Return the commands of a header or a suffix, which holds nothing else."""
        if not text:
            return []
        commands, rest = self.spelled.split(text)
        if rest:
            known = ", ".join(f"/{name}" for name in self.registry.plugins) or "none"
            raise BadRequest(f"{where}: {rest!r} is no known agent; known are: {known}")
        return commands

    def strip(self, payload: Payload) -> tuple[list[Command], bool]:
        """Take the commands out of every user message; those of the last one count.

        So the model never learns to type them, and its prompt cache keeps hitting.
        """
        commands: list[Command] = []
        stripped = False
        for message in filter(is_user, payload["messages"]):
            text = text_of(message)
            commands, rest = self.typed.split(text)
            if rest != text:
                set_text(message, rest)
                stripped = True
        return commands, stripped

    def enlist(
        self, turn: Turn, always: list[Plugin], strict: Sequence[Command], scope: Scope
    ) -> None:
        """Fill in the runs, or the reply where a command cannot be obeyed."""
        commands = {command.name: command for command in turn.commands}
        spelled = {(command.name, command.arguments) for command in strict}
        asked = [self.registry.plugins[name] for name in commands]
        state: dict[str, Any] = {}
        plugins = [*always, *(plugin for plugin in asked if plugin not in always)]
        for plugin in sorted(plugins, key=place):
            command = commands.get(plugin.name)
            try:
                arguments = self.arguments(plugin, command)
            except BadRequest as exc:
                if command and (command.name, command.arguments) in spelled:
                    raise
                turn.reply = f"{exc}\n\n{self.help(plugin.name)}"
                return turn.runs.clear()  # nobody else has a say in this
            known = facts(scope)
            context = Context(
                request_id=known.request_id,
                dialect=self.dialect.name,
                stream=self.dialect.wants_stream(turn.payload),
                asked=command is not None,
                user=known.user,
                state=state,
                log=agent_log(plugin.name, known.request_id),
                payload=turn.payload,
                client=self.client,
            )
            agent = plugin.instance(context, arguments)
            limit = plugin.config.timeout or self.timeout
            before = turn.runs[-1].plugin if turn.runs else plugin
            together = command.together if command and before not in always else ()
            joined = before.name in together and not (agent.innermost or agent.last)
            turn.runs.append(Run(plugin, agent, limit, self.metrics, joined))

    def arguments(self, plugin: Plugin, command: Command | None) -> dict[str, Any]:
        if plugin.agent is None:
            raise BadRequest(f"the agent {plugin.name} {unavailable(plugin)}")
        try:
            return parse_arguments(command.arguments if command else "", plugin.config.arguments)
        except BadRequest as exc:
            raise BadRequest(f"{plugin.name}: {exc}") from exc

    def help(self, name: str) -> str:
        plugins = self.registry.plugins
        return help_text([plugins[name]] if name else plugins.values(), self.typed.prefix)


def place(plugin: Plugin) -> int:
    """Return 0 for agents in their own order, 1 for one that is last, 2 for an innermost one."""
    agent = plugin.agent
    return 0 if agent is None else 2 if agent.innermost else int(agent.last)


def agent_log(name: str, request_id: str) -> logging.LoggerAdapter[logging.Logger]:
    fields = {"fields": {"agent": name, "request_id": request_id}}
    return logging.LoggerAdapter(logging.getLogger(f"plugins.{name}"), fields)


def parse(body: bytes, dialect: Dialect) -> Payload | None:
    """Return the JSON of a chat, or None if Ollama may read it otherwise than we would.

    Go's decoder is more lenient in some ways (the case of keys) and stricter in others (NaN).
    """
    try:
        payload = loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(payload, dict) or not isinstance(payload.get("model"), str):
        return None
    messages = payload.get("messages") or []
    options = payload.get("options") or {}
    if not isinstance(messages, list) or not isinstance(options, dict) or misspelt(payload):
        return None
    if not all(is_message(message) and not misspelt(message) for message in messages):
        return None
    parts = any(isinstance(message.get("content"), list) for message in messages)
    return None if parts and dialect is not OPENAI else payload


def misspelt(table: Mapping[str, Any]) -> bool:
    """Tell whether a known key stands there in another case, which Go would take for it."""
    strange = table.keys() - KNOWN_KEYS
    return bool(strange) and any(key.casefold() in KNOWN_KEYS for key in strange)


def edits(plugin: Plugin, payload: Payload, dialect: Dialect) -> bool:
    """Tell whether response hooks may change the answer: they must not make it false."""
    structured = dialect.is_structured(payload) and not plugin.config.structured
    return not (structured or payload.get("logprobs"))


def split_model(model: str) -> tuple[str, str | None]:
    """Split `llama3.2:3b+rag+translate:de` into the model and its suffix, as commands."""
    name, plus, suffix = model.partition("+")  # + is no legal character of a model's name
    return name, f"/{suffix}".replace("&+", "&/").replace("+", " /") if plus else None


def unique(commands: Sequence[Command]) -> list[Command]:
    """Keep each agent's first place and last arguments."""
    last = {command.name: command for command in commands}
    first = {command.name: command for command in reversed(commands)}
    return [replace(first[name], arguments=last[name].arguments) for name in last]


def is_bare(payload: Payload) -> bool:
    """Tell whether the last user message says nothing and shows nothing."""
    message = last_user(payload)
    if message is None:
        return False
    content = message.get("content")
    shows = isinstance(content, list) and any(part.get("type") != "text" for part in content)
    return not (text_of(message).strip() or message.get("images") or shows)
