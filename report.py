"""report.py - the numbers of evaluations as tables: of one run, and of many.

    table         the summary that eval.py prints
    report        the paper's tables over runs and seeds, and all methods side by side

    python eval.py --report RUN RUN ...                                         report.md and report.png
    python eval.py --report results/methods-tiny --out results/methods-tiny     of all runs below a folder

What differs from the paper: its own figures stand beside ours, and so does what a gain costs.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from contexts import DataArgs, contexts_of, sampling_for
from figures import gain_key, methods_figure
from judge import PAPER
from measures import SYSTEMS, gaps, mean_of, with_interval
from run import fingerprint, read_json, write_atomic

# ------------------------------------------------------------------------- formatting

def cell(runs: list[dict], key: str, scale: float, form: str) -> str:
    """Mean ± standard deviation over seeds; of two both, as two have no deviation worth the name; of one run
    its interval, if it has one."""
    means = [mean_of(run, key) for run in runs]
    values = [scale * mean for mean in means if mean is not None]
    if not values:
        return "-"
    if len(values) == 2:
        return f"{values[0]:{form}}, {values[1]:{form}} (2 seeds)"
    if len(values) > 2:
        deviation = format(np.std(values, ddof=1), form.lstrip("+"))
        return f"{np.mean(values):{form}} ± {deviation} ({len(values)} seeds)"
    measurement = next(run[key] for run in runs if mean_of(run, key) is not None)
    return with_interval(measurement, form, scale) if isinstance(measurement, dict) else f"{values[0]:{form}}"


def markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# ------------------------------------------------------------------------- the printed table

QUALITY = (  # heading, key, format; shown where a system has it
    ("flexible", "flexible", ".1%"), ("last ####", "last_marker", ".1%"), ("unparsed", "unparsed", ".1%"),
    ("by MI", "choice_mi", ".1%"),
    ("score", "score", ".2f"), ("strict wins", "strict", ".1%"), ("ties", "ties", ".1%"),
    ("at equal len", "length_controlled", ".1%"), ("off target", "off_target", ".1%"),
    ("tokens", "tokens", ".1f"), ("unfinished", "unfinished", ".0%"), ("base nll", "nll_per_token", ".3f"),
    ("distinct-2", "distinct_2", ".3f"), ("self-BLEU-4", "self_bleu_4", ".3f"),
    (" in a prompt", "self_bleu_4_within", ".3f"), ("prompt gain", "prompt_gain", ".1f"),
)


def table(result: dict) -> str:
    """The printed summary: differences and systems of each part, what judges say, every context."""
    lines = []
    for part, block in result["parts"].items():
        lines += ["", "all rows" if part == "all" else f"{part} contexts"]
        lines += [difference_line(name, d) for name, d in reversed(block["differences"].items())]
        lines += system_lines(block["systems"])
        for system, row in block["systems"].items():
            if "entropy_right" in row:
                right, wrong = (with_interval(row[key], ".2f") for key in ("entropy_right", "entropy_wrong"))
                lines.append(f"{system}: entropy over the letters, nats: {right} if right, {wrong} if wrong")
        lines += gaps(block["systems"] | block["differences"])
    if result.get("pairs"):
        rate = with_interval(result["pairs"], ".1f", 100)
        lines += ["", f"pairs of the data: in {rate}% (n = {result['pairs']['n']}) training has raised the "
                  "chosen response's log-prob relative to the rejected one's"]
    for name, verdicts in result.get("judges", {}).items():
        lines += ["", *judge_lines(name, verdicts)]
    if result["contexts"]:
        lines += ["", "each context, share honoured"]
    for c in result["contexts"]:
        rates = "  ".join(f"{system} {c[system]:4.0%}" for system in SYSTEMS if system in c)
        lines.append(f"  {c['context_id']} {c['group']:6} {rates}  {c['context'][:90]}")
    return "\n".join(lines)


def system_lines(systems: dict) -> list[str]:
    """A heading, then a line a system: win rate, context gain, and the quality columns that the data have."""
    columns = [column for column in QUALITY
               if any(mean_of(row, column[1]) is not None for row in systems.values())]
    headings = " ".join(f"{heading:>12}" for heading, _, _ in columns)
    lines = [f"{'':12} {'n':>6} {'win rate %':>19} {'context gain, nats':>22} {headings}"]
    for system, row in systems.items():
        means = [(mean_of(row, key), form) for _, key, form in columns]
        quality = " ".join(f"{'-' if mean is None else format(mean, form):>12}" for mean, form in means)
        rate, gain = with_interval(row["win_rate"], ".1f", 100), with_interval(row["context_gain"], ".2f")
        lines.append(f"{system:12} {row['win_rate']['n']:>6} {rate:>19} {gain:>22} {quality}")
    return lines


def difference_line(name: str, d: dict) -> str:
    """One pair of systems in two lines: differences of win rate, score, context gain and self-BLEU."""
    matched = d["win_rate_length_matched"]
    rate, even = with_interval(d["win_rate"], "+.1f", 100), with_interval(matched, "+.1f", 100)
    gain = with_interval(d["context_gain"], "+.2f")
    per_token = with_interval(d["context_gain_per_token_macro"], "+.3f")
    across, within = (with_interval(d[key], "+.3f") for key in ("self_bleu_4", "self_bleu_4_within"))
    test = "" if d["mcnemar_p"] is None else f" (McNemar p {d['mcnemar_p']:.2g})"
    score = f"; score {with_interval(d['score'], '+.2f')}" if d["score"]["n"] else ""
    return (f"{name}: win rate {rate} (n = {d['win_rate']['n']}){test}, at matched length {even} "
            f"(n = {matched['n']}){score}\n    context gain {gain}, per token {per_token}; "
            f"self-BLEU-4 across prompts {across}, within a prompt {within}")


def judge_lines(name: str, verdicts: dict) -> list[str]:
    """What one judge left unread, its scores, how far it agrees with people, which system it prefers."""
    unread = ", ".join(f"{n} of {texts}" for texts, n in verdicts["unread"].items() if n) or "none"
    if verdicts.get("unread_reasons"):
        unread += f" ({'; '.join(f'{n} {why}' for why, n in verdicts['unread_reasons'].items())})"
    lines = [f"judge {name}: unread replies: {unread}"]
    if "items" in verdicts:
        lines[0] += "; systems are compared on the {shared} of {asked} items read for all".format(
            **verdicts["items"])
    for system, row in verdicts.get("systems", {}).items():
        rate, score = with_interval(row["win_rate"], ".1f", 100), with_interval(row["score"], ".2f")
        lines.append(f"  {system}: score {score}, at least the reference's in {rate}%")
    if "critic" in verdicts:
        strict, tolerant = (with_interval(verdicts["critic"][key], ".1f", 100)
                            for key in ("strict", "tie_tolerant"))
        lines.append(f"  agrees with people: strictly {strict}%, ties allowed {tolerant}%")
    if "pairwise" in verdicts:
        p = verdicts["pairwise"]
        level = "unknown (fewer than two read)"
        if p["length_controlled"] is not None:
            level = f"{p['length_controlled']:.1%}"
        counts = ", ".join(f"{p[key]} {key}" for key in ("wins", "ties", "losses", "unread"))
        flips = with_interval(p["flip_interval"], ".0f", 100)
        lines.append(f"  trained against prompted: {with_interval(p['win_rate'], '.1f', 100)}% ({counts}; "
                     f"{flips}% flip with the order), at equal length {level}")
    return lines


# ------------------------------------------------------------------------- the report over runs

COMPARED = (  # heading, key of a system's row, scale, format
    ("win rate, %", "win_rate", 100, ".1f"), ("gain, points", "gain", 100, "+.1f"),
    ("on seen contexts", "gain_seen", 100, "+.1f"), ("on unseen", "gain_unseen", 100, "+.1f"),
    ("KL, nats", "kl", 1, ".1f"), ("context gain, nats", "context_gain", 1, ".1f"),
    ("over the baseline's", "gain_context", 1, "+.1f"), ("the same a token", "gain_a_token", 1, "+.2f"),
    ("tokens", "tokens", 1, ".0f"), ("unfinished, %", "unfinished", 100, ".0f"),
    ("base NLL", "nll_per_token", 1, ".2f"), ("distinct-2", "distinct_2", 1, ".2f"),
    ("self-BLEU-4", "self_bleu_4", 1, ".2f"), ("prompt gain", "prompt_gain", 1, ".0f"),
    ("sampled, thousand tokens", "sampled_tokens", 1e-3, ".0f"),
    ("trained on, thousand tokens", "trained_tokens", 1e-3, ".0f"),
    ("processor, s", "processor_seconds", 1, ".0f"),
)
LEGEND = (
    "Mean ± standard deviation over seeds; of two, both; of one, its 95% interval; *: validation's choice; "
    "in parentheses at the end the paper's figure, where it has one; -: no run here measures that (eval.py "
    "says of each run why).\n\n"
    "In a table of methods, the best first; what no row has measured has no column. Gain: points over "
    "prompting, or in data without contexts over the base model. Clear: seeds whose interval of the gain (of "
    "the context gain over the baseline's, where nothing says what is right) is above 0. KL: from the start "
    "model, nats a response, by results/divergence.py. Base NLL: nats a token under the start model. Prompt "
    "gain: nats that a response owes to its question. Tokens that were sampled are those of a run's own "
    "pairs, tokens trained on those of all responses in the loss with their prompts (PPO: without), "
    "processor seconds train.py's, sampling included, and of a resumed run those since its last start.")

Rows = dict[str, dict[str, list[dict]]]  # a system's or strategy's name -> data set -> a row for each seed

# What does not make another experiment: the seed, where files are, how fast it goes, how a judge is asked.
NO_SETTINGS = {"seed", "out", "reuse", "report", "dry_run", "test", "base", "slots", "pass_tokens", "shard",
               "checkpoint_activations", "save_every", "keep", "resume", "resume_elsewhere", "judge_url",
               "judge_cache", "judge_at_once", "judge_timeout", "judge_tokens", "judge_options",
               "judge_key_header"}

NUMBERS = "eval.json", "eval-validation.json"  # what the report reads of a run
VALIDATION = " (validation)"  # of a column whose runs were not evaluated on the test part
# What runs older than an option did: its value for them, whatever its default is now.
EARLY = dict(method="dpo", n_neg=1, softmax=False)


def report(folders: list[str], out: Path) -> str:
    """The paper's tables of some runs, as text, report.md and report.png.

    folders: of runs, or with runs somewhere below them. A row for every experiment, that is for all settings
    but the seed: mean ± standard deviation over seeds, what validation chose marked, the paper's own number
    beside it. What is there twice counts once.
    """
    published, (measured, copies) = read_json(PAPER), read_runs(runs_of(folders))
    models = tables_of(measured)
    lines, panels = [LEGEND], {}
    for model, rows in models.items():
        for data in data_sets_of(rows):
            if methods := methods_of(rows, data):
                title, baseline = f"{model}, {data}", baseline_of(rows, data)
                theirs = published_gains(published["win_rate"].get(model, {}), methods, data)
                lines += methods_table(title, methods, baseline)
                panels[title] = methods, baseline, theirs
        for title, key, scale, form in (("win rate or accuracy, %", "win_rate", 100, ".1f"),
                                        ("self-BLEU-4 across prompts", "self_bleu_4", 1, ".3f"),
                                        ("self-BLEU-4 within a prompt", "self_bleu_4_within", 1, ".3f")):
            numbers = published.get(key, {}).get(model, {})
            lines += ["", *strategy_table(f"{model}: {title}", rows, key, scale, form, numbers)]
        lines += critic_table(rows)
    text = "\n".join(lines + (["", *copies] if copies else [])) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "report.md", text)
    methods_figure(panels, out / "report.png")
    return text


def strategy(arguments: dict) -> str:
    """A run's row in the paper's tables: its method and, of DPO, where rejected responses come from."""
    if arguments["method"] != "dpo":
        return arguments["method"] + " shuffled" * arguments.get("shuffle_rewards", False)
    count = f" N={arguments['n_neg']}" if arguments["n_neg"] > 1 else ""
    return arguments["neg"] + count + (" softmax" if arguments["softmax"] else "")


def row_name(folder: Path, arguments: dict) -> str:
    """What a run's row is called: by the folder that its seeds share (.../larger-half/seed0), as in
    results/experiments.py, else by its strategy."""
    folder = folder.resolve()
    is_seed, name = re.fullmatch(r"seed[-_]?\d+", folder.name), folder.parent.name
    return name if is_seed and name not in SYSTEMS else strategy(arguments)


def validation_score(folder: Path) -> float | None:
    """A run's win rate on validation prompts: that of its evaluation there, else of its own selection."""
    if (folder / "eval-validation.json").exists():
        systems = read_json(folder / "eval-validation.json")["parts"]["all"]["systems"]
        return systems["trained"]["win_rate"]["mean"]
    if (folder / "summary.json").exists():
        chosen = read_json(folder / "summary.json").get("chosen", {})
        return chosen.get("score") if chosen.get("name", "win_rate") == "win_rate" else None
    return None


@dataclass(frozen=True)
class Measured:
    """One system of one run: in the table of which model, in which row and column, and its numbers."""

    model: str
    name: str
    data: str
    settings: dict  # that make the experiment
    seed: object  # what repeats it
    row: dict


def runs_of(folders: list[str]) -> list[Path]:
    """The runs themselves, and of every other folder those below it."""
    runs = []
    for folder in map(Path, folders):
        is_run = any((folder / name).exists() for name in NUMBERS)
        below = {file.parent for name in NUMBERS for file in folder.rglob(name)}
        runs += [folder] if is_run or not below else sorted(below)
    return runs


def read_runs(folders: list[Path]) -> tuple[list[Measured], list[str]]:
    """Every system of every run, each experiment once a seed; and a line for each run that was there before.

    The base model, whose responses runs share by --reuse, counts once, and no line says so.
    """
    first: dict[tuple[str, str], tuple[Path, Measured]] = {}
    lines = []
    for folder in folders:
        for system in systems_of(folder):
            identity = system.name, fingerprint(system.data, system.settings, system.seed)
            found_in, kept = first.setdefault(identity, (folder, system))
            if kept is not system and system.name not in SYSTEMS:
                lines.append(f"{folder}: {system.name}: the same settings and seed as in {found_in}, counted "
                             "once")
    return [system for _, system in first.values()], lines


def read_numbers(folder: Path) -> dict:
    """A run's evaluation: on the test part or, where there is none, on the validation part."""
    test, validation = (folder / name for name in NUMBERS)
    return read_json(validation if validation.exists() and not test.exists() else test)


def training_columns(folder: Path, parts: dict, systems: dict) -> dict:
    """What else the table of methods says of a trained model: its gain over the baseline, in each part of the
    data; its divergence; what training took."""
    baseline = "prompted" if "prompted" in systems else "default"
    more = {}
    for part, key in dict(all="gain", seen="gain_seen", unseen="gain_unseen").items():
        differences = parts.get(part, {}).get("differences", {})
        if f"trained - {baseline}" in differences:
            more[key] = differences[f"trained - {baseline}"]["win_rate"]
    over_all = parts["all"]["differences"].get(f"trained - {baseline}", {})
    more |= dict(gain_context=over_all.get("context_gain"),
                 gain_a_token=over_all.get("context_gain_per_token_macro"))
    divergence, summary = folder / "divergence.json", folder / "summary.json"
    if divergence.exists():
        more["kl"] = read_json(divergence)["kl"]
    if summary.exists():
        took = read_json(summary)
        more |= dict(trained_tokens=took.get("tokens"), processor_seconds=took.get("processor_seconds"))
        if "responses" in took:  # PPO trains on what it samples, and on that alone
            more["sampled_tokens"] = took["tokens"]
    if (folder / "pairs.json").exists():
        more["sampled_tokens"] = read_json(folder / "pairs.json")["statistics"]["response_tokens"]
    return more


def without_number(path: str, seed: int) -> str:
    """A path without the seed in it: runs/n-2/seed2, of a run with seed 2, becomes runs/n-2/seed*. Where no
    part of it says seed, the last such number is taken for it."""
    named = re.sub(rf"(seed[-_]?){seed}(?!\d)", r"\1*", path)
    return named if named != path else re.sub(rf"(.*)(?<!\d){seed}(?!\d)", r"\1*", path, flags=re.DOTALL)


def systems_of(folder: Path) -> list[Measured]:
    """The systems of one run. Those of the base model depend on the evaluation alone, not on training."""
    result, written = read_numbers(folder), read_json(folder / "args.json")
    arguments = EARLY | written["arguments"]
    part = "" if (folder / "eval.json").exists() else VALIDATION
    evaluated = result["arguments"] | result.get("settings", {}).get("sampling", {})  # as it really was
    # Wherever a copy of a known data set is; and a run may be evaluated on other data than it was trained on.
    data = arguments["data"].partition(":")[0]
    tested = (evaluated.get("data") or data).partition(":")[0]
    evaluation = {f"test {key}": value for key, value in evaluated.items() if key not in NO_SETTINGS}
    evaluation |= {"test model": arguments["model"], "test data": tested,
                   "test judge": evaluated.get("judge", "").split(",")[0]}  # it decides what wins
    training = {key: value for key, value in arguments.items() if key not in NO_SETTINGS} | dict(data=data)
    training["pairs"] = without_number(training["pairs"], arguments["seed"])
    names = {field.name for field in dataclasses.fields(DataArgs)}  # of which older runs lack some
    asked = DataArgs(**{key: value for key, value in arguments.items() if key in names})
    training |= dataclasses.asdict(sampling_for(asked)) | dict(contexts=contexts_of(asked))
    candidates = written.get("candidates", [])
    if len(candidates) > 1:  # every seed chooses anew
        training |= {key: [candidate[key] for candidate in candidates] for key in candidates[0]}
    systems, in_all = [], result["parts"]["all"]["systems"]
    for system, row in in_all.items():
        examples = result.get("settings", {}).get("examples") or fingerprint(row)
        name, settings, seed, validation = system, evaluation, (evaluated["seed"], examples), None
        if system == "trained":
            name, settings, seed = row_name(folder, arguments), evaluation | training, arguments["seed"]
            validation = validation_score(folder)
            row |= training_columns(folder, result["parts"], in_all) | dict(strategy=strategy(arguments))
        row |= dict(validation=validation, judges=result.get("judges", {}),
                    intervals=result.get("intervals"))
        systems.append(Measured(Path(arguments["model"]).name, name, Path(tested).stem + part, settings, seed,
                                row))
    return systems


def tables_of(measured: list[Measured]) -> dict[str, Rows]:
    """Base model -> the rows of its table: default, prompted and the strategies.

    Experiments that would stand in one cell of a table get a row each, named by the settings that differ.
    """
    models: dict[str, Rows] = {}
    for m in measured:
        own, differing = m.settings, set()
        for other in measured:
            if (other.model, other.name, other.data) == (m.model, m.name, m.data):
                keys = own | other.settings
                differing |= {key for key in keys if own.get(key) != other.settings.get(key)}
        values = ", ".join(f"{key} {own.get(key) or 'default'}" for key in sorted(differing))
        name = f"{m.name} ({values})" if values else m.name
        models.setdefault(m.model, {}).setdefault(name, {}).setdefault(m.data, []).append(m.row)
    return models


def data_sets_of(rows: Rows) -> list[str]:
    """The columns of a table."""
    return sorted({data for row in rows.values() for data in row})


def ordered(rows: Rows) -> list[str]:
    """The rows of a table: the base model's, then the strategies."""
    return sorted(rows, key=lambda name: (plain(name) not in SYSTEMS, name))


def plain(name: str) -> str:
    """A row's name without the settings that tell it from others of the name."""
    return name.partition(" (")[0]


def methods_of(rows: Rows, data: str) -> Rows:
    """The trained rows of one data set, the best first: name -> a row for each seed.

    The best by gain or, where nothing says what is right, by context gain over the baseline's.
    """
    of_data = {name: row[data] for name, row in rows.items() if data in row}
    key = gain_key(of_data)
    measured = {name: [run for run in runs if mean_of(run, key) is not None]
                for name, runs in of_data.items()}
    means = {name: np.mean([mean_of(run, key) for run in runs]) for name, runs in measured.items() if runs}
    return {name: measured[name] for name in sorted(means, key=means.get, reverse=True)}


def baseline_of(rows: Rows, data: str) -> list[dict]:
    """The rows of the system that gains are over: prompting or, in data without contexts, the default. Of
    several, tested on other rows or in another way, the one with most seeds."""
    for system in ("prompted", "default"):
        found = [row[data] for name, row in rows.items() if plain(name) == system and data in row]
        if found:
            return max(found, key=len)
    return []


def published_gains(published: dict, methods: dict[str, list[dict]], data: str) -> dict[str, float]:
    """The paper's gains over the same baseline, in points, of the methods that it has on this data set."""
    before = next((published[system][data] for system in ("prompted", "default")
                   if data in published.get(system, {})), None)
    numbers = {name: published.get(runs[0]["strategy"], {}).get(data) for name, runs in methods.items()}
    return {name: number[0] - before[0] for name, number in numbers.items() if number and before}


def methods_table(title: str, methods: dict[str, list[dict]], baseline: list[dict]) -> list[str]:
    """A Markdown table of all methods on one data set, with the columns of COMPARED; the baseline is last.
    Rows whose intervals are of an earlier version, over prompts alone, are named below and never clear."""
    key = gain_key(methods)
    cells = [[title, "seeds", "clear", *(heading for heading, *_ in COMPARED)]]
    for name, runs in [*methods.items(), ("the baseline", baseline)]:
        clear = [(run[key]["low"] or 0) > 0 for run in runs if key in run and run["intervals"]]
        counts = [str(len(runs)), f"{sum(clear)} of {len(clear)}" if clear else "-"]
        values = [cell(runs, *column).partition(" (")[0] for _, *column in COMPARED]
        cells.append([name, *counts, *values])
    measured = [column for column in zip(*cells, strict=True) if set(column[1:]) != {"-"}]
    heading, *rows = map(markdown_row, zip(*measured, strict=True))
    earlier = [name for name, runs in methods.items() if not all(run["intervals"] for run in runs)]
    note = ["", f"Intervals over prompts alone, by an earlier version: {', '.join(earlier)}."]
    return ["", heading, "|---" * len(measured) + "|", *rows, *(note if earlier else [])]


def best_strategy(rows: Rows, data: str) -> str | None:
    """The strategy with the best mean score on validation, where there is a choice."""
    scores = {name: [run["validation"] for run in row.get(data, [])] for name, row in rows.items()}
    means = {name: np.mean(of_seeds) for name, of_seeds in scores.items()
             if of_seeds and None not in of_seeds}
    return max(means, key=means.get) if len(means) > 1 else None


def strategy_table(title: str, rows: Rows, key: str, scale: float, form: str, published: dict) -> list[str]:
    """A Markdown table of one measurement: a line a system or strategy, a column a data set."""
    data_sets = data_sets_of(rows)
    lines = [markdown_row([title, *data_sets]), "|---" * (1 + len(data_sets)) + "|"]
    for name in ordered(rows):
        cells = []
        for data in data_sets:
            text = cell(rows[name].get(data, []), key, scale, form)
            is_of_test = not data.endswith(VALIDATION)
            if key == "win_rate" and is_of_test and best_strategy(rows, data) == name:
                text += "*"
            runs = rows[name].get(data, [])
            called = runs[0].get("strategy", plain(name)) if runs else ""  # as the paper calls it
            number = published.get(called, {}).get(data)
            cells.append(f"{text} ({number[0]:g})" if number else text)
        lines.append(markdown_row([name, *cells]))
    return lines


def critic_table(rows: Rows) -> list[str]:
    """A Markdown table of each judge's accuracy on human preferences (Table 7), if there is one."""
    critics = {(judge, data): verdicts["critic"]
               for row in rows.values() for data, runs in row.items() for run in runs
               for judge, verdicts in run["judges"].items() if "critic" in verdicts}
    if not critics:
        return []
    lines = ["", "| judge | data | strict accuracy, % | tie-tolerant, % |", "|---" * 4 + "|"]
    for (judge, data), critic in sorted(critics.items()):
        rates = [with_interval(critic[key], ".1f", 100) for key in ("strict", "tie_tolerant")]
        lines.append(markdown_row([judge, data, *rates]))
    return lines
