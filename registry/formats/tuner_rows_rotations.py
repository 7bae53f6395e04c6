"""Tuners that rotate or reflect what goes into a layer or comes out of it: OFT, BOFT, HRA, RoAd."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isqrt

from registry.changes import Option, Tuned
from registry.formats.findings import unsupported
from registry.formats.peft import CONFIG_FILE
from registry.formats.tuner_row import Layout, Made, Row, Settings, Site, fixed
from registry.manifest import Finding

_BEFORE_0_16 = "before 0.16"
_OFT_NEEDS = (0, 18)  # the Neumann series of earlier versions has another last term
_OFT_OLD = "load it with the PEFT that trained it, and merge it there; or train it again with PEFT 0.18 or newer"


def _oft(site: Site) -> Made:
    """Blocks of b inputs each turned by one of `blocks` rotations, or all of them by the only one.

    PEFT merges convolutions of any kernel, but what it computes unmerged is another function than what it merges, unless the kernel is one.
    """
    sizes, settings = site.sizes, site.settings
    if site.layout.name == _BEFORE_0_16:
        raise site.refused("method_not_mergeable", found="OFT with oft_r, as before PEFT 0.16", advice=_OFT_OLD)
    if sizes["in"] != sizes["channels"]:
        raise site.refused("layer_not_mergeable", found=f"OFT on a convolution with a kernel of {list(site.weight.kernel)}",
                           advice="PEFT turns overlapping patches and adds them up, which no weight does: serve it unmerged")  # fmt: skip
    elements, blocks = sizes["elements"], sizes["blocks"]
    side = (1 + isqrt(1 + 8 * elements)) // 2
    parts = sizes["in"] // side
    if (
        side * (side - 1) // 2 != elements
        or parts * side != sizes["in"]
        or blocks != (1 if settings.flag("block_share") else parts)
    ):
        raise site.unfit("shape_mismatch", expected=f"skew matrices above the diagonal for {sizes['in']} inputs",
                         found=f"{blocks} of {elements} elements")  # fmt: skip
    options: dict[str, Option] = {
        "terms": settings.count("num_cayley_neumann_terms") if settings.flag("use_cayley_neumann") else 0,
        "reach": settings.number("eps") if settings.flag("coft") else 0.0,
        "is_embedding": site.layout.name == "embedding",
    }
    (turns,) = site.tensors.values()
    return {"weight": (Tuned(method="oft", tensors={"oft_R": turns}, options=options, transposed=site.is_transposed),)}


def _oft_check(settings: Settings) -> Iterator[Finding]:
    if "oft_block_size" not in settings.values:
        yield unsupported(
            "method_not_mergeable",
            CONFIG_FILE,
            found="OFT without oft_block_size, as before PEFT 0.14",
            advice=_OFT_OLD,
        )
    elif settings.flag("use_cayley_neumann") and _version(settings.text("peft_version")) < _OFT_NEEDS:
        told = settings.text("peft_version") or "no peft_version, as before PEFT 0.18"
        yield unsupported(
            "method_not_mergeable", CONFIG_FILE, found=f"OFT with use_cayley_neumann, {told}"[:120], advice=_OFT_OLD
        )


def _version(text: str) -> tuple[int, int]:
    found = re.match(r"(\d{1,6})\.(\d{1,6})", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _boft(site: Site) -> Made:
    sizes, settings = site.sizes, site.settings
    factors, blocks, side = sizes["factors"], sizes["blocks"], sizes["b"]
    told = {"boft_block_size": side, "boft_block_num": blocks}
    is_told = all(settings.values.get(name) in (0, None, size) for name, size in told.items())
    is_shuffled = factors == 1 or (side % 2 == 0 and blocks % 2 ** (factors - 1) == 0)
    if blocks * side != sizes["in"] or not is_told or not is_shuffled:
        raise site.unfit("shape_mismatch", expected=f"{factors} times blocks for {sizes['in']} inputs, as {CONFIG_FILE} has them",
                         found=f"{blocks} blocks of {side}")  # fmt: skip
    return {"weight": (site.tuned("boft"),)}


def _hra(site: Site) -> Made:
    return {"weight": (site.tuned("hra", options={"is_orthogonal": site.settings.flag("apply_GS")}),)}


def _road(site: Site) -> Made:
    """Outputs are turned, and the bias with them."""
    sizes, settings = site.sizes, site.settings
    variant, group, outputs = settings.text("variant"), settings.count("group_size"), sizes["out"]
    told = {"road_1": outputs // 2, "road_2": outputs, "road_4": 2 * outputs}.get(variant)
    if told is None:
        raise site.refused("option_unknown", found=f"variant={variant!r}"[:120], advice="serve it unmerged")
    if sizes["n"] != told or group % 2 or outputs % group:
        raise site.unfit("shape_mismatch", expected=f"{told} angles, and {outputs} outputs in groups of {group}, says {CONFIG_FILE}",
                         found=f"{sizes['n']} angles")  # fmt: skip
    step = site.tuned("road", options={"group": group})
    steps = {"weight": (step,), "bias": (Tuned(method="road", tensors=step.tensors, options=step.options),)}
    return {kind: found for kind, found in steps.items() if kind in site.base or kind == "weight"}


ROWS = (
    Row(
        peft_type="BOFT",
        layouts=fixed(
            Layout(tensors={"boft_R": ("factors", "blocks", "b", "b"), "boft_s": ("out", 1)}),
            Layout(tensors={"boft_R": ("factors", "blocks", "b", "b"), "boft_s": (1, "out")}, is_convolution=True),
        ),
        make=_boft,
        fields=frozenset({"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "init_weights"}),
    ),
    Row(
        peft_type="HRA",
        layouts=fixed(Layout(tensors={"hra_u": ("in", "r")}, is_convolution=None)),
        make=_hra,
        fields=frozenset({"r", "apply_GS", "init_weights"}),
        ranks={"r": "r"},
    ),
    Row(
        peft_type="OFT",
        layouts=fixed(
            Layout(tensors={"oft_R": ("blocks", "elements")}, is_convolution=None),
            Layout(tensors={"oft_embedding_R": ("blocks", "elements")}, name="embedding"),
            Layout(tensors={"oft_r": ("blocks", "b", "b")}, unused=frozenset({"oft_s"}), name=_BEFORE_0_16, is_convolution=None),
        ),
        make=_oft,
        fields=frozenset({
            "r", "oft_block_size", "module_dropout", "init_weights", "coft", "eps", "block_share", "use_cayley_neumann",
            "num_cayley_neumann_terms",
        }),
        check=_oft_check,
    ),
    Row(
        peft_type="ROAD",
        layouts=fixed(Layout(tensors={"road_theta": ("n",), "road_alpha": ("n",)})),
        make=_road,
        fields=frozenset({"variant", "group_size", "init_weights"}),
    ),
)  # fmt: skip
