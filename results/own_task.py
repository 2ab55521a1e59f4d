"""own_task.py - questions made by a program, which a small model can half solve.

    python results/own_task.py runs/own-task.jsonl
    python train.py --data runs/own-task.jsonl --neg random --model MODEL ...

    What is 7 + 5?          What is the opposite of hot?        Which of these is a fruit: hammer, apple, ...?

On the real math files a model of 135M parameters solves next to nothing, so neither a gain nor its absence
can be seen there. The parts share no category, no sum and no opposite: what is measured is not remembered.
"""

import json
import random
import sys
from pathlib import Path

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
        remainder = PARTS.index(part)  # sums whose first term leaves this remainder by 3 belong to this part
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


if __name__ == "__main__":
    write_task(Path(sys.argv[1]))
