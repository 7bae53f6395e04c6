"""Which methods there are, what they take, and the coefficients that need no look at the tensors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.changes import Option
from registry.errors import InvalidRecipe
from registry.merge.methods import METHODS, checked, fixed_coefficients

FINITE = st.floats(-10, 10)


def coefficients(method: str, *weights: float, **options: Option) -> tuple[float, ...]:
    found = fixed_coefficients(method, weights, checked(method, weights, options))
    assert found is not None
    return found


@pytest.mark.parametrize("method", METHODS)
def test_takes_its_defaults_and_says_so(method: str) -> None:
    weights = (1,) * int(min(3, METHODS[method].most))
    found = checked(method, weights, {})
    assert found == {name: allowed.default for name, allowed in METHODS[method].options.items()}
    assert checked(method, weights, found) == found


@pytest.mark.parametrize(
    ("method", "weights", "options", "field"),
    [
        ("blend", (1, 1), {}, "method"),
        ("linear", (), {}, "inputs"),
        ("slerp", (1,), {}, "inputs"),
        ("slerp", (1, 1, 1), {}, "inputs"),
        ("model_stock", (1,), {}, "inputs"),
        ("linear", (float("nan"), 1), {}, "weights"),
        ("linear", (float("inf"), 1), {}, "weights"),
        ("ema", (0.5, 0.5), {}, "weights"),
        ("average", (1, -1), {}, "weights"),
        ("nuslerp", (1, -1), {}, "weights"),
        ("karcher", (2, -1), {}, "weights"),
        ("linear", (1, 1), {"density": 0.5}, "density"),
        ("ties", (1, 1), {"density": 0}, "density"),
        ("ties", (1, 1), {"density": 1.01}, "density"),
        ("ties", (1, 1), {"density": float("nan")}, "density"),
        ("ties", (1, 1), {"density": "half"}, "density"),
        ("ties", (1, 1), {"density": True}, "density"),
        ("ties", (1, 1), {"lambda": float("inf")}, "lambda"),
        ("interpolate", (1, 1), {"t": float("nan")}, "t"),
        ("ema", (1, 1), {"decay": 1.0}, "decay"),
        ("dare_ties", (1, 1), {"seed": -1}, "seed"),
        ("dare_ties", (1, 1), {"seed": 1.5}, "seed"),
        ("dare_ties", (1, 1), {"seed": 1 << 64}, "seed"),
        ("breadcrumbs", (1, 1), {"gamma": 1.0}, "gamma"),
        ("della", (1, 1), {"density": 0.1}, "epsilon"),
        ("della", (1, 1), {"density": 0.9, "epsilon": 0.1}, "epsilon"),
        ("della", (1, 1), {"epsilon": 0.5}, "epsilon"),
    ],
)
def test_refuses_what_makes_no_sense(
    method: str, weights: tuple[float, ...], options: dict[str, Option], field: str
) -> None:
    with pytest.raises(InvalidRecipe) as caught:
        checked(method, weights, options)
    assert caught.value.field == field


def test_della_at_density_1_drops_nothing_so_that_any_epsilon_will_do() -> None:
    assert checked("della", (1, 1), {"density": 1.0})["epsilon"] == 0.15
    assert checked("della", (1, 1), {"density": 1})["density"] == 1


@given(st.lists(FINITE, min_size=1, max_size=5), FINITE)
def test_linear_takes_the_weights_and_task_arithmetic_multiplies_them(weights: list[float], scale: float) -> None:
    assert coefficients("linear", *weights) == tuple(weights)
    assert coefficients("task_arithmetic", *weights, **{"lambda": scale}) == tuple(scale * weight for weight in weights)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5))
def test_an_average_has_coefficients_that_sum_to_1(weights: list[float]) -> None:
    found = coefficients("average", *weights)
    assert sum(found) == pytest.approx(1)
    assert found == pytest.approx([weight / sum(weights) for weight in weights])


@given(FINITE)
def test_an_interpolation_goes_through_both_inputs(t: float) -> None:
    assert coefficients("interpolate", 1, 1, t=0) == (1, 0)
    assert coefficients("interpolate", 1, 1, t=1) == (0, 1)
    assert sum(coefficients("interpolate", 1, 1, t=t)) == pytest.approx(1)


@given(st.integers(1, 8), st.floats(0, 0.99))
def test_ema_is_the_moving_average_over_the_inputs_in_order(count: int, decay: float) -> None:
    found = coefficients("ema", *[1] * count, decay=decay)
    values = [float(7 * index % 5) for index in range(count)]
    moving = values[0]
    for value in values[1:]:
        moving = decay * moving + (1 - decay) * value
    assert sum(c * value for c, value in zip(found, values, strict=True)) == pytest.approx(moving)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.is_exact])
def test_no_coefficients_make_a_dense_method(method: str) -> None:
    weights = (1.0, 1.0)
    assert fixed_coefficients(method, weights, checked(method, weights, {})) is None
