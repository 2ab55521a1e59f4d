"""responses.py - what the systems of an evaluation answer to held-out prompts, and the file that holds it.

    default    y ~ pi_ref(.|x)         the base model without the context
    prompted   y ~ pi_ref(.|x, c)      the base model with it: the baseline MIPO has to beat (section 5.1)
    trained    y ~ pi_theta(.|x, c)    the trained model; in data without contexts it has to beat `default`

The base model measures every response: its log-prob, its context gain log pi_ref(y|x,c) - log pi_ref(y|x) of
Eq. 14, its prompt gain. For multiple-choice questions there is also how a system's own model rates the
choices (Figs. 4, 5). Samples are kept as they end, so that an interrupted evaluation goes on from them.
What differs from the paper: the prompt gain is ours.

    python -m pytest tests/test_eval.py -k "answer or gain"
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checks import LETTERS
from data import Example, choice_lines, user_message
from losses import Group, sequence_logps
from measures import SYSTEMS, Answer, Answers, or_nan
from model import Decoder
from run import (UserError, broadcast, gather, naming, progress, rank, read_appended, read_jsonl, share_of,
                 write_jsonl)
from sample import SLOTS, Sample, Sampling, generate
from schema import FLAG, TEXT, TOKEN_IDS, checked, integer
from tokenizer import Tokenizer

# Columns of responses.jsonl beside the text: of all data, of multiple-choice questions, of judged data.
MEASURED = ("ids", "finished", "logp", "gain", "prompt_gain")
OF_CHOICES = ("entropy", "choice_mi")
JUDGED = ("scores", "reference_scores")


class Message(NamedTuple):
    """What a model is told: the user's message and, before it, the system prompt if there is one."""

    user: str
    system: str | None


# ------------------------------------------------------------------------- responses

def next_prompts(prompts: Iterable[str]) -> dict[str, str]:
    """Prompt -> the one that the prompt gain compares it with: the next, for the last the first."""
    distinct = list(dict.fromkeys(prompts))
    return dict(zip(distinct, distinct[1:] + distinct[:1], strict=True))


def respond(base: Decoder, trained: Decoder | None, tokenizer: Tokenizer, examples: list[Example],
            sampling: Sampling, seed: int, slots: int = SLOTS, cached: Answers | None = None,
            file: Path | None = None) -> Answers:
    """Every system's answer to every example, measured by the base model.

    trained: None leaves out the third system. slots: how many responses are sampled together. cached: the
    base model's answers of an earlier evaluation, which are then not sampled again. file: responses.jsonl,
    beside which samples are kept.
    """
    other_prompt = next_prompts(e.prompt for e in examples)

    def own_message(e: Example) -> Message:
        return Message(e.user_message(e.context), e.system)

    def without_context(e: Example) -> Message:
        return Message(e.user_message(None), e.system)

    def other_message(e: Example, context: str | None) -> Message:
        return Message(user_message(other_prompt[e.prompt], context, e.style), e.system)

    def draw(model: Decoder, messages: list[Message], system: str) -> list[Sample]:
        return sample_responses(model, tokenizer, messages, sampling, seed, slots, system, file)

    cached = cached or {}
    answers = dict(cached)
    if not cached:
        # `default` sees no context: one response a prompt stands beside all of the prompt's rows.
        asked = {(e.prompt, e.system): e for e in examples}
        own = [without_context(e) for e in asked.values()]
        other = [other_message(e, None) for e in asked.values()]
        samples = dict(default=draw(base, own, "default"))
        measured = measured_answers(base, tokenizer, samples, own, other)["default"]
        answer_to = dict(zip(asked, measured, strict=True))
        answers["default"] = [answer_to[e.prompt, e.system] for e in examples]

    own = [own_message(e) for e in examples]
    has_contexts = any(e.context for e in examples)
    samples = {}
    if has_contexts and not cached:
        samples["prompted"] = draw(base, own, "prompted")
    if trained is not None:
        samples["trained"] = draw(trained, own, "trained")
    if samples:
        other = [other_message(e, e.context) for e in examples]
        without = [without_context(e) for e in examples] if has_contexts else None
        answers |= measured_answers(base, tokenizer, samples, own, other, without)

    if examples[0].choices:
        for system in [system for system in answers if system not in cached]:
            model = trained if system == "trained" else base
            answers[system] = choice_measures(model, tokenizer, examples, answers[system])
    return answers


def sample_responses(model: Decoder, tokenizer: Tokenizer, messages: list[Message], sampling: Sampling,
                     seed: int, slots: int, system: str, file: Path | None = None) -> list[Sample]:
    """One response to every message. Message i draws from (seed, i, 0): two systems that are sent the same
    messages use the same numbers.

    With a file, responses.jsonl, each sample is written beside it as it ends, and those found there are not
    sampled again. Several processes share the work, each with a file of its own.
    """
    done = broadcast({} if rank() or not file else read_samples(file, system))
    if done:
        print(f"continuing: {len(done)} of {len(messages)} {system} responses are sampled already")

    left = [i for i in range(len(messages)) if i not in done]
    rows = share_of(left)
    bar = progress(len(rows), "responses", system)
    path = samples_file(file, system) if file else Path(os.devnull)
    with naming(path), open(path, "a", encoding="utf-8") as kept:

        def keep(j: int, sample: Sample) -> None:
            kept.write(json.dumps(dict(row=rows[j], ids=sample.ids, finished=sample.finished)) + "\n")
            kept.flush()

        prompts = [tokenizer.chat(*messages[i]) for i in rows]
        keys = [(i, 0) for i in rows]
        samples = generate(model, prompts, sampling, tokenizer.stop_ids, seed, keys, slots, bar, keep)
    bar.close()
    done |= dict(zip(left, gather(samples), strict=True))
    return [done[i] for i in range(len(messages))]


def measured_answers(base: Decoder, tokenizer: Tokenizer, samples: dict[str, list[Sample]],
                     own: list[Message], other: list[Message],
                     without: list[Message] | None = None) -> Answers:
    """Samples of some systems as answers, measured by the base model after three messages a row.

    own: what the samples answer. other: the same with another prompt. without: the same without the context;
    None: no row has one. The context gain is NaN where there is no context to leave out.
    """
    ids = [[sample.ids for sample in row] for row in zip(*samples.values(), strict=True)]
    logps = logps_after(base, tokenizer, own, ids, "own prompt")  # (rows, systems)
    prompt_gains = logps - logps_after(base, tokenizer, other, ids, "another prompt")  # (rows, systems)
    prompt_gains[[a == b for a, b in zip(own, other, strict=True)]] = np.nan  # there is no other prompt
    gains = np.full(logps.shape, np.nan)  # (rows, systems)
    if without:
        gains = logps - logps_after(base, tokenizer, without, ids, "no context")
        gains[[a == b for a, b in zip(own, without, strict=True)]] = np.nan
    answers = {}
    for k, (system, drawn) in enumerate(samples.items()):
        numbers = np.stack([logps[:, k], gains[:, k], prompt_gains[:, k]], axis=1).tolist()  # (rows, 3)
        answers[system] = [Answer(tokenizer.answer(sample.ids), sample.ids, sample.finished, *row)
                           for sample, row in zip(drawn, numbers, strict=True)]
    return answers


def logps_after(model: Decoder, tokenizer: Tokenizer, messages: list[Message],
                responses: list[list[list[int]]], label: str) -> np.ndarray:
    """log pi(response | message), summed over tokens: (rows, responses a row).

    responses: token ids, equally many responses for each message.
    """
    prompts = [tokenizer.chat(*message) for message in messages]
    return np.array(group_logps(model, list(zip(prompts, responses, strict=True)), label))


def group_logps(model: Decoder, groups: list[Group], label: str) -> list[list[float]]:
    """log pi(response | prefix) of each response of each group; the processes share the groups."""
    share = share_of(groups)
    bar = progress(len(share), "prompts", f"log-probs, {label}")
    logps = sequence_logps(model, share, bar=bar)
    bar.close()
    return gather(logps)


def choice_measures(model: Decoder, tokenizer: Tokenizer, examples: list[Example],
                    answers: list[Answer]) -> list[Answer]:
    """The answers to multiple-choice questions with what their model makes of the choices.

    entropy (Figs. 4, 5): of the softmax over the letters' log-probs after the response up to and including
    "The answer is:"; NaN where the response does not say that. choice_mi: whether the choice with the
    greatest log p(choice|question) - log p(choice) is the right one.
    """
    rows, after_reasoning, after_question, after_nothing = [], [], [], []
    for i, (e, answer) in enumerate(zip(examples, answers, strict=True)):
        reasoning = re.search(r"(?is).*the answer is:", answer.text)
        if reasoning:
            letters = [tokenizer.encode(f" {letter}") for letter in LETTERS[: len(e.choices)]]
            prompt = tokenizer.chat(e.user_message(None), e.system)
            rows.append(i)
            after_reasoning.append((prompt + tokenizer.encode(reasoning.group()), letters))
        question = e.prompt.removesuffix(choice_lines(e.choices)).rstrip("\n")
        choices = [tokenizer.encode(choice or " ") for choice in e.choices]  # an empty one is a blank
        after_question.append((tokenizer.chat(f"Question: {question}\nAnswer:", e.system), choices))
        after_nothing.append((tokenizer.chat("Answer:", e.system), choices))

    entropies = np.full(len(examples), np.nan)
    for i, logps in zip(rows, group_logps(model, after_reasoning, "letters"), strict=True):
        p = np.exp(logps - np.logaddexp.reduce(logps))  # (choices,)
        entropies[i] = -(p * np.log(np.maximum(p, 1e-300))).sum()
    given = group_logps(model, after_question, "choices")
    alone = group_logps(model, after_nothing, "choices alone")
    measured = []
    for i, (e, answer) in enumerate(zip(examples, answers, strict=True)):
        choice = int(np.argmax(np.subtract(given[i], alone[i])))
        right = float(LETTERS[choice] == e.answer)
        measured.append(dataclasses.replace(answer, entropy=float(entropies[i]), choice_mi=right))
    return measured


# ------------------------------------------------------------------------- what is sampled so far

def samples_file(file: Path, system: str) -> Path:
    """Where this process keeps a system's samples: responses.jsonl.trained, say."""
    process = f".process-{rank()}" if rank() else ""
    return file.with_name(f"{file.name}.{system}{process}")


def samples_files(file: Path, system: str) -> list[Path]:
    """The files in which any process has kept a system's samples."""
    return sorted(file.parent.glob(f"{file.name}.{system}*"))


SAMPLED = dict(row=integer(0, 2**63), ids=TOKEN_IDS, finished=FLAG)  # a line of such a file


def read_samples(file: Path, system: str) -> dict[int, Sample]:
    """Row -> sample: what an interrupted evaluation has left of a system's samples."""
    rows = [checked(row, SAMPLED, str(kept)) for kept in samples_files(file, system)
            for row in read_appended(kept)]
    return {row["row"]: Sample(row["ids"], [], row["finished"]) for row in rows}


def remove_samples(file: Path) -> None:
    """Remove the kept samples: responses.jsonl has them all, or they are of no use."""
    if rank():
        return
    for system in SYSTEMS:
        for kept in samples_files(file, system):
            kept.unlink()


# ------------------------------------------------------------------------- responses.jsonl

def write_responses(file: Path, examples: list[Example], answers: Answers) -> None:
    """Write responses.jsonl, a line for each answer of each system."""
    lines = [response_row(e, system, answer) for system, rows in answers.items()
             for e, answer in zip(examples, rows, strict=True)]
    write_jsonl(file, lines)


def response_row(e: Example, system: str, answer: Answer) -> dict:
    """One line of responses.jsonl."""
    row = dict(id=e.id, prompt=e.prompt, context=e.context, response=answer.text, system=system)
    row |= {key: or_null(getattr(answer, key)) for key in MEASURED}
    if e.choices:
        row |= {key: or_null(getattr(answer, key)) for key in OF_CHOICES}
    if answer.scores:
        row |= {key: {judge: or_null(score) for judge, score in getattr(answer, key).items()}
                for key in JUDGED}
    return row


def or_null(value):
    """A value for a JSON file, which has null for NaN."""
    return None if value != value else value  # only NaN differs from itself


def read_answers(file: Path, examples: list[Example], with_trained: bool) -> Answers:
    """What `write_responses` wrote; UserError where a system has not as many rows as there are examples."""
    answers: Answers = {}
    for number, row in read_jsonl(file):
        checked(row, dict(system=TEXT, response=TEXT), f"{file}:{number}")
        if row["system"] == "trained" and not with_trained:
            continue
        numbers = {key: or_nan(row.get(key)) for key in (*MEASURED, *OF_CHOICES)}
        scores = {key: {judge: or_nan(score) for judge, score in row.get(key, {}).items()} for key in JUDGED}
        answers.setdefault(row["system"], []).append(Answer(row["response"], **numbers, **scores))
    if not answers or any(len(rows) != len(examples) for rows in answers.values()):
        raise UserError(f"{file} does not hold {len(examples)} rows a system")
    return answers
