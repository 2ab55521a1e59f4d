"""measures.py - the numbers of an evaluation: statistics, and what they say of each system.

    statistics    intervals that know which rows belong together, McNemar, win rates at equal length
    systems       win rates, quality columns and paired differences (Tables 1, 2)

What differs from the paper: the intervals are ours (it gives standard deviations over seeds).

    python -m pytest tests/test_measures.py
"""

import itertools
import math
from dataclasses import dataclass, field

import numpy as np

from checks import extract, final_style, honours, math_answer, verify
from data import Example
from diversity import distinct_2, self_bleu_across, self_bleu_within
from tokenizer import without_thoughts

SYSTEMS = ("default", "prompted", "trained")


# ------------------------------------------------------------------------- responses

@dataclass(frozen=True)
class Answer:
    """One system's response to one example, with what models and judges measured of it.

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
             "clusters; rates: Wilson, their differences: Bonett and Price, both with effective rows")


def interval(values: np.ndarray, clusters: list, crossed: list | None = None,
             bounds: tuple[float, float] | None = None) -> dict:
    """Mean of the values (rows,) and its 95% interval. NaNs are ignored.

    clusters: the user or prompt of each row. Rows of one cluster are not independent, so the variance is that
    of the mean when whole clusters are left out, `jackknife`. crossed: a second grouping, where the claim is
    about more contexts than these; V(clusters) + V(crossed) - V(both) (Cameron, Gelbach and Miller, 2011),
    but never less than either of the first two. bounds: RATE for values from 0 to 1, or DIFFERENCE for
    differences of such, where `bounded` serves better than Student's t; None for all others.

    The quantile is Student's t with (effective clusters - 1) degrees of freedom, using the smaller of the two
    groupings. One cluster tells nothing: the ends are then the bounds, or None.
    """
    keep = ~np.isnan(values)
    if not keep.any():
        return dict(NO_INTERVAL)
    values = values[keep]
    group = numbered([label for label, is_kept in zip(clusters, keep, strict=True) if is_kept])
    variance, units = jackknife(values, group)
    if crossed is not None:
        other = numbered([label for label, is_kept in zip(crossed, keep, strict=True) if is_kept])
        cells = numbered(list(zip(group, other, strict=True)))
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
            # The mean lies inside up to rounding, which matters at 0 and 1.
            low, high = max(low, bounds[0]), min(high, bounds[1])
            low, high = min(low, mean), max(high, mean)
    return dict(mean=mean, low=low, high=high, n=len(values))


def numbered(labels: list) -> np.ndarray:
    """The labels as numbers from 0 on, in the order of their appearance: (rows,)."""
    numbers: dict = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels])


def jackknife(values: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """The variance of the mean, and the effective number of equal-sized groups.

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
    """The effective number of independent rows (Korn and Graubard, 1998).

    The number of rows n over the design effect d: the variance over that of independent rows, at least 1.
    With few events (rows that differ from the commonest value) d is unreliable. So, by our own rule, we take
    a weighted mean: d has weight events, and n / units, the largest that d can be, weight 2.
    """
    n = len(values)
    independent = float(values.var()) / max(1, n - 1)
    effect = max(1.0, variance / independent) if independent else 1.0
    events = n - np.unique(values, return_counts=True)[1].max()
    greatest = n / units
    return n / ((events * effect + 2 * greatest) / (events + 2))


def bounded(values: np.ndarray, n: float, t: float, bounds: tuple[float, float]) -> tuple[float, float]:
    """Centre and half width of the interval of values between `bounds` that are worth n rows.

    Rates: Wilson's (1927). Differences: a normal interval after adding one row at each bound, as Bonett and
    Price (2012) do for paired rates. Both have positive width even if all values are equal.
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
    """The 97.5% quantile of Student's t for whole degrees of freedom from 1 on, accurate to 0.004.

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

    The hypothesis: where the two differ, each of them is as likely to be the right one. Rows must be
    independent.
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


def jackknife_interval(estimates: np.ndarray) -> dict:
    """The full estimate and its interval, from estimates (1 + prompts,): the full one, then those that leave
    out one prompt."""
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


# ------------------------------------------------------------------------- the numbers

def mean_of(row: dict, key: str) -> float | None:
    """A measurement of a system, whether or not it has an interval; None where there is none."""
    measurement = row.get(key)
    return measurement["mean"] if isinstance(measurement, dict) else measurement


def with_interval(measurement: dict | None, form: str, scale: float = 1) -> str:
    """63.1 [58.0, 68.2]: a mean with its interval, if it has one; - where there is no mean."""
    if measurement is None or measurement["mean"] is None:
        return "-"
    if measurement["low"] is None:
        return format(scale * measurement["mean"], form)
    mean, low, high = (format(scale * measurement[key], form) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def or_nan(value):
    """A value of a JSON file, which has null for NaN."""
    return math.nan if value is None else value


def clusters_of(examples: list[Example]) -> dict:
    """`interval`'s clusters, the users or, if these are unknown, the prompts; and, in the demo, where all
    prompts meet the same contexts, what crosses them."""
    contexts = [e.context_id for e in examples]
    return dict(clusters=[e.user or e.prompt for e in examples], crossed=contexts if all(contexts) else None)


def have_final_answers(examples: list[Example]) -> bool:
    """Whether responses to some of the examples have a final answer that is right or wrong."""
    return any(final_style(e) for e in examples)


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

    If this rises as much as the win rate, nothing was gained.
    """
    checks = {e.context_id: e.check for e in examples if e.check}
    passed = [honours(check, answer.text) for e, answer in zip(examples, answers, strict=True)
              for context_id, check in checks.items() if context_id != e.context_id]
    return float(np.mean(passed)) if passed else None


def system_row(examples: list[Example], answers: list[Answer], judge: str = "") -> dict:
    """All numbers of one system: win rate, quality, and what only some data have."""
    clusters = clusters_of(examples)
    texts, prompts = [answer.text for answer in answers], [e.prompt for e in examples]
    won = wins(examples, answers, judge)
    tokens = np.array([len(answer.ids) for answer in answers])
    unfinished = np.array([float(not answer.finished) for answer in answers])
    prompt_gain = interval(np.array([answer.prompt_gain for answer in answers]), **clusters)
    row = dict(
        win_rate=interval(won, **clusters, bounds=RATE),
        off_target=off_target(examples, answers),
        tokens=float(tokens.mean()),
        unfinished=float(unfinished.mean()),
        nll_per_token=float(-sum(answer.logp for answer in answers) / tokens.sum()),
        context_gain=interval(np.array([answer.gain for answer in answers]), **clusters),
        prompt_gain=prompt_gain["mean"],
        tokens_interval=interval(tokens.astype(float), **clusters),
        unfinished_interval=interval(unfinished, **clusters, bounds=RATE),
        prompt_gain_interval=prompt_gain,
        distinct_2=distinct_2(texts, prompts),
        **self_bleus(texts, prompts),
    )
    if have_final_answers(examples):
        row |= final_answer_columns(examples, answers)
    if examples[0].choices:
        entropy = np.array([answer.entropy for answer in answers])
        choice_mi = np.array([answer.choice_mi for answer in answers])
        row |= dict(choice_mi=interval(choice_mi, **clusters, bounds=RATE),
                    entropy_right=interval(nan_where(won != 1, entropy), **clusters),
                    entropy_wrong=interval(nan_where(won != 0, entropy), **clusters))
    if judge:
        row |= judged_columns(examples, answers, judge)
    return row


def final_answer_columns(examples: list[Example], answers: list[Answer]) -> dict:
    """Accuracy under other readings of the answers, and the shares with no readable answer.

    flexible: answers in any form. last_marker: of math, what follows the last #### of the whole response,
    where a model may have gone on to questions of its own. Answers of a user's own file are read in one way.
    """
    if final_style(examples[0]) not in ("math", "choice"):
        return {}
    clusters = clusters_of(examples)

    def read(flexible: bool) -> list[str | None]:
        return [extract(e.style, answer.text, len(e.choices or ()), flexible)
                for e, answer in zip(examples, answers, strict=True)]

    def share_right(finals: list[str | None]) -> dict:
        right = [float(final == e.answer) for e, final in zip(examples, finals, strict=True)]
        return interval(np.array(right), **clusters, bounds=RATE)

    strict, flexible = read(flexible=False), read(flexible=True)
    unparsed = np.array([float(final is None) for final in strict])
    columns = dict(flexible=share_right(flexible),
                   unparsed=float(unparsed.mean()),
                   unparsed_flexible=flexible.count(None) / len(flexible),
                   unparsed_interval=interval(unparsed, **clusters, bounds=RATE))
    if examples[0].style == "math":
        last = [math_answer(answer.text, flexible=False) for answer in answers]
        columns["last_marker"] = share_right(last)
    return columns


def judged_columns(examples: list[Example], answers: list[Answer], judge: str) -> dict:
    """The judge's mean score; strict wins, ties, and the win rate at the reference's length."""
    clusters = clusters_of(examples)
    scores, references = scores_of(answers, judge)
    unknown = np.isnan(scores - references)
    ties = scores[~unknown] == references[~unknown]
    longer = [float(len(answer.text) - len(without_thoughts(e.reference or "")))
              for e, answer in zip(examples, answers, strict=True)]
    return dict(score=interval(scores, **clusters),
                length_controlled=length_controlled(wins(examples, answers, judge), np.array(longer)),
                strict=interval(nan_where(unknown, scores > references), **clusters, bounds=RATE),
                ties=float(ties.mean()) if len(ties) else None)


def paired_differences(examples: list[Example], answers: list[Answer], baseline: list[Answer],
                       judge: str = "") -> dict:
    """Row by row, answers - baseline: win rate, over all rows and where lengths match; context gain; score.
    Self-BLEU-4 is one number a system, and so is its difference.

    macro: a mean of each response's gain over its own length; micro, in pairs.py, is a ratio of sums.
    """
    clusters = clusters_of(examples)
    independent = len(set(clusters["clusters"])) == len(examples)
    mine, theirs = wins(examples, answers, judge), wins(examples, baseline, judge)
    won = mine - theirs
    tokens, baseline_tokens = (np.array([len(a.ids) for a in system]) for system in (answers, baseline))
    gain, baseline_gain = (np.array([a.gain for a in system]) for system in (answers, baseline))
    shorter, longer = np.minimum(tokens, baseline_tokens), np.maximum(tokens, baseline_tokens)
    unmatched = shorter < 0.8 * longer  # lengths more than 20% apart
    scores = scores_of(answers, judge)[0] - scores_of(baseline, judge)[0]
    texts, baseline_texts = [a.text for a in answers], [a.text for a in baseline]
    return dict(
        win_rate=interval(won, **clusters, bounds=DIFFERENCE),
        win_rate_length_matched=interval(nan_where(unmatched, won), **clusters, bounds=DIFFERENCE),
        context_gain=interval(gain - baseline_gain, **clusters),
        context_gain_per_token_macro=interval(gain / tokens - baseline_gain / baseline_tokens, **clusters),
        mcnemar_p=mcnemar(mine, theirs) if have_final_answers(examples) and independent else None,
        score=interval(scores, **clusters),
        **self_bleus(texts, [e.prompt for e in examples], baseline_texts),
    )


def evaluate(examples: list[Example], answers: Answers, judge: str = "") -> dict:
    """All numbers: systems and differences of all rows and of each group (seen, unseen), and each context.

    judge: whose scores decide the win rate, in data that have neither checks nor final answers.
    """
    def select(indices: list[int]) -> tuple[list[Example], Answers]:
        selected = {system: [rows[i] for i in indices] for system, rows in answers.items()}
        return [examples[i] for i in indices], selected

    crossed = clusters_of(examples)["crossed"] is not None
    intervals = dict(kind=INTERVALS, clusters="users" if all(e.user for e in examples) else "prompts",
                     crossed="contexts" if crossed else None)
    result: dict = dict(intervals=intervals, parts={}, contexts=[])
    for part in ("all", *sorted({e.group for e in examples if e.group})):
        subset, selected = select([i for i, e in enumerate(examples) if part == "all" or e.group == part])
        systems = {system: system_row(subset, rows, judge) for system, rows in selected.items()}
        differences = {}
        for baseline, system in itertools.pairwise(system for system in SYSTEMS if system in selected):
            differences[f"{system} - {baseline}"] = paired_differences(subset, selected[system],
                                                                       selected[baseline], judge)
        result["parts"][part] = dict(systems=systems, differences=differences)
    for _, context_id in sorted({(e.group, e.context_id) for e in examples if e.check}, key=str):
        subset, selected = select([i for i, e in enumerate(examples) if e.context_id == context_id])
        rates = {system: float(wins(subset, rows).mean()) for system, rows in selected.items()}
        first = subset[0]
        result["contexts"].append(dict(context_id=context_id, group=first.group, check=first.check,
                                       n=len(subset), context=first.context, **rates))
    return result


# ------------------------------------------------------------------------- what is not there

MISSING = dict(  # why a number of a system or of a difference is not there
    win_rate="no row has a check, a short `answer` (a number, a letter, a few words), or a judge's score and "
             "a `reference`",
    win_rate_length_matched="no row has a win rate and two responses within 20% of each other's length",
    context_gain="the system sees no context, or no row has one",
    self_bleu_4="there is one prompt only",
    self_bleu_4_within="no two rows have the same prompt",
    distinct_2="there is one prompt only",
    length_controlled="fewer than two rows have a judge's score and a `reference`",
    entropy_right="no right answer says 'The answer is:'",
    entropy_wrong="no wrong answer says 'The answer is:'",
    off_target="there are no two contexts with checks",
    prompt_gain="there is one prompt only",
)


def gaps(rows: dict[str, dict]) -> list[str]:
    """One line per missing number: which systems or differences (name -> its numbers) lack it, and why."""
    def is_missing(value) -> bool:
        return value is None or (isinstance(value, dict) and value["mean"] is None)

    lines = []
    for key, reason in MISSING.items():
        names = [name for name, row in rows.items() if key in row and is_missing(row[key])]
        if names:
            lines.append(f"no {key.replace('_', ' ')} of {', '.join(names)}: {reason}")
    return lines
