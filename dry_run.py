"""dry_run.py - what a run will take: a small part of everything is run, an example shown, the rest estimated.

What differs from the paper: it has nothing of the kind.

    python train.py --dry-run
"""

import dataclasses
import heapq
import math
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from batches import all_logps, epoch_batches, groups_of, micro_batches, passes_of, training_rows
from contexts import examples_for, sampling_for
from folder import read_config
from losses import OBJECTIVES, token_count
from memory import MAX_CARDS, Pass, card_memory, cards_needed, gb, out_of_reach, peak, predicted_memory
from model import Decoder
from negatives import SAMPLED, Pair
from pairs import check_negatives, make_pairs, pairs_for, read_meta
from run import default_device, peak_memory, rank, read_jsonl, world
from shard import gathered
from tokenizer import Tokenizer


def dry_run(grid: list, folder: Path, source: Path, pairs: list[Pair] | None, load_trainable: Callable,
            time_steps: Callable) -> None:
    """Run a small part of everything, show an example, and say what the whole will take.

    grid: the run's arguments, train.Args, one of each candidate. pairs: those of --pairs; their memory is
    told before the model, which may not fit, is loaded. load_trainable(source, args) loads the model to be
    trained; time_steps(model, pairs, reference, args, file) trains on a few pairs and leaves its metrics in a
    file.
    """
    args = grid[0]
    tokenizer = Tokenizer(source, args.date, args.template)
    if pairs is not None:
        tell_memory(training_rows(pairs, args), source, args, samples=False)
    start = time.perf_counter()
    model = load_trainable(source, args)
    seconds_loading = time.perf_counter() - start
    pairs_file = folder / "pairs.json"
    seconds = {}
    if pairs is None and pairs_file.exists() and read_meta(folder)["statistics"] is not None:
        pairs = pairs_for(args, "train", folder)
        tell_memory(training_rows(pairs, args), source, args, samples=False)
    if pairs is None:
        pairs, count, seconds = estimate_sampling(args, model, tokenizer)
        tell_memory(training_rows(pairs, args), source, args, samples=True)
    else:
        count = len(pairs)
    show_pair(pairs[0], tokenizer)

    # Training is timed on the first four batches. The very first step also sets up memory, so it is left out
    # where there are others.
    rows = training_rows(pairs, args)
    count = count * len(rows) // len(pairs)
    few = rows[: 4 * args.batch]
    start = time.perf_counter()
    reference = all_logps(model, few, args)
    if OBJECTIVES[args.method].uses_reference:
        seconds["reference"] = (time.perf_counter() - start) * count / len(few)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "metrics.jsonl"
        time_steps(model, few, reference, args, file)
        steps = [row for _, row in read_jsonl(file)] if not rank() else []
    if steps:
        steps = steps[1:] or steps
        spent = sum(step["tokens"] / step["tokens_per_second"] for step in steps)
        per_pair = spent / sum(step["pairs"] for step in steps)
        seconds["training"] = sum(count * candidate.epochs * per_pair for candidate in grid)

    tokens = sum(token_count(groups_of(pair, args)) for pair in rows) / len(rows)
    total = sum(seconds.values()) + (1 + len(grid)) * seconds_loading
    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    each = " in each process" if world() > 1 else ""
    uncounted = ["validation"] * (len(grid) > 1 or args.eval_every > 0)
    uncounted += ["the revision"] * (args.method == "sft-revise")
    uncounted += ["rounds after the first"] * (args.rounds > 1)
    print(f"\n{count} pairs of about {tokens:.0f} tokens, {math.ceil(count / args.batch)} steps an epoch, "
          f"{sum(candidate.epochs for candidate in grid)} epochs in all")
    print(f"estimate: {total:.0f} s ({parts}), {peak_memory() / 1e9:.1f} GB at most{each}"
          + (f"; {' and '.join(uncounted)} not counted" if uncounted else ""))


def tell_memory(rows: list[Pair], source: Path, args, samples: bool) -> None:
    """Print what a process will need, predicted from the largest step of these rows; on GPUs also how many
    cards hold the model in parts, and what these cannot do. samples: whether the run samples its pairs."""
    if rank():  # process 0 alone prints, and it has a share of every batch
        return
    config, device = read_config(source), default_device()
    args = dataclasses.replace(args, max_new_tokens=sampling_for(args).max_new_tokens)
    steps = []
    for batch in epoch_batches(len(rows), args, epoch=0):
        passes = []
        for indices in micro_batches(batch, lambda i: groups_of(rows[i], args), args):
            passes += passes_of([groups_of(rows[i], args) for i in indices], args)
        steps.append([Pass.of(groups) for groups in passes])
    largest = max(steps, key=lambda step: max(each.tokens() for each in step))
    prompt = max(len(row.prompt_ids) for row in rows) if samples else 0
    parts = predicted_memory(config, args, largest, prompt, world(), device.type)
    listed = ", ".join(f"{name} {gb(size)}" for name, size in parts.items() if size)
    print(f"memory of a process: {listed}; {gb(peak(parts, device.type))} at most")
    card = card_memory()
    if card is not None:
        cards = cards_needed(config, args, largest, card)
        print(f"cards needed with --shard: {cards or f'more than {MAX_CARDS}, or no number is enough'}")
        for line in out_of_reach(config, args, card):
            print("not on these cards: " + line)


def show_pair(pair: Pair, tokenizer: Tokenizer) -> None:
    r"""A pair as the model sees it: special tokens and all, and which tokens the loss counts. Text that only
    looks like a special token has a backslash before it."""
    def block(title: str, ids: list[int], mask: int) -> None:
        text = tokenizer.show(ids).replace("\n", "\n    ")
        print(f"\n{title}: {len(ids)} tokens, mask {mask}\n    {text}")

    print(f"example {pair.id}; mask 1: in the loss, mask 0: not; \\<|x|> is text, <|x|> a special token")
    block("prompt, of all responses below", pair.prompt_ids, 0)
    for k, response in enumerate(pair.responses):
        end = "" if response.finished else ", unfinished: no end token"
        block((f"rejected {k}" if k else "chosen") + end, response.ids, 1)
        if response.prompt_ids and response.prompt_ids != pair.prompt_ids:
            block(f"rejected {k} was sampled from", response.prompt_ids, 0)


def estimate_sampling(args, model: Decoder, tokenizer: Tokenizer) -> tuple[list[Pair], int, dict]:
    """Sample a few pairs: these, how many there will be in all, and the seconds that all will take."""
    examples = examples_for(args, "train")
    check_negatives(examples, args)
    per_example = 1 + args.n_neg * (args.neg in SAMPLED)  # responses that are sampled
    size = min(len(examples), max(8, args.slots * world() // per_example))
    few = random.Random(0).sample(examples, size)
    pairs, statistics = make_pairs(gathered(model), tokenizer, few, args.neg, sampling_for(args), args.seed,
                                   args.slots, args.n_neg)
    lengths = [len(response.ids) for pair in pairs for response in pair.responses]
    depth, depth_of_few = (decoding_depth(lengths, -(-count * per_example // world()), args.slots)
                           for count in (len(examples), len(few)))
    share = len(few) / len(examples)
    seconds = dict(
        sampling=statistics["seconds_sampling"] * depth / depth_of_few,
        gain=statistics["seconds_gain"] / share,
    )
    return pairs, round(len(pairs) / share), seconds


def decoding_depth(lengths: list[int], count: int, slots: int) -> int:
    """How many steps the sampler takes for `count` responses of such lengths, refilling its slots."""
    rng = random.Random(0)
    ends = [0] * min(slots, count)  # the step at which each slot becomes free
    for _ in range(count):
        heapq.heappush(ends, heapq.heappop(ends) + rng.choice(lengths))
    return max(ends)
