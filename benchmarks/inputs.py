"""What the benchmarks merge: Llama-shaped bfloat16 models and rank-16 LoRAs on all their linear layers, in both formats, made without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from registry.tensors import DType, TensorSpec, layout_safetensors
from registry.torchzip import Descriptor, Directory, Literal, layout_torch_zip

SHARD_BYTES = 500 << 20
RANK, ALPHA = 16, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama:
    """The shape of a base model. As it stands: 1.1 billion parameters, 2.2 GB."""

    layers: int = 22
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    key_value_heads: int = 4
    vocabulary: int = 32000

    @property
    def key_value_rows(self) -> int:
        """Rows of the key and of the value projection."""
        return self.hidden // self.heads * self.key_value_heads

    def linear(self) -> dict[str, tuple[int, int]]:
        """Every linear layer, `[d_out, d_in]`."""
        shapes = {
            "self_attn.q_proj": (self.hidden, self.hidden), "self_attn.k_proj": (self.key_value_rows, self.hidden),
            "self_attn.v_proj": (self.key_value_rows, self.hidden), "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden), "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }  # fmt: skip
        return {f"model.layers.{layer}.{name}": shape for layer in range(self.layers) for name, shape in shapes.items()}

    def tensors(self) -> list[TensorSpec]:
        """Every tensor as transformers names it, in order."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        shapes |= {f"{name}.weight": shape for name, shape in self.linear().items()}
        for layer in range(self.layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"model.layers.{layer}.{norm}.weight"] = (self.hidden,)
        shapes |= {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}
        return [TensorSpec(name, DType.BF16, shape) for name, shape in shapes.items()]

    def litgpt_linear(self) -> dict[str, tuple[int, int]]:
        """Every linear layer of the blocks as litgpt names it."""
        shapes = {
            "attn.qkv": (self.hidden + 2 * self.key_value_rows, self.hidden), "attn.proj": (self.hidden, self.hidden),
            "mlp.fc_1": (self.intermediate, self.hidden), "mlp.fc_2": (self.intermediate, self.hidden),
            "mlp.proj": (self.hidden, self.intermediate),
        }  # fmt: skip
        return {
            f"transformer.h.{layer}.{name}": shape for layer in range(self.layers) for name, shape in shapes.items()
        }

    def litgpt_tensors(self) -> list[TensorSpec]:
        """Every tensor as litgpt names it, in order."""
        shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (self.vocabulary, self.hidden)}
        shapes["transformer.wte.weight"] = (self.vocabulary, self.hidden)
        shapes |= {f"{name}.weight": shape for name, shape in self.litgpt_linear().items()}
        for layer in range(self.layers):
            shapes |= {f"transformer.h.{layer}.{norm}.weight": (self.hidden,) for norm in ("norm_1", "norm_2")}
        shapes["transformer.ln_f.weight"] = (self.hidden,)
        return [TensorSpec(name, DType.BF16, shape) for name, shape in shapes.items()]

    def config(self) -> dict[str, Any]:
        """What goes into `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads, "vocab_size": self.vocabulary, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048, "tie_word_embeddings": False, "hidden_act": "silu",
        }  # fmt: skip

    def litgpt_config(self) -> dict[str, Any]:
        """What goes into `model_config.yaml`."""
        return {
            "name": "benchmark", "hf_config": {}, "n_embd": self.hidden, "n_layer": self.layers, "n_head": self.heads,
            "n_query_groups": self.key_value_heads, "head_size": self.hidden // self.heads, "block_size": 2048,
            "intermediate_size": self.intermediate, "vocab_size": self.vocabulary, "padded_vocab_size": self.vocabulary,
            "bias": False, "lm_head_bias": False, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "norm_eps": 1e-5,
            "parallel_residual": False, "rotary_percentage": 1.0, "rope_base": 10000,
        }  # fmt: skip


class Weights:
    """Weights that are normal with standard deviation 0.02, no two tensors the same, as bfloat16 bits."""

    def __init__(self, shape: Llama) -> None:
        pool = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(np.float32)
        self._words = np.resize(
            (pool.view(np.uint32) >> 16).astype(np.uint16), shape.vocabulary * shape.hidden + pool.size
        )
        self._taken = 0

    def next(self, elements: int) -> bytes:
        """The bytes of another tensor."""
        start, self._taken = self._taken * 7919 % (1 << 22), self._taken + 1
        return bytes(self._words[start : start + elements].tobytes())


def write_base(folder: Path, shape: Llama) -> None:
    """Write a base model in shards of about 500 MB."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    weights, weight_map, shards = Weights(shape), dict[str, str](), [list[TensorSpec]()]
    for spec in shape.tensors():
        if sum(each.size_bytes for each in shards[-1]) + spec.size_bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(spec)
    for number, specs in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(layout_safetensors(specs, {"format": "pt"}, file)[0])
            for spec in specs:
                stream.write(weights.next(spec.elements))
                weight_map[spec.name] = file
    index = {"metadata": {"total_size": sum(s.size_bytes for s in shape.tensors())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def factors(shapes: dict[str, tuple[int, int]], seed: int) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """A and B of every layer, float32, whose product is about a tenth of the weights once it is scaled."""
    values = np.random.default_rng(seed)
    for name, (d_out, d_in) in shapes.items():
        for letter, size in (("A", (RANK, d_in)), ("B", (d_out, RANK))):
            yield f"{name}.lora_{letter}", values.normal(0, 0.016, size).astype(np.float32)


def write_adapter(folder: Path, base: Path, shape: Llama, seed: int = 1) -> None:
    """Write a PEFT LoRA with float32 factors."""
    folder.mkdir()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": str(base),
        "target_modules": sorted({name.rpartition(".")[2] for name in shape.linear()}), "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"base_model.model.{name}.weight": values for name, values in factors(shape.linear(), seed)}
    specs = [TensorSpec(name, DType.F32, values.shape) for name, values in tensors.items()]
    with (folder / "adapter_model.safetensors").open("wb") as stream:
        stream.write(layout_safetensors(specs, {"format": "pt"}, "adapter_model.safetensors")[0])
        for values in tensors.values():
            stream.write(values.tobytes())


def write_torch_zip(path: Path, specs: list[TensorSpec], values: Iterator[bytes]) -> None:
    """Write what `torch.save` would of a flat state dict."""
    import zlib

    layout, checksums = layout_torch_zip(specs, {}, path.name), dict[str, int]()
    with path.open("wb") as stream:
        for piece in layout.pieces:
            if isinstance(piece, Literal):
                stream.write(piece.data)
            elif isinstance(piece, Descriptor):
                stream.write(layout.descriptor(piece.name, checksums[piece.name]))
            elif isinstance(piece, Directory):
                stream.write(layout.directory(checksums))
            else:
                data = next(values)
                checksums[piece.name] = zlib.crc32(data)
                stream.write(data)


def write_litgpt(base: Path, adapter: Path, shape: Llama) -> None:
    """Write a litgpt base model and a LoRA with everything but the head enabled."""
    for folder in (base, adapter):
        folder.mkdir()
        (folder / "model_config.yaml").write_text(yaml.safe_dump(shape.litgpt_config()))
        for name in ("tokenizer.json", "tokenizer_config.json"):  # litgpt wants them to be there
            (folder / name).write_text("{}")
    weights, specs = Weights(shape), shape.litgpt_tensors()
    write_torch_zip(base / "lit_model.pth", specs, (weights.next(spec.elements) for spec in specs))
    tensors = dict(factors(shape.litgpt_linear(), 1))
    values = np.random.default_rng(2)
    for name in [
        name for name in tensors if ".attn.qkv.lora_A" in name
    ]:  # query, key and value have their own rows of A
        tensors[name] = values.normal(0, 0.016, (3 * RANK, shape.hidden)).astype(np.float32)
    lora = [TensorSpec(name, DType.F32, each.shape) for name, each in tensors.items()]
    write_torch_zip(adapter / "lit_model.pth.lora", lora, (each.tobytes() for each in tensors.values()))
    flags = {f"lora_{flag}": flag != "head" for flag in ("query", "key", "value", "projection", "mlp", "head")}
    hyper = {
        "checkpoint_dir": str(base),
        "precision": "bf16-true",
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        **flags,
    }
    (adapter / "hyperparameters.yaml").write_text(yaml.safe_dump(hyper))
