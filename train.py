"""train.py - MIPO end to end: model -> contrastive pairs -> reference log-probs -> DPO -> model folder.

    dpo         -log sigmoid(beta * ((log pi - log pi_ref)(y_c|x,c) - (log pi - log pi_ref)(y_r|x,c)))  Eq. 5
                --n-neg N: N such rows for every chosen response, or with --softmax one (N+1)-way row   Eq. 8
    sft         -log pi(y_c|x,c) per token, mean over the batch's tokens                                Eq. 3
    sft-revise  the same on responses that the model has first rewritten (revise.py)                    D.2
    infonce     -log softmax over contexts c_i of log pi(y_j|x,c_i) / tau, at i = j                     Eq. 6
    sami        that with tau = 1 and the same over responses y_j, in equal parts                       Eq. 7
    ppo-mi, rlaif, rlaif-mi, rlvr    reinforcement learning on four rewards: ppo.py has its own loop

A row's path: data.py reads it, contexts.py picks it (`examples_for`). pairs.py (`pairs_for`, `make_pairs`)
drops what does not fit (rows.py), takes the rejected response's message from negatives.py and samples both
responses. `prepare`, below, makes training rows and their reference log-probs (batches.py: `training_rows`,
`all_logps`); `train` scores both responses under the right prompt (`pair_logps`), takes the loss of losses.py
(`dpo_loss`, which calls `dpo`) and the step.

Pairs are sampled from the model itself, unless the run folder or --pairs holds them. AdamW on fp32 master
weights, linear warm-up over 3% of the steps, cosine to 10% of the peak, gradient norm clipped at 1. Several
processes (torchrun --nproc_per_node) share the sampling and every batch: results are those of one process, up
to rounding. Several values (--lr 1e-6,5e-6) are trained in turn and the best is kept.
What differs from the paper: settings are chosen on validation prompts, never on test ones. The default rate,
1e-6, is the paper's largest, for 1B parameters and more; a run of a model below 500M without a larger one
prints a note. One epoch is the default for all data; the paper has 2 to 3 on Multi-Bench for some models.

    torchrun train.py --data demo --neg missing --model DIR          or plain python train.py ...

The run folder then holds args.json, the pairs that were sampled (pairs.jsonl), metrics.jsonl, summary.json,
learning_curve.png and model/; eval.py reads it. --dry-run shows an example and says what a run will take.

Legend: B pairs of a micro-batch, N rejected responses of a pair, K = 1 + N its responses.
"""

import dataclasses
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import contexts
import fast
import pairs as pairing
import ppo
from batches import (all_logps, epoch_batches, groups_of, idle_passes, micro_batches_together, pair_logps,
                     training_rows)
from checkpoint import Checkpoints, StopSignal, lock
from contexts import examples_for
from dry_run import dry_run
from eval import Args as EvalArgs
from eval import evaluation
from folder import check_weights, find, load, read_config
from lora import add_adapters
from losses import OBJECTIVES, require_one_each, token_count
from memory import Sizes, require_copy, require_fit
from model import Decoder
from negatives import Pair
from optimizer import MasterAdamW, all_reduce_gradients, gradient_norm, learning_rate
from pairs import PairArgs, check_negatives, pairs_for, round_seed
from revise import check_revisable, revise
from rewards import check_data
from rows import missing_part
from run import (UserError, barrier, broadcast, default_device, fingerprint, flag_of, main, option,
                 parse_all, peak_memory, progress, restarts)
from run_folder import (begin_or_resume, check_space, complete, given_pairs, is_finished, refuse_occupied,
                        run_folder, swept, with_settings_of_pairs, write_arguments)
from selection import Selection, check_validation, save_model
from shard import gathered, shard_weights
from training_log import Metrics, State, Step, TrainingLog

LR, TINY_LR = 1e-6, 2e-4  # the paper's, for 1B parameters and more; the embedded model's
SMALL = 5e8  # parameters, below which LR is said to be too low: on 135M it gains nothing in 30 steps
TEST_ROWS = 640  # test rows, drawn by seed, that --test evaluates where --limit is not given; eval.py: all


# ------------------------------------------------------------------------- arguments

@dataclass
class Args(ppo.PPOArgs, PairArgs):
    pairs: str = option("", "folder of pairs to train on; data, contexts, negatives, seed, prompts' settings "
                        "and sampling are theirs", "data")
    out: str = option("", "run folder (default: runs/ and a name made of the arguments)", "data")
    dry_run: bool = option(False, "show an example, estimate memory and time, and stop (not of PPO)", "data")
    method: str = option("dpo", "what to train by", "training", (*OBJECTIVES, *ppo.REWARDS))
    softmax: bool = option(False, "one softmax over all rejected responses, not a row for each", "training")
    beta: float = option(0.1, "strength of the pull towards the reference", "training", sweep=True)
    lr: float | None = option(None, f"peak learning rate (default: {LR:g}, PPO "
                              f"{ppo.DEFAULTS['lr']:g}; tiny: {TINY_LR:g})", "training", sweep=True)
    epochs: int = option(1, "passes over the pairs", "training", sweep=True)
    rounds: int = option(1, "self-training rounds; each samples new pairs from the last round's model",
                         "training")
    batch: int = option(4, "training rows per step, of all processes together", "training")
    label_smoothing: float = option(0.0, "share of pairs taken to be the wrong way round", "training")
    nll: float = option(0.0, "weight of the chosen response's negative log-likelihood per token", "training")
    temperature_loss: float | None = option(None, "log-probs are divided by this (default: infonce "
                                            f"{OBJECTIVES['infonce'].temperature:g}, sami "
                                            f"{OBJECTIVES['sami'].temperature:g})", "training")
    reduce: str = option("sum", "sum or average log-probs over tokens (infonce, sami)", "training",
                         ("sum", "mean"))
    pass_tokens: int | None = option(None, "most tokens in one forward and backward pass, shared beginnings "
                                     "not counted (default: CPU 768, GPU 8192)", "training")
    lora_rank: int = option(0, "train adapters of this rank on all linear layers, 32 is usual; 0: train all "
                            "weights", "training")
    lora_alpha: float = option(16.0, "an adapter's update is scaled by this over its rank", "training")
    checkpoint_activations: bool = option(False, "keep only each block's input for the backward pass, and "
                                          "compute the rest again", "training")
    shard: bool = option(False, "divide weights, gradients and moments among the processes", "training")
    save_dtype: str | None = option(None, "type of the saved weights (default: that of --dtype)", "training",
                                    ("bfloat16", "float32"))
    rounding: str = option("stochastic", "of the fp32 masters to bfloat16; nearest only to see what it loses",
                           "training", ("stochastic", "nearest"))
    eval_every: int = option(0, "steps between validations; 0: only to choose among values", "choosing")
    patience: int = option(0, "stop after so many validations without a better one; 0: never", "choosing")
    test: bool = option(False, f"evaluate on --limit, else {TEST_ROWS}, test rows at the end (tiny: always)",
                        "choosing")
    val_limit: int = option(192, "validation examples, 0 for all", "choosing")
    save_every: int = option(200, "steps between checkpoints, which better validations and signals write "
                             "too; 0: these alone", "resuming")
    keep: int = option(1, "checkpoints to keep, the newest ones", "resuming")
    resume: bool = option(False, "continue the run in --out from its last checkpoint", "resuming")
    resume_elsewhere: bool = option(False, "resume even with another torch, device, thread or process count, "
                                    "which changes last bits", "resuming")


def resolve(args: Args) -> Args:
    """A copy with every default filled in that depends on other arguments or on the machine."""
    args = contexts.resolve(args)
    if args.method in ppo.REWARDS:
        args = ppo.resolve(args)
    is_tiny = args.model == "tiny"
    lr, pass_tokens = args.lr, args.pass_tokens
    neg, n_neg = args.neg, args.n_neg
    if lr is None:
        lr = TINY_LR if is_tiny else LR
    temperature = args.temperature_loss
    if temperature is None and args.method in OBJECTIVES:
        temperature = OBJECTIVES[args.method].temperature
    # What was left at its default fits the method: the model revises its response beside one to a random
    # context (section 5.1), and SFT samples no rejected ones.
    if args.method == "sft-revise" and not args.pairs:
        neg = "random" if neg == Args.neg else neg
    elif not uses_rejected(args) and not args.pairs and n_neg == Args.n_neg:
        n_neg = 0
    if pass_tokens is None:
        pass_tokens = 8192 if default_device().type == "cuda" else 768
    return dataclasses.replace(
        args,
        neg=neg,
        n_neg=n_neg,
        lr=lr,
        temperature_loss=temperature,
        pass_tokens=pass_tokens,
        save_dtype=args.save_dtype or args.dtype,
        resume=args.resume or args.resume_elsewhere or restarts() > 0,
        test=args.test or is_tiny,
    )


def check(args: Args) -> None:
    """UserError where the arguments contradict each other."""
    pairing.check(args)
    if min(args.batch, args.epochs, args.lr, args.beta, args.pass_tokens) <= 0:
        raise UserError("--batch, --epochs, --lr, --beta and --pass-tokens must be positive")
    if not 0 <= args.label_smoothing < 0.5 or min(args.nll, args.eval_every, args.patience) < 0:
        raise UserError("--label-smoothing must be in [0, 0.5); --nll, --eval-every, --patience at least 0")
    if args.lora_rank < 0 or args.lora_alpha <= 0:
        raise UserError("--lora-rank must be at least 0, --lora-alpha positive")
    if args.lora_alpha != Args.lora_alpha and not args.lora_rank:
        raise UserError("--lora-alpha scales adapters: give --lora-rank too")
    if args.save_every < 0 or args.keep < 1:
        raise UserError("--save-every must be at least 0, --keep at least 1")
    if args.patience and not args.eval_every:
        raise UserError("--patience counts validations during training: give --eval-every too")
    if args.rounds < 1 or (args.rounds > 1 and args.pairs):
        raise UserError("--rounds must be at least 1, and 1 with --pairs: later rounds sample anew")
    if args.method in ppo.REWARDS:
        ppo.check(args)
    else:
        check_method(args)


def uses_rejected(args: Args) -> bool:
    """Whether the method trains on rejected responses."""
    return args.method in OBJECTIVES and OBJECTIVES[args.method].uses_rejected


def check_method(args: Args) -> None:
    """UserError where options contradict a method that trains on pairs."""
    objective = OBJECTIVES[args.method]
    if args.judge and contexts.contexts_of(args) != "infer":
        raise UserError(f"--judge has nothing to judge in training with --method {args.method}, except "
                        "for --contexts infer: give it to eval.py")
    for unused in dataclasses.fields(ppo.PPOArgs):
        if getattr(args, unused.name) != unused.default:
            raise UserError(f"{flag_of(unused)} goes with {', '.join(ppo.REWARDS)}, not with --method "
                            f"{args.method}")
    if args.method != "dpo" and (args.softmax or args.label_smoothing or args.nll):
        raise UserError(f"--softmax, --label-smoothing and --nll go with --method dpo, not {args.method}")
    if not objective.uses_reference and args.beta != Args.beta:
        raise UserError(f"--beta has no effect with --method {args.method}")
    if objective.uses_rejected and not args.n_neg:
        raise UserError("--n-neg 0 leaves nothing to prefer: only --method sft trains without")
    if args.method == "sft-revise" and not args.pairs and args.neg != "random":
        raise UserError(f"--neg {args.neg}: --method sft-revise shows the model a response to a random "
                        "context")
    if args.method == "sft-revise" and not args.n_neg:
        raise UserError("--method sft-revise shows the model a rejected response too: not with --n-neg 0")
    if not objective.uses_rejected and args.n_neg > 1 and not args.pairs:
        used = "one rejected response" if args.method == "sft-revise" else "no rejected responses"
        raise UserError(f"--n-neg {args.n_neg}: --method {args.method} uses {used}")
    if objective.temperature is None and (args.temperature_loss is not None or args.reduce != "sum"):
        with_one = " and ".join(name for name, other in OBJECTIVES.items() if other.temperature)
        raise UserError(f"--temperature-loss and --reduce go with {with_one}, not with --method "
                        f"{args.method}")
    if args.temperature_loss is not None and args.temperature_loss <= 0:
        raise UserError("--temperature-loss must be positive")
    if not objective.every_prompt:
        return
    if args.neg not in ("missing", "random"):
        raise UserError(f"--method {args.method} scores every response under each other's prompts, which "
                        f"--neg {args.neg} does not have: use --neg random or missing")
    if args.neg == "missing" and args.n_neg > 1:
        raise UserError(f"--method {args.method} needs different contexts, and --neg missing has one beside "
                        "the right one: use --n-neg 1, or --neg random")


# ------------------------------------------------------------------------- training

def train(optimizer: MasterAdamW, pairs: list[Pair], reference: Tensor, args: Args, metrics: Metrics,
          state: State, selection: Selection | None = None, checkpoints: Checkpoints | None = None) -> None:
    """Train the optimizer's model on the pairs, for one round; every step is a line of metrics.jsonl.

    reference (pairs, 1 + N), for objectives that use one. `state` is continued. With a selection the model is
    validated on the way, and training may stop early. With checkpoints SIGTERM and SIGINT finish the step,
    save, and raise Stopped.
    """
    model, objective = optimizer.model, OBJECTIVES[args.method]
    batches = [batch for epoch in range(args.epochs) for batch in epoch_batches(len(pairs), args, epoch)]
    steps_per_epoch = len(batches) // args.epochs
    bar = progress(len(pairs) * args.epochs, "pairs", "training")
    bar.update(sum(map(len, batches[: state.batch])))
    log = TrainingLog(metrics, state, bar)

    def checkpoint_tensors() -> dict[str, Tensor]:
        """What a checkpoint keeps. `state`, kept beside it, then counts all steps."""
        log.flush()
        state.rows = metrics.rows
        return optimizer.tensors() | dict(reference=reference)

    for number, batch in enumerate(batches[state.batch :], state.batch):
        if has_stalled(state.scores, args.patience):
            print(f"stopped after step {number} of {len(batches)}: {args.patience} validations were no "
                  "better")
            break
        start = fast.Moment(model.device)

        # The loss is one mean over the whole batch, however it is cut into micro-batches and wherever those
        # are computed: its gradient is the sum of theirs.
        divisor = len(batch)
        if objective.mean_over == "tokens":
            divisor = sum(len(pairs[i].chosen.ids) for i in batch)  # of all processes
        measured: dict[str, list[Tensor]] = {}  # the metrics of this process's pairs, (B,) each
        for indices, pass_count in micro_batches_together(model, pairs, batch, args):
            if not indices:  # but other processes have pairs left, and need this one's shards for them
                idle_passes(model, pass_count).backward()
                continue
            micro_batch = [pairs[i] for i in indices]
            # (B, 1 + N) each, of InfoNCE and SAMI (B, K, K) and (B, K): log pi(y|x,c), tokens of y
            logps, lengths = pair_logps(model, micro_batch, args, pass_count)
            start_logps = reference[fast.sent(indices, model.device)]  # (B, 1 + N)
            loss, values = objective.loss(logps, start_logps, lengths, args)  # (B,)
            require_one_each(len(micro_batch), loss, values)
            (loss.sum() / divisor).backward()
            for name, value in values.items():
                measured.setdefault(name, []).append(value.float())
        all_reduce_gradients(model)

        norm = gradient_norm(optimizer.weights)
        # The schedule begins again with every round of self-training.
        lr = learning_rate(number, len(batches), args.lr)
        optimizer.step(state.step, lr, norm)
        optimizer.zero_grad()
        state.step += 1
        state.batch = number + 1

        shown = [value for values in measured.values() for value in values]
        log.add(Step(
            number=state.step,
            epoch=number // steps_per_epoch,
            lr=lr,
            ids=[pairs[i].id for i in batch],
            tokens=sum(token_count(groups_of(pairs[i], args)) for i in batch),
            divisor=divisor,
            names=list(measured),
            count=sum(map(len, measured["loss"])) if measured else 0,
            numbers=fast.Reading(torch.cat([norm.view(1), optimizer.share_changed().view(1), *shown])),
            start=start,
        ))

        best_before = state.best
        is_last = number + 1 == len(batches)
        is_due = args.eval_every and (number + 1) % args.eval_every == 0
        if selection and (is_last or is_due):
            log.flush()
            score = selection.offer(optimizer, pairs, args, state.candidate, state.step)
            state.best = selection.best
            state.scores.append(score)
            metrics.log(candidate=state.candidate, step=state.step, **{"validation_" + selection.name: score})

        # A better model is in model/ already: a run that is killed now must remember which it is.
        if checkpoints:
            checkpoints.after_step(args.save_every, checkpoint_tensors, state,
                                   now=state.best is not best_before)
    log.flush()
    bar.close()


def has_stalled(scores: list[float], patience: int) -> bool:
    """Whether the last `patience` validations were no better than one before them; never with patience 0."""
    if not scores or not patience:
        return False
    best = scores.index(max(scores))
    return len(scores) - 1 - best >= patience


def time_steps(model: Decoder, pairs: list[Pair], reference: Tensor, args: Args, file: Path) -> None:
    """Train one epoch on a few pairs, for the dry run, which reads the metrics in `file`."""
    optimizer = MasterAdamW(model, args.lr, args.seed, args.rounding)
    train(optimizer, pairs, reference, dataclasses.replace(args, epochs=1), Metrics(file), State())


# ------------------------------------------------------------------------- command line

def program() -> None:
    grid = [resolve(args) for args in with_settings_of_pairs(parse_all(Args, usage=__doc__))]
    for args in grid:
        check(args)
    args = grid[0]
    is_ppo = args.method in ppo.REWARDS
    if is_ppo and args.dry_run:
        raise UserError(f"--dry-run: there is none for --method {args.method}; try a run of --limit 32")
    if len(grid) > 1 and (args.rounds > 1 or is_ppo):
        raise UserError("--rounds and PPO go with one value of every option: choose in runs of one round")

    # Bad data and names are found before the run folder is made and, unless contexts are to be inferred,
    # before a model is downloaded.
    folder = run_folder(grid)
    if not args.pairs:
        check_examples(args)
    if len(grid) > 1 or args.eval_every:
        check_validation(args)
    missing = missing_part(args.data, "test", args.seed) if args.test else ""
    if missing:
        print(f"{missing}: the run will not be evaluated")
    source = find(args.model)
    config = read_config(source)
    check_weights(source)
    parameters = Sizes.of(config, 0).total
    largest = max(candidate.lr for candidate in grid)
    if parameters < SMALL and largest <= LR:
        print(f"note: --lr {largest:g} is for 1B parameters and more; {parameters / 1e6:.0f}M may learn "
              "nothing at it: choose a larger one on validation prompts (DPO on 135M: 1e-5)")
    barrier()  # all processes have looked at the folder before one of them writes there
    given = given_pairs(args, source) if args.pairs else None
    if args.dry_run:
        dry_run(grid, folder, source, given, load_trainable, time_steps)
        return
    was_finished = is_finished(grid, folder)
    if was_finished:
        print(f"{folder}: training is done")
    else:
        # A better model is written whole before it replaces the last.
        models = 2 if len(grid) > 1 or args.eval_every else 1
        check_space(folder, models * parameters * getattr(torch, args.save_dtype).itemsize)
        require_fit(args, config, args.model)
        with lock(folder):
            refuse_occupied(folder, args)  # by a run that has ended since it was looked at
            barrier()
            if is_ppo:
                ppo.run_ppo(args, folder, source, load_trainable)
            else:
                run_training(grid, folder, source, given)
    is_evaluated = broadcast((folder / "eval.json").exists())  # as process 0 sees the disk
    if was_finished and is_evaluated:
        print(f"{folder} is evaluated too: its numbers are in {folder / 'eval.json'}")
    elif args.test and not missing:
        barrier()  # process 0 has written summary.json
        evaluation(EvalArgs(model=str(folder), limit=args.limit or TEST_ROWS, slots=args.slots))
        print(f"pictures: gain.png and learning_curve.png in {folder}")
    else:
        print(f"evaluate it with: python eval.py --model {folder}")


def check_examples(args: Args) -> None:
    """UserError where the data can't be what the method needs."""
    examples = examples_for(args, "train")
    if args.method in ppo.REWARDS:
        check_data(examples, args)
        return
    if args.method == "sft-revise" and examples[0].chosen is not None:
        raise UserError(f"--method sft-revise revises the model's own responses, and {args.data} supplies "
                        "responses itself: use --method sft")
    if args.rounds > 1 and examples[0].chosen is not None:
        raise UserError(f"--rounds {args.rounds}: {args.data} supplies the responses itself, so that every "
                        "round would train on the same ones")
    check_negatives(examples, args)
    without = [example.id for example in examples if not example.context]
    if OBJECTIVES[args.method].every_prompt and without:
        raise UserError(f"--method {args.method} contrasts the contexts of a prompt; {len(without)} of "
                        f"{len(examples)} examples have none (first: {without[0]!r}): use --method dpo")
    if args.method == "sft-revise":
        check_revisable(examples, args)


def run_training(grid: list[Args], folder: Path, source: Path, given: list[Pair] | None) -> None:
    """Pairs, reference log-probs, training of every candidate, and the run folder's files.

    given: the pairs of --pairs.
    """
    args = grid[0]
    start, processor = time.perf_counter(), time.process_time()
    checkpoints = Checkpoints(folder, args.keep)
    saved, tensors = begin_or_resume(grid, folder, checkpoints)
    state = State(**saved)
    has_begun = state.rows > 0
    selection = None
    if len(grid) > 1 or args.eval_every:
        selection = Selection(args, folder, source, state.best)
    metrics = Metrics(folder / "metrics.jsonl", state.rows)
    seconds = dict(pairs=0.0, reference=0.0)
    pairs = None

    # Candidates differ in beta, lr and epochs alone: model, pairs and reference are the first one's.
    for candidate_args in grid[state.candidate :]:
        if len(grid) > 1:
            print(f"candidate {state.candidate + 1} of {len(grid)}: {swept(candidate_args)}")
        model = optimizer = None  # before the next one takes their memory
        model = load_trainable(source, args)
        optimizer = MasterAdamW(model, candidate_args.lr, args.seed, args.rounding)
        if tensors:
            optimizer.load_tensors(tensors)

        # Rounds of self-training (our addition): each samples its pairs and computes its reference from the
        # current model, and draws with a seed of its own; the optimizer keeps its fp32 masters.
        for round in range(state.round, args.rounds):
            state.round = round
            if pairs is None or round:
                pairs, reference = prepare(model, args, folder, given, state, seconds, tensors)
            round_args = dataclasses.replace(candidate_args, seed=round_seed(args.seed, round))
            tensors = {}
            checkpoints.stop = StopSignal()
            with checkpoints.stop:  # a signal now lets the step end first
                train(optimizer, pairs, reference, round_args, metrics, state, selection, checkpoints)
            if round + 1 < args.rounds:
                state.batch, state.rows, state.scores = 0, metrics.rows, []
                checkpoints.save(optimizer.tensors(), asdict(state) | dict(round=round + 1))
        summary = dict(steps=state.step, pairs=len(pairs), skipped=state.skipped, tokens=state.tokens,
                       seconds_training=state.seconds)
        state = State(state.candidate + 1, finished=[*state.finished, summary], best=state.best,
                      pairs=state.pairs)

    best = selection.best["candidate"] if selection else 0
    if selection:
        write_arguments(grid[best], grid, folder)
        print(f"chosen: {swept(grid[best])} after step {selection.best['step']}, "
              f"{selection.name} {selection.best['score']:.3f}")
    else:
        kept = save_model(optimizer, pairs, args, folder, source)
    barrier()

    summary = state.finished[best] | dict(
        kept=selection.best["kept"] if selection else kept,
        seconds_pairs=seconds["pairs"],
        seconds_reference=seconds["reference"],
        seconds=time.perf_counter() - start,  # since the last start, as are all but seconds_training
        processor_seconds=time.process_time() - processor,
        peak_memory_gb=peak_memory() / 1e9,
    )
    if selection:
        summary |= dict(chosen=selection.best, runs=state.finished)
    complete(folder, checkpoints, summary, best)
    span = "since the last start" if has_begun else "in all"
    print(f"{summary['steps']} steps, {summary['seconds']:.0f} s {span}: pairs {seconds['pairs']:.0f}, "
          f"reference {seconds['reference']:.0f}, training {summary['seconds_training']:.0f}; "
          f"{summary['peak_memory_gb']:.1f} GB at most; model in {folder / 'model'}")


def load_trainable(source: Path, args: Args) -> Decoder:
    """The start model in --dtype, with adapters where --lora-rank asks for them, and divided among processes
    where --shard does."""
    if args.shard and not args.pairs:
        require_copy(args, read_config(source), "sampling", "make pairs elsewhere, and bring them by --pairs")
    device = torch.device("cpu") if args.shard else default_device()  # shards go on from there
    model = load(source, getattr(torch, args.dtype), device)
    model.checkpoint_activations = args.checkpoint_activations
    if args.lora_rank:
        add_adapters(model, args.lora_rank, args.lora_alpha, args.seed)
    return shard_weights(model) if args.shard else model


def prepare(model: Decoder, args: Args, folder: Path, given: list[Pair] | None, state: State, seconds: dict,
            tensors: dict[str, Tensor]) -> tuple[list[Pair], Tensor]:
    """What a round trains on: its training rows, and the reference's log-probs of them, (rows, 1 + N); where
    the method has no reference, zeros (rows, 1).

    seconds: what was spent on pairs and reference so far, added to. tensors: a checkpoint's; its reference is
    used again, as the model has changed since.
    """
    started = time.perf_counter()
    seed = round_seed(args.seed, state.round)
    round_folder = folder / f"round-{state.round + 1}" if state.round else folder
    pairs = given or pairs_for(args, "train", round_folder, gathered(model), state.round)
    if args.method == "sft-revise":
        pairs = revise(gathered(model), pairs, args, round_folder, seed)
    pairs = training_rows(pairs, args)
    print(f"{round_folder}: {len(pairs)} training rows")
    seconds["pairs"] += time.perf_counter() - started

    pairs_now = fingerprint([asdict(pair) for pair in pairs])
    if "reference" in tensors and state.pairs != pairs_now:
        raise UserError(f"--resume: the pairs in {round_folder} are not those that the run was trained on")
    state.pairs = pairs_now
    started = time.perf_counter()
    if "reference" in tensors:
        reference = tensors["reference"].to(model.device)
    else:
        reference = all_logps(model, pairs, dataclasses.replace(args, seed=seed))
    seconds["reference"] += time.perf_counter() - started
    return pairs, reference


if __name__ == "__main__":
    main(program)
