"""train.py as a program: its run folder, given pairs, whatever its methods need, and what it refuses."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (TRAIN_FLAGS, metrics_of, model_weights, run_inside, run_process, run_processes,
                      same_weights, steps_of, validations_of)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import pairs as pairing
import train
from folder import load
from lora import adapted_layers
from pairs import load_pairs
from run import UserError, read_json, read_jsonl, write_json, write_jsonl
from train import Args

COMMON = {"candidate", "round", "step", "epoch", "loss", "logp_chosen", "grad_norm", "lr", "pairs", "tokens",
          "skipped", "weights_changed"}
REWARDS = {"margin", "accuracy", "reward_chosen", "reward_rejected", "accuracy_chosen", "accuracy_rejected",
           "logp_rejected"}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def whole_run(own_data, tiny, tmp_path_factory) -> tuple[list, Path, str]:
    """(arguments, folder, what it printed) of one whole run in a process of its own."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = ["--data", own_data, "--neg", "missing", "--model", tiny, "--out", "mine", *TRAIN_FLAGS]
    done = run_process("train.py", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return arguments, folder / "mine", done.stdout


# ------------------------------------------------------------------------- a whole run

def test_a_run_folder_is_complete(whole_run, own_data, tiny):
    """Arguments, pairs of the training rows only, a line a step, a summary and a model; nothing else."""
    _, folder, out = whole_run
    files = ["args.json", "learning_curve.png", "metrics.jsonl", "model", "pairs.json", "pairs.jsonl",
             "summary.json"]
    assert sorted(os.listdir(folder)) == files and os.listdir(folder.parent) == ["mine"]
    given = Args(data=str(own_data), model=str(tiny), out="mine", max_new_tokens=6, batch=2, lr=1e-4,
                 dtype="float32")
    arguments = dataclasses.asdict(train.resolve(given))
    assert read_json(folder / "args.json")["arguments"] == json.loads(json.dumps(arguments))
    pairs, steps = load_pairs(folder), metrics_of(folder)
    assert {pair.id for pair in pairs} <= {f"r{i}" for i in range(8)} and len(pairs) >= 6
    assert all(step.keys() == COMMON | REWARDS for step in steps)
    assert sum(step["pairs"] for step in steps) == len(pairs) and len(steps) == math.ceil(len(pairs) / 2)
    assert steps[0]["margin"] == 0.0 and steps[-1]["skipped"] == 0
    summary = read_json(folder / "summary.json")
    assert (summary["steps"], summary["pairs"], summary["skipped"]) == (len(steps), len(pairs), 0)
    assert "eval.py" in out and str(folder.name) in out


def test_the_trained_model_opens_in_transformers(whole_run, tiny):
    """Every weight is there, every matrix has moved; the tokenizer and its template came along."""
    folder = whole_run[1] / "model"
    oracle, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    before = load_file(tiny / "model.safetensors")
    for name, p in load(folder).named_parameters():
        assert torch.equal(oracle.state_dict()[name], p)
        assert p.dim() == 1 or not torch.equal(p, before[name])
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [dict(role="user", content="Hi")], add_generation_prompt=True, return_dict=False)
    assert 0 in ids and 1 in ids


def test_the_same_command_again_is_refused(whole_run):
    """Exit code 2, one line that names the folder, every file as it was."""
    arguments, folder, _ = whole_run
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    done = run_process("train.py", *arguments, cwd=folder.parent)
    assert done.returncode == 2 and "mine" in done.stderr and done.stderr.count("\n") == 1
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_torchrun_trains_on_the_pairs_of_a_folder(whole_run, own_data, tiny, tmp_path):
    """One process of torch.distributed.run, --pairs: the steps and weights of the run that drew them."""
    done = run_processes(1, "train.py", "--data", own_data, "--model", tiny, "--pairs", whole_run[1], "--out",
                         "again", *TRAIN_FLAGS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert metrics_of(tmp_path / "again") == metrics_of(whole_run[1])
    assert same_weights(model_weights(tmp_path / "again"), model_weights(whole_run[1]))


def test_a_folder_without_a_name_is_named_by_the_arguments(own_data, tiny, work, whole_run):
    """Under runs/; --neg random is in the name, and its rejected responses have other sources."""
    run_inside(train.program, work, "--data", own_data, "--model", tiny, "--neg", "random", *TRAIN_FLAGS)
    (folder,) = (work / "runs").iterdir()
    assert all(word in folder.name for word in ("own", "random", tiny.name))
    assert (folder / "model" / "model.safetensors").exists()
    sources = {pair.id: pair.rejected[0].prompt_ids for pair in load_pairs(folder)}
    missing = [pair for pair in load_pairs(whole_run[1]) if pair.id in sources]
    assert missing and all(sources[pair.id] != pair.rejected[0].prompt_ids for pair in missing)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_saved_in_the_type_asked_for(dtype, call_train, dpo_run):
    """The tensors' type and config.json's word for it."""
    folder = call_train("--pairs", dpo_run, "--softmax", "--save-dtype", dtype)
    assert {str(weight.dtype) for weight in model_weights(folder).values()} == {f"torch.{dtype}"}
    config = read_json(folder / "model" / "config.json")
    assert dtype in (config.get("dtype"), config.get("torch_dtype"))


def test_a_summary_says_what_rounding_has_kept(call_train, dpo_run, capsys):
    """The margin of the masters and of the folder; at a learning rate far below a bf16 step nearly all of it
    is kept, and all of it in float32."""
    folder = call_train("--pairs", dpo_run, "--lr", "1e-3", "--save-dtype", "bfloat16")
    kept = read_json(folder / "summary.json")["kept"]
    assert kept.keys() == {"share", "margin", "margin_saved", "pairs"}
    margin, saved = kept["margin"], kept["margin_saved"]
    assert margin > 0 and saved != margin and kept["share"] == pytest.approx(saved / margin)
    assert 0.8 < kept["share"] < 1.2
    assert f"keeps {kept['share']:.0%} of what was learned" in capsys.readouterr().out
    flags = ["--lr", "1e-3", "--save-dtype", "bfloat16", "--eval-every", "2", "--val-limit", "4"]
    folder = call_train(*flags, "--out", "v").parent / "v"
    kept = read_json(folder / "summary.json")["kept"]["validation"]
    assert kept.keys() == {"share", "margin", "margin_saved", "pairs"} and 0 < kept["pairs"] <= 4
    folder = call_train("--pairs", dpo_run, "--out", "whole")
    assert read_json(folder.parent / "whole" / "summary.json")["kept"] == dict(share=1.0)


# ------------------------------------------------------------------------- methods

def test_a_run_of_three_negatives_has_three_rows_a_pair(dpo_run):
    """learning_curve.png is a PNG; a line a step with every DPO metric; no validation was asked for."""
    assert (dpo_run / "learning_curve.png").read_bytes().startswith(PNG)
    steps, pairs = steps_of(dpo_run), load_pairs(dpo_run)
    assert all(step.keys() == COMMON | REWARDS for step in steps) and not validations_of(dpo_run)
    assert all(len(pair.rejected) == 3 for pair in pairs)
    rows = sum(step["pairs"] for step in steps)
    assert rows == 3 * len(pairs) == read_json(dpo_run / "summary.json")["pairs"]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_softmax_is_a_row_a_pair(dpo_run, call_train):
    """The same pairs with --softmax: a third of the rows, the first step at ln 4."""
    folder = call_train("--pairs", dpo_run, "--softmax")
    assert read_json(folder / "summary.json")["pairs"] == len(load_pairs(dpo_run))
    assert steps_of(folder)[0]["loss"] == pytest.approx(math.log(4), abs=1e-6)


def test_sft_samples_no_rejected_responses(call_train):
    """A chosen response an example and nothing else; no metric of rewards; a figure all the same."""
    folder = call_train("--method", "sft")
    pairs = load_pairs(folder)
    assert len(pairs) >= 6 and all(pair.rejected == [] for pair in pairs)
    assert all(step.keys() == COMMON for step in steps_of(folder))
    assert read_json(folder / "args.json")["arguments"]["n_neg"] == 0
    assert (folder / "learning_curve.png").read_bytes().startswith(PNG)


def test_sft_on_the_chosen_responses_of_dpo_pairs(dpo_run, call_train, tmp_path):
    """--pairs of a DPO run: one row a pair, and other rejected responses there give the same weights."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(dpo_run / "pairs.json", other)
    rows = [row for _, row in read_jsonl(dpo_run / "pairs.jsonl")]
    for row in rows:
        for k, response in enumerate(row["rejected"]):
            response["ids"] = [9 - k] * (3 - k)
    write_jsonl(other / "pairs.jsonl", rows)
    weights = []
    for k, source in enumerate((dpo_run, other)):
        call_train("--method", "sft", "--pairs", source, "--out", f"o{k}")
        run = tmp_path / "work" / f"o{k}"
        assert read_json(run / "summary.json")["pairs"] == len(rows)
        assert not REWARDS & steps_of(run)[0].keys()
        weights.append(model_weights(run))
    assert same_weights(*weights)


# ------------------------------------------------------------------------- given pairs

def copy_pairs(source: Path, folder: Path, rows: list[dict] | None = None, **settings) -> Path:
    """A folder with the pairs of another, of which some settings, or the rows, are other ones."""
    folder.mkdir()
    meta = read_json(source / "pairs.json")
    write_json(folder / "pairs.json", meta | dict(settings=meta["settings"] | settings))
    write_jsonl(folder / "pairs.jsonl", rows or [row for _, row in read_jsonl(source / "pairs.jsonl")])
    return folder


def test_pairs_of_another_folder_are_not_sampled_again(call_train, dpo_run, monkeypatch):
    """--pairs needs no sampling, and leaves its folder alone."""
    before = {file: file.stat().st_mtime_ns for file in dpo_run.rglob("*")}
    monkeypatch.setattr(pairing, "generate", None)
    folder = call_train("--pairs", dpo_run)
    assert read_json(folder / "summary.json")["pairs"] == 3 * len(load_pairs(dpo_run))
    assert {file: file.stat().st_mtime_ns for file in dpo_run.rglob("*")} == before


def test_a_limit_is_of_the_given_pairs(call_train, dpo_run):
    """As it is of examples: some of them, drawn by seed."""
    folder = call_train("--pairs", dpo_run, "--limit", "2")
    assert read_json(folder / "summary.json")["pairs"] == 3 * 2 < 3 * len(load_pairs(dpo_run))


def test_a_run_on_given_pairs_remembers_their_data_and_seed(dpo_run, own_data, tiny, tmp_path):
    """With --pairs alone they are those of pairs.json: eval.py goes by args.json."""
    source = copy_pairs(dpo_run, tmp_path / "made", seed=3)
    run_inside(train.program, tmp_path, "--pairs", source, "--model", tiny, "--out", "o", *TRAIN_FLAGS)
    arguments = read_json(tmp_path / "o" / "args.json")["arguments"]
    assert (arguments["data"], arguments["seed"], arguments["n_neg"]) == (str(own_data), 3, 3)


def test_dpo_needs_rejected_responses_in_given_pairs(call_train, dpo_run, work, tmp_path):
    """--pairs of an SFT run is refused, and nothing is left."""
    rows = [row | dict(rejected=[]) for _, row in read_jsonl(dpo_run / "pairs.jsonl")]
    source = copy_pairs(dpo_run, tmp_path / "bare", rows, n_neg=0)
    with pytest.raises(UserError, match=r"--pairs|--n-neg"):
        call_train("--pairs", source)
    assert os.listdir(work) == []


def test_pairs_of_another_tokenizer_are_refused(dpo_run, own_data, tiny, work, tmp_path):
    """Sampled ids go to the loss as they are: under another chat template they would be another text."""
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("assistant", "robot")
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="encodes these prompts differently"):
        run_inside(train.program, work, "--model", other, "--pairs", dpo_run, "--out", "o", *TRAIN_FLAGS)
    assert os.listdir(work) == []


def test_pairs_of_another_part_are_refused(call_train, dpo_run, work, tmp_path):
    """A model must not be trained on validation or test examples: by the split that pairs.json names."""
    source = copy_pairs(dpo_run, tmp_path / "validation", split="validation")
    with pytest.raises(UserError, match="made of the validation part"):
        call_train("--pairs", source)
    assert os.listdir(work) == []


def test_pairs_that_are_test_examples_are_refused(call_train, dpo_run, work, tmp_path):
    """Whatever pairs.json says: by id and prompt, one of them is enough."""
    rows = [row for _, row in read_jsonl(dpo_run / "pairs.jsonl")]
    rows[-1] |= dict(id="r13", prompt="test question 13?")
    source = copy_pairs(dpo_run, tmp_path / "leaking", rows)
    with pytest.raises(UserError, match=rf"1 of {len(rows)} pairs are test examples \(first: 'r13'\)"):
        call_train("--pairs", source)
    assert os.listdir(work) == []


@pytest.mark.parametrize("data", ["gone.jsonl", "gsm8k:gone"])
def test_pairs_whose_data_are_gone_are_trained_on_with_a_word(data, call_train, dpo_run, tmp_path, capsys):
    """Whether they leak can't be checked then."""
    source = copy_pairs(dpo_run, tmp_path / "orphans", data=data)
    folder = call_train("--pairs", source)
    assert read_json(folder / "summary.json")["pairs"] == 3 * len(load_pairs(dpo_run))
    assert f"{data} is not here" in capsys.readouterr().out


# ------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize(("flags", "word"), [
    (["--batch", "0"], "--batch"), (["--epochs", "0"], "--epochs"), (["--lr", "0"], "--lr"),
    (["--lr", "-1e-6"], "--lr"), (["--beta", "0"], "--beta"), (["--pass-tokens", "0"], "--pass-tokens"),
    (["--pairs", "nowhere"], "nowhere"), (["--model", "no/such/place"], "no/such/place"),
    (["--data", "demos"], "--data"), (["--method", "sft", "--softmax"], "--softmax"),
    (["--method", "sft", "--label-smoothing", "0.1"], "--label-smoothing"),
    (["--method", "sft", "--nll", "1"], "--nll"), (["--method", "sft", "--n-neg", "3"], "--n-neg"),
    (["--method", "sft", "--beta", "0.1,0.2"], "--beta"),
    (["--n-neg", "0"], "--n-neg"), (["--n-neg", "-1"], "--n-neg"),
    (["--label-smoothing", "0.5"], "--label-smoothing"), (["--label-smoothing", "-1"], "--label-smoothing"),
    (["--nll", "-1"], "--nll"), (["--patience", "2"], "--patience"), (["--eval-every", "-1"], "--eval-every"),
    (["--lr", "1e-4,0"], "--lr"), (["--beta", "0.1,x"], "--beta"), (["--epochs", "1,0"], "--epochs"),
    (["--label-smoothing", "0.1,0.2"], "--label-smoothing"), (["--method", "ppo"], "--method"),
    (["--rounding", "up"], "--rounding"),
])  # fmt: skip
def test_wrong_arguments_leave_nothing(flags, word, call_train, work, monkeypatch):
    """A UserError that names them, before any folder is made."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=word):
        call_train(*flags)
    assert os.listdir(work) == []


def test_rounding_reaches_the_optimizer(call_train, dpo_run):
    """Rounded to the nearest, the bf16 model of the same run is another one."""
    flags = ["--pairs", dpo_run, "--softmax", "--dtype", "bfloat16", "--lr", "1e-5", "--out"]
    nearest, stochastic = (model_weights(call_train(*flags, kind, "--rounding", kind).parent / kind)
                           for kind in ("nearest", "stochastic"))
    assert not same_weights(nearest, stochastic)


def test_what_changes_the_model_reaches_it(tiny):
    """--checkpoint-activations, --lora-rank and --lora-alpha."""
    args = train.resolve(Args(model=str(tiny), dtype="float32", lora_rank=4, lora_alpha=2.0,
                              checkpoint_activations=True))
    model = train.load_trainable(tiny, args)
    assert model.checkpoint_activations
    assert {(layer.scale, len(layer.lora_A)) for layer in adapted_layers(model).values()} == {(0.5, 4)}
