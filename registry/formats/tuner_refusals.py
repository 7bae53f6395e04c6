"""Methods of PEFT whose adapters have no merged form, why, and what to do with them instead."""

from __future__ import annotations

from collections.abc import Mapping

from registry.formats.findings import unsupported
from registry.formats.peft import CONFIG_FILE
from registry.manifest import Finding

_SERVE = "recorded as it is: serve it unmerged, with the base model and PEFT"
_VIRTUAL_TOKENS = f"puts virtual tokens before the input, which no weight of the base stands for; {_SERVE}"
_REASONS: Mapping[str, str] = {
    "adamss": f"changes clusters of rows that training found in the base and did not save; {_SERVE}",
    "adaption_prompt": f"adds gated attention over trained prompts; {_SERVE}",
    "cartridge": f"is a trained cache of keys and values; {_SERVE}",
    "cpt": _VIRTUAL_TOKENS,
    "lily": f"routes each input through shared experts; {_SERVE}",
    "multitask_prompt_tuning": _VIRTUAL_TOKENS,
    "p_tuning": _VIRTUAL_TOKENS,
    "poly": f"mixes its skills by the task of each input; {_SERVE}",
    "prefix_tuning": f"puts trained keys and values before those of the input; {_SERVE}",
    "prompt_tuning": _VIRTUAL_TOKENS,
    "psoft": f"rests on singular vectors of the base that are not saved and whose signs differ between machines; {_SERVE}",
    "shadow": f"runs a network of its own beside the model; {_SERVE}",
    "xlora": f"mixes its LoRAs anew for each token; {_SERVE}",
}


def refusal(method: str) -> Finding:
    """Why an adapter of a method is not merged, and what to do instead; of a method that nobody here knows, too."""
    advice = _REASONS.get(
        method, "not known here: serve it unmerged with the PEFT that trained it, or upgrade ckpt-registry"
    )
    return unsupported("method_not_mergeable", CONFIG_FILE, found=method, advice=advice)
