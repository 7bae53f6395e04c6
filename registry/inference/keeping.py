"""What is kept in memory of adapters: a few, the one used longest ago makes room."""

from __future__ import annotations

from typing import Generic, TypeVar, final

from registry.errors import InvalidRecipe
from registry.inference import Weighed

KEPT_ADAPTERS = 4

_T = TypeVar("_T")


@final
class Recent(Generic[_T]):
    """Things by name, the one used last at the end."""

    def __init__(self) -> None:
        self._things: dict[str, _T] = {}

    def find(self, name: str) -> _T | None:
        """The thing of this name, which is used now; None where it is not kept."""
        if name not in self._things:
            return None
        self._things[name] = self._things.pop(name)
        return self._things[name]

    def keep(self, name: str, thing: _T) -> None:
        """Keep one more."""
        self._things[name] = thing

    def make_room(self, most: int = KEPT_ADAPTERS) -> list[str]:
        """Forget what is too much beside one more; gives the names."""
        gone = list(self._things)[: max(0, len(self._things) + 1 - most)]
        for name in gone:
            del self._things[name]
        return gone

    def values(self) -> list[_T]:
        """All that is kept."""
        return list(self._things.values())

    def clear(self) -> None:
        """Forget everything."""
        self._things.clear()


def check_sum(weighed: Weighed) -> None:
    """See that adapters can be weighed and added up unmerged.

    Raises:
        InvalidRecipe: there is none, or one is no LoRA.
    """
    if not weighed:
        raise InvalidRecipe("checkpoints", "", "expected at least one")
    odd = next((each for each, _ in weighed if each.manifest.method != "lora"), None)
    if odd is not None:
        raise InvalidRecipe("method", odd.manifest.method, f"only LoRA can be added up unmerged; {odd.ref} is none")
