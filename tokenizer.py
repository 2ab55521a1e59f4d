"""tokenizer.py - text to token ids, and back, by the model's own tokenizer and chat template.

`Tokenizer.chat` is the only way from what a user says to prompt ids. Whatever data or users write stays text:
no special token of more than one character can be smuggled in. Of generation_config.json only the ids that
stop a response are taken. What differs from the paper: nothing; it does not describe its templates.

    python sample.py --model DIR "What is inflation?"      renders a message and samples an answer
"""

import datetime
import functools
import json
from pathlib import Path

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model import find
from run import UserError, read_json

TEMPLATE_DATE = "2024-07-26"  # Llama 3's templates print the date: pinned, or prompts would change daily
CUT = "\ufdd0"  # a Unicode noncharacter: cuts special tokens that appear in data into two harmless pieces


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
        self.special_ids = {str(t.content): i for i, t in self.tokenizer.get_added_tokens_decoder().items()}
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

        def raise_exception(message: str):  # templates call it
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
        return self._encode_rendered(self.render(messages))

    def response(self, text: str) -> list[int]:
        """A response given as text (not sampled) -> ids, the end token included."""
        return [*self.encode(text), self.end_token]

    def encode(self, text: str) -> list[int]:
        """A text from data, as it stands, -> ids."""
        return self._encode_rendered(self._harmless(text))

    def decode(self, ids: list[int]) -> str:
        """Ids -> text for people, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _encode_rendered(self, text: str) -> list[int]:
        """The ids of a text with its special tokens, in which CUT stands where no token may reach across."""
        ids = []
        for piece in text.split(CUT):
            ids += self.tokenizer.encode(piece, add_special_tokens=False).ids
        return ids

    def _harmless(self, text: str) -> str:
        """Text from data with every special token in it cut in two, and without lone surrogates."""
        text = text.replace(CUT, "").encode("utf-8", "replace").decode()
        for name in sorted(self.special_ids, key=len, reverse=True):
            while len(name) > 1 and name in text:  # again: occurrences may overlap
                text = text.replace(name, name[0] + CUT + name[1:])
        return text

    def _end_of_turn(self) -> int:
        """The id that ends an assistant's turn: what the template writes straight after its content."""
        mark = "mipo-answer"
        messages = [dict(role="user", content="question"), dict(role="assistant", content=mark)]
        rest = self.render(messages, prompt=False).split(mark)[-1]
        ids = self._encode_rendered(rest)
        if not ids or ids[0] not in self.special_ids.values():
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
