"""A calculator that evaluates arithmetic without `eval`, in bounded time and memory."""

import ast
import operator
from collections.abc import Callable

_MAX_CHARS = 200
_MAX_BITS = 1024  # of every intermediate result; 2**1024 is also the end of the floats

_BINARY: dict[type[ast.operator], Callable[..., int | float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[..., int | float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression such as "(3 + 4) * 2 ** 5".

    Args:
        expression: Numbers, parentheses and the operators + - * / // % **.

    Returns:
        The value; a whole number without decimals.

    >>> calculator("(3 + 4) * 2 ** 5"), calculator("10 / 4"), calculator("10 / 5")
    ('224', '2.5', '2')
    """
    if len(expression) > _MAX_CHARS:
        raise ValueError(f"expression must have at most {_MAX_CHARS} characters, got {len(expression)}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"expression must be arithmetic, got {expression!r}") from None
    value = _evaluate(tree.body)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return str(value)


def _evaluate(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_evaluate(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _apply(op, _evaluate(left), _evaluate(right))
    raise ValueError(f"expression may hold only numbers and + - * / // % **, got '{ast.unparse(node)}'")


def _apply(op: ast.operator, left: int | float, right: int | float) -> int | float:
    # an integer power is the one operation whose result can be huge before it is looked at: bound its bits from below
    integers = isinstance(left, int) and isinstance(right, int)
    if integers and isinstance(op, ast.Pow) and (int(left).bit_length() - 1) * right > _MAX_BITS:
        raise ValueError("the result is too large")
    return _bounded(_BINARY[type(op)](left, right))


def _bounded(value: int | float | complex) -> int | float:
    if isinstance(value, complex):
        raise ValueError("the result is not a real number")
    if (isinstance(value, int) and value.bit_length() > _MAX_BITS) or not abs(value) < float("inf"):
        raise ValueError("the result is too large")
    return value
