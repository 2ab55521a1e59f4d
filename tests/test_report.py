"""report.py on runs made by hand: figures, the printed table, the report over runs, recomputed results."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from matplotlib.axes import Axes

from figures import entropy_figure, gain_figure, judges_figure, spread
from measures import NO_INTERVAL
from report import difference_line, report, system_lines, table, without_number
from run import UserError, read_json, write_json

PNG = b"\x89PNG"


# ------------------------------------------------------------------------------------------- figures

def interval(mean: float, half: float = 0.05) -> dict:
    """A measurement as eval.json has it."""
    return dict(mean=mean, low=mean - half, high=mean + half, n=9)


@pytest.fixture
def trained_run(tmp_path):
    """A run folder whose gain can be drawn: seen and unseen contexts, two candidates of three steps."""
    rates = dict(default=0.1, prompted=0.4, trained=0.7)
    block = dict(systems={system: dict(win_rate=interval(rate)) for system, rate in rates.items()},
                 differences={"trained - prompted": dict(win_rate=interval(0.3))})
    write_json(tmp_path / "eval.json", dict(parts=dict(all=block, seen=block, unseen=block),
                                            run=dict(method="dpo")))
    write_json(tmp_path / "summary.json", dict(chosen=dict(candidate=1)))
    accuracies = dict(accuracy=0.5, accuracy_chosen=0.4, accuracy_rejected=0.6)
    steps = [dict(candidate=candidate, step=step, loss=0.6, **accuracies)
             for candidate in (0, 1) for step in (1, 2, 3)]
    validation = [dict(candidate=1, step=3, validation_win_rate=0.5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps + validation))
    return tmp_path


def drawn_texts(monkeypatch) -> list[str]:
    """Fills with all texts of the figures that are saved from now on."""
    texts: list[str] = []
    monkeypatch.setattr("figures.save_figure", lambda figure, file: texts.extend(
        text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))))
    return texts


def test_the_gain_is_drawn_as_a_picture(trained_run):
    """One PNG, and nothing beside it."""
    before = {file.name for file in trained_run.iterdir()}
    gain_figure(trained_run, trained_run / "gain.png")
    assert (trained_run / "gain.png").read_bytes().startswith(PNG)
    assert {file.name for file in trained_run.iterdir()} == before | {"gain.png"}


def test_the_gains_picture_says_what_it_shows(trained_run, monkeypatch):
    """Systems, rates and gains of both parts, the curves by name; SFT has no curves and its own name."""
    texts = drawn_texts(monkeypatch)
    gain_figure(trained_run, trained_run / "gain.png")
    for text in ("seen contexts", "unseen contexts", "+30 [+25, +35] points", "no context", "prompting",
                 "MIPO", "10%", "40%", "70%", "All contexts: prompting 40%, MIPO 70%", "chosen > rejected"):
        assert text in texts
    texts.clear()
    result = read_json(trained_run / "eval.json")
    write_json(trained_run / "eval.json", result | dict(run=dict(method="sft")))
    (trained_run / "metrics.jsonl").write_text('{"candidate": 1, "step": 1, "loss": 0.6}\n')
    gain_figure(trained_run, trained_run / "gain.png")
    assert "SFT" in texts and "chosen > rejected" not in texts


@pytest.mark.parametrize("systems", [
    dict(default=dict(win_rate=interval(0.1)), prompted=dict(win_rate=interval(0.4))),
    dict(default=dict(win_rate=interval(0.1)), trained=dict(win_rate=NO_INTERVAL)),
])  # fmt: skip
def test_no_gain_is_drawn_without_a_trained_system_or_a_win_rate(systems, trained_run):
    """No file is written."""
    write_json(trained_run / "eval.json", dict(parts=dict(all=dict(systems=systems, differences={}))))
    gain_figure(trained_run, trained_run / "gain.png")
    assert not (trained_run / "gain.png").exists()


def test_names_that_would_overlap_are_moved_apart():
    """From the top down, by no more than it takes, in the order of their curves."""
    assert spread(dict(a=20.0, b=99.0, c=98.0), gap=7) == dict(b=99.0, c=92.0, a=20.0)
    assert spread(dict(a=0.0, b=1.0, c=2.0), gap=7) == dict(c=14.0, b=7.0, a=0.0)


def test_judges_are_drawn_where_their_comparisons_could_be_read(tmp_path):
    """One that could not be read once, or compared nothing, gives no figure."""
    unread = dict(pairwise=dict(wins=0, ties=0, losses=0, unread=4))
    judges_figure(tmp_path / "judges.png", dict(J=unread, K=dict(unread={})))
    assert not (tmp_path / "judges.png").exists()
    judges_figure(tmp_path / "judges.png", dict(J=unread, K=dict(pairwise=dict(wins=2, ties=1, losses=1))))
    assert (tmp_path / "judges.png").read_bytes().startswith(PNG)


def test_a_judge_is_drawn_under_its_own_name(tmp_path, monkeypatch):
    """Without its folder, with the number of its readable comparisons."""
    texts = drawn_texts(monkeypatch)
    verdicts = dict(pairwise=dict(wins=2, ties=1, losses=1))
    judges_figure(tmp_path / "judges.png", {"/models/Judge-1.5B": verdicts})
    assert "Judge-1.5B (n = 4)" in texts and "50" in texts
    texts.clear()
    judges_figure(tmp_path / "judges.png", {"a/model": verdicts, "b/model": verdicts})
    assert "a/model (n = 4)" in texts and "b/model (n = 4)" in texts


def test_entropies_are_drawn_of_right_and_wrong_answers(tmp_path, monkeypatch):
    """Answers without an entropy are not counted."""
    entropies = dict(default=np.array([0.2, 0.4, np.nan]), trained=np.array([0.1, 0.2, 0.3]))
    right = dict(default=np.array([1.0, 0.0, 1.0]), trained=np.ones(3))
    entropy_figure(tmp_path / "entropy.png", entropies, right, choices=4)
    assert (tmp_path / "entropy.png").read_bytes().startswith(PNG)
    texts = drawn_texts(monkeypatch)
    entropy_figure(tmp_path / "entropy.png", entropies, right, choices=4)
    assert {"default (n = 1)", "trained (n = 3)", "trained (n = 0)"} <= set(texts)


# ------------------------------------------------------------------------------------------- table

def test_the_paired_difference_leads_and_every_system_has_its_n():
    """Trained less prompted comes first, then a line a system with the number of its rows that were read."""
    row = dict(win_rate=interval(0.5) | dict(n=7), context_gain=NO_INTERVAL)
    difference = dict.fromkeys(("win_rate", "win_rate_length_matched", "context_gain", "score", "self_bleu_4",
                                "context_gain_per_token_macro", "self_bleu_4_within"), interval(0.3))
    block = dict(systems=dict(default=row, prompted=row, trained=row),
                 differences={name: difference | dict(mcnemar_p=None)
                              for name in ("prompted - default", "trained - prompted")})
    judges = dict(J=dict(unread=dict(trained=3), items=dict(asked=20, shared=17),
                         unread_reasons={"filtered": 2, "too long": 1}))
    lines = table(dict(parts=dict(all=block), contexts=[], judges=judges)).splitlines()
    assert lines[1] == "all rows"
    assert lines[2].startswith("trained - prompted: win rate +30.0 [+25.0, +35.0] (n = 9)")
    assert "within a prompt +0.300 [+0.250, +0.350]" in lines[3]
    assert [line.split()[:3] for line in lines[7:10]] == [[name, "7", "50.0"] for name in block["systems"]]
    assert lines[-1] == ("judge J: unread replies: 3 of trained (2 filtered; 1 too long); "
                         "systems are compared on the 17 of 20 items read for all")


def test_a_dash_in_the_table_has_its_reason():
    """Of a system and of a difference; pairs of the data are named where they were scored."""
    difference = dict.fromkeys(("win_rate", "win_rate_length_matched", "context_gain", "score", "self_bleu_4",
                                "context_gain_per_token_macro", "self_bleu_4_within"), NO_INTERVAL)
    systems = {name: dict(win_rate=NO_INTERVAL, context_gain=NO_INTERVAL) for name in ("default", "trained")}
    block = dict(systems=systems, differences={"trained - default": difference | dict(mcnemar_p=None)})
    text = table(dict(parts=dict(all=block), contexts=[], pairs=interval(0.6)))
    for reason in ("no win rate of default, trained, trained - default: no row has a check",
                   "no context gain of default, trained, trained - default: ",
                   "no self bleu 4 of trained - default: ", "no self bleu 4 within of trained - default: "):
        assert reason in text
    assert "pairs of the data: in 60.0 [55.0, 65.0]% (n = 9)" in text


def test_math_shows_both_readings():
    """The answer before questions of the model's own, and the last ####."""
    row = dict(win_rate=interval(0.5), context_gain=NO_INTERVAL, last_marker=interval(0.2))
    lines = table(dict(parts=dict(all=dict(systems=dict(default=row), differences={})), contexts=[]))
    assert "last ####" in lines and "20.0%" in lines


# ------------------------------------------------------------------------------------------- report

def write_run(folder, seed: int, rate: float, neg: str = "missing", validation: float | None = None,
              test_seed: int = 0, **more) -> str:
    """A run on Multi-Bench with a judge J whose trained model has this win rate; the base model's is 0.5.

    test_seed: which test rows there are. more: other arguments of the run.
    """
    folder.mkdir()
    row = dict(win_rate=interval(rate, 0.1), self_bleu_4=rate / 2)
    base = row | dict(win_rate=interval(0.5, 0.1))
    arguments = dict(method="dpo", neg=neg, n_neg=1, softmax=False, data="multibench:/x", seed=seed,
                     model="/m/Llama-3.2-1B-Instruct", pairs="", out=str(folder), slots=seed + 1) | more
    critic = dict(strict=base["win_rate"], tie_tolerant=row["win_rate"])
    gain = {"trained - prompted": dict(win_rate=interval(rate - 0.5, 0.1))}
    block = dict(systems=dict(default=base, prompted=base, trained=row), differences=gain)
    result = dict(parts=dict(all=block), intervals=dict(crossed="contexts"),
                  settings=dict(examples=f"rows of seed {test_seed}"),
                  arguments=dict(model=str(folder), data=arguments["data"], seed=0, limit=0, judge="J"),
                  judges=dict(J=dict(critic=critic)))
    (folder / "args.json").write_text(json.dumps(dict(arguments=arguments)))
    (folder / "eval.json").write_text(json.dumps(result))
    if validation is not None:
        (folder / "summary.json").write_text(json.dumps(dict(chosen=dict(score=validation))))
    return str(folder)


def win_rates(text: str) -> dict[str, str]:
    """The first table of win rates in a report: name -> cell."""
    table = next(block for block in text.split("\n\n") if "win rate or accuracy" in block)
    return dict(line.strip("| ").split(" | ") for line in table.splitlines()[2:])


def methods(text: str) -> dict[str, dict[str, str]]:
    """The table of methods of a report: name -> heading -> cell."""
    table = next(block for block in text.split("\n\n") if "| seeds | clear |" in block)
    headings, _, *rows = (line.strip("| ").split(" | ") for line in table.splitlines())
    return {row[0]: dict(zip(headings[1:], row[1:], strict=True)) for row in rows}


def test_the_report_has_seeds_the_chosen_strategy_and_the_papers_numbers(tmp_path):
    """Mean and deviation over seeds, an interval of one; validation's choice has *; the paper's is last."""
    runs = [write_run(tmp_path / "a", 0, 0.8, validation=0.7),
            write_run(tmp_path / "b", 1, 0.9, validation=0.9, test_seed=1),
            write_run(tmp_path / "d", 2, 0.7, validation=0.8, test_seed=2),
            write_run(tmp_path / "c", 0, 0.95, "random", 0.6)]
    text = report(runs, tmp_path / "out")
    assert text == (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    rates = win_rates(text)
    assert rates["missing"] == "80.0 ± 10.0 (3 seeds)* (93.26)"  # validation 0.8 against random's 0.6
    assert rates["random"] == "95.0 [85.0, 105.0] (89.68)"
    assert rates["prompted"] == "50.0 ± 0.0 (3 seeds) (79.76)"  # three test parts; c's is that of a
    assert "0.400 ± 0.050 (3 seeds)" in text.split("self-BLEU-4 across prompts")[1]
    assert "| J | multibench | 50.0 [40.0, 60.0] |" in text
    assert (tmp_path / "out" / "report.png").stat().st_size > 5000


def test_a_base_model_that_several_runs_share_is_one_run(tmp_path):
    """Four runs with other training tested on the same rows: one number with its interval, not four seeds;
    and no copy, which would be named."""
    runs = [write_run(tmp_path / f"r{i}", 0, 0.6 + i / 20, neg)
            for i, neg in enumerate(("missing", "random", "reshuffle", "noise"))]
    text = report(runs, tmp_path / "out")
    assert win_rates(text)["prompted"] == "50.0 [40.0, 60.0] (79.76)"
    assert "counted once" not in text


def test_a_run_named_twice_or_copied_counts_once(tmp_path):
    """The same settings and seed are one run, wherever it is and however it was sampled."""
    first, copy = (write_run(tmp_path / name, 0, 0.8, slots=i) for i, name in enumerate("ab"))
    text = report([first, first, copy], tmp_path / "out")
    assert win_rates(text)["missing"] == "80.0 [70.0, 90.0] (93.26)"
    for again in (first, copy):
        assert f"{again}: missing: the same settings and seed as in {first}" in text


def test_how_a_judge_is_asked_makes_no_other_experiment(tmp_path):
    """Its room to think, its options and its key's header: seeds of one experiment stay in one row."""
    runs = [write_run(tmp_path / "a", 0, 0.8),
            write_run(tmp_path / "b", 1, 0.9, test_seed=1, judge_tokens=2000)]
    result = read_json(tmp_path / "b" / "eval.json")
    result["arguments"] |= dict(judge_tokens=2000, judge_options="{}", judge_key_header="api-key")
    write_json(tmp_path / "b" / "eval.json", result)
    assert set(win_rates(report(runs, tmp_path / "out"))) == {"default", "prompted", "missing"}


@pytest.mark.parametrize("more", [dict(resume=True), dict(resume_elsewhere=True), dict(save_every=5),
                                  dict(keep=2), dict(shard=True), dict(checkpoint_activations=True)])
def test_a_seed_that_was_interrupted_is_a_seed_of_its_experiment(more, tmp_path):
    """How a run was carried out is no setting of it, nor where the base model lies now."""
    runs = [write_run(tmp_path / "a", 0, 0.8), write_run(tmp_path / "b", 1, 0.9, **more)]
    result = read_json(tmp_path / "b" / "eval.json")
    result["arguments"] |= dict(base="/elsewhere")
    write_json(tmp_path / "b" / "eval.json", result)
    assert win_rates(report(runs, tmp_path / "out"))["missing"] == "80.0, 90.0 (2 seeds) (93.26)"


@pytest.mark.parametrize("unmeasured", [0, 1])
def test_a_seed_without_a_win_rate_hides_no_other(unmeasured, tmp_path):
    """A judge that could not be read: the other seed's number stands, in the table and in the picture."""
    runs = [write_run(tmp_path / f"r{seed}", seed, 0.8) for seed in range(2)]
    file = tmp_path / f"r{unmeasured}" / "eval.json"
    result = read_json(file)
    result["parts"]["all"]["systems"]["trained"]["win_rate"] = NO_INTERVAL
    write_json(file, result)
    assert win_rates(report(runs, tmp_path / "out"))["missing"] == "80.0 [70.0, 90.0] (93.26)"
    assert (tmp_path / "out" / "report.png").stat().st_size > 5000


def test_judges_of_one_name_are_two_judges(tmp_path):
    """Every run's model folder is called model."""
    run = write_run(tmp_path / "a", 0, 0.8)
    result = read_json(tmp_path / "a" / "eval.json")
    critic = result["judges"].pop("J")
    result["judges"] = {"runs/a/model": critic, "runs/b/model": critic}
    write_json(tmp_path / "a" / "eval.json", result)
    text = report([run], tmp_path / "out")
    assert "| runs/a/model | multibench |" in text and "| runs/b/model | multibench |" in text


def test_a_share_of_decided_pairs_is_no_win_rate(tmp_path):
    """What validation chose is marked by win rates alone; on data without checks selection has another score.
    """
    runs = [write_run(tmp_path / "a", 0, 0.8), write_run(tmp_path / "b", 0, 0.7, "random", 0.6)]
    write_json(tmp_path / "a" / "summary.json", dict(chosen=dict(name="margin_accuracy", score=0.95)))
    rates = win_rates(report(runs, tmp_path / "out"))
    assert not any("*" in cell for cell in rates.values())


def test_a_run_of_an_early_version_is_reported(tmp_path):
    """Its arguments name no method: DPO with one rejected response was all there was."""
    run = write_run(tmp_path / "a", 0, 0.8, "random")
    written = read_json(tmp_path / "a" / "args.json")
    for key in ("method", "n_neg", "softmax"):
        del written["arguments"][key]
    write_json(tmp_path / "a" / "args.json", written)
    assert win_rates(report([run], tmp_path / "out"))["random"] == "80.0 [70.0, 90.0] (89.68)"


def test_seeds_that_train_on_pairs_of_their_own_are_seeds_of_one_experiment(tmp_path):
    """The pairs' folders differ by the seed alone. Another folder of the same seed is another experiment."""
    runs = [write_run(tmp_path / f"r{seed}", seed, 0.6 + seed / 10, pairs=f"runs/v10/seed{seed}")
            for seed in (0, 1)]
    runs.append(write_run(tmp_path / "swapped", 1, 0.5, pairs="runs/v10/seed1-swapped"))
    rates = win_rates(report(runs, tmp_path / "out"))
    assert rates["missing (pairs runs/v10/seed*)"] == "60.0, 70.0 (2 seeds) (93.26)"
    assert rates["missing (pairs runs/v10/seed*-swapped)"] == "50.0 [40.0, 60.0] (93.26)"


def test_sampling_is_compared_as_it_was_and_not_as_it_was_written(tmp_path):
    """96 new tokens are 96, whether the data set says so or the command."""
    runs = [write_run(tmp_path / f"r{i}", i, 0.6) for i in range(2)]
    for run, written in zip(runs, (None, 96), strict=True):
        file = Path(run) / "eval.json"
        result = read_json(file)
        result["arguments"] |= dict(max_new_tokens=written)
        result["settings"] |= dict(sampling=dict(max_new_tokens=96))
        write_json(file, result)
    assert set(win_rates(report(runs, tmp_path / "out"))) == {"default", "prompted", "missing"}


def test_a_run_that_was_only_evaluated_on_validation_is_reported(tmp_path):
    """Its column says so, has no figure of the paper's test part, and marks nothing as chosen by itself."""
    run = write_run(tmp_path / "a", 0, 0.8)
    (tmp_path / "a" / "eval.json").rename(tmp_path / "a" / "eval-validation.json")
    other = write_run(tmp_path / "b", 0, 0.7, "random")
    (tmp_path / "b" / "eval.json").rename(tmp_path / "b" / "eval-validation.json")
    text = report([run, other], tmp_path / "out")
    assert win_rates(text)["missing"] == "80.0 [70.0, 90.0]" and "*" not in text.partition("\n")[2]
    assert " (validation) |" in text


@pytest.mark.parametrize(("path", "seed", "without"), [
    ("runs/v1/seed1", 1, "runs/v1/seed*"), ("runs/lr-1e-6/seed1/x", 1, "runs/lr-1e-6/seed*/x"),
    ("runs/v0/seed10", 10, "runs/v0/seed*"), ("runs/a-2/2", 2, "runs/a-2/*"), ("runs/a", 3, "runs/a"),
    ("", 0, ""),
])  # fmt: skip
def test_a_seed_is_found_in_a_path_that_has_its_digit_elsewhere(path, seed, without):
    assert without_number(path, seed) == without


@pytest.mark.parametrize("more", [dict(pairs="runs/swapped"), dict(lr=1e-5), dict(limit=300),
                                  dict(model="/n/Llama-3.2-1B-Instruct")])
def test_different_experiments_are_not_seeds_of_one(more, tmp_path):
    """A control on other pairs, another rate, model or number of rows: rows of their own, told apart."""
    runs = [write_run(tmp_path / "a", 0, 0.8, "random"), write_run(tmp_path / "b", 1, 0.6, "random", **more)]
    rates = win_rates(report(runs, tmp_path / "out"))
    ((key, value),) = more.items()
    cells = {name: cell for name, cell in rates.items() if name.startswith("random")}
    assert sorted(cells.values()) == ["60.0 [50.0, 70.0] (89.68)", "80.0 [70.0, 90.0] (89.68)"]
    assert any(f"{key} {value}" in name for name in cells)


def test_a_row_is_named_by_the_folder_that_its_seeds_share(tmp_path):
    """As results/experiments.py keeps them; all runs below a folder are found; the paper's number stays."""
    for name, rate in (("swapped", 0.5), ("whole", 0.8)):
        (tmp_path / name).mkdir()
        for seed in range(2):
            write_run(tmp_path / name / f"seed{seed}", seed, rate + seed / 10, pairs=f"{name}/seed{seed}")
    text = report([str(tmp_path)], tmp_path / "out")
    assert text == report([str(tmp_path / name) for name in ("swapped", "whole")], tmp_path / "out")
    assert win_rates(text)["whole"] == "80.0, 90.0 (2 seeds) (93.26)"
    assert win_rates(text)["swapped"] == "50.0, 60.0 (2 seeds) (93.26)"


def test_a_folder_called_like_a_system_is_none(tmp_path):
    """Its runs go by their strategy."""
    (tmp_path / "default").mkdir()
    write_run(tmp_path / "default" / "seed0", 0, 0.8)
    rates = win_rates(report([str(tmp_path)], tmp_path / "out"))
    assert rates["missing"] == "80.0 [70.0, 90.0] (93.26)"
    assert rates["default"].startswith("50.0 [40.0, 60.0]")


def test_methods_stand_side_by_side(tmp_path):
    """The best first, with gain, seeds clear of 0, divergence and what training took; the baseline last."""
    runs = [write_run(tmp_path / "a", 0, 0.55), write_run(tmp_path / "b", 1, 0.65),
            write_run(tmp_path / "c", 0, 0.9, "random")]
    write_json(tmp_path / "c" / "divergence.json", dict(kl=interval(3.0, 0.5)))
    write_json(tmp_path / "c" / "summary.json", dict(tokens=2600, processor_seconds=7.4))
    write_json(tmp_path / "c" / "pairs.json", dict(statistics=dict(response_tokens=1300)))
    write_json(tmp_path / "a" / "summary.json", dict(tokens=900, responses=8))
    rows = methods(report(runs, tmp_path / "out"))
    assert list(rows) == ["random", "missing", "the baseline"]
    assert rows["random"] == rows["random"] | {
        "seeds": "1", "clear": "1 of 1", "gain, points": "+40.0 [+30.0, +50.0]", "KL, nats": "3.0 [2.5, 3.5]",
        "sampled, thousand tokens": "1", "trained on, thousand tokens": "3", "processor, s": "7"}
    assert rows["missing"] == rows["missing"] | {
        "seeds": "2", "clear": "1 of 2", "gain, points": "+5.0, +15.0", "KL, nats": "-", "processor, s": "-",
        "sampled, thousand tokens": "1", "trained on, thousand tokens": "1"}
    assert rows["the baseline"] == rows["the baseline"] | {
        "seeds": "1", "clear": "-", "win rate, %": "50.0 [40.0, 60.0]", "gain, points": "-"}


def test_intervals_of_an_earlier_version_are_named_and_count_as_no_evidence(tmp_path):
    """They were over prompts alone."""
    runs = [write_run(tmp_path / "a", 0, 0.9), write_run(tmp_path / "b", 0, 0.8, "random")]
    result = read_json(tmp_path / "a" / "eval.json")
    del result["intervals"]
    write_json(tmp_path / "a" / "eval.json", result)
    text = report(runs, tmp_path / "out")
    assert "Intervals over prompts alone, by an earlier version: missing." in text
    assert [methods(text)[name]["clear"] for name in ("missing", "random")] == ["-", "1 of 1"]


def test_the_baseline_is_the_one_with_most_seeds(tmp_path):
    """Of two that were tested on different numbers of rows."""
    runs = [write_run(tmp_path / "a", 0, 0.8), write_run(tmp_path / "b", 0, 0.7, "random"),
            write_run(tmp_path / "c", 1, 0.7, "random", test_seed=1)]
    result = read_json(tmp_path / "a" / "eval.json")
    result["arguments"]["limit"] = 64
    write_json(tmp_path / "a" / "eval.json", result)
    assert methods(report(runs, tmp_path / "out"))["the baseline"]["seeds"] == "2"


def test_where_nothing_says_what_is_right_methods_are_compared_by_context_gain(tmp_path):
    """The best first and clear seeds by it; what no row has measured has no column; the picture is drawn."""
    runs = [write_run(tmp_path / name, 0, 0.5, neg) for name, neg in (("a", "missing"), ("b", "random"))]
    unknown = dict(mean=None, low=None, high=None, n=0)
    for run, gain in zip(runs, (2.0, 9.0), strict=True):
        result = read_json(Path(run) / "eval.json")
        block = result["parts"]["all"]
        block["differences"]["trained - prompted"] = dict(
            win_rate=unknown, context_gain=interval(gain, 3.0),
            context_gain_per_token_macro=interval(gain / 10, 0.1))
        for row in block["systems"].values():
            row |= dict(win_rate=unknown, nll_per_token=0.7)
        write_json(Path(run) / "eval.json", result)
    rows = methods(report(runs, tmp_path / "out"))
    assert list(rows) == ["random", "missing", "the baseline"]
    assert rows["random"] == {
        "seeds": "1", "clear": "1 of 1", "over the baseline's": "+9.0 [+6.0, +12.0]",
        "the same a token": "+0.90 [+0.80, +1.00]", "base NLL": "0.70", "self-BLEU-4": "0.25"}
    assert rows["missing"]["clear"] == "0 of 1"
    assert (tmp_path / "out" / "report.png").exists()


def test_runs_tested_on_other_rows_are_not_seeds_of_one(tmp_path):
    """An evaluation with --limit stands beside the one on all rows."""
    runs = [write_run(tmp_path / "a", 0, 0.8), write_run(tmp_path / "b", 1, 0.6)]
    result = read_json(tmp_path / "b" / "eval.json")
    result["arguments"]["limit"] = 64
    write_json(tmp_path / "b" / "eval.json", result)
    rates = win_rates(report(runs, tmp_path / "out"))
    assert rates["missing (test limit 64)"] == "60.0 [50.0, 70.0] (93.26)"
    assert rates["missing (test limit default)"] == "80.0 [70.0, 90.0] (93.26)"


def test_a_run_that_was_evaluated_on_other_data_stands_there(tmp_path):
    """Not in the column of the data it was trained on, nor as another seed of the base model there."""
    runs = [write_run(tmp_path / "a", 0, 0.8), write_run(tmp_path / "b", 0, 0.6)]
    result = read_json(tmp_path / "b" / "eval.json")
    result["arguments"]["data"] = "prism:/y"
    write_json(tmp_path / "b" / "eval.json", result)
    text = report(runs, tmp_path / "out")
    assert "| multibench | prism |" in text
    rates = next(block for block in text.split("\n\n") if "win rate or accuracy" in block)
    assert "| prompted | 50.0 [40.0, 60.0] (79.76) | 50.0 [40.0, 60.0] (72.17) |" in rates


def test_a_row_is_named_by_its_folder_from_inside_that_folder(tmp_path, monkeypatch):
    """eval.py --report seed0 seed1."""
    (tmp_path / "larger-half").mkdir()
    runs = [write_run(tmp_path / "larger-half" / f"seed{seed}", seed, 0.8) for seed in range(2)]
    monkeypatch.chdir(tmp_path / "larger-half")
    assert "larger-half" in win_rates(report([Path(run).name for run in runs], tmp_path / "out"))


def test_a_run_from_before_an_option_is_a_seed_of_those_that_had_its_value(tmp_path):
    """EARLY says which value that was."""
    runs = [write_run(tmp_path / "a", 0, 0.8), write_run(tmp_path / "b", 1, 0.6)]
    written = read_json(tmp_path / "a" / "args.json")
    del written["arguments"]["n_neg"]
    write_json(tmp_path / "a" / "args.json", written)
    assert win_rates(report(runs, tmp_path / "out"))["missing"] == "80.0, 60.0 (2 seeds) (93.26)"


def test_values_that_validation_chose_do_not_split_an_experiment(tmp_path):
    """Two seeds of one sweep are seeds of it, whichever learning rate either chose."""
    runs = [write_run(tmp_path / "a", 0, 0.8, lr=1e-6), write_run(tmp_path / "b", 1, 0.6, lr=5e-7)]
    for run in ("a", "b"):
        written = read_json(tmp_path / run / "args.json")
        write_json(tmp_path / run / "args.json", written | dict(candidates=[dict(lr=1e-6), dict(lr=5e-7)]))
    assert win_rates(report(runs, tmp_path / "out"))["missing"] == "80.0, 60.0 (2 seeds) (93.26)"


def test_the_report_names_a_folder_without_an_evaluation(tmp_path):
    """A UserError."""
    with pytest.raises(UserError, match=r"eval\.json does not exist"):
        report([str(tmp_path)], tmp_path / "out")


# ------------------------------------------------------------------------------------------- recomputation

@pytest.fixture(scope="module")
def recompute():
    """results/recompute.py as a module."""
    file = Path(__file__).parents[1] / "results" / "recompute.py"
    spec = importlib.util.spec_from_file_location("recompute", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numbers_of_a_table_are_read_again_from_their_files(recompute):
    """A row as results/table.py prints it is right; with one digit changed, exactly that number is not."""
    row = "| random | 320 | 62.8 [57.8, 67.7] | 22.3 [20.5, 24.0] | 73 | 57% |"
    page = "| | n | win rate % | context gain, nats | tokens | unfinished |\n|---|---|---|---|---|---|\n{}\n"
    verdicts = [recompute.verdict(claimed, value)
                for _, claimed, value in recompute.check_tables("results/LOG.md", page.format(row))]
    assert verdicts == ["OK"] * 9
    wrong = [(claimed, recompute.verdict(claimed, value)) for _, claimed, value
             in recompute.check_tables("results/LOG.md", page.format(row.replace("67.7", "67.8")))]
    assert [pair for pair in wrong if pair[1] != "OK"] == [("67.8", "DIFFERENT: 67.7")]


def test_sentences_are_read_again_or_said_to_be_gone(recompute):
    """A right number, a wrong one, and a sentence that is not there."""
    texts = {"README.md": "(base NLL 2.05 ±\n0.07, MIPO 0.84 ± 0.01, prompting 0.72 ± 0.01; **RLAIF "
             "and RLVR** gain +27.2 ± 6.0 and +27.0 ± 10.8:",
             "results/LOG.md": "nothing of the kind"}
    verdicts: dict[str, list[str]] = {}
    for where, claimed, value in recompute.check_claims(texts):
        verdicts.setdefault(where.partition(": ")[2], []).append(recompute.verdict(claimed, value))
    assert verdicts["(base NLL {} ± {}, MIPO {} ± {}, prompting {} ± {};"] == [
        "OK", "OK", "DIFFERENT: 0.83", "OK", "OK", "OK"]
    assert verdicts["**RLAIF and RLVR** gain {} ± {} and {} ± {}:"] == ["OK"] * 4
    assert verdicts["seen contexts {}, {}, {}; unseen {}, {}, {}."] == ["NOT CLAIMED"]


def test_intervals_over_contexts_leave_each_context_out_once(recompute):
    """Of the real model on its eight unseen contexts: Student's t of eight means of 40 rows each."""
    file = Path(__file__).parents[1] / "results" / recompute.DEMO
    gains = np.array([c["trained"] - c["prompted"] for c in read_json(file)["contexts"]
                      if c["group"] == "unseen"])
    expected = scipy.stats.t.interval(0.95, 7, gains.mean(), scipy.stats.sem(gains))
    measured = recompute.over_contexts(recompute.DEMO, "unseen", "trained")
    assert (measured["low"], measured["high"]) == pytest.approx(expected, abs=1e-3)


def test_a_strategy_is_chosen_by_its_trained_model(tmp_path):
    """On validation, where prompting may do better beside the worse one."""
    runs = [write_run(tmp_path / "a", 0, 0.8), write_run(tmp_path / "b", 0, 0.7, "random")]
    for run, trained, prompted in zip(runs, (0.6, 0.7), (0.9, 0.2), strict=True):
        systems = dict(prompted=dict(win_rate=interval(prompted)), trained=dict(win_rate=interval(trained)))
        write_json(Path(run) / "eval-validation.json", dict(parts=dict(all=dict(systems=systems))))
    rates = win_rates(report(runs, tmp_path / "out"))
    assert "*" in rates["random"] and "*" not in rates["missing"]


def test_the_reports_picture_shows_the_tables_numbers(tmp_path, monkeypatch):
    """The gain of every seed with its interval, their mean, and the paper's gain over prompting."""
    drawn, plot = [], Axes.plot

    def draw(self, x, *rest, **options):
        drawn.append(tuple(np.ravel(x)))
        return plot(self, x, *rest, **options)

    monkeypatch.setattr(Axes, "plot", draw)
    runs = [write_run(tmp_path / "a", 0, 0.8), write_run(tmp_path / "b", 1, 0.9),
            write_run(tmp_path / "c", 0, 0.7, "random")]
    report(runs, tmp_path / "out")
    expected = [(20, 40), (30, 50), (30, 40), (35,), (10, 30), (20,), (93.26 - 79.76,), (89.68 - 79.76,)]
    assert drawn == [pytest.approx(x) for x in expected]


def test_data_without_contexts_gain_over_the_base_model(tmp_path, monkeypatch):
    """As the paper's number does, which stands beside; an interval without ends is clear of nothing."""
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, *rest, **options: (
        drawn.append(np.ravel(x).tolist()), plot(self, x, *rest, **options))[1])
    run = write_run(tmp_path / "a", 0, 0.8, "random", data="svamp:/x")
    result = read_json(Path(run) / "eval.json")
    block = result["parts"]["all"]
    del block["systems"]["prompted"]
    block["differences"] = {"trained - default": dict(win_rate=dict(mean=0.3, low=None, high=None, n=1))}
    write_json(Path(run) / "eval.json", result)
    row = methods(report([run], tmp_path / "out"))["random"]
    assert (row["gain, points"], row["clear"]) == ("+30.0", "0 of 1")
    assert drawn == [[30.0], [pytest.approx(52.22 - 51.67)]]


def test_the_price_is_the_divergence_only_where_all_have_it(tmp_path, monkeypatch):
    """Else how likely the responses are under the start model."""
    runs = [write_run(tmp_path / "a", 0, 0.8), write_run(tmp_path / "c", 0, 0.7, "random")]
    texts = drawn_texts(monkeypatch)
    for run in map(Path, runs):
        write_json(run / "divergence.json", dict(kl=interval(2.0, 0.5)))
        report(runs, tmp_path / "out")
        assert ("base NLL, nats per token" in texts) == (run.name == "a")
        texts.clear()


def test_without_a_gain_there_is_no_picture(tmp_path):
    run = write_run(tmp_path / "a", 0, 0.8)
    result = read_json(Path(run) / "eval.json")
    result["parts"]["all"]["differences"] = {}
    write_json(Path(run) / "eval.json", result)
    assert "| seeds |" not in report([run], tmp_path / "out")
    assert not (tmp_path / "out" / "report.png").exists()


def test_every_number_stands_under_its_name():
    """Numbers that all differ: of a difference, and of a system's columns."""
    keys = ("win_rate", "win_rate_length_matched", "score", "context_gain", "context_gain_per_token_macro",
            "self_bleu_4", "self_bleu_4_within")
    numbers = {key: interval(i / 100) | dict(n=i) for i, key in enumerate(keys, 1)}
    text = difference_line("trained - prompted", numbers | dict(mcnemar_p=0.03))
    assert text == (
        "trained - prompted: win rate +1.0 [-4.0, +6.0] (n = 1) (McNemar p 0.03), at matched length +2.0 "
        "[-3.0, +7.0] (n = 2); score +0.03 [-0.02, +0.08]\n    context gain +0.04 [-0.01, +0.09], per token "
        "+0.050 [+0.000, +0.100]; self-BLEU-4 across prompts +0.060 [+0.010, +0.110], within a prompt +0.070 "
        "[+0.020, +0.120]")
    columns = {"flexible": ("flexible", "1.0%"), "last ####": ("last_marker", "2.0%"),
               "unparsed": ("unparsed", "3.0%"), "by MI": ("choice_mi", "4.0%"), "score": ("score", "0.05"),
               "strict wins": ("strict", "6.0%"), "ties": ("ties", "7.0%"),
               "at equal len": ("length_controlled", "8.0%"), "off target": ("off_target", "9.0%"),
               "tokens": ("tokens", "0.1"), "unfinished": ("unfinished", "11%"),
               "base nll": ("nll_per_token", "0.120"), "distinct-2": ("distinct_2", "0.130"),
               "self-BLEU-4": ("self_bleu_4", "0.140"), "in a prompt": ("self_bleu_4_within", "0.150"),
               "prompt gain": ("prompt_gain", "0.2")}
    given = {key: i / 100 for i, (key, _) in enumerate(columns.values(), 1)}
    given |= dict(win_rate=interval(0.5), context_gain=interval(3.0))
    heading, line = system_lines(dict(trained=given))
    places = 63  # of the columns before: system, n, win rate, context gain
    assert heading[places:].split() == " ".join(columns).split()
    assert line[places:].split() == [text for _, text in columns.values()]
