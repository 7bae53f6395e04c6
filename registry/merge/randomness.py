"""Random numbers by name and place instead of by order: the same for any number of threads, any grid and any order of work."""

from __future__ import annotations

import numpy as np
from blake3 import blake3

from registry.merge.rounding import Array

# A counter of Philox4x64 yields four words of 64 bits.
_PER_COUNTER = 8


def random_bits(key: str, first: int, count: int) -> Array:
    """Words `first … first + count` of the endless sequence that belongs to a key, uint32 `[count]`.

    Philox4x64-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011) as numpy has it, whose raw words never change from one
    version to the next. The cipher's key is the first 128 bits of the key's BLAKE3; word i is half `i mod 8` of what counter `i div 8` yields,
    the lower half of each 64 bits first.
    """
    counter, skipped = divmod(first, _PER_COUNTER)
    cipher_key = int.from_bytes(blake3(key.encode()).digest(16), "little")
    # numpy counts up before it computes
    generator = np.random.Philox(counter=(counter - 1) % (1 << 256), key=cipher_key)
    words: Array = generator.random_raw(-(-(skipped + count) // 2))
    return words.astype("<u8", copy=False).view("<u4")[skipped : skipped + count]
