"""The calculator: values, refusals, bounds."""

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtpo.tools import FunctionTool, calculator
from gtpo.types import ToolStatus


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        (" -(2 - 5) ", "3"),
        ("+4", "4"),
        ("7 // 2", "3"),
        ("7 % 4", "3"),
        ("6 / 4", "1.5"),
        ("6 / 3", "2"),
        ("2 ** 100", str(2**100)),
        ("2 ** -1", "0.5"),
        ("1 ** (10 ** 100)", "1"),
        ("1e3", "1000"),
    ],
)
def test_values(expression: str, value: str) -> None:
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["__import__('os')", "a", "'a' * 3", "True", "1 if 1 else 2", "[1]", "1 < 2", "~1", "1j", "(1).real", "max(1, 2)"],
)
def test_anything_but_arithmetic_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="expression may hold only numbers"):
        calculator(expression)


@pytest.mark.parametrize("expression", ["", "1 +", "((((1)", "1 = 2", "\x00", "print 1", "(" * 199])
def test_bad_syntax(expression: str) -> None:
    with pytest.raises(ValueError, match="expression must be arithmetic"):
        calculator(expression)


@pytest.mark.parametrize(
    "expression",
    ["9 ** 9 ** 9", "(2 ** 1000) * (2 ** 1000)", "1e308 * 10", "10 ** 400", "1e999", "(0 - 3) ** 99999"],
)
def test_large_results_are_refused_before_they_are_made(expression: str) -> None:
    with pytest.raises(ValueError, match="the result is too large"):
        calculator(expression)


def test_long_and_complex() -> None:
    with pytest.raises(ValueError, match="at most 200 characters, got 201"):
        calculator("1" * 201)
    with pytest.raises(ValueError, match="not a real number"):
        calculator("(0 - 8) ** 0.5")


@given(st.integers(0, 2**32))
def test_agrees_with_python_on_random_expressions(seed: int) -> None:
    rng = random.Random(seed)
    expression = str(rng.randint(-9, 9))
    for _ in range(rng.randint(1, 8)):
        expression = f"({expression} {rng.choice(['+', '-', '*', '//', '%'])} {rng.randint(1, 99)})"
    assert calculator(expression) == str(eval(expression))


@given(st.text(max_size=40))
def test_any_text_gives_a_value_or_an_arithmetic_error(text: str) -> None:
    try:
        float(calculator(text))
    except (ValueError, ArithmeticError) as error:
        assert str(error)


def test_as_a_tool() -> None:
    tool = FunctionTool(calculator)
    good = asyncio.run(tool.call({"expression": "6 * 7"}))
    assert (tool.name, good.status, good.text) == ("calculator", ToolStatus.OK, "42")
    bad = asyncio.run(tool.call({"expression": "1 / 0"}))
    assert (bad.status, bad.text) == (ToolStatus.ERROR, "ZeroDivisionError: division by zero")
