"""run_folder.py - a run's folder: its name, its arguments, what may be trained there and from where.

    RUN/args.json       the arguments, and what must be the same for the run to go on
    RUN/checkpoints/    see checkpoint.py

Functions take the run's arguments, train.Args, or the grid of them where options were given several values.
What differs from the paper: nothing; it does not say.

    python train.py --out RUN          begins, python train.py --out RUN --resume goes on
"""

import dataclasses
import json
import shutil
from pathlib import Path

from torch import Tensor

from checkpoint import Checkpoints, refuse_changes
from contexts import limited
from data import OWN_FILES, load_all_splits, name_and_folder, user_message
from figures import learning_curve
from folder import read_config
from losses import OBJECTIVES
from negatives import Pair
from pairs import load_pairs, read_meta
from rows import fitting_pairs
from run import UserError, broadcast, environment, fingerprint, rank, read_json, world, write_json
from schema import OBJECT, checked, record
from tokenizer import Tokenizer

BEGUN = dict(resuming=record(dict(arguments=OBJECT, machine=OBJECT)))  # what is read of args.json


def run_folder(grid: list) -> Path:
    """--out, or runs/ and a name made of the arguments. A folder that already holds a run is refused."""
    args = grid[0]
    given = [resuming([candidate])["arguments"] for candidate in grid]
    parts = Path(args.data.partition(":")[0]).stem, args.neg, Path(args.model).name, fingerprint(given)[:6]
    folder = Path(args.out) if args.out else Path("runs") / "-".join(parts)
    refuse_occupied(folder, args)
    return folder


def refuse_occupied(folder: Path, args) -> None:
    """UserError where the folder holds a run that is not to be resumed."""
    if (folder / "summary.json").exists() and not args.resume:
        raise UserError(f"{folder} already holds a run: name another --out, or remove it")
    if (folder / "metrics.jsonl").exists() and not args.resume:
        raise UserError(f"{folder} holds a run that was interrupted: go on with --resume, or remove it")


def is_finished(grid: list, folder: Path) -> bool:
    """Whether the run that is to be resumed is whole; UserError where it is a run of other arguments."""
    if not broadcast((folder / "summary.json").exists()):  # as process 0 sees the disk
        return False
    now = resuming(grid)["arguments"]
    before = begun_with(folder)["arguments"] | dict(test=now["test"])  # evaluation may follow
    refuse_changes(dict(arguments=before, machine={}), dict(arguments=now), may_differ=False)
    return True


def check_space(folder: Path, size: int) -> None:
    """UserError where the disk has no room for a trained model of so many bytes."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise UserError(f"{folder}: a trained model takes {size / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are "
                        "free")


def with_settings_of_pairs(grid: list) -> list:
    """With --pairs, the arguments that made them: eval.py goes by args.json, and another seed, say, would
    give it another split."""
    if not grid[0].pairs:
        return grid
    settings = read_meta(Path(grid[0].pairs))["settings"]
    if settings.get("split", "train") != "train":
        raise UserError(f"--pairs {grid[0].pairs} were made of the {settings['split']} part, which a model "
                        "must not be trained on: make pairs with --split train")
    names = ("data", "contexts", "neg", "n_neg", "seed", "date", "system")
    known = {name: settings[name] for name in names if name in settings} | (settings.get("sampling") or {})
    known["template"] = tuple(settings.get("template") or ())
    return [dataclasses.replace(args, **known) for args in grid]


def refuse_leaks(pairs: list[Pair], args) -> None:
    """UserError where pairs to train on are rows of the validation or the test part."""
    source = args.data if args.data.endswith(OWN_FILES) else name_and_folder(args.data)[1]
    if source and not all(Path(part).exists() for part in source.split(",")):
        print(f"{args.data} is not here: whether pairs are validation or test examples could not be checked")
        return
    mine = {(pair.id, pair.prompt) for pair in pairs}
    for part in ("validation", "test"):
        held_out = [example for example in load_all_splits(args.data, args.seed) if example.split == part]
        leaks = [example.id for example in held_out if (example.id, example.prompt) in mine]
        if leaks:
            raise UserError(f"--pairs {args.pairs}: {len(leaks)} of {len(pairs)} pairs are {part} examples "
                            f"(first: {leaks[0]!r}), which a model must not be trained on: use pairs of the "
                            "train part")


def given_pairs(args, source: Path) -> list[Pair]:
    """The pairs of --pairs, --limit of them, after a check that this model's tokenizer made them."""
    pairs = limited(load_pairs(Path(args.pairs)), args)
    first = pairs[0]
    message = user_message(first.prompt, first.context, first.style)
    if Tokenizer(source, args.date, args.template).chat(message, first.system) != first.prompt_ids:
        raise UserError(f"--pairs {args.pairs}: {args.model} encodes these prompts differently: its "
                        "tokenizer, chat template, --template or --date differs")
    if OBJECTIVES[args.method].uses_rejected and not first.rejected:
        raise UserError(f"--pairs {args.pairs}: no rejected responses; only --method sft trains without")
    refuse_leaks(pairs, args)
    return fitting_pairs(pairs, [], read_config(source).max_position_embeddings)


def begin_or_resume(grid: list, folder: Path, checkpoints: Checkpoints) -> tuple[dict, dict[str, Tensor]]:
    """Where training stands, a State as a dict, and the tensors to go on from; a new run has neither.

    UserError where the run in the folder was begun with other arguments, or on another machine.
    """
    file = folder / "args.json"
    if not grid[0].resume or not file.exists():
        write_arguments(grid[0], grid, folder)
        return {}, {}
    refuse_changes(begun_with(folder), resuming(grid), grid[0].resume_elsewhere)
    saved = checkpoints.load()
    if saved is None:
        print(f"{folder}: no checkpoint yet, training begins with its first step")
        return {}, {}
    tensors, state = saved
    print(f"{folder}: goes on after step {state['step']}")
    return state, tensors


def begun_with(folder: Path) -> dict:
    """What `resuming` said when the run in the folder began."""
    file = folder / "args.json"
    return checked(read_json(file), BEGUN, str(file))["resuming"]


def resuming(grid: list) -> dict:
    """What a run must have in common with the one that it goes on with (see refuse_changes)."""
    free = ("out", "dry_run", "save_every", "keep", "resume", "resume_elsewhere")
    arguments = {name: value for name, value in dataclasses.asdict(grid[0]).items() if name not in free}
    here = environment()
    machine = {name: here[name] for name in ("torch", "device", "threads")} | dict(processes=world())
    arguments["candidates"] = [swept(args) for args in grid]
    return json.loads(json.dumps(dict(arguments=arguments, machine=machine)))  # as args.json will have it


def write_arguments(args, grid: list, folder: Path) -> None:
    """args.json. args: those of the candidate that was chosen, or of the first one."""
    folder.mkdir(parents=True, exist_ok=True)
    model = Path(args.model).expanduser()
    write_json(folder / "args.json", dict(
        arguments=dataclasses.asdict(args),
        base=str(model.resolve()) if model.is_dir() else None,
        candidates=[swept(candidate) for candidate in grid],
        processes=world(),
        environment=environment(),
        resuming=resuming(grid),
    ))


def swept(args) -> dict:
    """The values of the options that take lists."""
    names = [field.name for field in dataclasses.fields(args) if field.metadata["sweep"]]
    return {name: getattr(args, name) for name in names}


def complete(folder: Path, checkpoints: Checkpoints, summary: dict, candidate: int = 0) -> None:
    """The last files of a run that has ended, its picture and then summary.json: whatever fails before that
    one is done again. candidate: which of the listed values the picture is of."""
    if not rank():
        learning_curve(folder, candidate)
    write_json(folder / "summary.json", summary)
    checkpoints.remove()
