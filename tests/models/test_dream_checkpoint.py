"""Dream's checkpoints and tokenizer files in the official layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from egspo.config import GenerationConfig
from egspo.models import (
    DreamConfig,
    DreamForMaskedLM,
    DreamModel,
    SpecialTokens,
    load_model,
    load_tokenizer,
    new_model,
    special_token_ids,
)
from egspo.models.tokenization import decode_completions, encode_prompts, end_of_turn
from egspo.rollouts.denoiser import Denoiser
from egspo.serving.generation import generate
from egspo.tasks import Example
from egspo.training.sft import SupervisedData
from tests.helpers.chatml import AB, EOS, IM_END, IM_START, MASK, SPACE, write_tokenizer

# Field for field what the published config.json has, at a small size.
OFFICIAL_CONFIG: dict[str, Any] = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_dream.DreamConfig",
        "AutoModel": "modeling_dream.DreamModel",
    },
    "bos_token_id": 257,
    "eos_token_id": 257,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "mask_token_id": 261,
    "max_position_embeddings": 96,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 257,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 272,
}


def layout(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official tensors, written out from the published layout."""
    width, hidden, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = width // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (width, width),
        "self_attn.q_proj.bias": (width,),
        "self_attn.k_proj.weight": (kv, width),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, width),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (hidden, width),
        "mlp.up_proj.weight": (hidden, width),
        "mlp.down_proj.weight": (width, hidden),
    }
    names = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        names["lm_head.weight"] = (rows, width)
    for n in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return names


def write_checkpoint(
    folder: Path, *, shards: int = 1, dtype: torch.dtype = torch.float32, **fields: Any
) -> dict[str, torch.Tensor]:
    """An official-looking checkpoint of random weights; returns its tensors."""
    config = {**OFFICIAL_CONFIG, **fields}
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"_from_model_config": True, "alg": "origin", "alg_temp": None, "eps": 0.001}
    (folder / "generation_config.json").write_text(json.dumps({**generation, "steps": 512}))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in layout(config).items()
    }
    write_tensors(folder, tensors, shards)
    return tensors


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and torch.equal(actual[key], value), key


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_official_checkpoints_round_trip(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    tensors = write_checkpoint(tmp_path / "in", shards=3, dtype=dtype, tie_word_embeddings=tied)
    model = load_model(tmp_path / "in")
    assert isinstance(model, DreamForMaskedLM) and not model.training
    assert model.dtype == torch.bfloat16 or dtype == torch.float32
    assert_same(load_model(tmp_path / "in", dtype=dtype).state_dict(), tensors)

    load_model(tmp_path / "in", dtype=dtype).save_pretrained(tmp_path / "out", max_shard_size="4KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert_same(read_tensors(tmp_path / "out"), tensors)
    assert_same(load_model(tmp_path / "out", dtype=dtype).state_dict(), tensors)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == "Dream" and written["max_window_layers"] == 28


@pytest.mark.parametrize("model_type", ["Dream", "dream"])
def test_the_model_type_in_either_case(tmp_path: Path, model_type: str) -> None:
    tensors = write_checkpoint(tmp_path, model_type=model_type)
    assert_same(load_model(tmp_path, dtype=torch.float32).state_dict(), tensors)


def test_auto_classes_need_no_remote_code(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DreamConfig
    model = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(model) is DreamForMaskedLM
    assert_same(model.state_dict(), tensors)
    trunk = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(trunk) is DreamModel
    body = {k.removeprefix("model."): v for k, v in tensors.items() if k != "lm_head.weight"}
    assert_same(trunk.state_dict(), body)


def test_dream_7b_has_the_published_tensors() -> None:
    with torch.device("meta"):
        model = DreamForMaskedLM(DreamConfig())
    published = {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == layout(published)
    assert len(shapes) == 339
    assert model.num_parameters() == 7_615_616_512


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "1 missing"),
        ("model.layers.1.self_attn.q_proj.bias", None, "1 missing"),
        ("model.layers.7.self_attn.o_proj.weight", torch.zeros(2), "1 unknown"),
        ("model.layers.0.self_attn.o_proj.bias", torch.zeros(16), "1 unknown"),
        ("model.norm.weight", torch.zeros(8), "1 mis-shaped"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    tensors = write_checkpoint(tmp_path)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    write_tensors(tmp_path, tensors)
    with pytest.raises(ValueError, match=f"does not fit DreamForMaskedLM; {message}: {name}"):
        load_model(tmp_path)


def test_a_tied_checkpoint_has_no_head(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    fields = {**OFFICIAL_CONFIG, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    write_tensors(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"1 unknown: lm_head\.weight"):
        load_model(tmp_path)


def test_new_models_by_model_type() -> None:
    fields = {"model_type": "dream", "hidden_size": 16, "num_attention_heads": 2}
    fields |= {"num_key_value_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    model = new_model({**fields, "vocab_size": 12}, seed=0)
    assert isinstance(model, DreamForMaskedLM)
    with pytest.raises(ValueError, match=r"unknown fields for a new Dream model: \['d_model'\]"):
        new_model({**fields, "d_model": 16}, seed=0)


# --- The tokenizer and where a completion ends


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    write_checkpoint(tmp_path / "hub")
    write_tokenizer(tmp_path / "hub")
    return load_tokenizer(tmp_path / "hub")


def test_official_tokenizer_files_need_no_remote_code(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert tokenizer("ab a", add_special_tokens=False)["input_ids"] == [AB, SPACE, 0]
    assert tokenizer.mask_token_id == MASK
    tokens = special_token_ids(tokenizer, load_model(tmp_path / "hub").config)
    assert tokens == SpecialTokens(mask=MASK, eos=EOS, pad=EOS)
    # Beside an adapter there is no config.json.
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert saved.get_vocab() == tokenizer.get_vocab()
    assert saved.chat_template == tokenizer.chat_template
    assert saved("ab a", add_special_tokens=False)["input_ids"] == [AB, SPACE, 0]
    assert AutoTokenizer.from_pretrained(tmp_path / "hub").mask_token_id == MASK


def test_prompts_are_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    (ids,) = encode_prompts(tokenizer, [[{"role": "user", "content": "ab"}]])
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert text.endswith("user\nab<|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(IM_START) == 3 and ids.count(IM_END) == 2


def test_a_completion_ends_with_its_turn_or_with_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    assert end_of_turn(tokenizer) == IM_END
    completions = [
        [0, IM_END, EOS, EOS],  # the usual way
        [0, IM_END, 1, EOS],  # text behind the turn is not of the answer
        [0, EOS, 1, IM_END],
        [0, 1, 2, 0],
        [IM_END, 0, 1, 2],
    ]
    texts = decode_completions(tokenizer, completions, eos_id=EOS)
    assert texts == ["a", "a", "a", "abca", ""]


def test_supervised_targets_end_as_the_chat_template_has_it(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = load_model(tmp_path / "hub", dtype=torch.float32)
    denoiser = Denoiser(model, mask_id=MASK, eos_id=EOS, pad_id=EOS)
    prompt = [{"role": "user", "content": "c"}]
    examples = [Example(prompt, {}, target) for target in ("ab", "cccc", "ccc")]
    data = SupervisedData.encode(tokenizer, examples, 4, denoiser)
    assert data.completions.tolist() == [[AB, IM_END, EOS, EOS], [2, 2, 2, 2], [2, 2, 2, IM_END]]


def test_generation_end_to_end(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = load_model(tmp_path / "hub", dtype=torch.float32)
    config = GenerationConfig(max_new_tokens=8, steps=4, block_length=4, temperature=1.0)
    chats = [[{"role": "user", "content": text}] for text in ("a", "ab ab", "c")]
    together = generate(model, tokenizer, chats, config)
    assert any(together)
    one = [generate(model, tokenizer, chats[:1], config)[0]]
    assert one == together[:1]
