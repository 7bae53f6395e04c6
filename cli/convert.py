"""`ckpt convert`, `extract`: adapters and models in another layout, and adapters out of whole models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import output, views
from cli.options import Json
from registry import connect
from registry.errors import InvalidInput
from registry.manifest import BaseFormat
from registry.tensors import DType

if TYPE_CHECKING:
    from registry.extracting import Extraction
    from registry.rearranging import Conversion
    from registry.separating import Separation

_LAYOUTS = {"peft": BaseFormat.SAFETENSORS, "hf": BaseFormat.SAFETENSORS, "litgpt": BaseFormat.LITGPT}
_SHOWN = 10

Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Write it there, into a new folder.")]
As = Annotated[str, typer.Option("--as", metavar="NAME", help="Record it in the registry under this name.")]


def convert(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF", help="A checkpoint, a merged model's digest, a base model's name, or a model's folder."
        ),
    ],
    to: Annotated[str, typer.Option(metavar="LAYOUT", help="peft (or hf, for a whole model) or litgpt.")],
    out: Out = None,
    name: As = "",
    base: Annotated[
        str,
        typer.Option(
            metavar="REF",
            help="An adapter's base model in that layout. Default: the registered one with the same weights.",
        ),
    ] = "",
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The model's config.json or model_config.yaml. Default: made from the other."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Carry an adapter between PEFT and litgpt, or a whole model between transformers and litgpt.

    Values are moved, not computed with. The result is read back and compared with its source, by the merged weights, before it is published;
    what cannot be said in the other layout is refused. A whole model needs --out; with --as it becomes a base model.

    ckpt convert bot@v3 --to peft --as bot-peft

    ckpt convert 3f9c2a7 --to hf --out merged-hf
    """
    from registry.rearranging import Wanted  # noqa: PLC0415 - keeps `ckpt --help` light

    if to not in _LAYOUTS:
        raise InvalidInput("--to", to, "expected peft, hf or litgpt")
    wanted = Wanted(layout=_LAYOUTS[to], out=_folder(out), name=name, base=base, config=config)
    with connect() as registry, output.progress() as progress:
        found = registry.convert(ref, wanted, progress)
    if json:
        output.print_json(_conversion_json(found))
    else:
        _print_conversion(ref, found)


def _folder(out: Path | None) -> Path | None:
    return None if out is None else out.expanduser().absolute()


def _conversion_json(found: Conversion) -> dict[str, Any]:
    return {
        "place": found.place or None,
        "tensors": found.tensors,
        "compared": found.compared,
        "exact": found.exact,
        "difference": found.difference,
        "checkpoint": views.checkpoint_json(found.registered.checkpoint) if found.registered else None,
        "base": views.base_json(found.base, whole=False) if found.base else None,
    }


def _print_conversion(ref: str, found: Conversion) -> None:
    name = found.registered.checkpoint.ref if found.registered else found.base.name if found.base else found.place
    same = "all the same" if found.exact else f"the change differs by {found.difference:.1g} of itself"
    output.print_line(f"converted {ref} to {name}: {found.tensors} tensors, {found.compared:,} values compared, {same}")
    if found.place and name != found.place:
        output.say(f"written to {output.plain(found.place)}")
    if not found.exact:
        output.say("scales that are no powers of two had to go into the factors, which are rounded to float32")


def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model: name, digest or folder.")] = "",
    tuned: Annotated[
        str,
        typer.Argument(
            metavar="FINETUNED", help="What it became: a folder, a base model's name, a merged model's digest."
        ),
    ] = "",
    rank: Annotated[int | None, typer.Option(min=1, metavar="R", help="Rank of the factors.")] = None,
    modules: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="Modules that get factors. Default: every linear layer but the output head."
        ),
    ] = "",
    save: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Modules that are kept whole, or none. Default: norms, and biases of linear layers."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="Of the factors.")] = "float32",
    from_: Annotated[
        list[Path] | None,
        typer.Option(
            "--from", metavar="FILE", help="Instead of two models: a file with an adapter among other weights."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --from: its adapter_config.json or hyperparameters.yaml.")
    ] = None,
    adapter_name: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="With --from: what PEFT called the adapter. Default: default, or the only one."
        ),
    ] = "",
    on: Annotated[
        str,
        typer.Option(
            "--base", metavar="REF", help="With --from: the base model. Default: the one the configuration names."
        ),
    ] = "",
    out: Out = None,
    name: As = "",
    json: Json = False,
) -> None:
    """Make a LoRA of what fine-tuning a whole model changed, or take an adapter out of a checkpoint of the wrapped model.

    The LoRA is the nearest of its rank (truncated singular values); what it leaves out is measured for every tensor, and recorded. What it
    does not cover at all is listed. With --from nothing is computed: the adapter's tensors are copied.

    ckpt extract llama ./finetuned --rank 32 --as tuned-lora

    ckpt extract --from pytorch_model.bin --config adapter_config.json --as bot
    """
    if from_:
        _separate(from_, config, adapter_name, on, base or tuned or rank, out=out, name=name, json=json)
        return
    from registry.extracting import Extract, extraction_json  # noqa: PLC0415 - torch takes a second to import

    if not base or not tuned or rank is None:
        raise InvalidInput("extract", "", "needs BASE, FINETUNED and --rank, or --from FILE and --config FILE")
    wanted = Extract(
        rank=rank,
        modules=_names(modules),
        saved=None if save is None else () if save == "none" else _names(save),
        dtype=_dtype(dtype),
        out=_folder(out),
        name=name,
    )
    with connect() as registry, output.progress() as progress:
        found = registry.extract(base, tuned, wanted, progress)
    if json:
        checkpoint = views.checkpoint_json(found.registered.checkpoint) if found.registered else None
        said = {
            **extraction_json(found, {}),
            "place": found.place or None,
            "peak_bytes": found.peak_bytes,
            "checkpoint": checkpoint,
        }
        output.print_json({key: value for key, value in said.items() if key != "from"})
    else:
        _print_extraction(found)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _dtype(text: str) -> DType:
    found = DType.from_long_name(text)
    if found is None or not found.is_mergeable:
        raise InvalidInput("--dtype", text, "expected float32, bfloat16, float16 or float64")
    return found


def _print_extraction(found: Extraction) -> None:
    with_factors = [each for each in found.tensors if each.kind == "factors"]
    worst = max(with_factors, key=lambda each: each.residual, default=None)
    at_most = f", at most {worst.residual:.3g} ({worst.name})" if worst else ""
    whole = sum(each.kind == "whole" for each in found.tensors)
    checkpoint = found.registered.checkpoint if found.registered else None
    output.print_facts(
        {
            "extracted": f"{checkpoint.ref}  {checkpoint.digest.short}" if checkpoint else found.place,
            "place": found.place if checkpoint else "",
            "factors": f"{len(with_factors)} weights at rank {found.rank}",
            "kept whole": f"{whole} vectors and modules" if whole else "",
            "‖Δ - BA‖ / ‖Δ‖": f"{found.factors:.3g} of the weights with factors{at_most}",
            "of all changes": f"{found.residual:.3g}",
        }
    )  # fmt: skip
    for each in found.not_covered[:_SHOWN]:
        output.say(f"[yellow]not covered:[/yellow] {output.plain(each.name)}: {each.reason} (‖Δ‖ {each.size:.3g})")
    if len(found.not_covered) > _SHOWN:
        output.say(f"and {len(found.not_covered) - _SHOWN} more; extraction.json has them all")


def _separate(
    files: list[Path], config: Path | None, adapter_name: str, base: str, stray: object, *, out: Path | None, name: str, json: bool
) -> None:  # fmt: skip
    from registry.separating import Separate  # noqa: PLC0415 - keeps `ckpt --help` light

    if config is None:
        raise InvalidInput(
            "--config", "", "the weights alone do not tell: give adapter_config.json or hyperparameters.yaml"
        )
    if stray:
        raise InvalidInput("--from", str(files[0]), "takes no BASE, FINETUNED or --rank: the base model goes to --base")
    wanted = Separate(
        files=tuple(files), config=config, adapter_name=adapter_name, base=base, out=_folder(out), name=name
    )
    with connect() as registry, output.progress() as progress:
        found = registry.separate(wanted, progress)
    if json:
        checkpoint = views.checkpoint_json(found.registered.checkpoint) if found.registered else None
        said = {
            "place": found.place or None,
            "tensors": found.tensors,
            "left": found.left,
            "others": list(found.others),
        }
        output.print_json({**said, "checkpoint": checkpoint})
        return
    _print_separation(found)


def _print_separation(found: Separation) -> None:
    made = found.registered.checkpoint.ref if found.registered else found.place
    output.print_line(f"extracted {made}: {found.tensors} tensors; {found.left} of the model were left")
    for other in found.others:
        output.say(f"another adapter is in the same weights: {output.plain(other)}")
