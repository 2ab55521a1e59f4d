"""formats.py - a user's own file: its rows in this project's columns, whichever format they are in.

A file holds JSON objects, one a line or all in one array. Rows with this project's columns (COLUMNS) are
taken as they are. Preference data of the common trainers are known by their columns, and read where they hold
one question and two answers:

    prompt, chosen, rejected as conversations      TRL, OpenRLHF; a prompt as text beside them: UltraFeedback
    chosen, rejected as whole conversations        TRL's implicit prompts; as one text each: HH
    conversations / messages, chosen, rejected     ShareGPT (LLaMA-Factory), Axolotl
    instruction / question / input, chosen, ...    Alpaca, Orca, distilabel, Argilla
    input, preferred_output, ...                   OpenAI
    prompt, response_0, response_1, ...            PKU-SafeRLHF

A system turn becomes the column `system`. Rows with more turns are dropped, counted and named; what is no
preference data is refused with what it is and what to do. The paper does not speak of files.

    python -m pytest tests/test_formats.py
"""

import codecs
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path

from console import first_of, one_line, shown
from run import UserError, parse_json, read_bytes, read_jsonl

COLUMNS = dict(prompt=str, context=(str, list), reference=str, answer=str, user=str, id=str, split=str,
               chosen=str, rejected=str, system=str)

Turn = tuple[str, str]  # a role (user, assistant or system) and what it says


class Dropped(Exception):
    """A row of a known format that cannot be used; its text says why."""


# ------------------------------------------------------------------------- the file

@dataclass
class OwnFile:
    """The rows of a user's file in this project's columns, and what the user should know of the others."""

    rows: list[tuple[int, str, dict]]  # (line, or place in an array; where that is, for messages; columns)
    formats: set[str] = field(default_factory=set)  # other than this project's own
    unused: set[str] = field(default_factory=set)  # columns
    dropped: dict[str, list[int]] = field(default_factory=dict)  # why -> which lines

    def remarks(self, path: Path) -> list[str]:
        """What the user should know, a line each."""
        lines = [f"{path}: read as {', '.join(sorted(self.formats))}"] if self.formats else []
        count = len(self.rows) + sum(map(len, self.dropped.values()))
        for reason, places in self.dropped.items():
            lines.append(f"{path}: {len(places)} of {count} rows dropped: {reason} ({first_of(places)})")
        if self.unused:
            lines.append(f"{path}: columns not used: {', '.join(sorted(self.unused))}")
        return [one_line(line) for line in lines]


def read_own_file(path: Path) -> OwnFile:
    """All rows of a file. A mistake in it is a UserError with file and line."""
    file = OwnFile([])
    for number, where, row in read_objects(path):
        row = {column: value for column, value in row.items() if value is not None}
        try:
            name, used, row = to_own_columns(row, where)
        except Dropped as reason:
            file.dropped.setdefault(str(reason), []).append(number)
            continue
        file.unused |= unused_columns(row, where) - used
        if name:
            file.formats.add(name)
        else:
            refuse_unreadable(row, where)
        file.rows.append((number, where, checked_columns(row, where)))
    if file.dropped and not file.rows:
        raise UserError(f"{path}: no row can be used: {'; '.join(file.dropped)}. A row takes one question, "
                        "one chosen and one rejected answer")
    return file


def read_objects(path: Path) -> list[tuple[int, str, dict]]:
    """(number, where, object) of every row: of a .jsonl file its line, of a JSON array its place."""
    text = read_bytes(path).removeprefix(codecs.BOM_UTF8).strip()
    if text[:1] != b"[":
        return [(line, f"{path}:{line}", row) for line, row in read_jsonl(path)]
    try:
        value = parse_json(text)
    except ValueError as e:
        raise UserError(f"{path} begins as a JSON array and is not one: {e}") from None
    for number, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number}: not a JSON object but {type(row).__name__}")
    return [(number, f"{path}: row {number}", row) for number, row in enumerate(value, 1)]


# ------------------------------------------------------------------------- which format

# Where other formats have the prompt, the chosen and the rejected response. A column "prompt" comes first.
FORMATS = {
    "OpenAI's preference data": ("input", "preferred_output", "non_preferred_output"),
    "Argilla's preference data": ("instruction", "chosen_response", "rejected_response"),
    "Alpaca's preference data": ("instruction", "chosen", "rejected"),
    "ShareGPT's preference data": ("conversations", "chosen", "rejected"),
    "Axolotl's preference data": ("messages", "chosen", "rejected"),
    "Orca's preference data": ("question", "chosen", "rejected"),
    "distilabel's preference data": ("input", "chosen", "rejected"),
}
OWN = ("prompt", "chosen", "rejected")
SAFE_RLHF = {"prompt", "response_0", "response_1", "better_response_id"}

# What cannot be read as pairs: the columns that tell, what they are, what to do.
UNREADABLE = (
    ({"prompt", "completion", "label"}, "TRL's unpaired preference data (KTO)",
     "pairs need a chosen and a rejected response to the same prompt"),
    ({"prompt", "completion"}, "prompts with completions (SFT)",
     "name 'completion' 'chosen' for --method sft"),
    ({"instruction", "completions"}, "UltraFeedback with all completions",
     "take its binarized form, with chosen and rejected"),
    ({"instruction", "output"}, "Alpaca's instructions",
     "name 'instruction' 'prompt', and 'output' 'chosen' for --method sft"),
    ({"prompt", "answers"}, "ranked answers (Nectar)",
     "make the best answer 'chosen' and another 'rejected'"),
    ({"history", "human_ref_A", "human_ref_B"}, "Stanford's human preferences (SHP)",
     "name 'history' 'prompt', and of the two answers the one that 'labels' prefers 'chosen'"),
    ({"context", "response1", "response2"}, "HelpSteer's preference data",
     "make the last question 'prompt', and the two responses 'chosen' and 'rejected'"),
    ({"conversation_a", "conversation_b"}, "battles of the chatbot arena",
     "make the question 'prompt', and the winner's and the loser's answers 'chosen' and 'rejected'"),
    ({"messages"}, "conversations without a rejected answer",
     "give 'prompt', and 'chosen' for --method sft"),
    ({"conversations"}, "ShareGPT's conversations without a rejected answer",
     "give 'prompt', and 'chosen' for --method sft"),
    ({"chosen", "rejected"}, "preference data whose prompt is not told apart",
     "give it as a column 'prompt' of its own"),
    ({"text"}, "plain text", "give what a user asks as 'prompt'"),
)


def to_own_columns(row: dict, where: str) -> tuple[str, set[str], dict]:
    """(name of the row's format, its columns that were read, the row in this project's columns).

    The name is "" for the project's own format. Raises Dropped where the row holds more than it should.
    """
    name, places = recognise(row)
    if not name:
        return "", set(), row
    read, used = turns_of(row, places, where), {*places, "history"}  # a history drops the row
    if "instruction" in places:
        used.add("input")
    if "response_0" in places:
        used |= SAFE_RLHF
    rest = {column: value for column, value in row.items() if column not in places}
    if row.get("history"):
        raise Dropped(SEVERAL_TURNS)
    columns = rest | one_turn(*read, row.get("system"))
    return name, used, {column: value for column, value in columns.items() if value is not None}


def recognise(row: dict) -> tuple[str, tuple[str, str, str]]:
    """The format's name, "" for the project's own; and the columns of prompt, chosen and rejected."""
    prompt, chosen = row.get("prompt"), row.get("chosen")
    if row.keys() >= SAFE_RLHF and row["better_response_id"] in (0, 1) and "chosen" not in row:
        better = int(row["better_response_id"])
        return "PKU-SafeRLHF's preference data", ("prompt", f"response_{better}", f"response_{1 - better}")
    if is_conversation(prompt):
        return "TRL's conversational data", OWN
    if prompt is not None:
        if is_conversation(chosen) or is_conversation(row.get("rejected")):
            return "preference data with whole conversations (UltraFeedback)", OWN
        is_hh = isinstance(prompt, str) and HH_PROMPT.match(prompt)
        return ("HH's preference data" if is_hh else ""), OWN
    for name, places in FORMATS.items():
        if row.keys() >= set(places):
            return name, places
    if is_conversation(chosen) and is_conversation(row.get("rejected")):
        return "TRL's preference data with implicit prompts", OWN
    if isinstance(chosen, str) and HH.match(chosen):
        return "HH's preference data", OWN
    return "", OWN


def is_conversation(value) -> bool:
    """Whether a value is one message, or a list of them: objects with a role and what it says."""
    messages = value if isinstance(value, list) else [value]
    return bool(messages) and all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in messages)


def refuse_unreadable(row: dict, where: str) -> None:
    """UserError for data that are known, but hold no pairs. What has contexts or pairs of its own may have
    any other columns beside them."""
    is_ours = isinstance(row.get("prompt"), str) and {"context", "chosen"} & row.keys()
    for columns, name, advice in UNREADABLE:
        if row.keys() >= columns and not is_ours:
            alone = ", or remove the other columns to use the prompts alone" if "prompt" in row else ""
            raise UserError(f"{where}: these are {name}, which are not read: {advice}{alone}")


# ------------------------------------------------------------------------- conversations

SEVERAL_TURNS = "more than one question and one answer"
ROLES = dict(user="user", human="user", prompter="user", assistant="assistant", gpt="assistant",
             model="assistant", bot="assistant", system="system", developer="system")
HH = re.compile(r"\s*Human:(?s:.*)\n\nAssistant:")
HH_PROMPT = re.compile(r"\s*Human:(?s:.*)\n\nAssistant:\s*$")


def turns_of(row: dict, places: tuple[str, str, str], where: str) -> tuple[list[Turn], ...]:
    """The turns of prompt, chosen and rejected; none where a row has no such column."""
    result = []
    for column, role in zip(places, ("user", "assistant", "assistant"), strict=True):
        value = row.get(column)
        if column == "instruction" and row.get("input"):
            value = f"{value}\n{row['input']}"
        result.append([] if value is None else turns(value, role, f"{where}: column {column!r}"))
    return tuple(result)


def turns(value, role: str, where: str) -> list[Turn]:
    """The turns of a text (of this role, or HH's), of a message or of a list of messages."""
    if isinstance(value, str):
        if not HH.match(value):
            return [(role, value)]
        _, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", value.strip())
        found = [(ROLES.get(who.lower(), who), text.strip())
                 for who, text in zip(parts[::2], parts[1::2], strict=True)]
        return found if found[-1][1] or role == "assistant" else found[:-1]  # a prompt ends in "Assistant:"
    if isinstance(value, dict) and "messages" in value:
        value = value["messages"]
    messages = value if isinstance(value, list) else [value]
    if not is_conversation(messages):
        raise UserError(f"{where} holds {type(value).__name__}, neither text nor messages with a role")
    return [turn_of(message, where) for message in messages]


def turn_of(message: dict, where: str) -> Turn:
    """A message in the manner of OpenAI (role, content) or of ShareGPT (from, value)."""
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise Dropped(f"a turn of {shown(role)}")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise Dropped("something else than text in a turn")
        content = "\n".join(part["text"] for part in content)
    if content is None:
        raise Dropped("something else than text in a turn")
    if not isinstance(content, str):
        raise UserError(f"{where}: a turn holds {type(content).__name__}, not text")
    return ROLES[role], content


def one_turn(prompt: list[Turn], chosen: list[Turn], rejected: list[Turn], system: str | None) -> dict:
    """prompt, chosen, rejected and system of a row that holds one question; Dropped where it holds more."""
    questions = [one_question(prompt)] if prompt else []
    answers = {}
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            continue
        *before, (role, text) = prompt + answer if answer[0][0] == "assistant" else answer
        if role != "assistant":
            raise Dropped("an answer that does not end with the assistant")
        questions.append(one_question(before))
        answers[name] = text
    prompts = {question["prompt"].strip() for question in questions}
    systems = {question.get("system") for question in questions[-len(answers):]}
    if len(prompts) > 1 or len(systems) > 1:
        raise Dropped("chosen and rejected answer different prompts")
    return dict(system=system) | questions[0] | questions[-1] | answers


def one_question(question: list[Turn]) -> dict:
    """prompt, and system where there is one, of a system turn (or none) and a user's; else Dropped."""
    columns = {}
    if question and question[0][0] == "system":
        columns["system"], question = question[0][1], question[1:]
    if [role for role, _ in question] != ["user"]:
        raise Dropped(SEVERAL_TURNS)
    return columns | dict(prompt=question[0][1])


# ------------------------------------------------------------------------- this project's columns

# Where a row lacks a column that decides what is done, and has one of nearly this name, that is a mistake.
# Others are only named: "idx" need not be a misspelt "id", nor "preference" a "reference".
SYNONYMS = dict(preference="context", preferences="context", persona="context", profile="context")


def unused_columns(row: dict, where: str) -> set[str]:
    """Columns that an Example does not have, with a hint where one may be a context under another name.

    UserError where one looks like a misspelling of a column that the row needs and lacks.
    """
    unused = row.keys() - COLUMNS.keys()
    needed = ["prompt", "split", *(["context"] if "chosen" not in row else ["rejected"]),
              *(["chosen"] if "rejected" in row else [])]
    missing = [column for column in needed if column not in row]
    for column in sorted(unused):
        cutoff = 0.88 if "prompt" in row else 0.75
        nearest = difflib.get_close_matches(column.lower(), missing, n=1, cutoff=cutoff)
        if nearest:
            raise UserError(f"{where}: unknown column {column!r} (did you mean {nearest[0]!r}?)")
    hints = {column: SYNONYMS[column] for column in unused & SYNONYMS.keys()
             if SYNONYMS[column] in missing and isinstance(row[column], COLUMNS[SYNONYMS[column]])}
    return {f"{column} (did you mean {hints[column]!r}?)" if column in hints else column for column in unused}


def checked_columns(row: dict, where: str) -> dict:
    """The columns of a row that an Example has, each of the right type; UserError if they are not.

    A blank context or system prompt is none.
    """
    columns = {column: value for column, value in row.items() if column in COLUMNS}
    for column, value in columns.items():
        if column in ("id", "answer", "user") and isinstance(value, int | float):
            columns[column] = str(value)
        elif not isinstance(value, COLUMNS[column]):
            raise UserError(f"{where}: column {column!r} holds {type(value).__name__}, not text")
    if isinstance(columns.get("context"), list):
        if not all(isinstance(item, str) for item in columns["context"]):
            raise UserError(f"{where}: column 'context' is a list, but not of texts only")
        columns["items"] = [item for item in columns["context"] if item.strip()]
        columns["context"] = " ".join(columns["items"])
    if not columns.get("context", "").strip():
        columns.pop("context", None)
        columns.pop("items", None)
    if not columns.get("system", "").strip():
        columns.pop("system", None)
    if not columns.get("prompt", "").strip():
        raise UserError(f"{where}: no 'prompt' (the columns here are {', '.join(row) or 'none'})")
    if "rejected" in columns and "chosen" not in columns:
        raise UserError(f"{where}: ready pairs need 'chosen' too, not 'rejected' alone")
    return columns
