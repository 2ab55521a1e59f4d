"""data.py's own data: .jsonl files, the demo, the user message, --limit. The paper's data: test_datasets.py.

Oracle: brute force over the assets.
"""

import dataclasses
import json
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import ROOT, training_example

import contexts
from contexts import DataArgs, add_contexts, examples_for, read_contexts
from data import Example, load_demo, load_examples, load_jsonl
from run import UserError


def write_rows(path, *rows):
    """A .jsonl file of dicts (or of lines as they are)."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


# ------------------------------------------------------------------------- own data

def test_columns_become_an_example(tmp_path):
    """All columns there are; a list of contexts is joined by a space; null is as if absent."""
    full = {"prompt": "Hi?", "context": ["I am old.", "I am tall."], "reference": "Hello.", "answer": "B",
            "user": "ann", "id": "row-7", "split": "validation"}
    file = write_rows(tmp_path / "a.jsonl", full, {"prompt": "x", "split": "test"},
                      {"prompt": "y", "context": "z", "answer": None, "split": "train"})
    a, b, c = load_jsonl(file, 0)
    assert a == Example("row-7", "Hi?", "validation", "I am old. I am tall.", "ann", "Hello.", "B",
                        items=["I am old.", "I am tall."])
    assert (b.prompt, b.split, b.context, b.chosen) == ("x", "test", None, None)
    assert (c.prompt, c.split, c.context, c.answer) == ("y", "train", "z", None)
    assert len({a.id, b.id, c.id}) == 3


def test_ready_pairs_are_read(tmp_path):
    """chosen and rejected, with or without a context."""
    file = write_rows(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "good", "rejected": "bad"},
                      {"prompt": "q", "context": "c", "chosen": "yes", "rejected": "no"})
    rows = [(e.chosen, e.rejected, e.context) for e in load_jsonl(file, 0)]
    assert rows == [("good", "bad", None), ("yes", "no", "c")]


FINE, READY = {"prompt": "p"}, {"prompt": "p", "chosen": "a", "rejected": "b"}
MISTAKES = [  # rows, line of the mistake, what the message has to name
    ([FINE, "", '{"prompt": "p"'], 3, ""),
    ([FINE, '["p"]'], 2, "list"),
    ([FINE, "", {"context": "c"}], 3, "prompt"),
    ([{"prompt": " \n"}], 1, "prompt"),
    ([{"prompt": None}], 1, "prompt"),
    ([{"prompt": 3}], 1, "prompt"),
    ([FINE, {"prompt": "p", "context": 5}], 2, "context"),
    ([{"prompt": "p", "context": ["c", 5]}], 1, "context"),
    ([{"prompt": "p", "context": {"a": "b"}}], 1, "context"),
    ([{"prompt": "p", "reference": ["r"]}], 1, "reference"),
    ([{"prompt": "p", "split": 1}], 1, "split"),
    ([{"prompt": "p", "chosen": ["a"], "rejected": "b"}], 1, "chosen"),
    ([READY, {"prompt": "p", "chosen": "a"}], 2, "rejected"),
    ([{"prompt": "p", "rejected": "a"}], 1, "chosen"),
    ([READY, FINE], 2, "chosen"),
    ([FINE, READY], 2, "chosen"),
    ([FINE, {"prompt": "p", "split": "dev"}], 2, "dev"),
    ([FINE, {"prompt": "p", "split": "test"}], 2, "some rows have 'split'"),
    ([{"prompt": "p", "split": "test"}, FINE], 2, "some rows have 'split'"),
    ([{"prompt": "p", "id": "seven"}, FINE, {"prompt": "q", "id": "seven"}], 3, "seven"),
    ([FINE, {"prompt": "p", "contxt": "c"}], 2, "did you mean 'context'"),
    ([{"promt": "p"}], 1, "did you mean 'prompt'"),
    ([{"prompt": "p", "chosen": "a", "rejcted": "b"}], 1, "did you mean 'rejected'"),
    (['{"prompt": "a \\ud800", "context": "c"}'], 1, ""),  # half a surrogate pair, which no text can hold
]


@pytest.mark.parametrize(("rows", "line", "word"), MISTAKES)
def test_a_mistake_names_file_and_line(rows, line, word, tmp_path):
    """And the column, value or name that is wrong."""
    with pytest.raises(UserError, match=rf"mine\.jsonl:{line}\b.*{word}"):
        load_jsonl(write_rows(tmp_path / "mine.jsonl", *rows), 0)


def test_other_columns_are_named_and_unused(tmp_path, capsys):
    """They are no mistake."""
    rows = load_jsonl(write_rows(tmp_path / "a.jsonl", {"prompt": "p", "topic": "money", "score": 3}), 0)
    out = capsys.readouterr().out
    assert "topic" in out and "score" in out and "prompt" not in out
    assert rows[0].prompt == "p" and "money" not in dataclasses.asdict(rows[0]).values()


@pytest.fixture(scope="module")
def splits_of(tmp_path_factory):
    """(prompts, seed) -> {prompt: split} of rows without a split; a prompt may stand in several rows."""
    file = tmp_path_factory.mktemp("splits") / "a.jsonl"

    def get(prompts, seed: int = 0) -> dict[str, str]:
        rows = [{"prompt": prompt, "context": f"c{i % 7}"} for i, prompt in enumerate(prompts)]
        splits: dict[str, set] = {}
        for e in load_jsonl(write_rows(file, *rows), seed):
            splits.setdefault(e.prompt, set()).add(e.split)
        assert all(len(each) == 1 for each in splits.values())  # the same prompt, the same split
        return {prompt: each.pop() for prompt, each in splits.items()}

    return get


PROMPTS = [f"How do I do thing {i}?" for i in range(2000)]


@pytest.mark.parametrize("seed", [0, 1])
def test_without_split_the_parts_are_80_10_10(seed, splits_of):
    """Within 5 standard deviations of a fair draw over 2,000 prompts."""
    counts = Counter(splits_of(PROMPTS, seed).values())
    assert set(counts) == {"train", "validation", "test"}
    assert abs(counts["train"] - 1600) < 90
    assert abs(counts["validation"] - 200) < 67 and abs(counts["test"] - 200) < 67


def test_a_prompt_has_one_split_whatever_stands_beside_it(splits_of):
    """Rows that share a prompt stay together; rows put before, between or after move nothing."""
    few = splits_of(PROMPTS[:300] * 3)
    more = splits_of(["a new row", *PROMPTS[::-1], "another"])
    assert all(more[prompt] == split for prompt, split in few.items())


def test_another_seed_is_another_assignment(splits_of):
    """Two independent 80/10/10 draws differ in 1 - (.64 + .01 + .01) = 34% of the prompts."""
    a, b = splits_of(PROMPTS, 0), splits_of(PROMPTS, 1)
    assert 0.28 < sum(a[prompt] != b[prompt] for prompt in PROMPTS) / 2000 < 0.40
    assert a == splits_of(PROMPTS, 0)


def test_load_examples_takes_one_split(tmp_path):
    """In file order; a split without rows and a name that is no data set are UserErrors that say so."""
    rows = [{"prompt": str(i), "split": "test" if i % 3 else "train"} for i in range(7)]
    file = str(write_rows(tmp_path / "a.jsonl", *rows))
    assert [e.prompt for e in load_examples(file, "test")] == ["1", "2", "4", "5"]
    with pytest.raises(UserError, match="validation"):
        load_examples(file, "validation")
    with pytest.raises(UserError, match="--data 'demos'"):
        load_examples("demos", "train")


# ------------------------------------------------------------------------- demo

def asset(name: str) -> list[dict]:
    """The rows of a file of the demo."""
    text = (ROOT / "assets" / "demo" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_demo_train_has_five_seen_contexts_a_prompt_in_balance(seed):
    """120 prompts x 5 different contexts, each of the 24 seen ones 25 times and no unseen one."""
    rows = [e for e in load_demo(seed) if e.split == "train"]
    prompts = [row["prompt"] for row in asset("prompts") if row["split"] == "train"]
    contexts = [row["context"] for row in asset("contexts") if row["split"] == "seen"]
    assert Counter(e.prompt for e in rows) == dict.fromkeys(prompts, 5)
    assert Counter(e.context for e in rows) == dict.fromkeys(contexts, 25)
    assert len({(e.prompt, e.context) for e in rows}) == len(rows) == 600
    assert {e.group for e in rows} == {"seen"}


@pytest.mark.parametrize(("split", "prompt_count", "context_count"), [
    ("validation", 16, 24), ("test", 40, 32),
])  # fmt: skip
def test_demo_held_out_splits_are_full_grids(split, prompt_count, context_count):
    """Validation: every prompt with every seen context; test: with every context. No seed changes them."""
    rows = [e for e in load_demo(0) if e.split == split]
    contexts = [row for row in asset("contexts") if row["split"] == "seen" or split == "test"]
    prompts = [row["prompt"] for row in asset("prompts") if row["split"] == split]
    assert (len(prompts), len(contexts)) == (prompt_count, context_count)
    cells = [(prompt, context["context"]) for prompt in prompts for context in contexts]
    assert sorted((e.prompt, e.context) for e in rows) == sorted(cells)
    by_text = {context["context"]: context for context in contexts}
    for e in rows:
        context = by_text[e.context]
        assert (e.context_id, e.group, e.check) == (context["id"], context["split"], context["check"])
    assert rows == [e for e in load_demo(1) if e.split == split]


def test_demo_prompts_and_unseen_contexts_do_not_leak():
    """No prompt is in two splits, an unseen context is in test only, every id names one row."""
    rows = load_demo(0)
    prompts = [{e.prompt.lower() for e in rows if e.split == s} for s in ("train", "validation", "test")]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 176
    unseen = {row["context"] for row in asset("contexts") if row["split"] == "unseen"}
    assert len(unseen) == 8 and {e.split for e in rows if e.context in unseen} == {"test"}
    assert len({e.id for e in rows}) == len(rows)


def test_demo_seed_decides_the_training_contexts():
    """The same seed draws the same ones, another seed others."""
    first, again, other = ([e.context for e in load_demo(s) if e.split == "train"] for s in (0, 0, 1))
    assert first == again != other


# ------------------------------------------------------------------------- user message, limit

def test_the_user_message_asks_to_respect_the_context():
    """Appendix D.2's wording to the letter; without a context just the prompt."""
    e = training_example(0, "I am {old}.", "Why {x}?")
    request = "Please respect the following requirements made by the user:"
    assert e.user_message(e.context) == f"Why {{x}}? {request} I am {{old}}."
    assert e.user_message("B") == f"Why {{x}}? {request} B"
    assert e.user_message(None) == "Why {x}?"


def test_limit_draws_a_subset_by_seed_in_order(tmp_path):
    """Of so many rows, in the split's order; over 40 seeds every row is drawn; too many is all."""
    splits = [("train", "test")[i % 4 == 3] for i in range(16)]
    rows = [{"prompt": f"p{i}", "split": split} for i, split in enumerate(splits)]
    file = write_rows(tmp_path / "a.jsonl", *rows)

    def prompts(limit: int, seed: int = 0) -> list[str]:
        return [e.prompt for e in examples_for(DataArgs(data=str(file), limit=limit, seed=seed), "train")]

    everything = [f"p{i}" for i in range(16) if i % 4 != 3]
    subsets = [prompts(5, seed) for seed in range(40)]
    for subset in subsets:
        assert len(subset) == 5 and sorted(set(subset), key=everything.index) == subset
    assert set().union(*subsets) == set(everything) and subsets[0] == prompts(5, 0)
    assert len({tuple(subset) for subset in subsets}) > 30
    assert prompts(0) == prompts(12) == prompts(99) == everything


def test_contexts_that_two_judges_infer_do_not_mix(tmp_path, monkeypatch):
    """Each judge's are in a file of its own, into which its other splits' go too; the newest replace."""
    version = "early"

    def infer(judge, rows) -> list[list[str]]:
        return [[f"{version} {judge.args.judge} of {prompt}, {chosen} not {rejected}"]
                for prompt, chosen, rejected in rows]

    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contexts, "infer", infer)
    monkeypatch.setattr(contexts, "Judge", lambda args, *rest: SimpleNamespace(args=args))
    rows = [dataclasses.replace(training_example(i), reference="A", human_rejected="B") for i in range(4)]
    for judge, some in (("org/a", rows[:2]), ("b", rows[1:2]), ("org/a", rows[2:])):
        add_contexts(some, DataArgs(data="community", judge=judge, contexts="infer"))
    version = "late"
    made = add_contexts(rows[:1], DataArgs(data="community", judge="org/a", contexts="infer"))
    assert made[0].context == f"late org/a of {rows[0].prompt}, A not B"
    files = {file.name: read_contexts(file) for file in (tmp_path / "runs").glob("contexts-*.jsonl")}
    assert files == {
        "contexts-community-org-a.jsonl": {
            e.id: [f"{'late' if e is rows[0] else 'early'} org/a of {e.prompt}, A not B"] for e in rows},
        "contexts-community-b.jsonl": {rows[1].id: [f"early b of {rows[1].prompt}, A not B"]},
    }
