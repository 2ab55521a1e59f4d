"""measures.py - the numbers of an evaluation: statistics, text quality, and what they say of each system.

    statistics    bootstrap over users or prompts, Wilson and McNemar, win rates at equal length
    text          distinct-2 and self-BLEU-4 (Tables 3, 4)
    systems       win rates, quality columns and paired differences (Tables 1, 2)

What differs from the paper: the intervals are ours (it gives standard deviations over seeds), and so is the
smoothing of self-BLEU, which it leaves open.

    python -m pytest tests/test_measures.py
"""

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from checks import extract, honours, verify
from data import Example
from run import seed_from

SYSTEMS = ("default", "prompted", "trained")


# -------------------------------------------------------------------------------- responses

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


# -------------------------------------------------------------------------------- statistics

NO_INTERVAL = dict(mean=None, low=None, high=None, n=0)  # of no values at all


def bootstrap(values: np.ndarray, clusters: list[str], draws: int = 10_000, seed: int = 0) -> dict:
    """Mean of the values (rows,) and its 95% percentile interval, resampling whole clusters. NaN is left out.

    Rows of one cluster (a prompt, a user) are not independent: resampling rows would make the interval too
    narrow.
    """
    keep = ~np.isnan(values)
    if not keep.any():
        return dict(NO_INTERVAL)
    names, index = np.unique(np.asarray(clusters)[keep], return_inverse=True)
    sums = np.bincount(index, weights=values[keep], minlength=len(names))  # (clusters,)
    counts = np.bincount(index, minlength=len(names))  # (clusters,)
    # How often each resample holds each cluster; a resample's mean is that of all its rows.
    share = np.full(len(names), 1 / len(names))
    weights = np.random.default_rng(seed).multinomial(len(names), share, size=draws)  # (draws, clusters)
    low, high = np.percentile(weights @ sums / (weights @ counts), [2.5, 97.5])
    return dict(mean=float(values[keep].mean()), low=float(low), high=float(high), n=int(keep.sum()))


def wilson(values: np.ndarray) -> dict:
    """The mean of 0/1 values (rows,) and Wilson's 95% interval. NaN is left out."""
    values = values[~np.isnan(values)]
    n = len(values)
    if not n:
        return dict(NO_INTERVAL)
    p, z2 = float(values.mean()), 1.959964**2
    centre = p + z2 / (2 * n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
    return dict(mean=p, low=(centre - half) / (1 + z2 / n), high=(centre + half) / (1 + z2 / n), n=n)


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
    counts = sum((ngrams(text, n) for text in texts), Counter())
    return len(counts) / max(1, counts.total())


def self_bleu(texts: list[list[str]]) -> float:
    """Mean BLEU-4 of each text against all others as references (Zhu et al., 2018); higher is less diverse.

    Precisions of n > 1 are smoothed by adding one to both counts (Lin and Och, 2004), so that a text without
    a common 4-gram is not 0 whatever else it shares. The brevity penalty is taken against the reference
    closest in length.
    """
    precisions = np.stack([clipped_precisions(texts, n) for n in range(1, 5)], axis=1)  # (texts, 4)
    lengths = [len(text) for text in texts]
    scores = []
    for i, p in enumerate(precisions):
        others = lengths[:i] + lengths[i + 1 :]
        closest = min(others, key=lambda length: (abs(length - lengths[i]), length))
        penalty = min(1.0, math.exp(1 - closest / max(1, lengths[i])))
        scores.append(penalty * math.exp(sum(map(math.log, p)) / 4) if p.all() else 0.0)
    return float(np.mean(scores))


def clipped_precisions(texts: list[list[str]], n: int) -> np.ndarray:
    """BLEU's n-gram precision of each text against all others: (texts,).

    An n-gram counts at most as often as the reference that has it most often holds it. That reference may not
    be the text itself, so the two texts with the highest counts are kept for every n-gram.
    """
    counts = [ngrams(text, n) for text in texts]
    highest: dict[tuple, tuple[int, int, int]] = {}  # n-gram -> highest count, its text, the next highest
    for i, count in enumerate(counts):
        for gram, c in count.items():
            first, holder, second = highest.get(gram, (0, -1, 0))
            highest[gram] = (c, i, first) if c > first else (first, holder, max(second, c))
    added = int(n > 1)
    precisions = []
    for i, count in enumerate(counts):
        clipped = 0
        for gram, c in count.items():
            first, holder, second = highest[gram]
            clipped += min(c, second if holder == i else first)
        precisions.append((clipped + added) / max(1, count.total() + added))
    return np.array(precisions)


def diversity(texts: list[str], prompts: list[str], draws: int = 5) -> dict:
    """distinct-2 and self-BLEU-4 of one response a prompt, mean over `draws` seeded choices of the responses.

    The choices are the same for every system, and no two chosen responses answer one prompt, so that all
    systems compare.
    """
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    if len(rows) < 2:
        return dict(distinct_2=None, self_bleu_4=None)
    tokens = [words(text) for text in texts]
    values = []
    for draw in range(draws):
        generator = np.random.default_rng(seed_from("diversity", draw))
        chosen = [tokens[generator.choice(of_prompt)] for of_prompt in rows.values()]
        values.append((distinct(chosen), self_bleu(chosen)))
    distinct_2, self_bleu_4 = np.mean(values, axis=0).tolist()
    return dict(distinct_2=distinct_2, self_bleu_4=self_bleu_4)


# -------------------------------------------------------------------------------- the numbers

def or_nan(value):
    """A value of a JSON file, which has null for NaN."""
    return math.nan if value is None else value


def cluster_of(e: Example) -> str:
    """Rows that are resampled together: all of one user, or where users are unknown all of one prompt."""
    return e.user or e.prompt


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
    clusters = [cluster_of(e) for e in examples]
    won = wins(examples, answers, judge)
    tokens = np.array([len(answer.ids) for answer in answers])
    unfinished = np.array([float(not answer.finished) for answer in answers])
    prompt_gains = np.array([answer.prompt_gain for answer in answers])
    row = dict(
        win_rate=wilson(won) if has_final_answer(examples[0]) else bootstrap(won, clusters),
        off_target=off_target(examples, answers),
        tokens=float(tokens.mean()),
        unfinished=float(unfinished.mean()),
        nll_per_token=float(-sum(answer.logp for answer in answers) / tokens.sum()),
        context_gain=bootstrap(np.array([answer.gain for answer in answers]), clusters),
        prompt_gain=float(np.mean(prompt_gains)),
        tokens_interval=bootstrap(tokens.astype(float), clusters),
        unfinished_interval=wilson(unfinished),
        prompt_gain_interval=bootstrap(prompt_gains, clusters),
        **diversity([answer.text for answer in answers], [e.prompt for e in examples]),
    )
    if has_final_answer(examples[0]):
        row |= final_answer_columns(examples, answers)
    if examples[0].choices:
        entropy = np.array([answer.entropy for answer in answers])
        row |= dict(choice_mi=wilson(np.array([answer.choice_mi for answer in answers])),
                    entropy_right=bootstrap(nan_where(won != 1, entropy), clusters),
                    entropy_wrong=bootstrap(nan_where(won != 0, entropy), clusters))
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
    return dict(flexible=wilson(np.array(right)),
                unparsed=float(unparsed.mean()),
                unparsed_flexible=flexible.count(None) / len(flexible),
                unparsed_interval=wilson(unparsed))


def judged_columns(examples: list[Example], answers: list[Answer], judge: str) -> dict:
    """The judge's mean score; strict wins, ties, and the win rate at the reference's length."""
    clusters = [cluster_of(e) for e in examples]
    scores, references = scores_of(answers, judge)
    unknown = np.isnan(scores - references)
    ties = scores[~unknown] == references[~unknown]
    longer = [float(len(answer.text) - len(e.reference or ""))
              for e, answer in zip(examples, answers, strict=True)]
    return dict(score=bootstrap(scores, clusters),
                length_controlled=length_controlled(wins(examples, answers, judge), np.array(longer)),
                strict=bootstrap(nan_where(unknown, scores > references), clusters),
                ties=float(ties.mean()) if len(ties) else None)


def paired_differences(examples: list[Example], answers: list[Answer], baseline: list[Answer],
                       judge: str = "") -> dict:
    """Row by row, answers - baseline: win rate, over all rows and where lengths match; context gain; score.
    """
    clusters = [cluster_of(e) for e in examples]
    won, baseline_won = wins(examples, answers, judge), wins(examples, baseline, judge)
    tokens, baseline_tokens = (np.array([len(a.ids) for a in system]) for system in (answers, baseline))
    gain, baseline_gain = (np.array([a.gain for a in system]) for system in (answers, baseline))
    shorter, longer = np.minimum(tokens, baseline_tokens), np.maximum(tokens, baseline_tokens)
    unmatched = shorter < 0.8 * longer  # lengths more than 20% apart
    scores = scores_of(answers, judge)[0] - scores_of(baseline, judge)[0]
    return dict(
        win_rate=bootstrap(won - baseline_won, clusters),
        win_rate_length_matched=bootstrap(nan_where(unmatched, won - baseline_won), clusters),
        context_gain=bootstrap(gain - baseline_gain, clusters),
        context_gain_per_token=bootstrap(gain / tokens - baseline_gain / baseline_tokens, clusters),
        mcnemar_p=mcnemar(won, baseline_won) if has_final_answer(examples[0]) else None,
        score=bootstrap(scores, clusters),
    )


def evaluate(examples: list[Example], answers: Answers, judge: str = "") -> dict:
    """All numbers: systems and differences of all rows and of each group (seen, unseen), and each context.

    judge: whose scores decide the win rate, in data that have neither checks nor final answers.
    """
    def select(indices: list[int]) -> tuple[list[Example], Answers]:
        chosen = {system: [rows[i] for i in indices] for system, rows in answers.items()}
        return [examples[i] for i in indices], chosen

    result: dict = dict(parts={}, contexts=[])
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
