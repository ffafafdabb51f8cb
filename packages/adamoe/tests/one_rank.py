"""One of two gloo processes: python one_rank.py RANK FOLDER. Rank 1 sends no token to any expert.

Leaves the gradients after a backward pass, by kernel, in FOLDER/RANK.pt; the ranks meet at FOLDER/meet.
"""

import faulthandler
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from adamoe import set_load
from tiny_mixtures import converted
from torch.nn.parallel import DistributedDataParallel

KERNELS = ["adamoe_loop", "adamoe_grouped"]
LIMIT = 240


def model_of(rank: int, kernel: str):
    model = converted(noise=0.2, experts_implementation=kernel).train()
    if rank:
        set_load(model, null_bias=float("inf"))
    return model


def loss_of(model, rank: int) -> torch.Tensor:
    tokens = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(5))[rank : rank + 1]
    return model(tokens, labels=tokens).loss


def main(rank: int, folder: Path) -> None:
    # A hang shows where it is, and ends.
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2, timeout=timedelta(seconds=LIMIT)
    )
    found = {}
    for kernel in KERNELS:
        model = model_of(rank, kernel)
        # The ranks' null biases differ; otherwise rank 0's would be sent to rank 1.
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        loss_of(wrapped, rank).backward()
        found[kernel] = {name: p.grad for name, p in model.named_parameters()}
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    # Taking a gloo group down can deadlock: its destructor joins the worker threads under the interpreter's lock, and a
    # worker that still has a tensor to free waits for that lock. Seen on busy machines only.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
