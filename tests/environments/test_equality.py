"""Which answers are the same."""

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gtpo.environments.equality import same_answer
from gtpo.parsing import bare_answer

EQUAL = [
    # numbers
    *[("42", "42.0"), ("+42", "42"), ("-0", "0"), ("1,234,567.5", "1234567.50"), ("$ 12", "12"), ("$5", "5$")],
    *[("-$5", "$-5"), ("3/4", "0.75"), ("6/8", "3/4"), ("6 / 8", "0.75"), (".5", "0.5"), ("42.", "42"), ("- 5", "-5")],
    *[("9" * 300, "9" * 300 + ".0"), ("1e-05", "0.00001"), ("1e16", "1" + "0" * 16), ("2.5e-7", "0.00000025")],
    *[("1e3", "1000"), ("1E+3", "1,000"), ("10^3", "1000"), ("1.5 x 10^3", "1500"), ("2*10**-2", "0.02")],
    *[("\u22124", "-4"), ("4", "\uff14"), ("50 %", "50.0%"), ("1\u202f000\xa0000", "1000000"), ("1e400", "10^400")],
    # mixed numbers
    *[("1 1/2", "1.5"), ("-1 1/2", "-3/2"), ("2 and 1/4", "9/4"), ("1½", "1.5"), ("½", "0.5"), ("1  1 / 2", "3/2")],
    # LaTeX
    *[(r"\boxed{4}", "4"), (r"\(4\)", "4"), ("$4$", "4"), (r"\frac{1}{2}", "1/2"), (r"-\dfrac{1}{2}", "-0.5")],
    *[(r"\frac12", "0.5"), (r"1\frac{1}{2}", "1.5"), (r"50\%", "50%"), (r"\$12", "12"), ("1{,}000", "1000")],
    *[(r"10\,000", "10000"), (r"1.5 \times 10^{3}", "1500"), (r"\text{Paris}", "Paris"), ("x^{2}", "x^2")],
    *[(r"\left(1, 2\right)", "(1,2)"), (r"\{1, 2\}", "{1,2}"), (r"5\text{ cm}", "5 cm")],
    *[(r"\frac{-1}{2}", "-1/2"), (r"\frac{1}{-2}", "-1/2"), (r"\frac{-1}{-2}", "0.5"), (r"\frac{+3}{4}", "0.75")],
    # lists
    *[("(1,2)", "(1, 2)"), ("1, 2, 3", "1,2,3"), ("[1, 2.0]", "[1,2]"), ("(0.5, x)", "(1/2,X)"), ("(5)", "5")],
    *[
        ("['a', 'b']", '["a","b"]'),
        ("(1,2),(3,4)", "(1, 2), (3, 4)"),
        ("[[1],[2, 3]]", "[[1], [2,3]]"),
        ("1; 2", "1;2"),
    ],
    # texts
    *[("[0,1)", "[0, 1)"), ("f(1,2)", "f(1, 2)"), ("(1,2", "(1, 2"), ("**4** apples", "4 apples")],
    *[("Paris", " paris. "), ("a  b\nc", "A B C"), ("caf\u00e9", "cafe\u0301"), ("Straße", "STRASSE")],
    *[("**Paris**", "Paris"), ("`x = 1`", "x = 1"), ('"Paris"', "Paris"), ("__init__", "`__init__`")],
]
DIFFERENT = [
    *[("1 1/2", "11/2"), ("1 2", "12"), ("2 1/4", "21/4"), ("1 000", "1000"), ("100 200", "100200"), ("1,2", "12")],
    *[("1,200", "1, 200"), ("2**3**4", "234"), ("[0,1)", "[0,1]")],
    *[("1, 234", "1234"), ("1/0", "0"), ("1 1/0", "1"), ("42 km", "42"), ("0.333", "1/3"), ("9" * 500, "9" * 499)],
    *[("", "0"), ("50%", "50"), ("1e99999", "1e99998"), ("1e5000", "0"), ("nan", "0"), ("inf", "1e4000"), ("4", "-4")],
    *[("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1,2)", "(1,2,3)"), ("()", ""), ("[5]", "5"), ("1,,2", "1,2")],
    *[("(1,2),(3,4)", "(1,2,3,4)"), ("a,b", "b,a"), ("f(1)", "1"), ("((1,2),3)", "(1,(2,3))"), ("a*", "a")],
    *[("2 + 2", "4"), ("x2", "x^2"), ("U.S.", "US"), ("5²", "52"), ("1.2.3", "1.23"), ("0x10", "16"), ("10^", "10")],
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_answers(one: str, other: str) -> None:
    assert same_answer(one, other)
    assert same_answer(other, one)
    assert same_answer(f"**{one}**.", other) or "*" in one


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_answers(one: str, other: str) -> None:
    assert not same_answer(one, other)
    assert not same_answer(other, one)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.fractions())
@example(5e-324)
def test_every_notation_of_a_number_is_it(number: float | Fraction) -> None:
    exact = Fraction(str(number))
    assert same_answer(str(number), f"{exact.numerator}/{exact.denominator}") or len(str(exact)) > 400
    whole, rest = divmod(abs(exact), 1)
    if rest and len(str(exact)) < 100:
        mixed = f"{'-' if exact < 0 else ''}{whole} {rest.numerator}/{rest.denominator}"
        assert same_answer(mixed, str(exact)) and not same_answer(mixed, str(exact + 1))


PIECES = st.sampled_from(
    [*"()[]{},;/^*$%.-+ 0123456789e½", "\\frac", "\\boxed{", "\\text{", "10^", "×", "\u2212", "\ud800", "\0", "\u202f"]
)
HOSTILE = st.one_of(
    st.text(st.characters()),
    st.lists(PIECES, max_size=30).map("".join),
    st.sampled_from(["(" * 50_000, "[" * 20_000 + "]" * 20_000, "9" * 100_000, "1e" + "9" * 390, "10^" + "9" * 390]),
    st.sampled_from(["1/" + "0" * 390, "\\frac{" * 20_000, "1," * 50_000, "{" * 50_000, "١٢", "²", "1 " * 50_000]),
)


@given(HOSTILE, HOSTILE)
def test_nothing_raises_and_every_answer_is_itself(one: str, other: str) -> None:
    assert same_answer(one, other) == same_answer(other, one)
    assert same_answer(one, one)
    assert same_answer(one, f" {one}\n")
    bare_answer(one, other)


def test_marks_without_end_take_no_time_to_speak_of() -> None:
    """Sorting the marks of one letter takes quadratic time: a minute of it for what now takes a moment."""
    text = "a" + "\u0301\u0316" * 200_000
    assert same_answer(text, text) and not same_answer(text, text + "1")
    assert same_answer("a" + "\u0301" * 12, "a" + "\u0301" * 12) and not same_answer("a\u0301", "a\u0316")
