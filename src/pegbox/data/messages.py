"""Chat messages in the forms people write them, brought into one: role, content, tool calls, reasoning.

Understood: OpenAI's (`role`/`content`, `tool_calls` with JSON text as arguments, content in text parts, `weight` 0 or
1 per answer), ShareGPT's (`from`/`value`, human, gpt, function_call, observation), reasoning under any of its names.

What this file does not do: judging whether a template can render the result (masks.py).
"""

from __future__ import annotations

import json
from typing import Any

from pegbox.data.rows import bad_row

__all__ = ["read_messages"]

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_EXAMPLE = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
_CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "ping", "arguments": {"host": "r1"}}}]}


def read_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Messages of known roles with text content. Raises `BadInput` that names the message by its number."""
    if isinstance(value, str):  # CSV cells
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise bad_row(where, "", f"not a JSON list of messages ({error})", "a list", _EXAMPLE) from None
    if not isinstance(value, list | tuple) or not value:
        raise bad_row(where, "", "not a list of messages, or an empty one", "a list of messages", _EXAMPLE)
    return [_message(m, f"{where}, message {n}") for n, m in enumerate(value, start=1)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise bad_row(where, "", f"a message must be an object, not {type(message).__name__}", "this", _EXAMPLE)
    said = message.get("role", message.get("from"))
    role = _ROLES.get(str(said).lower())
    if role is None:
        raise bad_row(where, "", f"unknown role {said!r}", f"one of {', '.join(sorted(_ROLES))}", _EXAMPLE)
    content = _content(message.get("content", message.get("value")), where)
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(_json(content, where), where)]}
    out: dict[str, Any] = {"role": role, "content": content}
    out |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
    return out | _answer_parts(message, out, where) if role == "assistant" else out


def _answer_parts(message: dict[str, Any], out: dict[str, Any], where: str) -> dict[str, Any]:
    """What only an assistant's message has: tool calls, reasoning, and whether it is trained."""
    parts: dict[str, Any] = {}
    calls = message.get("tool_calls")
    if isinstance(calls, str) and calls.strip():
        calls = _json(calls, where)
    if message.get("function_call"):
        calls = [message["function_call"]]
    if calls:
        parts["tool_calls"] = [_call(c, where) for c in calls]
    reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
    if reasoning is not None:
        parts["reasoning_content"] = str(reasoning)
    if not out["content"].strip() and not calls:
        raise bad_row(where, "", "the assistant says nothing", "content or tool calls", _EXAMPLE)
    if not _trained(message, where):
        parts["train"] = False
    return parts


def _trained(message: dict[str, Any], where: str) -> bool:
    flag = message.get("train", message.get("weight", 1))
    if flag is None:
        return True
    if flag not in (0, 1):
        raise bad_row(where, "", f"a message's weight is {flag!r}", "0 or 1", {"role": "assistant", "weight": 0})
    return bool(flag)


def _content(value: Any, where: str) -> str:
    """Text, or text parts joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
            return "".join(part["text"] for part in value)
        raise bad_row(where, "", "the content has parts that are not text", "text parts only", _EXAMPLE)
    raise bad_row(where, "", f"the content is {type(value).__name__}", "text", _EXAMPLE)


def _call(call: Any, where: str) -> dict[str, Any]:
    """One tool call, its arguments an object (templates write them as JSON themselves)."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not function.get("name"):
        raise bad_row(where, "", "a tool call without a function name", "this", _CALL)
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", where)
    out = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return out | ({"id": call["id"]} if call.get("id") else {})


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise bad_row(where, "", f"a tool call is not valid JSON ({error})", "this", _CALL) from None
