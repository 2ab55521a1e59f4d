"""Fixtures: a tiny random instruct model made on the spot, and SmolLM2-135M-Instruct where it can be built.

The tiny one needs nothing but the project's own packages. The real one comes from MIPO_SMOLLM2 (a folder), or
is built once by ../shared/tools/make_smollm2.py where that script is at hand; tests that ask for it are
skipped elsewhere.
"""

import http.server
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

if not torch.cuda.is_available():  # before anyone imports Triton: its kernels run as numpy then
    os.environ.setdefault("TRITON_INTERPRET", "1")

from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from model import Config, Decoder

ROOT = Path(__file__).parent.parent
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


def random_model(seed: int = 0, scale: float = 0.1, **changes) -> Decoder:
    """A tiny decoder with N(0, scale) weights, norms left at 1."""
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
    defaults = dict(eos_token_id=[1], temperature=0.7, top_k=3)
    (folder / "generation_config.json").write_text(json.dumps(defaults))


def write_model(folder: Path, **changes) -> Path:
    """A Hugging Face folder: random_model's weights, its config and the tokenizer above."""
    folder.mkdir(parents=True, exist_ok=True)
    model = random_model(**changes)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
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
        subprocess.run([sys.executable, tool, folder], check=True, capture_output=True)
    return folder
