"""Choosing among candidates and moments of training on the validation part, early stopping, what is saved."""

import json
import math
import os
import signal

import pytest
import torch
from conftest import model_weights, oracle_logp, same_weights, steps_of, validations_of
from torch import Tensor
from transformers import AutoModelForCausalLM

import selection
from checks import honours
from data import load_examples
from folder import load
from pairs import load_pairs
from run import Stopped, UserError, read_json
from sample import Sample
from selection import Selection, mean_margin
from tokenizer import Tokenizer
from train import Args, resolve


@pytest.fixture
def script(monkeypatch):
    """(scores) -> Selection.measure returns them in turn; the weights that it was shown."""
    def arrange(*scores: float) -> list[dict[str, Tensor]]:
        shown: list[dict[str, Tensor]] = []

        def measure(self, model) -> float:
            shown.append({name: p.detach().clone() for name, p in model.state_dict().items()})
            return scores[len(shown) - 1]

        monkeypatch.setattr(Selection, "measure", measure)
        return shown

    return arrange


# ------------------------------------------------------------------------- which model is kept

def test_the_best_of_four_candidates_is_kept(call_train, script, dpo_run):
    """lr x beta, 0 to 3; of equal ones the earlier; model, args.json and summary.json are the chosen's."""
    shown = script(0.1, 0.4, 0.4, 0.2)
    folder = call_train("--pairs", dpo_run, "--lr", "1e-4,1e-3", "--beta", "0.1,0.2")
    assert len(shown) == 4 and same_weights(model_weights(folder), shown[1])
    assert [row["candidate"] for row in validations_of(folder)] == [0, 1, 2, 3]
    assert [row["validation_margin_accuracy"] for row in validations_of(folder)] == [0.1, 0.4, 0.4, 0.2]
    args, steps = read_json(folder / "args.json"), steps_of(folder)
    settings = [(candidate["lr"], candidate["beta"]) for candidate in args["candidates"]]
    assert sorted(settings) == [(1e-4, 0.1), (1e-4, 0.2), (1e-3, 0.1), (1e-3, 0.2)]
    each = len(steps) // 4
    assert [row["candidate"] for row in steps] == [k for k in range(4) for _ in range(each)]
    for k, (lr, _) in enumerate(settings):
        rows = [row for row in steps if row["candidate"] == k]
        assert [row["step"] for row in rows] == list(range(1, each + 1))
        assert max(row["lr"] for row in rows) == lr and rows[0]["margin"] == 0.0
    chosen = read_json(folder / "summary.json")["chosen"]
    assert (chosen["candidate"], chosen["score"], chosen["step"]) == (1, 0.4, each)
    assert (args["arguments"]["lr"], args["arguments"]["beta"]) == settings[1]
    assert (folder / "learning_curve.png").exists()
    lr, beta = map(str, settings[1])
    call_train("--pairs", dpo_run, "--lr", lr, "--beta", beta, "--out", "alone")
    assert same_weights(model_weights(folder), model_weights(folder.parent / "alone"))


def test_early_stopping_keeps_the_best_step(call_train, script, dpo_run):
    """Scores .1 .5 .5 .3 .9 at patience 2: it ends after the fourth, with the weights of the second."""
    shown = script(0.1, 0.5, 0.5, 0.3, 0.9)
    folder = call_train("--pairs", dpo_run, "--eval-every", "2", "--patience", "2")
    assert len(shown) == 4 and len(steps_of(folder)) == 8
    assert same_weights(model_weights(folder), shown[1]) and not same_weights(shown[1], shown[2])
    assert [row["step"] for row in validations_of(folder)] == [2, 4, 6, 8]
    summary = read_json(folder / "summary.json")
    assert summary["chosen"]["step"] == 4 and summary["steps"] == 8


def test_a_signal_after_the_last_validation_ends_the_run_there(call_train, script, dpo_run, monkeypatch):
    """Stopped by a signal in the step whose validation ended it: resumed, it takes no further step."""
    shown = script(0.1, 0.5, 0.5, 0.3, 0.9)
    offer = Selection.offer

    def offer_and_signal(*args):
        score = offer(*args)
        if len(shown) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return score

    monkeypatch.setattr(Selection, "offer", offer_and_signal)
    flags = ["--pairs", dpo_run, "--eval-every", "2", "--patience", "2"]
    with pytest.raises(Stopped):
        call_train(*flags)
    folder = call_train(*flags, "--resume")
    assert len(shown) == 4 and len(steps_of(folder)) == 8
    assert read_json(folder / "summary.json")["chosen"]["step"] == 4


def test_without_patience_every_step_is_taken(call_train, script, dpo_run):
    """And the last one is validated too, once, whether 3 divides the steps or not."""
    shown = script(0.9, *[0.1] * 9)
    folder = call_train("--pairs", dpo_run, "--softmax", "--eval-every", "3")
    total = math.ceil(len(load_pairs(dpo_run)) / 2)
    expected = sorted({*range(3, total, 3), total})
    assert [row["step"] for row in validations_of(folder)] == expected and len(steps_of(folder)) == total
    assert same_weights(model_weights(folder), shown[0])


def test_a_bf16_model_is_saved_as_it_was_validated(call_train, script, dpo_run):
    """The copy that was scored, not the masters rounded another time."""
    shown = script(0.5, 0.9)
    folder = call_train("--pairs", dpo_run, "--softmax", "--eval-every", "2", "--dtype", "bfloat16",
                        "--lr", "1e-5")
    saved = model_weights(folder)
    assert saved.keys() == shown[1].keys()
    for name, weight in saved.items():
        if weight.dim() > 1:  # norms are fp32 in memory
            assert weight.dtype == torch.bfloat16 and torch.equal(weight, shown[1][name])


# ------------------------------------------------------------------------- scores

def test_a_margin_is_against_the_mean_of_the_rejected_responses():
    """By hand: 1 - (-1 - 2) / 2 and 0 - (4 + 0) / 2, and the mean of both."""
    start = [[-9.0, -5.0, -6.0], [-1.0, -7.0, -2.0]]
    now = [[-8.0, -6.0, -8.0], [-1.0, -3.0, -2.0]]
    assert mean_margin(now, start) == pytest.approx((2.5 - 2.0) / 2)


def test_the_choice_never_sees_the_test_part(call_train, tiny, own_data, monkeypatch):
    """No test prompt becomes ids; scores are the validation pairs' by transformers' full logits."""
    messages, chat = [], Tokenizer.chat

    def watched(self, user: str, *rest) -> list[int]:
        messages.append(user)
        return chat(self, user, *rest)

    monkeypatch.setattr(Tokenizer, "chat", watched)
    folder = call_train("--lr", "1e-3,3e-3", "--epochs", "2")
    was_read = {part: any(f"{part} question" in message for message in messages)
                for part in ("train", "validation", "test")}
    assert was_read == dict(train=True, validation=True, test=False)
    pairs = load_pairs(folder / "validation")
    assert {pair.id for pair in pairs} <= {e.id for e in load_examples(str(own_data), "validation")}
    assert not {pair.id for pair in pairs} & {pair.id for pair in load_pairs(folder)}

    base, trained = (AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
                     for source in (tiny, folder / "model"))
    margins = []
    for pair in pairs:
        chosen, rejected = (oracle_logp(trained, pair.prompt_ids, response.ids)
                            - oracle_logp(base, pair.prompt_ids, response.ids) for response in pair.responses)
        margins.append(chosen - rejected)
    assert min(map(abs, margins)) > 1e-3  # none is a matter of rounding
    chosen = read_json(folder / "summary.json")["chosen"]
    assert chosen["score"] == pytest.approx(sum(margin > 0 for margin in margins) / len(margins))
    assert chosen["score"] == max(row["validation_margin_accuracy"] for row in validations_of(folder))


@pytest.fixture
def respond(monkeypatch):
    """(selection, text) -> its generate answers every prompt with the text; the sampling it was asked for."""
    def arrange(chosen: Selection, text: str) -> list:
        asked = []

        def generate(model, prompts, sampling, *_, **__) -> list[Sample]:
            asked.append((sampling.temperature, sampling.top_p, sampling.max_new_tokens))
            return [Sample(chosen.tokenizer.response(text)) for _ in prompts]

        monkeypatch.setattr(selection, "generate", generate)
        return asked

    return arrange


def test_data_with_checks_are_chosen_by_win_rate(tiny, tmp_path, respond):
    """Share of validation responses that honour their context, drawn at temperature 0.1 and top-p 0.9."""
    args = resolve(Args(data="demo", model=str(tiny), val_limit=40, max_new_tokens=5))
    chosen = Selection(args, tmp_path, tiny)
    assert chosen.name == "win_rate" and {e.split for e in chosen.examples} == {"validation"}
    text = 'yes! ok! "oh!" is it?'
    asked = respond(chosen, text)
    wins = [honours(e.check, text) for e in chosen.examples]
    assert len(wins) == 40 and 0 < sum(wins) < 40
    assert chosen.measure(load(tiny)) == pytest.approx(sum(wins) / 40)
    assert asked == [(0.1, 0.9, 5)]


def test_the_win_rate_is_of_all_processes_responses(tiny, tmp_path, monkeypatch):
    """Here of four lost ones, and four that another process has won."""
    args = resolve(Args(data="demo", model=str(tiny), val_limit=8, max_new_tokens=5))
    chosen = Selection(args, tmp_path, tiny)
    monkeypatch.setattr(selection, "share_of", lambda items: items[::2])
    monkeypatch.setattr(selection, "gather", lambda own: own + [True] * 4)
    monkeypatch.setattr(selection, "verify", lambda *given: False)
    assert chosen.measure(load(tiny)) == 0.5


def test_tasks_are_chosen_by_accuracy(tiny, tmp_path, respond):
    """Share of validation responses with the right letter, drawn as ARC is evaluated: at temperature 1."""
    (tmp_path / "ARC-Easy").mkdir()
    for split in ("train", "validation", "test"):
        rows = [dict(id=f"{split}{i}", question=f"{split} {i}?", answerKey="1" if i % 3 else "3",
                     choices=dict(text=["red", "blue", "green"], label=["1", "2", "3"])) for i in range(6)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "ARC-Easy" / f"{split}.jsonl").write_text(lines)
    args = resolve(Args(data=f"arc-easy:{tmp_path}", neg="random", model=str(tiny), max_new_tokens=5))
    chosen = Selection(args, tmp_path, tiny)
    assert chosen.name == "win_rate" and {e.split for e in chosen.examples} == {"validation"}
    asked = respond(chosen, "The answer is: A")
    assert chosen.measure(load(tiny)) == pytest.approx(4 / 6)
    assert asked == [(1.0, 0.9, 5)]


def test_validation_samples_as_evaluation_does(tiny, tmp_path):
    """--top-k, too, is for pairs alone."""
    args = resolve(Args(data="demo", model=str(tiny), val_limit=4, top_k=50, temperature=2.0, top_p=0.5))
    chosen = Selection(args, tmp_path, tiny)
    assert (chosen.sampling.top_k, chosen.sampling.temperature, chosen.sampling.top_p) == (0, 0.1, 0.9)


@pytest.mark.parametrize(("row", "words"), [
    (dict(prompt="p", chosen="good"), "need rejected ones"), (dict(prompt="p"), "need rejected ones"),
])
def test_validation_that_nothing_could_decide_is_refused_at_once(row, words, call_train, work):
    """SFT takes such rows, but models are compared by rejected responses: said before a folder is made."""
    rows = [row | dict(prompt=f"p{i}", split=split) for i, split in enumerate(("train", "validation") * 4)]
    (work / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=words):
        call_train("--method", "sft", "--data", "own.jsonl", "--eval-every", "5")
    assert [path.name for path in work.iterdir()] == ["own.jsonl"]


def test_ready_pairs_are_validated_whatever_could_be_sampled(call_train, work):
    """Nothing is sampled for them: --max-new-tokens beyond the model's positions does not matter."""
    rows = [dict(prompt=f"p{i}", context="c", chosen=f"good {i}", rejected="bad", split=split)
            for i, split in enumerate(("train", "validation") * 3)]
    (work / "ready.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = call_train("--data", "ready.jsonl", "--eval-every", "1", "--max-new-tokens", "5000")
    assert validations_of(folder)
    assert read_json(folder / "summary.json")["chosen"]["name"] == "margin_accuracy"


def test_validation_responses_are_drawn_with_their_contexts(tiny, tmp_path, monkeypatch):
    """Each from its whole prompt, by the run's seed: response i is sample (i, 0)."""
    args = resolve(Args(data="demo", model=str(tiny), val_limit=6, max_new_tokens=5, seed=3,
                        system="Be brief."))
    chosen, asked = Selection(args, tmp_path, tiny), []

    def watched(model, prompts, sampling, stop_ids, seed, keys, *rest) -> list[Sample]:
        asked.append((prompts, seed, keys))
        return [Sample([5])] * len(prompts)

    monkeypatch.setattr(selection, "generate", watched)
    chosen.measure(load(tiny))
    assert all(e.context and e.context in e.user_message(e.context) for e in chosen.examples)
    prompts = [Tokenizer(tiny).chat(e.user_message(e.context), "Be brief.") for e in chosen.examples]
    assert asked == [(prompts, 3, [(i, 0) for i in range(6)])]
