"""vLLM's way to the registry: adapters by name, `support-bot@v12` or `support-bot@production`, when a request first asks for one.

vLLM finds `register` by the entry point `vllm.general_plugins`, and asks the resolver for model names that it does not know, if it is started
with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`. Written against the interface that vLLM publishes (`vllm.lora.resolver`); not run on a GPU.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, final

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from registry import connect
from registry.errors import RegistryError, UnknownBase
from registry.locations import local_folder
from registry.manifest import Checkpoint
from registry.serving import admitted_copy
from registry.settings import Settings
from registry.wording import explain

if TYPE_CHECKING:
    from pathlib import Path

    from registry.manifest import BaseModel
    from registry.refs import Digest
    from registry.service import Registry

log = logging.getLogger("vllm.ckpt")  # vLLM shows what is below its own name
NAME = "ckpt"


def register() -> None:
    """Make the registry known to vLLM. Called in each of its processes; nothing is opened before a name is asked for."""
    LoRAResolverRegistry.register_resolver(NAME, CheckpointResolver())


@final
class CheckpointResolver(LoRAResolver):  # type: ignore[misc] # vLLM is not installed where types are checked
    """Resolves references to checkpoints. What it answers is pinned to a version, in name and path.

    Args:
        settings: of the registry; those of the environment when None.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings
        self._registry: Registry | None = None
        self._used: dict[Digest, ExitStack] = {}
        self._lock = threading.Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Find a checkpoint and copy it to this machine, once.

        Args:
            base_model_name: what vLLM was told to serve.
            lora_name: the model name of a request.

        Returns:
            The version that the name means now; None for what is no checkpoint, does not go with the base model or is not served unmerged.
        """
        return await asyncio.to_thread(self._resolve, base_model_name, lora_name)

    def _resolve(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        try:
            registry = self._connected()
            checkpoint = registry.resolve(lora_name)
            if reason := _against(registry, checkpoint, base_model_name):
                log.warning("%s is not served: %s", lora_name, reason)
                return None
            folder = self._copy(registry, checkpoint)
        except RegistryError as error:
            words = explain(error)
            log.warning("%s is not served: %s%s", lora_name, words.message, f" ({words.hint})" if words.hint else "")
            return None
        if lora_name != checkpoint.ref:
            log.warning(
                "%s is %s now, and stays so in this process until it is unloaded: ask for %s to be sure of the version",
                lora_name, checkpoint.ref, checkpoint.ref,
            )  # fmt: skip
        return LoRARequest(lora_name=checkpoint.ref, lora_int_id=_number(checkpoint), lora_path=str(folder))

    def _copy(self, registry: Registry, checkpoint: Checkpoint) -> Path:
        """A copy that no sweep takes as long as this process lives: vLLM may drop an adapter from memory and read it again."""
        with ExitStack() as use:
            folder, _ = use.enter_context(admitted_copy(registry, checkpoint, "vllm"))
            if checkpoint.digest not in self._used:
                self._used[checkpoint.digest] = use.pop_all()
            return folder

    def _connected(self) -> Registry:
        with self._lock:
            if self._registry is None:
                self._registry = connect(self._settings or Settings.from_environment(os.environ))
            return self._registry


def _against(registry: Registry, checkpoint: Checkpoint, base_model_name: str) -> str:
    """Why a checkpoint does not go with the base model that is served; empty where it does.

    A base model that the registry knows by this name or place is compared by its weights; of any other, only the name can be compared.
    """
    try:
        named: BaseModel | None = registry.base(base_model_name)
    except UnknownBase:
        named = None
    own = registry.base(checkpoint.base.hex)
    if named is not None and named.digest != own.digest:
        return f"it was trained on {own.name} ({own.digest.short}), and {base_model_name} is {named.digest.short}"
    names = (own.name, f"base-{own.digest.short}", checkpoint.manifest.base_name)
    if named is not None or base_model_name in names or _is_place(own.url, base_model_name):
        return ""
    return f"it was trained on {own.name}, and {base_model_name} is served"


def _is_place(url: str, text: str) -> bool:
    return local_folder(url) is not None and local_folder(url) == local_folder(text)


def _number(checkpoint: Checkpoint) -> int:
    """vLLM counts anew; until then, a number that follows from the content."""
    return 1 + int(checkpoint.digest.hex[:7], 16)
