"""pairs.py - data sets, and the contrastive pairs that MIPO trains on (sections 4.1 and 4.2 of the paper).

    chosen    y_c ~ pi_ref(.|x, c)      x the prompt, c the user's context
    rejected  y_r ~ pi_ref(.|x)         --neg missing
              y_r ~ pi_ref(.|x, c')     --neg random: c' of another row
              y_r ~ pi_ref(.|x')        --neg random in data without contexts: another prompt
              y_r = another row's y_c   --neg reshuffle
              y_r = letters and digits  --neg noise (Table 6's control)

Both are then trained under the same right prompt (x, c). --n-neg N draws N rejected responses for every
chosen one. Each pair also keeps the prompts its rejected responses really came from, and its *context gain*
log pi_ref(y|x, c) - log pi_ref(y|x), the reward MIPO maximises (Eq. 14).
What differs from the paper: sampling settings, splits and which turn is taken of a conversation, which it
does not give, are those of DATA and the loaders below; PRISM's contexts are by default the users' own words;
identical pairs and empty responses are dropped and counted. Noise is as long as the chosen response (Table
6's caption; R5 says the rejected one).

    python pairs.py --data demo --neg missing --model DIR --out FOLDER

writes FOLDER/pairs.jsonl, one pair a line, and FOLDER/pairs.json, how they were made and what they are like.
"""

import csv
import dataclasses
import difflib
import functools
import hashlib
import json
import os
import random
import re
import string
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from judge import PAPER, Judge, JudgeArgs, infer, rewrite, rubric_text
from losses import sequence_logps
from model import Decoder, download, find, load
from run import (UserError, default_device, derive, environment, gather, main, mine, option, parse, progress,
                 rank, read_grown, read_json, read_jsonl, write_json, write_jsonl)
from sample import TEMPLATE_DATE, Sample, Sampling, Tokenizer, generate

ASSETS = Path(__file__).parent / "assets"
QWEN = "Qwen/Qwen2.5-1.5B-Instruct"
SPLITS = ("train", "validation", "test")
NEGATIVES = ("missing", "random", "reshuffle", "noise")
GAINS = ("chosen", "chosen_per_token", "rejected", "rejected_per_token")
PART = "pairs.jsonl.process-*"  # what processes other than the first have sampled
SPLIT_SEED = 42  # the paper's data sets are split alike for every --seed: seeds then share their test rows
SAMPLING = dict(demo=Sampling(1.0, 1.0, 96), jsonl=Sampling(1.0, 1.0, 256))  # pairs; method: the theory's own
LETTERS = "ABCDEFGH"
DEMO_CONTEXTS = 5  # contexts drawn for every demo training prompt: 600 pairs

# The user's turn, by the data set's style. Appendix D.2's request and its frame for conversations, D.1's math
# prompt with D.3's shots; the frame of multiple-choice questions is ours.
REQUEST = "{x} Please respect the following requirements made by the user: {c}"
SHORT = "Give me short 2-3 sentence answers to the following prompt: {x} Respond with short 2-3 sentences."
MATH = ("You are a helpful math assistant. Solve the following problem step-by-step and give the final "
        "answer after ####.")
CHOICE = ("Answer this multiple-choice question. Think step by step, then end with a line of the form "
          "'The answer is: <X>', where <X> is the letter of the right choice.\n\n{x}")


# -------------------------------------------------------------------------------- data

@dataclass
class Example:
    """One row of a data set. `chosen` and `rejected` are there only where a file brings ready pairs."""

    id: str
    prompt: str
    split: str
    context: str | None = None
    user: str | None = None
    reference: str | None = None  # a response to compare with: the one a person chose, or a strong model's
    answer: str | None = None  # the right number or letter
    context_id: str | None = None
    group: str | None = None  # demo: "seen" or "unseen" context
    check: list | None = None  # demo: [checker name, arguments...]
    chosen: str | None = None
    rejected: str | None = None
    style: str = "plain"  # of the user's turn: plain, short, math or choice
    items: list[str] | None = None  # the context's parts, which a judge scores one by one
    worse: str | None = None  # the response that a person preferred `reference` to
    rubric: str | None = None  # how a judge compares two responses
    choices: list[str] | None = None  # of a multiple-choice question
    preference: dict | None = None  # Multi-Bench: what --contexts infer has put in the user's words

    def turn(self, context: str | None) -> str:
        """The user's turn with a context (this row's, another's or none)."""
        return user_turn(self.prompt, context, self.style)


@functools.cache
def shots() -> str:
    """The eight worked examples of appendix D.3."""
    form = "Example {}:\nQuestion: {question}\nAnswer: {answer}\n#### {short_answer}"
    return "\n\n".join(form.format(i, **shot) for i, shot in enumerate(read_json(PAPER)["shots"], 1))


def user_turn(prompt: str, context: str | None, style: str = "plain") -> str:
    """What the user says: the prompt, and the request to respect the context where there is one."""
    if style == "math":
        return f"{MATH}\n\n{shots()}\n\nNew question: {prompt}"
    if style == "choice":
        return CHOICE.format(x=prompt)
    text = REQUEST.format(x=prompt, c=context) if context else prompt
    return SHORT.format(x=text) if style == "short" else text


@dataclass(frozen=True)
class DataSet:
    """Where a data set of the paper is, and how it is used."""

    load: Callable[..., list[Example]]
    hub: str
    files: tuple[str, ...]  # what is fetched from the hub
    sampling: Sampling  # of pairs: the authors' scripts
    note: str  # what is chosen here where the paper is silent
    terms: str  # licence and source
    temperature: float = 0.1  # of evaluation, at top_p 0.9
    contexts: str = "given"


def load_examples(data: str, split: str, seed: int = 0) -> list[Example]:
    """The examples of one split of a data set in a fixed order.

    data: demo, a *.jsonl file, or one of DATA, with ":FOLDER" where it is not to come from the hub.
    """
    name, _, folder = data.partition(":")
    if data == "demo":
        examples = load_demo(seed)
    elif data.endswith(".jsonl"):
        examples = load_jsonl(Path(data), seed)
    elif name in DATA:
        examples = load_known(name, folder)
    else:
        near = difflib.get_close_matches(name, DATA, n=1)
        raise UserError(f"--data {data!r} is neither demo, a .jsonl file nor one of {', '.join(DATA)}"
                        + (f" (did you mean {near[0]}?)" if near else ""))
    chosen = [e for e in examples if e.split == split]
    if not chosen:
        raise UserError(f"--data {data}: no example in the {split} part (of {len(examples)} in all)")
    return chosen


@functools.cache
def load_known(name: str, folder: str) -> list[Example]:
    """A data set of the paper, from the hub or a folder; printed once: sizes, choices of ours, terms."""
    d = DATA[name]
    if folder and not all(Path(part).is_dir() for part in folder.split(",")):
        raise UserError(f"--data {name}:{folder}: there is no such folder")
    place = folder or str(download(d.hub, d.files, "dataset"))
    try:
        examples = d.load(place)
    except (KeyError, ValueError) as e:  # a column or a label that is not there
        raise UserError(f"{place} is not laid out as {d.hub} is: {type(e).__name__} {e}") from None
    counts = ", ".join(f"{sum(e.split == s for e in examples)} {s}" for s in SPLITS)
    print(f"{name}: {counts}; {d.note}. {d.terms}")
    return examples


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
    "reference", "answer", "user", "id", "split"; or ready pairs with "chosen" and "rejected" too. "chosen"
    alone is for SFT, or to be contrasted with noise or reshuffled.

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
            row |= dict(items=row["context"], context=" ".join(row["context"]))
        if not row.get("prompt", "").strip():
            raise UserError(f"{where}: no 'prompt'")
        if "rejected" in row and "chosen" not in row:
            raise UserError(f"{where}: ready pairs need 'chosen' too, not 'rejected' alone")
        for key in ("chosen", "rejected"):
            if examples and (key in row) != (getattr(examples[0], key) is not None):
                raise UserError(f"{where}: some rows have {key!r} and some have not")
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


# -------------------------------------------------------------------------------- the paper's data sets

def read_rows(folder: str, *patterns: str) -> list[dict]:
    """The rows of the files that match the first pattern that any file matches: jsonl, json, csv, parquet."""
    for pattern in patterns:
        if files := sorted(Path(folder).glob(pattern)):
            break
    else:
        raise UserError(f"{folder} has no {' or '.join(patterns)}")
    rows: list[dict] = []
    for file in files:
        if file.suffix == ".jsonl":
            rows += [row for _, row in read_jsonl(file)]
        elif file.suffix == ".json":
            rows += read_json(file)
        elif file.suffix == ".csv":
            csv.field_size_limit(sys.maxsize)
            with open(file, newline="", encoding="utf-8") as f:
                rows += csv.DictReader(f)
        else:
            try:
                import pyarrow.parquet
            except ImportError:
                raise UserError(f"{file} is read with pyarrow: pip install pyarrow") from None
            rows += pyarrow.parquet.read_table(file).to_pylist()
    return rows


def divide(examples: list[Example], key: Callable[[Example], str], **sizes: int | None) -> list[Example]:
    """Give the parts (test=.., validation=.., train=..; None: all that is left) so many rows, by SPLIT_SEED.

    Rows of one key stand in one part: what is too much of the last key's is left out.
    """
    groups: dict[str, list[Example]] = {}
    for e in examples:
        groups.setdefault(key(e), []).append(e)
    left, whole = random.Random(SPLIT_SEED).sample(sorted(groups), len(groups)), []
    for split, size in sizes.items():
        part: list[Example] = []
        while left and (size is None or len(part) < size):
            part += groups[left.pop()]
        whole += [dataclasses.replace(e, split=split) for e in part[:size]]
    return whole


def preferred(reference: str, others: list[str], *seed: str) -> tuple[str, str] | None:
    """A chosen response and one rejected by seed, of another text; None where there is none."""
    others = sorted({text for text in others if text.strip() and text != reference})
    if not reference.strip() or not others:
        return None
    return reference, random.Random(derive("rejected", *seed)).choice(others)


def load_prism(folder: str) -> list[Example]:
    """PRISM (Kirk et al., 2024): the first turn of every conversation, with the user's own system_string."""
    users = {row["user_id"]: row for row in read_rows(folder, "survey.jsonl")}
    examples, dropped = [], 0
    for row in read_rows(folder, "conversations.jsonl"):
        turn = [t for t in row["conversation_history"] if t["turn"] == 0]
        prompt = next((t["content"] for t in turn if t["role"] == "user"), "")
        said = [t for t in turn if t["role"] == "model" and t["content"] not in (None, "", "EMPTY STRING")]
        best = next((t["content"] for t in said if t["if_chosen"]), "")
        pair = preferred(best, [t["content"] for t in said if not t["if_chosen"]], row["conversation_id"])
        words = (users.get(row["user_id"], {}).get("system_string") or "").strip()
        if pair is None or not prompt.strip() or not words:
            dropped += 1
            continue
        examples.append(Example(row["conversation_id"], prompt, "", words, row["user_id"], pair[0],
                                style="short", items=[words], worse=pair[1]))
    print(f"prism: {dropped} conversations left out: no prompt, no system_string, nothing chosen or rejected")
    return divide(examples, lambda e: e.user, test=194, validation=194, train=7294)


def load_community(folder: str) -> list[Example]:
    """Community Alignment (Zhang et al., 2025): English first turns, a row for each prompt and annotator."""
    examples, seen, dropped = [], set(), 0
    for row in read_rows(folder, "community_alignment.csv", "data/filtered_community_alignment.csv",
                         "data/full_community_alignment.csv", "*.csv"):
        if row["assigned_lang"] != "en":
            continue
        texts = {f"response_{x}": row[f"first_turn_response_{x}"] or "" for x in "abcd"}
        texts = {x: text.removesuffix("<|end_of_text|>").strip() for x, text in texts.items()}
        prompt, user = (row["first_turn_prompt"] or "").strip(), row["annotator_id"]
        best = texts.pop(row["first_turn_preferred_response"], "")
        pair = preferred(best, list(texts.values()), row["conversation_id"])
        if pair is None or not prompt or (prompt, user) in seen:
            dropped += 1
            continue
        seen.add((prompt, user))
        examples.append(Example(row["conversation_id"], prompt, "", None, user, pair[0], style="short",
                                worse=pair[1]))
    print(f"community: {dropped} English rows left out: incomplete, or an annotator's prompt seen before")
    return divide(examples, lambda e: e.user, test=200, validation=200, train=6564)


def load_multibench(folder: str) -> list[Example]:
    """Multifaceted Bench (Lee et al., 2024): a row for each of a prompt's four preferences."""
    examples = []
    for i, row in enumerate(read_rows(folder, "data/train-*.parquet", "*.parquet", "*.jsonl")):
        if "preference_set" not in row:
            raise UserError(f"{folder}: an old revision of Multifaceted Bench, without preference_set")
        judged = row.get("rubrics") or row.get("rubric")
        for j, (p, rubric) in enumerate(zip(row["preference_set"], judged, strict=True)):
            examples.append(Example(f"mb{i:03}-{j}", row["prompt"], "", p["description"], None,
                                    row["reference_answer"], items=[p["description"]], preference=p,
                                    rubric=rubric_text(rubric)))
    return divide(examples, lambda e: e.prompt, test=84, validation=84, train=None)


def math_example(id: str, question: str, answer: str, reference: str | None, split: str) -> Example:
    right = number(str(answer))
    if right is None:
        raise ValueError(f"{id}: no number in {answer!r}")
    return Example(id, question, split, answer=right, reference=reference, style="math")


def gsm_rows(folder: str, split: str) -> list[Example]:
    return [math_example(f"gsm-{split}-{i}", r["question"], r["answer"].split("####")[-1], r["answer"], split)
            for i, r in enumerate(read_rows(folder, f"main/{split}-*.parquet", f"{split}.jsonl"))]


def load_gsm8k(folder: str) -> list[Example]:
    """GSM8K (Cobbe et al., 2021): 5,000 training and 200 test problems; validation from the other training
    ones."""
    test = divide(gsm_rows(folder, "test"), lambda e: e.id, test=200)
    return divide(gsm_rows(folder, "train"), lambda e: e.id, train=5000, validation=200) + test


def load_svamp(folder: str) -> list[Example]:
    """SVAMP (Patel et al., 2021), 700 and 300 problems, and 700 of GSM8K to train on too.

    folder: SVAMP's, and GSM8K's after a comma, else that comes from the hub. All of SVAMP is in the training
    or the test part, so validation is of 200 more problems of GSM8K.
    """
    folder, _, gsm = folder.partition(",")
    whole = Path(folder, "SVAMP.json").exists()  # the authors' own file, not split yet

    def some(split: str) -> list[Example]:
        rows = read_rows(folder, "SVAMP.json" if whole else f"{split}.json", f"data/{split}-*.parquet")
        bodies = [r["Body"].strip() for r in rows]
        bodies = [b if b.endswith((".", "?", "!", ",")) else b + "." for b in bodies]
        return [math_example(r["ID"], f"{b} {r['Question'].strip()}", r["Answer"], None, split)
                for b, r in zip(bodies, rows, strict=True)]

    svamp = divide(some(""), lambda e: e.id, train=700, test=300) if whole else some("train") + some("test")
    gsm = gsm or str(download(DATA["gsm8k"].hub, DATA["gsm8k"].files, "dataset"))
    return svamp + divide(gsm_rows(gsm, "train"), lambda e: e.id, train=700, validation=200)


def choice_example(id: str, question: str, choices: list[str], right: int, split: str) -> Example:
    """A multiple-choice question; its letters go by position, whatever the data call them."""
    lines = [f"{letter}: {text}" for letter, text in zip(LETTERS, choices, strict=False)]
    return Example(id, "\n".join([question, *lines]), split, answer=LETTERS[right], style="choice",
                   choices=list(choices))


def load_arc(folder: str, part: str) -> list[Example]:
    """ARC (Clark et al., 2018): all training and validation questions, 500 of the test ones."""
    examples = []
    for split in SPLITS:
        rows = [choice_example(r["id"], r["question"], r["choices"]["text"],
                               r["choices"]["label"].index(r["answerKey"]), split)
                for r in read_rows(folder, f"{part}/{split}-*.parquet", f"{part}/{split}.jsonl")]
        examples += divide(rows, lambda e: e.id, test=500) if split == "test" else rows
    return examples


def load_mmlu(folder: str) -> list[Example]:
    """MMLU (Hendrycks et al., 2021; in an earlier version of the paper): 5,000, 200 and 500 questions."""
    examples = []
    for split, file, size in (("train", "auxiliary_train", 5000), ("validation", "validation", 200),
                              ("test", "test", 500)):
        rows = [choice_example(f"{file}-{i}", r["question"], r["choices"], int(r["answer"]), split)
                for i, r in enumerate(read_rows(folder, f"all/{file}-*.parquet", f"all/{file}.jsonl"))]
        examples += divide(rows, lambda e: e.id, **{split: size})
    return examples


TALK, THINK, ASK = Sampling(0.1, 0.9, 512), Sampling(0.1, 0.9, 1024), Sampling(1.0, 0.9, 1024)
DATA = dict(
    prism=DataSet(
        load_prism, "HannahRoseKirk/prism-alignment", ("survey.jsonl", "conversations.jsonl"), TALK,
        "first turns, one rejected response by seed, users disjoint between parts; contexts are the users' "
        "own system_string, where the paper had GPT-4o infer them (--contexts infer)",
        "Human text CC-BY-4.0, model responses CC-BY-NC-4.0; Kirk et al., 2024, DOI 10.57967/hf/2113"),
    community=DataSet(
        load_community, "facebook/community-alignment-dataset",
        ("community_alignment.csv", "data/filtered*.csv"), TALK,
        "English first turns, one rejected response by seed, annotators disjoint between parts; contexts are "
        "inferred by --judge or by the model itself, where the paper asked GPT-4o",
        "CC-BY-4.0; Zhang et al., 2025, arXiv 2507.09650", contexts="infer"),
    multibench=DataSet(
        load_multibench, "kaist-ai/Multifaceted-Bench", ("data/*.parquet",), THINK,
        "split by prompt, validation out of the paper's 3,600 training rows; contexts are the preferences' "
        "descriptions, which --contexts infer puts in the user's words; references are GPT-4's",
        "CC-BY-4.0; Lee et al., 2024, arXiv 2405.17977"),
    gsm8k=DataSet(
        load_gsm8k, "openai/gsm8k", ("main/*.parquet",), THINK,
        "validation is other training problems", "MIT; Cobbe et al., 2021, arXiv 2110.14168"),
    svamp=DataSet(
        load_svamp, "ChilleD/SVAMP", ("train.json", "test.json"), THINK,
        "half of training and all of validation are GSM8K problems",
        "MIT; Patel et al., 2021, arXiv 2103.07191"),
    mmlu=DataSet(
        load_mmlu, "cais/mmlu", ("all/auxiliary_train-*", "all/validation-*", "all/test-*"), ASK,
        "not in the paper's last version: sizes are ours", "MIT; Hendrycks et al., 2021, arXiv 2009.03300",
        temperature=1.0),
)
DATA |= {f"arc-{part.lower()}": DataSet(
    functools.partial(load_arc, part=f"ARC-{part}"), "allenai/ai2_arc", (f"ARC-{part}/*.parquet",), ASK,
    "prompt ours, letters by position", "CC-BY-SA-4.0; Clark et al., 2018, arXiv 1803.05457", temperature=1.0)
    for part in ("Easy", "Challenge")}


# -------------------------------------------------------------------------------- contexts

def add_contexts(examples: list[Example], args: "DataArgs") -> list[Example]:
    """The examples with their contexts: the data's own, inferred by a judge (--contexts infer; Multi-Bench:
    put in the user's words), or those of a file. Rows that get none are dropped and counted.

    Inferred ones are kept by the judge's cache, and written to a file beside it for --contexts FILE.
    """
    mode = contexts_of(args)
    if mode == "given":
        return examples
    if mode == "infer":
        asked = args if args.judge else dataclasses.replace(args, judge=args.model, judge_url="")
        judge = Judge(asked, args.slots, args.date)
        if examples[0].preference:
            found = [said and [said] for said in rewrite(judge, [e.preference for e in examples])]
        elif all(e.reference and e.worse for e in examples):
            found = infer(judge, [(e.prompt, e.reference, e.worse) for e in examples])
        else:
            raise UserError(f"--contexts infer: {args.data} has no choice of two responses to infer from")
        items = {e.id: texts for e, texts in zip(examples, found, strict=True) if texts}
        file = Path(args.judge_cache).with_name(f"contexts-{args.data.partition(':')[0]}.jsonl")
        known = {row["id"]: row["items"] for row in read_grown(file)} if not rank() else {}
        write_jsonl(file, (dict(id=id, items=texts) for id, texts in sorted((known | items).items())))
        print(f"contexts inferred by {judge.args.judge}, written to {file}")
    else:
        rows = read_jsonl(Path(mode))
        for at, row in rows:
            if not (isinstance(row.get("id"), str) and isinstance(row.get("items"), list) and row["items"]
                    and all(isinstance(item, str) for item in row["items"])):
                raise UserError(f"{mode}:{at}: not a line of contexts, {{\"id\": text, \"items\": [texts]}}")
        items = {row["id"]: row["items"] for _, row in rows}
    kept = [dataclasses.replace(e, items=items[e.id], context=" ".join(items[e.id]))
            for e in examples if e.id in items]
    print(f"contexts of {len(kept)} of {len(examples)} examples; the others are dropped")
    if not kept:
        raise UserError(f"--contexts {mode}: no example of {args.data} has a context")
    return kept


def note_of(args: "DataArgs") -> dict:
    """What eval.json says of the data: which, where their contexts are from, choices of ours, licence."""
    name, contexts = args.data.partition(":")[0], contexts_of(args)
    by = (args.judge or Path(args.model).name) if contexts == "infer" else None
    known = DATA.get(name)
    return dict(name=name, contexts=contexts, inferred_by=by, note=known and known.note,
                terms=known and known.terms)


def contexts_of(args: "DataArgs") -> str:
    """given, infer, or a file: --contexts, else what the data set needs."""
    name = args.data.partition(":")[0]
    return args.contexts or (DATA[name].contexts if name in DATA else "given")


# -------------------------------------------------------------------------------- answers

NUMBER = r"(?P<sign>[-+\u2212]?)\s*[$\u00a3\u20ac]?\s*(?P<minus>[-\u2212]?)" \
         r"(?P<value>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?![\d,]*\d)(?!\s*/\s*\d)"


def number(text: str) -> str | None:
    """The number that a text begins with, exactly, in its shortest form: 1,080.50 is 1080.5, -$7 is -7.

    Sign, currency, thousands commas and decimals are read, marks before it ("**") and whatever follows are
    passed over. A fraction is none.
    """
    found = re.match(r"[\s*_\\(=:]*" + NUMBER, text)
    if found is None:
        return None
    whole, _, decimals = found["value"].replace(",", "").partition(".")
    value = (whole.lstrip("0") or "0") + ("." + decimals).rstrip("0").rstrip(".")
    return "-" * (value != "0" and (found["sign"] in ("-", "\u2212") or found["minus"] != "")) + value


def extract(style: str, text: str, choices: int = 0, flexible: bool = False) -> str | None:
    """The final answer of a response, None where there is none.

    math: the number after the last ####; flexible: else the last number. choice: the letter after the last
    "the answer is:"; flexible: else the last letter that stands alone.
    """
    if style == "math":
        found = number(text.rpartition("####")[2]) if "####" in text else None
        if found is None and flexible:
            starts = re.finditer(r"(?<![\w.,])(?:[-+\u2212$\u00a3\u20ac]+\s?)?\.?\d", text)
            read = (number(text[m.start():]) for m in reversed(list(starts)))
            found = next((n for n in read if n is not None), None)
        return found
    letters = LETTERS[:choices]
    said = re.findall(rf"(?i:the (?:correct |right |best )?answer is)(?:\s*:[\s*(<\[]*([{letters}])(?![\w'])"
                      rf"|[\s*(<\[]+([{letters}])(?=[.,;)*>\]]|\s*$|\s*\n))", text)
    if not said and flexible:
        said = re.findall(rf"(?<![\w'])()([{letters}])(?![\w']|\s+[a-z])", text)
    return (said[-1][0] or said[-1][1]) if said else None


def verify(example: Example, text: str, flexible: bool = False) -> bool | None:
    """Whether a response is right, by the example's checker or answer; None where it has neither."""
    if example.check:
        return honours(example.check, text)
    if example.answer is None or example.style not in ("math", "choice"):
        return None
    return extract(example.style, text, len(example.choices or ()), flexible) == example.answer


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
    style: str = "plain"  # of the user's turn, as in Example


def other_rows(examples: list[Example], seed: int, count: int = 1) -> list[list[Example]]:
    """For each row `count` others by seed, with another context (in data without contexts: another prompt).
    """
    key = (lambda e: e.context) if any(e.context for e in examples) else (lambda e: e.prompt)
    if len({key(e) for e in examples}) < 2 or len({e.user or e.id for e in examples}) < 2:
        raise UserError("--neg random needs two different contexts, of two users where there are users "
                        "(without contexts: two different prompts)")
    others = []
    for i, example in enumerate(examples):
        draw = random.Random(derive("random", seed, i))
        row: list[Example] = []
        tries = 0
        while len(row) < count:
            other, tries = draw.choice(examples), tries + 1
            if key(other) != key(example) and (other.user is None or other.user != example.user):
                row.append(other)
            elif tries > 100 * len(examples):
                raise UserError(f"--neg random: no other user than {example.user!r} has another context than "
                                f"example {example.id!r}")
        others.append(row)
    return others


def negative_turns(examples: list[Example], neg: str, seed: int, count: int = 1) -> list[list[str]]:
    """The user turns that each row's `count` rejected responses are sampled from (section 4.2).

    None for `reshuffle` and `noise`, which sample no rejected responses.
    """
    has_contexts = all(e.context for e in examples)
    if neg in ("reshuffle", "noise") or not count:
        return [[] for _ in examples]
    if neg == "missing":
        if not has_contexts:
            raise UserError("--neg missing needs a context in every row; random, reshuffle and noise do not")
        return [[e.turn(None)] * count for e in examples]  # (i) pi_ref(.|x)
    others = other_rows(examples, seed, count)
    if has_contexts:
        return [[e.turn(o.context) for o in row] for e, row in zip(examples, others, strict=True)]  # (ii)
    return [[o.turn(o.context) for o in row] for row in others]  # no contexts: pi_ref(.|x')


def sample_pairs(model: Decoder, tokenizer: Tokenizer, examples: list[Example], turns: list[list[str]],
                 sampling: Sampling, seed: int, slots: int, folder: Path | None) -> list[Pair]:
    """Sample every example's chosen response and one rejected response for each of its `turns`.

    With a folder, every pair is written as it becomes whole, and those found there are not sampled again.
    Several processes share the work, each with a file of its own; the text is that of one process.
    """
    done: dict[str, Pair] = {}
    if folder and not rank():
        n = len(turns[0])  # whatever else a pair has was not sampled, and is made anew
        for row in (row for file in [folder / "pairs.jsonl", *folder.glob(PART)] for row in read_grown(file)):
            row |= {key: row[key][:n] for key in ("rejected", "rejected_ids", "source_ids")}
            done[row["id"]] = Pair(**row | dict(finished=row["finished"][: 1 + n]))
    done = gather([done] if not rank() else [])[0]
    if done:
        print(f"continuing: {len(done)} of {len(examples)} examples are sampled already")
    todo = mine([i for i, e in enumerate(examples) if e.id not in done])
    jobs = [(i, k) for i in todo for k in range(1 + len(turns[i]))]  # sample 0 is the chosen one
    prompts = {i: [tokenizer.chat(turn) for turn in (examples[i].turn(examples[i].context), *turns[i])]
               for i in todo}
    samples: dict[int, dict[int, Sample]] = {i: {} for i in todo}
    pairs: dict[int, Pair] = {}
    name = PART.replace("*", str(rank())) if rank() else "pairs.jsonl"
    with open(folder / name if folder else os.devnull, "a", encoding="utf-8") as file:

        def ended(job: int, sample: Sample) -> None:
            i, k = jobs[job]
            samples[i][k] = sample
            if len(samples[i]) == len(prompts[i]):
                e, (chosen, *rejected) = examples[i], [samples[i][k] for k in range(len(prompts[i]))]
                pairs[i] = Pair(e.id, e.prompt, e.context, tokenizer.decode(chosen.ids),
                                [tokenizer.decode(r.ids) for r in rejected], prompts[i][0], chosen.ids,
                                [r.ids for r in rejected], prompts[i][1:],
                                [chosen.finished, *(r.finished for r in rejected)], style=e.style)
                file.write(json.dumps(dataclasses.asdict(pairs[i]), ensure_ascii=False) + "\n")
                file.flush()

        bar = progress(len(jobs), "responses", "sampling")
        generate(model, [prompts[i][k] for i, k in jobs], sampling, tokenizer.stop_ids, seed, jobs, slots,
                 bar, ended)
        bar.close()
    done |= {pair.id: pair for pair in gather([pairs[i] for i in todo])}
    return [done[e.id] for e in examples]


def ready_pairs(tokenizer: Tokenizer, examples: list[Example]) -> list[Pair]:
    """The pairs of a file that brings the chosen responses as text, and maybe the rejected ones."""
    pairs = []
    for e in examples:
        rejected = [] if e.rejected is None else [e.rejected]
        pairs.append(Pair(e.id, e.prompt, e.context, e.chosen, rejected, tokenizer.chat(e.turn(e.context)),
                          tokenizer.response(e.chosen), [tokenizer.response(r) for r in rejected],
                          [tokenizer.chat(e.turn(None)) for _ in rejected], [True] * (1 + len(rejected)),
                          style=e.style))
    return pairs


def reshuffle(pairs: list[Pair], seed: int, count: int) -> None:
    """(iii) Fill in rejected responses: `count` times the chosen ones of other rows, in another order.

    Each order is a derangement: no row keeps its own response or gets one of equal text, and every response
    is used once. With the rows sorted by text, equal texts stand in runs of at most m rows, so that turning
    the list by anything from m to n - m moves every row off its run.
    """
    draw = random.Random(derive("reshuffle", seed))
    runs: dict[str, list[int]] = {}
    for i in draw.sample(range(len(pairs)), len(pairs)):
        runs.setdefault(pairs[i].chosen, []).append(i)
    order = [i for run in runs.values() for i in run]
    n, m = len(order), max(map(len, runs.values()))
    if n - 2 * m + 1 < count:
        raise UserError(f"--neg reshuffle: {m} of {n} chosen responses are the same text: too many to give "
                        f"every row {count} of another text")
    for shift in draw.sample(range(m, n - m + 1), count):
        for i, j in zip(order, order[shift:] + order[:shift], strict=True):
            pairs[i].rejected.append(pairs[j].chosen)
            pairs[i].rejected_ids.append(pairs[j].chosen_ids)
            pairs[i].source_ids.append(pairs[j].prompt_ids)
            pairs[i].finished.append(pairs[j].finished[0])


def add_noise(pairs: list[Pair], tokenizer: Tokenizer, seed: int, count: int) -> None:
    """Fill in rejected responses of random letters and digits, as many tokens as the chosen one, then the end
    token (Table 6's control). They come from no prompt."""
    for i, pair in enumerate(pairs):
        length = len(pair.chosen_ids) - pair.finished[0]  # the chosen response's own, without its end token
        for k in range(count):
            draw, text, ids = random.Random(derive("noise", seed, i, k)), "", []
            while len(ids) < length:
                text += "".join(draw.choices(string.ascii_letters + string.digits, k=4 * length))
                ids = tokenizer.response(text)[:-1]
            pair.rejected.append(tokenizer.decode(ids[:length]))
            pair.rejected_ids.append([*ids[:length], tokenizer.end_token])
            pair.source_ids.append([])
            pair.finished.append(True)


def make_pairs(model: Decoder, tokenizer: Tokenizer, examples: list[Example], neg: str, sampling: Sampling,
               seed: int, slots: int = 128, count: int = 1,
               folder: Path | None = None) -> tuple[list[Pair], dict]:
    """One chosen and `count` rejected responses for every example, useless pairs dropped, gains measured.

    Responses are sampled, or taken from a file that brings them; folder: see `sample_pairs`. Returns the
    pairs and their statistics: counts, unfinished share, seconds, context gain (if anything is rejected),
    checker rates.
    """
    start = time.perf_counter()
    if examples[0].chosen is not None:
        pairs = ready_pairs(tokenizer, examples)
    else:
        turns = negative_turns(examples, neg, seed, count)
        pairs = sample_pairs(model, tokenizer, examples, turns, sampling, seed, slots, folder)
    finished = [f for p in pairs for f in p.finished]
    tokens = sum(len(ids) for p in pairs for ids in (p.chosen_ids, *p.rejected_ids))
    sampled = time.perf_counter() - start
    empty = [not all(text.strip() for text in (p.chosen, *p.rejected)) for p in pairs]
    same = [p.chosen_ids in p.rejected_ids for p in pairs]
    dropped = dict(empty=sum(empty), identical=sum(s and not e for s, e in zip(same, empty, strict=True)))
    pairs = [p for p, e, s in zip(pairs, empty, same, strict=True) if not e and not s]
    if not pairs:
        raise UserError(f"no pair is left of {len(examples)} examples: {dropped}")
    if count and not pairs[0].rejected:
        if neg == "reshuffle":
            reshuffle(pairs, seed, count)
        else:
            add_noise(pairs, tokenizer, seed, count)
    kept = {p.id for p in pairs}
    rows = [e for e in examples if e.id in kept]
    gains = context_gain(model, tokenizer, rows, pairs, seed) if count else dict.fromkeys(GAINS)
    stats = dict(examples=len(examples), pairs=len(pairs), dropped=dropped,
                 unfinished=1 - sum(finished) / len(finished), response_tokens=tokens,
                 seconds_sampling=sampled, seconds_gain=time.perf_counter() - start - sampled, gain=gains)
    if any(e.check for e in examples):
        stats["checks"] = check_rates(rows, pairs, neg)
    return pairs, stats


def context_gain(model: Decoder, tokenizer: Tokenizer, examples: list[Example], pairs: list[Pair],
                 seed: int) -> dict:
    """Fill in each pair's context gain and return its means, per response and per token, of both sides.

    log pi_ref(y|x,c) - log pi_ref(y|x): for `missing` its mean over chosen responses is I(Y;C|X) plus a KL,
    an upper bound of the mutual information. In data without contexts the second prompt is another row's;
    where there is no other, there is no gain.
    """
    if not any(e.context for e in examples) and len({e.prompt for e in examples}) < 2:
        return dict.fromkeys(GAINS)
    responses = [[p.chosen_ids, *p.rejected_ids] for p in pairs]
    if any(e.context for e in examples):
        turns = [e.turn(None) for e in examples]
    else:
        turns = [other.turn(None) for other, in other_rows(examples, seed)]
    right = [(p.prompt_ids, r) for p, r in zip(pairs, responses, strict=True)]
    bare = [(tokenizer.chat(turn), r) for turn, r in zip(turns, responses, strict=True)]
    bar = progress(2 * len(mine(pairs)), "passes", "context gain")
    with_context, without = (gather(sequence_logps(model, mine(groups), bar=bar)) for groups in (right, bare))
    bar.close()
    for p, a, b in zip(pairs, with_context, without, strict=True):
        p.gain_chosen, *p.gain_rejected = (x - y for x, y in zip(a, b, strict=True))
    chosen, rejected = [p.gain_chosen for p in pairs], [g for p in pairs for g in p.gain_rejected]
    tokens = sum(len(p.chosen_ids) for p in pairs), sum(len(r) for p in pairs for r in p.rejected_ids)
    return dict(zip(GAINS, (sum(chosen) / len(chosen), sum(chosen) / tokens[0],
                            sum(rejected) / len(rejected), sum(rejected) / tokens[1]), strict=True))


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
    for side in ("chosen", "rejected"):
        if g[side] is not None:
            per_token = g[side + "_per_token"]
            print(f"context gain of {side} responses: {g[side]:+.2f} nats, {per_token:+.3f} a token")
    if g["chosen"] is not None and g["chosen"] < 1:
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
    if not rank():
        for part in folder.glob(PART):  # what other processes had sampled: pairs.jsonl has it all
            part.unlink()


def load_pairs(folder: Path, settings: dict | None = None) -> list[Pair]:
    """Read pairs.jsonl back; with `settings`, refuse pairs that were made with others, naming the difference.
    """
    made = read_json(folder / "pairs.json")
    check_settings(folder, made, settings or {})
    if made["statistics"] is None:
        raise UserError(f"{folder / 'pairs.jsonl'} is not whole: let the command that samples it finish")
    try:
        return [Pair(**row) for _, row in read_jsonl(folder / "pairs.jsonl")]
    except TypeError as e:
        raise UserError(f"{folder / 'pairs.jsonl'} does not hold pairs: {e}") from None


def check_settings(folder: Path, made: dict, settings: dict) -> None:
    """UserError where pairs in a folder were made with other settings than these."""
    for key, value in settings.items():
        if made["settings"].get(key) != value:
            raise UserError(f"{folder / 'pairs.jsonl'} was made with {key} {made['settings'].get(key)!r}, "
                            f"not {value!r}: give the same arguments or another folder")


# -------------------------------------------------------------------------------- command line

@dataclass
class DataArgs(JudgeArgs):
    """What every program that samples needs to be told; train.py and eval.py add to it."""

    data: str = option("demo", f"demo, a .jsonl file of your own, or {', '.join(DATA)}, with :FOLDER for a "
                       "copy on disk", "data")
    contexts: str = option("", "given; infer: by --judge, else by the model itself; or a file of inferred "
                           "ones (default: given, community: infer)", "data")
    model: str = option("", "Hugging Face folder or hub id; tiny is the embedded model (default: tiny for "
                        f"demo, else {QWEN})", "data")
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
        self.model = self.model or ("tiny" if self.data == "demo" else QWEN)
        if self.slots < 1 or self.limit < 0:
            raise UserError(f"--slots {self.slots} must be at least 1 and --limit {self.limit} at least 0")


@dataclass
class PairArgs(DataArgs):
    neg: str = option("missing", "where rejected responses come from", "data", NEGATIVES)
    n_neg: int = option(1, "rejected responses for every chosen one, 0 for none", "data")

    def __post_init__(self):
        super().__post_init__()
        if self.n_neg < 0:
            raise UserError(f"--n-neg {self.n_neg} must be at least 0")


@dataclass
class Args(PairArgs):
    split: str = option("train", "which part to make pairs of", "data", SPLITS)
    out: str = option("", "folder for pairs.jsonl and pairs.json", "data")


def sampling_for(args: DataArgs, evaluation: bool = False) -> Sampling:
    """The data set's sampling settings, of pairs or of evaluation, with the user's changes."""
    name = args.data.partition(":")[0]
    base = DATA[name].sampling if name in DATA else SAMPLING["demo" if name == "demo" else "jsonl"]
    if evaluation:
        temperature = DATA[name].temperature if name in DATA else 0.1
        base = dataclasses.replace(base, temperature=temperature, top_p=0.9)
    changes = dict(temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens)
    return dataclasses.replace(base, top_k=args.top_k, **{k: v for k, v in changes.items() if v is not None})


def examples_for(args: DataArgs, split: str) -> list[Example]:
    """A split's examples; with --limit some of them, drawn by seed, in the split's order."""
    examples = load_examples(args.data, split, args.seed)
    if 0 < args.limit < len(examples):
        drawn = random.Random(derive("limit", args.seed)).sample(range(len(examples)), args.limit)
        examples = [examples[i] for i in sorted(drawn)]
    return add_contexts(examples, args)


def pair_settings(args: PairArgs, examples: list[Example]) -> dict:
    """All that decides what the pairs are: stored beside them, and compared before they are used again."""
    rows = [dataclasses.asdict(e) for e in examples]
    data = hashlib.sha256(repr(rows).encode()).hexdigest()[:12]
    return dict(data=args.data, contexts=contexts_of(args), data_fingerprint=data, examples=len(examples),
                model=args.model, neg=args.neg, n_neg=args.n_neg, seed=args.seed, date=args.date,
                dtype=args.dtype, sampling=dataclasses.asdict(sampling_for(args)))


def check_negatives(examples: list[Example], args: PairArgs) -> None:
    """UserError where these data can't have these negatives."""
    first = examples[0]
    if first.chosen is None:
        negative_turns(examples, args.neg, args.seed, args.n_neg)
    elif first.rejected is not None and args.n_neg > 1:
        raise UserError(f"--n-neg {args.n_neg}: {args.data} brings one rejected response for each chosen one")
    elif first.rejected is None and args.n_neg and args.neg not in ("reshuffle", "noise"):
        raise UserError(f"{args.data} has no rejected responses: --neg reshuffle or noise, or --method sft")


def pairs_for(args: PairArgs, split: str, folder: Path) -> list[Pair]:
    """The pairs of a split: those in `folder` if the same settings made them, else sampled into it.

    Sampling that was interrupted continues: pairs.json tells by its settings whether it may, and by its
    statistics, which come last, whether it must.
    """
    examples = examples_for(args, split)
    settings = pair_settings(args, examples)
    file = folder / "pairs.json"
    if file.exists():
        made = read_json(file)
        check_settings(folder, made, settings)
        if made["statistics"] is not None:
            pairs = load_pairs(folder)
            print(f"{len(pairs)} pairs from {folder / 'pairs.jsonl'}")
            return pairs
    check_negatives(examples, args)  # before anything begins
    tokenizer = Tokenizer(args.model, args.date)
    model = load(args.model, getattr(torch, args.dtype), device=default_device())
    print(f"sampling with {sampling_for(args)}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, dict(settings=settings, statistics=None))
    pairs, stats = make_pairs(model, tokenizer, examples, args.neg, sampling_for(args), args.seed, args.slots,
                              args.n_neg, folder)
    save_pairs(folder, pairs, dict(settings=settings, statistics=stats, environment=environment()))
    report(stats)
    return pairs


def program() -> None:
    args = parse(Args, usage=__doc__)
    find(args.model)
    if not args.out:
        raise UserError("usage: python pairs.py --model DIR --out FOLDER; --help lists all arguments")
    pairs_for(args, args.split, Path(args.out))
    print(f"pairs are in {Path(args.out) / 'pairs.jsonl'}")


if __name__ == "__main__":
    main(program)
