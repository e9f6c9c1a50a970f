"""Whatever a user or a stranger hands in: an answer or one sentence, never a traceback.

Inputs come from generators with a seed; a few of them in the fast tests, many in the slow ones.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from egspo.cli import build_parser, main
from egspo.config.recipe import config_to_dict
from egspo.config.yaml_text import load_yaml
from egspo.models import new_model
from egspo.models.tokenization import character_tokenizer
from egspo.training.warm_start import save_model
from tests.helpers import runs

few_and_many = pytest.mark.parametrize(
    "count", [40, pytest.param(1500, marks=pytest.mark.slow)], ids=["few", "many"]
)
ODD: list[Any] = [
    None, True, -1, 0, 2**63, 10**400, 0.5, float("inf"), float("nan"), "", " ", "x" * 5000,
    "\x1b[2J", "\u202e", [], {}, [[]], {"a": {}}, ["a", 1], {"": 0}, "../..", "/dev/null", "1e400",
]  # fmt: skip


parser = cache(build_parser)
"""Which takes as long to build as a small recipe to read."""


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("egspo.cli.build_parser", parser)


def sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """The exit code, of an end that says why in a few lines."""
    try:
        code = main(arguments)
    except SystemExit as error:  # of argparse
        code = error.code if isinstance(error.code, int) else 1
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err, (arguments, shown.err[-3000:])
    assert code in (0, 2, 3), (arguments, code)
    assert "\x1b" not in shown.err
    return code


# --- Recipes and arguments

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)
)
HOSTILE_YAML = {
    "recursive list": "a: &a [*a]",
    "recursive section": "model: &m {config: *m}",
    "recursive over two": "a: &a {b: &b [*a]}",
    "deep flow": "a: " + "[" * 5000,
    "deep and closed": "a: " + "[" * 1200 + "]" * 1200,
    "deep blocks": "".join("  " * i + f"k{i}:\n" for i in range(300)),
    "bomb": BOMB,
    "merge bomb": "a: &a {x: 1}\n" + "".join(f"k{i}: {{<<: *a}}\n" for i in range(9)),
    "no date": "a: 2001-99-99",
    "long number": "a: " + "9" * 6000,
    "base 60": "a: 190:20:30",
    "no anchor": "a: *b",
    "tag": "a: !!python/object/apply:os.system [id]",
    "list as key": "? [a, b]\n: 1",
    "zero": "a: \x00",
    "surrogate": 'a: "\\ud800"',
    "binary": "a: !!binary x",
    "infinite": "a: .inf\nsteps: .nan",
}


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_hostile_yaml(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(HOSTILE_YAML[name].encode("utf-8", "surrogatepass"))
    assert sentence(["train", str(recipe), "--print-config"], capsys) == 2


def test_aliases_that_are_none_of_that_stay() -> None:
    assert load_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": {"x": 1, "y": 2},
    }


def mutated(tree: Any, rng: random.Random) -> Any:
    """``tree`` with something odd somewhere."""
    if rng.random() < 0.15 or not isinstance(tree, dict | list) or not tree:
        return rng.choice(ODD)
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    tree[key] = mutated(tree[key], rng)
    if isinstance(tree, dict) and rng.random() < 0.1:
        tree[rng.choice(["x", "steps", "", 3, None, "\x1b[1m"])] = rng.choice(ODD)
    return tree


DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # where there is a compiled one


@few_and_many
def test_recipes(count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random("recipes")
    original = config_to_dict(runs.config(tmp_path / "run", {"sft": {"steps": 2}}))
    recipe = tmp_path / "recipe.yaml"
    for _ in range(count):
        tree = original
        for _ in range(rng.randrange(1, 4)):
            tree = mutated(tree, rng)
        if isinstance(tree, dict):  # less to read, and all that is odd in it
            same = {key for key in original.keys() & tree.keys() if tree[key] is original[key]}
            left_out = {key for key in sorted(same - {"model", "task"}) if rng.random() < 0.7}
            tree = {key: value for key, value in tree.items() if key not in left_out}
        text = yaml.dump(tree, Dumper=DUMPER, allow_unicode=True)
        if rng.random() < 0.3:
            place = rng.randrange(len(text))
            text = text[:place] + rng.choice("&*:[{-!|>'\"#%\x00\t") + text[place + 1 :]
        recipe.write_bytes(text.encode("utf-8", "surrogatepass"))
        sentence(["train", str(recipe), "--print-config"], capsys)


@few_and_many
def test_arguments(count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random("arguments")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {path: no/model}\n")
    words = ["--resume", "auto", "--seed", "--output-dir", "", "=", "a=b", "steps=.inf", "seed=1"]
    words += ["steps=[", "x.y.z=1", "model=1", "--", "-", "--model", "--step", "--prompt", "\x1b["]
    words += ["algorithm.preset=no", "--overwrite", str(recipe), str(tmp_path), "/dev/null", "7"]
    words += ["\udcff", "🙂", "--json", "--tasks", "none", "--file", "--all-steps", "--index", "-1"]
    commands = ["generate", "inspect", "export", "eval", "data", "plan", "options", "plot", "sweep"]
    for _ in range(count):
        command = rng.choice(commands)
        chosen = [rng.choice(words) for _ in range(rng.randrange(5))]
        if command == "plan":
            chosen = [str(recipe), *chosen]
        sentence([command, *chosen], capsys)


# --- Model folders and prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = character_tokenizer("01234\n")
    fields = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id}
    fields |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = runs.config(folder / "run").generation
    save_model(new_model({**runs.MODEL, **fields}, seed=0), tokenizer, config, folder)
    return folder / "model"


def generate(folder: Path, *more: str) -> list[str]:
    return ["generate", "--model", str(folder), *more]


def test_the_folder_itself_answers(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence(generate(model, "--prompt", "12"), capsys) == 0


def _pipe(file: Path, rng: random.Random) -> None:
    file.unlink()
    os.mkfifo(file)


def _folder(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


def _dangling(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.symlink_to(file.parent / "nothing")


def _cut(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def _flipped(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(rng.randrange(1, 8)):
        content[rng.randrange(min(len(content), 4000))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _odd(file: Path, rng: random.Random) -> None:
    if file.suffix == ".json":
        tree = mutated(json.loads(file.read_text()), rng)
        file.write_text(json.dumps(tree))
    elif file.suffix == ".safetensors":
        tensors = load_file(file)
        name = rng.choice(sorted(tensors))
        change: Callable[[], Any] = rng.choice(
            [
                lambda: tensors.pop(name),
                lambda: tensors.update({name: tensors[name] * float("nan")}),
                lambda: tensors.update({f"{name}x": tensors[name].clone()}),
                lambda: tensors.update({name: tensors[name].flatten()[:1].clone()}),
                lambda: tensors.update({name: tensors[name].long()}),
            ]
        )
        change()
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        texts = ["{{", "{% for", "{{ 1/0 }}", "{{ x.y.z }}", "", "{{ messages"]
        file.write_text(rng.choice([*texts, LOOPS, "{{ 'x' * 10**8 }}"]))


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DAMAGE = (_pipe, _folder, _dangling, _cut, _cut, _flipped, _flipped, _odd, _odd, _odd, _odd)


@pytest.mark.parametrize(
    "count", [25, pytest.param(300, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_model_folders(
    count: int,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("egspo.models.chat_template.SECONDS", 1.0)
    rng = random.Random("folders")
    for number in range(count):
        folder = tmp_path / str(number)
        shutil.copytree(model, folder)
        file = rng.choice(sorted(folder.iterdir()))
        rng.choice(DAMAGE)(file, rng)
        sentence(generate(folder, "--prompt", "12"), capsys)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("n_layers", 10**9, "n_layers is 1000000000, no model has more than 1000"),
        ("d_model", 2**20, "describes a model of"),
        ("mlp_hidden_size", 2**40, "mlp_hidden_size is"),
        ("max_sequence_length", 0, "max_sequence_length must be an integer >= 1"),
        ("n_heads", float("nan"), "n_heads must be an integer >= 1"),
    ],
)
def test_absurd_sizes(
    field: str, value: Any, said: str, model: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, field: value}))
    assert main(generate(folder, "--prompt", "12")) == 2
    assert said in capsys.readouterr().err


def lines(rng: random.Random) -> Iterator[bytes]:
    yield b'{"prompt": ' + b"[" * 20000
    yield b'{"prompt": "1", "x": ' + b"[" * 3000 + b"]" * 3000 + b"}"
    yield b'{"prompt": "\\ud800"}'
    yield b'{"prompt": "1", "id": "\\udfff"}'
    yield b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    yield b'{"prompt": "1", "n": ' + b"9" * 6000 + b"}"
    yield b"\xff\xfe{}"
    while True:
        record = mutated(
            rng.choice(
                [
                    {"prompt": "12", "id": 1},
                    {"messages": [{"role": "user", "content": "12"}]},
                    {"messages": [{"role": "system", "content": "1"}] * 2, "prompt": None},
                ]
            ),
            rng,
        )
        line = json.dumps(record).encode()
        if rng.random() < 0.2:
            line = line[: rng.randrange(len(line) + 1)]
        yield line


@few_and_many
def test_prompts(
    count: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is loaded for the good ones only."""
    rng = random.Random("prompts")
    file = tmp_path / "prompts.jsonl"
    made = lines(rng)
    for number in range(count // 4):
        file.write_bytes(next(made) + b"\n")
        short = ["--max-new-tokens", "4", "--steps", "1", "--block-length", "4"]
        output = tmp_path / f"{number}.jsonl"
        arguments = ["--prompts", str(file), "--output", str(output), *short]
        sentence(generate(model, *arguments), capsys)
