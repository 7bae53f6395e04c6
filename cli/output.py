"""The only module that prints. Data goes to stdout, talk to stderr; tables for people, `--json` for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import import_module
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from registry.errors import InvalidInput

# What a pipe or file gets must not be cut to the width of a terminal that is not there.
_WIDTH_WITHOUT_TERMINAL = 500

_UNITS = ("B", "kB", "MB", "GB", "TB")

# Notes, names and what a model says come from others: what would steer the terminal is shown instead (`ESC` as `␛`), one sign for one.
_SHOWN = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_SHOWN |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


def _console(stream: Any, *, stderr: bool = False) -> Console:
    width = None if stream.isatty() else _WIDTH_WITHOUT_TERMINAL
    return Console(file=stream, width=width, highlight=False, soft_wrap=False, stderr=stderr, emoji=False)


def data_console() -> Console:
    """Where data goes."""
    return _console(sys.stdout)


def talk_console() -> Console:
    """Where everything else goes."""
    return _console(sys.stderr, stderr=True)


def say(message: str) -> None:
    """Tell the user something; markup of rich is interpreted, so escape what comes from outside."""
    talk_console().print(message.translate(_SHOWN), soft_wrap=True)


def say_error(message: str, hint: str) -> None:
    """Tell the user what went wrong, and what to do about it if anything."""
    say(f"[bold red]error:[/bold red] {escape(message)}")
    if hint:
        say(f"[dim]{escape(hint)}[/dim]")


def print_line(text: str) -> None:
    """One line of data, as it is where a program reads it."""
    sys.stdout.write(f"{_for_stdout(text)}\n")


def _for_stdout(text: str) -> str:
    return text.translate(_SHOWN) if sys.stdout.isatty() else text


def _cell(content: str | Text) -> Text:
    cell = Text(content) if isinstance(content, str) else content
    cell.plain = cell.plain.translate(_SHOWN)
    return cell


def print_json(value: object) -> None:
    """Data for programs: NaN and infinities, which JSON lacks, become null."""
    sys.stdout.write(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def print_json_line(value: object) -> None:
    """The same in one line: what comes one after the other."""
    sys.stdout.write(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]], *, right: Sequence[str] = ()) -> None:
    """A table. Cells that are text are taken literally; the first column is never broken.

    Args:
        columns: their headings.
        rows: a cell for each column.
        right: headings of the columns that are aligned to the right.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        kept_whole = index == 0 or name in right
        table.add_column(name, justify="right" if name in right else "left", no_wrap=kept_whole, overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    data_console().print(table)


def print_facts(facts: Mapping[str, str | Text]) -> None:
    """Names and values, one pair a line; empty values are left out."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value:
            table.add_row(name, _cell(value))
    data_console().print(table)


def stream(pieces: Iterable[str]) -> None:
    """Text as it comes, as one line of data or several; what is written so far is seen at once. What fails before it begins leaves no line."""
    end = ""
    try:
        for piece in pieces:
            end = "\n"
            sys.stdout.write(_for_stdout(piece))
            sys.stdout.flush()
        end = "\n"
    finally:
        sys.stdout.write(end)
        sys.stdout.flush()


def print_side_by_side(texts: Mapping[str, str]) -> None:
    """Longer texts next to each other, each under its name."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", expand=sys.stdout.isatty())
    for name in texts:
        table.add_column(Text(name), overflow="fold", ratio=1)
    table.add_row(*map(_cell, texts.values()))
    data_console().print(table)


def lines_typed(prompt: str) -> Iterator[str]:
    """The lines that somebody types, with a prompt at a terminal, where readline's keys work; else those of stdin. Empty ones are left out."""
    is_typed = sys.stdin.isatty()
    if is_typed:
        with suppress(ImportError):
            import_module("readline")
    while True:
        try:
            line = input(prompt if is_typed else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not is_typed:
                raise
            sys.stdout.write("\n")
            continue
        if line:
            yield line


def print_heading(text: str) -> None:
    """A heading between parts of the data."""
    data_console().print(f"\n[bold]{escape(text.translate(_SHOWN))}[/bold]")


@contextmanager
def progress(unit: str = "bytes") -> Iterator[Any]:
    """A bar of bytes or other things with the time left, on a terminal only. Gives what is told of progress, from any thread."""
    if not sys.stderr.isatty():
        yield lambda what, done_bytes, total_bytes: None
        return
    from rich.progress import (  # noqa: PLC0415 - most commands show no bar
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *((DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=talk_console(), transient=True) as bar:
        tasks: dict[tuple[str, int], Any] = {}

        def tell(what: str, done_bytes: int, total_bytes: int) -> None:
            key = what, total_bytes
            if key not in tasks:
                tasks[key] = bar.add_task(what, total=total_bytes)
            bar.advance(tasks[key], done_bytes)

        yield tell


def size(size_bytes: int) -> str:
    """`1.2 GB`, in powers of 1000 as file managers and the Hub show it."""
    value, unit = float(size_bytes), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{int(value)} {_UNITS[unit]}" if unit == 0 else f"{value:.{1 if value < 100 else 0}f} {_UNITS[unit]}"


def count(number: int) -> str:
    """`1.1B`, `13M`: how the field writes parameters."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return str(number)


def number(value: float) -> str:
    """Five significant digits."""
    return f"{value:#.5g}"


def when(moment: datetime) -> str:
    """Local date and time to the minute."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M")


def ago(moment: datetime) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = max(0, int((datetime.now(UTC) - moment).total_seconds()))
    for limit, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= limit:
            return f"{seconds // limit} {unit} ago"
    return "just now"


def plain(text: str) -> str:
    """Text from outside, safe to put into a message with markup."""
    return escape(text)


def confirm(question: str, *, yes: bool) -> bool:
    """Ask on a terminal; without one, only `--yes` is a yes.

    Raises:
        InvalidInput: no terminal to ask on.
    """
    if yes:
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InvalidInput("--yes", "", "not on a terminal, so say --yes")
    talk_console().print(f"{escape(question)} [dim]\\[y/N][/dim] ", end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")
