"""pairs.py's negatives, N a row, and sampling that is resumed and shared, against the method.

Oracles: brute force over random inputs, single calls of generate, an uninterrupted run's bytes.
"""

import inspect
import itertools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
import torch

import pairs
import train
from model import load
from pairs import Example, Pair, add_noise, load_pairs, make_pairs, reshuffle
from run import UserError
from sample import Sampling, Tokenizer, generate

ROOT = Path(__file__).parents[1]
SETTINGS = Sampling(1.0, 1.0, 8)


def example(number: int, context: str | None = None, prompt: str | None = None, **more) -> Example:
    return Example(str(number), prompt or f"Question {number}?", "train", context, **more)


ROWS = [example(i, f"I am number {i % 3}.") for i in range(8)]
BARE = [example(i) for i in range(8)]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """The tiny folder, but every fifth id ends a response, so that some end early."""
    copy = shutil.copytree(tiny, tmp_path_factory.mktemp("stopping") / "tiny")
    (copy / "generation_config.json").write_text(json.dumps(dict(eos_token_id=list(range(1, 320, 5)))))
    return copy


@pytest.fixture(scope="module")
def world(folder):
    """(model, tokenizer)."""
    return load(folder), Tokenizer(folder)


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[int, int]]:
    """The keys (row, sample) of all that is sampled from now on."""
    return watch(monkeypatch)


def watch(monkeypatch, after=lambda i, sample: None) -> list[tuple[int, int]]:
    """Keys of what pairs.py samples, put down as each response ends, before `after(job, sample)`."""
    keys = []

    def watched(*args, **kwargs):
        bound = inspect.signature(generate).bind(*args, **kwargs)
        ended = bound.arguments["ended"]

        def both(i, sample):
            ended(i, sample)
            keys.append(tuple(bound.arguments["keys"][i]))
            after(i, sample)

        bound.arguments["ended"] = both
        return generate(*bound.args, **bound.kwargs)

    monkeypatch.setattr(pairs, "generate", watched)
    return keys


def chat_ids(folder: Path, turn: str) -> list[int]:
    """The tiny model's ChatML around a user turn, by the tokenizers library alone."""
    text = f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


# ------------------------------------------------------------------------------------------- reshuffle

def rows_of(texts: list[str]) -> list[Pair]:
    """Pairs without rejected responses; the prompt of row i is [i], its response 1000 + i and an end."""
    return [Pair(str(i), f"p{i}", None, text, [], [i], [1000 + i, 1], [], [], [i % 3 > 0])
            for i, text in enumerate(texts)]


def check_reshuffled(rows: list[Pair], count: int) -> None:
    """Each negative is a derangement of the responses, N different ones a row, none of equal text."""
    for k in range(count):
        source = [row.source_ids[k][0] for row in rows]
        assert sorted(source) == list(range(len(rows)))
        for i, (row, j) in enumerate(zip(rows, source, strict=True)):
            assert i != j and row.rejected[k] == rows[j].chosen != row.chosen
            assert row.rejected_ids[k] == rows[j].chosen_ids and row.source_ids[k] == rows[j].prompt_ids
            assert row.finished[1 + k] == rows[j].finished[0]
    for row in rows:
        assert len(row.rejected) == len(row.rejected_ids) == len(row.finished) - 1 == count
        assert len({source for source, in row.source_ids}) == len(row.source_ids) == count


def test_reshuffle_is_a_derangement_wherever_there_is_one():
    """600 random lists full of duplicates: refused exactly where more than half are one text."""
    draw, refused = random.Random(0), 0
    for case in range(600):
        n = draw.randint(1, 12)
        pool = draw.randint(1, n)
        rows = rows_of([f"text {min(draw.randrange(pool), draw.randrange(pool))}" for _ in range(n)])
        most = max(Counter(row.chosen for row in rows).values())
        if 2 * most <= n:
            reshuffle(rows, case, 1)
            check_reshuffled(rows, 1)
        else:
            refused += 1
            with pytest.raises(UserError, match=f"--neg reshuffle: {most} of {n} "):
                reshuffle(rows, case, 1)
    assert 100 < refused < 500


def test_reshuffle_gives_every_row_n_different_responses():
    """200 random lists of which no text is more than a quarter; what was there before stays."""
    draw = random.Random(1)
    for case in range(200):
        n = draw.randint(8, 40)
        texts = [f"text {i // draw.randint(1, n // 4)}" for i in range(n)]
        texts = [t if texts.index(t) + n // 4 > i else f"one {i}" for i, t in enumerate(texts)]
        draw.shuffle(texts)
        rows = rows_of(texts)
        reshuffle(rows, case, count := draw.randint(2, n // 2))
        check_reshuffled(rows, count)
        assert [(r.chosen, r.prompt_ids, r.chosen_ids) for r in rows] == [
            (t, [i], [1000 + i, 1]) for i, t in enumerate(texts)]


def test_reshuffle_is_decided_by_the_seed():
    """The same seed gives the same rows; twenty seeds give a row most of the responses there are."""
    def order(seed: int) -> list[int]:
        rows = rows_of([f"text {i}" for i in range(10)])
        reshuffle(rows, seed, 1)
        return [row.source_ids[0][0] for row in rows]

    orders = [order(seed) for seed in range(20)]
    assert orders[0] == order(0)
    assert len({tuple(o) for o in orders}) > 10 and len({o[0] for o in orders}) > 5


def test_reshuffled_pairs_sample_nothing_but_chosen_responses(world, drawn):
    """make_pairs: one response a row is drawn; rejected ones, gains apart, are another pair's chosen one."""
    found, stats = make_pairs(*world, ROWS, "reshuffle", SETTINGS, 5, count=2)
    assert sorted(drawn) == [(i, 0) for i in range(8)] and len(found) > 4
    by_prompt = {tuple(p.prompt_ids): p for p in found}
    for k in range(2):
        sources = [by_prompt[tuple(p.source_ids[k])] for p in found]
        assert sorted(s.id for s in sources) == sorted(p.id for p in found)
        for p, s in zip(found, sources, strict=True):
            assert p is not s and (p.rejected[k], p.rejected_ids[k]) == (s.chosen, s.chosen_ids)
            assert p.finished[1 + k] == s.finished[0] and p.chosen != s.chosen
    assert {len(p.gain_rejected) for p in found} == {2} and stats["pairs"] == len(found)


# ------------------------------------------------------------------------------------------- noise

def noisy(tokenizer: Tokenizer, seed: int, count: int) -> list[Pair]:
    """Noise beside responses of 1, 9 and 300 ids, ended by two different stop ids or unfinished."""
    rows = []
    for i, (length, end) in enumerate(itertools.product([1, 9, 300], [[1], [6], []])):
        rows.append(Pair(str(i), "p", None, "x", [], [5], [70] * length + end, [], [], [bool(end)]))
    add_noise(rows, tokenizer, seed, count)
    return rows


def test_noise_is_as_many_tokens_as_the_chosen_response_and_an_end(world, tiny):
    """Letters and digits only, the chosen one's own token count, the end token; it comes from no prompt."""
    library = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    for i, row in enumerate(noisy(world[1], 0, 3)):
        assert row.source_ids == [[], [], []] and row.finished[1:] == [True] * 3
        for text, ids in zip(row.rejected, row.rejected_ids, strict=True):
            *own, end = ids
            assert (len(own), end) == ([1, 9, 300][i // 3], 1)
            assert re.fullmatch("[A-Za-z0-9]+", text) and library.decode(own) == text


def test_noise_differs_by_row_sample_and_seed_alone(world):
    """The same seed gives the same ids; no two of different rows, samples or seeds are alike; all is used."""
    made = [noisy(world[1], seed, 2) for seed in (0, 0, 1)]
    first, again, other = ([tuple(ids) for row in rows[3:] for ids in row.rejected_ids] for rows in made)
    assert first == again and len({*first, *other}) == len(first) + len(other)
    assert len(set("".join(text for row in made[0] for text in row.rejected))) == 62


def test_noise_beside_a_response_that_is_only_a_stop_id(world):
    """No token of its own: the end token is all there is."""
    row = Pair("0", "p", None, "x", [], [5], [6], [], [], [True])
    add_noise([row], world[1], 0, 2)
    assert row.rejected_ids == [[1], [1]] and row.rejected == ["", ""]


def test_noise_pairs_sample_nothing_but_chosen_responses(world, tiny, drawn):
    """make_pairs: one response a row, whose length the noise has; a gain for each."""
    found, _ = make_pairs(world[0], Tokenizer(tiny), ROWS, "noise", SETTINGS, 5, count=2)
    assert len(found) > 4
    assert sorted(drawn) == [(i, 0) for i in range(8)]
    for p in found:
        own = len(p.chosen_ids) - (p.chosen_ids[-1] == 1)
        assert [len(ids) for ids in p.rejected_ids] == [own + 1] * 2 and len(p.gain_rejected) == 2


# ------------------------------------------------------------------------------------------- N negatives

@pytest.mark.parametrize(("neg", "rows"), [("missing", ROWS), ("random", ROWS), ("random", BARE)])
def test_n_negatives_are_drawn_from_their_prompts_and_keys(neg, rows, world, folder):
    """Sample (i, k) of row i's k-th source prompt, itself the bare prompt, or one with another context, or
    another prompt; the first of three is that of one."""
    model, tokenizer = world
    found, stats = make_pairs(model, tokenizer, rows, neg, SETTINGS, 5, count=3)
    one = {p.id: p for p in make_pairs(model, tokenizer, rows, neg, SETTINGS, 5)[0]}
    assert len(found) + sum(stats["dropped"].values()) == 8 and len(found) > 4
    jobs = [(p, k) for p in found for k in range(4)]
    prompts = [p.source_ids[k - 1] if k else p.prompt_ids for p, k in jobs]
    oracle = generate(model, prompts, SETTINGS, tokenizer.stop_ids, 5, [(int(p.id), k) for p, k in jobs])
    for p, samples in zip(found, zip(*[iter(oracle)] * 4, strict=True), strict=True):
        e = rows[int(p.id)]
        others = {r.turn(r.context) if rows is BARE else e.turn(r.context) for r in rows
                  if (r.context, r.prompt)[rows is BARE] != (e.context, e.prompt)[rows is BARE]}
        allowed = [chat_ids(folder, turn) for turn in ([e.prompt] if neg == "missing" else others)]
        assert p.prompt_ids == chat_ids(folder, e.turn(e.context))
        assert len(p.source_ids) == 3 and all(source in allowed for source in p.source_ids)
        assert [p.chosen_ids, *p.rejected_ids] == [s.ids for s in samples]
        assert p.finished == [s.finished for s in samples]
        assert p.rejected == [tokenizer.decode(ids) for ids in p.rejected_ids]
        assert (p.rejected_ids[0], p.source_ids[0]) == (one[p.id].rejected_ids[0], one[p.id].source_ids[0])
    assert neg == "missing" or len({tuple(s) for p in found for s in p.source_ids}) > 4
    if neg == "random":
        assert any(p.source_ids[0] != p.source_ids[1] for p in found)


@torch.no_grad()
def test_every_negative_has_its_own_gain(world, folder):
    """log p(y|x,c) - log p(y|x) of each, one plain forward pass at a time."""
    model, _ = world
    found, stats = make_pairs(*world, ROWS[:4], "missing", SETTINGS, 5, count=3)

    def logp(prompt: list[int], response: list[int]) -> float:
        ids = prompt + response
        logps = model.logits(model(torch.tensor(ids), model.pack([(len(ids), [])]))).log_softmax(-1)
        return sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(response))

    every = [logp(p.prompt_ids, ids) - logp(chat_ids(folder, p.prompt), ids)
             for p in found for ids in p.rejected_ids]
    assert [g for p in found for g in p.gain_rejected] == pytest.approx(every, abs=1e-4)
    assert stats["gain"]["rejected"] == pytest.approx(sum(every) / len(every), abs=1e-4)


@pytest.mark.parametrize("rows", [ROWS, BARE, BARE[:1]], ids=["contexts", "bare", "one"])
def test_no_negatives_sample_chosen_responses_only(rows, world, drawn):
    """count 0, what SFT asks for: nothing rejected, with contexts, without, or a single row."""
    found, stats = make_pairs(*world, rows, "missing", SETTINGS, 5, count=0)
    assert sorted(drawn) == [(i, 0) for i in range(len(rows))] and stats["pairs"] == len(found)
    assert all(p.rejected == p.rejected_ids == p.source_ids == [] and len(p.finished) == 1 for p in found)


def test_chosen_responses_do_not_depend_on_the_negatives(world, tiny):
    """The same ids for every strategy and number of negatives."""
    chosen: dict[str, set] = {}
    for neg, count in [("missing", 0), ("missing", 2), ("random", 1), ("reshuffle", 1), ("noise", 3)]:
        for p in make_pairs(world[0], Tokenizer(tiny), ROWS, neg, SETTINGS, 5, count=count)[0]:
            chosen.setdefault(p.id, set()).add(tuple(p.chosen_ids))
    assert len(chosen) > 4 and {len(ids) for ids in chosen.values()} == {1}


# ------------------------------------------------------------------------------------------- the program

@pytest.fixture
def call(folder, tmp_path, monkeypatch):
    """(flags) -> pairs.py (or another) on ten rows and the tiny model, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"naïve {i} 😊", "context": f"c{i % 3}", "split": "train"} for i in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def program(*flags: str, out: str = "o", module=pairs) -> Path:
        argv = ["--data", "a.jsonl", "--model", str(folder), "--out", out, "--max-new-tokens", "6",
                "--slots", "4", "--dtype", "float32"]
        monkeypatch.setattr(sys, "argv", ["program", *argv, *flags])
        module.program()
        return tmp_path / out

    return program


@pytest.mark.parametrize("module", [pairs, train], ids=["pairs", "train"])
@pytest.mark.parametrize(("row", "flags", "named"), [
    ({"prompt": "p"}, ["--neg", "missing"], "--neg missing"),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, ["--n-neg", "2"], "--n-neg"),
    ({"prompt": "p", "context": "c"}, ["--n-neg", "-1"], "--n-neg"),
])  # fmt: skip
def test_what_cannot_be_leaves_no_folder(row, flags, named, module, call, tmp_path):
    """missing without contexts, several negatives of ready pairs, fewer than none: UserErrors by name."""
    rows = [{**row, "prompt": f"p{i}", "split": "train"} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=named):
        call(*flags, module=module)
    assert not (tmp_path / "o").exists()


def interrupt(monkeypatch, after: int) -> list[tuple[int, int]]:
    """Ctrl-C as so many responses have ended."""
    def stop(job, sample):
        if len(keys) == after:
            raise KeyboardInterrupt

    keys = watch(monkeypatch, stop)
    return keys


def statistics(folder: Path) -> dict:
    """pairs.json's statistics, clock readings left out."""
    found = json.loads((folder / "pairs.json").read_text())["statistics"]
    return {key: value for key, value in found.items() if not key.startswith("seconds")}


def test_pairs_jsonl_grows_by_whole_rows(call, tmp_path, monkeypatch):
    """At every moment it holds exactly the rows all of whose responses have ended, one whole line each."""
    seen = []

    def look(job, sample):
        ended = Counter(row for row, _ in keys)
        text = (tmp_path / "o" / "pairs.jsonl").read_text(encoding="utf-8")
        assert text == "" or text.endswith("\n")
        ids = {json.loads(line)["id"] for line in text.splitlines()}
        assert ids == {str(row + 1) for row, count in ended.items() if count == 3}
        seen.append(len(ids))

    keys = watch(monkeypatch, look)
    call("--n-neg", "2")
    assert seen[0] == 0 and seen[-1] == 10 and len(set(seen)) > 4


FLAGS = [["--n-neg", "2"], ["--neg", "random"], ["--neg", "reshuffle", "--n-neg", "2"], ["--neg", "noise"]]


@pytest.mark.parametrize(("flags", "cut"), list(zip(FLAGS, [60, 0, 400, 1], strict=True)))
def test_interrupted_sampling_continues(flags, cut, call, tmp_path, monkeypatch):
    """Twice stopped, its last line torn by `cut` bytes: whole rows are not sampled again, and the files are
    those of an uninterrupted run."""
    sampled = watch(monkeypatch)
    whole, file = call(*flags, out="whole"), tmp_path / "o" / "pairs.jsonl"
    for after in (len(sampled) * 8 // 10, 1):
        interrupt(monkeypatch, after)
        with pytest.raises(KeyboardInterrupt):
            call(*flags)
        with pytest.raises(UserError, match="is not whole"):
            load_pairs(tmp_path / "o")
        data = file.read_bytes()
        file.write_bytes(data[: max(0, len(data) - cut)])
        lines = file.read_bytes().split(b"\n")[:-1]
        done = [int(json.loads(line)["id"]) - 1 for line in lines]
    assert len(done) < 10 and (done or cut)
    keys = watch(monkeypatch)
    call(*flags)
    assert {row for row, _ in keys} == set(range(10)) - set(done) and len(set(keys)) == len(keys)
    assert file.read_bytes() == (whole / "pairs.jsonl").read_bytes()
    assert statistics(tmp_path / "o") == statistics(whole)


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: flags[1])
def test_a_run_that_ends_between_its_two_files_continues(flags, call, tmp_path, monkeypatch):
    """pairs.jsonl is complete and pairs.json not yet: the same command gives the same files and figures."""
    whole, write = call(*flags, out="whole"), pairs.write_json

    def stop(path, value):
        if value["statistics"] is not None:
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(pairs, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        call(*flags)
    monkeypatch.setattr(pairs, "write_json", write)
    call(*flags)
    assert (tmp_path / "o" / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()
    assert statistics(tmp_path / "o") == statistics(whole)


def test_half_sampled_pairs_refuse_other_arguments(call, tmp_path, monkeypatch):
    """Each by its name, nothing sampled, the folder as it was; slots may change."""
    interrupt(monkeypatch, 11)
    with pytest.raises(KeyboardInterrupt):
        call("--n-neg", "2")
    before = {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()}
    keys = watch(monkeypatch)
    for flags, name in [(["--seed", "1"], "seed"), (["--neg", "random"], "neg"), (["--n-neg", "1"], "n_neg"),
                        (["--top-p", "0.5"], "sampling"), (["--limit", "9"], "examples|fingerprint")]:
        with pytest.raises(UserError, match=rf"made with \w*({name})\b"):
            call("--n-neg", "2", *flags)
    assert {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()} == before and not keys
    call("--n-neg", "2", "--slots", "3")
    assert len(load_pairs(tmp_path / "o")) > 5


# ------------------------------------------------------------------------------------------- processes

def test_two_processes_write_the_pairs_of_one(call, tmp_path, folder):
    """The same rows in fp32, gains up to rounding, no files but pairs.jsonl and pairs.json."""
    alone = load_pairs(call("--neg", "random", "--n-neg", "2"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr",
               "127.0.0.1", "--master_port", str(port), ROOT / "pairs.py", *sys.argv[1:]]
    command[command.index("--out") + 1] = "two"
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    together = load_pairs(tmp_path / "two")
    for p, q in zip(alone, together, strict=True):
        assert [q.gain_chosen, *q.gain_rejected] == pytest.approx([p.gain_chosen, *p.gain_rejected], abs=1e-4)
        q.gain_chosen, q.gain_rejected = p.gain_chosen, p.gain_rejected
        assert p == q
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["pairs.json", "pairs.jsonl"]


def test_one_process_continues_what_two_began(call, tmp_path, monkeypatch):
    """Rows of both files are kept, half a last line is not; in the end there is pairs.jsonl alone."""
    whole, out = call("--n-neg", "2", out="whole"), tmp_path / "o"
    rows = [json.loads(line) for line in (whole / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({**row, "gain_chosen": None, "gain_rejected": None}, ensure_ascii=False) + "\n"
             for row in rows]
    meta = json.loads((whole / "pairs.json").read_text())
    out.mkdir()
    (out / "pairs.json").write_text(json.dumps(dict(settings=meta["settings"], statistics=None)))
    (out / "pairs.jsonl").write_text(lines[0] + lines[4] + lines[2][:-9], encoding="utf-8")
    (out / "pairs.jsonl.process-1").write_text(lines[1] + lines[3] + lines[5][:50], encoding="utf-8")
    keys = watch(monkeypatch)
    call("--n-neg", "2")
    kept = {int(rows[i]["id"]) - 1 for i in (0, 1, 3, 4)}
    assert {row for row, _ in keys} == set(range(10)) - kept
    assert (out / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()
    assert sorted(p.name for p in out.iterdir()) == ["pairs.json", "pairs.jsonl"]


# ------------------------------------------------------------------------------------------- limit

def test_limit_draws_a_subset_by_seed_in_order(tmp_path):
    """Of so many rows, in the split's order; over 40 seeds every row is drawn; too many is all."""
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{i}", "split": ("train", "test")[i % 4 == 3]}) + "\n"
                            for i in range(16)))

    def prompts(limit: int, seed: int = 0) -> list[str]:
        args = pairs.Args(data=str(file), limit=limit, seed=seed)
        return [e.prompt for e in pairs.examples_for(args, "train")]

    everything = [f"p{i}" for i in range(16) if i % 4 != 3]
    drawn = [prompts(5, seed) for seed in range(40)]
    assert all(len(d) == 5 and sorted(set(d), key=everything.index) == d for d in drawn)
    assert set().union(*drawn) == set(everything) and drawn[0] == prompts(5, 0)
    assert len({tuple(d) for d in drawn}) > 30
    assert prompts(0) == prompts(12) == prompts(99) == everything
