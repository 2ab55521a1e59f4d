"""gpu.py - every row that needs a GPU, in one process and a few minutes; it needs no files but the project's.

    kernel   the log-softmax-gather kernels over ready bf16 logits, forward and backward, against torch
    head     hidden states to log-probs and back: ours, materialised, torch's, Liger, cut-cross-entropy
    step     a DPO step of models of well-known shapes with random weights: share of the matmul ceiling
    decode   sampling from them: tokens a second; weights and cache read a second, over the copy bandwidth

    python bench/gpu.py            on a GPU
    python bench/gpu.py --small    the same script on small shapes, on any machine: to check the script
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from head import HEADS, available, run_head
from side_by_side import clock, copy_speed, flops, matmul_ceiling

from fast import slice_backward, slice_forward
from model import Config, Decoder
from optimizer import MasterAdamW
from negatives import Pair, Response
from run import Metrics, default_device, environment, write_json
from sample import Sampling, generate
from train import Args, State, groups_of, resolve, train

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


def kernel(tokens: int, vocabulary: int, device: torch.device) -> dict:
    """Milliseconds and GB a second of the two kernels; without a GPU, of the plain code in their place."""
    logits = torch.randn(tokens, vocabulary, device=device, dtype=torch.bfloat16)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    upstream = torch.rand(tokens, device=device)
    lse, picked = slice_forward(logits, targets)
    exact = logits[:16].double().log_softmax(-1).gather(1, targets[:16, None]).squeeze(1)
    there = timed(lambda: slice_forward(logits, targets))
    back = timed(lambda: slice_backward(logits, targets, lse, upstream))
    plain = timed(lambda: logits.float().log_softmax(-1).gather(1, targets[:, None]), 3)
    return dict(tokens=tokens, vocabulary=vocabulary, forward_ms=1e3 * there, backward_ms=1e3 * back,
                forward_gb_per_s=logits.nbytes / there / 1e9,
                backward_gb_per_s=2 * logits.nbytes / back / 1e9, torch_forward_ms=1e3 * plain,
                error=((picked - lse)[:16] - exact).abs().max().item())


def heads(tokens: int, size: int, vocabulary: int, device: torch.device) -> dict:
    """Each head's milliseconds forward and backward, and its peak memory."""
    rows = {}
    for name in available():
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found = run_head(HEADS[name], tokens, size, vocabulary, device)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        rows[name] = dict(forward_ms=1e3 * found["seconds_forward"],
                          backward_ms=1e3 * found["seconds_backward"], peak_gib=peak, error=found["error"])
    return dict(tokens=tokens, hidden=size, vocabulary=vocabulary, heads=rows)


def step(raw: dict, pairs: int, prompt: int, response: int, device: torch.device, ceiling: float) -> dict:
    """DPO steps of train.py on random pairs: pairs a second and the share of the matmul ceiling."""
    model = random_model(raw, device)
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(raw["vocab_size"], (count,), generator=generator).tolist()

    def random_pair(i: int) -> Pair:
        prompt_ids = ids(prompt)
        chosen, rejected = (Response("", ids(response), True, prompt_ids) for _ in range(2))
        return Pair(str(i), "", None, chosen, [rejected])

    rows, reference = [random_pair(i) for i in range(pairs)], torch.zeros(pairs, 2, device=device)
    for epochs in (2, 5):  # the first two steps warm up
        args = resolve(Args(model="random", neg="random", batch=pairs, lr=1e-6, epochs=epochs))
        optimizer, state = MasterAdamW(model, args.lr, args.seed), State()
        train(optimizer, rows, reference, args, Metrics(Path(os.devnull)), state)
    seconds = state.seconds / state.step
    work = flops(model.config, [groups_of(pair, args)[0] for pair in rows])
    return dict(model=raw["model_type"], hidden=raw["hidden_size"], layers=raw["num_hidden_layers"],
                pairs=pairs, prompt=prompt, response=response, seconds=seconds, pairs_per_s=pairs / seconds,
                matmul_share=work / seconds / ceiling, tflops=work / seconds / 1e12)


@torch.inference_mode()
def decode(raw: dict, counts: list[int], new: int, device: torch.device, bandwidth: float) -> list[dict]:
    """Sampling `new` tokens without an end: tokens a second, and bytes of weights and cache read a second."""
    model = random_model(raw, device)
    weights = sum(p.nbytes for p in model.parameters())
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    rows = []
    for count in counts:
        prompts = [[1 + i % 7] * 64 for i in range(count)]

        def run(most: int, prompts: list[list[int]] = prompts) -> float:
            start = clock()
            generate(model, prompts, Sampling(1.0, 1.0, most), frozenset(), 0, slots=len(prompts))
            return clock() - start

        run(8)
        seconds = run(new) - run(8)  # without the prefill
        cache = 2 * 2 * raw["num_hidden_layers"] * heads * size * count * (64 + new // 2)
        rows.append(dict(hidden=raw["hidden_size"], rows=count, tokens_per_s=count * (new - 8) / seconds,
                         bandwidth_share=(weights + cache) * (new - 8) / seconds / bandwidth))
    return rows


def program() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--small", action="store_true", help="small shapes, nothing written")
    p.add_argument("--out", default=str(Path(__file__).parent / "results" / "gpu.json"))
    args = p.parse_args()
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
        note("kernel", [kernel(32, 1000, device)])
        note("head", [heads(64, 64, 1000, device)])
        note("step", [step(TINY, 2, 16, 8, device, ceiling)])
        note("decode", decode(TINY, [1, 4], 16, device, bandwidth))
        return
    note("kernel", [kernel(8192, v, device) for v in (151936, 128256)])
    note("head", [heads(8192, *shape, device) for shape in ((4096, 151936), (2048, 128256))])
    note("step", [step(raw, 16, 512, 256, device, ceiling) for raw in (LLAMA_1B, QWEN_1B)])
    note("decode", [row for raw in (QWEN_1B, QWEN_7B)
                    for row in decode(raw, [1, 64, 256], 128, device, bandwidth)])


if __name__ == "__main__":
    program()
