"""revise.py - responses that the model has rewritten, for SFT with revision (section 5.1).

    with contexts   the model improves its chosen response, shown beside one that was sampled for the same
                    prompt with a random context (with --pairs: beside the rejected one that they hold); the
                    prompt is appendix D.2's
    on tasks        it rewrites its answer, told what the right one is: privileged information, which MIPO
                    does without; a rejected response is sampled there too, and not read

What differs from the paper: it does not give the prompt for tasks; ours is below. A typo in D.2 is corrected.
Revisions are sampled as responses are, and trained under the prompt without the request to revise.

    python train.py --method sft-revise --data demo
"""

import dataclasses
import json
from pathlib import Path

from contexts import examples_for, sampling_for
from data import Example
from model import Decoder
from negatives import Pair, Response
from pairs import RESPONSE
from rows import fitting_rows
from run import UserError, broadcast, gather, naming, progress, rank, read_appended, seed_from, share_of
from sample import Sample, generate
from schema import TEXT, checked, record
from tokenizer import Tokenizer

FROM_CONTRAST = (
    "You are a helpful assistant. Modify the assistant's message to make sure the response is personalized "
    "to this user based on the information available about them. You will be given an example of a good "
    "response and a bad response to the same prompt. {context} {prompt} Good assistant's response: {chosen} "
    "Bad assistant's response: {rejected}. Rewrite the good assistant's response to make it better.")
FROM_ANSWER = (
    "{message}\n\nHere is an attempt at the answer:\n\n{chosen}\n\nThe right final answer is {answer}. "
    "Rewrite the attempt so that its reasoning leads to this answer. Keep its form, and write nothing but "
    "the new attempt.")


REVISED = dict(id=TEXT, response=record(RESPONSE))  # a line of revised.jsonl


def check_revisable(examples: list[Example], args) -> None:
    """UserError where examples have neither a context nor a right answer to revise a response by."""
    without = [example.id for example in examples if not example.context and example.answer is None]
    if without:
        raise UserError(f"--method sft-revise needs a context or a right answer in every row of {args.data}; "
                        f"{len(without)} have neither (first: {without[0]!r}): use --method sft")


def examples_of(pairs: list[Pair], args) -> dict[str, Example]:
    """The examples that pairs were made of, by id, in the pairs' order; UserError where some are missing."""
    every = dataclasses.replace(args, limit=0) if args.pairs else args  # --limit is of these pairs then
    by_id = {example.id: example for example in examples_for(every, "train")}
    lost = [pair.id for pair in pairs if pair.id not in by_id]
    if lost:
        raise UserError(f"--method sft-revise: {len(lost)} of {len(pairs)} pairs are no rows of {args.data} "
                        f"(first: {lost[0]!r})")
    examples = {pair.id: by_id[pair.id] for pair in pairs}
    check_revisable(list(examples.values()), args)
    return examples


def revision_message(pair: Pair, example: Example) -> str:
    """What the user says to have a pair's chosen response revised."""
    if pair.context:
        return FROM_CONTRAST.format(context=pair.context, prompt=pair.prompt, chosen=pair.chosen.text,
                                    rejected=pair.rejected[0].text)
    return FROM_ANSWER.format(message=example.user_message(None), chosen=pair.chosen.text,
                              answer=example.answer)


def revise(model: Decoder, pairs: list[Pair], args, folder: Path, seed: int) -> list[Pair]:
    """The pairs with their chosen responses rewritten by the model; those rewritten to nothing are left out,
    and those whose revision would not fit into the model's positions.

    args: the run's arguments, train.Args. Every revision is appended to folder/revised.jsonl as it ends, and
    those found there are not made again; several processes share the work, each with a file of its own.
    """
    tokenizer, sampling = Tokenizer(args.model, args.date, args.template), sampling_for(args)
    examples = examples_of(pairs, args)
    of_pair = {pair.id: pair for pair in pairs}
    fitting = fitting_rows(list(examples.values()), lambda e: [revision_message(of_pair[e.id], e)], tokenizer,
                           model.config.max_position_embeddings, sampling.max_new_tokens)
    pairs = [of_pair[example.id] for example in fitting]
    done = {}
    files = [] if rank() else sorted(folder.glob("revised.jsonl*"))  # process 0 reads for all
    for file in files:
        for row in read_appended(file):
            row = checked(row, REVISED, str(file))
            done[row["id"]] = Response(**row["response"])
    done = broadcast(done)

    todo = share_of([i for i, pair in enumerate(pairs) if pair.id not in done])
    messages = [revision_message(pairs[i], examples[pairs[i].id]) for i in todo]
    prompts = [tokenizer.chat(message, pairs[i].system) for i, message in zip(todo, messages, strict=True)]
    fresh: dict[str, Response] = {}
    name = f"revised.jsonl.process-{rank()}" if rank() else "revised.jsonl"
    with naming(folder / name), open(folder / name, "a", encoding="utf-8") as file:

        def on_finished(k: int, sample: Sample) -> None:
            pair = pairs[todo[k]]
            response = Response(tokenizer.answer(sample.ids), sample.ids, sample.finished, pair.prompt_ids)
            row = dict(id=pair.id, response=dataclasses.asdict(response))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            fresh[pair.id] = response

        bar = progress(len(todo), "responses", "revising")
        generate(model, prompts, sampling, tokenizer.stop_ids, seed_from("revise", seed),
                 keys=[(i, 0) for i in todo], slots=args.slots, bar=bar, on_finished=on_finished)
        bar.close()
    done |= dict(gather(list(fresh.items())))

    revised = [dataclasses.replace(pair, chosen=done[pair.id]) for pair in pairs]
    kept = [pair for pair in revised if pair.chosen.text.strip()]
    changed = sum(new.chosen.text != old.chosen.text for new, old in zip(revised, pairs, strict=True))
    print(f"{changed} of {len(pairs)} responses were changed by revision; {len(pairs) - len(kept)} were left "
          "empty and are dropped")
    if not kept:
        raise UserError("no response is left after revision: raise --max-new-tokens, or use --method sft")
    return kept
