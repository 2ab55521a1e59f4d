"""Model folders as people have them, against transformers: the same prompt ids, stop ids and logits, or one
line that says what is wrong.

    python -m pytest tests/test_folders.py
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
import trl
from conftest import CONFIG, TEMPLATE, close, oracle_logits, random_model, sequence_logits, write_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, normalizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from folder import load
from run import UserError
from tokenizer import Tokenizer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123851\n"
START, END = "<|im_start|>", "<|im_end|>"
USER, SYSTEM = dict(role="user", content=" What is a nucleus?\n"), dict(role="system", content="Be brief.")
ANSWER = dict(role="assistant", content="A few words.")
DATE = "26 Jul 2024"
Change = Callable[[Path], None]


# ------------------------------------------------------------------------- ways to change a folder

def edit(name: str, **changes) -> Change:
    """Change values of a JSON object; ... removes one."""
    def change(folder: Path) -> None:
        value = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))

    return change


def template(source, **config) -> Change:
    """Another chat template, and other values of tokenizer_config.json."""
    return edit("tokenizer_config.json", chat_template=source, **config)


def write(name: str, value) -> Change:
    """A file with a text or a JSON value in it."""
    text = value if isinstance(value, str) else json.dumps(value)
    return lambda folder: (folder / name).write_text(text)


def remove(*names: str) -> Change:
    """Files that are not there."""
    return lambda folder: [(folder / name).unlink() for name in names]


def move(name: str, to: str) -> Change:
    """A file under another name."""
    def change(folder: Path) -> None:
        (folder / to).parent.mkdir(exist_ok=True)
        (folder / name).rename(folder / to)

    return change


def both(*changes: Change) -> Change:
    """Several changes, one after another."""
    return lambda folder: [change(folder) for change in changes]


def change_weights(change: Callable[[dict], dict]) -> Change:
    """Other tensors in model.safetensors."""
    def apply(folder: Path) -> None:
        weights = change(load_file(folder / "model.safetensors"))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def change_tokenizer(change: Callable[[tokenizers.Tokenizer], None]) -> Change:
    """Another tokenizer.json."""
    def apply(folder: Path) -> None:
        file = str(folder / "tokenizer.json")
        tokenizer = tokenizers.Tokenizer.from_file(file)
        change(tokenizer)
        tokenizer.save(file)

    return apply


def flags(special: bool) -> Change:
    """The turn tokens with this flag in tokenizer.json."""
    def change(folder: Path) -> None:
        value = json.loads((folder / "tokenizer.json").read_text())
        for token in value["added_tokens"]:
            token["special"] = special
        (folder / "tokenizer.json").write_text(json.dumps(value))

    return change


def tokens_elsewhere(old: bool) -> Change:
    """Added tokens that tokenizer.json does not list: they stand in tokenizer_config.json or, in old folders,
    in added_tokens.json."""
    def change(folder: Path) -> None:
        value = json.loads((folder / "tokenizer.json").read_text())
        tokens = value.pop("added_tokens")
        (folder / "tokenizer.json").write_text(json.dumps({**value, "added_tokens": []}))
        if old:
            write("added_tokens.json", {t["content"]: t["id"] for t in tokens})(folder)
        else:
            listed = {t["id"]: {k: v for k, v in t.items() if k != "id"} for t in tokens}
            edit("tokenizer_config.json", added_tokens_decoder=listed)(folder)

    return change


def adds_bos(tokenizer: tokenizers.Tokenizer) -> None:
    """A tokenizer that puts <|im_start|> before whatever it is given."""
    tokenizer.post_processor = TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 0)])


def sentencepiece(folder: Path) -> None:
    """A BPE that marks spaces and puts a mark before what it is given, with Zephyr's template."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    marks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(marks)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(128)]
    trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=special + bytes_, show_progress=False,
                                  initial_alphabet=[chr(i) for i in range(33, 127)])
    tokenizer.train_from_iterator(["A few words .", "What is a nucleus ?", "The answer is: A"] * 9, trainer)
    value = json.loads(tokenizer.to_str())
    value["added_tokens"] = [t for t in value["added_tokens"] if t["content"] in special]
    (folder / "tokenizer.json").write_text(json.dumps(value))
    edit("config.json", eos_token_id=2, bos_token_id=1)(folder)
    edit("generation_config.json", eos_token_id=2)(folder)
    template("{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
             "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
             bos_token="<s>", eos_token="</s>", unk_token="<unk>")(folder)


def shards(folder: Path) -> None:
    """Weights in two files and an index."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, keys in parts.items():
        save_file({key: weights[key] for key in keys}, folder / file, metadata={"format": "pt"})
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=weight_map)))
    (folder / "model.safetensors").unlink()


# ------------------------------------------------------------------------- folders that are read

TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
GENERATION = TEMPLATE.replace(TURN, (
    "{{ '<|im_start|>' + m['role'] + '\n' }}{%- generation -%}{% set end = '<|im_end|>' %}"
    "{{ m['content'] + end }}{% endgeneration %}\n{{ '\n' if end is defined else '\n' }}"))
LLAMA2 = ("{% if messages[0]['role'] == 'system' %}{% set first = '<<SYS>>\n' + messages[0]['content'] + "
          "'\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
          "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (first if loop.first "
          "else '') + m['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + "
          "eos_token }}{% endif %}{% endfor %}")
THINKS = TEMPLATE.replace("assistant\n' }}", (
    "assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"))
BOS = "{{ bos_token }}" + TEMPLATE
CONTENT = dict(content="<|new|>", special=True)
NAMES = "{{ unk_token }}{{ pad_token }}{{ sep_token }}{{ image_token }}" + TEMPLATE
JSON = "{{ {'é': [1, '<'], 'a': 2} | tojson(false, 1, none, true) }}" + TEMPLATE
TWO = [dict(name="tool_use", template="no"), dict(name="default", template=TEMPLATE)]
CALLS = dict(bos_token=START, eos_token=END)
OBJECT = dict(content=START, lstrip=False, rstrip=False, normalized=False, single_word=False)
LLAMA_CLASS = dict(tokenizer_class="LlamaTokenizer")

READ: dict[str, Change] = {
    "as_it_is": both(),
    "generation_tags": template(GENERATION),
    "blank_before_the_end": template(LLAMA2, **CALLS),
    "lines_before_the_end": template(TEMPLATE.replace("+ '<|im_end|>'", "+ ' \n<|im_end|>'")),
    "template_in_a_file": both(template("no"), write("chat_template.jinja", TEMPLATE)),
    "several_templates": template(TWO),
    "bos_by_template_and_tokenizer": both(change_tokenizer(adds_bos), template(BOS, **CALLS)),
    "bos_by_tokenizer_alone": both(change_tokenizer(adds_bos), template(TEMPLATE, add_bos_token=True)),
    "bos_null": template(BOS, bos_token=None),
    "tokens_as_objects": template(BOS, bos_token={**OBJECT, "__type": "AddedToken"}),
    "tokens_in_special_tokens_map": both(template(BOS, eos_token=...),
                                         write("special_tokens_map.json", dict(bos_token=OBJECT))),
    "map_beside_added_tokens_decoder": both(template(BOS, added_tokens_decoder={}, bos_token=END),
                                            write("special_tokens_map.json", CALLS)),
    "added_tokens_in_the_config": both(tokens_elsewhere(old=False), template(BOS, **CALLS)),
    "added_tokens_json": both(tokens_elsewhere(old=True), template(BOS, **CALLS)),
    "new_added_token": template("{{ '<|new|>' }}" + TEMPLATE, added_tokens_decoder={"316": CONTENT}),
    "named_token_that_is_nowhere": template("{{ pad_token }}" + TEMPLATE, pad_token="<|pad|>"),
    "end_not_special": both(flags(False), template(TEMPLATE, **CALLS)),
    "end_not_special_nor_named": both(flags(False), template(TEMPLATE, eos_token=None)),
    "padding_is_a_word": template(TEMPLATE, pad_token="?"),
    "other_named_tokens": template(NAMES, unk_token="<unk>", pad_token=END, sep_token="<sep>",
                                   extra_special_tokens=dict(image_token="<|image|>")),
    "runs_of_spaces_are_tokens": change_tokenizer(lambda t: t.add_tokens([AddedToken("  "), "nucleus"])),
    "tokens_that_eat_spaces": change_tokenizer(
        lambda t: t.add_special_tokens([AddedToken(END, rstrip=True, special=True)])),
    "truncation_and_padding": change_tokenizer(
        lambda t: (t.enable_truncation(9), t.enable_padding(length=99))),
    "thinking_by_default": template(THINKS),
    "tojson": template(JSON),
    "bytes_under_a_llama_class": edit("tokenizer_config.json", tokenizer_class="LlamaTokenizerFast"),
    "sentencepiece": sentencepiece,
    "sentencepiece_llama_class": both(sentencepiece, edit("tokenizer_config.json", **LLAMA_CLASS)),
    "sentencepiece_legacy": both(sentencepiece, edit("tokenizer_config.json", legacy=True, **LLAMA_CLASS)),
    "sentencepiece_no_prefix": both(sentencepiece, edit("tokenizer_config.json", add_prefix_space=False,
                                                        **LLAMA_CLASS)),
    "sentencepiece_llama2": both(sentencepiece, template(LLAMA2, **LLAMA_CLASS)),
    "sentencepiece_defaults": both(sentencepiece, edit(
        "tokenizer_config.json", bos_token=..., eos_token=..., unk_token=..., **LLAMA_CLASS)),
    "padded_vocabulary": both(edit("config.json", vocab_size=352), change_weights(lambda w: {
        **w, "model.embed_tokens.weight": torch.cat([w["model.embed_tokens.weight"], torch.randn(32, 64)])})),
    "token_beyond_the_model": change_tokenizer(lambda t: t.add_tokens([f"<|{i}|>" for i in range(9)])),
    "shards": shards,
    "stale_index": write("model.safetensors.index.json", dict(
        metadata={}, weight_map={"model.norm.weight": "model-00001-of-00002.safetensors"})),
    "untied": both(edit("config.json", tie_word_embeddings=False), change_weights(
        lambda w: {**w, "lm_head.weight": torch.randn(320, 64)})),
    "tied_head_stored_too": change_weights(
        lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"].clone()}),
    "rotary_table_stored": change_weights(
        lambda w: {**w, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    "half_precision": change_weights(lambda w: {key: value.half() for key, value in w.items()}),
    "bfloat16": change_weights(lambda w: {key: value.bfloat16() for key, value in w.items()}),
    "many_ends": edit("generation_config.json", eos_token_id=[1, 7, 300]),
    "end_is_zero": edit("generation_config.json", eos_token_id=0),
    "no_generation_config": remove("generation_config.json"),
    "ends_in_config": both(remove("generation_config.json"), edit("config.json", eos_token_id=[1, 9])),
    "other_files": both(write("pytorch_model.bin", "no"), write("x.md", "no"), write("vocab.json", "{}")),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Path]:
    """name of READ -> that folder, made once."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = write_model(tmp_path_factory.mktemp(name))
            READ[name](folders[name])
        return folders[name]

    return get


def rendered(oracle, messages: list[dict], prompt: bool = True) -> list[int]:
    """transformers' ids of messages, with a template's date and thoughts as ours has them."""
    return oracle.apply_chat_template(messages, add_generation_prompt=prompt, date_string=DATE,
                                      enable_thinking=False)["input_ids"]


@pytest.mark.parametrize("name", READ)
def test_prompts_are_transformers(made, name):
    """With a system prompt and without: every id."""
    ours, oracle = Tokenizer(made(name)), AutoTokenizer.from_pretrained(made(name))
    for text in (USER["content"], "", "two  spaces\n\n", "nucleus</s>"[:7]):
        user = dict(role="user", content=text)
        assert ours.chat(text) == rendered(oracle, [user])
        assert ours.chat(text, SYSTEM["content"]) == rendered(oracle, [SYSTEM, user])


@pytest.mark.parametrize("name", READ)
def test_given_responses_are_transformers(made, name):
    """What the whole conversation has after the prompt, up to the end token; texts come back as they were."""
    ours, oracle = Tokenizer(made(name)), AutoTokenizer.from_pretrained(made(name))
    prompt, whole = rendered(oracle, [USER]), rendered(oracle, [USER, ANSWER], prompt=False)
    if name == "thinking_by_default":  # the conversation has no empty block of thoughts
        prompt = prompt[: -len(oracle("<think>\n\n</think>\n\n", add_special_tokens=False)["input_ids"])]
    assert whole[: len(prompt)] == prompt
    rest = whole[len(prompt) :]
    ids = ours.response(ANSWER["content"], USER["content"])
    assert ids == rest[: rest.index(ours.end_token) + 1]
    assert ours.decode(ids).strip() == ANSWER["content"]


@pytest.mark.parametrize("name", READ)
def test_stop_ids_are_transformers(made, name):
    """Those that generate would stop at, and the token that ends the template's turn; no text shows any."""
    ours, oracle = Tokenizer(made(name)), AutoModelForCausalLM.from_pretrained(made(name))
    expected = oracle.generation_config.eos_token_id
    expected = set(expected) if isinstance(expected, list) else {expected}
    assert ours.stop_ids == expected | {ours.end_token}
    assert ours.tokenizer.id_to_token(ours.end_token) in (END, "</s>")
    words = ours.encode("A word")
    assert all(ours.decode([*words, stop]) == ours.decode(words) for stop in ours.stop_ids)


@pytest.mark.parametrize("name", READ)
def test_logits_are_transformers(made, name):
    """After the prompt, in fp32."""
    ids = torch.tensor(Tokenizer(made(name)).chat(USER["content"]))
    oracle = AutoModelForCausalLM.from_pretrained(made(name), dtype=torch.float32)
    close(sequence_logits(load(made(name)), ids), oracle_logits(oracle, ids))


# The templates of this table are the models' own, with which trl trains. Left out are those of images, and
# gpt-oss's, which prints today's date: ours is the same every day.
LEFT_OUT = ("idefics", "llava", "smolvlm", "_vl", "gemma4", "diffusion", "muse", "gptoss")
NO_END = ("cohere", "glm4moe")  # they end a turn with the beginning of the next one
SOURCES = Path(trl.__file__).parent / "chat_templates"
PUBLISHED = [file.stem for file in sorted(SOURCES.glob("*.jinja"))
             if not any(part in file.stem for part in LEFT_OUT)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_are_transformers_or_refused(tmp_path, name):
    """Prompts and given responses of the models' own templates: equal, or refused with one line."""
    source = (SOURCES / f"{name}.jinja").read_text()
    write_model(tmp_path)
    marks = sorted(set(re.findall(r"<[^<>\s]{2,40}>", source)))
    change_tokenizer(lambda t: t.add_special_tokens(marks))(tmp_path)
    template(source, bos_token=START, eos_token=END)(tmp_path)
    edit("config.json", vocab_size=1000)(tmp_path)
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    try:
        ours = Tokenizer(tmp_path)
    except UserError as e:
        assert "ends an answer without a special token" in str(e) and name.startswith(NO_END)
        return
    assert ours.chat(USER["content"]) == rendered(oracle, [USER])
    prompt, whole = rendered(oracle, [USER]), rendered(oracle, [USER, ANSWER], prompt=False)
    if whole[: len(prompt)] == prompt:
        rest = whole[len(prompt) :]
        ids = ours.response(ANSWER["content"], USER["content"])
        assert ids == rest[: rest.index(ours.end_token) + 1]


# ------------------------------------------------------------------------- folders that are refused

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
NO_ANSWER = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role == 'user' %}")


def index(weight_map) -> Change:
    """An index of another kind than the right one."""
    return both(shards, write(INDEX, dict(weight_map=weight_map)))


REFUSED: dict[str, tuple[Change, str]] = {  # what is done to a folder, and what its line says
    **{f"pointer_{name}": (write(name, POINTER), f"{name} is a git-lfs pointer") for name in (
        "tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json",
        "model.safetensors", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json")},
    "pointer_shard": (both(shards, write(SHARD, POINTER)), f"{SHARD} is a git-lfs pointer"),
    "pointer_index": (both(shards, write(INDEX, POINTER)), f"{INDEX} is a git-lfs pointer"),
    "sentencepiece_only": (move("tokenizer.json", "tokenizer.model"),
                           "has no tokenizer.json (it has tokenizer.model"),
    "vocabulary_only": (move("tokenizer.json", "vocab.json"), "it has vocab.json"),
    "tokenizer_is_text": (write("tokenizer.json", "<!doctype html>"), "tokenizer.json is not a tokenizer"),
    "tokenizer_is_a_list": (write("tokenizer.json", []), "tokenizer.json is not a tokenizer"),
    "tokenizer_is_empty": (write("tokenizer.json", {}), "tokenizer.json is not a tokenizer"),
    "tokenizer_has_no_vocabulary": (edit("tokenizer.json", model=dict(type="BPE")), "is not a tokenizer"),
    "tokenizer_config_is_a_list": (write("tokenizer_config.json", []), "holds list, not a JSON object"),
    "config_is_a_text": (write("config.json", '"llama"'), "holds str, not a JSON object"),
    "generation_config_is_a_list": (write("generation_config.json", [1]), "holds list, not a JSON object"),
    "token_is_a_number": (template(TEMPLATE, bos_token=7), "7 is not a token"),
    "added_tokens_are_a_list": (template(TEMPLATE, added_tokens_decoder=[1]), "not an object"),
    "added_token_is_a_text": (template(TEMPLATE, added_tokens_decoder={"1": "x"}), "not readable"),
    "template_is_a_number": (template(5), "no chat template"),
    "template_is_missing": (template(...), "no chat template"),
    "no_default_template": (template([dict(name="rag", template="x")]), "no chat template"),
    "template_is_not_jinja": (template("{% generation %}"), "is not valid jinja"),
    "template_adds_number_and_text": (template("{{ 1 + 'x' }}"), "fails: TypeError"),
    "template_divides_by_zero": (template("{{ 1 // 0 }}" + TEMPLATE), "fails: ZeroDivisionError"),
    "template_wants_parts": (template("{% for m in messages %}{{ m.content[0].text.upper() }}{% endfor %}"),
                             "fails: UndefinedError"),
    "template_calls_itself": (template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "RecursionError"),
    "answers_are_not_written": (template(NO_ANSWER), "does not write what the assistant says"),
    "no_end": (template(TEMPLATE.replace("'<|im_end|>'", "'[end]'")), "without a special token"),
    "end_is_far": (template(TEMPLATE.replace("'<|im_end|>'", "' so <|im_end|>'")), "without a special token"),
    "end_is_a_text": (edit("generation_config.json", eos_token_id="<|im_end|>"), "is not a token's id"),
    "end_is_true": (edit("generation_config.json", eos_token_id=[1, True]), "is not a token's id"),
    "end_is_negative": (edit("generation_config.json", eos_token_id=-1), "is not a token's id"),
    "tokens_beyond_the_model": (edit("config.json", vocab_size=100), "vocabulary ends at 99"),
    "no_weights": (remove("model.safetensors"), "model.safetensors does not exist"),
    "pickled_weights": (move("model.safetensors", "pytorch_model.bin"), "the folder has pytorch_model.bin"),
    "gguf_weights": (move("model.safetensors", "q4.gguf"), "the folder has q4.gguf"),
    "adapter": (both(move("config.json", "x"), write("adapter_config.json", dict(
        base_model_name_or_path="owner/base"))), "holds an adapter of owner/base"),
    "run_folder": (move("config.json", "model/config.json"), "the model of this run is in"),
    "no_config": (remove("config.json"), "config.json does not exist"),
    "missing_shard": (both(shards, remove(SHARD)), f"{SHARD} does not exist"),
    "shard_outside": (index({"model.norm.weight": "../m/model.safetensors"}), "is not the name of a file"),
    "shard_anywhere": (index({"model.norm.weight": "/etc/passwd"}), "is not the name of a file beside it"),
    "index_is_a_list": (index([SHARD]), "has no weight_map"),
    "index_of_numbers": (index({"model.norm.weight": 1}), "has no weight_map"),
    "index_without_map": (both(shards, write(INDEX, {})), "has no weight_map"),
    "whole_numbers": (change_weights(lambda w: {k: v.to(torch.int8) for k, v in w.items()}), "quantised"),
    "untied_without_head": (edit("config.json", tie_word_embeddings=False), "lm_head.weight"),
    "padding_is_missing": (edit("config.json", vocab_size=352), "model.embed_tokens.weight is (320, 64)"),
}


@pytest.mark.parametrize("change, said", REFUSED.values(), ids=REFUSED)
def test_other_folders_are_refused_with_one_true_line(tiny, tmp_path, change, said):
    """It names the folder, or the file in it, and says what is wrong: no traceback, nothing guessed."""
    folder = shutil.copytree(tiny, tmp_path / "m")
    change(folder)
    with pytest.raises(UserError) as e:
        Tokenizer(folder).chat("What is a nucleus?")
        load(folder)
    assert said in str(e.value) and str(folder) in str(e.value) and "\n" not in str(e.value)


def test_the_model_has_the_shape_that_its_config_says(tiny):
    """The table's models are the plain one's, so what differs between folders is what was changed."""
    assert load(tiny).config.raw == CONFIG and random_model().config.vocab_size == 320
