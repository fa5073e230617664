"""Training in several processes, started by torchrun. Each computes a slice of every batch.

    loss        of the whole batch on every rank: logits are gathered, and gradients flow into the rank's own
    BatchNorm   mean and variance of the whole batch
    gradients   summed over ranks, so that clipping and Adam do the same everywhere
    dropout     every rank draws the masks of the whole batch and takes its rows' (`models.schema.Part`)

N processes end in the weights of one process, except for the order of float sums. Without torchrun none of this is
used. CPUs talk through Gloo and GPUs through NCCL. Whether to stop always goes through Gloo, so that no step waits for
a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.layers import Ranker
from models.schema import Logits


@dataclass(frozen=True)
class Ranks:
    """This process among `size` processes. Only rank 0 writes files and prints."""

    rank: int = 0
    size: int = 1
    host: Any = None

    def share(self, rows: int) -> slice:
        """This rank's part of `rows` rows. The parts of two ranks differ by one row at most."""
        return slice(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)

    def whole(self, own_KB: Tensor, rows: int) -> Tensor:
        """[K, rows], put together from each rank's [K, B]. Gradients flow only into the rank's own part."""
        if self.size == 1:
            return own_KB
        whole, mine = own_KB.new_zeros(len(own_KB), rows), self.share(rows)
        whole[:, mine] = own_KB.detach()
        dist.all_reduce(whole)
        return torch.cat((whole[:, : mine.start], own_KB, whole[:, mine.stop :]), 1)

    def gather(self, logits: Logits, label_B: Tensor, rows: int) -> tuple[Logits, Tensor]:
        """Logits and labels of all rows of the batch."""
        if self.size == 1:
            return logits, label_B
        logit_B, *parts_B, label_B = self.whole(torch.stack((logits.logit_B, *logits.parts_B, label_B)), rows)
        return Logits(logit_B, tuple(parts_B)), label_B

    def sum_gradients(self, model: nn.Module) -> None:
        if self.size == 1:
            return
        parameters = [p for p in model.parameters() if p.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        dist.all_reduce(flat)
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = grad.view_as(parameter)

    def largest(self, number: int) -> int:
        """The largest of the numbers that the ranks give. Waits for all ranks."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.host)
        return int(found)

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def local_rank() -> int | None:
    """Which of the machine's processes this is; None where there is only one."""
    many = dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    return int(os.environ["LOCAL_RANK"]) if many else None


@contextmanager
def ranks(device: torch.device) -> Iterator[Ranks]:
    """This process among those that torchrun started. They can talk to each other inside the block."""
    if local_rank() is None:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


def with_whole_batch_norms(model: Ranker) -> Ranker:
    """The model, with BatchNorms that see the batch of all ranks. Parameters and their names stay."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d):
                norm = WholeBatchNorm(child.num_features, child.eps, child.momentum, device="meta")
                norm.load_state_dict(child.state_dict(), assign=True)
                norm.weight, norm.bias = child.weight, child.bias
                setattr(module, name, norm)
    return model


class WholeBatchNorm(nn.BatchNorm1d):
    """BatchNorm of [b, C] or [b, C, K], where each rank has its b rows. (SyncBatchNorm is the same, for GPUs only.)"""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x = x.float()
        over = [0, *range(2, x.dim())]
        # float64: the variance is a difference of the two sums
        count = torch.full((1,), x.numel() // self.num_features, dtype=torch.float64, device=x.device)
        sums = (x.sum(over, dtype=torch.float64), x.square().sum(over, dtype=torch.float64), count)
        total_C, squares_C, rows = Summed.apply(torch.cat(sums)).split((self.num_features, self.num_features, 1))
        mean_C = total_C / rows
        var_C = (squares_C / rows - mean_C.square()).clamp(min=0)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean_C.float(), self.momentum)
            self.running_var.lerp_((var_C * rows / (rows - 1)).float(), self.momentum)
        scale_C = self.weight * (var_C + self.eps).rsqrt().float()
        shift_C = self.bias - mean_C.float() * scale_C
        shape = (1, self.num_features, *[1] * (x.dim() - 2))
        return torch.addcmul(shift_C.view(shape), x, scale_C.view(shape))


class Summed(torch.autograd.Function):
    """The sum over ranks. Its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad
