"""sample.py - text to token ids by the model's own chat template, and batched sampling with a KV cache.

The only way from text to ids is `Tokenizer.chat`; the only way from ids to new ids is `generate`. Sampled ids
are kept as they are: nothing is decoded and tokenised again. Temperature, top-p and top-k are what the caller
says; nothing is inherited from generation_config.json except the ids that stop a response.
What differs from the paper: every draw depends on (seed, row, sample) alone, so the text does not change with
the batch, its order or its size: exactly in fp32, and in bf16 where a matrix product rounds each row alike
however many there are (CPUs: measured; GPUs: not quite) and all prompts begin with the same 64-token blocks.

Legend: S slots, V vocabulary, E hidden size, T tokens of a packed prefill.

    python sample.py --model DIR "What is inflation?"
"""

import datetime
import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import tokenizers
import torch
import torch.nn.functional as F
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torch import Tensor

from losses import common_prefix
from model import Cache, Decoder, Packed, find, load
from run import UserError, default_device, derive, main, option, parse, read_json

TEMPLATE_DATE = "2024-07-26"  # Llama 3's templates print the date: pinned, or prompts would change daily
PREFILL_TOKENS = 8192  # prompts are taken up in passes of about this many tokens
WINDOW = 128  # rows that are sampled side by side: the first ones are whole long before the last begin
SPLIT = "\ufdd0"  # a Unicode noncharacter: cuts special tokens that appear in data into two harmless pieces


# -------------------------------------------------------------------------------- tokenizer

class Tokenizer:
    """A Hugging Face tokenizer.json with the model's chat template and stop ids."""

    def __init__(self, folder: str | Path, date: str = TEMPLATE_DATE):
        """folder: a model folder or hub id. date: ISO date that templates which print one are given."""
        folder = find(folder)
        file = folder / "tokenizer.json"
        if not file.exists():
            raise UserError(f"{folder} has no tokenizer.json")
        self.folder = folder
        self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.added = {str(t.content): i for i, t in self.tokenizer.get_added_tokens_decoder().items()}
        config = read_json(folder / "tokenizer_config.json")
        self.template = self._template(folder, config)
        try:
            day = datetime.date.fromisoformat(date)
        except ValueError:
            raise UserError(f"date {date!r} is not of the form 2024-07-26") from None

        def token(name: str) -> str | None:  # older files store {"content": ..., ...}
            value = config.get(name)
            return value["content"] if isinstance(value, dict) else value

        self.variables = dict(tools=None, documents=None, date_string=day.strftime("%d %b %Y"),
                              strftime_now=day.strftime)
        for name in ("bos_token", "eos_token"):
            if token(name) is not None:  # undefined, a template renders it as nothing
                self.variables[name] = token(name)
        self.end_token = self._end_of_turn()
        self.stop_ids = self._stop_ids()

    @staticmethod
    def _template(folder: Path, config: dict) -> jinja2.Template:
        """chat_template.jinja, else the chat_template of tokenizer_config.json, compiled in jinja's sandbox.
        """
        path, source = folder / "chat_template.jinja", config.get("chat_template")
        if path.exists():
            source = path.read_text(encoding="utf-8")
        elif isinstance(source, list):  # several named templates
            source = next((t["template"] for t in source if t["name"] == "default"), None)
        if not source:
            raise UserError(f"{folder} has no chat template: MIPO needs an instruct model")

        def raise_exception(message: str):
            raise UserError(f"the chat template of {folder} refuses these messages: {message}")

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = raise_exception
        try:
            return environment.from_string(source)
        except jinja2.TemplateError as e:
            raise UserError(f"the chat template of {folder} is not valid jinja: {e}") from None

    def render(self, messages: list[dict], prompt: bool = True) -> str:
        """Messages ({"role", "content"}) as the template writes them; prompt: open the assistant's turn."""
        try:
            return self.template.render(messages=messages, add_generation_prompt=prompt, **self.variables)
        except jinja2.TemplateError as e:
            raise UserError(f"the chat template of {self.folder} fails: {e}") from None

    def chat(self, user: str, system: str | None = None) -> list[int]:
        """One user turn (and system prompt) -> prompt ids, ready for the assistant's answer.

        Special tokens come from the template alone: a literal "<|im_end|>" in the text is cut after its first
        character before rendering and the pieces are encoded apart, so that it stays text.
        """
        messages = [dict(role="user", content=self._harmless(user))]
        if system is not None:
            messages.insert(0, dict(role="system", content=self._harmless(system)))
        pieces = self.render(messages).split(SPLIT)
        return [i for piece in pieces for i in self.tokenizer.encode(piece, add_special_tokens=False).ids]

    def _harmless(self, text: str) -> str:
        text = text.replace(SPLIT, "").encode("utf-8", "replace").decode()  # and no lone surrogates
        for name in sorted(self.added, key=len, reverse=True):
            while len(name) > 1 and name in text:  # again: occurrences may overlap
                text = text.replace(name, name[0] + SPLIT + name[1:])
        return text

    def response(self, text: str) -> list[int]:
        """A response given as text (not sampled) -> ids, the end token included."""
        pieces = self._harmless(text).split(SPLIT)
        ids = [i for piece in pieces for i in self.tokenizer.encode(piece, add_special_tokens=False).ids]
        return [*ids, self.end_token]

    def decode(self, ids: list[int]) -> str:
        """Ids -> text for people, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _end_of_turn(self) -> int:
        """The id that ends an assistant's turn: what the template writes straight after its content."""
        mark = "mipo-answer"
        messages = [dict(role="user", content="question"), dict(role="assistant", content=mark)]
        rest = self.render(messages, prompt=False).split(mark)[-1]
        ids = self.tokenizer.encode(rest, add_special_tokens=False).ids
        if not ids or ids[0] not in self.added.values():
            raise UserError(f"the chat template of {self.folder} ends an answer without a special token")
        return ids[0]

    def _stop_ids(self) -> frozenset[int]:
        """All of generation_config.json's (else config.json's) eos ids and the end-of-turn token."""
        stop = {self.end_token}
        for name in ("generation_config.json", "config.json"):
            path = self.folder / name
            eos = read_json(path).get("eos_token_id") if path.exists() else None
            if eos is not None:
                return frozenset(stop | set(eos if isinstance(eos, list) else [eos]))
        return frozenset(stop)


# -------------------------------------------------------------------------------- sampling

@dataclass(frozen=True)
class Sampling:
    """How to draw: temperature 0 is greedy, top_p 1 and top_k 0 switch the filters off."""

    temperature: float
    top_p: float
    max_new_tokens: int
    top_k: int = 0

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1 or self.top_k < 0:
            raise UserError(f"temperature, top_k must be >= 0, top_p in (0, 1], max_new_tokens >= 1: {self}")


@dataclass
class Sample:
    """One response: ids, with the end token if the model emitted it, and their untempered log-probs."""

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finished: bool = False


def filtered_probs(logits: Tensor, s: Sampling) -> Tensor:
    """Logits (S, V) -> the tempered, top-k and top-p filtered probabilities, not normalised again. (S, V)

    The nucleus is the smallest set of most likely tokens whose mass reaches top_p; tokens as likely as
    its least one are all kept. It mostly lies within the 256 most likely, so whole rows are seldom sorted.
    """
    probs = torch.softmax(logits / s.temperature, dim=-1)  # (S, V)
    vocabulary = probs.shape[-1]
    if s.top_k:
        least = probs.topk(min(s.top_k, vocabulary)).values[:, -1:]  # (S, 1)
        probs = torch.where(probs >= least, probs, 0)
    if s.top_p < 1:
        mass = s.top_p * probs.sum(-1, keepdim=True)  # (S, 1)
        likely = probs.topk(min(256, vocabulary)).values  # (S, 256), falling
        if (likely.sum(-1, keepdim=True) < mass).any():
            likely = probs.sort(descending=True).values  # (S, V)
        before = likely.cumsum(-1) < mass  # the tokens that alone do not reach the mass
        least = likely.gather(1, before.sum(-1, keepdim=True).clamp(max=likely.shape[1] - 1))  # (S, 1)
        probs = torch.where(probs >= least, probs, 0)
    return probs


def pick(logits: Tensor, uniform: Tensor, s: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the cumulative distribution at `uniform` in [0, 1).

    logits (S, V) fp32, uniform (S,) -> ids (S,), log-probs of those ids under softmax(logits) itself (S,).
    The inverse is looked up twice, among sums of 128 probabilities and then in one such block: a cumulative
    sum of all V would take longer than all else here.
    """
    def invert(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The first column whose cumulative mass exceeds target (S, 1), and what of target is left there."""
        cumulative = mass.cumsum(-1)  # (S, columns)
        target = target.minimum(cumulative[:, -1:].nextafter(target.new_zeros(())))  # rounding: always found
        column = torch.searchsorted(cumulative, target, right=True)  # (S, 1)
        return column, target - (cumulative.gather(1, column) - mass.gather(1, column))

    probs = logits.softmax(-1)  # (S, V)
    if s.temperature == 0:
        ids = logits.argmax(-1, keepdim=True)  # (S, 1)
    else:
        kept = probs if s.temperature == s.top_p == 1 and not s.top_k else filtered_probs(logits, s)
        blocks = F.pad(kept, (0, -kept.shape[1] % 128)).unflatten(1, (-1, 128))  # (S, V/128, 128)
        sums = blocks.sum(-1)  # (S, V/128)
        block, rest = invert(sums, uniform[:, None] * sums.sum(-1, keepdim=True))  # (S, 1) each
        within, _ = invert(blocks.take_along_dim(block[:, :, None], 1).squeeze(1), rest)  # (S, 1)
        ids = 128 * block + within  # (S, 1)
    return ids.squeeze(1), probs.gather(1, ids).squeeze(1).log()


def uniforms(seed: int, row: int, sample: int, count: int) -> Tensor:
    """The `count` uniform numbers of one response: a stream of its own, whatever else is sampled beside it.
    (count,)
    """
    return torch.rand(count, generator=torch.Generator().manual_seed(derive(seed, row, sample)))


def replayed(work: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """work() as one CUDA graph, captured now: a call launches the same kernels over the same memory again,
    all at once. On other devices work itself."""
    if device.type != "cuda":
        return work
    side = torch.cuda.Stream(device)  # of this graph alone, like what libraries set up on it
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        work()  # the first call sets up what cannot be captured
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = work()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@torch.inference_mode()
def generate(model: Decoder, prompts: list[list[int]], sampling: Sampling, stop_ids: frozenset[int],
             seed: int, keys: list[tuple[int, int]] | None = None, slots: int = 64, bar=None,
             ended: Callable[[int, Sample], None] = lambda i, sample: None) -> list[Sample]:
    """Sample one response for every prompt.

    keys: (row, sample index) of each prompt, which with `seed` decide its randomness; default (i, 0). slots:
    how many are decoded together; a slot whose response has ended takes the next prompt. `ended(i, sample)`
    is called as prompt i's response ends. WINDOW rows after WINDOW rows, prompts are taken longest first,
    equal ones side by side, so that each is computed once and all slots that wait for it share the result.
    """
    start, total, device, most = time.perf_counter(), 0, model.device, sampling.max_new_tokens
    keys = keys or [(i, 0) for i in range(len(prompts))]
    results = [Sample() for _ in prompts]
    waiting = sorted(range(len(prompts)),  # taken from the end
                     key=lambda i: (-(keys[i][0] // WINDOW), len(prompts[i]), prompts[i]))
    slots = min(slots, len(prompts))
    if not slots:
        return []
    longest = max(map(len, prompts)) + most
    if longest > model.config.max_position_embeddings:
        raise UserError(f"the longest prompt and {most} new tokens take {longest} places, "
                        f"the model has {model.config.max_position_embeddings}")
    shared = common_prefix(prompts) // 64 * 64  # worked examples, say: computed, kept and read once
    room = -(-(longest - shared) // 64) * 64  # a round number: odd ones make slow products
    cache = Cache(model.config, slots, room, model.compute, device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    owner: list[int | None] = [None] * slots  # which prompt each slot works on
    drawn = torch.zeros(slots, dtype=torch.long, device=device)  # (S,) tokens drawn so far
    latest = torch.zeros(slots, dtype=torch.long, device=device)  # (S,) the last of them
    noise = torch.zeros(slots, most, device=device)  # (S, most)
    ids = torch.zeros(slots, most, dtype=torch.long, device=device)  # (S, most)
    logps = torch.zeros(slots, most, device=device)  # (S, most)

    def draw(at: Tensor, logits: Tensor) -> bool:
        """One token for each slot of `at` (n,) from logits (n, V); whether any response has ended with it."""
        nonlocal total
        column = drawn[at]  # (n,)
        token, logp = pick(logits, noise[at, column], sampling)
        ids[at, column], logps[at, column] = token, logp
        drawn[at] += 1
        finished = torch.isin(token, stops)  # (n,)
        over = (finished | (column + 1 == most)).nonzero().squeeze(1)  # the one wait for the device in a step
        for slot, end, count in zip(*(x[over].tolist() for x in (at, finished, column + 1)), strict=True):
            sample = Sample(ids[slot, :count].tolist(), logps[slot, :count].tolist(), end)
            results[owner[slot]] = sample
            ended(owner[slot], sample)
            owner[slot] = None
            total += count
            if bar is not None:
                bar.set_postfix_str(f"{total / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
                bar.update(1)
        return len(over) > 0

    def admit(free: list[int]) -> None:
        """Prefill waiting prompts into the free slots, each distinct one once; draw their first tokens."""
        taken: dict[tuple[int, ...], list[int]] = {}  # prompt -> the slots that start from it
        for slot in free:
            if not waiting or sum(len(p) - shared for p in taken) >= PREFILL_TOKENS:
                break
            owner[slot] = i = waiting.pop()
            noise[slot] = uniforms(seed, *keys[i], most).to(device)
            taken.setdefault(tuple(prompts[i]), []).append(slot)
        rest = [prompt[shared:] for prompt in taken]
        root = common_prefix(rest)  # a system prompt, say
        layout = Packed([(len(p) - root, []) for p in rest], device, cache, list(taken.values()), root)
        tokens = torch.tensor([*rest[0][:root], *(t for p in rest for t in p[root:])], device=device)  # (T,)
        ends = torch.tensor([len(p) - root for p in rest], device=device).cumsum(0) + root - 1  # last tokens
        logits = model.logits(model(tokens, layout)[ends])  # (distinct prompts, V)
        which = torch.tensor([g for g, group in enumerate(taken.values()) for _ in group], device=device)
        at = torch.tensor([slot for group in taken.values() for slot in group], device=device)
        cache.lengths[at] = torch.tensor([len(p) for p in rest], device=device)[which]
        drawn[at] = 0
        draw(at, logits[which])

    @functools.cache
    def step(width: int) -> Callable[[], Tensor]:
        """What feeds the latest token of the first `width` slots, and returns logits (width, V)."""
        return replayed(lambda: model.logits(model(latest[:width], cache)), device)

    if shared:
        model(torch.tensor(prompts[0][:shared], device=device), Packed([(shared, [])], device, cache, [None]))
    changed = True
    while True:
        if changed:
            while waiting and (free := [s for s in range(slots) if owner[s] is None]):
                admit(free)
            busy = [s for s in range(slots) if owner[s] is not None]
            if not busy:
                return results
            # no prompt is left for the gaps: the last slots move there, so that fewer are computed
            gaps = [s for s in range(len(busy)) if owner[s] is None]
            if last := busy[len(busy) - len(gaps) :]:
                cache.move(last, gaps)
                for x in (drawn, noise, ids, logps):
                    x[gaps] = x[last]
                for gap, slot in zip(gaps, last, strict=True):
                    owner[gap], owner[slot] = owner[slot], None
            at = torch.arange(len(busy), device=device)  # (n,)
            # a few widths on a CPU, which makes kernels for every new shape; one on a GPU: a single graph
            width = slots if device.type == "cuda" else min(slots, -(-len(busy) // 8) * 8)
            cache.lengths[len(busy) :] = 0  # idle slots compute too: where it harms nobody
        latest[:width] = ids[cache.rows[:width], drawn[:width] - 1]
        logits = step(width)()[: len(busy)]  # (n, V)
        cache.lengths[: len(busy)] += 1
        changed = draw(at, logits)


# -------------------------------------------------------------------------------- command line

@dataclass
class Args:
    prompt: str = option("", "the user's message")
    model: str = option("", "Hugging Face folder or hub id")
    system: str | None = option(None, "system prompt, instead of the template's own")
    temperature: float = option(1.0, "0 is greedy", "sampling")
    top_p: float = option(1.0, "nucleus mass", "sampling")
    top_k: int = option(0, "keep the k most likely tokens, 0 for all", "sampling")
    max_new_tokens: int = option(256, "longest response, in tokens", "sampling")
    samples: int = option(1, "responses to draw", "sampling")
    seed: int = option(0, "with row and sample index, decides every draw", "sampling")
    date: str = option(TEMPLATE_DATE, "date for chat templates that print one", "sampling")
    dtype: str = option("bfloat16", "arithmetic", "sampling", ("bfloat16", "float32"))


def program() -> None:
    args = parse(Args, usage=__doc__)
    if not args.prompt or not args.model:
        raise UserError('usage: python sample.py --model DIR "prompt"')
    tokenizer = Tokenizer(args.model, args.date)
    model = load(args.model, getattr(torch, args.dtype), device=default_device())
    ids = tokenizer.chat(args.prompt, args.system)
    sampling = Sampling(args.temperature, args.top_p, args.max_new_tokens, args.top_k)
    start = time.perf_counter()
    samples = generate(model, [ids] * args.samples, sampling, tokenizer.stop_ids, args.seed,
                       keys=[(0, j) for j in range(args.samples)])
    seconds = time.perf_counter() - start
    for sample in samples:
        print(tokenizer.decode(sample.ids) + ("" if sample.finished else " [unfinished]"))
    count = sum(len(s.ids) for s in samples)
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main(program)
