"""The data sets of the paper: from folders laid out as on the hub, and as commands that ask a fake hub.

Rows are made up, in the schemas of the real ones; GSM8K and SVAMP are checked on the real files too.
"""

import csv
import dataclasses
import functools
import http.server
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest
from conftest import FakeHub, write_model
from tokenizers import Tokenizer

import contexts
import data
from data import Example, load_examples
from run import UserError

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"
SPLITS, SHA, PART = ("train", "validation", "test"), "0123456789" * 4, "-00000-of-00001.parquet"
ARROW = importlib.util.find_spec("pyarrow") is not None


# ------------------------------------------------------------------------------------------- made-up rows

def conversation(number: int, user: int, answers: list[tuple]) -> dict:
    """PRISM: a first turn with the answers (text, chosen, score), and a second turn that nobody wants."""
    turns = [(f"Prompt {number}?", answers), ("More!", [("Later A.", True, 70), ("Later B.", False, 52)])]
    history = []
    for turn, (prompt, texts) in enumerate(turns):
        history += [dict(turn=turn, role="user", content=prompt)]
        history += [dict(turn=turn, role="model", content=text, model_name=f"M{i}", model_provider="X",
                         score=score, if_chosen=chosen, within_turn_id=i)
                    for i, (text, chosen, score) in enumerate(texts)]
    return dict(conversation_id=f"c{number}", user_id=f"user{user}", conversation_type="values guided",
                opening_prompt=f"Prompt {number}?", conversation_turns=2, conversation_history=history,
                performance_attributes=dict(fluency=90, values=None), choice_attributes={}, open_feedback="")


def person(user: int) -> dict:
    """PRISM: a user's line of the survey."""
    return dict(user_id=f"user{user}", survey_only=user >= 1396, self_description=f"I am number {user}.",
                system_string=f"Be kind to user {user}. Be brief.", stated_prefs=dict(other_text=None))


def comparison(number: int, annotator: int, lang: str = "en", **changes: str) -> dict:
    """Community Alignment: a conversation of two turns, with empty cells for those that never came."""
    row = dict(conversation_id=number, assigned_lang=lang, annotator_id=annotator)
    for turn in ("first", "second", "third", "fourth"):
        cells = {f"response_{x}": f"{turn} {x} of {number}." for x in "abcd"}
        cells |= dict(prompt=f"Prompt {number}, {turn}?", preferred_response="response_c", feedback="Fine")
        row |= {f"{turn}_turn_{k}": text * (turn in ("first", "second")) for k, text in cells.items()}
    return row | dict(annotator_age="18-34", annotator_country="united states", wave=1) | changes


def instruction(number: int, prompt: str = "", rubrics: str = "rubrics") -> dict:
    """Multifaceted Bench: an instruction with four preferences and a rubric for each."""
    dimensions = ("style", "background_knowledge", "informativeness", "harmlessness")
    return {"source": "self-instruct", "system": "You are kind.", "prompt": prompt or f"Prompt {number}?",
            "reference_answer": f"Answer {number}.", "preference_set": [
                dict(dimension=d, subdimension=f"kind {number}.{i}", preference=f"taste {number}.{i}",
                     description=f"This preference values {number}.{i}.") for i, d in enumerate(dimensions)],
            rubrics: [dict(criteria=f"Does it honour {number}.{i}?",
                           score_descriptions={str(s): f"It is a {s} on {number}.{i}." for s in range(1, 6)})
                      for i in range(4)]}  # fmt: skip


def problems(name: str, count: int, final: str = "72") -> list[dict]:
    """GSM8K: so many rows with one final answer."""
    return [dict(question=f"How many {name}{n} are there?", answer=f"48/2 = <<48/2=24>>24.\n#### {final}")
            for n in range(count)]


def svamp(number: int, body: str = "I had 76.", answer: str | float = "51.0") -> dict:
    """SVAMP."""
    return dict(ID=f"chal-{number}", Body=body, Question=f"How many are left of {number}?",
                Equation="( 76.0 - 25.0 )", Answer=answer, Type="Common-Divison")


def science(name: str, labels: str = "ABCD", key: str = "B") -> dict:
    """ARC: a question whose choices are text A, text B, ... by their labels."""
    return dict(id=f"Mercury_{name}", question=f"Why {name}?", answerKey=key,
                choices=dict(text=[f"text {x}" for x in labels], label=list(labels)))


def exam(name: str, right: int = 2) -> dict:
    """MMLU."""
    return dict(question=f"What is {name}?", subject="anatomy", choices=["p", "q", "r", "s"], answer=right)


def encode(path: str, rows: list[dict] | str) -> bytes:
    """The rows as the file's name says: jsonl, json, csv or parquet; a text as it is."""
    if isinstance(rows, str):
        return rows.encode()
    if path.endswith((".json", ".jsonl")):
        return (json.dumps(rows) if path.endswith("n") else "\n".join(map(json.dumps, rows)) + "\n").encode()
    if path.endswith(".csv"):
        writer = csv.DictWriter(text := io.StringIO(), list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(rows), buffer := io.BytesIO())
    return buffer.getvalue()


def place(folder: Path, files: dict[str, list[dict] | str]) -> Path:
    """Write the files into the folder."""
    for path, rows in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(encode(path, rows))
    return folder


def loaded(name: str, *folders: Path) -> list[Example]:
    """All rows of the set, whatever their split."""
    examples, _ = data.load_paper_data(name, ",".join(map(str, folders)))
    return examples


# ----------------------------------------------------------------- repositories, as large as the real ones

PRISM, COMMUNITY, BENCH = ("HannahRoseKirk/prism-alignment", "facebook/community-alignment-dataset",
                           "kaist-ai/Multifaceted-Bench")
GSM8K, SVAMP, ARC, MMLU = "openai/gsm8k", "ChilleD/SVAMP", "allenai/ai2_arc", "cais/mmlu"
FOUR = [("Wrong 1.", False, 41), ("Wrong 2.", False, 52), ("Right.", True, 88), ("Wrong 3.", False, 41)]
COUNTS = dict(Easy=(2251, 570, 2376), Challenge=(1119, 299, 1172))
CONTENTS = {  # repository -> its files; a text is of no use to anyone
    PRISM: lambda: {"survey.jsonl": [person(u) for u in range(1500)], "utterances.jsonl": "stray",
                    "conversations.jsonl": [conversation(n, n % 1396, FOUR) for n in range(8011)]},
    COMMUNITY: lambda: {"community_alignment.csv": [comparison(n, n % 1501, "en" if n % 8 else "fr")
                                                    for n in range(8800)]},
    BENCH: lambda: {f"data/train{PART}": [instruction(n) for n in range(921)]},
    GSM8K: lambda: {f"main/train{PART}": problems("a", 7473), f"main/test{PART}": problems("b", 1319),
                    f"socratic/train{PART}": "stray"},
    SVAMP: lambda: {"train.json": [svamp(n) for n in range(700)], f"data/train{PART}": "stray",
                    "test.json": [svamp(n) for n in range(700, 1000)]},
    ARC: lambda: {f"ARC-{part}/{split}{PART}": [science(f"{part} {split}{n}") for n in range(count)]
                  for part in COUNTS for split, count in zip(SPLITS, COUNTS[part], strict=True)},
    MMLU: lambda: {f"all/{file}{PART}": [exam(f"{file}{n}") for n in range(count)] for file, count in
                   dict(auxiliary_train=5500, validation=1531, test=1404).items()} |
                  {f"all/dev{PART}": "stray", f"anatomy/test{PART}": "stray"},
}  # fmt: skip
SOURCE = ("auxiliary_train", "validation", "test")  # MMLU's names of the three parts
MAIN = {GSM8K: [f"main/test{PART}", f"main/train{PART}"]}
SETS = {  # data set -> the files that are fetched, rows to train, validate and test with, words of its terms
    "prism": ({PRISM: ["conversations.jsonl", "survey.jsonl"]}, (7294, 194, 194),
              ["CC-BY-4.0", "CC-BY-NC-4.0", "10.57967/hf/2113"]),
    "community": ({COMMUNITY: ["community_alignment.csv"]}, (6564, 200, 200), ["CC-BY-4.0"]),
    "multibench": ({BENCH: [f"data/train{PART}"]}, (3600 - 84, 84, 84), ["CC-BY-4.0"]),
    "gsm8k": (MAIN, (5000, 200, 200), ["MIT"]),
    "svamp": ({SVAMP: ["test.json", "train.json"]} | MAIN, (1400, 200, 300), ["MIT"]),
    "arc-easy": ({ARC: [f"ARC-Easy/{s}{PART}" for s in SPLITS]}, (2251, 570, 500), ["CC-BY-SA-4.0"]),
    "arc-challenge": ({ARC: [f"ARC-Challenge/{s}{PART}" for s in SPLITS]}, (1119, 299, 500),
                      ["CC-BY-SA-4.0"]),
    "mmlu": ({MMLU: [f"all/{s}{PART}" for s in SOURCE]}, (5000, 200, 500), ["MIT"]),
}  # fmt: skip
every = pytest.mark.parametrize("name", SETS)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """(name) -> what --data takes for the set's copy; repositories lie under shelf.root."""
    @functools.cache
    def copy(repository: str) -> Path:
        return place(source.root / repository, CONTENTS[repository]() | {"README.md": "# stray"})

    def source(name: str) -> str:
        return f"{name}:{','.join(str(copy(repository)) for repository in SETS[name][0])}"

    source.root = tmp_path_factory.mktemp("shelf")
    return source


@every
def test_parts_have_the_sizes_of_the_paper_and_share_nothing(name, shelf, capsys):
    """No user, or no prompt, is in two parts; they are the same for every seed; terms are printed once."""
    _, sizes, terms = SETS[name]
    data.print_once.cache_clear()
    parts = [load_examples(shelf(name), split, 0) for split in SPLITS]
    assert tuple(map(len, parts)) == sizes and len({e.id for part in parts for e in part}) == sum(sizes)
    assert all(e.split == split for part, split in zip(parts, SPLITS, strict=True) for e in part)
    keys = [{e.user if name in ("prism", "community") else e.prompt for e in part} for part in parts]
    assert None not in keys[0] and sum(map(len, keys)) == len(set.union(*keys))
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if all(word in line for word in terms)]) == 1, lines
    assert [load_examples(f"{shelf(name)}/.", split, 1) for split in SPLITS] == parts  # loaded anew


@pytest.mark.parametrize("name", ["prism", "community"])
def test_the_rejected_response_is_any_of_the_others(name, shelf):
    """Each of the three is drawn in about a third of the rows, never the chosen one."""
    drawn = Counter(re.sub(" of .*", "", e.human_rejected) for e in load_examples(shelf(name), "train"))
    others = {"prism": {"Wrong 1.", "Wrong 2.", "Wrong 3."}, "community": {"first a", "first b", "first d"}}
    assert drawn.keys() == others[name] and min(drawn.values()) > 0.3 * drawn.total()


# ------------------------------------------------------------------------------------- PRISM and Community

SHORT = "Give me short 2-3 sentence answers to the following prompt: {} Respond with short 2-3 sentences."
PLEASE = " Please respect the following requirements made by the user: "


def prism(tmp_path: Path, *answers: tuple) -> list[Example]:
    """PRISM of one conversation with these answers in its first turn."""
    files = {"survey.jsonl": [person(5), person(1400)], "conversations.jsonl": [conversation(7, 5, answers)]}
    return loaded("prism", place(tmp_path, files))


def community(tmp_path: Path, *rows: dict, file: str = "community_alignment.csv") -> list[Example]:
    """Community Alignment of these rows."""
    return loaded("community", place(tmp_path, {file: list(rows)}))


def test_prism_is_first_turns_with_the_users_own_words(tmp_path):
    """Prompt and answers of turn 0, the user's system_string as context, the short user turn."""
    [e] = prism(tmp_path, ("Bad.", False, 41), ("Good.", True, 88))
    context = "Be kind to user 5. Be brief."
    assert (e.prompt, e.user, e.context, e.items) == ("Prompt 7?", "user5", context, [context])
    assert (e.reference, e.human_rejected, e.style) == ("Good.", "Bad.", "short")
    assert e.answer is e.choices is None
    assert e.user_message(context) == SHORT.format("Prompt 7?" + PLEASE + context)
    assert e.user_message(None) == SHORT.format("Prompt 7?")


G, B, EMPTY = ("Good.", True, 88), ("Bad.", False, 41), "EMPTY STRING"


@pytest.mark.parametrize(("answers", "left"), [
    ([G, G, B], 1), ([("Good.", False, 88), G, B], 1), ([("Good.", True, None), ("Bad.", False, None)], 1),
    ([(EMPTY, False, 1), G, B], 1), ([G], 0), ([G, G], 0), ([G, ("Good.", False, 88)], 0),
    ([G, (EMPTY, False, 1)], 0), ([(EMPTY, True, 9), B], 0), ([B, ("Sad.", False, 9)], 0),
], ids=["chosen twice", "equal text", "no scores", "an empty one", "no other", "no other, twice", "itself",
        "no other, empty", "empty chosen", "none chosen"])  # fmt: skip
def test_an_incomplete_prism_row_is_left_out(answers, left, tmp_path):
    """One row where a chosen and another text are left, else none at all."""
    assert [(e.reference, e.human_rejected) for e in prism(tmp_path, *answers)] == [("Good.", "Bad.")] * left


@pytest.mark.parametrize("file", ["community_alignment.csv", "data/filtered_community_alignment.csv"])
def test_community_is_english_first_turns(file, tmp_path):
    """The label names the reference; contexts come later; cells keep their commas, quotes and lines."""
    prompt = 'Tell me, "please",\nhow né is said 👍'
    rows = comparison(17, 5, first_turn_prompt=prompt), comparison(18, 5, "fr"), comparison(19, 5, "hi")
    [e] = community(tmp_path, *rows, file=file)
    assert (e.prompt, e.user, e.context, e.items, e.style) == (prompt, "5", None, None, "short")
    assert e.reference == "first c of 17." and e.human_rejected in {f"first {x} of 17." for x in "abd"}
    assert e.user_message(None) == SHORT.format(prompt)
    assert e.user_message("C.") == SHORT.format(prompt + PLEASE + "C.")


END = "<|end_of_text|>"


@pytest.mark.parametrize(("answers", "label", "left"), [
    (["", "", f"Good.{END}", f"Bad.{END}"], "response_c", 1), (["Bad.", "", "", "Good."], "response_d", 1),
    (["Good.", f"Good.{END}", "Good.", "Bad."], "response_b", 1), (["Good."] * 4, "response_a", 0),
    (["", "", "Good.", ""], "response_c", 0), (["Bad.", "Good.", "", "Bad."], "response_c", 0),
    (["Bad.", "Good.", "", "Bad."], "", 0),
], ids=["end of text", "missing", "equal text", "all the same", "no other", "empty chosen", "no label"])
def test_an_incomplete_community_row_is_left_out(answers, label, left, tmp_path):
    """One row where a chosen and another text are left, else none; its neighbour is always there."""
    cells = {f"first_turn_response_{x}": text for x, text in zip("abcd", answers, strict=True)}
    odd = comparison(1, 5, first_turn_preferred_response=label, **cells)
    rows = {e.prompt: (e.reference, e.human_rejected) for e in community(tmp_path, odd, comparison(2, 5))}
    assert rows.pop("Prompt 2, first?") and list(rows.values()) == [("Good.", "Bad.")] * left


def test_an_annotators_second_row_of_a_prompt_is_left_out(tmp_path):
    """Another annotator's row of the same prompt is not."""
    rows = [comparison(n, user, first_turn_prompt="Same?") for n, user in enumerate([5, 5, 6, 5])]
    assert sorted((e.prompt, e.user) for e in community(tmp_path, *rows)) == [("Same?", "5"), ("Same?", "6")]


# ------------------------------------------------------------------------------------------- Multi-Bench

@pytest.mark.parametrize("file", [f"data/train{PART}", "any.jsonl"])
@pytest.mark.parametrize("column", ["rubrics", "rubric"])
def test_multibench_has_a_row_for_each_preference(file, column, tmp_path):
    """With its own rubric: the criteria and five descriptions; and the context is its items."""
    rows = [instruction(n, rubrics=column) for n in (1, 2)]
    found = loaded("multibench", place(tmp_path, {file: rows}))
    examples = {e.preference["subdimension"].removeprefix("kind "): e for e in found}
    assert sorted(examples) == [f"{n}.{i}" for n in (1, 2) for i in range(4)]
    for name, e in examples.items():
        assert e.preference in rows[int(name[0]) - 1]["preference_set"]
        assert (e.prompt, e.reference, e.style) == (f"Prompt {name[0]}?", f"Answer {name[0]}.", "plain")
        assert [n for n in examples if n in e.rubric] == [n for n in examples if n in e.context] == [name]
        assert f"Does it honour {name}?" in e.rubric
        assert all(f"It is a {score} on {name}." in e.rubric for score in range(1, 6))
        assert e.context == " ".join(e.items) and len(found) == 8
        assert e.user_message(e.context) == e.prompt + PLEASE + e.context


def test_multibench_prompts_stay_together(tmp_path):
    """Instructions with one prompt stand in one part."""
    rows = [instruction(n, prompt=f"Prompt {n // 2}?") for n in range(80)]
    found = {(e.prompt, e.split) for e in loaded("multibench", place(tmp_path, {"a.jsonl": rows}))}
    assert len(found) == len({prompt for prompt, _ in found}) and {split for _, split in found} == set(SPLITS)


def test_an_old_multibench_is_refused(tmp_path):
    """Without preference_set there is nothing to respect: one line that names the column."""
    row = {k: v for k, v in instruction(1, rubrics="rubric").items() if k != "preference_set"}
    with pytest.raises(UserError, match=r"^[^\n]*preference_set[^\n]*$"):
        loaded("multibench", place(tmp_path, {"a.jsonl": [row]}))


# ------------------------------------------------------------------------------------------- mathematics

@pytest.mark.parametrize("form", [f"main/{{}}{PART}", "{}.jsonl"])
def test_gsm8k_answers_are_numbers(form, tmp_path):
    """What follows ####, without commas; the test part is test rows, the others training ones."""
    golds = {"72": "72", "1,080": "1080", "109,200,000": "109200000", "-10": "-10"}
    test = [*chain(*[problems(gold, 1, gold) for gold in golds]), *problems("b", 196)]
    files = {form.format("train"): problems("a", 5300), form.format("test"): test}
    rows = loaded("gsm8k", place(tmp_path, files))
    answers = {e.prompt: e.answer for e in rows if e.split == "test"}
    assert [answers.pop(row["question"]) for row in test] == [*golds.values(), *["72"] * 196] and not answers
    assert {e.prompt for e in rows if e.split != "test"} <= {row["question"] for row in problems("a", 5300)}
    assert {(e.style, e.context, e.user) for e in rows} == {("math", None, None)}


@pytest.mark.parametrize("twin", [False, True], ids=["train.json, test.json", "SVAMP.json"])
@pytest.mark.parametrize("answer", ["51.0", 51.0], ids=["str", "float"])
def test_svamp_is_body_and_question(twin, answer, tmp_path):
    """A body without its full stop gets one; the hub's parts stay; the rest is GSM8K's training rows."""
    rows = [svamp(n, "I had 76" if n % 2 else "I had 76.", answer) for n in range(1000)]
    files = {"SVAMP.json": rows} if twin else {"train.json": rows[:700], "test.json": rows[700:]}
    gsm = {"train.jsonl": problems("a", 5300), "test.jsonl": problems("b", 300)}
    examples = loaded("svamp", place(tmp_path / "s", files), place(tmp_path / "g", gsm))
    split, texts = {e.prompt: e.split for e in examples}, [f"I had 76. {row['Question']}" for row in rows]
    assert twin or [split[text] for text in texts] == ["train"] * 700 + ["test"] * 300
    assert Counter(split.pop(text) for text in texts) == dict(train=700, test=300)
    assert Counter(split.values()) == dict(train=700, validation=200)
    assert split.keys() <= {row["question"] for row in gsm["train.jsonl"]}
    assert {(e.answer, e.style) for e in examples if e.prompt not in split} == {("51", "math")}


@pytest.mark.skipif(not (REAL / "gsm8k").is_dir(), reason="the real files are not at hand")
def test_the_real_gsm8k_and_svamp_load_as_they_are():
    """Sizes, parts that share no problem, answers, and the eight-shot prompt."""
    gsm = [[json.loads(line) for line in (REAL / "gsm8k" / f"{part}.jsonl").read_text().splitlines()]
           for part in ("train", "test")]
    gold = {row["question"]: row["answer"].split("#### ")[1].replace(",", "") for row in chain(*gsm)}
    for row in json.loads((REAL / "svamp" / "SVAMP.json").read_text()):
        gold[row["Body"].removesuffix(".") + ". " + row["Question"]] = str(int(row["Answer"]))
    for name, folders in (("gsm8k", REAL / "gsm8k"), ("svamp", f"{REAL / 'svamp'},{REAL / 'gsm8k'}")):
        parts = [load_examples(f"{name}:{folders}", split) for split in SPLITS]
        assert tuple(map(len, parts)) == SETS[name][1]
        assert all(e.answer == gold[e.prompt] for part in parts for e in part)
        train, validation, test = ({e.prompt for e in part} for part in parts)
        assert not train & validation and not test & (train | validation)
    shown, first = (REAL / "eight_shot_prompt.txt").read_text().rstrip("\n"), gsm[0][0]["question"]
    e = load_examples(f"gsm8k:{REAL / 'gsm8k'}", "train")[0]
    assert e.user_message(None) == shown.replace(first, e.prompt) and shown.endswith(first)


# ------------------------------------------------------------------------------------------- choices

@pytest.mark.parametrize("suffix", [PART, ".jsonl"])
@pytest.mark.parametrize("part", ["Easy", "Challenge"])
def test_arc_letters_go_by_position(part, suffix, tmp_path):
    """Labels are letters or digits, of 3 to 5 choices; a line "A: text" for each after the question."""
    labels = ["ABCD", "1234", "ABC", "ABCDE", "123", "12345", "BADC"]
    rows = {(word, i): science(f"{word} {i}", word, word[i]) for word in labels for i in range(len(word))}
    files = {f"ARC-{part}/{split}{suffix}": [science(split)] for split in SPLITS}
    files[f"ARC-{part}/train{suffix}"] = list(rows.values())
    examples = {e.id: e for e in loaded(f"arc-{part.lower()}", place(tmp_path, files)) if e.split == "train"}
    assert examples.keys() == {row["id"] for row in rows.values()}
    for (word, i), row in rows.items():
        e, texts = examples[row["id"]], [f"text {x}" for x in word]
        lines = [f"{letter}: {text}" for letter, text in zip("ABCDE", texts, strict=False)]
        assert (e.answer, e.choices, e.style, e.context) == ("ABCDE"[i], texts, "choice", None)
        assert e.prompt == "\n".join([row["question"], *lines])
        assert e.prompt in e.user_message(None) and "The answer is: " in e.user_message(None)


@pytest.mark.parametrize("suffix", [PART, ".jsonl"])
def test_mmlu_answers_are_numbers_from_0(suffix, tmp_path):
    """Four choices; the training part is auxiliary_train."""
    files = {f"all/{s}{suffix}": [exam(f"{s}{i}", i) for i in range(4)] for s in (*SOURCE, "dev")}
    rows = [(e.prompt, e.split, e.answer, e.choices, e.style) for e in loaded("mmlu", place(tmp_path, files))]
    assert sorted(rows) == sorted(
        (f"What is {file}{i}?\nA: p\nB: q\nC: r\nD: s", split, "ABCD"[i], ["p", "q", "r", "s"], "choice")
        for split, file in zip(SPLITS, SOURCE, strict=True) for i in range(4))


# ------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("name", ["multibench", "gsm8k", "arc-easy", "arc-challenge", "mmlu"])
def test_parquet_without_pyarrow_is_one_line(name, tmp_path, monkeypatch):
    """The remedy is named, not a traceback."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    [files] = SETS[name][0].values()
    with pytest.raises(UserError, match=r"^[^\n]*pip install pyarrow[^\n]*$"):
        loaded(name, place(tmp_path, dict.fromkeys(files, "PAR1")))


def test_json_and_csv_need_no_pyarrow(tmp_path, monkeypatch):
    """PRISM, Community Alignment, and SVAMP with GSM8K's own jsonl."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert prism(tmp_path, G, B) and community(tmp_path, comparison(1, 5))
    place(tmp_path, {"train.json": [svamp(1)], "test.json": [svamp(2)]})
    place(tmp_path, {"train.jsonl": problems("a", 1000), "test.jsonl": problems("b", 300)})
    assert loaded("svamp", tmp_path, tmp_path)


@every
@pytest.mark.parametrize("kind", ["absent", "useless", "other"])
def test_a_wrong_folder_is_named(name, kind, tmp_path):
    """No such folder, none of the set's files in it, or other columns in them: one line."""
    folder = place(tmp_path / "elsewhere", {"README.md": "# nothing"} if kind == "useless" else {})
    if kind == "other":
        place(folder, {file: [{"column": "1"}] for file in next(iter(SETS[name][0].values()))})
    with pytest.raises(UserError, match=rf"^[^\n]*{re.escape(str(folder))}[^\n]*$"):
        load_examples(f"{name}:{folder}", "train")


@pytest.mark.parametrize(("wrong", "right"), [
    ("prsim", "prism"), ("gms8k", "gsm8k"), ("arc_easy", "arc-easy"), ("comunity:/tmp", "community"),
])  # fmt: skip
def test_the_nearest_name_is_offered_for_a_misspelt_one(wrong, right):
    """With or without a folder after it."""
    with pytest.raises(UserError, match=f"did you mean '?{right}"):
        load_examples(wrong, "train")


@pytest.mark.parametrize(("change", "message"), [
    (dict(id="one"), "examples have 1 different ids"), (dict(split="val"), "splits called val")])
def test_what_a_loader_gives_has_ids_and_splits(change, message, tmp_path, monkeypatch):
    """Rows of one id would become one pair, and rows of an unknown split nothing."""
    examples = [dataclasses.replace(data.Example(f"r{i}", "Why?", "train"), **change) for i in range(3)]
    monkeypatch.setitem(data.LOADERS, "prism", lambda folder: (examples, ""))
    with pytest.raises(UserError, match=message):
        load_examples(f"prism:{tmp_path}", "train")


def test_every_data_set_has_a_loader():
    """The table of data sets and the table of loaders have the same names."""
    assert data.LOADERS.keys() == data.DATA.keys() == SETS.keys()


# ------------------------------------------------------------------------------------------- arguments

def test_resolve_fills_in_the_model_alone_and_changes_no_argument_of_its_caller():
    """tiny for the demo, else Qwen, a given one stays; a program's own class and arguments stay too."""
    @dataclasses.dataclass
    class Args(contexts.DataArgs):
        own: int = 0

    for changes, model in ((dict(), "tiny"), (dict(data="prism"), data.QWEN), (dict(model="m"), "m")):
        args = Args(own=3, **changes)
        assert contexts.resolve(args) == Args(own=3, **changes | dict(model=model))
        assert args == Args(own=3, **changes)


@pytest.mark.parametrize("mistake", [dict(slots=0), dict(slots=-1), dict(limit=-1)], ids=str)
def test_a_number_out_of_range_is_named(mistake):
    """--slots must be positive, --limit at least 0: one line, before anything is loaded."""
    contexts.check(contexts.DataArgs())
    with pytest.raises(UserError, match=r"^[^\n]*--slots[^\n]*--limit[^\n]*$"):
        contexts.check(contexts.DataArgs(**mistake))


def test_alone_data_py_shows_splits_sampling_and_a_user_message(monkeypatch, capsys):
    """`python contexts.py` tells how large the demo's splits are and what the model reads of one example."""
    monkeypatch.setattr(sys, "argv", ["contexts.py"])
    contexts.program()
    out = capsys.readouterr().out
    assert "600 train, 384 validation, 1280 test" in out and "temperature=1.0" in out
    assert data.load_demo(0)[0].prompt + PLEASE in out


# ------------------------------------------------------------------------------------------- from a hub

class Answer(FakeHub):
    """A hub's answers about the data sets in the server's root: revision, tree, HEAD and GET of files."""

    def answer(self, path: str) -> None:
        route = re.fullmatch(rf"(?:/api)?/datasets/([^/]+/[^/]+)/(\w+)/(?:main|{SHA})/?(.*)", path)
        repository, verb, name = route.groups() if route else ("none", "", "")
        folder = self.server.root / repository
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        status, body, headers = 200, b"", {"X-Repo-Commit": SHA, "ETag": f'"{name.encode().hex()}"'}
        if verb == "revision" and files:
            info = dict(id=repository, sha=SHA, siblings=[dict(rfilename=f) for f in files])
            body = json.dumps(info).encode()
        elif verb == "tree" and files:
            body = json.dumps([dict(type="file", path=f, size=p.stat().st_size, oid=f.encode().hex())
                               for f, p in files.items()]).encode()
        elif verb == "resolve" and name in files:
            body = files[name].read_bytes()
        else:
            status, headers = 404, {"X-Error-Code": "RepoNotFound"}
        self.send(status, body, **headers)


def command(folder: Path, root: Path, *flags: str | Path) -> tuple[subprocess.CompletedProcess, list]:
    """pairs.py, run in the folder and with a cache there, and what it asked a hub of what is in root."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.root, server.asked = root, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and
            not k.lower().endswith("_proxy")}
    env = kept | dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(folder / "hf"),
                      HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_ETAG_TIMEOUT="5",
                      HF_HUB_DOWNLOAD_TIMEOUT="5", HF_HUB_DISABLE_TELEMETRY="1", OMP_NUM_THREADS="1")
    small = "--limit 4 --max-new-tokens 4 --slots 4 --dtype float32 --temperature 1 --out runs/x"
    done = subprocess.run([sys.executable, ROOT / "pairs.py", *small.split(), *flags],
                          cwd=folder, env=env, capture_output=True, text=True, check=False)
    server.shutdown()
    server.server_close()
    return done, server.asked


PERSONAL = ("prism", "community", "multibench")
CASES = {name: ["--data", name, "--neg", "missing" if name in PERSONAL else "random"] for name in SETS}
CASES["community"] += ["--contexts", "../contexts.jsonl"]
CASES |= {"unreadable": ["--data", "community", "--contexts", "infer"], "unknown": ["--data", "prism"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random model with room for the eight-shot prompts, of about 2,700 bytes."""
    return write_model(tmp_path_factory.mktemp("model"), max_position_embeddings=8192)


@pytest.fixture(scope="module")
def result(request, tmp_path_factory, shelf, model):
    """(case) -> its folder, its finished command and what that asked for; two commands run at a time."""
    tests = [item for item in request.session.items if "result" in item.fixturenames]
    wanted = [value for test in tests for value in test.callspec.params.values()]
    base, futures = tmp_path_factory.mktemp("commands"), {}
    contexts = [dict(id=e.id, items=["Be kind.", f"I am {e.user}."])
                for e in load_examples(shelf("community"), "train")]
    place(base, {"contexts.jsonl": contexts} | {f"{case}/README.md": "" for case in CASES})
    with ThreadPoolExecutor(2) as pool:
        for case, flags in CASES.items():
            if case in wanted and (ARROW or flags[1] in ("prism", "community")):
                shelf(flags[1])
                root = base / "empty" if case == "unknown" else shelf.root
                futures[case] = pool.submit(command, base / case, root, "--model", model, *flags)
        yield lambda case: (base / case, *futures[case].result())
        pool.shutdown(cancel_futures=True)


@every
def test_the_command_runs_from_the_hub(name, shelf, model, result):
    """Only the needed files are fetched, each once; the pairs have the set's own rows and user turns."""
    examples = {e.id: e for e in load_examples(shelf(name), "train")}
    folder, done, asked = result(name)
    assert done.returncode == 0, done.stderr
    fetched = sorted(path for verb, path in asked if verb == "GET" and "/resolve/" in path)
    assert fetched == sorted(f"/datasets/{repository}/resolve/{SHA}/{file}"
                             for repository, files in SETS[name][0].items() for file in files)
    rows = [json.loads(line) for line in (folder / "runs" / "x" / "pairs.jsonl").read_text().splitlines()]
    decode = Tokenizer.from_file(str(model / "tokenizer.json")).decode
    assert 1 <= len({row["id"] for row in rows}) == len(rows) <= 4
    for row in rows:
        e = examples[row["id"]]
        context = f"Be kind. I am {e.user}." if name == "community" else e.context
        others = [e] if name in PERSONAL else [other for other in examples.values() if other is not e]
        assert (row["prompt"], row["context"]) == (e.prompt, context)
        right, source = (decode(r["prompt_ids"]) for r in (row["chosen"], row["rejected"][0]))
        assert e.user_message(context) in right and e.user_message(context) not in source
        assert any(other.user_message(None) in source for other in others)


@pytest.mark.parametrize(("case", "words"), [("unreadable", ["--contexts infer", "community"]),
                                             ("unknown", [PRISM])])  # fmt: skip
def test_data_that_cannot_be_had_are_one_line(case, words, result):
    """A judge that nobody understands, a set that the hub has not: exit code 2, a line, and no pairs."""
    folder, done, _ = result(case)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words) and not list(folder.glob("runs/x/pairs.jsonl"))
