"""Merges that run beside each other do not give torch its threads back while another still counts on one."""

from __future__ import annotations

import torch

from registry.merge.weight import one_thread


def test_the_last_one_to_end_sets_it_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        first, second = one_thread(), one_thread()
        first.__enter__()
        second.__enter__()
        assert torch.get_num_threads() == 1
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
