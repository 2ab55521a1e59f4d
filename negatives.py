"""negatives.py - a contrastive pair, and where its rejected responses come from (section 4.2 of the paper).

    chosen    y_c ~ pi_ref(.|x, c)      x the prompt, c the user's context
    rejected  y_r ~ pi_ref(.|x)         --neg missing
              y_r ~ pi_ref(.|x, c')     --neg random: c' of another row
              y_r ~ pi_ref(.|x')        --neg random in data without contexts: another prompt
              y_r = another row's y_c   --neg reshuffle
              y_r = letters and digits  --neg noise (Table 6's control)
              y_r ~ pi_ref(.|x, c)      --neg same (our control: only chance tells it from y_c)

Both are then trained under the same right prompt (x, c). What differs from the paper: a random context is
never the right one, nor the same user's. Noise has as many tokens as the chosen response has before its end
token (Table 6's caption; the paper's text says the rejected one), and always an end token.

    python -m pytest tests/test_negatives.py
"""

import dataclasses
import random
import string
from dataclasses import dataclass

from data import Example
from rows import require_contexts
from run import UserError, seed_from
from tokenizer import Tokenizer

NEGATIVES = ("missing", "random", "reshuffle", "noise", "same")
SAMPLED = ("missing", "random", "same")  # those whose rejected responses are sampled from a prompt
REPEATS = 100  # after this many duplicates in a row, no distinct row is assumed to be left


# ------------------------------------------------------------------------- pairs

@dataclass
class Response:
    """One response: the ids that were sampled, their text, and where they came from.

    prompt_ids: the prompt it was sampled from; for a ready or revised chosen response, the prompt it is
    trained under; empty for noise, and where a file does not say. gain: log pi_ref(y|x,c) - log pi_ref(y|x)
    in nats, x and c those of the pair; of a row without a context log pi_ref(y|x) - log pi_ref(y|x'), where
    x' is another row's prompt.
    """

    text: str
    ids: list[int]
    finished: bool  # whether the model ended it
    prompt_ids: list[int]
    gain: float | None = None


@dataclass
class Pair:
    """A chosen and N rejected responses, all trained under the chosen one's prompt (by InfoNCE and SAMI under
    each other's prompts too)."""

    id: str
    prompt: str
    context: str | None
    chosen: Response
    rejected: list[Response]
    style: str = "plain"  # of the user's message, as in Example
    system: str | None = None  # what the model is told before the user speaks

    @property
    def prompt_ids(self) -> list[int]:
        """The right prompt (x, c), under which the pair is trained."""
        return self.chosen.prompt_ids

    @property
    def responses(self) -> list[Response]:
        """The chosen response, then the rejected ones."""
        return [self.chosen, *self.rejected]


# ------------------------------------------------------------------------- where rejected responses come from

def negative_messages(examples: list[Example], neg: str, seed: int, count: int = 1) -> list[list[str]]:
    """The user messages of `count` draws for each row (section 4.2, (i), (ii)): first those of --n-neg, then
    those that pairs.py draws from where a response is useless. No messages for `reshuffle` and `noise`, which
    sample no rejected responses."""
    if neg not in SAMPLED or not count:
        return [[] for _ in examples]
    require_contexts(examples, neg)
    messages = []
    for i, example in enumerate(examples):
        row = None
        if neg == "missing":
            row = [example.user_message(None)] * count  # (i) y_r ~ pi_ref(.|x)
        elif neg == "random":
            others = other_rows(examples, i, seed, count)
            if example.context:  # (ii) y_r ~ pi_ref(.|x, c')
                row = [example.user_message(other.context) for other in others]
            else:  # y_r ~ pi_ref(.|x')
                row = [other.user_message(None) for other in others]
        elif neg == "same":
            row = [example.user_message(example.context)] * count  # pi_ref(.|x, c) again
        if not isinstance(row, list) or len(row) != count:
            raise ValueError(f"negative_messages: {neg} gives no list of {count} messages for row {i}")
        messages.append(row)
    return messages


def other_rows(examples: list[Example], i: int, seed: int, count: int) -> list[Example]:
    """`count` seeded random rows whose context (without contexts: whose prompt) differs from row i's and
    which are another user's, if users are known; distinct from each other where possible.

    A larger count begins with the rows of a smaller one, so that --n-neg 3 extends --n-neg 1.
    """
    rng = random.Random(seed_from("random", seed, i))
    others: list[Example] = []
    seen: set[str] = set()
    repeats = 0  # duplicates in a row
    # Nearly every row will do, so rows are drawn at random, a bounded number of times. A duplicate is passed
    # over, unless REPEATS of them have come in a row.
    for _ in range(100 * (count + len(examples))):
        other = rng.choice(examples)
        if not is_other(examples[i], other):
            continue
        text = other.context or other.prompt
        repeats = repeats + 1 if text in seen else 0
        if 0 < repeats < REPEATS:
            continue
        others.append(other)
        seen.add(text)
        if len(others) == count:
            return others
    if others:  # hardly any other row will do: those that were found stand in again
        return [others[k % len(others)] for k in range(count)]
    raise UserError("--neg random needs two different contexts, of two users where there are users (without "
                    f"contexts: two different prompts): there is no other for example {examples[i].id!r}")


def is_other(example: Example, other: Example) -> bool:
    """Whether `other` can stand in for a random user, as seen from `example`."""
    if example.user is not None and example.user == other.user:
        return False
    if example.context:
        return bool(other.context) and other.context != example.context
    return other.prompt != example.prompt


def add_reshuffled(pairs: list[Pair], seed: int, n_neg: int) -> None:
    """Fill in rejected responses: the chosen ones of other rows, `n_neg` times, each time in a different
    order (section 4.2, (iii)).

    Each order is a derangement: no row keeps its own response or gets one of equal text, and every response
    is used once. Rows of equal text stand side by side in runs of at most m rows, so that rotating the list
    by anything from m to n - m moves every row off its run: aabc rotated by 2 is bcaa.
    """
    rng = random.Random(seed_from("reshuffle", seed))
    runs: dict[str, list[int]] = {}
    for i in rng.sample(range(len(pairs)), len(pairs)):
        runs.setdefault(pairs[i].chosen.text, []).append(i)
    order = [i for run in runs.values() for i in run]
    n, m = len(order), max(map(len, runs.values()))
    if n - 2 * m + 1 < n_neg:
        raise UserError(f"--neg reshuffle: {m} of {n} chosen responses are the same text: too many to give "
                        f"every row {n_neg} of another text")
    for shift in rng.sample(range(m, n - m + 1), n_neg):
        rotated = order[shift:] + order[:shift]
        for i, j in zip(order, rotated, strict=True):
            pairs[i].rejected.append(dataclasses.replace(pairs[j].chosen, gain=None))


def add_noise(pairs: list[Pair], tokenizer: Tokenizer, seed: int, n_neg: int) -> None:
    """Fill in rejected responses of random letters and digits, as many tokens as the chosen one, then the end
    token (Table 6's control)."""
    characters = string.ascii_letters + string.digits
    for i, pair in enumerate(pairs):
        length = len(pair.chosen.ids) - pair.chosen.finished  # without the end token
        for k in range(n_neg):
            rng = random.Random(seed_from("noise", seed, i, k))
            text, ids = "", []
            while len(ids) < length:
                text += "".join(rng.choices(characters, k=4 * length))
                ids = tokenizer.encode(text)
            ids = [*ids[:length], tokenizer.end_token]
            pair.rejected.append(Response(tokenizer.decode(ids), ids, True, prompt_ids=[]))
