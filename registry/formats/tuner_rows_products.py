"""Tuners that add a product of small factors, of whatever kind: AdaLoRA, VeRA, PVeRA, LoHa, LoKr, C3A, MiSS and Bone, SHiRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from registry.changes import Option, Tuned
from registry.errors import CorruptFile
from registry.formats.findings import unsupported, warning
from registry.formats.peft import CONFIG_FILE
from registry.formats.tuner_row import KERNEL, Dimension, Layout, Made, Row, Settings, Site, fixed
from registry.manifest import Finding

_LYCORIS_FIELDS = frozenset({"r", "alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"})
_LYCORIS_PATTERNS = {"r": "rank_pattern", "alpha": "alpha_pattern"}


def _adalora(site: Site) -> Made:
    """Scaled by the rank that training began with; `rank_pattern` tells what pruning has left of it, in the file too."""
    settings = site.settings
    first, alpha, rank = settings.count("init_r"), settings.number("lora_alpha"), site.sizes["r"]
    if rank != (told := _rank_left(site, first)):
        raise site.unfit("rank_mismatch", expected=f"rank {told}, says {CONFIG_FILE}", found=f"rank {rank}")
    return {"weight": (site.tuned("adalora", options={"scale": (alpha if alpha > 0 else first) / (first + 1e-5)}),)}


def _rank_left(site: Site, first: int) -> int:
    kept = site.settings.values.get("rank_pattern") or {}
    if not isinstance(kept, dict) or not all(isinstance(flags, list) for flags in kept.values()):
        raise CorruptFile(CONFIG_FILE, "rank_pattern of AdaLoRA is not a mapping to lists of true and false")
    names = (f"{before}{site.path}.lora_E{after}" for before in ("", "base_model.model.") for after in ("", ".default"))
    return next((sum(map(bool, kept[name])) for name in names if name in kept), first)


def _vera(site: Site) -> Made:
    return _projected(site, "vera", site.settings.count("r"))


def _pvera(site: Site) -> Made:
    """The first half is the mean, which is what merging takes; the other the logarithm of the variance."""
    return _projected(site, "pvera", 2 * site.settings.count("r"))


def _projected(site: Site, method: str, rows: int) -> Made:
    """Shared projections of the file, or those that PEFT would draw: as large as the largest layer of the adapter."""
    settings, sizes, rank = site.settings, site.sizes, site.settings.count("r")
    if sizes["rows"] != rows:
        raise site.unfit(
            "rank_mismatch",
            expected=f"{rows} elements of lambda_d, for r {rank} in {CONFIG_FILE}",
            found=f"{sizes['rows']}",
        )
    tensors = {name: site.tensors[f"{method}_{name}"] for name in ("lambda_b", "lambda_d")}
    options: dict[str, Option] = {}
    if settings.flag("save_projection") or f"{method}_A" in site.shared:
        tensors["A"] = site.of_all(f"{method}_A", (rows, sizes["in"]), at_least=(1,))
        tensors["B"] = site.of_all(f"{method}_B", (sizes["out"], rank), at_least=(0,))
    else:
        options = {"seed": settings.whole("projection_prng_key"), "rank": rank, "dtype": site.base["weight"].spec.dtype.value,
                   "outputs": site.largest[0], "inputs": site.largest[1]}  # fmt: skip
    return {"weight": (Tuned(method="vera", tensors=tensors, options=options, transposed=site.is_transposed),)}


def _vera_check(settings: Settings) -> Iterator[Finding]:
    if not settings.flag("save_projection"):
        yield warning("projection_drawn", CONFIG_FILE, expected="the random projections in the file", found="save_projection=false",
                      advice="drawn again from projection_prng_key, as PEFT does when it loads the adapter")  # fmt: skip
    if settings.flag("sample_at_inference"):
        yield unsupported("option_not_mergeable", CONFIG_FILE, found="sample_at_inference=true: what is added is drawn for each input",
                          advice="serve it unmerged, or set it to false, which leaves the mean")  # fmt: skip


def _loha(site: Site) -> Made:
    return {"weight": (site.tuned("loha", options={"scale": _lycoris_scale(site)}),)}


def _lycoris_scale(site: Site) -> float:
    return site.settings.number("alpha", site.path) / site.settings.count("r", site.path)


def _lokr(site: Site) -> Made:
    """PEFT scales by alpha / r even when neither factor is low-rank."""
    sizes = site.sizes
    inner = sizes["d"] * sizes["c"] if "d" in sizes else sizes["flat"] * sizes["c"]
    if sizes["a"] * sizes["b"] != sizes["out"] or inner != sizes["channels" if "d" in sizes else "in"]:
        raise site.unfit("shape_mismatch", expected=f"factors that make [{sizes['out']}, {sizes['in']}]",
                         found=", ".join(f"{name} {list(tensor.spec.shape)}" for name, tensor in site.tensors.items()))  # fmt: skip
    return {"weight": (site.tuned("lokr", options={"scale": _lycoris_scale(site)}),)}


def _lokr_layouts() -> Iterator[Layout]:
    """Either factor full or low-rank; of a convolution the second has the kernel, flat or as a core of its own."""
    shapes = dict[str, tuple[Dimension, ...]]
    first: list[shapes] = [{"lokr_w1": ("a", "c")}, {"lokr_w1_a": ("a", "r"), "lokr_w1_b": ("r", "c")}]
    pair: shapes = {"lokr_w2_a": ("r", "b"), "lokr_w2_b": ("r", "d")}
    linear: list[shapes] = [{"lokr_w2": ("b", "d")}, {"lokr_w2_a": ("b", "r"), "lokr_w2_b": ("r", "d")}]
    convolution: list[shapes] = [
        {"lokr_w2": ("b", "d", KERNEL)},
        {"lokr_w2_a": ("b", "r"), "lokr_w2_b": ("r", "flat")},
        {"lokr_t2": ("r", "r", KERNEL), **pair},
    ]
    for one in first:
        yield from (Layout(tensors={**one, **two}) for two in linear)
        yield from (Layout(tensors={**one, **two}, is_convolution=True) for two in convolution)


def _c3a(site: Site) -> Made:
    sizes, told = site.sizes, site.settings.count("block_size", site.path)
    if sizes["b"] != told or sizes["p"] * told != sizes["out"] or sizes["q"] * told != sizes["in"]:
        raise site.unfit("shape_mismatch", expected=f"blocks of {told}, says {CONFIG_FILE}, for [{sizes['out']}, {sizes['in']}]",
                         found=f"[{sizes['p']}, {sizes['q']}] of {sizes['b']}")  # fmt: skip
    return {"weight": (site.tuned("c3a"),)}


def _miss_layouts(name: str) -> Callable[[Settings], tuple[Layout, ...]]:
    kinds: dict[str, tuple[Dimension, ...]] = {"bat": ("blocks", "r", "r"), "mini": ("r", "mini_r")}

    def layouts(settings: Settings) -> tuple[Layout, ...]:
        kind = settings.values.get("init_weights")
        return (Layout(tensors={name: kinds.get(str(kind), ("r", "out"))}),)

    return layouts


def _miss(site: Site) -> Made:
    sizes = site.sizes
    rows = sizes["blocks"] * sizes["r"] if "blocks" in sizes else sizes.get("mini_r", sizes["out"])
    is_whole = rows == sizes["out"] and sizes["in"] % sizes["r"] == 0 if "blocks" in sizes else sizes["out"] % rows == 0
    if not is_whole:
        raise site.unfit("shape_mismatch", expected=f"blocks that make [{sizes['out']}, {sizes['in']}]",
                         found=", ".join(str(list(tensor.spec.shape)) for tensor in site.tensors.values()))  # fmt: skip
    (block,) = site.tensors.values()
    method = "miss_bat" if "blocks" in sizes else "miss"
    return {"weight": (Tuned(method=method, tensors={"block": block}, transposed=site.is_transposed),)}


def _shira(site: Site) -> Made:
    """As many values as a LoRA of that rank would have."""
    sizes = site.sizes
    told = site.settings.count("r") * (sizes["in"] + sizes["out"])
    if sizes["n"] != told:
        raise site.unfit("rank_mismatch", expected=f"{told} values, for r in {CONFIG_FILE}", found=f"{sizes['n']}")
    return {"weight": (site.tuned("shira"),)}


def _block_row(peft_type: str, name: str) -> Row:
    return Row(
        peft_type=peft_type,
        layouts=_miss_layouts(name),
        make=_miss,
        fields=frozenset({"r", "mini_r", "miss_dropout", "init_weights"}),
        ranks={"r": "r", "mini_r": "mini_r"},
    )


_LOHA: dict[str, tuple[Dimension, ...]] = {
    f"hada_w{number}_{side}": ("out", "r") if side == "a" else ("r", "in") for number in "12" for side in "ab"
}
_LOHA_CORED: dict[str, tuple[Dimension, ...]] = {
    f"hada_w{number}_{side}": ("r", "out") if side == "a" else ("r", "channels") for number in "12" for side in "ab"
}
_VERA_FIELDS = frozenset({"r", "projection_prng_key", "save_projection", "d_initial", "init_weights"})

ROWS = (
    Row(
        peft_type="ADALORA",
        layouts=fixed(
            Layout(tensors={"lora_A": ("r", "in"), "lora_B": ("out", "r"), "lora_E": ("r", 1)}, is_convolution=None)
        ),
        make=_adalora,
        fields=frozenset({
            "r", "target_r", "init_r", "lora_alpha", "rank_pattern", "lora_dropout", "init_lora_weights", "tinit", "tfinal", "deltaT", "beta1",
            "beta2", "orth_reg_weight", "total_step", "megatron_core", "qalora_group_size", "runtime_config",
        }),
        may_be_empty=True,
    ),
    _block_row("BONE", "bone_block"),  # as MiSS was called before PEFT 0.18
    Row(
        peft_type="C3A",
        layouts=fixed(Layout(tensors={"c3a_kernel": ("p", "q", "b")})),
        make=_c3a,
        fields=frozenset({"block_size", "init_weights"}),
        patterns={"block_size": "block_size_pattern"},
    ),
    Row(
        peft_type="LOHA",
        layouts=fixed(
            Layout(tensors=_LOHA, is_convolution=None),
            Layout(tensors={**_LOHA_CORED, "hada_t1": ("r", "r", KERNEL), "hada_t2": ("r", "r", KERNEL)}, is_convolution=True),
            Layout(tensors={**_LOHA_CORED, "hada_t1": ("r", "r", KERNEL, 1), "hada_t2": ("r", "r", KERNEL, 1)}, is_convolution=True),
        ),
        make=_loha,
        fields=_LYCORIS_FIELDS,
        patterns=_LYCORIS_PATTERNS,
        ranks={"r": "r"},
    ),
    Row(
        peft_type="LOKR",
        layouts=fixed(*_lokr_layouts()),
        make=_lokr,
        fields=_LYCORIS_FIELDS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
        patterns=_LYCORIS_PATTERNS,
        ranks={"r": "r"},
    ),
    _block_row("MISS", "miss_block"),
    Row(
        peft_type="PVERA",
        layouts=fixed(Layout(tensors={"pvera_lambda_b": ("out",), "pvera_lambda_d": ("rows",)})),
        make=_pvera,
        fields=_VERA_FIELDS | {"pvera_dropout", "sample_at_inference", "generator_seed"},
        shared="pvera_[AB]",
        check=_vera_check,
    ),
    Row(
        peft_type="SHIRA",
        layouts=fixed(Layout(tensors={"shira_weight": ("n",), "shira_indices": (2, "n")})),
        make=_shira,
        fields=frozenset({"r", "mask_type", "random_seed", "init_weights"}),
        places="shira_indices",
        are_places_small=True,  # PEFT saves them so on Windows
    ),
    Row(
        peft_type="VERA",
        layouts=fixed(Layout(tensors={"vera_lambda_b": ("out",), "vera_lambda_d": ("rows",)})),
        make=_vera,
        fields=_VERA_FIELDS | {"vera_dropout"},
        shared="vera_[AB]",
        check=_vera_check,
    ),
)  # fmt: skip
