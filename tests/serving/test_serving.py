"""Completions as users get them: streamed, in files, with step maps; ``egspo generate``."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import egspo.serving.generation
from egspo.cli import main
from egspo.cli.model import _HELP
from egspo.config import GenerationConfig
from egspo.rollouts.completion import Completion, TextDelta, TextStream, token_pieces
from egspo.runs.lock import LOCK
from egspo.serving.generation import complete, generate, stream
from egspo.serving.named_model import save_generation_config
from egspo.training.warm_start import save_model
from tests.helpers.runs import hold_elsewhere
from tests.serving.test_generation import CONFIG, PROMPTS, TOKENIZER, chats, model

WORDY = 20  # a seed with text in both blocks
EARLY = replace(CONFIG, early_exit=True, batch_size=3)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, as in GPT-2, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", "<mask>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", mask_token="<mask>"
    )


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Words with their leading space, and bytes where there is no word, as in Llama."""
    words = ["<eos>", "<mask>", "▁the", "▁cat", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", mask_token="<mask>"
    )


BYTES, WORDS = byte_tokenizer(), sentencepiece_tokenizer()
EOS, MASK = 0, 1


# --- Streaming


@pytest.mark.parametrize("config", [CONFIG, EARLY, replace(CONFIG, batch_size=1)])
def test_deltas_add_up_to_the_completions(config: GenerationConfig) -> None:
    texts = dict.fromkeys(range(len(PROMPTS)), "")
    ended: dict[int, Completion] = {}
    for event in stream(model(), TOKENIZER, PROMPTS, config):
        assert event.index not in ended
        if isinstance(event, TextDelta):
            assert event.text
            texts[event.index] += event.text
        else:
            ended[event.index] = event
    expected = generate(model(), TOKENIZER, PROMPTS, config)
    assert [texts[i] for i in range(len(PROMPTS))] == expected
    assert [ended[i].text for i in range(len(PROMPTS))] == expected


def test_text_comes_block_by_block() -> None:
    """The first block can be read before the second is denoised."""
    calls, whole = [], model().forward
    events: list[tuple[int, TextDelta | Completion]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model(), "forward", lambda *a, **k: calls.append(0) or whole(*a, **k))
        config = replace(CONFIG, early_exit=False)
        for event in stream(model(), TOKENIZER, chats("00"), config, seed=WORDY):
            events.append((len(calls), event))
    forwards = [count for count, _ in events]
    assert forwards[0] == CONFIG.steps // 2 and forwards[-1] == CONFIG.steps
    assert [type(event) for _, event in events] == [TextDelta, TextDelta, Completion]


def test_streaming_leaves_gradients_on_for_its_consumer() -> None:
    for _ in stream(model(), TOKENIZER, PROMPTS, CONFIG):
        assert torch.is_grad_enabled()


def test_bad_input_is_found_before_the_first_completion_is_asked_for() -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        stream(model(), TOKENIZER, chats("1", ""), CONFIG)
    with pytest.raises(ValueError, match="prompts must not be empty"):
        stream(model(), TOKENIZER, [], CONFIG)


def test_prompts_that_are_skipped_change_nothing_for_the_others() -> None:
    whole = complete(model(), TOKENIZER, PROMPTS, CONFIG)
    events = stream(model(), TOKENIZER, PROMPTS, CONFIG, skip={0, 3})
    rest = {event.index: event.token_ids for event in events if isinstance(event, Completion)}
    assert rest == {i: whole[i].token_ids for i in (1, 2, 4, 5)}
    assert list(stream(model(), TOKENIZER, PROMPTS, CONFIG, skip=range(6))) == []


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS], ids=["bytes", "words"])
@given(data=st.data())
def test_half_a_character_is_never_shown(
    tokenizer: PreTrainedTokenizerBase, data: st.DataObject
) -> None:
    ids = tokens_of(tokenizer, data)
    canvas = [*ids, EOS] + [7] * data.draw(st.integers(0, 3))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(canvas)), max_size=4)))
    text = TextStream(tokenizer, MASK, EOS)
    shown = []
    for cut in [*cuts, len(canvas)]:
        shown.append(text.advance(canvas[:cut] + [MASK] * (len(canvas) - cut)))
    whole = tokenizer.decode(ids)
    if "\ufffd" not in whole:
        assert "".join(shown) == whole
        assert not any("\ufffd" in piece for piece in shown)


def tokens_of(tokenizer: PreTrainedTokenizerBase, data: st.DataObject) -> list[int]:
    """Tokens of some text, or of any bytes at all."""
    first = 2 if tokenizer is BYTES else 5
    raw = data.draw(
        st.one_of(
            st.text(st.sampled_from("a 猫é🙂"), max_size=6).map(str.encode), st.binary(max_size=6)
        )
    )
    if tokenizer is BYTES:
        return tokenizer(raw.decode("latin-1"), add_special_tokens=False)["input_ids"]
    words = data.draw(st.lists(st.integers(2, 4), max_size=3))
    return [*words, *(first + byte for byte in raw)]


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS], ids=["bytes", "words"])
@given(data=st.data())
def test_pieces_of_tokens_add_up_to_the_text(
    tokenizer: PreTrainedTokenizerBase, data: st.DataObject
) -> None:
    ids = tokens_of(tokenizer, data)
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    whole = tokenizer.decode(ids)
    assert "\ufffd" in whole or "".join(pieces) == whole


def test_pieces_of_tokens() -> None:
    assert token_pieces(WORDS, [2, 3, 4, 2]) == ["the", " cat", "s", " the"]
    cat = [2 + 3 + byte for byte in "猫".encode()]
    assert token_pieces(WORDS, [3, *cat, 0]) == ["cat", "", "", "猫", "<eos>"]
    assert token_pieces(WORDS, [3, *cat[:2]]) == ["cat", "", "\ufffd\ufffd"]


# --- Completions


@pytest.mark.parametrize("early_exit", [False, True])
def test_completions_say_how_they_ended_and_came_about(early_exit: bool) -> None:
    config = replace(CONFIG, early_exit=early_exit)
    eos = TOKENIZER.eos_token_id
    completions = complete(model(), TOKENIZER, PROMPTS, config)
    assert [c.text for c in completions] == generate(model(), TOKENIZER, PROMPTS, config)
    assert {c.finish_reason for c in completions} == {"eos", "length"}
    for index, completion in enumerate(completions):
        assert completion.index == index
        assert eos not in completion.token_ids
        assert (len(completion.token_ids) == 8) == (completion.finish_reason == "length")
        assert TOKENIZER.decode(completion.token_ids, skip_special_tokens=True) == completion.text
        step_map = completion.step_map
        assert step_map is not None
        tokens, length = [token.token_id for token in step_map], len(completion.token_ids)
        assert tokens[:length] == completion.token_ids
        assert completion.finish_reason == "length" or tokens[length] == eos
        assert [token.position for token in step_map] == list(range(len(step_map)))
        assert len(step_map) in ({8} if not early_exit else {4, 8})
        for token in step_map:
            assert token.text == TOKENIZER.decode([token.token_id])
            assert token.step in range(2 * (token.position // 4), 2 * (token.position // 4) + 2)
            assert 0 < token.confidence <= 1 and token.entropy >= 0
        steps = [token.step for token in step_map]
        assert all(steps.count(step) == 2 for step in steps)  # the quota


# --- egspo generate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model was trained to be decoded with a cache, guidance and a threshold."""
    folder = tmp_path_factory.mktemp("run")
    trained = replace(CONFIG, cache="dual", guidance=0.5, threshold=0.6, max_tokens_per_step=3)
    (folder / "final").mkdir()
    save_model(model(), TOKENIZER, trained, folder / "final")
    return folder


def command(run: Path, *arguments: str) -> int:
    return main(["generate", "--model", str(run), *arguments])


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_decoding_option_has_a_flag(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(_HELP) == [f.name for f in fields(GenerationConfig)]
    used = watch(monkeypatch)
    flags = ["--max-new-tokens", "6", "--steps", "3", "--block-length", "3", "--temperature", "0"]
    assert command(run, "--prompt", "1", *flags) == 2  # 3 steps over 2 blocks
    assert "generation.steps (3)" in capsys.readouterr().err
    flags[3] = "2"
    flags += ["--policy", "margin", "--cache", "prefix", "--guidance", "0", "--threshold", "0.9"]
    flags += ["--max-tokens-per-step", "none", "--no-early-exit", "--batch-size", "2"]
    assert command(run, "--prompt", "1", *flags) == 0
    assert used[-1] == GenerationConfig(
        max_new_tokens=6,
        steps=2,
        block_length=3,
        temperature=0.0,
        policy="margin",
        cache="prefix",
        guidance=0.0,
        threshold=0.9,
        max_tokens_per_step=None,
        early_exit=False,
        batch_size=2,
    )


def watch(monkeypatch: pytest.MonkeyPatch) -> list[GenerationConfig]:
    """The configurations that ``stream`` is called with."""
    used: list[GenerationConfig] = []

    def watched(*args: Any, **options: Any) -> Iterator[Any]:
        used.append(args[3])
        return stream(*args, **options)

    monkeypatch.setattr(egspo.serving.generation, "stream", watched)
    return used


def test_the_trained_policy_is_what_decodes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used = watch(monkeypatch)
    assert command(run, "--prompt", "1234") == 0
    shown = capsys.readouterr()
    assert (used[-1].cache, used[-1].guidance, used[-1].threshold) == ("dual", 0.5, 0.6)
    assert shown.out == generate(model(), TOKENIZER, chats("1234"), used[-1])[0] + "\n"
    assert shown.err == ""
    # Lengths, temperature and what changes no token are no other policy.
    same = ["--temperature", "0", "--max-new-tokens", "4", "--steps", "2", "--no-early-exit"]
    assert command(run, "--prompt", "1234", *same, "--batch-size", "1") == 0
    assert capsys.readouterr().err == ""
    assert command(run, "--prompt", "1234", "--cache", "none", "--steps", "8") == 0
    assert capsys.readouterr().err == (
        "egspo: note: this is not the policy that was trained: cache dual -> none, "
        "tokens per step 2 -> 1\n"
    )
    # Without a stored policy there is nothing to differ from.
    bare = tmp_path / "bare"
    bare.mkdir()
    save_model(model(), TOKENIZER, CONFIG, bare)
    (file,) = bare.rglob("egspo_generation.json")
    file.unlink()
    tiny = ["--max-new-tokens", "4", "--steps", "2", "--block-length", "4"]
    assert command(bare, "--prompt", "1234", "--cache", "dual", *tiny) == 0
    assert capsys.readouterr().err == ""


def test_jsonl_in_and_out(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"prompt": "1234", "id": "a", "grid": [1, {"x": None}]},
        {"messages": [{"role": "system", "content": "0"}, {"role": "user", "content": "11"}]},
        {"prompt": "21\n43\n"},
    ]
    source = tmp_path / "prompts.jsonl"
    source.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    output = tmp_path / "out" / "answers.jsonl"
    assert command(run, "--prompts", str(source), "--output", str(output)) == 0
    written = sorted(records(output.read_text()), key=lambda record: record["index"])
    messages = [chats("1234")[0], lines[1]["messages"], chats("21\n43\n")[0]]
    stored = json.loads((run / "final" / "model" / "egspo_generation.json").read_text())
    expected = complete(model(), TOKENIZER, messages, GenerationConfig(**stored))
    assert written == [
        {
            "index": i,
            **lines[i],
            "completion": expected[i].text,
            "finish_reason": expected[i].finish_reason,
            "tokens": len(expected[i].token_ids),
        }
        for i in range(3)
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO(source.read_text()))
    options = ["--prompts-format", "jsonl", "--format", "jsonl", "--step-map"]
    assert command(run, "--prompts", "-", *options) == 0
    piped = sorted(records(capsys.readouterr().out), key=lambda record: record["index"])
    for i, record in enumerate(piped):
        assert record.pop("generation") == stored
        step_map = [asdict(token) for token in expected[i].step_map or []]
        assert record.pop("step_map") == step_map
    assert piped == written


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "1"', "is not valid JSON"),
        ('["1"]', "expected an object with prompt or messages"),
        ('{"text": "1"}', r"exactly one of the keys prompt and messages, got \['text'\]"),
        ('{"prompt": "1", "messages": []}', "exactly one"),
        ('{"prompt": " "}', "prompt must be a text"),
        ('{"prompt": 1}', "prompt must be a text, got 1"),
        ('{"messages": []}', "messages must be a list of messages"),
        ('{"messages": "1"}', "messages must be a list of messages"),
        ('{"messages": [{"role": "user"}]}', "must have the texts role and content"),
        ('{"prompt": "1", "completion": "2"}', r"the keys \['completion'\], which the output"),
    ],
)
def test_a_bad_line_is_named_before_any_work(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "1"}\n\n' + line + "\n")
    output = tmp_path / "out.jsonl"
    # There is no such model: it would be the error if it were looked for first.
    options = ["--prompts", str(source), "--output", str(output)]
    assert main(["generate", "--model", str(tmp_path / "none"), *options]) == 2
    error = capsys.readouterr().err
    assert f"egspo: error: {source}, line 3" in error
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)
    assert not output.exists()


def test_one_completion_appears_as_it_grows(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def flush(self) -> None:
            seen.append(self.getvalue())

    seen: list[str] = []
    monkeypatch.setattr("sys.stdout", Screen())
    assert command(run, "--prompt", "00", "--seed", str(WORDY)) == 0
    whole = seen[-1]
    assert whole.endswith("\n") and 0 < len(seen[0]) < len(whole) - 1
    assert all(whole.startswith(text) for text in seen)


def breaking(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """Generation ends with ``error`` after so many completions."""

    def broken(*args: Any, **options: Any) -> Iterator[Any]:
        ended = 0
        for event in stream(*args, **options):
            yield event
            ended += isinstance(event, Completion)
            if ended == after:
                raise error

    monkeypatch.setattr(egspo.serving.generation, "stream", broken)


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (FloatingPointError("NaN logits"), 2)]
)
def test_an_interrupted_file_is_continued(
    error: BaseException,
    code: int,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1\n1234\n\n00\n214\n")
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    options = ["--prompts", str(prompts), "--batch-size", "1", "--output"]
    assert command(run, *options, str(whole)) == 0
    with monkeypatch.context() as patch:
        breaking(patch, 2, error)
        assert command(run, *options, str(part)) == code
    assert part.read_text() == "".join(whole.read_text().splitlines(keepends=True)[:2])
    with part.open("a") as stream_:
        stream_.write('{"index": 2, "promp')  # a kill in the middle of a line

    capsys.readouterr()
    assert command(run, *options, str(part)) == 2
    message = capsys.readouterr().err
    assert f"{part} exists already" in message and "\n  --resume " in message
    assert command(run, *options, str(part), "--resume") == 0
    assert part.read_text() == whole.read_text()
    # Nothing left to do, and no model needed for that.
    assert main(["generate", "--model", "none", *options, str(part), "--resume"]) == 0
    assert "has all 4 answers" in capsys.readouterr().err
    assert command(run, *options, str(part), "--overwrite") == 0
    assert part.read_text() == whole.read_text()
    (old,) = tmp_path.glob("part.jsonl.old-*")
    assert old.read_text() == whole.read_text()


def test_one_process_at_a_time_writes_to_a_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    assert command(run, "--prompt", "1", "--output", str(output)) == 0
    before = output.read_text()
    link.symlink_to(output)
    hold_elsewhere(tmp_path / f"{LOCK}-out.jsonl")
    for file, option in ((output, "--resume"), (link, "--resume"), (output, "--overwrite")):
        options = ["--prompt", "1", "--prompt", "2", "--output", str(file), option]
        assert command(run, *options) == 2
        said = f"--output {output} is in use by process"
        assert said in capsys.readouterr().err.replace("\n", " ")
    assert output.read_text() == before
    assert command(run, "--prompt", "1", "--output", str(tmp_path), "--overwrite") == 2
    assert f"--output is a file, and {tmp_path} is a folder" in capsys.readouterr().err
    (tmp_path / f"{LOCK}-out.jsonl").unlink()
    assert command(run, "--prompt", "1", "--output", str(tmp_path / "other.jsonl")) == 0
    assert not list(tmp_path.glob(".*"))


def test_resuming_what_is_not_there_starts(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "new.jsonl"
    assert command(run, "--prompt", "1", "--output", str(output), "--resume") == 0
    assert [record["index"] for record in records(output.read_text())] == [0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"index": 0, "prompt": "2", "completion": ""}', "answers another prompt 0"),
        ('{"index": 5, "prompt": "1", "completion": ""}', "not an answer to one of the 1 prompts"),
        ('{"prompt": "1", "completion": ""}', "not an answer"),
        ("egspo", "not an answer"),
    ],
)
def test_a_file_of_other_prompts_is_not_continued(
    line: str, message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "other.jsonl"
    output.write_text(line + "\n")
    assert command(run, "--prompt", "1", "--output", str(output), "--resume") == 2
    error = capsys.readouterr().err
    assert f"{output}, line 1 " in error and message in error
    assert output.read_text() == line + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "--resume needs --output FILE"),
        (["--overwrite"], "--overwrite needs --output FILE"),
        (["--resume", "--output", "a.txt"], "--resume needs JSONL output"),
        (["--resume", "--overwrite", "--output", "a.jsonl"], "give one of them"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--model", "none", "--prompt", "1", *options]) == 2
    assert message in capsys.readouterr().err


def test_interrupted_text_keeps_what_was_done(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest prompt is answered first, but stands third: it is not lost with the wait."""
    texts = ["1", "1234", "000000000000"]
    options = [part for text in texts for part in ("--prompt", text)] + ["--batch-size", "1"]
    whole, part = tmp_path / "whole.txt", tmp_path / "part.txt"
    assert command(run, *options, "--output", str(whole)) == 0
    answers = whole.read_text().split("\n\n###")
    assert [answer.removeprefix("### ").split("\n")[0].strip() for answer in answers] == texts
    breaking(monkeypatch, 1, KeyboardInterrupt())
    assert command(run, *options, "--output", str(part)) == 130
    assert part.read_text() == "\n###" + answers[2]


def test_the_generation_config_of_a_model_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(model(), TOKENIZER, CONFIG, tmp_path)
    folder = next(tmp_path.rglob("config.json")).parent
    save_generation_config(CONFIG, folder)
    file = folder / "egspo_generation.json"
    file.write_text(file.read_text().replace('"cache"', '"cach"'))
    assert command(tmp_path, "--prompt", "1") == 2
    assert "cach: unknown key; did you mean cache?" in capsys.readouterr().err
