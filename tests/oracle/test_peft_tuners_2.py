"""Tuners that add shared, drawn or transformed numbers, or that depend on the weight, compared with the real PEFT.

Merged weights, and the answers of the unmerged model. And what PEFT has that is not merged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merging import assert_rounded_once, read_weights
from models import load_model, logits, make_adapter
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.activations import ACT2FN
from tuned import ATOL, TARGETS, BaseMaker, Case, adapt_module, assert_like_peft, config_of, write_module

from registry.formats.peft_tuners import ROWS
from registry.formats.tuner_refusals import refusal
from registry.formats.tuner_rows_dependent import ACTIVATIONS
from registry.merge.tuners import dependent
from registry.merge.tuners.wavelets import LOW_PASS
from registry.tensors import DType

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Specified to not save"),
    pytest.mark.filterwarnings("ignore:save_precomputed_indices=False"),
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
# By what is special about it: the method, the model, the options.
OPTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "beft": ("BEFT", "qwen2", {"target_modules": ["q_proj", "v_proj"]}),
    "beft, tall": ("BEFT", "neox", {"target_modules": ["query_key_value", "dense_h_to_4h"]}),
    "deft": ("DEFT", "llama", {"r": 3}),
    "deft, alpha": ("DEFT", "llama", {"r": 5, "alpha": 7}),
    "deft, orthogonal": ("DEFT", "llama", {"r": 4, "decomposition_method": "qr", "alpha": 2}),
    "deft, rank 1": ("DEFT", "llama", {"r": 1, "decomposition_method": "qr"}),
    "deft, taken out only": ("DEFT", "llama", {"r": 3, "para": True}),
    "deft, taken out only, orthogonal": ("DEFT", "llama", {"r": 3, "para": True, "decomposition_method": "qr"}),
    "deft, more than there is": ("DEFT", "llama", {"r": 40, "target_modules": ["k_proj", "q_proj"]}),
    "deft, Conv1D": ("DEFT", "gpt2", {"r": 3}),
    "delora": ("DELORA", "llama", {"r": 3}),
    "delora, patterns": ("DELORA", "llama", {"r": 4, "rank_pattern": {"q_proj": 2}, "lambda_pattern": {"k_proj": 3}}),
    "delora, rank 1, a saved module": ("DELORA", "llama", {"r": 1, "modules_to_save": ["lm_head"]}),
    "fourierft": ("FOURIERFT", "llama", {"n_frequency": 40}),
    "fourierft, pattern": ("FOURIERFT", "llama", {"n_frequency": 9, "n_frequency_pattern": {"q_proj": 30}, "random_loc_seed": 3,
                                                  "scaling": 20.0}),
    "fourierft, Conv1D": ("FOURIERFT", "gpt2", {"n_frequency": 25}),
    "frod": ("FROD", "llama", {"progressbar": False}),
    "frod, dense": ("FROD", "llama", {"sparse_rate": 0.5, "progressbar": False, "target_modules": ["q_proj", "down_proj"]}),
    "frod, biases": ("FROD", "qwen2", {"progressbar": False, "bias": "all"}),
    "frod, Conv1D": ("FROD", "gpt2", {"progressbar": False}),
    "glora": ("GLORA", "llama", {"r": 3}),
    "glora, biases": ("GLORA", "qwen2", {"r": 3}),
    "glora, vectors": ("GLORA", "qwen2", {"r": 2, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    "glora, numbers": ("GLORA", "qwen2", {"config_A_B": "constant", "config_C": "none"}),
    "glora, biases only": ("GLORA", "neox", {"config_A_B": "none", "config_D_E": "vector"}),
    "glora, weights only": ("GLORA", "neox", {"r": 1, "config_C": "none", "config_D_E": "none"}),
    "glora, no biases to train": ("GLORA", "llama", {"config_A_B": "vector", "config_C": "none", "config_D_E": "none"}),
    "gralora": ("GRALORA", "llama", {"r": 4, "alpha": 6}),
    "gralora, four parts": ("GRALORA", "llama", {"r": 8, "alpha": 6, "gralora_k": 4}),
    "gralora, one part": ("GRALORA", "llama", {"r": 1, "alpha": 2, "gralora_k": 1}),
    "gralora, hybrid": ("GRALORA", "llama", {"r": 6, "alpha": 6, "gralora_k": 2, "hybrid_r": 3}),
    "gralora, Conv1D": ("GRALORA", "gpt2", {"r": 4, "alpha": 6, "hybrid_r": 1}),
    "hira": ("HIRA", "llama", {"r": 3}),
    "hira, patterns": ("HIRA", "llama", {"r": 4, "rank_pattern": {"down_proj": 1}}),
    "hira, Conv1D": ("HIRA", "gpt2", {"r": 4}),
    "hira, embedding": ("HIRA", "llama", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "osf": ("OSF", "llama", {}),
    "osf, a number": ("OSF", "llama", {"effective_rank": 5}),
    "osf, a share": ("OSF", "llama", {"effective_rank": 0.3, "rank_pattern": {"q_proj": 7}}),
    "peanut": ("PEANUT", "llama", {"r": 3}),
    "peanut, deep": ("PEANUT", "llama", {"r": 4, "depth": 2, "act_fn": "gelu_new", "scaling": 0.5}),
    "randlora": ("RANDLORA", "llama", {"r": 4, "randlora_alpha": 8}),
    "randlora, a rank that does not divide": ("RANDLORA", "llama", {"r": 5, "randlora_alpha": 8}),
    "randlora, sparse": ("RANDLORA", "llama", {"r": 3, "randlora_alpha": 4, "sparse": True}),
    "randlora, Conv1D": ("RANDLORA", "gpt2", {"r": 7, "randlora_alpha": 4}),
    "supertuning": ("SUPERTUNING", "llama", {"sparsity": 0.9}),
    "supertuning, the smallest": ("SUPERTUNING", "llama", {"sparsity": 0.5, "select_top": False}),
    "supra": ("SUPERTUNING", "llama", {"sparsity": 0.9, "r": 3, "lora_alpha": 5}),
    "tinylora": ("TINYLORA", "llama", {"r": 2, "u": 5}),
    "tinylora, tied in pairs": ("TINYLORA", "llama", {"r": 3, "u": 5, "weight_tying": 0.5}),
    "tinylora, tied unevenly": ("TINYLORA", "llama", {"r": 2, "u": 9, "weight_tying": 0.6}),
    "tinylora, all tied": ("TINYLORA", "llama", {"r": 2, "u": 5, "weight_tying": 1.0, "projection_seed": 1}),
    "tinylora, rank 1": ("TINYLORA", "llama", {"r": 1, "u": 16}),
    "tinylora, Conv1D": ("TINYLORA", "gpt2", {"r": 2, "u": 5}),
    "tinylora, embedding": ("TINYLORA", "llama", {"r": 2, "u": 5, "target_modules": ["embed_tokens", "q_proj"]}),
    "unilora": ("UNILORA", "llama", {"r": 3, "theta_d_length": 100, "save_indices": True}),
    "unilora, Conv1D": ("UNILORA", "gpt2", {"r": 3, "theta_d_length": 100, "save_indices": True}),
    "vblora": ("VBLORA", "llama", {"r": 3, "num_vectors": 20, "vector_length": 8}),
    "vblora, weights only": ("VBLORA", "llama", {"r": 3, "num_vectors": 20, "vector_length": 8, "topk": 3, "save_only_topk_weights": True}),
    "vblora, many vectors": ("VBLORA", "llama", {"r": 1, "num_vectors": 300, "vector_length": 16, "save_only_topk_weights": True}),
    "vblora, one vector each": ("VBLORA", "llama", {"r": 2, "num_vectors": 20, "vector_length": 8, "topk": 1, "save_only_topk_weights": True}),
    "vblora, Conv1D": ("VBLORA", "gpt2", {"r": 2, "num_vectors": 20, "vector_length": 8, "topk": 1}),
    "waveft": ("WAVEFT", "llama", {"n_frequency": 60}),
    "waveft, symlet": ("WAVEFT", "llama", {"n_frequency": 60, "wavelet_family": "sym4", "scaling": 3.0}),
    "waveft, coiflet": ("WAVEFT", "llama", {"n_frequency": 60, "wavelet_family": "coif2", "n_frequency_pattern": {"k_proj": 33}}),
    "waveft, without a transform": ("WAVEFT", "llama", {"n_frequency": 60, "use_idwt": False, "random_loc_seed": 11}),
    "waveft, in proportion": ("WAVEFT", "llama", {"n_frequency": 60, "proportional_parameters": True}),
    "waveft, Conv1D": ("WAVEFT", "gpt2", {"n_frequency": 60, "wavelet_family": "db3"}),
}  # fmt: skip


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.mark.parametrize("option", OPTIONS)
def test_merged_and_unmerged(base_model: BaseMaker, case: Case, option: str) -> None:
    method, family, options = OPTIONS[option]
    base = base_model(family)
    peft_model = make_adapter(base, case.adapter, config_of(method, family, options))
    expected = logits(peft_model)
    found = case.merge(base)
    assert not torch.allclose(expected, logits(load_model(base)), rtol=0, atol=10 * ATOL)
    torch.testing.assert_close(logits(load_model(case.out)), expected, rtol=1e-5, atol=ATOL)
    assert_like_peft(found, peft_model)


ONE_OF_EACH = {method: option for option, (method, *_) in reversed(OPTIONS.items())}


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_a_16_bit_base_is_rounded_once(base_model: BaseMaker, case: Case, method: str) -> None:
    """The result in float64, from the same 16 bit base and adapter, is what each element is nearest to."""
    _, family, options = OPTIONS[ONE_OF_EACH[method]]
    base = base_model(family, torch.bfloat16)
    make_adapter(base, case.adapter, config_of(method, family, options))
    exact, found, before = case.merge(base, DType.F64), case.merge(base), read_weights(base)
    changed = [name for name in before if not torch.equal(exact[name].to(torch.bfloat16), before[name])]
    assert len(changed) >= 2 * len(options.get("target_modules", TARGETS[family]))
    for name, tensor in found.items():
        assert tensor.dtype is torch.bfloat16
        assert_rounded_once(tensor, exact[name], exact[name].abs() * 1e-13)


def test_osf_takes_from_a_16_bit_base_what_training_took(base_model: BaseMaker, case: Case) -> None:
    """PEFT's own merge rounds in between; its unmerged layer does not."""
    base = base_model("llama", torch.bfloat16)
    peft_model = make_adapter(base, case.adapter, config_of("OSF", "llama", {"effective_rank": 6}))
    layer = peft_model.base_model.model.model.layers[1].self_attn.k_proj
    parts = [layer.osf_svd_params["default"][f"{name}_low"].double() for name in "USV"]
    first = [getattr(layer, f"_osf_{name}_low_init")["default"].double() for name in "USV"]
    (u, s, v), (u_0, s_0, v_0) = parts, first
    expected = layer.base_layer.weight.double() + u * s @ v - u_0 * s_0 @ v_0
    found = case.merge(base, DType.F64)["model.layers.1.self_attn.k_proj.weight"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wavelet", LOW_PASS)
def test_every_wavelet_that_peft_can_train_with(case: Case, tmp_path: Path, wavelet: str) -> None:
    layers = nn.Sequential(nn.Linear(5, 9), nn.Linear(8, 6))
    base = write_module(tmp_path / "base", layers)
    options = {"target_modules": ["0", "1"], "task_type": None, "n_frequency": 20, "wavelet_family": wavelet}
    peft_model = adapt_module(base, layers, case.adapter, config_of("WAVEFT", "llama", options))
    assert_like_peft(case.merge(base), peft_model)


# -- modules that language models seldom have


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line, self.plane, self.point = nn.Conv1d(6, 10, 3), nn.Conv2d(5, 7, (3, 2), bias=False), nn.Conv2d(4, 4, 1)


def test_hira_on_convolutions(case: Case, tmp_path: Path) -> None:
    base = write_module(tmp_path / "base", Convolutions())
    config = config_of("HIRA", "llama", {"r": 3, "target_modules": ["line", "plane", "point"], "task_type": None})
    peft_model = adapt_module(base, Convolutions(), case.adapter, config)
    assert_like_peft(case.merge(base), peft_model)


# -- files that do not say everything, or say something else

INCOMPLETE: dict[str, tuple[str, dict[str, Any]]] = {
    "randlora without its bases": ("RANDLORA", {"r": 4, "save_projection": False}),
    "unilora without its indices": ("UNILORA", {"r": 3, "theta_d_length": 100}),
    "tinylora without its projections": ("TINYLORA", {"r": 2, "u": 5, "save_projection": False}),
    "frod without its bases": ("FROD", {"save_projection": False, "progressbar": False}),
    "supertuning without its places": ("SUPERTUNING", {"sparsity": 0.9, "save_precomputed_indices": False}),
    "peanut with parameters in its activation": ("PEANUT", {"r": 3, "act_fn": "prelu"}),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_what_the_file_does_not_say_is_not_guessed(base_model: BaseMaker, case: Case, what: str) -> None:
    method, options = INCOMPLETE[what]
    base = base_model("llama")
    make_adapter(base, case.adapter, config_of(method, "llama", options))
    (finding,) = case.bench.findings(case.adapter, base).values()
    assert (finding.code, finding.fits) == ("option_not_mergeable", True)
    assert "serve it unmerged" in finding.advice
    assert case.bench.register(case.adapter, base).manifest.method == method.lower()


def test_a_bias_that_the_base_has_no_place_for(base_model: BaseMaker, case: Case) -> None:
    base = base_model("llama")
    make_adapter(base, case.adapter, config_of("BEFT", "llama", {"target_modules": ["q_proj"]}))
    (finding,) = case.bench.findings(case.adapter, base).values()
    assert (finding.code, finding.fits) == ("layer_not_mergeable", True)


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "delora, rank": ("DELORA", {"r": 3}, {"r": 4}, "rank_mismatch"),
    "deft, rank": ("DEFT", {"r": 3}, {"r": 4}, "rank_mismatch"),
    "deft, nothing put back": ("DEFT", {"r": 3}, {"para": True}, "rank_mismatch"),
    "fourierft, how many": ("FOURIERFT", {"n_frequency": 20}, {"n_frequency": 21}, "shape_mismatch"),
    "glora, forms": ("GLORA", {"r": 3}, {"config_A_B": "vector"}, "missing_factor"),
    "gralora, parts": ("GRALORA", {"r": 4}, {"gralora_k": 4}, "rank_mismatch"),
    "gralora, hybrid": ("GRALORA", {"r": 4}, {"hybrid_r": 2}, "rank_mismatch"),
    "hira, rank": ("HIRA", {"r": 3}, {"r": 2}, "rank_mismatch"),
    "osf, rank": ("OSF", {"effective_rank": 5}, {"effective_rank": 6}, "rank_mismatch"),
    "peanut, depth": ("PEANUT", {"r": 3, "depth": 1}, {"depth": 2}, "missing_factor"),
    "randlora, rank": ("RANDLORA", {"r": 4}, {"r": 8}, "rank_mismatch"),
    "supra, rank": ("SUPERTUNING", {"sparsity": 0.9, "r": 2}, {"r": None}, "rank_mismatch"),
    "tinylora, tying": ("TINYLORA", {"r": 2, "u": 5}, {"weight_tying": 0.5}, "missing_factor"),
    "tinylora, rank": ("TINYLORA", {"r": 2, "u": 5}, {"u": 6}, "rank_mismatch"),
    "unilora, numbers": ("UNILORA", {"r": 3, "save_indices": True}, {"theta_d_length": 100}, "shape_mismatch"),
    "vblora, vectors": ("VBLORA", {"vector_length": 8, "num_vectors": 20}, {"num_vectors": 21}, "shape_mismatch"),
    "vblora, lengths": ("VBLORA", {"vector_length": 8}, {"vector_length": 16}, "shape_mismatch"),
    "waveft, how many": ("WAVEFT", {"n_frequency": 20}, {"n_frequency": 21}, "shape_mismatch"),
    "an option of the future": ("HIRA", {"r": 3}, {"use_more": True}, "option_unknown"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_configuration_of_another_save_is_refused(base_model: BaseMaker, case: Case, what: str) -> None:
    method, options, change, code = CONTRADICTIONS[what]
    base = base_model("llama")
    make_adapter(base, case.adapter, config_of(method, "llama", options))
    case.configure(**change)
    assert code in case.bench.findings(case.adapter, base)


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_every_tensor_has_to_be_there(base_model: BaseMaker, case: Case, method: str) -> None:
    """One tensor fewer, or one more, and it is refused, whichever it is."""
    _, family, options = OPTIONS[ONE_OF_EACH[method]]
    base = base_model(family)
    make_adapter(base, case.adapter, config_of(method, family, options))
    path = case.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    copies = (".randlora_A", ".randlora_B", ".zeros")  # of those for all modules, and nothing at all
    first = next(name for name in tensors if name.startswith("base_model.model."))
    module = first[: first.index("." + method.lower()[:4])]
    own = [name for name in tensors if name.startswith(f"{module}.") and not name.endswith(copies)]
    shared = [name for name in tensors if not name.startswith("base_model.model.")]
    for name in (*own, *shared):
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
        assert case.bench.findings(case.adapter, base), name
    save_file({**tensors, f"{module}.{method.lower()}_more": torch.ones(2)}, path)
    assert "unused_tensor" in case.bench.findings(case.adapter, base)


# -- everything that PEFT has


MERGED_ELSEWHERE = {"lora", "trainable_tokens"}


@pytest.mark.parametrize("method", [kind.value.lower() for kind in PeftType])
def test_every_method_of_peft_is_merged_or_refused_with_a_reason(method: str) -> None:
    """A method that a newer PEFT brings is neither, until somebody has looked at it."""
    is_merged = method in ROWS or method in MERGED_ELSEWHERE
    assert is_merged == ("not known here" in refusal(method).advice)


def test_a_method_that_rests_on_what_is_not_saved_is_recorded(base_model: BaseMaker, case: Case) -> None:
    base = base_model("llama")
    make_adapter(base, case.adapter, config_of("PSOFT", "llama", {"r": 4}))
    (finding,) = case.bench.findings(case.adapter, base).values()
    assert (finding.code, finding.fits) == ("method_not_mergeable", True)
    assert case.bench.register(case.adapter, base).manifest.parameters > 0


PROMPTS = ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"]


@pytest.mark.parametrize("method", PROMPTS)
def test_virtual_tokens_are_recorded(base_model: BaseMaker, case: Case, method: str) -> None:
    base = base_model("llama")
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)](task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(load_model(base), config).save_pretrained(case.adapter)
    (finding,) = case.bench.findings(case.adapter, base).values()
    assert (finding.code, finding.fits) == ("method_not_mergeable", True)
    assert "serve it unmerged" in finding.advice
    assert case.bench.register(case.adapter, base).manifest.method == method.lower()


def test_a_method_that_nobody_knows_is_recorded(base_model: BaseMaker, case: Case) -> None:
    base = base_model("llama")
    make_adapter(base, case.adapter, config_of("HIRA", "llama", {"r": 3}))
    case.configure(peft_type="NEWLORA")
    (finding,) = case.bench.findings(case.adapter, base).values()
    assert (finding.code, finding.found, finding.fits) == ("method_not_mergeable", "newlora", True)


def test_the_activations_that_are_accepted_are_those_that_are_computed() -> None:
    assert set(dependent.ACTIVATIONS) == ACTIVATIONS
    without_parameters = {name for name in ACTIVATIONS if not list(ACT2FN[name].parameters())}
    assert without_parameters == ACTIVATIONS


def test_places_that_were_cast_to_floats_are_refused(base_model: BaseMaker, case: Case) -> None:
    base = base_model("llama")
    make_adapter(base, case.adapter, config_of("SUPERTUNING", "llama", {"sparsity": 0.5}))
    path = case.adapter / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}, path)
    assert "dtype" in case.bench.findings(case.adapter, base)
