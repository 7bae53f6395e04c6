"""`ckpt convert` and `ckpt extract` as a user types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from commands import Ckpt
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parents[1] / "data/litgpt"


@pytest.fixture
def litgpt_run(ckpt: Ckpt, tmp_path: Path) -> Ckpt:
    """A registry with a litgpt run and its base model."""
    shutil.copytree(DATA / "base-llama-gqa", tmp_path / "base")
    assert ckpt("register", str(DATA / "lora-llama-qv/final"), "--base", "base", "--adapter", "bot").code == 0
    return ckpt


def test_an_adapter_goes_to_peft_and_back(litgpt_run: Ckpt, tmp_path: Path) -> None:
    model = litgpt_run("convert", "base", "--to", "hf", "--out", "hf", "--as", "llama-hf")
    assert (model.code, model.out) == (
        0,
        "converted base to llama-hf: 39 tensors, 86,448 values compared, all the same\n",
    )
    assert f"written to {tmp_path}/hf" in model.err
    there = litgpt_run("convert", "bot", "--to", "peft", "--as", "bot-peft")
    assert there.out.startswith("converted bot to bot-peft@v1: 16 tensors")
    shown = litgpt_run("show", "bot-peft").out
    assert "convert" in shown
    assert "bot@v1" in shown
    back = litgpt_run("convert", "bot-peft", "--to", "litgpt", "--as", "bot-again", "--out", "again", "--json").json
    assert (back["exact"], back["checkpoint"]["ref"]) == (True, "bot-again@v1")
    before = torch.load(DATA / "lora-llama-qv/final/lit_model.pth.lora", weights_only=True)["model"]
    after = torch.load(tmp_path / "again/lit_model.pth.lora", weights_only=True)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_merged_model_goes_to_transformers(litgpt_run: Ckpt, tmp_path: Path) -> None:
    merged = litgpt_run("merge", "bot", "--json").json["digest"]
    result = litgpt_run("convert", merged[7:17], "--to", "peft", "--out", "hf", "--json")
    assert (result.code, result.json["place"], result.json["base"]) == (0, str(tmp_path / "hf"), None)
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "llama"


def test_what_goes_wrong_is_said(litgpt_run: Ckpt, tmp_path: Path) -> None:
    nowhere = litgpt_run("convert", "bot", "--to", "peft")
    assert nowhere.code == 2
    assert "say where to: --out DIR, or --as NAME" in nowhere.err
    assert litgpt_run("convert", "bot", "--to", "gguf", "--out", "x").code == 2
    assert litgpt_run("convert", "cat", "--to", "peft", "--out", "x").code == 3
    same = litgpt_run("convert", "bot", "--to", "litgpt", "--out", "x")
    assert same.code == 4
    assert "bot@v1 cannot be written as a litgpt adapter" in same.err
    unknown = litgpt_run("convert", "bot", "--to", "peft", "--as", "x")
    assert unknown.code == 4
    assert "`ckpt convert base --to hf --out DIR --as NAME` makes it" in unknown.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert litgpt_run("convert", "bot", "--to", "peft", "--out", "full").code == 5
    assert not (tmp_path / "x").exists()


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A base model and what it became: one matrix, a norm and the output head changed."""
    tiny.write_base(tmp_path / "base")
    tensors = load_file(tiny.write_base(tmp_path / "tuned") / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += torch.outer(
        torch.ones(tiny.INNER), torch.arange(tiny.WIDTH).float()
    )
    tensors["model.norm.weight"] += 1
    tensors["lm_head.weight"] += torch.randn(
        tensors["lm_head.weight"].shape, generator=torch.Generator().manual_seed(0)
    )
    save_file(tensors, tmp_path / "tuned/model.safetensors", {"format": "pt"})
    return tmp_path / "tuned"


@pytest.mark.usefixtures("tuned")
def test_a_lora_of_a_fine_tuned_model(ckpt: Ckpt) -> None:
    result = ckpt("extract", "base", "tuned", "--rank", "2", "--as", "lora", "--out", "lora")
    assert result.code == 0
    assert "1 weights at rank 2" in result.out
    assert "1 vectors and modules" in result.out
    assert "not covered: lm_head.weight: an embedding or output head: name it in --modules or --save" in result.err
    shown = ckpt("show", "lora", "--json").json
    assert [metric["name"] for metric in shown["metrics"]] == ["extraction_residual"]
    whole = ckpt(
        "extract", "base", "tuned", "--rank", "16", "--modules", "up_proj,lm_head", "--out", "whole", "--json"
    ).json
    kinds = {name: told["kind"] for name, told in whole["tensors"].items()}
    assert kinds == {
        "model.layers.0.mlp.up_proj.weight": "factors", "lm_head.weight": "factors", "model.norm.weight": "whole",
    }  # fmt: skip
    assert whole["residual"] < 1e-6
    assert ckpt("merge", "lora", "--out", "merged").code == 0


@pytest.mark.usefixtures("tuned")
def test_what_cannot_be_extracted_is_said(ckpt: Ckpt) -> None:
    assert ckpt("extract", "base").code == 2
    assert ckpt("extract", "base", "tuned", "--rank", "2").code == 2
    assert ckpt("extract", "base", "elsewhere", "--rank", "2", "--as", "x").code == 3
    nothing = ckpt("extract", "base", "base", "--rank", "2", "--as", "x")
    assert nothing.code == 4
    assert "base cannot be written as a LoRA on base" in nothing.err
    assert ckpt("extract", "base", "tuned", "--rank", "2", "--as", "x", "--dtype", "int8").code == 2


def test_an_adapter_out_of_a_whole_state(ckpt: Ckpt, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    adapter = tiny.write_adapter(tmp_path / "saved", base=base)
    inside = {
        name.replace(".weight", ".default.weight"): tensor
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    outside = {f"base_model.model.{name}": tensor for name, tensor in load_file(base / "model.safetensors").items()}
    torch.save({"state_dict": {**inside, **outside}, "epoch": 3}, tmp_path / "last.ckpt")
    result = ckpt("extract", "--from", "last.ckpt", "--config", "saved/adapter_config.json", "--as", "bot")
    assert (result.code, result.out) == (0, f"extracted bot@v1: 8 tensors; {len(outside)} of the model were left\n")
    assert ckpt("extract", "--from", "last.ckpt", "--as", "bot").code == 2
    assert (
        ckpt("extract", "base", "--from", "last.ckpt", "--config", "saved/adapter_config.json", "--as", "x").code == 2
    )
    named = ckpt(
        "extract", "--from", "last.ckpt", "--config", "saved/adapter_config.json", "--as", "x", "--adapter-name", "code"
    )
    assert named.code == 4
    assert ckpt("extract", "--from", "no.ckpt", "--config", "saved/adapter_config.json", "--as", "x").code == 3
