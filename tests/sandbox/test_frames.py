"""The frame parser takes anything."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtpo.sandbox import frames


@given(st.binary(max_size=64))
def test_garbage_is_a_value_error_or_the_end(data):
    try:
        message = frames.read_frame(io.BytesIO(data).read)
    except (ValueError, EOFError):
        return
    assert isinstance(message, dict)


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=4), st.integers(1, 7))
def test_what_is_written_is_read_in_any_pieces(message, piece):
    stream = io.BytesIO(frames.encode(message))
    assert frames.read_frame(lambda count: stream.read(min(count, piece))) == message


def test_lone_surrogates_pass():
    assert frames.read_frame(io.BytesIO(frames.encode({"code": "\ud800é\0"})).read) == {"code": "\ud800é\0"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xff\xff\xff", "at most 131072 bytes, got 4294967295"),
        (b"\0\0\0\x04{}{}", "must hold one JSON object, got 2 more characters"),
        (b"\0\0\0\x02[]", "must hold a JSON object, got list"),
        (b"\0\0\xc3\x50" + b"[" * 50_000, "nested too deeply"),
    ],
)
def test_bad_frames_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        frames.read_frame(io.BytesIO(data).read)


def test_too_much_to_send_is_refused():
    with pytest.raises(ValueError, match="at most 131072 bytes, got 200007"):
        frames.encode({"a": "x" * 199_999})
