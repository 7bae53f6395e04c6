"""The two kinds of refusal that matching an adapter with a base model ends in, and how a base is doubted."""

from __future__ import annotations

from dataclasses import replace

from registry.manifest import Finding, Level, Report

OTHER_BASE = "is this the base model it was trained on?"
ANOTHER_SAVE = "configuration and weights are not from the same save"
# Refusals that only say that merging would leave something out, which whoever merges may accept.
LOSSY = frozenset({"gated_prefix", "router_bias"})


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


def accept_loss(report: Report) -> Report:
    """The report for someone who accepts what merging leaves out: such refusals become warnings, which are recorded with the result."""
    accepted = [
        replace(each, level=Level.WARNING, advice="left out, as `--allow-lossy` says")
        if each.code in LOSSY and each.level is Level.REFUSED
        else each
        for each in report.findings
    ]
    return replace(report, findings=tuple(accepted))
