"""Prompts and continuations as padded rows of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Prompts(NamedTuple):
    """The prompts of a batch, padded on the left.

    Attributes:
        tokens: Shape ``(B, P)``.
        mask: True where a token is not padding, shape ``(B, P)``.
    """

    tokens: Tensor
    mask: Tensor

    def equal(self, other: Prompts) -> bool:
        """Whether they are the same. It waits for the device."""
        return torch.equal(self.mask, other.mask) and torch.equal(self.tokens, other.tokens)


class Continued(NamedTuple):
    """Prompts and the student's continuations of them.

    Attributes:
        prompts: The prompts.
        tokens: The new tokens; padding after the end token; shape ``(B, N)``.
        mask: True up to the end token, which counts, shape ``(B, N)``.
    """

    prompts: Prompts
    tokens: Tensor
    mask: Tensor

    def rows(self, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt, continuation and padding in each row.

        Args:
            ignore_index: Label of the prompt and of the padding.

        Returns:
            Tokens, attention mask and labels, shape ``(B, T)``.
        """
        tokens = torch.cat([self.prompts.tokens, self.tokens], 1)
        mask = torch.cat([self.prompts.mask, self.mask], 1)
        answers = torch.cat([torch.zeros_like(self.prompts.mask), self.mask], 1)
        labels = tokens.masked_fill(~answers, ignore_index)
        order = (~mask).long().argsort(stable=True, dim=1)[:, : int(mask.sum(1).max())]
        return tokens.gather(1, order), mask.gather(1, order).long(), labels.gather(1, order)

    def decoder_rows(self, start: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of a decoder, whose input begins with a start token.

        Args:
            start: The start token.
            ignore_index: Label of the padding.

        Returns:
            Inputs, their mask, and labels, shape ``(B, N)``.
        """
        first = self.tokens.new_full((len(self.tokens), 1), start)
        tokens = torch.cat([first, self.tokens[:, :-1]], 1)
        mask = torch.cat([torch.ones_like(first), self.mask[:, :-1].long()], 1)
        return tokens, mask, self.tokens.masked_fill(~self.mask, ignore_index)


def prompts_of(tokens: Tensor, is_prompt: Tensor, padding: int) -> Prompts:
    """The prompts in rows of tokens, on whichever side these are padded.

    Args:
        tokens: Shape ``(B, T)``.
        is_prompt: True for the tokens of the prompts, shape ``(B, T)``.
        padding: The token for padding.

    Raises:
        ValueError: If a row has no prompt.

    Example:
        >>> prompts_of(torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), 0).tokens
        tensor([[5, 6],
                [0, 8]])
    """
    lengths = is_prompt.sum(1)
    if not bool((lengths > 0).all()):
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(
            f"Expected each sequence to begin with a prompt, tokens before the first label that counts, but got"
            f" sequence {row} of the batch without one. Set the labels of the prompt to -100, or pass"
            " OnPolicyDistillation(prompt=<key of a mask, or a function of the batch>)."
        )
    order = is_prompt.long().argsort(stable=True, dim=1)[:, -int(lengths.max()) :]
    mask = is_prompt.gather(1, order)
    return Prompts(tokens.gather(1, order).masked_fill(~mask, padding), mask)


def up_to_end(tokens: Tensor, ends: list[int]) -> Tensor:
    """True up to the first end token of each row, which counts.

    Args:
        tokens: Shape ``(B, N)``.
        ends: The tokens that end a text.

    Example:
        >>> up_to_end(torch.tensor([[4, 2, 2], [2, 7, 2]]), [2]).int()
        tensor([[1, 1, 0],
                [1, 0, 0]], dtype=torch.int32)
    """
    is_end = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype, device=tokens.device)).long()
    return is_end.cumsum(1) - is_end == 0
