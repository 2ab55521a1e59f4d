"""eval.py - held-out prompts answered by three systems, and the numbers that compare them.

    default    y ~ pi_ref(.|x)         the base model without the context
    prompted   y ~ pi_ref(.|x, c)      the base model with it: the baseline MIPO has to beat (section 5.1)
    trained    y ~ pi_theta(.|x, c)    the trained model; in data without contexts it has to beat `default`

Win rate, the share of responses that
    honour the context, as a program checks                              demo data
    give the right final answer, strictly read                           Table 2: gsm8k, svamp, arc; and mmlu
    get at least the reference's score from --judge                      Table 1: prism, community, multibench

Where the data allow it there are also self-BLEU-4 and distinct-2 (Tables 3, 4), the judge's own accuracy on
human preferences (Table 7), its comparisons of trained and prompted responses in both orders (Fig. 3), the
entropy over the answer letters (Figs. 4, 5), and accuracy by log p(choice|question) - log p(choice).
Differences are paired, row by row, and come first; those of accuracies have McNemar's exact test. Win rates,
gains, self-BLEU and differences have 95% intervals over users or prompts, in the demo over prompts and
contexts crossed (measures.py, `interval`).

A gain must not come from degenerate text. So we also report the length, the unfinished share, the base
model's likelihood, the win rate at equal length, `off_target` (how often a response honours contexts that it
was not given) and `prompt_gain` (how much it depends on the question). The context gain of Eq. 14,
log pi_ref(y|x,c) - log pi_ref(y|x), is measured under the base model: under the trained one it can be gamed.
responses.py samples and measures the answers, measures.py computes the numbers, verdicts.py asks judges.

What differs from the paper: data with checks need no judge; intervals, paired differences and the columns
against degenerate text are added.

    python eval.py --model RUN [--judge JUDGE]     a bare model folder has only the first two systems
    python eval.py --report RUN RUN ...            the paper's tables over runs and seeds

Writes responses.jsonl, eval.json and figures to the run folder (or --out) and prints a table. A judge's
endpoint is asked one question before anything is sampled. Responses are saved as they finish, before they are
judged; the same command, run again, resumes. Another evaluation's results are never replaced, except those of
some rows (--limit) by those of more.
"""

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from checkpoint import lock
from checks import verify
from console import first_of
from contexts import DataArgs, examples_for, note_of, sampling_for, warn_of_templates
from contexts import check as check_data
from data import OWN_FILES, SPLITS, Example
from figures import entropy_figure, gain_figure, judges_figure
from folder import find, load, read_config, weight_times
from judge import Judge, JudgeArgs
from measures import RATE, Answers, clusters_of, evaluate, interval, wins
from pairs import is_useful, ready_pairs
from report import report, table
from responses import group_logps, read_answers, remove_samples, respond, write_responses
from rows import fitting_pairs, fitting_rows
from run import (UserError, barrier, broadcast, default_device, default_dtype, environment, fingerprint, main,
                 option, parse, rank, read_json, seed_from, write_json)
from sample import Sampling
from schema import OBJECT, TEXT, checked, optional, record
from tokenizer import TEMPLATE_DATE, TEMPLATE_HELP, Tokenizer
from verdicts import judge_all

# ------------------------------------------------------------------------- the program

@dataclass
class Args(DataArgs):
    data: str | None = option(None, "as train.py's --data (default: what the run was trained on)", "data")
    contexts: str = option("", "as train.py's --contexts (default: the run's, on its own data)", "data")
    model: str = option("", "run folder; or a bare model, with --out", "data")
    temperature: float | None = option(None, "default: 0.1, or the data set's", "sampling")
    top_p: float | None = option(None, "default: 0.9", "sampling")
    max_new_tokens: int | None = option(None, "longest response; default: the run's", "sampling")
    date: str | None = option(None, "for chat templates that print one (default: the run's)", "sampling")
    dtype: str | None = option(None, "arithmetic (default: the run's; float32 where it saved that)",
                               "sampling", ("bfloat16", "float32"))
    system: str | None = option(None, "system prompt of rows without one of their own (default: the run's)",
                                "sampling")
    template: tuple = option((), f"{TEMPLATE_HELP} (default: the run's)", "sampling")
    split: str = option("test", "which part to evaluate on; choose settings on validation", "data", SPLITS)
    out: str = option("", "folder for responses.jsonl and eval.json (default: the run folder)", "data")
    reuse: str = option("", "folder of an evaluation whose base model's responses are taken; the run's own: "
                        "all its responses, to have them judged", "data")
    base: str = option("", "the model that training started from (default: where it was then)", "data")
    rubrics: bool = option(False, "let the judge write the criteria of its comparisons (D.2)", "judge")
    report: tuple = option((), "run folders: print and write the paper's tables of them", "data")


def check(args: Args) -> None:
    """Raise UserError where the arguments alone are wrong."""
    if not args.model and not args.report:
        raise UserError("usage: python eval.py --model RUN (or a bare model, with --out FOLDER)")
    if args.rubrics and not args.judge:
        raise UserError("--rubrics: a judge writes and uses them, so give --judge too")
    check_data(args)


@dataclass(frozen=True)
class Plan:
    """One evaluation with all defaults resolved: from its arguments, the run and the data."""

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
    settings: dict  # what decides which rows are answered, and how
    note: dict  # what the data's contexts are
    cached: Answers  # what --reuse supplies

    @property
    def reuses_itself(self) -> bool:
        """Whether --reuse names the run's own folder: its responses are judged again, and none is sampled."""
        return bool(self.args.reuse) and Path(self.args.reuse).resolve() == self.run.resolve()

    @property
    def responses_file(self) -> Path:
        """The file of the responses."""
        return self.out / f"responses{self.suffix}.jsonl"

    @property
    def numbers_file(self) -> Path:
        """The file of the numbers, which is written last."""
        return self.out / f"eval{self.suffix}.json"

    @property
    def progress_file(self) -> Path:
        """A file that exists while the evaluation runs: its settings, and whether sampling is done."""
        return self.out / f"unfinished{self.suffix}.json"

    @property
    def progress(self) -> dict:
        """What the progress file holds. Models are known by the times at which their weights were written."""
        models = [self.base, *([str(self.trained)] if self.trained else [])]
        return dict(settings=self.settings, arguments=dataclasses.asdict(self.args),
                    weights=[weight_times(model) for model in models])

    @property
    def deciding_judge(self) -> str:
        """The judge whose scores decide a win: the first one, unless every row has a check or an answer."""
        checkable = all(verify(example, "") is not None for example in self.examples)
        return self.judges[0].args.judge if self.judges and not checkable else ""


def resolve(args: Args) -> Plan:
    """Settle which model, data and settings the arguments mean; UserError where that is impossible."""
    run = Path(args.model)
    name, base, trained, trained_with = models_of(args, run)
    args = filled_in(args, run, trained_with)
    sampling = sampling_for(args, evaluation=True)
    args = dataclasses.replace(args, temperature=sampling.temperature, top_p=sampling.top_p)

    asked = [judge for judge in args.judge.split(",") if judge]
    judges = [Judge(dataclasses.replace(args, judge=judge), args.slots, args.date) for judge in asked]
    # The run's seed made the split: another one would put training prompts into the test part. On the run's
    # own data, contexts are those of training, even if another judge scores here; --contexts overrides this.
    source = dict(judge=args.judge.split(",")[0], model=base)
    keys = ["seed"]
    if not args.contexts and args.data.partition(":")[0] == trained_with.get("data", "").partition(":")[0]:
        keys += ["contexts", *(field.name for field in dataclasses.fields(JudgeArgs))]
    source |= {key: trained_with[key] for key in keys if key in trained_with}
    data_args = dataclasses.replace(args, **source)
    examples = examples_for(data_args, args.split)
    without = [e.name for e in examples if not e.context]
    if args.judge and without:
        raise UserError(f"--judge: {args.data} has rows without a context, and contexts are what is judged "
                        f"({first_of(without)})")
    examples = examples_that_fit(examples, base, args, sampling)

    suffix = "" if args.split == "test" else f"-{args.split}"
    settings = dict(model=name, split=args.split, examples=fingerprint([e.row() for e in examples]),
                    seed=args.seed, sampling=dataclasses.asdict(sampling), date=args.date, dtype=args.dtype,
                    template=list(args.template) or None)
    plan = Plan(args, run, base, trained, trained_with, Path(args.out or run), suffix, sampling, examples,
                judges, settings, note_of(data_args), cached={})
    return dataclasses.replace(plan, cached=cached_answers(plan)) if args.reuse else plan


def models_of(args: Args, run: Path) -> tuple[str, str, Path | None, dict]:
    """What --model names, a run or a bare model: the base model's name, where it is, the trained model's
    folder, and the arguments it was trained with."""
    if (run / "args.json").exists():
        is_training = (run / "metrics.jsonl").exists() and not (run / "summary.json").exists()
        is_training = broadcast(is_training)  # as process 0 sees the disk
        if is_training or not (run / "model").is_dir():
            raise UserError(f"{run} is a run that has not finished: go on with train.py --resume")
        named = record(dict(model=TEXT, data=TEXT))
        saved = checked(read_json(run / "args.json"), dict(arguments=named, base=optional(TEXT)),
                        str(run / "args.json"))
        return saved["arguments"]["model"], base_of(args, run, saved), run / "model", saved["arguments"]
    find(args.model)  # report a wrong name first
    if not args.out:
        raise UserError(f"{run} is a bare model, not a run: say where results go with --out FOLDER")
    if args.reuse:
        raise UserError(f"--reuse supplies the base model's responses, and {run} is a bare model: none is "
                        "left")
    if args.base:
        raise UserError(f"--base is the model that a run started from, and {run} is a bare model")
    return args.model, args.model, None, {}


def filled_in(args: Args, run: Path, trained_with: dict) -> Args:
    """The arguments, with what they leave open taken from the run's own or from a default."""
    defaults = dict(data="demo", date=TEMPLATE_DATE, max_new_tokens=None, dtype=default_dtype())
    defaults |= trained_with
    if trained_with.get("save_dtype") == "float32":
        defaults["dtype"] = "float32"  # what was saved is read without rounding it again
    data = defaults["data"]
    if args.data is None and data.endswith(OWN_FILES) and not Path(data).exists():
        raise UserError(f"{run} was trained on {data}, which is not here: say where it is with --data FILE")
    keys = ("data", "date", "max_new_tokens", "dtype", "system")
    left_out = {key: defaults.get(key) for key in keys if getattr(args, key) is None}
    template = args.template or tuple(defaults.get("template", ()))
    return dataclasses.replace(args, template=template, **left_out)


def base_of(args: Args, run: Path, saved: dict) -> str:
    """The model that a run started from: --base, else the folder recorded then, else the hub id.

    saved: the run's args.json. What was a folder is never looked for on the hub.
    """
    name, folder = saved["arguments"]["model"], saved.get("base")
    if folder and not args.base and not Path(folder).is_dir():
        raise UserError(f"{run} was trained from the folder {folder}, which is not there: say where it is "
                        "now with --base FOLDER")
    base = args.base or folder or name
    try:
        find(base)
    except UserError as e:
        raise UserError(f"the model that {run} was trained from: {e} (--base names it)") from None
    return base


def examples_that_fit(examples: list[Example], base: str, args: Args, sampling: Sampling) -> list[Example]:
    """The examples whose prompts, with and without the context, leave room for a response."""
    tokenizer = Tokenizer(base, args.date, args.template)
    warn_of_templates(examples, tokenizer)
    positions = read_config(find(base)).max_position_embeddings
    return fitting_rows(examples, lambda e: [e.user_message(e.context), e.user_message(None)], tokenizer,
                        positions, sampling.max_new_tokens)


# ------------------------------------------------------------------------- earlier evaluations

def refuse_to_replace(plan: Plan) -> None:
    """UserError where the folder holds another evaluation than this one, or verdicts that this one does not
    ask for. An evaluation of some rows (--limit) gives way to one of more rows."""
    for file in (plan.progress_file, plan.numbers_file):
        if not file.exists():
            continue
        earlier = read_evaluation(file)
        run = earlier["arguments"].get("model") or str(plan.run)
        if plan.out.resolve() != plan.run.resolve() and Path(run).resolve() != plan.run.resolve():
            raise UserError(f"{file} is of another model, {run}: name another folder with --out, or remove "
                            "that file")
        changes = changes_since(plan, earlier)
        if changes and not has_fewer_rows(plan, earlier):
            raise UserError(f"{file} is of an evaluation with {changes}: name another folder with --out, or "
                            "remove that file")
        if changes:
            print(f"{file} is of fewer rows, --limit {earlier['arguments']['limit']}: it is replaced")
        asked = [judge.args.judge for judge in plan.judges]
        lost = [name for name in earlier.get("judges", {}) if name not in asked]
        keeps = plan.reuses_itself and plan.judges and plan.out.resolve() == plan.run.resolve()
        if lost and not keeps:
            raise UserError(f"{file} holds the verdicts of {', '.join(lost)}: name it in --judge too, add "
                            f"others with --reuse {plan.run}, or name another folder with --out")


# What is read of eval.json and unfinished.json; evaluations from before there were settings have none.
EVALUATION = dict(arguments=OBJECT, settings=optional(OBJECT), judges=optional(OBJECT))


def read_evaluation(file: Path) -> dict:
    """eval.json, or what an unfinished evaluation has written of itself."""
    return checked(read_json(file), EVALUATION, str(file))


def differing(before: dict, now: dict, keys: Iterable[str]) -> dict[str, str]:
    """The keys under which two dicts differ: key -> both values, in words."""
    return {key: f"{key} {before.get(key)!r}, not {now[key]!r}" for key in keys
            if before.get(key) != now[key]}


def changes_since(plan: Plan, earlier: dict) -> str:
    """Where this evaluation's settings are not those of an earlier one's file, in words; "" if nowhere."""
    changes = differing(earlier.get("settings", {}), plan.settings, plan.settings)
    if "examples" in changes:  # which arguments chose others says more than their fingerprint
        before, now = dataclasses.asdict(Args()) | earlier["arguments"], dataclasses.asdict(plan.args)
        arguments = differing(before, now, ("data", "limit", "contexts", "system"))
        changes["examples"] = "; ".join(arguments.values()) or changes["examples"]
    return "; ".join(changes.values())


def has_fewer_rows(plan: Plan, earlier: dict) -> bool:
    """Whether an earlier evaluation differs from this one only in having fewer rows of the same data."""
    changes = differing(earlier.get("settings", {}), plan.settings, plan.settings)
    before, limit = dataclasses.asdict(Args()) | earlier["arguments"], plan.args.limit
    is_more = before["limit"] > 0 and (not limit or limit > before["limit"])
    is_same = all(before[key] == getattr(plan.args, key) for key in ("data", "contexts", "system"))
    return list(changes) == ["examples"] and is_more and is_same


def cached_answers(plan: Plan) -> Answers:
    """What --reuse supplies: the base model's answers of another evaluation, or all of the run's own.

    Raises UserError where that evaluation had other settings, or its rows are not these examples.
    """
    folder, suffix = Path(plan.args.reuse), plan.suffix
    if (folder / f"unfinished{suffix}.json").exists():
        raise UserError(f"--reuse {folder}: its evaluation has not ended: rerun the command that "
                        "began it")
    changes = changes_since(plan, read_evaluation(folder / f"eval{suffix}.json"))
    if changes:
        raise UserError(f"--reuse {folder}: made with {changes}")
    return read_answers(folder / f"responses{suffix}.jsonl", plan.examples, plan.reuses_itself)


def read_progress(plan: Plan) -> dict:
    """What an interruption of this evaluation has left in its progress file, {} where there is none. Answers
    from other weights are ignored."""
    earlier = read_evaluation(plan.progress_file) if plan.progress_file.exists() else {}
    if earlier.get("settings") != plan.settings:  # there was none, or one of fewer rows
        return {}
    if earlier.get("weights") != plan.progress["weights"]:
        print(f"{plan.out}: the models have been written again since: everything is sampled again")
        return {}
    return earlier


# ------------------------------------------------------------------------- the evaluation

def pairs_of_data(plan: Plan) -> dict | None:
    """The share of the data's own pairs for which training raised the chosen response's log-prob relative to
    the rejected one's (DPO's accuracy). None where there are no pairs or no trained model."""
    if plan.trained is None or any(e.chosen is None or e.rejected is None for e in plan.examples):
        return None
    args, ratios = plan.args, []
    positions = read_config(find(plan.base)).max_position_embeddings
    pairs = ready_pairs(Tokenizer(plan.base, args.date, args.template), plan.examples)
    pairs = [pair for pair in fitting_pairs(pairs, plan.examples, positions, needed=False)
             if is_useful(pair.rejected[0], pair)]
    if not pairs:
        return None
    groups = [(pair.prompt_ids, [response.ids for response in pair.responses]) for pair in pairs]
    for folder in (plan.base, plan.trained):
        model = load(folder, getattr(torch, args.dtype), device=default_device())
        chosen, rejected = np.array(group_logps(model, groups, "pairs of the data")).T  # (pairs,) each
        ratios.append(chosen - rejected)
    kept = {pair.id for pair in pairs}
    clusters = clusters_of([e for e in plan.examples if e.id in kept])
    positive = (ratios[1] > ratios[0]).astype(float)  # (pairs,)
    return interval(positive, **clusters, bounds=RATE)


def all_answers(plan: Plan) -> Answers:
    """Every system's answers: those that --reuse supplies or an interruption has left, the others sampled.

    Judges are asked one question first, and answers are written before they are judged: what a judge refuses
    costs no sampling.
    """
    if "trained" in plan.cached:
        return plan.cached
    args, earlier = plan.args, read_progress(plan)
    if earlier.get("sampled"):
        print(f"{plan.responses_file} holds this evaluation's responses: none is sampled again")
        return read_answers(plan.responses_file, plan.examples, with_trained=True)
    for judge in plan.judges:
        judge.check_endpoint()
    dtype, device = getattr(torch, args.dtype), default_device()
    trained = load(plan.trained, dtype, device=device) if plan.trained else None
    base = load(plan.base, dtype, device=device)
    tokenizer = Tokenizer(plan.base, args.date, args.template)

    barrier()  # all processes have read what is left before one of them writes
    if not earlier:
        remove_samples(plan.responses_file)
        write_json(plan.progress_file, dict(plan.progress, sampled=False))
    barrier()
    answers = respond(base, trained, tokenizer, plan.examples, plan.sampling, args.seed, args.slots,
                      plan.cached, plan.responses_file)
    write_responses(plan.responses_file, plan.examples, answers)
    write_json(plan.progress_file, dict(plan.progress, sampled=True))
    remove_samples(plan.responses_file)
    return answers


def measure(plan: Plan) -> tuple[Answers, dict]:
    """Sample, judge, count: the answers, and what eval.json will hold."""
    start, args, examples = time.perf_counter(), plan.args, plan.examples
    print(f"{len(examples)} {args.split} examples, {plan.sampling}")
    answers = all_answers(plan)
    verdicts = {}
    for judge in plan.judges:
        answers, verdicts[judge.args.judge] = judge_all(judge, examples, answers, args.rubrics)
    result = evaluate(examples, answers, plan.deciding_judge)
    if plan.reuses_itself:  # other judges' verdicts stay
        earlier = read_json(plan.run / plan.numbers_file.name)
        verdicts = earlier.get("judges", {}) | verdicts
    result |= dict(pairs=pairs_of_data(plan), settings=plan.settings, arguments=dataclasses.asdict(args),
                   run=plan.trained_with, judges=verdicts, data=plan.note, environment=environment(),
                   seconds=round(time.perf_counter() - start, 1))
    return answers, result


def write(plan: Plan, answers: Answers, result: dict) -> None:
    """Write responses.jsonl and eval.json; print the table and some answers; draw the figures."""
    out, suffix, examples = plan.out, plan.suffix, plan.examples
    write_responses(plan.responses_file, examples, answers)
    write_json(plan.numbers_file, result)
    won = {system: wins(examples, rows, plan.deciding_judge) for system, rows in answers.items()}
    if not rank():
        plan.progress_file.unlink(missing_ok=True)
    print(table(result))
    if "trained" in answers:
        print(side_by_side(examples, answers, won))
    written = f"{plan.numbers_file.name} and {plan.responses_file.name}"
    print(f"\n{result['seconds']:.0f} s; written: {written} in {out}")
    if not rank():
        judges_figure(out / f"judges{suffix}.png", result["judges"])
        if examples[0].choices:
            entropies = {system: np.array([answer.entropy for answer in rows])
                         for system, rows in answers.items()}
            entropy_figure(out / f"entropy{suffix}.png", entropies, won,
                           max(len(e.choices) for e in examples))
        if out == plan.run and not suffix and (plan.run / "metrics.jsonl").exists():
            gain_figure(plan.run, plan.run / "gain.png")


def side_by_side(examples: list[Example], answers: dict[str, list], won: dict[str, np.ndarray],
                 count: int = 3) -> str:
    """Some prompts with the answers of prompting and of training: `count` gains, and one still wrong."""
    baseline = "prompted" if "prompted" in answers else "default"
    before, after = won[baseline], won["trained"]
    order = np.random.default_rng(seed_from("examples")).permutation(len(examples))
    gained = [i for i in order if before[i] == 0 and after[i] == 1][:count]
    failed = [i for i in order if before[i] == after[i] == 0][:1]
    lines = []
    for i in [*gained, *failed]:
        context = f" [{examples[i].context}]" if examples[i].context else ""
        label, verdict = baseline + ":", " (still wrong)" if i in failed else ""
        lines += ["", f"{examples[i].prompt}{context}",
                  f"  {label:9} {answers[baseline][i].text!r}",
                  f"  trained:  {answers['trained'][i].text!r}{verdict}"]
    return "\n".join(lines)


def evaluation(args: Args) -> None:
    """Everything that the first lines of this file promise: responses, numbers, files and a table."""
    plan = resolve(args)
    with lock(plan.out):
        refuse_to_replace(plan)
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
