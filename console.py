"""console.py - what is printed: streams that end no run, and values and messages of a sane length.

What differs from the paper: nothing; it does not speak of terminals.

    python -m doctest console.py       runs the example below
"""

import contextlib
import os
import reprlib
import sys
import typing
from collections.abc import Iterator


class Output:
    """A standard stream that ends no run: what its encoding lacks is escaped, and where nobody reads any
    longer (`| head`) or there is no such stream (`2>&-`), what is written goes nowhere."""

    def __init__(self, stream: typing.TextIO | None):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 - until the process ends

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except UnicodeEncodeError as e:
            self.stream.write(text.encode(e.encoding, "backslashreplace").decode(e.encoding))
        except BrokenPipeError:
            self.close_pipe()
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.close_pipe()

    def close_pipe(self) -> None:
        """Let the stream write to nowhere, what it still holds too."""
        send_nowhere(self.stream.fileno())


def send_nowhere(descriptor: int) -> None:
    """Let what is written to a file descriptor go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextlib.contextmanager
def silent_libraries() -> Iterator[None]:
    """Inside, nothing reaches the error stream but what Python raises: libraries in other languages write
    there themselves as they fail."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no such stream
        yield
        return
    try:
        sys.stderr.flush()
        send_nowhere(2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 60
MAX_LINE = 1000


def shown(value) -> str:
    """A value for a message, cut short where it is long or deep."""
    return SHORT.repr(value)


def first_of(places: list) -> str:
    """The first three of some rows, for a message."""
    return "first: " + ", ".join(map(str, places[:3])) + (", ..." if len(places) > 3 else "")


def one_line(text: str) -> str:
    """A message as one line of a sane length: what files and servers say in it may hold anything, and moves
    no cursor.

    >>> one_line("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    if len(text) > MAX_LINE:
        text = f"{text[: MAX_LINE // 2]} ... {text[-MAX_LINE // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
