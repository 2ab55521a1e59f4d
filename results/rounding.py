"""What remains of training when weights are kept in bf16: learning rates x ways of rounding.

    python results/rounding.py --model tiny --pairs runs/pairs --lr 2e-5,2e-4 --out results/rounding-tiny.json

Every run trains on the same pairs. Three ways: fp32 weights throughout; a bf16 working copy made by
stochastic rounding of fp32 masters after every step (what train.py does in bf16); the same with rounding to
the nearest. Each is measured by the mean margin of its training pairs (selection.mean_margin: nats, in fp32
arithmetic) of the masters, of the copy that forward passes read, and of a folder that is saved from the
masters, rounded once more (train.py saves the copy itself, where there is one), and with
--val-limit by the share of validation prompts whose context the saved model honours. On a machine without
bf16 products the copy's values are bf16 numbers but products run in fp32: the file says which. What --out
holds already is not measured again.
"""

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batches import all_logps, groups_of, training_rows
from figures import BLUE, GREY, VERMILION, pyplot, save_figure
from folder import find, load, save
from losses import sequence_logps
from model import Decoder
from optimizer import MasterAdamW, round_stochastically
from pairs import load_pairs
from run import (UserError, default_dtype, environment, main, peak_memory, read_json, read_jsonl,
                 seed_from, write_json)
from selection import Selection, mean_margin
from train import Args, resolve, train
from training_log import Metrics, State

WAYS = ("fp32", "stochastic", "nearest")


class EmulatedAdamW(MasterAdamW):
    """A MasterAdamW whose working copy holds bf16 numbers in fp32 storage."""

    def __init__(self, model: Decoder, lr: float, seed: int, rounding: str):
        super().__init__(model, lr, seed, rounding)
        self.masters = [weight.detach().clone() for weight in self.weights]
        self.masters_by_weight = dict(zip(self.weights, self.masters, strict=True))
        self.adamw = torch.optim.AdamW(self.masters, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0,
                                       fused=True)

    def round_weights(self, number: int) -> None:
        generator = torch.Generator().manual_seed(seed_from("rounding", self.seed, number))
        for copy, master in zip(self.weights, self.masters, strict=True):
            is_matrix = copy.dim() > 1  # norms stay in fp32
            rounded = master if not is_matrix else master.bfloat16()
            if is_matrix and self.rounding == "stochastic":
                rounded = round_stochastically(master, generator)
            copy.copy_(rounded)


def measure(name: str, rows: list, lr: float, seed: int, way: str, options: argparse.Namespace) -> dict:
    """Train one model one way and measure what is left of it."""
    source = find(name)
    dtype = "float32" if way == "fp32" else default_dtype()
    args = resolve(Args(model=name, lr=lr, seed=seed, epochs=options.epochs, dtype=dtype,
                        val_limit=options.val_limit))
    compute = getattr(torch, dtype)
    model = load(source, torch.bfloat16)
    if compute == torch.float32:
        model = model.float()
    start = load(source, torch.bfloat16).float()
    reference = all_logps(model, rows, args)
    emulated = way != "fp32" and compute == torch.float32
    make = EmulatedAdamW if emulated else MasterAdamW
    optimizer = make(model, lr, seed, "nearest" if way == "nearest" else "stochastic")
    groups = [groups_of(row, args)[0] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        file, began = Path(folder) / "metrics.jsonl", time.perf_counter()
        train(optimizer, rows, reference, args, Metrics(file), State())
        seconds = time.perf_counter() - began
        steps = [row for _, row in read_jsonl(file)]
        masters = load(source, torch.float32)
        for parameter, master in zip(masters.parameters(), optimizer.masters, strict=True):
            parameter.data = master.detach().float().clone()
        if way == "nearest":
            weights = {name: p.detach().bfloat16() for name, p in masters.named_parameters()}
        else:
            weights = MasterAdamW(masters, lr, seed).weights_to_save(torch.bfloat16)
        save(weights, model.config, Path(folder) / "model", source, torch.bfloat16)
        saved = load(Path(folder) / "model", torch.float32)
        win_rate = Selection(args, Path(folder), source).measure(saved) if options.val_limit else None
    before = sequence_logps(start, groups)
    margins = {name: mean_margin(sequence_logps(m, groups), before)
               for name, m in (("masters", masters), ("copy", model.float()), ("saved", saved))}
    return dict(way=way, lr=lr, seed=seed, **margins, win_rate=win_rate, seconds=seconds,
                peak_memory_gb=peak_memory() / 1e9, weights_changed=steps[-1]["weights_changed"],
                metrics_margin=sum(step["margin"] for step in steps[-10:]) / len(steps[-10:]) / args.beta)


def draw(results: list[dict], file: Path) -> None:
    """The margin of the saved model against the learning rate, and what share of fp32's each way has kept."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    rates = sorted({result["lr"] for result in results})

    def means(way: str, key: str) -> list[float]:
        margins = [[r[key] for r in results if r["way"] == way and r["lr"] == lr] for lr in rates]
        return [sum(values) / len(values) for values in margins]

    exact = means("fp32", "masters")
    axis.plot(rates, exact, "s", color=GREY, markersize=9, markerfacecolor="none", label="fp32")
    for way, colour, below in (("stochastic", BLUE, False), ("nearest", VERMILION, True)):
        saved = means(way, "saved")
        axis.plot(rates, saved, "o-", color=colour, markersize=5, label=f"bf16, {way} rounding")
        for lr, margin, whole in zip(rates, saved, exact, strict=True):
            axis.annotate(f"{margin / whole:.0%}", (lr, margin), xytext=(5, -12) if below else (-30, 4),
                          textcoords="offset points", color=colour, fontsize="small")
    axis.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="margin of the saved model, nats",
             title="what rounding to the nearest bf16 number throws away")
    axis.set_xticks(rates, [f"{lr:g}" for lr in rates])
    axis.minorticks_off()
    axis.margins(x=0.12, y=0.15)
    low, high = axis.get_ylim()
    ticks = [digit * 10.0**power for power in range(-3, 4) for digit in (1, 2, 5)]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ylim(low, high)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize="small", loc="lower right")
    save_figure(figure, file)


def program() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--pairs", default="", help="folder that pairs.py made")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", default="1e-6,2e-6,5e-6,1e-5")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--val-limit", type=int, default=0, help="validation prompts for a win rate")
    parser.add_argument("--out", required=True, help=".json file; a .png is drawn beside it")
    parser.add_argument("--draw", action="store_true", help="only draw what --out holds")
    options = parser.parse_args()
    if options.draw:
        draw(read_json(Path(options.out))["results"], Path(options.out).with_suffix(".png"))
        return
    rows = training_rows(load_pairs(Path(options.pairs)), Args())[: options.rows]
    out, results = Path(options.out), []
    settings = dict(model=Path(options.model).name, rows=len(rows), epochs=options.epochs,
                    val_limit=options.val_limit)
    if out.exists():
        held = read_json(out)
        if held["settings"] != settings:
            raise UserError(f"{out} holds runs of other settings, {held['settings']}: choose another --out")
        results = held["results"]
    measured = {(r["seed"], r["lr"], r["way"]) for r in results}
    numbers = ([float(text) for text in given.split(",")] for given in (options.seeds, options.lr))
    for seed, lr, way in itertools.product(*numbers, WAYS):
        if (seed, lr, way) not in measured:
            results.append(measure(options.model, rows, lr, int(seed), way, options))
            print(results[-1], flush=True)
            write_json(out, dict(settings=settings, products=default_dtype(), environment=environment(),
                                 results=results))
    draw(results, out.with_suffix(".png"))


if __name__ == "__main__":
    main(program)
