"""How often a sampled text depends on what is sampled beside it: it should not, but for the rounding of sums.

    python results/agreement.py --model tiny --rows 600 --out results/agreement-tiny.json

The same prompts (of the demo), seeds and row numbers are sampled with different numbers of slots, in another
order, and in the shares that two processes would take. Texts that equal those of the first way, token by
token, are counted.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contexts import DataArgs, examples_for
from folder import load
from run import default_device, default_dtype, environment, main, progress, write_json
from sample import Sampling, generate
from tokenizer import Tokenizer


def program() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--dtype", default=default_dtype(), choices=("bfloat16", "float32"))
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    tokenizer = Tokenizer(options.model)
    model = load(options.model, getattr(torch, options.dtype), default_device())
    examples = examples_for(DataArgs(limit=options.rows), "train")
    prompts = [tokenizer.chat(example.user_message(example.context)) for example in examples]
    sampling = Sampling(1.0, 1.0, options.max_new_tokens)

    def texts(rows: list[int], slots: int, label: str) -> dict[int, list[int]]:
        """Row -> the ids sampled for it, when these rows are sampled in this order."""
        bar = progress(len(rows), "responses", label)
        samples = generate(model, [prompts[i] for i in rows], sampling, tokenizer.stop_ids, 0,
                           [(i, 0) for i in rows], slots, bar)
        bar.close()
        return {i: sample.ids for i, sample in zip(rows, samples, strict=True)}

    rows = list(range(len(prompts)))
    first = texts(rows, 128, "128 slots")
    others = {
        "64 slots": texts(rows, 64, "64 slots"),
        "7 slots": texts(rows, 7, "7 slots"),
        "reversed order": texts(rows[::-1], 128, "reversed"),
        "shares of two processes": texts(rows[::2], 128, "even") | texts(rows[1::2], 128, "odd"),
    }
    equal = {name: sum(other[i] == first[i] for i in rows) for name, other in others.items()}
    write_json(Path(options.out), dict(
        command=f"python results/agreement.py --model {Path(options.model).name} --rows {options.rows} "
                f"--max-new-tokens {options.max_new_tokens} --dtype {options.dtype}",
        rows=len(rows),
        equal_to_128_slots=equal,
        environment=environment(),
    ))
    print(equal)


if __name__ == "__main__":
    main(program)
