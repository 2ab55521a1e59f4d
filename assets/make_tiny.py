"""Make assets/tiny, the embedded instruct model: 2.8M parameters, Llama architecture, all our own.

A grammar answers the demo's prompts in plain English, from the sentences of assets/demo/answers.jsonl. Asked
to respect a context it does so only about half of the time: with a probability between 0.2 and 0.8 that
depends on the context. That is the headroom MIPO finds, and it is there by construction. A byte-level BPE
tokenizer is trained on those answers, and `train.py --method sft` trains the model on them from random
initialisation. All prompts of the demo are in its training data, test prompts too: *held out* in the demo
means held out from MIPO.

    python assets/make_tiny.py BUILD        some 14 minutes on two cores; then BUILD/run/model is assets/tiny
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from checks import honours  # noqa: E402
from config import Config  # noqa: E402 - the project's files are no package
from data import ASSETS, user_message  # noqa: E402
from model import Decoder  # noqa: E402
from run import read_jsonl, seed_from, write_json, write_jsonl  # noqa: E402

CONFIG = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=2048, hidden_size=192,
    intermediate_size=512, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=3, head_dim=32,
    rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True, max_position_embeddings=512,
    hidden_act="silu", bos_token_id=0, eos_token_id=1, torch_dtype="float32",
)  # fmt: skip
SPECIAL = ["<|start|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
PLAIN, ASKED = 8, 4  # answers written to every prompt, and to every prompt with every context
QUESTIONS = ("Does that help?", "What do you think?", "Would you like to hear more?", "Shall I go on?")
EMOJIS = "😊🎉👍🌟"
SAID = {  # a sentence that relates the answer to the context, for the checks that look for a word
    "c11": ("Hola, y gracias por preguntar.", "Es muy importante.", "Un poco cada semana, para empezar.",
            "Gracias por la pregunta."),
    "c12": ("Ahoy there, captain.", "Arr, that be the way.", "Aye, so say all sailors.",
            "Ahoy, and steady as she goes."),
    "c13": ("Hello Marta.", "I hope that helps, Marta.", "Here is what I know, Marta.",
            "Take your time, Marta."),
    "c14": ("Rufus may enjoy that as well.", "Take Rufus along if you can.", "Rufus will not mind at all.",
            "A walk with Rufus goes well with that."),
    "c15": ("Nora may want to help.", "Tell Nora about it tonight.", "Nora can learn from that too.",
            "Ask Nora what she thinks."),
    "c16": ("That works well in Lisbon.", "Lisbon has good places for that.",
            "Many people in Lisbon do the same.", "Ask around in Lisbon."),
    "c17": ("That works well in Nairobi.", "Nairobi has good places for that.",
            "Many people in Nairobi do the same.", "Ask around in Nairobi."),
    "c18": ("As a nurse you know how much care matters.", "A nurse can use that on any shift.",
            "Your work as a nurse will help you here.", "Other nurses would agree."),
    "c19": ("As a teacher you could show that to a class.", "A teacher can use that at school.",
            "Your work as a teacher will help you here.", "Other teachers would agree."),
    "c20": ("As a firefighter you know how to keep calm.", "A firefighter can use that after any shift.",
            "Your work as a firefighter will help you here.", "Other firefighters would agree."),
    "c21": ("It is a little like gardening.", "A gardener knows how patience pays.",
            "Think about it in your garden.", "Gardening teaches much the same."),
    "c22": ("It is a little like chess.", "Think ahead, as in a game of chess.",
            "Chess teaches much the same.", "A good chess player would plan it."),
    "c23": ("It is a little like playing the piano.", "Practise it as you practise the piano.",
            "The piano teaches much the same.", "A pianist would take it slowly."),
    "c24": ("It is a little like football.", "A football team would train for it.",
            "Football teaches much the same.", "Think of it before the next football match."),
    "c29": ("Luna may enjoy that as well.", "Luna can watch you do it.", "Luna will not mind at all.",
            "A nap with Luna goes well with that."),
    "c30": ("That works well in Kyoto.", "Kyoto has good places for that.",
            "Many people in Kyoto do the same.", "Ask around in Kyoto."),
    "c31": ("Picture it in purple.", "A touch of purple would suit it.", "Purple goes well with that.",
            "You could mark it in purple."),
    "c32": ("Pancakes go well with that.", "Have some pancakes afterwards.",
            "It deserves a plate of pancakes.", "Think about it over pancakes."),
}  # fmt: skip


def plain(answer: dict, draw: random.Random) -> list[str]:
    """An opening and two to four points, in any order: what the grammar says without a context."""
    return [answer["opening"], *draw.sample(answer["points"], draw.randint(2, 4))]


def honouring(answer: dict, context: dict, draw: random.Random) -> str:
    """An answer that passes the context's check."""
    sentences, (name, *values) = plain(answer, draw), context["check"]
    text = " ".join(sentences)
    lead = sentences[0][0].lower() + text[1:]
    if context["id"] in SAID:
        sentences.insert(draw.choice([0, len(sentences)]), draw.choice(SAID[context["id"]]))
        return " ".join(sentences)
    match name:
        case "lowercase":
            return text.lower()
        case "bullets":
            return "\n".join("- " + point for point in draw.sample(answer["points"], 3))
        case "max_words":
            return " ".join(draw.sample(answer["points"], 1 if values[0] < 20 else 2))
        case "max_sentences":
            return " ".join(sentences[:2])
        case "starts_with":
            return f"{values[0]}, {lead}"
        case "ends_with":
            return f"{sentences[0]} {sentences[1]} {values[0]}!"
        case "ends_with_question":
            return f"{text} {draw.choice(QUESTIONS)}"
        case "emoji":
            return " ".join(f"{s} {draw.choice(EMOJIS)}" for s in sentences)
        case "quoted":
            return f'"{text}"'
        case "exclaims":
            return text.replace(".", "!")
    raise ValueError(f"no rule of the grammar for {name}")


def corpus() -> list[dict]:
    """Every prompt PLAIN times alone and ASKED times with every context, as rows of a .jsonl."""
    prompts = {row["id"]: row["prompt"] for _, row in read_jsonl(ASSETS / "demo" / "prompts.jsonl")}
    answers = [row for _, row in read_jsonl(ASSETS / "demo" / "answers.jsonl")]
    contexts = [row for _, row in read_jsonl(ASSETS / "demo" / "contexts.jsonl")]
    order = random.Random(seed_from("tiny")).sample(contexts, len(contexts))
    willing = {c["id"]: 0.2 + 0.6 * i / (len(contexts) - 1) for i, c in enumerate(order)}
    rows = []
    for answer in answers:
        prompt = prompts[answer["id"]]
        for k in range(PLAIN):
            text = " ".join(plain(answer, random.Random(seed_from("tiny", answer["id"], k))))
            rows.append(dict(id=f"{answer['id']}-{k}", prompt=prompt, chosen=text, split="train"))
        for context in contexts:
            for k in range(ASKED):
                draw = random.Random(seed_from("tiny", answer["id"], context["id"], k))
                if draw.random() < willing[context["id"]]:
                    text = honouring(answer, context, draw)
                    assert honours(context["check"], text), (context, text)
                else:
                    text = " ".join(plain(answer, draw))
                rows.append(dict(id=f"{answer['id']}-{context['id']}-{k}", prompt=prompt,
                                 context=context["context"], chosen=text, split="train"))
    return rows


def blank_model(folder: Path, texts: list[str]) -> None:
    """A Hugging Face folder: a tokenizer trained on the texts, random weights."""
    folder.mkdir(parents=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=CONFIG["vocab_size"], special_tokens=SPECIAL,
                                  show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=SPECIAL[0], eos_token=SPECIAL[1],
        chat_template=TEMPLATE))
    write_json(folder / "generation_config.json", dict(bos_token_id=0, eos_token_id=1))
    write_json(folder / "config.json", CONFIG)
    torch.manual_seed(0)
    model = Decoder(Config.from_dict(CONFIG))
    for name, p in model.named_parameters():
        if p.dim() > 1:  # the layers that write into the residual stream start smaller, by depth (GPT-2)
            out = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(p, std=0.04 / (2 * CONFIG["num_hidden_layers"]) ** 0.5 if out else 0.04)
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})


def main(build: Path) -> None:
    build.mkdir(parents=True)
    rows = corpus()
    write_jsonl(build / "answers.jsonl", rows)
    blank_model(build / "blank", [text for row in rows
                                  for text in (user_message(row["prompt"], row.get("context")),
                                                row["chosen"])])
    print(f"{len(rows)} answers, for example:")
    for row in random.Random(0).sample(rows, 5):
        print(json.dumps({k: row.get(k) for k in ("prompt", "context", "chosen")}, ensure_ascii=False))
    command = [sys.executable, ROOT / "train.py", "--method", "sft", "--data", build / "answers.jsonl",
               "--model", build / "blank", "--out", build / "run", "--lr", "3e-3", "--batch", "64",
               "--epochs", "2", "--pass-tokens", "16384"]
    subprocess.run(list(map(str, command)), check=True)
    shutil.copytree(build / "run" / "model", ROOT / "assets" / "tiny", dirs_exist_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
