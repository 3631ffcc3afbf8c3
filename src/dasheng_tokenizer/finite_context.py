"""What both block-wise and streamed work stand on: results that depend on a finite stretch of their surroundings.

`ContextBlocks` cuts audio that arrives in pieces into blocks with the context that front ends need. `FiniteContext`
applies a network whose tokens see a finite number of neighbours to tokens that arrive in pieces. Either way the results
are those of the whole clip, whatever the pieces were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from dasheng_tokenizer.samples import Array
from dasheng_tokenizer.spectral import CONTEXT, SAMPLES_PER_TOKEN


class ContextBlocks:
    """Pieces of a clip at 16 kHz → blocks of tokens with context audio (see `spectral`).

    The clip's start is mirrored before it, silence follows its end, as `with_context` does for a whole clip.

    Args:
        block_tokens: tokens a block; the last has fewer.
        wait: give only blocks of that size until the clip ends; else as many tokens as there are, at most that size.
    """

    def __init__(self, block_tokens: int, wait: bool = True) -> None:
        self.block_tokens, self.wait = block_tokens, wait
        self._pieces: list[Array] = []  # from CONTEXT samples before the next block on, or from the clip's start
        self._held = 0  # samples in them
        self._started = False

    def push(self, piece: Array) -> Iterator[tuple[Tensor, int]]:
        """(channels, any) samples → blocks that are complete: (channels, CONTEXT + 640·N + CONTEXT) and N."""
        self._pieces.append(piece)
        self._held += piece.shape[1]
        while (ready := min((self._after_left() - CONTEXT) // SAMPLES_PER_TOKEN, self.block_tokens)) > 0:
            if self.wait and ready < self.block_tokens:
                return
            yield self._cut(ready), ready

    def finish(self) -> Iterator[tuple[Tensor, int]]:
        """The rest of the clip, with a last token where samples are left over."""
        while (samples := self._after_left()) > 0:
            size = min(-(-samples // SAMPLES_PER_TOKEN), self.block_tokens)
            yield self._cut(size), size

    def _after_left(self) -> int:
        """Samples from the start of the next block on."""
        return self._held - (CONTEXT if self._started else 0)

    def _cut(self, size: int) -> Tensor:
        audio = self._pieces[0] if len(self._pieces) == 1 else np.concatenate(self._pieces, axis=1)
        end = size * SAMPLES_PER_TOKEN + CONTEXT + (CONTEXT if self._started else 0)
        block = np.pad(audio[:, :end], ((0, 0), (0, max(0, end - self._held))))  # (channels, left + 640·N + CONTEXT)
        if not self._started:
            block = np.concatenate([block[:, CONTEXT:0:-1], block], axis=1)
        rest = audio[:, end - 2 * CONTEXT :]
        self._pieces, self._held, self._started = [rest], rest.shape[1], True
        return torch.from_numpy(np.ascontiguousarray(block))


class FiniteContext:
    """A network on tokens that arrive in pieces, equal to it on all of them, at constant memory.

    Args:
        network: (B, T, any) → (B, scale·T, …), where what belongs to a token depends on `context` tokens on each side.
        context: see there.
        scale: results a token, 1 for tokens to tokens, 640 for tokens to samples.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], context: int, scale: int = 1) -> None:
        self.network, self.context, self.scale = network, context, scale
        self._held: Tensor | None = None  # from `context` tokens before the next one on, or from the clip's start
        self._first = 0  # place of the next one in it

    def push(self, piece: Tensor) -> Tensor | None:
        """(B, any, …) → results of the tokens whose neighbours are all here; None where there is no such token."""
        self._held = piece if self._held is None else torch.cat([self._held, piece], dim=1)
        end = self._held.shape[1] - self.context
        if end <= self._first:
            return None
        results = self.network(self._held)[:, self.scale * self._first : self.scale * end]
        start = max(0, end - self.context)
        self._held, self._first = self._held[:, start:], end - start
        return results

    def finish(self) -> Tensor | None:
        """The results of the tokens that are left; None where there are none."""
        held, self._held = self._held, None
        if held is None or held.shape[1] <= self._first:
            return None
        return self.network(held)[:, self.scale * self._first :]
