"""train.py - MIPO end to end: model -> contrastive pairs -> reference log-probs -> DPO -> a Hugging Face
folder.

    loss = -log sigmoid(beta * ((log pi(y_c|x,c) - log pi_ref(y_c|x,c)) - (log pi(y_r|x,c) - log
    pi_ref(y_r|x,c))))
                                                                                                    Eq. 5,
                                                                                                    section 4
Pairs are sampled from the model itself (pairs.py), unless the run folder or --pairs holds them. AdamW on fp32
master weights with bf16 arithmetic, linear warm-up over 3% of the steps, cosine to 10% of the peak, gradient
norm clipped at 1. What differs from the paper: the learning rate is chosen on validation prompts, never on
test ones, and depends on the model's size: 1e-7 to 1e-6 suits 1B and more, a model of 135M needs more.

    torchrun train.py --data demo --neg missing --model DIR          or plain python train.py ...
The run folder then holds args.json, pairs.jsonl, metrics.jsonl and model/; eval.py reads it.
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
from pairs import Pair, PairArgs, load_pairs, pairs_for
from run import (Metrics, UserError, default_device, derive, environment, fingerprint, main, option, parse,
                 progress, write_json)


@dataclass
class Args(PairArgs):
    pairs: str = option("", "folder with pairs.jsonl to train on, instead of sampling", "data")
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


def passes(pairs: list[Pair], batch: list[int], tokens: int) -> list[list[int]]:
    """A batch of pair indices cut into forward passes of at most `tokens` tokens."""
    return [[batch[i] for i in part] for part in batches([pair_group(pairs[i]) for i in batch], tokens)]


@torch.no_grad()
def reference_logps(model: Decoder, pairs: list[Pair], plan: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The start model's log-probs of every pair, (pairs,) each, by the same passes as the first epoch's
    training:
    then the first step's margins are exactly 0 in any arithmetic."""
    chosen, rejected = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    bar = progress(len(pairs), "pairs", "reference")
    for part in plan:
        c, r = pair_logps(model, [pairs[i] for i in part])
        chosen[part], rejected[part] = c.cpu(), r.cpu()
        bar.update(len(part))
    bar.close()
    return chosen, rejected


def train(model: Decoder, pairs: list[Pair], args: Args, metrics: Metrics) -> dict:
    """One DPO run over the pairs, in place. Returns its summary; every step is a line of metrics.jsonl."""
    epochs = [epoch_order(len(pairs), args.seed, epoch) for epoch in range(args.epochs)]
    cuts = range(0, len(pairs), args.batch)
    plan = [[passes(pairs, order[i : i + args.batch], args.pass_tokens) for i in cuts] for order in epochs]
    # plan: epoch -> step -> pass -> pair indices
    start = time.perf_counter()
    ref_chosen, ref_rejected = (t.to(model.device) for t in
                                reference_logps(model, pairs, [part for step in plan[0] for part in step]))
    reference_seconds = time.perf_counter() - start

    optimizer = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.95), 1e-8, 0.0, fused=True)
    steps = [step for epoch in plan for step in epoch]
    bar = progress(sum(map(len, epochs)), "pairs", "training")
    start, seen_tokens, skipped, skipped_in_a_row = time.perf_counter(), 0, 0, 0
    model.train()
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
        metrics.log(step=number + 1, epoch=number // len(plan[0]), **means, grad_norm=norm, lr=lr, pairs=size,
                    tokens=tokens, tokens_per_second=tokens / seconds, skipped=skipped)
        bar.set_postfix_str(f"loss {means['loss']:.3f} margin {means['margin']:+.2f} "
                            f"{seen_tokens / (time.perf_counter() - start):.0f} tokens/s")
        bar.update(size)
    bar.close()
    return dict(steps=len(steps), pairs=len(pairs), skipped=skipped, tokens=seen_tokens,
                seconds_reference=reference_seconds, seconds_training=time.perf_counter() - start)


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
    folder = run_folder(args)
    source = find(args.model)  # before the folder exists: a wrong name leaves nothing behind
    start = time.perf_counter()
    pairs = load_pairs(Path(args.pairs)) if args.pairs else pairs_for(args, "train", folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "args.json", dict(arguments=dataclasses.asdict(args), environment=environment()))
    pairs_seconds = time.perf_counter() - start
    model = load(source, torch.float32, getattr(torch, args.dtype), default_device())
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, {len(pairs)} pairs")
    summary = train(model, pairs, args, Metrics(folder / "metrics.jsonl"))
    save(model, folder / "model", source)
    s = {**summary, "seconds_pairs": pairs_seconds, "seconds": time.perf_counter() - start}
    write_json(folder / "summary.json", s)
    print(f"{s['steps']} steps, {s['seconds']:.0f} s in all: pairs {s['seconds_pairs']:.0f}, "
          f"reference {s['seconds_reference']:.0f}, training {s['seconds_training']:.0f}; "
          f"model in {folder / 'model'}")
    print(f"evaluate it with: python eval.py --model {folder} --data {args.data}")


if __name__ == "__main__":
    main(program)
