"""mutants.py - whether the tests see what they are there to see: one line of the method's path is broken at a
time, and the tests that are named beside it must fail.

The path is what a run of train.py computes with: pairs, batches, log-probs, objectives, optimizer, sampling,
PPO, adapters, checkpoints, the choice of a model. A mutation is a line that someone could have written: a
sign, an index off by one, a mask, a wrong axis, swapped arguments, a forgotten detach or gather, another
seed, a sum for a mean. It is applied to a copy of the project in a temporary folder, where pytest runs; tests
that fail or take more than two minutes have killed it. Without any mutation all named tests must pass there,
which is tried first. What differs from the paper: it has nothing of the kind.

    python tests/mutants.py [--only TEXT] [--out FILE]      a quarter of an hour; writes results/mutants.json
"""

import argparse
import json
import multiprocessing
import os
import queue
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path


# Nothing of the project is imported here: tests must find the files of their copy, not those that stand here.
ROOT = Path(__file__).parents[1]
SECONDS = 120  # of one run of tests
AT_ONCE = 2  # runs
LEFT_OUT = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache")
LOG = "mutants.log"  # in a copy: what pytest has printed
# Every run of pytest is forked from a process that has loaded these: that takes longer than most tests.
LIBRARIES = ["matplotlib.pyplot", "numpy", "peft", "pytest", "safetensors.torch", "torch",
             "torch.distributed.fsdp", "transformers", "transformers.models.llama.modeling_llama",
             "trl.trainer.dpo_trainer"]

# ------------------------------------------------------------------------- mutations

MODEL = "test_model.py::test_logits_are_transformers"
EQUATIONS = ("test_ppo.py::test_gae_is_the_discounted_sum_of_td_errors "
             "test_ppo.py::test_whitened_advantages_have_mean_zero_and_variance_one_over_all_tokens "
             "test_ppo.py::test_the_score_lands_on_the_last_token test_ppo.py::test_losses_are_numpys")
PROCESSES = "test_processes.py::test_two_processes_are_one[dpo-8192-5]"
LOGPS = ("test_fast.py::test_linear_logps_are_the_log_softmax "
         "test_fast.py::test_the_gradient_of_linear_logps_is_that_of_finite_differences")
UPDATE = "test_ppo.py::test_one_update_is_written_out"
NORM, ROTATION = (f"test_gpu_kernels.py::test_{name}_and_its_gradient" for name in ("norm", "rotation"))
DECODING = "test_gpu_kernels.py::test_decode_attention_sees_what_a_slot_holds"
LAYERS = ("test_fast.py::test_the_gradient_of_attention_is_that_of_finite_differences "
          "test_fast.py::test_rms_norm_is_pytorchs test_fast.py::test_swiglu_is_silu_times_up")
# Of each file: (what stands in it once, what is put there, the tests that must notice).
MUTATIONS = {
    "losses.py": [
        ("if shape != (count,)]", "if shape is None]",
         "test_train.py::test_a_new_objective_that_takes_the_mean_is_refused"),
        ("accuracy=(own > rivals)", "accuracy=(own >= rivals)",
         "test_infonce.py::test_metrics_say_how_far_the_own_context_stands_out"),
        ("rewards = beta * (logps - reference)", "rewards = beta * (logps + reference)", "test_dpo.py"),
        ("log_share = rewards.log_softmax(-1)", "log_share = rewards.log_softmax(0)", "test_dpo.py"),
        ("loss = -(1 - label_smoothing) *", "loss = (1 - label_smoothing) *", "test_dpo.py"),
        ("label_smoothing * log_share[:, 1:].mean(-1)", "label_smoothing * log_share[:, 1:].sum(-1)",
         "test_dpo.py"),
        ("accuracy=chosen > rejected.amax(-1)", "accuracy=chosen > rejected.amin(-1)", "test_dpo.py"),
        ("accuracy_rejected=(rejected < 0)", "accuracy_rejected=(rejected > 0)", "test_losses.py"),
        ("logp_rejected=logps[:, 1:].mean(-1)", "logp_rejected=logps.mean(-1)", "test_losses.py"),
        ("{name: value.detach().float() for", "{name: value.float() for", "test_losses.py"),
        ("args.nll * logps[:, 0] / lengths[:, 0]", "args.nll * logps[:, 0]", "test_dpo.py"),
        ("log_share = scores.log_softmax(-2)", "log_share = scores.log_softmax(-1)", "test_infonce.py"),
        ("over_contexts(logps / temperature)", "over_contexts(logps * temperature)", "test_infonce.py"),
        ("logps.sum(-2) - own) / (count - 1)", "logps.sum(-2) - own) / count", "test_infonce.py"),
        ("information=math.log(count) - over", "information=math.log(count) + over", "test_infonce.py"),
        ("logps / lengths[:, None, :]", "logps / lengths[:, :, None]",
         "test_infonce.py::test_a_mean_is_over_the_tokens_of_the_response"),
        ('"sft": Objective(sft_loss, uses_rejected=False, uses_reference=False, mean_over="tokens")',
         '"sft": Objective(sft_loss, uses_rejected=False, uses_reference=False, mean_over="pairs")',
         "test_sft.py"),
        ("*range(len(ids), len(ids) + len(response) - 1)]",
         "*range(len(ids) - 1, len(ids) + len(response) - 2)]", "test_losses.py"),
        ("longest = min(map(len, sequences)) - 1", "longest = min(map(len, sequences))", "test_losses.py"),
        ("root * (len(prefixes) + len(groups))", "root * len(groups)", "test_losses.py"),
        ("logps = logps.detach().float()", "logps = logps.float()",
         "test_losses.py::test_metrics_of_sets_are_detached"),
        ('metrics["loss"] = loss.detach().float()', 'metrics["loss"] = loss.float()',
         "test_dpo.py::test_nll_adds_the_chosen_responses_mean_nll"),
    ],
    "negatives.py": [
        ("len(row) != count", "False", "test_negatives.py::test_too_few_messages_are_refused"),
        ("[example.user_message(None)] * count", "[example.user_message(example.context)] * count",
         "test_pairs.py::test_missing_is_the_bare_prompt"),
        ("[example.user_message(other.context) for", "[other.user_message(other.context) for",
         "test_pairs.py::test_random_is_the_same_prompt_with_the_context_of_another_row"),
        ("bool(other.context) and other.context != example.context", "bool(other.context)",
         "test_pairs.py::test_random_is_the_same_prompt_with_the_context_of_another_row"),
        ('seed_from("random", seed, i)', 'seed_from("random", i)',
         "test_pairs.py::test_random_is_the_same_prompt_with_the_context_of_another_row"),
        ("range(m, n - m + 1)", "range(m - 1, n - m + 1)", "test_negatives.py"),
        ("dataclasses.replace(pairs[j].chosen, gain=None)", "dataclasses.replace(pairs[i].chosen, gain=None)",
         "test_negatives.py"),
        ("len(pair.chosen.ids) - pair.chosen.finished", "len(pair.chosen.ids)", "test_negatives.py"),
        ('seed_from("noise", seed, i, k)', 'seed_from("noise", seed, i)', "test_negatives.py"),
        ("if example.user is not None and example.user == other.user:", "if False:",
         "test_pairs.py::test_a_random_context_is_of_another_user"),
    ],
    "pairs.py": [
        ("len(pair.rejected) != n_neg for", "False for",
         "test_negatives.py::test_pairs_without_rejected_responses_are_refused"),
        ("right = examples[i].user_message(examples[i].context)", "right = examples[i].user_message(None)",
         "test_pairs.py"),
        ("keys = [(i, k + 1) for i in share_of(short)]", "keys = [(i, k) for i in share_of(short)]",
         "test_pairs.py"),
        ("response.ids != pair.chosen.ids", "response.ids != pair.chosen.prompt_ids", "test_pairs.py"),
        ("response.gain = logp - bare_logp", "response.gain = bare_logp - logp", "test_pairs.py"),
        ("        groups.append((pair.prompt_ids, ids))",
         "        groups.append((pair.rejected[0].prompt_ids, ids))", "test_pairs.py"),
        ("means[side] = total / len(responses)", "means[side] = total / len(pairs)",
         "test_negatives.py::test_every_negative_has_its_own_gain"),
        ("unfinished=1 - sum(", "unfinished=sum(",
         "test_pairs.py::test_a_useless_rejected_response_is_drawn_again"),
        ('seed_from("round", seed, round) if round else seed', "seed", "test_rounds.py"),
        ("tokenizer.chat(messages[i][k], pairs[i].system) for i", "tokenizer.chat(messages[i][k]) for i",
         "test_pairs.py::test_further_draws_and_gains_are_told_the_system_prompt"),
        ("    sampling = sampling_for(args)", "    sampling = sampling_for(args, evaluation=True)",
         "test_pairs.py::test_pairs_are_not_sampled_as_evaluation_samples"),
        ('seed_from("gain", seed, i)', 'seed_from("gain", i)',
         "test_pairs.py::test_the_other_prompt_of_a_context_gain_is_drawn_by_seed"),
    ],
    "batches.py": [
        ("prompts = [pair.prompt_ids]  # (x, c)", "prompts = [pair.rejected[0].prompt_ids]  # (x, c)",
         "test_train.py::test_the_first_gradient_is_a_naive_dpo_gradient"),
        ("rejected=[response]) for response", "rejected=pair.rejected) for response",
         "test_train.py::test_a_training_row_keeps_its_own_rejected_response_whole"),
        ("if objective.uses_rejected else [pair.chosen]", "if True else [pair.chosen]", "test_sft.py"),
        ("[response.prompt_ids for response in responses]", "[pair.prompt_ids for response in responses]",
         "test_infonce.py"),
        ('seed_from("order", seed, epoch)', 'seed_from("order", seed)',
         "test_train.py::test_epoch_order_is_a_permutation_of_seed_and_epoch_alone"),
        ("order[i : i + size]", "order[i : i + size - 1]",
         "test_train.py::test_batches_are_an_epoch_in_its_order"),
        ("epoch_batches(len(pairs), args, epoch=0)", "epoch_batches(len(pairs), args, epoch=1)",
         "test_train.py::test_the_reference_is_scored_in_the_micro_batches_of_the_first_epoch"),
        ("split_by_tokens(share_of(batch, process)", "split_by_tokens(batch", PROCESSES),
        ("dist.all_reduce(table)  #", "pass  #", PROCESSES),
    ],
    "train.py": [
        ("require_one_each(len(micro_batch), loss, values)", "pass",
         "test_train.py::test_a_new_objective_that_takes_the_mean_is_refused"),
        ("if args.rounds > 1 and examples[0].chosen is not None:", "if False:",
         "test_rounds.py::test_rounds_of_the_datas_own_responses_are_refused"),
        ("(loss.sum() / divisor).backward()", "loss.mean().backward()",
         "test_train.py::test_cutting_a_batch_into_micro_batches_changes_nothing"),
        ("reference[fast.sent(indices, model.device)]", "reference[: len(indices)]",
         "test_train.py::test_the_first_step_is_at_the_reference_exactly"),
        ("divisor = sum(len(pairs[i].chosen.ids) for i in batch)",
         "divisor = sum(len(pairs[i].chosen.ids) - 1 for i in batch)", "test_sft.py"),
        ("learning_rate(number, len(batches), args.lr)", "learning_rate(number + 1, len(batches), args.lr)",
         "test_train.py::test_the_schedule_reaches_the_optimizer"),
        ("optimizer.step(state.step, lr, norm)", "optimizer.step(0, lr, norm)", "test_train.py"),
        ("        optimizer.zero_grad()", "        pass",
         "test_train.py::test_training_goes_on_after_a_skipped_step"),
        ("epoch_batches(len(pairs), args, epoch)]", "epoch_batches(len(pairs), args, 0)]",
         "test_train.py::test_metrics_have_a_line_a_step"),
        ("all_reduce_gradients(model)", "pass", PROCESSES),
        ("log = TrainingLog(metrics, state, bar)", "log = TrainingLog(metrics, State(), bar)",
         "test_train.py::test_metrics_have_a_line_a_step"),
        ("enumerate(batches[state.batch :], state.batch)", "enumerate(batches, 0)",
         "test_checkpoint.py::test_a_run_that_was_stopped_ends_with_the_same_bits[dpo-3]"),
        ("len(scores) - 1 - best >= patience", "len(scores) - 1 - best > patience",
         "test_selection.py::test_early_stopping_keeps_the_best_step"),
        ("state.batch, state.rows, state.scores = 0, metrics.rows, []",
         "state.batch, state.rows = 0, metrics.rows",
         "test_rounds.py::test_early_stopping_ends_a_round_and_not_the_next_one"),
        ("round_args = dataclasses.replace(candidate_args, seed=round_seed(args.seed, round))",
         "round_args = candidate_args",
         "test_rounds.py::test_a_round_is_trained_and_scored_in_an_order_of_its_own"),
        ("candidate_args.lr, args.seed, args.rounding)", "candidate_args.lr, args.seed)",
         "test_run_folder.py::test_rounding_reaches_the_optimizer"),
        ("add_adapters(model, args.lora_rank, args.lora_alpha, args.seed)",
         "add_adapters(model, args.lora_rank, Args.lora_alpha, args.seed)",
         "test_run_folder.py::test_what_changes_the_model_reaches_it"),
        ("pairs, args, round_folder, seed)", "pairs, args, round_folder, args.seed)",
         "test_rounds.py::test_a_round_revises_by_a_seed_of_its_own"),
        ("limit=args.limit or TEST_ROWS", "limit=TEST_ROWS",
         "test_train.py::test_a_run_is_evaluated_on_as_many_rows_as_it_is_given"),
        ("models = 2 if len(grid) > 1 or args.eval_every else 1", "models = 2 if len(grid) > 1 else 1",
         "test_mistakes.py::test_a_full_disk_is_told_before_the_work"),
    ],
    "model.py": [
        ("quarter_turn = torch.cat((-b, a), dim=-1)", "quarter_turn = torch.cat((b, -a), dim=-1)", MODEL),
        (".triu(n - m + 1)", ".triu(n - m + 2)",
         "test_model.py::test_causal_attention_is_a_masked_softmax"),
        ("past + root + prefix)", "past + prefix)",
         "test_model.py::test_packed_groups_are_each_sequence_alone"),
        ("prefix_part = add(prefix, root_part, past + root)", "prefix_part = add(prefix, None, past + root)",
         "test_model.py::test_packed_groups_are_each_sequence_alone"),
        ("if before := seen[self.parents[i]]:", "if before := seen[None]:",
         "test_model.py::test_packed_groups_are_each_sequence_alone"),
        ("keep * frequency + (1 - keep) *", "(1 - keep) * frequency + keep *", MODEL),
        ("k = rotate(self.k_norm(k), cos, sin)", "k = rotate(k, cos, sin)", MODEL),
        ("return x + self.mlp(self.post_attention_layernorm(x))", "return x + self.mlp(x)", MODEL),
        ("return self.model.norm(x)", "return x", MODEL),
    ],
    "sample.py": [
        ("if any(map(math.isnan, logps)):", "if False:",
         "test_cache.py::test_a_model_of_nan_is_one_line"),
        ('seed_from(seed, row, sample)', 'seed_from(seed, row)',
         "test_sample.py::test_uniform_numbers_depend_on_seed_row_and_sample_alone"),
        ("probs = logits.softmax(-1)", "probs = (logits / (sampling.temperature or 1)).softmax(-1)",
         "test_sample.py::test_logps_are_a_scoring_pass"),
        ("least = likely[:, -1:]", "least = likely[:, :1]",
         "test_sample.py::test_filter_is_the_sorted_nucleus"),
        ("unused = places > lengths[:, None]", "unused = places > lengths[:, None] + 1",
         "test_sample.py::test_logps_are_a_scoring_pass"),
        ("self.positions = cache.shared_length + lengths", "self.positions = lengths",
         "test_sample.py::test_what_all_prompts_begin_with_changes_nothing"),
        ("count == self.sampling.max_new_tokens", "count > self.sampling.max_new_tokens",
         "test_sample.py::test_a_sample_ends_at_the_first_stop_id_or_at_the_limit"),
        ("tensor[:, target] = tensor[:, source]", "tensor[:, source] = tensor[:, target]",
         "test_sample.py::test_slots_and_order_change_nothing"),
        ("own.cache.lengths[:width] += 1", "own.cache.lengths[:width] += 0",
         "test_sample.py::test_logps_are_a_scoring_pass"),
        ("self.uniform[slots, column], self.sampling", "self.uniform[slots, 0], self.sampling",
         "test_sample.py::test_every_token_is_drawn_by_its_own_number"),
        ("self.cache.lengths[self.busy :] = 0", "pass",
         "test_sample.py::test_an_idle_slot_does_not_run_out_of_room"),
    ],
    "optimizer.py": [
        ("math.ceil(0.03 * steps)", "math.floor(0.03 * steps)", "test_optimizer.py"),
        ("peak * (step + 1) / warmup", "peak * step / warmup", "test_optimizer.py"),
        ("0.1 + 0.45 * (1 + math.cos", "0.1 + 0.45 * (1 - math.cos", "test_optimizer.py"),
        ("+ noise + 2**15", "+ noise", "test_optimizer.py"),
        ('seed_from("rounding", self.seed, number)', 'seed_from("rounding", self.seed)', "test_optimizer.py"),
        ("accumulate_in(master.dtype, weight)", "accumulate_in(weight.dtype, weight)", "test_optimizer.py"),
        ("weight_decay=0.0", "weight_decay=0.01", "test_optimizer.py"),
        ("betas=(0.9, 0.95)", "betas=(0.9, 0.999)", "test_optimizer.py"),
        ("if weight.dtype == dtype else self.master_of(weight)", "if False else self.master_of(weight)",
         "test_optimizer.py"),
        ("dist.all_reduce(p.grad)", "dist.all_reduce(p.grad, dist.ReduceOp.MAX)", PROCESSES),
        ("1e-6).clamp(min=1)", "1e-6).clamp(min=10)", "test_optimizer.py"),
        ("(~norm.isfinite()).float()", "norm.isnan().float()", "test_optimizer.py"),
        ("while any(math.gcd(", "while not any(math.gcd(",
         "test_optimizer.py::test_of_a_large_model_a_part_is_watched"),
        ("whole(get_total_norm(gradients))", "whole(get_total_norm(gradients[1:]))", "test_optimizer.py"),
        ("return changed.mean()", "return torch.tensor(changed.mean().item())",
         "test_cuda.py::test_a_whole_training_step_reads_nothing"),
        ("p.grad = torch.zeros_like(p, dtype=p.grad_dtype)", "p.grad = torch.zeros_like(p)",
         "test_optimizer.py::test_a_process_without_pairs_adds_gradients_of_the_others_type"),
        ('seed_from("saving", self.seed)', 'seed_from("saving")',
         "test_optimizer.py::test_saved_weights_are_rounded_by_seed"),
    ],
    "training_log.py": [
        ("        require_finite_steps(state)", "        pass",
         "test_train.py::test_five_in_a_row_stop_the_run"),
        ("self.queued = step", "self.queued = step; self.flush()",
         "test_training_log.py::test_a_run_is_one_step_behind"),
        ("values[i :: step.count]", "values[i :: len(step.names)]",
         "test_training_log.py::test_a_step_is_read_when_the_next_is_given_and_at_the_end"),
        ('means["loss"] *= len(rows) / step.divisor', 'means["loss"] *= 1', "test_sft.py"),
        ("for row in rows) / len(rows) for name", "for row in rows) for name",
         "test_train.py::test_metrics_are_means_over_the_pairs_of_a_batch"),
        ("rows = gather(rows)", "pass", PROCESSES),
        ("state.skipped_in_a_row >= 5", "state.skipped_in_a_row >= 6",
         "test_train.py::test_five_in_a_row_stop_the_run"),
        ("math.isfinite(norm)", "math.isfinite(means['loss'])",
         "test_train.py::test_a_gradient_that_is_not_finite_is_not_taken_though_the_loss_is"),
    ],
    "ppo.py": [
        ("        require_finite_steps(state)", "        pass",
         "test_ppo.py::test_an_update_that_is_not_finite_is_skipped"),
        ("return logps - reference", "return reference - logps", EQUATIONS),
        ("rewards[-1] += reward", "rewards[0] += reward", EQUATIONS),
        ("delta + gamma * gae_lambda * advantage", "delta + gae_lambda * advantage", EQUATIONS),
        ("return advantages, advantages + values", "return advantages, advantages - values", EQUATIONS),
        ("(own - mean) * scale", "(own - own.mean()) * scale", EQUATIONS),
        ("-torch.minimum(ratio * advantages", "-torch.maximum(ratio * advantages", EQUATIONS),
        ("0.5 * torch.maximum((values", "0.5 * torch.minimum((values", EQUATIONS),
        ("logits(states_before(critic, groups))", "logits(states_before(critic, groups).roll(1, 0))",
         "test_ppo.py::test_values_are_of_the_states_before_the_tokens"),
        ("min(args.reward_clip, reward))", "reward)", "test_ppo.py::test_rewards_are_clipped_and_counted"),
        ("(sum(policy_losses) / len(batch))", "(sum(policy_losses) / len(chunk))",
         "test_ppo.py::test_passes_and_slots_change_nothing"),
        ("critic_lr = learning_rate(state.updates, update_count, args.critic_lr)", "critic_lr = lr",
         "test_ppo.py::test_actor_and_critic_have_learning_rates_of_their_own"),
        ("numbers = range(epoch * args.rollouts,", "numbers = range(0 * args.rollouts,",
         "test_ppo.py::test_every_prompt_is_sampled_once_a_pass"),
        ("for terms in zip(logps, bare_logps, strict=True)]",
         "for terms in zip(bare_logps, logps, strict=True)]",
         UPDATE),
        ("rollout.reference, args.kl_weight)  # (R,)", "rollout.reference, 0.0)  # (R,)",
         UPDATE),
        ("gae(of_tokens, rollout.values, args.gamma, args.gae_lambda)",
         "gae(of_tokens, rollout.values, args.gae_lambda, args.gamma)",
         UPDATE),
        ("rollout.advantages, args.clip).mean()", "rollout.advantages, args.value_clip).mean()",
         UPDATE),
        ("rollout.returns, args.value_clip).mean()", "rollout.returns, args.value_clip).sum()",
         UPDATE),
        ("rollout.advantages = advantages", "pass",
         UPDATE),
        ("asked = [examples[rollout.row] for rollout in rollouts]", "asked = examples[: len(rollouts)]",
         UPDATE),
        ("math.isfinite(sum(norms[-1].values()))", 'math.isfinite(norms[-1]["grad_norm"])',
         "test_ppo.py::test_a_critic_that_diverges_is_noticed"),
        ("ratio = (logps[i].detach() - rollout.logps).exp()",
         "ratio = (rollout.logps - logps[i].detach()).exp()",
         "test_ppo.py::test_ratios_beyond_the_clip_are_counted"),
        ("((ratio - 1).abs() > args.clip)", "((ratio - 1) > args.clip)",
         "test_ppo.py::test_ratios_beyond_the_clip_are_counted"),
        ("order = epoch_order(count, args.seed, epoch)", "order = epoch_order(count, args.seed, 0)",
         "test_ppo.py::test_every_prompt_is_sampled_once_a_pass"),
        ('seed_from("updates", args.seed, number)', 'seed_from("updates", args.seed)',
         "test_ppo.py::test_every_rollout_is_trained_on_once_a_pass"),
        ('seed_from("shuffled rewards", args.seed), number)', 'seed_from("shuffled rewards", args.seed), 0)',
         "test_ppo.py::test_every_batch_is_shuffled_in_its_own_order"),
        ("state.unread += unread", "state.unread = unread",
         "test_ppo.py::test_unread_verdicts_of_all_batches_are_counted"),
        ("args.critic_lr, args.seed, args.rounding)", "args.critic_lr, args.seed)",
         "test_ppo.py::test_settings_reach_both_optimizers"),
        ("args.lr, args.seed, args.rounding)", "args.lr, args.seed)",
         "test_ppo.py::test_settings_reach_both_optimizers"),
        ("responses=len(examples) * args.rollouts * args.epochs", "responses=len(examples) * args.epochs",
         "test_ppo.py::test_a_run_on_the_embedded_model"),
    ],
    "data.py": [
        ("len(ids) < len(examples) or", "", "test_datasets.py::test_what_a_loader_gives_has_ids_and_splits"),
    ],
    "rewards.py": [
        ("not all(map(math.isfinite, rewards))", "False", "test_ppo.py::test_a_reward_is_a_finite_number"),
        ("return (logps - bare_logps).sum()", "return (logps - bare_logps).mean()",
         "test_ppo.py::test_mutual_information_is_transformers"),
        ("mean = fmean(readable) if readable else 0.0", "mean = 0.0",
         "test_ppo.py::test_an_unread_verdict_earns_the_mean_of_its_batch"),
        ("own + args.mi_weight * nats", "own + nats",
         "test_ppo.py::test_information_is_added_with_its_weight"),
    ],
    "lora.py": [
        ("self.alpha, self.scale = alpha, alpha / r", "self.alpha, self.scale = alpha, alpha",
         "test_lora.py::test_a_layer_adds_its_scaled_update"),
        ("b, a, alpha=self.scale)", "b, a, alpha=1.0)", "test_lora.py::test_merged_it_computes_the_same"),
        ("layer.enabled = False", "layer.enabled = True",
         "test_lora.py::test_without_its_adapters_it_is_the_start_model"),
        ("model.requires_grad_(False)", "model.requires_grad_(True)",
         "test_lora.py::test_frozen_weights_have_no_gradient"),
        ("a=math.sqrt(5)", "a=0", "test_lora.py::test_adapters_start_as_pefts_do"),
    ],
    "checkpoint.py": [
        ("state.step % every == 0", "(state.step + 1) % every == 0",
         "test_checkpoint.py::test_a_run_that_was_killed_goes_on_from_its_last_checkpoint"),
        ("oldest_first[: -self.keep]", "oldest_first[: 1 - self.keep]",
         "test_checkpoint.py::test_only_the_newest_are_kept"),
        ("tensor.isfinite().all()", "tensor.isfinite().any()",
         "test_checkpoint.py::test_weights_that_are_not_finite_never_become_a_checkpoint"),
        ('raise damaged(file, "is not what was written', 'print(file, "is not what was written',
         "test_checkpoint.py::test_a_damaged_checkpoint_is_refused_by_name"),
        ("if was != given:", "if was != given and was is None:",
         "test_checkpoint.py::test_a_changed_argument_is_refused_by_name"),
        ("return max(gather([self.number]))", "return self.number",
         "test_checkpoint.py::test_a_signal_to_another_process_counts"),
        ("        barrier()  # nobody goes on before it is there", "        pass",
         "test_checkpoint.py::test_all_wait_until_a_checkpoint_is_there"),
        ("            if old.name != name:", "            if True:",
         "test_checkpoint.py::test_a_clock_that_went_back_costs_nothing"),
    ],
    "run_folder.py": [
        ("if example.split == part]", "if example.split != part]",
         "test_run_folder.py::test_pairs_that_are_test_examples_are_refused"),
    ],
    "selection.py": [
        ('score > self.best["score"]', 'score >= self.best["score"]',
         "test_selection.py::test_the_best_of_four_candidates_is_kept"),
        ("total += chosen - sum(rejected) / len(rejected)", "total += chosen - sum(rejected)",
         "test_selection.py::test_a_margin_is_against_the_mean_of_the_rejected_responses"),
        ("dpo(logps, self.reference, self.args.beta)", "dpo(self.reference, logps, self.args.beta)",
         "test_selection.py::test_the_choice_never_sees_the_test_part"),
        ("e.user_message(e.context), e.system) for _, e in mine]",
         "e.user_message(None), e.system) for _, e in mine]",
         "test_selection.py::test_validation_responses_are_drawn_with_their_contexts"),
        ("wins = gather([verify(example, text) for (_, example), text in zip(mine, texts, strict=True)])",
         "wins = [verify(example, text) for (_, example), text in zip(mine, texts, strict=True)]",
         "test_selection.py::test_the_win_rate_is_of_all_processes_responses"),
    ],
    "fast.py": [
        ("return column.clamp(max=last)", "return column",
         "test_cache.py::test_a_model_of_nan_is_one_line"),
        ("(upcast(rows) * size**-0.5) @", "upcast(rows * size**-0.5) @",
         "test_fast.py::test_bf16_queries_are_scaled_in_fp32"),
        ("torch.cat((seen[parent], own[i]))", "torch.cat((seen[None], own[i]))",
         "test_cuda.py::test_all_parts_at_once_are_part_by_part"),
        ("torch.logaddexp(lse, slice_lse)", "torch.maximum(lse, slice_lse)", LOGPS),
        ("slice_forward(logits, targets - start)", "slice_forward(logits, targets)", LOGPS),
        ("d[rows, targets[rows]] += grad[rows]", "d[rows, targets[rows]] -= grad[rows]", LOGPS),
        ("d_weight[start : start + len(part)] = d.T", "d_weight[start : start + len(part)] = -d.T", LOGPS),
        ("(d_out @ v.transpose(1, 2) - row_sum)", "(d_out @ v.transpose(1, 2) + row_sum)", LAYERS),
        ("(mean_square + eps).rsqrt()", "mean_square.rsqrt() + eps", LAYERS),
        ("h.sub_(unit.mul_(mean))", "h.add_(unit.mul_(mean))", LAYERS),
        ("silu_backward(grad * up, gate)", "silu_backward(grad * gate, up)", LAYERS),
        ("torch.searchsorted(cumulative, target, right=True)", "torch.searchsorted(cumulative, target)",
         "test_fast.py::test_invert_cumulative_is_the_inverse"
         " test_fast.py::test_invert_cumulative_finds_a_column_with_mass_at_both_ends"),
        ("return column, target - before", "return column, target",
         "test_fast.py::test_invert_cumulative_is_the_inverse"),
        ("is_short = likely.cumsum(-1) < mass", "is_short = likely.cumsum(-1) <= mass",
         "test_sample.py::test_top_p_on_halves"),
        ("x.shape[-1] <= 256", "x.shape[-1] < 256", "test_cuda.py::test_the_kernel_is_used_where_it_exists"),
    ],
    "responses.py": [
        ('model = trained if system == "trained" else base', "model = base",
         "test_eval.py::test_each_systems_own_model_is_asked_about_the_choices"),
    ],
    "eval.py": [
        ("if plan.out.resolve() != plan.run.resolve() and", "if False and",
         "test_reuse.py::test_another_runs_evaluation_is_not_replaced"),
        ('verdicts = earlier.get("judges", {}) | verdicts', "verdicts = dict(verdicts)",
         "test_eval.py::test_the_first_judge_decides_and_others_stay"),
    ],
    "measures.py": [
        ("low, high = min(low, mean), max(high, mean)", "low, high = low, high",
         "test_measures.py::test_a_mean_lies_in_its_interval_to_the_last_bit"),
        ("row |= dict(choice_mi=interval(choice_mi,", "row |= dict(choice_mi=interval(1 - choice_mi,",
         "test_eval.py::test_choices_by_mutual_information_are_counted_where_they_are_right"),
        ("    if count > 2:", "    if count > 1:",
         "test_measures.py::test_two_prompts_are_too_few_for_an_interval_of_self_bleu"),
        ("max(variance, across, both)", "max(variance, both)",
         "test_measures.py::test_crossing_with_prompts_that_are_alike_takes_nothing_away"),
        ("effect = max(1.0, variance / independent) if independent",
         "effect = variance / independent if independent",
         "test_measures.py::test_rows_that_disagree_within_a_cluster_are_not_worth_more"),
        ("crossed=contexts if all(contexts) else None", "crossed=contexts if any(contexts) else None",
         "test_measures.py::test_evaluate_says_which_intervals_they_are"),
    ],
    "contexts.py": [
        ("[(e.prompt, e.reference, e.human_rejected) for e in examples]",
         "[(e.prompt, e.human_rejected, e.reference) for e in examples]",
         "test_data.py::test_contexts_that_two_judges_infer_do_not_mix"),
        ("(earlier | items).items()", "(items | earlier).items()",
         "test_data.py::test_contexts_that_two_judges_infer_do_not_mix"),
    ],
    "verdicts.py": [
        ("zip(criteria, trained, prompted, strict=True)", "zip(criteria, prompted, trained, strict=True)",
         "test_eval.py::test_trained_responses_are_compared_with_prompted_ones"),
    ],
    "memory.py": [
        ("cache=0.0 if is_ppo else cache", "cache=cache",
         "test_memory.py::test_what_ppo_samples_with_stays_while_it_trains"),
        ("shares + copy > USABLE * card", "copy > USABLE * card",
         "test_shard.py::test_a_copy_must_fit_beside_the_shares"),
    ],
    "report.py": [
        ("EARLY | written", "written",
         "test_report.py::test_a_run_from_before_an_option_is_a_seed_of_those_that_had_its_value"),
        ('return systems["trained"]["win_rate"]["mean"]', 'return systems["prompted"]["win_rate"]["mean"]',
         "test_report.py::test_a_strategy_is_chosen_by_its_trained_model"),
        ("key=means.get, reverse=True)}", "key=means.get)}",
         "test_report.py::test_methods_stand_side_by_side"),
        ("if key in run and run[\"intervals\"]]", "if key in run]",
         "test_report.py::test_intervals_of_an_earlier_version_are_named_and_count_as_no_evidence"),
        ("if set(column[1:]) != {\"-\"}", "if column",
         "test_report.py::test_where_nothing_says_what_is_right_methods_are_compared_by_context_gain"),
        ("np.std(values, ddof=1)", "np.std(values)",
         "test_report.py::test_the_report_has_seeds_the_chosen_strategy_and_the_papers_numbers"),
        ("return name if is_seed and name not in SYSTEMS", "return name if is_seed",
         "test_report.py::test_a_folder_called_like_a_system_is_none"),
        ("return max(found, key=len)", "return found[0]",
         "test_report.py::test_the_baseline_is_the_one_with_most_seeds"),
    ],
    "gpu_kernels.py": [
        ("total * tl.exp(maximum - base) +", "total +",
         "test_gpu_kernels.py::test_the_running_maximum_crosses_blocks"),
        ("tl.sum(values * values, 0) / size + eps", "tl.sum(values * values, 0) / size", NORM),
        ("unit * (tl.sum(h * unit, 0) / size)", "unit * tl.sum(h * unit, 0)", NORM),
        ("(a * c - b * s)", "(a * c + b * s)", ROTATION),
        ("mask=column < HALF) * sign", "mask=column < HALF)", ROTATION),
        ("s * (1 + z * (1 - s))", "s * (1 + z * s)", "test_gpu_kernels.py::test_gate_and_its_gradient"),
        ("held = token < count", "held = token <= count", DECODING),
        ("total = total * before + tl.sum", "total = total + tl.sum", DECODING),
        ("slot_k + first + count * SIZE", "slot_k + first + (count + 1) * SIZE", DECODING),
        ("tl.where(totals >= wanted, candidates", "tl.where(totals > wanted, candidates",
         "test_gpu_kernels.py::test_the_nucleus_is_that_of_the_plain_form"),
        ("+ lane - first", "+ lane", "test_gpu_kernels.py::test_a_part_is_rounded_as_in_the_whole"),
        (">> (16 * (part % 2))", ">> 0",
         "test_gpu_kernels.py::test_rounding_is_right_in_the_mean_and_independent_side_by_side"),
    ],
}


# ------------------------------------------------------------------------- runs

FORKS = multiprocessing.get_context("forkserver")


@dataclass
class Mutation:
    """A line that is broken, and what became of it."""

    file: str
    old: str
    new: str
    tests: list[str]
    outcome: str = ""  # killed, timeout (killed too), survived, or broken: no test could run
    by: str = ""  # the first test that failed
    seconds: float = 0.0


def mutations(folder: Path, only: str) -> list[Mutation]:
    """All of the table, or those whose file, old or new text holds `only`. An old text that does not stand in
    its file exactly once ends the program: the code has moved on, and the table has to follow."""
    chosen = []
    for file, rows in MUTATIONS.items():
        source = (folder / file).read_text()
        for old, new, tests in rows:
            if source.count(old) != 1 or "\n" in old:
                sys.exit(f"{file} holds {old!r} {source.count(old)} times, not once: bring tests/mutants.py "
                         "up to date")
            if any(only in text for text in (file, old, new)):
                chosen.append(Mutation(file, old, new, [f"tests/{name}" for name in tests.split()]))
    if not chosen:
        sys.exit(f"--only {only!r}: there is no such mutation")
    return chosen


def pytest_in(folder: Path, tests: list[str]) -> None:
    """Run pytest in a copy of the project, in a process of its own."""
    os.setsid()  # with all processes that tests start
    os.chdir(folder)
    sys.path[0] = str(folder)
    sys.dont_write_bytecode = False  # a copy serves many runs
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import pytest  # here, as the process that only starts others needs none of it

    sys.exit(pytest.main(["-x", "-q", "-n", "0", "--tb=no", "-p", "no:cacheprovider", *tests]))


def run_tests(folder: Path, tests: list[str], seconds: float = SECONDS) -> tuple[str, str]:
    """(outcome, by), as in Mutation, of tests in a copy of the project."""
    process = FORKS.Process(target=pytest_in, args=(folder, tests))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        return "timeout", f"took more than {seconds} s"
    if process.exitcode == 0:
        return "survived", ""
    output = (folder / LOG).read_text(errors="replace")
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.M)
    if process.exitcode == 1 and failed:
        return "killed", failed[1]
    return "broken", output[-500:]


def try_mutation(mutation: Mutation, folders: queue.Queue) -> None:
    """Break the line in a copy that is free, run its tests, mend the line, and print what became of it."""
    folder = folders.get()
    file = folder / mutation.file
    source = file.read_text()
    started = time.perf_counter()
    file.write_text(source.replace(mutation.old, mutation.new))
    mutation.outcome, mutation.by = run_tests(folder, mutation.tests)
    mutation.seconds = round(time.perf_counter() - started, 1)
    file.write_text(source)
    folders.put(folder)
    print(f"{mutation.outcome:8} {mutation.seconds:5.1f} s  {mutation.file}: {mutation.new}  "
          f"({mutation.by})", flush=True)


def program() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="mutations whose file, old or new text holds this")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "mutants.json")
    args = parser.parse_args()
    # As conftest.py, but before LIBRARIES import Triton.
    os.environ |= dict(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
    FORKS.set_forkserver_preload(LIBRARIES)
    with tempfile.TemporaryDirectory() as scratch:
        folders: queue.Queue = queue.Queue()
        for i in range(AT_ONCE):
            folders.put(shutil.copytree(ROOT, Path(scratch) / str(i), ignore=LEFT_OUT))
        first = Path(scratch) / "0"
        table = mutations(first, args.only)

        # A test that fails anyway kills nothing.
        tests = sorted({name for mutation in table for name in mutation.tests})
        print(f"{len(table)} mutations; first {len(tests)} files and tests without any", flush=True)
        outcome, by = run_tests(first, tests, SECONDS * len(tests))
        if outcome != "survived":
            sys.exit(f"without any mutation the tests do not pass: {outcome}, {by}")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda mutation: try_mutation(mutation, folders), table))

    counts = Counter(mutation.outcome for mutation in table)
    results = dict(counts=counts, mutations=[asdict(mutation) for mutation in table])
    args.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(f"{args.out}: {dict(counts)}")
    if counts.keys() - {"killed", "timeout"}:
        sys.exit("a mutation has survived, or could not be tried: it needs a test")


if __name__ == "__main__":
    program()
