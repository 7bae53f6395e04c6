"""Merging by pages: choose, look, start, combine; everything is in the address, and problems are beside what they are about."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit

import pytest
from visiting import Site

from registry.errors import InvalidRecipe
from registry.merge.methods import METHODS
from registry.mixing import Mixture
from registry.server.pages.merge import USUAL_RATE, estimate, wanted_again
from registry.server.pages.mixing_form import METHOD_WORDS, OPTION_WORDS, Wanted, number
from registry.server.pages.visits import Values
from registry.server.scope import Scope
from registry.teamwork import Principal, Role

BOTH = [("ref", "support-bot@v9"), ("ref", "nlu/intent@v6")]
HTMX = {"HX-Request": "true"}


def test_every_method_and_option_has_its_words() -> None:
    assert set(METHOD_WORDS) == set(METHODS)
    assert {name for method in METHODS.values() for name in method.options} == set(OPTION_WORDS)


def test_a_choice_survives_its_address() -> None:
    wanted = Wanted(
        refs=("a@v1", "b/c@best:eval_loss"),
        method="ties",
        weights={"b/c@best:eval_loss": "0.5"},
        options={"density": "0.3"},
        dtype="bfloat16",
        allow_lossy=True,
        note="for & against",
    )
    query = parse_qs(urlsplit(wanted.url()).query)
    assert Wanted.of(Values([(name, value) for name, values in query.items() for value in values])) == wanted


def test_what_a_method_does_not_take_is_left_out() -> None:
    values = Values([*BOTH, ("method", "slerp"), ("weight.support-bot@v9", "3"), ("option.density", "1")])
    assert Wanted.of(values) == Wanted(refs=("support-bot@v9", "nlu/intent@v6"), method="slerp")


def test_an_empty_weight_is_the_usual_one() -> None:
    assert Wanted(refs=("a", "b"), weights={"b": "3"}).mixture().weights == (0.5, 3.0)
    assert Wanted(refs=("a", "b"), method="ties", weights={"b": "3"}).mixture().weights == (1.0, 3.0)
    assert Wanted(refs=("a", "b")).mixture().weights == ()


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "1e999", "1_0_0x", "٣x"])
def test_only_finite_numbers_are_numbers(text: str) -> None:
    with pytest.raises(InvalidRecipe, match="expected a number"):
        number(text, "weights")


def test_inputs_are_added_and_dropped(site: Site) -> None:
    client = site.visitor("writer")
    added = client.get("/merge", params=[*BOTH[:1], ("find", "nlu/intent@v6")])
    assert added.headers["location"] == "/merge?ref=support-bot%40v9&ref=nlu%2Fintent%40v6"
    chosen = client.get("/merge", params=[*BOTH[:1], ("find", "intent"), ("add", "nlu/intent@v6"), ("dtype", "")])
    assert chosen.headers["location"] == added.headers["location"]
    dropped = client.get("/merge", params=[*BOTH, ("drop", "support-bot@v9")])
    assert dropped.headers["location"] == "/merge?ref=nlu%2Fintent%40v6"


def test_a_few_letters_find_what_is_not_chosen_yet(site: Site) -> None:
    client = site.visitor("writer")
    found = client.get("/merge/found", params=[("ref", "nlu/intent@v6"), ("find", "INTENT@v")], headers=HTMX).text
    assert re.findall(r'value="([^"]+)"', found) == [f"nlu/intent@v{version}" for version in (5, 4, 3, 2, 1)]
    assert 'value="support-bot@best:eval_loss"' in client.get("/merge/found?find=support-bot@best:eval_loss").text
    assert 'value="support-bot@v9"' in client.get("/merge/found?find=bot@cand").text
    assert "Nothing here is called like that" in client.get("/merge/found", params={"find": "no'such%_\\<b>"}).text


def test_the_fields_are_those_of_the_method(site: Site) -> None:
    client = site.visitor("writer")
    answer = client.get("/merge/setup", params=[*BOTH, ("method", "ties")], headers=HTMX)
    assert 'name="option.density"' in answer.text
    assert 'name="weight.support-bot@v9"' in answer.text
    assert answer.headers["hx-replace-url"].endswith("&method=ties")
    other = client.get("/merge/setup", params=[*BOTH, ("method", "slerp")], headers=HTMX).text
    assert 'name="option.t"' in other
    assert 'name="weight.' not in other


def test_the_plan_is_shown_before_anything_is_written(site: Site) -> None:
    client, before = site.visitor("writer"), len(site.direct.history())
    shown = client.get("/merge", params=[*BOTH, ("method", "ties"), ("look", "yes")]).text
    for words in ("The plan", "model-00001-of-00002.safetensors", "Tensors changed", "The report", "careful guess"):
        assert words in shown
    assert 'formaction="/merge"' in shown
    assert len(site.direct.history()) == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([("method", "ties"), ("option.density", "7")], "more than 0, at most 1"),
        ([("method", "ties"), ("option.density", "x")], "expected a number"),
        ([("weight.support-bot@v9", "much")], "expected a number"),
        ([("method", "magic")], "one of linear"),
        ([("dtype", "int8")], "one of float32"),
        ([("ref", "support-bot@v11"), ("method", "slerp")], "slerp"),
        ([("ref", "nobody")], "no adapter"),
    ],
)
def test_what_is_wrong_is_said_beside_the_form(site: Site, more: list[tuple[str, str]], words: str) -> None:
    client = site.visitor("writer")
    shown = client.get("/merge", params=[*BOTH, *more, ("look", "yes")])
    assert shown.status_code == 200
    assert words in shown.text
    assert "Start the merge" not in shown.text


def test_a_merge_is_started_and_its_job_is_shown(site: Site) -> None:
    client = site.visitor("writer")
    answer = client.post("/merge", data={"ref": ["support-bot@v9", "nlu/intent@v6"], "method": "ties", "note": "try"})
    assert answer.status_code == 303
    number = int(answer.headers["location"].removeprefix("/jobs/"))
    job = site.direct.follow_job(number)
    assert (job.kind, job.author, job.arguments["note"]) == ("merge", "writer", "try")
    assert site.direct.merged()[-1].recipe.method == "ties"


def test_what_cannot_be_started_comes_back_with_the_form(site: Site) -> None:
    client = site.visitor("writer")
    answer = client.post("/merge", data={"ref": ["support-bot@v9"], "weight.support-bot@v9": "wide"})
    assert answer.status_code == 422
    assert 'aria-invalid="true"' in answer.text
    assert 'value="wide"' in answer.text
    assert client.post("/merge", data={}).status_code == 422


def test_an_adapter_is_made_of_adapters(site: Site) -> None:
    client = site.visitor("writer")
    refs = ["support-bot@v9", "nlu/intent@v6"]
    assert "what the new adapter is called" in client.post("/merge/combine", data={"ref": refs}).text
    answer = client.post("/merge/combine", data={"ref": refs, "adapter": "both", "rank": "0"})
    assert "expected a whole number from 1" in answer.text
    answer = client.post("/merge/combine", data={"ref": refs, "adapter": "both"})
    site.direct.follow_job(int(answer.headers["location"].removeprefix("/jobs/")))
    assert site.direct.resolve("both").author == "writer"


def test_a_recipe_is_saved_and_its_model_is_not_made(site: Site) -> None:
    client, before = site.visitor("writer"), len(site.direct.merged())
    form = {
        "ref": ["support-bot@v9", "nlu/intent@v6"],
        "method": "ties",
        "option.density": "0.3",
        "note": "<i>for fun</i>",
    }
    answer = client.post("/merge/save", data={**form, "weight.nlu/intent@v6": "0.1", "dtype": "bfloat16"})
    shown = client.get(answer.headers["location"]).text
    (saved,) = site.direct.recipes()
    assert len(site.direct.merged()) == before
    for words in (saved.repository, "virtual", "&lt;i&gt;for fun&lt;/i&gt;", "hf download", "bfloat16", "0.3"):
        assert words in shown
    assert saved.repository in client.get("/merge/saved").text
    again = re.search(r'href="(/merge\?[^"]+)"', shown)
    assert again is not None
    assert "The plan" in client.get(again[1].replace("&amp;", "&")).text
    assert "No recipe was saved yet" in site.visitor("nlu").get("/merge/saved").text
    assert site.visitor("nlu").get(answer.headers["location"]).status_code == 404
    assert client.post("/merge/save", data={**form, "option.density": "9"}).status_code == 422


def test_a_saved_recipe_is_removed_when_that_is_confirmed(site: Site) -> None:
    client, form = site.visitor("writer"), {"ref": ["support-bot@v9", "nlu/intent@v6"], "method": "ties"}
    place = client.post("/merge/save", data=form).headers["location"]
    (saved,) = site.direct.recipes()
    assert f'href="{place}/remove"' in client.get(place).text
    assert f'action="{place}/remove"' in client.get(f"{place}/remove").text
    asked = client.get(f"{place}/remove", headers=HTMX).text
    assert asked.startswith("<form")
    assert f"Remove {saved.repository}?" in asked
    assert "/remove" not in site.visitor("reader").get(place).text
    for stranger, status in (("reader", 403), ("nlu", 404)):
        assert site.visitor(stranger).get(f"{place}/remove").status_code == status
        assert site.visitor(stranger).post(f"{place}/remove").status_code == status
    assert site.direct.recipes() == [saved]
    assert client.post(f"{place}/remove").headers["location"] == "/merge/saved"
    assert site.direct.recipes() == []
    assert client.get(place).status_code == client.post(f"{place}/remove").status_code == 404


def test_removing_a_recipe_that_was_merged_says_what_stays(site: Site) -> None:
    client, registry = site.visitor("writer"), site.direct
    planned = registry.plan(registry.resolve("support-bot@v9"), registry.resolve("nlu/intent@v6"))
    registry.save_recipe(planned)
    merged = registry.merge(planned).merged
    place = f"/merge/saved/{planned.plan.recipe.digest.hex}"
    for shown in (client.get(place).text, client.get(f"{place}/remove").text):
        assert f'href="/merged/{merged.digest.hex}"' in shown


def test_a_saved_recipe_comes_out_of_its_choice_again(site: Site) -> None:
    registry = site.direct
    inputs = [registry.resolve(ref) for ref in ("support-bot@v9", "nlu/intent@v6")]
    for mixture in (
        Mixture(),
        Mixture(method="della", weights=(1.0, 1 / 3), options={"seed": 7}),
        Mixture(method="slerp"),
    ):
        planned = registry.plan(*inputs, mixture=mixture)
        registry.save_recipe(planned)
        (saved,) = [each for each in registry.recipes() if each.recipe == planned.plan.recipe]
        wanted = wanted_again(saved)
        assert registry.plan(*inputs, mixture=wanted.mixture()).plan.recipe == saved.recipe


def test_namespaces_hold(site: Site) -> None:
    client = site.visitor("nlu")
    assert "support-bot" not in client.get("/merge").text
    assert "no adapter" in client.get("/merge", params=[*BOTH, ("look", "yes")]).text
    assert client.post("/merge", data={"ref": "support-bot@v9"}).status_code == 404
    answer = client.post("/merge/combine", data={"ref": "nlu/intent@v6", "adapter": "elsewhere"})
    assert answer.status_code == 403


def test_readers_have_no_part_in_it(site: Site) -> None:
    client = site.visitor("reader")
    assert client.get("/merge").status_code == 403
    assert 'href="/merge"' not in client.get("/jobs").text


def test_the_time_is_by_merges_that_were_done_here(site: Site) -> None:
    registry = site.direct
    scope = Scope(registry, Principal(name="writer", role=Role.WRITER))
    outline = registry.plan(registry.resolve("support-bot@v9")).outline
    guessed = estimate(scope, outline)
    assert (guessed.merges, guessed.rate) == (0, USUAL_RATE)
    job = registry.follow_job(registry.start_merge(registry.plan(registry.resolve("support-bot@v8"))).id)
    measured = estimate(scope, outline)
    assert job.started_at is not None
    assert job.finished_at is not None
    assert measured.merges == 1
    assert measured.rate == pytest.approx(job.total_bytes / (job.finished_at - job.started_at).total_seconds())
