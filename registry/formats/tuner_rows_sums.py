"""Tuners that add to a weight something that is made without it.

DeLoRA, GraLoRA, RandLoRA, VB-LoRA, Uni-LoRA, TinyLoRA, Super-Tuning, FourierFT, WaveFT, BEFT.
"""

from __future__ import annotations

from collections.abc import Iterator

from registry.changes import LowRank, Matrix, Option, Tuned
from registry.formats.findings import unsupported
from registry.formats.peft import CONFIG_FILE
from registry.formats.tuner_row import Layout, Made, Row, Settings, Site, fixed
from registry.manifest import Finding

# Those that PEFT 0.21 can train with: it names more, and has no filters for them.
_WAVELETS = frozenset({
    *(f"db{order}" for order in range(1, 11)), *(f"sym{order}" for order in range(2, 11)), *(f"coif{order}" for order in range(1, 5)),
})  # fmt: skip


def _saved(field: str, what: str) -> Iterator[Finding]:
    """The refusal of an adapter without numbers that were drawn in training."""
    yield unsupported("option_not_mergeable", CONFIG_FILE, found=f"{field}=false: {what} not in the file",
                      advice=f"load it where it was trained, set {field}, and save it again; or serve it unmerged")  # fmt: skip


# -- low-rank products


def _delora(site: Site) -> Made:
    return {"weight": (site.tuned("delora"),)}


def _gralora(site: Site) -> Made:
    """`scale * B_jnᵀ A_njᵀ` for each of k * k blocks, all of them views of A `[k, in / k, r]` and B `[k, r, out / k]`.

    Block (j, n) has output part j and input part n. Of A's part n it takes the j-th r / k columns, of B's part j the n-th r / k rows.
    """
    sizes, settings = site.sizes, site.settings
    parts, rank, inputs, outputs = sizes["k"], sizes["r"], sizes["inputs"], sizes["outputs"]
    if parts * inputs != sizes["in"] or parts * outputs != sizes["out"] or rank % parts:
        raise site.unfit("shape_mismatch", expected=f"{parts} blocks of equal size for [{sizes['out']}, {sizes['in']}] and the rank",
                         found=f"blocks [{outputs}, {inputs}], rank {rank}")  # fmt: skip
    general, told = sizes.get("h", 0), settings.whole("hybrid_r")
    if general != told:
        raise site.unfit("rank_mismatch", expected=f"hybrid_r {told}, says {CONFIG_FILE}", found=str(general))
    scale, part = settings.number("alpha") / (rank + general), rank // parts
    a, b = site.tensors["gralora_A"], site.tensors["gralora_B"]
    steps: list[LowRank] = []
    for j in range(parts):
        for n in range(parts):
            left = Matrix(
                tensor=b,
                rows=outputs,
                columns=part,
                row_step=1,
                column_step=outputs,
                offset=(j * rank + n * part) * outputs,
            )
            right = Matrix(
                tensor=a, rows=part, columns=inputs, row_step=1, column_step=rank, offset=n * inputs * rank + j * part
            )
            steps.append(site.low_rank(left, right, scale, row=j * outputs, column=n * inputs))
    if general:
        of = {name: Matrix.of(site.tensors[name]) for name in ("gralora_A_general", "gralora_B_general")}
        steps.append(site.low_rank(of["gralora_B_general"], of["gralora_A_general"], scale))
    return {"weight": tuple(steps)}


def _randlora(site: Site) -> Made:
    rank, bases, small = site.sizes["r"], site.sizes["bases"], site.sizes["small"]
    if small != min(site.sizes["out"], site.sizes["in"]) or bases != -(-small // rank):
        raise site.unfit("shape_mismatch", expected="bases that fill the smaller side of the weight",
                         found=f"{bases} of rank {rank} for {small}")  # fmt: skip
    large = max(site.sizes["out"], site.sizes["in"])
    shared = {
        "randlora_A": site.of_all("randlora_A", (rank, 1, small), at_least=(2,)),
        "randlora_B": site.of_all("randlora_B", (large, bases, rank), at_least=(0, 1)),
    }
    options = {"scale": site.settings.number("randlora_alpha") / rank}
    return {"weight": (site.tuned("randlora", options=options, **shared),)}


def _randlora_check(settings: Settings) -> Iterator[Finding]:
    if not settings.flag("save_projection"):
        yield from _saved("save_projection", "the random bases are")


def _vblora(site: Site) -> Made:
    sizes, settings = site.sizes, site.settings
    length, vectors, topk = settings.count("vector_length"), settings.count("num_vectors"), settings.count("topk")
    bank = site.of_all("vblora_vector_bank", (vectors, length))
    if sizes["a"] * length != sizes["in"] or sizes["b"] * length != sizes["out"]:
        raise site.unfit("shape_mismatch", expected=f"[{sizes['out']}, {sizes['in']}] in pieces of {length}",
                         found=f"{sizes['b']} and {sizes['a']} pieces")  # fmt: skip
    told = vectors if "vectors" in sizes else topk
    if sizes.get("vectors", sizes.get("k")) != told or sizes.get("others", topk - 1) != topk - 1:
        raise site.unfit("shape_mismatch", expected=f"num_vectors {vectors} and topk {topk}, says {CONFIG_FILE}",
                         found=f"{sizes.get('vectors', sizes.get('k'))}")  # fmt: skip
    return {"weight": (site.tuned("vblora", options={"topk": topk}, vblora_vector_bank=bank),)}


def _unilora(site: Site) -> Made:
    theta = site.of_all("unilora_theta_d", (site.settings.count("theta_d_length"),))
    return {"weight": (site.tuned("unilora", unilora_theta_d=theta),)}


def _unilora_check(settings: Settings) -> Iterator[Finding]:
    if not settings.flag("save_indices"):
        yield from _saved("save_indices", "the drawn indices are")


def _tinylora(site: Site) -> Made:
    """The numbers are shared by groups of layers; which group a layer is in, the arithmetic finds out."""
    sizes, settings = site.sizes, site.settings
    rank = min(settings.count("r"), sizes["out"], sizes["in"])
    if sizes["r"] != rank or sizes["u"] != settings.count("u"):
        raise site.unfit("rank_mismatch", expected=f"r {rank} and u {settings.count('u')}, says {CONFIG_FILE}",
                         found=f"r {sizes['r']} and u {sizes['u']}")  # fmt: skip
    groups = max(1, round(site.modules * (1.0 - settings.number("weight_tying"))))
    if len(site.shared) != groups:
        raise site.unfit(
            "missing_factor", expected=f"{groups} shared vectors for {site.modules} layers", found=f"{len(site.shared)}"
        )
    vectors = {f"tinylora_v.{group}": site.of_all(f"tinylora_v.{group}", (sizes["u"],)) for group in range(groups)}
    options = {"seed": settings.whole("projection_seed"), "layers": site.modules}
    return {"weight": (site.tuned("tinylora", options=options, **vectors),)}


def _tinylora_check(settings: Settings) -> Iterator[Finding]:
    if not settings.flag("save_projection"):
        yield from _saved("save_projection", "the drawn projections are")


# -- single elements, transforms, biases


def _supertuning(site: Site) -> Made:
    sparse = site.tuned("supertuning", "supertuning_values", "supertuning_indices")
    rank, found = site.settings.values.get("r"), site.sizes.get("r")
    if rank != found:
        raise site.unfit("rank_mismatch", expected=f"r {rank}, says {CONFIG_FILE}", found=f"{found}")
    if rank is None:
        return {"weight": (sparse,)}
    left, right = (Matrix.of(site.tensors[f"supertuning_lora_{side}"]) for side in "BA")
    return {"weight": (sparse, site.low_rank(left, right, site.settings.number("lora_alpha") / rank))}


def _supertuning_check(settings: Settings) -> Iterator[Finding]:
    if not settings.flag("save_precomputed_indices"):
        yield from _saved("save_precomputed_indices", "the places of the values are")


def _fourierft(site: Site) -> Made:
    options = {"seed": site.settings.whole("random_loc_seed"), "scaling": site.settings.number("scaling")}
    _check_frequencies(site)
    return {"weight": (site.tuned("fourierft", options=options),)}


def _waveft(site: Site) -> Made:
    settings = site.settings
    wavelet = settings.text("wavelet_family") if settings.flag("use_idwt") else ""
    if not settings.flag("proportional_parameters"):
        _check_frequencies(site)
    options: dict[str, Option] = {
        "seed": settings.whole("random_loc_seed"), "scaling": settings.number("scaling"), "wavelet": wavelet,
    }  # fmt: skip
    return {"weight": (site.tuned("waveft", options=options),)}


def _check_frequencies(site: Site) -> None:
    found, told = site.sizes["n"], site.settings.count("n_frequency", site.path)
    if found != told or found > site.sizes["out"] * site.sizes["in"]:
        raise site.unfit("shape_mismatch", expected=f"n_frequency {told}, says {CONFIG_FILE}", found=f"{found}")


def _waveft_check(settings: Settings) -> Iterator[Finding]:
    wavelet = settings.text("wavelet_family")
    if settings.flag("use_idwt") and wavelet not in _WAVELETS:
        yield unsupported("option_not_mergeable", CONFIG_FILE, found=f"wavelet_family={wavelet!r}"[:120],
                          advice=f"PEFT 0.21 has filters for {', '.join(sorted(_WAVELETS))}; serve it unmerged")  # fmt: skip


def _beft(site: Site) -> Made:
    if "bias" not in site.base:
        raise site.refused("layer_not_mergeable", found="a trained bias for a layer of the base that has none",
                           advice="the model has no place for it: serve it unmerged")  # fmt: skip
    value = {"value": site.tensors["beft_bias"]}
    return {"bias": (Tuned(method="add", tensors=value, options={"scale": 1.0}),)}


ROWS = (
    Row(
        peft_type="BEFT",
        layouts=fixed(Layout(tensors={"beft_bias": (1, "out")})),
        make=_beft,
        fields=frozenset({"init_weights"}),
    ),
    Row(
        peft_type="DELORA",
        layouts=fixed(
            Layout(tensors={"delora_A": ("r", "in"), "delora_B": ("out", "r"), "delora_lambda": (1,), "delora_w_norm": ("in",)})
        ),
        make=_delora,
        fields=frozenset({"r", "delora_lambda", "lambda_pattern", "module_dropout", "init_weights"}),
        patterns={"r": "rank_pattern"},
        ranks={"r": "r"},
    ),
    Row(
        peft_type="FOURIERFT",
        layouts=fixed(Layout(tensors={"fourierft_spectrum": ("n",)})),
        make=_fourierft,
        fields=frozenset({"n_frequency", "scaling", "random_loc_seed", "init_weights"}),
        patterns={"n_frequency": "n_frequency_pattern"},
    ),
    Row(
        peft_type="GRALORA",
        layouts=fixed(
            Layout(
                tensors={"gralora_A": ("k", "inputs", "r"), "gralora_B": ("k", "r", "outputs")},
                optional={"gralora_A_general": ("h", "in"), "gralora_B_general": ("out", "h")},
            )
        ),
        make=_gralora,
        fields=frozenset({"r", "hybrid_r", "alpha", "gralora_dropout", "gralora_k", "init_weights"}),
        ranks={"r": "r", "k": "gralora_k"},
    ),
    Row(
        peft_type="RANDLORA",
        layouts=fixed(
            Layout(
                tensors={"randlora_lambda": ("r", "bases"), "randlora_gamma": ("bases", "small")},
                unused=frozenset({"randlora_A", "randlora_B"}),  # copies of the shared ones
            )
        ),
        make=_randlora,
        fields=frozenset({
            "r", "projection_prng_key", "save_projection", "sparse", "very_sparse", "randlora_dropout", "randlora_alpha", "init_weights",
        }),
        ranks={"r": "r"},
        shared="randlora_[AB]",
        check=_randlora_check,
    ),
    Row(
        peft_type="SUPERTUNING",
        layouts=fixed(
            Layout(
                tensors={"supertuning_values": ("n",), "supertuning_indices": ("n",)},
                optional={"supertuning_lora_A": ("r", "in"), "supertuning_lora_B": ("out", "r")},
            )
        ),
        make=_supertuning,
        fields=frozenset({"sparsity", "select_top", "r", "lora_alpha", "lora_dropout", "save_precomputed_indices", "init_weights"}),
        check=_supertuning_check,
        places="supertuning_indices",
    ),
    Row(
        peft_type="TINYLORA",
        layouts=fixed(Layout(tensors={"tinylora_A": ("r", "in"), "tinylora_B": ("out", "r"), "tinylora_P": ("u", "r", "r")})),
        make=_tinylora,
        fields=frozenset({
            "r", "u", "weight_tying", "projection_seed", "save_projection", "init_v_bound", "tinylora_dropout", "init_weights",
        }),
        shared=r"tinylora_v\.\d+",
        check=_tinylora_check,
    ),
    Row(
        peft_type="UNILORA",
        layouts=fixed(
            Layout(
                tensors={
                    "unilora_indices_A": ("r", "in"),
                    "unilora_indices_B": ("out", "r"),
                    "unilora_scales_A": ("r", "in"),
                    "unilora_scales_B": ("out", "r"),
                }
            )
        ),
        make=_unilora,
        fields=frozenset({
            "r", "proj_seed", "theta_d_length", "unilora_dropout", "init_theta_d_bound", "save_indices", "init_weights",
        }),
        ranks={"r": "r"},
        shared="unilora_theta_d",
        check=_unilora_check,
        places="unilora_indices_[AB]",
    ),
    Row(
        peft_type="VBLORA",
        layouts=fixed(
            Layout(tensors={"vblora_logits_A": ("r", "a", "vectors"), "vblora_logits_B": ("b", "r", "vectors")}),
            Layout(
                tensors={
                    "vblora_logits_A_topk_indices": ("r", "a", "k"),
                    "vblora_logits_A_topk_weights": ("r", "a", "others"),
                    "vblora_logits_B_topk_indices": ("b", "r", "k"),
                    "vblora_logits_B_topk_weights": ("b", "r", "others"),
                }
            ),
        ),
        make=_vblora,
        fields=frozenset({
            "r", "num_vectors", "vector_length", "topk", "save_only_topk_weights", "vblora_dropout", "init_vector_bank_bound",
            "init_logits_std",
        }),
        ranks={"r": "r"},
        shared="vblora_vector_bank",
        may_be_empty=True,  # the weights, where there is one vector in each mixture
        places="vblora_logits_[AB]_topk_indices",
    ),
    Row(
        peft_type="WAVEFT",
        layouts=fixed(Layout(tensors={"waveft_spectrum": ("n",)})),
        make=_waveft,
        fields=frozenset({
            "n_frequency", "scaling", "wavelet_family", "use_idwt", "random_loc_seed", "proportional_parameters", "init_weights",
        }),
        patterns={"n_frequency": "n_frequency_pattern"},
        check=_waveft_check,
    ),
)  # fmt: skip
