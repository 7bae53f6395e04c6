"""Identity of a base model: by its weights, never by its name.

`weights`: for each tensor BLAKE3 over `dtype`, `shape` and the bytes; the root is BLAKE3 over the lines `name digest` in the order of names.
How the tensors are spread over files, and what those are called, does not enter.
`architecture`: BLAKE3 over the facts of the configuration that shape the computation, and every tensor's name, dtype and shape.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from blake3 import blake3

from registry.errors import InvalidInput
from registry.locations import Location
from registry.manifest import BaseFormat, digest_of
from registry.refs import Digest
from registry.tensors import StoredTensor, TensorSpec

BLOCK_BYTES = 1 << 20
Advance = Callable[[int], None]

_FACTS = {
    BaseFormat.SAFETENSORS: (
        "model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head",
        "num_key_value_heads", "head_dim", "intermediate_size", "n_inner", "vocab_size", "tie_word_embeddings",
    ),
    BaseFormat.LITGPT: (
        "n_embd", "n_layer", "n_head", "n_query_groups", "head_size", "intermediate_size", "padded_vocab_size",
        "mlp_class_name", "norm_class_name", "bias", "lm_head_bias", "parallel_residual", "rotary_percentage", "rope_base",
    ),
}  # fmt: skip


def architecture_digest(format: BaseFormat, config: Mapping[str, Any], specs: Iterable[TensorSpec]) -> Digest:
    """Digest over the configuration's facts and the table of tensors, from headers alone.

    Only facts that every writer of a configuration states are taken, so that saving it again with a newer library does not change it.
    Of a nested configuration (`text_config`), its facts count as well.
    """
    nested = config.get("text_config")
    levels = [config, nested] if isinstance(nested, dict) else [config]
    facts = [{key: level[key] for key in _FACTS[format] if level.get(key) is not None} for level in levels]
    table = sorted([spec.name, spec.dtype.value, list(spec.shape)] for spec in specs)
    return digest_of({"facts": facts, "tensors": table})


def tensor_hasher(spec: TensorSpec) -> Any:
    """A BLAKE3 that has taken in dtype and shape and waits for the tensor's bytes in order."""
    return blake3(f"{spec.dtype.value}:{','.join(map(str, spec.shape))}\n".encode())


def weights_digest(tensors: Mapping[str, Digest]) -> Digest:
    """The root over the digest of each tensor."""
    return Digest(blake3("".join(f"{name} {tensors[name].hex}\n" for name in sorted(tensors)).encode()).hexdigest())


def digest_tensors(
    location: Location,
    tensors: Sequence[StoredTensor],
    *,
    cache: DigestCache,
    advance: Advance = lambda done_bytes: None,
    threads: int | None = None,
) -> dict[str, Digest]:
    """Hash every tensor, several at once, skipping files whose digests are in the cache.

    Args:
        location: the model's folder.
        tensors: what to hash.
        cache: digests from earlier runs, by file identity.
        advance: told of each number of bytes done (cached ones included); called from several threads.
        threads: how many; the number of cores when None.

    Raises:
        CorruptFile: a file ends early.
    """
    found: dict[str, Digest] = {}
    by_file: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        for file, members in by_file.items():
            identity = location.identity(file)
            known = cache.get(location.url, file, identity)
            if known is None or not {tensor.spec.name for tensor in members} <= set(known):
                digests = pool.map(lambda tensor: digest_tensor(location, tensor, advance), members)
                known = {tensor.spec.name: digest for tensor, digest in zip(members, digests, strict=True)}
                # A file that was being written while it was read must not be remembered as what it was before.
                if location.identity(file) == identity:
                    cache.put(location.url, file, identity, known)
            else:
                advance(sum(tensor.spec.size_bytes for tensor in members))
            found.update({tensor.spec.name: known[tensor.spec.name] for tensor in members})
    return found


def digest_tensor(location: Location, tensor: StoredTensor, advance: Advance = lambda done_bytes: None) -> Digest:
    """The digest of one tensor, as the fingerprint has it."""
    hasher = tensor_hasher(tensor.spec)
    for block in blocks_of(location, tensor):
        hasher.update(block)
        advance(len(block))
    return Digest(hasher.hexdigest())


def blocks_of(location: Location, tensor: StoredTensor) -> Iterator[memoryview]:
    """The bytes of a tensor in blocks that share one buffer: each is valid until the next."""
    size = tensor.spec.size_bytes
    buffer = memoryview(bytearray(min(BLOCK_BYTES, size)))
    for start in range(0, size, BLOCK_BYTES):
        block = buffer[: min(BLOCK_BYTES, size - start)]
        location.read_into(tensor.file, tensor.offset_bytes + start, block)
        yield block


@final
class DigestCache:
    """Digests of the tensors of files that have not changed since: one small JSON file each, made again whenever it is missing.

    The key holds the file's identity (device, inode, size and time of change locally; the ETag remotely), so nothing is ever invalidated.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, url: str, file: str, identity: str) -> Path:
        return self._folder / f"{digest_of([url, file, identity]).hex}.json"

    def get(self, url: str, file: str, identity: str) -> dict[str, Digest] | None:
        """Digest of each tensor of the file, or None."""
        try:
            entries = json.loads(self._path(url, file, identity).read_text(encoding="utf-8"))
            return {name: Digest(text) for name, text in entries.items()}
        except (OSError, ValueError, TypeError, AttributeError, InvalidInput):
            return None

    def put(self, url: str, file: str, identity: str, digests: Mapping[str, Digest]) -> None:
        """Remember. A folder that cannot be written only costs time later."""
        path = self._path(url, file, identity)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({name: digest.hex for name, digest in digests.items()}), encoding="utf-8")
            temporary.replace(path)
