"""Quantised bases: known by their configuration or by what their files hold, recorded, and never merged into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from merging import Bench
from safetensors.numpy import load_file, save_file

from registry.errors import Refused
from registry.manifest import Level

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return tiny.write_adapter(tmp_path / "adapter")


def quantise(base: Path, **instead: Any) -> None:
    """Write other tensors instead of a layer's weight; dots in their names are written as `__`."""
    path = base / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"{Q0}.weight"]
    tensors |= {f"{Q0}{name.replace('__', '.')}": array for name, array in instead.items()}
    save_file(tensors, path, {"format": "pt"})


STORED: dict[str, tuple[dict[str, Any], str]] = {
    "GPTQ": ({"__qweight": np.ones((2, 16), np.int32), "__scales": np.ones((1, 16), np.float16)}, "GPTQ or AWQ"),
    "bitsandbytes, 4 bits": (
        {"__weight": np.ones((128, 1), np.uint8), "__weight__absmax": np.ones(4, np.float32)},
        "bitsandbytes, 4 bits",
    ),
    "bitsandbytes, 8 bits": (
        {"__weight": np.ones((16, 16), np.int8), "__SCB": np.ones(16, np.float32)},
        "bitsandbytes, 8 bits",
    ),
    "mxfp4": ({"_blocks": np.ones((4, 8), np.uint8), "_scales": np.ones(4, np.uint8)}, "mxfp4"),
    "fp8 with scales": (
        {"__weight": np.ones((16, 16), np.uint8), "__weight_scale_inv": np.ones((1, 1), np.float32)},
        "compressed-tensors, fp8 or nvfp4",
    ),
    "integers": ({"__weight": np.ones((16, 16), np.int8)}, "of int8"),
}


@pytest.mark.parametrize("kind", STORED)
def test_what_the_files_hold_tells(bench: Bench, adapter: Path, base: Path, kind: str) -> None:
    """The adapter of such a base is recorded: its tensors cannot be compared with packed ones."""
    tensors, told = STORED[kind]
    quantise(base, **tensors)
    findings = bench.findings(adapter, base)
    assert set(findings) == {"base_quantised"}
    assert findings["base_quantised"].fits
    assert findings["base_quantised"].found.startswith(f"{Q0}")
    assert told in findings["base_quantised"].found
    assert "16-bit base" in findings["base_quantised"].advice


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantization_config in config.json (bitsandbytes)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config in config.json (gptq)"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config in config.json (awq)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config in config.json (fp8)"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config in config.json (mxfp4)"),
        ({"text_config": {"quantization_config": {"bits": 4}}}, "text_config.quantization_config in config.json"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization in config.json"),
    ],
)  # fmt: skip
def test_what_the_configuration_says_tells(
    bench: Bench, adapter: Path, tmp_path: Path, config: dict[str, Any], told: str
) -> None:
    base = tiny.write_base(tmp_path / "said", config=config)
    findings = bench.findings(adapter, base)
    assert set(findings) == {"base_quantised"}
    assert findings["base_quantised"].found == told


def test_nothing_is_merged_into_a_quantised_base(bench: Bench, adapter: Path, base: Path, tmp_path: Path) -> None:
    quantise(base, **STORED["bitsandbytes, 4 bits"][0])
    with pytest.raises(Refused) as caught:
        bench.merge(adapter, base, tmp_path / "merged")
    assert [each.code for each in caught.value.report.findings if each.level is Level.REFUSED] == ["base_quantised"]
    assert not (tmp_path / "merged").exists()


def test_scales_and_codes_of_other_kinds_are_no_mark(bench: Bench, adapter: Path, base: Path) -> None:
    """Names that end like marks, in models that are not quantised."""
    path = base / "model.safetensors"
    names = ("model.layer_scale", "model.scales", "model.blocks.0.codes_embedding.weight")
    odd = {name: np.ones((4, 4), np.float32) for name in names}
    save_file({**load_file(path), **odd}, path, {"format": "pt"})
    assert bench.findings(adapter, base) == {}
