"""pairs.py - making the contrastive pairs that MIPO trains on (sections 4.1 and 4.2 of the paper).

Responses are sampled from the reference model itself: a chosen one with the right prompt, and --n-neg
rejected ones (see negatives.py). Every response keeps the prompt that it was really sampled from, and its
*context gain* log pi_ref(y|x, c) - log pi_ref(y|x): with missing contexts, drawn at temperature 1 and top-p
1, the reward that MIPO maximises (Eq. 14). What differs from the paper: it does not give sampling settings;
ours are the data sets' (data.py), from the authors' scripts where there are any. A rejected response that is
empty or equals the chosen one is drawn again (what this changes: docs.md, "What it converges to").

    python pairs.py --data demo --neg missing --model DIR --out FOLDER

writes FOLDER/pairs.jsonl, one pair a line, and FOLDER/pairs.json, how they were made and what they are like.
"""

import dataclasses
import itertools
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import contexts
from checkpoint import lock
from checks import check_rates
from contexts import DataArgs, contexts_of, examples_for, sampling_for
from data import SPLITS, Example
from folder import find, load
from losses import sequence_logps
from model import Decoder
from negatives import (NEGATIVES, SAMPLED, Pair, Response, add_noise, add_reshuffled,
                       negative_messages)
from rows import fitting_pairs, fitting_rows, rows_with_contexts
from run import (UserError, broadcast, default_device, environment, fingerprint, gather, main, naming, option,
                 parse, progress, rank, read_appended, read_json, read_jsonl, seed_from, share_of, write_json,
                 write_jsonl)
from sample import SLOTS, Sample, Sampling, generate
from schema import FLAG, OBJECT, TEXT, TOKEN_IDS, checked, integer, listing, one_of, optional, real, record
from tokenizer import Tokenizer

# micro: the summed gain over the summed tokens, not a mean of ratios.
GAINS = ("chosen", "chosen_per_token_micro", "rejected", "rejected_per_token_micro")
LITTLE_GAIN = 1.0  # nats a chosen response; below it users are warned, by our own rule
DRAWS = 10  # rejected responses that are drawn for an example before it is given up
MAX_NEGATIVES = 1000  # of a chosen response
PROCESS_FILES = "pairs.jsonl.process-*"  # what processes other than the first have sampled


# ------------------------------------------------------------------------- arguments

@dataclass
class PairArgs(DataArgs):
    """What every program that makes pairs needs to be told; train.py adds to it."""

    neg: str = option("missing", "where rejected responses come from (sft-revise: random)", "pairs",
                      NEGATIVES)
    n_neg: int = option(1, "rejected responses for every chosen one (sft, PPO: 0)", "pairs")


@dataclass
class Args(PairArgs):
    split: str = option("train", "which part to make pairs of", "pairs", SPLITS)
    out: str = option("", "folder for pairs.jsonl and pairs.json", "pairs")


def check(args: PairArgs) -> None:
    """UserError where the arguments contradict each other."""
    contexts.check(args)
    if not 0 <= args.n_neg <= MAX_NEGATIVES:
        raise UserError(f"--n-neg {args.n_neg} must be from 0 to {MAX_NEGATIVES}")


def check_negatives(examples: list[Example], args: PairArgs) -> None:
    """UserError where these data can't have these negatives."""
    first = examples[0]
    if first.chosen is None:
        usable = rows_with_contexts(examples, args.neg)
        negative_messages(usable, args.neg, args.seed, args.n_neg)  # it refuses what cannot be drawn
    elif first.rejected is not None and args.neg != "missing":
        raise UserError(f"--neg {args.neg}: {args.data} supplies its rejected responses itself")
    elif first.rejected is not None and args.n_neg > 1:
        raise UserError(f"--n-neg {args.n_neg}: {args.data} supplies one rejected response for each chosen "
                        "one")
    elif first.rejected is None and args.n_neg and args.neg in SAMPLED:
        raise UserError(f"{args.data} has no rejected responses: --neg reshuffle or noise, or --method sft")


# ------------------------------------------------------------------------- making pairs

def make_pairs(
    model: Decoder,
    tokenizer: Tokenizer,
    examples: list[Example],
    neg: str,
    sampling: Sampling,
    seed: int,
    slots: int = SLOTS,
    n_neg: int = 1,
    folder: Path | None = None,
) -> tuple[list[Pair], dict]:
    """One chosen and `n_neg` rejected responses for every example; useless pairs are dropped, and context
    gains are measured.

    Responses are sampled, or taken from a file that supplies them; folder: see `sample_pairs`. Returns the
    pairs and their statistics: counts, unfinished share, seconds, context gain, how often the demo's contexts
    are honoured.
    """
    start = time.perf_counter()
    contexts.warn_of_templates(examples, tokenizer)
    redrawn, sampled_before, given = 0, 0, len(examples)
    positions = model.config.max_position_embeddings
    if examples[0].chosen is not None:
        pairs = ready_pairs(tokenizer, examples)
    else:
        new_tokens = sampling.max_new_tokens
        examples, messages = usable_rows(tokenizer, examples, neg, seed, n_neg, positions, new_tokens)
        first_draws = [row[:n_neg] for row in messages]
        pairs, sampled_before = sample_pairs(model, tokenizer, examples, first_draws, sampling, seed, slots,
                                             folder)
        if n_neg and neg in SAMPLED:
            redrawn = redraw(model, tokenizer, pairs, messages, n_neg, sampling, seed, slots)
    # A response that fills several places counts once; those that were drawn again and replaced do not count,
    # though their seconds do.
    responses = {id(response): response for pair in pairs for response in pair.responses}.values()
    seconds_sampling = time.perf_counter() - start

    # Reshuffle and noise are made from the pairs that are kept, so they come after this; until then a pair is
    # dropped only if its chosen response is empty.
    fill_in_later = n_neg > 0 and neg not in SAMPLED and examples[0].rejected is None
    pairs, dropped = drop_useless(pairs, needs_rejected=n_neg > 0 and not fill_in_later)
    if not pairs:
        raise UserError(f"no pair is left of {given} examples: {dropped}")
    if fill_in_later and neg == "reshuffle":
        add_reshuffled(pairs, seed, n_neg)
    elif fill_in_later and neg == "noise":
        add_noise(pairs, tokenizer, seed, n_neg)
    elif fill_in_later:
        raise ValueError(f"make_pairs: nothing says how {neg} is made")
    if fill_in_later and any(len(pair.rejected) != n_neg for pair in pairs):
        raise ValueError(f"make_pairs: {neg} has not given every pair {n_neg} rejected responses")
    pairs = fitting_pairs(pairs, examples, positions)
    unusable = given - len(pairs) - sum(dropped.values())
    if unusable:
        dropped["unusable"] = unusable  # no context, or too long
    kept_ids = {pair.id for pair in pairs}
    kept = [example for example in examples if example.id in kept_ids]
    gain = context_gain(model, tokenizer, kept, pairs, seed) if n_neg else dict.fromkeys(GAINS)

    statistics = dict(
        examples=given,
        pairs=len(pairs),
        dropped=dropped,
        redrawn=redrawn,
        unfinished=1 - sum(response.finished for response in responses) / len(responses),
        response_tokens=sum(len(response.ids) for response in responses),
        seconds_sampling=seconds_sampling,
        sampled_before=sampled_before,  # pairs that an interrupted start left, not in these seconds
        seconds_gain=time.perf_counter() - start - seconds_sampling,
        gain=gain,
    )
    if any(example.check for example in examples):
        statistics["checks"] = check_rates(kept, pairs, neg)
    return pairs, statistics


def usable_rows(tokenizer: Tokenizer, examples: list[Example], neg: str, seed: int, n_neg: int,
                positions: int, new_tokens: int) -> tuple[list[Example], list[list[str]]]:
    """The rows that can be sampled, and the messages that each one's rejected responses may be drawn from.

    Rows are dropped by their own prompts first, so that no other row borrows a context that is too long.
    """
    if n_neg:
        examples = rows_with_contexts(examples, neg, tell=True)
    examples = fitting_rows(examples, lambda e: [e.user_message(e.context)], tokenizer, positions, new_tokens)
    messages = negative_messages(examples, neg, seed, max(n_neg, DRAWS) if n_neg else 0)
    if not messages[0]:
        return examples, messages
    of_row = {example.id: row for example, row in zip(examples, messages, strict=True)}
    examples = fitting_rows(examples, lambda e: of_row[e.id], tokenizer, positions, new_tokens)
    return examples, [of_row[example.id] for example in examples]


def sample_pairs(
    model: Decoder,
    tokenizer: Tokenizer,
    examples: list[Example],
    negatives: list[list[str]],
    sampling: Sampling,
    seed: int,
    slots: int,
    folder: Path | None,
) -> tuple[list[Pair], int]:
    """Sample every example's chosen response, and a rejected one for each of its `negatives` (user messages).

    With a folder, each pair is written once complete, and those found there are not sampled again; how many
    these are is returned too. Several processes share the work, each with a file of its own; the result is
    that of one process.
    """
    done: dict[str, Pair] = {}
    if folder and not rank():
        done = read_sampled(folder, len(negatives[0]))
    done = broadcast(done)
    if done:
        print(f"continuing: {len(done)} of {len(examples)} examples are sampled already")

    # A job is (example, which response of it): 0 is the chosen one, which has the right context.
    todo = share_of([i for i, example in enumerate(examples) if example.id not in done])
    prompts: dict[int, list[list[int]]] = {}
    for i in todo:
        right = examples[i].user_message(examples[i].context)
        prompts[i] = [tokenizer.chat(message, examples[i].system) for message in (right, *negatives[i])]
    jobs = [(i, k) for i in todo for k in range(len(prompts[i]))]
    responses: dict[int, dict[int, Response]] = {i: {} for i in todo}
    pairs: dict[int, Pair] = {}

    name = PROCESS_FILES.replace("*", str(rank())) if rank() else "pairs.jsonl"
    path = folder / name if folder else Path(os.devnull)
    with naming(path), open(path, "a", encoding="utf-8") as file:

        def on_finished(job: int, sample: Sample) -> None:
            i, k = jobs[job]
            text = tokenizer.answer(sample.ids)
            responses[i][k] = Response(text, sample.ids, sample.finished, prompts[i][k])
            if len(responses[i]) == len(prompts[i]):
                example = examples[i]
                chosen, *rejected = (responses[i][n] for n in range(len(prompts[i])))
                pair = Pair(example.id, example.prompt, example.context, chosen, rejected, example.style,
                            example.system)
                file.write(json.dumps(dataclasses.asdict(pair), ensure_ascii=False) + "\n")
                file.flush()
                pairs[i] = pair

        bar = progress(len(jobs), "responses", "sampling")
        flat = [prompts[i][k] for i, k in jobs]
        generate(model, flat, sampling, tokenizer.stop_ids, seed, keys=jobs, slots=slots, bar=bar,
                 on_finished=on_finished)
        bar.close()

    fresh = gather([pairs[i] for i in todo])
    of_id = done | {pair.id: pair for pair in fresh}
    return [of_id[example.id] for example in examples], len(done)


def redraw(model: Decoder, tokenizer: Tokenizer, pairs: list[Pair], messages: list[list[str]], n_neg: int,
           sampling: Sampling, seed: int, slots: int) -> int:
    """Replace rejected responses that teach nothing, in place, by further draws; return how many were drawn.

    A pair with too few useful responses draws again, up to DRAWS in total, one for each of its `messages`,
    and then repeats those that it has. So whether a row can be used does not depend on n_neg: 1, 3 or 10
    rejected responses are compared on the same rows.
    """
    drawn = 0
    for pair in pairs:
        pair.rejected = [response for response in pair.rejected if is_useful(response, pair)]
    for k in range(n_neg, len(messages[0])):
        short = [i for i, pair in enumerate(pairs) if len(pair.rejected) < n_neg]
        prompts = [tokenizer.chat(messages[i][k], pairs[i].system) for i in share_of(short)]
        keys = [(i, k + 1) for i in share_of(short)]  # sample 0 is the chosen response
        samples = generate(model, prompts, sampling, tokenizer.stop_ids, seed, keys, slots)
        draws = gather(list(zip(prompts, samples, strict=True)))
        for i, (prompt, sample) in zip(short, draws, strict=True):
            response = Response(tokenizer.answer(sample.ids), sample.ids, sample.finished, prompt)
            if is_useful(response, pairs[i]):
                pairs[i].rejected.append(response)
        drawn += len(short)
    for pair in pairs:
        if pair.rejected:
            good = itertools.cycle(pair.rejected)
            pair.rejected = [next(good) for _ in range(n_neg)]
    return drawn


def is_useful(response: Response, pair: Pair) -> bool:
    """Whether a rejected response can teach anything: it says something, and something else."""
    return bool(response.text.strip()) and response.ids != pair.chosen.ids


def read_sampled(folder: Path, count: int) -> dict[str, Pair]:
    """The pairs that interrupted sampling left in a folder, by id, with the `count` rejected responses that
    were sampled: everything else is computed again."""
    pairs = {}
    for file in [folder / "pairs.jsonl", *folder.glob(PROCESS_FILES)]:
        for line, row in enumerate(read_appended(file), 1):
            pair = read_pair(row, f"{file}:{line}")
            pair.rejected = pair.rejected[:count]
            pairs[pair.id] = pair
    return pairs


def ready_pairs(tokenizer: Tokenizer, examples: list[Example]) -> list[Pair]:
    """The pairs of a file that supplies the chosen responses as text, and maybe the rejected ones."""
    pairs = []
    for example in examples:
        turns = example.user_message(example.context), example.system
        chosen = Response(example.chosen, tokenizer.response(example.chosen, *turns), True,
                          tokenizer.chat(*turns))
        rejected = []
        if example.rejected is not None:
            rejected = [Response(example.rejected, tokenizer.response(example.rejected, *turns), True, [])]
        pairs.append(Pair(example.id, example.prompt, example.context, chosen, rejected, example.style,
                          example.system))
    return pairs


def drop_useless(pairs: list[Pair], needs_rejected: bool) -> tuple[list[Pair], dict[str, int]]:
    """Leave out pairs whose chosen response is empty or, where rejected ones should be there by now, none of
    these is useful; count both."""
    kept, dropped = [], dict(empty=0, identical=0)
    for pair in pairs:
        if not pair.chosen.text.strip():
            dropped["empty"] += 1
        elif needs_rejected and not any(is_useful(response, pair) for response in pair.rejected):
            dropped["identical"] += 1
        else:
            kept.append(pair)
    return kept, dropped


# ------------------------------------------------------------------------- what pairs are like

def context_gain(model: Decoder, tokenizer: Tokenizer, examples: list[Example], pairs: list[Pair],
                 seed: int) -> dict:
    """Fill in every response's context gain, and return the means of both sides, per response and per token.

    It is log pi_ref(y|x,c) - log pi_ref(y|x), Eq. 14. Over chosen responses that were drawn at temperature 1
    and top-p 1, its mean is an upper bound on the mutual information of response and context: larger by
    KL(mean over c of pi_ref(.|x,c) || pi_ref(.|x)). A row without a context is compared with another row's
    prompt x'. Where there is no x' the row's gain is 0; if no row has a context either, all are None.
    """
    prompts = sorted({example.prompt for example in examples})
    if not any(example.context for example in examples) and len(prompts) < 2:
        return dict.fromkeys(GAINS)
    bare_messages = []
    for i, example in enumerate(examples):
        if not example.context and len(prompts) > 1:
            rng = random.Random(seed_from("gain", seed, i))
            other = rng.choice([prompt for prompt in prompts if prompt != example.prompt])
            example = dataclasses.replace(example, prompt=other)
        bare_messages.append(example.user_message(None))

    groups, bare_groups = [], []  # the responses after the prompt with its context, and without
    for pair, message in zip(pairs, bare_messages, strict=True):
        ids = [response.ids for response in pair.responses]
        groups.append((pair.prompt_ids, ids))
        bare_groups.append((tokenizer.chat(message, pair.system), ids))
    bar = progress(2 * len(share_of(pairs)), "prompts", "context gain")
    logps = gather(sequence_logps(model, share_of(groups), bar=bar))
    bare_logps = gather(sequence_logps(model, share_of(bare_groups), bar=bar))
    bar.close()

    for pair, of_pair, bare_of_pair in zip(pairs, logps, bare_logps, strict=True):
        for response, logp, bare_logp in zip(pair.responses, of_pair, bare_of_pair, strict=True):
            response.gain = logp - bare_logp  # log pi_ref(y|x,c) - log pi_ref(y|x)
    means = {}
    chosen = [pair.chosen for pair in pairs]
    rejected = [response for pair in pairs for response in pair.rejected]
    for side, responses in (("chosen", chosen), ("rejected", rejected)):
        total = sum(response.gain for response in responses)
        means[side] = total / len(responses)
        means[side + "_per_token_micro"] = total / sum(len(response.ids) for response in responses)
    return means


def print_statistics(statistics: dict) -> None:
    """Print what a user should know before an hour of training."""
    dropped, gain = statistics["dropped"], statistics["gain"]
    before = statistics.get("sampled_before", 0)
    print(f"{statistics['pairs']} pairs of {statistics['examples']} examples (dropped: {dropped['empty']} "
          f"empty, {dropped['identical']} without a useful rejected response, "
          f"{dropped.get('unusable', 0)} without a context or too long; {statistics.get('redrawn', 0)} "
          f"drawn again), {statistics['unfinished']:.0%} of responses "
          f"unfinished, {statistics['response_tokens']} tokens, sampled in "
          f"{statistics['seconds_sampling']:.0f} s"
          + (f" ({before} pairs were sampled before)" if before else ""))
    for side in ("chosen", "rejected"):
        if gain[side] is not None:
            per_token = gain[side + "_per_token_micro"]
            print(f"context gain of {side} responses: {gain[side]:+.2f} nats, {per_token:+.3f} a token")
    if gain["chosen"] is not None and gain["chosen"] < LITTLE_GAIN:
        print("warning: the context gain of chosen responses is near zero: answers hardly depend on the "
              "context (without contexts: on the prompt), so there is little for MIPO to learn (limitation "
              "iii of the paper)")
    for rate in statistics.get("checks", []):
        free = "" if rate["context_free"] is None else f", {rate['context_free']:4.0%} of context-free"
        check = " ".join(map(str, rate["check"]))
        print(f"  {rate['context']} {check:40.40} honoured by {rate['chosen']:4.0%} of {rate['n']} chosen "
              f"responses{free}")


# ------------------------------------------------------------------------- the pairs' files

def save_pairs(folder: Path, pairs: list[Pair], meta: dict) -> None:
    """Write pairs.jsonl, one pair a line, and then pairs.json: settings and statistics."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "pairs.jsonl", (dataclasses.asdict(pair) for pair in pairs))
    write_json(folder / "pairs.json", meta)
    if not rank():
        for file in folder.glob(PROCESS_FILES):  # pairs.jsonl has it all
            file.unlink()


RESPONSE = dict(text=TEXT, ids=TOKEN_IDS, finished=FLAG, prompt_ids=TOKEN_IDS,
                gain=optional(real(-1e9, 1e9)))
PAIR = dict(id=TEXT, prompt=TEXT, context=optional(TEXT), chosen=record(RESPONSE),
            rejected=listing(record(RESPONSE)),
            style=one_of("plain", "short", "math", "choice"), system=optional(TEXT))
SAMPLED_WITH = dict(temperature=real(0, 1e6), top_p=real(0, 1), top_k=optional(integer(0, 2**31)),
                    max_new_tokens=integer(1, 2**31))
SETTINGS = dict(data=optional(TEXT), contexts=optional(TEXT), neg=optional(one_of(*NEGATIVES)),
                n_neg=optional(integer(0, 2**31)), seed=optional(integer(-(2**31), 2**31)),
                date=optional(TEXT), split=optional(one_of(*SPLITS)), sampling=optional(record(SAMPLED_WITH)),
                template=optional(listing(TEXT)))


def read_meta(folder: Path) -> dict:
    """pairs.json: settings, and statistics once the pairs are complete, else None. UserError where it is
    anything else."""
    file = folder / "pairs.json"
    meta = checked(read_json(file), dict(settings=optional(OBJECT), statistics=optional(OBJECT)), str(file))
    settings = checked(meta.get("settings") or {}, SETTINGS, str(file))
    return dict(settings=settings, statistics=meta.get("statistics"))


def read_pair(row: dict, where: str) -> Pair:
    """The pair of a line of pairs.jsonl; UserError where it is none."""
    try:
        chosen, rejected = Response(**row["chosen"]), [Response(**fields) for fields in row["rejected"]]
        pair = Pair(**row | dict(chosen=chosen, rejected=rejected))
    except (TypeError, KeyError, ValueError) as e:
        raise UserError(f"{where}: not a pair ({type(e).__name__}: {e}); make the pairs anew with pairs.py"
                        ) from None
    parts = dict(chosen=vars(pair.chosen), rejected=[vars(response) for response in pair.rejected])
    checked(vars(pair) | parts, PAIR, where)
    if not all(response.ids for response in pair.responses):
        raise UserError(f"{where}: a response without tokens; make the pairs anew with pairs.py")
    return pair


def load_pairs(folder: Path) -> list[Pair]:
    """Read pairs.jsonl back: as many pairs as pairs.json says, each once, all with as many rejected
    responses."""
    statistics, file = read_meta(folder).get("statistics"), folder / "pairs.jsonl"
    if statistics is None:
        raise UserError(f"{file} is incomplete: rerun the command that samples it")
    pairs = [read_pair(row, f"{file}:{line}") for line, row in read_jsonl(file)]
    said = statistics.get("pairs", len(pairs))
    if not pairs or said != len(pairs) or len({pair.id for pair in pairs}) < len(pairs):
        raise UserError(f"{file} holds {len(pairs)} pairs, of {len({pair.id for pair in pairs})} rows, and "
                        f"pairs.json says {said}: lines were lost or added, make the pairs anew")
    for line, pair in enumerate(pairs, 1):
        if len(pair.rejected) != len(pairs[0].rejected):
            raise UserError(f"{file}: pair {line} has {len(pair.rejected)} rejected responses, the first one "
                            f"{len(pairs[0].rejected)}: make the pairs anew")
    return pairs


def pair_settings(args: PairArgs, examples: list[Example], split: str) -> dict:
    """All that decides what the pairs are: stored beside them, and compared before they are used again."""
    rows = [example.row() for example in examples]
    sampling = dataclasses.asdict(sampling_for(args))
    names = ("data", "model", "neg", "n_neg", "seed", "date", "dtype")
    return {name: getattr(args, name) for name in names} | dict(
        system=args.system, template=list(args.template) or None,
        split=split, contexts=contexts_of(args), examples=len(examples), data_fingerprint=fingerprint(rows),
        sampling=sampling)


def refuse_other_settings(folder: Path, made_with: dict, settings: dict) -> None:
    """UserError where the pairs in a folder were made with other settings than these."""
    for key, value in settings.items():
        if made_with.get(key) != value:
            raise UserError(f"{folder / 'pairs.jsonl'} was made with {key} {made_with.get(key)!r}, "
                            f"not {value!r}: give the same arguments or another folder")


def round_seed(seed: int, round: int) -> int:
    """The seed of a round's draws; the first round's is the run's own, by which data are always split."""
    return seed_from("round", seed, round) if round else seed


def pairs_for(args: PairArgs, split: str, folder: Path, model: Decoder | None = None,
              round: int = 0) -> list[Pair]:
    """The pairs of a split: those in `folder` if the same settings made them, else sampled into it.

    Sampling that was interrupted continues. pairs.json is written twice: first with the settings, by which a
    continuation is checked, then with statistics, which mark completion. model: what is sampled from, if not
    the one that args name. round: of self-training; it changes every draw.
    """
    examples = examples_for(args, split)
    settings = pair_settings(args, examples, split)
    if round:
        settings |= dict(round=round)
    file = folder / "pairs.json"
    if file.exists():
        meta = read_meta(folder)
        refuse_other_settings(folder, meta["settings"], settings)
        if meta["statistics"] is not None:
            pairs = load_pairs(folder)
            print(f"{len(pairs)} pairs from {folder / 'pairs.jsonl'}")
            return pairs

    check_negatives(examples, args)  # before anything is loaded
    sampling = sampling_for(args)
    tokenizer = Tokenizer(args.model, args.date, args.template)
    if model is None:
        model = load(args.model, getattr(torch, args.dtype), default_device())
    if examples[0].chosen is None:
        print(f"sampling with {sampling}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, dict(settings=settings, statistics=None))
    seed = round_seed(args.seed, round)
    pairs, statistics = make_pairs(model, tokenizer, examples, args.neg, sampling, seed, args.slots,
                                   args.n_neg, folder)
    save_pairs(folder, pairs, dict(settings=settings, statistics=statistics, environment=environment()))
    print_statistics(statistics)
    return pairs


# ------------------------------------------------------------------------- command line

def program() -> None:
    args = contexts.resolve(parse(Args, usage=__doc__))
    check(args)
    if not args.out:
        raise UserError("usage: python pairs.py --model DIR --out FOLDER; --help lists all arguments")
    find(args.model)  # a wrong name leaves nothing behind
    with lock(Path(args.out)):
        pairs_for(args, args.split, Path(args.out))
    print(f"pairs are in {Path(args.out) / 'pairs.jsonl'}")


if __name__ == "__main__":
    main(program)
