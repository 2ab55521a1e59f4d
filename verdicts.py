"""verdicts.py - what one judge says of all answers of an evaluation.

    scores         of every system's answers and of the references, an item of the context at a time: Table 1
    critic         how far the judge agrees with people's own choices: Table 7
    comparisons    of trained and prompted responses, in both orders: Fig. 3

What differs from the paper: it does not say what becomes of replies that cannot be read. Here they are
counted, and systems are compared on the items on which the judge could be read for all of them.

    python -m pytest tests/test_eval.py -k judge
"""

import collections
import dataclasses
import math

import numpy as np

import judge as judging
from data import Example
from judge import Judge
from measures import (RATE, Answers, clusters_of, interval, length_controlled, nan_where, or_nan, scores_of,
                      wins)
from tokenizer import without_thoughts


def judge_all(judge: Judge, examples: list[Example], answers: Answers,
              write_rubrics: bool) -> tuple[Answers, dict]:
    """Let one judge score every answer and reference (Table 1), score what people rejected (Table 7), and
    compare the trained model's responses with prompting's (Fig. 3).

    Returns the answers with their scores, and the judge's own numbers for eval.json. Systems and references
    are compared on the items on which the judge could be read for all of them.
    """
    name = judge.args.judge
    texts = dict(reference=[answer_in(e.reference) for e in examples])
    texts |= {system: [answer.text for answer in rows] for system, rows in answers.items()}
    reasons: collections.Counter = collections.Counter()  # why a reply was not read, how often
    items = {label: item_scores(judge, examples, rows, label, reasons) for label, rows in texts.items()}
    means, shared = means_over_shared_items(items)
    scored: Answers = {}
    for system, rows in answers.items():
        scored[system] = [
            dataclasses.replace(answer, scores=answer.scores | {name: score},
                                reference_scores=answer.reference_scores | {name: reference})
            for answer, score, reference in zip(rows, means[system], means["reference"], strict=True)]
    asked = sum(len(e.items or [e.context]) for e in examples)
    verdicts: dict = dict(items=dict(asked=asked, shared=shared), systems={})
    for system, rows in scored.items():  # also where checks, or another judge, decide what wins
        verdicts["systems"][system] = dict(
            score=interval(scores_of(rows, name)[0], **clusters_of(examples)),
            win_rate=interval(wins(examples, rows, name), **clusters_of(examples), bounds=RATE))

    if any(e.human_rejected for e in examples):
        rejected = [answer_in(e.human_rejected) for e in examples]
        items["human_rejected"] = item_scores(judge, examples, rejected, "human_rejected", reasons)
        pair, _ = means_over_shared_items({label: items[label] for label in ("reference", "human_rejected")})
        margin = np.subtract(pair["reference"], pair["human_rejected"])  # (rows,)
        clusters = clusters_of(examples)
        verdicts["critic"] = dict(
            strict=interval(nan_where(np.isnan(margin), margin > 0), **clusters, bounds=RATE),
            tie_tolerant=interval(nan_where(np.isnan(margin), margin >= 0), **clusters, bounds=RATE))
    verdicts["unread"] = {label: sum(math.isnan(score) for row in rows for score in row)
                          for label, rows in items.items()}
    verdicts["unread_reasons"] = dict(reasons)
    if "trained" in answers and "prompted" in answers:
        verdicts["pairwise"] = compare_with_prompting(judge, examples, answers, write_rubrics)
    return scored, verdicts


def answer_in(text: str | None) -> str | None:
    """A response of the data without the thoughts that some models leave in it; None for None."""
    return None if text is None else without_thoughts(text)


def item_scores(judge: Judge, examples: list[Example], texts: list[str | None], label: str,
                reasons: collections.Counter) -> list[list[float]]:
    """The judge's score of each text on each item of its row's context; none for a row without a text.

    NaN where the reply could not be read: what is unread is never scored, and its reason is added to
    `reasons`.
    """
    questions = [(i, item) for i, e in enumerate(examples) if texts[i] is not None
                 for item in e.items or [e.context]]
    asked = [(examples[i].prompt, texts[i], item) for i, item in questions]
    scores = judging.rate(judge, asked, label, reasons)
    rows: list[list[float]] = [[] for _ in examples]
    for (i, _), score in zip(questions, scores, strict=True):
        rows[i].append(or_nan(score))
    return rows


def means_over_shared_items(items: dict[str, list[list[float]]]) -> tuple[dict[str, list[float]], int]:
    """Each row's mean score over the items that were read for all texts of the row; and how many those are.

    items: label -> each row's scores, by item. Means over different items do not compare: a text whose hard
    items went unread would win. NaN where a row has no such item, or no text.
    """
    means: dict[str, list[float]] = {label: [] for label in items}
    count = 0
    for rows in zip(*items.values(), strict=True):
        scores = np.array([row for row in rows if row])  # (texts, items)
        read = ~np.isnan(scores).any(axis=0)  # (items,)
        count += int(read.sum()) if scores.size else 0
        for label, row in zip(items, rows, strict=True):
            means[label].append(float(np.mean(np.array(row)[read])) if row and read.any() else math.nan)
    return means, count


def compare_with_prompting(judge: Judge, examples: list[Example], answers: Answers,
                           write_rubrics: bool) -> dict:
    """The judge's comparison of trained and prompted responses, each pair in both orders (Fig. 3).

    The criterion is the example's rubric, else with write_rubrics one that the judge writes for the context,
    else whether the response respects the context.
    """
    without = [i for i, e in enumerate(examples) if write_rubrics and not e.rubric]
    rubrics = judging.rubrics(judge, [examples[i].context for i in without]) if without else []
    written = dict(zip(without, rubrics, strict=True))
    criteria = [e.rubric or written.get(i) or "Does the response respect this preference of the user: "
                f"{e.context}" for i, e in enumerate(examples)]
    trained = [answer.text for answer in answers["trained"]]
    prompted = [answer.text for answer in answers["prompted"]]
    verdicts = judging.compare(judge, list(zip(criteria, trained, prompted, strict=True)))

    outcomes = np.array([or_nan(outcome) for outcome, _ in verdicts])  # (rows,) 1 win, 1/2 tie, 0 loss
    unread = np.isnan(outcomes)
    flips = nan_where(unread, np.array([float(flipped) for _, flipped in verdicts]))
    clusters = clusters_of(examples)
    characters = [float(len(a) - len(b)) for a, b in zip(trained, prompted, strict=True)]  # how many more
    return dict(
        win_rate=interval(outcomes, **clusters, bounds=RATE),
        wins=int((outcomes == 1).sum()),
        ties=int((outcomes == 0.5).sum()),
        losses=int((outcomes == 0).sum()),
        unread=int(unread.sum()),
        flip_interval=interval(flips, **clusters, bounds=RATE),
        length_controlled=length_controlled(outcomes, np.array(characters)),
        rubrics_unread=rubrics.count(None) if write_rubrics else None,
    )
