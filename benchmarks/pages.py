"""How long the server takes for the pages that list checkpoints, with many of them, on SQLite and on PostgreSQL.

    python benchmarks/pages.py [--counts 10000 100000 1000000] [--databases sqlite postgresql] [--repeat 20] [--json out.json]

The databases are those of `catalog.py`: five metrics and two tags a checkpoint, 500 checkpoints an adapter. Every figure is the time until
one client on the same machine has the whole page, in HTML; two visits before are not counted.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

import catalog
import httpx
from catalog import Figure, database, measure

from registry import Settings
from registry.db.schema import open_engine, upgrade

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from running import serving

LIMIT_MS = 200.0


def addresses(client: httpx.Client, count: int) -> Mapping[str, str]:
    """What people look at. Every list has three metrics as columns, and marks the best."""
    last = math.ceil(count / catalog.PER_ADAPTER) - 1
    adapter = f"team-{last % 20}/bot-{last}"
    pages = {
        "the overview": "/",
        "the first 50": table(),
        "the first 200": table(limit="200"),
        "by a metric": table(sort="metric.eval_loss"),
        "by a metric, the reverse": table(sort="-metric.eval_loss"),
        "by run": table(sort="run"),
        "by step, the last first": table(sort="-step"),
        "by rank": table(sort="rank"),
        "by size": table(sort="size"),
        "of an adapter, by a metric": table(adapter=adapter, sort="metric.accuracy"),
        "of an adapter, by step": table(adapter=adapter, sort="-step"),
        "of an adapter, by size": table(adapter=adapter, sort="size"),
        "a metric that 1 in 2000 pass": table(where="metric.eval_loss < 0.0005"),
        "a metric that half pass, and a rank": table(where="metric.eval_loss < 0.5 and rank = 16"),
        "a metric that only the worst pass": table(where="metric.eval_loss > 0.9"),
        "a metric that none pass": table(where="metric.eval_loss < 0"),
        "a tag that few have": table(where="tag.ticket = '77'"),
        "a tag that 1 in 20 have, by a metric": table(where="tag.team = 'team-3'", sort="metric.eval_loss"),
        "a text in the run's name": table(where="run like 'run-1%'"),
    }
    return {**pages, "the tenth page of a metric": tenth(client, table(sort="metric.eval_loss"))}


def table(**said: str) -> str:
    """The address of a list."""
    return f"/checkpoints?{urlencode(said)}"


def tenth(client: httpx.Client, address: str) -> str:
    """The address of the tenth page, by way of those before it."""
    for _ in range(9):
        text = client.get(address).text
        address = text.partition('rel="next" href="')[2].partition('"')[0].replace("&amp;", "&")
    return address


@contextmanager
def served(kind: str, count: int) -> Iterator[httpx.Client]:
    """A visitor of a server with so many checkpoints."""
    with tempfile.TemporaryDirectory(prefix="ckpt-pages-") as name, database(kind, Path(name)) as url:
        home = Path(name)
        upgrade(url, home / "backups")
        engine = open_engine(url)
        start = time.perf_counter()
        catalog.fill(engine, count)
        engine.dispose()
        print(f"{kind}: {count:,} checkpoints written in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        settings = replace(Settings.from_environment({"CKPT_HOME": str(home)}), database_url=url)
        with serving(settings) as server, httpx.Client(base_url=server.url, timeout=120) as client:
            yield client


def run(kind: str, count: int, repeat: int) -> list[Figure]:
    """All figures of one database of one size."""
    found = []
    with served(kind, count) as client:
        for what, address in addresses(client, count).items():
            p50, p95 = measure(partial(visit, client, address), repeat)
            found.append(Figure(database=kind, checkpoints=count, what=what, p50_ms=p50, p95_ms=p95))
    return found


def visit(client: httpx.Client, address: str) -> None:
    """Get a page, whole."""
    answer = client.get(address)
    if answer.status_code != httpx.codes.OK:
        raise SystemExit(f"{address}: {answer.status_code}\n{answer.text[:2000]}")


def show(figures: Sequence[Figure], counts: Sequence[int]) -> None:
    """A table: a line for each page, the sizes side by side."""
    for kind in dict.fromkeys(figure.database for figure in figures):
        print(f"\n{kind:38}" + "".join(f"{count:>20,}" for count in counts))
        found = {(f.what, f.checkpoints): f for f in figures if f.database == kind}
        for what in dict.fromkeys(what for what, _ in found):
            row = [found[what, count] for count in counts]
            cells = "".join(f"{each.p50_ms:>9.1f} {each.p95_ms:>7.1f} ms" for each in row)
            print(f"{what:38}{cells}{'  !' if row[-1].p50_ms > LIMIT_MS else ''}")
    print(f"\np50 and p95; ! marks what takes more than {LIMIT_MS:.0f} ms")


if __name__ == "__main__":
    catalog.main(__doc__, run, show, repeat=20)
