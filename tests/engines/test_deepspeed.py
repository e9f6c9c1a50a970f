"""DeepSpeed ZeRO on two processes: what one process with AdamW does, to rounding."""

from __future__ import annotations

import importlib.util
import math
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DeepSpeedPlugin, DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.integrations import is_deepspeed_zero3_enabled

from egspo.config import OptimizerConfig
from egspo.engines import choose_engine
from egspo.engines.deepspeed import DeepSpeedModel, deepspeed_config
from egspo.engines.optimization import NonFiniteError, build_optimizer
from egspo.engines.processes import Processes, process_state
from egspo.engines.whole import Engine, WholeModel
from egspo.models import add_lora, new_model
from tests.helpers.runs import config as run_config
from tests.helpers.runs import forkserver, start, train_parallel

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)

MODEL = {
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 2,
    "mlp_hidden_size": 27,  # with a bias of an odd size, that two processes cannot halve
    "include_bias": True,
    "max_sequence_length": 64,
    "init_std": 0.2,
    "vocab_size": 37,
    "embedding_size": 37,
    "mask_token_id": 36,
    "eos_token_id": 35,
    "pad_token_id": 35,
}
# AdamW's first updates are the gradient's sign where eps is tiny: where it is 0, its rounding's.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, eps=1e-2, max_grad_norm=1.0)
# No weight of a model this small is divided otherwise.
OPTIONS = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
PROCESSES, MICRO_BATCHES, STEPS = 2, 2, 2
CASES = ("full", "tied", "checkpointing", "lora")


def build(case: str, device: str = "cpu") -> nn.Module:
    model: Any = new_model({**MODEL, "weight_tying": case == "tied"}, seed=0).eval()
    if case == "checkpointing":
        model.checkpoint_activations()
    if case == "lora":  # a frozen base in half precision, as on a GPU
        model = add_lora(model.bfloat16(), rank=3, alpha=6, dropout=0.0, seed=0).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return nn.Module.to(model, device)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(model, OPTIMIZER)


def tokens(step: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randint(0, 34, (3, 11), generator=generator)


def hidden(model: Any, ids: Tensor) -> Tensor:
    """As the denoiser calls the model."""
    ids = ids.to(next(model.parameters()).device)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=hasattr(model, "peft_config")):
        output = model(input_ids=ids, attention_mask=None, compute_logits=False)
    state: Tensor = output.last_hidden_state
    return state.float()


def loss(model: Any, step: int, number: int) -> Tensor:
    """Of a micro-batch, times the head outside the model; of the last one there is nothing."""
    ids = tokens(step, number)
    states, head = hidden(model, ids), model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    logits = nn.functional.linear(
        states, head.weight.float(), bias if bias is None else bias.float()
    )
    weight = 0.0 if number == PROCESSES * MICRO_BATCHES - 1 else 1.0
    targets = ids.flatten().to(logits.device)
    return weight * nn.functional.cross_entropy(logits.flatten(0, 1), targets)


def train(engine: Engine, model: nn.Module, steps: range, mine: range, share: int) -> list[float]:
    """With the micro-batches ``mine``; the norms of the gradient."""
    scheduler = LambdaLR(engine.optimizer, lambda step: 1.0 / (1 + steps.start + step))
    norms = []
    for step in steps:
        for number in mine:
            last = number == mine[-1]
            engine.backward(loss(model, step, number) / share, last=last)
        assert engine.reduce_gradients(True)
        norms.append(engine.clip(OPTIMIZER.max_grad_norm))
        engine.step()
        scheduler.step()
    return norms


def plain(case: str, steps: range, device: str = "cpu") -> tuple[nn.Module, Engine, list[float]]:
    """One process, with all micro-batches."""
    model = build(case, device)
    engine = WholeModel(model, make_optimizer, Processes(alone=True))
    count = PROCESSES * MICRO_BATCHES
    return model, engine, train(engine, model, steps, range(count), PROCESSES)


def as_rank(stage: int, kind: str, folder: Path, rank: int, port: int) -> None:
    """One of the processes: every case, and what came of it."""
    if kind == "cpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(PROCESSES),
        LOCAL_WORLD_SIZE=str(PROCESSES),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    process_state()
    device = f"cuda:{rank}" if kind == "cuda" else "cpu"
    processes = Processes(60.0)
    mine = range(rank * MICRO_BATCHES, (rank + 1) * MICRO_BATCHES)

    def engine_of(model: nn.Module) -> DeepSpeedModel:
        return DeepSpeedModel(
            model,
            make_optimizer,
            processes,
            stage=stage,
            max_grad_norm=OPTIMIZER.max_grad_norm,
            options=OPTIONS,
        )

    for case in CASES:
        model = build(case, device)
        engine = engine_of(model)
        with engine.gathered(), torch.no_grad():
            before, *_ = [hidden(model, tokens(9, i)) for i in range(1 + rank)]
        # Where nobody has a gradient there is no step, and nothing is left of the passes.
        engine.backward(0 * loss(model, 0, 0), last=True)
        assert not engine.reduce_gradients(False)
        norms = train(engine, model, range(STEPS), mine, 1)
        whole = sum(parameter.numel() for parameter in model.parameters())
        assert (whole == 0) == (stage == 3)
        with engine.gathered(), torch.no_grad():
            after, *_ = [hidden(model, tokens(9, i)) for i in range(2 - rank)]
        weights, state = engine.weights(), engine.optimizer_state()

        # A new one goes on from what one process left.
        one, other, _ = plain(case, range(STEPS), device)
        engine = engine_of(one)
        engine.load_optimizer_state(other.optimizer_state())
        train(engine, one, range(STEPS, STEPS + 1), mine, 1)
        continued = engine.weights()

        engine.backward(loss(one, 0, 0) * math.inf, last=True)
        with pytest.raises(NonFiniteError, match="gradient norm"):
            engine.clip(1.0)
        if rank == 0:
            found = {"kind": kind, "norms": norms, "weights": weights, "state": state}
            found |= {"before": before.cpu(), "after": after.cpu(), "continued": continued}
            torch.save(found, folder / f"{case}.pt")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, "cpu"), id="zero2"),
        pytest.param((3, "cpu"), id="zero3"),
        pytest.param((2, "cuda"), id="zero2-gpu", marks=pytest.mark.gpu),
        pytest.param((3, "cuda"), id="zero3-gpu", marks=pytest.mark.gpu),
    ],
)
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    stage, kind = request.param
    if kind == "cuda" and torch.cuda.device_count() < PROCESSES:
        pytest.skip(f"needs {PROCESSES} CUDA devices")
    folder = tmp_path_factory.mktemp("zero")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        forkserver().Process(target=as_rank, args=(stage, kind, folder, rank, port))
        for rank in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    return lambda case: torch.load(folder / f"{case}.pt")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_what_one_does(
    case: str, results: Callable[[str], dict[str, Any]]
) -> None:
    found = results(case)
    tolerance, of_states = tolerances(case, found["kind"])
    with torch.no_grad():
        close(found["before"], hidden(build(case), tokens(9, 0)), of_states)
    model, engine, norms = plain(case, range(STEPS))
    assert found["norms"] == pytest.approx(norms, rel=tolerance)
    assert norms[0] > OPTIMIZER.max_grad_norm  # it is clipped
    with torch.no_grad():
        close(found["after"], hidden(model, tokens(9, 0)), of_states)
    assert found["weights"].keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert found["weights"][name].dtype == parameter.dtype
        close(found["weights"][name], parameter.detach(), tolerance)

    expected = engine.optimizer_state()
    assert found["state"]["param_groups"] == expected["param_groups"]
    assert found["state"]["state"].keys() == expected["state"].keys()
    for index, values in expected["state"].items():
        assert found["state"]["state"][index].keys() == values.keys()
        for name, value in values.items():
            close(found["state"]["state"][index][name], value, tolerance)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_goes_on_with_another_engine(
    case: str, results: Callable[[str], dict[str, Any]]
) -> None:
    found = results(case)
    tolerance, _ = tolerances(case, found["kind"])
    model, engine, _ = plain(case, range(STEPS))
    third = range(STEPS, STEPS + 1)
    everything = range(PROCESSES * MICRO_BATCHES)
    train(engine, model, third, everything, PROCESSES)
    for name, parameter in model.named_parameters():  # from one process to ZeRO
        close(found["continued"][name], parameter.detach(), tolerance)

    other = build(case)  # and from ZeRO to one process
    other.load_state_dict(found["weights"], strict=False)
    engine = WholeModel(other, make_optimizer, Processes(alone=True))
    engine.load_optimizer_state(found["state"])
    train(engine, other, third, everything, PROCESSES)
    for name, parameter in model.named_parameters():
        close(dict(other.named_parameters())[name].detach(), parameter.detach(), tolerance)


@needs_deepspeed
@pytest.mark.slow
def test_a_run_goes_on_with_the_other_stage(tmp_path: Path) -> None:
    """The whole of a run, with checkpoints that do not say which engine it was."""
    run, half = tmp_path / "run", {"steps": 2}
    zero3, zero2 = ({"distributed": {"engine": engine}} for engine in ("zero3", "zero2"))
    assert start(run, 2, zero3, half) == [0, 0]
    assert start(run, 2, zero2, resume=run) == [0, 0]
    train_parallel(tmp_path / "one")
    (expected,) = (tmp_path / "one" / "final").rglob("*.safetensors")
    weights = load_file(run / expected.relative_to(tmp_path / "one"))
    for name, weight in load_file(expected).items():
        close(weights[name], weight, 1e-5)


def tolerances(case: str, kind: str) -> tuple[float, float]:
    """Of weights and of hidden states."""
    if case == "lora":  # in half precision a product may be rounded elsewhere
        return 1e-3, 0.1
    return (1e-5, 1e-4) if kind == "cpu" else (1e-4, 1e-3)  # products in another order


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert float((found.float() - expected.float()).abs().max()) < tolerance


@needs_deepspeed
def test_what_accelerate_makes_of_its_configuration() -> None:
    plugin = DeepSpeedPlugin(
        zero_stage=3, gradient_accumulation_steps=1, gradient_clipping=0.2, zero3_init_flag=True
    )
    plugin.set_mixed_precision("no")
    config = deepspeed_config(3, 0.2, 4, plugin.deepspeed_config)
    assert config["train_batch_size"] == 4
    with pytest.raises(ValueError, match=r"gradient_clipping is 0.2, by the recipe it is 0.5"):
        deepspeed_config(3, 0.5, 4, plugin.deepspeed_config)

    # Models are loaded whole, whatever accelerate says to transformers.
    plugin.set_deepspeed_weakref()
    assert is_deepspeed_zero3_enabled()
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        state=SimpleNamespace(deepspeed_plugin=plugin),
        num_processes=2,
    )
    assert choose_engine(run_config(Path("unused")), accelerator) == "zero3"
    assert not is_deepspeed_zero3_enabled()


def test_accelerate_leaves_deepspeed_out_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, num_processes=2)
    with pytest.raises(ValueError, match="accelerate leaves the DeepSpeed"):
        choose_engine(run_config(Path("unused")), accelerator)


def test_the_launchers_options_are_kept_and_completed() -> None:
    options = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": "auto",
            "offload_param": {"device": "none", "nvme_path": None},
        },
    }
    config = deepspeed_config(3, 0.2, 4, options)
    assert config["train_batch_size"] == 4
    assert config["gradient_clipping"] == 0.2
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["zero_optimization"]["reduce_bucket_size"] == 50_000_000
    assert options["train_batch_size"] == "auto"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2, not 3"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, by the recipe it is 0.2"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4, by the recipe"),
        ({"bf16": {"enabled": True}}, "DeepSpeed's bf16 casts the weights"),
        ({"optimizer": {"type": "Adam"}}, "DeepSpeed's optimizer is not used"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer is not supported",
        ),
    ],
)
def test_options_that_contradict_the_recipe(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deepspeed_config(3, 0.2, 4, options)


def test_half_precision_weights_are_not_trained() -> None:
    with pytest.raises(ValueError, match=r"trains float32 weights here, .* is torch.bfloat16"):
        DeepSpeedModel(
            build("full").bfloat16(),
            make_optimizer,
            Processes(alone=True),
            stage=3,
            max_grad_norm=1.0,
        )


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed"
)
def test_a_missing_library_is_named() -> None:
    with pytest.raises(ValueError, match=r"pip install 'egspo\[deepspeed\]'"):
        DeepSpeedModel(
            build("full"), make_optimizer, Processes(alone=True), stage=2, max_grad_norm=1.0
        )
