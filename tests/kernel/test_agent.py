"""The contract: helpers for payloads in both dialects, the clock, what a hook may raise."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kernel.agent import (
    Abort,
    Clock,
    add_context,
    add_system,
    last_user,
    prompt,
    set_prompt,
)

IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


def chat(*messages: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (chat(("user", "a"), ("assistant", "b"), ("User", "c"), ("tool", "d")), "c"),
        (
            chat(("user", [IMAGE, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}])),
            "a",
        ),
        (chat(("user", None)), ""),
        (chat(("user", [IMAGE])), ""),
        (chat(("system", "s")), ""),
    ],
)
def test_the_prompt_is_the_first_text_of_the_last_user_message(
    payload: dict[str, Any], text: str
) -> None:
    assert prompt(payload) == text


@pytest.mark.parametrize(
    ("content", "after"),
    [
        ("a", "new"),
        (None, "new"),
        ([IMAGE], [{"type": "text", "text": "new"}, IMAGE]),
        ([IMAGE, {"type": "text", "text": "a"}], [IMAGE, {"type": "text", "text": "new"}]),
    ],
)
def test_setting_the_prompt_keeps_images(content: Any, after: Any) -> None:
    payload = chat(("user", content), ("tool", "t"))

    assert set_prompt(payload, "new") is payload
    assert payload == chat(("user", after), ("tool", "t"))


def test_setting_a_prompt_where_there_is_none_adds_a_message() -> None:
    assert set_prompt(chat(("system", "s")), "a") == chat(("system", "s"), ("user", "a"))


def test_system_text_goes_to_the_front_and_context_before_the_prompt() -> None:
    payload = add_context(add_system(chat(("system", "s"), ("user", "a")), "first"), "facts")

    assert payload == chat(("system", "first"), ("system", "s"), ("user", "facts\n\na"))


def test_there_may_be_no_user_at_all() -> None:
    assert last_user(chat(("system", "s"))) is None


@pytest.mark.parametrize("status", [200, 399, 600])
def test_an_abort_needs_an_error_status(status: int) -> None:
    with pytest.raises(ValueError, match=f"{status} is no error status, 400 to 599 are"):
        Abort(status, "why")


def test_the_clock_stands_still_in_overlapping_blocks() -> None:
    clock = Clock(10)
    with clock.standing(), clock.standing():
        before = clock.left()
        busy(0.02)
        assert clock.left() == before
    busy(0.02)

    assert clock.left() < before - 0.015
    clock.restart()
    assert clock.left() > before


def busy(seconds: float) -> None:
    """Let time pass: a clock cannot be tested without."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
