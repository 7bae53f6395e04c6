"""`ckpt chat` and `ckpt generate`: hear what a checkpoint says before it is merged."""

from __future__ import annotations

import json as json_module
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cli import output
from cli.errors import explain
from cli.options import Json, flag
from registry import connect
from registry.errors import InvalidInput, RegistryError

if TYPE_CHECKING:
    from registry.inference.conversation import Conversation

Spoken = Annotated[str, typer.Argument(metavar="REF", help="A checkpoint, or several added up: 'A:0.7+B:0.3'.")]
Merged = Annotated[bool, flag("--merged", "The merged model, computed in memory, instead of base and adapter.")]
System = Annotated[str, typer.Option(metavar="TEXT", help="What goes before the conversation.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, metavar="N", help="The longest answer.")]
Temperature = Annotated[float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token each time.")]
TopP = Annotated[float, typer.Option("--top-p", metavar="P", help="Choose among the tokens that make up this much.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="The same number gives the same answers again.")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda|mps", help="Where to compute.")]
DType = Annotated[str, typer.Option(metavar="auto|float32|bfloat16|float16", help="Of the weights in memory.")]

_HELP = """/switch REF   another checkpoint answers from now on
/both REF     hear the next answers of both, side by side; /both alone ends it
/system TEXT  what goes before the conversation
/reset        forget the conversation
/save FILE    write the conversation down, as JSON lines
/help, /quit"""


def generate(
    ref: Spoken,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to go on from, or to answer.")] = "",
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A prompt a line, or JSON lines with 'prompt'.")
    ] = None,
    system: System = "",
    raw: Annotated[bool, flag("--raw", "Go on from the text as it is, without a chat template.")] = False,
    merged: Merged = False,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: Device = "auto",
    dtype: DType = "auto",
    json: Json = False,
) -> None:
    """Print what a checkpoint answers, or how it goes on from a text."""
    from registry.trying import read_prompts  # noqa: PLC0415 - the help need not wait for it

    asked = _asked(prompt) if prompts is None or prompt else read_prompts(prompts)
    if not any(text.strip() for text in asked):
        raise InvalidInput("prompt", "", "say --prompt TEXT or --prompts FILE, or write it to stdin")
    with connect() as registry:
        talk = _open(registry, ref, _Wanted(merged, system, max_tokens, temperature, top_p, seed, device, dtype))
        for text in asked:
            pieces = talk.go_on(text) if raw else talk.ask(text)
            if json:
                output.print_json_line({"prompt": text, "by": talk.speaker.name, "text": "".join(pieces)})
            else:
                output.stream(pieces)
            talk.messages.clear()


@dataclass(frozen=True, slots=True)
class _Wanted:
    is_merged: bool
    system: str
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    device: str
    dtype: str


def _open(registry: Any, ref: str, wanted: _Wanted) -> Conversation:
    from registry.inference import Device as Place  # noqa: PLC0415
    from registry.inference import LoadedDType, Sampling  # noqa: PLC0415
    from registry.inference.conversation import Conversation, find_speaker  # noqa: PLC0415

    sampling = Sampling(
        max_tokens=wanted.max_tokens, temperature=wanted.temperature, top_p=wanted.top_p, seed=wanted.seed
    )
    talk = Conversation(
        registry,
        find_speaker(registry, ref, is_merged=wanted.is_merged),
        sampling,
        wanted.system,
        cast("Place", wanted.device),
        cast("LoadedDType", wanted.dtype),
    )
    talk.runner_for(talk.speaker)
    return talk


def _asked(prompt: str) -> tuple[str, ...]:
    """What was said, or else comes on stdin, unless somebody would have to type it."""
    return (prompt,) if prompt or sys.stdin.isatty() else (sys.stdin.read(),)


def chat(
    ref: Spoken,
    merged: Merged = False,
    system: System = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Talk with a checkpoint. /switch REF compares it with others in one conversation, /help tells the rest; Ctrl-D ends."""
    with connect() as registry:
        talk = _open(registry, ref, _Wanted(merged, system, max_tokens, temperature, top_p, seed, device, dtype))
        output.say(f"{output.plain(talk.speaker.name)} answers; /help tells what else there is")
        _Chat(talk).run()


class _Chat:
    """A conversation at a terminal, or with the lines of a pipe."""

    def __init__(self, talk: Conversation) -> None:
        self._talk = talk
        self._second: Any = None

    def run(self) -> None:
        for line in output.lines_typed("> "):
            if line.startswith("/"):
                if line.split()[0] in ("/quit", "/exit"):
                    return
                self._guarded(self._command, line)
            else:
                self._guarded(self._answer, line)

    def _guarded(self, do: Any, line: str) -> None:
        """A mistake does not end the conversation."""
        try:
            do(line)
        except RegistryError as error:
            found = explain(error)
            output.say_error(found.message, found.hint)
        except KeyboardInterrupt:
            output.say("stopped")

    def _answer(self, line: str) -> None:
        if self._second is None:
            turns = len(self._talk.messages)
            output.stream(self._talk.ask(line))
            if len(self._talk.messages) == turns:
                output.say(f"{output.plain(self._talk.speaker.name)} says nothing")
            return
        other = "".join(self._talk.ask_another(line, self._second))
        mine = "".join(self._talk.ask(line))
        output.print_side_by_side({self._talk.speaker.name: mine, self._second.name: other})

    def _command(self, line: str) -> None:
        from registry.inference.conversation import find_speaker  # noqa: PLC0415

        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "/switch" and rest:
            self._talk.switch(find_speaker(self._talk.registry, rest))
            output.say(f"{output.plain(self._talk.speaker.name)} answers")
        elif word == "/both":
            self._second = find_speaker(self._talk.registry, rest) if rest else None
            second = f" and {output.plain(self._second.name)}" if self._second else ""
            output.say(f"{output.plain(self._talk.speaker.name)}{second} answer" + ("" if second else "s"))
        elif word == "/system":
            self._talk.system = rest
        elif word == "/reset":
            self._talk.messages.clear()
        elif word == "/save" and rest:
            self._save(Path(rest))
        else:
            output.say(output.plain(_HELP))

    def _save(self, path: Path) -> None:
        lines = [json_module.dumps({"role": each.role, "content": each.content}) for each in self._talk.messages]
        try:
            path.write_text("".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise InvalidInput("/save", str(path), error.strerror or str(error)) from error
        output.say(f"wrote {len(lines)} turns to {output.plain(str(path))}")
