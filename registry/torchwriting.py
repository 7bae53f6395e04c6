"""Write archives of `torch.save` as they were laid out, with the checksums that follow the data."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import IO

from registry.torchzip import Descriptor, Directory, Storage, ZipLayout


def write_torch_zip(file: IO[bytes], layout: ZipLayout, data: Callable[[str], Iterable[bytes | memoryview]]) -> None:
    """Write an archive.

    Args:
        file: where to.
        layout: of the archive.
        data: gives the bytes of a tensor, in pieces; asked for in the order of the layout, once for each storage.
    """
    checksums: dict[str, int] = {}
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
