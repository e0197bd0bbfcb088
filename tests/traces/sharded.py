"""A fused distillation step on a model sharded by torch's own fully_shard; run under torchrun.

    torchrun --nproc_per_node 2 tests/traces/sharded.py SETTINGS.json OUT.json

Accelerate ignores FSDP on CPU processes without a word, so the sharding is torch's own here. The wrapped module is the
loop's Step: the head's weights are gathered because its forward uses them, and their gradient is scattered like any.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from distilpeft import selftest
from distilpeft.data import micro_batches
from distilpeft.recipe import CausalLM
from distilpeft.tasks import causal_lm
from distilpeft.train import Step


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    student, teacher = selftest.models()
    task = CausalLM(kind="causal_lm", text="text", pack=True)
    for model in (student, teacher):
        causal_lm.prepare(task, model)
    data = selftest.rows()

    def loss_sum(bare, batch):
        with torch.no_grad():
            soft = causal_lm.soft(teacher, batch)
        return causal_lm.loss_sum(bare, batch, selftest.LOSS, soft)

    step = Step(student, loss_sum)
    for block in student.transformer.h:
        fully_shard(block)
    fully_shard(step)
    assert any(type(parameter).__name__ == "DTensor" for parameter in step.parameters())
    optim = torch.optim.SGD(step.parameters(), lr=selftest.OPTIMIZERS["sgd"])
    padding = type("Padding", (), {"pad_token_id": 0})
    trace = []
    for rows in selftest.batches(data):
        (mine,) = micro_batches(rows, len(rows), rank, world)
        batch = causal_lm.collate({name: [column[i] for i in mine] for name, column in data.items()}, padding)
        count = torch.tensor(causal_lm.count_rows(batch))
        dist.all_reduce(count)
        loss = step(batch) * (world / count)
        loss.backward()
        total = loss.detach().clone() / world
        dist.all_reduce(total)
        squares = torch.stack([parameter.grad.full_tensor().square().sum() for parameter in step.parameters()])
        trace.append((total.item(), squares.sum().sqrt().item()))
        optim.step()
        optim.zero_grad()
    if rank == 0:
        out.write_text(json.dumps({"trace": trace, "world": world}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[2]))
