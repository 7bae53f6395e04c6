"""The configuration of one model in two layouts: litgpt's `model_config.yaml` and transformers' `config.json`, made from one another.

Only what is understood is written: a family, an activation or a rotary scaling that is not known here is refused, since a model with a slightly
wrong configuration loads without a word. Fields as litgpt 0.5.13 and transformers 4 and 5 read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from registry.errors import NotConvertible

TRANSFORMERS, LITGPT = "a model of transformers", "a model of litgpt"
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "gpt_neox": "GPTNeoXForCausalLM",
}  # fmt: skip
# litgpt tells families by the beginning of the name; a name that says nothing is put behind one of these.
_NAME_STARTS = {"qwen2": "Qwen2.5", "qwen3": "Qwen3", "qwen3_moe": "Qwen3"}
_TELLING = ("qwen2.5", "qwq", "qwen3", "phi", "olmo", "gemma")
_SILU, _GELU = ("silu", "swish"), {"gelu": "none", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}


# -- which linear layers have biases


def bias_kinds(names: Iterable[str]) -> frozenset[str]:
    """The kinds of litgpt's linear layers (qkv, proj, mlp, head) that have a bias, by the names of the tensors."""
    found = set()
    for name in names:
        if name.endswith(".bias"):
            module = name.removesuffix(".bias")
            if module == "lm_head":
                found.add("head")
            elif module.endswith((".attn.qkv", ".attn.attn")):
                found.add("qkv")
            elif module.endswith(".attn.proj"):
                found.add("proj")
            elif ".mlp." in module:
                found.add("mlp")
    return frozenset(found)


def _bias_slots(config: Mapping[str, Any]) -> frozenset[str] | None:
    """The kinds of linear layers that transformers gives a bias; None for a model that is not known here."""
    kind = config.get("model_type")
    attention = {"qkv", "proj"}
    if kind == "llama":
        return frozenset(
            (attention if config.get("attention_bias") else set()) | ({"mlp"} if config.get("mlp_bias") else set())
        )
    if kind == "gpt_neox":
        return frozenset({"mlp", *(attention if config.get("attention_bias", True) else ())})
    if kind in ("qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"):
        return frozenset(attention if config.get("attention_bias") else ())
    fixed = {"qwen2": {"qkv"}, "phi": {"qkv", "proj", "mlp", "head"}, "mistral": (), "mixtral": (), "phi3": ()}
    return frozenset(fixed[kind]) if kind in fixed else None


def with_biases(config: Mapping[str, Any], kinds: frozenset[str], subject: str) -> dict[str, Any]:
    """The configuration with which transformers loads just these biases: it drops what has no slot, and makes up what is missing.

    A model that is Llama but for its biases is written as Llama where that has the slots.

    Raises:
        NotConvertible: there is no such configuration.
    """
    slots = _bias_slots(config)
    if slots is None or slots == kinds:
        return dict(config)
    is_llama_but_for_biases = config.get("model_type") in ("llama", "mistral", "qwen2") and not _window(config)
    if not is_llama_but_for_biases or kinds - {"qkv", "proj", "mlp"} or ("qkv" in kinds) != ("proj" in kinds):
        here, there = (", ".join(sorted(each)) or "nothing" for each in (kinds, slots))
        shown = f"biases on {here}, where {config.get('model_type')} has them on {there}"
        raise NotConvertible(subject, TRANSFORMERS, [shown])
    return {
        **config, "model_type": "llama", "architectures": [_ARCHITECTURES["llama"]],
        "attention_bias": "qkv" in kinds, "mlp_bias": "mlp" in kinds,
    }  # fmt: skip


def _window(config: Mapping[str, Any]) -> int | None:
    """How many positions a sliding window covers; None without one."""
    if config.get("model_type") == "qwen2" and not config.get("use_sliding_window"):
        return None
    size = config.get("sliding_window")
    return size if isinstance(size, int) and not isinstance(size, bool) else None


# -- litgpt to transformers


def transformers_config(config: Mapping[str, Any], subject: str) -> dict[str, Any]:
    """`config.json` for a model with this `model_config.yaml`.

    Raises:
        NotConvertible: a family or an option that is not known here.
    """
    kind = _model_type(config)
    if kind is None:
        reason = f"no config.json can be made for {config.get('name')!r}: put the original's into its folder"
        raise NotConvertible(subject, TRANSFORMERS, [reason])
    problems = [f"{key}={config[key]!r} is not known here" for key in _ODD_IN_LITGPT if config.get(key)]
    if config.get("sliding_window_size") and not all(
        (config.get("sliding_window_indices") or [1])[: config["n_layer"]]
    ):
        problems.append("a sliding window in some layers only is not known here")
    if problems:
        raise NotConvertible(subject, TRANSFORMERS, problems)
    common = {
        "model_type": kind,
        "architectures": [_ARCHITECTURES[kind]],
        "vocab_size": config.get("padded_vocab_size") or config.get("vocab_size"),
        "hidden_size": config["n_embd"],
        "num_hidden_layers": config["n_layer"],
        "num_attention_heads": config["n_head"],
        "intermediate_size": config.get("intermediate_size") or 4 * config["n_embd"],
        "max_position_embeddings": config.get("block_size", 4096),
        "tie_word_embeddings": False,
    }
    return {
        **common,
        **(_neox(config, subject) if kind == "gpt_neox" else _llama(config, kind)),
        **_rotary(config, kind),
    }


_ODD_IN_LITGPT = (
    "latent_attention", "n_shared_expert", "n_expert_groups", "first_k_dense_replace", "attention_logit_softcapping",
    "final_logit_softcapping", "attention_scores_scalar", "scale_embeddings", "rope_indices", "rope_local_base_freq", "rope_interleave",
    "post_attention_norm", "post_mlp_norm",
)  # fmt: skip


def _model_type(config: Mapping[str, Any]) -> str | None:
    name, mlp = str(config.get("name", "")).lower(), config.get("mlp_class_name")
    if name.startswith(("gemma", "phi", "olmo")) or "falcon" in name or "gemma" in name:
        return None
    if mlp == "LLaMAMoE":
        return "qwen3_moe" if name.startswith("qwen3") else "mixtral"
    if mlp == "LLaMAMLP" and config.get("norm_class_name") == "RMSNorm":
        if name.startswith(("qwen2.5", "qwq")):
            return "qwen2"
        return "qwen3" if config.get("norm_qk") else "mistral" if config.get("sliding_window_size") else "llama"
    is_neox = (
        mlp == "GptNeoxMLP" and config.get("norm_class_name") == "LayerNorm" and not config.get("shared_attention_norm")
    )
    return "gpt_neox" if is_neox else None


def _llama(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "num_key_value_heads": config.get("n_query_groups") or config["n_head"],
        "head_dim": config.get("head_size") or config["n_embd"] // config["n_head"],
        "rms_norm_eps": config.get("norm_eps", 1e-5),
        "hidden_act": "silu",
    }
    if kind in ("mistral", "mixtral"):
        found["sliding_window"] = config.get("sliding_window_size")
    if kind == "mixtral":
        found |= {"num_local_experts": config["n_expert"], "num_experts_per_tok": config["n_expert_per_token"]}
    if kind == "qwen3_moe":
        inner = config.get("moe_intermediate_size") or config.get("intermediate_size")
        found |= {
            "num_experts": config["n_expert"], "num_experts_per_tok": config["n_expert_per_token"], "moe_intermediate_size": inner,
            "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        }  # fmt: skip
    return found


def _neox(config: Mapping[str, Any], subject: str) -> dict[str, Any]:
    if config.get("n_query_groups") not in (None, config["n_head"]):
        raise NotConvertible(subject, TRANSFORMERS, ["GPT-NeoX has no grouped queries"])
    acts = {"none": "gelu", "tanh": "gelu_new"}
    return {
        "layer_norm_eps": config.get("norm_eps", 1e-5),
        "use_parallel_residual": bool(config.get("parallel_residual", True)),
        "hidden_act": acts[config.get("gelu_approximate") or "none"],
        "attention_bias": bool(config.get("bias", True)),
    }


def _rotary(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """In the words of transformers 4, which 5 still reads."""
    base, condensed, adjusted = (
        config.get("rope_base", 10000),
        config.get("rope_condense_ratio") or 1,
        config.get("rope_adjustments"),
    )
    scaling: dict[str, Any] | None = None
    if adjusted:
        scaling = {"rope_type": "llama3", **{key: adjusted[key] for key in ("factor", "low_freq_factor", "high_freq_factor")},
                   "original_max_position_embeddings": adjusted["original_max_seq_len"]}  # fmt: skip
    elif condensed != 1:
        scaling = {"rope_type": "linear", "factor": float(condensed)}
    found: dict[str, Any] = {"rope_scaling": scaling} if scaling else {}
    if kind == "gpt_neox":
        return {"rotary_emb_base": base, "rotary_pct": config.get("rotary_percentage", 0.25), **found}
    return {"rope_theta": base, **found}


_COMPARED = {
    "n_layer": None, "n_embd": None, "n_head": None, "n_query_groups": None, "head_size": None, "intermediate_size": None,
    "norm_class_name": None, "norm_eps": 1e-5, "norm_qk": False, "parallel_residual": None, "mlp_class_name": None, "n_expert": 0,
    "n_expert_per_token": 0, "rope_base": 10000, "rope_condense_ratio": 1, "rope_adjustments": None, "rotary_percentage": None,
}  # fmt: skip


def disagreements(config: Mapping[str, Any], beside: Mapping[str, Any]) -> tuple[str, ...]:
    """Where a `config.json` describes another model than the `model_config.yaml` it lies beside; empty where it cannot be told."""
    try:
        said = litgpt_config(beside, "", "")
    except NotConvertible:
        return ()
    pairs = {key: (config.get(key, usual), said.get(key, usual)) for key, usual in _COMPARED.items()}
    return tuple(
        f"config.json says {key}={theirs!r}, {ours!r} is right: give another one with --config"
        for key, (ours, theirs) in pairs.items()
        if None not in (ours, theirs) and ours != theirs
    )


# -- transformers to litgpt


def litgpt_config(config: Mapping[str, Any], name: str, subject: str) -> dict[str, Any]:
    """`model_config.yaml` for a model with this `config.json`.

    Args:
        config: of the model.
        name: what the model is called; litgpt chooses a family by it, so that it may get a word in front.
        subject: what to call the model in errors.

    Raises:
        NotConvertible: a family or an option that is not known here.
    """
    kind = str(config.get("model_type", ""))
    if kind not in _ARCHITECTURES:
        raise NotConvertible(
            subject, LITGPT, [f"no model_config.yaml can be made for model_type {kind!r}: give one with --config"]
        )
    missing = [f"config.json has no {key}" for key in _NEEDED if key not in config]
    if problems := missing or list(_unknown(config, kind)):
        raise NotConvertible(subject, LITGPT, problems)
    made: dict[str, Any] = {
        "name": _litgpt_name(name, kind),
        "hf_config": {},
        "block_size": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "padded_vocab_size": config["vocab_size"],
        "n_layer": config["num_hidden_layers"],
        "n_embd": config["hidden_size"],
        "n_head": config["num_attention_heads"],
        "intermediate_size": config["intermediate_size"],
        "lm_head_bias": False,
        **(_from_neox(config) if kind == "gpt_neox" else _from_llama(config, kind)),
    }
    return {**made, **_litgpt_rotary(config, kind, subject)}


_NEEDED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
)  # fmt: skip


def _unknown(config: Mapping[str, Any], kind: str) -> Iterable[str]:
    act = config.get("hidden_act", "silu")
    if act not in (_GELU if kind == "gpt_neox" else _SILU):
        yield f"hidden_act={act!r} is not known here"
    if kind == "llama" and bool(config.get("attention_bias")) != bool(config.get("mlp_bias")):
        yield "litgpt has biases on attention and MLP both, or on neither"
    if kind in ("qwen3", "qwen3_moe") and config.get("attention_bias"):
        yield "litgpt's Qwen3 has no attention biases"
    if kind == "gpt_neox" and not config.get("attention_bias", True):
        yield "litgpt has biases on attention and MLP both, or on neither"
    if kind == "qwen2" and config.get("use_sliding_window"):
        yield "use_sliding_window is not known here"
    if kind == "qwen3_moe":
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            yield "litgpt has experts in every layer, or in none"
        if not config.get("norm_topk_prob"):
            yield "litgpt weighs the chosen experts so that they sum to one: norm_topk_prob=false is not the same"


def _litgpt_name(name: str, kind: str) -> str:
    leaf = name.rstrip("/").rpartition("/")[2] or kind
    start = _NAME_STARTS.get(kind, "")
    lower = leaf.lower()
    if start:
        return leaf if lower.startswith(start.lower()) else f"{start}-{leaf}"
    misleading = lower.startswith(_TELLING) or "falcon" in lower or "gemma" in lower
    return _ARCHITECTURES[kind].removesuffix("ForCausalLM") if misleading else leaf


def _from_llama(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    found: dict[str, Any] = {
        "n_query_groups": config.get("num_key_value_heads") or heads,
        "head_size": config.get("head_dim") or config["hidden_size"] // heads,
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": bool(config.get("mlp_bias")) and kind == "llama",
        "attn_bias": kind == "qwen2",
        "norm_class_name": "RMSNorm",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "norm_qk": kind in ("qwen3", "qwen3_moe"),
        "mlp_class_name": "LLaMAMLP",
    }
    if kind in ("mistral", "mixtral") and _window(config):
        found["sliding_window_size"] = _window(config)
    if kind in ("mixtral", "qwen3_moe"):
        experts = config.get("num_local_experts") or config.get("num_experts")
        found |= {
            "mlp_class_name": "LLaMAMoE",
            "n_expert": experts,
            "n_expert_per_token": config["num_experts_per_tok"],
        }
    if kind == "qwen3_moe":
        found["moe_intermediate_size"] = config["moe_intermediate_size"]
    return found


def _from_neox(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "n_query_groups": config["num_attention_heads"],
        "head_size": config["hidden_size"] // config["num_attention_heads"],
        "parallel_residual": bool(config.get("use_parallel_residual", True)),
        "bias": True,
        "norm_class_name": "LayerNorm",
        "norm_eps": config.get("layer_norm_eps", 1e-5),
        "mlp_class_name": "GptNeoxMLP",
        "gelu_approximate": _GELU[config.get("hidden_act", "gelu")],
    }


def _litgpt_rotary(config: Mapping[str, Any], kind: str, subject: str) -> dict[str, Any]:
    """From the words of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`)."""
    said = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = said.get("rope_theta") or config.get("rope_theta") or config.get("rotary_emb_base") or 10000
    found: dict[str, Any] = {"rope_base": int(base) if float(base).is_integer() else base}
    if kind == "gpt_neox":
        found["rotary_percentage"] = said.get("partial_rotary_factor") or config.get("rotary_pct", 0.25)
    scaling = said.get("rope_type") or said.get("type") or "default"
    if scaling == "llama3":
        found["rope_adjustments"] = {
            **{key: said[key] for key in ("factor", "low_freq_factor", "high_freq_factor")},
            "original_max_seq_len": said["original_max_position_embeddings"],
        }
    elif scaling == "linear":
        found["rope_condense_ratio"] = said["factor"]
    elif scaling != "default":
        raise NotConvertible(subject, LITGPT, [f"rotary scaling {scaling!r} is not known here"])
    return found
