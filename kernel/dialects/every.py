"""Every dialect in which a chat can be held; a new one is its file and its name here."""

from __future__ import annotations

from kernel.dialects import Dialect
from kernel.dialects.completions import Completions
from kernel.dialects.messages import Messages
from kernel.dialects.responses import Responses

DIALECTS: tuple[Dialect, ...] = (Dialect(), Completions(), Messages(), Responses())
