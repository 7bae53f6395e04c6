"""Write files of weights from start to end: safetensors, and archives of `torch.save` with the checksums that follow the data."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from registry.disk import Translating, sync
from registry.tensors import TensorSpec, layout_safetensors
from registry.torchzip import Descriptor, Directory, Storage, ZipLayout

Data = bytes | memoryview


def write_safetensors(path: Path, specs: Sequence[TensorSpec], data: Iterable[Data]) -> None:
    """Write a safetensors file.

    Args:
        path: where to.
        specs: of the tensors.
        data: the bytes of all tensors in their order, in any pieces.
    """
    with Translating(str(path)), path.open("wb") as file:
        file.write(layout_safetensors(specs, {"format": "pt"}, path.name)[0])
        for piece in data:
            file.write(piece)
        sync(file)


def write_torch_zip(path: Path, layout: ZipLayout, data: Callable[[str], Iterable[Data]]) -> None:
    """Write an archive.

    Args:
        path: where to.
        layout: of the archive.
        data: gives the bytes of a tensor, in pieces; asked for in the order of the layout, once for each storage.
    """
    checksums: dict[str, int] = {}
    with Translating(str(path)), path.open("wb") as file:
        for piece in layout.pieces:
            if isinstance(piece, Storage):
                checksums[piece.name] = 0
                for block in data(piece.name):
                    checksums[piece.name] = zlib.crc32(block, checksums[piece.name])
                    file.write(block)
            elif isinstance(piece, Descriptor):
                file.write(layout.descriptor(piece.name, checksums[piece.name]))
            elif isinstance(piece, Directory):
                file.write(layout.directory(checksums))
            else:
                file.write(piece.data)
        sync(file)
