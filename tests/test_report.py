"""report.py on runs made by hand: tables, figures, the report over runs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from data import Example
from measures import wilson
from report import entropy_figure, gain_figure, judges_figure, report, side_by_side, spread
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
    monkeypatch.setattr("report.save_figure", lambda figure, file: texts.extend(
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
                 "MIPO", "10%", "40%", "70%", "Win rate: prompting 40%, MIPO 70%", "chosen > rejected"):
        assert text in texts
    texts.clear()
    result = read_json(trained_run / "eval.json")
    write_json(trained_run / "eval.json", result | dict(run=dict(method="sft")))
    (trained_run / "metrics.jsonl").write_text('{"candidate": 1, "step": 1, "loss": 0.6}\n')
    gain_figure(trained_run, trained_run / "gain.png")
    assert "SFT" in texts and "chosen > rejected" not in texts


@pytest.mark.parametrize("systems", [
    dict(default=dict(win_rate=interval(0.1)), prompted=dict(win_rate=interval(0.4))),
    dict(default=dict(win_rate=interval(0.1)), trained=dict(win_rate=wilson(np.array([])))),
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


def test_entropies_are_drawn_of_right_and_wrong_answers(tmp_path, monkeypatch):
    """Answers without an entropy are not counted."""
    entropies = dict(default=np.array([0.2, 0.4, np.nan]), trained=np.array([0.1, 0.2, 0.3]))
    right = dict(default=np.array([1.0, 0.0, 1.0]), trained=np.ones(3))
    entropy_figure(tmp_path / "entropy.png", entropies, right, choices=4)
    assert (tmp_path / "entropy.png").read_bytes().startswith(PNG)
    texts = drawn_texts(monkeypatch)
    entropy_figure(tmp_path / "entropy.png", entropies, right, choices=4)
    assert {"default (n = 1)", "trained (n = 3)", "trained (n = 0)"} <= set(texts)


def test_answers_stand_side_by_side():
    """A row that was gained, and one that is still wrong and says so."""
    rows = [Example(str(i), f"p{i}", "test", f"c{i}") for i in range(2)]
    answers = {system: [SimpleNamespace(text=f"{system} {i}") for i in range(2)]
               for system in ("prompted", "trained")}
    won = dict(prompted=np.zeros(2), trained=np.array([1.0, 0.0]))
    lines = side_by_side(rows, answers, won).splitlines()
    assert lines == ["", "p0 [c0]", "  prompted: 'prompted 0'", "  trained:  'trained 0'",
                     "", "p1 [c1]", "  prompted: 'prompted 1'", "  trained:  'trained 1' (still wrong)"]


# ------------------------------------------------------------------------------------------- report

def write_run(folder, seed: int, rate: float, neg: str = "missing", validation: float | None = None) -> str:
    """A run on Multi-Bench with a judge J whose trained model has this win rate; the base model's is 0.5."""
    folder.mkdir()
    row = dict(win_rate=interval(rate, 0.1), self_bleu_4=rate / 2)
    base = row | dict(win_rate=interval(0.5, 0.1))
    arguments = dict(method="dpo", neg=neg, n_neg=1, softmax=False, data="multibench:/x", seed=seed,
                     model="/m/Llama-3.2-1B-Instruct")
    critic = dict(strict=base["win_rate"], tie_tolerant=row["win_rate"])
    result = dict(parts=dict(all=dict(systems=dict(default=base, prompted=base, trained=row))),
                  judges=dict(J=dict(critic=critic)))
    (folder / "args.json").write_text(json.dumps(dict(arguments=arguments)))
    (folder / "eval.json").write_text(json.dumps(result))
    if validation is not None:
        (folder / "summary.json").write_text(json.dumps(dict(chosen=dict(score=validation))))
    return str(folder)


def test_the_report_has_seeds_the_chosen_strategy_and_the_papers_numbers(tmp_path):
    """Mean and deviation over seeds, an interval of one; validation's choice has *; the paper's is last."""
    runs = [write_run(tmp_path / "a", 0, 0.8, validation=0.7),
            write_run(tmp_path / "b", 1, 0.9, validation=0.9),
            write_run(tmp_path / "c", 0, 0.95, "random", 0.6)]
    text = report(runs, tmp_path / "out")
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert text == (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    win_rates = text.split("self-BLEU-4")[0]
    assert "| missing | 85.0 ± 7.1 (2 seeds)* (93.26) |" in win_rates  # validation 0.8 against random's 0.6
    assert "| random | 95.0 [85.0, 105.0] (89.68) |" in win_rates
    assert "| prompted | 50.0 ± 0.0 (3 seeds) (79.76) |" in win_rates
    assert "0.425 ± 0.035 (2 seeds)" in lines["missing"]
    assert "| J | multibench | 50.0 [40.0, 60.0] |" in text
    assert (tmp_path / "out" / "report.png").stat().st_size > 5000


def test_the_report_names_a_folder_without_an_evaluation(tmp_path):
    """A UserError."""
    with pytest.raises(UserError, match=r"eval\.json does not exist"):
        report([str(tmp_path)], tmp_path / "out")
