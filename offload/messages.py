"""Messages of a conversation as files hold them: a list of objects with role and content."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]


class Unusable(Exception):
    """A record cannot be used; the message says why, and whoever knows the line adds it."""


def check_messages(messages: Any, key: str, *, needs_answer: bool) -> list[Message]:
    """The messages, if they are some.

    Args:
        messages: what the file has under `key`.
        needs_answer: the assistant must say something, or there is nothing to learn.

    Raises:
        Unusable: it is no such list.
    """
    if not isinstance(messages, list) or not messages:
        raise Unusable(f"{key!r} is not a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Unusable(f"{key!r}: a message has no role")
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            raise Unusable(f"{key!r}: the {message['role']}'s message has no content")
    if needs_answer and not any(
        m["role"] == "assistant" and (m.get("content") or m.get("tool_calls")) for m in messages
    ):
        raise Unusable(f"{key!r}: the assistant says nothing, so there is nothing to learn")
    return messages
