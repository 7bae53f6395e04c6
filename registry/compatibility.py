"""Does a checkpoint belong to a base model, and can it be merged? Every finding, never just the first. Pure: the facts are passed in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from registry.changes import Resolution
from registry.formats import Adapter, resolve
from registry.formats.quantised import base_quantised, said_quantised
from registry.manifest import BaseModel, Checkpoint, Finding, Level, Report
from registry.omissions import Omission

_LISTED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What only reading can tell.

    `nonfinite`: adapter tensors with NaN or infinite values; None when their values were not read. `zeros`: those that hold nothing but zeros,
    likewise. `losses`: in words, by the code of each omission whose loss was measured. `tokens`: one more than the largest token
    id of the adapter's own tokenizer, 0 without one. `changed_files`: files of the base that are no longer what was recorded.
    `merged_before`: the base's own record says that this checkpoint is in it.
    """

    nonfinite: Sequence[str] | None = None
    zeros: frozenset[str] | None = None
    losses: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 0
    changed_files: Sequence[str] = ()
    merged_before: bool = False


def check(
    label: str, adapter: Adapter, base: BaseModel, resolution: Resolution, *, trained: Checkpoint | None, facts: Facts
) -> Report:
    """Compare an adapter with a base model.

    Args:
        label: what the checkpoint is called in the report.
        adapter: what its files say.
        base: the base model to compare with.
        resolution: the adapter's tensors matched with this very base.
        trained: the checkpoint, which says what base it was trained on; None while it is not registered yet.
        facts: what only reading can tell.
    """
    findings = [
        *(_identity(base, trained) if trained else ()),
        *_changed(base, facts),
        *_merged_before(base, facts),
        *_matching(adapter, resolution),
        *(_omitted(each, resolution, facts) for each in resolution.omitted),
        *_values(adapter, facts),
        *_vocabulary(base, resolution, facts),
        *_dtypes(adapter, base, resolution.places),
        *_quantised(base, resolution),
    ]
    return Report(checkpoint=label, base=base.name, findings=tuple(findings))


def compare(checkpoint: Checkpoint, adapter: Adapter, base: BaseModel, facts: Facts) -> tuple[Resolution, Report]:
    """Match a registered checkpoint with a base model and check it. `adapter` is what its files say."""
    resolution = resolve(adapter, base)
    return resolution, check(checkpoint.ref, adapter, base, resolution, trained=checkpoint, facts=facts)


def _passed(code: str, where: str, found: str) -> Finding:
    return Finding(code=code, level=Level.PASS, where=where, found=found)


def _identity(base: BaseModel, trained: Checkpoint) -> Iterator[Finding]:
    if trained.base == base.digest:
        yield _passed("base_weights", base.name, f"{base.digest.short}, as recorded")
    else:
        yield Finding(
            code="base_weights", level=Level.REFUSED, where=base.name, fits=False,
            expected=f"{trained.base.short} ({trained.base_name}), which it was trained on", found=base.digest.short,
            advice="merge into the base it was trained on; other weights give silently wrong answers",
        )  # fmt: skip
    same = trained.architecture == base.fingerprint.architecture
    yield Finding(
        code="architecture", level=Level.PASS if same else Level.REFUSED, where=base.name, fits=same,
        expected="" if same else trained.architecture.short, found=base.fingerprint.architecture.short,
        advice="" if same else "configuration or tensor shapes differ from those it was trained with",
    )  # fmt: skip
    if trained.arch_version and base.arch_version:
        same = trained.arch_version == base.arch_version
        yield Finding(
            code="arch_version", level=Level.PASS if same else Level.REFUSED, where=base.name, fits=same,
            expected="" if same else trained.arch_version, found=base.arch_version,
            advice="" if same else "retrain on this version, or merge into the base of the version it was trained for",
        )  # fmt: skip


def _changed(base: BaseModel, facts: Facts) -> Iterator[Finding]:
    for path in facts.changed_files:
        yield Finding(
            code="base_changed", level=Level.REFUSED, where=f"{base.url}/{path}", expected="the file that was recorded",
            found="another one", advice=f"`ckpt base verify {base.name}` tells which tensors differ",
        )  # fmt: skip


def _merged_before(base: BaseModel, facts: Facts) -> Iterator[Finding]:
    if facts.merged_before:
        yield Finding(
            code="merged_before", level=Level.REFUSED, where=f"{base.url}/merge.json", expected="a base without this checkpoint",
            found="it was merged in already", advice="merging twice doubles its effect: use the model as it is",
        )  # fmt: skip


def _matching(adapter: Adapter, resolution: Resolution) -> Iterator[Finding]:
    yield from resolution.findings
    refused = [finding for finding in resolution.findings if finding.level is Level.REFUSED]
    if any(not finding.fits for finding in refused):
        return
    if resolution.changes:
        used = len(adapter.tensors)
        yield _passed(
            "tensors", adapter.weights_file, f"all {used} tensors have their place in the base, none is left over"
        )
        yield _passed(
            "targets",
            adapter.weights_file,
            f"{len(resolution.changes)} tensors of the base change, no target is missed",
        )
    elif not refused and not resolution.omitted:
        yield Finding(
            code="nothing_matched", level=Level.REFUSED, where=adapter.weights_file, expected="at least one tensor of the base",
            found="none", fits=False, advice="is this the base model it was trained on?",
        )  # fmt: skip


def _omitted(omission: Omission, resolution: Resolution, facts: Facts) -> Finding:
    """What becomes of something that the changes leave out, as far as its values are known."""
    finding = omission.finding
    if facts.zeros is not None and omission.zeros <= facts.zeros:
        if resolution.changes:
            return _passed(finding.code, finding.where, "all of them are zero: nothing is left out")
        return Finding(
            code="nothing_to_merge", level=Level.REFUSED, where=finding.where, found="an adapter that changes nothing: all its gates are zero",
            advice="use the base model as it is",
        )  # fmt: skip
    if facts.zeros is None and resolution.changes:
        return replace(
            finding, level=Level.WARNING, advice="`ckpt check` reads whether they are zero, and what is lost if not"
        )
    loss = facts.losses.get(finding.code)
    return replace(finding, found=f"{finding.found}: {loss}") if loss else finding


def _values(adapter: Adapter, facts: Facts) -> Iterator[Finding]:
    for name in facts.nonfinite or ():
        yield Finding(
            code="not_finite", level=Level.REFUSED, where=name, expected="finite numbers", found="NaN or infinity",
            advice="training diverged here: choose an earlier checkpoint",
        )  # fmt: skip
    if facts.nonfinite is not None and not facts.nonfinite:
        yield _passed("finite", adapter.weights_file, f"{adapter.parameters:,} values")


def _vocabulary(base: BaseModel, resolution: Resolution, facts: Facts) -> Iterator[Finding]:
    rows = _vocabulary_rows(base, resolution)
    if not facts.tokens or rows is None:
        return
    if facts.tokens > rows:
        yield Finding(
            code="vocabulary", level=Level.REFUSED, where="tokenizer", expected=f"at most {rows} ids, the rows of the embedding",
            found=f"{facts.tokens}", advice="the new rows were not saved: train again with save_embedding_layers=True",
        )  # fmt: skip
    else:
        yield _passed("vocabulary", "tokenizer", f"{facts.tokens} ids in {rows} rows")


def _vocabulary_rows(base: BaseModel, resolution: Resolution) -> int | None:
    resized = resolution.config.get("vocab_size")
    if isinstance(resized, int):
        return resized
    text = base.config.get("text_config")
    for config in (base.config, text if isinstance(text, dict) else {}):
        for key in ("padded_vocab_size", "vocab_size"):
            if isinstance(config.get(key), int):
                return int(config[key])
    return None


def _dtypes(adapter: Adapter, base: BaseModel, places: frozenset[str]) -> Iterator[Finding]:
    sizes: dict[str, int] = {}
    for tensor in base.tensors:
        sizes[tensor.spec.dtype.long_name] = sizes.get(tensor.spec.dtype.long_name, 0) + tensor.spec.size_bytes
    if not sizes:
        return
    own = max(sizes, key=lambda name: sizes[name])
    odd = [
        each.spec.name for each in adapter.tensors if not each.spec.dtype.is_mergeable and each.spec.name not in places
    ]
    for name in odd[:_LISTED]:
        yield Finding(
            code="dtype", level=Level.REFUSED, where=name, expected="16, 32 or 64 bit floats", found="another dtype",
            advice="save the adapter in bfloat16 or float32",
        )  # fmt: skip
    if not odd:
        yield _passed("dtype", adapter.weights_file, f"{adapter.dtype} onto {own}; added in float32, rounded once")


def _quantised(base: BaseModel, resolution: Resolution) -> Iterator[Finding]:
    said = said_quantised(base.config)
    if said and all(finding.code != "base_quantised" for finding in resolution.findings):
        yield base_quantised(base, said)
