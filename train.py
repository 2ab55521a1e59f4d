"""train.py - MIPO end to end: model -> contrastive pairs -> reference log-probs -> DPO -> model folder.

    dpo   -log sigmoid(beta * ((log pi - log pi_ref)(y_c|x,c) - (log pi - log pi_ref)(y_r|x,c)))       Eq. 5
          --n-neg N: N such rows for every chosen response, or with --softmax one (N+1)-way row        Eq. 8
    sft   -log pi(y_c|x,c) a token, mean over the batch's tokens

Pairs are sampled from the model itself (pairs.py), unless the run folder or --pairs holds them. AdamW on fp32
master weights, linear warm-up over 3% of the steps, cosine to 10% of the peak, gradient norm clipped at 1.
Several processes (torchrun --nproc_per_node) share the sampling and every batch: results equal a single
process's, but for rounding. Several values (--lr 1e-6,5e-6) are trained in turn and the best is kept.
What differs from the paper: settings are chosen on validation prompts, never on test ones, and the learning
rate goes with the model's size: 1e-7 to 1e-6 for 1B and more, several times that for 135M.

    torchrun train.py --data demo --neg missing --model DIR          or plain python train.py ...

The run folder then holds args.json, pairs.jsonl, metrics.jsonl, summary.json, learning_curve.png and model/;
eval.py reads it. --dry-run shows an example and says what a run will take.

Legend: B pairs of a micro-batch, N rejected responses of a pair.
"""

import dataclasses
import heapq
import math
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import contexts
import pairs as pairing
from batches import all_logps, epoch_batches, group_of, micro_batches, pair_logps, token_count, training_rows
from contexts import examples_for, sampling_for
from data import user_message
from eval import Args as EvalArgs
from eval import evaluation
from losses import OBJECTIVES
from model import Config, Decoder, find, load
from optimizer import MasterAdamW, all_reduce_gradients, learning_rate
from pairs import SAMPLED, Pair, PairArgs, check_negatives, load_pairs, make_pairs, pairs_for
from report import learning_curve
from run import (Metrics, UserError, barrier, default_device, environment, fingerprint, gather, main, option,
                 parse_all, peak_memory, progress, rank, read_json, read_jsonl, world, write_json)
from selection import Selection, refuse_leaks, save_model
from tokenizer import Tokenizer

LR, TINY_LR = 1e-6, 2e-4  # the paper's, for 1B parameters and more; the embedded model's
TEST_ROWS = 640  # of the test part that --test evaluates, by seed: eval.py evaluates all


# ------------------------------------------------------------------------- arguments

@dataclass
class Args(PairArgs):
    pairs: str = option("", "folder of pairs to train on; data, negatives and seed are theirs", "data")
    out: str = option("", "run folder (default: runs/ and a name made of the arguments)", "data")
    dry_run: bool = option(False, "show an example, estimate memory and time, and stop", "data")
    method: str = option("dpo", "objective", "training", tuple(OBJECTIVES))
    softmax: bool = option(False, "one softmax over all rejected responses, not a row for each", "training")
    beta: float = option(0.1, "strength of the pull towards the reference", "training", sweep=True)
    lr: float | None = option(None, f"peak learning rate (default: {LR}; tiny: {TINY_LR})", "training",
                              sweep=True)
    epochs: int = option(1, "passes over the pairs", "training", sweep=True)
    batch: int = option(4, "pairs a step, of all processes together", "training")
    label_smoothing: float = option(0.0, "share of pairs taken to be the wrong way round", "training")
    nll: float = option(0.0, "weight of the chosen response's negative log-likelihood a token", "training")
    pass_tokens: int | None = option(None, "most tokens in one forward and backward pass (default: 768 on a "
                                     "CPU, 8192 on a GPU), a shared beginning not counted", "training")
    save_dtype: str | None = option(None, "type of the saved weights (default: that of --dtype)", "training",
                                    ("bfloat16", "float32"))
    rounding: str = option("stochastic", "of the fp32 masters to bfloat16; nearest only to see what it loses",
                           "training", ("stochastic", "nearest"))
    eval_every: int = option(0, "steps between validations; 0: only where values are chosen", "choosing")
    patience: int = option(0, "stop after so many validations without a better one; 0: never", "choosing")
    test: bool = option(False, f"evaluate on {TEST_ROWS} test rows at the end (tiny: always)", "choosing")
    val_limit: int = option(192, "validation examples, 0 for all", "choosing")


def resolve(args: Args) -> Args:
    """A copy with every default filled in that depends on other arguments or on the machine."""
    args = contexts.resolve(args)
    is_tiny = args.model == "tiny"
    lr, pass_tokens = args.lr, args.pass_tokens
    if lr is None:
        lr = TINY_LR if is_tiny else LR
    if pass_tokens is None:
        pass_tokens = 8192 if default_device().type == "cuda" else 768
    return dataclasses.replace(
        args,
        lr=lr,
        pass_tokens=pass_tokens,
        save_dtype=args.save_dtype or args.dtype,
        test=args.test or is_tiny,
    )


def check(args: Args) -> None:
    """UserError where the arguments contradict each other."""
    pairing.check(args)
    if min(args.batch, args.epochs, args.lr, args.beta, args.pass_tokens) <= 0:
        raise UserError("--batch, --epochs, --lr, --beta and --pass-tokens must be positive")
    if not 0 <= args.label_smoothing < 0.5 or min(args.nll, args.eval_every, args.patience) < 0:
        raise UserError("--label-smoothing must be in [0, 0.5); --nll, --eval-every, --patience at least 0")
    if args.patience and not args.eval_every:
        raise UserError("--patience counts validations during training: give --eval-every too")
    has_rejected = OBJECTIVES[args.method].uses_rejected
    if has_rejected and not args.n_neg:
        raise UserError("--n-neg 0 leaves nothing to prefer: only --method sft trains without")
    asks_for_more = args.n_neg > 1 and not args.pairs  # given pairs may have more than are used
    if not has_rejected and (args.softmax or args.label_smoothing or args.nll or asks_for_more):
        raise UserError("--softmax, --label-smoothing, --nll and --n-neg go with rejected responses: "
                        f"--method {args.method} has none")


# ------------------------------------------------------------------------- training

def train(optimizer: MasterAdamW, pairs: list[Pair], reference: Tensor, args: Args, metrics: Metrics,
          selection: Selection | None = None, candidate: int = 0) -> dict:
    """Train the optimizer's model on the pairs, and return a summary; every step is a line of metrics.jsonl.

    reference (pairs, 1 + N), of objectives that use one. candidate: the number of this combination of listed
    values. With a selection the model is validated on the way, and training may stop early.
    """
    model, objective = optimizer.model, OBJECTIVES[args.method]
    batches = [batch for epoch in range(args.epochs) for batch in epoch_batches(len(pairs), args, epoch)]
    steps_per_epoch = len(batches) // args.epochs
    bar = progress(len(pairs) * args.epochs, "pairs", "training")
    start = time.perf_counter()
    seconds, tokens, skipped, skipped_in_a_row = 0.0, 0, 0, 0  # of all steps so far
    scores: list[float] = []  # of the validations so far

    for step, batch in enumerate(batches):
        started = time.perf_counter()

        # The loss is one mean over the whole batch, however it is cut into micro-batches and wherever those
        # are computed: its gradient is the sum of theirs.
        divisor = len(batch)
        if objective.mean_over == "tokens":
            divisor = sum(len(pairs[i].chosen.ids) for i in batch)  # of all processes
        measured: list[dict[str, float]] = []  # the metrics of each pair of this process
        for indices in micro_batches(pairs, batch, args):
            chunk = [pairs[i] for i in indices]
            logps, lengths = pair_logps(model, chunk, args)  # (B, 1 + N) each: log pi(y|x,c), tokens of y
            loss, values = objective.loss(logps, reference[indices], lengths, args)  # (B,)
            (loss.sum() / divisor).backward()
            measured += rows_of(values)
        all_reduce_gradients(model)
        measured = gather(measured)
        means = {name: sum(row[name] for row in measured) / len(batch) for name in measured[0]}
        means["loss"] *= len(batch) / divisor

        # A step that is not finite is skipped; many in a row mean that the run is lost.
        norm = clip_grad_norm_(model.parameters(), 1.0).item()
        lr = learning_rate(step, len(batches), args.lr)
        if math.isfinite(norm) and math.isfinite(means["loss"]):
            optimizer.step(step, lr)
            skipped_in_a_row = 0
        else:
            skipped += 1
            skipped_in_a_row += 1
            ids = ", ".join(pairs[i].id for i in batch)
            print(f"step {step + 1} skipped: loss {means['loss']}, gradient norm {norm} (pairs {ids})")
            if skipped_in_a_row == 5:
                raise UserError("five steps in a row were not finite: lower --lr, or use --dtype float32")
        optimizer.zero_grad()

        step_seconds = time.perf_counter() - started
        step_tokens = sum(token_count(group_of(pairs[i], args)) for i in batch)
        seconds += step_seconds
        tokens += step_tokens
        metrics.log(
            candidate=candidate,
            step=step + 1,
            epoch=step // steps_per_epoch,
            **means,
            grad_norm=norm,
            lr=lr,
            pairs=len(batch),
            tokens=step_tokens,
            tokens_per_second=step_tokens / step_seconds,
            skipped=skipped,
            weights_changed=optimizer.share_changed(),
        )
        margin = f" margin {means['margin']:+.2f}" if "margin" in means else ""
        bar.set_postfix_str(f"loss {means['loss']:.3f}{margin} {tokens / seconds:.0f} tokens/s")
        bar.update(len(batch))

        is_last = step + 1 == len(batches)
        is_due = args.eval_every and (step + 1) % args.eval_every == 0
        if selection and (is_last or is_due):
            scores.append(selection.offer(optimizer, pairs, args, candidate, step + 1))
            metrics.log(candidate=candidate, step=step + 1, **{"validation_" + selection.name: scores[-1]})
            since_best = len(scores) - 1 - scores.index(max(scores))
            if args.patience and since_best >= args.patience and not is_last:
                print(f"stopped at step {step + 1} of {len(batches)}: {args.patience} validations no better")
                break
    bar.close()
    return dict(
        steps=step + 1,
        pairs=len(pairs),
        skipped=skipped,
        tokens=tokens,
        seconds_training=time.perf_counter() - start,
    )


def rows_of(values: dict[str, Tensor]) -> list[dict[str, float]]:
    """Metrics as one dict a pair, from name -> (B,)."""
    columns = torch.stack([value.float() for value in values.values()])  # (metrics, B)
    return [dict(zip(values, row, strict=True)) for row in columns.T.tolist()]


# ------------------------------------------------------------------------- dry run

def dry_run(grid: list[Args], folder: Path, source: Path) -> None:
    """Run a small part of everything, show an example, and say what the whole will take."""
    args = grid[0]
    dtype, device = getattr(torch, args.dtype), default_device()
    tokenizer = Tokenizer(source, args.date)
    start = time.perf_counter()
    model = load(source, dtype, device)
    seconds_loading = time.perf_counter() - start
    pairs_file = folder / "pairs.json"
    if args.pairs or (pairs_file.exists() and read_json(pairs_file)["statistics"] is not None):
        pairs = given_pairs(args, source) if args.pairs else pairs_for(args, "train", folder)
        count, seconds = len(pairs), {}
    else:
        pairs, count, seconds = estimate_sampling(args, model, tokenizer)
    show_pair(pairs[0], tokenizer)

    # Training is timed on the first four batches. The very first step also sets up memory, so it is left out
    # where there are others.
    rows = training_rows(pairs, args)
    count = count * len(rows) // len(pairs)
    few = rows[: 4 * args.batch]
    once = dataclasses.replace(args, epochs=1)
    start = time.perf_counter()
    reference = all_logps(model, few, once)
    if OBJECTIVES[args.method].uses_reference:
        seconds["reference"] = (time.perf_counter() - start) * count / len(few)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "metrics.jsonl"
        train(MasterAdamW(model, once.lr, once.seed, once.rounding), few, reference, once, Metrics(file))
        steps = [row for _, row in read_jsonl(file)] if not rank() else []
    if steps:
        steps = steps[1:] or steps
        spent = sum(step["tokens"] / step["tokens_per_second"] for step in steps)
        per_pair = spent / sum(step["pairs"] for step in steps)
        seconds["training"] = sum(count * candidate.epochs * per_pair for candidate in grid)

    tokens = sum(token_count(group_of(pair, args)) for pair in rows) / len(rows)
    total = sum(seconds.values()) + (1 + len(grid)) * seconds_loading
    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    each = " in each process" if world() > 1 else ""
    uncounted = "; validation not counted" if len(grid) > 1 or args.eval_every else ""
    print(f"\n{count} pairs of about {tokens:.0f} tokens, {math.ceil(count / args.batch)} steps an epoch, "
          f"{sum(candidate.epochs for candidate in grid)} epochs in all")
    print(f"estimate: {total:.0f} s ({parts}), {peak_memory() / 1e9:.1f} GB at most{each}{uncounted}")


def show_pair(pair: Pair, tokenizer: Tokenizer) -> None:
    """A pair as the model sees it: special tokens and all, and which tokens the loss counts."""
    def block(title: str, ids: list[int], mask: int) -> None:
        text = tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
        print(f"\n{title}: {len(ids)} tokens, mask {mask}\n    " + text.replace("\n", "\n    "))

    print(f"example {pair.id}; mask 1: in the loss, mask 0: not")
    block("prompt, of all responses below", pair.prompt_ids, 0)
    for k, response in enumerate(pair.responses):
        end = "" if response.finished else ", unfinished: no end token"
        block((f"rejected {k}" if k else "chosen") + end, response.ids, 1)
        if response.prompt_ids and response.prompt_ids != pair.prompt_ids:
            block(f"rejected {k} was sampled from", response.prompt_ids, 0)


def estimate_sampling(args: Args, model: Decoder, tokenizer: Tokenizer) -> tuple[list[Pair], int, dict]:
    """Sample a few pairs: these, how many there will be in all, and the seconds that all will take."""
    examples = examples_for(args, "train")
    check_negatives(examples, args)
    per_example = 1 + args.n_neg * (args.neg in SAMPLED)  # responses that are sampled
    size = min(len(examples), max(8, args.slots * world() // per_example))
    few = random.Random(0).sample(examples, size)
    pairs, statistics = make_pairs(model, tokenizer, few, args.neg, sampling_for(args), args.seed, args.slots,
                                   args.n_neg)
    lengths = [len(response.ids) for pair in pairs for response in pair.responses]
    depth = decoding_depth(lengths, len(examples) * per_example // world(), args.slots)
    share = len(few) / len(examples)
    seconds = dict(
        sampling=statistics["seconds_sampling"] * depth / max(lengths),
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


# ------------------------------------------------------------------------- command line

def run_folder(grid: list[Args]) -> Path:
    """--out, or runs/ and a name made of the arguments. A folder that already holds a run is refused."""
    args = grid[0]
    given = [dataclasses.asdict(candidate) | dict(dry_run=False) for candidate in grid]
    parts = Path(args.data.partition(":")[0]).stem, args.neg, Path(args.model).name, fingerprint(given)[:6]
    folder = Path(args.out) if args.out else Path("runs") / "-".join(parts)
    if (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder} already holds a run: name another --out, or remove it")
    return folder


def check_space(folder: Path, source: Path) -> None:
    """UserError where the disk has no room for another model of source's size."""
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise UserError(f"{folder}: a trained model takes {size / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are "
                        "free")


def with_settings_of_pairs(grid: list[Args]) -> list[Args]:
    """With --pairs, the arguments that made them: eval.py goes by args.json, and another seed, say, would
    give it another split."""
    if not grid[0].pairs:
        return grid
    settings = read_json(Path(grid[0].pairs) / "pairs.json").get("settings", {})
    if settings.get("split", "train") != "train":
        raise UserError(f"--pairs {grid[0].pairs} were made of the {settings['split']} part, which a model "
                        "must not be trained on: make pairs with --split train")
    names = ("data", "contexts", "neg", "n_neg", "seed", "date")
    known = {name: settings[name] for name in names if name in settings} | settings.get("sampling", {})
    return [dataclasses.replace(args, **known) for args in grid]


def given_pairs(args: Args, source: Path) -> list[Pair]:
    """The pairs of --pairs, after a check that this model's tokenizer made them."""
    pairs = load_pairs(Path(args.pairs))
    first = pairs[0]
    message = user_message(first.prompt, first.context, first.style)
    if Tokenizer(source, args.date).chat(message) != first.prompt_ids:
        raise UserError(f"--pairs {args.pairs}: {args.model} writes these prompts as other tokens: "
                        "its tokenizer, chat template or --date is another one")
    if OBJECTIVES[args.method].uses_rejected and not first.rejected:
        raise UserError(f"--pairs {args.pairs}: no rejected responses; only --method sft trains without")
    refuse_leaks(pairs, args)
    return pairs


def program() -> None:
    grid = [resolve(args) for args in with_settings_of_pairs(parse_all(Args, usage=__doc__))]
    for args in grid:
        check(args)
    args, objective = grid[0], OBJECTIVES[grid[0].method]
    if not objective.uses_rejected and not args.pairs:
        grid = [dataclasses.replace(candidate, n_neg=0) for candidate in grid]  # nothing to be sampled
    if not objective.uses_reference and len({candidate.beta for candidate in grid}) > 1:
        raise UserError(f"--beta is of no use to --method {args.method}: give it one value")

    # What can be wrong with data and names is found before the run folder exists, and where contexts are not
    # to be inferred before a model is fetched.
    folder = run_folder(grid)
    if not args.pairs:
        examples_for(args, "train")
    source = find(args.model)
    Config.from_dict(read_json(source / "config.json"), str(source / "config.json"))
    barrier()  # all processes have looked at the folder before one of them writes there
    if args.dry_run:
        dry_run(grid, folder, source)
        return
    check_space(folder, source)
    run_training(grid, folder, source)
    if grid[0].test:
        evaluation(EvalArgs(model=str(folder), limit=args.limit or TEST_ROWS, slots=args.slots))
        print(f"learning curve: {folder / 'learning_curve.png'}")
    else:
        print(f"evaluate it with: python eval.py --model {folder}")


def run_training(grid: list[Args], folder: Path, source: Path) -> None:
    """Pairs, reference log-probs, training of every candidate, and the run folder's files."""
    args = grid[0]
    dtype, device = getattr(torch, args.dtype), default_device()
    start = time.perf_counter()
    selection = Selection(args, folder, source) if len(grid) > 1 or args.eval_every else None
    pairs = given_pairs(args, source) if args.pairs else pairs_for(args, "train", folder)
    pairs = training_rows(pairs, args)
    swept = [field.name for field in dataclasses.fields(args) if field.metadata["sweep"]]
    candidates = [{name: getattr(candidate, name) for name in swept} for candidate in grid]
    folder.mkdir(parents=True, exist_ok=True)

    def write_arguments(arguments: Args) -> None:
        write_json(folder / "args.json", dict(
            arguments=dataclasses.asdict(arguments),
            candidates=candidates,
            processes=world(),
            environment=environment(),
        ))

    write_arguments(args)
    seconds_pairs = time.perf_counter() - start
    print(f"{folder}: {len(pairs)} pairs, lr {args.lr}, beta {args.beta}")

    # The reference is the model as training finds it; an objective that uses none does not read these zeros.
    model = load(source, dtype, device)
    reference = torch.zeros(len(pairs), 1, device=device)
    if OBJECTIVES[args.method].uses_reference:
        reference = all_logps(model, pairs, args)
    seconds_reference = time.perf_counter() - start - seconds_pairs

    metrics, summaries = Metrics(folder / "metrics.jsonl"), []
    for k, candidate in enumerate(grid):
        if len(grid) > 1:
            print(f"candidate {k + 1} of {len(grid)}: {candidates[k]}")
        if k:
            model = optimizer = None  # before the next one takes their memory
            model = load(source, dtype, device)
        optimizer = MasterAdamW(model, candidate.lr, candidate.seed, candidate.rounding)
        summaries.append(train(optimizer, pairs, reference, candidate, metrics, selection, k))
    best = selection.best["candidate"] if selection else 0
    if selection:
        write_arguments(grid[best])
        print(f"chosen: {candidates[best]} after step {selection.best['step']}, "
              f"{selection.name} {selection.best['score']:.3f}")
    else:
        kept = save_model(optimizer, pairs, args, folder, source)
    barrier()

    summary = summaries[best] | dict(
        kept=selection.best["kept"] if selection else kept,
        seconds_pairs=seconds_pairs,
        seconds_reference=seconds_reference,
        seconds=time.perf_counter() - start,
        peak_memory_gb=peak_memory() / 1e9,
    )
    if selection:
        summary |= dict(chosen=selection.best, runs=summaries)
    write_json(folder / "summary.json", summary)
    if not rank():
        learning_curve(folder, best)
    print(f"{summary['steps']} steps, {summary['seconds']:.0f} s in all: pairs {seconds_pairs:.0f}, "
          f"reference {seconds_reference:.0f}, training {summary['seconds_training']:.0f}; "
          f"{summary['peak_memory_gb']:.1f} GB at most; model in {folder / 'model'}")


if __name__ == "__main__":
    main(program)
