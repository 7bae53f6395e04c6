"""As in vLLM's OpenAI server: a name that is not known is resolved, loaded under a number of the server's, and kept for ever."""

from __future__ import annotations

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolverRegistry


class Models:
    def __init__(self, model: str) -> None:
        self.model, self.kept, self.counted = model, dict[str, LoRARequest](), 0

    async def resolve_lora(self, lora_name: str) -> LoRARequest | None:
        if lora_name in self.kept:
            return self.kept[lora_name]
        self.counted += 1
        for resolver in LoRAResolverRegistry.resolvers.values():
            found = await resolver.resolve_lora(self.model, lora_name)
            if found is not None:
                found.lora_int_id = self.counted
                self.kept[lora_name] = found
                return found
        return None

    def unload(self, lora_name: str) -> None:
        del self.kept[lora_name]
