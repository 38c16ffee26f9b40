"""The gate for arguments: every error says what was asked, what was got, and what to do."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

from ncprior.utils.require import (
    described,
    floats,
    floats_of_batch,
    numbers,
    real_tensor,
    require_callable,
    require_choice,
    require_counts,
    require_finite,
    require_flags,
    require_instance,
    require_numbers,
    require_positive,
    require_shape,
    tensor_of_batch,
)


@pytest.mark.parametrize("value", [1, 7, np.int64(3), torch.tensor(2), 10**30])
def test_whole_numbers_pass(value: Any) -> None:
    require_counts(steps=value)


@pytest.mark.parametrize(
    "value",
    [
        28.6,
        28.0,
        "2",
        None,
        True,
        math.nan,
        [3],
        torch.tensor(3.0),
        np.array(3),
        np.float64(3),
        1j,
    ],
)
def test_a_count_that_is_no_whole_number_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=r"steps must be a whole number in \[1, inf\); got .*int"):
        require_counts(steps=value)


def test_a_count_outside_its_interval_is_a_value_error_that_names_it() -> None:
    require_counts("[0, inf)", num_steps=0)
    with pytest.raises(ValueError, match=r"batch_size must be .* in \[1, inf\); got 0\."):
        require_counts(steps=3, batch_size=0)


def test_none_passes_only_where_the_interval_says_so() -> None:
    require_counts("[1, inf) or None", patience=None)
    require_numbers("(0, inf) or None", step_size=None)
    with pytest.raises(ValueError, match=r"patience must be .* or None; got -1\."):
        require_counts("[1, inf) or None", patience=-1)


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("(0, 1)", [0.5, np.float32(0.25)], [0, 1, -1, 2, math.nan]),
        ("[0, 1]", [0, 1, 0.0, 1.0], [-1e-9, 1 + 1e-9, math.inf]),
        ("(-inf, inf)", [0, -1e300], [math.inf, -math.inf, math.nan]),
        ("[0, inf]", [math.inf], [math.nan, -math.inf]),
    ],
)
def test_intervals_are_those_of_mathematics(
    interval: str, inside: list[float], outside: list[float]
) -> None:
    for value in inside:
        require_numbers(interval, rate=value)
    for value in outside:
        with pytest.raises(ValueError, match="rate must be a number in"):
            require_numbers(interval, rate=value)


@pytest.mark.parametrize("value", ["0.1", None, True, 1j, torch.tensor(0.1), [0.1]])
def test_what_is_no_real_number_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=r"rate must be a number in \(0, 1\); got .*float"):
        require_numbers("(0, 1)", rate=value)


def test_flags_and_choices() -> None:
    require_flags(adjusted=True)
    with pytest.raises(TypeError, match="adjusted must be True or False; got 1"):
        require_flags(adjusted=1)
    require_choice("kind", "mlp", ("auto", "mlp"))
    with pytest.raises(ValueError, match="kind must be one of 'auto', 'mlp'; got 'mpl'"):
        require_choice("kind", "mpl", ("auto", "mlp"))
    with pytest.raises(ValueError, match="kind must be one of 1, 2; got True"):
        require_choice("kind", True, (1, 2))


def test_objects_of_another_type_and_classes() -> None:
    normal = Normal(0.0, 1.0)
    assert require_instance("prior", normal, Normal, "Pass one.") is normal
    with pytest.raises(TypeError, match="must be of type Normal; got the class Normal. Pass one."):
        require_instance("prior", Normal, Normal, "Pass one.")
    with pytest.raises(TypeError, match="of type int or str; got an object of type Normal"):
        require_instance("prior", normal, (int, str), "Pass one.")
    require_callable("decoder", abs, "Pass one.")
    with pytest.raises(TypeError, match="decoder must be a function; got the class Normal"):
        require_callable("decoder", Normal, "Pass one.")


@pytest.mark.parametrize(
    "value", [[[1, 2], [3, 4]], np.array([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 4]])]
)
def test_numbers_become_a_tensor_of_floats(value: Any) -> None:
    x = real_tensor("features", value, ndim=2, rows=2)
    assert x.dtype == torch.float32
    assert x.tolist() == [[1, 2], [3, 4]]


def test_a_tensor_of_floats_is_returned_as_it_is_and_an_array_is_copied() -> None:
    x = torch.randn(3, 2, dtype=torch.float64)
    assert real_tensor("features", x) is x
    array = np.ones((3, 2))
    array.setflags(write=False)
    assert real_tensor("features", array).dtype == torch.float64


@pytest.mark.parametrize(
    "value", ["abc", None, [["a"]], [[1], [2, 3]], torch.ones(2, 2) > 0, torch.ones(2, 2) * 1j, {}]
)
def test_what_holds_no_real_numbers_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="features must be "):
        real_tensor("features", value)


def test_x_of_a_batch_is_found_and_arrays_are_converted() -> None:
    x = torch.rand(3, 2)
    for batch in (x, (x, "labels"), [x, 3]):
        assert tensor_of_batch(batch) is x
    assert torch.equal(tensor_of_batch(x.numpy()), x)
    for wrong in (None, "x", 3.0 + 1j, {}, [None]):
        with pytest.raises(TypeError, match="x must be a tensor or an array"):
            tensor_of_batch(wrong)
    for shape in ((), (0, 2), (3, 0)):
        with pytest.raises(ValueError, match="x must have 1 or more rows of numbers"):
            tensor_of_batch(torch.zeros(shape))


def test_floats_of_a_batch_are_within_their_limits() -> None:
    x = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    assert floats_of_batch("This VAE", (x, 1), "Divide by 255.", (0, 1)) is x
    assert floats_of_batch("This VAE", 255 * x, "Divide by 255.").max() == 255
    for wrong, got in ((255 * x, "numbers from 0 to 255"), (x - 1, "numbers from -1 to 0")):
        message = rf"This VAE takes x in \[0, 1\]; got {got}\. Divide by 255\."
        with pytest.raises(ValueError, match=message):
            floats_of_batch("This VAE", wrong, "Divide by 255.", (0, 1))
    for codes in (x.long(), x.bool(), x.byte(), x.to(torch.complex64)):
        with pytest.raises(ValueError, match="This VAE takes x as floats; got a tensor of"):
            floats_of_batch("This VAE", codes, "Divide by 255.")
    x[1, 0] = math.nan
    with pytest.raises(ValueError, match="x must be finite; got NaN or infinity in 1 of 2 rows"):
        floats_of_batch("This VAE", x, "Divide by 255.", (0, 1))


def test_codes_are_no_floats() -> None:
    with pytest.raises(TypeError, match="z must be floating-point numbers; got a tensor of int64"):
        real_tensor("z", torch.zeros(3, 2, dtype=torch.long), integers=False)


def test_wrong_shapes_and_values_that_are_not_finite() -> None:
    with pytest.raises(
        ValueError, match=r"must have 2 dimensions and 1 or more rows; got .*\(3,\)"
    ):
        real_tensor("features", torch.zeros(3), ndim=2)
    with pytest.raises(ValueError, match="2 or more rows"):
        real_tensor("features", torch.zeros(1, 2), rows=2)
    x = torch.zeros(4, 3)
    x[1, 0], x[1, 1], x[3, 2] = math.nan, math.inf, -math.inf
    with pytest.raises(ValueError, match="NaN or infinity in 2 of 4 rows"):
        require_finite("features", x)


def test_descriptions_are_short_and_on_one_line() -> None:
    assert described(torch.zeros(2, 3)) == "a tensor of float32, (2, 3)"
    assert described(np.zeros(2)) == "an array of float64, (2,)"
    assert described("a\nb") == r"'a\nb'"
    assert len(described("a" * 1000)) < 80


def test_a_shape_is_a_tuple_of_whole_numbers() -> None:
    assert require_shape("event_shape", torch.Size([2, 3])) == (2, 3)
    assert require_shape("event_shape", np.array([2])) == (2,)
    assert require_shape("event_shape", ()) == ()
    for wrong, match in (("ab", "list of whole numbers"), (3, "list"), ([2.0], r"\[0\] must be")):
        with pytest.raises(TypeError, match=match):
            require_shape("event_shape", wrong)
    with pytest.raises(ValueError, match=r"event_shape\[1\] must be a whole number in \[1, inf\)"):
        require_shape("event_shape", (2, 0))


def test_a_module_without_forward_and_a_tensor_without_numbers_are_named() -> None:
    require_callable("decoder", torch.nn.Linear(1, 1), "")
    with pytest.raises(
        TypeError, match="decoder must be a function; got an object of type Module"
    ):
        require_callable("decoder", torch.nn.Module(), "Pass a function.")
    with pytest.raises(ValueError, match="x must have values; got a meta tensor of float32"):
        real_tensor("x", torch.ones(3, device="meta"))


def test_scores_may_be_infinite_where_that_is_allowed() -> None:
    scores = torch.tensor([1.0, -math.inf, math.inf])
    assert real_tensor("scores", scores, infinite=True) is scores
    for wrong in (torch.tensor([1.0, math.nan]), [math.nan]):
        with pytest.raises(ValueError, match="scores must be finite; got NaN"):
            real_tensor("scores", wrong, infinite=True)


def test_numbers_keep_their_dtype() -> None:
    codes = torch.arange(3)
    assert numbers("z", codes) is codes
    assert numbers("z", np.array([1, 2])).dtype == torch.int64
    for wrong in (codes > 0, codes + 0j, "z", None):
        with pytest.raises(TypeError, match="z must be"):
            numbers("z", wrong)
    for few in (codes[:0], torch.tensor(1.0)):
        with pytest.raises(ValueError, match="z must have 1 or more rows"):
            numbers("z", few)
    with pytest.raises(ValueError, match="z must be finite"):
        numbers("z", [1.0, math.nan])


def test_floats_are_taken_without_a_look_at_their_values() -> None:
    assert floats("loc", [1, 2]).dtype == torch.float32
    assert floats("loc", torch.empty(2, device="meta")).is_meta
    assert floats("loc", [math.nan]).isnan().all()
    with pytest.raises(TypeError, match="loc must be real numbers; got a tensor of bool"):
        floats("loc", torch.tensor([True]))


def test_numbers_beyond_all_floats_are_infinite() -> None:
    for number in (10**400, -(10**400)):
        with pytest.raises(ValueError, match=r"x must be a number in \(-inf, inf\)"):
            require_numbers(x=number)
    require_numbers("[-inf, inf]", x=10**400)


def test_positive_numbers() -> None:
    require_positive("scale", torch.ones(2))
    require_positive("scale", torch.empty(2, device="meta"))
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            require_positive("scale", torch.tensor([1.0, wrong]))


def test_sparse_and_meta_tensors_are_named() -> None:
    with pytest.raises(TypeError, match=r"x must be dense; got a sparse tensor .*to_dense\(\)"):
        real_tensor("x", torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match="x must have values; got a meta tensor of float32"):
        real_tensor("x", torch.empty(2, 2, device="meta"))


def test_a_module_without_forward_is_no_function() -> None:
    require_callable("f", nn.Identity(), "Pass one.")
    with pytest.raises(TypeError, match="f must be a function; got an object of type Module"):
        require_callable("f", nn.Module(), "Pass one.")
