"""Write `docs/cli.md` from the commands' own help. `make docs` runs this; a test checks that the file is up to date."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.update(TERMINAL_WIDTH="100", COLUMNS="100", NO_COLOR="1", TERM="dumb")

import typer
from typer.testing import CliRunner

from cli.app import COMMANDS, make_app
from cli.errors import EXIT_CODES

HEAD = """# Commands

Made from the commands' own help by `make docs`.

Data goes to stdout, talk to stderr; `--json` gives data for programs ([shapes](json.md)). Bars are shown on a terminal only. Nothing asks
a question unless it is on one.

## How to ask for a checkpoint

| write | means |
|---|---|
| `support-bot` | its newest checkpoint |
| `team/support-bot@v12` | a version |
| `support-bot@candidate` | an alias, or else what is live in an environment of that name |
| `support-bot@step:500` | the newest checkpoint of that step |
| `support-bot@run:lr-1e-4` | the newest checkpoint of a run, by its name or number (`@run:3`: the third one registered) |
| `support-bot@best:eval_loss` | the best by a metric; `@best` alone by the metric that all its checkpoints share |
| `3f9c2a7` | a digest's first digits, at least 6; merged models are asked for so, too |

## Filters (`--where`)

Comparisons `= != < <= > >=`, `like` (with `%` and `_`), `in (…)`, `is null`, `is not null`, joined by `and`, `or`, `not` and parentheses.
Names: `metric.NAME` (`metric."val/loss"` where it has other characters), `tag.KEY`, `step`, `version`, `rank`, `alpha`, `parameters`,
`size`, `adapter`, `run`, `base`, `method`, `format`, `dtype`, `author`, `arch_version`, `alias`, `created`. What is missing makes a
comparison false.

    ckpt list --where "metric.eval_loss < 0.9 and tag.team = 'nlu' and step >= 200"

## Settings

| variable | `config.toml` in the home | default |
|---|---|---|
| `CKPT_HOME` | | the platform's folder for user data, `ckpt` in it |
| `CKPT_DATABASE_URL` | `database_url` | SQLite in the home |
| `CKPT_STORE` | `store` | the folder `store` in the home; any fsspec URL |
| `CKPT_USER` | `user` | the login name |
| `CKPT_CACHE_BYTES` | `cache_bytes` | 268435456: memory for blocks of merged models that are computed while they are downloaded |
| `CKPT_TRACEBACK` | | unset; anything shows where errors come from, as `--traceback` does |

## Exit codes

| code | meaning |
|---|---|
"""


def commands(app: typer.Typer) -> Iterator[tuple[str, ...]]:
    """Every command by its words, in the order of the help."""
    yield ()
    inside = {group.name: group.typer_instance for group in app.registered_groups}
    for name, _, _ in COMMANDS:
        yield (name,)
        group = inside.get(name)
        for command in group.registered_commands if group else ():
            yield name, str(command.name)


def page() -> str:
    """The whole text of `docs/cli.md`."""
    codes = "".join(f"| {code} | {meaning} |\n" for code, meaning in EXIT_CODES.items())
    parts = [HEAD, codes]
    app = make_app()
    for words in commands(app):
        result = CliRunner().invoke(app, [*words, "--help"], prog_name="ckpt", env={"COLUMNS": "100"})
        text = "\n".join(line.rstrip() for line in result.output.strip("\n").splitlines())
        parts.append(f"\n## `{' '.join(('ckpt', *words))}`\n\n```text\n{text}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(page(), encoding="utf-8")
    sys.stdout.write("wrote docs/cli.md\n")
