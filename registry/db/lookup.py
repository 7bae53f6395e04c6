"""Finding rows by what people call them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from sqlalchemy import ColumnElement, ScalarSelect, and_, case, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from registry.db.tables import AdapterRow, CheckpointRow
from registry.errors import UnknownAdapter, UnknownCheckpoint
from registry.manifest import Checkpoint
from registry.refs import AdapterName

MOST_SUGGESTED_FROM = 1000  # so many names are looked at for similar ones
_DIGEST_PREFIX = re.compile(r"(?:blake3:)?([0-9a-f]{6,64})")


def near(name: str, known: Iterable[str]) -> list[str]:
    """At most three of the known names that resemble a wrong one, the likest first."""
    return get_close_matches(name, list(known), n=3, cutoff=0.5)


def digest_prefix(text: str) -> str | None:
    """The hex digits of a digest or its beginning; None for text that is neither."""
    match = _DIGEST_PREFIX.fullmatch(text)
    return match and match[1]


def starts_with(column: InstrumentedAttribute[str], prefix: str) -> ColumnElement[bool]:
    """The digests with a prefix. A range, so that the index serves it; `g` follows the last hex digit."""
    return and_(column >= prefix, column < prefix + "g")


def is_adapter(name: AdapterName) -> ColumnElement[bool]:
    """The row of an adapter."""
    return and_(AdapterRow.namespace == name.namespace, AdapterRow.name == name.name)


def unknown_adapter(session: Session, adapter: AdapterName, namespaces: Sequence[str] = ()) -> UnknownAdapter:
    """That there is no adapter of a name (in some namespaces), with similar names from among the newest."""
    statement = select(AdapterRow.namespace, AdapterRow.name).where(AdapterRow.checkpoints > 0)
    if namespaces:
        statement = statement.where(AdapterRow.namespace.in_(namespaces))
    rows = session.execute(statement.order_by(AdapterRow.id.desc()).limit(MOST_SUGGESTED_FROM))
    return UnknownAdapter(str(adapter), near(str(adapter), (str(AdapterName(*row)) for row in rows)))


def adapter_text() -> ColumnElement[str]:
    """The name of an adapter as people write it."""
    whole: ColumnElement[str] = AdapterRow.namespace + "/" + AdapterRow.name
    return case((AdapterRow.namespace == "", AdapterRow.name), else_=whole)


def newest_of_adapter() -> ScalarSelect[int]:
    """The id of the newest checkpoint of an adapter, to be asked for beside its row."""
    return (
        select(CheckpointRow.id)
        .where(CheckpointRow.adapter_id == AdapterRow.id)
        .order_by(CheckpointRow.version.desc())
        .limit(1)
        .correlate(AdapterRow)
        .scalar_subquery()
    )


def ref(namespace: str, name: str, version: int) -> str:
    """How to ask for a checkpoint: `team/support-bot@v12`."""
    return f"{AdapterName(namespace, name)}@v{version}"


def checkpoint_id(session: Session, checkpoint: Checkpoint) -> int:
    """The row of a checkpoint.

    Raises:
        UnknownCheckpoint: it was removed meanwhile.
    """
    found = session.scalar(
        select(CheckpointRow.id)
        .join(AdapterRow)
        .where(is_adapter(checkpoint.adapter), CheckpointRow.version == checkpoint.version)
    )
    if found is None:
        raise UnknownCheckpoint(checkpoint.ref)
    return found
