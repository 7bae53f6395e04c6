"""What models are evaluated on: a file of JSON lines, each of one of four kinds. Pure but for reading the file.

    {"text": "…"}                                          every token counts
    {"prompt": "…", "completion": "…"}                     the completion counts
    {"messages": [{"role": "user", "content": "…"}, …]}    what the assistant says counts
    {"prompt": "…", "choices": ["…", "…"], "answer": 1}    which choice is the likeliest; answers are counted from 0

Prompts and completions are joined as they are: a blank between them belongs to one of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from blake3 import blake3

from registry.errors import InvalidInput, PathNotFound
from registry.inference import Message
from registry.manifest import digest_of

_ROLES = ("system", "user", "assistant")


@final
@dataclass(frozen=True, slots=True)
class Text:
    """A text of which every token counts."""

    text: str


@final
@dataclass(frozen=True, slots=True)
class Completion:
    """What should come after a prompt."""

    prompt: str
    completion: str


@final
@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation; its last turn is the assistant's."""

    messages: tuple[Message, ...]


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """A prompt and what could come after it; `answer` is the number of the right one, from 0."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


Example = Text | Completion | Dialogue | Choice


@final
@dataclass(frozen=True, slots=True)
class EvaluationData:
    """Examples by their line, from 1, and the `digest` that names them (64 hex digits): the same only for the same lines of the same file."""

    path: str
    digest: str
    examples: tuple[tuple[int, Example], ...]


def read_data(path: Path, limit: int | None = None) -> EvaluationData:
    """Read a file of examples.

    Args:
        path: the file.
        limit: only the first so many.

    Raises:
        InvalidInput: a line is none of the kinds; says which line and what is wrong. Or there is none.
        PathNotFound: no such file.
    """
    try:
        data = path.read_bytes()
        lines = data.decode().splitlines()
    except OSError as error:
        raise PathNotFound(str(path)) from error
    except UnicodeDecodeError as error:
        raise InvalidInput(str(path), "", "expected JSON lines in UTF-8") from error
    found = tuple(_examples(path, lines))
    if not found:
        raise InvalidInput(str(path), "", "there is nothing in it")
    whole = blake3(data).hexdigest()
    is_part = limit is not None and limit < len(found)
    return EvaluationData(str(path), digest_of([whole, limit]).hex if is_part else whole, found[:limit])


def _examples(path: Path, lines: list[str]) -> Iterator[tuple[int, Example]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, parse_example(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InvalidInput(f"{path} line {number}", line[:80], f"expected a JSON object: {error}") from error
            except InvalidInput as error:
                raise InvalidInput(f"{path} line {number}: {error.field}", error.value, error.reason) from error


def parse_example(found: Any) -> Example:
    """An example out of a JSON object.

    Raises:
        InvalidInput: it is of no known kind, or a field is not what it should be.
    """
    if not isinstance(found, Mapping):
        raise InvalidInput("line", str(found)[:80], "expected a JSON object")
    if "messages" in found:
        return Dialogue(_messages(found["messages"]))
    if "choices" in found:
        return _choice(found)
    if "prompt" in found and "completion" in found:
        return Completion(_text(found, "prompt"), _said(found, "completion"))
    if "text" in found:
        return Text(_said(found, "text"))
    raise InvalidInput(
        "fields",
        ", ".join(map(str, found))[:80],
        "expected text; prompt and completion; messages; or prompt, choices and answer",
    )


def _text(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    if not isinstance(value, str):
        raise InvalidInput(name, str(value)[:80], "expected text")
    return value


def _said(found: Mapping[str, Any], name: str) -> str:
    text = _text(found, name)
    if not text:
        raise InvalidInput(name, "", "it is empty")
    return text


def _messages(found: Any) -> tuple[Message, ...]:
    if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
        raise InvalidInput("messages", str(found)[:80], "expected a list of objects with role and content")
    turns = tuple(Message(_text(each, "role"), _text(each, "content")) for each in found)
    if odd := next((each.role for each in turns if each.role not in _ROLES), None):
        raise InvalidInput("role", odd, f"expected {', '.join(_ROLES)}")
    if not turns or turns[-1].role != "assistant":
        raise InvalidInput("messages", turns[-1].role if turns else "", "the last turn must be the assistant's")
    return turns


def _choice(found: Mapping[str, Any]) -> Choice:
    choices, answer = found["choices"], found.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(each, str) and each for each in choices):
        raise InvalidInput("choices", str(choices)[:80], "expected two and more texts")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise InvalidInput(
            "answer", str(answer)[:80], f"expected the number of the right choice, 0 to {len(choices) - 1}"
        )
    return Choice(_text(found, "prompt"), tuple(choices), answer)
