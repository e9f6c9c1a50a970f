"""The masked-diffusion bound on likelihoods, and which completions are greedy."""

from __future__ import annotations

import itertools

import pytest
import torch

from egspo.config import GenerationConfig
from egspo.models import new_model
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import rollout
from egspo.rollouts.trajectory import PromptBatch
from egspo.serving.likelihood import Request, greedily_decoded, likelihood_bounds
from tests.families import make
from tests.helpers.runs import MODEL
from tests.helpers.toy import MASK, PROMPT, toy_denoiser

EOS, PAD, MASK_ID, VOCAB = 1, 0, 2, 12


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    special = {"eos_token_id": EOS, "pad_token_id": PAD, "mask_token_id": MASK_ID}
    sizes = {"vocab_size": VOCAB, "embedding_size": VOCAB}
    model = new_model({**MODEL, **special, **sizes}, seed=3)
    return Denoiser(model, mask_id=MASK_ID, eos_id=EOS, pad_id=PAD)


@torch.no_grad()
def exact_bound(table: Denoiser, completion: tuple[int, ...]) -> float:
    """By its definition, over all numbers and all sets of masked positions."""
    length, total = len(completion), 0.0
    for count in range(1, length + 1):
        subsets = list(itertools.combinations(range(length), count))
        for masked in subsets:
            canvas = [MASK if i in masked else token for i, token in enumerate(completion)]
            logits = table.model.logits(torch.tensor([canvas]))[0]  # type: ignore[operator]
            log_probs = logits[:, :MASK].log_softmax(1)  # a mask is never a token
            value = sum(float(log_probs[i, completion[i]]) for i in masked)
            total += length / count * value / len(subsets) / length
    return total


def test_estimates_the_bound() -> None:
    completion = (0, 1, 0)
    table = toy_denoiser(len(completion), seed=4)
    exact = exact_bound(table, completion)
    estimates = [
        likelihood_bounds(table, [(PROMPT, completion)], samples=n, seed=5, batch_size=512)[0]
        for n in (30, 30_000)
    ]
    assert estimates[0] == pytest.approx(exact, abs=0.5)
    assert estimates[1] == pytest.approx(exact, abs=0.01)
    assert estimates[0] != pytest.approx(exact, abs=1e-4)


def test_one_token_is_exact_and_needs_one_pass(denoiser: Denoiser) -> None:
    before = denoiser.work.forwards
    prompt = [3, 4, 5]
    requests: list[Request] = [(prompt, [token]) for token in range(3, VOCAB)]
    bounds = likelihood_bounds(denoiser, requests, samples=64, seed=0, batch_size=16)
    assert denoiser.work.forwards - before == 1
    hidden = denoiser.hidden_states(torch.tensor([[*prompt, MASK_ID]]), None)[0, -1:]
    logits = denoiser.logits(hidden)[0].index_fill(0, torch.tensor(MASK_ID), -torch.inf)
    torch.testing.assert_close(torch.tensor(bounds), logits.log_softmax(0)[3:])


def test_an_estimate_depends_on_its_request_and_the_seed_alone(denoiser: Denoiser) -> None:
    requests: list[Request] = [([3, 4], [5, 6, 7]), ([3], [8, 4]), ([9] * 6, [3, 4, 5, 6, 7])]

    def bounds(requests: list[Request], batch_size: int = 4, seed: int = 1) -> list[float]:
        return likelihood_bounds(denoiser, requests, samples=6, seed=seed, batch_size=batch_size)

    together = bounds(requests)
    alone = [bounds([request], batch_size=1)[0] for request in requests]
    assert alone == pytest.approx(together, rel=1e-5)
    assert bounds(requests[::-1]) == pytest.approx(together[::-1], rel=1e-5)
    others = bounds(requests, seed=2)
    assert all(a != pytest.approx(b, rel=1e-5) for a, b in zip(together, others, strict=True))


def test_what_greedy_decoding_gives_is_greedy_and_nothing_else(denoiser: Denoiser) -> None:
    prompts = [[3, 4, 5], [6], [7, 8, 9, 10, 3, 3]]
    requests: list[Request] = []
    for length, prompt in zip((4, 1, 6), prompts, strict=True):
        config = GenerationConfig(
            max_new_tokens=length, steps=length, block_length=length, temperature=0.0
        )
        batch = PromptBatch.from_lists([prompt], PAD)
        tokens = rollout(denoiser, batch, config, seed=0, sequence_ids=torch.tensor([0])).tokens
        requests.append((prompt, tokens[0].tolist()))
    wrong: list[Request] = []
    for prompt, completion in requests:
        for place in range(len(completion)):
            changed = list(completion)
            changed[place] = 3 if completion[place] != 3 else 4
            wrong.append((prompt, changed))
    greedy = greedily_decoded(denoiser, requests + wrong, batch_size=5)
    assert greedy == [True] * len(requests) + [False] * len(wrong)


def test_bad_requests(denoiser: Denoiser) -> None:
    for request, part in ((([], [3]), "prompt"), (([3], []), "completion")):
        for call in (likelihood_bounds, greedily_decoded):
            options = {"samples": 2, "seed": 0} if call is likelihood_bounds else {}
            with pytest.raises(ValueError, match=f"the {part} of request 1 has no tokens"):
                call(denoiser, [([3], [4]), request], batch_size=2, **options)  # type: ignore
    with pytest.raises(ValueError, match="samples must be >= 1, got 0"):
        likelihood_bounds(denoiser, [([3], [4])], samples=0, seed=0, batch_size=1)


# --- Block-causal models


def block_denoiser() -> Denoiser:
    model = make("sdar", initializer_range=0.5).double()
    return Denoiser(model, mask_id=5, eos_id=1, pad_id=1)


@pytest.mark.parametrize("prompt", [2, 4, 7])
def test_the_bound_of_a_block_causal_model_is_the_sum_over_its_blocks(prompt: int) -> None:
    """With blocks of one token it is the exact log-probability, whatever the samples."""
    denoiser = block_denoiser()
    denoiser.model.config.block_size = 1
    ids = torch.randint(6, 60, (prompt + 5,), generator=torch.Generator().manual_seed(0))
    request = (ids[:prompt].tolist(), ids[prompt:].tolist())
    (bound,) = likelihood_bounds(denoiser, [request], samples=3, seed=0, batch_size=4)
    expected = 0.0
    for i in range(prompt, len(ids)):
        with torch.no_grad():
            logits = denoiser.model(torch.cat([ids[:i], torch.tensor([5])])[None]).logits[0, i]
        logits[5] = -torch.inf
        expected += float(logits.log_softmax(0)[ids[i]])
    assert bound == pytest.approx(expected, abs=1e-6)


def test_the_bound_of_blocks_estimates_what_it_should() -> None:
    """Against all masks of each block, for a prompt that leaves part of a block."""
    denoiser, generator = block_denoiser(), torch.Generator().manual_seed(0)
    ids = torch.randint(6, 60, (8,), generator=generator)
    prompt, completion = ids[:3], ids[3:]  # blocks of 1 and 4
    expected = 0.0
    for start, end in ((0, 1), (1, 5)):
        size = end - start
        for k in range(1, size + 1):
            sets = list(itertools.combinations(range(start, end), k))
            for masked in sets:
                tokens = ids[: 3 + end].clone()
                tokens[[3 + i for i in masked]] = 5
                with torch.no_grad():
                    logits = denoiser.model(tokens[None]).logits[0]
                logits[:, 5] = -torch.inf
                found = logits.log_softmax(1)
                total = sum(float(found[3 + i, completion[i]]) for i in masked)
                expected += total * size / k / size / len(sets)
    request = (prompt.tolist(), completion.tolist())
    (bound,) = likelihood_bounds(denoiser, [request], samples=400, seed=0, batch_size=100)
    assert bound == pytest.approx(expected, abs=0.25)  # a mean of 400 canvases


@pytest.mark.parametrize("prompt", [3, 4])
def test_greedy_decoding_goes_block_by_block(prompt: int) -> None:
    denoiser = block_denoiser()
    ids = [7, 9, 11, 13][:prompt]
    config = GenerationConfig(
        max_new_tokens=8, steps=8, block_length=4, temperature=0.0, early_exit=False
    )
    prompts = PromptBatch.from_lists([ids], 1)
    sampled = rollout(denoiser, prompts, config, seed=0, sequence_ids=torch.arange(1))
    right = sampled.tokens[0].tolist()
    wrong = [*right[:6], 6 + (right[6] - 5) % 50, right[7]]
    assert greedily_decoded(denoiser, [(ids, right), (ids, wrong)], batch_size=2) == [True, False]
