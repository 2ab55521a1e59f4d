"""tokenizer.py - text to token ids, and back, by the model's own tokenizer and chat template.

`Tokenizer.chat` is the only way from what a user says to prompt ids, `Tokenizer.response` from a response
that is given as text to ids, and `Tokenizer.answer` from sampled ids to what people, checks and judges read.
Files are read as transformers reads them, or refused. Whatever data or users write stays text:
no special token of more than one character can be smuggled in. Of generation_config.json only the ids that
stop a response are taken. What differs from the paper: nothing; it does not describe its templates.

    python sample.py --model DIR "What is inflation?"      renders a message and samples an answer
"""

import contextlib
import datetime
import difflib
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers

from chat_template import ChatTemplate, template_source
from console import silent_libraries
from folder import find, read_object, refuse_pointer
from replies import THOUGHTS_BEGIN, THOUGHTS_END
from run import UserError, parse_json
from schema import FLAG, OBJECT, TEXT, TOKEN_IDS, checked, optional

TEMPLATE_DATE = "2024-07-26"  # Llama 3's templates print the date: pinned, or prompts would change daily
TEMPLATE_HELP = ("variables of the chat template, key=value ...; enable_thinking is false unless given, and "
                 "thoughts are no part of an answer")
CUT = "\ufdd0"  # a Unicode noncharacter: cuts special tokens that appear in data into two harmless pieces
ANSWER = "mipo-answer"  # stands for an answer where only what the template writes around it matters
QUESTION = dict(role="user", content="question")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OF_CLASSES = {  # special tokens that transformers' classes have where their files name none
    "LlamaTokenizer": dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>"),
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
}
TOKENIZER_CONFIG = dict(
    tokenizer_class=optional(TEXT),
    legacy=optional(FLAG),
    add_prefix_space=optional(FLAG),
    added_tokens_decoder=optional(OBJECT),
)
OTHER_TOKENIZERS = ("tokenizer.model", "tekken.json", "vocab.json", "*.tiktoken")  # which we do not read

# What chat templates write around messages without its being a token, and the tokens of the common ones.
MARKS = re.compile(r"<\|[^<>|\s]+\|>|\[/?[A-Z]{2,}\]|<</?[A-Z]+>>")
KNOWN_MARKS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
               "<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>", "<|system|>", "<|user|>",
               "<|assistant|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<<SYS>>")


# ------------------------------------------------------------------------- thoughts

def without_thoughts(text: str, began: bool = False) -> str:
    """The answer in a response: what follows its thoughts, <think> ... </think>, where it begins with any.

    began: its prompt has opened them already. Thoughts that never end leave no answer, "".
    """
    while began or begins_with_thoughts(text):
        end = THOUGHTS_END.search(text)
        text = text[end.end() :].lstrip() if end else ""
        began = False
    return text


def begins_with_thoughts(text: str) -> bool:
    """Whether a response opens with a tag of thoughts. Sentences and headings, which people write too, open
    none: "[Analysis]", say."""
    tag = THOUGHTS_BEGIN.match(text.lstrip())
    return tag is not None and tag[0].lower().startswith(("<", "\u25c1", "[think"))


def is_thought_tag(token: str) -> bool:
    """Whether a token begins or ends thoughts."""
    return bool(THOUGHTS_BEGIN.fullmatch(token) or THOUGHTS_END.fullmatch(token))


# ------------------------------------------------------------------------- reading a folder

def read_tokenizer(folder: Path, config: dict, kind: str) -> tokenizers.Tokenizer:
    """tokenizer.json, with the tokens that stand in other files, and as transformers' class `kind` uses it.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        others = sorted(path.name for pattern in OTHER_TOKENIZERS for path in folder.glob(pattern))
        hint = f" (it has {others[0]}: save it with transformers' AutoTokenizer)" if others else ""
        raise UserError(f"{folder} has no tokenizer.json{hint}")
    refuse_pointer(file)
    with failing_as_a_line(file):
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        tokenizer.encode("x")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if kind == "LlamaTokenizer" and isinstance(tokenizer.model, tokenizers.models.BPE):
        use_sentencepiece_spaces(tokenizer, config)
    return tokenizer


@contextlib.contextmanager
def failing_as_a_line(file: Path) -> Iterator[None]:
    """Whatever the library finds wrong with a file is a UserError: it has no exception class for that, and
    where it panics it raises no Exception, and fills the error stream."""
    try:
        with silent_libraries():
            yield
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise UserError(f"{file} is not a tokenizer that can be used: {e}") from None


def use_sentencepiece_spaces(tokenizer: tokenizers.Tokenizer, config: dict) -> None:
    """Mark spaces as transformers' LlamaTokenizer does, whatever tokenizer.json says of them: a mark before
    the text ("legacy": before every part of it that follows a special token). Llama 3's bytes stay."""
    if "ByteLevel" in str(tokenizer.pre_tokenizer):
        return
    scheme = "always" if config.get("legacy", False) else "first"
    adds = config.get("add_prefix_space")
    adds = True if adds is None else adds
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", scheme if adds else "never", split=False)
    strip = [decoders.Strip(" ", 1, 0)] if adds else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def content_of(token, where: Path) -> str | None:
    """A token as files write it: a string, or an object with its "content"."""
    value = token.get("content") if isinstance(token, dict) else token
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {token!r} is not a token")
    return value


def named_tokens(folder: Path, config: dict, kind: str) -> dict[str, str]:
    """bos_token, eos_token and the like, as templates know them.

    They stand in tokenizer_config.json or, in older folders, in special_tokens_map.json.
    """
    where, values = folder / "tokenizer_config.json", OF_CLASSES.get(kind, {}) | config
    old = folder / "special_tokens_map.json"
    if old.exists() and "added_tokens_decoder" not in config:
        values |= read_object(old)
    tokens = {name: content_of(values.get(name), where) for name in NAMED_TOKENS}
    extra = values.get("extra_special_tokens")
    if isinstance(extra, dict):  # names of a model's own
        tokens |= {name: content_of(token, where) for name, token in extra.items()}
    return {name: token for name, token in tokens.items() if token}


def add_tokens(tokenizer: tokenizers.Tokenizer, folder: Path, config: dict, named: dict[str, str]) -> None:
    """Add the tokens that other files than tokenizer.json name, in the order of their ids, then `named` ones.

    A token that is there already keeps its id and takes over the flags; one that has a name is special.
    """
    flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
    old, listed = folder / "added_tokens.json", config.get("added_tokens_decoder")
    where = folder / "tokenizer_config.json" if listed is not None else old
    rows = listed or {}
    if listed is None and old.exists():
        rows = {str(id): dict(content=content) for content, id in read_object(old).items()}
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    try:
        ordered = [row for _, row in sorted((int(id), row) for id, row in rows.items())]
        for row in ordered:
            if listed is not None or row["content"] not in known:
                given = {name: row[name] for name in flags if name in row}
                known[row["content"]] = AddedToken(row["content"], **given)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{where}: its added tokens are not readable ({type(e).__name__}: {e})") from None
    for content in named.values():
        known.setdefault(content, AddedToken(content, special=True, normalized=False))
        known[content].special = True
    tokenizer.add_tokens(list(known.values()))


# ------------------------------------------------------------------------- the tokenizer

def template_variables(pairs: Sequence[str]) -> dict:
    """key=value ... -> the variables of a chat template. true, false, null, numbers and other JSON are read
    as such, anything else is a text."""
    variables = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier() or key in ("messages", "add_generation_prompt"):
            raise UserError(f"--template {pair}: not of the form key=value, such as enable_thinking=true")
        if text in ("True", "False"):  # as Python writes them: as a text even False would be a yes
            text = text.lower()
        try:
            variables[key] = parse_json(text)
        except ValueError:
            variables[key] = text
    return variables


class Tokenizer:
    """A Hugging Face tokenizer.json with the model's chat template and stop ids."""

    def __init__(self, folder: str | Path, date: str = TEMPLATE_DATE, template: Sequence[str] = ()):
        """folder: a model folder or hub id. date: ISO date that templates which print one are given.
        template: further variables of the template, "key=value" each; enable_thinking is false unless given.
        """
        self.folder = folder = find(folder)
        file = folder / "tokenizer_config.json"
        config = checked(read_object(file), TOKENIZER_CONFIG, str(file))
        kind = str(config.get("tokenizer_class")).removesuffix("Fast")  # transformers' class
        named = named_tokens(folder, config, kind)
        self.tokenizer = read_tokenizer(folder, config, kind)
        add_tokens(self.tokenizer, folder, config, named)
        self.added = {t.content: i for i, t in self.tokenizer.get_added_tokens_decoder().items()}
        self.vocab_size = self._vocab_size()
        # Sentencepiece puts a space mark before what it is given, also before text that continues another.
        self.marks_spaces = "".join(self.tokenizer.encode("x", add_special_tokens=False).tokens) != "x"

        self.template = ChatTemplate(template_source(folder, config), folder)
        read = self.template.names
        try:
            day = datetime.date.fromisoformat(date)
        except ValueError:
            raise UserError(f"date {date!r} is not of the form 2024-07-26") from None
        given = template_variables(template)
        for key in given.keys() - read:
            nearest = difflib.get_close_matches(key, read, n=1)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise UserError(f"--template {key}: the chat template of {folder} has no such variable{hint}")
        thinking = dict(enable_thinking=False) if "enable_thinking" in read else {}
        # What a template is not given is undefined in it, and rendered as nothing.
        self.variables = dict(tools=None, documents=None, date_string=day.strftime("%d %b %Y"),
                              strftime_now=day.strftime) | named | thinking | given

        self.opening, self.ending = self._around_answer([QUESTION])
        self.end_token = self._end_of_turn()
        self.stop_ids = self._stop_ids()
        prompt = self.render([QUESTION]).rstrip()
        self.thoughts_began = any(tag.end() == len(prompt) for tag in THOUGHTS_BEGIN.finditer(prompt))
        special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        special |= {self.added[token] for token in named.values()} | (self.stop_ids & {*self.added.values()})
        # Thoughts are shown with their tags, and some folders name a mere word, "!", as the padding token.
        words = {i for token, i in self.added.items() if is_thought_tag(token) or len(token) == 1}
        self.hidden = special - words  # what no text shows
        # What data must not spell: hidden tokens and those that the template writes. Other added tokens are
        # words, as in transformers.
        protected = self.hidden | (self._written_ids() - words)
        self.special_ids = {token: i for token, i in self.added.items() if i in protected}

    # --------------------------------------------------------------------- text to ids

    def render(self, messages: list[dict], prompt: bool = True) -> str:
        """Messages ({"role", "content"}) as the template writes them; prompt: open the assistant's turn."""
        return self.template.render(messages, dict(add_generation_prompt=prompt) | self.variables)

    def chat(self, user: str, system: str | None = None) -> list[int]:
        """One user turn (and system prompt) -> prompt ids, ready for the assistant's answer.

        Special tokens come from the template alone: a literal "<|im_end|>" in the text is cut after its first
        character before rendering and the pieces are encoded apart, so that it stays text.
        """
        return self._encode_rendered(self.render(self._messages(user, system)))

    def response(self, text: str, user: str = "question", system: str | None = None) -> list[int]:
        """A response given as text (not sampled) -> ids, the end token included: those that the whole
        conversation, as the template writes it, has after the prompt.

        Where a token would reach across the end of the prompt, which sampling never does, the response is
        encoded on its own. UserError where the template does not write the response after that prompt.
        """
        messages = self._messages(user, system)
        answer = dict(role="assistant", content=self._harmless(text))
        prompt, whole = self.render(messages), self.render([*messages, answer], prompt=False)
        if whole.startswith(prompt):
            rest = whole[len(prompt) :]
        elif self.thoughts_began:  # templates leave the thoughts of answers out; sampled responses have them
            if not without_thoughts(text, began=True):
                raise UserError(f"the chat template of {self.folder} opens thoughts, and a given response "
                                f"does not close them (thoughts</think> answer): {text[:60]!r}")
            rest = self._harmless(text) + self.ending
        else:  # the prompt has more than the conversation: an empty block of thoughts, say
            opening, _ = self._around_answer(messages)
            if not whole.startswith(opening):
                raise UserError(f"the chat template of {self.folder} does not write this response after its "
                                f"prompt (thoughts need --template enable_thinking=true): {text[:60]!r}")
            rest = whole[len(opening) :]
        prompt_ids, ids = self._encode_rendered(prompt), self._encode_rendered(prompt + rest)
        start = len(prompt_ids)
        ids = ids[start:] if ids[:start] == prompt_ids else self.encode_rest(rest)
        return ids[: ids.index(self.end_token) + 1]

    def encode(self, text: str) -> list[int]:
        """A text from data, as it stands in the middle of a conversation, -> ids."""
        return self.encode_rest(self._harmless(text))

    def encode_rest(self, text: str) -> list[int]:
        """The ids of a rendered text that continues another one."""
        return [id for piece in text.split(CUT) for id in self._encode_piece(piece, continues=True)]

    def _encode_rendered(self, text: str) -> list[int]:
        """The ids of a text with its special tokens, in which CUT stands where no token may reach across."""
        first, *others = text.split(CUT)
        ids = self._encode_piece(first, continues=False)
        return ids + [id for piece in others for id in self._encode_piece(piece, continues=True)]

    def _encode_piece(self, text: str, continues: bool) -> list[int]:
        """The ids of a text without CUT. continues: it follows other text and gets no leading space mark: it
        is encoded after a newline, or a colon, whose ids are then cut off."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        for before in ("\n", ":") if continues and self.marks_spaces and text else ():
            start = self.tokenizer.encode(before, add_special_tokens=False).ids
            whole = self.tokenizer.encode(before + text, add_special_tokens=False).ids
            if whole[: len(start)] == start:
                ids = whole[len(start) :]
                break
        if self.vocab_size and max(ids, default=0) >= self.vocab_size:
            token = self.tokenizer.id_to_token(max(ids))
            raise UserError(f"{self.folder}: the token {token!r} has the id {max(ids)}, and the model's "
                            f"vocabulary ends at {self.vocab_size - 1}")
        return ids

    def _messages(self, user: str, system: str | None) -> list[dict]:
        """The messages of a prompt, in which no text can be taken for a special token."""
        messages = [dict(role="user", content=self._harmless(user))]
        if system is None:
            return messages
        if system.strip() and not self.takes_system:
            raise UserError(f"the chat template of {self.folder} writes no system prompt: put it into the "
                            "users' messages, or leave it out")
        return [dict(role="system", content=self._harmless(system)), *messages]

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether the template writes a system prompt; some pass over it in silence."""
        return ANSWER in self.render([dict(role="system", content=ANSWER), QUESTION])

    def _harmless(self, text: str) -> str:
        """Text from data with every special token in it cut in two, and without lone surrogates."""
        text = text.replace(CUT, "").encode("utf-8", "replace").decode()
        for name in sorted(self.special_ids, key=len, reverse=True):
            while name in text:  # again: occurrences may overlap
                text = text.replace(name, name[0] + CUT + name[1:])
        if self.is_slippery:
            found = set(self.encode_rest(text)) & set(self.special_ids.values())
            if found:
                token = self.tokenizer.id_to_token(min(found))
                raise UserError(f"a text of the data would be read as the special token {token!r}, and can't "
                                f"be told from it: {text[:60]!r}")
        return text

    @functools.cached_property
    def is_slippery(self) -> bool:
        """Whether a text may become a special token that it does not spell, because it is normalised first.
        """
        protected = [self.tokenizer.get_added_tokens_decoder()[id] for id in self.special_ids.values()]
        return self.tokenizer.normalizer is not None and any(token.normalized for token in protected)

    # --------------------------------------------------------------------- ids to text

    def decode(self, ids: list[int]) -> str:
        """Ids -> text for people: without special tokens, and without the one that ends a response, whatever
        its flags."""
        body = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        shown = [id for id in body if id not in self.hidden]
        return self.tokenizer.decode(shown, skip_special_tokens=False)

    def answer(self, ids: list[int]) -> str:
        """A response's ids -> what checks, judges and measures read: its text without its thoughts."""
        return without_thoughts(self.decode(ids), self.thoughts_began)

    def show(self, ids: list[int]) -> str:
        r"""Ids as text with the special tokens in it. Letters that only look like one have a backslash before
        them: <|end|> is the token, \<|end|> is text."""
        names = {id: name for name, id in self.added.items()}
        look_alike = re.compile("|".join(re.escape(name) for name in self.special_ids))
        text = ""
        for is_token, run in itertools.groupby(ids, names.__contains__):
            if is_token:
                text += "".join(names[id] for id in run)
            else:
                piece = self.tokenizer.decode(list(run), skip_special_tokens=False)
                text += look_alike.sub(lambda found: "\\" + found[0], piece)
        return text

    def template_mark(self, text: str) -> str | None:
        """What a text holds that a chat template writes, this one or another well-known one; None for
        nothing. Such a text may carry a template already."""
        return next((mark for mark in self.template_marks if mark in text), None)

    @functools.cached_property
    def template_marks(self) -> list[str]:
        """This tokenizer's special tokens, what looks like one in its template, and those of other models."""
        own = [*self.special_ids, *MARKS.findall(self.opening + self.ending)]
        return [mark for mark in dict.fromkeys([*own, *KNOWN_MARKS]) if len(mark) > 1]

    # --------------------------------------------------------------------- what a folder says

    def _around_answer(self, messages: list[dict]) -> tuple[str, str]:
        """What the template writes before and after the assistant's answer to these messages."""
        answer = dict(role="assistant", content=ANSWER)
        opening, found, ending = self.render([*messages, answer], prompt=False).rpartition(ANSWER)
        if not found:
            raise UserError(f"the chat template of {self.folder} does not write what the assistant says")
        return opening, ending

    def _end_of_turn(self) -> int:
        """The id that ends an assistant's turn: the first token after its content, past blanks."""
        for id in self.encode_rest(self.ending):
            if id in self.added.values():
                return id
            if self.tokenizer.decode([id], skip_special_tokens=False).strip("\u2581 \n\t\r"):
                break
        raise UserError(f"the chat template of {self.folder} ends an answer without a special token")

    def _written_ids(self) -> set[int]:
        """The ids that the template writes of itself around a system prompt, a question and an answer."""
        system = [dict(role="system", content="system")] if self._renders_system() else []
        text = self.render([*system, QUESTION]) + self.opening + self.ending
        return set(self.encode_rest(text))

    def _renders_system(self) -> bool:
        """Whether the template writes a system prompt; False where it passes over one or refuses it."""
        try:
            return self.takes_system
        except UserError:
            return False

    def _vocab_size(self) -> int | None:
        """How many tokens the model knows, from config.json; None where that is not there or does not say."""
        file = self.folder / "config.json"
        size = read_object(file).get("vocab_size") if file.exists() else None
        return size if type(size) is int and size > 0 else None

    def _stop_ids(self) -> frozenset[int]:
        """All of generation_config.json's (else config.json's) eos ids and the end-of-turn token."""
        for name in ("generation_config.json", "config.json"):
            file = self.folder / name
            eos = read_object(file).get("eos_token_id") if file.exists() else None
            if eos is None:
                continue
            ids = eos if isinstance(eos, list) else [eos]
            if not TOKEN_IDS.holds(ids):
                raise UserError(f"{file}: eos_token_id {eos!r} is not a token's id, nor a list of such")
            return frozenset([self.end_token, *ids])
        return frozenset([self.end_token])
