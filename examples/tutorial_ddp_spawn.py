"""Data-parallel training in one sitting: a network learns which arm of a spiral a point is on.

    python examples/tutorial_ddp_spawn.py                              # a rank per GPU, or 2 ranks
    python examples/tutorial_ddp_spawn.py --checkpoint /tmp/spiral.pt  # run it twice: it resumes

Run it with plain python: `fastddp.spawn` starts one process per rank and runs `train` in each.
Every rank has a copy of the model and its own share of the data. Gradients are averaged over the
ranks, so that the copies stay equal. Read the file from the bottom up.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastddp

ARMS = 3


def make_spiral(num_points: int, seed: int) -> TensorDataset:
    """Returns points in the plane, and for each the number of the spiral arm that it is on."""
    generator = torch.Generator().manual_seed(seed)
    arm = torch.randint(ARMS, (num_points,), generator=generator)
    radius = torch.rand(num_points, generator=generator)
    noise = 0.1 * torch.randn(num_points, generator=generator)
    angle = 4 * radius + 2 * torch.pi / ARMS * arm + noise
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], 1), arm)


def make_model() -> nn.Module:
    hidden = nn.Linear(64, 64)
    return nn.Sequential(nn.Linear(2, 64), nn.ReLU(), hidden, nn.ReLU(), nn.Linear(64, ARMS))


@torch.no_grad()
def evaluate(model: nn.Module, test: TensorDataset, device: torch.device) -> float:
    """Returns the accuracy on the test set, in which every point counts exactly once.

    301 points cannot be shared equally. `pad="none"` neither repeats nor drops one, so one rank has
    more points than another. `model.module` is this rank's copy of the model. Calling it does not
    communicate, so no rank waits for one that has finished its share.
    """
    sampler = fastddp.DistributedSampler(test, shuffle=False, pad="none")
    loader = DataLoader(test, batch_size=100, sampler=sampler)
    mine = torch.cat([model.module(points.to(device)).argmax(1) for points, _ in loader])
    # Every rank gets all predictions, in the order of the test set.
    predictions: Tensor = fastddp.gather_unpadded(mine, sampler=sampler)
    return (predictions.cpu() == test.tensors[1]).float().mean().item()


def train(rank: int, epochs: int, checkpoint: Path | None) -> float:
    """Trains on one rank; every rank runs it. Returns the test accuracy, the same on all ranks."""
    model = fastddp.wrap(make_model())  # from here on, all ranks have rank 0's weights
    device = next(model.parameters()).device  # this rank's GPU, if it has one
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_set, test_set = make_spiral(3000, seed=0), make_spiral(301, seed=1)
    sampler = fastddp.DistributedSampler(train_set)
    loader = DataLoader(train_set, batch_size=60 // sampler.num_replicas, sampler=sampler)

    first_epoch = 0
    if checkpoint and checkpoint.exists():  # on every rank: each has an optimizer of its own
        saved = torch.load(checkpoint, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first_epoch = saved["epoch"]

    for epoch in range(first_epoch, first_epoch + epochs):
        sampler.set_epoch(epoch)  # another order each epoch, the same on all ranks
        for points, arms in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(points.to(device)), arms.to(device))
            loss.backward()  # averages gradients over the ranks
            optimizer.step()
        accuracy = evaluate(model, test_set, device)
        if rank == 0:  # one rank prints and saves for all
            print(f"epoch {epoch + 1}: test accuracy {accuracy:.4f}", flush=True)
            if checkpoint:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                partial = checkpoint.with_suffix(".partial")
                torch.save(state | {"epoch": epoch + 1}, partial)
                os.replace(partial, checkpoint)  # so that a checkpoint is whole or not there
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5, help="to train now, at least 1")
    parser.add_argument("--ranks", type=int, help="by default one per GPU; without a GPU 2")
    parser.add_argument("--checkpoint", type=Path, help="file to resume from and to save to")
    options = parser.parse_args()
    accuracies = fastddp.spawn(train, options.ranks, (options.epochs, options.checkpoint))
    print(f"{len(accuracies)} rank(s) trained; final test accuracy {accuracies[0]:.4f}")


if __name__ == "__main__":  # the ranks import this file, too, and must not start ranks themselves
    main()
