"""Names of layers in little room."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_cache.core import naming
from dora_cache.core.naming import shorten


def expanded(text):
    """Every name that a pattern stands for."""
    pieces = [
        list(_values(piece[1:-1])) if piece.startswith("{") else [piece]
        for piece in re.split(r"(\{[^}]*\})", text)
    ]
    return ["".join(choice) for choice in itertools.product(*pieces)]


def _values(listed):
    for value in listed.split(","):
        first, dots, last = value.partition("..")
        yield from map(str, range(int(first), int(last) + 1)) if dots else [value]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ""),
        (["lm_head"], "lm_head"),
        (
            [f"model.layers.{i}.self_attn.{p}_proj" for i in range(32) for p in "qv"],
            "model.layers.{0..31}.self_attn.{q,v}_proj",
        ),
        (["base_model.model.h.3.fc", "base_model.model.h.4.fc"], "h.{3,4}.fc"),
        (["base_model.model.fc", "fc"], "base_model.model.fc, fc"),
        (["a.query", "a.key"], "a.{query,key}"),
        (["a.lora_A", "a.lora_B"], "a.lora_{A,B}"),
        (["x_x", "x_y_x"], "x_{x,y_x}"),
        ([f"h.{i}" for i in (7, 0, 1, 2, 4, 5)], "h.{0..2,4,5,7}"),
        (["a", "b.c", "d.e.f", "g.h.i.j", "k.l.m.n.o"], "a, b.c, d.e.f, 2 more"),
        ([f"x.{c}" for c in "abcdefghijk"], "x.{a,b,c,d,e,f,g,h,... 3 more}"),
    ],
)
def test_shortened(names, expected):
    """A range of numbers, parts that differ, PEFT's prefix left out, and not too many of each."""
    assert shorten(names) == expected


WORDS = st.sampled_from(["q_proj", "v_proj", "q", "self_attn", "mlp", "x_x", "x_y_x", "01", "1"])
NUMBERS = st.integers(0, 12).map(str)
NAMES = st.lists(
    st.lists(WORDS | NUMBERS, min_size=1, max_size=4).map(".".join), unique=True, max_size=12
)


@given(NAMES)
def test_patterns_stand_for_the_names_and_no_others(names):
    """Expanded, the patterns give each name once, and nothing else."""
    patterns = naming._patterns(names)
    shown = [".".join(map(naming._braces, pattern)) for pattern in patterns]
    if not any("..." in text for text in shown):  # some values are left out
        assert sorted(itertools.chain.from_iterable(map(expanded, shown))) == sorted(names)
