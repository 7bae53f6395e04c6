"""The fused query-key-value matrix of a litgpt model: which rows belong to which head.

Two row orders exist, told apart by name alone: `attn.qkv` (litgpt >= 0.5.5) has all query rows, then all key, then all value rows;
`attn.attn` (<= 0.5.4) has, for each key-value group, its query heads, its key head, its value head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from registry.errors import CorruptFile
from registry.formats.litgpt import MODEL_CONFIG_FILE

QKV_PARTS = ("query", "key", "value")
FUSED = (".attn.qkv", ".attn.attn")


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention heads of a model: `groups` key-value heads, `per_group` query heads for each, `size` rows a head."""

    groups: int
    per_group: int
    size: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Heads:
        """Read `model_config.yaml`.

        Raises:
            CorruptFile: the numbers are missing or do not divide.
        """
        names = ("n_head", "n_embd", "n_query_groups", "head_size")
        numbers = [config.get(name) if isinstance(config.get(name), int) else None for name in names]
        heads, width, groups, size = numbers
        groups = groups or heads
        if not heads or not width or not groups or heads % groups:
            raise CorruptFile(MODEL_CONFIG_FILE, "n_head, n_embd and n_query_groups do not describe attention heads")
        return cls(groups, heads // groups, size or width // heads)

    @property
    def part_rows(self) -> dict[str, int]:
        """Rows of the query, key and value parts."""
        key = self.groups * self.size
        return {"query": key * self.per_group, "key": key, "value": key}

    @property
    def rows(self) -> int:
        """Rows of the fused matrix."""
        return sum(self.part_rows.values())

    def concatenated(self, part: str) -> Iterator[tuple[int, int, int]]:
        """Where a part's rows stand in the current order, as (first row in the part, first row in the matrix, count)."""
        yield 0, self._before(part), self.part_rows[part]

    def interleaved(self, part: str) -> Iterator[tuple[int, int, int]]:
        """The same for the order of litgpt <= 0.5.4."""
        heads = self.per_group if part == "query" else 1
        inside = {"query": 0, "key": self.per_group, "value": self.per_group + 1}[part]
        for group in range(self.groups):
            at = (group * (self.per_group + 2) + inside) * self.size
            yield group * heads * self.size, at, heads * self.size

    def regrouped(self, part: str) -> Iterator[tuple[int, int, int]]:
        """Where a part's rows end up in the current order if they were stacked, [q k v], onto rows in the order of litgpt <= 0.5.4."""
        first = self._before(part)
        for start in range(0, self.part_rows[part], self.size):
            yield start, self._modern((first + start) // self.size) * self.size, self.size

    def _before(self, part: str) -> int:
        sizes = self.part_rows
        return {"query": 0, "key": sizes["query"], "value": sizes["query"] + sizes["key"]}[part]

    def _modern(self, head: int) -> int:
        """The place in the current order of the head at a place in the order of litgpt <= 0.5.4."""
        group, inside = divmod(head, self.per_group + 2)
        if inside < self.per_group:
            return group * self.per_group + inside
        return self.groups * (inside if inside == self.per_group else self.per_group + 1) + group


def flag_of(module: str) -> str:
    """The flag of `litgpt finetune_lora` that a linear layer belongs to, `qkv` for three of them; empty text for any other module."""
    if module == "lm_head":
        return "head"
    if module.endswith(FUSED):
        return "qkv"
    if module.endswith(".attn.proj"):
        return "projection"
    return "mlp" if ".mlp." in module else ""
