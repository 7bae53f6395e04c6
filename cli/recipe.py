"""`ckpt recipe`: the recipes that `ckpt merge --virtual` keeps, so that their models are computed for whoever loads them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli import output
from cli.options import Json
from registry import connect
from registry.manifest import to_json
from registry.results import KeptRecipe

recipe_app = typer.Typer(no_args_is_help=True, help="Recipes that are kept without being carried out.")


@recipe_app.command("list")
def list_(json: Json = False) -> None:
    """List the recipes that are kept. `ckpt merge … --virtual` keeps one."""
    with connect() as registry:
        found = registry.recipes()
    if json:
        output.print_json([_as_json(each) for each in found])
        return
    rows = [
        [
            each.repository,
            _inputs(each),
            each.recipe.method,
            each.base,
            each.author,
            output.ago(each.created_at),
            each.note,
        ]
        for each in found
    ]
    if rows:
        output.print_table(["recipe", "made of", "method", "base model", "by", "kept", "note"], rows)
    else:
        output.say("no recipe is kept yet: `ckpt merge REF REF --virtual` keeps one")


@recipe_app.command("rm")
def rm(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="As `ckpt recipe list` calls it, or its digest's first digits.")
    ],
) -> None:
    """Keep a recipe no longer. What it is made of can be removed then; a model that was merged of it meanwhile stays."""
    with connect() as registry:
        removed = registry.remove_recipe(recipe)
    output.print_line(f"removed recipe {removed.repository}")
    if removed.merged:
        output.say(f"its repository stays: it was merged meanwhile, to {removed.merged.short}")


def _inputs(kept: KeptRecipe) -> str:
    """The inputs with their weights, as they are typed."""
    inputs = zip(kept.checkpoints, kept.recipe.inputs, strict=True)
    return " + ".join(f"{ref}:{each.weight:.4g}" for ref, each in inputs)


def _as_json(kept: KeptRecipe) -> dict[str, Any]:
    return {**to_json(kept), "repository": kept.repository}
