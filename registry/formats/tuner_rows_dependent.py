"""Tuners whose change depends on the weight that they change: HiRA, GLoRA, DEFT, PEANuT, OSF, FRoD."""

from __future__ import annotations

from collections.abc import Iterator

from registry.changes import Option, Tuned
from registry.errors import CorruptFile
from registry.formats.findings import unsupported
from registry.formats.peft import CONFIG_FILE
from registry.formats.tuner_row import KERNEL, ONES, Dimension, Layout, Made, Row, Settings, Site, fixed
from registry.manifest import Finding

_MAX_DEPTH = 1000
# Activations without parameters of their own, by transformers' names; `registry.merge.tuners.dependent` computes them.
ACTIVATIONS = frozenset({
    "relu", "relu2", "relu6", "leaky_relu", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh",
    "quick_gelu", "silu", "swish", "mish", "sigmoid", "tanh", "linear",
})  # fmt: skip


def _hira(site: Site) -> Made:
    """PEFT 0.21 passes over `rank_pattern`: a rank is right if either field says it."""
    told = {site.settings.count("r"), site.settings.count("r", site.path)}
    if site.sizes["r"] not in told:
        raise site.unfit("rank_mismatch", expected=f"r {min(told)}, says {CONFIG_FILE}", found=str(site.sizes["r"]))
    return {"weight": (site.tuned("hira"),)}


# -- GLoRA

_GLORA_WITH_BIAS = "with a bias"
_GLORA_WEIGHT: dict[str, dict[str, tuple[Dimension, ...]]] = {
    "lora": {"Xd": ("out", "r"), "Xu": ("r", "in")}, "vector": {"X": ("out", 1)}, "constant": {"X": (1,)}, "none": {"zeros": ("out", "in")},
}  # fmt: skip
_GLORA_INPUT: dict[str, dict[str, tuple[Dimension, ...]]] = {
    "lora": {"Xd": ("in", "r"), "Xu": ("r", 1)}, "vector": {"X": ("in", 1)}, "none": {"zeros": ("in", 1)},
}  # fmt: skip
_GLORA_BIAS: dict[str, dict[str, tuple[Dimension, ...]]] = {
    "vector": {"X": ("out",)}, "constant": {"X": (1,)}, "none": {"zeros": ("out",)},
}  # fmt: skip


def _glora_layouts(settings: Settings) -> tuple[Layout, ...]:
    """A and B are of the weight; C, D and E of the bias, and zeros where the layer has none."""
    try:
        weight = _GLORA_WEIGHT[settings.text("config_A_B")]
        inputs, bias = _GLORA_INPUT[settings.text("config_C")], _GLORA_BIAS[settings.text("config_D_E")]
    except KeyError as error:
        raise CorruptFile(CONFIG_FILE, f"config_A_B, config_C or config_D_E is {error}") from error
    both = {f"glora_{side}.{name}": dimensions for side in "AB" for name, dimensions in weight.items()}
    of_bias = {f"glora_C.{name}": dimensions for name, dimensions in inputs.items()}
    of_bias |= {f"glora_{side}.{name}": dimensions for side in "DE" for name, dimensions in bias.items()}
    without = Layout(tensors=both, unused=frozenset(f"glora_{side}.zeros" for side in "CDE"))
    trains_bias = not all(name.endswith(".zeros") for name in of_bias)
    return (Layout(name=_GLORA_WITH_BIAS, tensors={**both, **of_bias}), without) if trains_bias else (without,)


def _glora(site: Site) -> Made:
    """`W + W ∘ A + B`; `b + b ∘ D + E + W C`, whose W is the base's."""
    names = sorted(name for name in site.tensors if name.startswith(("glora_A.", "glora_B.")))
    made: dict[str, tuple[Tuned, ...]] = {"weight": (site.tuned("glora", *names),)}
    with_bias, has_bias = site.layout.name == _GLORA_WITH_BIAS, "bias" in site.base
    if with_bias != has_bias and site.settings.text("config_C") + site.settings.text("config_D_E") != "nonenone":
        raise site.unfit("no_base_tensor", expected="a layer with a bias" if with_bias else "a layer without a bias",
                         found="a bias" if has_bias else "none")  # fmt: skip
    if with_bias:
        rest = {name: tensor for name, tensor in site.tensors.items() if name not in names}
        made["bias"] = (Tuned(method="glora_bias", tensors=rest, base={"W": site.base["weight"]}),)
    return made


# -- products with the weight


def _deft(site: Site) -> Made:
    settings, rank = site.settings, site.sizes["r"]
    told = min(settings.count("r"), site.sizes["out"])
    if rank != told or settings.flag("para") == ("deft_R" in site.tensors):
        raise site.unfit("rank_mismatch", expected=f"P of rank {told}, and R unless para is set, says {CONFIG_FILE}",
                         found=f"{', '.join(site.tensors)} of rank {rank}")  # fmt: skip
    scale = settings.number("alpha") / rank if settings.values.get("alpha") else 1.0
    options: dict[str, Option] = {"method": settings.text("decomposition_method"), "scale": scale}
    return {"weight": (site.tuned("deft", options=options),)}


def _deft_check(settings: Settings) -> Iterator[Finding]:
    method = settings.text("decomposition_method")
    if method not in ("relu", "qr"):
        yield unsupported("option_unknown", CONFIG_FILE, found=f"decomposition_method={method!r}"[:120],
                          advice="a newer PEFT? upgrade ckpt-registry")  # fmt: skip


def _peanut_layouts(settings: Settings) -> tuple[Layout, ...]:
    depth = settings.whole("depth")
    if not 0 <= depth <= _MAX_DEPTH:
        raise CorruptFile(CONFIG_FILE, f"depth is {depth}")
    inner: dict[str, tuple[Dimension, ...]] = {
        f"peanut_{kind}.{level}.weight": ("r", "r") for kind in ("encoders", "decoders") for level in range(depth)
    }
    return (Layout(tensors={"peanut_A": ("r", "out"), "peanut_B": ("out", "r"), **inner}),)


def _peanut(site: Site) -> Made:
    options: dict[str, Option] = {
        "activation": site.settings.text("act_fn"),
        "scaling": site.settings.number("scaling"),
    }
    return {"weight": (site.tuned("peanut", options=options),)}


def _peanut_check(settings: Settings) -> Iterator[Finding]:
    activation = settings.text("act_fn")
    if activation not in ACTIVATIONS:
        yield unsupported("option_not_mergeable", CONFIG_FILE, found=f"act_fn={activation!r}"[:120],
                          advice=f"merged are those with {', '.join(sorted(ACTIVATIONS))}; serve it unmerged")  # fmt: skip


# -- decompositions of the weight


def _osf(site: Site) -> Made:
    """How many singular values stay is what the file's lack of all; the configuration is only compared, where it has one number for all."""
    smaller = min(site.sizes["out"], site.sizes["in"])
    kept, told = smaller - site.sizes["n"], site.settings.values.get("effective_rank")
    if not site.settings.values.get("rank_pattern") and kept != _osf_rank(site.settings, smaller):
        raise site.unfit(
            "rank_mismatch", expected=f"effective_rank {told}, says {CONFIG_FILE}", found=f"{kept} of {smaller}"
        )
    return {"weight": (site.tuned("osf", options={"dtype": site.base["weight"].spec.dtype.long_name}),)}


def _osf_rank(settings: Settings, smaller: int) -> int:
    """A number, a share of the smaller side, or half of it."""
    told = settings.values.get("effective_rank")
    if told is None:
        return smaller // 2
    value = settings.number("effective_rank")
    return max(0, min(smaller, int(smaller * value if isinstance(told, float) and 0 < value <= 1 else value)))


def _frod(site: Site) -> Made:
    category = _frod_category(site.path)
    names = [f"frod_{name}.{category}" for name in ("V", "s_indices", "s_size")]
    missing = [name for name in names if name not in site.shared]
    if missing:
        raise site.unfit("missing_factor", expected=", ".join(missing), found="none in the file")
    vectors, indices, size = (site.shared[name] for name in names)
    inner, entries = site.sizes["in"], site.sizes["n"]
    if (vectors.spec.shape, indices.spec.shape, size.spec.shape) != ((inner, inner), (2, entries), (2,)):
        raise site.unfit("shape_mismatch", expected=f"V [{inner}, {inner}] and {entries} indices",
                         found=f"{list(vectors.spec.shape)} and {list(indices.spec.shape)}")  # fmt: skip
    return {"weight": (site.tuned("frod", frod_V=vectors, frod_s_indices=indices, frod_s_size=size),)}


def _frod_category(path: str) -> str:
    """What modules of the same place in different layers share, as `peft.tuners.frod.model` has it."""
    *_, above, parent, name = ("", "", *path.split("."))
    if not parent or parent.isdigit():
        return name
    return "attention_output" if (above, parent, name) == ("attention", "output", "dense") else f"{parent}_{name}"


def _frod_check(settings: Settings) -> Iterator[Finding]:
    if not settings.flag("save_projection"):
        yield unsupported("option_not_mergeable", CONFIG_FILE, found="save_projection=false: the shared bases are not in the file",
                          advice="load it where it was trained, set save_projection, and save it again; or serve it unmerged")  # fmt: skip


ROWS = (
    Row(
        peft_type="DEFT",
        layouts=fixed(Layout(tensors={"deft_P": ("out", "r")}, optional={"deft_R": ("r", "in")})),
        make=_deft,
        fields=frozenset({"r", "decomposition_method", "init_scale", "alpha", "para", "deft_dropout", "init_weights"}),
        check=_deft_check,
    ),
    Row(
        peft_type="FROD",
        layouts=fixed(Layout(tensors={"frod_lambda_l": ("in",), "frod_lambda_s_values": ("n",)})),
        make=_frod,
        fields=frozenset({
            "projection_prng_key", "save_projection", "frod_dropout", "sparse_rate", "regularization_alpha", "progressbar",
            "runtime_offload_base_weight", "init_weights",
        }),
        shared=r"frod_(?:V|s_indices|s_size)\..+",
        check=_frod_check,
        places=r"frod_(?:s_indices|s_size)\..+",
    ),
    Row(
        peft_type="GLORA",
        layouts=_glora_layouts,
        make=_glora,
        fields=frozenset({"r", "config_A_B", "config_C", "config_D_E", "init_weights"}),
        ranks={"r": "r"},
    ),
    Row(
        peft_type="HIRA",
        layouts=fixed(
            Layout(tensors={"hira_A": ("r", "in"), "hira_B": ("out", "r")}),
            Layout(tensors={"hira_A": ("r", "channels", KERNEL), "hira_B": ("out", "r", ONES)}, is_convolution=True),
            Layout(tensors={"hira_embedding_A": ("r", "out"), "hira_embedding_B": ("in", "r")}),
        ),
        make=_hira,
        fields=frozenset({"r", "hira_dropout", "init_weights"}),
        patterns={"r": "rank_pattern"},
    ),
    Row(
        peft_type="OSF",
        layouts=fixed(
            Layout(
                tensors={
                    "osf_svd_params.U_low": ("out", "n"),
                    "osf_svd_params.S_low": ("n",),
                    "osf_svd_params.V_low": ("n", "in"),
                }
            )
        ),
        make=_osf,
        fields=frozenset({"effective_rank", "rank_pattern", "target_svd_config", "init_weights"}),
    ),
    Row(
        peft_type="PEANUT",
        layouts=_peanut_layouts,
        make=_peanut,
        fields=frozenset({"r", "depth", "act_fn", "scaling", "init_weights"}),
        ranks={"r": "r"},
        check=_peanut_check,
    ),
)  # fmt: skip
