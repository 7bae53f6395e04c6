"""Random numbers by key and place."""

from __future__ import annotations

import numpy as np
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from registry.merge.randomness import random_bits

_WORD = (1 << 64) - 1


def philox(counter: int, key: int) -> list[int]:
    """Philox4x64-10, as its paper writes it: four words of 64 bits of a counter of 256 bits under a key of 128."""
    words = [counter >> 64 * index & _WORD for index in range(4)]
    low, high = key & _WORD, key >> 64
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [second >> 64 ^ words[1] ^ low, second & _WORD, first >> 64 ^ words[3] ^ high, first & _WORD]
        low, high = (low + 0x9E3779B97F4A7C15) & _WORD, (high + 0xBB67AE8584CAA73B) & _WORD
    return words


def test_the_cipher_in_these_tests_gives_the_known_answers() -> None:
    """From the test vectors of Random123, the reference implementation: all bits 0, all bits 1, digits of π."""
    assert philox(0, 0) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox((1 << 256) - 1, (1 << 128) - 1) == [
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    ]
    digits = [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89]
    counter, key = (
        sum(word << 64 * index for index, word in enumerate(digits)),
        0x452821E638D01377 | 0xBE5466CF34E90C6C << 64,
    )
    assert philox(counter, key) == [0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6]


@given(st.text(max_size=20), st.integers(0, 1 << 70), st.integers(0, 40))
def test_are_those_of_the_cipher_wherever_one_starts(key: str, first: int, count: int) -> None:
    cipher_key = int.from_bytes(blake3(key.encode()).digest()[:16], "little")
    expected = []
    for index in range(first, first + count):
        word = philox(index // 8, cipher_key)[index % 8 // 2]
        expected.append(word >> 32 if index % 2 else word & 0xFFFF_FFFF)
    assert random_bits(key, first, count).tolist() == expected


@given(st.integers(0, 1000), st.lists(st.integers(0, 30), max_size=6))
def test_pieces_are_the_whole(first: int, sizes: list[int]) -> None:
    pieces, place = [], first
    for size in sizes:
        pieces.append(random_bits("key", place, size))
        place += size
    whole = random_bits("key", first, sum(sizes))
    assert np.array_equal(np.concatenate([*pieces, whole[:0]]), whole)


def test_other_keys_have_other_numbers() -> None:
    first, second = (random_bits(key, 0, 10_000) / 2**32 for key in ("one", "two"))
    assert abs(float(np.corrcoef(first, second)[0, 1])) < 0.05
    assert abs(float(first.mean()) - 0.5) < 0.02
