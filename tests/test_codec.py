"""Every value comes back from its JSON, and what is no such value is refused by the name of its field."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime, timedelta, timezone
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from factories import NOON, checkpoint, digest, manifest
from hypothesis import given
from hypothesis import strategies as st

import registry.manifest
import registry.teamwork
from registry.codec import from_json, plain
from registry.errors import InvalidInput
from registry.manifest import BaseModel, Checkpoint, FileEntry, Manifest, Metric, Recipe, Report, Shipment
from registry.refs import AdapterName, Digest
from registry.teamwork import Page
from registry.tensors import StoredTensor

floats = st.floats()
texts = st.text(max_size=8)
names = st.from_regex(r"[a-z]{1,5}-x", fullmatch=True)
plain_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | texts,
    lambda parts: st.lists(parts, max_size=2) | st.dictionaries(texts, parts, max_size=2),
    max_leaves=4,
)
PARTICULAR: dict[Any, st.SearchStrategy[Any]] = {
    Any: plain_json,
    str: texts,
    bool: st.booleans(),
    int: st.integers(-(2**60), 2**60),
    float: floats,
    Digest: st.integers(0, 2**64).map(lambda number: digest(str(number))),
    AdapterName: st.builds(AdapterName, st.just("") | names, names),
    datetime: st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a field with such an annotation may have."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint in PARTICULAR:
        return PARTICULAR[hint]
    if origin is Literal:
        return st.sampled_from(inside)
    if origin in (Union, types.UnionType) and {str, float} <= set(inside):
        finite = st.floats(allow_nan=False, allow_infinity=False)  # others would be read as text
        return st.one_of(*(finite if each is float else values(each) for each in inside))
    if origin in (Union, types.UnionType):
        return st.one_of(*(st.none() if each is type(None) else values(each) for each in inside))
    if origin is tuple and inside[-1] is Ellipsis:
        return st.lists(values(inside[0]), max_size=2).map(tuple)
    if origin is Mapping:
        return st.dictionaries(texts, values(inside[1]), max_size=2)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(hint)
    hints = get_type_hints(hint)
    parts = {each.name: values(hints[each.name]) for each in fields(hint)}
    if hint is FileEntry:
        parts["path"] = names
    return st.builds(hint, **parts)


KINDS = sorted(
    {
        value
        for module in (registry.manifest, registry.teamwork)
        for value in vars(module).values()
        if isinstance(value, type) and is_dataclass(value) and value not in (Digest, AdapterName)
    },
    key=lambda kind: kind.__name__,
)


def same(one: Any, other: Any) -> bool:
    """Equal, where NaN is equal to itself."""
    if is_dataclass(one) and not isinstance(one, type):
        return type(one) is type(other) and all(
            same(getattr(one, each.name), getattr(other, each.name)) for each in fields(one)
        )
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other) and (type(one) is type(other) or isinstance(one, Enum))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.__name__ != "Page"], ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_every_value_comes_back(kind: type[Any], data: st.DataObject) -> None:
    value = data.draw(values(kind))
    document = json.loads(json.dumps(plain(value), allow_nan=False))
    assert same(from_json(kind, document), value)


@given(items=st.lists(floats, max_size=3).map(tuple))
def test_a_page_is_of_its_kind(items: tuple[float, ...]) -> None:
    page = Page(items=items, cursor="x")
    assert same(from_json(Page[float], json.loads(json.dumps(plain(page), allow_nan=False))), page)


def test_numbers_that_json_lacks_are_text() -> None:
    assert plain([math.nan, math.inf, -math.inf, {"a": (1.5,)}]) == ["nan", "inf", "-inf", {"a": [1.5]}]
    assert from_json(float, "-inf") == -math.inf
    assert from_json(Metric, {"name": "loss", "value": "inf"}) == Metric(name="loss", value=math.inf)


def test_what_is_not_known_is_passed_over_and_what_is_missing_has_its_default() -> None:
    assert from_json(Metric, {"name": "loss", "value": 1, "unit": "nats"}) == Metric(name="loss", value=1.0)


def test_times_of_any_zone_are_read_in_utc() -> None:
    found = from_json(datetime, "2025-03-01T14:00:00+02:00")
    assert (found, found.tzinfo) == (NOON, UTC)
    assert plain(NOON.astimezone(timezone(timedelta(hours=2)))) == "2025-03-01T12:00:00Z"


@dataclass(frozen=True, slots=True, kw_only=True)
class Odd:
    """What domain values have none of."""

    choice: int | str | tuple[int, ...] | None
    numbers: set[int] = frozenset()  # type: ignore[assignment]


def test_the_first_kind_of_several_that_fits_is_taken() -> None:
    read: Callable[[Any], Odd] = lambda choice: from_json(Odd, {"choice": choice})  # noqa: E731
    assert [read(each).choice for each in (1, "1", [1, 2], None)] == [1, "1", (1, 2), None]
    with pytest.raises(InvalidInput):
        read(True)
    with pytest.raises(InvalidInput, match="no way to read"):
        from_json(Odd, {"choice": 1, "numbers": [1]})


@pytest.mark.parametrize(
    ("kind", "change", "field"),
    [
        (Metric, {"name": 1}, "name"),
        (Metric, {"value": "1.5"}, "value"),
        (Metric, {"value": True}, "value"),
        (Metric, {"step": 1.5}, "step"),
        (Metric, {"step": True}, "step"),
        (Metric, {"direction": "sideways"}, "direction"),
        (Manifest, {"format": "zip"}, "format"),
        (Manifest, {"files": {}}, "files"),
        (Manifest, {"files": [{"path": "x"}]}, "size_bytes"),
        (Manifest, {"targets": "q_proj"}, "targets"),
        (Manifest, {"tokenizer": 1}, "tokenizer"),
        (Checkpoint, {"digest": "abc"}, "digest"),
        (Checkpoint, {"adapter": ""}, ""),
        (Checkpoint, {"created_at": "2025-03-01T12:00:00"}, "created_at"),
        (Checkpoint, {"created_at": "yesterday"}, "created_at"),
        (Checkpoint, {"tags": []}, "tags"),
        (Checkpoint, {"manifest": None}, "manifest"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kind: type[Any], change: dict[str, Any], field: str) -> None:
    good = {Metric: Metric(name="loss", value=1.0), Manifest: manifest(), Checkpoint: checkpoint()}[kind]
    with pytest.raises(Exception) as caught:  # noqa: PT011 - names are refused as references
        from_json(kind, {**plain(good), **change})
    assert field in str(getattr(caught.value, "fields", {}).get("field", "")) or field == ""


@pytest.mark.parametrize("document", [None, 1, "x", [], [[]], True])
@pytest.mark.parametrize("kind", [Checkpoint, BaseModel, Recipe, Report, Shipment, StoredTensor])
def test_what_is_no_object_is_refused(kind: type[Any], document: Any) -> None:
    with pytest.raises(InvalidInput):
        from_json(kind, document)
