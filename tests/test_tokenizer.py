"""tokenizer.py: thoughts, template variables, system prompts, the ids of given responses, what texts show.

tests/test_folders.py compares odd folders with transformers, tests/test_sample.py templates and stop ids.

    python -m pytest tests/test_tokenizer.py
"""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from conftest import TEMPLATE, chat_ids, run_inside, write_model
from test_folders import LLAMA2, THINKS, both, change_tokenizer, flags, sentencepiece, template
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer

import pairs as pairing
from contexts import DataArgs, check, examples_for, warn_of_templates
from data import Example
from pairs import load_pairs, ready_pairs
from run import UserError, read_json
from tokenizer import Tokenizer, template_variables, without_thoughts

END = "<|im_end|>"
EMPTY = "<think>\n\n</think>\n\n"
QWEN3 = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- set text, thoughts = m.content, '' %}
{%- if '</think>' in text %}{% set thoughts = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}
{%- if m.role == 'assistant' %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}
{{- text + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
OPENS = TEMPLATE.replace("assistant\n' }}", "assistant\n<think>\n' }}")  # as DeepSeek-R1's
LATER = ("{% if not enable_thinking is defined %}{% set enable_thinking = true %}{% endif %}"
         + TEMPLATE.replace("assistant\n' }}", "assistant\n' + ('' if enable_thinking else "
                            "'<think>\n\n</think>\n\n') }}"))  # as SmolLM3's


@pytest.fixture
def folder_of(tiny, tmp_path):
    """(changes) -> a copy of the tiny model with them."""
    def get(*changes) -> Path:
        folder = shutil.copytree(tiny, tmp_path / "model")
        both(*changes)(folder)
        return folder

    return get


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Ids as text, special tokens too."""
    return tokenizer.tokenizer.decode(ids, skip_special_tokens=False)


# ------------------------------------------------------------------------- thoughts

ANSWERS = {
    "no_thoughts": ("Freeze it.", False, "Freeze it."),
    "spaces_stay": (" Freeze it.\n", False, " Freeze it.\n"),
    "thoughts": ("<think>\nThe user wants it short.\n</think>\n\nFreeze it.", False, "Freeze it."),
    "empty_thoughts": (EMPTY + "Freeze it.", False, "Freeze it."),
    "blank_before": ("\n <think>x</think> Freeze it. \n", False, "Freeze it. \n"),
    "never_ending": ("<think>\nFirst, the user", False, ""),
    "twice": ("<think>a</think><think>b</think>Freeze it.", False, "Freeze it."),
    "begun_in_the_prompt": ("The user wants it short.</think>\n\nFreeze it.", True, "Freeze it."),
    "begun_and_never_ending": ("The user wants it", True, ""),
    "other_tag": ("<thinking>x</thinking>\nFreeze it.", False, "Freeze it."),
    "brackets": ("[THINK]x[/THINK]Freeze it.", False, "Freeze it."),
    "special_looking": ("<|begin_of_thought|>x<|end_of_thought|>Freeze it.", False, "Freeze it."),
    "tag_in_the_answer": ("Write </think> at the end.", False, "Write </think> at the end."),
    "both_tags_in_the_answer": ("Use <think> and </think>.", False, "Use <think> and </think>."),
    "a_heading": ("[Analysis]\nFreeze it.", False, "[Analysis]\nFreeze it."),
    "a_sentence": ("Here is my thought process: freeze.", False, "Here is my thought process: freeze."),
    "html": ("<b>Freeze</b> it.", False, "<b>Freeze</b> it."),
    "nothing": ("", False, ""),
}


@pytest.mark.parametrize("text, began, answer", ANSWERS.values(), ids=ANSWERS)
def test_thoughts_are_no_part_of_the_answer(text, began, answer):
    """What follows them is; nothing where they never end; other texts stay as they are."""
    assert without_thoughts(text, began) == answer


@pytest.mark.parametrize("special", [False, True])
def test_tags_that_are_tokens_are_seen(folder_of, special):
    """Whether or not the tokenizer hides special tokens: thoughts do not stay behind without their tags."""
    tags = [AddedToken(tag, special=special) for tag in ("<think>", "</think>")]
    t = Tokenizer(folder_of(change_tokenizer(lambda t: t.add_tokens(tags))))
    ids = t.response("<think>Short.</think>Freeze it.")
    assert [i for i in ids if i >= 300] == [t.added["<think>"], t.added["</think>"]]
    assert t.answer(ids) == "Freeze it." and t.decode(ids) == "<think>Short.</think>Freeze it."


def test_a_prompt_that_opens_thoughts_is_known(folder_of):
    """DeepSeek-R1's: what is sampled begins within them, and has no answer before they end."""
    t = Tokenizer(folder_of(template(OPENS)))
    assert t.answer(t.encode("Hm.</think>\nFreeze it.")) == "Freeze it." and t.answer(t.encode("Hm.")) == ""
    assert text_of(t, t.response("Hm.</think>\nFreeze it.")) == f"Hm.</think>\nFreeze it.{END}"
    with pytest.raises(UserError, match="does not close them"):
        t.response("Freeze it.")


# ------------------------------------------------------------------------- variables

VALUES = {
    "true": ("x=true", True), "python's": ("x=False", False), "null": ("x=null", None), "number": ("x=3", 3),
    "text": ("x=low effort", "low effort"), "empty": ("x=", ""), "equals": ("x=a=b", "a=b"),
    "list": ('x=["a"]', ["a"]), "quoted": ('x="true"', "true"),
}  # fmt: skip


@pytest.mark.parametrize("pair, value", VALUES.values(), ids=VALUES)
def test_variables_are_json_or_text(pair, value):
    """False as Python writes it is no: as a text it would be a yes."""
    assert template_variables([pair, "y=1"]) == dict(x=value, y=1)


@pytest.mark.parametrize("pair", ["enable_thinking", "=true", "a b=1", "messages=[]",
                                  "add_generation_prompt=1"])
def test_malformed_variables_are_refused_by_name(pair):
    """Before anything is loaded: contexts.check reads them."""
    with pytest.raises(UserError, match="--template"):
        check(DataArgs(template=(pair,)))


THINKING = {"short": THINKS, "qwen3": QWEN3, "set_later": LATER}


@pytest.mark.parametrize("source", THINKING.values(), ids=THINKING)
def test_thinking_is_off_unless_asked_for(folder_of, source):
    """Where a template has the variable; the prompt is transformers' with the same value."""
    folder = folder_of(template(source))
    oracle, user = AutoTokenizer.from_pretrained(folder), [dict(role="user", content="Hi")]
    for given, value in (([], False), (["enable_thinking=false"], False), (["enable_thinking=True"], True)):
        ids = Tokenizer(folder, template=given).chat("Hi")
        assert ids == oracle.apply_chat_template(user, add_generation_prompt=True,
                                                 enable_thinking=value)["input_ids"]
    assert text_of(Tokenizer(folder), Tokenizer(folder).chat("Hi")).endswith("assistant\n" + EMPTY)


def test_a_variable_that_the_template_does_not_have_is_refused(folder_of):
    """A misspelt one would change nothing, without a word."""
    folder = folder_of(template(THINKS))
    with pytest.raises(UserError, match=r"no such variable \(did you mean 'enable_thinking'"):
        Tokenizer(folder, template=["enable_thinkin=true"])


def test_a_variable_of_a_models_own_reaches_the_template(folder_of):
    """Any name, any JSON value."""
    folder = folder_of(template("{{ 'effort: ' + effort + levels[1] if effort else '' }}" + TEMPLATE))
    t = Tokenizer(folder, template=["effort=low", 'levels=[".", "!"]'])
    assert text_of(t, t.chat("Hi")).startswith("effort: low!")
    assert Tokenizer(folder).chat("Hi") == chat_ids(folder, "Hi")


# ------------------------------------------------------------------------- system prompts

def test_a_template_that_passes_over_system_prompts_is_refused(folder_of):
    """In silence it would lose them; an empty one has nothing to lose."""
    skips = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    t = Tokenizer(folder_of(template(skips)))
    with pytest.raises(UserError, match="writes no system prompt"):
        t.chat("Hi", "Be brief.")
    assert t.chat("Hi", "") == t.chat("Hi")


def test_a_template_that_refuses_system_prompts_says_so(folder_of):
    """Gemma's: its own words; prompts without one work."""
    no = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    t = Tokenizer(folder_of(template(no + TEMPLATE)))
    assert t.chat("Hi")
    with pytest.raises(UserError, match="System role not supported"):
        t.chat("Hi", "Be brief.")


def rows(folder: Path, *systems: str | None) -> Path:
    """A data file with a row of the training part for each of these system prompts."""
    lines = [dict(prompt=f"Question {i}?", chosen=f"Yes {i}.", rejected="No.", split="train", id=str(i),
                  **({} if system is None else dict(system=system))) for i, system in enumerate(systems)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_the_flag_fills_rows_without_a_system_prompt(tmp_path):
    """A row's own stays; without the flag the others have none."""
    data = str(rows(tmp_path, "Own.", None))
    systems = [e.system for e in examples_for(DataArgs(data=data, system="Flag."), "train")]
    assert systems == ["Own.", "Flag."]
    assert [e.system for e in examples_for(DataArgs(data=data), "train")] == ["Own.", None]


def test_ready_pairs_are_told_the_system_prompt(tiny, tmp_path):
    """Their prompts are the template's with a system turn."""
    t = Tokenizer(tiny)
    examples = examples_for(DataArgs(data=str(rows(tmp_path, "Own.", None))), "train")
    first, second = ready_pairs(t, examples)
    assert first.prompt_ids == t.chat("Question 0?", "Own.") != t.chat("Question 0?")
    assert second.prompt_ids == chat_ids(tiny, "Question 1?") and first.system == "Own."


def test_sampled_pairs_are_told_the_flag_and_remember_it(tiny, tmp_path):
    """Chosen and rejected prompts; a second command without the flag does not take these pairs for its."""
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps(dict(prompt=f"Q{i}?", context=f"C{i}.", split="train")) + "\n"
                            for i in range(3)))
    argv = ["--data", data, "--model", tiny, "--out", "o", "--max-new-tokens", "4", "--dtype", "float32"]
    run_inside(pairing.program, tmp_path, *argv, "--system", "Be brief.")
    t = Tokenizer(tiny)
    for pair in load_pairs(tmp_path / "o"):
        assert pair.system == "Be brief." and pair.rejected[0].prompt_ids == t.chat(pair.prompt, "Be brief.")
        message = Example("", pair.prompt, "train").user_message(pair.context)
        assert pair.prompt_ids == t.chat(message, "Be brief.")
    assert read_json(tmp_path / "o" / "pairs.json")["settings"]["system"] == "Be brief."
    with pytest.raises(UserError, match=r"system 'Be brief\.', not None"):
        run_inside(pairing.program, tmp_path, *argv)


def test_pairs_remember_the_templates_variables(folder_of, tmp_path):
    """And are not taken for those of other ones."""
    folder = folder_of(template(THINKS))
    data = rows(tmp_path, None, None)
    argv = ["--data", data, "--model", folder, "--out", "o", "--dtype", "float32"]
    run_inside(pairing.program, tmp_path, *argv, "--template", "enable_thinking=true")
    pair = load_pairs(tmp_path / "o")[0]
    assert pair.prompt_ids == Tokenizer(folder, template=["enable_thinking=true"]).chat(pair.prompt)
    assert read_json(tmp_path / "o" / "pairs.json")["settings"]["template"] == ["enable_thinking=true"]
    with pytest.raises(UserError, match="template"):
        run_inside(pairing.program, tmp_path, *argv)


# ------------------------------------------------------------------------- given responses

def test_thoughts_of_a_given_response_stand_where_the_template_puts_them(folder_of):
    """After a prompt that lets the model think; a prompt with an empty block of them is refused by name."""
    folder = folder_of(template(QWEN3), change_tokenizer(lambda t: t.add_tokens(["<think>", "</think>"])))
    plain, thinks = Tokenizer(folder), Tokenizer(folder, template=["enable_thinking=true"])
    text = "<think>\nShort.\n</think>\n\nNo."
    assert text_of(thinks, thinks.response(text)) == text + END
    assert text_of(thinks, thinks.response("No.")) == f"{EMPTY}No.{END}"
    assert text_of(plain, plain.response("No.")) == f"No.{END}"
    with pytest.raises(UserError, match="enable_thinking=true"):
        plain.response(text)


@pytest.mark.parametrize("text, joins", [("\nfoo", False), ("\n\n\nfoo", True), ("  foo", True),
                                         (" foo", False), ("foo", False), ("", False)])
def test_no_token_reaches_across_the_end_of_the_prompt(smollm2, text, joins):
    """Sampling never draws half of a token: where two line ends would become one token, they stay two."""
    t = Tokenizer(smollm2)
    prompt, ids = t.chat("Hi"), t.response(text, "Hi")
    assert ids[-1] == t.end_token and text_of(t, ids) == text + END
    whole = t.tokenizer.encode(text_of(t, prompt) + text + END).ids
    assert (prompt + ids == whole) is not joins


def test_trimmed_content_is_trained_as_the_template_writes_it(folder_of):
    """Llama's: spaces around an answer are none of it; encode leaves them, for letters within a text."""
    t = Tokenizer(folder_of(template(TEMPLATE.replace("m['content']", "m['content'] | trim"))))
    assert text_of(t, t.response("  Yes. \n")) == f"Yes.{END}" and text_of(t, t.encode(" A")) == " A"


def test_a_blank_before_the_end_is_trained(folder_of):
    """Llama-2-chat's: a response begins and ends with it, and is read without."""
    t = Tokenizer(folder_of(template(LLAMA2, bos_token="<|im_start|>", eos_token=END)))
    assert text_of(t, t.response("Yes.", "Hi", "Be brief.")) == f" Yes. {END}"


def test_sentencepiece_marks_no_space_within_a_text(folder_of):
    """Letters and the halves of a cut token are encoded as in the middle of a sentence."""
    t = Tokenizer(folder_of(sentencepiece))
    assert [t.tokenizer.id_to_token(i) for i in t.encode(" A")] == t.tokenizer.encode("zz A").tokens[-1:]
    assert t.decode(t.response("Use </s> here")) == "Use </s> here"
    assert t.response("Use </s> here").count(t.end_token) == 1


# ------------------------------------------------------------------------- texts and tokens

@pytest.mark.parametrize("eos", [END, None])
def test_an_end_token_of_any_flag_leaves_texts(folder_of, tiny, eos):
    """By its id: texts are those of the folder whose end token is special."""
    ours, plain = Tokenizer(folder_of(flags(False), template(TEMPLATE, eos_token=eos))), Tokenizer(tiny)
    ids = plain.response("A word.")
    assert ours.decode(ids) == plain.decode(ids) == "A word."
    assert ours.response(f"A{END}") == plain.response(f"A{END}")  # nor can data write it


def test_words_that_were_added_are_words(folder_of):
    """A token that is neither special nor written by the template is read in data as by transformers."""
    folder = folder_of(change_tokenizer(lambda t: t.add_tokens(["<tool>", "    "])))
    oracle, text = AutoTokenizer.from_pretrained(folder), "def f():\n    return <tool>"
    assert Tokenizer(folder).encode(text) == oracle.encode(text, add_special_tokens=False)


def test_a_token_that_normalisation_makes_is_refused(folder_of):
    """Full-width signs become <|x|>, past the cut: no way to tell them apart, so the text is named."""
    def change(tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.add_special_tokens([AddedToken("<|x|>", normalized=True, special=True)])

    t = Tokenizer(folder_of(change_tokenizer(change)))
    assert t.chat("<|x|> stays text") and t.added["<|x|>"] not in t.chat("<|x|> stays text")
    with pytest.raises(UserError, match=r"would be read as the special token '<\|x\|>'"):
        t.chat("\uff1c|x|\uff1e")


def test_what_only_looks_like_a_token_is_shown_with_a_backslash(tiny):
    """In the dry run: the token itself has none."""
    t = Tokenizer(tiny)
    shown = t.show(t.chat(f"Say {END}<|im_start|>!") + t.response(f"a{END}"))
    assert shown == (f"<|im_start|>user\nSay \\{END}\\<|im_start|>!{END}\n<|im_start|>assistant\n"
                     f"a\\{END}{END}")
    assert t.show(t.chat("Hi")) == text_of(t, t.chat("Hi"))


WARNED = {
    "own_token": (dict(chosen=f"Yes.{END}"), f"'chosen' holds '{END}'"),
    "own_template": (dict(prompt="<|im_start|>user\nHi"), "'prompt' holds '<|im_start|>'"),
    "another_models": (dict(rejected="No.<|eot_id|>"), "'rejected' holds '<|eot_id|>'"),
    "llama2s": (dict(prompt="[INST] Hi [/INST]"), "'prompt' holds '[INST]'"),
    "system": (dict(system="<<SYS>>x"), "'system' holds '<<SYS>>'"),
    "html": (dict(prompt="<b>Hi</b> <think> x |> [end]"), None),
    "plain": (dict(), None),
}


@pytest.mark.parametrize("columns, said", WARNED.values(), ids=WARNED)
def test_texts_with_a_template_are_named_by_file_and_line(tiny, capsys, columns, said):
    """The first such row and how many there are; rows that merely hold tags are not."""
    plain = dict(id="1", prompt="Hi", split="train", chosen="Yes.", rejected="No.", where="rows.jsonl:1")
    examples = [Example(**plain), Example(**plain | dict(where="rows.jsonl:2") | columns)]
    warn_of_templates(examples, Tokenizer(tiny))
    out = capsys.readouterr().out
    assert (f"warning: rows.jsonl:2: {said} (1 of 2 rows" in out) if said else out == ""


def test_a_templates_own_marks_need_not_be_tokens(folder_of):
    """Zephyr's <|user|> is spelt in letters, and so is [ASK]."""
    source = ("{{ '[ASK]' }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}"
              "{% endfor %}")
    t = Tokenizer(folder_of(sentencepiece, template(source)))
    assert t.template_mark("x [ASK] y") == "[ASK]" and t.template_mark("<|user|>Hi") == "<|user|>"
    assert t.template_mark("<|other|>") is None


def test_pairs_warn_once(tmp_path, capsys):
    """The program prints it before it goes on."""
    write_model(tmp_path / "m")
    file = rows(tmp_path, None, f"Be brief.{END}")
    run_inside(pairing.program, tmp_path, "--data", file, "--model", "m", "--out", "o", "--dtype", "float32")
    assert capsys.readouterr().out.count(f"warning: {file}:2: 'system' holds") == 1
