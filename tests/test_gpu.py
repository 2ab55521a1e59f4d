"""What only a GPU can show: that its kernels, its graph and bf16 give what a CPU gives in fp32.

Without --gpu, or where there is none, all of these are skipped. What can be checked without a GPU is in
test_cuda.py and test_gpu_kernels.py.

    python -m pytest --gpu tests/test_gpu.py tests/test_gpu_kernels.py
"""

import inspect
import json
import time
import warnings

import pytest
import torch
from conftest import random_model, random_pairs, run_inside
from torch import Tensor

import fast
import train
from batches import all_logps, training_rows
from losses import OBJECTIVES, response_logps
from model import Packed
from optimizer import MasterAdamW
from sample import Sampler, Sampling, generate
from training_log import Metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs --gpu and a GPU")
SHAPE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, head_dim=64)
RNG = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(320, (5 + i % 9,), generator=RNG).tolist() for i in range(40)]


def relative(found: Tensor, expected: Tensor) -> float:
    """How far two tensors are apart."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def on_gpu(dtype: torch.dtype = torch.bfloat16, **changes):
    """random_model's weights on the GPU, in fp32 or with matrices in bf16; scores have no reason to agree by
    chance: weights of 0.1 make sharp distributions."""
    model = random_model(**SHAPE | changes).cuda()
    for name, p in model.named_parameters():
        if "norm" not in name:
            p.data = p.data.to(dtype)
    return model


def scores(model, prompts: list[list[int]], samples: list) -> Tensor:
    """The log-probs that training would give to the sampled tokens."""
    groups = [(prompt, [sample.ids]) for prompt, sample in zip(prompts, samples, strict=True)]
    with torch.no_grad():
        return torch.cat([tokens for [tokens] in response_logps(model, groups)]).cpu()


def test_attention_over_a_pack_is_that_of_its_parts_in_fp64():
    """A root, prefixes, empty responses; values and gradients, with shared key heads."""
    layout, results = Packed([(40, [30, 1, 55]), (70, [0, 12]), (33, [])], 17, device="cuda"), []
    inputs = [torch.randn(len(layout.positions), heads, 64).bfloat16() for heads in (6, 2, 2)]
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [x.to("cuda", dtype).requires_grad_() for x in inputs]
        assert fast.runs_flash(leaves[0]) == (dtype == torch.bfloat16)
        out = layout.attend(0, *leaves)
        out.backward(torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape).to(dtype))
        results.append([out, *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        assert relative(found, expected) < 0.01


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_log_probs_and_gradients_are_those_of_a_cpu(dtype, error):
    """Of groups with a common beginning, by every kernel that training uses."""
    model, exact = on_gpu(dtype), random_model(**SHAPE)
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        q.data = p.detach().float().cpu()
    root = PROMPTS[0] * 3
    groups = [(root + PROMPTS[1], [PROMPTS[2], [7], PROMPTS[3]]), (root + PROMPTS[4], [PROMPTS[5]])]
    results = []
    for each in (model, exact):
        logps = torch.cat([tokens for responses in response_logps(each, groups) for tokens in responses])
        logps.sum().backward()
        results.append([logps.detach(), *(p.grad for p in each.parameters())])
    assert all(relative(a, b) < error for a, b in zip(*results, strict=True))


def test_heads_without_a_kernel_are_decoded_too():
    """Of 96 channels."""
    model = on_gpu(head_dim=96)
    samples = generate(model, PROMPTS, Sampling(1.0, 0.9, 16), frozenset(range(20)), 0, slots=16)
    found = torch.tensor([logp for sample in samples for logp in sample.logps])
    assert (scores(model, PROMPTS, samples) - found).abs().mean() < 0.05


@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("shared", [0, 70])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_what_is_sampled_has_the_log_probs_that_training_gives_it(top_p, shared, offset):
    """In bf16, by the decoding step's graph with slots used again, also with keys that share a large
    constant: the two differ by bf16's rounding."""
    model = on_gpu(attention_bias=True, model_type="qwen2")
    for block in model.model.layers:
        block.self_attn.k_proj.bias.data.zero_()[::64] = offset
        block.self_attn.q_proj.bias.data.zero_()[::64] = 2
    prompts = [[7] * shared + prompt for prompt in PROMPTS]
    samples = generate(model, prompts, Sampling(1.0, top_p, 32), frozenset(range(20)), 0, slots=16)
    found = torch.tensor([logp for sample in samples for logp in sample.logps])
    assert len(found) > 300
    assert (scores(model, prompts, samples) - found).abs().mean() < 0.05


def test_texts_do_not_depend_on_the_slots_or_the_device():
    """In fp32: 40 responses by 24 slots, by one, and by a CPU; rounding may draw another token in one."""
    model, sampling, stops = on_gpu(torch.float32), Sampling(1.0, 0.9, 24), frozenset(range(20))
    wide, narrow = (generate(model, PROMPTS, sampling, stops, 0, slots=slots) for slots in (24, 1))
    on_cpu = generate(model.cpu(), PROMPTS, sampling, stops, 0, slots=24)
    for others in (narrow, on_cpu):
        assert sum(a.ids == b.ids for a, b in zip(wide, others, strict=True)) >= 38


def test_a_sampler_sees_changed_weights():
    """Its graph reads the weights where they are, as PPO wants it."""
    model, sampling = on_gpu(), Sampling(0.0, 1.0, 12)
    sampler = Sampler(model, PROMPTS, sampling, frozenset(), slots=16)
    before = sampler.sample(PROMPTS, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-1.5)
    after, expected = sampler.sample(PROMPTS, 0), generate(model, PROMPTS, sampling, frozenset(), 0, slots=16)
    assert [x.ids for x in after] == [x.ids for x in expected] != [x.ids for x in before]


def test_the_host_waits_once_a_step():
    """And twice for a response that ends, and a few times where prompts are admitted: 40 prompts in 16 slots,
    of 12 tokens each."""
    model = on_gpu()
    sampler = Sampler(model, PROMPTS, Sampling(1.0, 0.9, 12), frozenset(), slots=16)
    sampler.sample(PROMPTS, 0)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            sampler.sample(PROMPTS, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def waits_in(function) -> int:
        lines, first = inspect.getsourcelines(function)
        places = range(first, first + len(lines))
        return sum(w.filename == inspect.getsourcefile(function) and w.lineno in places for w in waits)

    steps, admissions = 3 * 11, 3  # the first token of a response is drawn as its prompt is admitted
    assert waits_in(Sampler.finish_ended) == steps + admissions
    assert waits_in(Sampler.step) == waits_in(Sampler.draw) == 0
    assert waits_in(Sampler.finish) == 2 * len(PROMPTS)


def test_training_learns_and_repeats(tmp_path):
    """DPO in bf16 on random pairs: the first step's margins are 0, the loss falls, masters move by less than
    bf16 can hold, and a second run is close to the first: a GPU's sums have no fixed order."""
    runs = []
    for number in range(2):
        model = on_gpu()
        args = train.resolve(train.Args(model="random", neg="random", lr=1e-4, epochs=3))
        pairs = training_rows(random_pairs(16), args)
        reference = all_logps(model, pairs, args)
        file = tmp_path / f"{number}.jsonl"
        train.train(MasterAdamW(model, args.lr, args.seed), pairs, reference, args, Metrics(file),
                    train.State())
        runs.append([json.loads(line) for line in file.read_text().splitlines()])
    first, again = runs
    assert first[0]["margin"] == 0 and first[-1]["margin"] > 1
    assert all(0 < line["weights_changed"] < 1 for line in first[1:])
    for a, b in zip(first, again, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.05)


@pytest.mark.parametrize("method", OBJECTIVES)
def test_no_training_step_makes_the_host_wait(method, tmp_path):
    """Nothing in it, or in the reference's log-probs, reads from the GPU, or sends what the GPU must take
    before the host can go on."""
    model = on_gpu()
    args = train.resolve(train.Args(method=method, model="random", neg="random", lr=1e-4))
    pairs = training_rows(random_pairs(16), args)
    all_logps(model, pairs, args)  # what comes first may have to wait
    optimizer = MasterAdamW(model, args.lr, args.seed)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            reference = all_logps(model, pairs, args)
            train.train(optimizer, pairs, reference, args, Metrics(tmp_path / "m.jsonl"), train.State())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [f"{w.filename}:{w.lineno}" for w in waits if "called a synchronizing" in str(w.message)] == []


def test_numbers_travel_while_the_host_goes_on():
    """While the GPU is busy for about a second, what is sent and what is to be read take the host no time;
    what is read is the value at the time of sending."""
    numbers = torch.arange(3, device="cuda")
    fast.Reading(numbers + fast.sent([5, 6, 7], "cuda")).read()  # what comes first may have to wait
    started = time.perf_counter()
    torch.cuda._sleep(2 * 10**9)  # cycles
    start = fast.Moment(numbers.device)
    reading = fast.Reading(numbers + fast.sent([5, 6, 7], "cuda"))
    numbers += 100
    given = time.perf_counter() - started
    assert reading.read() == [5, 7, 9] and numbers.tolist() == [100, 101, 102]
    assert given < 0.3 < time.perf_counter() - started and reading.arrival.seconds_since(start) < 0.3


def test_the_whole_job(tmp_path):
    """train.py on the embedded model: pairs, training, evaluation, all on the GPU, in bf16."""
    run_inside(train.program, tmp_path, "--out", "run", "--limit", "64", "--max-new-tokens", "48")
    out = tmp_path / "run"
    result, used = json.loads((out / "eval.json").read_text()), json.loads((out / "args.json").read_text())
    assert used["arguments"]["dtype"] == "bfloat16" and result["contexts"]
    assert used["environment"]["device"] == result["environment"]["device"] == torch.cuda.get_device_name()
