"""pairs.py's negatives that are not sampled, and N negatives a row (section 4.2, Table 6).

Oracles: brute force over random inputs, and single calls of generate.
"""

import dataclasses
import itertools
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
from conftest import END, chat_ids, oracle_logp, record_samples, stopping_model, training_example
from transformers import AutoModelForCausalLM

import negatives
import pairs
from folder import load
from model import Decoder
from negatives import Pair, Response, add_noise, add_reshuffled, negative_messages
from pairs import make_pairs
from run import UserError
from sample import Sampling, generate
from tokenizer import Tokenizer

SETTINGS = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=8)
ROWS = [training_example(i, f"I am number {i % 3}.") for i in range(8)]
BARE = [training_example(i) for i in range(8)]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """A tiny model, some of whose responses end early."""
    return stopping_model(tiny, tmp_path_factory.mktemp("stopping"))


@pytest.fixture(scope="module")
def model_and_tokenizer(folder) -> tuple[Decoder, Tokenizer]:
    """Those of the folder."""
    return load(folder), Tokenizer(folder)


@pytest.fixture
def keys(monkeypatch) -> list[tuple[int, int]]:
    """The keys (row, sample) of all that is sampled from now on."""
    return record_samples(monkeypatch)


# ------------------------------------------------------------------------- reshuffle

def pairs_of(texts: list[str]) -> list[Pair]:
    """Pairs without rejected responses; the prompt of row i is [i], its response 1000 + i and an end."""
    pairs = []
    for i, text in enumerate(texts):
        chosen = Response(text, [1000 + i, END], finished=i % 3 > 0, prompt_ids=[i], gain=float(i))
        pairs.append(Pair(str(i), f"p{i}", None, chosen, []))
    return pairs


def assert_reshuffled(pairs: list[Pair], count: int) -> None:
    """Each negative is a derangement of the responses, `count` different ones a row, none of equal text."""
    for k in range(count):
        sources = [pair.rejected[k].prompt_ids[0] for pair in pairs]
        assert sorted(sources) == list(range(len(pairs)))
        for i, (pair, j) in enumerate(zip(pairs, sources, strict=True)):
            given, source = pair.rejected[k], pairs[j].chosen
            assert i != j and given.text == source.text != pair.chosen.text
            assert (given.ids, given.finished) == (source.ids, source.finished)
            assert given.gain is None  # another prompt's gain is not this one's
    for pair in pairs:
        sources = {response.prompt_ids[0] for response in pair.rejected}
        assert len(sources) == len(pair.rejected) == count


def test_reshuffle_is_a_derangement_wherever_there_is_one():
    """600 random lists full of duplicates: refused exactly where more than half are one text."""
    rng, refused = random.Random(0), 0
    for case in range(600):
        n = rng.randint(1, 12)
        pool = rng.randint(1, n)
        pairs = pairs_of([f"text {min(rng.randrange(pool), rng.randrange(pool))}" for _ in range(n)])
        most = max(Counter(pair.chosen.text for pair in pairs).values())
        if 2 * most <= n:
            add_reshuffled(pairs, case, 1)
            assert_reshuffled(pairs, 1)
        else:
            refused += 1
            with pytest.raises(UserError, match=f"--neg reshuffle: {most} of {n} "):
                add_reshuffled(pairs, case, 1)
    assert 100 < refused < 500


def test_reshuffle_gives_every_row_n_different_responses():
    """200 random lists of which no text is more than a quarter; what was there before stays."""
    rng = random.Random(1)
    for case in range(200):
        n = rng.randint(8, 40)
        texts = [f"text {i // rng.randint(1, n // 4)}" for i in range(n)]
        texts = [text if texts.index(text) + n // 4 > i else f"one {i}" for i, text in enumerate(texts)]
        rng.shuffle(texts)
        pairs, count = pairs_of(texts), rng.randint(2, n // 2)
        add_reshuffled(pairs, case, count)
        assert_reshuffled(pairs, count)
        assert [pair.chosen for pair in pairs] == [pair.chosen for pair in pairs_of(texts)]


def test_reshuffle_is_decided_by_the_seed():
    """The same seed gives the same rows; twenty seeds give a row most of the responses there are."""
    def order(seed: int) -> tuple[int, ...]:
        pairs = pairs_of([f"text {i}" for i in range(10)])
        add_reshuffled(pairs, seed, 1)
        return tuple(pair.rejected[0].prompt_ids[0] for pair in pairs)

    orders = [order(seed) for seed in range(20)]
    assert orders[0] == order(0)
    assert len(set(orders)) > 10 and len({each[0] for each in orders}) > 5


def test_reshuffled_pairs_sample_nothing_but_chosen_responses(model_and_tokenizer, keys):
    """make_pairs: one response a row is drawn; rejected ones, gains apart, are another pair's chosen one."""
    made, statistics = make_pairs(*model_and_tokenizer, ROWS, "reshuffle", SETTINGS, 5, n_neg=2)
    assert sorted(keys) == [(i, 0) for i in range(8)] and len(made) > 4
    by_prompt = {tuple(pair.prompt_ids): pair for pair in made}
    for k in range(2):
        sources = [by_prompt[tuple(pair.rejected[k].prompt_ids)] for pair in made]
        assert sorted(source.id for source in sources) == sorted(pair.id for pair in made)
        for pair, source in zip(made, sources, strict=True):
            given, chosen = pair.rejected[k], source.chosen
            assert pair is not source and pair.chosen.text != chosen.text
            assert (given.text, given.ids, given.finished) == (chosen.text, chosen.ids, chosen.finished)
            assert given.gain is not None and given.gain != chosen.gain
    assert statistics["pairs"] == len(made)


# ------------------------------------------------------------------------- noise

def noise_pairs(tokenizer: Tokenizer, seed: int, count: int) -> list[Pair]:
    """Noise beside responses of 1, 9 and 300 ids, ended by two different stop ids or unfinished."""
    pairs = []
    for i, (length, end) in enumerate(itertools.product([1, 9, 300], [[1], [6], []])):
        chosen = Response("x", [70] * length + end, finished=bool(end), prompt_ids=[5])
        pairs.append(Pair(str(i), "p", None, chosen, []))
    add_noise(pairs, tokenizer, seed, count)
    return pairs


def test_noise_is_as_many_tokens_as_the_chosen_response_and_an_end(model_and_tokenizer, tiny):
    """Letters and digits only, the chosen one's own token count, the end token; it comes from no prompt."""
    library = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    for i, pair in enumerate(noise_pairs(model_and_tokenizer[1], 0, 3)):
        assert len(pair.rejected) == 3
        for response in pair.rejected:
            assert response.prompt_ids == [] and response.finished
            *own, end = response.ids
            assert (len(own), end) == ([1, 9, 300][i // 3], END)
            assert re.fullmatch("[A-Za-z0-9]+", response.text) and library.decode(own) == response.text


def test_noise_differs_by_row_sample_and_seed_alone(model_and_tokenizer):
    """The same seed gives the same ids; no two of different rows, samples or seeds are alike; all is used."""
    tokenizer = model_and_tokenizer[1]

    def responses(seed: int) -> list[Response]:
        return [response for pair in noise_pairs(tokenizer, seed, 2) for response in pair.rejected]

    first, again, other = responses(0), responses(0), responses(1)
    assert first == again
    long = [tuple(response.ids) for response in [*first, *other] if len(response.ids) > 2]
    assert len(set(long)) == len(long) == 24
    assert len(set("".join(response.text for response in first))) == 62


def test_noise_beside_a_response_that_is_only_a_stop_id(model_and_tokenizer):
    """No token of its own: the end token is all there is."""
    pair = Pair("0", "p", None, Response("x", [6], True, prompt_ids=[5]), [])
    add_noise([pair], model_and_tokenizer[1], 0, 2)
    assert [(response.ids, response.text) for response in pair.rejected] == [([END], "")] * 2


def test_noise_pairs_sample_nothing_but_chosen_responses(model_and_tokenizer, tiny, keys):
    """make_pairs: one response a row, whose length the noise has; a gain for each."""
    made, _ = make_pairs(model_and_tokenizer[0], Tokenizer(tiny), ROWS, "noise", SETTINGS, 5, n_neg=2)
    assert len(made) > 4
    assert sorted(keys) == [(i, 0) for i in range(8)]
    for pair in made:
        own = len(pair.chosen.ids) - (pair.chosen.ids[-1] == END)
        assert [len(response.ids) for response in pair.rejected] == [own + 1] * 2
        assert all(isinstance(response.gain, float) for response in pair.rejected)


# ------------------------------------------------------------------------- N negatives

def allowed_messages(neg: str, rows: list, i: int) -> set[str]:
    """The user messages that row i's rejected responses may come from."""
    e = rows[i]
    if neg == "missing":
        return {e.prompt}
    if neg == "same":
        return {e.user_message(e.context)}
    if e.context is None:
        return {other.prompt for other in rows if other.prompt != e.prompt}
    return {e.user_message(other.context) for other in rows if other.context != e.context}


def useful_draws(model_and_tokenizer, prompts: list[list[int]], i: int, chosen: list[int]) -> list[Response]:
    """Samples (i, 1), (i, 2), ... of row i's prompts, one at a time, without useless ones."""
    model, tokenizer = model_and_tokenizer
    responses = []
    for k, prompt in enumerate(prompts, 1):
        (sample,) = generate(model, [prompt], SETTINGS, tokenizer.stop_ids, 5, [(i, k)])
        text = tokenizer.decode(sample.ids)
        if text.strip() and sample.ids != chosen:
            responses.append(Response(text, sample.ids, sample.finished, prompt))
    return responses


@pytest.mark.parametrize("n_neg", [1, 3])
@pytest.mark.parametrize(("neg", "rows"), [
    ("missing", ROWS), ("random", ROWS), ("random", BARE), ("same", BARE),
], ids=["missing", "random", "random-bare", "same"])
def test_n_negatives_are_drawn_from_their_prompts_and_keys(neg, rows, n_neg, model_and_tokenizer, folder):
    """The first N useful ones of ten draws: sample (i, k) of row i's k-th source, which is the bare prompt,
    one with another context, or another prompt. So the first of three is that of one."""
    made, statistics = make_pairs(*model_and_tokenizer, rows, neg, SETTINGS, 5, n_neg=n_neg)
    messages = negative_messages(rows, neg, 5, 10)
    assert len(made) + sum(statistics["dropped"].values()) == 8 and len(made) > 4
    for pair in made:
        i = int(pair.id)
        assert set(messages[i]) <= allowed_messages(neg, rows, i)
        prompts = [chat_ids(folder, message) for message in messages[i]]
        expected = useful_draws(model_and_tokenizer, prompts, i, pair.chosen.ids)
        assert len(expected) >= n_neg
        assert [dataclasses.replace(response, gain=None) for response in pair.rejected] == expected[:n_neg]
        assert pair.prompt_ids == chat_ids(folder, rows[i].user_message(rows[i].context))
    if neg == "random":
        sources = {tuple(response.prompt_ids) for pair in made for response in pair.rejected}
        assert len(sources) > 3


def test_every_negative_has_its_own_gain(model_and_tokenizer, folder):
    """log p(y|x,c) - log p(y|x) of each, from transformers' full logits."""
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    made, statistics = make_pairs(*model_and_tokenizer, ROWS[:4], "missing", SETTINGS, 5, n_neg=3)
    expected, gains = [], []
    for pair in made:
        bare = chat_ids(folder, pair.prompt)
        for response in pair.rejected:
            gains.append(response.gain)
            expected.append(oracle_logp(oracle, pair.prompt_ids, response.ids)
                            - oracle_logp(oracle, bare, response.ids))
    assert gains == pytest.approx(expected, abs=1e-4)
    assert statistics["gain"]["rejected"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)


@pytest.mark.parametrize("rows", [ROWS, BARE, BARE[:1]], ids=["contexts", "bare", "one"])
def test_no_negatives_sample_chosen_responses_only(rows, model_and_tokenizer, keys):
    """n_neg 0, what SFT asks for: nothing rejected, with contexts, without, or a single row."""
    made, statistics = make_pairs(*model_and_tokenizer, rows, "missing", SETTINGS, 5, n_neg=0)
    assert sorted(keys) == [(i, 0) for i in range(len(rows))] and statistics["pairs"] == len(made)
    assert all(pair.rejected == [] for pair in made)
    assert set(statistics["gain"].values()) == {None}


def test_chosen_responses_do_not_depend_on_the_negatives(model_and_tokenizer, tiny):
    """The same ids for every strategy and number of negatives."""
    chosen: dict[str, set] = {}
    kinds = [("missing", 0), ("missing", 2), ("random", 1), ("reshuffle", 1), ("noise", 3), ("same", 2)]
    for neg, n_neg in kinds:
        made, _ = make_pairs(model_and_tokenizer[0], Tokenizer(tiny), ROWS, neg, SETTINGS, 5, n_neg=n_neg)
        for pair in made:
            chosen.setdefault(pair.id, set()).add(tuple(pair.chosen.ids))
    assert len(chosen) > 4 and {len(ids) for ids in chosen.values()} == {1}


# ------------------------------------------------------------------------- a negative that is not finished

def test_too_few_messages_are_refused(monkeypatch):
    """As a new kind of negative may give."""
    monkeypatch.setattr(negatives, "other_rows", lambda examples, *_: examples[:1])
    with pytest.raises(ValueError, match="random gives no list of 2 messages for row 0"):
        negative_messages(ROWS, "random", 0, 2)


def test_pairs_without_rejected_responses_are_refused(model_and_tokenizer, monkeypatch):
    """Where the function that should make them has not."""
    monkeypatch.setattr(pairs, "add_noise", lambda *_: None)
    with pytest.raises(ValueError, match="noise has not given every pair 1 rejected responses"):
        make_pairs(*model_and_tokenizer, ROWS, "noise", SETTINGS, 5)
