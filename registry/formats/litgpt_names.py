"""One model in two layouts: which rows of which module of litgpt are which rows of which module of transformers.

Weights are never transposed on the way and never computed with: a conversion moves whole rows. The same table holds for the rows of a weight,
the elements of a bias, and the rows of a LoRA's B. Families and names as litgpt 0.5.13 converts them, both ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from registry.errors import CorruptFile
from registry.formats.litgpt import MODEL_CONFIG_FILE
from registry.formats.litgpt_heads import Heads
from registry.tensors import StoredTensor, TensorSpec

_PARTS = ("query", "key", "value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """`count` rows of the module `source`, from `source_row` on, are those of the module `target` from `target_row` on."""

    source: str
    target: str
    count: int
    source_row: int = 0
    target_row: int = 0

    @property
    def flipped(self) -> Rows:
        """The other way round."""
        return Rows(
            source=self.target,
            target=self.source,
            count=self.count,
            source_row=self.target_row,
            target_row=self.source_row,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """Names of transformers by litgpt's. `{}` stands for the number of the layer, and in `modules` for that of the expert.

    `qkv` are three modules, or one that is fused: concatenated as litgpt's, or `interleaved`. `gate_up` holds fc_1 and then fc_2.
    """

    top: Mapping[str, str]
    layer: str
    modules: Mapping[str, str]
    qkv: tuple[str, ...]
    interleaved: bool = False
    gate_up: str = ""


_LLAMA = _Family(
    top={"lm_head": "lm_head", "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm"},
    layer="model.layers.{}.",
    modules={
        "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
        "attn.norm_q": "self_attn.q_norm", "attn.norm_k": "self_attn.k_norm",
        "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
    },
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)  # fmt: skip
_MIXTRAL = {
    "mlp.gate": "block_sparse_moe.gate", "mlp.experts.{}.fc_1": "block_sparse_moe.experts.{}.w1",
    "mlp.experts.{}.fc_2": "block_sparse_moe.experts.{}.w3", "mlp.experts.{}.proj": "block_sparse_moe.experts.{}.w2",
}  # fmt: skip
_QWEN3_MOE = {
    "mlp.gate": "mlp.gate", "mlp.experts.{}.fc_1": "mlp.experts.{}.gate_proj",
    "mlp.experts.{}.fc_2": "mlp.experts.{}.up_proj", "mlp.experts.{}.proj": "mlp.experts.{}.down_proj",
}  # fmt: skip
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm", "norm_2": "pre_feedforward_layernorm", "post_mlp_norm": "post_feedforward_layernorm",
}  # fmt: skip
_PHI = _Family(
    top={"lm_head": "lm_head", "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.final_layernorm"},
    layer="model.layers.{}.",
    modules={"norm_1": "input_layernorm", "attn.proj": "self_attn.dense", "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"},
    qkv=_LLAMA.qkv,
)
_PHI3 = _Family(
    top=_LLAMA.top,
    layer=_LLAMA.layer,
    modules={name: _LLAMA.modules[name] for name in ("norm_1", "norm_2", "attn.proj", "mlp.proj")},
    qkv=("self_attn.qkv_proj",),
    gate_up="mlp.gate_up_proj",
)
_NEOX = _Family(
    top={"lm_head": "embed_out", "transformer.wte": "gpt_neox.embed_in", "transformer.ln_f": "gpt_neox.final_layer_norm"},
    layer="gpt_neox.layers.{}.",
    modules={
        "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "attention.dense",
        "mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h",
    },
    qkv=("attention.query_key_value",),
    interleaved=True,
)  # fmt: skip
_FALCON = _Family(
    top={"lm_head": "lm_head", "transformer.wte": "transformer.word_embeddings", "transformer.ln_f": "transformer.ln_f"},
    layer="transformer.h.{}.",
    modules={
        "norm_1": "ln_attn", "norm_2": "ln_mlp", "attn.proj": "self_attention.dense",
        "mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h",
    },
    qkv=("self_attention.query_key_value",),
    interleaved=True,
)  # fmt: skip


def _family(config: Mapping[str, Any]) -> _Family | None:
    """The family of a litgpt model, told as litgpt tells it: by name, then by the kind of its MLP. None for those it cannot export."""
    name, mlp = str(config.get("name", "")), config.get("mlp_class_name")
    lower = name.lower()
    if "falcon" in name:
        norms = {"norm_1": "input_layernorm"} if "7b" in name else {}
        return replace(_FALCON, modules={**_FALCON.modules, **norms})
    if lower.startswith(("gemma-2", "gemma-3")):
        return replace(_LLAMA, modules={**_LLAMA.modules, **_GEMMA})
    if lower.startswith("phi"):
        return _PHI3 if lower.startswith(("phi-3", "phi-4")) else _PHI
    if lower.startswith("olmo"):
        return None
    if mlp == "LLaMAMoE":
        experts = _QWEN3_MOE if lower.startswith("qwen3") else _MIXTRAL
        return replace(_LLAMA, modules={**_LLAMA.modules, **experts})
    return _LLAMA if mlp in ("LLaMAMLP", "GemmaMLP") else _NEOX


def correspondence(config: Mapping[str, Any], *, legacy: bool = False) -> tuple[Rows, ...]:
    """Every row of every module that a litgpt model may have, and where it is in transformers' layout.

    Args:
        config: `model_config.yaml`.
        legacy: the row order and names of litgpt <= 0.5.4.

    Returns:
        Rows from litgpt to transformers, in the order of litgpt's own files; empty for a family that has no such layout.

    Raises:
        CorruptFile: the configuration lacks numbers, or they do not describe attention heads.
    """
    if missing := [key for key in ("n_layer", "n_embd") if not isinstance(config.get(key), int)]:
        raise CorruptFile(MODEL_CONFIG_FILE, f"no {' and '.join(missing)} in it")
    family = _family(config)
    return tuple(_all_rows(config, family, legacy)) if family else ()


def _all_rows(config: Mapping[str, Any], family: _Family, legacy: bool) -> Iterator[Rows]:
    heads, sizes = Heads.from_config(config), _row_counts(config)
    for module in ("lm_head", "transformer.wte"):
        yield Rows(source=module, target=family.top[module], count=sizes[module])
    for layer in range(config["n_layer"]):
        ours, theirs = f"transformer.h.{layer}.", family.layer.format(layer)
        for name in _in_order(family.modules):
            if name == "attn.qkv":
                yield from _fused_rows(heads, family, ours, theirs, legacy)
                continue
            for expert in range(config.get("n_expert") or 0) if "{}" in name else (0,):
                count = sizes[name.replace(".{}", "")]
                yield Rows(
                    source=ours + name.format(expert), target=theirs + family.modules[name].format(expert), count=count
                )
        if family.gate_up:
            inner = sizes["mlp.fc_1"]
            for at, name in ((0, "mlp.fc_1"), (inner, "mlp.fc_2")):
                yield Rows(source=ours + name, target=theirs + family.gate_up, count=inner, target_row=at)
    yield Rows(source="transformer.ln_f", target=family.top["transformer.ln_f"], count=sizes["transformer.ln_f"])


def _in_order(modules: Mapping[str, str]) -> list[str]:
    """As litgpt's blocks have them: the fused matrix behind the first norm."""
    return ["norm_1", "attn.qkv", *(name for name in modules if name != "norm_1")]


def _row_counts(config: Mapping[str, Any]) -> dict[str, int]:
    width, heads = config["n_embd"], Heads.from_config(config)
    inner = config.get("intermediate_size") or 4 * width
    vocabulary = config.get("padded_vocab_size") or config.get("vocab_size") or 0
    expert = config.get("moe_intermediate_size") or inner
    wide = (
        "transformer.ln_f",
        "norm_1",
        "norm_2",
        "post_attention_norm",
        "post_mlp_norm",
        "attn.proj",
        "mlp.proj",
        "mlp.experts.proj",
    )
    return {
        **dict.fromkeys(wide, width),
        **dict.fromkeys(("lm_head", "transformer.wte"), vocabulary),
        **dict.fromkeys(("attn.norm_q", "attn.norm_k"), heads.size),
        **dict.fromkeys(("mlp.fc", "mlp.fc_1", "mlp.fc_2"), inner),
        **dict.fromkeys(("mlp.experts.fc_1", "mlp.experts.fc_2"), expert),
        "mlp.gate": config.get("n_expert") or 0,
    }


def _fused_rows(heads: Heads, family: _Family, ours: str, theirs: str, legacy: bool) -> Iterator[Rows]:
    """The rows of query, key and value, group of heads by group, joined where neighbours stay neighbours."""
    module = f"{ours}attn.{'attn' if legacy else 'qkv'}"
    joined: list[Rows] = []
    for part, name in zip(_PARTS, family.qkv if len(family.qkv) == 3 else family.qkv * 3, strict=True):
        block = heads.part_rows[part] // heads.groups
        source = heads.interleaved(part) if legacy else heads.concatenated(part)
        if len(family.qkv) == 3:
            target = iter([(0, 0, heads.part_rows[part])])
        else:
            target = heads.interleaved(part) if family.interleaved else heads.concatenated(part)
        places = zip(_by_group(source, block), _by_group(target, block), strict=True)
        joined.extend(
            Rows(source=module, target=theirs + name, count=block, source_row=here, target_row=there)
            for here, there in places
        )
    yield from _joined(joined)


def _by_group(spread: Iterator[tuple[int, int, int]], block: int) -> Iterator[int]:
    """Where each block of so many rows of a part begins in the matrix, in the order of the part."""
    for _, at, count in spread:
        yield from range(at, at + count, block)


def _joined(rows: Sequence[Rows]) -> Iterator[Rows]:
    current = rows[0]
    for each in rows[1:]:
        follows = (each.target, each.source_row, each.target_row) == (
            current.target,
            current.source_row + current.count,
            current.target_row + current.count,
        )
        if follows:
            current = replace(current, count=current.count + each.count)
        else:
            yield current
            current = each
    yield current


@dataclass(frozen=True, slots=True)
class Range:
    """So many bytes of a file."""

    file: str
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Moved:
    """A tensor of the other layout: its bytes are these ranges, one after another."""

    spec: TensorSpec
    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rearranged:
    """A model's tensors in the other layout. `strangers` have no place in it; `problems` are tensors of it that are not made whole."""

    tensors: tuple[Moved, ...]
    strangers: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(slots=True)
class _Collected:
    """What has been found of one tensor of the other layout: its rows by where they begin."""

    name: str
    first: StoredTensor
    rows: int = 0
    ranges: dict[int, Range] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    mixed: bool = False


def rearrange(tensors: Sequence[StoredTensor], table: Sequence[Rows]) -> Rearranged:
    """Put a model's tensors into the other layout.

    Args:
        tensors: all of them.
        table: where each row goes, from this layout to the other.
    """
    by_source: dict[str, list[Rows]] = {}
    heights: dict[str, int] = {}
    for rows in table:
        by_source.setdefault(rows.source, []).append(rows)
        heights[rows.target] = heights.get(rows.target, 0) + rows.count
    order = {name: index for index, name in enumerate(heights)}
    found: dict[tuple[int, str], _Collected] = {}
    strangers, problems = [], []
    for tensor in tensors:
        module, _, kind = tensor.spec.name.rpartition(".")
        strips = by_source.get(module)
        if not strips or kind not in ("weight", "bias"):
            strangers.append(tensor.spec.name)
        elif not tensor.spec.shape or tensor.spec.shape[0] != sum(rows.count for rows in strips):
            wanted = sum(rows.count for rows in strips)
            problems.append(f"{tensor.spec.name}: {wanted} rows expected, shape {list(tensor.spec.shape)} found")
        else:
            for rows in strips:
                key = order[rows.target], kind
                place = found.setdefault(key, _Collected(f"{rows.target}.{kind}", tensor, heights[rows.target]))
                _collect(place, tensor, rows)
    made = []
    for _, place in sorted(found.items(), key=lambda item: (item[0][0], item[0][1] != "weight")):
        if place.mixed or sum(place.counts.values()) != place.rows:
            reason = "its parts differ in dtype or width" if place.mixed else "a part of it is missing"
            problems.append(f"{place.name}: {reason}")
        else:
            made.append(_moved(place))
    return Rearranged(tensors=tuple(made), strangers=tuple(strangers), problems=tuple(problems))


def _collect(place: _Collected, tensor: StoredTensor, rows: Rows) -> None:
    first = place.first.spec
    place.mixed |= (first.dtype, first.shape[1:]) != (tensor.spec.dtype, tensor.spec.shape[1:])
    width = tensor.spec.size_bytes // tensor.spec.shape[0] if tensor.spec.shape[0] else 0
    start = tensor.offset_bytes + rows.source_row * width
    place.ranges[rows.target_row] = Range(tensor.file, start, rows.count * width)
    place.counts[rows.target_row] = rows.count


def _moved(place: _Collected) -> Moved:
    first = place.first.spec
    spec = TensorSpec(place.name, first.dtype, (place.rows, *first.shape[1:]))
    return Moved(spec, tuple(place.ranges[at] for at in sorted(place.ranges)))
