"""Which checkpoint is best: directions, the shared metric, ranking, sorting."""

from __future__ import annotations

import math
import random
from datetime import timedelta
from typing import Any

import pytest
from factories import NOON, checkpoint, digest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import DirectionUnknown, InvalidInput, MixedData, UnknownMetric
from registry.manifest import Checkpoint, Metric
from registry.selection import Ranking, best, direction_of, shared_metric, sort_checkpoints

NAN, INF = math.nan, math.inf


def versions(ranking: Ranking) -> dict[str, list[int]]:
    return {group.key: [found.version for found in group.checkpoints] for group in ranking.groups}


def candidates(*values: float, **changes: Any) -> list[Checkpoint]:
    """Versions 1, 2, … with these values of eval_loss."""
    return [checkpoint(version=i, metrics={"eval_loss": value}, **changes) for i, value in enumerate(values, 1)]


# --- direction_of

LOWER = (
    "loss eval_loss val/loss train_loss_epoch Eval-Loss loss/wikitext val_ppl perplexity word_perplexity,none eval_wer cer error "
    "error_rate err nll mae eval/mse test_rmse bpb bits_per_byte negative_log_likelihood cross-entropy"
)
HIGHER = (
    "acc eval_mmlu_acc acc_norm,none accuracy mean_token_accuracy rewards/accuracies eval_rewards/margins f1 macro_f1 bleu sacrebleu bleu4 "
    "bleu_4 test_rouge1 rougeL rouge_l rougeLsum reward exact_match em precision recall auc roc_auc mcc r2 pass@1 pass@k pass@10 pass_at_1 "
    "win_rate winrate score eval_spearmanr"
)
UNKNOWN = (
    "learning_rate grad_norm epoch temperature lossless evalloss glossary step total_flos eval_runtime accumulate embed errors r22 exact match1 "
    "loss_scale loss/weight acc_stderr,none reward_std rewards/rejected rewards/chosen loss_diff neg_mean_squared_error accuracy_drop "
    "wer_score accuracy_loss pass bits rate perte éloss"
)


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        *((name, "lower") for name in LOWER.split()),
        *((name, "higher") for name in HIGHER.split()),
        *((name, None) for name in UNKNOWN.split()),
        *((name, None) for name in ("", "_", "/", " ")),
    ],
)
def test_direction_of(name: str, direction: str | None) -> None:
    assert direction_of(name) == direction


# --- shared_metric


@pytest.mark.parametrize(
    "names",
    [
        ["eval_loss", "val_loss"],
        ["eval_loss", "eval_aux_loss"],
        ["eval/loss", "eval_accuracy"],
        ["val_loss", "test_loss"],
        ["validation/loss", "eval_accuracy"],
        ["eval_accuracy", "val_accuracy"],
        ["val_accuracy", "test_accuracy"],
        ["test_f1", "loss"],
        ["loss", "accuracy"],
        ["train_loss", "accuracy"],
        ["accuracy", "f1"],
        ["zero_error", "eval_runtime"],
        ["zero_error", "learning_rate"],
    ],
)
def test_the_first_of_two_shared_metrics_is_preferred(names: list[str]) -> None:
    both = dict.fromkeys(names, 0.5)
    assert shared_metric([checkpoint(metrics=both), checkpoint(metrics=dict(reversed(both.items())))]) == names[0]


def test_the_split_of_a_metric_counts_like_a_word_of_its_name() -> None:
    found = checkpoint(
        metrics=[Metric(name="loss", value=1.0, split="train"), Metric(name="ppl", value=2.0, split="eval")],
    )
    assert shared_metric([found]) == "ppl"


def test_a_declared_direction_makes_a_metric_known() -> None:
    found = checkpoint(metrics=[Metric(name="magic", value=1.0, direction="higher")])
    assert shared_metric([found, checkpoint(metrics={"magic": 2.0})]) == "magic"


@pytest.mark.parametrize("spoilt", [NAN, INF, -INF])
def test_one_diverged_checkpoint_does_not_change_what_is_ranked_by(spoilt: float) -> None:
    found = [checkpoint(metrics={"eval_loss": 1.0, "f1": 0.5}), checkpoint(metrics={"eval_loss": spoilt, "f1": 0.4})]
    assert shared_metric(found) == "eval_loss"
    assert shared_metric(found[1:]) == "f1"


def test_no_shared_metric_names_what_exists_the_most_common_first() -> None:
    found = [
        checkpoint(metrics={"acc": 1, "eval_loss": 1, "lr": 0.1}),
        checkpoint(metrics={"lr": 0.1, "eval_loss": 1}),
        checkpoint(metrics={"lr": 0.1, "f1": NAN}),
    ]
    with pytest.raises(UnknownMetric) as caught:
        shared_metric(found)
    assert (caught.value.name, caught.value.near) == ("", ("lr", "eval_loss", "acc", "f1"))


def test_no_candidates_share_nothing() -> None:
    with pytest.raises(UnknownMetric):
        shared_metric([])


# --- best


def test_the_best_by_the_shared_metric() -> None:
    ranking = best(candidates(0.9, 0.7, 0.8))
    assert (ranking.metric, ranking.direction, ranking.without, versions(ranking)) == (
        "eval_loss",
        "lower",
        0,
        {"": [2]},
    )


@pytest.mark.parametrize(("top", "expected"), [(1, [2]), (2, [2, 3]), (3, [2, 3, 1]), (99, [2, 3, 1])])
def test_top_keeps_that_many(top: int, expected: list[int]) -> None:
    assert versions(best(candidates(0.9, 0.7, 0.8), top=top)) == {"": expected}


@pytest.mark.parametrize("top", [0, -1])
def test_top_below_one_is_refused(top: int) -> None:
    with pytest.raises(InvalidInput) as caught:
        best(candidates(0.9), top=top)
    assert (caught.value.field, caught.value.value) == ("top", top)


def test_what_cannot_be_ranked_is_counted() -> None:
    ranking = best([*candidates(NAN, 0.5, INF, -INF), checkpoint(version=5)], metric="eval_loss", top=9)
    assert (versions(ranking), ranking.without) == ({"": [2]}, 4)


def test_the_last_recorded_value_counts() -> None:
    corrected = checkpoint(version=2, metrics=[Metric(name="f1", value=0.9), Metric(name="f1", value=0.1)])
    assert versions(best([checkpoint(metrics={"f1": 0.5}), corrected], top=2)) == {"": [1, 2]}


@pytest.mark.parametrize(
    ("name", "declared", "argument", "expected"),
    [
        ("eval_loss", [None, None], None, "lower"),
        ("eval_loss", [None, None], "higher", "higher"),
        ("eval_loss", ["higher", None], None, "higher"),
        ("eval_loss", ["higher", "higher"], "lower", "lower"),
        ("eval_loss", ["higher", "lower"], None, "lower"),
        ("magic", [None, "lower"], None, "lower"),
        ("magic", ["higher", "lower"], "higher", "higher"),
        ("magic", [None, None], "lower", "lower"),
    ],
)
def test_direction_by_argument_then_declaration_then_name(
    name: str, declared: list[Any], argument: Any, expected: str
) -> None:
    found = [
        checkpoint(version=i, metrics=[Metric(name=name, value=i, direction=direction)])
        for i, direction in enumerate(declared, 1)
    ]
    ranking = best(found, metric=name, direction=argument)
    assert (ranking.direction, versions(ranking)) == (expected, {"": [1 if expected == "lower" else 2]})


@pytest.mark.parametrize("declared", [(None, None), ("higher", "lower")])
def test_an_unknown_direction_is_an_error(declared: tuple[Any, Any]) -> None:
    found = [checkpoint(metrics=[Metric(name="magic", value=1.0, direction=direction)]) for direction in declared]
    with pytest.raises(DirectionUnknown) as caught:
        best(found, metric="magic")
    assert caught.value.metric == "magic"


@pytest.mark.parametrize(
    ("name", "near"),
    [("eval_los", ("eval_loss",)), ("loss", ("eval_loss",)), ("eval_bleu", ("eval_loss",)), ("qqq", ())],
)
def test_an_unknown_metric_names_similar_ones(name: str, near: tuple[str, ...]) -> None:
    with pytest.raises(UnknownMetric) as caught:
        best([checkpoint(metrics={"eval_loss": 1.0, "eval_bleu": NAN, "zzz": 1.0})], metric=name)
    assert (caught.value.name, caught.value.near[:1]) == (name, near)


def test_no_candidates_have_no_best() -> None:
    with pytest.raises(UnknownMetric):
        best([], metric="eval_loss")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"version": 2, "step": 10}, {"version": 1, "step": 20}),
        ({"version": 2, "step": 10}, {"version": 1, "step": None}),
        ({"version": 1}, {"version": 2}),
        ({"version": 1, "step": None}, {"version": 2, "step": None}),
        ({"adapter": "a"}, {"adapter": "b"}),
    ],
)
@pytest.mark.parametrize("metric", ["eval_loss", "eval_acc"])
def test_ties_go_to_the_earlier_step_then_the_lower_version(metric: str, first: Any, second: Any) -> None:
    early, late = (checkpoint(metrics={metric: 0.5}, **changes) for changes in (first, second))
    for order in ([early, late], [late, early]):
        assert best(order, top=2).groups[0].checkpoints == (early, late)


def test_groups_by_adapter_run_and_base_come_in_the_order_of_keys() -> None:
    east, west = digest("east"), digest("west")
    found = [
        checkpoint(version=1, adapter="team/b", run="r1", base=east, metrics={"f1": 0.1}),
        checkpoint(version=2, adapter="team/b", run="r2", base=west, metrics={"f1": 0.3}),
        checkpoint(version=3, adapter="a", run="r1", base=west, metrics={"f1": 0.2}),
        checkpoint(version=4, adapter="a", run="r9", base=west),
    ]
    expected: dict[Any, dict[str, list[int]]] = {
        None: {"": [2, 3]},
        "adapter": {"a": [3], "team/b": [2, 1]},
        "run": {"a r1": [3], "team/b r1": [1], "team/b r2": [2]},
        "base": {east.hex: [1], west.hex: [2, 3]},
    }
    for per, groups in expected.items():
        ranking = best(found, metric="f1", per=per, top=2)
        assert list(versions(ranking).items()) == sorted(groups.items())
        assert ranking.without == 1


VALUES = st.one_of(st.none(), st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0]), st.floats(-10, 10))


@st.composite
def pools(draw: st.DrawFn) -> list[Checkpoint]:
    """Checkpoints with few distinct steps and values, at least one of them with a finite eval_loss."""
    values = [1.5, *draw(st.lists(VALUES, max_size=8))]
    return [
        checkpoint(
            adapter=draw(st.sampled_from(["a", "b"])),
            version=version,
            step=draw(st.sampled_from([None, 1, 2])),
            metrics={} if value is None else {"eval_loss": value},
        )
        for version, value in enumerate(values, 1)
    ]


@given(pool=pools(), per=st.sampled_from([None, "adapter", "run", "base"]), top=st.integers(1, 4), seed=st.integers())
def test_the_order_of_candidates_does_not_matter(pool: list[Checkpoint], per: Any, top: int, seed: int) -> None:
    shuffled = random.Random(seed).sample(pool, len(pool))
    assert best(pool, metric="eval_loss", per=per, top=top) == best(shuffled, metric="eval_loss", per=per, top=top)


@given(
    pool=pools(),
    direction=st.sampled_from(["lower", "higher"]),
    worse=st.floats(0.001, 10) | st.just(NAN) | st.just(INF),
)
def test_adding_a_worse_one_does_not_change_the_best(pool: list[Checkpoint], direction: Any, worse: float) -> None:
    winner = best(pool, metric="eval_loss", direction=direction).groups[0].checkpoints[0]
    value = (winner.metric("eval_loss") or 0.0) + (worse if direction == "lower" else -worse)
    extended = [checkpoint(version=99, step=0, metrics={"eval_loss": value}), *pool]
    assert best(extended, metric="eval_loss", direction=direction).groups[0].checkpoints == (winner,)


@given(pool=pools(), direction=st.sampled_from(["lower", "higher"]))
def test_a_ranking_holds_every_finite_candidate_best_first(pool: list[Checkpoint], direction: Any) -> None:
    ranking = best(pool, metric="eval_loss", direction=direction, top=99)
    values = [found.metric("eval_loss") for found in ranking.groups[0].checkpoints]
    measured = [value for found in pool if (value := found.metric("eval_loss")) is not None]
    assert values == sorted(filter(math.isfinite, measured), reverse=direction == "higher")
    assert len(values) + ranking.without == len(pool)


# --- sort_checkpoints

FIRST = checkpoint(
    version=1,
    adapter="b",
    run="x",
    step=30,
    rank=8,
    size_bytes=2,
    parameters=30,
    metrics={"val/loss": 0.2},
    created_at=NOON,
)
SECOND = checkpoint(
    version=2, adapter="a", run="z", step=10, rank=4, size_bytes=3, parameters=20, metrics={"val/loss": 0.3},
    created_at=NOON + timedelta(days=1),
)  # fmt: skip
THIRD = checkpoint(
    version=3, adapter="c", run="", step=None, rank=None, size_bytes=1, parameters=10, metrics={"val/loss": NAN},
    created_at=NOON - timedelta(days=1),
)  # fmt: skip


@pytest.mark.parametrize(
    ("key", "ascending", "descending"),
    [
        ("version", [1, 2, 3], [3, 2, 1]),
        ("created", [3, 1, 2], [2, 1, 3]),
        ("adapter", [2, 1, 3], [3, 1, 2]),
        ("size", [3, 1, 2], [2, 1, 3]),
        ("parameters", [3, 2, 1], [1, 2, 3]),
        ("step", [2, 1, 3], [1, 2, 3]),
        ("rank", [2, 1, 3], [1, 2, 3]),
        ("run", [1, 2, 3], [2, 1, 3]),
        ("metric.val/loss", [1, 2, 3], [2, 1, 3]),
        ("metric.nobody", [1, 2, 3], [1, 2, 3]),
    ],
)
def test_sorting_puts_missing_values_last_both_ways(key: str, ascending: list[int], descending: list[int]) -> None:
    found = [FIRST, SECOND, THIRD]
    assert [one.version for one in sort_checkpoints(found, key)] == ascending
    assert [one.version for one in sort_checkpoints(found, f"-{key}")] == descending


@pytest.mark.parametrize("key", ["step", "-step"])
def test_sorting_keeps_the_order_of_equal_ones(key: str) -> None:
    found = [checkpoint(version=version) for version in (3, 1, 2)]
    assert sort_checkpoints(found, key) == found


@pytest.mark.parametrize("key", ["", "-", "steps", "--step", "metric", "metric.", "-metric.", "eval_loss", "Step"])
def test_an_unknown_sort_key_lists_the_keys(key: str) -> None:
    with pytest.raises(
        InvalidInput, match=r"step, created, version, adapter, run, rank, size, parameters or metric\.NAME"
    ) as caught:
        sort_checkpoints([], key)
    assert (caught.value.field, caught.value.value) == ("sort", key)


def test_only_like_is_compared_with_like() -> None:
    def measured(version: int, value: float, data: str) -> Checkpoint:
        return checkpoint(version=version, metrics=[Metric(name="hard/loss", value=value, data=data)])

    same = [measured(1, 0.5, "aa"), measured(2, 0.4, "aa")]
    assert best(same, metric="hard/loss").groups[0].checkpoints[0].version == 2
    for other in ("bb", ""):
        with pytest.raises(MixedData) as refused:
            best([*same, measured(3, 0.3, other)], metric="hard/loss")
        assert refused.value.data == tuple(sorted(["aa", other]))
    assert best([*same, measured(3, math.nan, "bb")], metric="hard/loss").without == 1
