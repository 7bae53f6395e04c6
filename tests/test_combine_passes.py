"""Sums that several threads work out together."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from registry.merge.passes import Algorithm, Passes, tiles

WIDE = 100_000
SHAPE = (40, WIDE)


def test_tiles_cover_every_row_once_and_do_not_depend_on_who_asks() -> None:
    grid = tiles((1000, 1000))
    assert [row for first, last in grid for row in range(first, last)] == list(range(1000))
    assert len(grid) > 10
    assert tiles((1000, 1000), 70, 200) == [tile for tile in grid if tile[0] < 200 and tile[1] > 70]
    assert tiles((0, 5)) == []
    assert tiles((3, 0)) == [(0, 3)]


def test_threads_share_the_tiles_of_each_pass() -> None:
    seen: Counter[tuple[int, tuple[int, int]]] = Counter()
    workers: set[int] = set()
    lock, all_at_work = threading.Lock(), threading.Barrier(4)

    def count(number: int, first: int, last: int) -> Tensor:
        with lock:
            seen[number, (first, last)] += 1
            is_new = threading.get_ident() not in workers
            workers.add(threading.get_ident())
        if is_new:
            all_at_work.wait(timeout=120)
        return torch.tensor(float(sum(range(first, last))))

    def algorithm() -> Algorithm[tuple[float, float]]:
        once = yield lambda first, last: count(1, first, last)
        again = yield lambda first, last: count(2, first, last) * once
        return float(once), float(again)

    passes = Passes(SHAPE, algorithm())
    with ThreadPoolExecutor(4) as pool:
        results = {future.result(timeout=120) for future in [pool.submit(passes.result) for _ in range(4)]}
    total = float(sum(range(40)))
    assert results == {(total, total * total)}
    assert set(seen.values()) == {1}
    assert passes.result() == (total, total * total)
    assert set(seen.values()) == {1}


def test_contributions_are_added_in_the_order_of_the_tiles() -> None:
    """Sums of floats depend on their order; later tiles are made to finish first."""
    values = torch.rand(40, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(40).remainder(7)

    def slow(first: int, last: int) -> Tensor:
        time.sleep(0.0005 * (40 - first))
        return values[first:last].sum()

    def algorithm() -> Algorithm[float]:
        return float((yield slow))

    alone = Passes(SHAPE, algorithm()).result()
    together = Passes(SHAPE, algorithm())
    with ThreadPoolExecutor(7) as pool:
        assert {future.result(timeout=120) for future in [pool.submit(together.result) for _ in range(7)]} == {alone}


@pytest.mark.parametrize("where", ["pass", "algorithm"])
def test_everybody_learns_of_a_failure(where: str) -> None:
    def fail(first: int, last: int) -> Tensor:
        if where == "pass" and first:
            raise OSError("unplugged")
        time.sleep(0.002)
        return torch.zeros(())

    def algorithm() -> Algorithm[None]:
        yield fail
        raise OSError("unplugged")

    passes = Passes(SHAPE, algorithm())
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(passes.result) for _ in range(4)]:
            assert isinstance(future.exception(timeout=120), OSError)
    with pytest.raises(OSError, match="unplugged"):
        passes.result()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_an_empty_matrix_has_an_empty_sum(shape: tuple[int, int]) -> None:
    def algorithm() -> Algorithm[float]:
        return float((yield lambda first, last: torch.zeros(last - first, shape[1]).sum()))

    assert Passes(shape, algorithm()).result() == 0


def test_an_algorithm_without_passes_has_its_result_at_once() -> None:
    def algorithm() -> Algorithm[str]:
        yield from ()
        return "done"

    assert Passes(SHAPE, algorithm()).result() == "done"
