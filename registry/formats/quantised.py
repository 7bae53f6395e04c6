"""Bases whose weights are not floats of 16 bits or more: an adapter's delta cannot be added to those without quantising anew."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from registry.manifest import BaseModel, Finding, Level
from registry.tensors import DType

# What quantised files have beside, or instead of, a layer's weight.
_MARKS = {
    re.compile(r"\.(?:qweight|qzeros)"): "GPTQ or AWQ",
    re.compile(
        r"\.weight\.(?:absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..+)"
    ): "bitsandbytes, 4 bits",
    re.compile(r"\.(?:SCB|weight\.SCB|weight_format)"): "bitsandbytes, 8 bits",
    re.compile(r"\.weight_(?:scale|scale_inv|scale_2|packed|zero_point)"): "compressed-tensors, fp8 or nvfp4",
    re.compile(r"\.\w+_blocks"): "mxfp4",
    re.compile(r"\.(?:W_q|codebooks|codes)"): "HQQ or AQLM",
    re.compile(r"\.weight[.:_](?:qdata|scale|int_data)"): "torchao",
}
_ENDINGS = re.compile("|".join(f"(?:{pattern.pattern}$)" for pattern in _MARKS))
_NARROW = {DType.F8_E4M3, DType.F8_E5M2, DType.I8, DType.U8, DType.U32, DType.I32}
_FIELDS = ("quantization_config", "compression_config", "quantization")


def base_quantised(base: BaseModel, found: str) -> Finding:
    """That nothing is merged into a quantised base."""
    return Finding(
        code="base_quantised", level=Level.REFUSED, where=base.name, expected="16 or 32 bit weights", found=found,
        advice="merge into the 16-bit base that it was quantised from",
    )  # fmt: skip


def stored_quantised(base: BaseModel) -> str:
    """In what form the base's tensors are quantised, by their names and dtypes; empty text for floats of 16 bits or more."""
    for tensor in base.tensors:
        name = tensor.spec.name
        if _ENDINGS.search(name):
            kind = next(kind for pattern, kind in _MARKS.items() if re.search(f"{pattern.pattern}$", name))
            return f"{name} ({kind})"
        if name.endswith(".weight") and len(tensor.spec.shape) >= 2 and tensor.spec.dtype in _NARROW:
            return f"{name} of {tensor.spec.dtype.long_name}"
    return ""


def said_quantised(config: Mapping[str, Any]) -> str:
    """What a configuration says about quantisation; empty text for nothing."""
    text = config.get("text_config")
    for level, where in ((config, ""), (text if isinstance(text, dict) else {}, "text_config.")):
        for field in _FIELDS:
            if said := level.get(field):
                method = said.get("quant_method") if isinstance(said, dict) else None
                return f"{where}{field} in config.json" + (f" ({method})" if isinstance(method, str) else "")
    return ""
