"""EleutherAI's lm-evaluation-harness on masked diffusion models: ``--model egspo``.

    python -m egspo.evaluations.lm_eval_adapter run --model egspo --model_args pretrained=RUN ...

is lm-eval's command line with this model known to it; releases of lm-eval with plugins (later than
0.4.13) find it by its entry point, and then ``lm_eval`` itself does. Needs ``egspo[lm-eval]``.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather, gather_object
from tqdm import tqdm

from egspo.config import GenerationConfig
from egspo.config.convert import from_mapping
from egspo.engines.processes import process_state
from egspo.rollouts.completion import completions_of
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import rollout_blocks
from egspo.rollouts.trajectory import PromptBatch
from egspo.serving.likelihood import greedily_decoded, likelihood_bounds
from egspo.serving.named_model import NamedModel, generation_config, weights_folder

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"lm-evaluation-harness is not installed ({error}): pip install 'egspo[lm-eval]'"
    ) from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MODEL_NAME = "egspo"
# Tasks set these for other kinds of model. The first change nothing where decoding is greedy.
_SAMPLING = ("top_p", "top_k", "min_p")
_NEUTRAL = {"top_p": 1, "top_k": 0, "min_p": 0, "num_beams": 1, "repetition_penalty": 1}
_RANK_STRIDE = 1 << 32


class EgspoLM(TemplateLM):  # type: ignore[misc]
    """A masked diffusion model for lm-eval; its keyword arguments are ``--model_args``.

    ``generate_until`` denoises by the rollout engine and cuts at the first stop string.
    ``loglikelihood`` is an estimate of a lower bound, see :mod:`egspo.serving.likelihood`: choices
    are compared by it, as is usual for these models, but it is no likelihood.

    Args:
        pretrained: a run, folder of weights or hub name.
        adapter: LoRA adapter, or a run that trained one.
        mc_samples: canvases per likelihood.
        seed: of masks and of sampling noise.
        batch_size: canvases in a forward pass; ``auto`` is None: the one trained with.
        device: None or ``cuda:0`` for the process's own: a GPU, or the CPU where there is none.
        decoding: fields of :class:`egspo.config.GenerationConfig`. Those left out are what the
            model was trained with. ``max_new_tokens`` is the length of every canvas; without it,
            a task's ``max_gen_toks``, rounded up to whole blocks, is, or else the length trained
            with. ``steps`` grow with the length unless they are given.

    Raises:
        FileNotFoundError, ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        adapter: str | None = None,
        mc_samples: int = 128,
        seed: int = 0,
        batch_size: int | str | None = None,
        device: str | None = None,
        **decoding: Any,
    ) -> None:
        super().__init__()
        for name, value, least in (("mc_samples", mc_samples, 1), ("seed", seed, 0)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
        folder = None if adapter is None else weights_folder(adapter, "adapter", option=_OPTION)
        chosen = NamedModel(weights_folder(pretrained, "model", option=_OPTION), folder)
        self.mc_samples, self.seed, self.given = mc_samples, seed, decoding
        if "temperature" in decoding:
            raise ValueError(
                "temperature is the task's: --gen_kwargs do_sample=True,temperature=X changes it"
            )
        if batch_size is not None:
            given = str(batch_size)
            if not given.isdecimal() and not re.fullmatch(r"auto(:\d+)?", given):
                raise ValueError(f"batch_size must be a whole number or auto, got {batch_size!r}")
            if given.isdecimal():
                decoding["batch_size"] = int(given)
        self.trained = chosen.trained
        self.default = generation_config({}, self.trained)
        self._state = process_state()
        self._rank, self._world_size = self._state.process_index, self._state.num_processes
        self._device = self._state.device
        if device not in (None, "cuda", "cuda:0"):  # lm-eval's command line says cuda:0 by default
            self._device = torch.device(device)
        self._config(self.default.max_new_tokens, 0.0)  # refuses wrong options before the weights
        model, self.tokenizer = chosen.load(self._device)
        self.denoiser = Denoiser.of(model, self.tokenizer)
        self.context = getattr(model.config, "max_sequence_length", None)

    @property
    def eot_token_id(self) -> int:
        return self.denoiser.eos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Without special tokens, unless the text spells them (chat templates do)."""
        ids: list[int] = self.tokenizer(string, add_special_tokens=bool(add_special_tokens))[
            "input_ids"
        ]
        return ids

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(prompt, completion) for _, prompt, completion in requests]
        for number, (prompt, completion) in enumerate(pairs):
            self._check_length(number, len(prompt) + len(completion))
        batch_size = self._config(self.default.max_new_tokens, 0.0).batch_size
        with self._bar(len(pairs), "likelihood", disable_tqdm) as bar:
            bounds = likelihood_bounds(
                self.denoiser,
                pairs,
                samples=self.mc_samples,
                seed=self.seed,
                batch_size=batch_size,
                on_done=bar.update,
            )
        greedy = greedily_decoded(self.denoiser, pairs, batch_size=batch_size)
        results = list(zip(bounds, greedy, strict=True))
        for (texts, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        raise NotImplementedError(
            "perplexity tasks (loglikelihood_rolling) need the likelihood of whole documents; a "
            "masked diffusion model gives a bound on that of a completion, and perplexities made "
            "from it would not compare with those of autoregressive models"
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        settings = [_Generation.of(request.args[1]) for request in requests]
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        groups: dict[tuple[int, float], list[int]] = defaultdict(list)
        for number, (prompt, setting) in enumerate(zip(prompts, settings, strict=True)):
            length = self._length(setting.max_tokens)
            if not prompt:
                raise ValueError(f"request {number} has an empty prompt")
            self._check_length(number, len(prompt) + length)
            groups[length, setting.temperature].append(number)
        texts = [""] * len(requests)
        with self._bar(len(requests), "generate", disable_tqdm) as bar:
            for (length, temperature), numbers in groups.items():
                config = self._config(length, temperature)
                for number, text in self._completions(prompts, numbers, config):
                    texts[number] = settings[number].cut(text)
                    self.cache_hook.add_partial(
                        "generate_until", requests[number].args, texts[number]
                    )
                    bar.update(1)
        return texts

    def all_gather(self, tensor: Any) -> Any:
        return gather(tensor.reshape(-1)) if self.world_size > 1 else tensor

    def gather_object(self, obj: Any, dst: int = 0) -> Any:
        gathered = gather_object([obj])
        return gathered if self.rank == dst else None

    def barrier(self) -> None:
        self._state.wait_for_everyone()

    def _completions(
        self, prompts: Sequence[list[int]], numbers: Sequence[int], config: GenerationConfig
    ) -> Any:
        """(number, text) of the prompts at ``numbers``, as they end."""
        device = self.denoiser.device
        blocks = rollout_blocks(
            self.denoiser,
            PromptBatch.from_lists([prompts[n] for n in numbers], self.denoiser.pad_id, device),
            config,
            seed=self.seed,
            sequence_ids=torch.tensor(numbers, device=device) + self.rank * _RANK_STRIDE,
        )
        for block in blocks:
            if block.finished:
                places = [numbers[row] for row in block.finished]
                for completion in completions_of(
                    block.ended, self.tokenizer, self.denoiser.eos_id, indices=places
                ):
                    yield completion.index, completion.text

    def _length(self, asked: int | None) -> int:
        """Of the canvas, where a task asks for at most ``asked`` tokens."""
        if "max_new_tokens" in self.given or asked is None:
            return int(self.given.get("max_new_tokens", self.default.max_new_tokens))
        block = int(self.given.get("block_length", self.default.block_length))
        return -(-asked // block) * block

    def _config(self, length: int, temperature: float) -> GenerationConfig:
        """Decoding of a canvas of ``length`` tokens."""
        given = {"max_new_tokens": length, **self.given, "temperature": temperature}
        if "steps" not in given:
            tokens = self.default.max_new_tokens / self.default.steps
            given["steps"] = max(1, round(given["max_new_tokens"] / tokens))
        return from_mapping(GenerationConfig, {**asdict(self.default), **given}, "model_args")

    def _check_length(self, number: int, total: int) -> None:
        if self.context is not None and total > self.context:
            raise ValueError(
                f"request {number} and its completion have {total} tokens, the model's context is "
                f"{self.context}: fewer examples (--num_fewshot) or a smaller max_new_tokens fit"
            )

    def _bar(self, total: int, what: str, disabled: bool) -> tqdm[Any]:
        return tqdm(total=total, desc=what, disable=disabled or self.rank != 0)


@dataclass(frozen=True)
class _Generation:
    """What a task asks for."""

    until: list[str]
    max_tokens: int | None
    temperature: float

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> _Generation:
        """Of a task's ``generation_kwargs``; raises ValueError for what cannot be done."""
        options = dict(normalize_gen_kwargs(dict(given), default_max_gen_toks=0))
        until = [str(text) for text in options.pop("until") if text]
        length, sampled = int(options.pop("max_gen_toks")), bool(options.pop("do_sample"))
        temperature = float(options.pop("temperature", 0.0))
        refused = [
            f"{name}={value!r}"
            for name, value in options.items()
            if value != _NEUTRAL.get(name) and (sampled or name not in _SAMPLING)
        ]
        if refused:
            raise ValueError(f"generation_kwargs {', '.join(refused)}: not for this model")
        return cls(until, length or None, temperature if sampled else 0.0)

    def cut(self, text: str) -> str:
        """``text`` before the first of the stop strings."""
        ends = [text.find(end) for end in self.until]
        return text[: min((end for end in ends if end >= 0), default=len(text))]


_OPTION = "--model_args pretrained="


def register() -> None:
    """Make ``egspo`` known to lm-eval, where no entry point has."""
    import lm_eval.models  # noqa: F401  (registers lm-eval's own)
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target="egspo.evaluations.lm_eval_adapter:EgspoLM")


def main() -> None:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    register()
    try:
        cli_evaluate()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"lm-eval: error: {error}")


if __name__ == "__main__":
    main()
