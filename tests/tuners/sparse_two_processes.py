"""Two gloo processes train the same sparse adapter as one process does: DDP with a refresh, and fully_shard.

Run by `test_sparse_distributed.py` under torchrun; prints OK from rank 0 or fails.
"""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model

from pegbox.errors import Unsupported
from pegbox.select import SELECT
from pegbox.testing import tiny_llama
from pegbox.tuners.sparse import SparseConfig, sparse_layers
from pegbox.tuners.sparse.refresh import refresh

torch.set_num_threads(1)
SELECT_BLOCK = {"kind": "magnitude", "budget": {"density": 0.1}}
STEPS, BATCH = 4, torch.randint(3, 200, (8, 12), generator=torch.Generator().manual_seed(1))


def build():
    config = SparseConfig(select=SELECT_BLOCK, coordinates="absolute", task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama(), config)


def train(model, inner, batch, refreshing):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for turn in range(STEPS):
        if refreshing and turn == 2:
            refresh(inner, SELECT.validate(SELECT_BLOCK), optimizer)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def main(mode):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = wrapped = build()
    if mode == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    losses = train(wrapped, model, BATCH[rank * 4 : rank * 4 + 4], refreshing=mode == "ddp")
    dist.all_reduce(losses)
    with torch.no_grad(), model.disable_adapter():
        off = model(input_ids=BATCH).logits
    on = model(input_ids=BATCH).logits.detach()
    if mode == "fully_shard":
        with pytest.raises(Unsupported, match="sharded"):
            refresh(model, SELECT.validate(SELECT_BLOCK))
    dist.barrier()
    dist.destroy_process_group()
    if rank:
        return
    single = build()
    want = train(single, single, BATCH, refreshing=mode == "ddp")
    torch.testing.assert_close(losses / 2, want, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(off, tiny_llama()(input_ids=BATCH).logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(on, single(input_ids=BATCH).logits, rtol=0, atol=1e-4)
    if mode == "ddp":
        for name, layer in sparse_layers(model).items():
            other = sparse_layers(single)[name].slot("default", "weight")
            assert torch.equal(layer.slot("default", "weight").index, other.index)
    print("OK")


if __name__ == "__main__":
    main(sys.argv[1])
