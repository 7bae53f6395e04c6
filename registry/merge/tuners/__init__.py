"""The arithmetic of every PEFT tuner that is not a plain low-rank sum, by the name in `registry.changes.Tuned.method`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from registry.changes import Option
from registry.merge.tuners import assembled, dependent, lora, products, rotations, scalings, spectral
from registry.merge.tuners.litgpt import scaled_rows
from registry.merge.weight import Weight

# Gets the tuner's tensors by name (float64; integer tensors in their own dtype), its options, and the weight before; gives the weight after.
Tuner = Callable[[Mapping[str, Tensor], Mapping[str, Option], Weight], Weight]
TUNERS: dict[str, Tuner] = {
    "adalora": products.adalora,
    "adapter_v2": scaled_rows,
    "add": lora.add,
    "boft": rotations.boft,
    "c3a": products.c3a,
    "deft": dependent.deft,
    "delora": assembled.delora,
    "dora": lora.dora,
    "dora_embedding": lora.dora_embedding,
    "fourierft": spectral.fourierft,
    "frod": dependent.frod,
    "glora": dependent.glora,
    "glora_bias": dependent.glora_bias,
    "hira": dependent.hira,
    "hra": rotations.hra,
    "ia3": scalings.ia3,
    "kasa": lora.kasa,
    "loha": products.loha,
    "lokr": products.lokr,
    "miss": products.miss,
    "miss_bat": products.miss_bat,
    "oft": rotations.oft,
    "osf": dependent.osf,
    "peanut": dependent.peanut,
    "randlora": assembled.randlora,
    "road": rotations.road,
    "rows": lora.put_rows,
    "shira": products.shira,
    "supertuning": assembled.supertuning,
    "tinylora": assembled.tinylora,
    "unilora": assembled.unilora,
    "vblora": assembled.vblora,
    "vera": products.vera,
    "waveft": spectral.waveft,
}
