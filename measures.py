"""measures.py - the numbers of an evaluation: statistics, text quality, and what they say of each system.

    statistics    intervals that know which rows belong together, McNemar, win rates at equal length
    text          distinct-2 and self-BLEU-4 (Tables 3, 4)
    systems       win rates, quality columns and paired differences (Tables 1, 2)

What differs from the paper: the intervals are ours (it gives standard deviations over seeds), and so are the
smoothing of self-BLEU and its two kinds, within a prompt and across prompts, which it leaves open.

    python -m pytest tests/test_measures.py
"""

import functools
import itertools
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np

from checks import extract, honours, verify
from data import Example
from run import seed_from

SYSTEMS = ("default", "prompted", "trained")


# ------------------------------------------------------------------------- responses

@dataclass(frozen=True)
class Answer:
    """One system's response to one example, with what models and judges make of it.

    Log-probabilities are sums over the response's tokens, in nats. NaN: there is nothing to measure.
    """

    text: str
    ids: list[int]
    finished: bool
    logp: float  # log pi_ref(y | the prompt that it answered)
    gain: float  # log pi_ref(y|x,c) - log pi_ref(y|x); NaN without a context, and for `default`
    prompt_gain: float = math.nan  # log pi_ref(y|x,c) - log pi_ref(y|x',c), x' another prompt
    entropy: float = math.nan  # over the answer letters, after the response's own reasoning, in nats
    choice_mi: float = math.nan  # 1 where the choice by mutual information is right, 0 where it is wrong
    scores: dict[str, float] = field(default_factory=dict)  # judge -> mean score over the context's items
    reference_scores: dict[str, float] = field(default_factory=dict)  # judge -> the same of the reference


Answers = dict[str, list[Answer]]  # system -> its answer to every example


# ------------------------------------------------------------------------- statistics

NO_INTERVAL = dict(mean=None, low=None, high=None, n=0)  # of no values at all
RATE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)  # what a rate can be, and the difference of two rates
INTERVALS = ("95%, Student's t with (effective clusters - 1) degrees of freedom; means: jackknife over "
             "clusters; rates: Wilson, their differences: Agresti and Min, both with effective rows")


def interval(values: np.ndarray, clusters: list, crossed: list | None = None,
             bounds: tuple[float, float] | None = None) -> dict:
    """Mean of the values (rows,) and its 95% interval. NaN is left out.

    clusters: the user or prompt of each row. Rows of one cluster are not independent, so the variance is that
    of the mean when whole clusters are left out, `jackknife`. crossed: a second grouping, where the claim is
    about more contexts than these; V(clusters) + V(crossed) - V(both) (Cameron, Gelbach and Miller, 2011),
    but never less than either of the first two. bounds: RATE or DIFFERENCE, for values that are 0 or 1 and
    their differences, where `bounded` serves better; None for all others.

    The quantile is Student's t with one degree of freedom less than the effective number of clusters, the
    smaller of two. One cluster tells nothing: the ends are then the bounds, or None.
    """
    keep = ~np.isnan(values)
    if not keep.any():
        return dict(NO_INTERVAL)
    values = values[keep]
    group = numbered(np.asarray(clusters)[keep])
    variance, units = jackknife(values, group)
    if crossed is not None:
        other = numbered(np.asarray(crossed)[keep])
        cells = numbered(group * len(values) + other)
        across, units_across = jackknife(values, other)
        both = variance + across - jackknife(values, cells)[0]
        variance, units = max(variance, across, both), min(units, units_across)
    mean = float(values.mean())
    low, high = bounds or (None, None)
    if units > 1:
        t = t_quantile(max(1, int(units) - 1))
        centre, half = mean, t * math.sqrt(variance)
        if bounds:
            centre, half = bounded(values, effective_rows(values, variance, units), t, bounds)
        low, high = centre - half, centre + half
        if bounds:
            low, high = max(low, bounds[0]), min(high, bounds[1])
    return dict(mean=mean, low=low, high=high, n=len(values))


def numbered(labels: np.ndarray) -> np.ndarray:
    """The labels as numbers from 0 on: (rows,)."""
    return np.unique(labels, return_inverse=True)[1]


def jackknife(values: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """The variance of the mean, and how many groups of equal size would tell as much as these.

    (G - 1) / G times the sum of squared changes of the mean as each of G groups is left out (Quenouille and
    Tukey; MacKinnon and White's HC3 for clusters). Kish's effective number: n^2 / sum of squared sizes.
    """
    sums = np.bincount(group, weights=values - values.mean())  # (groups,)
    sizes = np.bincount(group)  # (groups,)
    count, n = len(sizes), len(values)
    if count == 1:
        return 0.0, 1.0
    changes = sums / (n - sizes)  # (groups,)
    return (count - 1) / count * float(changes @ changes), n**2 / float(sizes @ sizes)


def effective_rows(values: np.ndarray, variance: float, units: float) -> float:
    """As how many independent rows these tell about their mean (Korn and Graubard, 1998).

    The number of rows over the design effect: the variance over the one of independent rows, at least 1.
    A handful of events (rows unlike the commonest value) can show too small an effect by chance, and equal
    values show none. So it is averaged with the greatest one, that of clusters whose rows all agree, which
    counts as two events.
    """
    n = len(values)
    independent = float(values.var()) / max(1, n - 1)
    effect = max(1.0, variance / independent) if independent else 1.0
    events = n - np.unique(values, return_counts=True)[1].max()
    greatest = n / units
    return n / ((events * effect + 2 * greatest) / (events + 2))


def bounded(values: np.ndarray, n: float, t: float, bounds: tuple[float, float]) -> tuple[float, float]:
    """Centre and half width of the interval of values between `bounds` that are worth n rows.

    Rates: Wilson's (1927). Differences: the normal one after one row at either bound was added, as Agresti
    and Min (2005) do for paired rates. Both have a width where all values are equal.
    """
    mean = float(values.mean())
    if bounds == RATE:
        centre = (mean + t * t / (2 * n)) / (1 + t * t / n)
        half = t * math.sqrt(mean * (1 - mean) / n + t * t / (4 * n * n)) / (1 + t * t / n)
        return centre, half
    centre = n * mean / (n + 2)
    square = (n * float(values @ values) / len(values) + 2) / (n + 2)
    return centre, t * math.sqrt((square - centre**2) / (n + 2))


def t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t, for whole degrees of freedom from 1 on, to 0.004.

    From 3 on by Cornish and Fisher's expansion around the normal quantile (Abramowitz and Stegun, 26.7.5).
    """
    if freedom < 3:
        return (12.7062, 4.3027)[freedom - 1]
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**k for k, term in enumerate(terms, 1))


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p of McNemar's test of two 0/1 vectors over the same rows.

    The hypothesis: where the two differ, each of them is as likely to be the right one.
    """
    only_a = int(((a == 1) & (b == 0)).sum())
    only_b = int(((a == 0) & (b == 1)).sum())
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def length_controlled(outcomes: np.ndarray, longer: np.ndarray) -> float | None:
    """The win rate at equal length: sigmoid(a) of a logistic fit, P(win) = sigmoid(a + b tanh(longer / std)).

    outcomes (rows,): 1 for a win, 1/2 for a tie, 0; NaN is left out. longer (rows,): by how much our text is
    longer. The reduced model of AlpacaEval 2 (Dubois et al., 2024), fitted by Newton's method; a small
    penalty on b keeps it finite. None where fewer than two rows are left.
    """
    keep = ~np.isnan(outcomes)
    y, x = outcomes[keep], longer[keep]
    if len(y) < 2:
        return None
    features = np.stack([np.ones(len(y)), np.tanh(x / (x.std() or 1))], axis=1)  # (rows, 2)
    w, penalty = np.zeros(2), np.diag([1e-6, 1e-2])
    for _ in range(50):
        p = 1 / (1 + np.exp(-features @ w))  # (rows,)
        gradient = features.T @ (y - p) - penalty @ w  # (2,)
        hessian = (features * (p * (1 - p))[:, None]).T @ features + penalty  # (2, 2)
        w += np.clip(np.linalg.solve(hessian, gradient), -2, 2)
    return float(1 / (1 + np.exp(-w[0])))


def words(text: str) -> list[str]:
    """Lower-cased words and single punctuation marks: the tokens of distinct-2 and self-BLEU."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(tokens: list[str], n: int) -> Counter:
    """How often each n-gram occurs."""
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct(texts: list[list[str]], n: int = 2) -> float:
    """The share of different n-grams among all n-grams, of all texts together."""
    counts: Counter = Counter()
    for text in texts:
        counts.update(ngrams(text, n))
    return len(counts) / max(1, counts.total())


def self_bleu(texts: list[list[str]]) -> float:
    """Mean BLEU-4 of each text against all others as references (Zhu et al., 2018); higher is less diverse.

    Precisions of n > 1 are smoothed by adding one to both counts (Lin and Och, 2004; "method 2" of Chen and
    Cherry, 2014), so that a text without a common 4-gram is not 0 whatever else it shares. The brevity
    penalty is taken against the reference closest in length.
    """
    return float(bleu_against_others(texts).diagonal().mean())


def bleu_against_others(texts: list[list[str]]) -> np.ndarray:
    """BLEU-4 of each text against all others: (texts, texts).

    Row i, column j: of text i, where text j is no reference either. On the diagonal all others are.
    """
    closest = closest_lengths([len(text) for text in texts])  # (texts, texts)
    lengths = np.array([[max(1, len(text))] for text in texts])  # (texts, 1)
    penalty = np.minimum(1, np.exp(1 - closest / lengths))  # (texts, texts)
    product = np.ones(penalty.shape)
    for n in range(1, 5):
        product *= clipped_precisions(texts, n)
    return penalty * product ** (1 / 4)


def closest_lengths(lengths: list[int]) -> np.ndarray:
    """The length of the reference closest to each text's, the shorter of two: (texts, texts), as above."""
    closest = np.empty((len(lengths), len(lengths)))
    for i, own in enumerate(lengths):
        others = [j for j in range(len(lengths)) if j != i]
        others.sort(key=lambda j: (abs(lengths[j] - own), lengths[j]))
        closest[i] = lengths[others[0]]
        if len(others) > 1:
            closest[i, others[0]] = lengths[others[1]]
    return closest


def clipped_precisions(texts: list[list[str]], n: int) -> np.ndarray:
    """BLEU's n-gram precision of each text against all others: (texts, texts), as above.

    An n-gram counts at most as often as the reference that has it most often holds it. That is neither the
    text itself nor the one left out, so the three texts with the highest counts are kept for every n-gram.
    """
    counts = [ngrams(text, n) for text in texts]
    holders: dict[tuple, list[tuple[int, int]]] = defaultdict(list)  # n-gram -> (its count, a text)
    for i, count in enumerate(counts):
        for gram, c in count.items():
            holders[gram].append((c, i))
    highest = {gram: sorted(found, reverse=True)[:3] for gram, found in holders.items()}
    added = int(n > 1)
    precisions = np.empty((len(texts), len(texts)))
    for i, count in enumerate(counts):
        matched, lost = 0, np.zeros(len(texts))  # with all references; without the one that has most
        for gram, c in count.items():
            others = [(c_other, j) for c_other, j in highest[gram] if j != i]
            if not others:
                continue
            most, holder = others[0]
            next_most = others[1][0] if len(others) > 1 else 0
            matched += min(c, most)
            lost[holder] += min(c, most) - min(c, next_most)
        precisions[i] = (matched - lost + added) / max(1, count.total() + added)
    return precisions


def rows_of_prompts(prompts: tuple[str, ...]) -> list[list[int]]:
    """The rows of each prompt, in the order in which prompts first come."""
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    return list(rows.values())


def one_response_a_prompt(prompts: tuple[str, ...]) -> list[list[int]]:
    """Rows with one response to every prompt: five seeded choices, or the only one.

    They are the same for every system, so that all systems compare.
    """
    rows = rows_of_prompts(prompts)
    draws = 1 if len(rows) == len(prompts) else 5
    generators = [np.random.default_rng(seed_from("diversity", draw)) for draw in range(draws)]
    return [[int(generator.choice(of_prompt)) for of_prompt in rows] for generator in generators]


@functools.lru_cache(maxsize=8)  # differences of systems ask for their values again
def self_bleu_across(texts: tuple[str, ...], prompts: tuple[str, ...]) -> np.ndarray:
    """Self-BLEU-4 of one response a prompt: of all prompts, then without each of them. (1 + prompts,)

    This is what stands beside Tables 3 and 4: each response of a data set against all others. The paper does
    not say how rows that share a prompt are treated; here none meets another, so that the value does not
    depend on how many contexts a prompt has.
    """
    tokens = [words(text) for text in texts]
    estimates = []
    for chosen in one_response_a_prompt(prompts):
        scores = bleu_against_others([tokens[i] for i in chosen])  # (prompts, prompts)
        own = scores.diagonal()  # (prompts,)
        without = (scores.sum(0) - own) / max(1, len(own) - 1)  # (prompts,) a text left out has no score
        estimates.append([own.mean(), *without])
    return np.mean(estimates, axis=0)


@functools.lru_cache(maxsize=8)
def self_bleu_within(texts: tuple[str, ...], prompts: tuple[str, ...]) -> np.ndarray:
    """Self-BLEU-4 of all responses to one prompt, whose contexts differ: (prompts,), NaN for a single one.

    This is what the paper's R2 speaks of: other contexts bring other responses to the same prompt. `default`
    answers a prompt once, whatever the context: 1.
    """
    tokens = [words(text) for text in texts]
    values = [self_bleu([tokens[i] for i in rows]) if len(rows) > 1 else math.nan
              for rows in rows_of_prompts(prompts)]
    return np.array(values)


def jackknife_interval(estimates: np.ndarray) -> dict:
    """An estimate of all prompts and its interval, from those that leave out one prompt: (1 + prompts,)."""
    without, count = estimates[1:], len(estimates) - 1
    result = dict(mean=float(estimates[0]), low=None, high=None, n=count)
    if count > 2:
        half = t_quantile(count - 1) * math.sqrt((count - 1) * without.var())
        result |= dict(low=result["mean"] - half, high=result["mean"] + half)
    return result


def self_bleus(texts: list[str], prompts: list[str], baseline: list[str] | None = None) -> dict:
    """Self-BLEU-4 across prompts and within them, or by how much it is above the baseline's, with intervals.
    """
    across = self_bleu_across(tuple(texts), tuple(prompts)) if len(set(prompts)) > 1 else np.array([])
    within = self_bleu_within(tuple(texts), tuple(prompts))
    if baseline:
        if len(across):
            across = across - self_bleu_across(tuple(baseline), tuple(prompts))
        within = within - self_bleu_within(tuple(baseline), tuple(prompts))
    return dict(self_bleu_4=jackknife_interval(across) if len(across) else dict(NO_INTERVAL),
                self_bleu_4_within=interval(within, list(range(len(within)))))


def distinct_2(texts: list[str], prompts: list[str]) -> float | None:
    """distinct-2 of one response a prompt, mean over the choices that self-BLEU across prompts reads."""
    if len(set(prompts)) < 2:
        return None
    tokens = [words(text) for text in texts]
    values = [distinct([tokens[i] for i in chosen]) for chosen in one_response_a_prompt(tuple(prompts))]
    return float(np.mean(values))


# ------------------------------------------------------------------------- the numbers

def or_nan(value):
    """A value of a JSON file, which has null for NaN."""
    return math.nan if value is None else value


def cluster_of(e: Example) -> str:
    """Rows that are not independent: all of one user, or where users are unknown all of one prompt."""
    return e.user or e.prompt


def groups_of(examples: list[Example]) -> dict:
    """`interval`'s clusters and, in the demo, where all prompts meet the same contexts, what crosses them."""
    contexts = [e.context_id for e in examples]
    return dict(clusters=[cluster_of(e) for e in examples], crossed=contexts if all(contexts) else None)


def has_final_answer(e: Example) -> bool:
    """Whether a response to the example has a final answer that is right or wrong."""
    return e.answer is not None and e.style in ("math", "choice")


def nan_where(missing: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values as floats, NaN where `missing`. (rows,)"""
    return np.where(missing, np.nan, values)


def wins(examples: list[Example], answers: list[Answer], judge: str = "") -> np.ndarray:
    """1 where an answer wins, 0 where it does not, NaN where nothing can tell. (rows,)

    With a judge's name: it scores at least what the reference does. Without: it honours the context's check
    or gives the right final answer.
    """
    if judge:
        scores, references = scores_of(answers, judge)
        return nan_where(np.isnan(scores - references), scores >= references)
    right = [verify(e, answer.text) for e, answer in zip(examples, answers, strict=True)]
    return np.array([or_nan(r) for r in right], dtype=float)


def scores_of(answers: list[Answer], judge: str) -> tuple[np.ndarray, np.ndarray]:
    """A judge's scores of the answers, and of the references that they are compared with. (rows,) each"""
    scores = [answer.scores.get(judge, math.nan) for answer in answers]
    references = [answer.reference_scores.get(judge, math.nan) for answer in answers]
    return np.array(scores), np.array(references)


def off_target(examples: list[Example], answers: list[Answer]) -> float | None:
    """How often a response passes the checks of contexts that it was not given.

    Where this rises as much as the win rate, there is no gain.
    """
    checks = {e.context_id: e.check for e in examples if e.check}
    passed = [honours(check, answer.text) for e, answer in zip(examples, answers, strict=True)
              for context_id, check in checks.items() if context_id != e.context_id]
    return float(np.mean(passed)) if passed else None


def system_row(examples: list[Example], answers: list[Answer], judge: str = "") -> dict:
    """All numbers of one system: win rate, quality, and what only some data have."""
    groups = groups_of(examples)
    texts, prompts = [answer.text for answer in answers], [e.prompt for e in examples]
    won = wins(examples, answers, judge)
    tokens = np.array([len(answer.ids) for answer in answers])
    unfinished = np.array([float(not answer.finished) for answer in answers])
    prompt_gains = np.array([answer.prompt_gain for answer in answers])
    row = dict(
        win_rate=interval(won, **groups, bounds=RATE),
        off_target=off_target(examples, answers),
        tokens=float(tokens.mean()),
        unfinished=float(unfinished.mean()),
        nll_per_token=float(-sum(answer.logp for answer in answers) / tokens.sum()),
        context_gain=interval(np.array([answer.gain for answer in answers]), **groups),
        prompt_gain=float(np.mean(prompt_gains)),
        tokens_interval=interval(tokens.astype(float), **groups),
        unfinished_interval=interval(unfinished, **groups, bounds=RATE),
        prompt_gain_interval=interval(prompt_gains, **groups),
        distinct_2=distinct_2(texts, prompts),
        **self_bleus(texts, prompts),
    )
    if has_final_answer(examples[0]):
        row |= final_answer_columns(examples, answers)
    if examples[0].choices:
        entropy = np.array([answer.entropy for answer in answers])
        choice_mi = np.array([answer.choice_mi for answer in answers])
        row |= dict(choice_mi=interval(choice_mi, **groups, bounds=RATE),
                    entropy_right=interval(nan_where(won != 1, entropy), **groups),
                    entropy_wrong=interval(nan_where(won != 0, entropy), **groups))
    if judge:
        row |= judged_columns(examples, answers, judge)
    return row


def final_answer_columns(examples: list[Example], answers: list[Answer]) -> dict:
    """Accuracy where answers are read flexibly, and the shares that strict and flexible reading miss."""
    def read(flexible: bool) -> list[str | None]:
        return [extract(e.style, answer.text, len(e.choices or ()), flexible)
                for e, answer in zip(examples, answers, strict=True)]

    strict, flexible = read(flexible=False), read(flexible=True)
    right = [float(final == e.answer) for e, final in zip(examples, flexible, strict=True)]
    unparsed = np.array([float(final is None) for final in strict])
    groups = groups_of(examples)
    return dict(flexible=interval(np.array(right), **groups, bounds=RATE),
                unparsed=float(unparsed.mean()),
                unparsed_flexible=flexible.count(None) / len(flexible),
                unparsed_interval=interval(unparsed, **groups, bounds=RATE))


def judged_columns(examples: list[Example], answers: list[Answer], judge: str) -> dict:
    """The judge's mean score; strict wins, ties, and the win rate at the reference's length."""
    groups = groups_of(examples)
    scores, references = scores_of(answers, judge)
    unknown = np.isnan(scores - references)
    ties = scores[~unknown] == references[~unknown]
    longer = [float(len(answer.text) - len(e.reference or ""))
              for e, answer in zip(examples, answers, strict=True)]
    return dict(score=interval(scores, **groups),
                length_controlled=length_controlled(wins(examples, answers, judge), np.array(longer)),
                strict=interval(nan_where(unknown, scores > references), **groups, bounds=RATE),
                ties=float(ties.mean()) if len(ties) else None)


def paired_differences(examples: list[Example], answers: list[Answer], baseline: list[Answer],
                       judge: str = "") -> dict:
    """Row by row, answers - baseline: win rate, over all rows and where lengths match; context gain; score;
    and of the systems self-BLEU-4.

    The gain per token is macro: a mean over responses, each divided by its own length. It has another name
    than a ratio of sums (micro), as `nll_per_token` is one.
    """
    groups = groups_of(examples)
    won = wins(examples, answers, judge) - wins(examples, baseline, judge)
    tokens, baseline_tokens = (np.array([len(a.ids) for a in system]) for system in (answers, baseline))
    gain, baseline_gain = (np.array([a.gain for a in system]) for system in (answers, baseline))
    shorter, longer = np.minimum(tokens, baseline_tokens), np.maximum(tokens, baseline_tokens)
    unmatched = shorter < 0.8 * longer  # lengths more than 20% apart
    scores = scores_of(answers, judge)[0] - scores_of(baseline, judge)[0]
    mcnemar_p = None
    if has_final_answer(examples[0]):
        mcnemar_p = mcnemar(wins(examples, answers, judge), wins(examples, baseline, judge))
    texts, baseline_texts = [a.text for a in answers], [a.text for a in baseline]
    return dict(
        win_rate=interval(won, **groups, bounds=DIFFERENCE),
        win_rate_length_matched=interval(nan_where(unmatched, won), **groups, bounds=DIFFERENCE),
        context_gain=interval(gain - baseline_gain, **groups),
        context_gain_per_token_macro=interval(gain / tokens - baseline_gain / baseline_tokens, **groups),
        mcnemar_p=mcnemar_p,
        score=interval(scores, **groups),
        **self_bleus(texts, [e.prompt for e in examples], baseline_texts),
    )


def evaluate(examples: list[Example], answers: Answers, judge: str = "") -> dict:
    """All numbers: systems and differences of all rows and of each group (seen, unseen), and each context.

    judge: whose scores decide the win rate, in data that have neither checks nor final answers.
    """
    def select(indices: list[int]) -> tuple[list[Example], Answers]:
        chosen = {system: [rows[i] for i in indices] for system, rows in answers.items()}
        return [examples[i] for i in indices], chosen

    crossed = groups_of(examples)["crossed"] is not None
    intervals = dict(kind=INTERVALS, clusters="users" if all(e.user for e in examples) else "prompts",
                     crossed="contexts" if crossed else None)
    result: dict = dict(intervals=intervals, parts={}, contexts=[])
    for part in ("all", *sorted({e.group for e in examples if e.group})):
        subset, chosen = select([i for i, e in enumerate(examples) if part in ("all", e.group)])
        systems = {system: system_row(subset, rows, judge) for system, rows in chosen.items()}
        differences = {}
        for baseline, system in itertools.pairwise(system for system in SYSTEMS if system in chosen):
            differences[f"{system} - {baseline}"] = paired_differences(subset, chosen[system],
                                                                       chosen[baseline], judge)
        result["parts"][part] = dict(systems=systems, differences=differences)
    for _, context_id in sorted({(e.group, e.context_id) for e in examples if e.check}, key=str):
        subset, chosen = select([i for i, e in enumerate(examples) if e.context_id == context_id])
        rates = {system: float(wins(subset, rows).mean()) for system, rows in chosen.items()}
        first = subset[0]
        result["contexts"].append(dict(context_id=context_id, group=first.group, check=first.check,
                                       n=len(subset), context=first.context, **rates))
    return result
