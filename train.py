"""train.py - MIPO end to end: model -> contrastive pairs -> reference log-probs -> DPO -> model folder.

    dpo   -log sigmoid(beta * ((log pi - log pi_ref)(y_c|x,c) - (log pi - log pi_ref)(y_r|x,c)))       Eq. 5
          --n-neg N: N such rows for every chosen response, or with --softmax one (N+1)-way row        Eq. 8
    sft   -log pi(y_c|x,c) a token, mean over the batch's tokens

Pairs are sampled from the model itself (pairs.py), unless the run folder or --pairs holds them. AdamW on fp32
master weights with bf16 arithmetic, linear warm-up over 3% of the steps, cosine to 10% of the peak, gradient
norm clipped at 1. Several processes (torchrun --nproc_per_node) share the sampling and every batch: the
gradient and the text are those of one. Several values (--lr 1e-6,5e-6) are trained in turn and the
best is kept.
What differs from the paper: settings are chosen on validation prompts, never on test ones, and the learning
rate goes with the model's size: 1e-7 to 1e-6 for 1B and more, several times that for 135M.

    torchrun train.py --data demo --neg missing --model DIR          or plain python train.py ...

The run folder then holds args.json, pairs.jsonl, metrics.jsonl, summary.json, learning_curve.png and model/;
eval.py reads it. --dry-run shows an example and says what a run will take.
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
import torch.distributed as dist
from torch import Tensor

from eval import evaluation, learning_curve
from eval import Args as EvalArgs
from losses import Group, batches, common_prefix, dpo, score
from model import Config, Decoder, find, load, save
from pairs import (Pair, PairArgs, examples_for, load_pairs, make_pairs, pairs_for, sampling_for, user_turn,
                   verify)
from run import (Metrics, UserError, default_device, derive, environment, fingerprint, gather, main,
                 matmul_ceiling, mine, option, parse_all, peak_memory, progress, rank, read_json, read_jsonl,
                 world, write_json)
from sample import Tokenizer, generate

METHODS = ("dpo", "sft")
LR, TINY_LR = 1e-6, 2e-4  # the paper's, for 1B parameters and more; the embedded model's
TEST_ROWS = 640  # of the test part that --test evaluates, by seed: eval.py evaluates all


@dataclass
class Args(PairArgs):
    pairs: str = option("", "folder of pairs to train on; data, negatives and seed are theirs", "data")
    out: str = option("", "run folder (default: runs/ and a name made of the arguments)", "data")
    dry_run: bool = option(False, "show an example, estimate memory and time, and stop", "data")
    method: str = option("dpo", "objective", "training", METHODS)
    softmax: bool = option(False, "one softmax over all rejected responses, not a row for each", "training")
    beta: float = option(0.1, "strength of the pull towards the reference", "training", many=True)
    lr: float | None = option(None, f"peak learning rate (default: {LR}; tiny: {TINY_LR})", "training",
                              many=True)
    epochs: int = option(1, "passes over the pairs", "training", many=True)
    batch: int = option(4, "pairs a step, of all processes together", "training")
    label_smoothing: float = option(0.0, "share of pairs taken to be the wrong way round", "training")
    nll: float = option(0.0, "weight of the chosen response's negative log-likelihood a token", "training")
    pass_tokens: int | None = option(None, "most tokens in one forward and backward pass (default: 768 on a "
                                     "CPU, 8192 on a GPU), a shared beginning not counted", "training")
    save_dtype: str = option("bfloat16", "type of the saved weights", "training", ("bfloat16", "float32"))
    eval_every: int = option(0, "steps between validations; 0: only where values are chosen", "choosing")
    patience: int = option(0, "stop after so many validations without a better one; 0: never", "choosing")
    test: bool = option(False, f"evaluate on {TEST_ROWS} test rows at the end (tiny: always)", "choosing")
    val_limit: int = option(192, "validation examples, 0 for all", "choosing")

    def __post_init__(self):
        super().__post_init__()
        if self.lr is None:
            self.lr = TINY_LR if self.model == "tiny" else LR
        if self.pass_tokens is None:
            self.pass_tokens = 8192 if default_device().type == "cuda" else 768
        self.test = self.test or self.model == "tiny"
        if min(self.batch, self.epochs, self.lr, self.beta, self.pass_tokens) <= 0:
            raise UserError("--batch, --epochs, --lr, --beta and --pass-tokens must be positive")
        if not 0 <= self.label_smoothing < 0.5 or min(self.nll, self.eval_every, self.patience) < 0:
            raise UserError("--label-smoothing must be in [0, 0.5); --nll, --eval-every, --patience at least "
                            "0")
        if self.patience and not self.eval_every:
            raise UserError("--patience counts validations during training: give --eval-every too")
        if self.method == "sft":
            if self.softmax or self.label_smoothing or self.nll or (self.n_neg > 1 and not self.pairs):
                raise UserError("--softmax, --label-smoothing, --nll and --n-neg go with rejected responses: "
                                "--method sft has none")
            self.n_neg = 0  # only chosen responses are sampled
        elif not self.n_neg:
            raise UserError("--n-neg 0 leaves nothing to prefer: only --method sft trains without")


# -------------------------------------------------------------------------------- schedule

def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3% of the steps, then a cosine from the peak to 10% of it. step from 0.
    """
    warmup = max(1, math.ceil(0.03 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits the pairs: a permutation that is a function of (seed, epoch) alone.
    """
    generator = torch.Generator().manual_seed(derive("order", seed, epoch))
    return torch.randperm(count, generator=generator).tolist()


def schedule(count: int, args: Args, epoch: int) -> list[list[int]]:
    """An epoch's steps, each the indices of its `batch` pairs; the last step has what is left."""
    order = epoch_order(count, args.seed, epoch)
    return [order[i : i + args.batch] for i in range(0, count, args.batch)]


def passes(pairs: list[Pair], step: list[int], args: Args) -> list[list[int]]:
    """This process's share of a step, cut into passes of `pass_tokens` tokens (see batches)."""
    share = mine(step)
    return [[share[i] for i in part] for part in batches([group(pairs[i], args) for i in share],
                                                         args.pass_tokens)]


def rows(pairs: list[Pair], args: Args) -> list[Pair]:
    """What a batch counts: with N rejected responses N pairs that share the chosen one (section 4.2); with
    --softmax one that has them all (Eq. 8)."""
    if args.method == "sft" or args.softmax:
        return pairs
    return [dataclasses.replace(p, rejected=[text], rejected_ids=[ids])
            for p in pairs for text, ids in zip(p.rejected, p.rejected_ids, strict=True)]


# -------------------------------------------------------------------------------- objectives

def group(pair: Pair, args: Args) -> Group:
    """Chosen and rejected responses, all under the same right prompt: the heart of the method."""
    return pair.prompt_ids, [pair.chosen_ids, *(pair.rejected_ids if args.method == "dpo" else [])]


def response_logps(model: Decoder, pairs: list[Pair], args: Args) -> Tensor:
    """log pi(y|x,c) of the chosen and rejected responses, summed over tokens: (B, 1 + N); sft: (B, 1)."""
    scored = score(model, [group(p, args) for p in pairs])
    return torch.stack([torch.stack([lp.sum() for lp in responses]) for responses in scored])  # (B, 1 + N)


def objective(logps: Tensor, reference: Tensor, lengths: Tensor, args: Args) -> tuple[Tensor, dict]:
    """The loss of each pair (B,), of which a step takes the mean (sft: over tokens), and its metrics.

    logps, reference (B, 1 + N); lengths (B,): tokens of the chosen responses.
    """
    if args.method == "sft":
        loss = -logps[:, 0]  # (B,): token-mean cross-entropy once divided by the batch's tokens
        return loss, dict(loss=loss.detach(), logp_chosen=logps[:, 0].detach())
    loss, measured = dpo(logps, reference, args.beta, args.label_smoothing)
    if args.nll:
        loss = loss - args.nll * logps[:, 0] / lengths
    return loss, measured | dict(loss=loss.detach())


@torch.no_grad()
def all_logps(model: Decoder, pairs: list[Pair], args: Args, label: str = "reference") -> Tensor:
    """Log-probs of every pair, (pairs, 1 + N), by the very passes of the first epoch's training: then the
    first step's margins are exactly 0 in any arithmetic.

    The model may be held in the compute type alone: that is what training casts its fp32 masters to.
    """
    exact = torch.promote_types(model.compute, torch.float32)
    table = torch.zeros(len(pairs), len(group(pairs[0], args)[1]), dtype=exact, device=model.device)
    bar = progress(len(pairs), "pairs", label)
    for step in schedule(len(pairs), args, 0):
        for part in passes(pairs, step, args):
            table[part] = response_logps(model, [pairs[i] for i in part], args)
        bar.update(len(step))
    bar.close()
    if world() > 1:
        dist.all_reduce(table)  # every pair was scored by one process, the others have 0 there
    return table


# -------------------------------------------------------------------------------- training

def sum_gradients(model: Decoder) -> None:
    """Add up all processes' gradients: each is of its share of one mean over the whole batch."""
    if world() == 1:
        return
    for p in model.parameters():
        if p.grad is None:  # a last batch may leave a process without pairs
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad)


def add_gradients(model: Decoder, pairs: list[Pair], step: list[int], reference: Tensor,
                  args: Args) -> dict[str, float]:
    """Add the gradient of a step's loss to every parameter's, and return the means of its metrics.

    The loss is one mean over all the step's pairs (sft: tokens), however they are cut into passes and
    wherever they are computed.
    """
    divisor = sum(len(pairs[i].chosen_ids) for i in step) if args.method == "sft" else len(step)
    measured: list[dict[str, float]] = []  # one of each of this process's pairs
    for part in passes(pairs, step, args):
        some = [pairs[i] for i in part]
        lengths = torch.tensor([len(p.chosen_ids) for p in some], device=model.device)  # (B,)
        loss, values = objective(response_logps(model, some, args), reference[part], lengths, args)
        (loss.sum() / divisor).backward()
        columns = torch.stack([v.float() for v in values.values()]).T.tolist()  # (B, metrics)
        measured += [dict(zip(values, row, strict=True)) for row in columns]
    sum_gradients(model)
    measured = gather(measured)
    means = {key: sum(m[key] for m in measured) / len(step) for key in measured[0]}
    return means | dict(loss=means["loss"] * len(step) / divisor)


def flops(c: Config, groups: list[Group]) -> float:
    """Floating-point operations of one forward and backward pass over groups, matrix products alone: 6 for
    every weight and token, and 6 for every channel and pair of tokens that see each other, twice."""
    heads = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    weights = c.num_hidden_layers * c.hidden_size * (heads + 3 * c.intermediate_size)
    root = common_prefix([prefix for prefix, _ in groups])
    fed, seen, predicted = root, root * root / 2, 0  # tokens, pairs of them, response tokens
    for prefix, responses in groups:
        for start, n in [(root, len(prefix) - root), *((len(prefix), len(r) - 1) for r in responses)]:
            fed, seen = fed + n, seen + n * start + n * n / 2
        predicted += sum(map(len, responses))
    attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seen
    return 6 * (weights * fed + c.vocab_size * c.hidden_size * predicted + attention)


def train(model: Decoder, pairs: list[Pair], reference: Tensor, args: Args, metrics: Metrics,
          selection: "Selection | None" = None, candidate: int = 0) -> dict:
    """Train on the pairs, in place. reference (pairs, 1 + N). Returns the run's summary; every step is a line
    of metrics.jsonl. With a selection the model is validated on the way, and may stop early."""
    epochs = [schedule(len(pairs), args, epoch) for epoch in range(args.epochs)]
    steps = [step for epoch in epochs for step in epoch]
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.95), 1e-8, 0.0, fused=True)
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        # made now, side by side: scattered among a step's own tensors they would break up memory
        optimizer.state[p] = dict(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                                  exp_avg_sq=torch.zeros_like(p))
    ceiling = matmul_ceiling(model.compute, model.device)
    bar = progress(len(pairs) * args.epochs, "pairs", "training")
    start, spent, seen_tokens, seen_flops, skipped, in_a_row = time.perf_counter(), 0.0, 0, 0.0, 0, 0
    scores: list[float] = []
    for number, step in enumerate(steps):
        step_start = time.perf_counter()
        means = add_gradients(model, pairs, step, reference, args)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        lr = learning_rate(number, len(steps), args.lr)
        if math.isfinite(norm) and math.isfinite(means["loss"]):
            in_a_row = 0
            for g in optimizer.param_groups:
                g["lr"] = lr
            optimizer.step()
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            names = ", ".join(pairs[i].id for i in step)
            print(f"step {number + 1} skipped: loss {means['loss']}, gradient norm {norm} (pairs {names})")
            if in_a_row == 5:
                raise UserError("five steps in a row were not finite: lower --lr, or use --dtype float32")
        optimizer.zero_grad()
        seconds = time.perf_counter() - step_start
        groups = [group(pairs[i], args) for i in step]
        tokens = sum(len(prefix) + sum(map(len, responses)) for prefix, responses in groups)
        work = world() * sum(flops(model.config, [group(pairs[i], args) for i in part])
                             for part in passes(pairs, step, args))  # the other processes' shares are alike
        spent, seen_tokens, seen_flops = spent + seconds, seen_tokens + tokens, seen_flops + work
        metrics.log(candidate=candidate, step=number + 1, epoch=number // len(epochs[0]), **means,
                    grad_norm=norm, lr=lr, pairs=len(step), tokens=tokens, tokens_per_second=tokens / seconds,
                    matmul_share=work / seconds / ceiling, skipped=skipped)
        margin = f" margin {means['margin']:+.2f}" if "margin" in means else ""
        bar.set_postfix_str(f"loss {means['loss']:.3f}{margin} {seen_tokens / spent:.0f} tokens/s, "
                            f"{seen_flops / spent / ceiling:.0%} of the matmul ceiling")
        bar.update(len(step))
        last = number + 1 == len(steps)
        if selection and (last or (args.eval_every and (number + 1) % args.eval_every == 0)):
            scores.append(selection.offer(model, candidate, number + 1))
            metrics.log(candidate=candidate, step=number + 1, **{"validation_" + selection.name: scores[-1]})
            if args.patience and len(scores) - scores.index(max(scores)) > args.patience and not last:
                print(f"stopped at step {number + 1} of {len(steps)}: {args.patience} validations no better")
                break
    bar.close()
    return dict(steps=number + 1, pairs=len(pairs), skipped=skipped, tokens=seen_tokens,
                matmul_share=seen_flops / spent / ceiling, seconds_training=time.perf_counter() - start)


# -------------------------------------------------------------------------------- choosing

class Selection:
    """Scores models on the validation part and keeps the best of them in the run folder's model/.

    The score is the share of sampled responses that honour their context or solve their task, where the data
    can check that (win_rate), else the share of validation pairs whose margin is positive (margin_accuracy).
    Equal scores leave the earlier model.
    """

    def __init__(self, args: Args, folder: Path, source: Path):
        self.args = dataclasses.replace(args, limit=args.val_limit, method="dpo", n_neg=max(1, args.n_neg))
        self.folder, self.source = folder, source
        self.examples = examples_for(self.args, "validation")
        self.best = dict(score=-math.inf)
        self.name = "win_rate" if verify(self.examples[0], "") is not None else "margin_accuracy"
        if self.name == "win_rate":
            self.tokenizer = Tokenizer(source, args.date)
        else:
            self.pairs = rows(pairs_for(self.args, "validation", folder / "validation"), self.args)
            base = load(source, getattr(torch, args.dtype), device=default_device())
            self.reference = all_logps(base, self.pairs, self.args, "validation reference")

    def measure(self, model: Decoder) -> float:
        if self.name == "margin_accuracy":
            logps = all_logps(model, self.pairs, self.args, "validation")
            return dpo(logps, self.reference, self.args.beta)[1]["accuracy"].mean().item()
        draws = sampling_for(dataclasses.replace(self.args, temperature=None, top_p=None), evaluation=True)
        share = mine(list(enumerate(self.examples)))
        prompts = [self.tokenizer.chat(e.turn(e.context)) for _, e in share]
        bar = progress(len(prompts), "responses", "validation")
        samples = generate(model.snapshot(), prompts, draws, self.tokenizer.stop_ids, self.args.seed,
                           [(i, 0) for i, _ in share], self.args.slots, bar)
        bar.close()
        hits = gather([verify(e, self.tokenizer.decode(s.ids))
                       for (_, e), s in zip(share, samples, strict=True)])
        return sum(hits) / len(hits)

    def offer(self, model: Decoder, candidate: int, step: int) -> float:
        """The model's score; the model is saved if no earlier one has reached it."""
        score = self.measure(model)
        better = score > self.best["score"]
        print(f"validation: {self.name} {score:.3f} at step {step}" + ", the best so far" * better)
        if better:
            self.best = dict(score=score, candidate=candidate, step=step)
            save(model, self.folder / "model", self.source, getattr(torch, self.args.save_dtype))
        return score


# -------------------------------------------------------------------------------- dry run

def show(pair: Pair, tokenizer: Tokenizer) -> None:
    """The first pair as the model sees it: special tokens and all, and which tokens the loss counts."""
    def block(title: str, ids: list[int], mask: int) -> None:
        text = tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
        print(f"\n{title}: {len(ids)} tokens, mask {mask}\n    " + text.replace("\n", "\n    "))

    print(f"example {pair.id}; mask 1: in the loss, mask 0: not")
    block("prompt, of all responses below", pair.prompt_ids, 0)
    for k, ids in enumerate([pair.chosen_ids, *pair.rejected_ids]):
        end = "" if pair.finished[k] else ", unfinished: no end token"
        block((f"rejected {k}" if k else "chosen") + end, ids, 1)
        if k and pair.source_ids[k - 1] and pair.source_ids[k - 1] != pair.prompt_ids:
            block(f"rejected {k} was sampled from", pair.source_ids[k - 1], 0)


def decode_steps(lengths: list[int], count: int, slots: int) -> int:
    """How many tokens deep the sampler goes for `count` responses of such lengths, refilling its slots."""
    draw = random.Random(0)
    busy = [0] * min(slots, count)
    for _ in range(count):
        heapq.heappush(busy, heapq.heappop(busy) + draw.choice(lengths))
    return max(busy)


def dry_run(grid: list[Args], folder: Path, source: Path) -> None:
    """Run a small part of everything, show an example, and say what the whole will take."""
    args = grid[0]
    compute, device = getattr(torch, args.dtype), default_device()
    tokenizer = Tokenizer(source, args.date)
    loading = time.perf_counter()
    model = load(source, compute, device=device)
    loading = time.perf_counter() - loading
    made = folder / "pairs.json"
    if args.pairs or (made.exists() and read_json(made)["statistics"] is not None):
        pairs = given_pairs(args, source) if args.pairs else pairs_for(args, "train", folder)
        count, seconds = len(pairs), {}
    else:
        examples = examples_for(args, "train")
        sampled = 1 + args.n_neg * (args.neg in ("missing", "random"))  # responses of an example
        size = min(len(examples), max(8, args.slots * world() // sampled))
        probe = random.Random(0).sample(examples, size)
        pairs, stats = make_pairs(model, tokenizer, probe, args.neg, sampling_for(args), args.seed,
                                  args.slots, args.n_neg)
        lengths = [len(ids) for p in pairs for ids in (p.chosen_ids, *p.rejected_ids)]
        jobs = len(examples) * sampled // world()
        deeper = decode_steps(lengths, jobs, args.slots) / max(lengths)
        count = round(len(examples) * len(pairs) / len(probe))
        seconds = dict(sampling=stats["seconds_sampling"] * deeper,
                       gain=stats["seconds_gain"] * len(examples) / len(probe))
    show(pairs[0], tokenizer)
    trained = rows(pairs, args)
    count = count * len(trained) // len(pairs)
    some = trained[: 4 * args.batch]
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "metrics.jsonl"
        once = dataclasses.replace(args, epochs=1)
        start = time.perf_counter()
        reference = all_logps(model, some, once)
        if args.method == "dpo":
            seconds["reference"] = (time.perf_counter() - start) * count / len(some)
        del model
        train(load(source, torch.float32, compute, device), some, reference, once, Metrics(file))
        steps = [row for _, row in read_jsonl(file)] if not rank() else []
    if steps:  # the first step also sets up memory
        steps = steps[1:] or steps
        each = sum(s["tokens"] / s["tokens_per_second"] for s in steps) / sum(s["pairs"] for s in steps)
        seconds["training"] = sum(count * a.epochs * each for a in grid)
    tokens = sum(len(p.prompt_ids) + sum(map(len, group(p, args)[1])) for p in trained) / len(trained)
    whole = sum(seconds.values()) + (2 + len(grid)) * loading
    print(f"\n{count} pairs of about {tokens:.0f} tokens, {math.ceil(count / args.batch)} steps an epoch, "
          f"{sum(a.epochs for a in grid)} epochs in all")
    print(f"estimate: {whole:.0f} s (" + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items())
          + f"), {peak_memory() / 1e9:.1f} GB at most" + " in each process" * (world() > 1)
          + "; validation not counted" * (len(grid) > 1 or bool(args.eval_every)))


# -------------------------------------------------------------------------------- command line

def run_folder(grid: list[Args]) -> Path:
    """--out, or runs/ and a name made of the arguments. A folder that already holds a run is refused."""
    args, given = grid[0], [dataclasses.asdict(a) | dict(dry_run=False) for a in grid]
    parts = (Path(args.data.partition(":")[0]).stem, args.neg, Path(args.model).name, fingerprint(given)[:6])
    folder = Path(args.out) if args.out else Path("runs") / "-".join(parts)
    if (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder} already holds a run: name another --out, or remove it")
    return folder


def check_space(folder: Path, source: Path) -> None:
    """UserError where the disk has no room for another model of source's size."""
    size = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free
    if free < size:
        raise UserError(f"{folder}: a trained model takes {size / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are "
                        "free")


def given_pairs(args: Args, source: Path) -> list[Pair]:
    """The pairs of --pairs, after a check that this model's tokenizer made them."""
    pairs = load_pairs(Path(args.pairs))
    first = pairs[0]
    turn = user_turn(first.prompt, first.context, first.style)
    if Tokenizer(source, args.date).chat(turn) != first.prompt_ids:
        raise UserError(f"--pairs {args.pairs}: {args.model} writes these prompts as other tokens: "
                        "its tokenizer, chat template or --date is another one")
    if args.method == "dpo" and not first.rejected:
        raise UserError(f"--pairs {args.pairs}: no rejected responses; only --method sft trains without")
    return pairs


def program() -> None:
    grid = parse_all(Args, usage=__doc__)
    if grid[0].pairs:  # eval.py goes by args.json: another seed would give it another split
        made = read_json(Path(grid[0].pairs) / "pairs.json").get("settings", {})
        theirs = {key: made[key] for key in ("data", "neg", "n_neg", "seed", "date") if made.get(key)}
        grid = [dataclasses.replace(a, **theirs, **made.get("sampling", {})) for a in grid]
    args = grid[0]
    if args.method == "sft" and len({a.beta for a in grid}) > 1:
        raise UserError("--beta is of no use to --method sft: give it one value")
    folder = run_folder(grid)
    if not args.pairs:
        examples_for(args, "train")  # wrong data are told of before a model is fetched
    source = find(args.model)  # before the folder exists: a wrong name leaves nothing behind
    Config.from_dict(read_json(source / "config.json"), str(source / "config.json"))  # supported?
    gather([])  # all processes have looked at the folder before one of them writes there
    if args.dry_run:
        dry_run(grid, folder, source)
        return
    check_space(folder, source)
    start = time.perf_counter()
    selection = Selection(args, folder, source) if len(grid) > 1 or args.eval_every else None
    pairs = given_pairs(args, source) if args.pairs else pairs_for(args, "train", folder)
    pairs = rows(pairs, args)
    folder.mkdir(parents=True, exist_ok=True)
    many = [f.name for f in dataclasses.fields(args) if f.metadata["many"]]
    candidates = [{name: getattr(a, name) for name in many} for a in grid]
    write_json(folder / "args.json", dict(arguments=dataclasses.asdict(args), candidates=candidates,
                                          processes=world(), environment=environment()))
    seconds = dict(seconds_pairs=time.perf_counter() - start)
    print(f"{folder}: {len(pairs)} pairs, lr {args.lr}, beta {args.beta}")
    compute, device = getattr(torch, args.dtype), default_device()
    if args.method == "dpo":
        reference = all_logps(load(source, compute, device=device), pairs, args)
    else:
        reference = torch.zeros(len(pairs), 1)  # sft has none
    seconds["seconds_reference"] = time.perf_counter() - start - seconds["seconds_pairs"]
    metrics, summaries = Metrics(folder / "metrics.jsonl"), []
    for k, candidate in enumerate(grid):
        if len(grid) > 1:
            print(f"candidate {k + 1} of {len(grid)}: {candidates[k]}")
        model = load(source, torch.float32, compute, device)
        summaries.append(train(model, pairs, reference, candidate, metrics, selection, k))
    if selection:
        args = grid[selection.best["candidate"]]
        write_json(folder / "args.json", dict(arguments=dataclasses.asdict(args), candidates=candidates,
                                              processes=world(), environment=environment()))
        print(f"chosen: {candidates[selection.best['candidate']]} after step {selection.best['step']}, "
              f"{selection.name} {selection.best['score']:.3f}")
    else:
        save(model, folder / "model", source, getattr(torch, args.save_dtype))
    gather([])
    s = {**summaries[selection.best["candidate"] if selection else 0], **seconds,
         "seconds": time.perf_counter() - start, "peak_memory_gb": peak_memory() / 1e9}
    if selection:
        s |= dict(chosen=selection.best, runs=summaries)
    write_json(folder / "summary.json", s)
    if not rank():
        learning_curve(folder, selection.best["candidate"] if selection else 0)
    print(f"{s['steps']} steps, {s['seconds']:.0f} s in all: pairs {s['seconds_pairs']:.0f}, "
          f"reference {s['seconds_reference']:.0f}, training {s['seconds_training']:.0f}; "
          f"{s['peak_memory_gb']:.1f} GB at most; model in {folder / 'model'}")
    if args.test:
        del model
        evaluation(EvalArgs(model=str(folder), limit=args.limit or TEST_ROWS, slots=args.slots,
                            dtype=args.dtype))
        print(f"learning curve: {folder / 'learning_curve.png'}")
    else:
        print(f"evaluate it with: python eval.py --model {folder}")


if __name__ == "__main__":
    main(program)
