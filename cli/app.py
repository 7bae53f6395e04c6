"""The command table, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from cli import output
from cli.errors import explain
from cli.options import flag
from registry.errors import Refused

_INTERRUPTED = 130
_EPILOG = (
    "A checkpoint is asked for as name (the newest), name@v3, name@alias, name@production, name@step:500, name@run:3, name@best:eval_loss, "
    "or by 6 and more digits of its digest. Data goes to stdout, talk to stderr. "
    "Environment: CKPT_HOME, CKPT_DATABASE_URL, CKPT_STORE, CKPT_USER; for a server CKPT_SERVER, CKPT_TOKEN."
)

# Name, where it is defined, and its panel in the help, in the order of the help.
COMMANDS = (
    ("register", "cli.register:register", "Register"),
    ("watch", "cli.watch:watch", "Register"),
    ("outbox", "cli.watch:outbox_app", "Register"),
    ("base", "cli.register:base_app", "Register"),
    ("list", "cli.choose:list_", "Choose"),
    ("show", "cli.choose:show", "Choose"),
    ("select", "cli.policy:select", "Choose"),
    ("policy", "cli.policy:policy_app", "Choose"),
    ("diff", "cli.diff:diff", "Choose"),
    ("plot", "cli.plot:plot", "Choose"),
    ("eval", "cli.evaluate:evaluate", "Choose"),
    ("try", "cli.try_:try_", "Try"),
    ("chat", "cli.chat:chat", "Try"),
    ("generate", "cli.chat:generate", "Try"),
    ("check", "cli.merge:check", "Check and merge"),
    ("merge", "cli.merge:merge", "Check and merge"),
    ("recipe", "cli.recipe:recipe_app", "Check and merge"),
    ("resume", "cli.resume:resume", "Try"),
    ("report", "cli.report:report", "Choose"),
    ("combine", "cli.combine:combine", "Check and merge"),
    ("sweep", "cli.combine:sweep", "Check and merge"),
    ("extract", "cli.convert:extract", "Check and merge"),
    ("convert", "cli.convert:convert", "Check and merge"),
    ("pull", "cli.merge:pull", "Check and merge"),
    ("ship", "cli.ship:ship", "Ship"),
    ("shipped", "cli.ship:shipped", "Ship"),
    ("rollback", "cli.ship:rollback", "Ship"),
    ("serve-config", "cli.serving:serving_app", "Ship"),
    ("sign", "cli.sign:sign", "Sign"),
    ("verify-signature", "cli.sign:verify_signature", "Sign"),
    ("signatures", "cli.sign:signatures", "Sign"),
    ("provenance", "cli.sign:provenance", "Sign"),
    ("note", "cli.annotate:note", "Keep order"),
    ("tag", "cli.annotate:tag", "Keep order"),
    ("metric", "cli.annotate:metric_app", "Keep order"),
    ("alias", "cli.annotate:alias_app", "Keep order"),
    ("history", "cli.choose:history", "Keep order"),
    ("rm", "cli.annotate:rm", "Keep order"),
    ("keep", "cli.policy:keep", "Keep order"),
    ("jobs", "cli.jobs:jobs_app", "Work as a team"),
    ("worker", "cli.jobs:worker", "Work as a team"),
    ("gc", "cli.care:gc", "Keep order"),
    ("verify", "cli.care:verify", "Keep order"),
    ("doctor", "cli.care:doctor", "Keep order"),
    ("audit", "cli.audit:audit_app", "Keep order"),
    ("login", "cli.login:login", "Work as a team"),
    ("logout", "cli.login:logout", "Work as a team"),
    ("ui", "cli.ui:ui", "Choose"),
    ("serve", "cli.serve:serve", "Work as a team"),
    ("token", "cli.token:token_app", "Work as a team"),
    ("webhook", "cli.webhook:webhook_app", "Work as a team"),
    ("db", "cli.db:db_app", "Keep order"),
)


def make_app(wanted: str = "") -> typer.Typer:
    """The command line: with one command when its name is given, so that the others need not be loaded; else with all of them."""
    app = typer.Typer(
        name="ckpt",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        add_completion=False,
        epilog=_EPILOG,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    )
    app.callback()(_options)
    for name, place, panel in [row for row in COMMANDS if row[0] == wanted] or COMMANDS:
        module, _, attribute = place.partition(":")
        command = getattr(import_module(module), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=panel)
        else:
            app.command(name, rich_help_panel=panel)(command)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415 - takes longer to import than all of the help

        output.print_line(f"ckpt-registry {version('ckpt-registry')}")
        raise typer.Exit


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
    try:
        make_app(words[0] if words else "")(_with_bare_best(words), prog_name="ckpt")
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # Typer turns an interrupt of a command into this, without a word
            _say_interrupted(end)
        raise
    except KeyboardInterrupt as interrupt:
        _say_interrupted(interrupt)
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python must not complain while it flushes the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if "--traceback" in words[:2] or os.environ.get("CKPT_TRACEBACK"):
            raise
        sys.exit(_explain(error))


def _explain(error: Exception) -> int:
    """Tell the user what went wrong and what to do; gives the exit code."""
    if isinstance(error, Refused):
        from cli.views import print_report_as_talk  # noqa: PLC0415 - the help need not wait for it

        print_report_as_talk(error.report)
    explanation = explain(error)
    output.say_error(explanation.message, explanation.hint)
    return explanation.exit_code


def _say_interrupted(error: BaseException) -> None:
    from registry.following import Unfollowed  # noqa: PLC0415 - most commands follow no job

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, Unfollowed):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        output.say("interrupted; what is finished is kept, run it again to go on")
    else:
        watch, stop = f"`ckpt jobs show {cause.job} --follow` watches it", f"`ckpt jobs cancel {cause.job}` stops it"
        output.say(f"interrupted; job {cause.job} goes on: {watch}, {stop}")


def _with_bare_best(words: list[str]) -> list[str]:
    """`--best` may stand without a metric, which Typer's options cannot: an empty one is put there."""
    followed = [*words[1:], "-"][: len(words)]
    return [
        "--best=" if word == "--best" and after.startswith("-") else word
        for word, after in zip(words, followed, strict=True)
    ]
