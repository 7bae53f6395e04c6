"""The web pages: drawn on the server, with a little htmx where waiting for a whole page would be too much."""

from __future__ import annotations

from registry.server.pages import (
    adapter,
    admin,
    checkpoint,
    compare,
    jobs,
    merge,
    models,
    overview,
    shipped,
    table,
)
from registry.server.pages.visits import PageRule

PAGES: tuple[PageRule, ...] = tuple(
    rule
    for subject in (overview, table, adapter, checkpoint, compare, models, merge, jobs, shipped, admin)
    for rule in subject.pages
)
