"""What several test files share: two models, oracles, pairs and data made up on the spot, programs in and out
of this process.

The tiny random model needs nothing but the project's own packages. SmolLM2-135M-Instruct comes from
MIPO_SMOLLM2 (a folder), or is built once by ../shared/tools/make_smollm2.py where that script is at hand;
tests that ask for it are skipped where it is not.
"""

import contextlib
import gc
import http.server
import importlib.util
import inspect
import json
import math
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch

# The suite tests the same on every machine. With --gpu the tests that know of a GPU use it.
if "--gpu" not in sys.argv and "MIPO_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
if torch.cuda.is_available():
    os.environ["MIPO_GPU"] = "1"  # for the processes that share the tests
elif importlib.util.find_spec("triton"):  # before anyone imports it: its kernels run as numpy then
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    collect_ignore = ["test_gpu_kernels.py"]

from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import logging as transformers_logging

import train
from batches import all_logps, training_rows
from config import Config
from data import Example
from measures import Answer
from model import Decoder, Packed
from negatives import Pair, Response
from run import main, read_jsonl
from sample import Sample, generate
from training_log import Metrics

torch.set_num_threads(1)  # of each of the processes that share the tests, and of those they start
os.environ.setdefault("OMP_NUM_THREADS", "1")
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

ROOT = Path(__file__).parents[1]
END = 1  # the tiny model's end token
CLOCK = ("tokens_per_second",)  # what the clock decides in a line of metrics.jsonl
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = dict(
    model_type="llama", vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, rope_theta=10000.0,
    tie_word_embeddings=True, max_position_embeddings=2048, hidden_act="silu", eos_token_id=1,
    architectures=["LlamaForCausalLM"], torch_dtype="float32",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="let the GPU tests use a GPU")


# ------------------------------------------------------------------------- models

def random_model(seed: int = 0, scale: float = 0.1, **changes) -> Decoder:
    """A tiny decoder with N(0, scale) weights, norms left at 1. changes: values of its config.json."""
    model = Decoder(Config.from_dict({**CONFIG, **changes}))
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=scale, generator=generator)
    return model


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 320 entries with two special tokens, and a ChatML template."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials, alphabet = ["<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=specials, show_progress=False,
                                  initial_alphabet=alphabet)
    text = "the user asks and the assistant answers, in a word or in a few sentences. "
    tokenizer.train_from_iterator([text * 3], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = dict(eos_token="<|im_end|>", chat_template=TEMPLATE, tokenizer_class="PreTrainedTokenizerFast")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    defaults = dict(eos_token_id=[END], temperature=0.7, top_k=3)
    (folder / "generation_config.json").write_text(json.dumps(defaults))


def write_model(folder: Path, **changes) -> Path:
    """A Hugging Face folder: random_model's weights, its config and the tokenizer above."""
    folder.mkdir(parents=True, exist_ok=True)
    model = random_model(**changes)
    weights = {name: p.detach().contiguous() for name, p in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.raw))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Folder of a random 2-layer Llama with a tokenizer and a chat template."""
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct."""
    folder = Path(os.environ.get("MIPO_SMOLLM2") or Path.home() / ".cache" / "mipo-tests" / "smollm2")
    tool = ROOT.parent / "shared" / "tools" / "make_smollm2.py"
    if not (folder / "model.safetensors").exists():
        if not tool.exists():
            pytest.skip("SmolLM2 is not at hand: set MIPO_SMOLLM2 to its folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            built = Path(scratch) / "model"
            subprocess.run([sys.executable, tool, built], check=True, capture_output=True)
            if not folder.exists():  # no other test run has been faster
                built.rename(folder)
    return folder


# ------------------------------------------------------------------------- transformers' models

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
         "bos_token_id": None, "eos_token_id": END}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
ARCHITECTURES = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_untied": {"model_type": "llama", "tie_word_embeddings": False, "num_key_value_heads": 4},
    "llama_llama3_rope": {"model_type": "llama", "rope_parameters": {**LLAMA3, "rope_theta": 10_000.0}},
    "llama_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "llama_theta_eps": {"model_type": "llama", "rms_norm_eps": 0.1, "num_key_value_heads": 1,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 32},
    "qwen3_untied_biases": {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 16,
                            "attention_bias": True},
}
FAMILIES = ("llama_llama3_rope", "qwen2", "qwen3")


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """(name of an architecture) -> (folder that transformers saved, transformers' model): random weights,
    biases and norms."""
    cases: dict[str, tuple] = {}

    def get(name: str) -> tuple:
        if name not in cases:
            torch.manual_seed(len(name))
            config = AutoConfig.for_model(**{**SIZES, **ARCHITECTURES[name]})
            oracle = AutoModelForCausalLM.from_config(config).eval()
            for key, p in oracle.named_parameters():
                torch.nn.init.normal_(p, mean=float("norm" in key), std=0.5 if p.dim() == 1 else 0.15)
            folder = tmp_path_factory.mktemp(name)
            oracle.save_pretrained(folder)
            cases[name] = folder, oracle
        return cases[name]

    return get


@torch.no_grad()
def oracle_logits(oracle: torch.nn.Module, ids: Tensor) -> Tensor:
    """transformers' logits of one sequence, (T, V)."""
    return oracle(ids[None]).logits[0].float()


# ------------------------------------------------------------------------- log-probs and gradients

def close(a: Tensor, b: Tensor, atol: float = 1e-4) -> None:
    """Two tensors are of one shape and type, and nowhere further apart than `atol`."""
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


class CountingBar:
    """A progress bar that only counts."""

    count, status = 0, ""

    def update(self, n: int) -> None:
        self.count += n

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.status = text


@torch.no_grad()
def sequence_logits(model: Decoder, ids: Tensor) -> Tensor:
    """Our logits of one sequence, (T, V)."""
    return model.logits(model(ids, Packed([(len(ids), [])])))


def oracle_logps(oracle: torch.nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """The log-prob of every token of a response from transformers' full logits, with a graph. (R,)"""
    ids = torch.tensor(prompt + response)  # (T,)
    logps = oracle(ids[None]).logits[0, :-1].log_softmax(-1)  # (T - 1, V)
    return logps.gather(1, ids[1:, None])[len(prompt) - 1 :, 0]  # (R,)


@torch.no_grad()
def oracle_logp(oracle: torch.nn.Module, prompt: list[int], response: list[int]) -> float:
    """log p(response | prompt) from transformers' full logits, summed over the response's tokens."""
    return oracle_logps(oracle, prompt, response).sum().item()


def named_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the gradient of every parameter, ours or transformers': the names are the same."""
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def kept_bytes(model: torch.nn.Module, forward: Callable[[], Tensor]) -> int:
    """The bytes that autograd keeps between forward() and its backward pass, parameters left out: each
    storage once, however many operations keep it."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no storage takes the place of another that is gone

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(sizes.values())


def assert_json_close(a, b, rel: float = 1e-4, abs: float = 1e-5) -> None:
    """Two JSON values are equal, their numbers up to fp32 rounding; nan equals nan."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_json_close(a[key], b[key], rel, abs)
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_json_close(x, y, rel, abs)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=rel, abs=abs, nan_ok=True)
    else:
        assert a == b


# ------------------------------------------------------------------------- prompts, pairs, data

def chat_ids(folder: Path, user_message: str) -> list[int]:
    """The tiny model's ChatML around a user message, by the tokenizers library alone."""
    text = f"<|im_start|>user\n{user_message}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


def letter_ids(folder: Path, text: str) -> list[int]:
    """A text's ids letter by letter, which is not how the tokenizer would cut it."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [token for letter in text for token in tokenizer.encode(letter).ids]


def training_example(number: int, context: str | None = None, prompt: str | None = None, **more) -> Example:
    """A row of the training part, "Question <number>?" where no prompt is given."""
    return Example(str(number), prompt or f"Question {number}?", "train", context, **more)


def random_pairs(count: int, rejected: int = 1, seed: int = 0, end: bool = False) -> list[Pair]:
    """Pairs of random ids: prompts of 3 to 12 tokens, responses of 1 to 8. end: chosen responses have the end
    token after these."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(2, 320) for _ in range(rng.randint(low, high))]

    pairs = []
    for i in range(count):
        chosen = Response("good", ids(1, 8) + [END] * end, True, prompt_ids=ids(3, 12))
        others = [Response("bad", ids(1, 8), True, prompt_ids=ids(3, 12)) for _ in range(rejected)]
        pairs.append(Pair(f"row{i}", "x", "c", chosen, others))
    return pairs


def write_data(file: Path, contexts: int = 3, rows_per_prompt: int = 1, **parts: int) -> Path:
    """A data set of one's own, so many rows for each of the parts (train=8, test=3): row i of it says
    "I am number <i % contexts>.", and as many rows in succession as `rows_per_prompt` share a prompt."""
    splits = [split for split, count in parts.items() for _ in range(count)]
    rows = [dict(id=f"r{i}", prompt=f"{split} question {i // rows_per_prompt}?",
                 context=f"I am number {i % contexts}.", split=split) for i, split in enumerate(splits)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def metrics_of(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without what the clock decides."""
    rows = [row for _, row in read_jsonl(folder / "metrics.jsonl")]
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


# ------------------------------------------------------------------------- programs

def run_inside(program: Callable[[], None], folder: Path, *argv) -> None:
    """A program of the project (train.program, say) inside this process, with `folder` as its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{program.__module__}.py", *map(str, argv)])
        program()


def leave(monkeypatch, program: Callable[[], None], *argv) -> int:
    """Run a program as a script, inside this process; the exit code that it leaves with."""
    monkeypatch.setattr(sys, "argv", [f"{program.__module__}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as left:
        main(program)
    return left.value.code


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment for a child on one thread, which has no use for Triton's interpreter."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return variables | dict(OMP_NUM_THREADS="1") | more


def run_process(script: str, *argv, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """A program of the project ("train.py", say) in a process of its own, on one thread."""
    return subprocess.run([sys.executable, ROOT / script, *map(str, argv)], cwd=cwd, capture_output=True,
                          text=True, check=False, env=child_environment(**environment))


def run_processes(count: int, script: str, *argv, cwd: Path) -> subprocess.CompletedProcess:
    """The same in `count` processes of torchrun, on one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}",
               ROOT / script, *argv]
    return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False,
                          env=child_environment())


def seconds_of(function: Callable, *args) -> float:
    """Processor seconds of one call in this thread, without those that collect the garbage of other tests."""
    gc.disable()
    try:
        start = time.thread_time()
        function(*args)
        return time.thread_time() - start
    finally:
        gc.enable()


def start_workers(count: int, file: str, *argv) -> None:
    """Run a Python file that calls run.main in `count` processes of one group, on one thread each."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    group = dict(WORLD_SIZE=count, MASTER_ADDR="localhost", MASTER_PORT=port, OMP_NUM_THREADS=1,
                 PYTHONPATH=ROOT)
    shared = os.environ | {name: str(value) for name, value in group.items()}
    command = [sys.executable, file, *argv]
    processes = []
    for r in range(count):
        environment = shared | dict(RANK=str(r), LOCAL_RANK=str(r))
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
    errors = [process.communicate()[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors)


# ------------------------------------------------------------------------- servers

class FakeHub(http.server.BaseHTTPRequestHandler):
    """What fake hubs share: requests are written down, `answer(path)` answers them with `send`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append((self.command, path))
        self.answer(path)

    do_HEAD = do_GET

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


JUDGE_KEY = "sk-a-secret-of-the-test"  # of the endpoints below


def completion(content) -> bytes:
    """The body of a chat completion with this content."""
    return json.dumps(dict(choices=[dict(message=dict(role="assistant", content=content))])).encode()


class JudgeHandler(http.server.BaseHTTPRequestHandler):
    """One chat completion, as well or as badly as the server's plan has it."""

    timeout, log_message = 20, lambda *args: None  # a client that never gives up does not hang the tests

    def do_POST(self):
        server, request = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = request["messages"][-1]["content"]
        with server.lock:
            nth, arrival = server.asked.count(text), len(server.asked)
            server.asked.append(text)
            server.requests.append((self.path, dict(self.headers), request))
            server.now += 1
            server.peak = max(server.peak, server.now)
        self.reply(text, **server.plan(text, nth, arrival))

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers), None))

    def reply(self, text, status=200, body=b"", content=None, headers=(), fault="", wait=lambda: None):
        wait()
        with self.server.lock:
            self.server.now -= 1
            self.server.answered += [text] * (content is not None)
        if fault == "stall":
            self.rfile.read(1)  # until the client has had enough
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if fault in ("stall", "reset", "drop"):
            return
        body = b" " * 40 * (fault == "drip") + (completion(content) if content is not None else body)
        length = len(body) + 9 * (fault in ("cut", "hang"))
        self.send_response(status)
        for name, value in (dict(Content_Length=length) | dict(headers)).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        while fault == "drip" and body.startswith(b" "):  # a sign of life now and then
            time.sleep(0.15)
            self.wfile.write(body[:1])
            body = body[1:]
        self.wfile.write(body)
        if fault == "hang":
            self.rfile.read(1)


class JudgeServer(http.server.ThreadingHTTPServer):
    """plan(question, how often it was asked before, requests before) -> what JudgeHandler.reply does."""

    request_queue_size, daemon_threads, handle_error = 128, True, lambda *args: None

    def __init__(self, plan):
        super().__init__(("127.0.0.1", 0), JudgeHandler)
        self.plan, self.lock, self.gate = plan, threading.Lock(), threading.Event()
        self.asked, self.answered, self.requests, self.now, self.peak = [], [], [], 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def until(self, ready) -> None:
        """Wait for ready(self)."""
        end = time.monotonic() + 300
        while not ready(self):
            assert time.monotonic() < end, "the server waits in vain"
            time.sleep(0.005)


@pytest.fixture
def serve(monkeypatch):
    """(plan) -> a JudgeServer; a key is set, and no proxy stands between."""
    monkeypatch.setenv("OPENAI_API_KEY", JUDGE_KEY)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    with contextlib.ExitStack() as stack:
        def start(plan) -> JudgeServer:
            server = stack.enter_context(JudgeServer(plan))
            stack.callback(server.shutdown)
            stack.callback(server.gate.set)
            return server

        yield start


# ------------------------------------------------------------------------- sampling and training, watched

def stopping_model(tiny: Path, folder: Path) -> Path:
    """A copy of the tiny model in which every fifth id ends a response, so that some responses end early."""
    copy = shutil.copytree(tiny, folder / "stopping")
    settings = dict(eos_token_id=list(range(1, 320, 5)))
    (copy / "generation_config.json").write_text(json.dumps(settings))
    return copy


def record_samples(monkeypatch, after: Callable[[int, Sample], None] = lambda i, sample: None,
                   module: str = "pairs") -> list:
    """The keys (row, sample) of all that a module (pairs, or responses) samples from now on, written down as
    each response ends, before `after(i, sample)` is called."""
    keys: list[tuple[int, int]] = []

    def watched(*args, **kwargs) -> list[Sample]:
        bound = inspect.signature(generate).bind(*args, **kwargs)
        bound.apply_defaults()
        on_finished = bound.arguments["on_finished"]

        def record(i: int, sample: Sample) -> None:
            on_finished(i, sample)
            keys.append(tuple(bound.arguments["keys"][i]))
            after(i, sample)

        bound.arguments["on_finished"] = record
        return generate(*bound.args, **bound.kwargs)

    monkeypatch.setattr(f"{module}.generate", watched)
    return keys


class RecordingOptimizer:
    """In MasterAdamW's place: it writes down each step's gradients, as clipped, and its learning rate, and
    moves nothing."""

    def __init__(self, model: Decoder):
        self.model = model
        self.weights = list(model.parameters())
        self.gradients: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def step(self, number: int, lr: float, norm: Tensor) -> None:
        assert number == len(self.rates)
        scale = min(1.0, 1 / norm.item())
        self.gradients.append({name: g * scale for name, g in named_gradients(self.model).items()})
        self.rates.append(lr)

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def share_changed(self) -> Tensor:
        return torch.zeros(())


def train_in_place(optimizer, pairs: list[Pair], file: Path, **arguments) -> tuple[train.State, list[dict]]:
    """train.train on pairs with such arguments, from a reference that the optimizer's model is itself: where
    it has ended, and the rows of metrics.jsonl, which is `file`."""
    args = train.resolve(train.Args(**arguments))
    file.unlink(missing_ok=True)
    pairs = training_rows(pairs, args)
    reference = all_logps(optimizer.model, pairs, args)
    state = train.State()
    train.train(optimizer, pairs, reference, args, Metrics(file), state)
    return state, [row for _, row in read_jsonl(file)]


# ------------------------------------------------------------------------- runs of train.py

TRAIN_FLAGS = ("--max-new-tokens", "6", "--batch", "2", "--lr", "1e-4", "--dtype", "float32")


@pytest.fixture(scope="session")
def own_data(tmp_path_factory) -> Path:
    """Fifteen rows with contexts: eight to train, four to validate, three to test."""
    return write_data(tmp_path_factory.mktemp("data") / "own.jsonl", train=8, validation=4, test=3)


@pytest.fixture(scope="session")
def dpo_run(own_data, tiny, tmp_path_factory) -> Path:
    """The folder of one plain DPO run with three negatives a pair."""
    folder = tmp_path_factory.mktemp("dpo")
    run_inside(train.program, folder, "--data", own_data, "--model", tiny, "--n-neg", "3", "--out", "run",
               *TRAIN_FLAGS)
    return folder / "run"


@pytest.fixture
def work(tmp_path) -> Path:
    """The empty folder that `call_train` runs in."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def call_train(own_data, tiny, work) -> Callable[..., Path]:
    """(flags) -> the run folder work/o of train.py on own_data, run inside this process."""
    def get(*flags) -> Path:
        own = ["--data", own_data, "--model", tiny, "--out", "o", *TRAIN_FLAGS]
        if "--rollout-batch" in flags:  # of PPO, which has batches of its own
            place = own.index("--batch")
            del own[place : place + 2]
        run_inside(train.program, work, *own, *flags)
        return work / "o"

    return get


def steps_of(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl that are steps, without what the clock decides."""
    return [row for row in metrics_of(folder) if "loss" in row]


def validations_of(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl that are validations."""
    return [row for row in metrics_of(folder) if "loss" not in row]


def model_weights(folder: Path) -> dict[str, Tensor]:
    """The weights that a run has saved."""
    return load_file(folder / "model" / "model.safetensors")


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two models are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------- answers

LOWER, SHOUT = ["lowercase"], ["exclaims", 2]  # two of the demo's checks


def held_out(number: int, prompt: str, context: str | None = None, check: list | None = None) -> Example:
    """A row of the test part whose context, if it has one, reads "Context A."."""
    text = context and f"Context {context}."
    return Example(str(number), prompt, "test", text, context_id=context, check=check)


def answer(text: str, tokens: int = 1, gain: float = math.nan, logp: float = -1.0, finished: bool = True,
           **more) -> Answer:
    """An answer of so many tokens; its prompt gain is half of its negative log-probability."""
    return Answer(text, [7] * tokens, finished, logp, gain, prompt_gain=-logp / 2, **more)
