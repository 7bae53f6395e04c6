"""Single rows of an embedding that were trained: `trainable_token_indices` of a LoRA, and PEFT's method TRAINABLE_TOKENS.

Despite its name `trainable_tokens_delta` holds the rows' new values. Which rows they are only the configuration tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from registry.changes import Change, Resolution, Tuned
from registry.errors import CorruptFile
from registry.formats.adapter import Adapter
from registry.formats.findings import ANOTHER_SAVE, unsupported
from registry.formats.peft import CONFIG_FILE
from registry.formats.peft_config import COMMON_FIELDS, Scope, unknown_fields
from registry.formats.peft_keys import sort_keys
from registry.formats.peft_matching import Matching
from registry.manifest import BaseModel
from registry.tensors import StoredTensor

_FIELDS = COMMON_FIELDS | {"token_indices", "init_weights"}


def resolve_tokens(adapter: Adapter, base: BaseModel) -> Resolution:
    """Match an adapter of the method TRAINABLE_TOKENS with a base model; as `resolve_peft`."""
    keys = sort_keys(adapter.tensors, {})
    matching = Matching(keys, Scope.read(adapter.config), base)
    matching.findings += unknown_fields(adapter.config, _FIELDS)
    matching.replace_whole()
    if matching.embeddings and matching.tied_head:
        _drop_copy(keys.rows, matching, matching.embeddings.input_name)
    TokenRows.read(adapter.config, "token_indices").put(keys.rows, matching)
    return matching.finish(list(keys.rows))


def _drop_copy(rows: dict[str, StoredTensor], matching: Matching, input_name: str) -> None:
    """A tied head has the rows of the input embedding, and PEFT saves them under both names."""
    at = {matching.name(module): module for module in rows}
    if input_name in at and matching.tied_head in at:
        rows.pop(at[matching.tied_head])


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Row numbers by the end of a module's path; under empty text those of the input embedding, or of whatever has rows in the file."""

    by_module: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(cls, config: Mapping[str, Any], field: str) -> TokenRows:
        """Read a field of `adapter_config.json`: a list of row numbers, or lists by module.

        Raises:
            CorruptFile: it is neither.
        """
        value = config.get(field) or {}
        lists = value if isinstance(value, dict) else {"": value}
        if not all(isinstance(rows, list) and all(map(_is_row, rows)) for rows in lists.values()):
            raise CorruptFile(CONFIG_FILE, f"{field} is {str(value)[:60]!r}, expected row numbers")
        return cls({module: tuple(rows) for module, rows in lists.items()})

    def put(self, saved: Mapping[str, StoredTensor], matching: Matching) -> None:
        """Replace the rows whose values are in the file, and miss those that are not. Comes after everything else that changes a weight."""
        for module, tensor in saved.items():
            lists = {rows for name, rows in self.by_module.items() if module.endswith(name)}
            if len(lists) != 1:
                matching.unused(tensor)
            elif change := matching.change(module, tensor):
                _put(change, tensor, lists.pop(), matching)
        for name in self.by_module:
            if not any(module.endswith(name) for module in saved) and not self._is_tied(name, saved, matching):
                matching.missed(name or CONFIG_FILE, "values of the rows that were trained")

    def _is_tied(self, name: str, saved: Mapping[str, StoredTensor], matching: Matching) -> bool:
        """Whether a list is the tied head's, for which the same rows of the input embedding stand."""
        return matching.tied_head.removesuffix(".weight").endswith(name) and self.by_module[name] in (
            rows for other, rows in self.by_module.items() if any(module.endswith(other) for module in saved)
        )


def _put(change: Change, tensor: StoredTensor, rows: tuple[int, ...], matching: Matching) -> None:
    height, *width = change.target.shape
    if change.steps:
        found = "single rows and a tuner on one embedding"
        advice = "PEFT cannot run this itself: train the one or the other"
        matching.findings.append(unsupported("tokens_unclear", tensor.spec.name, found=found, advice=advice))
    elif tensor.spec.shape != (len(rows), *width) or max(rows) >= height or len({*rows}) < len(rows):
        matching.refuse("shape_mismatch", tensor.spec.name, expected=f"{len(rows)} different rows of {[height, *width]}",
                        found=f"{list(tensor.spec.shape)}", advice=ANOTHER_SAVE)  # fmt: skip
    else:
        matching.add(change, Tuned(method="rows", tensors={"values": tensor}, options={"rows": rows}))


def _is_row(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
