"""variants.py - pairs made of a folder's pairs, for controls and for what a reader may wonder about.

    python results/variants.py swapped runs/random runs/swapped-pairs
    python results/variants.py mixed runs/missing runs/random runs/mixed-pairs
    python train.py --pairs runs/swapped-pairs ...

    swapped          chosen and rejected change sides, half of the time. Whatever a model learns from these is
                     due to the lengths and the language of its own responses, not to which has the context
    larger-half      the half of the pairs whose chosen response has the larger context gain
    smaller-half     the other half
    answering-half   the half whose chosen response has the larger prompt gain, log pi_ref(y|x,c) -
                     log pi_ref(y|x',c): how much likelier it is after its own question than after another
    mixed            of two folders with the same chosen responses: rejected ones from both in turn
    joined           the pairs of several folders, one after the other
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import user_message
from folder import load
from pairs import load_pairs, read_meta
from responses import Message, logps_after, next_prompts
from run import default_device, write_json
from tokenizer import TEMPLATE_DATE, Tokenizer


def read_rows(folder: Path) -> list[dict]:
    """The lines of pairs.jsonl."""
    return [json.loads(line) for line in (folder / "pairs.jsonl").open(encoding="utf-8")]


def swapped(rows: list[dict]) -> list[dict]:
    """Every pair, its sides changed with probability 1/2: the prompt they are trained under stays."""
    draw = random.Random(0)
    result = []
    for row in rows:
        if draw.random() >= 0.5:
            # A pair is trained under its chosen response's prompt. The new chosen response takes that one
            # over, so its own is no longer known.
            right = row["chosen"]["prompt_ids"]
            row = row | dict(chosen=row["rejected"][0] | dict(prompt_ids=right), rejected=[row["chosen"]])
        result.append(row)
    return result


def context_gains(rows: list[dict]) -> list[float]:
    """Of every chosen response, in nats."""
    return [row["chosen"]["gain"] for row in rows]


def prompt_gains(folder: Path) -> list[float]:
    """Of every chosen response, in nats, under the model it was sampled from; x' is the next prompt."""
    settings, pairs = read_meta(folder)["settings"], load_pairs(folder)
    tokenizer = Tokenizer(settings["model"], settings.get("date") or TEMPLATE_DATE,
                          settings.get("template") or ())
    model = load(settings["model"]).to(default_device())
    following = next_prompts(pair.prompt for pair in pairs)
    own = [Message(user_message(p.prompt, p.context, p.style), p.system) for p in pairs]
    other = [Message(user_message(following[p.prompt], p.context, p.style), p.system) for p in pairs]
    responses = [[pair.chosen.ids] for pair in pairs]
    gains = (logps_after(model, tokenizer, own, responses, "own prompt")
             - logps_after(model, tokenizer, other, responses, "another prompt"))  # (pairs, 1)
    return gains[:, 0].tolist()


def larger_half(rows: list[dict], values: list[float]) -> list[dict]:
    """The rows whose value is at least the median, in their order."""
    least = sorted(values)[len(values) // 2]
    return [row for row, value in zip(rows, values, strict=True) if value >= least]


def smaller_half(rows: list[dict], values: list[float]) -> list[dict]:
    """The rows that `larger_half` leaves out."""
    larger = larger_half(rows, values)
    return [row for row in rows if row not in larger]


def mixed(rows: list[dict], others: list[dict]) -> list[dict]:
    """Every second row from the other list: both hold the same chosen responses in the same order."""
    for row, other in zip(rows, others, strict=True):
        if row["chosen"]["ids"] != other["chosen"]["ids"]:
            raise ValueError(f"row {row['id']}: the chosen responses differ")
    return [others[i] if i % 2 else row for i, row in enumerate(rows)]


def joined(folders: list[list[dict]]) -> list[dict]:
    """All rows, their ids made unique by the number of the folder."""
    return [row | dict(id=f"{row['id']}-{number}") for number, rows in enumerate(folders) for row in rows]


VARIANTS = {
    "swapped": lambda folder: swapped(read_rows(folder)),
    "larger-half": lambda folder: larger_half(read_rows(folder), context_gains(read_rows(folder))),
    "smaller-half": lambda folder: smaller_half(read_rows(folder), context_gains(read_rows(folder))),
    "answering-half": lambda folder: larger_half(read_rows(folder), prompt_gains(folder)),
    "mixed": lambda folder, other: mixed(read_rows(folder), read_rows(other)),
    "joined": lambda *folders: joined([read_rows(folder) for folder in folders]),
}


def make_variant(name: str, sources: list[Path], target: Path) -> None:
    """Write a folder of pairs; pairs.json comes last, and is the first source's but for their number."""
    target.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in VARIANTS[name](*sources)]
    (target / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    meta = json.loads((sources[0] / "pairs.json").read_text(encoding="utf-8"))
    meta["statistics"]["pairs"] = len(lines)
    write_json(target / "pairs.json", meta)


if __name__ == "__main__":
    name, *folders = sys.argv[1:]
    *sources, target = map(Path, folders)
    make_variant(name, sources, target)
