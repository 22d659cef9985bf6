"""Random bytes and text that resemble what a parser expects; input that grows."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from hypothesis import strategies as st

from .search import Property

__all__ = ["HOSTILE", "edited", "linear", "names", "pieces", "text_of"]

Data = TypeVar("Data", str, bytes)

HOSTILE: Final = (b"\n", b"\r", b"\r\n", b"\t", b"\0", b"\x1b[2J", b"\\", b"\xff", b"\xc2\x85", "\u2028".encode(), b" ")
"""What ends lines, and what terminals obey; what is not UTF-8."""

_TIMES: Final = 8
_SIZES: Final = (1 << 11, 1 << 14, 1 << 17)  # bytes or characters; what is quadratic must not take hours
_ENOUGH: Final = 0.01  # seconds, below which nothing is measured
_AT_ODDS: Final = 3.0  # times what is linear; quadratic would be _TIMES


def pieces(tokens: Sequence[bytes], most: int = 30) -> st.SearchStrategy[bytes]:
    """Bytes of a parser's tokens, in any order, and of what none expects."""
    piece = st.one_of(st.sampled_from(tokens), st.sampled_from(HOSTILE), st.binary(max_size=3))
    return st.lists(piece, max_size=most).map(b"".join)


def text_of(tokens: Sequence[str], most: int = 12) -> st.SearchStrategy[str]:
    """Text of a parser's tokens, in any order, and of any characters, half ones too."""
    anything = st.text(st.characters(exclude_categories=()), max_size=3)
    return st.lists(st.one_of(st.sampled_from(tokens), anything), max_size=most).map("".join)


def names(most: int, without: bytes = b"\0") -> st.SearchStrategy[bytes]:
    """Names that users give to processes, files and cgroups: any bytes but some."""
    hostile = st.lists(st.one_of(st.sampled_from(HOSTILE), st.binary(max_size=4)), max_size=most).map(b"".join)
    return hostile.map(lambda name: name.translate(None, without)[:most] or b"x")


@st.composite
def edited(draw: st.DrawFn, originals: st.SearchStrategy[bytes], tokens: Sequence[bytes] = HOSTILE) -> bytes:
    """Bytes that were valid, and of which something was cut, repeated, overwritten or put in."""
    data = draw(originals)
    for _ in range(draw(st.integers(0, 4))):
        start, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        middle = data[start:end]
        data = draw(
            st.sampled_from(
                [
                    data[:start],
                    data[:start] + data[end:],
                    data[:end] + middle + data[end:],
                    data[:start] + draw(st.sampled_from(tokens)) + data[start:],
                    data[:start] + draw(st.binary(min_size=1, max_size=8)) + data[start + 1 :],
                ]
            )
        )
    return data


def linear(
    name: str, heads: st.SearchStrategy[Data], units: st.SearchStrategy[Data], parse: Callable[[Data], object]
) -> Property:
    """The property that input of eight times the size takes eight times as long: a head, and a unit again and again."""

    def check(example: tuple[Data, Data, Data]) -> None:
        head, unit, tail = example

        def took(size: int) -> float:
            data = head + unit * (size // len(unit)) + tail
            gc.disable()  # it walks over all that the tests hold, the oftener the more the parser makes
            try:
                began = time.thread_time()
                parse(data)
                return time.thread_time() - began
            finally:
                gc.enable()

        for small, large in itertools.pairwise(_SIZES):
            for _ in range(4):  # a machine that others use is slow for a moment
                long = took(large)
                if long <= _ENOUGH or long <= _AT_ODDS * _TIMES * took(small):
                    break
            else:
                raise AssertionError(f"{took(small):.4f} s for {small}, {took(large):.4f} s for {large}")

    examples: Any = st.tuples(heads, units.filter(bool), heads)
    return Property(name, examples, check, shrinks=False)
