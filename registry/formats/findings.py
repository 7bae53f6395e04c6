"""The two kinds of refusal that matching an adapter with a base model ends in, and how a base is doubted."""

from __future__ import annotations

from registry.manifest import Finding, Level

OTHER_BASE = "is this the base model it was trained on?"


def misfit(code: str, where: str, *, expected: str, found: str, advice: str = "") -> Finding:
    """A refusal that says that adapter and base do not belong together."""
    return Finding(
        code=code, level=Level.REFUSED, where=where, expected=expected, found=found, advice=advice, fits=False
    )


def unsupported(code: str, where: str, *, found: str, advice: str) -> Finding:
    """A refusal to merge something that may well fit."""
    return Finding(code=code, level=Level.REFUSED, where=where, found=found, advice=advice)


def warning(code: str, where: str, *, expected: str = "", found: str, advice: str) -> Finding:
    """Something to know that does not stop a merge."""
    return Finding(code=code, level=Level.WARNING, where=where, expected=expected, found=found, advice=advice)
