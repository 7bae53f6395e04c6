"""Tied embeddings and grown vocabularies: what becomes of the input embedding and the output head together.

PEFT wraps the two sides of a tied pair on their own, so a delta or a trained copy on one side means that they are no longer the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from registry.changes import Change, Step, Tuned
from registry.formats.adapter import spec_like
from registry.formats.base_model import Embeddings
from registry.formats.findings import ANOTHER_SAVE, misfit, unsupported
from registry.formats.peft import CONFIG_FILE
from registry.formats.peft_config import Scope, names_of
from registry.manifest import Finding
from registry.tensors import StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The changes to the two matrices by name (none where the base's stays), and the configuration fields that change with them."""

    changes: Mapping[str, Change]
    config: Mapping[str, object]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of the pair. `is_saved`: it was trained whole (`modules_to_save`), so what replaces it is its own and not the shared matrix.

    Single rows of the input embedding that were trained (`shares_rows`) are those of the head, too; rows of the head are its own.
    """

    name: str
    change: Change | None
    is_saved: bool
    shares_rows: bool

    @property
    def module(self) -> str:
        """The module of that weight."""
        return self.name.removesuffix(".weight")

    @property
    def is_own(self) -> bool:
        """Whether training gave this side a value of its own."""
        if self.change is None:
            return False
        return self.is_saved or any(not (self.shares_rows and is_rows(step)) for step in self.change.steps)

    @property
    def is_tuned(self) -> bool:
        """Whether something other than a low-rank sum was done to this side."""
        return self.change is not None and any(
            isinstance(step, Tuned) and not is_rows(step) for step in self.change.steps
        )

    @property
    def has_rows(self) -> bool:
        """Whether single rows of this side were trained."""
        return self.change is not None and any(map(is_rows, self.change.steps))


def is_rows(step: Step) -> bool:
    """Whether a step replaces single rows."""
    return isinstance(step, Tuned) and step.method == "rows"


def settle(changes: Mapping[str, Change], found: Embeddings, base: Mapping[str, StoredTensor], scope: Scope) -> Settled:
    """Decide whether tied embeddings stay tied, and that both matrices have one number of rows.

    Args:
        changes: by the name of their target, as the adapter's tensors make them one by one.
        found: the base's embeddings.
        base: its tensors by name.
        scope: what was trained.
    """
    names = (found.input_name, found.head_name)
    inner, head = (
        Side(
            name=name,
            change=changes.get(name),
            is_saved=scope.saves(name.removesuffix(".weight")),
            shares_rows=name == found.input_name,
        )
        for name in names
    )
    config: dict[str, object] = {}
    findings: list[Finding] = []
    after = {side.name: side.change for side in (inner, head) if side.change}
    if found.tied:
        is_tied = _is_kept_tied(inner, head, scope)
        findings += _unclear_tie(inner, head) if is_tied else _unclear_rows(inner, head)
        if not is_tied:
            config["tie_word_embeddings"] = False
        after = _settle_tied(inner, head, base, is_tied=is_tied)
        findings += _check_shapes(changes, after)
    before = base[found.input_name].spec.shape[0]
    rows = {name: after[name].target.shape[0] if name in after else before for name in names if name in {*base, *after}}
    if max(rows.values()) != before or min(rows.values()) != before:
        config["vocab_size"] = max(rows.values())
        findings += _check_rows(rows)
    return Settled(changes=after, config=config, findings=tuple(findings))


def _is_kept_tied(inner: Side, head: Side, scope: Scope) -> bool:
    """Whether one matrix goes on serving both sides.

    With `ensure_weight_tying` PEFT gives the head the adapter of the input embedding, which it adds to the list while it takes the head off
    it, and saves both. But it does so only when `embed_tokens` or `lm_head` was listed, so the flag alone tells nothing. With DoRA the two
    sides share the factors, but each has its own magnitudes.
    """
    if not inner.is_own and not head.is_own:
        return True
    is_saved = inner.is_saved or head.is_saved
    if not scope.ties_weights or (inner.is_tuned and head.is_tuned):
        return False
    if scope.targets.text and not is_saved:
        return re.search(r"\|\^[^|]*\$\)$", scope.targets.text) is not None
    if names_of(head.module) & {*scope.targets.names, *scope.saved_modules}:
        return False
    return "embed_tokens" in names_of(inner.module) or head.is_own


def _unclear_tie(inner: Side, head: Side) -> Iterator[Finding]:
    changes = [side.change for side in (inner, head) if side.change]
    if (inner.is_saved or head.is_saved) and any(change.steps for change in changes):
        yield unsupported(
            "tying_unclear",
            CONFIG_FILE,
            found="ensure_weight_tying with one embedding saved whole and the other with factors",
            advice="train with both in modules_to_save, or both in target_modules",
        )


def _unclear_rows(inner: Side, head: Side) -> Iterator[Finding]:
    """Rows of a tied embedding are the head's, too, unless the head has rows of its own; PEFT cannot run anything else on it besides."""
    if inner.has_rows and not head.has_rows:
        yield unsupported("tokens_unclear", CONFIG_FILE, found="trained tokens of a tied embedding whose head was trained besides",
                          advice="PEFT cannot run this itself: train the one or the other")  # fmt: skip


def _settle_tied(inner: Side, head: Side, base: Mapping[str, StoredTensor], *, is_tied: bool) -> dict[str, Change]:
    source = base[inner.name]
    copies = [side.change.replacement for side in (inner, head) if side.change and not side.is_saved]
    shared = next((copy for copy in copies if copy), None)
    first, second = (_start(side, source, shared) for side in (inner, head))
    if not is_tied:
        return (
            {first.target.name: first, second.target.name: second}
            if _does_something(first)
            else {second.target.name: second}
        )
    kept = first if _does_something(first) else replace(second, target=spec_like(second.target, name=inner.name))
    if not _does_something(kept):
        return {}
    # A redundant head in the base's files must not tell another story.
    twin = {head.name: replace(kept, target=spec_like(kept.target, name=head.name))} if head.name in base else {}
    return {inner.name: kept, **twin}


def _start(side: Side, source: StoredTensor, shared: StoredTensor | None) -> Change:
    """A side's change, which starts from the shared matrix unless it was trained whole. PEFT saves that matrix when it may have grown."""
    change = side.change or Change(target=spec_like(source.spec, name=side.name), source=source)
    if shared is None or (side.is_saved and change.replacement):
        return change
    return replace(change, target=replace(change.target, shape=shared.spec.shape), replacement=shared)


def _does_something(change: Change) -> bool:
    return change.replacement is not None or bool(change.steps)


def _check_shapes(changes: Mapping[str, Change], after: Mapping[str, Change]) -> Iterator[Finding]:
    for name, change in after.items():
        made = changes[name].target.shape if name in changes else change.target.shape
        if change.steps and made != change.target.shape:
            yield misfit("shape_mismatch", name, expected=f"factors for {list(change.target.shape)}, as the saved matrix is",
                         found=f"for {list(made)}", advice=ANOTHER_SAVE)  # fmt: skip


def _check_rows(rows: Mapping[str, int]) -> Iterator[Finding]:
    for name, count in rows.items():
        if count != max(rows.values()):
            yield misfit("vocabulary", name, expected=f"{max(rows.values())} rows, as the other embedding has", found=f"{count} rows",
                         advice="its new rows were not saved: train with both embeddings in modules_to_save")  # fmt: skip
