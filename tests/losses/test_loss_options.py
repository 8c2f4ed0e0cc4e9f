"""Losses by name, what they say of themselves, and the options a recipe may give them."""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from retrieval_kd.losses import MODULES, _module, check_options, find_loss, loss_names
from retrieval_kd.losses.choice import kl
from retrieval_kd.types import InputError


def test_a_loss_says_what_it_needs() -> None:
    assert find_loss("kl").function is kl
    assert (find_loss("kl").of, find_loss("embedding_mse").of) == ("scores", "vectors")
    assert find_loss("kl").needs == {"teacher"}
    assert find_loss("info_nce").needs == {"positive"}
    assert find_loss("dkd").needs == {"teacher", "positive"}
    assert find_loss("preference_kl").needs == {"preference"}
    assert find_loss("info_nce").options == {"temperature": 1.0, "combine": "sum_exp"}
    assert find_loss("margin_mse").options == {}


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no loss 'margin_msa'; did you mean 'margin_mse'\?"):
        find_loss("margin_msa")
    with pytest.raises(InputError, match=r"no loss 'xxxxxx'; known: approx_rank_mse, bce,"):
        find_loss("xxxxxx")


def test_names_are_unique_and_all_public_functions_are_losses() -> None:
    listed = [name for module in MODULES for name in _module(module).__all__]
    assert sorted(listed) == loss_names()
    for module in MODULES:
        functions = inspect.getmembers(_module(module), inspect.isfunction)
        own = [name for name, function in functions if function.__module__ == _module(module).__name__]
        assert sorted(name for name in own if not name.startswith("_")) == sorted(_module(module).__all__)


@pytest.mark.parametrize("name", loss_names())
def test_signatures(name: str) -> None:
    """Tensors first, without default; then options of a type that can be checked; then the weights."""
    loss = find_loss(name)
    parameters = inspect.signature(loss.function).parameters
    tensors = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    expected = [key for key in ("teacher", "positive", "preference") if key in loss.needs]
    assert tensors == ["student", *expected, *(["valid"] if loss.of == "scores" else [])]
    assert list(parameters) == [*tensors, *loss.options, "row_weights"]
    assert parameters["row_weights"].default is None
    types = get_type_hints(loss.function)
    for option, default in loss.options.items():
        if isinstance(default, str):
            assert get_origin(types[option]) is Literal
            assert default in get_args(types[option])
        else:
            assert types[option] in (float, int, bool, float | None, int | None)
    check_options(loss, loss.options, "here")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kl", {"temprature": 2.0}, r"^stages\[0\]: kl has no option 'temprature'; did you mean 'temperature'\?"),
        ("kl", {"sharpness": 2.0}, "kl has no option 'sharpness'; known: temperature, teacher_temperature, squared"),
        ("margin_mse", {"temperature": 2.0}, "margin_mse has no option 'temperature'; known: none"),
        ("kl", {"student": 2.0}, "kl has no option 'student'"),
        ("info_nce", {"row_weights": None}, "no option 'row_weights'"),
        ("ranknet", {"weights": "gaps"}, r"^stages\[0\]: weights: Input should be 'none', 'gap' or 'squared_gap'"),
        ("kl", {"temperature": "2"}, "temperature: Input should be a valid number"),
        ("kl", {"temperature": True}, "temperature: Input should be a valid number"),
        ("kl", {"temperature": 0.0}, "temperature: Input should be greater than 0"),
        ("kl", {"temperature": float("nan")}, "temperature: Input should be"),
        ("kl", {"squared": 1}, "squared: Input should be a valid boolean"),
        ("partial_pl", {"depth": 1.5}, "depth: Input should be a valid integer"),
        ("partial_pl", {"depth": 0}, "depth: Input should be greater than or equal to 1"),
        ("js", {"beta": 1.5}, "beta: Input should be less than or equal to 1"),
        ("sinkhorn", {"slots": 3}, "slots: Input should be 'rank' or 'column'"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_options(find_loss(name), options, "stages[0]")


def test_good_options_pass() -> None:
    """A whole number where a number is wanted, none where none may be, the names of choices: nothing is raised."""
    check_options(find_loss("kl"), {"temperature": 2, "teacher_temperature": None, "squared": False}, "here")
    check_options(find_loss("lambda_rank"), {"scheme": "ndcg2", "k": 10}, "here")
    check_options(find_loss("margin_mse"), {}, "here")
