"""Tuners that multiply what goes into a layer or comes out of it, or that train its own parameters: IA3, LN tuning."""

from __future__ import annotations

from registry.changes import Tuned
from registry.errors import CorruptFile
from registry.formats.patterns import Pattern
from registry.formats.peft import CONFIG_FILE
from registry.formats.tuner_row import KERNEL, ONES, Layout, Made, Row, Site, fixed


def _ia3(site: Site) -> Made:
    """Outputs are scaled, and the bias with them; of layers that the configuration calls feed-forward the inputs, and not the bias."""
    is_input = _is_feedforward(site)
    scale, told = site.tensors["ia3_l"], site.weight.channels if is_input else site.weight.out
    shape = (1, told, *(1 for _ in site.weight.kernel)) if is_input or site.weight.kernel else (told, 1)
    if scale.spec.shape != shape:
        raise site.unfit("shape_mismatch", expected=f"ia3_l as {list(shape)}, as feedforward_modules has it",
                         found=f"{list(scale.spec.shape)}")  # fmt: skip
    step = site.tuned("ia3", options={"side": "inputs" if is_input else "outputs"})
    if is_input or "bias" not in site.base:
        return {"weight": (step,)}
    return {"weight": (step,), "bias": (Tuned(method="ia3", tensors=step.tensors, options=step.options),)}


def _is_feedforward(site: Site) -> bool:
    """As in PEFT: of a list, a name may be the end of a name."""
    value = site.settings.values.get("feedforward_modules") or []
    if isinstance(value, str):
        pattern = Pattern.compile(value)
        if pattern is None:
            raise site.refused(
                "pattern_invalid", found=f"feedforward_modules: {value[:100]!r}", advice="write plain module names"
            )
        return pattern.matches(site.path)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CorruptFile(CONFIG_FILE, f"feedforward_modules is {value!r}, expected text or a list of names")
    return site.path.endswith(tuple(value))


def _ln_tuning(site: Site) -> Made:
    """Trained copies of the module's own parameters."""
    return {name.rpartition(".")[2]: tensor for name, tensor in site.tensors.items()}


_LN_BIAS = {"ln_tuning_layers.bias": ("out",)}

ROWS = (
    Row(
        peft_type="IA3",
        layouts=fixed(
            Layout(tensors={"ia3_l": ("out", 1)}),
            Layout(tensors={"ia3_l": (1, "in")}),
            Layout(tensors={"ia3_l": (1, "scaled", ONES)}, is_convolution=True),
        ),
        make=_ia3,
        fields=frozenset({"feedforward_modules", "init_ia3_weights"}),
    ),
    Row(
        peft_type="LN_TUNING",
        layouts=fixed(
            Layout(tensors={"ln_tuning_layers.weight": ("out",)}, optional=_LN_BIAS),
            Layout(
                tensors={"ln_tuning_layers.weight": ("out", "channels", KERNEL)}, optional=_LN_BIAS, is_convolution=None
            ),
        ),
        make=_ln_tuning,
        trains_vectors=True,
    ),
)
