"""contexts.py - which examples a program works on, and where their contexts come from.

Every program that samples for a data set has the arguments of `DataArgs`: the data set, the model, how
responses are drawn. `examples_for` gives it the examples of a split, with the contexts of the data set
itself, those that a judge has inferred from people's choices (PRISM, Community Alignment: appendix D.2), or
those of a file.
What differs from the paper: its contexts were inferred by GPT-4o, ours by any judge; PRISM's are by default
the users' own words.

    python contexts.py --data demo

prints how many examples each split has, how responses are sampled, and the first example's user message.
"""

import dataclasses
import random
import re
from dataclasses import dataclass
from pathlib import Path

from data import (DATA, DEMO, OWN_FILE, QWEN, Example, load_all_splits, load_examples, name_and_folder,
                  split_counts)
from judge import Judge, JudgeArgs, infer, rewrite
from run import (UserError, default_dtype, main, option, parse, rank, read_jsonl, seed_from,
                 write_jsonl)
from sample import SLOTS, Sampling
from schema import TEXT, checked, listing
from tokenizer import TEMPLATE_DATE, TEMPLATE_HELP, Tokenizer, template_variables

# ------------------------------------------------------------------------- arguments

MAX_SLOTS = 2**16


@dataclass
class DataArgs(JudgeArgs):
    """Which examples, which model, how it is sampled. Arguments are inherited along the files: a judge's
    (JudgeArgs), these, those of pairs (PairArgs), and each program's own (Args).

    Where temperature, top_p and max_new_tokens are None, `sampling_for` takes the data set's own.
    """

    data: str = option("demo", f"demo, a .jsonl file of your own, or {', '.join(DATA)}, with :FOLDER for a "
                       "copy on disk", "data")
    contexts: str = option("", "given; infer: by --judge, else by the model itself; or a file of inferred "
                           "ones (default: given, community: infer)", "data")
    model: str = option("", "Hugging Face folder or hub id; tiny is the embedded model (default: tiny for "
                        f"demo, else {QWEN})", "data")
    limit: int = option(0, "use at most this many examples (train.py with --pairs: pairs), 0 for all", "data")
    seed: int = option(0, "decides every draw and own files' splits, and in training negatives and order",
                       "data")
    temperature: float | None = option(None, "default: the data set's, PPO 1", "sampling")
    top_p: float | None = option(None, "default: the data set's, PPO 1", "sampling")
    top_k: int = option(0, "0 for all", "sampling")
    max_new_tokens: int | None = option(None, "longest response; default: the data set's, PPO at most 256",
                                       "sampling")
    date: str = option(TEMPLATE_DATE, "date for chat templates that print one", "sampling")
    system: str | None = option(None, "system prompt of rows without one of their own (default: none, the "
                                "template's own)", "sampling")
    template: tuple = option((), TEMPLATE_HELP, "sampling")
    slots: int = option(SLOTS, "responses sampled together", "sampling")
    dtype: str = option(default_dtype(), "arithmetic; bfloat16 where its products are fast", "sampling",
                        ("bfloat16", "float32"))


def check(args: DataArgs) -> None:
    """UserError if an argument's value is out of range."""
    if not 1 <= args.slots <= MAX_SLOTS or args.limit < 0:
        raise UserError(f"--slots {args.slots} must be from 1 to {MAX_SLOTS} and --limit {args.limit} at "
                        "least 0")
    if args.judge_url and not args.judge:
        raise UserError("--judge-url says where the judge answers: name it with --judge")
    template_variables(args.template)  # for what it refuses


def resolve(args: DataArgs) -> DataArgs:
    """A copy of the arguments, of the same class, in which --model is filled in."""
    default = "tiny" if args.data == "demo" else QWEN
    return dataclasses.replace(args, model=args.model or default)


def sampling_for(args: DataArgs, evaluation: bool = False) -> Sampling:
    """How responses are sampled: as the data set has it, but for what the arguments say.

    evaluation: the settings of held-out responses, else those of training pairs.
    """
    name, _ = name_and_folder(args.data)
    if name in DATA:
        default, temperature = DATA[name].sampling, DATA[name].temperature
    else:
        default, temperature = DEMO if name == "demo" else OWN_FILE, 0.1
    if evaluation:
        default = dataclasses.replace(default, temperature=temperature, top_p=0.9)
    arguments = dict(temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens)
    given = {name: value for name, value in arguments.items() if value is not None}
    return dataclasses.replace(default, top_k=args.top_k, **given)


def examples_for(args: DataArgs, split: str) -> list[Example]:
    """The examples of a split, with contexts; --limit draws some by seed and leaves them in their order.

    --system is told to the model in all rows that have no system prompt of their own.
    """
    examples = limited(load_examples(args.data, split, args.seed), args)
    if args.system is not None:
        examples = [dataclasses.replace(example, system=args.system) if example.system is None else example
                    for example in examples]
    return add_contexts(examples, args)


def limited(items: list, args: DataArgs) -> list:
    """At most --limit of the items (0: all), drawn by seed and in their order."""
    if not 0 < args.limit < len(items):
        return items
    drawn = random.Random(seed_from("limit", args.seed)).sample(range(len(items)), args.limit)
    return [items[i] for i in sorted(drawn)]


def warn_of_templates(examples: list[Example], tokenizer: Tokenizer) -> None:
    """Warn of rows that hold chat-template markup. Mostly they carry a template already: the model's own is
    put around it, and the markup stays text."""
    found: list[str] = []
    for example in examples:
        for column in ("prompt", "system", "context", "chosen", "rejected"):
            mark = tokenizer.template_mark(getattr(example, column) or "")
            if mark:
                found.append(f"{example.name}: {column!r} holds {mark!r}")
                break
    if found:
        print(f"warning: {found[0]} ({len(found)} of {len(examples)} rows hold chat-template markup). The "
              "model's template is put around every text, and markup inside is read as plain text: give "
              "texts without it")


# ------------------------------------------------------------------------- contexts

def contexts_of(args: DataArgs) -> str:
    """Where contexts come from: given, infer, or a file. --contexts, else what the data set needs."""
    name, _ = name_and_folder(args.data)
    return args.contexts or (DATA[name].contexts if name in DATA else "given")


def add_contexts(examples: list[Example], args: DataArgs) -> list[Example]:
    """The examples with their contexts: the data's own, inferred ones (--contexts infer), or those of a file.

    Examples that get none are dropped and counted.
    """
    source = contexts_of(args)
    if source == "given":
        return examples
    items = infer_contexts(examples, args) if source == "infer" else read_contexts(Path(source))
    result = [dataclasses.replace(e, items=items[e.id], context=" ".join(items[e.id]))
              for e in examples if e.id in items]
    print(f"contexts of {len(result)} of {len(examples)} examples; the others are dropped")
    if not result:
        raise UserError(f"--contexts {source}: no example of {args.data} has a context")
    return result


def infer_contexts(examples: list[Example], args: DataArgs) -> dict[str, list[str]]:
    """Example id -> the items of its context, as --judge, else the model itself, infers them.

    Inferred from the responses that a person chose and rejected; Multi-Bench's preferences are put in the
    user's words. The judge's cache keeps the replies, and a file beside it this judge's contexts, for
    --contexts FILE.
    """
    judge_args = args if args.judge else dataclasses.replace(args, judge=args.model, judge_url="")
    judge = Judge(judge_args, args.slots, args.date)
    if examples[0].preference:
        statements = rewrite(judge, [e.preference for e in examples])
        inferred = [[statement] if statement else None for statement in statements]
    elif all(e.reference and e.human_rejected for e in examples):
        inferred = infer(judge, [(e.prompt, e.reference, e.human_rejected) for e in examples])
    else:
        raise UserError(f"--contexts infer: {args.data} has no choice of two responses to infer from")
    items = {e.id: texts for e, texts in zip(examples, inferred, strict=True) if texts}

    name, _ = name_and_folder(args.data)
    by = re.sub(r"[^\w.-]+", "-", judge_args.judge).strip("-")
    file = Path(args.judge_cache).with_name(f"contexts-{name}-{by}.jsonl")
    if not rank():  # other splits' contexts may be in the file already
        earlier = read_contexts(file) if file.exists() else {}
        write_jsonl(file, [dict(id=id, items=texts) for id, texts in sorted((earlier | items).items())])
    print(f"contexts inferred by {judge_args.judge}, written to {file}")
    return items


CONTEXT = dict(id=TEXT, items=listing(TEXT, least=1))  # a line of the file


def read_contexts(file: Path) -> dict[str, list[str]]:
    """Example id -> the items of its context, from a file that `infer_contexts` wrote."""
    items = {}
    for line, row in read_jsonl(file):
        checked(row, CONTEXT, f"{file}:{line}")
        items[row["id"]] = row["items"]
    return items


def note_of(args: DataArgs) -> dict:
    """What eval.json says of the data: which, where their contexts come from, choices of ours, terms."""
    name, _ = name_and_folder(args.data)
    source = contexts_of(args)
    data_set = DATA.get(name)
    return dict(name=name, contexts=source,
                inferred_by=(args.judge or Path(args.model).name) if source == "infer" else None,
                note=data_set.note if data_set else None, terms=data_set.terms if data_set else None)


# ------------------------------------------------------------------------- command line

def program() -> None:
    """Print the size of each split, the sampling settings, and the first example's user message."""
    args = parse(DataArgs, usage=__doc__)
    check(args)
    examples = load_all_splits(args.data, args.seed)
    if not examples:
        raise UserError(f"--data {args.data}: no examples")
    print(f"{args.data}: {split_counts(examples)}")
    print(f"pairs are sampled with {sampling_for(args)}")
    print(f"evaluation samples with {sampling_for(args, evaluation=True)}")
    first = examples[0]
    print(f"\nfirst example, {first.id}:\n{first.user_message(first.context)}")


if __name__ == "__main__":
    main(program)
