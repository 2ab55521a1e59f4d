"""checks.extract and checks.verify: final answers of math and multiple-choice responses.

Awkward responses stand in tables; the right answers of the real GSM8K and SVAMP are read too.
"""

import json
from decimal import Decimal
from pathlib import Path

import pytest

from checks import extract, math_answer, number, verify
from data import Example

SHARED = Path(__file__).parents[2] / "shared" / "data"

STRICT_MATH = [  # response, the number after the last ####
    ("so 5 + 3 = 8\n#### 8", "8"), ("#### 1,080", "1080"), ("#### 1,234,567", "1234567"), ("#### -5", "-5"),
    ("#### \u22125", "-5"), ("#### $18", "18"), ("#### $18.", "18"), ("#### -$7.50", "-7.5"),
    ("#### $-7.5", "-7.5"), ("#### 72 clips", "72"), ("####72", "72"), ("####  72  ", "72"),
    ("#### **72**", "72"), ("#### 50%", "50"), ("#### 0.5", "0.5"), ("#### .5", "0.5"), ("#### 3.0", "3"),
    ("#### 1,080.25", "1080.25"), ("#### +4", "4"), ("#### \u20ac12", "12"), ("#### 007", "7"),
    ("#### 18.00", "18"), ("#### 1000", "1000"), ("#### 0", "0"), ("#### -0", "0"), ("#### 4\n#### 6", "6"),
    ("#### 4\nwait\n#### ", None), ("The answer is 8", None), ("#### eight", None), ("", None),
    ("####", None), ("#### 1/2", None), ("#### 1,08,0", None), ("### 8", None), ("#### \n12", "12"),
    ("#### = 12", "12"), ("#### 3km", "3"), ("#### \\(42\\)", "42"), ("#### 12.5 dollars", "12.5"),
    ("#### " + "9" * 60, "9" * 60), ("#### 0." + "3" * 60, "0." + "3" * 60),
]
LOOSE_MATH = [  # response without a readable ####, its last number
    ("The answer is 8.", "8"), ("8 apples and 12 pears", "12"), ("it is -3", "-3"), ("10-3 is 7", "7"),
    ("between 5-10", "10"), ("costs $1,080.50 in all", "1080.5"), ("no number", None),
    ("#### eight, that is 8", "8"), ("x2 is a name, 9 is not", "9"), ("on 3, 4 and .5", "0.5"), ("60%", "60"),
    ("a) 4 b) 6", "6"), ("The total:\n- 5 apples", "5"), ("Between 3 - 5", "5"), ("It is - $ 5", "5"),
    ("It is -$ 5", "-5"), ("I owe $ 5", "5"),
]
STRICT_CHOICE = [  # response, letter; four choices
    ("The answer is: B", "B"), ("the answer is: B.", "B"), ("The answer is: <C>", "C"),
    ("The answer is: **D**", "D"), ("The answer is: (A)", "A"), ("The answer is (A)", "A"),
    ("The answer is B.", "B"), ("The answer is B", "B"), ("The correct answer is: C", "C"),
    ("THE ANSWER IS: D", "D"), ("The answer is: A: shady areas", "A"),
    ("The answer is: A\nThe answer is: B", "B"), ("The answer is: E", None), ("The answer is: b", None),
    ("The answer is: Because", None), ("The answer is A good idea", None), ("B", None), ("Answer: B", None),
    ("", None), ("The answer is:\nC", "C"), ("The answer is: <X>", None), ("The answer is: [B]", "B"),
    ("the best answer is: D)", "D"), ("'The answer is: B'", "B"), ('The answer is: "B"', "B"),
    ("The answer is B because A is wrong.", "B"), ("The answer is C rather than D", "C"),
    ("The answer is: B's", None), ("The answer is A: shady", "A"),
]
LOOSE_CHOICE = [  # the last letter that stands alone
    ("I choose B.", "B"), ("A dog barks, so C", "C"), ("(D)", "D"), ("A dog", None), ("B's", None),
    ("E", None), ("'B'", "B"), ("I'D rather not", None),
]


@pytest.mark.parametrize(("text", "value"), STRICT_MATH)
def test_a_math_answer_is_the_number_after_the_last_marker(text, value):
    """Only what follows the last #### counts, in its shortest exact form."""
    assert extract("math", text) == value


@pytest.mark.parametrize(("text", "value"), LOOSE_MATH)
def test_without_a_marker_a_flexible_math_answer_is_the_last_number(text, value):
    """Signs count unless they follow a number; fractions and names with digits are passed over."""
    assert extract("math", text, flexible=True) == value


@pytest.mark.parametrize(("text", "letter"), STRICT_CHOICE)
def test_a_chosen_letter_follows_the_answer_is(text, letter):
    """With or without a colon and brackets; the beginning of a phrase is no letter."""
    assert extract("choice", text, 4) == letter


@pytest.mark.parametrize(("text", "letter"), LOOSE_CHOICE)
def test_without_that_a_flexible_choice_is_the_last_letter_on_its_own(text, letter):
    """The article in "A dog" is not one."""
    assert extract("choice", text, 4, flexible=True) == letter


@pytest.mark.parametrize(("text", "value"), [row for row in STRICT_MATH if row[1] is not None])
def test_flexible_reading_changes_no_answer_that_strict_reading_finds(text, value):
    """A readable marker always wins."""
    assert extract("math", text, flexible=True) == value


def test_answers_are_compared_as_exact_decimals():
    """1,080.00 is 1080 and not 1080.01; an example without a number or letter to find gives None."""
    e = Example("1", "q", "test", answer=number("1,080.00"), style="math")
    assert verify(e, "#### 1080") and verify(e, "#### $1,080.0") and not verify(e, "#### 1080.01")
    assert verify(Example("1", "q", "test"), "#### 1") is None


OWN_ANSWERS = [  # the answer of a user's own file, a response, whether it is right
    ("12", "6 + 6 = 12.", True), ("12", "It is 13.", False), ("12", "No idea.", False), ("7", "77", False),
    ("1,000", "about 1000", True), ("50%", "It is 50 percent", True), ("-3", "x = -3", True),
    ("12.50", "$12.5", True), ("12", "The answer is 12, since 2 times 6 is that of 2.", True),
    ("12", "\\boxed{12} as 3 < 4", True), ("12", "#### 12\nas 3 < 4", True),
    ("12", "Answer: 12 (of 40)", True), ("4", "the answer is clear: 2+2=4", True),
    ("B", "The answer is: B", True), ("b", "I choose B.", True), ("B", "A or B? C.", False),
    ("B", "Because", False), ("Paris", "The capital is Paris.", True), ("Paris", "Parisians", False),
    ("paris", "PARIS!", True), ("the Eiffel Tower", "It is Eiffel tower!", True),
    ("New York", "York, new", False), ("yes", "Yes, there is no doubt.", True),
    ("yes", "No. Some say yes.", False), ("no", "No, yes is wrong", True), ("True", "It is true", True),
    ("false", "That is true, not false", False), ("yes", "Perhaps", False), ("1/2", "It is 1/2.", True),
    ("北京", "首都是北京。", True), ("北京", "首都是东京。", False), ("café", "cafe\u0301", True),
    ("5", "The total:\n- 5 apples", True), ("B", 'The answer is: "B"', True),
    ("x", "", False), ("I", "I think the answer is J.", False), ("J", "I think the answer is J.", True),
]


@pytest.mark.parametrize(("gold", "text", "right"), OWN_ANSWERS)
def test_an_answer_of_a_users_own_file_is_compared(gold, text, right):
    """A number by the one that is called the answer, else the last; words wherever they are said."""
    assert verify(Example("1", "q", "test", answer=gold), text) is right


@pytest.mark.parametrize("gold", ["a b c d e f g", "x" * 61, "", " ", "!?", "word " * 40])
def test_an_answer_that_is_long_or_empty_is_not_compared(gold):
    """Rules would guess."""
    assert verify(Example("1", "q", "test", answer=gold), gold) is None


GOES_ON = [  # response, its own answer, the one after the last ####
    ("#### 8\n\nExample 9:\nQuestion: ?\nAnswer: 3\n#### 3", "8", "3"),
    ("5 + 3 = 8\n#### 8\n\nNew question: ?\n#### 3", "8", "3"),
    ("#### 8\n\n**Example 9:**\n#### 3", "8", "3"), ("#### 8\n\n### Question 2:\n#### 3", "8", "3"),
    ("#### 8\nQuestion: ?\nAnswer:\n#### 3", "8", "3"), ("#### 8\n\nExample 9\n#### 3", "8", "3"),
    ("#### 8\n\nproblem 2: ?\n#### 3", "8", "3"),
    ("The answer is 8.\n\nExample 9:\n#### 3", None, "3"),  # no answer in the form that was asked for
    ("Question: he has 5\nAnswer: 8\n#### 8", "8", "8"),  # the question that was asked, repeated
    ("Example 9:\nQuestion: he has 5\nAnswer: 8\n#### 8", "8", "8"),
    ("Example 9:\nQuestion: 5?\n#### 8\n\nExample 10:\n#### 3", "8", "3"),
    ("He has 5.\nQuestion: how many more?\n3 more.\n#### 8", "8", "8"),  # a step of the reasoning
    ("#### 8\nThat is for example 3 more.", "8", "8"), ("#### 4\n#### 8", "8", "8"),
    ("#### 8\nThe question was easy.", "8", "8"), ("#### 8", "8", "8"), ("", None, None),
]


@pytest.mark.parametrize(("text", "own", "last"), GOES_ON)
def test_a_math_answer_stands_before_questions_of_the_models_own(text, own, last):
    """What follows an invented "Example 9" answers nothing that was asked."""
    assert (extract("math", text), math_answer(text, flexible=False)) == (own, last)


def test_without_a_marker_the_last_number_before_an_invented_example_counts():
    """In flexible reading."""
    assert extract("math", "The answer is 8.\n\nExample 9:\n#### 3", flexible=True) == "8"


def gsm8k_solutions() -> list[tuple[str, str]]:
    """(worked solution, right answer) of every problem of GSM8K."""
    rows = []
    for name in ("train", "test"):
        lines = (SHARED / "gsm8k" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        solutions = [json.loads(line)["answer"] for line in lines]
        rows += [(solution, solution.rsplit("#### ", 1)[1]) for solution in solutions]
    return rows


@pytest.mark.skipif(not SHARED.exists(), reason="the real files are not at hand")
def test_every_right_answer_of_gsm8k_is_read():
    """From the solution and alone, compared with the digits themselves."""
    rows = gsm8k_solutions()
    assert len(rows) == 7473 + 1319
    for solution, gold in rows:  # an independent reading: keep digits, sign and point
        exact = Decimal("".join(c for c in gold if c.isdigit() or c in "-."))
        assert Decimal(extract("math", solution)) == exact == Decimal(number(gold))


@pytest.mark.skipif(not SHARED.exists(), reason="the real files are not at hand")
def test_every_right_answer_of_svamp_is_read():
    """They are floats such as 51.0; the answer is the whole number."""
    rows = json.loads((SHARED / "svamp" / "SVAMP.json").read_text(encoding="utf-8"))
    assert len(rows) == 1000
    for row in rows:
        assert Decimal(number(str(row["Answer"]))) == Decimal(repr(row["Answer"]))
        assert extract("math", f"#### {row['Answer']}") == str(int(row["Answer"]))
