"""A first-in, first-out bank of embeddings: the keys of SEED, CompRess and their kin."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["FeatureBank"]


class FeatureBank(nn.Module):
    """Aligned queues of detached embeddings, one for each of `dims`.

    One queue (`FeatureBank(65536, 128)`) holds teacher embeddings, as in SEED; two
    (`FeatureBank(128000, 64, 128)`) hold the student's and the teacher's side by side, as in
    CompRess: row k of both always comes from the same sample.

    The keys are ordered from the newest batch to the oldest, each batch in its own order, so
    `push(x); keys()` and `keys(x)` begin with the same rows. Nothing is random, and any batch size
    goes with any bank size: of a batch larger than the bank the first `size` rows stay.

    `.to(device)` moves the queues, but they are no buffers: a `state_dict()` holds none of them,
    and `DistributedDataParallel` does not copy those of rank 0 over the others. On several ranks
    every rank has a bank of its own, filled with what it pushes itself.

    Args:
        size: rows a queue holds.
        dims: the length of an embedding, for each queue.
        dtype: floating dtype of the queues; what is pushed is converted to it.
        device: device of the queues.

    Raises:
        ValueError: `size` or one of `dims` is not a positive integer, or there is no dim.

    Example::

        bank = FeatureBank(65536, 128)
        keys = bank.keys(teacher)  # [B + rows, 128], the batch's own first
        loss = seed(student, teacher, student_keys=keys, teacher_keys=keys)
        bank.push(teacher)
    """

    def __init__(
        self,
        size: int,
        *dims: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not dims:
            raise ValueError("dims must hold the embedding length of at least one queue, got none")
        for name, value in [("size", size), *(("dims", dim) for dim in dims)]:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating dtype, got {dtype}")
        self.size = size
        self.dims = dims
        self._filled = 0
        # the queue grows towards lower addresses: the newest row is always at _head, so the keys
        # are at most two slices, newest first, and one slice (no copy) until it is full
        self._head = size
        self._queues = [torch.zeros(size, dim, dtype=dtype, device=device) for dim in dims]

    def __len__(self) -> int:
        """The rows held now, at most `size`."""
        return self._filled

    @property
    def full(self) -> bool:
        """Whether every row of the bank holds an embedding."""
        return self._filled == self.size

    def reset(self) -> None:
        """Forget every embedding."""
        self._filled, self._head = 0, self.size

    @torch.no_grad()
    def push(self, *embeddings: Tensor) -> None:
        """Enqueue one batch, [B, dim] for each queue; the oldest rows make room.

        Push after the backward of a loss that read `keys()`: until the bank has wrapped around,
        the keys are a view of it.

        Raises:
            TypeError, ValueError: another number of tensors than queues, or a wrong shape, dtype
                or device.
        """
        self._check(embeddings)
        rows = min(embeddings[0].shape[0], self.size)
        wrapped = max(rows - self._head, 0)
        for queue, batch in zip(self._queues, embeddings, strict=True):
            # what does not fit below the head goes to the end of the queue, the newest rows first
            queue[self.size - wrapped :] = batch[:wrapped]
            queue[self._head - (rows - wrapped) : self._head] = batch[wrapped:rows]
        self._head = self.size - wrapped if wrapped else self._head - rows
        self._filled = min(self._filled + rows, self.size)

    def keys(self, *current: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The keys, newest first: the `current` batch, if given, then the rows held.

        Args:
            current: one batch, [B, dim] for each queue, that goes before the bank's rows without
                being pushed; it is detached and converted to the bank's dtype.

        Returns:
            [B + len(self), dim] for one queue, a tuple of those for several.
        """
        if current:
            self._check(current)
        keys = [self._rows(queue) for queue in self._queues]
        if current:
            keys = [
                torch.cat([batch.detach().to(rows.dtype), rows])
                for batch, rows in zip(current, keys, strict=True)
            ]
        return keys[0] if len(keys) == 1 else tuple(keys)

    def extra_repr(self) -> str:
        return f"{self.size}, {', '.join(map(str, self.dims))}, filled={self._filled}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureBank:
        # what `.to()`, `.half()` and their like call for parameters and buffers
        super()._apply(fn, recurse)
        self._queues = [fn(queue) for queue in self._queues]
        return self

    def _rows(self, queue: Tensor) -> Tensor:
        end = self._head + self._filled
        if end <= self.size:
            return queue[self._head : end]
        return torch.cat([queue[self._head :], queue[: end - self.size]])

    def _check(self, embeddings: tuple[Tensor, ...]) -> None:
        if len(embeddings) != len(self.dims):
            raise ValueError(
                f"embeddings must be {len(self.dims)} tensors, one for each queue, "
                f"got {len(embeddings)}"
            )
        for batch, queue in zip(embeddings, self._queues, strict=True):
            if not isinstance(batch, Tensor) or not batch.is_floating_point():
                kind = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
                raise TypeError(f"embeddings must be floating-point tensors, got {kind}")
            if batch.ndim != 2 or batch.shape[1] != queue.shape[1]:
                raise ValueError(
                    f"embeddings must have shape [B, {queue.shape[1]}], got {list(batch.shape)}"
                )
            if batch.shape[0] != embeddings[0].shape[0]:
                raise ValueError(
                    "embeddings must hold the same samples, "
                    f"got {embeddings[0].shape[0]} and {batch.shape[0]} rows"
                )
            if batch.device != queue.device:
                raise ValueError(
                    f"embeddings must be on the bank's device {queue.device}, got {batch.device}"
                )
