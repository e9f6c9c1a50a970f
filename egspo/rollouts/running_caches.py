"""Keys and values of block-causal sequences between two blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from egspo.models.cache import KeyValueCache
from egspo.models.routes import Routes
from egspo.rollouts.causal import CausalDecoder
from egspo.rollouts.trajectory import PromptBatch


class RunningCaches:
    """The caches of the sequences that are being denoised, in the order of the last batch.

    A prompt is computed once for all sequences that answer it. What was dropped is computed again
    from the tokens.

    Args:
        decoder: of the rollout.
        prompts: of all sequences.
        length: of completions.
        experts: int16 [N, P + L, R, K], gets those of the columns that are computed here.
    """

    def __init__(
        self,
        decoder: CausalDecoder,
        prompts: PromptBatch,
        length: int,
        experts: Tensor | None = None,
    ) -> None:
        self.decoder, self.prompts, self.length = decoder, prompts, length
        self.experts = experts
        ids, mask = prompts.ids.tolist(), prompts.mask.tolist()
        self.keys = [
            tuple(t for t, real in zip(*row, strict=True) if real)
            for row in zip(ids, mask, strict=True)
        ]
        self.rows: list[int] = []
        self.cache: KeyValueCache | None = None
        self.prefilled: dict[tuple[int, ...], tuple[KeyValueCache, int, Tensor | None]] = {}
        """By prompt that others wait to answer: one sequence, its first column, and experts."""

    def clear(self) -> None:
        """Drop everything."""
        self.rows, self.cache, self.prefilled = [], None, {}

    def of(
        self, rows: list[int], tokens: Tensor, starts: list[int], waiting: list[int]
    ) -> KeyValueCache:
        """Of the sequences ``rows``, each at a block that begins at its ``starts``.

        Args:
            rows: of all sequences.
            tokens: int64 [N, L], all completions.
            starts: by sequence, of all.
            waiting: sequences not begun.
        """
        if self.cache is not None and rows == self.rows:
            return self.cache
        size = self.decoder.block_length
        known = set(self.rows)
        kept = [i for i in rows if i in known]
        fresh = [i for i in rows if i not in known and starts[i] <= 0]
        lost = [i for i in rows if i not in known and starts[i] > 0]
        self._prefill([i for i in fresh if self.keys[i] not in self.prefilled])
        parts: list[tuple[list[int], int, KeyValueCache, list[int]]] = []
        if kept:
            assert self.cache is not None
            parts.append((kept, 0, self.cache, [self.rows.index(i) for i in kept]))
        for i in fresh:
            cache, first, experts = self.prefilled[self.keys[i]]
            self._keep(i, first, experts)
            parts.append(([i], first, cache, [0]))
        for i in lost:
            parts.append(([i], *self._again(i, tokens[i], starts[i]), [0]))
        width = self.prompts.ids.shape[1] + self.length + 2 * size
        result = parts[0][2].room(len(rows), width)
        place = {i: n for n, i in enumerate(rows)}
        for those, first, cache, source in parts:
            device = self.prompts.ids.device
            to = torch.tensor([place[i] for i in those], device=device)
            result.put(to, first, cache, torch.tensor(source, device=device))
        wanted = {self.keys[i] for i in waiting}
        self.prefilled = {k: v for k, v in self.prefilled.items() if k in wanted}
        self.rows, self.cache = list(rows), result
        return result

    def _prefill(self, rows: list[int]) -> None:
        """Compute the prompts of ``rows``, each once."""
        unique = list({self.keys[i]: i for i in reversed(rows)}.values())
        if not unique:
            return
        index = torch.tensor(unique, device=self.prompts.ids.device)
        batch = PromptBatch(self.prompts.ids[index], self.prompts.mask[index])[:]
        first = self.decoder.block_length + self.prompts.ids.shape[1] - batch.ids.shape[1]
        cache, experts = self._clean(batch)
        for n, i in enumerate(unique):
            one = None if experts is None else experts[n]
            self.prefilled[self.keys[i]] = cache.take(torch.tensor([n])), first, one

    def _again(self, row: int, tokens: Tensor, start: int) -> tuple[int, KeyValueCache]:
        """First column and cache of a sequence whose blocks before ``start`` are finished."""
        prompt = self.prompts.ids[row][self.prompts.mask[row]]
        ids = torch.cat([prompt, tokens[:start]])[None]
        first = self.decoder.block_length + self.prompts.ids.shape[1] - len(prompt)
        cache, experts = self._clean(PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool)))
        self._keep(row, first, None if experts is None else experts[0])
        return first, cache

    def _keep(self, row: int, first: int, experts: Tensor | None) -> None:
        """Take down the ``experts`` [n, R, K] of a sequence whose columns begin at ``first``."""
        if self.experts is not None and experts is not None:
            begin = first - self.decoder.block_length
            self.experts[row, begin : begin + len(experts)] = experts

    def _clean(self, batch: PromptBatch) -> tuple[KeyValueCache, Tensor | None]:
        """The last block of a sequence, where it is a part, is computed to be overwritten."""
        denoiser = self.decoder.denoiser
        mask = None if bool(batch.mask.all()) else batch.mask
        routes = Routes() if self.decoder.record else None
        with denoiser.autocast(), denoiser.eagerly():
            cache = denoiser.hidden_states_and_cache(batch.ids, mask, routes)[1]
        return cache, None if routes is None else routes.stacked()
