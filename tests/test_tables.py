"""eval.py beyond the demo: intervals and tests against scipy, judged and task columns, the report."""

import json
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from conftest import random_model

import eval as evaluation
import judge as judging
from eval import (Response, compare, evaluate, judge_all, length_controlled, mcnemar, report, respond,
                  system_row, table, wilson)
from pairs import Example
from run import UserError
from sample import Tokenizer


@pytest.mark.parametrize(("k", "n"), [(0, 7), (7, 7), (3, 10), (120, 200), (1, 1)])
def test_wilson_is_scipys(k, n):
    values = np.array([1.0] * k + [0.0] * (n - k) + [np.nan] * 3)
    ours, theirs = wilson(values), scipy.stats.binomtest(k, n).proportion_ci(0.95, "wilson")
    assert (ours["mean"], ours["n"]) == (k / n, n)
    np.testing.assert_allclose([ours["low"], ours["high"]], [theirs.low, theirs.high], atol=1e-7)


def test_wilson_of_nothing_is_nothing():
    assert wilson(np.array([np.nan])) == dict(mean=None, low=None, high=None, n=0)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (5, 0), (8, 3), (3, 8), (40, 41)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_rows(better, worse):
    a = np.array([1.0] * better + [0.0] * worse + [1.0, 0.0, np.nan])
    b = np.array([0.0] * better + [1.0] * worse + [1.0, 0.0, 1.0])
    expected = scipy.stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert mcnemar(a, b) == pytest.approx(min(1.0, expected), rel=1e-9)


def test_length_controlled_is_the_penalised_likelihoods_maximum():
    draw = np.random.default_rng(0)
    longer = draw.normal(30, 50, 400)
    wins = (draw.random(400) < 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(longer / 50))))).astype(float)
    wins[:20] = 0.5

    def loss(w):
        z = w[0] + w[1] * np.tanh(longer / longer.std())
        return np.sum(np.logaddexp(0, z) - wins * z) + 0.5e-6 * w[0] ** 2 + 0.5e-2 * w[1] ** 2

    best = scipy.optimize.minimize(loss, np.zeros(2), tol=1e-12).x[0]
    ours = length_controlled(wins, longer)
    assert ours == pytest.approx(1 / (1 + math.exp(-best)), abs=1e-5)
    assert ours < wins.mean() - 0.05  # being longer explained a part of the wins


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_length_controlled_survives_one_sided_outcomes(value):
    rate = length_controlled(np.full(10, value), np.arange(10.0))
    assert 0 <= rate <= 1 and abs(rate - value) < 0.01


def test_length_controlled_leaves_out_what_was_not_read():
    outcomes, longer = np.array([1, 0, 1, 0.5, np.nan, np.nan]), np.array([3, -2, 1, 0, 99, -99.0])
    assert length_controlled(outcomes, longer) == length_controlled(outcomes[:4], longer[:4])


# ------------------------------------------------------------------------------------------- tasks

def response(text: str, **more) -> Response:
    return Response(text, [5] * max(1, len(text)), True, -1.0, math.nan, **more)


MATH = [Example(str(i), f"q{i}", "test", answer="8", style="math") for i in range(4)]


def test_a_tasks_row_has_strict_flexible_and_unparsed_shares():
    rows = [response("#### 8"), response("it is 8"), response("#### 9"), response("none")]
    row = system_row(MATH, rows)
    assert row["win_rate"] == wilson(np.array([1.0, 0, 0, 0])) and row["flexible"]["mean"] == 0.5
    assert (row["unparsed"], row["unparsed_flexible"]) == (0.5, 0.25)
    assert row["unparsed_interval"] == wilson(np.array([0.0, 1.0, 0.0, 1.0]))
    assert row["tokens_interval"]["mean"] == row["tokens"] and row["unfinished_interval"]["mean"] == 0.0


def test_a_tasks_difference_has_mcnemars_p_and_other_data_have_none():
    right, wrong = [response("#### 8")] * 4, [response("#### 9")] * 4
    assert compare(MATH, right, wrong)["mcnemar_p"] == pytest.approx(2 / 16)
    free = [Example(str(i), f"q{i}", "test", context="c") for i in range(4)]
    assert compare(free, right, wrong)["mcnemar_p"] is None


def test_data_without_contexts_have_two_systems_and_compare_trained_with_default(tiny):
    args = evaluation.Args(model=str(tiny), data="own.jsonl", max_new_tokens=4, slots=4)
    base, trained = (random_model(seed, max_position_embeddings=8192) for seed in (0, 1))
    answers = respond(base, trained, Tokenizer(tiny), MATH[:3], args)
    assert list(answers) == ["default", "trained"]
    result = evaluate(MATH[:3], answers)
    assert list(result["parts"]["all"]["differences"]) == ["trained - default"]
    assert all(math.isnan(r.gain) and math.isfinite(r.prompt_gain) for r in answers["trained"])
    assert "trained - default" in table(result)


CHOICE = [Example(str(i), f"Which {i}?\nA: red\nB: blue\nC: green", "test", answer="ABC"[i], style="choice",
                  choices=["red", "blue", "green"]) for i in range(3)]


def test_entropy_and_choice_by_mutual_information_by_brute_force(tiny):
    """One sequence at a time: softmax over " A", " B", " C" after the reasoning; log p(c|q) - log p(c)."""
    model, tokenizer = random_model(scale=0.3), Tokenizer(tiny)
    said = ["I think. The answer is: B, the answer is: C", "no", "THE ANSWER IS:A"]
    rows = [response(text) for text in said]
    evaluation.choice_measures(model, tokenizer, CHOICE, rows)

    def logp(prefix: list[int], ids: list[int]) -> float:
        with torch.no_grad():
            tokens = torch.tensor(prefix + ids)
            logits = model.logits(model(tokens, model.pack([(len(tokens), [])])))
        at = range(len(prefix) - 1, len(tokens) - 1)
        return sum(logits[i].log_softmax(-1)[tokens[i + 1]].item() for i in at)

    def encode(text: str) -> list[int]:
        return tokenizer.response(text)[:-1]

    for e, r, cut in zip(CHOICE, rows, ["I think. The answer is: B, the answer is:", None, "THE ANSWER IS:"],
                         strict=True):
        if cut is None:
            assert math.isnan(r.entropy)
        else:
            prefix = tokenizer.chat(e.turn(None)) + encode(cut)
            p = np.exp([logp(prefix, encode(f" {letter}")) for letter in "ABC"])
            p /= p.sum()
            assert r.entropy == pytest.approx(-(p * np.log(p)).sum(), abs=1e-4)
        question = tokenizer.chat(f"Question: {e.prompt.splitlines()[0]}\nAnswer:")
        gains = [logp(question, encode(c)) - logp(tokenizer.chat("Answer:"), encode(c)) for c in e.choices]
        assert r.choice_mi == float("ABC"[int(np.argmax(gains))] == e.answer)


def test_entropy_is_told_apart_by_what_was_right():
    rows = [response("The answer is: A", entropy=0.25), response("The answer is: C", entropy=1.0),
            response("no", entropy=math.nan)]
    row = system_row(CHOICE, rows)
    assert (row["entropy_right"]["mean"], row["entropy_right"]["n"]) == (0.25, 1)
    assert (row["entropy_wrong"]["mean"], row["entropy_wrong"]["n"]) == (1.0, 1)


# ------------------------------------------------------------------------------------------- judged data

class Scripted:
    """A judge that answers by a table: what a question's text holds decides the reply."""

    def __init__(self, **replies: str):
        self.args, self.replies = judging.JudgeArgs(judge="scripted"), replies

    def ask(self, questions, most, label):
        return [next((r for key, r in self.replies.items() if key in user.split("Assistant:")[-1]), "?")
                for _, user in questions]


TALK = [Example(f"e{i}", f"p{i}", "test", f"c{i}", f"u{i % 2}", "REF", items=[f"c{i}"], worse="WORSE")
        for i in range(4)]


def judged() -> tuple[dict, dict]:
    answers = {"default": [response("POOR")] * 4, "prompted": [response("EVEN") for _ in range(4)],
               "trained": [response("GOOD"), response("EVEN"), response("GOOD"), response("ODD")]}
    answers["default"] = [response("POOR") for _ in range(4)]
    judge = Scripted(REF="3", POOR="1", EVEN="Score: 3", GOOD="5", WORSE="4")
    return answers, judge_all(judge, TALK, answers, False)


def test_scores_win_tie_and_go_unread():
    answers, found = judged()
    assert [r.scores["scripted"] for r in answers["trained"][:3]] == [5, 3, 5]
    assert math.isnan(answers["trained"][3].scores["scripted"]) and found["unread"]["trained"] == 1
    row = system_row(TALK, answers["trained"], "scripted")
    assert (row["win_rate"]["mean"], row["win_rate"]["n"]) == (1.0, 3)  # ties win; unread counts nowhere
    assert row["strict"]["mean"] == pytest.approx(2 / 3) and row["ties"] == pytest.approx(1 / 3)
    assert system_row(TALK, answers["default"], "scripted")["win_rate"]["mean"] == 0.0
    difference = compare(TALK, answers["trained"], answers["prompted"], "scripted")["score"]
    assert difference["mean"] == pytest.approx(4 / 3)


def test_default_rows_of_one_prompt_are_scored_apart(tiny):
    """They hold one answer, but each row's context judges it anew."""
    rows = [Example(i, "p", "test", f"ITEM{i}", reference="r") for i in "12"]
    args = evaluation.Args(model=str(tiny), data="own.jsonl", max_new_tokens=4, slots=4)
    answers = respond(random_model(), None, Tokenizer(tiny), rows, args)
    judge_all(Scripted(ITEM1="2", ITEM2="5"), rows, answers, False)
    assert [r.scores["scripted"] for r in answers["default"]] == [2.0, 5.0]


def test_the_judges_own_accuracy_is_that_of_the_better_over_the_worse():
    _, found = judged()
    assert found["critic"]["strict"]["mean"] == 0.0 and found["critic"]["tie_tolerant"]["mean"] == 0.0
    answers = {"default": [response("x") for _ in TALK]}
    tied = judge_all(Scripted(REF="4", WORSE="4"), TALK, answers, False)["critic"]
    assert (tied["strict"]["mean"], tied["tie_tolerant"]["mean"]) == (0.0, 1.0)


def test_items_are_scored_one_by_one_and_averaged():
    example = Example("e", "p", "test", "a b", items=["ITEM1", "ITEM2", "ITEM3"], reference="r")
    answers = {"default": [response("text")]}
    found = judge_all(Scripted(ITEM1="2", ITEM2="5"), [example], answers, False)
    assert answers["default"][0].scores["scripted"] == 3.5 and found["unread"]["default"] == 1


def test_pairwise_counts_wins_ties_losses_and_flips(monkeypatch):
    verdicts = [(1.0, False), (0.5, True), (0.0, False), (None, False)]
    monkeypatch.setattr(judging, "compare", lambda judge, rows: verdicts)
    answers = {name: [response("GOOD" * (i + 1)) for i in range(4)] for name in evaluation.SYSTEMS}
    found = judge_all(Scripted(GOOD="3", REF="3", WORSE="1"), TALK, answers, False)["pairwise"]
    assert [found[key] for key in ("wins", "ties", "losses", "unread")] == [1, 1, 1, 1]
    assert found["win_rate"]["mean"] == 0.5 and found["flip_rate"] == pytest.approx(1 / 3)
    assert found["flip_interval"] == wilson(np.array([0.0, 1.0, 0.0]))


def test_figures_are_drawn_where_there_is_something_to_draw(tmp_path):
    answers, found = judged()
    evaluation.outcome_figure(tmp_path, "", dict(judges=dict(J=found)), TALK, answers)
    assert not (tmp_path / "judges.png").exists()  # this judge's comparisons can't be read
    read = dict(judges=dict(J=dict(pairwise=dict(wins=2, ties=1, losses=1))))
    evaluation.outcome_figure(tmp_path, "-validation", read, TALK, answers)
    rows = dict(default=[response("The answer is: A", entropy=0.25)] * 3)
    evaluation.outcome_figure(tmp_path, "", {}, CHOICE, rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["entropy.png", "judges-validation.png"]


# ------------------------------------------------------------------------------------------- report

def write_run(folder, seed: int, rate: float, neg: str = "missing", validation: float | None = None) -> str:
    folder.mkdir()
    row = dict(win_rate=dict(mean=rate, low=rate - 0.1, high=rate + 0.1, n=9), self_bleu_4=rate / 2)
    base = row | dict(win_rate=dict(mean=0.5, low=0.4, high=0.6, n=9))
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


def test_report_has_seeds_the_chosen_strategy_and_the_papers_figures(tmp_path):
    runs = [write_run(tmp_path / "a", 0, 0.8, validation=0.7),
            write_run(tmp_path / "b", 1, 0.9, validation=0.9),
            write_run(tmp_path / "c", 0, 0.95, "random", 0.6)]
    text = report(runs, tmp_path / "out")
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert text == (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    whole = text.split("self-BLEU-4")[0]
    assert "| missing | 85.0 ± 7.1 (2 seeds)* (93.26) |" in whole  # validation 0.8 against random's 0.6
    assert "| random | 95.0 [85.0, 105.0] (89.68) |" in whole
    assert "| prompted | 50.0 ± 0.0 (3 seeds) (79.76) |" in whole
    assert "0.425 ± 0.035 (2 seeds)" in lines["missing"]
    assert "| J | multibench | 50.0 [40.0, 60.0] |" in text
    assert (tmp_path / "out" / "report.png").stat().st_size > 5000


def test_report_names_a_folder_without_an_evaluation(tmp_path):
    with pytest.raises(UserError, match=r"eval\.json does not exist"):
        report([str(tmp_path)], tmp_path / "out")
