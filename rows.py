"""rows.py - which rows of the data can be used: those with a context where one is needed, and those that fit.

Rows are looked at one by one before anything is sampled. What cannot be used is refused, or dropped, counted
and named; no row is quietly treated by another method than the others (section 4.2 has two kinds of random
negatives: another context, and in data without contexts another prompt). The paper drops no rows.

    python -m pytest tests/test_rows.py
"""

from collections.abc import Callable

from console import first_of
from data import Example, load_all_splits
from run import UserError


def rows_with_contexts(examples: list[Example], neg: str, tell: bool = False) -> list[Example]:
    """The rows that `--neg random` draws from: where some have a context and some have none, the former.

    A row without one has no response to another context; data without any context keep all their rows. tell:
    print how many are dropped.
    """
    with_context = [example for example in examples if example.context]
    if neg != "random" or not with_context:
        return examples
    dropped = names_without(examples, with_context)
    if tell:
        tell_dropped(dropped, len(examples), f"no context, which --neg {neg} needs where others have one")
    return with_context


def require_contexts(examples: list[Example], neg: str) -> None:
    """UserError if some rows lack a context that is to be left out or exchanged."""
    without = [example.name for example in examples if not example.context]
    if neg == "missing" and without:
        raise UserError(f"--neg {neg} needs a context in every row; {len(without)} have none "
                        f"({first_of(without)}). random, reshuffle and noise do not")
    if neg == "random" and 0 < len(without) < len(examples):
        raise UserError(f"--neg {neg} needs a context in every row or in none; {len(without)} of "
                        f"{len(examples)} have none ({first_of(without)})")


def fitting_rows(examples: list[Example], messages: Callable[[Example], list[str]], tokenizer, positions: int,
                 new_tokens: int) -> list[Example]:
    """The rows all of whose prompts leave room for a response of `new_tokens` within the model's `positions`.

    messages: what the user says in a row's prompts. tokenizer: tokenizer.Tokenizer.
    """
    def longest(example: Example) -> int:
        return max(len(tokenizer.chat(message, example.system)) for message in messages(example))

    fitting = [example for example in examples if longest(example) + new_tokens <= positions]
    tell_dropped(names_without(examples, fitting), len(examples),
                 f"prompt and {new_tokens} new tokens take more than the model's {positions} positions")
    if not fitting:
        raise UserError(f"no row's prompt and {new_tokens} new tokens fit into the model's {positions} "
                        "positions: lower --max-new-tokens, or shorten the rows")
    return fitting


def fitting_pairs(pairs: list, examples: list[Example], positions: int, needed: bool = True) -> list:
    """The pairs (pairs.Pair) whose prompt and every response fit into the model's positions.

    examples: what the pairs were made of, for their names; may be empty. needed: whether there must be some.
    """
    def longest(pair) -> int:
        return len(pair.prompt_ids) + max(len(response.ids) for response in pair.responses)

    names = {example.id: example.name for example in examples}
    fitting, long = [], []
    for pair in pairs:
        if longest(pair) <= positions:
            fitting.append(pair)
        else:
            long.append(names.get(pair.id, repr(pair.id)))
    tell_dropped(long, len(pairs), f"prompt and response take more than the model's {positions} positions")
    if needed and not fitting and long:
        raise UserError(f"no pair fits into the model's {positions} positions: shorten them")
    return fitting


def names_without(examples: list[Example], kept: list[Example]) -> list[str]:
    """The names of those examples that were not kept."""
    ids = {example.id for example in kept}
    return [example.name for example in examples if example.id not in ids]


def tell_dropped(names: list[str], count: int, reason: str) -> None:
    """Print how many of `count` rows have been dropped, why, and the names of the first of them."""
    if names:
        print(f"{len(names)} of {count} rows dropped: {reason} ({first_of(names)})")


def missing_part(data: str, part: str, seed: int) -> str:
    """What to tell a user whose data have no rows in a part that a program will need; "" where they have."""
    examples = load_all_splits(data, seed)
    if any(example.split == part for example in examples):
        return ""
    return f"--data {data}: no example in the {part} part (of {len(examples)} in all)"
