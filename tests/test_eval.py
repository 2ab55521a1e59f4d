"""eval.py against its contract: intervals, nltk's BLEU, tables by hand, responses, the program."""

import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from transformers import AutoModelForCausalLM

import eval as evaluation
from conftest import random_model
from eval import (Args, Response, bootstrap, compare, distinct, diversity, elsewhere, evaluate, respond,
                  self_bleu, system_row, wins, words)
from model import load, save
from pairs import Example, load_examples
from run import UserError, read_json, read_jsonl, write_json
from sample import Sampling, Tokenizer, generate

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------- intervals

def loop_bootstrap(values: list[float], clusters: list[str], draws: int) -> tuple[float, float]:
    """Clusters drawn with replacement, their rows pooled: 2.5 and 97.5% of the means."""
    rows: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        if not math.isnan(value):
            rows.setdefault(cluster, []).append(value)
    draw, means = random.Random(0), []
    for _ in range(draws):
        pooled = [v for name in draw.choices(list(rows), k=len(rows)) for v in rows[name]]
        means.append(sum(pooled) / len(pooled))
    return tuple(np.percentile(means, [2.5, 97.5]))


@pytest.mark.parametrize("missing", [0, 9])
def test_interval_is_that_of_a_loop_over_clusters(missing):
    """Twelve clusters of unequal sizes, with and without NaN rows: mean exactly, ends within noise."""
    draw = np.random.default_rng(1)
    clusters = [f"prompt {i}" for i in range(12) for _ in range(1 + i % 4)]
    values = draw.normal(size=len(clusters)) + np.array([len(c) + int(c[7:]) / 5 for c in clusters])
    values[draw.permutation(len(values))[:missing]] = np.nan
    got = bootstrap(values, clusters)
    low, high = loop_bootstrap(values.tolist(), clusters, 4000)
    assert got["mean"] == pytest.approx(np.nanmean(values)) and got["n"] == 30 - missing
    assert got["low"] == pytest.approx(low, abs=0.06) and got["high"] == pytest.approx(high, abs=0.06)
    assert high - low > 0.7


def test_two_clusters_in_closed_form():
    """Means 0, 1/2 and 1 with probabilities 1/4, 1/2, 1/4: the interval is [0, 1]."""
    got = bootstrap(np.array([0.0, 0, 0, 1, 1, 1]), list("aaabbb"))
    assert got == dict(mean=0.5, low=0.0, high=1.0, n=6)


def test_clusters_that_agree_widen_the_interval():
    """Nine equal rows a prompt are worth one: three times as wide as if rows were independent."""
    values = np.repeat(np.random.default_rng(2).normal(size=40), 9)
    width = {}
    for name, size in (("prompts", 9), ("rows", 1)):
        got = bootstrap(values, [str(i // size) for i in range(360)])
        width[name] = got["high"] - got["low"]
        assert got["mean"] == pytest.approx(values.mean())
    assert width["prompts"] / width["rows"] == pytest.approx(3, rel=0.1)


def test_interval_covers_the_truth_about_95_times_in_100():
    """200 data sets of 50 prompts x 4 rows whose true mean is 0."""
    draw, clusters = np.random.default_rng(3), [str(i // 4) for i in range(200)]
    hits = 0
    for _ in range(200):
        values = np.repeat(draw.normal(size=50), 4) + draw.normal(size=200)
        got = bootstrap(values, clusters, draws=500)
        hits += got["low"] <= 0 <= got["high"]
    assert 0.89 <= hits / 200 <= 0.985


def test_nan_rows_are_left_out():
    """As if they were not there; without any value there is no interval."""
    values = np.array([1.0, np.nan, 0.0, np.nan, 1.0, 0.5])
    clusters = ["a", "a", "b", "c", "d", "d"]
    assert bootstrap(values, clusters) == bootstrap(values[[0, 2, 4, 5]], ["a", "b", "d", "d"])
    assert bootstrap(np.full(3, np.nan), ["a", "b", "c"]) == dict(mean=None, low=None, high=None, n=0)


def test_interval_is_deterministic():
    """Twice the same; equal values have no width; another seed moves the ends a little."""
    values, clusters = np.random.default_rng(4).normal(size=60), [str(i // 3) for i in range(60)]
    first, again, other = (bootstrap(values, clusters, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and other == pytest.approx(first, abs=0.02)
    assert bootstrap(np.full(60, 0.25), clusters) == dict(mean=0.25, low=0.25, high=0.25, n=60)


# ------------------------------------------------------------------------------------------- text quality

TEXTS = ["The soup is good, and the bread is better.", "The soup is good. And so is the bread!",
         "Try to sleep before ten; the soup is good for you.", "What do you think? The bread, and the soup?",
         "The the the the soup soup.", "Entirely different words appear here without repeats",
         "The soup is good, and the bread is better."]


def nltk_self_bleu(texts: list[list[str]]) -> float:
    """Each text against all others, BLEU-4 with one added to the counts of n > 1."""
    smooth = SmoothingFunction().method2
    return np.mean([sentence_bleu(texts[:i] + texts[i + 1 :], text, [0.25] * 4, smooth)
                    for i, text in enumerate(texts)])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("vocabulary", [3, 12, 60])
def test_self_bleu_is_nltks_on_random_texts(seed, vocabulary):
    """Repeats, clipped counts, unequal lengths, from all in common to nearly nothing."""
    draw = random.Random(seed)
    lengths = [draw.randint(4, 30) for _ in range(draw.randint(2, 12))]
    texts = [[str(draw.randrange(vocabulary)) for _ in range(length)] for length in lengths]
    assert self_bleu(texts) == pytest.approx(nltk_self_bleu(texts), rel=1e-9)


def test_self_bleu_is_nltks_on_real_texts():
    """Sentences of this file, and what nltk gives a text that shares no word: 0."""
    texts = [words(t) for t in TEXTS]
    assert self_bleu(texts) == pytest.approx(nltk_self_bleu(texts), rel=1e-9)
    assert self_bleu([list("abcd"), list("efgh")]) == nltk_self_bleu([list("abcd"), list("efgh")]) == 0


@pytest.mark.parametrize("text", ["a b c d e f", "a b c d", "a b", "a", "a a a a a"])
def test_identical_texts_have_self_bleu_one(text):
    """However short they are."""
    assert self_bleu([text.split()] * 3) == pytest.approx(1)


def test_words_are_lower_case_runs_and_single_marks():
    """The tokens of distinct-2 and self-BLEU."""
    assert words("It's 3.5 naïve  Cats…!\n«Oui»") == [
        "it", "'", "s", "3", ".", "5", "naïve", "cats", "…", "!", "«", "oui", "»"]


@pytest.mark.parametrize(("texts", "value"), [
    (["a b c"], 1.0), (["a b a b a b"], 2 / 5), (["a b c", "a b d"], 3 / 4), (["a b c", "a b c"], 1 / 2),
    (["a b", "c d"], 1.0),  # no bigram across texts
    (["a", "", "b"], 0.0),
])  # fmt: skip
def test_distinct_is_unique_over_all_bigrams(texts, value):
    """Of all texts together."""
    assert distinct([t.split() for t in texts]) == pytest.approx(value)


def test_diversity_takes_one_response_a_prompt():
    """With one row a prompt it is distinct-2 and self-BLEU-4; a prompt's second row never meets the first."""
    tokens = [words(t) for t in TEXTS[:4]]
    expected = dict(distinct_2=distinct(tokens), self_bleu_4=self_bleu(tokens))
    assert diversity(TEXTS[:4], list("abcd")) == pytest.approx(expected)
    assert diversity(TEXTS[:4] * 3, list("abcd") * 3) == pytest.approx(expected)
    assert diversity(TEXTS[:4], list("aaaa")) == dict(distinct_2=None, self_bleu_4=None)


# ------------------------------------------------------------------------------------------- tables

LOWER, SHOUT = ["lowercase"], ["exclaims", 2]


def row(number: int, prompt: str, context: str | None = None, check: list | None = None) -> Example:
    text = context and f"Context {context}."
    return Example(str(number), prompt, "test", text, context_id=context, check=check)


def said(text: str, tokens: int, gain=math.nan, logp: float = -1.0, finished: bool = True) -> Response:
    return Response(text, [7] * tokens, finished, logp, gain, prompt_gain=-logp / 2)


ROWS = [row(0, "p", "A", LOWER), row(1, "p", "B", SHOUT), row(2, "q", "A", LOWER), row(3, "q", "B", SHOUT)]
OURS = [said("abc", 10, 5.0, -20.0), said("abc!!", 10, 3.0, -10.0, False), said("Abc", 10, 2.0, -6.0),
        said("Abc", 10, -2.0, -4.0)]
THEIRS = [said("Abc", 8, 1.0), said("Abc", 7, 1.0), said("abc", 12, 4.0), said("Abc", 13, 0.0)]


def test_wins_are_honoured_contexts():
    """1 and 0 by the row's own check; NaN for a row without one."""
    assert wins(ROWS, OURS).tolist() == [1, 1, 0, 0]
    assert wins(ROWS, THEIRS).tolist() == [0, 0, 1, 0]
    mixed = wins([ROWS[0], row(9, "p", "C"), row(10, "p")], OURS[:3])
    assert mixed[0] == 1 and np.isnan(mixed[1:]).all()


def test_elsewhere_counts_other_contexts_only():
    """Of the other context's checks, "abc!!" alone passes one (it is lowercase too): 1 in 4."""
    assert elsewhere(ROWS, OURS) == pytest.approx(1 / 4)
    assert elsewhere(ROWS, THEIRS) == 0
    assert elsewhere(ROWS[:1], OURS[:1]) is None and elsewhere([row(0, "p")], OURS[:1]) is None


def test_system_row_by_hand():
    """Win rate, length, unfinished share, nats a token, context and prompt gain: each a plain mean."""
    got = system_row(ROWS, OURS)
    assert got["win_rate"] == dict(mean=0.5, low=0.0, high=1.0, n=4)
    assert (got["tokens"], got["unfinished"], got["elsewhere"]) == (10.0, 0.25, 0.25)
    assert got["nll_per_token"] == pytest.approx(40 / 40)
    assert got["context_gain"] == dict(mean=2.0, low=0.0, high=4.0, n=4)
    assert got["prompt_gain"] == pytest.approx(40 / 2 / 4)
    other = system_row(ROWS, [*THEIRS[:3], said("Abc", 13, logp=-17.0)])
    assert other["nll_per_token"] == pytest.approx((3 + 17) / (8 + 7 + 12 + 13))  # a token, not a response
    assert other["context_gain"]["mean"] == pytest.approx(2) and other["context_gain"]["n"] == 3


def test_compare_by_hand():
    """Ours - theirs, row by row; matched are rows 0 (8 of 10 tokens) and 2 (10 of 12), not 1 and 3."""
    got = compare(ROWS, OURS, THEIRS)
    assert got["win_rate"] == dict(mean=0.25, low=-0.5, high=1.0, n=4)
    assert got["win_rate_length_matched"] == dict(mean=0.0, low=-1.0, high=1.0, n=2)
    assert got["context_gain"] == dict(mean=0.5, low=-2.0, high=3.0, n=4)
    p = [0.5 - 1 / 8, 0.3 - 1 / 7, 0.2 - 4 / 12, -0.2]
    assert got["context_gain_per_token"]["mean"] == pytest.approx(sum(p) / 4)
    assert got["context_gain_per_token"]["high"] == pytest.approx((p[0] + p[1]) / 2)
    back = compare(ROWS, THEIRS, OURS)
    assert all(back[key]["mean"] == pytest.approx(-got[key]["mean"])
               for key in got if key not in ("score", "mcnemar_p"))
    assert got["score"]["n"] == 0 and got["mcnemar_p"] is None  # no judge, no task


def test_compare_with_a_system_that_has_no_gain():
    """The win rate is there, the gain is not."""
    got = compare(ROWS, OURS, [dataclasses.replace(r, gain=math.nan) for r in THEIRS])
    assert got["win_rate"]["n"] == 4
    assert got["context_gain"]["mean"] is None and got["context_gain_per_token"]["n"] == 0


def test_evaluate_has_a_block_a_part_and_a_line_a_context():
    """All, seen and unseen rows; prompted against default, trained against prompted; win rates a context."""
    rows = [dataclasses.replace(r, group="seen" if r.context_id == "A" else "unseen") for r in ROWS]
    got = evaluate(rows, dict(default=THEIRS, prompted=THEIRS, trained=OURS))
    assert set(got["parts"]) == {"all", "seen", "unseen"}
    assert got["parts"]["all"]["systems"]["trained"] == system_row(rows, OURS)
    assert got["parts"]["unseen"]["systems"]["trained"]["win_rate"]["mean"] == 0.5
    assert got["parts"]["unseen"]["systems"]["prompted"]["win_rate"]["mean"] == 0.0
    assert set(got["parts"]["seen"]["differences"]) == {"prompted - default", "trained - prompted"}
    assert got["parts"]["seen"]["differences"]["trained - prompted"]["win_rate"]["mean"] == 0.0
    assert got["parts"]["all"]["differences"]["trained - prompted"] == compare(rows, OURS, THEIRS)
    rates = [(c["context_id"], c["n"], c["default"], c["prompted"], c["trained"]) for c in got["contexts"]]
    assert rates == [("A", 2, 0.5, 0.5, 0.5), ("B", 2, 0.0, 0.0, 0.5)]


def test_evaluate_without_a_trained_system():
    """Two systems, one difference."""
    got = evaluate(ROWS, dict(default=THEIRS, prompted=OURS))
    assert set(got["parts"]["all"]["systems"]) == {"default", "prompted"}
    assert set(got["parts"]["all"]["differences"]) == {"prompted - default"}


# ------------------------------------------------------------------------------------------- responses

def chat_ids(folder: Path, turn: str) -> list[int]:
    """The tiny model's ChatML around a user turn, by the tokenizers library alone."""
    text = f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


GRID = [row(3 * i + j, f"Question {i}?", "ABC"[j]) for i in range(3) for j in range(3)]


@pytest.fixture(scope="module")
def answered(tiny):
    """(base, tokenizer, arguments, responses) of GRID under the tiny model and another one as trained."""
    base, trained, tokenizer = load(tiny), random_model(seed=1), Tokenizer(tiny)
    tokenizer.stop_ids = frozenset(range(1, 320, 9))
    args = Args(model="tiny", data="demo", temperature=1.0, top_p=0.9, max_new_tokens=7, seed=3, slots=4)
    return base, trained, tokenizer, args, respond(base, trained, tokenizer, GRID, args)


def test_every_system_answers_its_own_prompts(answered, tiny):
    """Row i draws from (seed, i, 0): prompted by the base model, trained by the other, in context."""
    base, trained, tokenizer, _, responses = answered
    assert list(responses) == ["default", "prompted", "trained"]
    prompts = [chat_ids(tiny, e.turn(e.context)) for e in GRID]
    for system, model in (("prompted", base), ("trained", trained)):
        expected = generate(model, prompts, Sampling(1.0, 0.9, 7), tokenizer.stop_ids, 3)
        assert [r.ids for r in responses[system]] == [s.ids for s in expected]
        assert [r.finished for r in responses[system]] == [s.finished for s in expected]
        assert [r.text for r in responses[system]] == [tokenizer.decode(s.ids) for s in expected]
    assert len({r.finished for r in responses["prompted"] + responses["trained"]}) == 2


def test_default_answers_each_prompt_once(answered, tiny, monkeypatch):
    """Its three answers, without context, stand beside all nine rows."""
    base, _, tokenizer, args, responses = answered
    expected = generate(base, [chat_ids(tiny, f"Question {i}?") for i in range(3)], Sampling(1.0, 0.9, 7),
                        tokenizer.stop_ids, 3)
    assert [r.ids for r in responses["default"]] == [expected[i // 3].ids for i in range(9)]
    asked = []
    monkeypatch.setattr(evaluation, "generate", lambda *a, **k: asked.append(a[1]) or generate(*a, **k))
    assert len(respond(base, None, tokenizer, GRID, args)) == 2
    assert [len(prompts) for prompts in asked] == [3, 9]


def test_gain_and_logp_are_the_base_models(answered, tiny):
    """log p(y|x,c), less log p(y|x) or log p(y|x',c) with another x', from transformers' full logits."""
    responses = answered[-1]
    oracle = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)

    @torch.no_grad()
    def logp(turn: str, response: list[int]) -> float:
        prompt = chat_ids(tiny, turn)
        logps = oracle(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        return sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(response))

    prompts = {e.prompt for e in GRID}
    for i, e in enumerate(GRID):
        r = responses["default"][i]
        right = logp(e.prompt, r.ids)
        assert r.logp == pytest.approx(right, abs=1e-4) and math.isnan(r.gain)
        others = prompts - {e.prompt}
        assert r.prompt_gain in [pytest.approx(right - logp(x, r.ids), abs=1e-4) for x in others]
        for system in ("prompted", "trained"):
            r = responses[system][i]
            right = logp(e.turn(e.context), r.ids)
            assert r.logp == pytest.approx(right, abs=1e-4)
            assert r.gain == pytest.approx(right - logp(e.prompt, r.ids), abs=1e-4)
            turns = [dataclasses.replace(e, prompt=x).turn(e.context) for x in others]
            assert r.prompt_gain in [pytest.approx(right - logp(turn, r.ids), abs=1e-4) for turn in turns]
    assert max(abs(r.gain) for r in responses["trained"]) > 0.1


def test_the_base_model_as_trained_model_makes_no_difference(answered):
    """Identical responses; every paired difference is 0 (gains: within fp32 rounding) with no width."""
    base, _, tokenizer, args, _ = answered
    responses = respond(base, base, tokenizer, GRID, args)
    prompted, trained = responses["prompted"], responses["trained"]
    assert [(r.ids, r.text, r.finished) for r in prompted] == [(r.ids, r.text, r.finished) for r in trained]
    got = compare([dataclasses.replace(e, check=LOWER) for e in GRID], trained, prompted)
    zero = dict(mean=0.0, low=0.0, high=0.0, n=9)
    assert got["win_rate"] == got["win_rate_length_matched"] == zero
    assert got["context_gain"] == pytest.approx(zero, abs=2e-5)
    assert got["context_gain_per_token"] == pytest.approx(zero, abs=2e-5)


def test_rows_without_contexts_have_no_gain(answered):
    """A prompt alone is answered by the base and the trained model; there is no context to leave out."""
    base, _, tokenizer, args, _ = answered
    responses = respond(base, base, tokenizer, [row(0, "Why?"), row(1, "How?")], args)
    assert all(math.isnan(r.gain) for system in responses.values() for r in system)
    assert list(responses) == ["default", "trained"]
    assert [r.ids for r in responses["trained"]] == [r.ids for r in responses["default"]]


# ------------------------------------------------------------------------------------------- program

FLAGS = ["--max-new-tokens", "5", "--dtype", "float32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Nine rows without checks: two to train, three for validation, two prompts x two contexts to test."""
    parts = {"train": 2, "validation": 3, "test": 4}
    rows = [{"id": f"{split}{i}", "prompt": f"{split} {i // 2}?", "context": f"I am {i}.", "split": split}
            for split, count in parts.items() for i in range(count)]
    file = tmp_path_factory.mktemp("data") / "own.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


@pytest.fixture
def finished_run(tiny, tmp_path) -> Path:
    """What train.py leaves: args.json that names the base model, and model/."""
    folder = tmp_path / "run"
    save(random_model(seed=1), folder / "model", tiny)
    write_json(folder / "args.json", dict(arguments=dict(model=str(tiny), data="demo")))
    return folder


@pytest.fixture
def call(monkeypatch):
    """(arguments) -> eval.py inside this process."""
    def program(*argv, flags=FLAGS) -> None:
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv), *flags])
        evaluation.program()

    return program


def test_a_run_is_evaluated_on_the_whole_test_part(finished_run, data, tmp_path):
    """By a process of its own: responses.jsonl with ten keys a line, eval.json, a table; three systems."""
    done = subprocess.run([sys.executable, ROOT / "eval.py", "--model", finished_run, "--data", data, *FLAGS],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(finished_run)) == ["args.json", "eval.json", "model", "responses.jsonl"]
    lines = [line for _, line in read_jsonl(finished_run / "responses.jsonl")]
    keys = ["id", "prompt", "context", "response", "system", "ids", "finished", "logp", "gain", "prompt_gain"]
    assert all(list(line) == keys for line in lines)
    examples = load_examples(str(data), "test")
    assert Counter((r["id"], r["prompt"], r["context"], r["system"]) for r in lines) == Counter(
        (e.id, e.prompt, e.context, s) for e in examples for s in ("default", "prompted", "trained"))
    default = {(r["prompt"], r["response"]) for r in lines if r["system"] == "default"}
    assert len(default) == 2  # one answer a prompt
    result = read_json(finished_run / "eval.json")
    systems = result["parts"]["all"]["systems"]
    assert list(systems) == ["default", "prompted", "trained"]
    for s in systems.values():
        assert s["win_rate"]["mean"] is None and 1 <= s["tokens"] <= 5 and s["nll_per_token"] > 0
    assert systems["trained"]["context_gain"]["n"] == 4 and systems["default"]["context_gain"]["mean"] is None
    assert result["arguments"]["temperature"] == 0.1 and result["arguments"]["top_p"] == 0.9
    assert "NaN" not in (finished_run / "eval.json").read_text()
    assert all(name in done.stdout for name in ("default", "prompted", "trained - prompted"))


def test_validation_has_files_of_its_own(finished_run, data, call):
    """eval-validation.json and its responses; those of the test part stay as they are."""
    test_files = [finished_run / "eval.json", finished_run / "responses.jsonl"]
    for file in test_files:
        file.write_text("kept")
    call("--model", finished_run, "--data", data, "--split", "validation")
    assert [file.read_text() for file in test_files] == ["kept", "kept"]
    assert read_json(finished_run / "eval-validation.json")["arguments"]["split"] == "validation"
    lines = [line for _, line in read_jsonl(finished_run / "responses-validation.jsonl")]
    assert {r["id"] for r in lines} == {"validation0", "validation1", "validation2"} and len(lines) == 9


def test_prompts_a_run_has_trained_on_are_not_tested(finished_run, call, tmp_path):
    """Data, seed of the split and length are the run's: its training prompts stay out of the test part."""
    rows = [{"prompt": f"Question {i}?", "context": f"I am {i}."} for i in range(60)]
    file = tmp_path / "whole.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    arguments = read_json(finished_run / "args.json")["arguments"]
    arguments.update(data=str(file), seed=3, max_new_tokens=2)
    write_json(finished_run / "args.json", dict(arguments=arguments))
    call("--model", finished_run, flags=[])
    tested = {line["prompt"] for _, line in read_jsonl(finished_run / "responses.jsonl")}
    assert tested == {e.prompt for e in load_examples(str(file), "test", 3)}
    assert tested != {e.prompt for e in load_examples(str(file), "test", 0)}
    assert read_json(finished_run / "eval.json")["parts"]["all"]["systems"]["trained"]["tokens"] <= 2


def test_a_bare_model_has_two_systems_and_needs_a_folder(tiny, data, call, tmp_path):
    """Without --out a UserError that names it; the model's own folder is not touched."""
    before = sorted(os.listdir(tiny))
    with pytest.raises(UserError, match="--out"):
        call("--model", tiny, "--data", data)
    call("--model", tiny, "--data", data, "--out", tmp_path / "new" / "folder")
    assert sorted(os.listdir(tiny)) == before
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["eval.json", "responses.jsonl"]
    lines = [line for _, line in read_jsonl(tmp_path / "new" / "folder" / "responses.jsonl")]
    assert Counter(r["system"] for r in lines) == dict(default=4, prompted=4)
    block = read_json(tmp_path / "new" / "folder" / "eval.json")["parts"]["all"]
    assert list(block["systems"]) == ["default", "prompted"]
    assert list(block["differences"]) == ["prompted - default"]


def test_demo_has_win_rates(finished_run, call, tmp_path, capsys):
    """64 of the rows: every number is there and in range, and contexts are listed."""
    call("--model", finished_run, "--limit", "64", "--out", tmp_path / "o")
    result = read_json(tmp_path / "o" / "eval.json")
    assert set(result["parts"]) == {"all", "seen", "unseen"}
    counts = {p: sum(c["n"] for c in result["contexts"] if p in ("all", c["group"])) for p in result["parts"]}
    assert counts["all"] == 64 and len(result["contexts"]) > 20 and counts["seen"] > counts["unseen"]
    for part, n in counts.items():
        for s in result["parts"][part]["systems"].values():
            assert 0 <= s["win_rate"]["low"] <= s["win_rate"]["mean"] <= s["win_rate"]["high"] <= 1
            assert s["win_rate"]["n"] == n and 0 <= s["elsewhere"] <= 1 and 0 <= s["self_bleu_4"] <= 1
    out = capsys.readouterr().out
    assert all(c["context_id"] in out for c in result["contexts"])


@pytest.mark.parametrize(("remove", "flags", "word"), [
    ("model", [], "not finished"), (None, ["--data", "none.jsonl"], r"none\.jsonl"),
    (None, ["--data", "demos"], "--data"),
])  # fmt: skip
def test_what_cannot_be_evaluated_leaves_nothing(remove, flags, word, finished_run, data, call):
    """A run without its model, data that are not there: a UserError, no file."""
    if remove:
        shutil.rmtree(finished_run / remove)
    before = sorted(os.listdir(finished_run))
    with pytest.raises(UserError, match=word):
        call("--model", finished_run, *(flags or ["--data", data]))
    assert sorted(os.listdir(finished_run)) == before
