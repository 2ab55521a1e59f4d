"""eval.py - held-out prompts answered by three systems, and the numbers that compare them.

    default    y ~ pi_ref(.|x)         the base model without the context
    prompted   y ~ pi_ref(.|x, c)      the base model with it: the baseline MIPO has to beat (section 5.1)
    trained    y ~ pi_theta(.|x, c)    the trained model; in data without contexts it has to beat `default`

Win rate, the share of responses that
    honour the context, as a program checks                              demo data
    give the right final answer, strictly read                           Table 2: gsm8k, svamp, arc, mmlu
    get at least the reference's score from --judge                      Table 1: prism, community, multibench

Where the data allow it there are also self-BLEU-4 and distinct-2 (Tables 3, 4), the judge's own accuracy on
human preferences (Table 7), its comparisons of trained and prompted responses in both orders (Fig. 3), the
entropy over the answer letters (Figs. 4, 5), and accuracy by log p(choice|question) - log p(choice).
Differences are paired, row by row, and come first; those of accuracies have McNemar's exact test. Every
number has a 95% interval over users or prompts, in the demo over prompts and contexts crossed (measures.py,
`interval`).

A gain must not come from degenerate text. So there are the length, the unfinished share, the base model's
likelihood, the win rate at equal length, `off_target` (how often a response honours contexts that it was not
given) and `prompt_gain` (how much it depends on the question). The context gain of Eq. 14,
log pi_ref(y|x,c) - log pi_ref(y|x), is measured under the base model: under the trained one it can be gamed.

What differs from the paper: data with checks need no judge; intervals, paired differences and the columns
against degenerate text are added.

    python eval.py --model RUN [--judge JUDGE]     a bare model folder has only the first two systems
    python eval.py --report RUN RUN ...            the paper's tables over runs and seeds

Writes responses.jsonl, eval.json and figures to the run folder (or --out) and prints a table.
"""

import dataclasses
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import judge as judging
from checks import LETTERS, verify
from contexts import DataArgs, examples_for, note_of, sampling_for
from contexts import check as check_data
from data import SPLITS, Example, user_message
from judge import Judge
from losses import Group, sequence_logps
from measures import (RATE, Answer, Answers, evaluate, groups_of, interval, length_controlled, nan_where,
                      or_nan, wins)
from model import Decoder, find, load
from report import entropy_figure, gain_figure, judges_figure, report, table
from run import (UserError, default_device, default_dtype, environment, fingerprint, gather, main, option,
                 parse, progress, rank, read_json, read_jsonl, seed_from, shard, write_json, write_jsonl)
from sample import Sample, Sampling, generate
from tokenizer import TEMPLATE_DATE, Tokenizer

MEASURED = ("ids", "finished", "logp", "gain", "prompt_gain")  # columns of responses.jsonl beside the text,
OF_CHOICES = ("entropy", "choice_mi")  # those of multiple-choice questions,
JUDGED = ("scores", "reference_scores")  # and those of judged data


# ------------------------------------------------------------------------- responses

def respond(base: Decoder, trained: Decoder | None, tokenizer: Tokenizer, examples: list[Example],
            sampling: Sampling, seed: int, slots: int = 64, cached: Answers | None = None) -> Answers:
    """Every system's answer to every example, measured by the base model.

    trained: None leaves out the third system. slots: how many responses are sampled together. cached: the
    base model's answers of an earlier evaluation, which are then not sampled again.
    """
    without_context = {e.prompt: e.user_message(None) for e in examples}  # prompt -> what the user says
    prompts = list(without_context)
    other_prompt = dict(zip(prompts, prompts[1:] + prompts[:1], strict=True))

    def draw(model: Decoder, user_messages: list[str], label: str) -> list[Sample]:
        return sample_responses(model, tokenizer, user_messages, sampling, seed, slots, label)

    cached = cached or {}
    answers = dict(cached)
    if not cached:
        # `default` sees no context: one response a prompt stands beside all of the prompt's rows.
        own = list(without_context.values())
        other = [without_context[other_prompt[prompt]] for prompt in prompts]
        samples = dict(default=draw(base, own, "default"))
        measured = measured_answers(base, tokenizer, samples, own, other)["default"]
        answer_to = dict(zip(prompts, measured, strict=True))
        answers["default"] = [answer_to[e.prompt] for e in examples]

    own = [e.user_message(e.context) for e in examples]
    has_contexts = any(e.context for e in examples)
    samples = {}
    if has_contexts and not cached:
        samples["prompted"] = draw(base, own, "prompted")
    if trained is not None:
        samples["trained"] = draw(trained, own, "trained")
    if samples:
        other = [user_message(other_prompt[e.prompt], e.context, e.style) for e in examples]
        without = [without_context[e.prompt] for e in examples] if has_contexts else None
        answers |= measured_answers(base, tokenizer, samples, own, other, without)

    if examples[0].choices:
        for system in [system for system in answers if system not in cached]:
            model = trained if system == "trained" else base
            answers[system] = choice_measures(model, tokenizer, examples, answers[system])
    return answers


def sample_responses(model: Decoder, tokenizer: Tokenizer, user_messages: list[str], sampling: Sampling,
                     seed: int, slots: int, label: str) -> list[Sample]:
    """One response to every user message. Row i draws from (seed, i, 0), the same numbers for every system.
    """
    rows = shard(list(enumerate(user_messages)))
    prompts = [tokenizer.chat(message) for _, message in rows]
    keys = [(i, 0) for i, _ in rows]
    bar = progress(len(rows), "responses", label)
    samples = generate(model, prompts, sampling, tokenizer.stop_ids, seed, keys, slots, bar)
    bar.close()
    return gather(samples)


def measured_answers(base: Decoder, tokenizer: Tokenizer, samples: dict[str, list[Sample]], own: list[str],
                     other: list[str], without: list[str] | None = None) -> Answers:
    """Samples of some systems as answers, measured by the base model after three user messages a row.

    own: what the samples answer. other: the same with another prompt. without: the same without the context;
    None: no row has one. The context gain is NaN where there is no context to leave out.
    """
    ids = [[sample.ids for sample in row] for row in zip(*samples.values(), strict=True)]
    logps = logps_after(base, tokenizer, own, ids, "own prompt")  # (rows, systems)
    prompt_gains = logps - logps_after(base, tokenizer, other, ids, "another prompt")  # (rows, systems)
    gains = np.full(logps.shape, np.nan)  # (rows, systems)
    if without:
        gains = logps - logps_after(base, tokenizer, without, ids, "no context")
        gains[[a == b for a, b in zip(own, without, strict=True)]] = np.nan
    answers = {}
    for k, (system, drawn) in enumerate(samples.items()):
        numbers = np.stack([logps[:, k], gains[:, k], prompt_gains[:, k]], axis=1).tolist()  # (rows, 3)
        answers[system] = [Answer(tokenizer.decode(sample.ids), sample.ids, sample.finished, *row)
                           for sample, row in zip(drawn, numbers, strict=True)]
    return answers


def logps_after(model: Decoder, tokenizer: Tokenizer, user_messages: list[str],
                responses: list[list[list[int]]], label: str) -> np.ndarray:
    """log pi(response | user message), summed over tokens: (rows, responses a row).

    responses: the token ids of as many responses for every user message.
    """
    prompts = [tokenizer.chat(message) for message in user_messages]
    return np.array(group_logps(model, list(zip(prompts, responses, strict=True)), label))


def group_logps(model: Decoder, groups: list[Group], label: str) -> list[list[float]]:
    """log pi(response | prefix) of each response of each group; the processes share the groups."""
    share = shard(groups)
    bar = progress(len(share), "prompts", f"log-probs, {label}")
    logps = sequence_logps(model, share, bar=bar)
    bar.close()
    return gather(logps)


def choice_measures(model: Decoder, tokenizer: Tokenizer, examples: list[Example],
                    answers: list[Answer]) -> list[Answer]:
    """The answers to multiple-choice questions with what their model makes of the choices.

    entropy (Figs. 4, 5): of the softmax over the letters' log-probs after the response up to and including
    "The answer is:"; NaN where the response does not say that. choice_mi: whether the choice with the
    greatest log p(choice|question) - log p(choice) is the right one.
    """
    def encode(text: str) -> list[int]:
        return tokenizer.response(text)[:-1]  # without the end token: the text goes on

    rows, after_reasoning, after_question, after_nothing = [], [], [], []
    for i, (e, answer) in enumerate(zip(examples, answers, strict=True)):
        reasoning = re.search(r"(?is).*the answer is:", answer.text)
        if reasoning:
            letters = [encode(f" {letter}") for letter in LETTERS[: len(e.choices)]]
            prefix = tokenizer.chat(e.user_message(None)) + encode(reasoning.group())
            rows.append(i)
            after_reasoning.append((prefix, letters))
        question = e.prompt.rsplit("\n", len(e.choices))[0]  # the prompt's last lines are the choices
        choices = [encode(choice) for choice in e.choices]
        after_question.append((tokenizer.chat(f"Question: {question}\nAnswer:"), choices))
        after_nothing.append((tokenizer.chat("Answer:"), choices))

    entropies = np.full(len(examples), np.nan)
    for i, logps in zip(rows, group_logps(model, after_reasoning, "letters"), strict=True):
        p = np.exp(logps - np.logaddexp.reduce(logps))  # (choices,)
        entropies[i] = -(p * np.log(np.maximum(p, 1e-300))).sum()
    given = group_logps(model, after_question, "choices")
    alone = group_logps(model, after_nothing, "choices alone")
    measured = []
    for i, (e, answer) in enumerate(zip(examples, answers, strict=True)):
        choice = int(np.argmax(np.subtract(given[i], alone[i])))
        right = float(LETTERS[choice] == e.answer)
        measured.append(dataclasses.replace(answer, entropy=float(entropies[i]), choice_mi=right))
    return measured


def cached_answers(folder: Path, suffix: str, settings: dict, examples: list[Example],
                   with_trained: bool) -> Answers:
    """The base model's answers of an earlier evaluation, and if asked for the trained model's.

    Raises UserError where that evaluation had other settings, or its rows are not these examples.
    """
    earlier = read_json(folder / f"eval{suffix}.json").get("settings", {})
    for key, value in settings.items():
        if earlier.get(key) != value:
            raise UserError(f"--reuse {folder}: made with {key} {earlier.get(key)!r}, not {value!r}")
    answers: Answers = {}
    file = folder / f"responses{suffix}.jsonl"
    for _, row in read_jsonl(file):
        if row["system"] == "trained" and not with_trained:
            continue
        numbers = {key: or_nan(row.get(key)) for key in (*MEASURED, *OF_CHOICES)}
        scores = {key: {judge: or_nan(score) for judge, score in row.get(key, {}).items()} for key in JUDGED}
        answers.setdefault(row["system"], []).append(Answer(row["response"], **numbers, **scores))
    if not answers or any(len(rows) != len(examples) for rows in answers.values()):
        raise UserError(f"{file} does not hold {len(examples)} rows a system")
    return answers


def or_null(value):
    """A value for a JSON file, which has null for NaN."""
    return None if value != value else value  # only NaN differs from itself


# ------------------------------------------------------------------------- judging

def judge_all(judge: Judge, examples: list[Example], answers: Answers,
              write_rubrics: bool) -> tuple[Answers, dict]:
    """Let one judge score every answer and reference (Table 1), score what people rejected (Table 7), and
    compare the trained model's responses with prompting's (Fig. 3).

    Returns the answers with their scores, and the judge's own numbers for eval.json. Systems and references
    are compared on the items on which the judge could be read for all of them.
    """
    name = judge.args.judge
    texts = dict(reference=[e.reference for e in examples])
    texts |= {system: [answer.text for answer in rows] for system, rows in answers.items()}
    items = {label: item_scores(judge, examples, rows, label) for label, rows in texts.items()}
    means, shared = means_over_shared_items(items)
    scored: Answers = {}
    for system, rows in answers.items():
        scored[system] = [
            dataclasses.replace(answer, scores=answer.scores | {name: score},
                                reference_scores=answer.reference_scores | {name: reference})
            for answer, score, reference in zip(rows, means[system], means["reference"], strict=True)]
    asked = sum(len(e.items or [e.context]) for e in examples)
    verdicts: dict = dict(items=dict(asked=asked, shared=shared))

    if any(e.human_rejected for e in examples):
        rejected = [e.human_rejected for e in examples]
        items["human_rejected"] = item_scores(judge, examples, rejected, "human_rejected")
        pair, _ = means_over_shared_items({label: items[label] for label in ("reference", "human_rejected")})
        margin = np.subtract(pair["reference"], pair["human_rejected"])  # (rows,)
        groups = groups_of(examples)
        verdicts["critic"] = dict(
            strict=interval(nan_where(np.isnan(margin), margin > 0), **groups, bounds=RATE),
            tie_tolerant=interval(nan_where(np.isnan(margin), margin >= 0), **groups, bounds=RATE))
    verdicts["unread"] = {label: sum(math.isnan(score) for row in rows for score in row)
                          for label, rows in items.items()}
    if "trained" in answers and "prompted" in answers:
        verdicts["pairwise"] = compare_with_prompting(judge, examples, answers, write_rubrics)
    return scored, verdicts


def item_scores(judge: Judge, examples: list[Example], texts: list[str | None],
                label: str) -> list[list[float]]:
    """The judge's score of each text on each item of its row's context; none for a row without a text.

    NaN where the reply could not be read: what is unread is never scored.
    """
    questions = [(i, item) for i, e in enumerate(examples) if texts[i] is not None
                 for item in e.items or [e.context]]
    scores = judging.rate(judge, [(examples[i].prompt, texts[i], item) for i, item in questions], label)
    rows: list[list[float]] = [[] for _ in examples]
    for (i, _), score in zip(questions, scores, strict=True):
        rows[i].append(or_nan(score))
    return rows


def means_over_shared_items(items: dict[str, list[list[float]]]) -> tuple[dict[str, list[float]], int]:
    """Each row's mean score over the items that were read for all texts of the row; and how many those are.

    items: label -> of each row a score an item. Otherwise two texts' means would be of different questions,
    and the one whose hard questions went unread would win. NaN where a row has no such item, or no text.
    """
    means: dict[str, list[float]] = {label: [] for label in items}
    count = 0
    for rows in zip(*items.values(), strict=True):
        scores = np.array([row for row in rows if row])  # (texts, items)
        read = ~np.isnan(scores).any(axis=0)  # (items,)
        count += int(read.sum())
        for label, row in zip(items, rows, strict=True):
            means[label].append(float(np.mean(np.array(row)[read])) if row and read.any() else math.nan)
    return means, count


def compare_with_prompting(judge: Judge, examples: list[Example], answers: Answers,
                           write_rubrics: bool) -> dict:
    """The judge's comparison of trained and prompted responses, each pair in both orders (Fig. 3).

    The criterion is the example's rubric, else with write_rubrics one that the judge writes for the context,
    else whether the response respects the context.
    """
    contexts = [e.context for e in examples]
    written = judging.rubrics(judge, contexts) if write_rubrics else [None] * len(examples)
    criteria = [e.rubric or rubric or f"Does the response respect this preference of the user: {e.context}"
                for e, rubric in zip(examples, written, strict=True)]
    trained = [answer.text for answer in answers["trained"]]
    prompted = [answer.text for answer in answers["prompted"]]
    verdicts = judging.compare(judge, list(zip(criteria, trained, prompted, strict=True)))

    outcomes = np.array([or_nan(outcome) for outcome, _ in verdicts])  # (rows,) 1 win, 1/2 tie, 0 loss
    unread = np.isnan(outcomes)
    flips = nan_where(unread, np.array([float(flipped) for _, flipped in verdicts]))
    read, groups = int((~unread).sum()), groups_of(examples)
    longer = [float(len(a) - len(b)) for a, b in zip(trained, prompted, strict=True)]  # in characters
    return dict(
        win_rate=interval(outcomes, **groups, bounds=RATE),
        wins=int((outcomes == 1).sum()),
        ties=int((outcomes == 0.5).sum()),
        losses=int((outcomes == 0).sum()),
        unread=int(unread.sum()),
        flip_rate=float(np.nansum(flips)) / max(1, read),
        flip_interval=interval(flips, **groups, bounds=RATE),
        length_controlled=length_controlled(outcomes, np.array(longer)),
        rubrics_unread=written.count(None) if write_rubrics else None,
    )


# ------------------------------------------------------------------------- the program

@dataclass
class Args(DataArgs):
    data: str | None = option(None, "as train.py's --data (default: what the run was trained on)", "data")
    date: str | None = option(None, "for chat templates that print one (default: the run's)", "sampling")
    dtype: str | None = option(None, "arithmetic (default: the run's; float32 where it saved that)",
                               "sampling", ("bfloat16", "float32"))
    split: str = option("test", "which part to evaluate on; choose settings on validation", "data", SPLITS)
    out: str = option("", "folder for responses.jsonl and eval.json (default: the run folder)", "data")
    reuse: str = option("", "folder of an evaluation whose base model's responses are taken; the run's own: "
                        "all its responses, to have them judged", "data")
    rubrics: bool = option(False, "let the judge write the criteria of its comparisons (D.2)", "judge")
    report: tuple = option((), "run folders: print and write the paper's tables of them", "data")


def check(args: Args) -> None:
    """Raise UserError where the arguments alone are wrong."""
    if not args.model and not args.report:
        raise UserError("usage: python eval.py --model RUN (or a bare model, with --out FOLDER)")
    check_data(args)


@dataclass(frozen=True)
class Plan:
    """One evaluation, with everything settled that its arguments leave to the run, the data or a default."""

    args: Args  # with every default filled in
    run: Path  # the run's folder, or the bare model
    base: str  # the model that training started from
    trained: Path | None  # the run's trained model; None for a bare model
    trained_with: dict  # the run's arguments
    out: Path
    suffix: str  # of the files' names: "" for the test part, else "-validation" or "-train"
    sampling: Sampling
    examples: list[Example]
    judges: list[Judge]
    settings: dict  # what decides the base model's responses
    note: dict  # what the data's contexts are
    cached: Answers  # what --reuse brings

    @property
    def reuses_itself(self) -> bool:
        """Whether --reuse names the run's own folder: all its responses are judged anew, none is sampled."""
        return bool(self.args.reuse) and Path(self.args.reuse).resolve() == self.run.resolve()

    @property
    def deciding_judge(self) -> str:
        """The judge whose scores decide a win: the first one, where data have neither checks nor answers."""
        checkable = verify(self.examples[0], "") is not None
        return self.judges[0].args.judge if self.judges and not checkable else ""


def resolve(args: Args) -> Plan:
    """Settle which model, data and settings the arguments mean; UserError where that is impossible."""
    run = Path(args.model)
    base, trained, trained_with = args.model, None, {}
    if (run / "args.json").exists():
        if not (run / "model").is_dir():
            raise UserError(f"{run} is a run without a trained model: it has not finished")
        trained_with = read_json(run / "args.json")["arguments"]
        base, trained = trained_with["model"], run / "model"
    else:
        find(args.model)  # a wrong name is told first
        if not args.out:
            raise UserError(f"{run} is a bare model, not a run: say where results go with --out FOLDER")
        if args.reuse:
            raise UserError(f"--reuse brings the base model's responses, and {run} is a bare model: none is "
                            "left")
    defaults = dict(data="demo", date=TEMPLATE_DATE, max_new_tokens=None, dtype=default_dtype())
    defaults |= trained_with
    if trained_with.get("save_dtype") == "float32":
        defaults["dtype"] = "float32"  # what was saved is read without rounding it again
    left_out = [key for key in ("data", "date", "max_new_tokens", "dtype") if getattr(args, key) is None]
    args = dataclasses.replace(args, **{key: defaults[key] for key in left_out})
    sampling = sampling_for(args, evaluation=True)
    args = dataclasses.replace(args, temperature=sampling.temperature, top_p=sampling.top_p)

    names = [name for name in args.judge.split(",") if name]
    judges = [Judge(dataclasses.replace(args, judge=name), args.slots, args.date) for name in names]
    # The run's seed made the split: another one would put training prompts into the test part. Contexts come
    # from where training's came from, whoever judges here.
    source = dict(judge=args.judge.split(",")[0], model=base)
    source |= {key: trained_with[key] for key in ("seed", "contexts", "judge", "judge_url")
               if key in trained_with}
    data_args = dataclasses.replace(args, **source)
    examples = examples_for(data_args, args.split)
    if args.judge and not all(e.context for e in examples):
        raise UserError(f"--judge: {args.data} has rows without a context, and contexts are what is judged")

    suffix = "" if args.split == "test" else f"-{args.split}"
    settings = dict(model=base, split=args.split, examples=fingerprint([vars(e) for e in examples]),
                    seed=args.seed, sampling=dataclasses.asdict(sampling), date=args.date, dtype=args.dtype)
    plan = Plan(args, run, base, trained, trained_with, Path(args.out or run), suffix, sampling, examples,
                judges, settings, note_of(data_args), cached={})
    if not args.reuse:
        return plan
    cached = cached_answers(Path(args.reuse), suffix, settings, examples, plan.reuses_itself)
    return dataclasses.replace(plan, cached=cached)


def measure(plan: Plan) -> tuple[Answers, dict]:
    """Sample, judge, count: the answers, and what eval.json will hold."""
    start, args, examples = time.perf_counter(), plan.args, plan.examples
    print(f"{len(examples)} {args.split} examples, {plan.sampling}")
    tokenizer = Tokenizer(plan.base, args.date)
    answers = plan.cached
    if "trained" not in answers:
        dtype, device = getattr(torch, args.dtype), default_device()
        trained = load(plan.trained, dtype, device=device) if plan.trained else None
        base = load(plan.base, dtype, device=device)
        answers = respond(base, trained, tokenizer, examples, plan.sampling, args.seed, args.slots, answers)
        del base, trained  # room for a local judge

    verdicts = {}
    for judge in plan.judges:
        answers, verdicts[judge.args.judge] = judge_all(judge, examples, answers, args.rubrics)
    result = evaluate(examples, answers, plan.deciding_judge)
    if plan.reuses_itself:  # other judges' verdicts stay
        earlier = read_json(plan.run / f"eval{plan.suffix}.json")
        verdicts = earlier.get("judges", {}) | verdicts
    result |= dict(settings=plan.settings, arguments=dataclasses.asdict(args), run=plan.trained_with,
                   judges=verdicts, data=plan.note, environment=environment(),
                   seconds=round(time.perf_counter() - start, 1))
    return answers, result


def write(plan: Plan, answers: Answers, result: dict) -> None:
    """Write responses.jsonl, eval.json and the figures; print the table and some answers."""
    out, suffix, examples = plan.out, plan.suffix, plan.examples
    out.mkdir(parents=True, exist_ok=True)
    lines = [response_row(e, system, answer) for system, rows in answers.items()
             for e, answer in zip(examples, rows, strict=True)]
    write_jsonl(out / f"responses{suffix}.jsonl", lines)
    write_json(out / f"eval{suffix}.json", result)
    won = {system: wins(examples, rows, plan.deciding_judge) for system, rows in answers.items()}
    if not rank():
        judges_figure(out / f"judges{suffix}.png", result["judges"])
        if examples[0].choices:
            entropies = {system: np.array([answer.entropy for answer in rows])
                         for system, rows in answers.items()}
            entropy_figure(out / f"entropy{suffix}.png", entropies, won,
                           max(len(e.choices) for e in examples))
        if out == plan.run and not suffix and (plan.run / "summary.json").exists():
            gain_figure(plan.run, plan.run / "gain.png")
    print(table(result))
    if "trained" in answers:
        print(side_by_side(examples, answers, won))
    print(f"\n{result['seconds']:.0f} s; written: eval{suffix}.json and responses{suffix}.jsonl in {out}")


def side_by_side(examples: list[Example], answers: dict[str, list], won: dict[str, np.ndarray],
                 count: int = 3) -> str:
    """Some prompts with the answers of prompting and of training: `count` gains, and one still wrong."""
    baseline = "prompted" if "prompted" in answers else "default"
    before, after = won[baseline], won["trained"]
    order = np.random.default_rng(seed_from("examples")).permutation(len(examples))
    gained = [i for i in order if before[i] == 0 and after[i] == 1][:count]
    failed = [i for i in order if after[i] == 0][:1]
    lines = []
    for i in [*gained, *failed]:
        context = f" [{examples[i].context}]" if examples[i].context else ""
        label, verdict = baseline + ":", " (still wrong)" if i in failed else ""
        lines += ["", f"{examples[i].prompt}{context}",
                  f"  {label:9} {answers[baseline][i].text!r}",
                  f"  trained:  {answers['trained'][i].text!r}{verdict}"]
    return "\n".join(lines)


def response_row(e: Example, system: str, answer: Answer) -> dict:
    """One line of responses.jsonl."""
    row = dict(id=e.id, prompt=e.prompt, context=e.context, response=answer.text, system=system)
    row |= {key: or_null(getattr(answer, key)) for key in MEASURED}
    if e.choices:
        row |= {key: or_null(getattr(answer, key)) for key in OF_CHOICES}
    if answer.scores:
        row |= {key: {judge: or_null(score) for judge, score in getattr(answer, key).items()}
                for key in JUDGED}
    return row


def evaluation(args: Args) -> None:
    """Everything that the first lines of this file promise: responses, numbers, files and a table."""
    plan = resolve(args)
    answers, result = measure(plan)
    write(plan, answers, result)


def program() -> None:
    args = parse(Args, usage=__doc__)
    check(args)
    if args.report:
        print(report(list(args.report), Path(args.out or "report")))
    else:
        evaluation(args)


if __name__ == "__main__":
    main(program)
