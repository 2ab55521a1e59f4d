"""Numbers of the results in README.md, docs.md and results/LOG.md again, from the files beside this one.

    python results/recompute.py

prints a line a number: OK, DIFFERENT (with what the file says), or NO FILE where no file holds it. A sentence
that is not there any more is NOT CLAIMED. Exit code 1 where a number is different.

Intervals are those of the files; before 2026-11-25 they were bootstrapped over prompts alone.
"""

import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checks import verify
from data import load_demo
from measures import DIFFERENCE, interval, mean_of, with_interval
from run import read_json, read_jsonl

RESULTS = Path(__file__).resolve().parent

NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?"
TINY = "demo-tiny/seed{}/eval.json"
HEADLINE, DEMO = "headline-smollm2/eval.json", "demo-smollm2/eval.json"  # README.md's, and the one before it
FIRST_TINY = "demo-tiny-2026-11-21/seed{}/eval.json"
RATES = "rates-smollm2/lr-{}/seed0/eval-validation.json"
VALIDATION = "demo-smollm2/validation/{}.json"
METHODS = "methods-smollm2-gpu/{}/seed{}/eval.json"
FIRST_METHODS = "methods-smollm2-gpu-2026-11-26/{}/seed0/eval.json"
FIRST_MEMORIES = "persistbench-methods-smollm2-cpu/{}/seed0/eval.json"
A_TOKEN = "context_gain_per_token_macro"
THIRD = "methods-smollm2-cpu/{}/seed2/eval.json"
NEGATIVES = "negatives-tiny/random-{}/seed{}/eval.json"
SETTINGS = "settings-tiny/{}/seed0/eval-validation.json"
CPU_METHODS = "methods-smollm2-fp32/{}/seed0/eval.json"
TASKS = {"SVAMP": "tasks-smollm2/svamp/eval.json", "GSM8K": "tasks-smollm2/gsm8k/eval.json"}
PERSIST, JUDGED = "persistbench-smollm2/eval.json", "tasks-smollm2/persist/eval.json"


def numbers(text: str) -> list[str]:
    """The numbers in a text, in their order: "64.8 [60.9, 68.6]" holds three."""
    return [found.rstrip(",").replace(",", "") for found in re.findall(NUMBER, text)]


# -------------------------------------------------------------------------------- what the files say

def part(file: str, name: str = "all") -> dict:
    """The systems and differences of one part of an eval.json."""
    return read_json(RESULTS / file)["parts"][name]


def gain(file: str, name: str = "all", key: str = "win_rate") -> dict:
    """By how much the trained system is above the one before it."""
    return list(part(file, name)["differences"].values())[-1][key]


def points(file: str, name: str = "all", key: str = "win_rate") -> list[str]:
    """A difference of rates in points, and its interval."""
    return numbers(with_interval(gain(file, name, key), "+.1f", 100))


def over_contexts(file: str, name: str, system: str) -> dict:
    """A system's rate less prompting's, with the interval over contexts, from each context's rates.

    Every row of a context is given the context's mean: rows of one context are left out together, so that
    nothing but the means and the numbers of rows enters.
    """
    contexts = [c for c in read_json(RESULTS / file)["contexts"] if name in ("all", c["group"])]
    rows = [c["n"] for c in contexts]
    differences = np.repeat([c[system] - c["prompted"] for c in contexts], rows)
    return interval(differences, np.repeat(np.arange(len(contexts)), rows).tolist())


def pair(file: str, key: str, form: str, scale: float = 1,
         systems: tuple = ("default", "trained")) -> list[str]:
    """A measurement of two systems."""
    rows = part(file)["systems"]
    return [format(scale * mean_of(rows[system], key), form) for system in systems]


def rates(file: str, name: str = "all", systems: tuple = ("prompted", "trained")) -> list[str]:
    """The win rates of two systems, in percent."""
    return [f"{100 * part(file, name)['systems'][system]['win_rate']['mean']:.1f}" for system in systems]


def seconds(file: str, key: str = "seconds") -> str:
    """How long the training beside an eval.json took, or a part of it."""
    path = RESULTS / file
    return f"{read_json(path.with_name(path.name.replace('eval', 'summary')))[key]:.0f}"


def replies() -> list[str]:
    """How many replies the judge gave, and how many held a number.

    Of `prompted` none did, and every system was asked the same number of questions.
    """
    unread = read_json(RESULTS / JUDGED)["judges"]["SmolLM2-135M-Instruct"]["unread"]
    asked = 3 * unread["prompted"]
    return [str(asked), str(asked - sum(unread.values()))]


def headline_rows() -> tuple[dict[str, dict[str, str]], dict]:
    """The headline's responses, id -> system -> text, and its examples by id."""
    answers: dict[str, dict[str, str]] = {}
    for _, row in read_jsonl(RESULTS / HEADLINE.replace("eval.json", "responses.jsonl")):
        answers.setdefault(row["id"], {})[row["system"]] = row["response"]
    return answers, {example.id: example for example in load_demo(0)}


def apologies() -> list[str]:
    """Of the headline: the share of prompting's and of the trained responses that apologise; the two win
    rates in rows where prompting does, and in all others, there with their difference."""
    answers, examples = headline_rows()
    systems = "prompted", "trained"
    sorry = {system: {i for i, texts in answers.items() if texts[system].lstrip().startswith("I'm sorry")}
             for system in systems}
    found = [f"{100 * len(sorry[system]) / len(answers):.0f}" for system in systems]
    for rows in (sorry["prompted"], [i for i in answers if i not in sorry["prompted"]]):
        prompted, trained = (np.array([verify(examples[i], answers[i][system]) for i in rows], float)
                             for system in systems)
        found += [f"{100 * prompted.mean():.0f}", f"{100 * trained.mean():.0f}"]
    difference = interval(trained - prompted, [examples[i].prompt for i in rows],
                          [examples[i].context for i in rows], DIFFERENCE)
    return found + numbers(with_interval(difference, "+.1f", 100))


# "As a teacher, I'm ...": an answer that speaks as the user.
AS_THE_USER = re.compile(r"\s*As an? [\w ]{2,30}, (I|my)\b")


def as_the_user() -> tuple[str, list[str]]:
    """Of the headline: the share of trained responses that take the user's role for the model's own, in
    percent; the gain on seen contexts if none of these counted as honoured."""
    rows, examples = headline_rows()
    speaks = {system: {i for i, texts in rows.items() if AS_THE_USER.match(texts[system])}
              for system in ("prompted", "trained")}
    seen = [i for i in rows if examples[i].group == "seen"]
    prompted, trained = (np.array([verify(examples[i], rows[i][system]) and i not in speaks[system]
                                   for i in seen], float) for system in speaks)
    difference = interval(trained - prompted, [examples[i].prompt for i in seen],
                          [examples[i].context for i in seen], DIFFERENCE)
    return f"{100 * len(speaks['trained']) / len(rows):.0f}", numbers(with_interval(difference, "+.1f", 100))


def above(file: str, other: str) -> list[str]:
    """By how many points one trained model's win rate is above another's on the same rows, with the interval
    over contexts, from each context's rates."""
    ours, theirs = (read_json(RESULTS / name)["contexts"] for name in (file, other))
    if [(c["context_id"], c["n"]) for c in ours] != [(c["context_id"], c["n"]) for c in theirs]:
        raise ValueError(f"{file} and {other} are not of the same rows")
    counts = [c["n"] for c in ours]
    differences = [a["trained"] - b["trained"] for a, b in zip(ours, theirs, strict=True)]
    measured = interval(np.repeat(differences, counts), np.repeat(np.arange(len(counts)), counts).tolist())
    return numbers(with_interval(measured, "+.1f", 100))


def hours() -> list[str]:
    """What the stored runs took, training and evaluation: of SmolLM2 and of the embedded model on CPUs, and
    of programs that shared a GPU."""
    took = dict.fromkeys(("SmolLM2", "tiny", "GPU"), 0.0)
    for file in RESULTS.rglob("args.json"):
        written = read_json(file)
        model = "tiny" if Path(written["arguments"]["model"]).name == "tiny" else "SmolLM2"
        place = "GPU" if "NVIDIA" in written.get("environment", {}).get("device", "") else model
        for name in ("summary.json", "eval.json", "eval-validation.json"):
            if file.with_name(name).exists():
                took[place] += read_json(file.with_name(name))["seconds"] / 3600
    return [f"{took['SmolLM2']:.0f}", f"{took['tiny']:.0f}", f"{took['GPU']:.1f}"]


def own_task(row: str) -> list[str]:
    """By how many points more answers to questions of our own are right, strictly counted, seed by seed."""
    measured = [read_json(RESULTS / f"own-task-smollm2/{row}/seed{seed}/own-task.json") for seed in range(3)]
    return [text for result in measured
            for text in numbers(with_interval(result["all"]["difference"], "+.1f", 100))]


def first_own_task(row: str) -> list[str]:
    """Of the run on a CPU: shares of right answers, strictly counted, and their difference."""
    result = read_json(RESULTS / f"own-task-smollm2-cpu/{row}/seed0/own-task.json")["all"]
    return [f"{100 * result[system]['mean']:.1f}" for system in ("default", "trained")] + numbers(
        with_interval(result["difference"], "+.1f", 100))


def seed_by_seed(row: str, other: str = "mipo-random", seeds: int = 3) -> list[str]:
    """By how many points a row of the table on a GPU is above another, with the first seeds."""
    return [text for seed in range(seeds)
            for text in above(METHODS.format(row, seed), METHODS.format(other, seed))]


def over_prompting(row: str, name: str = "all", key: str = "win_rate", seeds: int = 3) -> list[str]:
    """What a row of the table on a GPU gains, with the first seeds."""
    return [text for seed in range(seeds) for text in points(METHODS.format(row, seed), name, key)]


def fall(key: str) -> list[str]:
    """By how much a measurement of the headline falls, with its interval."""
    d = gain(HEADLINE, key=key)
    return [f"{-d[end]:.3f}" for end in ("mean", "high", "low")]


# -------------------------------------------------------------------------------- tables

COLUMNS = {  # heading -> key, scale, format
    "win rate %": ("win_rate", 100, ".1f"), "strict": ("win_rate", 100, ".1f"),
    "flexible": ("flexible", 100, ".1f"), "unparsed": ("unparsed", 100, ".0f"),
    "context gain, nats": ("context_gain", 1, ".1f"), "tokens": ("tokens", 1, ".0f"),
    "unfinished": ("unfinished", 100, ".0f"), "base NLL": ("nll_per_token", 1, ".2f"),
    "distinct-2": ("distinct_2", 1, ".2f"), "self-BLEU-4": ("self_bleu_4", 1, ".2f"),
    "off target": ("off_target", 100, ".1f"), "elsewhere": ("off_target", 100, ".1f"),
    "prompt gain": ("prompt_gain", 1, ".1f"),
}


# Rows of the log's table of 2026-11-27: its names, and those of the table on a GPU.
COMPARED = {
    "InfoNCE": "infonce", "RLAIF-MI": "rlaif-mi", "PPO on mutual information": "ppo-mi",
    "MIPO, missing contexts": "mipo-missing", "MIPO, reshuffled responses": "mipo-reshuffle",
    "the half with the larger context gain": "larger-half",
    "the half with the smaller context gain": "smaller-half",
    "RLAIF": "rlaif", "RLVR": "rlvr", "SAMI": "sami", "SFT": "sft", "sides swapped": "swapped",
    "two samples of one prompt": "same", "revision": "sft-revise",
}


def source(document: str, name: str, above: str) -> tuple[str, str, str] | None:
    """The file, part and system of a table's row; above: the file of the row before it."""
    head, _, tail = name.partition(", ")
    if head in TASKS:
        return TASKS[head], "all", "trained" if tail == "trained" else "default"
    if head in ("all", "seen", "unseen") and tail:
        return HEADLINE if document == "README.md" else DEMO, head, tail
    if head == "SmolLM2":
        return RATES.format(tail.removeprefix("lr ")), "all", "trained"
    if re.fullmatch(r"seed\d", name):
        return TINY.format(name[4:]), "all", "trained"
    if head == "prompting":
        return above, "all", "prompted"
    for file in (VALIDATION.format(name), f"methods-smollm2/{name}/seed0/eval.json"):
        if (RESULTS / file).exists():
            return file, "all", "trained"
    return None


def expected(heading: str, file: str, name: str, system: str) -> list[str]:
    """What the files say of one cell; empty: nothing."""
    block = part(file, name)
    row = block["systems"][system]
    if heading == "n":
        return [str(row["win_rate"]["n"])]
    if heading == "over prompting":
        return points(file, name) if system == "trained" else []
    key, scale, form = COLUMNS[heading]
    if isinstance(row.get(key), dict):
        return numbers(with_interval(row[key], form, scale))
    return [] if row.get(key) is None else [format(scale * row[key], form)]


def check_tables(document: str, text: str) -> list[tuple]:
    """(where, claimed, expected) of every number in the document's tables of results."""
    found, headings, above = [], [], ""
    for number, line in enumerate(text.splitlines(), 1):
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells or not headings:
            headings = cells
            continue
        # The tables with "seeds" are check_methods's.
        row = source(document, cells[0], above) if "seeds" not in headings else None
        if row is None:
            continue
        above = row[0]
        for heading, cell in list(zip(headings, cells, strict=True))[1:]:
            claimed = numbers(cell)
            values = expected(heading, *row) + [None] * len(claimed)  # None: no file has this number
            where = f"{document}:{number} {cells[0]}: {heading}"
            found += [(where, *both) for both in zip(claimed, values, strict=False)]
    return found


# -------------------------------------------------------------------------------- sentences

def rows_of(table: str) -> dict[str, dict[str, str]]:
    """Row -> heading -> cell of the table of methods that the committed report.md begins with."""
    text = (RESULTS / table / "report.md").read_text(encoding="utf-8")
    lines = next(block for block in text.split("\n\n") if block.startswith("|")).splitlines()
    headings, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(headings, row, strict=True)) for row in rows}


def check_methods(document: str, text: str) -> list[tuple]:
    """(where, claimed, expected) of every cell of docs.md's table of methods on a real model."""
    found, headings, methods = [], [], rows_of("methods-smollm2-gpu")
    for number, line in enumerate(text.splitlines(), 1):
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        headings = headings if headings and cells else cells
        if "seeds" not in headings or cells == headings or set(line) <= set("|-"):
            continue
        row = methods[re.split(r", | \(", cells[0])[0]]
        for heading, cell in list(zip(headings, cells, strict=True))[1:]:
            found.append((f"{document}:{number} {cells[0]}: {heading}", cell, row[heading]))
    return found


def claims() -> list[tuple[str, list[str]]]:
    """(A sentence with {} for its numbers, the numbers)."""
    tiny = [TINY.format(seed) for seed in range(3)]
    seen, unseen = ([points(file, name)[0] for file in tiny] for name in ("seen", "unseen"))
    first_tiny = [FIRST_TINY.format(seed) for seed in range(3)]
    first_seen, first_unseen = ([points(file, name)[0] for file in first_tiny] for name in ("seen", "unseen"))
    every = [text for file in tiny for text in points(file)]
    unseen_intervals = [points(file, "unseen") for file in tiny]
    svamp, gsm8k = TASKS.values()
    methods, memory = rows_of("methods-smollm2-gpu"), rows_of("persistbench-methods-smollm2")
    contexts = [text for name in ("all", "seen", "unseen")
                for text in numbers(with_interval(over_contexts(DEMO, name, "trained"), "+.1f", 100))]
    memories = [text for key, form, scale in (
        ("tokens", ".0f", 1), ("unfinished", ".0f", 100), ("nll_per_token", ".2f", 1),
        ("distinct_2", ".2f", 1), ("self_bleu_4", ".2f", 1), ("prompt_gain", ".0f", 1),
    ) for text in pair(PERSIST, key, form, scale, ("prompted", "trained"))]
    return [
        ("Stored runs took about {} hours of one or two CPU cores on SmolLM2, {} on the embedded model, and "
         "{} in programs of which", hours()),
        ("{} points [{}, {}] on contexts seen in training ({}% to {}%)",
         points(HEADLINE, "seen") + rates(HEADLINE, "seen")),
        ("{} [{}, {}] on unseen ones ({}% to {}%)",
         points(HEADLINE, "unseen") + rates(HEADLINE, "unseen")),
        ("`torchrun train.py --seed S` gains {} [{}, {}], {} [{}, {}] and {} [{}, {}] points over", every),
        ("unseen contexts alone {}, {} and {}, with", unseen),
        ("where {}% of prompting's and {}% of the trained ones are cut off",
         pair(HEADLINE, "unfinished", ".0f", 100, ("prompted", "trained"))),
        ("Prompting apologises (\"I'm sorry\") in {}% of the rows, the trained model in {}%. Where prompting "
         "does, the win rate rises from {}% to {}%, elsewhere from {}% to {}% ({} points [{}, {}])",
         apologies()),
        ("Context gain rises by {} nats [{}, {}] a response; its mean per token, by {} [{}, {}]",
         numbers(with_interval(gain(HEADLINE, key="context_gain"), "+.1f"))
         + numbers(with_interval(gain(HEADLINE, key="context_gain_per_token_macro"), "+.2f"))),
        ("falls by {} [{}, {}], from {} [{}, {}] to {} [{}, {}].",
         fall("self_bleu_4") + [
             text for system in ("prompted", "trained")
             for text in numbers(with_interval(part(HEADLINE)["systems"][system]["self_bleu_4"], ".3f"))]),
        ("{}% take the user's job for the model's own (\"As a teacher, I'm ...\"), which the program counts "
         "as honoured. If such answers, of both systems, count as failures, the gain on seen contexts is {} "
         "[{}, {}].",
         [as_the_user()[0], *as_the_user()[1]]),
        ("with random contexts {} [{}, {}] points above PPO on mutual information",
         above(FIRST_METHODS.format("mipo-random"), FIRST_METHODS.format("ppo-mi"))),
        ("Paired over contexts: the larger half {} [{}, {}] above 300 pairs at random, 5e-4 {} [{}, {}], a "
         "second pass {} [{}, {}] and a second round {} [{}, {}] above the default, 300 pairs {} [{}, {}].",
         [text for row, other in (("larger-half", "pairs-300"), ("lr-5e-4", "defaults"),
                                  ("two-epochs", "defaults"), ("two-rounds", "defaults"),
                                  ("pairs-300", "defaults"))
          for text in above(SETTINGS.format(row), SETTINGS.format(other))]),
        ("Among a prompt's contexts self-BLEU-4 falls by {} [{}, {}]", fall("self_bleu_4_within")),
        ("{}% are cut off at 96 tokens (prompting {}%)",
         pair(HEADLINE, "unfinished", ".0f", 100, ("trained", "prompted"))),
        ("1e-6 gains nothing on validation prompts ({} points [{}, {}]), 3e-6 little ({} [{}, {}]), 1e-5 {} "
         "[{}, {}] and 3e-5 "
         "{} [{}, {}]", [text for rate in ("1e-6", "3e-6", "1e-5", "3e-5")
                         for text in points(RATES.format(rate))]),
        ("the rise on seen contexts is {} points [{}, {}]",
         points(HEADLINE, "seen", "win_rate_length_matched")),
        *((f"| {name} | {{}} ± {{}} | " + ", ".join(["{} [{}, {}]"] * 3) + " |",
           numbers(methods[row]["gain, points"]) + seed_by_seed(row)) for name, row in COMPARED.items()),
        ("gains {} ± {} points (mean ± standard deviation of three seeds), each seed clear of 0; on "
         "unseen contexts alone {} ± {}, clear", [text for column in ("gain, points", "on unseen")
                                                  for text in numbers(methods["mipo-random"][column])]),
        ("({} ± {} and {} ± {}), nor does **SFT** on the same chosen responses ({} ± {}). **Revision** "
         "harms, {} ± {}.", [text for row in ("same", "swapped", "sft", "sft-revise")
                      for text in numbers(methods[row]["gain, points"])]),
        ("on the same pairs, gains {} ± {} and is not told apart from MIPO: {} [{}, {}], {} [{}, {}] and "
         "{} [{}, {}] points",
         numbers(methods["infonce"]["gain, points"]) + seed_by_seed("infonce")),
        ("(base NLL {} ± {}, MIPO {} ± {}, prompting {} ± {};",
         [text for row in ("infonce", "mipo-random", "the baseline")
          for text in numbers(methods[row]["base NLL"])]),
        ("**SAMI** gains {} ± {}, less than MIPO, clearly with two seeds of three: {} [{}, {}], {} [{}, {}] "
         "and {} [{}, {}]. {}% of its answers are cut off, prompting's {}%.",
         numbers(methods["sami"]["gain, points"]) + seed_by_seed("sami")
         + [numbers(methods[row]["unfinished, %"])[0] for row in ("sami", "the baseline")]),
        ("prompt gain {}, {} and {} nats a response, prompting's {}; PPO's have {} and {} tokens.",
         [numbers(methods[row]["prompt gain"])[0]
          for row in ("mipo-missing", "ppo-mi", "rlaif-mi", "the baseline")]
         + [numbers(methods[row]["tokens"])[0] for row in ("ppo-mi", "rlaif-mi")]),
        ("By win rate, {} ± {}, {} ± {} and {} ± {}, no seed",
         [text for row in ("mipo-missing", "ppo-mi", "rlaif-mi")
          for text in numbers(methods[row]["gain, points"])]),
        ("three more runs, on a GPU, {} ± {} on both", numbers(methods["mipo-random"]["gain, points"])),
        ("the half with the larger one gains {} ± {} points, the other half {} ± {}",
         [text for row in ("larger-half", "smaller-half") for text in numbers(methods[row]["gain, points"])]),
        ("**RLAIF and RLVR** gain {} ± {} and {} ± {}:",
         [text for row in ("rlaif", "rlvr") for text in numbers(methods[row]["gain, points"])]),
        ("(600 pairs, three seeds, paired: {} [{}, {}], {} [{}, {}] and {} points [{}, {}];",
         seed_by_seed("mipo-missing")),
        ("on SmolLM2 {} [{}, {}] and {} [{}, {}], 25", over_prompting("mipo-noise", seeds=2)),
        ("over one, three rows gain {} [{}, {}] and {} points [{}, {}] (two seeds), three in one softmax {} "
         "[{}, {}] (one)", seed_by_seed("random-3", seeds=2) + seed_by_seed("random-3-softmax", seeds=1)),
        ("it gains {} [{}, {}], {} [{}, {}] and {} [{}, {}]. **SAMI**",
         over_prompting("mipo-random", "unseen")),
        ("about equally long it gains {} [{}, {}], {} [{}, {}] and {} [{}, {}]. **Which",
         over_prompting("sami", key="win_rate_length_matched")),
        ("`larger-half` less `smaller-half`, paired over contexts, {} [{}, {}], {} [{}, {}] and {} [{}, {}]",
         seed_by_seed("larger-half", "smaller-half")),
        ("gain less than random contexts with every seed ({} [{}, {}], {} [{}, {}], {} [{}, {}])",
         seed_by_seed("mipo-reshuffle")),
        ("and differ by {} [{}, {}], {} [{}, {}] and {} points [{}, {}]", seed_by_seed("rlvr", "rlaif")),
        ("MIPO gains {} there (on the H100 {}), InfoNCE {} ({}), missing contexts {} ({}), SAMI {} ({}), SFT "
         "{} ({}); three rows of random contexts {}, one softmax over them {}.",
         [points(file)[0] for row in ("mipo-random", "infonce", "mipo-missing", "sami", "sft")
          for file in (THIRD.format(row), METHODS.format(row, 2))]
         + [points(THIRD.format(row))[0] for row in ("random-3", "random-3-softmax")]),
        ("most for `ppo-mi`: {} (seed 0, now {}).",
         [points(FIRST_METHODS.format("ppo-mi"))[0], points(METHODS.format("ppo-mi", 0))[0]]),
        ("certain either: {} [{}, {}], {} [{}, {}] and {} points [{}, {}] with three seeds,",
         own_task("mipo-random")),
        ("clearly worse with another: {} [{}, {}], {} [{}, {}] and {} [{}, {}].", own_task("rlvr")),
        ("eval.py alone counts {}, {} and {} for MIPO",
         [points(f"own-task-smollm2/mipo-random/seed{seed}/eval.json")[0] for seed in range(3)]),
        ("still gains {} ± {}, the larger one {} ± {}, all pairs {} ± {} (three",
         [text for row in ("smaller-half", "larger-half", "mipo-random")
          for text in numbers(methods[row]["gain, points"])]),
        ("MIPO's gain with seed 0 is {} [{}, {}].", numbers(with_interval(gain(
            "persistbench-methods-smollm2/mipo-random/seed0/eval.json", key="context_gain"), "+.1f"))),
        ("MIPO {} [{}, {}], {} [{}, {}], {} [{}, {}]; RLVR {} [{}, {}], {} [{}, {}], {} [{}, {}]; SFT {} "
         "[{}, {}], {} [{}, {}], {} [{}, {}].",
         [text for row in ("mipo-random", "rlvr", "sft") for text in own_task(row)]),
        ("raises the context gain by {} ± {} nats a response, {} ± {} a token, InfoNCE by {} ± {}, SAMI by "
         "{} ± {}; SFT by {} ± {}, revision by {} ± {}; MIPO with missing contexts by {} ± {}",
         numbers(memory["mipo-random"]["over the baseline's"])
         + numbers(memory["mipo-random"]["the same a token"])
         + [text for row in ("infonce", "sami", "sft", "sft-revise", "mipo-missing")
            for text in numbers(memory[row]["over the baseline's"])]),
        ("1, 3, 5 and 10 gain {} ± {}, {} ± {}, {} ± {} and {} ± {} points, in N times the steps; in "
         "one softmax, without more steps, 3, 5 and 10 gain {} ± {}, {} ± {} and {} ± {}",
         [text for count in ("1", "3", "5", "10", "3-softmax", "5-softmax", "10-softmax")
          for text in numbers(rows_of("negatives-tiny")[f"random-{count}"]["gain, points"])]),
        ("seed by seed: three rows {} [{}, {}], {} [{}, {}], {} [{}, {}]; ten in one softmax {} [{}, {}], {} "
         "[{}, {}], {} [{}, {}]",
         [text for row in ("3", "10-softmax") for seed in range(3)
          for text in above(NEGATIVES.format(row, seed), NEGATIVES.format("1", seed))]),
        *((f"| {name} | {{}} [{{}}, {{}}] | {{}} [{{}}, {{}}] |",
           points(THIRD.format(row)) + above(THIRD.format(row), THIRD.format("mipo-random")))
          for name, row in {
              "missing contexts": "mipo-missing", "three, as rows of their own (Eq. 5)": "random-3",
              "three, in one softmax (Eq. 8)": "random-3-softmax", "SFT on the chosen responses": "sft",
              "SAMI on the same pairs": "sami"}.items()),
        ("MIPO less InfoNCE {} points [{}, {}], paired over contexts",
         above(THIRD.format("mipo-random"), THIRD.format("infonce"))),
        ("1,200 pairs gain {} [{}, {}] points at base NLL {}, 2,400 gain **{} [{}, {}]** at {},",
         [text for row in ("pairs-1200", "pairs-2400") for text in (
             *points(SETTINGS.format(row)),
             *pair(SETTINGS.format(row), "nll_per_token", ".2f", 1, ("trained",)))]),
        ("contexts 1,200 are {} [{}, {}] and 2,400 {} [{}, {}] above 600.",
         [text for row in ("pairs-1200", "pairs-2400")
          for text in above(SETTINGS.format(row), SETTINGS.format("defaults"))]),
        ("1,200 pairs are {} [{}, {}] above them",
         above(SETTINGS.format("pairs-1200"), SETTINGS.format("two-epochs"))),
        ("1,200 and 2,400 give {}, {}, {}, {}, {} and {} points, at base NLL",
         [points(SETTINGS.format(row))[0] for row in ("pairs-75", "pairs-150", "pairs-300", "defaults",
                                                      "pairs-1200", "pairs-2400")]),
        ("MIPO **{} [{}, {}]** points, seen {} [{}, {}], unseen {} [{}, {}];",
         [text for name in ("all", "seen", "unseen") for text in points(THIRD.format("mipo-random"), name)]),
        ("InfoNCE on the same pairs **{} [{}, {}]**", points(THIRD.format("infonce"))),
        ("validation; prompting {} nats): random contexts {}, missing contexts {}, half of each {}, missing "
         "contexts with the half of the pairs of larger prompt gain {}, and sampled at temperature 0.5, {}.",
         [numbers(rows_of("missing-smollm2")[row]["prompt gain"])[0]
          for row in ("the baseline", "random", "missing", "mixed", "answering-half",
                      "missing-temperature-0.5")]),
        ("named, {}% to {}%, **{} [{}, {}]**;", first_own_task("mipo-random")),
        ("by the stricter count {}% to {}%, **{} [{}, {}]**", first_own_task("rlvr")),
        ("(`--method sami`): **{} [{}, {}]**", points(CPU_METHODS.format("sami"))),
        ("where both answers are about equally long it is {} [{}, {}]",
         points(CPU_METHODS.format("sami"), key="win_rate_length_matched")),
        ("MIPO **{} [{}, {}]** nats a response and {} [{}, {}] a token (an earlier run {} [{}, {}]), InfoNCE "
         "**{} [{}, {}]** and {} [{}, {}], SFT {} [{}, {}] and {} [{}, {}].",
         [text for row in ("mipo-random", "infonce", "sft") for text in (
             *numbers(with_interval(gain(FIRST_MEMORIES.format(row), key="context_gain"), "+.1f")),
             *numbers(with_interval(gain(FIRST_MEMORIES.format(row), key=A_TOKEN), "+.2f")),
             *(numbers(with_interval(gain(JUDGED, key="context_gain_per_token"), "+.2f"))
               if row == "mipo-random" else []))]),
        ("(SVAMP {}% to {}%, n = {}, p {}; GSM8K {}% to {}%, n = {}): a",
         [*rates(svamp, systems=("default", "trained")), str(gain(svamp)["n"]),
          f"{gain(svamp, key='mcnemar_p'):.2f}", *rates(gsm8k, systems=("default", "trained")),
          str(gain(gsm8k)["n"])]),
        ("only {} of its {} replies contained a number", replies()[::-1]),
        ("Over contexts (t intervals of the contexts' rates): all {} [{}, {}], seen {} [{}, {}], unseen {} "
         "[{}, {}].", contexts),
        ("(prompt gain {} to {} nats, {} to {}), but are as wrong.",
         pair(svamp, "prompt_gain", ".0f") + pair(gsm8k, "prompt_gain", ".0f")),
        ("(differences SVAMP {} [{}, {}], McNemar p {}, GSM8K {}, p {})",
         [*points(svamp), f"{gain(svamp, key='mcnemar_p'):.2f}", f"{100 * gain(gsm8k)['mean']:.1f}",
          f"{gain(gsm8k, key='mcnemar_p'):.0f}"]),
        ("from {} to {} nats on SVAMP and from {} to {} on GSM8K, and self-BLEU-4 falls from {} to {} and "
         "from {} to {}", pair(svamp, "prompt_gain", ".1f") + pair(gsm8k, "prompt_gain", ".1f")
         + pair(svamp, "self_bleu_4", ".2f") + pair(gsm8k, "self_bleu_4", ".2f")),
        ("context gain {} [{}, {}] nats over prompting",
         numbers(with_interval(gain(JUDGED, key="context_gain"), "+.1f"))),
        ("per token {} [{}, {}] in the later run",
         numbers(with_interval(gain(JUDGED, key="context_gain_per_token"), "+.2f"))),
        ("of {} replies {} hold a number", replies()),
        ("SVAMP {} for 120 pairs of about 1,230 tokens and {} to evaluate, GSM8K {} for 60 and {}, "
         "PersistBench {} and {}.", [text for file in (svamp, gsm8k, JUDGED)
                        for text in (seconds(file), f"{read_json(RESULTS / file)['seconds']:.0f}")]),
        ("(`demo-tiny/`): seed 0 {} [{}, {}], seed 1 {} [{}, {}], seed 2 {} [{}, {}]", every),
        ("seen contexts {}, {}, {}; unseen {} [{}, {}], {} [{}, {}], {} [{}, {}]:",
         seen + [text for interval in unseen_intervals for text in interval]),
        ("(`demo-tiny-2026-11-21/`): seed 0 {} [{}, {}], seed 1 {} [{}, {}], seed 2 {} [{}, {}]",
         [text for file in first_tiny for text in points(file)]),
        ("seen contexts {}, {}, {}; unseen {}, {}, {}.", first_seen + first_unseen),
        ("an earlier run of the same command, before sampling and training were made faster: {})",
         [numbers(with_interval(gain(PERSIST, key="context_gain"), "+.1f"))[0]]),
        ("prompting {} [{}, {}], trained {} [{}, {}]; paired difference **{} [{}, {}]**, "
         "per token {} [{}, {}]",
         [text for row in (*(part(PERSIST)["systems"][system]["context_gain"]
                             for system in ("prompted", "trained")), gain(PERSIST, key="context_gain"))
          for text in numbers(with_interval(row, "+.1f"))]
         + numbers(with_interval(gain(PERSIST, key="context_gain_per_token"), "+.2f"))),
        ("tokens {} to {} (of 128 at most: {}% and {}% are cut), base NLL {} to {}, distinct-2 {} to {}, "
         "self-BLEU-4 {} to {}, prompt gain {} to {}", memories),
        ("{} s = {} s for pairs (sampling {} s, context gain {} s), {} s for the reference, "
         "{} s for training",
         [seconds(DEMO), seconds(DEMO, "seconds_pairs"),
          *(f"{read_json(RESULTS / 'demo-smollm2/pairs.json')['statistics'][key]:.0f}"
            for key in ("seconds_sampling", "seconds_gain")),
          seconds(DEMO, "seconds_reference"), seconds(DEMO, "seconds_training")]),
    ]


def check_claims(texts: dict[str, str]) -> list[tuple]:
    """(where, claimed, expected) of every number of the sentences; claimed is None where one is nowhere."""
    found = []
    for sentence, values in claims():
        pattern = r"\s+".join(re.escape(word) for word in sentence.split()).replace(r"\{\}", f"({NUMBER})")
        matches = {name: match for name, text in texts.items() if (match := re.search(pattern, text))}
        if not matches:
            found.append((f"nowhere: {sentence}", None, None))
        for document, match in matches.items():
            where = f"{document}: {sentence}"
            claimed = [text.replace(",", "") for text in match.groups()]
            found += [(where, text, value) for text, value
                      in zip(claimed, values, strict=True)]
    return found


def check_responses() -> list[tuple]:
    """(where, win rate of eval.json, that of the responses by the demo's checks) of every run and system."""
    found = []
    for file, seed in ((HEADLINE, 0), *((TINY.format(seed), seed) for seed in range(3))):
        examples = {example.id: example for example in load_demo(seed)}
        wins: dict[str, list[bool]] = {}
        for _, row in read_jsonl(RESULTS / file.replace("eval.json", "responses.jsonl")):
            honoured = verify(examples[row["id"]], row["response"])
            wins.setdefault(row["system"], []).append(honoured)
        for system, honoured in wins.items():
            claimed = part(file)["systems"][system]["win_rate"]["mean"]
            rates = f"{100 * claimed:.2f}", f"{100 * sum(honoured) / len(honoured):.2f}"
            found.append((f"results/{file} {system}: win rate from {len(honoured)} responses", *rates))
    return found


def verdict(claimed: str | None, value: str | None) -> str:
    """The verdict; plus signs do not matter."""
    if claimed is None:
        return "NOT CLAIMED"
    if value is None:
        return "NO FILE"
    return "OK" if claimed.lstrip("+") == value.lstrip("+") else f"DIFFERENT: {value}"


if __name__ == "__main__":
    texts = {name: (RESULTS.parent / name).read_text(encoding="utf-8")
             for name in ("README.md", "docs.md", "results/LOG.md")}
    checked = [row for name, text in texts.items() for row in check_tables(name, text)]
    checked += check_methods("docs.md", texts["docs.md"])
    checked += check_claims(texts) + check_responses()
    verdicts = [verdict(claimed, value) for _, claimed, value in checked]
    for (where, claimed, _), says in zip(checked, verdicts, strict=True):
        print(f"{claimed or '-':>8}  {says:18}  {where}")
    different = sum(says.startswith("DIFFERENT") for says in verdicts)
    gone = verdicts.count("NOT CLAIMED")
    print(f"{len(checked)} numbers: {verdicts.count('OK')} OK, {different} different, "
          f"{verdicts.count('NO FILE')} without a file; {gone} sentences are not there")
    sys.exit(1 if different or gone else 0)
