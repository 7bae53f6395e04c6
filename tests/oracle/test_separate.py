"""Adapters taken out of the states of whole models, compared with what PEFT and litgpt themselves save of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from litgpt import adapter_v2
from litgpt.lora import GPT as LoraGPT
from litgpt.lora import Config as LoraConfigOfLitgpt
from merging import Bench, same
from models import load_model, lora, make_model, randomise
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from registry.errors import NotConvertible
from registry.separating import Separate, Separation

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")]
DATA = Path(__file__).parents[1] / "data/litgpt"
ADAPTERS: dict[str, PeftConfig] = {
    "lora": lora(),
    "dora": lora(use_dora=True, target_modules=["q_proj"]),
    "saved modules": lora(target_modules=["q_proj", "v_proj"], modules_to_save=["norm", "lm_head"]),
    "bias of layers": lora(target_modules=["q_proj", "v_proj"], bias="lora_only"),
    "all biases": lora(target_modules=["q_proj", "v_proj"], bias="all"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
}
PREFIXES: dict[str, Callable[[str], str]] = {
    "as it is": lambda name: name,
    "in another module": lambda name: f"net.llm.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "sharded": lambda name: "_fsdp_wrapped_module." + name.replace("layers.1.", "layers.1._fsdp_wrapped_module.").replace(
        "mlp.", "mlp._checkpoint_wrapped_module."
    ),
}  # fmt: skip


class Case:
    """A wrapped model, what PEFT saves of it, and where its whole state goes."""

    def __init__(self, folder: Path, config: PeftConfig, name: str = "default", family: str = "qwen2") -> None:
        self.base, self.saved, self.out = folder / "base", folder / "saved", folder / "out"
        make_model(family).save_pretrained(self.base)
        self.model = get_peft_model(load_model(self.base), copy.deepcopy(config), adapter_name=name)
        randomise((p for p in self.model.parameters() if p.requires_grad), seed=7)
        self.model.save_pretrained(self.saved)
        if name != "default":
            self.saved = self.saved / name
        self.bench, self.folder = Bench(folder), folder

    def separate(self, *files: Path, **more: Any) -> Separation:
        wanted = Separate(files=files, config=self.saved / "adapter_config.json", out=self.out, **more)
        return self.bench.registry.separate(wanted)

    def assert_same(self) -> None:
        found, expected = (load_file(place / "adapter_model.safetensors") for place in (self.out, self.saved))
        assert same(found, expected) == []
        assert (self.out / "adapter_config.json").read_bytes() == (self.saved / "adapter_config.json").read_bytes()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_state_of_a_wrapped_model_has_what_peft_saves(tmp_path: Path, adapter: str, prefix: str) -> None:
    case = Case(tmp_path, ADAPTERS[adapter])
    state = {PREFIXES[prefix](name): tensor for name, tensor in case.model.state_dict().items()}
    torch.save(state, tmp_path / "state.bin")
    found = case.separate(tmp_path / "state.bin")
    case.assert_same()
    assert (found.tensors + found.left, found.others) == (len(state), ())


def test_safetensors_in_several_files(tmp_path: Path) -> None:
    case = Case(tmp_path, ADAPTERS["lora"])
    state = {name: tensor.contiguous() for name, tensor in case.model.state_dict().items()}
    files = [tmp_path / f"model-{number}.safetensors" for number in range(2)]
    for number, file in enumerate(files):
        save_file({name: state[name] for name in list(state)[number::2]}, file)
    case.separate(*files)
    case.assert_same()


def test_one_of_several_adapters(tmp_path: Path) -> None:
    case = Case(tmp_path, ADAPTERS["lora"], name="math")
    case.model.add_adapter("code", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.save(case.model.state_dict(), tmp_path / "state.bin")
    with pytest.raises(NotConvertible) as several:
        case.separate(tmp_path / "state.bin")
    assert "code, math" in several.value.reasons[0]
    with pytest.raises(NotConvertible):
        case.separate(tmp_path / "state.bin", adapter_name="poetry")
    assert not case.out.exists()
    assert case.separate(tmp_path / "state.bin", adapter_name="math").others == ("code",)
    case.assert_same()


class Module(lightning.LightningModule):
    """A language model under Lightning's Trainer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_checkpoint_of_lightning_with_its_optimizer(tmp_path: Path) -> None:
    case = Case(tmp_path, ADAPTERS["lora"])
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(max_steps=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(Module(case.model), torch.utils.data.DataLoader(torch.arange(3, 15).unsqueeze(0)))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    case.model.save_pretrained(case.saved)
    case.separate(tmp_path / "last.ckpt")
    case.assert_same()


def test_it_is_registered_on_the_base_that_its_configuration_names(tmp_path: Path) -> None:
    case = Case(tmp_path, ADAPTERS["lora"])
    torch.save(case.model.state_dict(), tmp_path / "state.bin")
    wanted = Separate(files=(tmp_path / "state.bin",), config=case.saved / "adapter_config.json", name="bot")
    found = case.bench.registry.separate(wanted).registered
    assert found is not None
    checkpoint = found.checkpoint
    assert (checkpoint.ref, checkpoint.base_name, checkpoint.manifest.rank) == ("bot@v1", "base", 4)
    assert checkpoint.origin is not None
    assert checkpoint.origin.detail == {"files": [str(tmp_path / "state.bin")]}
    assert list((tmp_path / "registry/making").iterdir()) == []


# -- litgpt


def test_the_state_of_litgpts_lora_model(tmp_path: Path) -> None:
    run, base = DATA / "lora-llama-qv/final", DATA / "base-llama-gqa"
    hyper = yaml.safe_load((run / "hyperparameters.yaml").read_text())
    config = LoraConfigOfLitgpt(
        **yaml.safe_load((run / "model_config.yaml").read_text()),
        **{k: v for k, v in hyper.items() if k.startswith("lora_")},
    )
    factors = torch.load(run / "lit_model.pth.lora", weights_only=True)["model"]
    model = LoraGPT(config)
    model.load_state_dict({**torch.load(base / "lit_model.pth", weights_only=True), **factors})
    torch.save({"model": model.state_dict()}, tmp_path / "lit_model.pth")
    bench, out = Bench(tmp_path), tmp_path / "out"
    wanted = Separate(files=(tmp_path / "lit_model.pth",), config=run / "hyperparameters.yaml", base=str(base), out=out)
    assert bench.registry.separate(wanted).tensors == len(factors)
    assert same(torch.load(out / "lit_model.pth.lora", weights_only=True), factors) == []
    merged = [bench.merge(place, base, tmp_path / name) for place, name in ((run, "theirs"), (out, "ours"))]
    assert merged[0].merged.files[0].digest == merged[1].merged.files[0].digest


def test_the_state_of_litgpts_adapter_model_with_its_norms(tmp_path: Path) -> None:
    run, base = DATA / "adapter_v2-llama/final", DATA / "base-llama-gqa"
    tensors = torch.load(run / "lit_model.pth.adapter_v2", weights_only=True)["model"]
    model = adapter_v2.GPT(adapter_v2.Config.from_file(run / "model_config.yaml"))
    model.load_state_dict({**torch.load(base / "lit_model.pth", weights_only=True), **tensors})
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "state.pth")
    out = tmp_path / "out"
    wanted = Separate(files=(tmp_path / "state.pth",), config=run / "hyperparameters.yaml", base=str(base), out=out)
    Bench(tmp_path).registry.separate(wanted)
    assert same(torch.load(out / "lit_model.pth.adapter_v2", weights_only=True), tensors) == []
