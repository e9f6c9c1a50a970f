"""All states of some trajectories of a block-causal model in one pass, or in two.

Clean columns stand first, and behind them a copy of the block of each state
(:mod:`egspo.models.blocks`). Whole blocks of a prompt depend on nothing behind them. So
trajectories that answer the same prompt may have them computed once, in a pass of their own, whose
keys and values each goes on from; gradients flow through both. The tail of a prompt shares its
block with the completion, and stays in each trajectory's pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from egspo.models.cache import KeyValueCache, SharedCache
from egspo.models.routes import Routes
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.trajectory import PromptBatch


@dataclass(frozen=True)
class Streams:
    """The S columns of R trajectories."""

    ids: Tensor
    """int64 [R, S]."""
    real: Tensor
    """bool [R, S], False at padding."""
    positions: Tensor
    """int64 [R, S], from the first token of the prompt."""
    streams: Tensor
    """int64 [R, S], 0 at clean columns."""
    experts: Tensor | None = None
    """int16 [R, S, R', K], that the rollout chose."""
    replay: bool = False
    """Whether the passes take them; otherwise they are compared with them."""
    computed: Tensor | None = None
    """bool [R, S], where the rollout chose some."""

    def hidden_states(
        self, denoiser: Denoiser, *, keep: bool
    ) -> tuple[Tensor, KeyValueCache | None]:
        """Hidden states [R, S, D] by one pass, and if ``keep`` its keys and values."""
        routes = self._routes(self.experts)
        found = denoiser.stream_hidden_states(
            self.ids, self.real, self.positions, self.streams, keep=keep, routes=routes
        )
        self._compare(denoiser, routes, self.experts, self.real)
        return found

    def shared_hidden_states(
        self, denoiser: Denoiser, prompts: PromptBatch, size: int, *, keep: bool
    ) -> tuple[Tensor, KeyValueCache | None]:
        """The same by a pass over the whole blocks of the different prompts, and one over the rest.

        Args:
            denoiser: of the model.
            prompts: of the R trajectories.
            size: positions of a block.
            keep: also return the keys and values of all S columns.

        Returns:
            Hidden states [R, N, D] of the last N columns, which have all copies.
        """
        first, of = prompts.distinct()
        lengths = prompts.mask.sum(1)
        tails = lengths % size
        width, device = prompts.ids.shape[1], lengths.device
        whole, begin = max(width - int(tails.min()), 1), width - int(tails.max())
        # A prompt of fewer whole blocks than others has padding there, on either side.
        shared = (self.streams == 0) & (self.positions < (lengths - tails)[:, None])
        shared &= torch.arange(shared.shape[1], device=device) < whole

        head = slice(0, whole)
        there = (self.real & shared)[first, head]
        experts = None if self.experts is None else self.experts[first, head]
        routes = self._routes(experts)
        _, cache = denoiser.stream_hidden_states(
            *(self.ids[first, head], there, self.positions[first, head]),
            self.streams[first, head],
            keep=True,
            routes=routes,
        )
        self._compare(denoiser, routes, experts, there, first, head)
        assert cache is not None

        rest = slice(begin, None)
        columns = torch.arange(begin, self.ids.shape[1], device=device).expand(len(self.ids), -1)
        experts = None if self.experts is None else self.experts[:, rest]
        routes = self._routes(experts)
        live = ~shared[:, rest]
        found = denoiser.stream_hidden_states(
            *(self.ids[:, rest], self.real, self.positions, self.streams),
            cache=SharedCache(cache.keys, cache.values, of=of, columns=self.ids.shape[1]),
            columns=columns,
            live=live,
            keep=keep,
            routes=routes,
        )
        self._compare(denoiser, routes, experts, self.real[:, rest] & live, slice(None), rest)
        denoiser.work.spared_columns += self.ids.numel() - there.numel() - columns.numel()
        return found

    def _routes(self, experts: Tensor | None) -> Routes | None:
        return None if experts is None else Routes(experts if self.replay else None)

    def _compare(
        self,
        denoiser: Denoiser,
        routes: Routes | None,
        experts: Tensor | None,
        real: Tensor,
        rows: slice | Tensor = slice(None),
        columns: slice = slice(None),
    ) -> None:
        """Count the agreement with ``experts``, of the ``rows`` and ``columns`` here."""
        if routes is None or experts is None:
            return
        if self.computed is not None:
            real = real & self.computed[rows, columns]
        denoiser.agreement.add(routes, experts, real)
