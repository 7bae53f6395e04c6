"""transformers and PEFT load from a registry, as from the Hub: merged models that were never stored, too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hub_clients import Client
from running import Server, serving, settings_of
from tokenizers import Tokenizer, models, pre_tokenizers

from registry.registering import Registration

pytestmark = pytest.mark.oracle

WORDS = {"[UNK]": 0, "hello": 1, "world": 2, "again": 3}
LOADED = """
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
ids = torch.arange(12).reshape(1, 12)

def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits

def same(one, other):
    return torch.equal(logits(one), logits(other))

merged = AutoModelForCausalLM.from_pretrained("bot-merged", revision="production")
written = AutoModelForCausalLM.from_pretrained({written!r})
base = AutoModelForCausalLM.from_pretrained("lab/tiny")
peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("lab/tiny"), "bot", revision="production")
plain = AutoModelForCausalLM.from_pretrained("bot", revision="v1")
told = {{
    "is written": same(merged, written),
    "is base": same(merged, base),
    "dtype": str(merged.dtype),
    "as peft": float((logits(peft) - logits(merged)).abs().max()),
    "other version": float((logits(plain) - logits(merged)).abs().max()),
    "config": AutoConfig.from_pretrained("bot-v1-merged").num_hidden_layers,
    "tokens": [AutoTokenizer.from_pretrained(name).encode("hello world again") for name in ("lab/tiny", "bot-merged")],
    "commit": merged.config._commit_hash,
}}
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a base model of transformers' own making, and two versions of an adapter, the second in production."""
    folder = tmp_path_factory.mktemp("lab")
    with serving(settings_of(folder / "home")) as server:
        base = write_loadable(folder / "tiny")
        server.direct.add_base(str(base), name="lab/tiny")
        for number in (1, 2):
            place = tiny.write_adapter(folder / f"bot-{number}", base="lab/tiny", seed=number)
            checkpoint = server.direct.register(str(place), Registration(adapter="bot")).registered[0].checkpoint
        server.direct.ship(checkpoint, "production", "first")
        yield server


def write_loadable(folder: Path) -> Path:
    """A base model with a tokenizer that works."""
    tiny.write_base(folder, shards=2, config={"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 32})
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    tiny.write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    )
    return folder


@pytest.fixture(scope="module")
def loaded(lab: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process with nothing but the server's address has loaded; nothing was merged before that."""
    assert lab.direct.merged() == []
    home = tmp_path_factory.mktemp("hf")
    planned = lab.direct.plan(lab.direct.resolve("bot@production"))
    lab.direct.merge(planned, out=str(home / "written"))
    told: dict[str, Any] = Client("", lab.url, "", home).does(LOADED.format(written=str(home / "written")))
    return told


def test_a_merged_model_that_was_never_stored_is_loaded(lab: Server, loaded: dict[str, Any]) -> None:
    assert loaded["is written"]
    assert not loaded["is base"]
    assert loaded["dtype"] == "torch.float32"
    assert loaded["config"] == tiny.LAYERS
    assert loaded["commit"] == lab.direct.repository("bot-merged", "v2").commit
    assert all(not merged.locations or "" not in merged.locations for merged in lab.direct.merged())


def test_peft_puts_an_adapter_on_its_base(loaded: dict[str, Any]) -> None:
    assert loaded["as peft"] < 1e-4


def test_transformers_puts_an_adapter_on_its_base_at_a_revision(loaded: dict[str, Any]) -> None:
    # it passes the adapter's revision on to the base model
    assert loaded["other version"] > 1e-3


def test_tokenizers_come_along(loaded: dict[str, Any]) -> None:
    assert loaded["tokens"] == [[1, 2, 3], [1, 2, 3]]
