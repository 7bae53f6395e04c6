"""How litgpt models are spoken to: litgpt's tokenizer, the prompt style that an adapter was trained with, or a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, final

import jinja2
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from litgpt import Tokenizer, prompts

from registry.errors import CorruptFile, InvalidInput, NoChatTemplate, NoTokenizer
from registry.inference import Message

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_TOKENIZER_CONFIG, _TEMPLATE_FILE, _STYLE_FILE = "tokenizer_config.json", "chat_template.jinja", "prompt_style.yaml"
_STYLES = "litgpt.prompts."


def find_speech(folders: Sequence[Path], config: Any, name: str) -> Speech:
    """How to speak to a model: each file is that of the first folder that has it.

    Args:
        folders: the adapter's, if there is one, and the base's.
        config: the model's, of litgpt.
        name: whose it is, for errors.

    Raises:
        NoTokenizer: no folder has one.
        CorruptFile: a file is not as litgpt reads it.
        InvalidInput: a prompt style that is not litgpt's own.
    """
    folder = _first(folders, *_TOKENIZER_FILES)
    if folder is None:
        raise NoTokenizer(name)
    style = _first(folders, _STYLE_FILE)
    try:
        tokenizer = Tokenizer(folder)
    except (ValueError, KeyError) as error:
        raise CorruptFile(str(folder / _TOKENIZER_CONFIG), f"litgpt cannot read the tokenizer: {error}") from error
    tokenizer.use_bos = tokenizer.use_bos or _opens_texts(str(config.name))
    return Speech(tokenizer, _style(style) if style else None, _template(folders), name)


def _first(folders: Sequence[Path], *names: str) -> Path | None:
    return next((folder for folder in folders if any((folder / name).is_file() for name in names)), None)


def _opens_texts(model: str) -> bool:
    """Models whose texts begin with a special token though their tokenizers do not say so; litgpt tells by the folder's name."""
    return model.startswith(("Meta-Llama-3", "Llama-3")) or (model.startswith("SmolLM2") and model.endswith("Instruct"))


def _style(folder: Path) -> Any:
    """The prompt style that a file names. It could name any class to import, and comes from strangers: litgpt's own alone are taken."""
    said = yaml.safe_load((folder / _STYLE_FILE).read_text(encoding="utf-8"))
    path = str(said.get("class_path")) if isinstance(said, dict) else ""
    found = vars(prompts).get(path.removeprefix(_STYLES)) if path.startswith(_STYLES) else None
    if not (isinstance(found, type) and issubclass(found, prompts.PromptStyle)):
        raise InvalidInput(_STYLE_FILE, path, "expected one of litgpt's own, as litgpt.prompts.Alpaca")
    return found()


def _template(folders: Sequence[Path]) -> str:
    if folder := _first(folders, _TEMPLATE_FILE):
        return (folder / _TEMPLATE_FILE).read_text(encoding="utf-8")
    for folder in folders:
        found = _tokenizer_config(folder).get("chat_template")
        if isinstance(found, list):  # several, by name
            found = next((each["template"] for each in found if each.get("name") == "default"), None)
        if found:
            return str(found)
    return ""


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / _TOKENIZER_CONFIG
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


@final
@dataclass(frozen=True, slots=True)
class Speech:
    """How a model is spoken to. `style` is a prompt style of litgpt or None, `template` in Jinja or empty, `name` whose it is."""

    tokenizer: Any
    style: Any
    template: str
    name: str

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without any that only open or close a document."""
        processor = self.tokenizer.processor
        if self.tokenizer.backend == "huggingface":
            return list(processor.encode(text, add_special_tokens=False).ids)
        return list(processor.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self.tokenizer.processor.decode(list(ids)))

    def prompt(self, messages: Sequence[Message], *, answering: bool) -> list[int]:
        """Tokens of a conversation: of one question by the prompt style, of more by the chat template.

        Raises:
            NoChatTemplate: there is none.
            InvalidInput: a system message where the style has no place for one, or a template that does not take the conversation.
        """
        system, asked = _parted(messages)
        if self.style is not None and [each.role for each in asked] in (["user"], ["user", "assistant"]):
            return self._styled(system, *(each.content for each in asked))
        if not self.template:
            raise NoChatTemplate(self.name)
        return self.encode(self._rendered(messages, answering))

    def _styled(self, system: str, question: str, answer: str | None = None) -> list[int]:
        """As litgpt writes what it trains on."""
        text = str(self.style.apply(question, sys_prompt=system or None))
        if system and system not in text:
            raise InvalidInput("system", system, f"{type(self.style).__name__}, the prompt style, has no place for it")
        whole = text if answer is None else text + answer
        return [int(token) for token in self.tokenizer.encode(whole, eos=answer is not None)]

    def _rendered(self, messages: Sequence[Message], answering: bool) -> str:
        special = {key: _spelled(self.tokenizer, getattr(self.tokenizer, f"{key}_id")) for key in ("bos", "eos")}
        try:
            return (
                _environment()
                .from_string(self.template)
                .render(
                    messages=[{"role": each.role, "content": each.content} for each in messages],
                    add_generation_prompt=answering,
                    **{f"{key}_token": text for key, text in special.items()},
                )
            )
        except jinja2.TemplateError as error:
            raise InvalidInput("chat template", self.name, str(error)) from error

    @property
    def ends(self) -> tuple[list[int], ...]:
        """Sequences of tokens that end an answer."""
        end = self.tokenizer.eos_id
        usual = tuple([token] for token in (end if isinstance(end, list) else [end]) if token is not None)
        if self.style is None:
            return usual
        try:
            found = self.style.stop_tokens(self.tokenizer)
        except ValueError:  # it names tokens that this tokenizer has not, which so never come
            return usual
        return (*usual, *(each for each in found if each and all(isinstance(token, int) for token in each)))


def _parted(messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
    """What is said before everything, and the rest."""
    if messages and messages[0].role == "system":
        return messages[0].content, messages[1:]
    return "", messages


def _spelled(tokenizer: Any, token: object) -> str:
    """A special token as text."""
    if not isinstance(token, int):
        return ""
    is_ours = tokenizer.backend == "huggingface"
    return str((tokenizer.processor.id_to_token if is_ours else tokenizer.processor.id_to_piece)(token) or "")


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers renders templates."""
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], autoescape=False
    )
    found.globals["raise_exception"] = _refuse
    found.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return found


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def until(ids: Iterator[int], ends: Sequence[Sequence[int]]) -> Iterator[int]:
    """Tokens up to the first of some sequences. What may become one is held back."""
    held: list[int] = []
    for token in ids:
        held.append(token)
        if end := next((end for end in ends if held[-len(end) :] == list(end)), None):
            yield from held[: -len(end)]
            return
        while held and not any(list(end[: len(held)]) == held for end in ends):
            yield held.pop(0)
    yield from held
