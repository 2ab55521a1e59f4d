"""pairs.py against its contract: negatives, pairs on a tiny model, context gain, the pairs' files.

Oracles: brute force, single calls of generate, and transformers' full logits.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import END, chat_ids, letter_ids, oracle_logp, run_inside, training_example
from transformers import AutoModelForCausalLM

import pairs
from checkpoint import lock
from data import Example
from folder import load
from model import Decoder
from negatives import Pair, Response, negative_messages
from pairs import (check_negatives, load_pairs, make_pairs, pairs_for, print_statistics,
                   save_pairs)
from run import UserError, read_json, write_json, write_jsonl
from sample import Sample, Sampling, generate
from tokenizer import Tokenizer

SETTINGS = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=8)


# ------------------------------------------------------------------------- what negatives are sampled from

def grid(rows: int, contexts: int) -> list[Example]:
    """Rows that share few contexts, the first of them most of the time."""
    numbers = [max(0, i % (2 * contexts) - contexts) for i in range(rows)]
    return [training_example(i, f"Context {number}.") for i, number in enumerate(numbers)]


def test_missing_is_the_bare_prompt():
    """pi_ref(.|x)."""
    rows = grid(6, 3)
    assert negative_messages(rows, "missing", 0) == [[e.prompt] for e in rows]


def test_where_hardly_any_other_row_will_do_it_stands_in_for_more():
    """59 rows of one context and one of another: all draws of the 59 are of that one, ten times over."""
    rows = [training_example(i, "A" if i else "B") for i in range(60)]
    messages = negative_messages(rows, "random", 0, count=10)
    assert all(row == [rows[i].user_message("B")] * 10 for i, row in enumerate(messages) if i)
    assert messages[0] == [rows[0].user_message("A")] * 10


@pytest.mark.parametrize(("rows", "contexts"), [(80, 40), (200, 3), (50, 2)])
def test_random_is_the_same_prompt_with_the_context_of_another_row(rows, contexts):
    """Never a context of equal text, though many rows share one; the seed decides which."""
    examples = grid(rows, contexts)
    texts = {e.context for e in examples}
    assert len(texts) == contexts
    drawn = []
    for e, (message,) in zip(examples, negative_messages(examples, "random", 0), strict=True):
        (other,) = [context for context in texts if message == e.user_message(context)]
        assert other != e.context
        drawn.append(other)
    assert len(set(drawn)) >= min(contexts, 20)
    first, again, other = (negative_messages(examples, "random", seed) for seed in (0, 0, 1))
    assert first == again
    assert contexts == 2 or first != other


def test_random_without_contexts_is_another_prompt():
    """Never one of equal text."""
    examples = [training_example(i, prompt=f"Question {i // 4}?") for i in range(40)]
    messages = [message for (message,) in negative_messages(examples, "random", 0)]
    assert all(message != e.prompt for e, message in zip(examples, messages, strict=True))
    assert set(messages) <= {e.prompt for e in examples} and len(set(messages)) > 5


@pytest.mark.parametrize(("neg", "contexts"), [
    ("missing", [None, None]), ("missing", ["c", None]), ("random", ["c", "c", "c"]), ("random", ["c"]),
    ("random", [None, None]), ("random", ["c", None, "d"]),
])  # fmt: skip
def test_negatives_that_cannot_be_are_refused(neg, contexts):
    """missing without contexts, random where all contexts (or prompts) are one or some rows have no context:
    UserErrors naming --neg."""
    rows = [training_example(i, context, prompt="p") for i, context in enumerate(contexts)]
    with pytest.raises(UserError, match=f"--neg {neg}"):
        negative_messages(rows, neg, 0)


@pytest.mark.parametrize(("rejected", "neg", "n_neg", "words"), [
    ("no", "missing", 2, "--n-neg 2: .* supplies one rejected response"),
    (None, "missing", 1, "no rejected responses: --neg reshuffle or noise"),
    (None, "random", 1, "no rejected responses"),
    (None, "reshuffle", 1, None), (None, "noise", 3, None), (None, "missing", 0, None),
    ("no", "missing", 1, None), ("no", "random", 1, "supplies its rejected responses itself"),
    ("no", "noise", 1, "supplies its rejected responses itself"),
])  # fmt: skip
def test_ready_pairs_have_the_negatives_that_their_file_brings(rejected, neg, n_neg, words):
    """One response, or those that need no sampling; anything else is a UserError."""
    rows = [training_example(i, chosen="yes", rejected=rejected) for i in range(3)]
    args = pairs.Args(data="a.jsonl", neg=neg, n_neg=n_neg)
    if words is None:
        check_negatives(rows, args)
    else:
        with pytest.raises(UserError, match=words):
            check_negatives(rows, args)


# ------------------------------------------------------------------------- pairs

@pytest.fixture(scope="module")
def model_and_tokenizer(tiny) -> tuple[Decoder, Tokenizer]:
    """Those of the tiny folder; every fifth id ends a response, so that some end early."""
    tokenizer = Tokenizer(tiny)
    tokenizer.stop_ids = frozenset(range(1, 320, 5))
    return load(tiny), tokenizer


@pytest.fixture(scope="module", params=["missing", "random"])
def sampled(request, model_and_tokenizer) -> tuple[str, list[Example], list[Pair], dict]:
    """(neg, examples, pairs, statistics): 12 rows with 4 contexts sampled on the tiny model."""
    examples = [training_example(i, f"I am number {i % 4}.") for i in range(12)]
    return request.param, examples, *make_pairs(*model_and_tokenizer, examples, request.param, SETTINGS, 5)


def test_chosen_responses_are_drawn_from_their_prompts_and_keys(sampled, model_and_tokenizer, tiny):
    """Row i's is sample (i, 0) of (x, c); the rejected one comes from another prompt."""
    neg, examples, made, statistics = sampled
    model, tokenizer = model_and_tokenizer
    contexts = {e.context for e in examples}
    assert len(made) + sum(statistics["dropped"].values()) == statistics["examples"] == 12
    assert len(made) >= 8
    for pair in made:
        i = int(pair.id)
        e = examples[i]
        messages = [e.user_message(context) for context in contexts - {e.context}]
        if neg == "missing":
            messages = [e.prompt]
        (rejected,) = pair.rejected
        assert pair.prompt_ids == pair.chosen.prompt_ids == chat_ids(tiny, e.user_message(e.context))
        assert rejected.prompt_ids in [chat_ids(tiny, message) for message in messages]
        (sample,) = generate(model, [pair.prompt_ids], SETTINGS, tokenizer.stop_ids, 5, [(i, 0)])
        assert (pair.chosen.ids, pair.chosen.finished) == (sample.ids, sample.finished)
        assert (pair.prompt, pair.context) == (e.prompt, e.context)


def test_the_end_token_is_there_where_a_response_has_ended(sampled, model_and_tokenizer):
    """finished holds for exactly the responses whose last id is a stop id; no other id is one."""
    _, _, made, _ = sampled
    stop_ids = model_and_tokenizer[1].stop_ids
    responses = [response for pair in made for response in pair.responses]
    for response in responses:
        assert response.finished == (response.ids[-1] in stop_ids)
        assert not stop_ids & set(response.ids[:-1])
        assert response.finished or len(response.ids) == SETTINGS.max_new_tokens
    finished = [response.finished for response in responses]
    assert set(finished) == {True, False}


@pytest.fixture
def make_of(monkeypatch, model_and_tokenizer):
    """(rows of the chosen ids and of the ids of each further draw, the last of which repeat) -> make_pairs'
    answer, had generate drawn these."""
    def get(*rows: tuple[list[int], ...], n_neg: int = 1):
        def generate(model, prompts, sampling, stop_ids, seed, keys, slots, bar=None, on_finished=None):
            samples = []
            for job, (row, k) in enumerate(keys):
                ids = rows[row][min(k, len(rows[row]) - 1)]
                samples.append(Sample(ids, [0.0] * len(ids), ids[-1] == END))
                if on_finished is not None:
                    on_finished(job, samples[-1])
            return samples

        monkeypatch.setattr(pairs, "generate", generate)
        examples = [training_example(i, f"Context {i}.") for i in range(len(rows))]
        return make_pairs(*model_and_tokenizer, examples, "missing", SETTINGS, 0, n_neg=n_neg)

    return get


def test_sampled_ids_are_kept_as_they_are(make_of, tiny):
    """Nothing is decoded and tokenised again: an unusual cut survives, the end token too; texts lack it."""
    unusual = letter_ids(tiny, "the answer")
    usual = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json")).encode("the answer").ids
    assert unusual != usual
    (pair,), _ = make_of(([*unusual, END], usual))
    (rejected,) = pair.rejected
    assert (pair.chosen.ids, rejected.ids) == ([*unusual, END], usual)
    assert (pair.chosen.finished, rejected.finished) == (True, False)
    assert (pair.chosen.text, rejected.text) == ("the answer", "the answer")


def test_useless_examples_are_dropped_and_counted(make_of, tiny, logp_of):
    """An empty chosen response, or none but empty and equal rejected ones in ten draws: four examples of six;
    those left keep their contexts, in their context gains too."""
    yes, no, blank = (letter_ids(tiny, text) for text in ("yes", "no", " \n "))
    made, statistics = make_of(([*yes, END], [*no, END]), ([*yes, END], [*yes, END]), ([END], yes),
                               (no, [*blank, END]), ([END], [END]), (yes, [*yes, END]))
    assert [pair.id for pair in made] == ["0", "5"]
    assert [pair.context for pair in made] == ["Context 0.", "Context 5."]
    last = made[1]
    expected = logp_of(last.prompt_ids, yes) - logp_of(chat_ids(tiny, "Question 5?"), yes)
    assert last.chosen.gain == pytest.approx(expected, abs=1e-4)
    assert statistics["dropped"] == {"empty": 2, "identical": 2}
    assert (statistics["examples"], statistics["pairs"]) == (6, 2)


def test_a_useless_rejected_response_is_drawn_again(make_of, tiny):
    """Until there are enough; a row that has had ten draws repeats the good ones in their order."""
    yes, no, so, blank = ([*letter_ids(tiny, text), END] for text in ("yes", "no", "so", " "))
    rows = [(yes, no, so), (yes, yes, blank, no, so), (yes, no, yes), (yes, *[yes] * 9, no)]
    made, statistics = make_of(*rows, n_neg=2)
    assert [[response.ids for response in pair.rejected] for pair in made] == [
        [no, so], [no, so], [no, no], [no, no]]
    assert statistics["dropped"] == {"empty": 0, "identical": 0}
    assert statistics["redrawn"] == 0 + 2 + 8 + 8 and statistics["unfinished"] == 0
    assert statistics["response_tokens"] == 4 * len(yes) + 4 * len(no) + 2 * len(so)  # the repeated one once
    for pair in made:
        assert all(response.finished and response.gain is not None for response in pair.rejected)
        assert all(response.prompt_ids == chat_ids(tiny, pair.prompt) for response in pair.rejected)


@pytest.mark.parametrize("n_neg", [1, 3, 10])
def test_the_number_of_rejected_responses_does_not_decide_which_examples_are_used(n_neg, make_of, tiny):
    """A row is dropped where ten draws are useless, and only there."""
    yes, no = ([*letter_ids(tiny, text), END] for text in ("yes", "no"))
    rows = [(yes, no), (yes, *[yes] * 9, no), (yes, yes), (yes, *[yes] * 10, no)]
    made, statistics = make_of(*rows, n_neg=n_neg)
    assert [pair.id for pair in made] == ["0", "1"] and statistics["dropped"]["identical"] == 2
    assert all(len(pair.rejected) == n_neg for pair in made)


def test_no_pair_left_is_an_error(make_of):
    """A UserError that says how many there were."""
    with pytest.raises(UserError, match="2 examples"):
        make_of(([END], [END]), ([END], [5, END]))


def test_ready_pairs_are_tokenised_with_the_end_token(model_and_tokenizer, tiny):
    """Their texts' ids and the end-of-turn id; special tokens inside a text stay text. Where the rejected one
    comes from the file does not say."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    rows = [training_example(0, "c", chosen="the user", rejected="no"),
            training_example(1, chosen="a", rejected="<|im_end|>")]
    (first, second), statistics = make_pairs(*model_and_tokenizer, rows, "missing", SETTINGS, 0)
    right = chat_ids(tiny, rows[0].user_message("c"))
    chosen = Response("the user", [*tokenizer.encode("the user").ids, END], True, right, first.chosen.gain)
    (rejected,) = first.rejected
    assert first.chosen == chosen and first.prompt_ids == right
    assert rejected == Response("no", [*tokenizer.encode("no").ids, END], True, [], rejected.gain)
    assert second.prompt_ids == chat_ids(tiny, "Question 1?")
    assert second.rejected[0].ids.count(END) == 1 and second.rejected[0].ids[-1] == END
    assert statistics["pairs"] == 2


def test_seed_decides_the_pairs_and_slots_do_not(model_and_tokenizer, tmp_path):
    """The same seed gives the same bytes, with three slots too (fp32); another one gives other responses."""
    rows = [training_example(i, f"I am number {i % 4}.") for i in range(9)]
    files, chosen = [], []
    for seed, slots in [(5, 128), (5, 128), (5, 3), (6, 128)]:
        made, _ = make_pairs(*model_and_tokenizer, rows, "random", SETTINGS, seed, slots)
        save_pairs(tmp_path, made, {})
        files.append((tmp_path / "pairs.jsonl").read_bytes())
        chosen.append([pair.chosen.ids for pair in made])
    assert files[0] == files[1] == files[2]
    assert not [ids for ids in chosen[3] if ids in chosen[0] and len(ids) > 2]


# ------------------------------------------------------------------------- context gain

@pytest.fixture(scope="module")
def logp_of(tiny) -> Callable[[list[int], list[int]], float]:
    """(prompt ids, response ids) -> log pi(response | prompt) from transformers' full logits."""
    oracle = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    return lambda prompt, response: oracle_logp(oracle, prompt, response)


def assert_gains(made: list[Pair], gain_of, statistics: dict) -> None:
    """Responses' gains are gain_of(pair, ids), and the statistics are their means a response and a token."""
    means = {}
    sides = dict(chosen=[(pair, pair.chosen) for pair in made],
                 rejected=[(pair, response) for pair in made for response in pair.rejected])
    for side, responses in sides.items():
        expected = [gain_of(pair, response.ids) for pair, response in responses]
        assert [response.gain for _, response in responses] == pytest.approx(expected, abs=1e-4)
        assert max(map(abs, expected)) > 0.1
        means[side] = sum(expected) / len(expected)
        means[f"{side}_per_token_micro"] = sum(expected) / sum(len(response.ids) for _, response in responses)
    assert statistics["gain"] == pytest.approx(means, abs=1e-4)


def test_context_gain_is_the_naive_difference(sampled, logp_of, tiny):
    """log p(y|x,c) - log p(y|x) of both sides, whatever the negatives; means a response and a token."""
    _, _, made, statistics = sampled

    def gain(pair: Pair, ids: list[int]) -> float:
        return logp_of(pair.prompt_ids, ids) - logp_of(chat_ids(tiny, pair.prompt), ids)

    assert_gains(made, gain, statistics)


def test_the_other_prompt_of_a_context_gain_is_drawn_by_seed(tiny, monkeypatch):
    """Two seeds, two draws; the prompts that responses were sampled from stay."""
    asked = []
    monkeypatch.setattr(pairs, "sequence_logps", lambda model, groups, bar=None: asked.append(
        [prompt for prompt, _ in groups]) or [[0.0] * len(responses) for _, responses in groups])
    examples = [training_example(i) for i in range(9)]
    made = [Pair(e.id, e.prompt, None, Response("x", [5], True, [6]), [Response("y", [7], True, [6])])
            for e in examples]
    for seed in (0, 1):
        pairs.context_gain(None, Tokenizer(tiny), examples, made, seed)
    assert asked[0] == asked[2] and asked[1] != asked[3]


def test_context_gain_without_contexts_is_against_another_prompt(model_and_tokenizer, logp_of, tiny):
    """log p(y|x) - log p(y|x'): one x' for all responses of a pair, never the pair's own."""
    examples = [training_example(i) for i in range(5)]
    made, statistics = make_pairs(*model_and_tokenizer, examples, "random", SETTINGS, 0, n_neg=2)
    others = {}
    for pair in made:
        for e in examples:
            bare = chat_ids(tiny, e.prompt)
            gains = [logp_of(pair.prompt_ids, response.ids) - logp_of(bare, response.ids)
                     for response in pair.responses]
            if gains == pytest.approx([response.gain for response in pair.responses], abs=1e-4):
                others[pair.id] = e
    assert others.keys() == {pair.id for pair in made}
    assert all(e.id != id for id, e in others.items()) and len({e.id for e in others.values()}) > 1
    gains = [pair.chosen.gain for pair in made]
    assert statistics["gain"]["chosen"] == pytest.approx(sum(gains) / len(gains))


def test_a_model_that_ignores_the_context_has_no_gain_and_a_warning(tiny, capsys):
    """Without attention's output only the last token counts: gain 0, and what is printed says so."""
    model, tokenizer = load(tiny), Tokenizer(tiny)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    made, statistics = make_pairs(model, tokenizer, grid(6, 3), "missing", SETTINGS, 0)
    assert [pair.chosen.gain for pair in made] == pytest.approx([0] * len(made), abs=1e-4)
    assert statistics["gain"]["chosen"] == pytest.approx(0, abs=1e-4)
    print_statistics(statistics)
    assert "warning" in capsys.readouterr().out
    statistics["gain"]["chosen"] = 20.0
    print_statistics(statistics)
    assert "warning" not in capsys.readouterr().out


# ------------------------------------------------------------------------- files

WHOLE = dict(settings={}, statistics={})


def write_pairs(folder: Path, rows: list[dict], meta: dict | None = None) -> Path:
    """A folder of pairs as they stand in its files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "pairs.jsonl", rows)
    write_json(folder / "pairs.json", meta or WHOLE)
    return folder


def test_pairs_are_read_back_as_they_were_written(sampled, tmp_path):
    """Every field, texts that are not ASCII too."""
    made = list(sampled[2])
    made[0] = dataclasses.replace(made[0], prompt="naïve 😊\n\u2028", style="short")
    save_pairs(tmp_path / "new" / "folder", made, WHOLE)
    assert load_pairs(tmp_path / "new" / "folder") == made
    assert read_json(tmp_path / "new" / "folder" / "pairs.json") == WHOLE


ROW = dict(
    id="r1", prompt="Why?", context="I am old.", style="short",
    chosen=dict(text="Because.", ids=[7, 8, 1], finished=True, prompt_ids=[5, 6], gain=1.5),
    rejected=[dict(text="No.", ids=[9, 1], finished=True, prompt_ids=[5], gain=-0.5)],
)  # fmt: skip


@pytest.mark.parametrize("row", [
    dict(id="r"), ROW | dict(extra=1), ROW | dict(rejected=["no"]), ROW | dict(chosen="yes"),
    ROW | dict(chosen=dict(text="Because."))], ids=["little", "much", "texts", "text", "part"])  # fmt: skip
def test_a_row_that_is_no_pair_is_named(row, tmp_path):
    """By file and line."""
    with pytest.raises(UserError, match=r"pairs\.jsonl:2: not a pair"):
        load_pairs(write_pairs(tmp_path, [ROW, row]))


def test_pairs_that_are_not_whole_are_refused(tmp_path):
    """pairs.json has no statistics until all is sampled."""
    folder = write_pairs(tmp_path, [ROW], dict(settings={}, statistics=None))
    with pytest.raises(UserError, match="is incomplete"):
        load_pairs(folder)


# ------------------------------------------------------------------------- the program

FLAGS = ["--data", "a.jsonl", "--out", "o", "--max-new-tokens", "6", "--dtype", "float32"]


@pytest.fixture
def call(tiny, tmp_path):
    """(flags) -> pairs.py on four rows and the tiny model, in a folder of the test's own."""
    rows = [dict(prompt=f"p{i}", context=f"c{i % 2}", split="train") for i in range(4)]
    write_jsonl(tmp_path / "a.jsonl", rows)

    def program(*flags: str) -> None:
        run_inside(pairs.program, tmp_path, *FLAGS, "--model", tiny, *flags)

    return program


@pytest.fixture
def arguments(tiny, tmp_path, monkeypatch) -> pairs.Args:
    """The arguments of `call`."""
    monkeypatch.chdir(tmp_path)
    return pairs.Args(data="a.jsonl", model=str(tiny), max_new_tokens=6, dtype="float32")


def test_the_program_writes_pairs_and_never_over_them(call, tmp_path, capsys):
    """pairs.jsonl and pairs.json, counts on the screen; other pairs in the same folder are refused."""
    call()
    made = load_pairs(tmp_path / "o")
    assert {pair.id for pair in made} <= {"1", "2", "3", "4"}
    assert f"{len(made)} pairs of 4 examples" in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "o").iterdir()) == ["pairs.json", "pairs.jsonl"]
    before = (tmp_path / "o" / "pairs.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"o/pairs\.jsonl was made with seed 0, not 1"):
        call("--seed", "1")
    assert (tmp_path / "o" / "pairs.jsonl").read_bytes() == before


def test_two_programs_cannot_sample_into_one_folder(call, tmp_path):
    """Their pairs would mix; a program that is refused leaves nothing behind."""
    with lock(tmp_path / "o"):
        with pytest.raises(UserError, match="o: another run is writing here"):
            call()
        assert not any((tmp_path / "o").iterdir())
    assert not (tmp_path / "o").exists()


def test_seconds_are_said_to_leave_out_what_was_sampled_before(call, tmp_path, capsys):
    """Two of four pairs are there already, as an interruption leaves them."""
    call()
    file, meta = tmp_path / "o" / "pairs.jsonl", read_json(tmp_path / "o" / "pairs.json")
    assert meta["statistics"]["sampled_before"] == 0 and "sampled before" not in capsys.readouterr().out
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    write_json(tmp_path / "o" / "pairs.json", dict(settings=meta["settings"], statistics=None))
    call()
    assert read_json(tmp_path / "o" / "pairs.json")["statistics"]["sampled_before"] == 2
    assert "(2 pairs were sampled before)" in capsys.readouterr().out


def test_a_gain_is_a_number_for_every_response(call, tmp_path):
    """In the file, too: finite, for chosen and rejected ones."""
    call("--n-neg", "2")
    for pair in load_pairs(tmp_path / "o"):
        assert len(pair.responses) == 3 and all(math.isfinite(response.gain) for response in pair.responses)


@pytest.mark.parametrize(("change", "name"), [
    (dict(neg="random"), "neg"), (dict(seed=1), "seed"), (dict(model="other"), "model"),
    (dict(top_p=0.5), "sampling"), (dict(max_new_tokens=7), "sampling"), (dict(dtype="bfloat16"), "dtype"),
    (dict(date="2025-01-01"), "date"), (dict(limit=3), "examples|fingerprint"),
])  # fmt: skip
def test_pairs_made_with_other_settings_are_refused(change, name, call, arguments, tmp_path, monkeypatch):
    """The same settings take the pairs without sampling; a UserError names the one that differs."""
    call()
    monkeypatch.setattr(pairs, "generate", None)
    assert pairs_for(arguments, "train", tmp_path / "o") == load_pairs(tmp_path / "o")
    with pytest.raises(UserError, match=rf"made with \w*({name})\b"):
        pairs_for(dataclasses.replace(arguments, **change), "train", tmp_path / "o")


def test_data_that_changed_is_noticed(call, arguments, tmp_path):
    """As many rows, one of them with another context: the pairs are not those of this data."""
    call()
    text = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(text.replace('"c1"', '"c2"', 1))
    with pytest.raises(UserError, match="data_fingerprint"):
        pairs_for(arguments, "train", tmp_path / "o")


def test_negatives_that_cannot_be_leave_no_folder(call, tmp_path):
    """One context in all: --neg random ends before anything is written."""
    text = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(text.replace('"c1"', '"c0"'))
    with pytest.raises(UserError, match="--neg random"):
        call("--neg", "random")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("flag", "value"), [
    ("--slots", "0"), ("--slots", "-1"), ("--limit", "-4"), ("--n-neg", "-1"),
])  # fmt: skip
def test_impossible_numbers_are_refused(flag, value, call):
    """A UserError that names the flag."""
    with pytest.raises(UserError, match=flag):
        call(flag, value)


def test_a_mistake_in_the_data_comes_before_the_folder(call, tmp_path):
    """A UserError with file and line, and nothing is left."""
    (tmp_path / "a.jsonl").write_text(json.dumps(dict(context="c", split="train")) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:1\b"):
        call()
    assert not (tmp_path / "o").exists()


def test_a_random_context_is_of_another_user():
    """Where users are known: never of another row of one's own user, though its context is another one."""
    rows = [training_example(i, f"Context {i}.", user=f"u{i // 4}") for i in range(20)]
    for e, messages in zip(rows, negative_messages(rows, "random", 0, 10), strict=True):
        assert not set(messages) & {e.user_message(other.context) for other in rows if other.user == e.user}
    with pytest.raises(UserError, match="of two users"):
        negative_messages(rows[:4], "random", 0)


def test_pairs_are_not_sampled_as_evaluation_samples(call, monkeypatch):
    """At temperature 1, not at the 0.1 of held-out responses; as the command says, where it does."""
    used = []
    monkeypatch.setattr(pairs, "generate", lambda *a, **k: used.append(a[2]) or generate(*a, **k))
    call()
    assert set(used) == {Sampling(1.0, 1.0, 6)}
    used.clear()
    call("--temperature", "0.7", "--top-p", "0.8", "--top-k", "5", "--out", "other")
    assert set(used) == {Sampling(0.7, 0.8, 6, 5)}


def test_further_draws_and_gains_are_told_the_system_prompt(tiny, monkeypatch):
    """Not only the first draws: a rejected response that is drawn again, and log p(y|x) of the gain."""
    yes, no = letter_ids(tiny, "yes"), letter_ids(tiny, "no")
    tokenizer, model, asked = Tokenizer(tiny), load(tiny), []

    def generate(model, prompts, sampling, stop_ids, seed, keys, slots, bar=None,
                 on_finished=lambda i, drawn: None):
        asked.extend(zip(keys, prompts, strict=True))
        samples = [Sample(no if k == 3 else yes, [], k == 0) for _, k in keys]
        for i, drawn in enumerate(samples):
            on_finished(i, drawn)
        return samples

    monkeypatch.setattr(pairs, "generate", generate)
    example = training_example(0, "Context 0.", system="Be brief.")
    [pair], statistics = make_pairs(model, tokenizer, [example], "missing", SETTINGS, 0)
    full = tokenizer.chat(example.user_message("Context 0."), "Be brief.")
    bare = tokenizer.chat("Question 0?", "Be brief.")
    assert asked == [((0, 0), full), ((0, 1), bare), ((0, 2), bare), ((0, 3), bare)]
    oracle = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for response, ids in zip(pair.responses, (yes, no), strict=True):
        expected = oracle_logp(oracle, full, ids) - oracle_logp(oracle, bare, ids)
        assert response.ids == ids and response.gain == pytest.approx(expected, abs=1e-4)
    assert statistics["unfinished"] == 0.5 and statistics["redrawn"] == 2
