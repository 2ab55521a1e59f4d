"""own_task.py - questions made by a program, of which a small model can solve some.

    python results/own_task.py runs/own-task.jsonl
    python train.py --data runs/own-task.jsonl --neg random --model MODEL ...
    python results/own_task.py --score runs/RUN            after eval.py: writes own-task.json there

    What is 7 + 5?          What is the opposite of hot?        Which of these is a fruit: hammer, apple, ...?

On the real math files a model of 135M parameters solves next to nothing, so neither a gain nor its absence
can be seen there. The parts share no category and no opposite, and no sum in the same order of its terms (21
of the 179 test sums stand in the training part the other way round).
eval.py takes an answer of words for given wherever a response says them, so a response that names all options
is right there. --score counts it only where none of three wrong answers is named.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from checks import says, verify
from data import Example
from measures import DIFFERENCE, RATE, interval, mcnemar, with_interval
from run import read_jsonl, write_json

CATEGORIES = {
    "train": {
        "fruit": "apple banana cherry grape lemon mango orange peach pear plum",
        "tool": "hammer saw drill wrench pliers chisel shovel screwdriver rake axe",
        "colour": "red blue green yellow purple brown white black pink grey",
        "country": "France Japan Brazil Egypt Canada India Kenya Norway Peru Spain",
        "musical instrument": "piano violin guitar drum flute trumpet cello harp organ clarinet",
        "piece of clothing": "shirt coat hat sock glove scarf skirt jacket sweater dress",
        "drink": "water milk tea coffee juice wine beer lemonade cocoa cider",
        "profession": "doctor teacher lawyer baker farmer nurse pilot plumber tailor judge",
    },
    "validation": {
        "vegetable": "carrot potato onion cabbage spinach pea bean turnip leek celery",
        "day of the week": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "metal": "iron gold silver copper tin lead zinc nickel steel aluminium",
        "planet": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune",
    },
    "test": {
        "animal": "dog cat horse cow lion tiger rabbit bear wolf elephant",
        "vehicle": "car bus train bicycle truck boat tram van scooter aeroplane",
        "part of the body": "hand foot nose ear knee elbow shoulder chin thumb ankle",
        "month of the year": "January February March April May June July August October December",
        "piece of furniture": "table chair bed sofa desk wardrobe shelf stool bench cupboard",
        "sport": "football tennis hockey rugby golf swimming boxing cricket volleyball rowing",
    },
}
OPPOSITES = {
    "train": "hot cold,big small,fast slow,open closed,happy sad,light dark,up down,early late,hard soft,"
             "wet dry,rich poor,old new",
    "validation": "high low,full empty,near far,loud quiet",
    "test": "strong weak,day night,left right,long short,clean dirty,thick thin,first last,true false",
}
SIZES = {"train": 600, "validation": 200, "test": 400}
PARTS = tuple(SIZES)


def question(part: str, rng: random.Random) -> tuple[str, str, list[str]]:
    """(question, right answer, three wrong ones) of one of the three kinds."""
    kind = rng.choice(("category", "sum", "opposite"))
    if kind == "category":
        members = {name: rng.choice(words.split()) for name, words in CATEGORIES[part].items()}
        category, *others = rng.sample(list(members), 4)
        right, wrong = members[category], [members[name] for name in others]
        words = rng.sample([right, *wrong], 4)
        return f"Which of these is a {category}: {', '.join(words[:3])} or {words[3]}?", right, wrong
    if kind == "sum":
        remainder = PARTS.index(part)  # a part's sums have a first term with this remainder modulo 3
        a, b = 3 * rng.randrange(1, 16) + remainder, rng.randrange(2, 50)
        errors = rng.sample((-10, -2, -1, 1, 2, 10), 3)
        return f"What is {a} + {b}?", str(a + b), [str(a + b + error) for error in errors]
    pairs = [pair.split() for pair in OPPOSITES[part].split(",")]
    (word, right), *others = rng.sample([rng.sample(pair, 2) for pair in pairs], 4)
    return f"What is the opposite of {word}?", right, [pair[0] for pair in others]


def questions(part: str) -> list[dict]:
    """The questions of a part, no two alike, each with its right answer and three wrong ones."""
    rng = random.Random(part)
    made: dict[str, dict] = {}
    while len(made) < SIZES[part]:
        text, right, wrong = question(part, rng)
        row = dict(id=f"{part}-{len(made)}", prompt=text, answer=right, split=part, wrong=wrong)
        made.setdefault(text, row)
    return list(made.values())


def write_task(file: Path) -> None:
    """One question a line, of all parts, in the form of a user's own data."""
    rows = [row for part in PARTS for row in questions(part)]
    for row in rows:
        del row["wrong"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def is_right(row: dict, response: str) -> bool:
    """Whether a response gives the right answer; of a choice of words, and none of the wrong ones."""
    example = Example(row["id"], row["prompt"], "test", answer=row["answer"])
    is_sum = row["answer"].isdigit()
    return verify(example, response) and (is_sum or not any(says(response, word) for word in row["wrong"]))


def score(run: Path) -> dict:
    """Shares of right responses before and after training, over all questions and those of each kind."""
    rows = {row["id"]: row for row in questions("test")}
    right: dict[str, dict[str, bool]] = {"default": {}, "trained": {}}
    for _, line in read_jsonl(run / "responses.jsonl"):
        right[line["system"]][line["id"]] = is_right(rows[line["id"]], line["response"])
    kinds = dict(all="", sum="+", category="Which of these", opposite="opposite")
    result = {}
    for kind, sign in kinds.items():
        ids = [id for id in right["trained"] if sign in rows[id]["prompt"]]
        before, after = (np.array([float(right[system][id]) for id in ids]) for system in right)
        result[kind] = dict(default=interval(before, ids, bounds=RATE),
                            trained=interval(after, ids, bounds=RATE),
                            difference=interval(after - before, ids, bounds=DIFFERENCE),
                            mcnemar_p=mcnemar(before, after))
    return result


if __name__ == "__main__":
    if sys.argv[1] == "--score":
        for folder in map(Path, sys.argv[2:]):
            measured = score(folder)
            write_json(folder / "own-task.json", measured)
            for kind, row in measured.items():
                print(f"{folder} {kind}: {with_interval(row['default'], '.1f', 100)}% to "
                      f"{with_interval(row['trained'], '.1f', 100)}%, difference "
                      f"{with_interval(row['difference'], '+.1f', 100)}, n = {row['default']['n']}")
    else:
        write_task(Path(sys.argv[1]))
