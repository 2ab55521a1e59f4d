"""eval.py - held-out prompts under default prompting, personalised prompting and the trained model, compared.

    default    y ~ pi_ref(.|x)         the base model without the context
    prompted   y ~ pi_ref(.|x, c)      the base model with it: the baseline MIPO has to beat (section 5.1)
    trained    y ~ pi_theta(.|x, c)    the trained model; in data without contexts it has to beat `default`
Win rate, the share of responses that
    honour the context by its own program                                demo data
    give the right final answer, strictly read                           Table 2: gsm8k, svamp, arc, mmlu
    score with --judge at least what the reference does                  Table 1: prism, community, multibench
Beside it, by the data: self-BLEU-4 and distinct-2 (Tables 3, 4), the judge's own accuracy on human
preferences (Table 7), its comparisons of trained and prompted responses in both orders (Fig. 3), the entropy
over the answer letters (Figs. 4, 5), accuracy by mutual information, log p(choice|question) - log p(choice).
Every figure has a 95% interval: a bootstrap over users or prompts, Wilson's for accuracies; differences are
paired, row by row, with McNemar's exact test for accuracies. A gain must not come from degenerate text, so
length, unfinished share, the base model's likelihood, the win rate where lengths match or are controlled for,
`elsewhere` (how often a response honours contexts it was not given) and `prompt gain` (how much it depends on
the question) are shown. Context gain, Eq. 14's log pi_ref(y|x,c) - log pi_ref(y|x), is taken under the base
model, where it can't be gamed.
What differs from the paper: data with checks needs no judge; intervals, pairs and quality columns are added.

    python eval.py --model RUN [--judge JUDGE]     a bare model folder has only the first two systems
    python eval.py --report RUN RUN ...            the paper's tables over runs and seeds

Writes responses.jsonl, eval.json and figures to the run folder (or --out) and prints one table.
"""

import dataclasses
import itertools
import math
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import judge as judging
from judge import PAPER, Judge
from losses import sequence_logps
from model import Decoder, find, load
from pairs import (LETTERS, SPLITS, DataArgs, Example, examples_for, extract, honours, note_of,
                   sampling_for, verify)
from run import (UserError, default_device, derive, environment, fingerprint, gather, main, mine, option,
                 parse, progress, rank, read_json, read_jsonl, write_atomic, write_json, write_jsonl)
from sample import TEMPLATE_DATE, Sample, Tokenizer, generate

SYSTEMS = ("default", "prompted", "trained")


# -------------------------------------------------------------------------------- statistics

def bootstrap(values: np.ndarray, clusters: list[str], draws: int = 10_000, seed: int = 0) -> dict:
    """Mean of `values` and its 95% percentile interval, resampling whole clusters (prompts); NaN is left out.

    Rows that share a prompt are not independent: resampling rows would make the interval too narrow.
    """
    keep = ~np.isnan(values)
    if not keep.any():
        return dict(mean=None, low=None, high=None, n=0)
    names, index = np.unique(np.asarray(clusters)[keep], return_inverse=True)
    sums = np.bincount(index, weights=values[keep], minlength=len(names))  # (clusters,)
    counts = np.bincount(index, minlength=len(names))  # (clusters,)
    share = np.full(len(names), 1 / len(names))
    weights = np.random.default_rng(seed).multinomial(len(names), share, size=draws)  # (draws, clusters)
    low, high = np.percentile(weights @ sums / (weights @ counts), [2.5, 97.5])
    return dict(mean=float(values[keep].mean()), low=float(low), high=float(high), n=int(keep.sum()))


def wilson(values: np.ndarray) -> dict:
    """The mean of 0/1 values and Wilson's 95% interval; NaN is left out."""
    values = values[~np.isnan(values)]
    n = len(values)
    if not n:
        return dict(mean=None, low=None, high=None, n=0)
    p, z2 = float(values.mean()), 1.959964**2
    centre, half = p + z2 / (2 * n), math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
    return dict(mean=p, low=(centre - half) / (1 + z2 / n), high=(centre + half) / (1 + z2 / n), n=n)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p of McNemar's test of two 0/1 vectors over the same rows: of the rows where they
    differ, either is as likely to be the right one."""
    better, worse = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    tail = sum(math.comb(better + worse, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2 ** (better + worse))


def length_controlled(outcomes: np.ndarray, longer: np.ndarray) -> float | None:
    """The win rate at equal length: sigmoid(a) of a logistic fit, P(win) = sigmoid(a + b tanh(longer / std)).

    outcomes in 0..1 (1/2 is a tie), longer: how much longer our text is. The reduced model of AlpacaEval 2
    (Dubois et al., 2024), by Newton's method; a small penalty on b keeps it finite.
    """
    keep = ~np.isnan(outcomes)
    y, x = outcomes[keep], longer[keep]
    if len(y) < 2:
        return None
    features = np.stack([np.ones(len(y)), np.tanh(x / (x.std() or 1))], axis=1)  # (rows, 2)
    w, penalty = np.zeros(2), np.diag([1e-6, 1e-2])
    for _ in range(50):
        p = 1 / (1 + np.exp(-features @ w))  # (rows,)
        hessian = (features * (p * (1 - p))[:, None]).T @ features + penalty  # (2, 2)
        step = np.linalg.solve(hessian, features.T @ (y - p) - penalty @ w)
        w += np.clip(step, -2, 2)
    return float(1 / (1 + np.exp(-w[0])))


# -------------------------------------------------------------------------------- text quality

def words(text: str) -> list[str]:
    """Lower-cased words and single punctuation marks: the tokens of distinct-2 and self-BLEU."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(tokens: list[str], n: int) -> Counter:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct(texts: list[list[str]], n: int = 2) -> float:
    """Different n-grams over all n-grams, of all texts together."""
    counts = sum((ngrams(t, n) for t in texts), Counter())
    return len(counts) / max(1, counts.total())


def self_bleu(texts: list[list[str]]) -> float:
    """Mean BLEU-4 of each text against all others as references (Zhu et al., 2018); higher is less diverse.

    Precisions of n > 1 are smoothed by adding one to both counts (Lin and Och, 2004), so that a text without
    a common 4-gram is not 0 whatever else it shares; brevity penalty against the reference closest in length.
    """
    precision = np.zeros((len(texts), 4))
    for n in range(1, 5):
        counts = [ngrams(t, n) for t in texts]
        best: dict[tuple, tuple[int, int, int]] = {}  # n-gram -> highest count, whose, highest elsewhere
        for i, count in enumerate(counts):
            for gram, c in count.items():
                first, who, second = best.get(gram, (0, -1, 0))
                best[gram] = (c, i, first) if c > first else (first, who, max(second, c))
        for i, count in enumerate(counts):
            clipped = sum(min(c, best[g][2] if best[g][1] == i else best[g][0]) for g, c in count.items())
            add = int(n > 1)
            precision[i, n - 1] = (clipped + add) / max(1, count.total() + add)
    lengths = [len(t) for t in texts]
    scores = []
    for i, p in enumerate(precision):
        others = lengths[:i] + lengths[i + 1 :]
        closest = min(others, key=lambda r: (abs(r - lengths[i]), r))
        penalty = min(1.0, math.exp(1 - closest / max(1, lengths[i])))
        scores.append(penalty * math.exp(sum(map(math.log, p)) / 4) if p.all() else 0.0)
    return float(np.mean(scores))


def diversity(texts: list[str], prompts: list[str], draws: int = 5) -> dict:
    """distinct-2 and self-BLEU-4 of one response a prompt, mean over `draws` seeded choices of the rows.

    The choices are the same for every system, and no two responses answer one prompt, so all systems compare.
    """
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    if len(rows) < 2:
        return dict(distinct_2=None, self_bleu_4=None)
    tokens = [words(t) for t in texts]
    values = []
    for draw in range(draws):
        generator = np.random.default_rng(derive("diversity", draw))
        subset = [tokens[generator.choice(r)] for r in rows.values()]
        values.append((distinct(subset), self_bleu(subset)))
    d, b = np.mean(values, axis=0)
    return dict(distinct_2=float(d), self_bleu_4=float(b))


# -------------------------------------------------------------------------------- responses

@dataclass
class Response:
    """One system's answer to one example, with what the base model says of it (summed over its tokens)."""

    text: str
    ids: list[int]
    finished: bool
    logp: float  # log pi_ref(y | the prompt it answered)
    gain: float  # log pi_ref(y|x,c) - log pi_ref(y|x); NaN without context or for `default`
    prompt_gain: float = math.nan  # log pi_ref(y|x,c) - log pi_ref(y|x',c), x' another prompt
    entropy: float = math.nan  # over the answer letters, after the model's own reasoning, in nats
    choice_mi: float = math.nan  # 1 where the model's choice by mutual information is right, 0 where not
    scores: dict[str, float] = field(default_factory=dict)  # judge -> its mean score of the context's items
    against: dict[str, float] = field(default_factory=dict)  # judge -> its mean score of the reference


SCORED = ("ids", "finished", "logp", "gain", "prompt_gain")  # what responses.jsonl says beside the text;
MEASURED, JUDGED = ("entropy", "choice_mi"), ("scores", "against")  # and where there is something to say


def answer(model: Decoder, tokenizer: Tokenizer, turns: list[str], args: DataArgs, name: str) -> list[Sample]:
    """One response to every user turn. Row i draws from (seed, i, 0), the same numbers for every system."""
    share = mine(list(enumerate(turns)))
    bar = progress(len(share), "responses", name)
    samples = generate(model, [tokenizer.chat(t) for _, t in share], sampling_for(args), tokenizer.stop_ids,
                       args.seed, [(i, 0) for i, _ in share], args.slots, bar)
    bar.close()
    return gather(samples)


def respond(base: Decoder, trained: Decoder | None, tokenizer: Tokenizer, examples: list[Example],
            args: DataArgs, known: dict[str, list[Response]] | None = None) -> dict[str, list[Response]]:
    """Every system's responses to every example, scored by the base model; `default`: one a prompt.

    known: the base model's responses, where an earlier evaluation has them.
    """
    bare = {e.prompt: e.turn(None) for e in examples}  # a turn without context for every prompt
    prompts, turns = list(bare), [e.turn(e.context) for e in examples]
    with_contexts = any(e.context for e in examples)
    # Scored by the base model after the right prompt, after x without c, and after another x with c;
    # `default`, which has no c, once a prompt.
    elsewhere = dict(zip(prompts, prompts[1:] + prompts[:1], strict=True))
    swapped = [dataclasses.replace(e, prompt=elsewhere[e.prompt]).turn(e.context) for e in examples]
    samples, passes = {}, []
    if not known:
        samples["default"] = answer(base, tokenizer, list(bare.values()), args, "default")
        answers = [[s.ids] for s in samples["default"]]
        passes += [(bare.values(), answers), ([bare[elsewhere[p]] for p in prompts], answers)]
        if with_contexts:
            samples["prompted"] = answer(base, tokenizer, turns, args, "prompted")
    if trained is not None:
        samples["trained"] = answer(trained, tokenizer, turns, args, "trained")
    others = [system for system in samples if system != "default"]
    drawn = [[samples[system][i].ids for system in others] for i in range(len(examples))]
    if others:
        passes += [(turns, drawn), (swapped, drawn)]
        if with_contexts:
            passes.append(([bare[e.prompt] for e in examples], drawn))
    groups = [mine([(tokenizer.chat(t), r) for t, r in zip(*pair, strict=True)]) for pair in passes]
    bar = progress(sum(map(len, groups)), "passes", "scoring under the base model")
    logps = [np.array(gather(sequence_logps(base, g, bar=bar))) for g in groups]  # (rows, systems) a pass
    bar.close()

    def scored(sample: Sample, logp: float, gain: float, prompt_gain: float) -> Response:
        text = tokenizer.decode(sample.ids)
        return Response(text, sample.ids, sample.finished, float(logp), float(gain), float(prompt_gain))

    responses = dict(known or {})
    if not known:
        right, wrong = (logps.pop(0)[:, 0] for _ in range(2))
        position = {prompt: i for i, prompt in enumerate(prompts)}
        responses["default"] = [scored(samples["default"][i], right[i], math.nan, right[i] - wrong[i])
                                for i in (position[e.prompt] for e in examples)]
    for column, system in enumerate(others):
        right, wrong, *without = (p[:, column] for p in logps)
        gains = np.where([bool(e.context) for e in examples], right - (without or [right])[0], np.nan)
        columns = (samples[system], right, gains, right - wrong)
        responses[system] = [scored(*row) for row in zip(*columns, strict=True)]
    if examples[0].choices:
        for system in samples:
            choice_measures(trained if system == "trained" else base, tokenizer, examples, responses[system])
    return responses


def choice_measures(model: Decoder, tokenizer: Tokenizer, examples: list[Example],
                    responses: list[Response]) -> None:
    """Fill in, for multiple-choice questions, what the model that gave the responses makes of the choices.

    entropy (Figs. 4, 5): of the softmax over the letters' log-probs after the response up to and including
    "The answer is:"; none where it does not say that. choice_mi: whether the choice with the greatest
    log p(text|question) - log p(text) is the right one.
    """
    def logps(prompts: list[str], starts: list[str], ends: list[list[str]], label: str) -> list[list[float]]:
        groups = [(tokenizer.chat(p) + tokenizer.response(start)[:-1] * bool(start),
                   [tokenizer.response(text)[:-1] for text in texts])
                  for p, start, texts in zip(prompts, starts, ends, strict=True)]
        bar = progress(len(mine(groups)), "questions", label)
        sums = gather(sequence_logps(model, mine(groups), bar=bar))
        bar.close()
        return sums

    letters = [[f" {letter}" for letter in LETTERS[: len(e.choices)]] for e in examples]
    said = [re.search(r"(?is).*the answer is:", r.text) for r in responses]
    rows = [i for i, m in enumerate(said) if m]
    found = logps([examples[i].turn(None) for i in rows], [said[i].group() for i in rows],
                  [letters[i] for i in rows], "letters")
    for i, values in zip(rows, found, strict=True):
        p = np.exp(np.array(values) - np.logaddexp.reduce(values))
        responses[i].entropy = float(-(p * np.log(np.maximum(p, 1e-300))).sum())
    questions = [e.prompt.rsplit("\n", len(e.choices))[0] for e in examples]
    empty, choices = [""] * len(examples), [e.choices for e in examples]
    given = logps([f"Question: {q}\nAnswer:" for q in questions], empty, choices, "choices")
    alone = logps(["Answer:"] * len(examples), empty, choices, "choices alone")
    for e, r, a, b in zip(examples, responses, given, alone, strict=True):
        r.choice_mi = float(LETTERS[int(np.argmax(np.subtract(a, b)))] == e.answer)


def reuse(folder: Path, name: str, settings: dict, examples: list[Example],
          trained: bool) -> dict[str, list[Response]]:
    """The base model's responses of an earlier evaluation, which must have been made with these settings;
    with `trained` the trained model's too."""
    made = read_json(folder / f"eval{name}.json").get("settings", {})
    for key, value in settings.items():
        if made.get(key) != value:
            raise UserError(f"--reuse {folder}: made with {key} {made.get(key)!r}, not {value!r}")
    found: dict[str, list[Response]] = {}
    for _, row in read_jsonl(folder / f"responses{name}.jsonl"):
        if trained or row["system"] != "trained":
            scored = (math.nan if row.get(key) is None else row[key] for key in (*SCORED, *MEASURED))
            judged = [{judge: math.nan if v is None else v for judge, v in row.get(key, {}).items()}
                      for key in JUDGED]
            found.setdefault(row["system"], []).append(Response(row["response"], *scored, *judged))
    if not found or any(len(rows) != len(examples) for rows in found.values()):
        raise UserError(f"{folder / f'responses{name}.jsonl'} does not hold {len(examples)} rows a system")
    return found


# -------------------------------------------------------------------------------- judging

def judge_scores(judge: Judge, examples: list[Example], texts: list[str | None],
                 label: str) -> tuple[list[float], int]:
    """The judge's mean score over the items of each row's context, and how many replies it could not read.

    NaN where the row has no text or no reply of its items was readable: what can't be read is not scored.
    """
    rows = [(i, item) for i, (e, text) in enumerate(zip(examples, texts, strict=True))
            if text is not None for item in e.items or [e.context]]
    verdicts = judging.score(judge, [(examples[i].prompt, texts[i], item) for i, item in rows], label)
    read: list[list[int]] = [[] for _ in examples]
    for (i, _), verdict in zip(rows, verdicts, strict=True):
        if verdict is not None:
            read[i].append(verdict)
    return [float(np.mean(v)) if v else math.nan for v in read], sum(v is None for v in verdicts)


def judge_all(judge: Judge, examples: list[Example], responses: dict[str, list[Response]],
              write_rubrics: bool) -> dict:
    """Have one judge score every system's responses and the references (Table 1), the responses people did
    not prefer (Table 7), and compare the trained model's responses with prompting's (Fig. 3).

    The scores are put into the responses; returned are the judge's own numbers for eval.json.
    """
    name, clusters = judge.args.judge, [cluster(e) for e in examples]
    against, lost = judge_scores(judge, examples, [e.reference for e in examples], "reference")
    result: dict = dict(unread=dict(reference=lost))
    for system, some in responses.items():
        scores, result["unread"][system] = judge_scores(judge, examples, [r.text for r in some], system)
        for r, score, other in zip(some, scores, against, strict=True):
            r.scores[name], r.against[name] = score, other
    if any(e.worse for e in examples):
        worse, result["unread"]["worse"] = judge_scores(judge, examples, [e.worse for e in examples], "worse")
        gap = np.subtract(against, worse)
        result["critic"] = {key: bootstrap(np.where(np.isnan(gap), np.nan, right), clusters)
                            for key, right in (("strict", gap > 0), ("tie_tolerant", gap >= 0))}
    if "trained" in responses and "prompted" in responses:
        ask = [e.context for e in examples]
        written = judging.rubrics(judge, ask) if write_rubrics else [None] * len(ask)
        criteria = [e.rubric or rubric or f"Does the response respect this preference of the user: {c}"
                    for e, rubric, c in zip(examples, written, ask, strict=True)]
        ours, theirs = ([r.text for r in responses[system]] for system in ("trained", "prompted"))
        verdicts = judging.compare(judge, list(zip(criteria, ours, theirs, strict=True)))
        outcome = np.array([np.nan if v is None else v for v, _ in verdicts])
        longer = np.array([len(a) - len(b) for a, b in zip(ours, theirs, strict=True)], dtype=float)
        counts = {key: int((outcome == v).sum()) for key, v in (("wins", 1), ("ties", 0.5), ("losses", 0))}
        result["pairwise"] = dict(
            win_rate=bootstrap(outcome, clusters), **counts, unread=int(np.isnan(outcome).sum()),
            flip_rate=sum(flipped for _, flipped in verdicts) / max(1, sum(counts.values())),
            flip_interval=wilson(np.array([float(flip) for won, flip in verdicts if won is not None])),
            length_controlled=length_controlled(outcome, longer),
            rubrics_unread=sum(r is None for r in written) if write_rubrics else None)
    return result


# -------------------------------------------------------------------------------- tables

def cluster(e: Example) -> str:
    """What rows are resampled together: all of a user's, else all of a prompt's."""
    return e.user or e.prompt


def is_task(e: Example) -> bool:
    """Whether a response has a right final answer."""
    return e.answer is not None and e.style in ("math", "choice")


def wins(examples: list[Example], responses: list[Response], judge: str = "") -> np.ndarray:
    """1 where a response is right: honours its context's check, gives the answer or, with a judge, scores no
    less than the reference; 0 where not, NaN where there is nothing to tell. (rows,)"""
    if judge:
        score, other = scores_of(responses, judge)
        return np.where(np.isnan(score - other), np.nan, score >= other)
    checked = (verify(e, r.text) for e, r in zip(examples, responses, strict=True))
    return np.array([np.nan if right is None else float(right) for right in checked])


def scores_of(responses: list[Response], judge: str) -> tuple[np.ndarray, np.ndarray]:
    """A judge's scores of the responses and of the references they are compared with. (rows,) each"""
    scores, against = (np.array([getattr(r, key).get(judge, math.nan) for r in responses])
                       for key in JUDGED)
    return scores, against


def elsewhere(examples: list[Example], responses: list[Response]) -> float | None:
    """The share of the other contexts' checks that a response passes: no gain if this rises as much."""
    checks = {e.context_id: e.check for e in examples if e.check}
    hits = [honours(check, r.text) for e, r in zip(examples, responses, strict=True)
            for context_id, check in checks.items() if context_id != e.context_id]
    return float(np.mean(hits)) if hits else None


def system_row(examples: list[Example], responses: list[Response], judge: str = "") -> dict:
    """Win rate and quality columns of one system, and the columns that these data have beside them."""
    prompts, clusters = [e.prompt for e in examples], [cluster(e) for e in examples]
    tokens, won = np.array([len(r.ids) for r in responses]), wins(examples, responses, judge)
    more: dict = {}
    if is_task(examples[0]):
        strict, loose = ([extract(e.style, r.text, len(e.choices or ()), flexible)
                          for e, r in zip(examples, responses, strict=True)] for flexible in (False, True))
        hits = [float(answer == e.answer) for e, answer in zip(examples, loose, strict=True)]
        more = dict(flexible=wilson(np.array(hits)), unparsed=strict.count(None) / len(strict),
                    unparsed_flexible=loose.count(None) / len(loose),
                    unparsed_interval=wilson(np.array([float(x is None) for x in strict])))
    if examples[0].choices:
        entropy = np.array([r.entropy for r in responses])
        more |= dict(choice_mi=wilson(np.array([r.choice_mi for r in responses])),
                     entropy_right=bootstrap(np.where(won == 1, entropy, np.nan), clusters),
                     entropy_wrong=bootstrap(np.where(won == 0, entropy, np.nan), clusters))
    if judge:
        score, other = scores_of(responses, judge)
        known, others = ~np.isnan(score - other), [len(e.reference or "") for e in examples]
        longer = np.array([len(r.text) for r in responses]) - np.array(others, dtype=float)
        more |= dict(score=bootstrap(score, clusters), length_controlled=length_controlled(won, longer),
                     strict=bootstrap(np.where(known, score > other, np.nan), clusters),
                     ties=float(np.mean(score[known] == other[known])) if known.any() else None)
    return dict(
        win_rate=wilson(won) if is_task(examples[0]) else bootstrap(won, clusters),
        elsewhere=elsewhere(examples, responses),
        tokens=float(tokens.mean()), unfinished=float(np.mean([not r.finished for r in responses])),
        nll_per_token=float(-sum(r.logp for r in responses) / tokens.sum()),
        context_gain=bootstrap(np.array([r.gain for r in responses]), clusters),
        prompt_gain=float(np.mean([r.prompt_gain for r in responses])),
        tokens_interval=bootstrap(tokens.astype(float), clusters),
        unfinished_interval=wilson(np.array([float(not r.finished) for r in responses])),
        prompt_gain_interval=bootstrap(np.array([r.prompt_gain for r in responses]), clusters),
        **diversity([r.text for r in responses], prompts), **more,
    )  # fmt: skip


def compare(examples: list[Example], ours: list[Response], theirs: list[Response], judge: str = "") -> dict:
    """Paired differences, ours - theirs: win rate, in all and among rows of matched length, context gain, and
    with a judge its score."""
    clusters = [cluster(e) for e in examples]
    won, lost = wins(examples, ours, judge), wins(examples, theirs, judge)
    a, b = (np.array([len(r.ids) for r in system]) for system in (ours, theirs))
    matched = np.minimum(a, b) >= 0.8 * np.maximum(a, b)  # lengths within 20% of each other
    gain_a, gain_b = (np.array([r.gain for r in system]) for system in (ours, theirs))
    score = scores_of(ours, judge)[0] - scores_of(theirs, judge)[0]
    return dict(win_rate=bootstrap(won - lost, clusters),
                win_rate_length_matched=bootstrap(np.where(matched, won - lost, np.nan), clusters),
                context_gain=bootstrap(gain_a - gain_b, clusters),
                context_gain_per_token=bootstrap(gain_a / a - gain_b / b, clusters),
                mcnemar_p=mcnemar(won, lost) if is_task(examples[0]) else None,
                score=bootstrap(score, clusters))


def evaluate(examples: list[Example], responses: dict[str, list[Response]], judge: str = "") -> dict:
    """All numbers of eval.json: systems and differences of each part (all, seen, unseen), each context.

    judge: whose scores decide the win rate, in data that have neither checks nor answers.
    """
    parts = {"all": range(len(examples))}
    for group in sorted({e.group for e in examples if e.group}):
        parts[group] = [i for i, e in enumerate(examples) if e.group == group]
    result: dict = dict(parts={}, contexts=[])
    for part, rows in parts.items():
        some = [examples[i] for i in rows]
        chosen = {system: [r[i] for i in rows] for system, r in responses.items()}
        result["parts"][part] = dict(systems={s: system_row(some, r, judge) for s, r in chosen.items()})
        order = [s for s in SYSTEMS if s in chosen]
        result["parts"][part]["differences"] = {
            f"{a} - {b}": compare(some, chosen[a], chosen[b], judge)
            for b, a in itertools.pairwise(order)}
    for _, context in sorted({(e.group, e.context_id) for e in examples if e.check}, key=str):
        rows = [i for i, e in enumerate(examples) if e.context_id == context]
        first, some = examples[rows[0]], [examples[i] for i in rows]
        rates = {s: float(wins(some, [r[i] for i in rows]).mean()) for s, r in responses.items()}
        result["contexts"].append(dict(context_id=context, group=first.group, check=first.check, n=len(rows),
                                       context=first.context, **rates))
    return result


def value(row: dict, key: str) -> float | None:
    """A measurement of a system, which may have an interval, or not be there."""
    return found["mean"] if isinstance(found := row.get(key), dict) else found


def shown(v: dict, form: str, scale: float = 1) -> str:
    """63.1 [58.0, 68.2]: a mean with its interval; - where there is none."""
    if v["mean"] is None:
        return "-"
    mean, low, high = (format(scale * v[key], form) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


QUALITY = (  # heading, key, format; shown where a system has it
    ("flexible", "flexible", ".1%"), ("unparsed", "unparsed", ".1%"), ("by MI", "choice_mi", ".1%"),
    ("score", "score", ".2f"), ("strict wins", "strict", ".1%"), ("ties", "ties", ".1%"),
    ("at equal len", "length_controlled", ".1%"), ("elsewhere", "elsewhere", ".1%"),
    ("tokens", "tokens", ".1f"), ("unfinished", "unfinished", ".0%"), ("base nll", "nll_per_token", ".3f"),
    ("distinct-2", "distinct_2", ".3f"), ("self-BLEU-4", "self_bleu_4", ".3f"),
    ("prompt gain", "prompt_gain", ".1f"),
)


def table(result: dict) -> str:
    """The printed summary: one block of systems a part, its differences, then judges and every context."""
    lines = []
    for part, block in result["parts"].items():
        title = "all" if part == "all" else f"{part} contexts"
        rows = block["systems"].values()
        columns = [c for c in QUALITY if any(value(s, c[1]) is not None for s in rows)]
        lines += ["", f"{title:12} {'win rate %':>19} {'context gain, nats':>22} "
                  + " ".join(f"{name:>12}" for name, _, _ in columns)]
        for system, s in block["systems"].items():
            quality = ["-" if value(s, key) is None else format(value(s, key), form)
                       for _, key, form in columns]
            rate, gain = shown(s["win_rate"], ".1f", 100), shown(s["context_gain"], ".2f")
            lines.append(f"{system:12} {rate:>19} {gain:>22} " + " ".join(f"{v:>12}" for v in quality))
        for name, d in block["differences"].items():
            matched = d["win_rate_length_matched"]
            rate, even = (shown(v, "+.1f", 100) for v in (d["win_rate"], matched))
            gain, per_token = shown(d["context_gain"], "+.2f"), shown(d["context_gain_per_token"], "+.3f")
            test = "" if d["mcnemar_p"] is None else f" (McNemar p {d['mcnemar_p']:.2g})"
            score = f"; score {shown(d['score'], '+.2f')}" if d["score"]["n"] else ""
            lines.append(f"{name}: win rate {rate}{test}, at matched length {even} (n = {matched['n']})"
                         f"{score}; context gain {gain}, per token {per_token}")
        for system, s in block["systems"].items():
            if "entropy_right" in s:
                right, wrong = (shown(s[f"entropy_{side}"], ".2f") for side in ("right", "wrong"))
                lines.append(f"{system}: entropy over the letters, nats: {right} if right, {wrong} if wrong")
    for name, j in result.get("judges", {}).items():
        unread = ", ".join(f"{n} of {k}" for k, n in j["unread"].items() if n) or "none"
        lines += ["", f"judge {name}: replies it could not be read from: {unread}"]
        if "critic" in j:
            lines.append(f"  agrees with people: strictly {shown(j['critic']['strict'], '.1f', 100)}%, ties "
                         f"allowed {shown(j['critic']['tie_tolerant'], '.1f', 100)}%")
        if p := j.get("pairwise"):
            level = "-" if p["length_controlled"] is None else f"{p['length_controlled']:.1%}"
            counts = ", ".join(f"{p[key]} {key}" for key in ("wins", "ties", "losses", "unread"))
            lines.append(f"  trained against prompted: {shown(p['win_rate'], '.1f', 100)}% ({counts}; "
                         f"{p['flip_rate']:.0%} flip with the order), at equal length {level}")
    if result["contexts"]:
        lines += ["", "each context, share honoured"]
    for c in result["contexts"]:
        rates = "  ".join(f"{s} {c[s]:4.0%}" for s in SYSTEMS if s in c)
        lines.append(f"  {c['context_id']} {c['group']:6} {rates}  {c['context'][:90]}")
    return "\n".join(lines)


def side_by_side(examples: list[Example], responses: dict[str, list[Response]], judge: str = "",
                 count: int = 3) -> str:
    """Some prompts with the answers of prompting and of training: `count` gains, and one still wrong."""
    base = "prompted" if "prompted" in responses else "default"
    before, after = wins(examples, responses[base], judge), wins(examples, responses["trained"], judge)
    order = np.random.default_rng(derive("examples")).permutation(len(examples))
    gained = [i for i in order if before[i] == 0 and after[i] == 1][:count]
    failed = [i for i in order if after[i] == 0][:1]
    lines = []
    for i in [*gained, *failed]:
        e = examples[i]
        told = f" [{e.context}]" if e.context else ""
        lines += ["", f"{e.prompt}{told}", f"  {base + ':':9} {responses[base][i].text!r}",
                  f"  trained:  {responses['trained'][i].text!r}" + " (still wrong)" * (i in failed)]
    return "\n".join(lines)


# -------------------------------------------------------------------------------- figures

def pyplot():
    """matplotlib's, without a screen; imported here, because that is slow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def learning_curve(folder: Path, candidate: int = 0) -> None:
    """metrics.jsonl -> learning_curve.png: prediction accuracies (the paper's Fig. 2), rewards, margin, loss.

    Faint points are steps, lines their running mean over a twentieth of the run.
    """
    plt = pyplot()
    steps = [row for _, row in read_jsonl(folder / "metrics.jsonl")
             if row["candidate"] == candidate and "loss" in row]
    panels = [("prediction accuracy", dict(accuracy_chosen="chosen: reward > 0", accuracy="chosen > rejected",
                                           accuracy_rejected="rejected: reward < 0")),
              ("reward, nats", dict(reward_chosen="chosen", margin="margin", reward_rejected="rejected")),
              ("loss", dict(loss="loss"))]
    panels = [(title, lines) for title, lines in panels if set(lines) <= steps[0].keys()]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained",
                                squeeze=False)
    width = max(1, len(steps) // 20)
    for axis, (title, lines) in zip(axes[0], panels, strict=True):
        for (key, label), colour in zip(lines.items(), ("tab:blue", "tab:gray", "tab:red"), strict=False):
            values = np.array([s[key] for s in steps])
            x = [s["step"] for s in steps]
            smooth = np.convolve(values, np.ones(width) / width, "valid")  # (steps - width + 1,)
            axis.plot(x, values, ".", color=colour, alpha=0.2, markersize=3)
            axis.plot(x[width - 1 :], smooth, color=colour, label=label)
        axis.set(title=title, xlabel="step")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize="x-small",
                    frameon=False)
    figure.savefig(folder / "learning_curve.png", dpi=150)
    plt.close(figure)


def outcome_figure(folder: Path, name: str, result: dict, examples: list[Example],
                   responses: dict[str, list[Response]]) -> None:
    """judges.png: each judge's wins, ties and losses of trained against prompted responses (Fig. 3), and
    entropy.png: the entropy over the answer letters where right and where wrong (Figs. 4, 5)."""
    plt = pyplot()
    outcomes = ("wins", "ties", "losses")
    judged = {}
    for judge, verdicts in result.get("judges", {}).items():
        if n := sum(verdicts.get("pairwise", {}).get(key, 0) for key in outcomes):
            judged[f"{Path(judge).name} (n = {n})"] = verdicts["pairwise"]
    if judged:
        figure, axis = plt.subplots(figsize=(6.4, 1.2 + 0.5 * len(judged)), layout="constrained")
        for y, p in enumerate(judged.values()):
            left = 0.0
            for key, colour in zip(outcomes, ("tab:blue", "lightgray", "tab:orange"), strict=True):
                share = 100 * p[key] / sum(p[key] for key in outcomes)
                axis.barh(y, share, left=left, color=colour, label=key if y == 0 else None)
                if share >= 4:
                    axis.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center", fontsize="small")
                left += share
        axis.set(yticks=range(len(judged)), yticklabels=judged, xlim=(0, 100),
                 xlabel="% of the rows, both orders", title="trained against personalised prompting")
        axis.invert_yaxis()
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
        figure.savefig(folder / f"judges{name}.png", dpi=150)
        plt.close(figure)
    if examples[0].choices:
        figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained", sharex=True)
        bins = np.linspace(0, math.log(max(len(e.choices) for e in examples)), 21)
        for axis, right in zip(axes, (1, 0), strict=True):
            for system, colour in (("default", "tab:orange"), ("trained", "tab:blue")):
                if system in responses:
                    won = wins(examples, responses[system])
                    values = np.array([r.entropy for r in responses[system]])
                    values = values[(won == right) & ~np.isnan(values)]
                    axis.hist(values, bins, alpha=0.5, color=colour, label=f"{system} (n = {len(values)})")
                    if len(values):
                        axis.axvline(values.mean(), color=colour)
            axis.set(title="right answers" if right else "wrong answers", xlabel="entropy, nats",
                     ylabel="responses")
            axis.legend(frameon=False, fontsize="small")
        figure.savefig(folder / f"entropy{name}.png", dpi=150)
        plt.close(figure)


# -------------------------------------------------------------------------------- report

def strategy(arguments: dict) -> str:
    """A run's row in the paper's tables: its method and, of DPO, where rejected responses come from."""
    if arguments["method"] != "dpo":
        return arguments["method"]
    more = f" N={arguments['n_neg']}" if arguments["n_neg"] > 1 else ""
    return arguments["neg"] + more + " softmax" * arguments["softmax"]


def gather_runs(folders: list[str]) -> dict[str, dict[str, dict[str, list[dict]]]]:
    """Base model -> row -> data set -> what each run measured. Rows: default, prompted and the strategies.
    """
    found: dict = {}
    for folder in map(Path, folders):
        result, arguments = read_json(folder / "eval.json"), read_json(folder / "args.json")["arguments"]
        data = Path(arguments["data"].partition(":")[0]).stem
        on_validation = None
        if (f := folder / "summary.json").exists():
            on_validation = read_json(f).get("chosen", {}).get("score")
        if (f := folder / "eval-validation.json").exists():
            on_validation = read_json(f)["parts"]["all"]["systems"]["trained"]["win_rate"]["mean"]
        rows = found.setdefault(Path(arguments["model"]).name, {})
        for system, measured in result["parts"]["all"]["systems"].items():
            name, score = (strategy(arguments), on_validation) if system == "trained" else (system, None)
            rows.setdefault(name, {}).setdefault(data, []).append(
                measured | dict(validation=score, judges=result.get("judges", {})))
    return found


def best_strategy(rows: dict[str, dict[str, list[dict]]], data: str) -> str | None:
    """The strategy with the best mean score on validation, where there is a choice."""
    scores = {name: [run["validation"] for run in row.get(data, [])] for name, row in rows.items()}
    means = {name: np.mean(some) for name, some in scores.items() if some and None not in some}
    return max(means, key=means.get) if len(means) > 1 else None


def ordered(rows: dict) -> list[str]:
    """The rows of a table: the base model's, then the strategies."""
    return [*(s for s in SYSTEMS if s in rows), *sorted(rows.keys() - set(SYSTEMS))]


def entry(runs: list[dict], key: str, scale: float, form: str) -> str:
    """Mean +- standard deviation over seeds; of one seed its interval, if it has one."""
    values = [scale * v for run in runs if (v := value(run, key)) is not None]
    if not values:
        return "-"
    if len(values) > 1:
        return f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form}} ({len(values)} seeds)"
    return shown(runs[0][key], form, scale) if isinstance(runs[0][key], dict) else f"{values[0]:{form}}"


def report(folders: list[str], out: Path) -> str:
    """The paper's tables of some runs: a row for every method and negative strategy, mean +- std over seeds,
    the strategy that validation chose marked, the paper's own figure beside it; as Markdown and a figure."""
    paper, found = read_json(PAPER), gather_runs(folders)
    lines = ["Mean ± standard deviation over seeds, or of one seed the 95% interval; * is what validation "
             "chose; in parentheses at the end the paper's figure, where it has one."]
    for model, rows in found.items():
        data_sets = sorted({data for row in rows.values() for data in row})
        theirs = {key: paper[key].get(model, {}) for key in ("win_rate", "self_bleu_4")}
        for title, key, scale, form in (("win rate or accuracy, %", "win_rate", 100, ".1f"),
                                        ("self-BLEU-4", "self_bleu_4", 1, ".3f")):
            lines += ["", f"| {model}: {title} | " + " | ".join(data_sets) + " |",
                      "|---" * (1 + len(data_sets)) + "|"]
            for name in ordered(rows):
                cells = []
                for data in data_sets:
                    mark = "*" * (key == "win_rate" and best_strategy(rows, data) == name)
                    published = theirs[key].get(name, {}).get(data)
                    cells.append(entry(rows[name].get(data, []), key, scale, form) + mark
                                 + (f" ({published[0]:g})" if published else ""))
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        critics = {(Path(judge).name, data): verdicts["critic"] for row in rows.values()
                   for data, runs in row.items() for run in runs
                   for judge, verdicts in run["judges"].items() if "critic" in verdicts}
        if critics:
            lines += ["", "| judge | data | strict accuracy, % | tie-tolerant, % |", "|---" * 4 + "|"]
        for (judge, data), c in sorted(critics.items()):
            rates = (shown(c[key], ".1f", 100) for key in ("strict", "tie_tolerant"))
            lines.append(f"| {judge} | {data} | " + " | ".join(rates) + " |")
    out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    write_atomic(out / "report.md", text)
    report_figure(found, paper["win_rate"], out / "report.png")
    return text


def report_figure(found: dict, paper: dict, file: Path) -> None:
    """A panel for each model and data set: every row's win rate, its standard deviation over seeds or its
    interval, and the paper's figure (hollow)."""
    plt = pyplot()
    panels = [(model, data) for model, rows in found.items()
              for data in sorted({data for row in rows.values() for data in row})]
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 3.4 * len(panels), 3.4), layout="constrained",
                                squeeze=False)
    for axis, (model, data) in zip(axes[0], panels, strict=True):
        rows = found[model]
        names = [name for name in ordered(rows)
                 if any(value(run, "win_rate") is not None for run in rows[name].get(data, []))]
        for y, name in enumerate(names):
            rates = [100 * value(run, "win_rate") for run in rows[name][data]]
            mean, one = np.mean(rates), rows[name][data][0]["win_rate"]
            spread = ([np.std(rates, ddof=1)] * 2 if len(rates) > 1 else
                      [mean - 100 * one["low"], 100 * one["high"] - mean])
            axis.errorbar(mean, y, xerr=np.reshape(spread, (2, 1)), fmt="o", color="tab:blue", capsize=3)
            if published := paper.get(model, {}).get(name, {}).get(data):
                axis.plot(published[0], y, "o", markerfacecolor="none", color="gray", label="the paper")
        axis.set(yticks=range(len(names)), yticklabels=names, xlabel="win rate or accuracy, %")
        axis.set_title(f"{model}\n{data}", fontsize="small")
        axis.set_ylim(len(names) - 0.5, -0.5)
        if labelled := axis.get_legend_handles_labels()[0]:
            axis.legend(handles=labelled[:1], frameon=False, fontsize="small")
    figure.savefig(file, dpi=150)
    plt.close(figure)


# -------------------------------------------------------------------------------- command line

@dataclass
class Args(DataArgs):
    data: str | None = option(None, "demo, or a .jsonl file (default: what the run was trained on)", "data")
    date: str | None = option(None, "for chat templates that print one (default: the run's)", "sampling")
    split: str = option("test", "which part to evaluate on; choose settings on validation", "data", SPLITS)
    out: str = option("", "folder for responses.jsonl and eval.json (default: the run folder)", "data")
    reuse: str = option("", "folder of an evaluation whose base model's responses are taken; the run's own: "
                        "all its responses, to have them judged", "data")
    rubrics: bool = option(False, "let the judge write the criteria of its comparisons (D.2)", "judge")
    report: tuple = option((), "run folders: print and write the paper's tables of them", "data")

    def __post_init__(self):
        if not self.model and not self.report:
            raise UserError("usage: python eval.py --model RUN (or a bare model, with --out FOLDER)")
        super().__post_init__()


def evaluation(args: Args) -> None:
    """All that the file's first lines promise: responses, numbers, files and a table."""
    run = Path(args.model)
    if (run / "args.json").exists():
        if not (run / "model").is_dir():
            raise UserError(f"{run} is a run without a trained model: it has not finished")
        trained_with = read_json(run / "args.json")["arguments"]
        base_name, trained_name = trained_with["model"], run / "model"
        out = Path(args.out or run)
    else:
        find(args.model)
        base_name, trained_name, trained_with = args.model, None, {}
        if not args.out:
            raise UserError(f"{run} is a bare model, not a run: say where results go with --out FOLDER")
        out = Path(args.out)
    defaults = dict(data="demo", date=TEMPLATE_DATE, max_new_tokens=None) | trained_with
    for key in ("data", "date", "max_new_tokens"):
        if getattr(args, key) is None:
            setattr(args, key, defaults[key])
    sampling = sampling_for(args, evaluation=True)
    args.temperature, args.top_p = sampling.temperature, sampling.top_p
    judges = [Judge(dataclasses.replace(args, judge=name), args.slots, args.date)
              for name in args.judge.split(",") if name]
    # the run's seed made the split: another one would put training prompts into the test part; and its
    # contexts come from where training's came from, whoever judges
    source = dict(judge=args.judge.split(",")[0], model=base_name) | {
        key: trained_with[key] for key in ("seed", "contexts", "judge", "judge_url") if key in trained_with}
    examples = examples_for(dataclasses.replace(args, **source), args.split)
    if args.judge and not all(e.context for e in examples):
        raise UserError(f"--judge: {args.data} has rows without a context, and contexts are what is judged")
    settings = dict(model=base_name, split=args.split, examples=fingerprint([vars(e) for e in examples]),
                    seed=args.seed, sampling=dataclasses.asdict(sampling), date=args.date, dtype=args.dtype)
    name = "" if args.split == "test" else f"-{args.split}"
    if args.reuse and not trained_name:
        raise UserError(f"--reuse brings the base model's responses, and {run} is a bare model: none is left")
    again = bool(args.reuse) and Path(args.reuse).resolve() == run.resolve()
    known = reuse(Path(args.reuse), name, settings, examples, again) if args.reuse else None
    start = time.perf_counter()
    tokenizer = Tokenizer(base_name, args.date)
    dtype, device = getattr(torch, args.dtype), default_device()
    print(f"{len(examples)} {args.split} examples, {sampling}")
    if known and "trained" in known:
        responses = known
    else:
        trained = load(trained_name, dtype, device=device) if trained_name else None
        responses = respond(load(base_name, dtype, device=device), trained, tokenizer, examples, args, known)
        del trained  # room for a local judge
    judged = {j.args.judge: judge_all(j, examples, responses, args.rubrics) for j in judges}
    first = next(iter(judged), "") if verify(examples[0], "") is None else ""
    result = evaluate(examples, responses, first)
    result.update(settings=settings, arguments=dataclasses.asdict(args), run=trained_with, judges=judged,
                  data=note_of(dataclasses.replace(args, **source)), environment=environment())
    if again:  # other judges' verdicts stay
        result["judges"] = read_json(run / f"eval{name}.json").get("judges", {}) | judged
    result["seconds"] = round(time.perf_counter() - start, 1)
    out.mkdir(parents=True, exist_ok=True)

    def plain(value):
        return None if value != value else value  # JSON has no NaN

    write_jsonl(out / f"responses{name}.jsonl", (
        dict(id=e.id, prompt=e.prompt, context=e.context, response=r.text, system=system)
        | {key: plain(getattr(r, key)) for key in (*SCORED, *(MEASURED if e.choices else ()))}
        | {key: {j: plain(v) for j, v in getattr(r, key).items()} for key in JUDGED if r.scores}
        for system, drawn in responses.items() for e, r in zip(examples, drawn, strict=True)))
    write_json(out / f"eval{name}.json", result)
    if not rank():
        outcome_figure(out, name, result, examples, responses)
    print(table(result))
    if "trained" in responses:
        print(side_by_side(examples, responses, first))
    print(f"\n{result['seconds']:.0f} s; written: eval{name}.json and responses{name}.jsonl in {out}")


def program() -> None:
    args = parse(Args, usage=__doc__)
    if args.report:
        print(report(list(args.report), Path(args.out or "report")))
    else:
        evaluation(args)


if __name__ == "__main__":
    main(program)
