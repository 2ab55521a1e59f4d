"""train.py - MIPO end to end: model -> contrastive pairs -> reference log-probs -> DPO -> model folder.

    loss = -log sigmoid(beta * ((log pi - log pi_ref)(y_c|x,c) - (log pi - log pi_ref)(y_r|x,c)))      Eq. 5

Pairs are sampled from the model itself (pairs.py), unless the run folder or --pairs holds them. AdamW on fp32
master weights with bf16 arithmetic, linear warm-up over 3% of the steps, cosine to 10% of the peak, gradient
norm clipped at 1.
What differs from the paper: the learning rate is chosen on validation prompts, never on test ones, and goes
with the model's size: 1e-7 to 1e-6 for 1B and more, several times that for 135M.

    torchrun train.py --data demo --neg missing --model DIR          or plain python train.py ...

The run folder then holds args.json, pairs.jsonl, metrics.jsonl, summary.json and model/; eval.py reads it.
"""

import dataclasses
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from losses import Group, batches, dpo, score
from model import Decoder, find, load, save
from pairs import Pair, PairArgs, load_pairs, pairs_for, user_turn
from run import (Metrics, UserError, default_device, derive, environment, fingerprint, main, option, parse,
                 progress, read_json, write_json)
from sample import Tokenizer


@dataclass
class Args(PairArgs):
    pairs: str = option("", "folder of pairs to train on; data, negatives and seed are theirs", "data")
    out: str = option("", "run folder (default: runs/ and a name made of the arguments)", "data")
    beta: float = option(0.1, "strength of the pull towards the reference", "training")
    lr: float = option(1e-6, "peak learning rate", "training")
    batch: int = option(4, "pairs a step", "training")
    epochs: int = option(1, "passes over the pairs", "training")
    pass_tokens: int = option(8192, "most tokens in one forward and backward pass", "training")


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


# -------------------------------------------------------------------------------- DPO

def pair_group(pair: Pair) -> Group:
    """Chosen and rejected responses, all under the same right prompt: the heart of the method."""
    return pair.prompt_ids, [pair.chosen_ids, *pair.rejected_ids]


def pair_logps(model: Decoder, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """log pi(y_c|x,c) and log pi(y_r|x,c), summed over tokens: (B,) each."""
    scored = score(model, [pair_group(p) for p in pairs])
    return (torch.stack([chosen.sum() for chosen, _ in scored]),  # (B,)
            torch.stack([rejected.sum() for _, rejected in scored]))  # (B,)


def schedule(pairs: list[Pair], args: Args) -> list[list[list[list[int]]]]:
    """Epoch -> step -> pass -> pair indices: `batch` pairs a step, at most `pass_tokens` tokens a pass."""

    def passes(step: list[int]) -> list[list[int]]:
        groups = [pair_group(pairs[i]) for i in step]
        return [[step[i] for i in part] for part in batches(groups, args.pass_tokens)]

    orders = [epoch_order(len(pairs), args.seed, epoch) for epoch in range(args.epochs)]
    return [[passes(order[i : i + args.batch]) for i in range(0, len(order), args.batch)] for order in orders]


@torch.no_grad()
def reference_logps(model: Decoder, pairs: list[Pair], epoch: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    """The start model's log-probs of every pair, (pairs,) each, by the passes of the first epoch's training:
    then the first step's margins are exactly 0 in any arithmetic.

    The model may be held in the compute type alone: that is what training casts its fp32 masters to.
    """
    chosen, rejected = torch.zeros(2, len(pairs), device=model.device)  # (pairs,) each
    bar = progress(len(pairs), "pairs", "reference")
    for step in epoch:
        for part in step:
            chosen[part], rejected[part] = pair_logps(model, [pairs[i] for i in part])
        bar.update(sum(map(len, step)))
    bar.close()
    return chosen, rejected


def train(model: Decoder, pairs: list[Pair], reference: tuple[Tensor, Tensor], args: Args,
          metrics: Metrics) -> dict:
    """DPO over the pairs, in place. Returns the run's summary; every step is a line of metrics.jsonl."""
    ref_chosen, ref_rejected = reference  # (pairs,) each
    epochs = schedule(pairs, args)
    steps = [step for epoch in epochs for step in epoch]
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.95), 1e-8, 0.0, fused=True)
    bar = progress(len(pairs) * args.epochs, "pairs", "training")
    start, seen_tokens, skipped, skipped_in_a_row = time.perf_counter(), 0, 0, 0
    for number, step in enumerate(steps):
        step_start = time.perf_counter()
        size = sum(len(part) for part in step)
        values: dict[str, list[Tensor]] = {}
        tokens = 0
        for part in step:
            group = [pairs[i] for i in part]
            chosen, rejected = pair_logps(model, group)
            loss, measured = dpo(chosen, rejected, ref_chosen[part], ref_rejected[part], args.beta)
            (loss.sum() / size).backward()  # mean over the step's pairs, however cut
            for key, value in measured.items():
                values.setdefault(key, []).append(value)
            tokens += sum(len(ids) for p in group for ids in (p.prompt_ids, p.chosen_ids, *p.rejected_ids))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        means = {key: torch.cat(value).mean().item() for key, value in values.items()}
        lr = learning_rate(number, len(steps), args.lr)
        if math.isfinite(norm) and math.isfinite(means["loss"]):
            skipped_in_a_row = 0
            for g in optimizer.param_groups:
                g["lr"] = lr
            optimizer.step()
        else:
            skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
            names = ", ".join(pairs[i].id for part in step for i in part)
            print(f"step {number + 1} skipped: loss {means['loss']}, gradient norm {norm} (pairs {names})")
            if skipped_in_a_row == 5:
                raise UserError("five steps in a row were not finite: lower --lr, or use --dtype float32")
        optimizer.zero_grad()
        seconds = time.perf_counter() - step_start
        seen_tokens += tokens
        metrics.log(step=number + 1, epoch=number // len(epochs[0]), **means, grad_norm=norm, lr=lr,
                    pairs=size, tokens=tokens, tokens_per_second=tokens / seconds, skipped=skipped)
        bar.set_postfix_str(f"loss {means['loss']:.3f} margin {means['margin']:+.2f} "
                            f"{seen_tokens / (time.perf_counter() - start):.0f} tokens/s")
        bar.update(size)
    bar.close()
    return dict(steps=len(steps), pairs=len(pairs), skipped=skipped, tokens=seen_tokens,
                seconds_training=time.perf_counter() - start)


# -------------------------------------------------------------------------------- command line

def run_folder(args: Args) -> Path:
    """--out, or runs/ and a name made of the arguments. A folder that already holds a run is refused."""
    parts = (Path(args.data).stem, args.neg, Path(args.model).name, fingerprint(dataclasses.asdict(args))[:6])
    folder = Path(args.out) if args.out else Path("runs") / "-".join(parts)
    if (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder} already holds a run: name another --out, or remove it")
    return folder


def program() -> None:
    args = parse(Args, usage=__doc__)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("several processes are not supported yet: torchrun with --nproc_per_node 1")
    if args.batch < 1 or args.epochs < 1 or args.lr <= 0 or args.beta <= 0 or args.pass_tokens < 1:
        raise UserError("--batch, --epochs, --lr, --beta and --pass-tokens must be positive")
    if args.pairs:  # eval.py goes by args.json: another seed would give it another split
        made = read_json(Path(args.pairs) / "pairs.json")["settings"]
        args.data, args.neg, args.seed, args.date = (made[key] for key in ("data", "neg", "seed", "date"))
        args.max_new_tokens = made["sampling"]["max_new_tokens"]
    folder = run_folder(args)
    source = find(args.model)  # before the folder exists: a wrong name leaves nothing behind
    start = time.perf_counter()
    if args.pairs:
        pairs = load_pairs(Path(args.pairs))
        first = pairs[0]
        if Tokenizer(source, args.date).chat(user_turn(first.prompt, first.context)) != first.prompt_ids:
            raise UserError(f"--pairs {args.pairs}: {args.model} writes these prompts as other tokens: "
                            "its tokenizer, chat template or --date is another one")
    else:
        pairs = pairs_for(args, "train", folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "args.json", dict(arguments=dataclasses.asdict(args), environment=environment()))
    seconds = dict(seconds_pairs=time.perf_counter() - start)
    print(f"{folder}: {len(pairs)} pairs, lr {args.lr}, beta {args.beta}")
    compute, device = getattr(torch, args.dtype), default_device()
    reference = reference_logps(load(source, compute, device=device), pairs, schedule(pairs, args)[0])
    seconds["seconds_reference"] = time.perf_counter() - start - seconds["seconds_pairs"]
    model = load(source, torch.float32, compute, device)
    summary = train(model, pairs, reference, args, Metrics(folder / "metrics.jsonl"))
    save(model, folder / "model", source)
    s = {**summary, **seconds, "seconds": time.perf_counter() - start}
    write_json(folder / "summary.json", s)
    print(f"{s['steps']} steps, {s['seconds']:.0f} s in all: pairs {s['seconds_pairs']:.0f}, "
          f"reference {s['seconds_reference']:.0f}, training {s['seconds_training']:.0f}; "
          f"model in {folder / 'model'}")
    print(f"evaluate it with: python eval.py --model {folder}")


if __name__ == "__main__":
    main(program)
