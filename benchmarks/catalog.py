"""How long lists, rankings and look-ups take with many checkpoints, on SQLite and on PostgreSQL.

    python benchmarks/catalog.py [--counts 10000 100000 1000000] [--databases sqlite postgresql] [--repeat 40] [--json out.json]

Each checkpoint has five metrics and two tags; an adapter has 500 of them, an alias and a shipment. PostgreSQL is started here, on a folder
of its own and with the durable settings it has by default. Every figure is the wall time of one call of the library, with another
adapter each time, after three calls that are not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any

from blake3 import blake3
from measuring import machine
from sqlalchemy import Engine, Index, func, insert, select

from registry import Settings, connect
from registry.codec import plain
from registry.db.adding import listed
from registry.db.bases import Bases
from registry.db.schema import open_engine, upgrade, writing
from registry.db.tables import (
    AdapterMetricRow,
    AdapterRow,
    AliasRow,
    CheckpointRow,
    MetricRow,
    ShipmentRow,
    Table,
    TagRow,
)
from registry.errors import NotFound
from registry.filters import parse_filter
from registry.manifest import BaseFile, BaseFormat, BaseModel, FileEntry, Fingerprint, Format, Manifest
from registry.refs import Digest
from registry.service import Registry
from registry.tensors import DType, StoredTensor, TensorSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import servers

PER_ADAPTER = 500
START = datetime(2024, 1, 1, tzinfo=UTC)
LIMIT_MS, LIMIT_GROWTH = 50.0, 2.0
METRICS = ("eval_loss", "train_loss", "accuracy", "rouge1", "throughput")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Milliseconds of one kind of call: the median, and what 95 of 100 calls do not exceed."""

    database: str
    checkpoints: int
    what: str
    p50_ms: float
    p95_ms: float


# ---- what is in the database


def digest(text: str) -> Digest:
    """A digest that stands for some content."""
    return Digest(blake3(text.encode()).hexdigest())


def manifest(number: int) -> Manifest:
    """A LoRA as PEFT writes it."""
    rank = (8, 16, 32)[number % 3]
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = tuple(FileEntry(path=name, size_bytes=10**6 + number, digest=digest(f"{name} {number}")) for name in names)
    return Manifest(
        format=Format.PEFT,
        method="lora",
        rank=rank,
        alpha=2.0 * rank,
        scaling="alpha/r",
        targets=("q_proj", "v_proj"),
        dtype="float32",
        parameters=10**6,
        tensors=128,
        weights_file=names[1],
        base_name="meta/base",
        files=files,
    )


def base() -> BaseModel:
    """The base model of them all."""
    tensor = StoredTensor(TensorSpec("lm_head.weight", DType.BF16, (8, 4)), "model.safetensors", 96)
    return BaseModel(
        name="meta/base",
        url="/models/base",
        in_store=False,
        format=BaseFormat.SAFETENSORS,
        fingerprint=Fingerprint(architecture=digest("architecture"), weights=digest("base"), tensors={}),
        arch_version="",
        config={"model_type": "llama"},
        files=(BaseFile(path="model.safetensors", size_bytes=160, identity="1"),),
        tensors=(tensor,),
        created_at=START,
        author="ada",
    )


def adapter_rows(count: int) -> Iterator[dict[str, Any]]:
    """Adapters that have all their checkpoints already."""
    for number in range(math.ceil(count / PER_ADAPTER)):
        has = min(PER_ADAPTER, count - number * PER_ADAPTER)
        name = {"namespace": f"team-{number % 20}", "name": f"bot-{number}"}
        yield {"id": number + 1, **name, "last_version": has, "checkpoints": has, "created_at": START}


def checkpoint_rows(count: int) -> Iterator[dict[str, Any]]:
    """Checkpoints, as the runs of many people would interleave them."""
    adapters = math.ceil(count / PER_ADAPTER)
    versions = [0] * (adapters + 1)
    for number in range(count):
        adapter = number % adapters + 1
        versions[adapter] += 1
        found = manifest(number)
        yield {
            "id": number + 1,
            "adapter_id": adapter,
            "version": versions[adapter],
            "digest": found.digest.hex,
            "base_id": 1,
            "arch_version": "",
            "run": f"run-{versions[adapter] // 50}",
            "step": 100 * (versions[adapter] % 50),
            "source": f"/training/{number}",
            "manifest": plain(found),
            "created_at": START + timedelta(seconds=number),
            "author": f"user-{number % 50}",
            **listed(found),
        }


def metric_rows(count: int) -> Iterator[dict[str, Any]]:
    """Five metrics of each checkpoint, all current."""
    chance = random.Random(1)
    for number in range(count):
        for place, name in enumerate(METRICS):
            yield {
                "id": 5 * number + place + 1,
                "checkpoint_id": number + 1,
                "name": name,
                "value": chance.random() * (1000 if name == "throughput" else 1),
                "step": None,
                "split": "",
                "direction": None,
                "recorded_at": START,
                "author": "ada",
                "is_current": True,
                "data": "",
            }


def tag_rows(count: int) -> Iterator[dict[str, Any]]:
    """A tag that many share, and one that few do."""
    for number in range(count):
        for place, (key, value) in enumerate((("team", f"team-{number % 20}"), ("ticket", str(number // 3)))):
            shown = {"key": key, "value": value, "beginning": value}
            is_number = float(value) if key == "ticket" else None
            yield {"id": 2 * number + place + 1, "checkpoint_id": number + 1, **shown, "number": is_number}


def fill(engine: Engine, count: int) -> None:
    """Write everything, with the indexes made last."""
    adapters = math.ceil(count / PER_ADAPTER)
    with writing(engine) as session:
        Bases(session).add(base())
    tables = [CheckpointRow, MetricRow, TagRow]
    indexes = [index for table in tables for index in table.__table__.indexes]
    with engine.begin() as connection:
        for index in indexes:
            index.drop(connection)
    write(engine, AdapterRow, adapter_rows(count))
    write(engine, CheckpointRow, checkpoint_rows(count))
    write(engine, MetricRow, metric_rows(count))
    write(engine, TagRow, tag_rows(count))
    write(
        engine,
        AliasRow,
        ({"id": n + 1, "adapter_id": n + 1, "name": "candidate", "checkpoint_id": n + 1} for n in range(adapters)),
    )
    write(engine, ShipmentRow, shipment_rows(adapters))
    count_metrics(engine)
    make(engine, indexes)


def shipment_rows(adapters: int) -> Iterator[dict[str, Any]]:
    """One of each adapter."""
    for n in range(adapters):
        what = {"adapter_id": n + 1, "checkpoint_id": n + 1, "merged_id": None, "restores": None}
        yield {"id": n + 1, "environment": "production", **what, "note": "", "author": "ada", "shipped_at": START}


def count_metrics(engine: Engine) -> None:
    """What adding them one by one would have counted."""
    with engine.begin() as connection:
        counted = (
            select(
                CheckpointRow.adapter_id,
                MetricRow.name,
                MetricRow.split,
                func.coalesce(MetricRow.direction, ""),
                MetricRow.data,
                func.count(),
                func.count(),
            )
            .join_from(MetricRow, CheckpointRow)
            .group_by(CheckpointRow.adapter_id, MetricRow.name, MetricRow.split, MetricRow.direction, MetricRow.data)
        )
        columns = ["adapter_id", "name", "split", "direction", "data", "checkpoints", "finite"]
        connection.execute(insert(AdapterMetricRow).from_select(columns, counted))


def make(engine: Engine, indexes: Sequence[Index]) -> None:
    """Make indexes, and tell the database to look at what it has."""
    with engine.begin() as connection:
        for index in indexes:
            index.create(connection)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        vacuum = "VACUUM ANALYZE" if engine.dialect.name == "postgresql" else "ANALYZE"
        connection.exec_driver_sql(vacuum)


def write(engine: Engine, table: type[Table], rows: Iterator[Mapping[str, Any]]) -> None:
    """Many rows, as fast as the database takes them."""
    first = next(rows)
    names = list(first)
    kinds = [table.__table__.c[name].type.dialect_impl(engine.dialect).bind_processor(engine.dialect) for name in names]

    def values() -> Iterator[list[Any]]:
        for row in chain([first], rows):
            yield prepared(row)

    def prepared(row: Mapping[str, Any]) -> list[Any]:
        return [kind(row[name]) if kind else row[name] for name, kind in zip(names, kinds, strict=True)]

    name = table.__tablename__
    connection = engine.raw_connection()
    with closing(connection):
        if engine.dialect.name == "postgresql":
            driver: Any = connection.driver_connection
            with driver.cursor() as cursor, cursor.copy(f"COPY {name} ({', '.join(names)}) FROM STDIN") as copy:
                for each in values():
                    copy.write_row(each)
        else:
            lite: sqlite3.Connection = connection.driver_connection  # type: ignore[assignment]
            lite.execute("BEGIN")
            lite.executemany(
                f"INSERT INTO {name} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})", values()
            )
        connection.commit()


# ---- what is measured


def calls(registry: Registry, count: int) -> Mapping[str, Callable[[], object]]:
    """What people ask for most, each time about something else."""
    chance = random.Random(2)
    adapters = math.ceil(count / PER_ADAPTER)

    def adapter() -> str:
        number = chance.randrange(adapters)
        return f"team-{number % 20}/bot-{number}"

    few, many = parse_filter("metric.eval_loss < 0.0005"), parse_filter("metric.eval_loss < 0.5 and rank = 16")
    none, ticket = parse_filter("metric.eval_loss < 0"), parse_filter("tag.ticket = '77'")
    return {
        "first page": lambda: registry.page(),
        "first page of an adapter": lambda: registry.page(adapter()),
        "first page by a metric": lambda: registry.page(sort="metric.eval_loss"),
        "a metric that 1 in 2000 pass": lambda: registry.page(where=few),
        "a metric that half pass, and a rank": lambda: registry.page(where=many),
        "a metric that none pass": lambda: registry.page(where=none),
        "a tag that few have": lambda: registry.page(where=ticket),
        "best of an adapter": lambda: registry.rank(adapter()),
        "best of all": lambda: registry.rank(),
        "alias": lambda: registry.resolve(f"{adapter()}@candidate"),
        "live": lambda: registry.resolve(f"{adapter()}@production"),
        "show": lambda: registry.details(registry.resolve(f"{adapter()}@v7")),
        "a name that is not there": lambda: missing(registry, f"{adapter()}@zork"),
    }


def missing(registry: Registry, text: str) -> None:
    """Ask for what there is not, and be told what is like it."""
    try:
        registry.resolve(text)
    except NotFound:
        return
    raise SystemExit(f"{text} is there")


def measure(call: Callable[[], object], repeat: int) -> tuple[float, float]:
    """Median and 95th percentile of the milliseconds that a call takes."""
    for _ in range(3):
        call()
    took = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        took.append(1000 * (time.perf_counter() - start))
    return statistics.median(took), statistics.quantiles(took, n=20)[-1]


@contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'ckpt.db'}"
        return
    with servers.postgres_server(options=("shared_buffers=1GB", "random_page_cost=1.1")) as server:
        yield servers.create_database(server)


def run(kind: str, count: int, repeat: int) -> list[Figure]:
    """All figures of one database of one size."""
    with tempfile.TemporaryDirectory(prefix="ckpt-catalog-") as name, database(kind, Path(name)) as url:
        home = Path(name)
        upgrade(url, home / "backups")
        engine = open_engine(url)
        start = time.perf_counter()
        fill(engine, count)
        engine.dispose()
        print(f"{kind}: {count:,} checkpoints written in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        settings = replace(Settings.from_environment({"CKPT_HOME": str(home)}), database_url=url)
        with connect(settings) as registry:
            return [
                Figure(database=kind, checkpoints=count, what=what, p50_ms=p50, p95_ms=p95)
                for what, call in calls(registry, count).items()
                for p50, p95 in [measure(call, repeat)]
            ]


def show(figures: Sequence[Figure], counts: Sequence[int]) -> None:
    """A table: a line for each kind of call, the sizes side by side."""
    for kind in dict.fromkeys(figure.database for figure in figures):
        print(f"\n{kind:38}" + "".join(f"{count:>20,}" for count in counts) + f"{'growth':>10}")
        found = {(f.what, f.checkpoints): f for f in figures if f.database == kind}
        for what in dict.fromkeys(what for what, _ in found):
            row = [found[what, count] for count in counts]
            growth = row[-1].p50_ms / row[0].p50_ms
            is_slow = kind == "postgresql" and (row[-1].p50_ms > LIMIT_MS or growth > LIMIT_GROWTH)
            cells = "".join(f"{each.p50_ms:>9.1f} {each.p95_ms:>7.1f} ms" for each in row)
            print(f"{what:38}{cells}{growth:>9.1f}x{'  !' if is_slow else ''}")
    print(f"\np50 and p95; ! marks what takes more than {LIMIT_MS:.0f} ms or grows more than {LIMIT_GROWTH:.0f}x")


def main(
    about: str | None = __doc__,
    run: Callable[[str, int, int], list[Figure]] = run,
    show: Callable[[Sequence[Figure], Sequence[int]], None] = show,
    repeat: int = 40,
) -> None:
    """Measure, print a table, and write the figures down if asked to.

    Args:
        about: told by `--help`.
        run: measures a kind of database with so many checkpoints, each figure so many times.
        show: prints the figures.
        repeat: how many times, unless told otherwise.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])
    parser.add_argument("--repeat", type=int, default=repeat)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    figures = [
        figure for kind in asked.databases for count in asked.counts for figure in run(kind, count, asked.repeat)
    ]
    show(figures, asked.counts)
    if asked.json:
        rows = [{name: getattr(figure, name) for name in Figure.__slots__} for figure in figures]
        asked.json.write_text(json.dumps({"machine": machine(), "figures": rows}, indent=2))


if __name__ == "__main__":
    main()
