"""selection.py - choosing a model on validation examples, and saving it.

What differs from the paper: the authors chose their settings on test prompts; here hyperparameters and
stopping points are chosen on the validation part alone.

    python train.py --lr 1e-6,5e-6 --eval-every 50 --patience 2
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from batches import all_logps, groups_of, training_rows
from checks import verify
from contexts import examples_for, sampling_for
from folder import load, read_config, save, save_adapter
from lora import adapted_layers
from losses import OBJECTIVES, Group, dpo, sequence_logps
from memory import FP32, fits_whole, require_copy
from model import Decoder
from negatives import Pair
from optimizer import MasterAdamW
from pairs import check_negatives, pairs_for
from rows import fitting_rows
from run import UserError, broadcast, default_device, gather, progress, rank, share_of
from sample import generate
from shard import gathered, is_sharded
from tokenizer import Tokenizer

VALIDATION_METHOD = "dpo"  # validation compares chosen with rejected responses, whatever training does
MARGIN_PAIRS = 64  # training pairs, the first ones, on which saving measures what rounding costs


def validation_args(args):
    """The run's arguments for its validation examples, which have rejected responses whatever the method."""
    return dataclasses.replace(args, limit=args.val_limit, method=VALIDATION_METHOD, n_neg=max(1, args.n_neg))


def check_validation(args) -> None:
    """UserError where the validation part is empty, or has nothing by which models could be compared."""
    args = validation_args(args)
    examples = examples_for(args, "validation")
    if any(verify(example, "") is not None for example in examples):
        return
    try:
        check_negatives(examples, args)
    except UserError as e:
        raise UserError("--eval-every and lists of values compare chosen with rejected responses, whatever "
                        f"--method is, and so need rejected ones: {e}") from None


class Selection:
    """Scores models on the validation part and keeps the best of them in the run folder's model/.

    The score is the share of sampled responses that honour their context or solve their task, where the data
    can check that (win_rate), else the share of validation rows whose chosen response has a greater reward
    than the rejected one, with --softmax than every rejected one (margin_accuracy). Ties keep the earlier
    model.
    """

    def __init__(self, args, folder: Path, source: Path, best: dict | None = None):
        """best: what was chosen before the run was interrupted."""
        if args.shard:
            require_copy(args, read_config(source), "validation", "give one value of every option, and no "
                         "--eval-every")
        self.args = validation_args(args)
        self.folder, self.source = folder, source
        self.best = best
        self.tokenizer = Tokenizer(source, args.date, args.template)
        self.pairs: list[Pair] = []
        checkable = [e for e in examples_for(self.args, "validation") if verify(e, "") is not None]
        self.name = "win_rate" if checkable else "margin_accuracy"
        if checkable:
            # As evaluation will sample: --temperature, --top-p and --top-k are for pairs.
            own_settings = dataclasses.replace(self.args, temperature=None, top_p=None, top_k=0)
            self.sampling = sampling_for(own_settings, evaluation=True)
            positions = read_config(source).max_position_embeddings
            self.examples = fitting_rows(checkable, lambda e: [e.user_message(e.context)], self.tokenizer,
                                         positions, self.sampling.max_new_tokens)
        else:
            pairs = pairs_for(self.args, "validation", folder / "validation")
            self.pairs = training_rows(pairs, self.args)
            base = load(source, getattr(torch, args.dtype), default_device())
            self.reference = all_logps(base, self.pairs, self.args, "validation reference")

    def measure(self, model: Decoder) -> float:
        return self.win_rate(model) if self.name == "win_rate" else self.margin_accuracy(model)

    def margin_accuracy(self, model: Decoder) -> float:
        logps = all_logps(model, self.pairs, self.args, "validation")
        _, metrics = dpo(logps, self.reference, self.args.beta)  # the margin's sign does not depend on beta
        return metrics["accuracy"].mean().item()

    def win_rate(self, model: Decoder) -> float:
        mine = share_of(list(enumerate(self.examples)))
        prompts = [self.tokenizer.chat(e.user_message(e.context), e.system) for _, e in mine]
        keys = [(i, 0) for i, _ in mine]
        bar = progress(len(prompts), "responses", "validation")
        samples = generate(model, prompts, self.sampling, self.tokenizer.stop_ids, self.args.seed, keys,
                           self.args.slots, bar)
        bar.close()
        texts = [self.tokenizer.answer(sample.ids) for sample in samples]
        wins = gather([verify(example, text) for (_, example), text in zip(mine, texts, strict=True)])
        return sum(wins) / len(wins)

    def offer(self, optimizer: MasterAdamW, pairs: list[Pair], args, candidate: int, step: int) -> float:
        """The score of the optimizer's model, which is saved if it beats all earlier ones."""
        score = self.measure(gathered(optimizer.model))
        is_better = self.best is None or score > self.best["score"]
        comment = ", the best so far" if is_better else ""
        print(f"validation: {self.name} {score:.3f} at step {step}{comment}")
        if is_better:
            kept = save_model(optimizer, pairs, args, self.folder, self.source, self.pairs)
            self.best = dict(name=self.name, score=score, candidate=candidate, step=step, kept=kept)
        return score


def save_model(optimizer: MasterAdamW, pairs: list[Pair], args, folder: Path, source: Path,
               validation: Sequence[Pair] = ()) -> dict:
    """Write the run folder's model/ in the type of --save-dtype, and say what the rounding costs.

    Adapters are merged into it, and written to adapter/ beside it, in fp32 and in PEFT's format.

    Returns the mean margin of up to MARGIN_PAIRS pairs (nats, fp32 arithmetic) under the masters and under
    the saved model, and the share that the latter keeps; "validation" holds the same for validation pairs, if
    there are any. Saved in fp32: only the share, 1. {} for methods without pairs or rejected responses, and
    where no GPU holds all weights in fp32.
    """
    dtype = getattr(torch, args.save_dtype)
    config = optimizer.model.config
    save(optimizer.weights_to_save(dtype), config, folder / "model", source, dtype)
    if adapted_layers(optimizer.model):
        save_adapter(optimizer.model, optimizer.master_of, folder / "adapter", base=args.model)
    if not pairs or not OBJECTIVES[args.method].uses_rejected:
        return {}
    if dtype == torch.float32:
        return dict(share=1.0)  # the folder holds the masters themselves
    if is_sharded(optimizer.model) and not fits_whole(config, FP32):
        print("what the saved model keeps is not measured: that takes all weights in fp32 on one GPU")
        return {}
    # The first group is the one of the right prompt; InfoNCE and SAMI have others.
    parts = {part: [groups_of(pair, args)[0] for pair in rows[:MARGIN_PAIRS]]
             for part, rows in dict(training=pairs, validation=validation).items() if rows}
    exact = optimizer.weights_to_save(torch.float32)
    return broadcast(None if rank() else kept_margins(exact, parts, args, folder, source))


def kept_margins(exact: dict[str, Tensor], parts: dict[str, list[Group]], args, folder: Path,
                 source: Path) -> dict:
    """What `save_model` returns, and prints, of each part's groups. exact: the weights in fp32."""
    device = default_device()
    start = load(source, getattr(torch, args.dtype), device).float()
    logps_start = {part: sequence_logps(start, groups) for part, groups in parts.items()}
    del start
    model = load(folder / "model", torch.float32, device)
    logps_saved = {part: sequence_logps(model, groups) for part, groups in parts.items()}
    model.load_state_dict(exact)
    kept = {}
    for part, groups in parts.items():
        margin = mean_margin(sequence_logps(model, groups), logps_start[part])
        saved_margin = mean_margin(logps_saved[part], logps_start[part])
        share = saved_margin / margin if margin > 0 else None  # None: nothing was learned that could be lost
        kept[part] = dict(share=share, margin=margin, margin_saved=saved_margin, pairs=len(groups))
        if share is not None:
            print(f"the saved model keeps {share:.0%} of what was learned: on {len(groups)} {part} pairs a "
                  f"mean margin (without beta) of {saved_margin:.3f} nats, of {margin:.3f} before rounding")
            if share < 0.9:
                print("warning: rounding has lost over a tenth: use --save-dtype float32")
    training = kept.pop("training")
    return training | kept


def mean_margin(logps: list[list[float]], start: list[list[float]]) -> float:
    """How much likelier a model has made chosen responses than rejected ones, in nats.

    logps, start: log pi(y|x,c) of each pair's responses, the chosen one first, under the model and under the
    one it started from (sequence_logps). The mean over pairs; beta times this is DPO's margin.
    """
    total = 0.0
    for now, before in zip(logps, start, strict=True):
        chosen, *rejected = (a - b for a, b in zip(now, before, strict=True))  # log(pi / pi_start)
        total += chosen - sum(rejected) / len(rejected)
    return total / len(logps)
