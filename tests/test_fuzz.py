"""Damaged input to every reader: what is not read is refused by name (results/fuzz.py, here a small run).

    python -m pytest tests/test_fuzz.py
"""

import random
import sys

import pytest
from conftest import ROOT

from run import UserError, read_json
from schema import FLAG, TEXT, TOKEN_IDS, checked, listing, one_of, optional, real, record, integer

sys.path.insert(0, str(ROOT / "results"))

import fuzz


@pytest.mark.parametrize("name", fuzz.READERS)
def test_damaged_input_is_read_or_refused(name):
    """Three hundred inputs, other ones than those of the large run: no other error, none takes a second."""
    result = fuzz.fuzz(name, 300, seed=1)
    assert result["inputs"] == 300 and result["faults"] == 0, result["kinds_of_faults"]


@pytest.mark.parametrize("name", ["data", "judge's cache", "config.json", "pairs", "safetensors"])
def test_the_fuzzer_reaches_both_ends(name):
    """Some inputs are whole and some are not, or it would try little."""
    result = fuzz.fuzz(name, 300, seed=2)
    assert 0 < result["refused"] < 300


def test_the_fuzzer_sees_a_fault(monkeypatch):
    """A reader that fails on some inputs, in one way: counted, with the number of the first."""
    def feed(rng: random.Random, folder) -> None:
        if rng.random() < 0.5:
            raise IndexError("no such place")

    monkeypatch.setitem(fuzz.READERS, "broken", (feed, 0))
    result = fuzz.fuzz("broken", 50, seed=0)
    [(fault, kind)] = result["kinds_of_faults"].items()
    assert fault == "IndexError: no such place" and 10 < kind["count"] == result["faults"] < 40



def test_the_large_run_is_on_record():
    """A million inputs or more in all, every reader in them, no fault."""
    record = read_json(ROOT / "results" / "fuzz.json")
    assert record["all"]["inputs"] >= 1_000_000 and record["all"]["faults"] == 0
    assert record["readers"].keys() == fuzz.READERS.keys()


# ------------------------------------------------------------------------- schemas

KINDS = {  # name -> a kind, values of it, values not of it
    "whole": (integer(1, 9), [1, 9], [0, 10, True, 1.0, "1", None, [1], 10**30]),
    "real": (real(0, 1), [0, 1, 0.5, -0.0], [-0.1, 2, float("nan"), float("inf"), True, "0.5", None]),
    "text": (TEXT, ["", "a"], [1, None, ["a"], {}]),
    "flag": (FLAG, [True, False], [0, 1, "false", None]),
    "one_of": (one_of("a", "b"), ["a", "b"], ["c", "", None, ["a"], {}]),
    "listing": (listing(TEXT, least=1), [["a"], ["a", ""]], [[], "a", ["a", 1], {"a": "b"}]),
    "ids": (TOKEN_IDS, [[], [0, 2**31 - 1]], [[-1], [2**31], [True], [1.0], ["1"], None, "", (1,)]),
    "record": (record(dict(a=TEXT, b=optional(FLAG))), [{"a": "x"}, {"a": "x", "b": None}, {"a": "", "c": 1}],
               [{}, {"a": None}, {"a": "x", "b": "true"}, [], "a"]),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_holds_its_own_values_alone(name):
    """Neither booleans among numbers, nor numbers among texts, nor nan anywhere."""
    kind, good, bad = KINDS[name]
    assert all(kind.holds(value) for value in good) and not any(kind.holds(value) for value in bad)


@pytest.mark.parametrize("value, words", [
    ([1], "here holds [1], not a JSON object"), ({}, "here: 'n' is missing; it should be a whole number"),
    ({"n": None}, "here: 'n' is None, not a whole number from 1 to 9"),
    ({"n": "3"}, "here: 'n' is '3', not a whole number from 1 to 9"),
    ({"n": [[[[[[[[1]]]]]]]] * 9}, "here: 'n' is [[[[[[[...]"), ({"n": "x" * 9999}, "xxx...xxx"),
])  # fmt: skip
def test_what_is_refused_is_named_and_cut_short(value, words):
    """File, field, value, and what it should have been, in one line of a sane length."""
    with pytest.raises(UserError) as e:
        checked(value, dict(n=integer(1, 9), m=optional(TEXT)), "here")
    assert words in str(e.value) and len(str(e.value)) < 200
    assert checked({"n": 3, "m": None, "other": [1]}, dict(n=integer(1, 9), m=optional(TEXT)), "here")
