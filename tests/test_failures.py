"""Every error passes a wire whole."""

from __future__ import annotations

import inspect
import json

import pytest

from registry import errors
from registry.failures import from_document, to_document
from registry.manifest import Finding, Level, Report

_REPORT = Report(checkpoint="bot@v1", base="base", findings=(Finding(code="rank", level=Level.REFUSED, where="q"),))
_VALUES = {
    "position": 3, "near": ("bot",), "matches": ("a", "b"), "reasons": ("x",), "report": _REPORT, "largest_delta": 0.5, "retry_seconds": 7,
}  # fmt: skip


def _kinds() -> list[type[errors.RegistryError]]:
    found = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.RegistryError)]
    return [kind for kind in found if kind is not errors.RegistryError]


@pytest.mark.parametrize("kind", _kinds())
def test_an_error_comes_back_as_it_was(kind: type[errors.RegistryError]) -> None:
    wanted = inspect.signature(kind).parameters
    error = kind(**{name: _VALUES.get(name, f"some {name}") for name in wanted})
    back = from_document(json.loads(json.dumps(to_document(error))))
    assert type(back) is kind
    assert back.fields == error.fields
    assert vars(back) == vars(error)


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in _kinds()]
    assert len(set(codes)) == len(codes)


def test_an_error_of_a_newer_server_is_told_all_the_same() -> None:
    back = from_document({"code": "too_new", "fields": {}, "message": "the moon is full"}, "http://registry")
    assert isinstance(back, errors.ServerFailed)
    assert "the moon is full" in back.reason
