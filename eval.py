"""eval.py - held-out prompts under default prompting, personalised prompting and the trained model, compared.

    default    y ~ pi_ref(.|x)         the base model without the context
    prompted   y ~ pi_ref(.|x, c)      the base model with it: the baseline MIPO has to beat (section 5.1)
    trained    y ~ pi_theta(.|x, c)    the trained model
Win rate: the share of responses that honour the context by its own program (demo data). Win rates and gains
have 95% intervals, by a bootstrap over prompts; differences are paired, row by row. A gain must not come from
degenerate text, so beside it stand: mean length, the unfinished share, distinct-2, self-BLEU-4, the base
model's negative log-likelihood, the win rate where lengths match, `elsewhere` (how often a response honours
contexts it was not given) and `prompt gain` (how much the response still depends on the question). Context
gain, Eq. 14's log pi_ref(y|x,c) - log pi_ref(y|x), is taken under the base model, where it can't be gamed.
What differs from the paper: data with checks needs no judge; intervals, pairs and quality columns are added.

    python eval.py --model RUN        a bare model folder has only the first two systems

Writes responses.jsonl and eval.json to the run folder (or --out) and prints one table.
"""

import dataclasses
import math
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from losses import sequence_logps
from model import Decoder, find, load
from pairs import SPLITS, DataArgs, Example, examples_for, honours, sampling_for
from run import (UserError, default_device, derive, environment, fingerprint, gather, main, mine, option,
                 parse, progress, read_json, read_jsonl, write_json, write_jsonl)
from sample import TEMPLATE_DATE, Sample, Tokenizer, generate

SYSTEMS = ("default", "prompted", "trained")
TEMPERATURE, TOP_P = 0.1, 0.9  # evaluation draws, the authors' scripts; length as for pairs


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


SCORED = ("ids", "finished", "logp", "gain", "prompt_gain")  # what responses.jsonl says beside the text


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
    prompts = list(dict.fromkeys(e.prompt for e in examples))
    turns = [e.turn(e.context) for e in examples]
    # Scored by the base model after the right prompt, after x without c, and after another x with c;
    # `default`, which has no c, once a prompt.
    elsewhere = dict(zip(prompts, prompts[1:] + prompts[:1], strict=True))
    swapped = [dataclasses.replace(e, prompt=elsewhere[e.prompt]).turn(e.context) for e in examples]
    samples, passes = {}, []
    if not known:
        samples["default"] = answer(base, tokenizer, prompts, args, "default")
        answers = [[s.ids] for s in samples["default"]]
        passes += [(prompts, answers), (elsewhere.values(), answers)]
        samples["prompted"] = answer(base, tokenizer, turns, args, "prompted")
    if trained is not None:
        samples["trained"] = answer(trained, tokenizer, turns, args, "trained")
    others = [system for system in samples if system != "default"]
    drawn = [[samples[system][i].ids for system in others] for i in range(len(examples))]
    passes += [(turns, drawn), ([e.prompt for e in examples], drawn), (swapped, drawn)]
    groups = [mine([(tokenizer.chat(t), r) for t, r in zip(*pair, strict=True)]) for pair in passes]
    bar = progress(sum(map(len, groups)), "passes", "scoring under the base model")
    *plain, right, without, wrong = (np.array(gather(sequence_logps(base, g, bar=bar))) for g in groups)
    bar.close()

    def scored(sample: Sample, logp: float, gain: float, prompt_gain: float) -> Response:
        text = tokenizer.decode(sample.ids)
        return Response(text, sample.ids, sample.finished, float(logp), float(gain), float(prompt_gain))

    responses = dict(known or {})
    if plain:
        logps, wrong_logps = (p[:, 0] for p in plain)
        alone = {p: scored(samples["default"][i], logps[i], math.nan, logps[i] - wrong_logps[i])
                 for i, p in enumerate(prompts)}
        responses["default"] = [alone[e.prompt] for e in examples]
    gains = np.where([[bool(e.context)] for e in examples], right - without, np.nan)  # (rows, other systems)
    for column, system in enumerate(others):
        columns = (samples[system], right[:, column], gains[:, column], (right - wrong)[:, column])
        responses[system] = [scored(*row) for row in zip(*columns, strict=True)]
    return responses


def reuse(folder: Path, name: str, settings: dict, examples: list[Example]) -> dict[str, list[Response]]:
    """The base model's responses of an earlier evaluation, which must have been made with these settings."""
    made = read_json(folder / f"eval{name}.json").get("settings", {})
    for key, value in settings.items():
        if made.get(key) != value:
            raise UserError(f"--reuse {folder}: made with {key} {made.get(key)!r}, not {value!r}")
    found: dict[str, list[Response]] = {"default": [], "prompted": []}
    for _, row in read_jsonl(folder / f"responses{name}.jsonl"):
        if row["system"] in found:
            scored = (math.nan if row[key] is None else row[key] for key in SCORED)
            found[row["system"]].append(Response(row["response"], *scored))
    if any(len(rows) != len(examples) for rows in found.values()):
        raise UserError(f"{folder / f'responses{name}.jsonl'} does not hold {len(examples)} rows a system")
    return found


# -------------------------------------------------------------------------------- tables

def wins(examples: list[Example], responses: list[Response]) -> np.ndarray:
    """1 where a response honours its example's context, 0 where not, NaN where there is no check. (rows,)"""
    return np.array([float(honours(e.check, r.text)) if e.check else np.nan
                     for e, r in zip(examples, responses, strict=True)])


def elsewhere(examples: list[Example], responses: list[Response]) -> float | None:
    """The share of the other contexts' checks that a response passes: no gain if this rises as much."""
    checks = {e.context_id: e.check for e in examples if e.check}
    hits = [honours(check, r.text) for e, r in zip(examples, responses, strict=True)
            for context_id, check in checks.items() if context_id != e.context_id]
    return float(np.mean(hits)) if hits else None


def system_row(examples: list[Example], responses: list[Response]) -> dict:
    """Win rate and quality columns of one system."""
    prompts = [e.prompt for e in examples]
    tokens = np.array([len(r.ids) for r in responses])
    return dict(
        win_rate=bootstrap(wins(examples, responses), prompts), elsewhere=elsewhere(examples, responses),
        tokens=float(tokens.mean()), unfinished=float(np.mean([not r.finished for r in responses])),
        nll_per_token=float(-sum(r.logp for r in responses) / tokens.sum()),
        context_gain=bootstrap(np.array([r.gain for r in responses]), prompts),
        prompt_gain=float(np.mean([r.prompt_gain for r in responses])),
        **diversity([r.text for r in responses], prompts),
    )  # fmt: skip


def compare(examples: list[Example], ours: list[Response], theirs: list[Response]) -> dict:
    """Paired differences, ours - theirs: win rate, in all and among rows of matched length, and context gain.
    """
    prompts = [e.prompt for e in examples]
    difference = wins(examples, ours) - wins(examples, theirs)
    a, b = (np.array([len(r.ids) for r in system]) for system in (ours, theirs))
    matched = np.minimum(a, b) >= 0.8 * np.maximum(a, b)  # lengths within 20% of each other
    gain_a, gain_b = (np.array([r.gain for r in system]) for system in (ours, theirs))
    return dict(win_rate=bootstrap(difference, prompts),
                win_rate_length_matched=bootstrap(np.where(matched, difference, np.nan), prompts),
                context_gain=bootstrap(gain_a - gain_b, prompts),
                context_gain_per_token=bootstrap(gain_a / a - gain_b / b, prompts))


def evaluate(examples: list[Example], responses: dict[str, list[Response]]) -> dict:
    """All numbers of eval.json: systems and differences of each part (all, seen, unseen), each context."""
    parts = {"all": range(len(examples))}
    for group in sorted({e.group for e in examples if e.group}):
        parts[group] = [i for i, e in enumerate(examples) if e.group == group]
    result: dict = dict(parts={}, contexts=[])
    for part, rows in parts.items():
        some = [examples[i] for i in rows]
        chosen = {system: [r[i] for i in rows] for system, r in responses.items()}
        result["parts"][part] = dict(systems={s: system_row(some, r) for s, r in chosen.items()})
        versus = [("prompted", "default")] + [("trained", "prompted")] * ("trained" in chosen)
        result["parts"][part]["differences"] = {
            f"{a} - {b}": compare(some, chosen[a], chosen[b]) for a, b in versus}
    for _, context in sorted({(e.group, e.context_id) for e in examples if e.check}, key=str):
        rows = [i for i, e in enumerate(examples) if e.context_id == context]
        first, some = examples[rows[0]], [examples[i] for i in rows]
        rates = {s: float(wins(some, [r[i] for i in rows]).mean()) for s, r in responses.items()}
        result["contexts"].append(dict(context_id=context, group=first.group, check=first.check, n=len(rows),
                                       context=first.context, **rates))
    return result


def shown(v: dict, form: str, scale: float = 1) -> str:
    """63.1 [58.0, 68.2]: a mean with its interval; - where there is none."""
    if v["mean"] is None:
        return "-"
    mean, low, high = (format(scale * v[key], form) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


QUALITY = (  # heading, key, format
    ("elsewhere", "elsewhere", ".1%"), ("tokens", "tokens", ".1f"), ("unfinished", "unfinished", ".0%"),
    ("base nll", "nll_per_token", ".3f"), ("distinct-2", "distinct_2", ".3f"),
    ("self-BLEU-4", "self_bleu_4", ".3f"), ("prompt gain", "prompt_gain", ".1f"),
)


def table(result: dict) -> str:
    """The printed summary: one block of systems a part, its differences, then every context."""
    lines = []
    for part, block in result["parts"].items():
        title = "all contexts" if part == "all" else f"{part} contexts"
        lines += ["", f"{title:12} {'win rate %':>19} {'context gain, nats':>22} "
                  + " ".join(f"{name:>11}" for name, _, _ in QUALITY)]
        for system, s in block["systems"].items():
            quality = ["-" if s[key] is None else format(s[key], form) for _, key, form in QUALITY]
            rate, gain = shown(s["win_rate"], ".1f", 100), shown(s["context_gain"], ".2f")
            lines.append(f"{system:12} {rate:>19} {gain:>22} " + " ".join(f"{v:>11}" for v in quality))
        for name, d in block["differences"].items():
            matched = d["win_rate_length_matched"]
            rate, even = (shown(v, "+.1f", 100) for v in (d["win_rate"], matched))
            gain, per_token = shown(d["context_gain"], "+.2f"), shown(d["context_gain_per_token"], "+.3f")
            lines.append(f"{name}: win rate {rate}, at matched length {even} (n = {matched['n']}); "
                         f"context gain {gain}, per token {per_token}")
    if result["contexts"]:
        lines += ["", "each context, share honoured"]
    for c in result["contexts"]:
        rates = "  ".join(f"{s} {c[s]:4.0%}" for s in SYSTEMS if s in c)
        lines.append(f"  {c['context_id']} {c['group']:6} {rates}  {c['context'][:90]}")
    return "\n".join(lines)


def side_by_side(examples: list[Example], responses: dict[str, list[Response]], count: int = 3) -> str:
    """Some prompts with the answers of prompting and of training: `count` gains, and one still wrong."""
    before, after = wins(examples, responses["prompted"]), wins(examples, responses["trained"])
    order = np.random.default_rng(derive("examples")).permutation(len(examples))
    gained = [i for i in order if before[i] == 0 and after[i] == 1][:count]
    failed = [i for i in order if after[i] == 0][:1]
    lines = []
    for i in [*gained, *failed]:
        e = examples[i]
        lines += ["", f"{e.prompt} [{e.context}]", f"  prompted: {responses['prompted'][i].text!r}",
                  f"  trained:  {responses['trained'][i].text!r}" + " (still wrong)" * (i in failed)]
    return "\n".join(lines)


# -------------------------------------------------------------------------------- figures

def learning_curve(folder: Path, candidate: int = 0) -> None:
    """metrics.jsonl -> learning_curve.png: prediction accuracies (the paper's Fig. 2), rewards, margin, loss.

    Faint points are steps, lines their running mean over a twentieth of the run.
    """
    import matplotlib  # here, because it is slow to import

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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


# -------------------------------------------------------------------------------- command line

@dataclass
class Args(DataArgs):
    data: str | None = option(None, "demo, or a .jsonl file (default: what the run was trained on)", "data")
    date: str | None = option(None, "for chat templates that print one (default: the run's)", "sampling")
    split: str = option("test", "which part to evaluate on; choose settings on validation", "data", SPLITS)
    out: str = option("", "folder for responses.jsonl and eval.json (default: the run folder)", "data")
    reuse: str = option("", "folder of an evaluation whose base model's responses are taken", "data")

    def __post_init__(self):
        if not self.model:
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
    defaults.update(temperature=TEMPERATURE, top_p=TOP_P)
    for key in ("data", "date", "max_new_tokens", "temperature", "top_p"):
        if getattr(args, key) is None:
            setattr(args, key, defaults[key])
    # the run's seed made the split: another one would put training prompts into the test part
    split_seed = trained_with.get("seed", args.seed)
    examples = examples_for(dataclasses.replace(args, seed=split_seed), args.split)
    settings = dict(model=base_name, split=args.split, examples=fingerprint([vars(e) for e in examples]),
                    seed=args.seed, sampling=dataclasses.asdict(sampling_for(args)), date=args.date,
                    dtype=args.dtype)
    name = "" if args.split == "test" else f"-{args.split}"
    if args.reuse and not trained_name:
        raise UserError(f"--reuse brings the base model's responses, and {run} is a bare model: none is left")
    known = reuse(Path(args.reuse), name, settings, examples) if args.reuse else None
    start = time.perf_counter()
    tokenizer = Tokenizer(base_name, args.date)
    dtype, device = getattr(torch, args.dtype), default_device()
    base = load(base_name, dtype, device=device)
    trained = load(trained_name, dtype, device=device) if trained_name else None
    print(f"{len(examples)} {args.split} examples, {sampling_for(args)}")
    responses = respond(base, trained, tokenizer, examples, args, known)
    result = evaluate(examples, responses)
    result.update(settings=settings, arguments=dataclasses.asdict(args), run=trained_with,
                  environment=environment())
    result["seconds"] = round(time.perf_counter() - start, 1)
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / f"responses{name}.jsonl", (
        dict(id=e.id, prompt=e.prompt, context=e.context, response=r.text, system=system)
        | {key: None if value != value else value for key in SCORED for value in [getattr(r, key)]}
        for system, drawn in responses.items() for e, r in zip(examples, drawn, strict=True)))
    write_json(out / f"eval{name}.json", result)
    print(table(result))
    if trained:
        print(side_by_side(examples, responses))
    print(f"\n{result['seconds']:.0f} s; written: eval{name}.json and responses{name}.jsonl in {out}")


def program() -> None:
    evaluation(parse(Args, usage=__doc__))


if __name__ == "__main__":
    main(program)
