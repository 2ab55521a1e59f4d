"""measures.py against scipy, nltk, loops and rows made by hand: statistics, text quality, the numbers."""

import dataclasses
import math
import random

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from data import Example
from measures import (Answer, bootstrap, distinct, diversity, evaluate, length_controlled, mcnemar,
                      off_target, paired_differences, self_bleu, system_row, wilson, wins, words)

PNG = b"\x89PNG"


LOWER, SHOUT = ["lowercase"], ["exclaims", 2]  # two of the demo's checks


def example(number: int, prompt: str, context: str | None = None, check: list | None = None) -> Example:
    """A test row whose context, if it has one, reads "Context A."."""
    text = context and f"Context {context}."
    return Example(str(number), prompt, "test", text, context_id=context, check=check)


def answer(text: str, tokens: int = 1, gain: float = math.nan, logp: float = -1.0, finished: bool = True,
           **more) -> Answer:
    """An answer of so many tokens; its prompt gain is half of its negative log-probability."""
    return Answer(text, [7] * tokens, finished, logp, gain, prompt_gain=-logp / 2, **more)


# ------------------------------------------------------------------------------------------- statistics

def loop_bootstrap(values: list[float], clusters: list[str], draws: int) -> tuple[float, float]:
    """Clusters drawn with replacement, their rows pooled: 2.5 and 97.5% of the means."""
    rows: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        if not math.isnan(value):
            rows.setdefault(cluster, []).append(value)
    rng, means = random.Random(0), []
    for _ in range(draws):
        pooled = [v for name in rng.choices(list(rows), k=len(rows)) for v in rows[name]]
        means.append(sum(pooled) / len(pooled))
    return tuple(np.percentile(means, [2.5, 97.5]))


@pytest.mark.parametrize("missing", [0, 9])
def test_a_bootstrap_interval_is_that_of_a_loop_over_clusters(missing):
    """Twelve clusters of unequal sizes, with and without NaN rows: mean exactly, ends within noise."""
    rng = np.random.default_rng(1)
    clusters = [f"prompt {i}" for i in range(12) for _ in range(1 + i % 4)]
    values = rng.normal(size=len(clusters)) + np.array([len(c) + int(c[7:]) / 5 for c in clusters])
    values[rng.permutation(len(values))[:missing]] = np.nan
    interval = bootstrap(values, clusters)
    low, high = loop_bootstrap(values.tolist(), clusters, 4000)
    assert interval["mean"] == pytest.approx(np.nanmean(values)) and interval["n"] == 30 - missing
    assert interval["low"] == pytest.approx(low, abs=0.06)
    assert interval["high"] == pytest.approx(high, abs=0.06)
    assert high - low > 0.7


def test_the_bootstrap_of_two_clusters_in_closed_form():
    """Means 0, 1/2 and 1 with probabilities 1/4, 1/2, 1/4: the interval is [0, 1]."""
    interval = bootstrap(np.array([0.0, 0, 0, 1, 1, 1]), list("aaabbb"))
    assert interval == dict(mean=0.5, low=0.0, high=1.0, n=6)


def test_clusters_whose_rows_agree_widen_the_interval():
    """Nine equal rows a prompt are worth one: three times as wide as if rows were independent."""
    values = np.repeat(np.random.default_rng(2).normal(size=40), 9)
    width = {}
    for name, size in (("prompts", 9), ("rows", 1)):
        interval = bootstrap(values, [str(i // size) for i in range(360)])
        width[name] = interval["high"] - interval["low"]
        assert interval["mean"] == pytest.approx(values.mean())
    assert width["prompts"] / width["rows"] == pytest.approx(3, rel=0.1)


def test_a_bootstrap_interval_covers_the_truth_about_95_times_in_100():
    """200 data sets of 50 prompts x 4 rows whose true mean is 0."""
    rng, clusters = np.random.default_rng(3), [str(i // 4) for i in range(200)]
    hits = 0
    for _ in range(200):
        values = np.repeat(rng.normal(size=50), 4) + rng.normal(size=200)
        interval = bootstrap(values, clusters, draws=500)
        hits += interval["low"] <= 0 <= interval["high"]
    assert 0.89 <= hits / 200 <= 0.985


def test_the_bootstrap_leaves_nan_rows_out():
    """As if they were not there; without any value there is no interval."""
    values = np.array([1.0, np.nan, 0.0, np.nan, 1.0, 0.5])
    clusters = ["a", "a", "b", "c", "d", "d"]
    assert bootstrap(values, clusters) == bootstrap(values[[0, 2, 4, 5]], ["a", "b", "d", "d"])
    assert bootstrap(np.full(3, np.nan), ["a", "b", "c"]) == dict(mean=None, low=None, high=None, n=0)


def test_the_bootstrap_is_deterministic():
    """Twice the same; equal values have no width; another seed moves the ends a little."""
    values, clusters = np.random.default_rng(4).normal(size=60), [str(i // 3) for i in range(60)]
    first, again, other = (bootstrap(values, clusters, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and other == pytest.approx(first, abs=0.02)
    assert bootstrap(np.full(60, 0.25), clusters) == dict(mean=0.25, low=0.25, high=0.25, n=60)


@pytest.mark.parametrize(("k", "n"), [(0, 7), (7, 7), (3, 10), (120, 200), (1, 1)])
def test_wilsons_interval_is_scipys(k, n):
    """Of k ones in n rows, with rows that are not known."""
    values = np.array([1.0] * k + [0.0] * (n - k) + [np.nan] * 3)
    interval, expected = wilson(values), scipy.stats.binomtest(k, n).proportion_ci(0.95, "wilson")
    assert (interval["mean"], interval["n"]) == (k / n, n)
    np.testing.assert_allclose([interval["low"], interval["high"]], [expected.low, expected.high], atol=1e-7)


def test_wilsons_interval_of_no_rows_is_none():
    """No mean, no ends."""
    assert wilson(np.array([np.nan])) == dict(mean=None, low=None, high=None, n=0)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (5, 0), (8, 3), (3, 8), (40, 41)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_rows(only_a, only_b):
    """Rows where both are right, both wrong or one is unknown do not count."""
    a = np.array([1.0] * only_a + [0.0] * only_b + [1.0, 0.0, np.nan])
    b = np.array([0.0] * only_a + [1.0] * only_b + [1.0, 0.0, 1.0])
    expected = scipy.stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(a, b) == pytest.approx(min(1.0, expected), rel=1e-9)


def test_the_rate_at_equal_length_is_the_penalised_likelihoods_maximum():
    """Against scipy's minimiser; where long responses win more, the rate is below the plain one."""
    rng = np.random.default_rng(0)
    longer = rng.normal(30, 50, 400)
    outcomes = (rng.random(400) < 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(longer / 50))))).astype(float)
    outcomes[:20] = 0.5

    def loss(w):
        z = w[0] + w[1] * np.tanh(longer / longer.std())
        return np.sum(np.logaddexp(0, z) - outcomes * z) + 0.5e-6 * w[0] ** 2 + 0.5e-2 * w[1] ** 2

    best = scipy.optimize.minimize(loss, np.zeros(2), tol=1e-12).x[0]
    rate = length_controlled(outcomes, longer)
    assert rate == pytest.approx(1 / (1 + math.exp(-best)), abs=1e-5)
    assert rate < outcomes.mean() - 0.05  # being longer explained a part of the wins


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_rate_at_equal_length_survives_one_sided_outcomes(value):
    """Where all rows are won or all lost it stays finite, near 1 or 0."""
    rate = length_controlled(np.full(10, value), np.arange(10.0))
    assert 0 <= rate <= 1 and abs(rate - value) < 0.01


def test_the_rate_at_equal_length_leaves_unread_rows_out():
    """As if those rows were not there."""
    outcomes, longer = np.array([1, 0, 1, 0.5, np.nan, np.nan]), np.array([3, -2, 1, 0, 99, -99.0])
    assert length_controlled(outcomes, longer) == length_controlled(outcomes[:4], longer[:4])


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
    rng = random.Random(seed)
    lengths = [rng.randint(4, 30) for _ in range(rng.randint(2, 12))]
    texts = [[str(rng.randrange(vocabulary)) for _ in range(length)] for length in lengths]
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


# ------------------------------------------------------------------------------------------- the numbers

ROWS = [example(0, "p", "A", LOWER), example(1, "p", "B", SHOUT), example(2, "q", "A", LOWER),
        example(3, "q", "B", SHOUT)]
BETTER = [answer("abc", 10, 5.0, -20.0), answer("abc!!", 10, 3.0, -10.0, False), answer("Abc", 10, 2.0, -6.0),
          answer("Abc", 10, -2.0, -4.0)]
BASELINE = [answer("Abc", 8, 1.0), answer("Abc", 7, 1.0), answer("abc", 12, 4.0), answer("Abc", 13, 0.0)]


def test_wins_are_honoured_contexts():
    """1 and 0 by the row's own check; NaN for a row without one."""
    assert wins(ROWS, BETTER).tolist() == [1, 1, 0, 0]
    assert wins(ROWS, BASELINE).tolist() == [0, 0, 1, 0]
    mixed = wins([ROWS[0], example(9, "p", "C"), example(10, "p")], BETTER[:3])
    assert mixed[0] == 1 and np.isnan(mixed[1:]).all()


def test_off_target_counts_other_contexts_only():
    """Of the other context's checks, "abc!!" alone passes one (it is lowercase too): 1 in 4."""
    assert off_target(ROWS, BETTER) == pytest.approx(1 / 4)
    assert off_target(ROWS, BASELINE) == 0
    assert off_target(ROWS[:1], BETTER[:1]) is None and off_target([example(0, "p")], BETTER[:1]) is None


def test_a_systems_row_by_hand():
    """Win rate, length, unfinished share, nats a token, context and prompt gain: each a plain mean."""
    row = system_row(ROWS, BETTER)
    assert row["win_rate"] == dict(mean=0.5, low=0.0, high=1.0, n=4)
    assert (row["tokens"], row["unfinished"], row["off_target"]) == (10.0, 0.25, 0.25)
    assert row["nll_per_token"] == pytest.approx(40 / 40)
    assert row["context_gain"] == dict(mean=2.0, low=0.0, high=4.0, n=4)
    assert row["prompt_gain"] == pytest.approx(40 / 2 / 4)
    uneven = system_row(ROWS, [*BASELINE[:3], answer("Abc", 13, logp=-17.0)])
    assert uneven["nll_per_token"] == pytest.approx((3 + 17) / (8 + 7 + 12 + 13))  # a token, not a response
    assert uneven["context_gain"]["mean"] == pytest.approx(2) and uneven["context_gain"]["n"] == 3


def test_paired_differences_by_hand():
    """Row by row; of matched length are rows 0 (8 of 10 tokens) and 2 (10 of 12), not 1 and 3."""
    differences = paired_differences(ROWS, BETTER, BASELINE)
    assert differences["win_rate"] == dict(mean=0.25, low=-0.5, high=1.0, n=4)
    assert differences["win_rate_length_matched"] == dict(mean=0.0, low=-1.0, high=1.0, n=2)
    assert differences["context_gain"] == dict(mean=0.5, low=-2.0, high=3.0, n=4)
    per_token = [0.5 - 1 / 8, 0.3 - 1 / 7, 0.2 - 4 / 12, -0.2]
    assert differences["context_gain_per_token"]["mean"] == pytest.approx(sum(per_token) / 4)
    assert differences["context_gain_per_token"]["high"] == pytest.approx((per_token[0] + per_token[1]) / 2)
    assert differences["score"]["n"] == 0 and differences["mcnemar_p"] is None  # no judge, no task
    swapped = paired_differences(ROWS, BASELINE, BETTER)
    for key in ("win_rate", "win_rate_length_matched", "context_gain", "context_gain_per_token"):
        assert swapped[key]["mean"] == pytest.approx(-differences[key]["mean"])


def test_a_difference_to_a_system_that_has_no_gain():
    """The win rate is there, the gain is not."""
    no_gain = [dataclasses.replace(a, gain=math.nan) for a in BASELINE]
    differences = paired_differences(ROWS, BETTER, no_gain)
    assert differences["win_rate"]["n"] == 4
    assert differences["context_gain"]["mean"] is None and differences["context_gain_per_token"]["n"] == 0


def test_evaluate_has_a_block_for_every_part_and_a_line_for_every_context():
    """All, seen and unseen rows; prompted against default, trained against prompted; win rates a context."""
    rows = [dataclasses.replace(e, group="seen" if e.context_id == "A" else "unseen") for e in ROWS]
    result = evaluate(rows, dict(default=BASELINE, prompted=BASELINE, trained=BETTER))
    parts = result["parts"]
    assert set(parts) == {"all", "seen", "unseen"}
    assert parts["all"]["systems"]["trained"] == system_row(rows, BETTER)
    assert parts["unseen"]["systems"]["trained"]["win_rate"]["mean"] == 0.5
    assert parts["unseen"]["systems"]["prompted"]["win_rate"]["mean"] == 0.0
    assert set(parts["seen"]["differences"]) == {"prompted - default", "trained - prompted"}
    assert parts["seen"]["differences"]["trained - prompted"]["win_rate"]["mean"] == 0.0
    assert parts["all"]["differences"]["trained - prompted"] == paired_differences(rows, BETTER, BASELINE)
    rates = [(c["context_id"], c["n"], c["default"], c["prompted"], c["trained"]) for c in result["contexts"]]
    assert rates == [("A", 2, 0.5, 0.5, 0.5), ("B", 2, 0.0, 0.0, 0.5)]


def test_evaluate_without_a_trained_system():
    """Two systems, one difference."""
    block = evaluate(ROWS, dict(default=BASELINE, prompted=BETTER))["parts"]["all"]
    assert set(block["systems"]) == {"default", "prompted"}
    assert set(block["differences"]) == {"prompted - default"}
