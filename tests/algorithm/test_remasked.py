"""Objectives on completions that are masked again: by their formulas in float64; their masks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from egspo.algorithm.objectives.remasked import completion_tokens, smallest
from egspo.config import REMASKED
from tests.helpers.remasked import EOS, KLS, LENGTH, REWARDS, TOKENS, Scored, built, options
from tests.helpers.toy import MASK, toy_denoiser


@pytest.mark.parametrize("name", REMASKED)
def test_loss_and_gradient_are_those_of_the_formula(name: str, tmp_path: Path) -> None:
    scored = Scored(options(name, tmp_path))
    scored.move()
    for update in (0, 1):
        mine, plain = scored.loss(update), scored.formula(update)
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)
        found, expected = (torch.autograd.grad(loss, scored.table)[0] for loss in (mine, plain))
        assert float(expected.abs().max()) > 1e-4
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sorted(KLS))
def test_the_first_ratio_is_one(name: str, tmp_path: Path) -> None:
    scored = Scored(options(name, tmp_path))
    states = scored.selection.states
    for update in (0, 1):  # each under masks of its own
        for index in scored.scores.groups[update]:
            outcome = scored.objective.loss(states, index, scored.scores, scored.advantage, 1.0)
            assert (outcome.ratio == 1).all()
            assert torch.equal(outcome.log_prob, scored.scores.recorded[index])
    once = Scored(options(name, tmp_path, num_iterations=1, beta=0.0))
    assert once.scores.old_log_prob is None  # then it is that of the update's own pass
    outcome = once.objective.loss(
        once.selection.states, once.scores.groups[0][0], once.scores, once.advantage, 1.0
    )
    assert (outcome.ratio == 1).all()


@pytest.mark.parametrize("name", REMASKED)
def test_a_micro_batch_parts_no_completion_and_changes_no_gradient(
    name: str, tmp_path: Path
) -> None:
    scored = Scored(options(name, tmp_path))
    gradients = []
    for size in (1, 1000):
        scored.objective.micro_batches.size = size
        scores = scored.objective.score(scored.selection.states)
        for group in scores.groups:
            assert all(len(index) % scored.objective.canvases == 0 for index in group)
        scored.scores = scores
        gradients.append(torch.autograd.grad(scored.loss(0), scored.table)[0])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", REMASKED)
def test_masks_are_a_function_of_seed_update_and_sequence(name: str, tmp_path: Path) -> None:
    objective = built(options(name, tmp_path), toy_denoiser(LENGTH))
    tokens = completion_tokens(TOKENS.repeat(1, 4), EOS) | True
    ids, shown = torch.arange(8), torch.ones(8, 30, dtype=torch.bool)
    masks = objective.masks(shown, tokens, ids, 3)
    padded = torch.cat([torch.zeros(8, 5, dtype=torch.bool), shown], dim=1)
    some = objective.masks(padded[2:4], tokens[2:4], ids[2:4], 3)
    assert torch.equal(some.hidden, masks.hidden[2:4])
    assert torch.equal(some.prompt[..., 5:], masks.prompt[2:4]) and not some.prompt[..., :5].any()
    other = objective.masks(shown, tokens, ids, 4)
    assert not torch.equal(torch.cat(other[:2], dim=2), torch.cat(masks[:2], dim=2))


@pytest.mark.parametrize("name", ["mean_field", "weighted", "sandwich"])
def test_prompts_are_masked_at_their_rate(name: str, tmp_path: Path) -> None:
    objective = built(options(name, tmp_path), toy_denoiser(LENGTH))
    shown = torch.ones(400, 100, dtype=torch.bool)
    tokens = torch.ones(400, LENGTH, dtype=torch.bool)
    masks = objective.masks(shown, tokens, torch.arange(400), 0).prompt
    # 40,000 tokens at least: a standard deviation of 0.0018.
    assert float(masks.double().mean()) == pytest.approx(0.15, abs=0.01)


def test_the_elbo_estimate_is_unbiased(tmp_path: Path) -> None:
    """Its mean over all masks is the ELBO of its definition, in which every order counts alike."""
    torch.manual_seed(0)
    n, value = 4, torch.rand(16, 4, dtype=torch.float64)  # by the set that is masked, and the token
    sets = [[k for k in range(n) if code >> k & 1] for code in range(16)]
    by_size = {size: [s for s in sets if len(s) == size] for size in range(n + 1)}

    def total(masked: list[int]) -> float:
        return float(value[sum(1 << k for k in masked), masked].sum())

    exact = 0.0
    for size in range(1, n + 1):
        mean = sum(map(total, by_size[size])) / len(by_size[size])
        exact += mean * n / size / n
    objective = built(options("sequence_elbo", tmp_path, mask_samples=1), toy_denoiser(n))
    tokens = torch.ones(20000, n, dtype=torch.bool)
    masks = objective.masks(torch.ones(20000, 2, dtype=torch.bool), tokens, torch.arange(20000), 0)
    sizes = masks.scored[:, 0].sum(1)
    expected = torch.zeros((), dtype=torch.float64)
    for size in range(n + 1):
        found = masks.weight[sizes == size]
        share = float((sizes == size).double().mean())
        assert share == pytest.approx(1 / (n + 1), abs=0.015)  # five standard deviations
        first, second = (
            sum(map(total, by_size[count])) / len(by_size[count]) for count in (size, n - size)
        )
        assert (found == found[0]).all()
        expected += (found[0, 0] * first + found[0, 1] * second) / (n + 1)
    assert float(expected) == pytest.approx(exact, rel=1e-12)
    # And every set of a size is as likely as any other.
    codes = (masks.scored[:, 0] * (1 << torch.arange(n))).sum(1).bincount(minlength=16)
    for size, chosen in by_size.items():
        counts = codes[[sum(1 << k for k in s) for s in chosen]].double()
        assert float(counts.max() - counts.min()) < 6 * float(counts.mean()) ** 0.5, size


def test_sandwiched_blocks_are_masked_as_the_rollout_decodes(tmp_path: Path) -> None:
    objective = built(options("sandwich", tmp_path, prompt_masking=0.0), toy_denoiser(LENGTH))
    tokens = torch.arange(8) < torch.tensor([8, 5, 1]).repeat(200)[:, None]
    shown = torch.ones(600, 2, dtype=torch.bool)
    hidden = objective.masks(shown, tokens, torch.arange(600), 0).hidden[:, 0]
    firsts = set()
    for row, n in zip(hidden.tolist(), tokens.sum(1).tolist(), strict=True):
        first = row.index(True) // 2  # the block that is masked in part
        firsts.add((n, first))
        assert first * 2 < n and all(row[first * 2 + 2 :]) and all(row[n:])
    assert firsts == {(8, b) for b in range(4)} | {(5, b) for b in range(3)} | {(1, 0)}


def test_the_upper_bound_is_above_the_lower_one(tmp_path: Path) -> None:
    """By Jensen, for every beta >= 1, were all masks of all sizes averaged."""
    denoiser = toy_denoiser(3, seed=4)
    table = denoiser.model.table.detach()[..., :MASK].log_softmax(-1)
    tokens = (0, 1, 1)
    masked_sets = [[k for k in range(3) if code >> k & 1] for code in range(1, 8)]

    def log_prob(masked: list[int], k: int) -> float:
        canvas = [MASK if j in masked else t for j, t in enumerate(tokens)]
        return float(table[sum(t * (MASK + 1) ** j for j, t in enumerate(canvas)), k, tokens[k]])

    def weight(masked: list[int]) -> float:
        return 1 / 3 / math.comb(3, len(masked))

    lower = sum(weight(m) * 3 / len(m) * log_prob(m, k) for m in masked_sets for k in m)
    for beta in (1.0, 1.5, 2.0):
        upper = 0.0
        for k in range(3):
            mean = sum(
                weight(m) * 3 / len(m) * math.exp(beta * log_prob(m, k))
                for m in masked_sets
                if k in m
            )
            upper += math.log(mean) / beta
        assert upper > lower


def test_what_has_no_reward_or_teaches_nothing_is_left_out(tmp_path: Path) -> None:
    rewards = REWARDS.clone()
    rewards[0, 1], rewards[1] = float("nan"), 0.5
    for name in REMASKED:
        scored = Scored(options(name, tmp_path, beta=0.0), rewards)
        assert set(scored.selection.sequences) == {0, 2, 3}, name
        assert scored.selection.skipped_groups == 1
        assert float(scored.advantage[:: scored.objective.canvases].sum()) == pytest.approx(0.0)


def test_weights_are_softmaxes_over_the_members_with_a_reward(tmp_path: Path) -> None:
    objective = built(options("weighted", tmp_path, weight_scale=2.0), toy_denoiser(LENGTH))
    rewards = torch.tensor([[1.0, float("nan"), 0.0, 0.0], [3.0] * 4], dtype=torch.float64)
    up = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    expected = 4 * (up.softmax(0) - (-up).softmax(0))
    found = objective.completion_advantages(rewards)
    torch.testing.assert_close(found[0, [0, 2, 3]], expected)
    assert found[0, 1] == 0 and (found[1] == 0).all()
    assert (objective.completion_advantages(rewards * float("nan")) == 0).all()


def test_smallest_takes_as_many_of_the_allowed_as_asked_for() -> None:
    noise = torch.tensor([[0.3, 0.1, 0.2, 0.0], [0.5, 0.5, 0.5, 0.5]])
    allowed = torch.tensor([[True, True, True, False], [False, True, True, True]])
    found = smallest(noise, allowed, torch.tensor([2, 2]))
    assert found.tolist() == [[False, True, True, False], [False, True, True, False]]
    assert smallest(noise, allowed, torch.tensor([0, 9])).sum(1).tolist() == [0, 3]


def test_tokens_count_up_to_the_first_eos() -> None:
    tokens = torch.tensor([[5, 9, 5, 9], [5, 5, 5, 5], [9, 9, 9, 9]])
    expected = [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert completion_tokens(tokens, eos_id=9).tolist() == expected


def test_a_block_causal_model_is_refused(tmp_path: Path) -> None:
    denoiser = toy_denoiser(LENGTH)
    denoiser.model.config.block_size = 2
    with pytest.raises(ValueError, match=r"coupled masks whole completions.*block-causal"):
        built(options("coupled", tmp_path), denoiser)
