"""One training step: from a batch's loss to Adam."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.common.dataset import Dataset
from components.training.config import TrainConfig
from components.training.parallel import Ranks
from components.training.state import State
from models.kernels import choice
from models.layers import Ranker
from models.schema import Logits, Part

INDUCTOR = Path(".scratch/inductor")  # what torch.compile made, kept for the next run
WARM_STEPS = 3  # before a step is recorded


def adam(config: TrainConfig, model: Ranker, rows: int) -> torch.optim.Adam:
    """Adam over the regularised parameters and the others, each group with its `l2`, which `add_l2` reads.

    rows  of the training days: a batch's mean loss stands for all of them, so its share of the L2 is one in `rows`
    """
    regularised = model.regularised_parameters()
    ids = {id(p) for p in regularised}
    others = [p for p in model.parameters() if id(p) not in ids]
    groups = [
        {"params": regularised, "l2": config.embedding_l2 / rows},
        {"params": others, "l2": config.network_l2 / rows},
    ]
    device = next(model.parameters()).device
    if device.type != "cuda":
        return torch.optim.Adam(groups, lr=config.lr, fused=True)
    rate: Any = torch.tensor(config.lr, device=device)  # a CUDA graph reads it, so it stays where it lies
    return torch.optim.Adam(groups, lr=rate, fused=True, capturable=True)


@torch.no_grad()
def add_l2(optimizer: torch.optim.Adam) -> None:
    """Add the gradient of l2/2 · ‖p‖² to that of the loss. (Adam's own weight decay would come after the clipping.)"""
    for group in optimizer.param_groups:
        if group["l2"]:
            learning = [p for p in group["params"] if p.grad is not None]
            torch._foreach_add_([p.grad for p in learning], learning, alpha=group["l2"])


class Step:
    """Takes training steps on what `Dataset.fetched` gives of a batch.

    With `compile`, batches of full size go through torch.compile. On CUDA the whole step, from the gather to Adam, is
    then recorded as one CUDA graph after WARM_STEPS. A replay is one call; a step is hundreds of kernels, which the
    host needs longer to launch than the device to run. The last batch of an epoch is smaller and runs without both.
    """

    def __init__(self, config: TrainConfig, state: State, data: Dataset, ranks: Ranks) -> None:
        self.config, self.state, self.data, self.ranks = config, state, data, ranks
        self.compiled: Callable[[list[Tensor], int], Tensor] | None = None
        if config.compile:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(INDUCTOR.resolve())
            torch.compiler.assume_constant_result(choice.runs)  # type: ignore[no-untyped-call]
            self.compiled = torch.compile(self.loss, dynamic=False)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = 0

    def __call__(self, fetched: list[Tensor], rows: int) -> Tensor:
        """One step on a batch of `rows` rows, `fetched` holds this rank's part. Returns the loss, float64."""
        if self.compiled is None or rows < self.config.batch_size:
            return self.take(self.loss, fetched, rows)
        if self.data.device.type != "cuda":
            return self.take(self.compiled, fetched, rows)
        if self.graph is None:
            if self.warm == 0:
                self.stream = torch.cuda.Stream(self.data.device)
            self.warm += 1
            self.stream.wait_stream(torch.cuda.current_stream(self.data.device))
            if self.warm <= WARM_STEPS:  # kernels are compiled and moments made; a recording cannot do that
                with torch.cuda.stream(self.stream):
                    loss = self.take(self.compiled, fetched, rows)
                torch.cuda.current_stream(self.data.device).wait_stream(self.stream)
                return loss
            self.inputs = [column.clone() for column in fetched]
            self.state.optimizer.zero_grad(set_to_none=True)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.output = self.take(self.compiled, self.inputs, rows)
        for own, column in zip(self.inputs, fetched, strict=True):
            own.copy_(column)
        self.graph.replay()
        return self.output

    def take(self, loss_of: Callable[[list[Tensor], int], Tensor], fetched: list[Tensor], rows: int) -> Tensor:
        """From the loss to Adam."""
        loss = loss_of(fetched, rows)
        self.state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.ranks.sum_gradients(self.state.model)
        add_l2(self.state.optimizer)
        nn.utils.clip_grad_norm_(self.state.model.parameters(), self.config.clip_norm)
        self.state.optimizer.step()
        return loss.detach().double()

    def loss(self, fetched: list[Tensor], rows: int) -> Tensor:
        """The loss of the whole batch, on every rank."""
        batch = self.data.arranged(fetched)._replace(part=Part(self.ranks.share(rows).start, rows))
        assert batch.label_B is not None
        half = torch.autocast(self.data.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        with half:
            logits = self.state.model(batch, self.data.catalog, self.data.click_log)
        logits = Logits(logits.logit_B.float(), tuple(part_B.float() for part_B in logits.parts_B))
        return self.state.model.loss(*self.ranks.gather(logits, batch.label_B, rows))
