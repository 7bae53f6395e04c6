"""A model's files in another layout, before they are written: every tensor is made of byte ranges of the model it comes from.

Nothing is computed. Seen as a location, the model can be read as if it had been written already.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, final

from registry.errors import CorruptFile, PathNotFound
from registry.fingerprint import blocks_of
from registry.formats.base_model import INDEX_FILE, LITGPT_WEIGHTS
from registry.formats.litgpt_names import Moved, Range
from registry.locations import Location
from registry.tensors import StoredTensor
from registry.torchzip import layout_torch_zip
from registry.weights_files import write_safetensors, write_torch_zip

SHARD_BYTES = 5_000_000_000
_FILE = "rearranged"

Advance = Callable[[int], None]


@final
class RearrangedModel:
    """Tensors of another layout on the bytes of a model, as a location with one file that holds them one after another."""

    def __init__(self, source: Location, moved: Sequence[Moved]) -> None:
        self._source = source
        self._ranges: list[Range] = []
        self._starts: list[int] = []
        at, placed = 0, []
        for each in moved:
            placed.append(StoredTensor(each.spec, _FILE, at))
            for piece in each.ranges:
                self._ranges.append(piece)
                self._starts.append(at)
                at += piece.size_bytes
        self._size_bytes, self.tensors = at, tuple(placed)

    @property
    def url(self) -> str:
        return f"{self._source.url} (rearranged)"

    def files(self) -> Mapping[str, int]:
        return {_FILE: self._size_bytes}

    def identity(self, path: str) -> str:
        return f"{path} of {self._source.url}"

    def open(self, path: str) -> IO[bytes]:
        raise PathNotFound(f"{self.url}/{path}")

    def read_into(self, path: str, offset_bytes: int, buffer: memoryview) -> None:
        if offset_bytes + len(buffer) > self._size_bytes:
            raise CorruptFile(path, f"ends before byte {offset_bytes + len(buffer)}")
        done, index = 0, bisect_right(self._starts, offset_bytes) - 1
        while done < len(buffer):
            piece, inside = self._ranges[index], offset_bytes + done - self._starts[index]
            count = min(piece.size_bytes - inside, len(buffer) - done)
            self._source.read_into(piece.file, piece.offset_bytes + inside, buffer[done : done + count])
            done, index = done + count, index + 1

    def local_path(self, path: str) -> Path | None:
        del path
        return None

    def close(self) -> None:
        self._source.close()

    def write_safetensors(self, folder: Path, advance: Advance, shard_bytes: int = SHARD_BYTES) -> None:
        """Write `model.safetensors`, or shards with their index, as transformers does.

        Args:
            folder: where to.
            advance: told of each number of bytes that are done.
            shard_bytes: how much tensors of one file take at most, if there are several.
        """
        shards = _shards(self.tensors, shard_bytes)
        names = [
            "model.safetensors" if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            for number in range(len(shards))
        ]
        for name, shard in zip(names, shards, strict=True):
            blocks = (block for tensor in shard for block in blocks_of(self, tensor))
            write_safetensors(folder / name, [tensor.spec for tensor in shard], _told(blocks, advance))
        if len(shards) > 1:
            weight_map = {tensor.spec.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": self._size_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write_torch_zip(self, folder: Path, same_storage: Mapping[str, str], advance: Advance) -> None:
        """Write `lit_model.pth`.

        Args:
            folder: where to.
            same_storage: for a tensor, the earlier one whose bytes it shares in the file.
            advance: told of each number of bytes that are done.
        """
        by_name = {tensor.spec.name: tensor for tensor in self.tensors}
        layout = layout_torch_zip([tensor.spec for tensor in self.tensors], same_storage, LITGPT_WEIGHTS)
        write_torch_zip(folder / LITGPT_WEIGHTS, layout, lambda name: _told(blocks_of(self, by_name[name]), advance))


def _told(blocks: Iterator[memoryview], advance: Advance) -> Iterator[memoryview]:
    for block in blocks:
        yield block
        advance(len(block))


def _shards(tensors: Sequence[StoredTensor], shard_bytes: int) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.spec.size_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.spec.size_bytes
    return shards
