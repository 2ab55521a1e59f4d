"""data.py - the data sets: their examples, and what the user says to the model.

An example is a prompt x with, in personalisation data, a user's context c. What the model reads is one user
message made of both, in the words of appendix D.1 and D.2 (`user_message`). There are three kinds of data:

    demo          everyday prompts and contexts that a program can check; our own, in assets/demo
    FILE.jsonl    a user's own prompts, or ready pairs of a chosen and a rejected response
    prism ...     the paper's data sets (section 5), from the Hugging Face hub or from a folder

What differs from the paper: it gives neither sampling settings nor splits, nor which turn of a conversation
it takes. Ours are in DATA and in the loaders below; they are printed when data are loaded and saved with the
results. PRISM's contexts are by default the users' own words, where the paper had a model infer them.

    python contexts.py --data demo      shows a data set, its splits and its first example
"""

import csv
import dataclasses
import difflib
import functools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from checks import LETTERS, number
from folder import download
from formats import read_own_file
from judge import PAPER, rubric_text
from run import UserError, read_json, read_jsonl, seed_from
from sample import Sampling

ASSETS = Path(__file__).parent / "assets"


# ------------------------------------------------------------------------- what the user says

# By the style of the data: appendix D.2's request, and its frame for conversations, whose last sentence is
# not in the paper but in the authors' code; D.1's math prompt, which D.3's worked examples follow. The frame
# of multiple-choice questions is ours.
REQUEST = "{x} Please respect the following requirements made by the user: {c}"
SHORT = "Give me short 2-3 sentence answers to the following prompt: {x} Respond with short 2-3 sentences."
MATH = ("You are a helpful math assistant. Solve the following problem step-by-step and give the final "
        "answer after ####.")
CHOICE = ("Answer this multiple-choice question. Think step by step, then end with a line of the form "
          "'The answer is: <X>', where <X> is the letter of the right choice.\n\n{x}")


@dataclass
class Example:
    """One row of a data set. What a data set does not have is None."""

    id: str
    prompt: str
    split: str  # train, validation or test
    context: str | None = None
    user: str | None = None
    reference: str | None = None  # a response to compare with: the one a person chose, or a strong model's
    answer: str | None = None  # the right answer: a number, a letter or, in own files, a few words
    context_id: str | None = None
    group: str | None = None  # demo: whether the context is "seen" or "unseen" in training
    check: list | None = None  # demo: [name of a check in checks.CHECKS, its arguments...]
    chosen: str | None = None  # ready pairs of a user's own file
    rejected: str | None = None
    style: str = "plain"  # of the user message: plain, short, math or choice
    items: list[str] | None = None  # the context's parts, which a judge scores one by one
    human_rejected: str | None = None  # the response that a person liked less than `reference`
    rubric: str | None = None  # by which a judge compares two responses
    choices: list[str] | None = None  # of a multiple-choice question
    preference: dict | None = None  # Multi-Bench: what --contexts infer puts in the user's words
    system: str | None = None  # what the model is told before the user speaks
    where: str = field(default="", compare=False)  # own data: file and line

    @property
    def name(self) -> str:
        """What a message calls the row: its file and line, else its id."""
        return self.where or repr(self.id)

    def row(self) -> dict:
        """All fields, as they are compared with those of another run. Left out are the row's place in its
        file, and `system` where there is none, because earlier versions did not have it."""
        row = dataclasses.asdict(self)
        del row["where"]
        if self.system is None:
            del row["system"]
        return row

    def user_message(self, context: str | None) -> str:
        """What the user says with a context: this example's, another's, or none."""
        return user_message(self.prompt, context, self.style)


def user_message(prompt: str, context: str | None, style: str = "plain") -> str:
    """The prompt in the frame of its style, with the request to respect the context if there is one.

    Math and multiple-choice questions have no context; it is ignored there.
    """
    if style == "math":
        return f"{MATH}\n\n{shots()}\n\nNew question: {prompt}"
    if style == "choice":
        return CHOICE.format(x=prompt)
    message = REQUEST.format(x=prompt, c=context) if context else prompt
    return SHORT.format(x=message) if style == "short" else message


@functools.cache
def shots() -> str:
    """The eight worked examples of appendix D.3."""
    form = "Example {}:\nQuestion: {question}\nAnswer: {answer}\n#### {short_answer}"
    texts = [form.format(i, **shot) for i, shot in enumerate(read_json(PAPER)["shots"], 1)]
    return "\n\n".join(texts)


# ------------------------------------------------------------------------- what the data sets are like

SPLITS = ("train", "validation", "test")
OWN_FILES = (".jsonl", ".json")  # how the name of a user's own file ends
QWEN = "Qwen/Qwen2.5-1.5B-Instruct"


@dataclass(frozen=True)
class DataSet:
    """Where a data set of the paper is, and how it is used. Its loader is in LOADERS."""

    hub: str  # repository on the Hugging Face hub
    files: tuple[str, ...]  # what is fetched from there
    sampling: Sampling  # of training pairs, as in the authors' scripts
    note: str  # what we chose where the paper is silent
    terms: str  # licence and source
    temperature: float = 0.1  # of evaluation, at top_p 0.9
    contexts: str = "given"  # what --contexts is by default


CONVERSATION = Sampling(temperature=0.1, top_p=0.9, max_new_tokens=512)
REASONING = Sampling(temperature=0.1, top_p=0.9, max_new_tokens=1024)
MULTIPLE_CHOICE = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=1024)
# Temperature 1 and top-p 1 sample from the reference model itself, as the theory assumes.
DEMO = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=96)
OWN_FILE = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=256)

DATA = {
    "prism": DataSet(
        "HannahRoseKirk/prism-alignment", ("survey.jsonl", "conversations.jsonl"), CONVERSATION,
        "first turns, one rejected response by seed, users disjoint between parts; contexts are the users' "
        "own system_string, where the paper had GPT-4o infer them (--contexts infer)",
        "Human text CC-BY-4.0, model responses CC-BY-NC-4.0; Kirk et al., 2024, DOI 10.57967/hf/2113"),
    "community": DataSet(
        "facebook/community-alignment-dataset", ("community_alignment.csv", "data/filtered*.csv"),
        CONVERSATION,
        "English first turns, one rejected response by seed, annotators disjoint between parts; contexts are "
        "inferred by --judge or by the model itself, where the paper asked GPT-4o",
        "CC-BY-4.0; Zhang et al., 2025, arXiv 2507.09650", contexts="infer"),
    "multibench": DataSet(
        "kaist-ai/Multifaceted-Bench", ("data/*.parquet",), REASONING,
        "split by prompt; validation is taken out of the paper's 3,600 training rows, 3,516 are left; "
        "contexts are the preferences' descriptions, which --contexts infer puts in the user's words; "
        "references are GPT-4's",
        "CC-BY-4.0; Lee et al., 2024, arXiv 2405.17977"),
    "gsm8k": DataSet(
        "openai/gsm8k", ("main/*.parquet",), REASONING,
        "validation is other training problems", "MIT; Cobbe et al., 2021, arXiv 2110.14168"),
    "svamp": DataSet(
        "ChilleD/SVAMP", ("train.json", "test.json"), REASONING,
        "half of training and all of validation are GSM8K problems",
        "MIT; Patel et al., 2021, arXiv 2103.07191"),
    "mmlu": DataSet(
        "cais/mmlu", ("all/auxiliary_train-*", "all/validation-*", "all/test-*"), MULTIPLE_CHOICE,
        "not in the paper's last version: sizes are ours", "MIT; Hendrycks et al., 2021, arXiv 2009.03300",
        temperature=1.0),
    "arc-easy": DataSet(
        "allenai/ai2_arc", ("ARC-Easy/*.parquet",), MULTIPLE_CHOICE, "prompt ours, letters by position",
        "CC-BY-SA-4.0; Clark et al., 2018, arXiv 1803.05457", temperature=1.0),
    "arc-challenge": DataSet(
        "allenai/ai2_arc", ("ARC-Challenge/*.parquet",), MULTIPLE_CHOICE, "prompt ours, letters by position",
        "CC-BY-SA-4.0; Clark et al., 2018, arXiv 1803.05457", temperature=1.0),
}


def name_and_folder(data: str) -> tuple[str, str]:
    """The two parts of --data NAME:FOLDER; the folder is "" if there is none."""
    name, _, folder = data.partition(":")
    return name, folder


def load_examples(data: str, split: str, seed: int = 0) -> list[Example]:
    """The examples of one split, in a fixed order, without inferred contexts.

    data: what --data takes. seed: decides the splits of own data and the contexts of the demo. UserError if
    there are no such data or the split is empty.
    """
    all_examples = load_all_splits(data, seed)
    examples = [e for e in all_examples if e.split == split]
    if not examples:
        raise UserError(f"--data {data}: no example in the {split} part (of {len(all_examples)} in all)")
    return examples


def load_all_splits(data: str, seed: int) -> list[Example]:
    """The examples of all splits; for the paper's data sets their sizes and terms are printed once."""
    name, folder = name_and_folder(data)
    if data == "demo":
        return load_demo(seed)
    if data.endswith(OWN_FILES):
        return load_jsonl(Path(data), seed)
    if name in DATA:
        examples, remarks = load_paper_data(name, folder)
        print_once(remarks)
        return examples
    nearest = difflib.get_close_matches(name, DATA, n=1)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    raise UserError(f"--data {data!r} is neither demo, a .jsonl file nor one of {', '.join(DATA)}{hint}")


@functools.cache
def print_once(text: str) -> None:
    """Print a text the first time only: a program loads the same data for every split."""
    print(text)


# ------------------------------------------------------------------------- demo

DEMO_CONTEXTS = 5  # for every training prompt: 600 pairs


def load_demo(seed: int) -> list[Example]:
    """Everyday prompts and checkable contexts of our own (assets/demo), split by prompt and by context.

    train: each training prompt with DEMO_CONTEXTS of the seen contexts, every context equally often.
    validation: its prompts x the seen contexts. test: its prompts x all contexts, so that contexts that
    training has not seen are measured too.
    """
    prompts = [row for _, row in read_jsonl(ASSETS / "demo" / "prompts.jsonl")]
    contexts = [row for _, row in read_jsonl(ASSETS / "demo" / "contexts.jsonl")]
    seen = [context for context in contexts if context["split"] == "seen"]
    # Training prompts take the next five of the seen contexts in turn, from a shuffled circle.
    circle = random.Random(seed_from("demo", seed)).sample(seen, len(seen))
    position = 0
    examples = []
    for prompt in prompts:
        if prompt["split"] == "train":
            contexts_of_prompt = [circle[(position + j) % len(circle)] for j in range(DEMO_CONTEXTS)]
            position += DEMO_CONTEXTS
        else:
            contexts_of_prompt = contexts if prompt["split"] == "test" else seen
        examples += [demo_example(prompt, context) for context in contexts_of_prompt]
    return examples


def demo_example(prompt: dict, context: dict) -> Example:
    """A row of prompts.jsonl with a row of contexts.jsonl."""
    return Example(id=f"{prompt['id']}-{context['id']}", prompt=prompt["prompt"], split=prompt["split"],
                   context=context["context"], context_id=context["id"], group=context["split"],
                   check=context["check"])


# ------------------------------------------------------------------------- own .jsonl files

def load_jsonl(path: Path, seed: int) -> list[Example]:
    """A user's own data: one JSON object a line, or an array of them.

    Columns: "prompt", and optionally "context" (a string or a list of them), "reference", "answer", "user",
    "id", "split" and "system"; for ready pairs also "chosen" and "rejected". "chosen" alone is for SFT, or
    for pairs with noise or reshuffled responses. Other columns are named and not used; other formats of
    preference data are read by formats.py. A mistake in the data is a UserError with file and line.

    Where rows have no "split", a hash of the prompt and the seed puts it into train, validation or test
    (80, 10 and 10%), so that rows with the same prompt stay together.
    """
    file = read_own_file(path)
    has_split = bool(file.rows) and "split" in file.rows[0][2]
    examples: list[Example] = []
    line_of_id: dict[str, int] = {}
    for line, where, fields in file.rows:
        for column in ("chosen", "rejected"):
            if examples and (column in fields) != (getattr(examples[0], column) is not None):
                raise UserError(f"{where}: some rows have {column!r} and some have not")
        if fields.get("split", "train") not in SPLITS:
            raise UserError(f"{where}: split {fields['split']!r} is none of {', '.join(SPLITS)}")
        if ("split" in fields) != has_split:  # else a prompt could be in two parts
            raise UserError(f"{where}: some rows have 'split' and some have not")
        id = fields.setdefault("id", str(line))
        if id in line_of_id:
            raise UserError(f"{where}: id {id!r} is already that of line {line_of_id[id]}")
        line_of_id[id] = line
        tenth = seed_from("split", seed, fields["prompt"]) % 10
        fields.setdefault("split", {8: "validation", 9: "test"}.get(tenth, "train"))
        examples.append(Example(**fields, where=where))
    for remark in file.remarks(path):
        print_once(remark)
    return examples


# ------------------------------------------------------------------------- the paper's data sets

SPLIT_SEED = 42  # one for every --seed: runs with different seeds are tested on the same rows

Loaded = tuple[list[Example], str]  # the examples of all splits, and a remark for the user ("" for none)


@functools.cache
def load_paper_data(name: str, folder: str) -> Loaded:
    """A data set of DATA from a folder, or from the hub if `folder` is "".

    The remark says how many examples there are, what we chose where the paper is silent, and the terms.
    UserError if the folder does not exist or is not laid out as on the hub.
    """
    data_set = DATA[name]
    if folder and not all(Path(part).is_dir() for part in folder.split(",")):
        raise UserError(f"--data {name}:{folder}: there is no such folder")
    source = folder or str(download(data_set.hub, data_set.files, "dataset"))
    loader = LOADERS[name]
    try:
        examples, remark = loader(source)
    except (LookupError, ValueError, TypeError, AttributeError, csv.Error) as e:  # other columns, other types
        raise UserError(f"{source} is not laid out as {data_set.hub} is: {type(e).__name__} {e}") from None
    ids, splits = {e.id for e in examples}, {e.split for e in examples}
    if len(ids) < len(examples) or not splits <= set(SPLITS):
        raise UserError(f"{source}: its {len(examples)} examples have {len(ids)} different ids, and splits "
                        f"called {', '.join(sorted(splits))}")
    counts = split_counts(examples)
    lines = [remark, f"{counts}; {data_set.note}. {data_set.terms}"]
    return examples, "\n".join(f"{name}: {line}" for line in lines if line)


def split_counts(examples: list[Example]) -> str:
    """How many examples each split has, for the user to read."""
    return ", ".join(f"{sum(e.split == split for e in examples)} {split}" for split in SPLITS)


def read_rows(folder: str, *patterns: str) -> list[dict]:
    """The rows of all files that match the first pattern that matches any: jsonl, json, csv or parquet."""
    for pattern in patterns:
        files = sorted(Path(folder).glob(pattern))
        if files:
            return [row for file in files for row in read_table(file)]
    raise UserError(f"{folder} has no {' or '.join(patterns)}")


def read_table(file: Path) -> list[dict]:
    """The rows of one file, by its suffix."""
    if file.suffix == ".jsonl":
        return [row for _, row in read_jsonl(file)]
    if file.suffix == ".json":
        return read_json(file)
    if file.suffix == ".csv":
        csv.field_size_limit(sys.maxsize)
        with open(file, newline="", encoding="utf-8") as f:
            return list(csv.DictReader(f))
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} is read with pyarrow: pip install pyarrow") from None
    return pyarrow.parquet.read_table(file).to_pylist()


def split_rows(examples: list[Example], key: Callable[[Example], str], **sizes: int | None) -> list[Example]:
    """Put examples into splits of these sizes (test=.., train=..; None: all that are left) by SPLIT_SEED.

    Rows with one key share a split; rows of the last key beyond the size are dropped.
    """
    groups: dict[str, list[Example]] = {}
    for e in examples:
        groups.setdefault(key(e), []).append(e)
    keys = random.Random(SPLIT_SEED).sample(sorted(groups), len(groups))
    result = []
    for split, size in sizes.items():
        rows: list[Example] = []
        while keys and (size is None or len(rows) < size):
            rows += groups[keys.pop()]
        result += [dataclasses.replace(e, split=split) for e in rows[:size]]
    return result


def draw_rejected(chosen: str, others: list[str], id: str) -> str | None:
    """One of the other responses, drawn by the row's id; None if there is nothing chosen or nothing else."""
    different = sorted({text for text in others if text.strip() and text != chosen})
    if not chosen.strip() or not different:
        return None
    return random.Random(seed_from("rejected", id)).choice(different)


def load_prism(folder: str) -> Loaded:
    """PRISM (Kirk et al., 2024): the first turn of every conversation, with the user's own system_string."""
    users = {row["user_id"]: row for row in read_rows(folder, "survey.jsonl")}
    conversations = read_rows(folder, "conversations.jsonl")
    examples = []
    for row in conversations:
        id, user = row["conversation_id"], row["user_id"]
        first_turn = [message for message in row["conversation_history"] if message["turn"] == 0]
        prompts = [message["content"] for message in first_turn if message["role"] == "user"]
        responses = [message for message in first_turn if message["role"] == "model"
                     and message["content"] not in (None, "", "EMPTY STRING")]
        chosen = [message["content"] for message in responses if message["if_chosen"]]
        others = [message["content"] for message in responses if not message["if_chosen"]]
        rejected = draw_rejected(chosen[0], others, id) if chosen else None
        context = (users.get(user, {}).get("system_string") or "").strip()
        if prompts and prompts[0].strip() and context and rejected is not None:
            examples.append(Example(id, prompts[0], "", context, user, reference=chosen[0], style="short",
                                    items=[context], human_rejected=rejected))
    remark = (f"{len(conversations) - len(examples)} conversations left out: no prompt, no system_string, "
              "nothing chosen or rejected")
    return split_rows(examples, lambda e: e.user, test=194, validation=194, train=7294), remark


def load_community(folder: str) -> Loaded:
    """Community Alignment (Zhang et al., 2025): English first turns, one row a prompt and annotator."""
    rows = read_rows(folder, "community_alignment.csv", "data/filtered_community_alignment.csv",
                     "data/full_community_alignment.csv", "*.csv")
    english = [row for row in rows if row["assigned_lang"] == "en"]
    examples, seen = [], set()
    for row in english:
        id, user = row["conversation_id"], row["annotator_id"]
        prompt = (row["first_turn_prompt"] or "").strip()
        responses = {}
        for x in "abcd":
            text = row[f"first_turn_response_{x}"] or ""
            responses[f"response_{x}"] = text.removesuffix("<|end_of_text|>").strip()
        chosen = responses.pop(row["first_turn_preferred_response"], "")
        rejected = draw_rejected(chosen, list(responses.values()), id)
        if prompt and rejected is not None and (prompt, user) not in seen:
            seen.add((prompt, user))
            examples.append(Example(id, prompt, "", None, user, reference=chosen, style="short",
                                    human_rejected=rejected))
    remark = (f"{len(english) - len(examples)} English rows left out: incomplete, or an annotator's prompt "
              "seen before")
    return split_rows(examples, lambda e: e.user, test=200, validation=200, train=6564), remark


def load_multibench(folder: str) -> Loaded:
    """Multifaceted Bench (Lee et al., 2024): a row for each of a prompt's four preferences."""
    examples = []
    for i, row in enumerate(read_rows(folder, "data/train-*.parquet", "*.parquet", "*.jsonl")):
        if "preference_set" not in row:
            raise UserError(f"{folder}: an old revision of Multifaceted Bench, without preference_set")
        rubrics = row.get("rubrics") or row.get("rubric")
        for j, (preference, rubric) in enumerate(zip(row["preference_set"], rubrics, strict=True)):
            context = preference["description"]
            examples.append(Example(f"mb{i:03}-{j}", row["prompt"], "", context,
                                    reference=row["reference_answer"], items=[context],
                                    preference=preference, rubric=rubric_text(rubric)))
    return split_rows(examples, lambda e: e.prompt, test=84, validation=84, train=None), ""


def math_example(id: str, question: str, answer: str, reference: str | None, split: str) -> Example:
    """A math problem; its answer becomes the number that `checks.extract` would read."""
    value = number(str(answer))
    if value is None:
        raise ValueError(f"{id}: no number in {answer!r}")
    return Example(id, question, split, answer=value, reference=reference, style="math")


def gsm8k_examples(folder: str, split: str) -> list[Example]:
    """All of GSM8K's train or test problems."""
    rows = read_rows(folder, f"main/{split}-*.parquet", f"{split}.jsonl")
    return [math_example(f"gsm-{split}-{i}", row["question"], row["answer"].split("####")[-1], row["answer"],
                         split)
            for i, row in enumerate(rows)]


def load_gsm8k(folder: str) -> Loaded:
    """GSM8K (Cobbe et al., 2021): 5,000 training and 200 test problems; validation is 200 others of the
    training part."""
    train = split_rows(gsm8k_examples(folder, "train"), lambda e: e.id, train=5000, validation=200)
    test = split_rows(gsm8k_examples(folder, "test"), lambda e: e.id, test=200)
    return train + test, ""


def svamp_examples(folder: str, split: str, *patterns: str) -> list[Example]:
    """SVAMP's problems: the body, with a full stop where there is none, and the question."""
    examples = []
    for row in read_rows(folder, *patterns):
        body = row["Body"].strip()
        body += "" if body.endswith((".", "?", "!", ",")) else "."
        examples.append(math_example(row["ID"], f"{body} {row['Question'].strip()}", row["Answer"], None,
                                     split))
    return examples


def load_svamp(folder: str) -> Loaded:
    """SVAMP (Patel et al., 2021), 700 and 300 problems, and 700 of GSM8K to train on too.

    folder: SVAMP's, and after a comma GSM8K's, which else comes from the hub. All of SVAMP is in the training
    or the test part, so validation is 200 more problems of GSM8K.
    """
    folder, _, gsm8k_folder = folder.partition(",")
    if Path(folder, "SVAMP.json").exists():  # the authors' own file has no split
        svamp = split_rows(svamp_examples(folder, "", "SVAMP.json"), lambda e: e.id, train=700, test=300)
    else:
        svamp = []
        for split in ("train", "test"):
            svamp += svamp_examples(folder, split, f"{split}.json", f"data/{split}-*.parquet")
    gsm8k_folder = gsm8k_folder or str(download(DATA["gsm8k"].hub, DATA["gsm8k"].files, "dataset"))
    gsm8k = split_rows(gsm8k_examples(gsm8k_folder, "train"), lambda e: e.id, train=700, validation=200)
    return svamp + gsm8k, ""


def choice_lines(choices: list[str]) -> str:
    """The end of a multiple-choice prompt; letters go by position, whatever the data call the choices."""
    return "\n".join(f"{letter}: {text}" for letter, text in zip(LETTERS, choices, strict=False))


def choice_example(id: str, question: str, choices: list[str], right: int, split: str) -> Example:
    """A multiple-choice question."""
    return Example(id, f"{question}\n{choice_lines(choices)}", split, answer=LETTERS[right], style="choice",
                   choices=list(choices))


def load_arc(folder: str, part: str) -> Loaded:
    """ARC (Clark et al., 2018): all training and validation questions, 500 of the test ones."""
    examples = []
    for split in SPLITS:
        questions = []
        for row in read_rows(folder, f"{part}/{split}-*.parquet", f"{part}/{split}.jsonl"):
            texts, labels = row["choices"]["text"], row["choices"]["label"]
            right = labels.index(row["answerKey"])
            questions.append(choice_example(row["id"], row["question"], texts, right, split))
        examples += split_rows(questions, lambda e: e.id, test=500) if split == "test" else questions
    return examples, ""


def load_mmlu(folder: str) -> Loaded:
    """MMLU (Hendrycks et al., 2021; in an earlier version of the paper): 5,000, 200 and 500 questions."""
    examples = []
    for split, file, size in (("train", "auxiliary_train", 5000), ("validation", "validation", 200),
                              ("test", "test", 500)):
        rows = read_rows(folder, f"all/{file}-*.parquet", f"all/{file}.jsonl")
        questions = [choice_example(f"{file}-{i}", row["question"], row["choices"], int(row["answer"]), split)
                     for i, row in enumerate(rows)]
        examples += split_rows(questions, lambda e: e.id, **{split: size})
    return examples, ""


LOADERS: dict[str, Callable[[str], Loaded]] = {
    "prism": load_prism, "community": load_community, "multibench": load_multibench, "gsm8k": load_gsm8k,
    "svamp": load_svamp, "mmlu": load_mmlu, "arc-easy": functools.partial(load_arc, part="ARC-Easy"),
    "arc-challenge": functools.partial(load_arc, part="ARC-Challenge"),
}
