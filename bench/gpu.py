"""gpu.py - all measurements that need a GPU, in one process and a few minutes, from these files alone.

    kernel   the log-softmax-gather kernels over ready bf16 logits, forward and backward, against torch
    head     hidden states to log-probs and back: ours, materialised, torch's, Liger, cut-cross-entropy
    step     a DPO step of models of well-known shapes with random weights, on equal and on unequal pairs
    decode   sampling from them, with short and with long caches

Seconds are medians. Every row says the share of its floor: what the work would take if nothing but its
products ran, at the speed of a large matrix product, or nothing but its memory traffic, at the speed of a
copy; both are measured here first.

    python bench/gpu.py            on a GPU
    python bench/gpu.py --small    the same script on small shapes, on any machine: to check the script
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from head import HEADS, available, run_head
from side_by_side import clock, copy_speed, flops, matmul_ceiling

from batches import groups_of
from config import Config
from fast import skip_cudnn_attention, slice_backward, slice_forward
from model import Decoder
from negatives import Pair, Response
from optimizer import MasterAdamW
from run import default_device, environment, read_jsonl, write_json
from sample import Sampler, Sampling
from train import Args, resolve, train
from training_log import Metrics, State

COMMON = dict(rms_norm_eps=1e-6, max_position_embeddings=8192, hidden_act="silu")
LLAMA_1B = dict(COMMON, model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192,
                num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
                rope_theta=5e5, tie_word_embeddings=True)
QWEN_1B = dict(COMMON, model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960,
               num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, rope_theta=1e6,
               tie_word_embeddings=True)
QWEN_7B = dict(COMMON, model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944,
               num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, rope_theta=1e6,
               tie_word_embeddings=False)
TINY = dict(COMMON, model_type="llama", vocab_size=1000, hidden_size=64, intermediate_size=96,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
EQUAL = [(512, 256, 256)] * 16  # tokens of a pair's prompt, chosen and rejected response
UNEQUAL = [(430, 180, 260), (350, 240, 90), (500, 150, 200), (280, 300, 120)]


def timed(work, rounds: int = 10) -> float:
    """Median seconds of a call, after two that warm up."""
    seconds = []
    for _ in range(rounds + 2):
        start = clock()
        work()
        seconds.append(clock() - start)
    return statistics.median(seconds[2:])


def random_model(raw: dict, device: torch.device) -> Decoder:
    """A decoder of a shape in bf16, norms in fp32, with small random weights."""
    with device:
        model = Decoder(Config.from_dict(raw))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02)
        if "norm" not in name:
            p.data = p.data.bfloat16()
    return model


def kernel(tokens: int, vocabulary: int, device: torch.device, bandwidth: float) -> dict:
    """Milliseconds and GB a second of the two kernels; without a GPU, of the plain code in their place."""
    logits = torch.randn(tokens, vocabulary, device=device, dtype=torch.bfloat16)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    upstream = torch.rand(tokens, device=device)
    lse, picked = slice_forward(logits, targets)
    exact = logits[:16].double().log_softmax(-1).gather(1, targets[:16, None]).squeeze(1)
    there = timed(lambda: slice_forward(logits, targets))
    back = timed(lambda: slice_backward(logits, targets, lse, upstream))
    plain = timed(lambda: logits.float().log_softmax(-1).gather(1, targets[:, None]), 3)
    forward_floor, backward_floor = logits.nbytes / bandwidth, 2 * logits.nbytes / bandwidth
    return dict(tokens=tokens, vocabulary=vocabulary, forward_ms=1e3 * there, backward_ms=1e3 * back,
                forward_floor_share=forward_floor / there, backward_floor_share=backward_floor / back,
                torch_forward_ms=1e3 * plain, error=((picked - lse)[:16] - exact).abs().max().item())


def heads(tokens: int, size: int, vocabulary: int, device: torch.device, ceiling: float) -> dict:
    """Each head's milliseconds forward and backward, its peak memory, and the share of its floor: one product
    forward and two backward."""
    floor = 3 * 2 * tokens * size * vocabulary / ceiling
    rows = {}
    for name in available():
        if device.type == "cuda":
            torch.cuda.empty_cache()
        found = run_head(HEADS[name], tokens, size, vocabulary, device)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        rows[name] = dict(forward_ms=1e3 * found["seconds_forward"],
                          backward_ms=1e3 * found["seconds_backward"], peak_gib=peak, error=found["error"],
                          floor_share=floor / found["seconds"])
    return dict(tokens=tokens, hidden=size, vocabulary=vocabulary, heads=rows)


def step(raw: dict, shapes: list[tuple[int, int, int]], root: int, device: torch.device,
         ceiling: float) -> dict:
    """DPO steps of train.py on random pairs: pairs a second and the share of the floor.

    shapes: as in EQUAL. root: tokens that all prompts begin with.
    """
    model = random_model(raw, device)
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(raw["vocab_size"], (count,), generator=generator).tolist()

    beginning, rows = ids(root), []
    for i, (prompt, chosen, rejected) in enumerate(shapes):
        prompt_ids = beginning + ids(prompt - root)
        responses = [Response("", ids(count), True, prompt_ids) for count in (chosen, rejected)]
        rows.append(Pair(str(i), "", None, responses[0], responses[1:]))
    args = resolve(Args(model="random", neg="random", batch=len(rows), lr=1e-6, epochs=9))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "metrics.jsonl"
        train(MasterAdamW(model, args.lr, args.seed), rows, torch.zeros(len(rows), 2, device=device), args,
              Metrics(file), State())
        steps = [line for _, line in read_jsonl(file)]
    seconds = statistics.median(line["tokens"] / line["tokens_per_second"] for line in steps[2:])
    groups = [groups_of(pair, args)[0] for pair in rows]
    work = flops(model.config, groups)
    return dict(model=raw["model_type"], hidden=raw["hidden_size"], layers=raw["num_hidden_layers"],
                pairs=len(rows), shapes=sorted(set(shapes)), root=root, seconds=seconds,
                pairs_per_s=len(rows) / seconds, tflops=work / seconds / 1e12,
                floor_share=work / ceiling / seconds)


def decode(raw: dict, rows: list[tuple[int, int]], new: int, device: torch.device, bandwidth: float,
           top_p: float = 1.0) -> list[dict]:
    """Sampling `new` tokens without an end: tokens a second, and the share of the floor: to read the weights
    and what the cache holds once a step.

    rows: how many responses, tokens of a prompt.
    """
    model = random_model(raw, device)
    weights = sum(p.nbytes for p in model.parameters())
    if not model.config.tie_word_embeddings:  # a token reads one row of the embedding
        weights -= model.model.embed_tokens.weight.nbytes
    a_token = 2 * 2 * raw["num_hidden_layers"] * model.config.num_key_value_heads * model.config.head_dim
    results = []
    for count, prompt in rows:
        prompts = [[1 + i % 7] * prompt for i in range(count)]  # that begin differently

        def seconds(tokens: int, prompts: list[list[int]] = prompts) -> float:
            sampling = Sampling(1.0, top_p, tokens)
            sampler = Sampler(model, prompts, sampling, frozenset(), len(prompts))
            return timed(lambda: sampler.sample(prompts, 0), rounds=3)

        each = (seconds(new) - seconds(1)) / (new - 1)  # without the prefill, which draws the first token
        floor = (weights + a_token * count * (prompt + new // 2)) / bandwidth
        results.append(dict(hidden=raw["hidden_size"], rows=count, prompt=prompt, new=new, top_p=top_p,
                            step_ms=1e3 * each, tokens_per_s=count / each, floor_share=floor / each))
    return results


def program() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--small", action="store_true", help="small shapes, nothing written")
    p.add_argument("--out", default=str(Path(__file__).parent / "results" / "gpu.json"))
    args = p.parse_args()
    skip_cudnn_attention()
    device, began = default_device(), time.perf_counter()
    if not args.small and device.type != "cuda":
        raise SystemExit("bench/gpu.py: error: no GPU here; --small checks the script")
    bandwidth, ceiling = copy_speed(2**20 if args.small else 2**28), matmul_ceiling(torch.bfloat16, device)
    result: dict = dict(environment=environment(), copy_gb_per_s=bandwidth / 1e9,
                        matmul_tflops=ceiling / 1e12)

    def note(key: str, value) -> None:
        result[key] = value
        print(f"{time.perf_counter() - began:.0f} s {key}: {json.dumps(value)}", flush=True)
        if not args.small:
            write_json(Path(args.out), result)  # after every row: a time limit costs only what is left

    if args.small:
        note("kernel", [kernel(32, 1000, device, bandwidth)])
        note("head", [heads(64, 64, 1000, device, ceiling)])
        note("step", [step(TINY, [(16, 8, 8), (20, 5, 9)], 4, device, ceiling)])
        note("decode", decode(TINY, [(1, 64), (4, 100)], 16, device, bandwidth))
        return
    note("kernel", [kernel(8192, v, device, bandwidth) for v in (151936, 128256)])
    note("head", [heads(8192, *shape, device, ceiling) for shape in ((4096, 151936), (2048, 128256))])
    note("step", [step(raw, shapes, root, device, ceiling) for raw in (LLAMA_1B, QWEN_1B)
                  for shapes, root in ((EQUAL, 0), (UNEQUAL, 64))])
    cases = [(1, 64), (64, 64), (128, 64), (256, 64), (128, 1408)]
    note("decode", [row for raw in (QWEN_1B, QWEN_7B) for row in decode(raw, cases, 128, device, bandwidth)])
    note("decode_top_p", decode(QWEN_1B, [(128, 64)], 128, device, bandwidth, top_p=0.9))


if __name__ == "__main__":
    program()
