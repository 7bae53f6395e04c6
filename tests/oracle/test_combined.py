"""Combined adapters against the real PEFT: it loads them, they answer as the merged model does, and sums are those of `add_weighted_adapter`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import Bench, read_weights
from models import load_model, logits, lora, randomise
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from registry.combining import Combination
from registry.manifest import Checkpoint
from registry.mixing import Mixture

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]
BaseMaker = Callable[..., Path]
FAMILIES = {
    "llama": ({}, {"r": 6, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj", "lm_head"]}),
    "gpt2": ({}, {"target_modules": ["c_attn", "wte"], "use_rslora": True}),
    "qwen2": ({"bias": "all"}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 7}}),
    "gemma": ({"modules_to_save": ["norm"]}, {"target_modules": ["q_proj", "lm_head"]}),
}


class Pair:
    """Two adapters of the real PEFT on one base, registered."""

    def __init__(self, bench: Bench, base: Path, folder: Path, options: Sequence[dict[str, Any]]) -> None:
        self.bench, self.base, self.folder = bench, base, folder
        self.checkpoints: list[Checkpoint] = []
        for number, each in enumerate(options):
            place = folder / f"adapter-{number}"
            make_second(base, place, lora(**each), seed=7 + number)
            self.checkpoints.append(bench.register(place, base))

    def combine(self, **wanted: Any) -> Combination:
        rank = wanted.pop("rank", None)
        return self.bench.registry.combine(*self.checkpoints, mixture=Mixture(**wanted), rank=rank)

    def merged(self, **wanted: Any) -> nn.Module:
        out = self.folder / "merged"
        planned = self.bench.registry.plan(*self.checkpoints, mixture=Mixture(**wanted))
        self.bench.registry.merge(planned, out=str(out))
        return load_model(out)

    def loaded(self, made: Combination) -> PeftModel:
        target = self.folder / "combined"
        self.bench.registry.pull(made.checkpoint, target)
        return PeftModel.from_pretrained(load_model(self.base), target)

    def peft(self, weights: Sequence[float], combination: str, **options: Any) -> nn.Module:
        model = PeftModel.from_pretrained(load_model(self.base), self.folder / "adapter-0", adapter_name="0")
        model.load_adapter(self.folder / "adapter-1", adapter_name="1")
        model.add_weighted_adapter(["0", "1"], list(weights), "both", combination_type=combination, **options)
        model.set_adapter("both")
        return model


def make_second(base: Path, folder: Path, config: PeftConfig, seed: int) -> None:
    model = get_peft_model(load_model(base), config)
    randomise((p for p in model.parameters() if p.requires_grad), seed=seed)
    model.save_pretrained(folder)  # with a copy of the base's embedding where that has factors


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_real_peft_loads_a_combined_adapter_which_answers_as_the_merged_model_does(
    base_model: BaseMaker, bench: Bench, tmp_path: Path, family: str
) -> None:
    pair = Pair(bench, base_model(family), tmp_path, FAMILIES[family])
    weights = (0.7, 0.4)
    answer = logits(pair.loaded(pair.combine(weights=weights)))
    assert close(answer, logits(pair.merged(weights=weights)))
    assert not close(answer, logits(load_model(pair.base)))


@pytest.mark.parametrize(("mixture", "combination"), [({}, "cat"), ({"rank": 3}, "svd")])
def test_sums_are_those_of_peft(
    base_model: BaseMaker, bench: Bench, tmp_path: Path, mixture: dict[str, Any], combination: str
) -> None:
    pair = Pair(bench, base_model("llama"), tmp_path, ({}, {"r": 6, "lora_alpha": 5}))
    weights = (0.7, 0.4)
    options = {"svd_rank": 3} if combination == "svd" else {}
    made = pair.loaded(pair.combine(weights=weights, **mixture))
    assert close(logits(made), logits(pair.peft(weights, combination, **options)))


def test_several_adapters_merge_as_the_sum_of_what_peft_merges_of_each(
    base_model: BaseMaker, bench: Bench, tmp_path: Path
) -> None:
    """Magnitudes, biases and saved modules included: W + Σ w (W'_i - W)."""
    options = ({"use_dora": True}, {"bias": "all", "modules_to_save": ["lm_head"]}, {"r": 2})
    pair = Pair(bench, base_model("qwen2"), tmp_path, options)
    weights = (0.5, 0.3, 0.2)
    pair.merged(weights=weights)
    found, before = read_weights(tmp_path / "merged"), read_weights(pair.base)
    singles = []
    for number in range(3):
        model = PeftModel.from_pretrained(load_model(pair.base), tmp_path / f"adapter-{number}").merge_and_unload()
        singles.append(model.state_dict())
    for name, values in found.items():
        start = before[name].double()
        expected = start + sum(w * (each[name].double() - start) for w, each in zip(weights, singles, strict=True))
        assert torch.allclose(values.double(), expected, rtol=1e-5, atol=1e-5), name


def test_adapters_of_different_kinds_merge_together(base_model: BaseMaker, bench: Bench, tmp_path: Path) -> None:
    base, names = base_model("llama"), ["k_proj", "v_proj", "down_proj"]
    configs = [
        lora(target_modules=names),
        IA3Config(task_type="CAUSAL_LM", target_modules=names, feedforward_modules=["down_proj"]),
        LoHaConfig(task_type="CAUSAL_LM", target_modules=names, r=2, alpha=3),
    ]
    checkpoints, singles = [], []
    for number, config in enumerate(configs):
        folder = tmp_path / f"adapter-{number}"
        make_second(base, folder, config, seed=number)
        checkpoints.append(bench.register(folder, base))
        singles.append(PeftModel.from_pretrained(load_model(base), folder).merge_and_unload().state_dict())
    bench.registry.merge(bench.registry.plan(*checkpoints), out=str(tmp_path / "merged"))
    before = read_weights(base)
    for name, values in read_weights(tmp_path / "merged").items():
        start = before[name].double()
        expected = start + sum(each[name].double() - start for each in singles) / 3
        assert torch.allclose(values.double(), expected, rtol=1e-5, atol=1e-5), name


class Convolution(nn.Module):
    """A model of one convolution and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, kernel_size=(2, 4), stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        answer: Tensor = self.head(self.patch(image).mean(dim=(2, 3)))
        return answer


def test_factors_of_convolutions_keep_their_shapes(bench: Bench, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    start = Convolution()
    randomise(start.parameters(), seed=1)
    save_file(start.state_dict(), base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text("{}")
    checkpoints = []
    for number, rank in enumerate((2, 3)):
        model = get_peft_model(copy.deepcopy(start), LoraConfig(r=rank, target_modules=["patch", "head"]))
        randomise((p for p in model.parameters() if p.requires_grad), seed=7 + number)
        model.save_pretrained(tmp_path / str(number))
        checkpoints.append(bench.register(tmp_path / str(number), base))
    bench.registry.merge(bench.registry.plan(*checkpoints), out=str(tmp_path / "merged"))
    bench.registry.pull(bench.registry.combine(*checkpoints).checkpoint, tmp_path / "combined")
    merged = Convolution()
    merged.load_state_dict(read_weights(tmp_path / "merged"))
    loaded = PeftModel.from_pretrained(copy.deepcopy(start), tmp_path / "combined")
    image = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.allclose(loaded(image), merged(image), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(start(image), merged(image), rtol=1e-2, atol=1e-2)
