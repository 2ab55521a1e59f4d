"""fuzz.py - every reader of this project fed with damaged input; what is not read must be refused by name.

Each reader gets valid inputs of its own format, changed at random: values of other types and sizes, parts
cut, doubled and exchanged, bytes flipped. A fault is any error but the reader's own refusal, or more than a
second of work. Inputs follow from the seed alone.

    python results/fuzz.py             a million inputs, about ten minutes of one core; writes fuzz.json
"""

import argparse
import contextlib
import copy
import io
import json
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save

import checks
import replies
from config import Config
from data import load_jsonl, print_once
from endpoint import Refusal, TryAgain, completion_of
from folder import read_tensors
from formats import Dropped
from judge import quote, read_cache
from pairs import read_meta, read_pair
from run import UserError, read_appended, write_json

JUNK = (None, True, False, 0, -1, 1, 2, 7, 1.5, -0.0, 1e-9, 1e308, float("inf"), float("nan"), 10**6, 2**31,
        10**30, "", " ", "a", "false", "12", "\x00", "\u2028", "\U0001f600", "<|im_end|>", "../x", "x" * 300,
        [], [1], [[]], ["a", None], {}, {"a": 1}, {"role": "user", "content": "x"}, [{"role": "user"}],
        [{"from": "human"}])
PIECES = ("####", "1,080.50", "-", "$", "7", "answer is", "The answer is: ", "(B)", "A", "\\boxed{", "}", "%",
          "Score: ", "**", "<think>", "</think>", "```json", "{", '"score": 4', '"a": ', "response_a", ":",
          " ", "\n", "\u0664", "\u00b2", "\u2460", "\uff15", "\u0301", "\U0001f600", "Example 9:",
          "Question:", "0.", "1/2", "4/5", "[INST]", "<|channel|>", "User:", "\u200d", "\x00", "\ud7ff",
          "analysis", "assistantfinal")


# ------------------------------------------------------------------------- inputs

def places(value, path: tuple = ()) -> list[tuple]:
    """The paths of everything inside a JSON value; of lists, of their first items."""
    inside = []
    if isinstance(value, dict):
        inside = list(value.items())
    elif isinstance(value, list):
        inside = list(enumerate(value[:4]))
    return [path] * bool(path) + [place for key, item in inside for place in places(item, (*path, key))]


def changed_value(rng: random.Random, value):
    """A JSON value in which up to three places are gone, renamed or something else."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        found = places(value)
        if not found:
            break
        *path, last = rng.choice(found)
        parent = value
        for key in path:
            parent = parent[key]
        if rng.random() < 0.2:
            del parent[last]
        elif isinstance(parent, dict) and rng.random() < 0.1:
            parent[rng.choice(("", "Prompt", "promt", "a", "type"))] = parent.pop(last)
        else:
            parent[last] = copy.deepcopy(rng.choice(JUNK))
    return value


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes with one to four of them flipped, or parts of them cut, doubled or moved."""
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.choices(range(len(data) + 1), k=2))
        kind = rng.randrange(4)
        if kind == 0 and at < len(data):
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[end:]
        elif kind == 2:
            data = data[:end] + data[at : min(end, at + 200)] + data[end:]
        else:
            data = data[:at]
    return data


def random_text(rng: random.Random) -> str:
    """Up to thirty pieces of what answers and verdicts are made of, and letters of all scripts."""
    pieces = [chr(rng.choice((rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))))
              if rng.random() < 0.2 else rng.choice(PIECES) for _ in range(rng.randint(0, 30))]
    return "".join(pieces)


# ------------------------------------------------------------------------- readers

ROWS = [dict(prompt="Why?", context=["I am old.", "I like tea."], reference="So.", user="u", id="r",
             split="train"),
        dict(prompt="Why?", chosen="Because.", rejected="No.", system="Be brief."),
        dict(prompt=[dict(role="user", content="Why?")], chosen=[dict(role="assistant", content="So.")],
             rejected=[dict(role="assistant", content="No.")]),
        {"conversations": [{"from": "human", "value": "Why?"}], "chosen": {"from": "gpt", "value": "So."},
         "rejected": {"from": "gpt", "value": "No."}},
        dict(chosen="\n\nHuman: Why?\n\nAssistant: So.", rejected="\n\nHuman: Why?\n\nAssistant: No."),
        dict(prompt="Why?", response_0="So.", response_1="No.", better_response_id=0),
        dict(instruction="Why?", input="", chosen="So.", rejected="No.")]
SIZES = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             rms_norm_eps=1e-5)
CONFIGS = [dict(SIZES, model_type="llama", num_key_value_heads=2, head_dim=16, rope_theta=1e4, mlp_bias=False,
                tie_word_embeddings=True, max_position_embeddings=2048, hidden_act="silu",
                rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                  original_max_position_embeddings=64), layer_types=["full_attention"]),
           dict(SIZES, model_type="qwen3", rope_parameters=dict(rope_type="default", rope_theta=1e6))]
RESPONSE = dict(text="So.", ids=[7, 8, 1], finished=True, prompt_ids=[5, 6], gain=1.5)
PAIRS = [dict(id="r", prompt="Why?", context="I am old.", chosen=RESPONSE, rejected=[RESPONSE, RESPONSE],
              style="plain", system=None),
         dict(id="r", prompt="Why?", context=None, style="short", prompt_ids=[5, 6], chosen="So.",
              chosen_ids=[7, 1], rejected=["No."], rejected_ids=[[9, 1]], source_ids=[[5]],
              finished=[True, True], gain_chosen=1.5, gain_rejected=[-0.5])]
META = dict(settings=dict(data="demo", neg="missing", n_neg=1, seed=0, date="2024-07-26", split="train",
                          sampling=dict(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=8)),
            statistics=dict(pairs=2))
COMPLETION = dict(choices=[dict(message=dict(role="assistant", content="4"), finish_reason="stop")],
                  error=dict(message="no", code=400))
TENSORS = save({"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(4, dtype=torch.bfloat16)})


def fuzz_data(rng: random.Random, folder: Path) -> None:
    """A user's file: rows of all formats, values and bytes changed."""
    rows = [changed_value(rng, rng.choice(ROWS)) for _ in range(rng.randint(1, 3))]
    text = json.dumps(rows) if rng.random() < 0.2 else "\n".join(map(json.dumps, rows))
    data = text.encode() if rng.random() < 0.6 else changed_bytes(rng, text.encode())
    (folder / "own.jsonl").write_bytes(data)
    load_jsonl(folder / "own.jsonl", seed=0)


def fuzz_appended(rng: random.Random, folder: Path) -> None:
    """A judge's cache, which grows a line at a time."""
    rows = [changed_value(rng, dict(key="k", judge="j", reply="4", unread="cut off")) for _ in range(2)]
    (folder / "cache.jsonl").write_bytes(changed_bytes(rng, "\n".join(map(json.dumps, rows)).encode()))
    read_appended(folder / "cache.jsonl")
    read_cache(folder / "cache.jsonl")


def fuzz_answers(rng: random.Random, folder: Path) -> None:
    """A response to a question of every style."""
    text = random_text(rng)
    for style in ("math", "number", "choice", "letter"):
        checks.extract(style, text, choices=4, flexible=rng.random() < 0.5)
    checks.says(text, "blue whale")
    checks.answer_style(text)


def fuzz_verdicts(rng: random.Random, folder: Path) -> None:
    """A judge's reply, and a text that is to be judged."""
    text = random_text(rng)
    for read in (replies.read_score, replies.read_choice, replies.read_object, quote):
        read(text)


def fuzz_completions(rng: random.Random, folder: Path) -> None:
    """What an endpoint sends."""
    body = json.dumps(changed_value(rng, COMPLETION)).encode()
    completion_of(body if rng.random() < 0.6 else changed_bytes(rng, b"data: " * rng.randrange(2) + body))


def fuzz_config(rng: random.Random, folder: Path) -> None:
    """A model's config.json."""
    Config.from_dict(changed_value(rng, rng.choice(CONFIGS)), "config.json")


def fuzz_pairs(rng: random.Random, folder: Path) -> None:
    """A line of pairs.jsonl, of this version or an earlier one; now and then pairs.json."""
    read_pair(changed_value(rng, rng.choice(PAIRS)), "pairs.jsonl:1")
    if rng.random() < 0.1:
        (folder / "pairs.json").write_text(json.dumps(changed_value(rng, META)))
        read_meta(folder)


def fuzz_tensors(rng: random.Random, folder: Path) -> None:
    """A safetensors file: its header's values, its length, its bytes."""
    data = changed_bytes(rng, TENSORS)
    if rng.random() < 0.6:
        length = struct.unpack("<Q", TENSORS[:8])[0]
        header = json.dumps(changed_value(rng, json.loads(TENSORS[8 : 8 + length]))).encode()
        said = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**20, 2**63, 2**64 - 1))
        data = struct.pack("<Q", said) + header + TENSORS[8 + length :]
    (folder / "model.safetensors").write_bytes(data)
    for _ in read_tensors(folder / "model.safetensors"):
        pass


READERS: dict[str, tuple[Callable, int]] = {  # name -> what feeds it, its share of a thousand inputs
    "data": (fuzz_data, 200),
    "judge's cache": (fuzz_appended, 100),
    "answers": (fuzz_answers, 200),
    "verdicts": (fuzz_verdicts, 200),
    "completions": (fuzz_completions, 80),
    "config.json": (fuzz_config, 100),
    "pairs": (fuzz_pairs, 80),
    "safetensors": (fuzz_tensors, 40),
}
REFUSALS = (UserError, Dropped, TryAgain, Refusal)


def fuzz(name: str, count: int, seed: int) -> dict:
    """Feed one reader: how many inputs, how many of them refused, and the faults by kind, each with the
    number of the first input that it came of."""
    feed, _ = READERS[name]
    refused, slowest = 0, 0.0
    faults, first = Counter(), {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
        for number in range(count):
            rng = random.Random(f"{name} {seed} {number}")
            started = time.process_time()
            fault = ""
            try:
                feed(rng, Path(folder))
            except REFUSALS:
                refused += 1
            except Exception as e:  # what is looked for
                fault = f"{type(e).__name__}: {str(e)[:100]}"
            seconds = time.process_time() - started
            slowest = max(slowest, seconds)
            fault = fault or ("more than a second" if seconds > 1 else "")
            if fault:
                faults[fault] += 1
                first.setdefault(fault, number)
            said.truncate(0)  # what a reader remarks on
            print_once.cache_clear()
    kinds = {fault: dict(count=faults[fault], first=first[fault]) for fault in faults}
    return dict(inputs=count, refused=refused, faults=faults.total(), slowest_ms=round(1000 * slowest, 1),
                kinds_of_faults=kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Feed every reader damaged input.")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "fuzz.json")
    args = parser.parse_args()
    results = {}
    for name, (_, share) in READERS.items():
        results[name] = fuzz(name, args.inputs * share // 1000, args.seed)
        print(name, json.dumps(results[name]), flush=True)
    total = {key: sum(result[key] for result in results.values()) for key in ("inputs", "refused", "faults")}
    print("all", total)
    write_json(args.out, dict(seed=args.seed, all=total, readers=results))


if __name__ == "__main__":
    main()
