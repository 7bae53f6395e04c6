"""As in vLLM: the base class of resolvers, and where they are registered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from vllm.lora.request import LoRARequest


class LoRAResolver(ABC):
    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None: ...


@dataclass
class _LoRAResolverRegistry:
    resolvers: dict[str, LoRAResolver] = field(default_factory=dict)

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver


LoRAResolverRegistry = _LoRAResolverRegistry()
