"""figures.py - the pictures of a run and of its evaluation.

    learning_curve   metrics.jsonl over the steps (Fig. 2)
    gain_figure      what training gained, beside the learning curve
    judges_figure    judges' outcomes (Fig. 3)
    entropy_figure   entropies over the answer letters (Figs. 4, 5)
    methods_figure   what every method gains, and at what price

What differs from the paper: the gain beside the curve, and the last picture, are ours.
"""

import math
import os
from pathlib import Path

import numpy as np

from measures import mean_of, with_interval
from run import naming, read_json, read_jsonl

# ------------------------------------------------------------------------- drawing

# Colours that the colour-blind tell apart (Okabe and Ito's blue and vermilion); blue is what is trained.
BLUE, VERMILION, BLACK, GREY = "#0072B2", "#D55E00", "#333333", "#7F7F7F"
ACCURACIES = dict(  # the paper's Fig. 2: key of metrics.jsonl -> the curve's name
    accuracy_chosen="chosen: reward > 0", accuracy="chosen > rejected",
    accuracy_rejected="rejected: reward < 0",
)
PANELS = (  # of the learning curve: a title, and key of metrics.jsonl -> the curve's name, if it is there
    ("prediction accuracy", ACCURACIES),
    ("margin, rewards, nats", dict(reward_chosen="chosen", margin="margin", reward_rejected="rejected")),
    ("reward", dict(reward="mean of a batch")),  # from here on: PPO
    ("KL from the start model, nats", dict(kl="per response")),
    ("tokens per response", dict(length="mean of a batch")),
    ("share that is clipped", dict(reward_clipped="rewards", ratio_clipped="ratios")),
    ("critic", dict(explained_variance="explained variance of returns")),
    ("mutual information, nats", dict(information="context and response")),  # InfoNCE, SAMI, ppo-mi
    ("loss", dict(loss="loss")),  # from here on: every method
    ("share of weights", dict(weights_changed="with another bf16 value than at the start")),
)


def pyplot():
    """matplotlib.pyplot without a display; imported here, as that is slow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save_figure(figure, file: Path) -> None:
    """Write a figure to `file` whole or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        with naming(file):
            figure.savefig(temporary, dpi=150, format=file.suffix[1:])
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk has no room for half a figure
        pyplot().close(figure)


# ------------------------------------------------------------------------- of training

def training_steps(folder: Path, candidate: int = 0) -> list[dict]:
    """The steps of metrics.jsonl that trained one candidate of a run."""
    rows = [row for _, row in read_jsonl(folder / "metrics.jsonl")]
    return [row for row in rows if row["candidate"] == candidate and "loss" in row]


def running_mean(steps: list[dict], key: str, windows: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """The last step of each sliding window, 1 / windows of the run, and the metric's mean over it."""
    width = max(1, len(steps) // windows)
    values = np.array([row[key] for row in steps])  # (steps,)
    smooth = np.convolve(values, np.ones(width) / width, "valid")  # (steps - width + 1,)
    return np.array([row["step"] for row in steps[width - 1 :]]), smooth


def learning_curve(folder: Path, candidate: int = 0) -> None:
    """metrics.jsonl -> learning_curve.png: prediction accuracies (the paper's Fig. 2), rewards, margin, loss;
    of PPO its rewards, divergence, lengths and critic.

    Faint points are steps, lines their running mean over a twentieth of the run.
    """
    plt = pyplot()
    steps = training_steps(folder, candidate)
    panels = [(title, curves) for title, curves in PANELS if set(curves) & steps[0].keys()]
    rows, columns = math.ceil(len(panels) / 3), min(3, len(panels))
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), layout="constrained",
                                squeeze=False)
    for axis, (title, curves) in zip(axes.flat, panels, strict=False):
        for (key, label), colour in zip(curves.items(), ("tab:blue", "tab:gray", "tab:red"), strict=False):
            if key not in steps[0]:
                continue
            axis.plot([row["step"] for row in steps], [row[key] for row in steps], ".", color=colour,
                      alpha=0.2, markersize=3)
            axis.plot(*running_mean(steps, key), color=colour, label=label)
        axis.set(title=title, xlabel="step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize="x-small",
                    frameon=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    save_figure(figure, folder / "learning_curve.png")


def gain_figure(run: Path, file: Path) -> None:
    """What training gained: a run's eval.json and metrics.jsonl as one picture.

    Left: each system's win rate with its 95% interval, for seen and unseen contexts where the data tell them
    apart. Right: the prediction accuracies of training (Fig. 2), for objectives that have them. No file is
    written where there is no trained system or no win rate.
    """
    result, summary = read_json(run / "eval.json"), read_json(run / "summary.json")
    systems = result["parts"]["all"]["systems"]
    if "trained" not in systems or systems["trained"]["win_rate"]["mean"] is None:
        return
    steps = training_steps(run, summary.get("chosen", {}).get("candidate", 0))
    has_accuracies = set(ACCURACIES) <= steps[0].keys()
    method = result["run"].get("method", "dpo")
    figure, axes = pyplot().subplots(1, 1 + has_accuracies, figsize=(9 if has_accuracies else 4.6, 3.4),
                                     layout="constrained", squeeze=False)
    figure.get_layout_engine().set(wspace=0.06)
    draw_win_rates(axes[0, 0], result["parts"], "MIPO" if method == "dpo" else method.upper())
    if has_accuracies:
        draw_accuracies(axes[0, 1], steps)
    save_figure(figure, file)


def draw_win_rates(axis, parts: dict, method: str) -> None:
    """A dot and its interval for every system; a block a part, headed by the trained system's gain."""
    names = dict(default="no context", prompted="prompting", trained=method)
    colours = dict(default=GREY, prompted=BLACK, trained=BLUE)
    y, positions = 0.0, {}  # position -> system
    for part in [part for part in parts if part != "all"] or ["all"]:
        gain = list(parts[part]["differences"].values())[-1]["win_rate"]  # trained - what stands before it
        axis.text(0, y, "all rows" if part == "all" else f"{part} contexts", va="center", fontweight="bold",
                  fontsize="small")
        axis.text(105, y, with_interval(gain, "+.0f", 100) + " points", va="center", ha="right", color=BLUE,
                  fontsize="small")
        for system, mean, low, high in win_rates(parts[part]):
            y += 1
            positions[y] = system
            axis.plot([low, high], [y, y], color=colours[system], linewidth=3, solid_capstyle="round")
            axis.plot(mean, y, "o", color=colours[system], markersize=8)
            axis.annotate(f"{mean:.0f}%", (max(high, mean + 2), y), xytext=(6, 0), va="center",
                          textcoords="offset points", color=colours[system])
        y += 1.5
    axis.set(xlabel="win rate, % (95% intervals)", xlim=(-2, 105), xticks=range(0, 101, 25),
             ylim=(y - 0.8, -0.6), yticks=list(positions),
             yticklabels=[names[system] for system in positions.values()])
    for label, system in zip(axis.get_yticklabels(), positions.values(), strict=True):
        label.set_color(colours[system])
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="0.92")
    axis.spines[["top", "right", "left"]].set_visible(False)
    last_two = [f"{names[system]} {mean:.0f}%" for system, mean, _, _ in win_rates(parts["all"])[-2:]]
    of_all = "Win rate" if len(parts) == 1 else "All contexts"
    axis.set_title(f"{of_all}: {', '.join(last_two)}", loc="left", pad=12)


def win_rates(block: dict) -> list[tuple[str, float, float, float]]:
    """(system, mean, low, high), in percent, of one part's systems that have a win rate."""
    rates = {system: row["win_rate"] for system, row in block["systems"].items()}
    return [(system, 100 * rate["mean"], 100 * rate["low"], 100 * rate["high"])
            for system, rate in rates.items() if rate["mean"] is not None]


def draw_accuracies(axis, steps: list[dict]) -> None:
    """The prediction accuracies, running means over a tenth of the run, each named at its right end."""
    colours = dict(accuracy_chosen=BLUE, accuracy=BLACK, accuracy_rejected=VERMILION)
    ends = {}
    for key, colour in colours.items():
        x, smooth = running_mean(steps, key, windows=10)
        axis.plot(x, 100 * smooth, color=colour, linewidth=1.8)
        ends[key] = 100 * smooth[-1]
    for key, height in spread(ends, gap=7).items():
        axis.text(1.02, height, ACCURACIES[key], color=colours[key], fontsize="small", va="center",
                  transform=axis.get_yaxis_transform())
    axis.set(xlabel="training step", ylabel="% of pairs", xlim=(0, steps[-1]["step"]), ylim=(-3, 103),
             yticks=range(0, 101, 25))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(axis="y", color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"Chosen beats rejected in {ends['accuracy']:.0f}% at the end", loc="left", pad=12)


def spread(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Heights of labels, 0 to 100, in their order and at least `gap` apart: the highest are placed first."""
    placed: dict[str, float] = {}
    ceiling = 100.0
    for key in sorted(heights, key=heights.get, reverse=True):
        room_below = gap * (len(heights) - len(placed) - 1)
        placed[key] = min(max(heights[key], room_below), ceiling)
        ceiling = placed[key] - gap
    return placed


# ------------------------------------------------------------------------- of an evaluation

def judges_figure(file: Path, judges: dict) -> None:
    """Fig. 3: each judge's wins, ties and losses of trained against prompted responses.

    judges: eval.json's. No file is written where no judge's comparisons could be read.
    """
    outcomes = dict(wins=BLUE, ties="lightgray", losses=VERMILION)
    compared = {judge: verdicts["pairwise"] for judge, verdicts in judges.items()
                if sum(verdicts.get("pairwise", {}).get(key, 0) for key in outcomes)}
    if not compared:
        return
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 1.2 + 0.5 * len(compared)), layout="constrained")
    labels, names = [], [Path(judge).name for judge in compared]
    for y, (judge, verdicts) in enumerate(compared.items()):
        count, left = sum(verdicts[key] for key in outcomes), 0.0
        label = names[y] if names.count(names[y]) == 1 else judge
        labels.append(f"{label} (n = {count})")
        for key, colour in outcomes.items():
            share = 100 * verdicts[key] / count
            axis.barh(y, share, left=left, color=colour, label=key if y == 0 else None)
            if share >= 4:  # room for its number
                axis.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center", fontsize="small")
            left += share
    axis.set(yticks=range(len(labels)), yticklabels=labels, xlim=(0, 100),
             xlabel="% of the rows, both orders", title="trained against personalised prompting")
    axis.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    save_figure(figure, file)


def entropy_figure(file: Path, entropies: dict[str, np.ndarray], won: dict[str, np.ndarray],
                   choices: int) -> None:
    """Figs. 4, 5: histograms of the entropy over the answer letters, of right and of wrong answers.

    entropies, won: of each system (rows,); choices: how many letters there are at most.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained", sharex=True)
    bins = np.linspace(0, math.log(choices), 21)
    for axis, right, title in zip(axes, (1, 0), ("right answers", "wrong answers"), strict=True):
        for system, colour in (("default", VERMILION), ("trained", BLUE)):
            if system not in entropies:
                continue
            values = entropies[system][won[system] == right]
            values = values[~np.isnan(values)]
            axis.hist(values, bins, alpha=0.5, color=colour, label=f"{system} (n = {len(values)})")
            if len(values):
                axis.axvline(values.mean(), color=colour)
        axis.set(title=title, xlabel="entropy, nats", ylabel="responses")
        axis.legend(frameon=False, fontsize="small")
    save_figure(figure, file)


Methods = dict[str, list[dict]]  # name -> its system in eval.json, one for each seed


def gain_key(methods: Methods) -> str:
    """What methods are compared by: the gain in points or, if no run has one, that in context gain."""
    known = any(mean_of(run, "gain") is not None for runs in methods.values() for run in runs)
    return "gain" if known else "gain_context"


def methods_figure(panels: dict[str, tuple[Methods, list[dict], dict[str, float]]], file: Path) -> None:
    """What every method gains, by `gain_key`, and, beside it, at what price: KL from the start model or,
    where a run lacks it, how likely the responses are under that model; the grey line is the baseline's.

    panels: title -> the systems of each method, one for each seed; the baseline's; the paper's gains in
    points. A dot is a seed, with a line for its 95% interval, a bar the mean of several; a hollow dot is the
    paper's. No file is written without a panel.
    """
    if not panels:
        return
    plt = pyplot()
    heights = [0.9 + 0.3 * len(methods) for methods, *_ in panels.values()]
    figure, axes = plt.subplots(len(panels), 2, figsize=(9, sum(heights)), layout="constrained", sharey="row",
                                squeeze=False, width_ratios=(3, 2), height_ratios=heights)
    for (gains, prices), (title, panel) in zip(axes, panels.items(), strict=True):
        methods, baseline, published = panel
        key = gain_key(methods)
        scale, unit = (100, "gain, points") if key == "gain" else (1, "gain in context gain, nats")
        has_kl = all(mean_of(run, "kl") is not None for runs in methods.values() for run in runs)
        price, label = ("kl", "KL from the start model, nats") if has_kl else (
            "nll_per_token", "base NLL, nats per token")
        for y, runs in enumerate(methods.values()):
            draw_seeds(gains, y, runs, key, scale)
            draw_seeds(prices, y, runs, price, 1)
        for y, name in enumerate(methods):
            if name in published:
                gains.plot(published[name], y, "o", markerfacecolor="none", color=GREY)
        before = [mean_of(run, "nll_per_token") for run in baseline]
        gains.axvline(0, color=GREY, linewidth=1)
        if None not in before:
            prices.axvline(0 if has_kl else np.mean(before), color=GREY, linewidth=1)
        left, right = gains.get_xlim()  # and no less than -5 to 5: a gain of nothing looks like one
        gains.set(xlabel=unit, xlim=(min(left, -5), max(right, 5)),
                  yticks=range(len(methods)), yticklabels=list(methods),
                  ylim=(len(methods) - 0.5, -0.5))
        gains.set_title(title, fontsize="small", loc="left")
        prices.set(xlabel=label)
        prices.set_xlim(0, 1.05 * prices.get_xlim()[1])
        for axis in (gains, prices):
            axis.grid(color="0.92")
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, file)


def draw_seeds(axis, y: int, runs: list[dict], key: str, scale: float) -> None:
    """A dot for every seed that has this measurement, and a line for its interval, if it has one; a bar at
    the mean of several."""
    known = [run for run in runs if mean_of(run, key) is not None]
    if not known:
        return
    values = [scale * mean_of(run, key) for run in known]
    heights = y + 0.12 * (np.arange(len(known)) - (len(known) - 1) / 2)  # seeds beside each other
    for run, height in zip(known, heights, strict=True):
        if isinstance(run[key], dict) and run[key]["low"] is not None:
            ends = [scale * run[key][end] for end in ("low", "high")]
            axis.plot(ends, [height, height], color=BLUE, linewidth=1)
    axis.plot(values, heights, "o", color=BLUE, alpha=0.4, markersize=5)
    if len(values) > 1:
        axis.plot(np.mean(values), y, "|", color=BLACK, markersize=14, markeredgewidth=2)
