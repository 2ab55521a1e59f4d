"""results/: what its scripts make of a run is what they say.

    python -m pytest -n 0 tests/test_results.py
"""

import json
import random
import sys
from itertools import combinations

import numpy as np
import pytest
from conftest import ROOT, training_example
from scipy.stats import spearmanr

import train
from data import load_jsonl
from folder import load
from losses import sequence_logps
from pairs import load_pairs, read_meta
from report import report
from run import parse
from tokenizer import Tokenizer

sys.path.insert(0, str(ROOT / "results"))

import context_gain
import experiments
import own_task
import variants

RESULTS = ROOT / "results"
TINY, PARTS = ROOT / "assets" / "tiny", own_task.PARTS


def pair(i: int, gain: float) -> dict:
    """A line of pairs.jsonl whose responses name their sides."""
    chosen = dict(text=f"chosen {i}", ids=[2 * i], finished=True, prompt_ids=[1], gain=gain)
    rejected = dict(text=f"rejected {i}", ids=[2 * i + 1], finished=True, prompt_ids=[2], gain=0.0)
    return dict(id=str(i), prompt="p", context="c", chosen=chosen, rejected=[rejected])


ROWS = [pair(i, gain) for i, gain in enumerate(np.random.default_rng(0).normal(size=101))]


# ------------------------------------------------------------------------- variants.py

def test_swapped_pairs_change_sides_half_of_the_time_and_keep_their_prompt():
    swapped = variants.swapped(ROWS)
    changed = 0
    for before, after in zip(ROWS, swapped, strict=True):
        texts = [after["chosen"]["text"], after["rejected"][0]["text"]]
        assert sorted(texts) == [before["chosen"]["text"], before["rejected"][0]["text"]]
        assert after["chosen"]["prompt_ids"] == [1]
        changed += texts[0].startswith("rejected")
    assert 35 < changed < 66


def test_the_larger_and_the_smaller_half_are_all_pairs_apart_by_their_gain():
    gains = variants.context_gains(ROWS)
    larger, smaller = variants.larger_half(ROWS, gains), variants.smaller_half(ROWS, gains)
    assert (len(larger), len(smaller)) == (51, 50)
    assert sorted(row["id"] for row in larger + smaller) == sorted(row["id"] for row in ROWS)
    least = min(row["chosen"]["gain"] for row in larger)
    assert least > max(row["chosen"]["gain"] for row in smaller)


def write_pairs(folder, rows):
    """A folder of pairs, as pairs.py leaves it."""
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    meta = dict(settings=dict(seed=3), statistics=dict(pairs=len(rows)))
    (folder / "pairs.json").write_text(json.dumps(meta))
    return folder


def test_a_variant_is_a_folder_of_pairs(tmp_path):
    source, target = write_pairs(tmp_path / "a", ROWS), tmp_path / "b"
    variants.make_variant("larger-half", [source], target)
    larger = variants.larger_half(ROWS, variants.context_gains(ROWS))
    assert [pair.id for pair in load_pairs(target)] == [row["id"] for row in larger]
    assert read_meta(target) == dict(settings=dict(seed=3), statistics=dict(pairs=51))


def test_mixed_pairs_have_their_rejected_responses_from_both_in_turn():
    others = [row | dict(rejected=[row["rejected"][0] | dict(text="other")]) for row in ROWS]
    texts = [row["rejected"][0]["text"] for row in variants.mixed(ROWS, others)]
    assert texts == ["other" if i % 2 else f"rejected {i}" for i in range(101)]
    with pytest.raises(ValueError, match="row 0: the chosen responses differ"):
        variants.mixed(ROWS, ROWS[::-1])


def test_joined_pairs_are_those_of_all_folders(tmp_path):
    """In their order, and as many as pairs.json says."""
    sources = [write_pairs(tmp_path / "a", ROWS), write_pairs(tmp_path / "b", ROWS[:1])]
    target = tmp_path / "c"
    variants.make_variant("joined", sources, target)
    assert [pair.id for pair in load_pairs(target)] == [f"{row['id']}-0" for row in ROWS] + ["0-1"]
    assert read_meta(target) == dict(settings=dict(seed=3), statistics=dict(pairs=102))


def test_prompt_gains_are_those_that_an_evaluation_measures(tmp_path):
    """Of the embedded model: log-probs after the row's own prompt less those after the next one."""
    example = [training_example(i, "I live in Nairobi.", prompt) for i, prompt in
               enumerate(("How do I keep bread fresh?", "What should I read?", "How do I save money?"))]
    tokenizer, model = Tokenizer(TINY), load(TINY)
    texts = ["Keep it in a bag.", "A long book.", "Spend less."]
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for e, text in zip(example, texts, strict=True):
            prompt_ids = tokenizer.chat(e.user_message(e.context))
            response = dict(text=text, ids=tokenizer.response(text), finished=True,
                            prompt_ids=prompt_ids, gain=0.0)
            row = dict(id=e.id, prompt=e.prompt, context=e.context, chosen=response,
                       rejected=[response | dict(text="x", ids=tokenizer.response("x"))])
            file.write(json.dumps(row) + "\n")
    meta = dict(settings=dict(model=str(TINY)), statistics=dict(pairs=3))
    (tmp_path / "pairs.json").write_text(json.dumps(meta))
    found = variants.prompt_gains(tmp_path)
    for i, text in enumerate(texts):
        after = [tokenizer.chat(e.user_message(e.context)) for e in (example[i], example[(i + 1) % 3])]
        own, other = (sequence_logps(model, [(ids, [tokenizer.response(text)])])[0][0] for ids in after)
        assert found[i] == pytest.approx(own - other, abs=1e-3) and own != other


# ------------------------------------------------------------------------- own_task.py

def content(part: str) -> set[str]:
    """Categories, words, opposites and sums of a part's questions; the question words are no content."""
    found = set()
    for row in own_task.questions(part):
        text = row["prompt"].rstrip("?")
        if "+" in text:
            found.add(text.removeprefix("What is "))
        elif "opposite" in text:
            found |= {text.rpartition(" ")[2], row["answer"]}
        else:
            category, _, words = text.removeprefix("Which of these is a ").partition(": ")
            found |= {category, *words.replace(" or ", ", ").split(", ")}
    return found


@pytest.mark.parametrize(("a", "b"), list(combinations(PARTS, 2)))
def test_parts_of_our_own_task_share_nothing(a, b):
    assert len(content(a)) > 50 and not content(a) & content(b)


@pytest.mark.parametrize("part", PARTS)
def test_answers_of_our_own_task_are_right(part):
    """Sums by arithmetic, categories and opposites by the lists; wrong answers are wrong and apart."""
    pairs = [set(pair.split()) for pair in own_task.OPPOSITES[part].split(",")]
    kinds = set()
    for row in own_task.questions(part):
        text, right, wrong = row["prompt"], row["answer"], row["wrong"]
        assert len({right, *wrong}) == 4
        if "+" in text:
            a, b = text.removeprefix("What is ").rstrip("?").split(" + ")
            assert int(right) == int(a) + int(b)
        elif "opposite" in text:
            assert {text.rstrip("?").rpartition(" ")[2], right} in pairs
        else:
            category = text.removeprefix("Which of these is a ").partition(":")[0]
            members = own_task.CATEGORIES[part][category].split()
            assert right in members and right in text and not set(wrong) & set(members)
        kinds.add(text[:12])
    assert len(kinds) >= 3


@pytest.mark.parametrize(("response", "right"), [
    ("The apple is a fruit.", True), ("Not the hammer but the apple.", False), ("A hammer.", False),
    ("", False),
])
def test_a_response_that_names_wrong_words_too_is_not_right(response, right):
    row = dict(id="0", prompt="Which of these is a fruit: hammer, apple, red or milk?", answer="apple",
               wrong=["hammer", "red", "milk"])
    assert own_task.is_right(row, response) == right


def test_a_sum_is_right_by_its_last_number():
    row = dict(id="0", prompt="What is 7 + 5?", answer="12", wrong=["11", "13", "2"])
    assert own_task.is_right(row, "Not 11: 7 + 5 = 12.") and not own_task.is_right(row, "12, or rather 13")


def test_our_own_task_is_a_file_of_ones_own_data(tmp_path):
    """Every row has its split and its answer, as data.py reads them."""
    own_task.write_task(tmp_path / "own.jsonl")
    examples = load_jsonl(tmp_path / "own.jsonl", 0)
    counts = {part: sum(example.split == part for example in examples) for part in PARTS}
    assert counts == own_task.SIZES
    assert all(example.answer and example.context is None for example in examples)


# ------------------------------------------------------------------------- context_gain.py

@pytest.mark.parametrize("seed", range(5))
def test_rank_correlations_are_those_of_scipy(seed):
    """With ties."""
    rng = random.Random(seed)
    x, y = (np.array([rng.randrange(8) for _ in range(24)], float) for _ in range(2))
    assert context_gain.spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)


def test_the_bootstrap_finds_a_strong_correlation_and_doubts_a_weak_one():
    rng = np.random.default_rng(1)
    x = rng.normal(size=24)
    strong, weak = (context_gain.with_bootstrap(x, x + noise * rng.normal(size=24)) for noise in (0.3, 30))
    assert strong["low"] > 0.5 and weak["low"] < 0 < weak["high"]


# ------------------------------------------------------------------------- experiments.py

def test_every_row_of_the_tables_can_be_run():
    """Its flags are train.py's, its pairs another row's."""
    for name, table in experiments.TABLES.items():
        assert table.base in table.rows, name
        for row in table.rows.values():
            assert not row.variant or row.variant in variants.VARIANTS
            for seed in row.seeds or table.seeds:
                for source, of_seed in row.sources(seed):
                    assert of_seed in (table.rows[source].seeds or table.seeds)
            parse(train.Args, f"{table.train} {row.flags}".split(), usage="")


def test_stored_files_name_no_folders_of_a_machine():
    """Where runs were made is nobody's business."""
    files = [file for suffix in ("json", "md") for file in RESULTS.rglob(f"*.{suffix}")]
    assert len(files) > 100
    assert [file.name for file in files if '"/' in file.read_text(encoding="utf-8")] == []


REPORTS = sorted(file.parent for file in RESULTS.glob("*/report.md"))


@pytest.mark.parametrize("folder", REPORTS, ids=lambda folder: folder.name)
def test_a_committed_table_is_what_its_runs_say(folder, tmp_path, monkeypatch):
    """python eval.py --report results/FOLDER, from the small files of the stored runs."""
    monkeypatch.chdir(ROOT)
    text = report([str(folder.relative_to(ROOT))], tmp_path)
    assert text == (folder / "report.md").read_text(encoding="utf-8")
