"""Which serving engine takes a checkpoint as it is, which only merged, and why. Pure: the rules of vLLM 0.33 and SGLang 0.5.

Unmerged, an engine adds a LoRA to the base model while it computes. What an engine refuses is refused here, with the reason. What it neither
refuses nor is known to apply is refused as well: it would answer, but not as it was trained to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from registry.formats.peft_config import option_findings
from registry.formats.peft_tuners import ROWS
from registry.formats.tuner_refusals import refusal
from registry.manifest import Finding, Format, Level, Manifest, Report

Engine = Literal["vllm", "sglang"]
Way = Literal["unmerged", "merged"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
ENGINE_NAMES: Mapping[Engine, str] = {"vllm": "vLLM", "sglang": "SGLang"}

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # it takes no other --max-lora-rank
_VLLM_WHOLE_MODULES = frozenset({"classifier", "score"})
_ADDED_TOKENS = "added_tokens.json"
_WITH_PEFT = "serve it with PEFT itself, beside its base model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Servability:
    """Whether an engine can serve a checkpoint in one way.

    `reason` says in a few words why not; it is empty where it can. `advice` is what to do: so that it works, or instead.
    """

    engine: Engine
    way: Way
    is_possible: bool
    reason: str = ""
    advice: str = ""


def servable(
    manifest: Manifest, config: Mapping[str, Any], *, ref: str = "REF", report: Report | None = None
) -> tuple[Servability, ...]:
    """What every engine makes of a checkpoint, unmerged and merged.

    Args:
        manifest: the checkpoint's.
        config: its `adapter_config.json`; empty for litgpt's, which have none.
        ref: how the checkpoint is asked for, for the commands in the advice.
        report: what checking it found; None leaves it to the configuration whether it can be merged.
    """
    return tuple(
        found
        for engine in ENGINES
        for merged in (_merged(engine, manifest, config, ref, report),)
        for found in (_unmerged(engine, manifest, config, merged, ref), merged)
    )


def rank_of(manifest: Manifest, config: Mapping[str, Any]) -> int:
    """The highest rank of a LoRA's modules."""
    ranks = config.get("rank_pattern")
    others = ranks.values() if isinstance(ranks, dict) else ()
    return max([manifest.rank or 0, *(int(rank) for rank in others if isinstance(rank, int | float))])


def rank_flag(engine: Engine, rank: int) -> int | None:
    """What `--max-lora-rank` must be at least for a rank; None where it can be nothing."""
    return rank if engine == "sglang" else next((allowed for allowed in _VLLM_RANKS if allowed >= rank), None)


# -- unmerged


def _has(field: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda config: bool(config.get(field))


def _starts_elsewhere(config: Mapping[str, Any]) -> bool:
    return any(finding.code == "initialiser_changes_base" for finding in option_findings(config))


# What vLLM refuses of a LoRA, by its configuration. SGLang itself only refuses the first.
_REFUSED_FIELDS: Sequence[tuple[str, Callable[[Mapping[str, Any]], bool]]] = (
    ("DoRA", _has("use_dora")),
    ("biases of the factors (lora_bias)", _has("lora_bias")),
    ("trained biases", lambda config: config.get("bias") not in (None, "", "none")),
    ("factors that begin with a part of the base (PiSSA and its kin)", _starts_elsewhere),
    ("an activated LoRA", _has("alora_invocation_tokens")),
    ("replicated layers", _has("layer_replication")),
    ("BD-LoRA", _has("use_bdlora")),
    ("QALoRA", _has("use_qalora")),
)


def _unmerged(
    engine: Engine, manifest: Manifest, config: Mapping[str, Any], merged: Servability, ref: str
) -> Servability:
    reasons = list(_against_unmerged(engine, manifest, config))
    if not reasons:
        rank = rank_flag(engine, rank_of(manifest, config))
        advice = [f"start it with {'--enable-lora ' if engine == 'vllm' else ''}--max-lora-rank {rank}"]
        if engine == "sglang" and any(entry.path == _ADDED_TOKENS for entry in manifest.files):
            advice.append(f"it is refused if {_ADDED_TOKENS} has tokens that the base model lacks: merge it then")
        return Servability(engine=engine, way="unmerged", is_possible=True, advice="; ".join(advice))
    advice = [f"merge it: ckpt merge {ref}"] if merged.is_possible else [merged.advice]
    return Servability(
        engine=engine, way="unmerged", is_possible=False, reason="; ".join(reasons), advice="; ".join(advice)
    )


def _against_unmerged(engine: Engine, manifest: Manifest, config: Mapping[str, Any]) -> Iterator[str]:
    if manifest.format is Format.LITGPT:
        yield "litgpt's layout"
        return
    if manifest.method not in ("lora", "dora"):
        yield f"{manifest.method}, and only LoRA is served unmerged"
        return
    for name, applies in _REFUSED_FIELDS:
        if applies(config):
            yield name if engine == "vllm" or name == "DoRA" else _not_known(engine, name)
    whole = _whole_modules(config)
    if engine == "vllm" and not _VLLM_WHOLE_MODULES.issuperset(whole):
        yield f"modules trained whole ({', '.join(whole)})"
    elif engine == "sglang" and whole:
        yield _not_known(engine, f"modules trained whole ({', '.join(whole)})")
    if config.get("trainable_token_indices"):
        yield _not_known(engine, "trained tokens")
    if rank_flag(engine, rank := rank_of(manifest, config)) is None:
        yield f"rank {rank}, and {_VLLM_RANKS[-1]} is the highest"


def _not_known(engine: Engine, what: str) -> str:
    return f"{what}, which {ENGINE_NAMES[engine]} is not known to apply"


def _whole_modules(config: Mapping[str, Any]) -> list[str]:
    named = config.get("modules_to_save") or []
    return [named] if isinstance(named, str) else sorted(map(str, named)) if isinstance(named, Sequence) else []


# -- merged


def _merged(
    engine: Engine, manifest: Manifest, config: Mapping[str, Any], ref: str, report: Report | None
) -> Servability:
    findings = _merge_findings(manifest, config) if report is None else report.findings
    refused = next((finding for finding in findings if finding.level is Level.REFUSED), None)
    if refused is not None:
        reason = f"cannot be merged: {refused.found or refused.code}"
        advice = _WITH_PEFT if refused.code == "method_not_mergeable" else refused.advice
        return Servability(engine=engine, way="merged", is_possible=False, reason=reason, advice=advice)
    if manifest.format is Format.LITGPT:
        advice = f"ckpt convert {ref} --to peft --as NAME, and merge that" if manifest.method == "lora" else ""
        return Servability(
            engine=engine,
            way="merged",
            is_possible=False,
            reason="merging gives a model in litgpt's layout",
            advice=advice or "merge it, then: ckpt convert DIGEST --to hf --out DIR",
        )
    return Servability(engine=engine, way="merged", is_possible=True, advice=f"ckpt merge {ref} --out DIR")


def _merge_findings(manifest: Manifest, config: Mapping[str, Any]) -> Sequence[Finding]:
    if manifest.format is Format.LITGPT or manifest.method in ROWS:
        return ()
    return tuple(option_findings(config)) if manifest.method in ("lora", "dora") else (refusal(manifest.method),)
