"""diversity.py - how alike the responses of a system are: distinct-2 and self-BLEU-4 (Tables 3, 4).

What differs from the paper: the smoothing of self-BLEU and its two kinds, within a prompt and across prompts,
which it leaves open, and what counts as a word in scripts without spaces (checks.words) are ours.

    python -m pytest tests/test_measures.py
"""

import functools
import math
from collections import Counter, defaultdict

import numpy as np

from checks import words
from run import seed_from


def ngrams(tokens: list[str], n: int) -> Counter:
    """How often each n-gram occurs."""
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct(texts: list[list[str]]) -> float:
    """The share of different bigrams among all bigrams, of all texts together."""
    counts: Counter = Counter()
    for text in texts:
        counts.update(ngrams(text, 2))
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

    Entry (i, j): text i against all texts but i and j; on the diagonal against all but i.
    """
    closest = closest_lengths([len(text) for text in texts])  # (texts, texts)
    lengths = np.array([[max(1, len(text))] for text in texts])  # (texts, 1)
    penalty = np.minimum(1, np.exp(1 - closest / lengths))  # (texts, texts)
    product = np.ones(penalty.shape)
    for n in range(1, 5):
        product *= clipped_precisions(texts, n)
    return penalty * product ** (1 / 4)


def closest_lengths(lengths: list[int]) -> np.ndarray:
    """For entry (i, j) as above: the length closest to text i's; of two equally close ones the shorter."""
    closest = np.empty((len(lengths), len(lengths)))
    for i, own in enumerate(lengths):
        others = [j for j in range(len(lengths)) if j != i]
        others.sort(key=lambda j: (abs(lengths[j] - own), lengths[j]))
        closest[i] = lengths[others[0]]
        if len(others) > 1:
            closest[i, others[0]] = lengths[others[1]]
    return closest


def clipped_precisions(texts: list[list[str]], n: int) -> np.ndarray:
    """BLEU's n-gram precision of each text, for entry (i, j) as above.

    An n-gram counts at most as often as it occurs in any one reference. References are neither the text
    itself nor the one left out, so each n-gram's three highest counts are kept.
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


def distinct_2(texts: list[str], prompts: list[str]) -> float | None:
    """distinct-2 of one response a prompt, mean over the choices that self-BLEU across prompts reads."""
    if len(set(prompts)) < 2:
        return None
    tokens = [words(text) for text in texts]
    values = [distinct([tokens[i] for i in chosen]) for chosen in one_response_a_prompt(tuple(prompts))]
    return float(np.mean(values))
