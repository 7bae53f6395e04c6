"""`ckpt report`: one page about an adapter, for a review."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import output
from registry import connect
from registry.disk import Translating
from registry.errors import InvalidInput

_FORMS = (".html", ".md")


def report(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter.")],
    out: Annotated[
        Path, typer.Option(metavar="FILE.html|FILE.md", help="Where to write it; an older one is replaced.")
    ],
    policy: Annotated[str, typer.Option(metavar="POLICY", help="Judge by this one instead of the adapter's own.")] = "",
) -> None:
    """Write one page about an adapter: what is best and why, curves, candidates, what differs from what is live, evidence, lineage.

    A page needs nothing but a browser, and prints well; Markdown has the same in tables.
    """
    if out.suffix.lower() not in _FORMS:
        raise InvalidInput("--out", str(out), f"expected a name that ends in {' or '.join(_FORMS)}")
    from registry.report_forms import to_html, to_markdown  # noqa: PLC0415 - the help need not wait for it
    from registry.reporting import report as gather  # noqa: PLC0415

    with connect() as registry:
        document = gather(registry, adapter, policy)
    text = to_html(document) if out.suffix.lower() == ".html" else to_markdown(document)
    with Translating(str(out)):
        out.write_text(text, encoding="utf-8")
    output.print_line(f"wrote {out}")
