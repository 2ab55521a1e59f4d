"""measures.py and diversity.py against scipy, nltk, loops and rows made by hand: statistics, text quality,
the numbers."""

import dataclasses
import math
import random

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from conftest import LOWER, SHOUT, answer, held_out
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from checks import words
from data import Example
from diversity import distinct, distinct_2, self_bleu
from measures import (DIFFERENCE, MISSING, NO_INTERVAL, RATE, clusters_of, evaluate, gaps, interval,
                      length_controlled, mcnemar, off_target, paired_differences, self_bleus, system_row,
                      t_quantile, wins)

# ------------------------------------------------------------------------------------------- statistics

def loop_variance(values: list[float], labels: list) -> float:
    """(G - 1) / G times the sum of squared changes of the mean, each of G labels left out once."""
    names, mean = sorted(set(labels)), np.mean(values)
    changes = [np.mean([v for v, label in zip(values, labels, strict=True) if label != name]) - mean
               for name in names]
    return (len(names) - 1) / len(names) * sum(change**2 for change in changes)


def ends(measurement: dict) -> tuple[float, float]:
    """An interval's two ends."""
    return measurement["low"], measurement["high"]


@pytest.mark.parametrize("freedom", [*range(1, 12), 23, 39, 1000])
def test_the_quantile_is_students(freedom):
    """To 0.004, from one degree of freedom on."""
    assert t_quantile(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), abs=0.004)


def test_an_interval_of_equal_clusters_is_that_of_their_means():
    """Student's t of ten means; what rows do within their cluster does not enter."""
    means = np.random.default_rng(0).normal(size=10)
    values = np.repeat(means, 4) + np.tile([1.0, -1, 3, -3], 10)
    expected = scipy.stats.t.interval(0.95, 9, means.mean(), scipy.stats.sem(means))
    measured = interval(values, [f"prompt {i // 4}" for i in range(40)])
    assert (measured["mean"], measured["n"]) == (pytest.approx(means.mean()), 40)
    assert ends(measured) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("missing", [0, 5])
def test_an_interval_leaves_each_cluster_out_once(missing):
    """Twelve clusters of one to four rows, and rows that are not known, against a loop.

    Clusters of unequal sizes tell less: the degrees of freedom are those of Kish's effective number.
    """
    rng = np.random.default_rng(1)
    clusters = [f"prompt {i}" for i in range(12) for _ in range(1 + i % 4)]
    values = rng.normal(size=30) + np.array([int(c[7:]) / 5 for c in clusters])
    values[rng.permutation(30)[:missing]] = np.nan
    known = [(v, c) for v, c in zip(values, clusters, strict=True) if not math.isnan(v)]
    kept, labels = map(list, zip(*known, strict=True))
    sizes = np.unique(labels, return_counts=True)[1]
    t = scipy.stats.t.ppf(0.975, int(sizes.sum() ** 2 / (sizes**2).sum()) - 1)
    half = t * math.sqrt(loop_variance(kept, labels))
    measured = interval(values, clusters)
    assert (measured["mean"], measured["n"]) == (pytest.approx(np.mean(kept)), 30 - missing)
    assert ends(measured) == pytest.approx((np.mean(kept) - half, np.mean(kept) + half), abs=1e-3)


def test_crossed_contexts_add_their_variance():
    """V(prompts) + V(contexts) - V(rows) by loops, with the degrees of freedom of the fewer contexts."""
    rng = np.random.default_rng(2)
    prompts, contexts = np.repeat(np.arange(9), 5).tolist(), np.tile(np.arange(5), 9).tolist()
    values = rng.normal(size=9)[prompts] + rng.normal(size=5)[contexts] + rng.normal(size=45)
    variance = sum(sign * loop_variance(values.tolist(), labels)
                   for sign, labels in ((1, prompts), (1, contexts), (-1, list(range(45)))))
    half = scipy.stats.t.ppf(0.975, 4) * math.sqrt(variance)
    measured = interval(values, prompts, contexts)
    assert ends(measured) == pytest.approx((values.mean() - half, values.mean() + half), abs=2e-3)
    assert measured["low"] < interval(values, prompts)["low"]


def test_crossing_with_contexts_that_are_alike_takes_nothing_away():
    """The variance is never below that of prompts alone."""
    values = np.tile([1.0, 2.0, 0.0], 12) + np.repeat(np.random.default_rng(3).normal(size=12), 3)
    prompts, contexts = np.repeat(np.arange(12), 3).tolist(), list(range(36))
    assert ends(interval(values, prompts, contexts)) == pytest.approx(ends(interval(values, prompts)))


def test_crossing_with_prompts_that_are_alike_takes_nothing_away():
    """Nor below that of contexts alone."""
    values = np.tile([3.0, 1.0, -1.0, -3.0], 12)
    prompts, contexts = np.repeat(np.arange(12), 4).tolist(), np.tile(np.arange(4), 12).tolist()
    assert ends(interval(values, prompts, contexts)) == pytest.approx(ends(interval(values, contexts)))


def test_rows_that_disagree_within_a_cluster_are_not_worth_more():
    """A design effect below 1 is taken as 1."""
    values = np.tile([1.0, 0.0], 20)
    widths = []
    for clusters in ([i // 2 for i in range(40)], list(range(40))):
        measured = interval(values, clusters, bounds=RATE)
        widths.append(measured["high"] - measured["low"])
    assert widths[0] >= widths[1]


def test_clusters_whose_rows_agree_widen_the_interval():
    """Nine equal rows a prompt are worth one: three times as wide as if rows were independent."""
    values = np.repeat(np.random.default_rng(2).normal(size=40), 9)
    width = {}
    for name, size in (("prompts", 9), ("rows", 1)):
        measured = interval(values, [str(i // size) for i in range(360)])
        width[name] = measured["high"] - measured["low"]
        assert measured["mean"] == pytest.approx(values.mean())
    assert width["prompts"] / width["rows"] == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(("k", "n"), [(0, 7), (7, 7), (3, 10), (120, 200)])
def test_the_interval_of_a_rate_of_independent_rows_is_wilsons(k, n):
    """Of k ones in n rows, each its own cluster, against scipy's at the level that has Student's quantile."""
    values = np.array([1.0] * k + [0.0] * (n - k) + [np.nan] * 3)
    level = 2 * scipy.stats.norm.cdf(t_quantile(n - 1)) - 1
    expected = scipy.stats.binomtest(k, n).proportion_ci(level, "wilson")
    measured = interval(values, list(range(n + 3)), bounds=RATE)
    assert (measured["mean"], measured["n"]) == (k / n, n)
    assert ends(measured) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_interval_of_a_difference_of_independent_rows_is_agresti_and_mins():
    """Five gained, two lost of 40: one row of each is added, then the normal interval with Student's t."""
    values = np.array([1.0] * 5 + [-1.0] * 2 + [0.0] * 33)
    centre, variance = 3 / 42, (9 / 42 - (3 / 42) ** 2) / 42
    half = scipy.stats.t.ppf(0.975, 39) * math.sqrt(variance)
    measured = interval(values, list(range(40)), bounds=DIFFERENCE)
    assert measured["mean"] == pytest.approx(3 / 40)
    assert ends(measured) == pytest.approx((centre - half, centre + half), abs=1e-6)


@pytest.mark.parametrize(("value", "bounds"), [(0.0, RATE), (1.0, RATE), (0.5, RATE), (0.0, DIFFERENCE)])
def test_equal_outcomes_have_a_width(value, bounds):
    """How far rows of a cluster agree can't be seen, so each of eight clusters counts as one row."""
    clustered = interval(np.full(40, value), [i // 5 for i in range(40)], bounds=bounds)
    alone = interval(np.full(8, value), list(range(8)), bounds=bounds)
    assert ends(clustered) == pytest.approx(ends(alone))
    assert clustered["high"] - clustered["low"] > 0.3
    assert bounds[0] <= clustered["low"] <= value <= clustered["high"] <= bounds[1]


def test_an_interval_leaves_nan_rows_out():
    """As if they were not there; without any value there is no interval."""
    values = np.array([1.0, np.nan, 0.0, np.nan, 1.0, 0.5])
    clusters = ["a", "a", "b", "c", "d", "d"]
    assert interval(values, clusters) == interval(values[[0, 2, 4, 5]], ["a", "b", "d", "d"])
    assert interval(np.full(3, np.nan), ["a", "b", "c"]) == dict(mean=None, low=None, high=None, n=0)


def test_one_cluster_tells_nothing_of_others():
    """A rate can be anything; of other values there is the mean alone, in the printed table too."""
    values = np.array([1.0, 0.0, 1.0, 1.0])
    assert interval(values, list("aaaa"), bounds=RATE) == dict(mean=0.75, low=0.0, high=1.0, n=4)
    assert interval(values, list("aaaa")) == dict(mean=0.75, low=None, high=None, n=4)
    assert ends(interval(values, list("abcd"), list("xxxx"), bounds=RATE)) == RATE


# Coverage. Each cluster has a probability of its own, drawn from a beta distribution around the true one; 0.3
# is how far two rows of a cluster are correlated. Crossed effects act on a hidden normal variable.

REPETITIONS = 600
CORRELATION = 0.3


def sizes(clusters: int, equal: bool) -> np.ndarray:
    """Eight rows a cluster, or between one and twenty-three."""
    return np.full(clusters, 8) if equal else np.resize([1, 2, 4, 6, 8, 23, 3, 12], clusters)


def outcomes(rng: np.random.Generator, rate: float, index: np.ndarray) -> np.ndarray:
    """0/1 rows of as many repetitions: (repetitions, rows)."""
    shape = (1 - CORRELATION) / CORRELATION
    chances = rng.beta(rate * shape, (1 - rate) * shape, (REPETITIONS, index.max() + 1))
    return (rng.random((REPETITIONS, len(index))) < chances[:, index]).astype(float)


def coverage(rows: np.ndarray, truth: float, *groups, bounds=None) -> float:
    """How often the interval of a repetition holds the truth."""
    found = [interval(values, *groups, bounds=bounds) for values in rows]
    return float(np.mean([low <= truth <= high for low, high in map(ends, found)]))


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("clusters", [8, 16, 40])
def test_intervals_over_clusters_hold_the_truth_94_times_in_100(clusters, equal):
    """Rare and common rates, paired differences, normal values, clusters of equal and unequal sizes.

    0.925 is 0.94 less one and a half standard errors of 600 repetitions; the mean of all is held to 0.94.
    """
    rng, index = np.random.default_rng(7), np.repeat(np.arange(clusters), sizes(clusters, equal))
    covered = {}
    for rate in (0.02, 0.05, 0.5):
        rows = outcomes(rng, rate, index)
        covered["rate", rate] = coverage(rows, rate, index, bounds=RATE)
    for first, second in ((0.02, 0.02), (0.05, 0.2), (0.6, 0.3)):
        rows = outcomes(rng, first, index) - outcomes(rng, second, index)
        covered["difference", first, second] = coverage(rows, first - second, index, bounds=DIFFERENCE)
    effects = rng.normal(0, math.sqrt(CORRELATION), (REPETITIONS, clusters))[:, index]
    rows = effects + rng.normal(0, math.sqrt(1 - CORRELATION), effects.shape)
    covered["normal"] = coverage(rows, 0.0, index)
    assert min(covered.values()) >= 0.925, covered
    assert np.mean(list(covered.values())) >= 0.94, covered


@pytest.mark.parametrize("contexts", [8, 24])
def test_crossed_intervals_hold_the_truth_of_unseen_contexts_94_times_in_100(contexts):
    """16 prompts x some contexts that both move the outcome: rates, a paired difference, normal values."""
    rng = np.random.default_rng(8)
    prompts, others = np.repeat(np.arange(16), contexts), np.tile(np.arange(contexts), 16)

    def hidden() -> np.ndarray:
        """Standard normal, a tenth of the variance by prompts and three by contexts: (repetitions, rows)."""
        by_prompt = rng.normal(0, math.sqrt(0.1), (REPETITIONS, 16))[:, prompts]
        by_context = rng.normal(0, math.sqrt(0.3), (REPETITIONS, contexts))[:, others]
        return by_prompt + by_context + rng.normal(0, math.sqrt(0.6), by_prompt.shape)

    covered = dict(normal=coverage(hidden(), 0.0, prompts, others))
    for rate in (0.05, 0.4):
        rows = (hidden() < scipy.stats.norm.ppf(rate)).astype(float)
        covered["rate", rate] = coverage(rows, rate, prompts, others, bounds=RATE)
    rows = (hidden() < scipy.stats.norm.ppf(0.6)) * 1.0 - (hidden() < scipy.stats.norm.ppf(0.4))
    covered["difference"] = coverage(rows, 0.2, prompts, others, bounds=DIFFERENCE)
    assert min(covered.values()) >= 0.925, covered
    assert coverage(hidden(), 0.0, prompts) < 0.8  # contexts taken as fixed


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


SCRIPTS = {  # a text without spaces between its words, or with marks, and its tokens
    "Chinese": ("我喜欢苹果。", list("我喜欢苹果。")),
    "Japanese": ("パンを食べる", list("パンを食べる")),
    "halfwidth kana": ("ﾊﾟﾝ", ["ﾊ", "ﾟ", "ﾝ"]),
    "a rare Chinese character": ("𠮷野", ["𠮷", "野"]),
    "Chinese and Latin": ("用iPhone 15拍", ["用", "iphone", "15", "拍"]),
    "Thai": ("กินข้าว",
             ["กิ", "น", "ข้", "า", "ว"]),
    "Lao": ("ກິນ", ["ກິ", "ນ"]),
    "Khmer": ("នំប៉ុង", ["នំ", "ប៉ុ", "ង"]),
    "Burmese": ("မုန်", ["မု", "န်"]),
    "Hindi": ("पसंद है।", ["पसंद", "है", "।"]),
    "Tamil": ("நான்", ["நான்"]),
    "Persian with a joiner": ("می\u200cخورم", ["می\u200cخورم"]),
    "Arabic with vowels": ("كَتَبَ", ["كَتَبَ"]),
    "Korean": ("나는 밥을", ["나는", "밥을"]),
    "Cyrillic": ("Я ем.", ["я", "ем", "."]),
    "accents apart": ("nai\u0308ve", ["nai\u0308ve"]),
    "an emoji's variant": ("a ❤\ufe0f!", ["a", "❤\ufe0f", "!"]),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_words_in_other_scripts(script):
    """A character where a script has no spaces between words; marks and joiners stay with their letters."""
    text, tokens = SCRIPTS[script]
    assert words(text) == tokens


@pytest.mark.parametrize("one", ["我喜欢苹果", "ฉันชอบกิน", "パンを食べる"])
def test_near_equal_texts_without_spaces_have_a_high_self_bleu(one):
    """As in English; different ones have a low one."""
    alike = [words(one * 5 + end) for end in "一二三四五"]
    different = [words(text) for text in ("面包放在布袋", "晚上做豆子汤", "睡前关灯")]
    assert self_bleu(alike) > 0.9 and self_bleu(different) < 0.3
    assert distinct(alike) < 0.2


@pytest.mark.parametrize(("texts", "value"), [
    (["a b c"], 1.0), (["a b a b a b"], 2 / 5), (["a b c", "a b d"], 3 / 4), (["a b c", "a b c"], 1 / 2),
    (["a b", "c d"], 1.0),  # no bigram across texts
    (["a", "", "b"], 0.0),
])  # fmt: skip
def test_distinct_is_unique_over_all_bigrams(texts, value):
    """Of all texts together."""
    assert distinct([t.split() for t in texts]) == pytest.approx(value)


def test_distinct_2_takes_one_response_a_prompt():
    """With one row a prompt it is that of all texts; a prompt's second row never meets the first."""
    tokens = [words(t) for t in TEXTS[:4]]
    assert distinct_2(TEXTS[:4], list("abcd")) == pytest.approx(distinct(tokens))
    assert distinct_2(TEXTS[:4] * 3, list("abcd") * 3) == pytest.approx(distinct(tokens))
    assert distinct_2(TEXTS[:4], list("aaaa")) is None


def test_self_bleu_is_measured_across_prompts_and_within_them():
    """Across: one response a prompt. Within: all responses to a prompt against each other, mean over prompts.
    """
    tokens = [words(t) for t in TEXTS[:6]]
    measured = self_bleus(TEXTS[:4], list("abcd"))
    assert measured["self_bleu_4"]["mean"] == pytest.approx(self_bleu(tokens[:4]))
    assert measured["self_bleu_4_within"]["mean"] is None  # no prompt has two responses
    measured = self_bleus(TEXTS[:6], list("aaabbb"))
    within = [self_bleu(tokens[:3]), self_bleu(tokens[3:])]
    assert measured["self_bleu_4_within"] == interval(np.array(within), ["a", "b"])
    assert self_bleus(TEXTS[:4], list("aaaa"))["self_bleu_4"]["mean"] is None


def test_responses_that_follow_their_context_lower_self_bleu_within_a_prompt_alone():
    """Stock phrases of a context make prompts alike and contexts unlike: R2's claim is about the second."""
    contexts = ["my dear cat is fond of this", "as sailors say in port", "in my garden all is well today"]
    prompts = [f"question {i}" for i in range(5) for _ in contexts]
    plain = [f"the answer to number {i} is {i} times {i} as you know" for i in range(5) for _ in contexts]
    following = [f"{context} {i}" for i in range(5) for context in contexts]
    change = self_bleus(following, prompts, plain)
    assert change["self_bleu_4_within"]["mean"] < -0.5 and change["self_bleu_4_within"]["high"] < 0
    within = [self_bleus(texts, prompts)["self_bleu_4_within"]["mean"] for texts in (plain, following)]
    assert within[0] == pytest.approx(1)  # the same response to every context
    assert change["self_bleu_4_within"]["mean"] == pytest.approx(within[1] - within[0])


def test_self_bleus_interval_leaves_each_prompt_out_as_text_and_as_reference():
    """The jackknife by seven evaluations of six texts."""
    tokens = [words(t) for t in TEXTS]
    without = np.array([self_bleu(tokens[:i] + tokens[i + 1 :]) for i in range(7)])
    half = scipy.stats.t.ppf(0.975, 6) * math.sqrt(6 / 7 * ((without - without.mean()) ** 2).sum())
    measured = self_bleus(TEXTS, list("abcdefg"))["self_bleu_4"]
    assert measured["mean"] == pytest.approx(self_bleu(tokens)) and measured["n"] == 7
    assert ends(measured) == pytest.approx((measured["mean"] - half, measured["mean"] + half), abs=1e-3)


# ------------------------------------------------------------------------------------------- the numbers

ROWS = [held_out(0, "p", "A", LOWER), held_out(1, "p", "B", SHOUT), held_out(2, "q", "A", LOWER),
        held_out(3, "q", "B", SHOUT)]
BETTER = [answer("abc", 10, 5.0, -20.0), answer("abc!!", 10, 3.0, -10.0, False), answer("Abc", 10, 2.0, -6.0),
          answer("Abc", 10, -2.0, -4.0)]
BASELINE = [answer("Abc", 8, 1.0), answer("Abc", 7, 1.0), answer("abc", 12, 4.0), answer("Abc", 13, 0.0)]


def test_wins_are_honoured_contexts():
    """1 and 0 by the row's own check; NaN for a row without one."""
    assert wins(ROWS, BETTER).tolist() == [1, 1, 0, 0]
    assert wins(ROWS, BASELINE).tolist() == [0, 0, 1, 0]
    mixed = wins([ROWS[0], held_out(9, "p", "C"), held_out(10, "p")], BETTER[:3])
    assert mixed[0] == 1 and np.isnan(mixed[1:]).all()


def test_off_target_counts_other_contexts_only():
    """Of the other context's checks, "abc!!" alone passes one (it is lowercase too): 1 in 4."""
    assert off_target(ROWS, BETTER) == pytest.approx(1 / 4)
    assert off_target(ROWS, BASELINE) == 0
    assert off_target(ROWS[:1], BETTER[:1]) is None and off_target([held_out(0, "p")], BETTER[:1]) is None


def test_a_systems_row_by_hand():
    """Win rate, length, unfinished share, nats a token, context and prompt gain: each a plain mean."""
    row = system_row(ROWS, BETTER)
    assert row["win_rate"] == interval(np.array([1.0, 1, 0, 0]), list("ppqq"), list("ABAB"), RATE)
    assert (row["tokens"], row["unfinished"], row["off_target"]) == (10.0, 0.25, 0.25)
    assert row["nll_per_token"] == pytest.approx(40 / 40)
    assert row["context_gain"] == interval(np.array([5.0, 3, 2, -2]), list("ppqq"), list("ABAB"))
    assert row["prompt_gain"] == pytest.approx(40 / 2 / 4)
    uneven = system_row(ROWS, [*BASELINE[:3], answer("Abc", 13, logp=-17.0)])
    assert uneven["nll_per_token"] == pytest.approx((3 + 17) / (8 + 7 + 12 + 13))  # a token, not a response
    assert uneven["context_gain"]["mean"] == pytest.approx(2) and uneven["context_gain"]["n"] == 3


def test_paired_differences_by_hand():
    """Row by row; of matched length are rows 0 (8 of 10 tokens) and 2 (10 of 12), not 1 and 3."""
    differences = paired_differences(ROWS, BETTER, BASELINE)
    groups = list("ppqq"), list("ABAB")
    assert differences["win_rate"] == interval(np.array([1.0, 1, -1, 0]), *groups, DIFFERENCE)
    matched = differences["win_rate_length_matched"]
    assert (matched["mean"], matched["n"]) == (0.0, 2) and ends(matched) == DIFFERENCE  # one context
    assert differences["context_gain"] == interval(np.array([4.0, 2, -2, -2]), *groups)
    per_token = [0.5 - 1 / 8, 0.3 - 1 / 7, 0.2 - 4 / 12, -0.2]  # each response over its own length: macro
    assert differences["context_gain_per_token_macro"]["mean"] == pytest.approx(sum(per_token) / 4)
    assert differences["score"]["n"] == 0 and differences["mcnemar_p"] is None  # no judge, no task
    swapped = paired_differences(ROWS, BASELINE, BETTER)
    for key in ("win_rate", "win_rate_length_matched", "context_gain", "context_gain_per_token_macro"):
        assert swapped[key]["mean"] == pytest.approx(-differences[key]["mean"])


def test_a_difference_to_a_system_that_has_no_gain():
    """The win rate is there, the gain is not."""
    no_gain = [dataclasses.replace(a, gain=math.nan) for a in BASELINE]
    differences = paired_differences(ROWS, BETTER, no_gain)
    assert differences["win_rate"]["n"] == 4
    assert differences["context_gain"]["mean"] is None
    assert differences["context_gain_per_token_macro"]["n"] == 0


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


def test_two_prompts_are_too_few_for_an_interval_of_self_bleu():
    """A jackknife leaves one prompt out, and one text has no others to be compared with."""
    measured = self_bleus(TEXTS[:2], ["a", "b"])["self_bleu_4"]
    assert (measured["low"], measured["high"]) == (None, None)


def test_evaluate_says_which_intervals_they_are():
    """Over prompts and contexts crossed where all rows have a known context; else over users or prompts."""
    answers = dict(default=BASELINE)
    crossed = evaluate(ROWS, answers)["intervals"]
    assert (crossed["clusters"], crossed["crossed"]) == ("prompts", "contexts")
    assert "Wilson" in crossed["kind"]
    users = [dataclasses.replace(e, user=e.id, context_id=None, check=None) for e in ROWS]
    plain = evaluate(users, answers)["intervals"]
    assert (plain["clusters"], plain["crossed"]) == ("users", None)
    some = [ROWS[0], dataclasses.replace(ROWS[1], context_id=None)]
    assert clusters_of(some)["crossed"] is None


def test_evaluate_without_a_trained_system():
    """Two systems, one difference."""
    block = evaluate(ROWS, dict(default=BASELINE, prompted=BETTER))["parts"]["all"]
    assert set(block["systems"]) == {"default", "prompted"}
    assert set(block["differences"]) == {"prompted - default"}


# ------------------------------------------------------------------------------------------- what is missing

@pytest.mark.parametrize("key", MISSING)
@pytest.mark.parametrize("nothing", [None, NO_INTERVAL], ids=["null", "interval"])
def test_a_number_that_is_not_there_has_its_reason(key, nothing):
    """Of which systems, and why; what is there, or is of other data, has none."""
    there = dict(mean=0.0, low=None, high=None, n=3)
    rows = dict(default={key: nothing}, prompted={key: there}, trained={key: nothing}, other={})
    assert gaps(rows) == [f"no {key.replace('_', ' ')} of default, trained: {MISSING[key]}"]


def test_own_answers_decide_the_win_rate():
    """A number, a letter or a few words; a row with a long answer, or none, is left out."""
    rows = [Example(str(text), "p", "test", answer=text) for text in ("12", "B", "Paris", "word " * 40, None)]
    texts = ["6 + 6 = 12.", "The answer is: C", "It is Paris.", "word " * 40, "x"]
    won = wins(rows, [answer(text, 3) for text in texts])
    assert won[:3].tolist() == [1, 0, 1] and np.isnan(won[3:]).all()


def test_math_answers_are_read_before_and_after_questions_of_the_models_own():
    """win_rate reads the answer that belongs to the question, last_marker the last #### there is."""
    rows = [Example(prompt, prompt, "test", answer="8", style="math") for prompt in "pqr"]
    texts = ["#### 8\n\nExample 9:\nQuestion: ?\nAnswer: 3\n#### 3", "#### 8", "#### 3\n\nExample 9:\n#### 8"]
    row = system_row(rows, [answer(text, 3) for text in texts])
    assert (row["win_rate"]["mean"], row["last_marker"]["mean"]) == pytest.approx((2 / 3, 2 / 3))
    row = system_row(rows[:1], [answer(texts[0], 3)])
    assert (row["win_rate"]["mean"], row["last_marker"]["mean"], row["flexible"]["mean"]) == (1, 0, 1)


def test_a_judges_win_rate_at_equal_length_is_beside_the_references_characters():
    """How much longer an answer is than its reference, whose thoughts do not count; ties at 1."""
    scores, texts = [5, 3, 2, 4], ["a" * n for n in (90, 60, 5, 40)]
    reference = "<think>much</think> " + "r" * 20
    rows = [Example(str(i), f"p{i}", "test", "c", reference=reference) for i in range(4)]
    given = [answer(text, scores=dict(j=float(s)), reference_scores=dict(j=3.0))
             for text, s in zip(texts, scores, strict=True)]
    expected = length_controlled(np.array([1.0, 1, 0, 1]), np.array([70.0, 40, -15, 20]))
    assert system_row(rows, given, "j")["length_controlled"] == pytest.approx(expected, rel=1e-9)
    assert abs(expected - 0.75) > 0.01


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_mean_lies_in_its_interval_to_the_last_bit(value):
    """Of rates that are all alike too, where rounding puts an end of Wilson's beyond them."""
    for n in range(2, 200):
        ends = interval(np.full(n, value), list(range(n)), bounds=RATE)
        assert ends["low"] <= value <= ends["high"]
