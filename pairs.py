"""pairs.py - data sets, and the contrastive pairs that MIPO trains on (sections 4.1 and 4.2 of the paper).

    chosen    y_c ~ pi_ref(.|x, c)      x the prompt, c the user's context
    rejected  y_r ~ pi_ref(.|x)         --neg missing
              y_r ~ pi_ref(.|x, c')     --neg random: c' of another row
              y_r ~ pi_ref(.|x')        --neg random in data without contexts: another prompt

Both are then trained under the same right prompt (x, c). Each pair also keeps the prompt its rejected
response really came from, and its *context gain* log pi_ref(y|x, c) - log pi_ref(y|x), the reward MIPO
maximises (Eq. 14).
What differs from the paper: the sampling settings, which it does not give, are those of SAMPLING below;
identical pairs and empty responses are dropped and counted.

    python pairs.py --data demo --neg missing --model DIR --out FOLDER

writes FOLDER/pairs.jsonl, one pair a line, and FOLDER/pairs.json, how they were made and what they are like.
"""

import dataclasses
import difflib
import hashlib
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from losses import sequence_logps
from model import Decoder, find, load
from run import (UserError, default_device, derive, environment, main, option, parse, progress, read_json,
                 read_jsonl, write_json, write_jsonl)
from sample import TEMPLATE_DATE, Sampling, Tokenizer, generate

ASSETS = Path(__file__).parent / "assets"
SPLITS = ("train", "validation", "test")
SAMPLING = dict(demo=Sampling(1.0, 1.0, 96), jsonl=Sampling(1.0, 1.0, 256))  # pairs; method: the theory's own
DEMO_CONTEXTS = 5  # contexts drawn for every demo training prompt: 600 pairs
REQUEST = "{x} Please respect the following requirements made by the user: {c}"  # appendix D.2's user turn


# -------------------------------------------------------------------------------- data

@dataclass
class Example:
    """One row of a data set. `chosen` and `rejected` are there only where a file brings ready pairs."""

    id: str
    prompt: str
    split: str
    context: str | None = None
    user: str | None = None
    reference: str | None = None
    answer: str | None = None
    context_id: str | None = None
    group: str | None = None  # demo: "seen" or "unseen" context
    check: list | None = None  # demo: [checker name, arguments...]
    chosen: str | None = None
    rejected: str | None = None

    def turn(self, context: str | None) -> str:
        """The user's turn with a context (this row's, another's or none)."""
        return user_turn(self.prompt, context)


def user_turn(prompt: str, context: str | None) -> str:
    """What the user says: the prompt, and the request to respect the context where there is one."""
    return REQUEST.format(x=prompt, c=context) if context else prompt


def load_examples(data: str, split: str, seed: int = 0) -> list[Example]:
    """The examples of one split of `demo` or of a *.jsonl file, in a fixed order."""
    if data == "demo":
        examples = load_demo(seed)
    elif data.endswith(".jsonl"):
        examples = load_jsonl(Path(data), seed)
    else:
        raise UserError(f"--data {data!r} is neither 'demo' nor a .jsonl file")
    chosen = [e for e in examples if e.split == split]
    if not chosen:
        raise UserError(f"--data {data}: no example in the {split} part (of {len(examples)} in all)")
    return chosen


def load_demo(seed: int) -> list[Example]:
    """Everyday prompts and checkable contexts, split by prompt and by context (assets/demo, data of our own).

    train: every training prompt with DEMO_CONTEXTS of the seen contexts, each context as often as any other;
    validation: its prompts x seen contexts; test: its prompts x all contexts, so that unseen ones are
    measured too.
    """
    prompts = [row for _, row in read_jsonl(ASSETS / "demo" / "prompts.jsonl")]
    contexts = [row for _, row in read_jsonl(ASSETS / "demo" / "contexts.jsonl")]
    seen = [c for c in contexts if c["split"] == "seen"]
    order = random.Random(derive("demo", seed)).sample(seen, len(seen))
    examples, turn = [], 0
    for p in prompts:
        if p["split"] == "train":
            used = [order[(turn + j) % len(order)] for j in range(DEMO_CONTEXTS)]
            turn += DEMO_CONTEXTS
        else:
            used = contexts if p["split"] == "test" else seen
        examples += [
            Example(id=f"{p['id']}-{c['id']}", prompt=p["prompt"], split=p["split"], context=c["context"],
                    context_id=c["id"], group=c["split"], check=c["check"])
            for c in used
        ]  # fmt: skip
    return examples


COLUMNS = dict(prompt=str, context=(str, list), reference=str, answer=str, user=str, id=str, split=str,
               chosen=str, rejected=str)


def load_jsonl(path: Path, seed: int) -> list[Example]:
    """Own data, one object a line: "prompt", and if there is one "context" (a string or a list of them),
    "reference", "answer", "user", "id", "split"; or ready pairs with "chosen" and "rejected" too.

    Without "split" a row's part (train/validation/test 80/10/10) follows from a hash of its prompt and the
    seed, so rows that share a prompt stay together. A mistake is a UserError with file:line; other columns
    are named, unused.
    """
    examples, ids, unused = [], {}, set()
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        for key in row.keys() - COLUMNS.keys():
            near = difflib.get_close_matches(key, COLUMNS, n=1, cutoff=0.75)
            if near and near[0] not in row:
                raise UserError(f"{where}: unknown column {key!r} (did you mean {near[0]!r}?)")
            unused.add(key)
        row = {k: v for k, v in row.items() if k in COLUMNS and v is not None}
        for key, value in row.items():
            if key in ("id", "answer", "user") and isinstance(value, int | float):
                row[key] = value = str(value)
            if not isinstance(value, COLUMNS[key]):
                raise UserError(f"{where}: column {key!r} holds a {type(value).__name__}, not text")
        if isinstance(row.get("context"), list):
            if not all(isinstance(item, str) for item in row["context"]):
                raise UserError(f"{where}: column 'context' is a list, but not of texts only")
            row["context"] = " ".join(row["context"])
        if not row.get("prompt", "").strip():
            raise UserError(f"{where}: no 'prompt'")
        if ("chosen" in row) != ("rejected" in row):
            raise UserError(f"{where}: ready pairs need both 'chosen' and 'rejected'")
        if examples and ("chosen" in row) != (examples[0].chosen is not None):
            raise UserError(f"{where}: some rows are ready pairs ('chosen', 'rejected') and some are not")
        if row.get("split", "train") not in SPLITS:
            raise UserError(f"{where}: split {row['split']!r} is none of {', '.join(SPLITS)}")
        row.setdefault("id", str(number))
        if row["id"] in ids:
            raise UserError(f"{where}: id {row['id']!r} is already that of line {ids[row['id']]}")
        ids[row["id"]] = number
        bucket = derive("split", seed, row["prompt"]) % 10
        row.setdefault("split", "train" if bucket < 8 else SPLITS[bucket - 7])
        examples.append(Example(**row))
    if unused:
        print(f"{path}: columns not used: {', '.join(sorted(unused))}")
    return examples


# -------------------------------------------------------------------------------- demo checks

def starts_with(text: str, phrase: str) -> bool:
    """The first words are the phrase; its case, and any spaces or marks before it, are ignored."""
    return bool(re.match(rf"[\W_]*{re.escape(phrase)}(?![^\W_])", text, re.I))


def ends_with(text: str, phrase: str) -> bool:
    """The last words are the phrase; its case, and any spaces or marks after it, are ignored."""
    return bool(re.search(rf"(?<![^\W_]){re.escape(phrase)}[\W_]*$", text, re.I))


def ends_with_question(text: str) -> bool:
    """After the last word comes a question mark, and after that no full stop, comma, colon or semicolon."""
    return bool(re.search(r"[^\W_][\W_]*\?(?:[^\w.,:;]|_)*$", text))


def max_words(text: str, n: int) -> bool:
    """There are 1 to n words; a word is a run without spaces that has a letter or a digit."""
    return 1 <= sum(any(map(str.isalnum, run)) for run in text.split()) <= n


def max_sentences(text: str, n: int) -> bool:
    """1 to n sentences, the last one finished; a sentence ends at [.!?] before a space, or at a new line."""
    sentences = [s for s in re.split(r"[.!?](?:[^\w\s]|_)*\s|\n", text) if any(map(str.isalnum, s))]
    return 1 <= len(sentences) <= n and bool(re.search(r"[.!?][\W_]*$", text))


def lowercase(text: str) -> bool:
    """There are letters, and none of them is a capital."""
    return text.islower()


def bullets(text: str, n: int) -> bool:
    """At least n lines, and over half of those not blank, are a bullet (-, * or •), a space and words."""
    lines = [line for line in text.splitlines() if line.strip()]
    marked = [line for line in lines if re.match(r"\s*[-*•]\s.*[^\W_]", line)]
    return len(marked) >= n and 2 * len(marked) > len(lines)


def emoji(text: str) -> bool:
    """There is a symbol, dingbat or pictograph, by the Unicode blocks U+2600-27BF and U+1F300-1FAFF."""
    return bool(re.search("[\u2600-\u27bf\U0001f300-\U0001faff]", text))


def exclaims(text: str, n: int) -> bool:
    """There are at least n exclamation marks."""
    return text.count("!") >= n


def quoted(text: str) -> bool:
    """All the text stands between two double quotation marks, straight or curly, with no others inside."""
    return bool(re.fullmatch(r'\s*["“][^"“”]*\w[^"“”]*["”]\s*', text))


def mentions(text: str, *words: str) -> bool:
    """One of the words, which are regular expressions, occurs as a whole word, in any case."""
    return bool(re.search(rf"(?<![^\W_])(?:{'|'.join(words)})(?![^\W_])", text, re.I))


CHECKS: dict[str, Callable[..., bool]] = {check.__name__: check for check in (
    starts_with, ends_with, ends_with_question, max_words, max_sentences, lowercase, bullets, emoji,
    exclaims, quoted, mentions)}


def honours(check: list, response: str) -> bool:
    """Whether the response meets a context's check, [name, *arguments]; a blank response meets none."""
    name, *args = check
    return bool(response.strip()) and CHECKS[name](response, *args)


# -------------------------------------------------------------------------------- pairs

@dataclass
class Pair:
    """A chosen and N rejected responses, all trained under `prompt_ids`; ids are those that were sampled."""

    id: str
    prompt: str
    context: str | None
    chosen: str
    rejected: list[str]
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[list[int]]
    source_ids: list[list[int]]  # the prompt each rejected response was really sampled from
    finished: list[bool]  # chosen, then rejected
    gain_chosen: float | None = None  # log pi_ref(y|x,c) - log pi_ref(y|x) in nats, summed over tokens
    gain_rejected: list[float] | None = None


def other_rows(examples: list[Example], seed: int) -> list[Example]:
    """For each row another one, by seed, with another context (in data without contexts: another prompt)."""
    key = (lambda e: e.context) if any(e.context for e in examples) else (lambda e: e.prompt)
    if len({key(e) for e in examples}) < 2:
        raise UserError("--neg random needs at least two different contexts (without contexts: two prompts)")
    others = []
    for i, example in enumerate(examples):
        draw = random.Random(derive("random", seed, i))
        other = example
        while key(other) == key(example):
            other = draw.choice(examples)
        others.append(other)
    return others


def negative_turns(examples: list[Example], neg: str, seed: int) -> list[str]:
    """The user turn that each row's rejected response is sampled from (section 4.2)."""
    has_contexts = all(e.context for e in examples)
    if neg == "missing":
        if not has_contexts:
            raise UserError("--neg missing needs a context in every row; --neg random works without")
        return [e.turn(None) for e in examples]  # (i) pi_ref(.|x)
    others = other_rows(examples, seed)
    if has_contexts:
        return [e.turn(o.context) for e, o in zip(examples, others, strict=True)]  # (ii) pi_ref(.|x, c')
    return [o.turn(o.context) for o in others]  # no contexts: pi_ref(.|x')


def make_pairs(model: Decoder, tokenizer: Tokenizer, examples: list[Example], neg: str, sampling: Sampling,
               seed: int, slots: int = 128) -> tuple[list[Pair], dict]:
    """Sample (or take ready) both responses of every example, drop useless pairs, measure context gains.

    Returns the pairs and their statistics: counts, unfinished share, seconds, context gain, checker rates.
    """
    start = time.perf_counter()
    prompts = [tokenizer.chat(e.turn(e.context)) for e in examples]
    ready = examples[0].chosen is not None
    turns = [e.turn(None) for e in examples] if ready else negative_turns(examples, neg, seed)
    sources = [tokenizer.chat(turn) for turn in turns]
    if ready:
        texts = [e.chosen for e in examples] + [e.rejected for e in examples]
        responses = [(tokenizer.response(text), True) for text in texts]
    else:
        bar = progress(2 * len(examples), "responses", "sampling")
        keys = [(i, 0) for i in range(len(examples))] + [(i, 1) for i in range(len(examples))]
        samples = generate(model, prompts + sources, sampling, tokenizer.stop_ids, seed, keys, slots, bar)
        bar.close()
        responses = [(s.ids, s.finished) for s in samples]
        texts = [tokenizer.decode(s.ids) for s in samples]
    n, pairs, kept = len(examples), [], []
    dropped = dict(empty=0, identical=0)
    for i, e in enumerate(examples):
        (chosen_ids, done), (rejected_ids, rejected_done) = responses[i], responses[n + i]
        chosen, rejected = texts[i], texts[n + i]
        if not chosen.strip() or not rejected.strip():
            dropped["empty"] += 1
        elif chosen_ids == rejected_ids:
            dropped["identical"] += 1
        else:
            kept.append(e)
            pairs.append(Pair(e.id, e.prompt, e.context, chosen, [rejected], prompts[i], chosen_ids,
                              [rejected_ids], [sources[i]], [done, rejected_done]))
    if not pairs:
        raise UserError(f"no pair is left of {n} examples: {dropped}")
    sampled = time.perf_counter() - start
    gains = context_gain(model, tokenizer, kept, pairs)
    tokens = sum(len(ids) for ids, _ in responses)
    stats = dict(examples=n, pairs=len(pairs), dropped=dropped,
                 unfinished=sum(not done for _, done in responses) / (2 * n), response_tokens=tokens,
                 seconds_sampling=sampled, seconds_gain=time.perf_counter() - start - sampled, gain=gains)
    if any(e.check for e in examples):
        stats["checks"] = check_rates(kept, pairs, neg)
    return pairs, stats


def context_gain(model: Decoder, tokenizer: Tokenizer, examples: list[Example], pairs: list[Pair]) -> dict:
    """Fill in each pair's context gain and return its means, per response and per token, of both sides.

    log pi_ref(y|x,c) - log pi_ref(y|x): for `missing` its mean over chosen responses is I(Y;C|X) plus a KL,
    an upper bound of the mutual information. Without contexts the second prompt is the one the rejected
    response came from.
    """
    right = [(p.prompt_ids, [p.chosen_ids, *p.rejected_ids]) for p in pairs]
    bare = [(tokenizer.chat(e.turn(None)) if e.context else p.source_ids[0], [p.chosen_ids, *p.rejected_ids])
            for e, p in zip(examples, pairs, strict=True)]
    bar = progress(2 * len(pairs), "passes", "context gain")
    with_context, without = (sequence_logps(model, groups, bar=bar) for groups in (right, bare))
    bar.close()
    for p, a, b in zip(pairs, with_context, without, strict=True):
        p.gain_chosen, *p.gain_rejected = (x - y for x, y in zip(a, b, strict=True))
    chosen, rejected = [p.gain_chosen for p in pairs], [g for p in pairs for g in p.gain_rejected]
    return dict(
        chosen=sum(chosen) / len(chosen),
        chosen_per_token=sum(chosen) / sum(len(p.chosen_ids) for p in pairs),
        rejected=sum(rejected) / len(rejected),
        rejected_per_token=sum(rejected) / sum(len(r) for p in pairs for r in p.rejected_ids),
    )  # fmt: skip


def check_rates(examples: list[Example], pairs: list[Pair], neg: str) -> list[dict]:
    """Per demo context: how often chosen responses honour it, and how often context-free ones do by chance.
    """
    free = [r for p in pairs for r in p.rejected] if neg == "missing" else []
    rates = []
    rows = list(zip(examples, pairs, strict=True))
    for context_id, check in sorted({(e.context_id, tuple(e.check)) for e in examples}):
        own = [honours(check, p.chosen) for e, p in rows if e.context_id == context_id]
        rates.append(dict(context=context_id, check=list(check), chosen=sum(own) / len(own), n=len(own),
                          context_free=sum(honours(check, r) for r in free) / len(free) if free else None))
    return rates


def report(stats: dict) -> None:
    """Print what a user should know before an hour of training."""
    s, g = stats, stats["gain"]
    print(f"{s['pairs']} pairs of {s['examples']} examples (dropped: {s['dropped']['empty']} empty, "
          f"{s['dropped']['identical']} identical), {s['unfinished']:.0%} of responses unfinished, "
          f"{s['response_tokens']} tokens in {s['seconds_sampling']:.0f} s")
    print(f"context gain, nats: chosen {g['chosen']:+.2f} a response, {g['chosen_per_token']:+.3f} a token; "
          f"rejected {g['rejected']:+.2f}, {g['rejected_per_token']:+.3f}")
    if g["chosen"] < 1:
        print("warning: the context gain of chosen responses is near zero: answers hardly depend on the "
              "context, so there is little for MIPO to learn (limitation iii of the paper)")
    for r in stats.get("checks", []):
        free = "" if r["context_free"] is None else f", {r['context_free']:4.0%} of context-free"
        print(f"  {r['context']} {' '.join(map(str, r['check'])):40.40} honoured by {r['chosen']:4.0%} of "
              f"{r['n']} chosen responses{free}")


def save_pairs(folder: Path, pairs: list[Pair], meta: dict) -> None:
    """pairs.jsonl, one pair a line, and pairs.json: settings and statistics. pairs.json is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "pairs.jsonl", (dataclasses.asdict(p) for p in pairs))
    write_json(folder / "pairs.json", meta)


def load_pairs(folder: Path, settings: dict | None = None) -> list[Pair]:
    """Read pairs.jsonl back; with `settings`, refuse pairs that were made with others, naming the difference.
    """
    made = read_json(folder / "pairs.json")["settings"]
    for key, value in (settings or {}).items():
        if made.get(key) != value:
            raise UserError(f"{folder / 'pairs.jsonl'} was made with {key} {made.get(key)!r}, not {value!r}: "
                            "give the same arguments or another folder")
    try:
        return [Pair(**row) for _, row in read_jsonl(folder / "pairs.jsonl")]
    except TypeError as e:
        raise UserError(f"{folder / 'pairs.jsonl'} does not hold pairs: {e}") from None


# -------------------------------------------------------------------------------- command line

@dataclass
class DataArgs:
    """What every program that samples needs to be told; train.py and eval.py add to it."""

    data: str = option("demo", "demo, or a .jsonl file of your own", "data")
    model: str = option("Qwen/Qwen2.5-1.5B-Instruct", "Hugging Face folder or hub id", "data")
    limit: int = option(0, "use at most this many examples, 0 for all", "data")
    seed: int = option(0, "decides splits, negatives, every draw and the training order", "data")
    temperature: float | None = option(None, "default: the data set's", "sampling")
    top_p: float | None = option(None, "default: the data set's", "sampling")
    top_k: int = option(0, "0 for all", "sampling")
    max_new_tokens: int | None = option(None, "longest response; default: the data set's", "sampling")
    date: str = option(TEMPLATE_DATE, "date for chat templates that print one", "sampling")
    slots: int = option(128, "responses sampled together", "sampling")
    dtype: str = option("bfloat16", "arithmetic; masters are float32", "sampling", ("bfloat16", "float32"))

    def __post_init__(self):
        if self.slots < 1 or self.limit < 0:
            raise UserError(f"--slots {self.slots} must be at least 1 and --limit {self.limit} at least 0")


@dataclass
class PairArgs(DataArgs):
    neg: str = option("missing", "where rejected responses come from", "data", ("missing", "random"))


@dataclass
class Args(PairArgs):
    split: str = option("train", "which part to make pairs of", "data", SPLITS)
    out: str = option("", "folder for pairs.jsonl and pairs.json", "data")


def sampling_for(args: DataArgs) -> Sampling:
    """The data set's sampling settings with the user's changes."""
    base = SAMPLING["demo" if args.data == "demo" else "jsonl"]
    changes = dict(temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens)
    return dataclasses.replace(base, top_k=args.top_k, **{k: v for k, v in changes.items() if v is not None})


def examples_for(args: DataArgs, split: str) -> list[Example]:
    return load_examples(args.data, split, args.seed)[: args.limit or None]


def pair_settings(args: PairArgs, examples: list[Example]) -> dict:
    """All that decides what the pairs are: stored beside them, and compared before they are used again."""
    rows = [dataclasses.asdict(e) for e in examples]
    data = hashlib.sha256(repr(rows).encode()).hexdigest()[:12]
    return dict(data=args.data, data_fingerprint=data, examples=len(examples), model=args.model,
                neg=args.neg, seed=args.seed, sampling=dataclasses.asdict(sampling_for(args)), date=args.date,
                dtype=args.dtype)


def pairs_for(args: PairArgs, split: str, folder: Path) -> list[Pair]:
    """The pairs of a split: those in `folder` if the same settings made them, else sampled into it."""
    examples = examples_for(args, split)
    settings = pair_settings(args, examples)
    if (folder / "pairs.json").exists():
        pairs = load_pairs(folder, settings)
        print(f"{len(pairs)} pairs from {folder / 'pairs.jsonl'}")
        return pairs
    tokenizer = Tokenizer(args.model, args.date)
    model = load(args.model, getattr(torch, args.dtype), device=default_device())
    print(f"sampling with {sampling_for(args)}")
    pairs, stats = make_pairs(model, tokenizer, examples, args.neg, sampling_for(args), args.seed, args.slots)
    save_pairs(folder, pairs, dict(settings=settings, statistics=stats, environment=environment()))
    report(stats)
    return pairs


def program() -> None:
    args = parse(Args, usage=__doc__)
    find(args.model)
    if not args.out:
        raise UserError("usage: python pairs.py --model DIR --out FOLDER; --help lists all arguments")
    if (Path(args.out) / "pairs.json").exists():
        raise UserError(f"{args.out} already holds pairs: name another folder")
    pairs_for(args, args.split, Path(args.out))
    print(f"written: {Path(args.out) / 'pairs.jsonl'}")


if __name__ == "__main__":
    main(program)
