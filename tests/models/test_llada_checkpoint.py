"""Checkpoints in the official layout, new models, tokenizers and special tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from egspo.models import (
    LLaDAConfig,
    LLaDAForMaskedLM,
    LLaDAModel,
    SpecialTokens,
    load_model,
    load_tokenizer,
    new_model,
    special_token_ids,
)

# Field for field what the published config.json has, at a small size.
OFFICIAL_CONFIG: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 16,
    "embedding_dropout": 0.0,
    "embedding_size": 40,
    "eos_token_id": 2,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 5,
    "max_sequence_length": 32,
    "mlp_hidden_size": 24,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "pad_token_id": 2,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 38,
    "weight_tying": False,
}


def layout(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official tensors, written out from the published layout."""
    width, hidden, rows = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    kv = width // config["n_heads"] * config["n_kv_heads"]
    block = {
        "attn_norm": (width,),
        "ff_norm": (width,),
        "q_proj": (width, width),
        "k_proj": (kv, width),
        "v_proj": (kv, width),
        "attn_out": (width, width),
        "ff_proj": (hidden, width),
        "up_proj": (hidden, width),
        "ff_out": (width, hidden),
    }
    names = {"wte": (rows, width), "ln_f": (width,)}
    if not config["weight_tying"]:
        names["ff_out"] = (rows, width)
    for n in range(config["n_layers"]):
        names |= {f"blocks.{n}.{name}": shape for name, shape in block.items()}
    return {f"model.transformer.{name}.weight": shape for name, shape in names.items()}


def write_checkpoint(
    folder: Path, *, shards: int = 1, dtype: torch.dtype = torch.float32, **fields: Any
) -> dict[str, torch.Tensor]:
    """An official-looking checkpoint of random weights; returns its tensors."""
    config = {**OFFICIAL_CONFIG, **fields}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in layout(config).items()
    }
    write_tensors(folder, tensors, shards)
    return tensors


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
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


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {key: value for file in files for key, value in load_file(file).items()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and torch.equal(actual[key], value), key


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_official_checkpoints_round_trip(
    tmp_path: Path, shards: int, tied: bool, dtype: torch.dtype
) -> None:
    tensors = write_checkpoint(tmp_path / "in", shards=shards, dtype=dtype, weight_tying=tied)
    model = load_model(tmp_path / "in")
    assert isinstance(model, LLaDAForMaskedLM) and not model.training
    assert model.config._attn_implementation == "sdpa"
    assert_same(model.state_dict(), tensors)

    model.save_pretrained(tmp_path / "out", max_shard_size="4KB" if shards > 1 else "1GB")
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shards > 1)
    assert_same(read_tensors(tmp_path / "out"), tensors)
    assert_same(load_model(tmp_path / "out").state_dict(), tensors)


def test_auto_classes_need_no_remote_code(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LLaDAConfig
    for auto in (AutoModelForMaskedLM, AutoModelForCausalLM):
        model = auto.from_pretrained(tmp_path)
        assert type(model) is LLaDAForMaskedLM
        assert_same(model.state_dict(), tensors)
    trunk = AutoModel.from_pretrained(tmp_path)
    assert type(trunk) is LLaDAModel
    head = "model.transformer.ff_out.weight"
    body = {k.removeprefix("model."): v for k, v in tensors.items() if k != head}
    assert_same(trunk.state_dict(), body)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        hidden = model(ids).last_hidden_state
        assert torch.equal(trunk(ids).last_hidden_state, hidden)


def test_official_fields_are_written_back(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in")
    load_model(tmp_path / "in").save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    # transformers sets the first two itself, and counts use_cache as a generation setting
    ours = {"architectures", "transformers_version", "use_cache"}
    assert {
        k: v for k, v in OFFICIAL_CONFIG.items() if written.get(k, "absent") != v
    }.keys() <= ours
    assert written["precision"] == "amp_bf16" and written["init_fn"] == "mitchell"


def test_llada_8b_has_the_published_tensors() -> None:
    config = LLaDAConfig()
    with torch.device("meta"):
        model = LLaDAForMaskedLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    published = {
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "mlp_hidden_size": 12288,
        "embedding_size": 126464,
        "weight_tying": False,
    }
    assert shapes == layout(published)
    assert len(shapes) == 291
    assert model.num_parameters() == 8_015_581_184


def test_a_loaded_model_computes_what_a_built_one_does(tmp_path: Path) -> None:
    """Nothing outside the checkpoint is left uninitialised by loading through the meta device."""
    tensors = write_checkpoint(tmp_path)
    built = LLaDAForMaskedLM(LLaDAConfig(**OFFICIAL_CONFIG)).eval()
    built.load_state_dict(tensors)
    ids = torch.arange(30).view(2, 15)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_model(tmp_path, dtype=dtype)
        assert loaded.dtype == dtype
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, built.to(dtype)(ids).logits)


Edit = Callable[[dict[str, torch.Tensor]], None]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop("model.transformer.blocks.1.up_proj.weight"),
            r"1 missing: model\.transformer\.blocks\.1\.up_proj\.weight",
        ),
        (
            lambda t: t.update({"model.transformer.blocks.7.q_proj.weight": torch.zeros(2)}),
            r"1 unknown: model\.transformer\.blocks\.7\.q_proj\.weight",
        ),
        (
            lambda t: t.update({"model.transformer.ln_f.weight": torch.zeros(8)}),
            r"1 mis-shaped: model\.transformer\.ln_f\.weight \(file \(8,\), model \(16,\)\)",
        ),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path, edit: Edit, message: str) -> None:
    tensors = write_checkpoint(tmp_path)
    edit(tensors)
    write_tensors(tmp_path, tensors)
    for load in (load_model, AutoModelForMaskedLM.from_pretrained, LLaDAModel.from_pretrained):
        with pytest.raises(ValueError, match=message if load is load_model else "does not fit"):
            load(tmp_path)


def test_loading_info_and_mismatches_on_request(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    model, info = LLaDAForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, LLaDAForMaskedLM) and not any(info.values())
    write_tensors(tmp_path, {**tensors, "model.transformer.ln_f.weight": torch.zeros(8)})
    _, info = LLaDAForMaskedLM.from_pretrained(
        tmp_path, output_loading_info=True, ignore_mismatched_sizes=True
    )
    assert [key for key, *_ in info["mismatched_keys"]] == ["model.transformer.ln_f.weight"]


def test_a_tied_checkpoint_has_no_head(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**OFFICIAL_CONFIG, "weight_tying": True}))
    write_tensors(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"1 unknown: model\.transformer\.ff_out\.weight"):
        load_model(tmp_path)


def test_other_architectures_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type 'llama'; supported are \['Dream', 'llada',"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model at .*absent"):
        load_model(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no model at .*empty"):
        load_model(tmp_path / "empty")


def test_new_models_are_a_function_of_the_seed(tiny: dict[str, Any]) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, second, other = (new_model(tiny, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert_same(second.state_dict(), first.state_dict())
    weight = "model.transformer.blocks.0.q_proj.weight"
    assert not torch.equal(other.state_dict()[weight], first.state_dict()[weight])
    assert first.dtype == torch.float32
    assert 0.17 < first.state_dict()[weight].std() < 0.23  # init_std 0.2
    assert (first.model.transformer.ln_f.weight == 1).all()


def test_new_models_refuse_unknown_fields(tiny: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"unknown fields .*\['d_modle'\]"):
        new_model({**tiny, "d_modle": 64}, seed=0)
    with pytest.raises(ValueError, match="got 'llama'"):
        new_model({**tiny, "model_type": "llama"}, seed=0)
    assert new_model({**tiny, "model_type": "llada"}, seed=0).config.d_model == 32


def write_tokenizer(folder: Path, **special: str) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<bos>", "<eos>", "a", "b", "<|mdm_mask|>"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", **special
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_the_mask_token_comes_from_the_tokenizer_or_the_configuration(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "own", mask_token="b")
    assert load_tokenizer(tmp_path / "own").mask_token_id == 4

    write_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match="none' has no mask token"):
        load_tokenizer(tmp_path / "none")
    config = LLaDAConfig(vocab_size=38, mask_token_id=5)
    tokenizer = load_tokenizer(tmp_path / "none", config)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|mdm_mask|>", 5)
    with pytest.raises(ValueError, match="mask_token_id 9 is no token"):
        load_tokenizer(tmp_path / "none", LLaDAConfig(vocab_size=38, mask_token_id=9))

    write_checkpoint(tmp_path / "none")  # the official folder: model and tokenizer together
    assert load_tokenizer(tmp_path / "none").mask_token_id == 5
    with pytest.raises(FileNotFoundError, match="absent"):
        load_tokenizer(tmp_path / "absent")


def test_special_tokens(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)

    def tokens(**fields: Any) -> SpecialTokens:
        base = {"vocab_size": 38, "mask_token_id": 5, "eos_token_id": 2, "pad_token_id": 3}
        return special_token_ids(tokenizer, LLaDAConfig(**{**base, **fields}))

    assert tokens() == SpecialTokens(mask=5, eos=2, pad=3)
    assert tokens(eos_token_id=[4, 2]).eos == 4
    assert tokens(eos_token_id=None, pad_token_id=None) == SpecialTokens(mask=5, eos=2, pad=2)
    with pytest.raises(ValueError, match="has a mask token"):
        tokens(mask_token_id=None)
    with pytest.raises(ValueError, match="mask_token_id and eos_token_id must differ"):
        tokens(eos_token_id=5)
    with pytest.raises(ValueError, match="mask_token_id and pad_token_id must differ"):
        tokens(pad_token_id=5)
    with pytest.raises(ValueError, match="mask_token_id 38 is outside the vocabulary of 38"):
        tokens(mask_token_id=38)
    tokenizer.mask_token = "b"
    with pytest.raises(ValueError, match="mask_token_id is 5, the tokenizer's 4"):
        tokens()


def test_files_name_tensors_as_the_official_ones_do(tmp_path: Path) -> None:
    new_model(OFFICIAL_FIELDS, seed=0).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert shapes == layout(OFFICIAL_CONFIG)


OFFICIAL_FIELDS = {
    name: OFFICIAL_CONFIG[name]
    for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "vocab_size")
} | {"embedding_size": 40}
