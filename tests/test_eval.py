"""eval.py against its contract: every system's responses, judging, numbers worked by hand, the program."""

import dataclasses
import json
import math
import re
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (LOWER, answer, chat_ids, completion, held_out, oracle_logp, random_model,
                      write_model)
from transformers import AutoModelForCausalLM

import eval as evaluation
import judge as judging
import responses
from checks import honours, verify
from data import Example, choice_example, load_examples
from eval import side_by_side
from folder import load
from measures import RATE, SYSTEMS, evaluate, interval, paired_differences, system_row
from report import judge_lines, table
from responses import respond
from run import UserError, parse, read_json, read_jsonl, write_json
from sample import Sample, Sampling, generate
from tokenizer import Tokenizer
from verdicts import judge_all

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------- responses

GRID = [held_out(3 * i + j, f"Question {i}?", "ABC"[j]) for i in range(3) for j in range(3)]
SAMPLING, SEED = Sampling(1.0, 0.9, 7), 3


@pytest.fixture(scope="module")
def answered(tiny):
    """(base, trained, tokenizer, answers) of GRID under the tiny model and another one as trained."""
    base, trained, tokenizer = load(tiny), random_model(seed=1), Tokenizer(tiny)
    tokenizer.stop_ids = frozenset(range(1, 320, 9))
    return base, trained, tokenizer, respond(base, trained, tokenizer, GRID, SAMPLING, SEED, slots=4)


def test_every_system_answers_its_own_prompts(answered, tiny):
    """Row i draws from (seed, i, 0): prompted by the base model, trained by the other, in context."""
    base, trained, tokenizer, answers = answered
    assert list(answers) == ["default", "prompted", "trained"]
    prompts = [chat_ids(tiny, e.user_message(e.context)) for e in GRID]
    for system, model in (("prompted", base), ("trained", trained)):
        expected = generate(model, prompts, SAMPLING, tokenizer.stop_ids, SEED)
        assert [a.ids for a in answers[system]] == [s.ids for s in expected]
        assert [a.finished for a in answers[system]] == [s.finished for s in expected]
        assert [a.text for a in answers[system]] == [tokenizer.decode(s.ids) for s in expected]
    assert len({a.finished for a in answers["prompted"] + answers["trained"]}) == 2


def test_default_answers_each_prompt_once(answered, tiny, monkeypatch):
    """Its three answers, without context, stand beside all nine rows."""
    base, _, tokenizer, answers = answered
    prompts = [chat_ids(tiny, f"Question {i}?") for i in range(3)]
    expected = generate(base, prompts, SAMPLING, tokenizer.stop_ids, SEED)
    assert [a.ids for a in answers["default"]] == [expected[i // 3].ids for i in range(9)]
    sampled = []
    monkeypatch.setattr(responses, "generate", lambda *a, **k: sampled.append(a[1]) or generate(*a, **k))
    assert len(respond(base, None, tokenizer, GRID, SAMPLING, SEED)) == 2
    assert [len(prompts) for prompts in sampled] == [3, 9]


def test_gain_and_logp_are_the_base_models(answered, tiny):
    """log p(y|x,c), less log p(y|x) or log p(y|x',c) with another x', from transformers' full logits."""
    answers = answered[-1]
    oracle = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)

    def logp(user_message: str, response: list[int]) -> float:
        return oracle_logp(oracle, chat_ids(tiny, user_message), response)

    prompts = {e.prompt for e in GRID}
    for i, e in enumerate(GRID):
        a = answers["default"][i]
        own = logp(e.prompt, a.ids)
        assert a.logp == pytest.approx(own, abs=1e-4) and math.isnan(a.gain)
        others = prompts - {e.prompt}
        assert a.prompt_gain in [pytest.approx(own - logp(x, a.ids), abs=1e-4) for x in others]
        for system in ("prompted", "trained"):
            a = answers[system][i]
            own = logp(e.user_message(e.context), a.ids)
            assert a.logp == pytest.approx(own, abs=1e-4)
            assert a.gain == pytest.approx(own - logp(e.prompt, a.ids), abs=1e-4)
            messages = [dataclasses.replace(e, prompt=x).user_message(e.context) for x in others]
            assert a.prompt_gain in [pytest.approx(own - logp(m, a.ids), abs=1e-4) for m in messages]
    assert max(abs(a.gain) for a in answers["trained"]) > 0.1


def test_the_base_model_as_trained_model_makes_no_difference(answered):
    """Identical responses; every paired difference is 0 (gains: to fp32 rounding), and has an interval."""
    base, _, tokenizer, _ = answered
    answers = respond(base, base, tokenizer, GRID, SAMPLING, SEED, slots=4)
    prompted, trained = answers["prompted"], answers["trained"]
    assert [(a.ids, a.text, a.finished) for a in prompted] == [(a.ids, a.text, a.finished) for a in trained]
    checked = [dataclasses.replace(e, check=LOWER) for e in GRID]
    differences = paired_differences(checked, trained, prompted)
    zero = dict(mean=0.0, low=0.0, high=0.0, n=9)
    rate = differences["win_rate"]
    assert rate == differences["win_rate_length_matched"]
    assert (rate["mean"], rate["n"]) == (0.0, 9) and rate["low"] == -rate["high"] < -0.1
    assert differences["context_gain"] == pytest.approx(zero, abs=5e-5)
    assert differences["context_gain_per_token_macro"] == pytest.approx(zero, abs=5e-5)
    assert differences["self_bleu_4"]["mean"] == differences["self_bleu_4_within"]["mean"] == 0.0


def test_rows_without_contexts_have_no_gain(answered):
    """A prompt alone is answered by the base and the trained model; there is no context to leave out."""
    base, _, tokenizer, _ = answered
    answers = respond(base, base, tokenizer, [held_out(0, "Why?"), held_out(1, "How?")], SAMPLING, SEED)
    assert all(math.isnan(a.gain) for of_system in answers.values() for a in of_system)
    assert list(answers) == ["default", "trained"]
    assert [a.ids for a in answers["trained"]] == [a.ids for a in answers["default"]]


def test_a_row_without_a_context_among_others_has_no_gain(answered):
    """Its prompted response is measured as any other, its context gain is NaN."""
    base, _, tokenizer, _ = answered
    rows = [held_out(0, "Why?"), held_out(1, "How?", "A")]
    prompted = respond(base, None, tokenizer, rows, SAMPLING, SEED)["prompted"]
    assert [math.isnan(a.gain) for a in prompted] == [True, False]
    assert all(math.isfinite(a.logp) and math.isfinite(a.prompt_gain) for a in prompted)


def test_with_one_prompt_there_is_no_prompt_gain(answered):
    """No other prompt to compare with: NaN, no mean, and a line that says why."""
    base, _, tokenizer, _ = answered
    rows = [held_out(0, "Why?", "A"), held_out(1, "Why?", "B")]
    answers = respond(base, base, tokenizer, rows, SAMPLING, SEED)
    assert all(math.isnan(a.prompt_gain) for of_system in answers.values() for a in of_system)
    result = evaluate(rows, answers)
    assert result["parts"]["all"]["systems"]["trained"]["prompt_gain"] is None
    assert "no prompt gain of default, prompted, trained: there is one prompt only" in table(result)


def test_cached_answers_are_not_sampled_again(answered, monkeypatch):
    """With the base model's answers at hand only the trained model samples; the caller's dict stays as it is.
    """
    base, trained, tokenizer, answers = answered
    cached = {system: answers[system] for system in ("default", "prompted")}
    sampled = []
    monkeypatch.setattr(responses, "generate", lambda *a, **k: sampled.append(a[0]) or generate(*a, **k))
    again = respond(base, trained, tokenizer, GRID, SAMPLING, SEED, cached=cached)
    assert sampled == [trained] and list(cached) == ["default", "prompted"]
    assert again["default"] is answers["default"] and again["prompted"] is answers["prompted"]
    assert [a.ids for a in again["trained"]] == [a.ids for a in answers["trained"]]


# ------------------------------------------------------------------------------------------- system prompts

def test_system_prompts_stand_in_every_prompt(answered, tiny, monkeypatch):
    """Of sampling and of all three measurements, choices included; a prompt under two system prompts has two
    default responses, and the other prompt that its gain is measured with is another prompt."""
    base, _, tokenizer, _ = answered
    examples = [dataclasses.replace(held_out(i, f"Question {i // 2}?", "A"), system=system)
                for i, system in enumerate(("Be kind.", None, "Be kind.", "Be brief."))]
    sampled, scored = [], []
    monkeypatch.setattr(responses, "generate", lambda *a, **k: sampled.append(a[1]) or generate(*a, **k))
    monkeypatch.setattr(responses, "group_logps", lambda model, groups, label: scored.append(
        [prompt for prompt, _ in groups]) or [[0.0] * len(groups[0][1]) for _ in groups])
    respond(base, None, tokenizer, examples, SAMPLING, SEED)

    def prompts(contexts: bool, shift: int = 0) -> list[list[int]]:
        asked = [dataclasses.replace(e, prompt=f"Question {(i // 2 + shift) % 2}?")
                 for i, e in enumerate(examples)]
        return [tokenizer.chat(e.user_message(e.context if contexts else None), e.system) for e in asked]

    bare, full = prompts(contexts=False), prompts(contexts=True)
    assert sampled == [bare, full] and len({tuple(ids) for ids in full}) == 4
    assert scored == [bare, prompts(False, 1), full, prompts(True, 1), bare]
    scored.clear()
    asked = [dataclasses.replace(e, system="Be brief.") for e in CHOICE]
    responses.choice_measures(base, tokenizer, asked, [answer("The answer is: A")] * 3)
    texts = [tokenizer.show(ids) for prompts in scored for ids in prompts]
    start = "<|im_start|>system\nBe brief.<|im_end|>"
    assert len(texts) == 9 and all(text.startswith(start) for text in texts)


def test_a_runs_system_prompt_and_template_are_its_evaluations_too(finished_run, data, call, tmp_path):
    """From args.json unless the command names others; in the settings, so that --reuse compares them."""
    file = finished_run.parent / "base"
    shutil.copytree(read_json(finished_run / "args.json")["arguments"]["model"], file)
    config = read_json(file / "tokenizer_config.json")
    config["chat_template"] += "{% if add_generation_prompt and mood %}{{ mood }}{% endif %}"
    write_json(file / "tokenizer_config.json", config)
    arguments = dict(model=str(file), data=str(data), dtype="float32", max_new_tokens=2)
    saved = arguments | dict(system="Be kind.", template=["mood=glad"])
    write_json(finished_run / "args.json", dict(arguments=saved))
    told = dict(system="Be brief.", template=("mood=sad",))
    for more, system, mood in (({}, "Be kind.", "glad"), (told, "Be brief.", "sad")):
        plan = evaluation.resolve(evaluation.Args(model=str(finished_run), **more))
        assert {e.system for e in plan.examples} == {system}
        assert plan.settings["template"] == [f"mood={mood}"] and plan.args.template == (f"mood={mood}",)
    call("--model", finished_run, flags=[])
    call("--model", finished_run, "--reuse", finished_run, "--out", tmp_path / "again", flags=[])
    with pytest.raises(UserError, match=r"--reuse .*template \['mood=glad'\], not \['mood=sad'\]"):
        call("--model", finished_run, "--reuse", finished_run, "--template", "mood=sad", "--out",
             tmp_path / "other", flags=[])


def test_thoughts_are_no_part_of_an_answer(answered, monkeypatch):
    """Nor of what checks, judges and references say; their ids stay, and are measured."""
    base, _, tokenizer, _ = answered
    thought = "<think>She wants 9 words, in CAPITALS!! #### 9</think> "
    ids = [*tokenizer.encode(thought + "freeze it."), tokenizer.end_token]
    monkeypatch.setattr(responses, "generate", lambda *rest: [Sample(ids, [], True)])
    [given] = respond(base, None, tokenizer, [held_out(0, "How?")], SAMPLING, SEED)["default"]
    assert given.text == "freeze it." and given.ids == ids
    for check in (LOWER, ["max_words", 2], ["starts_with", "freeze"]):
        assert honours(check, thought + "freeze it.")
    assert not honours(["emoji"], thought + "freeze it.") and not honours(LOWER, "<think>it never ends")
    for example, right in ((MATH[0], "#### 8"), (Example("own", "q", "test", answer="8"), "8"),
                           (Example("words", "q", "test", answer="eight"), "It is eight.")):
        assert verify(example, thought + right) and not verify(example, f"<think>{right}</think> No")
    judge, asked = Scripted(REF="3"), []
    judge.ask = lambda questions, *rest: asked.extend(questions) or ["4"] * len(questions)
    row = dataclasses.replace(TALK[0], reference=thought + "REF", human_rejected=thought + "REJECTED")
    judge_all(judge, [row], {"default": [given]}, write_rubrics=False)
    assert len(asked) == 3 and not any("CAPITALS" in user for _, user in asked)


# ------------------------------------------------------------------------------------------- tasks

MATH = [Example(str(i), f"q{i}", "test", answer="8", style="math") for i in range(4)]
CHOICE = [choice_example(str(i), f"Which {i}?", ["red", "blue\nor teal", ""], i, "test") for i in range(3)]


def test_a_tasks_row_has_strict_flexible_and_unparsed_shares():
    """Of four answers one is right strictly read and two flexibly; two and one can't be read."""
    row = system_row(MATH, [answer(text) for text in ("#### 8", "it is 8", "#### 9", "none")])
    prompts = [e.prompt for e in MATH]
    assert row["win_rate"] == interval(np.array([1.0, 0, 0, 0]), prompts, bounds=RATE)
    assert row["flexible"]["mean"] == 0.5
    assert (row["unparsed"], row["unparsed_flexible"]) == (0.5, 0.25)
    assert row["unparsed_interval"] == interval(np.array([0.0, 1.0, 0.0, 1.0]), prompts, bounds=RATE)
    assert row["tokens_interval"]["mean"] == row["tokens"] and row["unfinished_interval"]["mean"] == 0.0


def test_a_tasks_difference_has_mcnemars_p_and_other_data_have_none():
    """Four rows of four gained: p is 2 / 2^4."""
    right, wrong = [answer("#### 8")] * 4, [answer("#### 9")] * 4
    assert paired_differences(MATH, right, wrong)["mcnemar_p"] == pytest.approx(2 / 16)
    free = [held_out(i, f"q{i}", "C") for i in range(4)]
    assert paired_differences(free, right, wrong)["mcnemar_p"] is None


def test_rows_that_depend_on_each_other_have_no_p():
    """McNemar's test takes rows for independent: four of one user are not."""
    right, wrong = [answer("#### 8")] * 4, [answer("#### 9")] * 4
    of_one_user = [dataclasses.replace(example, user="u") for example in MATH]
    assert paired_differences(of_one_user, right, wrong)["mcnemar_p"] is None


def test_data_without_contexts_compare_trained_with_default(tiny):
    """Two systems, one difference, in the numbers and in the printed table."""
    base, trained = (random_model(seed, max_position_embeddings=8192) for seed in (0, 1))
    answers = respond(base, trained, Tokenizer(tiny), MATH[:3], Sampling(1.0, 1.0, 4), seed=0)
    assert list(answers) == ["default", "trained"]
    result = evaluate(MATH[:3], answers)
    assert list(result["parts"]["all"]["differences"]) == ["trained - default"]
    assert all(math.isnan(a.gain) and math.isfinite(a.prompt_gain) for a in answers["trained"])
    assert "trained - default" in table(result)


def test_entropy_and_choice_by_mutual_information_by_brute_force(tmp_path):
    """One sequence at a time: softmax over " A", " B", " C" after the reasoning; log p(c|q) - log p(c), also
    of a choice of two lines, and of an empty one, which is a blank."""
    folder = write_model(tmp_path / "model", scale=0.3)
    tokenizer, oracle = Tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = ["I think. The answer is: B, the answer is: C", "no", "THE ANSWER IS:A"]
    reasonings = ["I think. The answer is: B, the answer is:", None, "THE ANSWER IS:"]
    given = [answer(text) for text in texts]
    measured = responses.choice_measures(load(folder), tokenizer, CHOICE, given)
    assert all(math.isnan(a.choice_mi) for a in given)  # the caller's stay as they are

    for e, a, reasoning in zip(CHOICE, measured, reasonings, strict=True):
        if reasoning is None:
            assert math.isnan(a.entropy)
        else:
            prefix = tokenizer.chat(e.user_message(None)) + tokenizer.encode(reasoning)
            p = np.exp([oracle_logp(oracle, prefix, tokenizer.encode(f" {letter}")) for letter in "ABC"])
            p /= p.sum()
            assert a.entropy == pytest.approx(-(p * np.log(p)).sum(), abs=1e-4)
        question, nothing = f"Question: {e.prompt.splitlines()[0]}\nAnswer:", "Answer:"
        asked, alone = ([oracle_logp(oracle, tokenizer.chat(message), tokenizer.encode(choice or " "))
                         for choice in e.choices] for message in (question, nothing))
        gains = np.subtract(asked, alone)
        assert a.choice_mi == float("ABC"[int(np.argmax(gains))] == e.answer)


def test_entropy_is_averaged_over_right_and_wrong_answers_apart():
    """An answer without an entropy is in neither mean."""
    right, wrong = answer("The answer is: A", entropy=0.25), answer("The answer is: C", entropy=1.0)
    row = system_row(CHOICE, [right, wrong, answer("no", entropy=math.nan)])
    assert (row["entropy_right"]["mean"], row["entropy_right"]["n"]) == (0.25, 1)
    assert (row["entropy_wrong"]["mean"], row["entropy_wrong"]["n"]) == (1.0, 1)


# ------------------------------------------------------------------------------------------- judging

class Scripted:
    """A judge that answers by a table: what a question's text holds decides the reply."""

    def __init__(self, **replies: str):
        self.args, self.replies = judging.JudgeArgs(judge="scripted"), replies

    def ask(self, questions, *rest):
        texts = [user.split("Assistant:")[-1] for _, user in questions]
        return [next((reply for key, reply in self.replies.items() if key in text), "?") for text in texts]


TALK = [Example(f"e{i}", f"p{i}", "test", f"c{i}", f"u{i % 2}", "REF", items=[f"c{i}"],
                human_rejected="REJECTED") for i in range(4)]


@pytest.fixture
def judged() -> tuple[dict, dict]:
    """Answers that the judge scores 1 (default), 3 (prompted) and 5, 3, 5, unreadably (trained); it gives the
    reference 3 and the response that people rejected 4."""
    answers = {"default": [answer("POOR")] * 4, "prompted": [answer("EVEN")] * 4,
               "trained": [answer(text) for text in ("GOOD", "EVEN", "GOOD", "ODD")]}
    judge = Scripted(REF="3", POOR="1", EVEN="Score: 3", GOOD="5", REJECTED="4")
    return judge_all(judge, TALK, answers, write_rubrics=False)


def test_trained_responses_are_compared_with_prompted_ones(monkeypatch):
    """In this order: the first one's share of wins is the judge's win rate."""
    asked = []
    monkeypatch.setattr(judging, "compare",
                        lambda judge, rows: asked.extend(rows) or [(1.0, False)] * len(rows))
    answers = {system: [answer(system)] * len(TALK) for system in SYSTEMS}
    judge_all(Scripted(), TALK, answers, write_rubrics=False)
    assert [given[1:] for given in asked] == [("trained", "prompted")] * len(TALK)


def test_a_score_wins_ties_or_goes_unread(judged):
    """At least the reference's score wins; what can't be read counts nowhere."""
    answers, verdicts = judged
    assert [a.scores["scripted"] for a in answers["trained"][:3]] == [5, 3, 5]
    assert math.isnan(answers["trained"][3].scores["scripted"]) and verdicts["unread"]["trained"] == 1
    row = system_row(TALK, answers["trained"], "scripted")
    assert (row["win_rate"]["mean"], row["win_rate"]["n"]) == (1.0, 3)
    assert row["strict"]["mean"] == pytest.approx(2 / 3) and row["ties"] == pytest.approx(1 / 3)
    assert system_row(TALK, answers["default"], "scripted")["win_rate"]["mean"] == 0.0
    differences = paired_differences(TALK, answers["trained"], answers["prompted"], "scripted")
    assert differences["score"]["mean"] == pytest.approx(4 / 3)


def test_every_judge_has_its_scores_in_the_table(judged):
    """Also where checks or another judge decide what wins."""
    verdicts = judged[1]["systems"]
    assert [verdicts[system]["score"]["mean"] for system in SYSTEMS] == [1, 3, pytest.approx(13 / 3)]
    assert [verdicts[system]["win_rate"]["mean"] for system in SYSTEMS] == [0, 1, 1]
    lines = judge_lines("scripted", judged[1])
    assert any(re.match(r"  prompted: score 3\.00 \[.*, at least the reference's in 100\.0 \[", line)
               for line in lines)


def test_a_rubric_is_written_where_the_data_have_none(monkeypatch):
    """And only there; those that cannot be read are counted."""
    asked, criteria = [], []
    monkeypatch.setattr(judging, "rubrics", lambda judge, contexts: (
        asked.extend(contexts), ["written", None])[1])
    monkeypatch.setattr(judging, "compare", lambda judge, rows: (
        criteria.extend(row[0] for row in rows), [(1.0, False)] * len(rows))[1])
    rows = [dataclasses.replace(example, rubric=rubric)
            for example, rubric in zip(TALK, ("own", None, "own", None), strict=True)]
    answers = {system: [answer("GOOD")] * 4 for system in SYSTEMS}
    _, verdicts = judge_all(Scripted(GOOD="3", REF="3", REJECTED="1"), rows, answers, write_rubrics=True)
    assert asked == ["c1", "c3"] and verdicts["pairwise"]["rubrics_unread"] == 1
    assert criteria[:3] == ["own", "written", "own"] and criteria[3].endswith("preference of the user: c3")


def test_one_answer_beside_several_contexts_is_scored_for_each():
    """`default` answers a prompt once, but each row's context judges that answer anew."""
    rows = [Example(i, "p", "test", f"ITEM{i}", reference="r") for i in "12"]
    given = {"default": [answer("text")] * 2}
    answers, _ = judge_all(Scripted(ITEM1="2", ITEM2="5"), rows, given, write_rubrics=False)
    assert [a.scores["scripted"] for a in answers["default"]] == [2.0, 5.0]
    assert given["default"][0].scores == {}  # the caller's stay as they are


def test_a_second_judge_leaves_the_firsts_scores():
    """Every judge's scores of an answer and of the reference stand side by side."""
    first, second = Scripted(text="2", REF="3"), Scripted(text="5", REF="4")
    second.args.judge = "another"
    answers = {"default": [answer("text")] * 4}
    for judge in (first, second):
        answers, _ = judge_all(judge, TALK, answers, write_rubrics=False)
    assert answers["default"][0].scores == dict(scripted=2, another=5)
    assert answers["default"][0].reference_scores == dict(scripted=3, another=4)


def test_the_judges_own_accuracy_is_that_of_the_preferred_over_the_rejected(judged):
    """The judge of `judged` prefers what people rejected; one that ties is right only where ties count."""
    assert judged[1]["critic"]["strict"]["mean"] == judged[1]["critic"]["tie_tolerant"]["mean"] == 0.0
    answers = {"default": [answer("x")] * 4}
    _, verdicts = judge_all(Scripted(REF="4", REJECTED="4"), TALK, answers, write_rubrics=False)
    assert verdicts["critic"]["strict"]["mean"] == 0.0 and verdicts["critic"]["tie_tolerant"]["mean"] == 1.0


def test_a_contexts_items_are_scored_one_by_one_and_averaged():
    """Of three items one can't be read: the mean is that of the other two."""
    row = Example("e", "p", "test", "a b", items=["ITEM1", "ITEM2", "ITEM3"], reference="r")
    given = {"default": [answer("text")]}
    answers, verdicts = judge_all(Scripted(ITEM1="2", ITEM2="5"), [row], given, write_rubrics=False)
    assert answers["default"][0].scores["scripted"] == 3.5 and verdicts["unread"]["default"] == 1


def test_an_item_that_goes_unread_for_one_system_counts_for_none():
    """Else means would be of different questions: here the third item, and the second for the reference."""
    row = Example("e", "p", "test", "a b c", items=["ITEM1", "ITEM2", "ITEM3"], reference="REF")

    class ByItem(Scripted):
        def ask(self, questions, *rest):
            replies = {("REF", "ITEM2"): "?", ("ODD", "ITEM3"): "?", ("EVEN", "ITEM3"): "1"}
            return [next((reply for words, reply in replies.items() if all(w in user for w in words)), "4")
                    for _, user in questions]

    given = {"prompted": [answer("EVEN")], "trained": [answer("ODD")]}
    answers, verdicts = judge_all(ByItem(), [row], given, write_rubrics=False)
    assert answers["prompted"][0].scores["scripted"] == answers["trained"][0].scores["scripted"] == 4
    assert answers["prompted"][0].reference_scores["scripted"] == 4
    assert verdicts["items"] == dict(asked=3, shared=1)
    assert (verdicts["unread"]["reference"], verdicts["unread"]["trained"]) == (1, 1)


def test_equal_systems_stay_equal_where_the_judge_reads_one_of_them_less():
    """Half of 40 rows are lost by both; of the trained system's lost ones the judge can read every third."""
    rows = [Example(f"e{i}", f"p{i}", "test", f"c{i}", reference="REF") for i in range(40)]
    prompted = [answer("GOOD" if i % 2 else "POOR") for i in range(40)]
    trained = [answer("GOOD" if i % 2 else "POOR" if i % 3 == 0 else "ODD") for i in range(40)]
    judge = Scripted(REF="3", POOR="1", GOOD="5")
    answers, _ = judge_all(judge, rows, dict(prompted=prompted, trained=trained), write_rubrics=False)
    block = evaluate(rows, answers, "scripted")["parts"]["all"]
    rates = [block["systems"][system]["win_rate"] for system in ("prompted", "trained")]
    assert rates[0] == rates[1] and rates[0]["n"] == 27
    difference = block["differences"]["trained - prompted"]["win_rate"]
    assert (difference["mean"], difference["n"]) == (0.0, 27)


def test_comparisons_count_wins_ties_losses_and_flips(monkeypatch):
    """One of each and one that can't be read; a third of the readable ones flips with the order."""
    outcomes = [(1.0, False), (0.5, True), (0.0, False), (None, False)]
    monkeypatch.setattr(judging, "compare", lambda judge, rows: outcomes)
    answers = {system: [answer("GOOD" * (i + 1)) for i in range(4)] for system in SYSTEMS}
    _, verdicts = judge_all(Scripted(GOOD="3", REF="3", REJECTED="1"), TALK, answers, write_rubrics=False)
    pairwise = verdicts["pairwise"]
    assert [pairwise[key] for key in ("wins", "ties", "losses", "unread")] == [1, 1, 1, 1]
    assert pairwise["win_rate"]["mean"] == 0.5
    assert pairwise["flip_interval"] == interval(np.array([0.0, 1.0, 0.0]), ["u0", "u1", "u0"], bounds=RATE)


def test_answers_stand_side_by_side():
    """A row that was gained, and one that is still wrong and says so; one that was lost is neither."""
    rows = [Example(str(i), f"p{i}", "test", f"c{i}") for i in range(3)]
    answers = {system: [answer(f"{system} {i}") for i in range(3)]
               for system in ("prompted", "trained")}
    won = dict(prompted=np.array([0.0, 0.0, 1.0]), trained=np.array([1.0, 0.0, 0.0]))
    lines = side_by_side(rows, answers, won).splitlines()
    assert lines == ["", "p0 [c0]", "  prompted: 'prompted 0'", "  trained:  'trained 0'",
                     "", "p1 [c1]", "  prompted: 'prompted 1'", "  trained:  'trained 1' (still wrong)"]


# ------------------------------------------------------------------------------------------- the program

FLAGS = ["--max-new-tokens", "5", "--dtype", "float32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Nine rows without checks: two to train, three for validation, two prompts x two contexts to test."""
    parts = {"train": 2, "validation": 3, "test": 4}
    rows = [{"id": f"{split}{i}", "prompt": f"{split} {i // 2}?", "context": f"I am {i}.", "split": split}
            for split, count in parts.items() for i in range(count)]
    file = tmp_path_factory.mktemp("data") / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def finished_run(tiny, tmp_path) -> Path:
    """What eval.py reads of a run of train.py: args.json, which names the base model, and model/."""
    folder = tmp_path / "run"
    write_model(folder / "model", seed=1)
    write_json(folder / "args.json", dict(arguments=dict(model=str(tiny), data="demo", method="dpo")))
    return folder


@pytest.fixture
def call(monkeypatch):
    """(arguments) -> eval.py inside this process."""
    def program(*argv, flags=FLAGS) -> None:
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv), *flags])
        evaluation.program()

    return program


def test_a_run_is_evaluated_on_the_whole_test_part(finished_run, data, tmp_path):
    """By a process of its own: responses.jsonl with ten keys a line, eval.json, a table; three systems."""
    done = subprocess.run([sys.executable, ROOT / "eval.py", "--model", finished_run, "--data", data, *FLAGS],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(finished_run)) == ["args.json", "eval.json", "model", "responses.jsonl"]
    lines = [line for _, line in read_jsonl(finished_run / "responses.jsonl")]
    keys = ["id", "prompt", "context", "response", "system", "ids", "finished", "logp", "gain", "prompt_gain"]
    assert all(list(line) == keys for line in lines)
    examples = load_examples(str(data), "test")
    assert Counter((r["id"], r["prompt"], r["context"], r["system"]) for r in lines) == Counter(
        (e.id, e.prompt, e.context, system) for e in examples for system in SYSTEMS)
    default = {(r["prompt"], r["response"]) for r in lines if r["system"] == "default"}
    assert len(default) == 2  # one answer a prompt
    result = read_json(finished_run / "eval.json")
    systems = result["parts"]["all"]["systems"]
    assert list(systems) == ["default", "prompted", "trained"]
    for row in systems.values():
        assert row["win_rate"]["mean"] is None and 1 <= row["tokens"] <= 5 and row["nll_per_token"] > 0
    assert systems["trained"]["context_gain"]["n"] == 4 and systems["default"]["context_gain"]["mean"] is None
    assert result["arguments"]["temperature"] == 0.1 and result["arguments"]["top_p"] == 0.9
    assert "NaN" not in (finished_run / "eval.json").read_text()
    assert all(name in done.stdout for name in ("default", "prompted", "trained - prompted"))


def test_responses_are_sampled_as_the_data_set_says(finished_run, data, call, monkeypatch):
    """Temperature 0.1 and top-p 0.9 unless the command names others; the arguments object stays as it is."""
    used = []
    monkeypatch.setattr(responses, "generate", lambda *a, **k: used.append(a[2]) or generate(*a, **k))
    call("--model", finished_run, "--data", data)
    assert set(used) == {Sampling(0.1, 0.9, 5)}
    used.clear()
    args = evaluation.Args(model=str(finished_run), data=str(data), temperature=0.5, max_new_tokens=4,
                           out=str(finished_run / "warm"))
    before = dataclasses.replace(args)
    evaluation.evaluation(args)
    assert set(used) == {Sampling(0.5, 0.9, 4)} and args == before


def test_validation_has_files_of_its_own(finished_run, data, call):
    """eval-validation.json and its responses; those of the test part stay as they are."""
    test_files = [finished_run / "eval.json", finished_run / "responses.jsonl"]
    for file in test_files:
        file.write_text("kept")
    call("--model", finished_run, "--data", data, "--split", "validation")
    assert [file.read_text() for file in test_files] == ["kept", "kept"]
    assert read_json(finished_run / "eval-validation.json")["arguments"]["split"] == "validation"
    lines = [line for _, line in read_jsonl(finished_run / "responses-validation.jsonl")]
    assert {r["id"] for r in lines} == {"validation0", "validation1", "validation2"} and len(lines) == 9


@pytest.mark.parametrize(("flags", "contexts"), [
    ([], "of the run"), (["--contexts", "given"], "given"), (["--data", "OTHER"], ""),
])
def test_contexts_are_the_runs_unless_the_command_says_or_data_are_others(flags, contexts, finished_run, data,
                                                                         tmp_path, monkeypatch):
    """A file of contexts that were inferred for the run's own data goes with these data alone."""
    other = shutil.copyfile(data, tmp_path / "other.jsonl")
    written = read_json(finished_run / "args.json")
    written["arguments"] |= dict(data=str(data), contexts="of the run")
    write_json(finished_run / "args.json", written)
    used = []
    monkeypatch.setattr(evaluation, "examples_for",
                        lambda args, split: used.append(args.contexts) or load_examples(args.data, split))
    flags = [str(other) if flag == "OTHER" else flag for flag in flags]
    evaluation.resolve(parse(evaluation.Args, ["--model", str(finished_run), *flags, *FLAGS]))
    assert used == [contexts]


@pytest.mark.parametrize("written", [{}, dict(arguments={}), dict(arguments=dict(model=1, data="demo"))])
def test_a_run_without_its_arguments_is_named(written, finished_run, call):
    write_json(finished_run / "args.json", written)
    with pytest.raises(UserError, match=r"args\.json"):
        call("--model", finished_run)


def test_prompts_a_run_has_trained_on_are_not_tested(finished_run, call, tmp_path):
    """Data, seed of the split and length are the run's: its training prompts stay out of the test part."""
    rows = [{"prompt": f"Question {i}?", "context": f"I am {i}."} for i in range(60)]
    file = tmp_path / "whole.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = read_json(finished_run / "args.json")["arguments"]
    arguments.update(data=str(file), seed=3, max_new_tokens=2)
    write_json(finished_run / "args.json", dict(arguments=arguments))
    call("--model", finished_run, flags=[])
    tested = {line["prompt"] for _, line in read_jsonl(finished_run / "responses.jsonl")}
    assert tested == {e.prompt for e in load_examples(str(file), "test", 3)}
    assert tested != {e.prompt for e in load_examples(str(file), "test", 0)}
    assert read_json(finished_run / "eval.json")["parts"]["all"]["systems"]["trained"]["tokens"] <= 2


@pytest.mark.parametrize(("saved", "flags", "dtype"), [
    ("bfloat16", [], "bfloat16"), ("bfloat16", ["--dtype", "float32"], "float32"), ("float32", [], "float32"),
])  # fmt: skip
def test_a_run_is_evaluated_in_its_own_arithmetic(saved, flags, dtype, finished_run, data, call, monkeypatch):
    """The run's dtype unless the command names another, for both models; saved fp32 is not rounded again."""
    arguments = read_json(finished_run / "args.json")["arguments"]
    arguments |= dict(dtype="bfloat16", save_dtype=saved)
    write_json(finished_run / "args.json", dict(arguments=arguments))
    loaded = []
    monkeypatch.setattr(evaluation, "load", lambda name, dtype, **k: loaded.append(dtype) or load(name, **k))
    call("--model", finished_run, "--data", data, "--max-new-tokens", "2", flags=flags)
    assert loaded == [getattr(torch, dtype)] * 2
    assert read_json(finished_run / "eval.json")["settings"]["dtype"] == dtype


def test_a_bare_model_has_two_systems_and_needs_a_folder(tiny, data, call, tmp_path):
    """Without --out a UserError that names it; the model's own folder is not touched."""
    before = sorted(os.listdir(tiny))
    with pytest.raises(UserError, match="--out"):
        call("--model", tiny, "--data", data)
    call("--model", tiny, "--data", data, "--out", tmp_path / "new" / "folder")
    assert sorted(os.listdir(tiny)) == before
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["eval.json", "responses.jsonl"]
    lines = [line for _, line in read_jsonl(tmp_path / "new" / "folder" / "responses.jsonl")]
    assert Counter(r["system"] for r in lines) == dict(default=4, prompted=4)
    block = read_json(tmp_path / "new" / "folder" / "eval.json")["parts"]["all"]
    assert list(block["systems"]) == ["default", "prompted"]
    assert list(block["differences"]) == ["prompted - default"]


def test_the_demo_has_win_rates_and_a_picture_of_the_gain(finished_run, call, capsys):
    """64 of the rows: every number is there and in range, contexts are listed, gain.png is drawn."""
    steps = [dict(candidate=0, step=i, loss=0.7, accuracy=0.5, accuracy_chosen=0.5, accuracy_rejected=0.5)
             for i in (1, 2)]
    (finished_run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    write_json(finished_run / "summary.json", {})
    call("--model", finished_run, "--limit", "64")
    assert (finished_run / "gain.png").read_bytes().startswith(b"\x89PNG")
    result = read_json(finished_run / "eval.json")
    assert set(result["parts"]) == {"all", "seen", "unseen"}
    counts = {p: sum(c["n"] for c in result["contexts"] if p in ("all", c["group"])) for p in result["parts"]}
    assert counts["all"] == 64 and len(result["contexts"]) > 20 and counts["seen"] > counts["unseen"]
    for part, n in counts.items():
        for row in result["parts"][part]["systems"].values():
            assert 0 <= row["win_rate"]["low"] <= row["win_rate"]["mean"] <= row["win_rate"]["high"] <= 1
            assert row["win_rate"]["n"] == n
            assert 0 <= row["off_target"] <= 1
            assert 0 <= row["self_bleu_4"]["mean"] <= 1 and 0 <= row["self_bleu_4_within"]["mean"] <= 1
    printed = capsys.readouterr().out
    assert all(c["context_id"] in printed for c in result["contexts"])


@pytest.mark.parametrize(("remove", "flags", "word"), [
    ("model", [], "not finished"), (None, ["--data", "none.jsonl"], r"none\.jsonl"),
    (None, ["--data", "demos"], "--data"),
])  # fmt: skip
def test_what_cannot_be_evaluated_leaves_nothing(remove, flags, word, finished_run, data, call):
    """A run without its model, data that are not there: a UserError, no file."""
    if remove:
        shutil.rmtree(finished_run / remove)
    before = sorted(os.listdir(finished_run))
    with pytest.raises(UserError, match=word):
        call("--model", finished_run, *(flags or ["--data", data]))
    assert sorted(os.listdir(finished_run)) == before


# ------------------------------------------------------------------------------- a judge that fails

def judged_flags(server, folder: Path) -> list:
    """eval.py's flags for a judge at this server."""
    return ["--judge", "m", "--judge-url", server.url, "--judge-cache", folder / "verdicts.jsonl",
            "--judge-at-once", "1"]


def verdict(text: str, nth: int = 0, arrival: int = 0) -> dict:
    """A judge's answer: one score and one choice for everything."""
    return dict(content="response_a" if "Response_a" in text else "4")


def count_samples(monkeypatch) -> list[int]:
    """How many prompts each of eval.py's calls of `generate` has from now on."""
    counts: list[int] = []
    monkeypatch.setattr(responses, "generate",
                        lambda *a, **k: counts.append(len(a[1])) or generate(*a, **k))
    return counts


def test_a_judge_that_refuses_is_noticed_before_sampling(finished_run, data, call, serve, tmp_path,
                                                         monkeypatch):
    """One question, one line; nothing is sampled or written."""
    server, counts = serve(lambda *_: dict(status=403, body=b"error code: 1010")), count_samples(monkeypatch)
    before = sorted(os.listdir(finished_run))
    with pytest.raises(UserError, match="403: error code: 1010"):
        call("--model", finished_run, "--data", data, *judged_flags(server, tmp_path))
    assert len(server.asked) == 1 and counts == [] and sorted(os.listdir(finished_run)) == before


def test_a_judge_that_fails_later_costs_no_responses(finished_run, data, call, serve, tmp_path, monkeypatch):
    """They are written before they are judged; the same command goes on from them, to the same numbers."""
    server, counts = serve(verdict), count_samples(monkeypatch)
    command = ["--model", finished_run, "--data", data]
    call(*command, *judged_flags(server, tmp_path / "undisturbed"), "--out", tmp_path / "whole")
    assert sum(counts) == 10 and sorted(os.listdir(tmp_path / "whole")) == ["eval.json", "judges.png",
                                                                             "responses.jsonl"]
    counts.clear()
    server.answered.clear()
    server.plan = lambda text, *_: dict(status=401) if len(server.answered) > 8 else verdict(text)
    judged = [*command, *judged_flags(server, tmp_path / "disturbed"), "--out", tmp_path / "cut"]
    with pytest.raises(UserError, match="401"):
        call(*judged)
    assert sum(counts) == 10
    assert sorted(os.listdir(tmp_path / "cut")) == ["responses.jsonl", "unfinished.json"]
    with pytest.raises(UserError, match="has not ended"):
        call(*command, "--reuse", tmp_path / "cut", "--out", tmp_path / "other")
    counts.clear()
    server.plan = verdict
    call(*judged)
    assert counts == [] and len(server.answered) > 9
    for name in ("responses.jsonl", "eval.json"):
        whole, again = (read_rows(tmp_path / folder / name) for folder in ("whole", "cut"))
        assert whole == again
    assert not (tmp_path / "cut" / "unfinished.json").exists()


def read_rows(file: Path) -> list:
    """The rows of a .jsonl file; of eval.json the numbers."""
    if file.suffix == ".jsonl":
        return [row for _, row in read_jsonl(file)]
    result = read_json(file)
    return [result["parts"], result["judges"]]


def test_responses_of_other_settings_are_not_judged_in_their_place(finished_run, data, call, serve, tmp_path,
                                                                   monkeypatch):
    """Another seed is refused, by its name; of other weights everything is sampled anew."""
    def plan(text, nth, arrival):
        return dict(status=401 if arrival else 200, body=completion("4"))

    server, counts = serve(plan), count_samples(monkeypatch)
    command = ["--model", finished_run, "--data", data, *judged_flags(server, tmp_path)]
    for time in (1, 2, 3):
        os.utime(finished_run / "model" / "model.safetensors", (time, time))
        server.asked.clear()
        with pytest.raises(UserError, match="401"):
            call(*command)
        with pytest.raises(UserError, match=r"unfinished\.json is of .* seed 0, not 1"):
            call(*command, "--seed", "1")
    assert sum(counts) == 30


def test_what_one_question_meets_is_counted_with_its_reason(finished_run, data, call, serve, tmp_path):
    """The evaluation goes on; eval.json says how many replies were not read, and why."""
    def plan(text, nth, arrival):
        if "I am 1." in text:
            return dict(status=400, body=b'{"error": {"message": "filtered", "code": "content_filter"}}')
        return verdict(text)

    call("--model", finished_run, "--data", data, *judged_flags(serve(plan), tmp_path))
    verdicts = read_json(finished_run / "eval.json")["judges"]["m"]
    assert verdicts["unread"] == dict(reference=0, default=1, prompted=1, trained=1)
    assert verdicts["unread_reasons"] == dict(filtered=3) and verdicts["items"] == dict(asked=4, shared=3)
    assert verdicts["pairwise"]["unread"] == 1


def test_each_systems_own_model_is_asked_about_the_choices(tiny, monkeypatch):
    """The trained one of the trained system's answers (Figs. 4, 5), the base model of all others."""
    base, trained = (random_model(seed, max_position_embeddings=8192) for seed in (0, 1))
    asked = []
    monkeypatch.setattr(responses, "choice_measures",
                        lambda model, tokenizer, examples, answers: asked.append(model) or answers)
    answers = respond(base, trained, Tokenizer(tiny), CHOICE, Sampling(1.0, 1.0, 4), 0)
    assert list(answers) == ["default", "trained"]
    assert [model is own for model, own in zip(asked, (base, trained), strict=True)] == [True, True]


def test_the_first_judge_decides_and_others_stay(finished_run, data, call, serve, tmp_path):
    """Win rates are by the first of --judge a,b; with --reuse of the run's own folder verdicts of earlier
    judges stay in eval.json."""
    server = serve(verdict)
    flags = ["--model", finished_run, "--data", data, *judged_flags(server, tmp_path)]
    args = evaluation.Args(model=str(finished_run), data=str(data), judge="first,second",
                           judge_url=server.url, judge_cache=str(tmp_path / "c.jsonl"), max_new_tokens=5,
                           dtype="float32")
    plan = evaluation.resolve(args)
    assert [judge.args.judge for judge in plan.judges] == ["first", "second"]
    assert plan.deciding_judge == "first"
    call(*flags)
    call(*flags, "--judge", "n", "--reuse", finished_run)
    assert list(read_json(finished_run / "eval.json")["judges"]) == ["m", "n"]


def test_choices_by_mutual_information_are_counted_where_they_are_right():
    """Two of three."""
    row = system_row(CHOICE, [answer("no", choice_mi=value) for value in (1.0, 1.0, 0.0)])
    assert (row["choice_mi"]["mean"], row["choice_mi"]["n"]) == (pytest.approx(2 / 3), 3)
