"""What the processes of one training tell each other, through torch.distributed.

Every function is the identity in a process of its own, so that a method is written once. Positions of a data
set are divided into one block a process, in the order of the processes: what they gather is in the order of
the data set, and no image is looked at twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from duallora.errors import DualLoRAError

Made = TypeVar("Made")


def size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """This process's number, from 0; the first one writes files and speaks."""
    return dist.get_rank() if _together() else 0


def share(total: int) -> range:
    """The positions that are this process's: blocks whose lengths differ by at most one."""
    return block(total, rank(), size())


def block(total: int, part: int, parts: int) -> range:
    """Positions of one of ``parts`` blocks of ``total``."""
    return range(total * part // parts, total * (part + 1) // parts)


def require_enough(total: int, what: str) -> None:
    """Refuses fewer images than processes: one without an image could say nothing about shapes.

    Raises:
        DualLoRAError: naming ``what``.
    """
    if total < size():
        raise DualLoRAError(f"{what} has {total} images for {size()} processes; run it with fewer devices.")


def gather(x: Tensor) -> Tensor:
    """Rows of all processes in their order: (n_rank, ...) -> (n, ...), on the device of ``x``."""
    if not _together():
        return x
    mine = x.detach().to(_device()).contiguous()
    counts = [torch.zeros(1, dtype=torch.long, device=mine.device) for _ in range(size())]
    dist.all_gather(counts, torch.tensor([len(mine)], device=mine.device))
    longest = max(int(count) for count in counts)
    # Bytes travel, because not every backend knows bool and bf16; all blocks must be equally long.
    padded = mine.new_zeros(longest, *mine.shape[1:])
    padded[: len(mine)] = mine
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather([_bytes(part) for part in found], _bytes(padded))
    return torch.cat([part[: int(n)] for part, n in zip(found, counts, strict=True)]).to(x.device)


def total(x: Tensor) -> Tensor:
    """Sum over the processes, on the device of ``x``."""
    if not _together():
        return x
    summed = x.detach().to(_device(), copy=True)
    dist.all_reduce(summed)
    return summed.to(x.device)


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replaces the gradients by their sums over the processes, in one message; a missing one counts as 0."""
    if not _together():
        return
    trained = list(parameters)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
    dist.all_reduce(flat)
    for p, grad in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        p.grad = grad.view_as(p)


def once(compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What the first process computes, for all: two machines need not agree on an eigenvector's last bit.

    Args:
        compute: gives CPU tensors of at most two dimensions; only called in the first process.
    """
    if not _together():
        return compute()
    mine = compute() if rank() == 0 else ()
    device = _device()
    about = torch.zeros(1 + 4 * 3, dtype=torch.long, device=device)  # how many; per tensor dim, rows, columns
    if rank() == 0:
        rows = [[x.dim(), *x.shape, *[0] * (2 - x.dim())] for x in mine]
        words = [len(mine), *(n for row in rows for n in row)]
        about[: len(words)] = torch.tensor(words, device=device)
    dist.broadcast(about, 0)
    count, *numbers = about.tolist()
    found = []
    for i in range(count):
        dim, *shape = numbers[3 * i : 3 * i + 3]
        x = (
            mine[i].double().to(device)
            if rank() == 0
            else torch.empty(shape[:dim], dtype=torch.float64, device=device)
        )
        dist.broadcast(x, 0)
        found.append(x.cpu())
    return tuple(found)


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrites tensors with those of the first process."""
    if _together():
        for x in tensors:
            sent = x.detach().to(_device()).contiguous()
            dist.broadcast(sent, 0)
            with torch.no_grad():
                x.copy_(sent)


def agree(value: int) -> int:
    """The first process's number, in all of them."""
    number = torch.tensor([value])
    copy_from_first([number])
    return int(number)


@contextmanager
def failing_together() -> Iterator[None]:
    """All processes wait for each other at its end, where an error of any becomes that of all.

    What is inside may differ from process to process, and must not send anything: a process that gave up
    would leave the others waiting for its part.

    Raises:
        DualLoRAError: of this process, or that of the first process that had one.
    """
    error = None
    try:
        yield
    except DualLoRAError as own:
        if not _together():
            raise
        error = own
    words = "" if error is None else str(error)
    lengths = gather(torch.tensor([len(words.encode())])).tolist()
    if any(lengths):
        sentences = bytes(gather(torch.tensor(list(words.encode()), dtype=torch.uint8)).tolist())
        raise DualLoRAError(sentences[: next(filter(None, lengths))].decode()) from error


def first_alone(make: Callable[[], Made]) -> Made:
    """What ``make`` gives in each process; the first one begins, and the others find what it has fetched.

    Raises:
        DualLoRAError: in all of them, where ``make`` raises it in one.
    """
    made = []
    for turn in (rank() == 0, rank() > 0):
        with failing_together():
            made += [make()] if turn else []
    return made[0]


def wait() -> None:
    """Until all processes are here: what one has written is there for the others then."""
    if _together():
        total(torch.zeros(1))  # a barrier on any backend, without its guess of the device


def leave() -> None:
    """Ends what the processes have in common, once all are here; its threads must not outlive them."""
    if _together():
        wait()
        dist.destroy_process_group()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device() -> torch.device:
    """Where the backend can read: NCCL knows no memory of the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend() == "nccl"
        else torch.device("cpu")
    )


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)
