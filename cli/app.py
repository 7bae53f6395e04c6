"""The command table, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer
from rich.markup import escape

from cli import annotate, choose, merge, output, register, ship
from cli.errors import EXIT_CODES, explain
from cli.options import flag
from registry.errors import RegistryError

_REGISTER, _CHOOSE, _MERGE, _SHIP, _KEEP = "Register", "Choose", "Check and merge", "Ship", "Keep order"
_EPILOG = (
    "A checkpoint is asked for as name (the newest), name@v3, name@alias, name@production, name@step:500, name@best:eval_loss, "
    "or by 6 and more digits of its digest. Data goes to stdout, talk to stderr. "
    "Environment: CKPT_HOME, CKPT_DATABASE_URL, CKPT_STORE, CKPT_USER."
)

app = typer.Typer(
    name="ckpt",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.command("register", rich_help_panel=_REGISTER)(register.register)
app.add_typer(register.base_app, name="base", rich_help_panel=_REGISTER)
app.command("list", rich_help_panel=_CHOOSE)(choose.list_)
app.command("show", rich_help_panel=_CHOOSE)(choose.show)
app.command("check", rich_help_panel=_MERGE)(merge.check)
app.command("merge", rich_help_panel=_MERGE)(merge.merge)
app.command("pull", rich_help_panel=_MERGE)(merge.pull)
app.command("ship", rich_help_panel=_SHIP)(ship.ship)
app.command("shipped", rich_help_panel=_SHIP)(ship.shipped)
app.command("rollback", rich_help_panel=_SHIP)(ship.rollback)
app.command("note", rich_help_panel=_KEEP)(annotate.note)
app.command("tag", rich_help_panel=_KEEP)(annotate.tag)
app.add_typer(annotate.metric_app, name="metric", rich_help_panel=_KEEP)
app.add_typer(annotate.alias_app, name="alias", rich_help_panel=_KEEP)
app.command("history", rich_help_panel=_KEEP)(choose.history)
app.command("rm", rich_help_panel=_KEEP)(annotate.rm)
app.command("gc", rich_help_panel=_KEEP)(annotate.gc)


def _print_version(wanted: bool) -> None:
    if wanted:
        output.print_line(f"ckpt-registry {version('ckpt-registry')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, flag("--version", "Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    traceback: Annotated[bool, flag("--traceback", "Show where an error comes from.")] = False,
) -> None:
    """Record every adapter checkpoint, choose the best, check it, merge it, and know which version is live where."""
    del show_version, traceback


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with one of `cli.errors.EXIT_CODES`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with_traceback = "--traceback" in words[:2] or bool(os.environ.get("CKPT_TRACEBACK"))
    try:
        app(_with_bare_best(words), prog_name="ckpt")
    except RegistryError as error:
        if with_traceback:
            raise
        explanation = explain(error)
        output.say(f"[bold red]error:[/bold red] {escape(explanation.message)}")
        if explanation.hint:
            output.say(f"[dim]{escape(explanation.hint)}[/dim]")
        sys.exit(explanation.exit_code)
    except KeyboardInterrupt:
        output.say("interrupted; what is finished is kept, run it again to go on")
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python must not complain while it flushes the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if with_traceback:
            raise
        output.say(f"[bold red]error:[/bold red] {escape(f'{type(error).__name__}: {error}')}")
        output.say(f"[dim]{EXIT_CODES[1]}[/dim]")
        sys.exit(1)


def _with_bare_best(words: list[str]) -> list[str]:
    """`--best` may stand without a metric, which Typer's options cannot: an empty one is put there."""
    followed = [*words[1:], "-"][: len(words)]
    return [
        "--best=" if word == "--best" and after.startswith("-") else word
        for word, after in zip(words, followed, strict=True)
    ]


if __name__ == "__main__":
    main()
