"""chat_template.py - a model's chat template: somebody else's program, run in a sandbox and within limits.

Templates come with the model's folder, in jinja, and write messages as the model was trained to read them.
They are set up as transformers sets them up. What they must not do: reach anything but their own variables
(jinja's sandbox), take more than SECONDS or MEMORY, or write more than WRITTEN characters beside eight times
what they were given. Time is bounded by an alarm, memory by the limit of the process while a template runs,
so that it does not matter by which of many tricks they are wasted.

What differs from the paper: nothing; it does not describe its templates.

    python -m pytest tests/test_security.py -k template
"""

import contextlib
import json
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from folder import refuse_pointer
from run import UserError, read_bytes

SECONDS = 10  # for one rendering, which takes a thousandth of one
MEMORY = 2**30  # bytes beyond what the process has when it begins
WRITTEN = 10**6  # characters


# ------------------------------------------------------------------------- the template

class ChatTemplate:
    """A compiled chat template. names: the variables that it reads. UserError where it is not valid jinja."""

    def __init__(self, source: str, folder: Path):
        self.folder = folder
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols", Generation])
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = self.refuse
        with self.failing_as("is not valid jinja"):  # constants are computed here, however large they get
            found = environment.parse(source).find_all(jinja2.nodes.Name)
            self.names = {name.name for name in found if name.ctx == "load"}
            self.template = environment.from_string(source)

    def render(self, messages: list[dict], variables: dict) -> str:
        """Messages ({"role", "content"}) as the template writes them; UserError where it fails."""
        with self.failing_as("fails"):
            text = self.template.render(messages=messages, **variables)
        given = sum(len(message["content"]) for message in messages)
        if len(text) > WRITTEN + 8 * given:
            raise UserError(f"the chat template of {self.folder} writes {len(text)} characters around "
                            f"messages of {given}: take another model, or mend its template")
        return text

    def refuse(self, message: str) -> None:
        """Templates call it as raise_exception."""
        raise UserError(f"the chat template of {self.folder} refuses these messages: {message}")

    @contextlib.contextmanager
    def failing_as(self, verb: str) -> Iterator[None]:
        """Whatever goes wrong inside is a UserError that says so: a program of somebody else's may fail in
        any way."""
        try:
            with limits(SECONDS, MEMORY):
                yield
            return
        except UserError:
            raise
        except OutOfTime:
            reason = f"it takes more than {SECONDS} seconds"
        except MemoryError:
            reason = f"it takes more than {MEMORY:,} bytes"
        except Exception as e:
            reason = f"{type(e).__name__}: {e}"
        raise UserError(f"the chat template of {self.folder} {verb}: {reason}")


def template_source(folder: Path, config: dict) -> str:
    """chat_template.jinja, else the chat_template of tokenizer_config.json: one, or the one called default.
    """
    path, source = folder / "chat_template.jinja", config.get("chat_template")
    if path.exists():
        data = read_bytes(path)
        refuse_pointer(path)
        try:
            source = data.decode()
        except UnicodeDecodeError as e:
            raise UserError(f"{path} is not text in UTF-8: {e}") from None
    elif isinstance(source, list):  # several named templates
        named = [t for t in source if isinstance(t, dict) and t.get("name") == "default"]
        source = named[0].get("template") if named else None
    if not source or not isinstance(source, str):
        raise UserError(f"{folder} has no chat template: MIPO needs an instruct model")
    return source


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}: training templates mark the assistant's text so. What is
    inside is written unchanged."""

    tags = {"generation"}  # noqa: RUF012 - as jinja has it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """The tojson of chat templates, which unlike jinja's leaves < and > as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


# ------------------------------------------------------------------------- limits

class OutOfTime(BaseException):
    """Not an Exception, because jinja swallows every Exception that it meets while it computes constants."""


@contextlib.contextmanager
def limits(seconds: float, memory: int) -> Iterator[None]:
    """OutOfTime after `seconds` of processor time (wall time would refuse good templates on a busy machine),
    MemoryError if the process grows by more than `memory` bytes.

    Only the main thread receives alarms, and only Linux reports a process's size: elsewhere only the other
    limit holds.
    """
    def ring(number: int, frame) -> None:
        raise OutOfTime

    is_main = threading.current_thread() is threading.main_thread()
    allowed = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if is_main:
            before = signal.signal(signal.SIGPROF, ring)
            signal.setitimer(signal.ITIMER_PROF, seconds)
        if size := address_space():
            resource.setrlimit(resource.RLIMIT_AS, (least(allowed[0], size + memory), allowed[1]))
        yield
    finally:
        if is_main:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, allowed)


def address_space() -> int:
    """Bytes of this process's addresses; 0 where that is not to be had."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()


def least(limit: int, wanted: int) -> int:
    """The smaller of two limits of a process, of which the first may be none."""
    return wanted if limit == resource.RLIM_INFINITY else min(limit, wanted)
