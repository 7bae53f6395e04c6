"""What the command line says about litgpt's outputs, and about whole models."""

from __future__ import annotations

from pathlib import Path

from commands import Ckpt

DATA = Path(__file__).parents[1] / "data/litgpt"


def test_an_adapter_v2_is_merged_in_part_only_when_that_is_allowed(ckpt: Ckpt) -> None:
    """What is left out is said before and after, in the same numbers."""
    assert ckpt("register", str(DATA / "adapter_v2-llama"), "--base", str(DATA / "base-llama-gqa")).code == 0
    refused = ckpt("merge", "adapter_v2-llama", "--out", "merged")
    assert refused.code == 4
    assert "gated_prefix" in refused.err
    assert "--allow-lossy" in refused.err
    assert not Path("merged").exists()
    merged = ckpt("merge", "adapter_v2-llama", "--out", "merged", "--allow-lossy", "--json")
    assert merged.code == 0
    assert merged.json["recipe"]["options"] == {"allow_lossy": True}
    loss = refused.err.partition("gates of up to ")[2].partition(" (")[0]
    assert "% in layer 3" in loss
    assert loss in merged.err


def test_an_adapter_v1_is_recorded_with_what_to_do_instead(ckpt: Ckpt) -> None:
    registered = ckpt("register", str(DATA / "adapter-llama"), "--base", str(DATA / "base-llama-gqa"))
    assert registered.code == 0
    assert "run it unmerged with `litgpt generate_adapter`" in registered.err
    refused = ckpt("merge", "adapter-llama", "--allow-lossy")
    assert refused.code == 4
    assert "method_not_mergeable" in refused.err


def test_a_whole_model_is_recorded_as_a_base_model_and_said_so(ckpt: Ckpt, run_folder: Path, tmp_path: Path) -> None:
    (run_folder.parent / "tiny-llama").rename(tmp_path / "checkpoint-7")
    first, again = (ckpt("register", "checkpoint-7") for _ in range(2))
    assert (first.code, again.code) == (0, 0)
    name = f"{tmp_path.name}-checkpoint-7"
    assert first.out.startswith(f"recorded base model {name}  blake3:")
    assert again.out.startswith(f"known already: base model {name}  blake3:")
    assert first.err.startswith("not an adapter but a whole model")
    assert "None" not in first.err
    assert name in ckpt("base", "list").out
    (found,) = ckpt("register", "checkpoint-7", "--json").json
    assert (found["name"], found["created"], found["format"]) == (name, False, "safetensors")
