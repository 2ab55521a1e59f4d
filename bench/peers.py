"""peers.py - what one would use instead, on the same work: TRL's DPOTrainer, and generate of transformers.

Only the peers' children import this file: it needs transformers, trl and datasets, the project does not.
"""

import tempfile

import torch
import transformers
from side_by_side import clock, read_rows, report

from data import user_message
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


def dpo(args) -> None:
    """An epoch of DPO, fp32 weights, under bf16 autocast where that is the arithmetic. Tokenising and
    reference are the trainer's own."""
    import trl
    from datasets import Dataset

    tokenizer, model = pretrained(args, torch.float32)
    rows = read_rows(args.pairs, args.rows)
    data = Dataset.from_list([dict(prompt=message(user_message(row["prompt"], row.get("context"))),
                                   chosen=message(row["chosen"], "assistant"),
                                   rejected=message(row["rejected"], "assistant")) for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            folder, num_train_epochs=1, per_device_train_batch_size=args.peer_batch, learning_rate=1e-6,
            beta=0.1, bf16=args.dtype == "bfloat16", use_cpu=not torch.cuda.is_available(),
            precompute_ref_log_probs=True, max_length=None, gradient_checkpointing=False,
            save_strategy="no", report_to=[], disable_tqdm=True)
        start = clock()
        trainer = trl.DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        seconds = clock() - start
    report(pairs=len(rows), seconds=seconds, pairs_per_s=len(rows) / seconds, steps=trainer.state.global_step,
           trl=trl.__version__, transformers=transformers.__version__)


def sample(args, turns: list[str], batch: int = 64) -> None:
    """Responses to the users' turns, `batch` of them together, prompts padded on the left."""
    tokenizer, model = pretrained(args, getattr(torch, args.dtype))
    model.to(default_device())
    stop = model.generation_config.eos_token_id
    stop = set(stop if isinstance(stop, list) else [stop])

    def generate(some: list[str], most: int) -> list[list[int]]:
        texts = [tokenizer.apply_chat_template(message(turn), tokenize=False, add_generation_prompt=True)
                 for turn in some]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        ids = model.generate(**inputs.to(model.device), max_new_tokens=most, do_sample=True, temperature=1.0,
                             top_p=1.0, top_k=0, repetition_penalty=1.0, pad_token_id=tokenizer.pad_token_id)
        return ids[:, inputs.input_ids.shape[1] :].tolist()

    generate(turns[:2], 4)
    torch.manual_seed(args.seed)
    start, count = clock(), 0
    for i in range(0, len(turns), batch):
        for ids in generate(turns[i : i + batch], args.max_new):
            count += next((n for n, token in enumerate(ids, 1) if token in stop), len(ids))
    seconds = clock() - start
    report(responses=len(turns), new_tokens=count, seconds=seconds, tokens_per_s=count / seconds,
           transformers=transformers.__version__)
