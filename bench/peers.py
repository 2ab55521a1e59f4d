"""peers.py - what one would use instead, on the same work: TRL's DPOTrainer, generate of transformers, both.

Only the peers' children import this file: it needs transformers, trl and datasets, the project does not.
"""

import random
import tempfile

import torch
import transformers
from side_by_side import clock, read_rows, report

from checks import verify
from data import load_demo, user_message
from folder import find
from run import default_device


def message(text: str, role: str = "user") -> list[dict]:
    return [dict(role=role, content=text)]


def pretrained(args, dtype: torch.dtype):
    """The peer's tokenizer and model."""
    transformers.utils.logging.set_verbosity_error()
    folder = str(find(args.model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=args.peer_attention)


def trained(args, tokenizer, model, rows: list[dict], lr: float, folder: str):
    """The trainer after an epoch of DPO, fp32 weights, under bf16 autocast where that is the arithmetic.
    Tokenising and reference are the trainer's own; a row has a user message, chosen and rejected."""
    import trl
    from datasets import Dataset

    data = Dataset.from_list([dict(prompt=message(row["user"]), chosen=message(row["chosen"], "assistant"),
                                   rejected=message(row["rejected"], "assistant")) for row in rows])
    config = trl.DPOConfig(
        folder, num_train_epochs=1, per_device_train_batch_size=args.peer_batch, learning_rate=lr,
        beta=0.1, bf16=args.dtype == "bfloat16", use_cpu=not torch.cuda.is_available(),
        precompute_ref_log_probs=True, max_length=None, gradient_checkpointing=False,
        save_strategy="no", report_to=[], disable_tqdm=True)
    trainer = trl.DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return trainer


def generated(tokenizer, model, turns: list[str], most: int, temperature: float = 1.0, top_p: float = 1.0,
              batch: int = 64) -> list[list[int]]:
    """Ids of a response to every user's turn, up to the end token; `batch` together, padded on the left."""
    stop = model.generation_config.eos_token_id
    stop = set(stop if isinstance(stop, list) else [stop])
    responses = []
    for i in range(0, len(turns), batch):
        texts = [tokenizer.apply_chat_template(message(turn), tokenize=False, add_generation_prompt=True)
                 for turn in turns[i : i + batch]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        ids = model.generate(**inputs.to(model.device), max_new_tokens=most, do_sample=True, top_k=0,
                             temperature=temperature, top_p=top_p, repetition_penalty=1.0,
                             pad_token_id=tokenizer.pad_token_id)
        for row in ids[:, inputs.input_ids.shape[1] :].tolist():
            end = next((n for n, token in enumerate(row, 1) if token in stop), len(row))
            responses.append(row[:end])
    return responses


def dpo(args) -> None:
    """An epoch of DPO on ready pairs."""
    import trl

    tokenizer, model = pretrained(args, torch.float32)
    rows = [dict(row, user=user_message(row["prompt"], row.get("context")))
            for row in read_rows(args.pairs, args.rows)]
    with tempfile.TemporaryDirectory() as folder:
        start = clock()
        trainer = trained(args, tokenizer, model, rows, 1e-6, folder)
        seconds = clock() - start
    report(pairs=len(rows), seconds=seconds, pairs_per_s=len(rows) / seconds, steps=trainer.state.global_step,
           trl=trl.__version__, transformers=transformers.__version__)


def sample(args, turns: list[str]) -> None:
    """Responses to the users' turns."""
    tokenizer, model = pretrained(args, getattr(torch, args.dtype))
    model.to(default_device())
    generated(tokenizer, model, turns[:2], 4)
    torch.manual_seed(args.seed)
    start = clock()
    count = sum(map(len, generated(tokenizer, model, turns, args.max_new)))
    seconds = clock() - start
    report(responses=len(turns), new_tokens=count, seconds=seconds, tokens_per_s=count / seconds,
           transformers=transformers.__version__)


def whole(args) -> None:
    """Pairs by generate, an epoch of DPOTrainer, a saved model, and held-out prompts answered by both."""
    import trl

    start = clock()
    tokenizer, model = pretrained(args, getattr(torch, args.dtype))
    model.to(default_device())
    torch.manual_seed(args.seed)
    draw = random.Random(args.seed)
    examples = load_demo(args.seed)
    training = draw.sample([e for e in examples if e.split == "train"], args.limit)
    held_out = draw.sample([e for e in examples if e.split == "test"], args.limit)

    def responses(turns: list[str], *temperature_and_top_p: float) -> list[str]:
        ids = generated(tokenizer, model, turns, args.max_new, *temperature_and_top_p)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    def win_rate(texts: list[str]) -> float:
        return sum(map(verify, held_out, texts)) / len(held_out)

    users = [user_message(e.prompt, e.context) for e in training]
    others = [draw.choice([e.context for e in training if e.context != mine.context]) for mine in training]
    chosen = responses(users)
    rejected = responses([user_message(e.prompt, other) for e, other in zip(training, others, strict=True)])
    sampled = clock()
    questions = [user_message(e.prompt, e.context) for e in held_out]
    prompts = list(dict.fromkeys(e.prompt for e in held_out))
    alone = responses([user_message(prompt, None) for prompt in prompts], 0.1, 0.9)
    answer = dict(zip(prompts, alone, strict=True))
    win_rates = dict(default=win_rate([answer[e.prompt] for e in held_out]),
                     prompted=win_rate(responses(questions, 0.1, 0.9)))
    answered = clock()
    rows = [dict(user=u, chosen=c, rejected=r) for u, c, r in zip(users, chosen, rejected, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trained(args, tokenizer, pretrained(args, torch.float32)[1], rows, args.lr, folder)
        model = trainer.model.eval().to(getattr(torch, args.dtype))
        trainer.save_model(folder)
    done = clock()
    win_rates["trained"] = win_rate(responses(questions, 0.1, 0.9))
    end = clock()
    report(pairs=len(rows), seconds_sampling=sampled - start,
           seconds_training=done - answered, seconds_evaluation=answered - sampled + end - done,
           win_rates=win_rates, trl=trl.__version__, transformers=transformers.__version__)
