"""What tests run in processes of their own; here, so that a new process can import it."""

import os
from pathlib import Path

import torch


def command(words: list[str]) -> None:
    """The command line."""
    from cllm_jacobi import cli

    torch.set_num_threads(1)
    cli.app(words)


def half(rank: int, port: int, output: str) -> None:
    """One of two processes of a training."""
    import test_trainer

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    trainer = test_trainer.train(Path(output), per_device_train_batch_size=4, ddp_backend="gloo", **test_trainer.SGD)
    assert trainer.args.world_size == 2
    if trainer.is_world_process_zero():
        trainer.save_model(f"{output}/model")
    torch.distributed.destroy_process_group()
