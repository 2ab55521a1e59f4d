"""pairs.py against its contract: data files, the demo set, negatives, pairs on a tiny model, context gain.

Oracles: brute force over the assets, single calls of generate, and transformers' full logits.
"""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM

import pairs
from model import load
from pairs import (Example, Pair, load_demo, load_examples, load_jsonl, load_pairs, make_pairs,
                   negative_turns, report, save_pairs)
from run import UserError
from sample import Sample, Sampling, Tokenizer, generate

SETTINGS = Sampling(1.0, 1.0, 8)


def write_rows(path: Path, *rows) -> Path:
    """A .jsonl file of dicts (or of lines as they are)."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def example(number: int, context: str | None = None, prompt: str | None = None, **more) -> Example:
    return Example(str(number), prompt or f"Question {number}?", "train", context, **more)


# ------------------------------------------------------------------------------------------- own data

def test_columns_become_an_example(tmp_path):
    """All columns there are; a list of contexts is joined by a space; null is as if absent."""
    full = {"prompt": "Hi?", "context": ["I am old.", "I am tall."], "reference": "Hello.", "answer": "B",
            "user": "ann", "id": "row-7", "split": "validation"}
    a, b, c = load_jsonl(write_rows(tmp_path / "a.jsonl", full, {"prompt": "x", "split": "test"},
                                    {"prompt": "y", "context": "z", "answer": None, "split": "train"}), 0)
    assert a == Example("row-7", "Hi?", "validation", "I am old. I am tall.", "ann", "Hello.", "B",
                        items=["I am old.", "I am tall."])
    assert (b.prompt, b.split, b.context, b.chosen) == ("x", "test", None, None)
    assert (c.prompt, c.split, c.context, c.answer) == ("y", "train", "z", None)
    assert len({a.id, b.id, c.id}) == 3


def test_ready_pairs_are_read(tmp_path):
    """chosen and rejected, with or without a context."""
    rows = load_jsonl(write_rows(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "good", "rejected": "bad"},
                                 {"prompt": "q", "context": "c", "chosen": "yes", "rejected": "no"}), 0)
    assert [(e.chosen, e.rejected, e.context) for e in rows] == [("good", "bad", None), ("yes", "no", "c")]


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
    ([{"prompt": "p", "id": "seven"}, FINE, {"prompt": "q", "id": "seven"}], 3, "seven"),
    ([FINE, {"prompt": "p", "contxt": "c"}], 2, "did you mean 'context'"),
    ([{"promt": "p"}], 1, "did you mean 'prompt'"),
    ([{"prompt": "p", "chosen": "a", "rejcted": "b"}], 1, "did you mean 'rejected'"),
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
def parts(tmp_path_factory):
    """(rows, seed) -> {prompt: part} of prompts without a split, each of which may stand in several rows."""
    file = tmp_path_factory.mktemp("parts") / "a.jsonl"

    def get(prompts, seed: int = 0) -> dict[str, str]:
        found: dict[str, set] = {}
        rows = [{"prompt": p, "context": f"c{i % 7}"} for i, p in enumerate(prompts)]
        for e in load_jsonl(write_rows(file, *rows), seed):
            found.setdefault(e.prompt, set()).add(e.split)
        assert all(len(splits) == 1 for splits in found.values())  # the same prompt, the same part
        return {p: splits.pop() for p, splits in found.items()}

    return get


PROMPTS = [f"How do I do thing {i}?" for i in range(2000)]


@pytest.mark.parametrize("seed", [0, 1])
def test_without_split_the_parts_are_80_10_10(seed, parts):
    """Within 5 standard deviations of a fair draw over 2,000 prompts."""
    counts = Counter(parts(PROMPTS, seed).values())
    assert set(counts) == {"train", "validation", "test"}
    assert abs(counts["train"] - 1600) < 90
    assert abs(counts["validation"] - 200) < 67 and abs(counts["test"] - 200) < 67


def test_a_prompt_has_one_part_whatever_stands_beside_it(parts):
    """Rows that share a prompt stay together; rows put before, between or after move nothing."""
    few = parts(PROMPTS[:300] * 3)
    more = parts(["a new row", *PROMPTS[::-1], "another"])
    assert all(more[p] == part for p, part in few.items())


def test_another_seed_is_another_assignment(parts):
    """Two independent 80/10/10 draws differ in 1 - (.64 + .01 + .01) = 34% of the prompts."""
    a, b = parts(PROMPTS, 0), parts(PROMPTS, 1)
    assert 0.28 < sum(a[p] != b[p] for p in PROMPTS) / 2000 < 0.40
    assert a == parts(PROMPTS, 0)


def test_load_examples_takes_one_part(tmp_path):
    """In file order; a part without rows and a name that is no data set are UserErrors that say so."""
    rows = [{"prompt": str(i), "split": "test" if i % 3 else "train"} for i in range(7)]
    file = str(write_rows(tmp_path / "a.jsonl", *rows))
    assert [e.prompt for e in load_examples(file, "test")] == ["1", "2", "4", "5"]
    with pytest.raises(UserError, match="validation"):
        load_examples(file, "validation")
    with pytest.raises(UserError, match="--data 'demos'"):
        load_examples("demos", "train")


# ------------------------------------------------------------------------------------------- demo

ASSETS = Path(__file__).parents[1] / "assets" / "demo"


def asset(name: str) -> list[dict]:
    return [json.loads(line) for line in (ASSETS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_demo_train_has_five_seen_contexts_a_prompt_in_balance(seed):
    """120 prompts x 5 different contexts, each of the 24 seen ones 25 times and no unseen one."""
    rows = [e for e in load_demo(seed) if e.split == "train"]
    prompts = [p["prompt"] for p in asset("prompts") if p["split"] == "train"]
    contexts = [c["context"] for c in asset("contexts") if c["split"] == "seen"]
    assert Counter(e.prompt for e in rows) == dict.fromkeys(prompts, 5)
    assert Counter(e.context for e in rows) == dict.fromkeys(contexts, 25)
    assert len({(e.prompt, e.context) for e in rows}) == len(rows) == 600
    assert {e.group for e in rows} == {"seen"}


@pytest.mark.parametrize(("split", "prompts", "contexts"), [("validation", 16, 24), ("test", 40, 32)])
def test_demo_held_out_parts_are_full_grids(split, prompts, contexts):
    """Validation: every prompt with every seen context; test: with every context. No seed changes them."""
    rows = [e for e in load_demo(0) if e.split == split]
    named = [c for c in asset("contexts") if c["split"] == "seen" or split == "test"]
    texts = [p["prompt"] for p in asset("prompts") if p["split"] == split]
    assert (len(texts), len(named)) == (prompts, contexts)
    cells = [(p, c["context"]) for p in texts for c in named]
    assert sorted((e.prompt, e.context) for e in rows) == sorted(cells)
    by_text = {c["context"]: c for c in named}
    for e in rows:
        c = by_text[e.context]
        assert (e.context_id, e.group, e.check) == (c["id"], c["split"], c["check"])
    assert rows == [e for e in load_demo(1) if e.split == split]


def test_demo_prompts_and_unseen_contexts_do_not_leak():
    """No prompt is in two parts, an unseen context is in test only, every id names one row."""
    rows = load_demo(0)
    prompts = [{e.prompt.lower() for e in rows if e.split == s} for s in ("train", "validation", "test")]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 176
    unseen = {c["context"] for c in asset("contexts") if c["split"] == "unseen"}
    assert len(unseen) == 8 and {e.split for e in rows if e.context in unseen} == {"test"}
    assert len({e.id for e in rows}) == len(rows)


def test_demo_seed_decides_the_training_contexts():
    """The same seed draws the same ones, another seed others."""
    first, again, other = ([e.context for e in load_demo(s) if e.split == "train"] for s in (0, 0, 1))
    assert first == again != other


# ------------------------------------------------------------------------------------------- turns, negatives

def test_the_user_turn_with_a_context():
    """Appendix D.2's wording to the letter; without a context just the prompt."""
    e = example(0, "I am {old}.", "Why {x}?")
    request = "Please respect the following requirements made by the user:"
    assert e.turn(e.context) == f"Why {{x}}? {request} I am {{old}}."
    assert e.turn("B") == f"Why {{x}}? {request} B"
    assert e.turn(None) == "Why {x}?"


def grid(rows: int, contexts: int) -> list[Example]:
    """Rows that share few contexts, the first of them most of the time."""
    return [example(i, f"Context {max(0, i % (2 * contexts) - contexts)}.") for i in range(rows)]


def test_missing_is_the_bare_prompt():
    """pi_ref(.|x)."""
    rows = grid(6, 3)
    assert negative_turns(rows, "missing", 0) == [[e.prompt] for e in rows]


@pytest.mark.parametrize(("rows", "contexts"), [(80, 40), (200, 3), (50, 2)])
def test_random_is_the_same_prompt_with_the_context_of_another_row(rows, contexts):
    """Never a context of equal text, though many rows share one; the seed decides which."""
    data = grid(rows, contexts)
    texts = {e.context for e in data}
    assert len(texts) == contexts
    drawn = []
    for e, (turn,) in zip(data, negative_turns(data, "random", 0), strict=True):
        (other,) = (c for c in texts if turn == e.turn(c))
        assert other != e.context
        drawn.append(other)
    assert len(set(drawn)) >= min(contexts, 20)
    assert negative_turns(data, "random", 0) == negative_turns(data, "random", 0)
    assert contexts == 2 or negative_turns(data, "random", 0) != negative_turns(data, "random", 1)


def test_random_without_contexts_is_another_prompt():
    """Never one of equal text."""
    data = [example(i, prompt=f"Question {i // 4}?") for i in range(40)]
    turns = [turn for turn, in negative_turns(data, "random", 0)]
    assert all(turn != e.prompt for e, turn in zip(data, turns, strict=True))
    assert set(turns) <= {e.prompt for e in data} and len(set(turns)) > 5


@pytest.mark.parametrize(("neg", "rows"), [
    ("missing", [example(0), example(1)]),
    ("missing", [example(0, "c"), example(1)]),
    ("random", [example(0, "c"), example(1, "c"), example(2, "c")]),
    ("random", [example(0, "c")]),
    ("random", [example(0, prompt="p"), example(1, prompt="p")]),
])  # fmt: skip
def test_negatives_that_cannot_be_are_refused(neg, rows):
    """missing without contexts, random where all contexts (or prompts) are one: UserErrors naming --neg."""
    with pytest.raises(UserError, match=f"--neg {neg}"):
        negative_turns(rows, neg, 0)


# ------------------------------------------------------------------------------------------- pairs

def chat_ids(folder: Path, turn: str) -> list[int]:
    """The tiny model's ChatML around a user turn, by the tokenizers library alone."""
    text = f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


@pytest.fixture(scope="module")
def world(tiny):
    """(model, tokenizer) of the tiny folder; every fifth id ends a response, so that some end early."""
    tokenizer = Tokenizer(tiny)
    tokenizer.stop_ids = frozenset(range(1, 320, 5))
    return load(tiny), tokenizer


@pytest.fixture(scope="module", params=["missing", "random"])
def made(request, world):
    """(neg, examples, pairs, statistics): 12 rows with 4 contexts sampled on the tiny model."""
    rows = [example(i, f"I am number {i % 4}.") for i in range(12)]
    return request.param, rows, *make_pairs(*world, rows, request.param, SETTINGS, 5)


def test_pairs_are_drawn_from_their_prompts_and_keys(made, world, tiny):
    """Row i's chosen response is sample (i, 0) of (x, c), its rejected one is (i, 1) of the source prompt."""
    neg, rows, found, stats = made
    model, tokenizer = world
    contexts = {e.context for e in rows}
    assert len(found) + sum(stats["dropped"].values()) == stats["examples"] == 12 and len(found) >= 8
    for pair in found:
        i = int(pair.id)
        e = rows[i]
        sources = [e.prompt] if neg == "missing" else [e.turn(c) for c in contexts - {e.context}]
        assert pair.prompt_ids == chat_ids(tiny, e.turn(e.context))
        assert len(pair.rejected_ids) == len(pair.source_ids) == 1
        assert pair.source_ids[0] in [chat_ids(tiny, turn) for turn in sources]
        chosen, rejected = (generate(model, [ids], SETTINGS, tokenizer.stop_ids, 5, [(i, side)])[0]
                            for side, ids in enumerate([pair.prompt_ids, pair.source_ids[0]]))
        assert pair.chosen_ids == chosen.ids and pair.rejected_ids == [rejected.ids]
        assert (pair.prompt, pair.context) == (e.prompt, e.context)


def test_the_end_token_is_there_where_a_response_has_ended(made, world):
    """finished holds for exactly the responses whose last id is a stop id; no other id is one."""
    _, _, found, stats = made
    stop, ended = world[1].stop_ids, []
    for pair in found:
        for ids, finished in zip([pair.chosen_ids, *pair.rejected_ids], pair.finished, strict=True):
            assert finished == (ids[-1] in stop) and not stop & set(ids[:-1])
            assert finished or len(ids) == SETTINGS.max_new_tokens
            ended.append(finished)
    assert set(ended) == {True, False}
    if not sum(stats["dropped"].values()):
        assert stats["unfinished"] == pytest.approx(1 - sum(ended) / len(ended))


@pytest.fixture
def sampled(monkeypatch, world):
    """([(chosen ids, rejected ids)...]) -> make_pairs' answer, had generate drawn these."""
    def get(*responses):
        def generate(*arguments):
            keys, ended = arguments[5], arguments[8]
            for job, (row, k) in enumerate(keys):
                ids = responses[row][k]
                ended(job, Sample(ids, [0.0] * len(ids), ids[-1] == 1))

        monkeypatch.setattr(pairs, "generate", generate)
        rows = [example(i, f"Context {i}.") for i in range(len(responses))]
        return make_pairs(*world, rows, "missing", SETTINGS, 0)

    return get


def letters(folder: Path, text: str) -> list[int]:
    """A text's ids letter by letter, which is not how the tokenizer would cut it."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [i for letter in text for i in tokenizer.encode(letter).ids]


def test_sampled_ids_are_kept_as_they_are(sampled, tiny):
    """Nothing is decoded and tokenised again: an unusual cut survives, the end token too; texts lack it."""
    unusual = letters(tiny, "the answer")
    usual = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json")).encode("the answer").ids
    assert unusual != usual
    (pair,), _ = sampled(([*unusual, 1], usual))
    assert (pair.chosen_ids, pair.rejected_ids, pair.finished) == ([*unusual, 1], [usual], [True, False])
    assert (pair.chosen, pair.rejected) == ("the answer", ["the answer"])


def test_identical_pairs_and_empty_responses_are_dropped_and_counted(sampled, tiny, naive_logp):
    """Four useless pairs of six; those left keep their examples, in their context gains too."""
    yes, no, blank = (letters(tiny, text) for text in ("yes", "no", " \n "))
    found, stats = sampled(([*yes, 1], [*no, 1]), ([*yes, 1], [*yes, 1]), ([1], yes), (no, [*blank, 1]),
                           ([1], [1]), (yes, [*yes, 1]))
    assert [p.id for p in found] == ["0", "5"]
    assert [p.context for p in found] == ["Context 0.", "Context 5."]
    bare = naive_logp(chat_ids(tiny, "Question 5?"), yes)
    assert found[1].gain_chosen == pytest.approx(naive_logp(found[1].prompt_ids, yes) - bare, abs=1e-4)
    assert stats["dropped"] == {"empty": 3, "identical": 1}
    assert (stats["examples"], stats["pairs"]) == (6, 2)


def test_no_pair_left_is_an_error(sampled):
    """A UserError that says how many there were."""
    with pytest.raises(UserError, match="2 examples"):
        sampled(([1], [1]), ([1], [5, 1]))


def test_ready_pairs_are_tokenised_with_the_end_token(world, tiny):
    """Their texts' ids and the end-of-turn id; special tokens inside a text stay text."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    rows = [example(0, "c", chosen="the user", rejected="no"), example(1, chosen="a", rejected="<|im_end|>")]
    (first, second), stats = make_pairs(*world, rows, "missing", SETTINGS, 0)
    assert first.chosen_ids == [*tokenizer.encode("the user").ids, 1]
    assert first.rejected_ids == [[*tokenizer.encode("no").ids, 1]]
    assert (first.chosen, first.rejected, first.finished) == ("the user", ["no"], [True, True])
    assert first.prompt_ids == chat_ids(tiny, rows[0].turn("c"))
    assert second.prompt_ids == chat_ids(tiny, "Question 1?")
    assert second.rejected_ids[0].count(1) == 1 and second.rejected_ids[0][-1] == 1
    assert stats["pairs"] == 2


def test_seed_decides_the_pairs_and_slots_do_not(world, tmp_path):
    """The same seed gives the same bytes, with three slots too (fp32); another one gives other responses."""
    rows, files = [example(i, f"I am number {i % 4}.") for i in range(9)], []
    for seed, slots in [(5, 128), (5, 128), (5, 3), (6, 128)]:
        found, stats = make_pairs(*world, rows, "random", SETTINGS, seed, slots)
        save_pairs(tmp_path, found, stats)
        files.append((tmp_path / "pairs.jsonl").read_bytes())
    assert files[0] == files[1] == files[2]
    ids = [[json.loads(line)["chosen_ids"] for line in f.splitlines()] for f in files]
    assert not [a for a in ids[3] if a in ids[0] and len(a) > 2]


# ------------------------------------------------------------------------------------------- context gain

@pytest.fixture(scope="module")
def naive_logp(tiny):
    """(prompt ids, response ids) -> log pi(response | prompt) from transformers' full logits."""
    oracle = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)

    @torch.no_grad()
    def logp(prompt: list[int], response: list[int]) -> float:
        logps = oracle(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        return sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(response))

    return logp


def check_gains(found: list[Pair], gain, stats: dict) -> None:
    """Pairs' gains and their means against gain(pair, ids)."""
    chosen = [gain(p, p.chosen_ids) for p in found]
    rejected = [gain(p, p.rejected_ids[0]) for p in found]
    assert [p.gain_chosen for p in found] == pytest.approx(chosen, abs=1e-4)
    assert [p.gain_rejected[0] for p in found] == pytest.approx(rejected, abs=1e-4)
    assert max(map(abs, chosen)) > 0.1
    assert stats["gain"] == pytest.approx(dict(
        chosen=sum(chosen) / len(found),
        chosen_per_token=sum(chosen) / sum(len(p.chosen_ids) for p in found),
        rejected=sum(rejected) / len(found),
        rejected_per_token=sum(rejected) / sum(len(p.rejected_ids[0]) for p in found)), abs=1e-4)


def test_context_gain_is_the_naive_difference(made, naive_logp, tiny):
    """log p(y|x,c) - log p(y|x) of both sides, whatever the negatives; means a response and a token."""
    _, _, found, stats = made

    def gain(p: Pair, ids: list[int]) -> float:
        return naive_logp(p.prompt_ids, ids) - naive_logp(chat_ids(tiny, p.prompt), ids)

    check_gains(found, gain, stats)


def test_context_gain_without_contexts_is_against_the_other_prompt(world, naive_logp):
    """log p(y|x) - log p(y|x'), x' where the rejected response came from."""
    found, stats = make_pairs(*world, [example(i) for i in range(5)], "random", SETTINGS, 0)

    def gain(p: Pair, ids: list[int]) -> float:
        return naive_logp(p.prompt_ids, ids) - naive_logp(p.source_ids[0], ids)

    check_gains(found, gain, stats)


def test_a_model_that_ignores_the_context_has_no_gain_and_a_warning(tiny, capsys):
    """Without attention's output only the last token counts: gain 0, and the report says so."""
    model, tokenizer = load(tiny), Tokenizer(tiny)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    found, stats = make_pairs(model, tokenizer, grid(6, 3), "missing", SETTINGS, 0)
    assert [p.gain_chosen for p in found] == pytest.approx([0] * len(found), abs=1e-4)
    assert stats["gain"]["chosen"] == pytest.approx(0, abs=1e-4)
    report(stats)
    assert "warning" in capsys.readouterr().out
    stats["gain"]["chosen"] = 20.0
    report(stats)
    assert "warning" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- files, program

def test_pairs_are_read_back_as_they_were_written(made, tmp_path):
    """Every field, texts that are not ASCII too."""
    _, _, found, stats = made
    found = [dataclasses.replace(found[0], chosen="naïve 😊\n\u2028"), *found[1:]]
    save_pairs(tmp_path / "new" / "folder", found, dict(settings=dict(neg="x"), statistics=stats))
    assert load_pairs(tmp_path / "new" / "folder") == found
    assert load_pairs(tmp_path / "new" / "folder", dict(neg="x")) == found


@pytest.fixture
def call(tiny, tmp_path, monkeypatch):
    """(flags) -> pairs.py on four rows and the tiny model, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"p{i}", "context": f"c{i % 2}", "split": "train"} for i in range(4)]
    write_rows(tmp_path / "a.jsonl", *rows)

    def program(*flags: str, out: str = "o") -> None:
        argv = ["--data", "a.jsonl", "--model", str(tiny), "--out", out, "--max-new-tokens", "6"]
        monkeypatch.setattr(sys, "argv", ["pairs.py", *argv, *flags])
        pairs.program()

    return program


def test_program_writes_pairs_and_never_over_them(call, tmp_path, capsys):
    """pairs.jsonl and pairs.json, counts on the screen; other pairs in the same folder are refused."""
    call()
    found = load_pairs(tmp_path / "o")
    assert {p.id for p in found} <= {"1", "2", "3", "4"}
    assert f"{len(found)} pairs of 4 examples" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["pairs.json", "pairs.jsonl"]
    before = (tmp_path / "o" / "pairs.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"o/pairs\.jsonl was made with seed 0, not 1"):
        call("--seed", "1")
    assert (tmp_path / "o" / "pairs.jsonl").read_bytes() == before


@pytest.mark.parametrize(("change", "name"), [
    (dict(neg="random"), "neg"), (dict(seed=1), "seed"), (dict(model="other"), "model"),
    (dict(top_p=0.5), "sampling"), (dict(max_new_tokens=7), "sampling"), (dict(dtype="float32"), "dtype"),
    (dict(date="2025-01-01"), "date"), (dict(limit=3), "examples|fingerprint"),
])  # fmt: skip
def test_pairs_made_with_other_settings_are_refused(change, name, call, tiny, tmp_path, monkeypatch):
    """The same settings take the pairs without sampling; a UserError names the one that differs."""
    call()
    monkeypatch.setattr(pairs, "generate", None)
    args = pairs.Args(data="a.jsonl", model=str(tiny), max_new_tokens=6)
    assert pairs.pairs_for(args, "train", tmp_path / "o") == load_pairs(tmp_path / "o")
    with pytest.raises(UserError, match=name):
        pairs.pairs_for(dataclasses.replace(args, **change), "train", tmp_path / "o")


def test_data_that_changed_is_noticed(call, tiny, tmp_path):
    """As many rows, one of them with another context: the pairs are not those of this data."""
    call()
    lines = (tmp_path / "a.jsonl").read_text().replace('"c1"', '"c2"', 1)
    (tmp_path / "a.jsonl").write_text(lines)
    args = pairs.Args(data="a.jsonl", model=str(tiny), max_new_tokens=6)
    with pytest.raises(UserError, match="data"):
        pairs.pairs_for(args, "train", tmp_path / "o")


def test_negatives_that_cannot_be_leave_no_folder(call, tmp_path):
    """One context in all: --neg random ends before anything is written."""
    text = (tmp_path / "a.jsonl").read_text().replace('"c1"', '"c0"')
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match="--neg random"):
        call("--neg", "random")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("flag", "value"), [("--slots", "0"), ("--slots", "-1"), ("--limit", "-4")])
def test_impossible_numbers_are_refused(flag, value, call):
    """A UserError that names the flag."""
    with pytest.raises(UserError, match=flag):
        call(flag, value)


def test_half_a_surrogate_pair_is_a_mistake_in_the_data(call, tmp_path):
    """JSON may hold one as an escape, a text file may not: a UserError with file:line, before sampling."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a \\ud800", "context": "c", "split": "train"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1\b"):
        call()
    assert not (tmp_path / "o").exists()
