"""The schema that a model reads and the check of its arguments."""

from collections.abc import Callable
from typing import Any, Literal

import pytest

from gtpo.tools.signature import CallSignature


def book(city: str, nights: int = 1, *, price: float | None = None, tags: list[str] = [], copy: bool = True) -> str:  # noqa: B006
    """Book a room.

    Args:
        city: Where.
        nights: How long.
        price: At most this.
        tags: Wishes.
        copy: Whether to send a copy.
    """
    return f"{city} {nights}"


def place(point: tuple[int, int], mode: Literal["fast", "slow"]) -> str:
    """Place a stone.

    Args:
        point: Column and row.
        mode: How.
    """
    return f"{point} {mode}"


def test_schema_is_the_one_chat_templates_take() -> None:
    schema = CallSignature(book).schema
    assert schema["type"] == "function"
    function = schema["function"]
    assert (function["name"], function["description"]) == ("book", "Book a room.")
    assert function["parameters"]["required"] == ["city"]
    assert function["parameters"]["properties"]["nights"] == {"type": "integer", "description": "How long."}
    assert function["parameters"]["properties"]["price"] == {
        "type": "number",
        "nullable": True,
        "description": "At most this.",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {"city": "Ulm"},
        {"city": "Ulm", "nights": 2, "price": 3, "tags": ["a"], "copy": False},
        {"city": "Ulm", "price": None},
    ],
)
def test_fitting_arguments_pass_unchanged(arguments: dict[str, Any]) -> None:
    assert CallSignature(book).parse(arguments) == arguments


def test_arguments_take_the_types_of_the_signature() -> None:
    assert CallSignature(place).parse({"point": [1, 2], "mode": "fast"}) == {"point": (1, 2), "mode": "fast"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "book: missing argument 'city'"),
        ({"city": 3}, "book: argument 'city': input should be a valid string, got 3"),
        ({"city": "Ulm", "nights": "2"}, "book: argument 'nights': input should be a valid integer, got '2'"),
        ({"city": "Ulm", "nights": True}, "book: argument 'nights': input should be a valid integer, got True"),
        ({"city": "Ulm", "tags": ["a", 1]}, "book: argument 'tags.1': input should be a valid string, got 1"),
        (
            {"town": "Ulm"},
            "book: missing argument 'city'; unexpected argument 'town', known are city, nights, price, tags, copy",
        ),
        ({"city": "x" * 99, "nights": "y" * 99}, "got '" + "y" * 59 + "..."),
        ({"city": "\ud800"}, "book: Invalid JSON"),
        ({"city": object()}, "book: arguments must be a JSON object: Object of type object is not JSON serializable"),
        (["Ulm"], "book: Input should be an object"),
    ],
)
def test_faults_name_argument_expected_and_got(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        CallSignature(book).parse(arguments)
    assert message in str(caught.value)


def test_literal_is_checked() -> None:
    with pytest.raises(ValueError, match="argument 'mode': input should be 'fast' or 'slow', got 'medium'"):
        CallSignature(place).parse({"point": [1, 2], "mode": "medium"})


def untyped(x):  # type: ignore[no-untyped-def]
    """Do.

    Args:
        x: It.
    """


def undocumented(x: int) -> int:
    return x


def undescribed(x: int) -> int:
    """Do."""
    return x


def variable(*xs: int) -> int:
    """Do.

    Args:
        xs: Them.
    """
    return sum(xs)


def positional(x: int, /) -> int:
    """Do.

    Args:
        x: It.
    """
    return x


@pytest.mark.parametrize("fn", [untyped, undocumented, undescribed])
def test_function_without_schema_is_refused(fn: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="fn must have type hints and a docstring"):
        CallSignature(fn)


@pytest.mark.parametrize("fn", [variable, positional])
def test_arguments_without_a_name_are_refused(fn: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="fn must take all its arguments by name"):
        CallSignature(fn)
