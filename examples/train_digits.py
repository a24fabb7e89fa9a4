"""Train a small convolutional network on scikit-learn's handwritten digits (1797 images, bundled).

    torchrun --nproc-per-node 2 examples/train_digits.py   # two ranks
    mpirun -n 2 python examples/train_digits.py            # the same; also srun -n 2
    python examples/train_digits.py                        # one process, same script

It shows the parts that a training script of any size has around the model: a sampler that gives
each rank its share, BatchNorm, and a test accuracy that counts every image exactly once.
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastddp


def load_data(device: torch.device) -> tuple[TensorDataset, TensorDataset]:
    """Returns a fixed random split: 1437 images of 1 x 8 x 8 to train on, 360 to test on."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, device=device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[360:], order[:360]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def make_model() -> nn.Module:
    def layer(channels_in: int, channels_out: int) -> nn.Module:
        convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())

    return nn.Sequential(
        layer(1, 32),
        layer(32, 32),
        nn.MaxPool2d(2),
        layer(32, 64),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )


@torch.no_grad()
def accuracy_over_ranks(model: nn.Module, test: TensorDataset) -> float:
    """Returns the share of test images classified correctly, over all ranks.

    The ranks' shares are not padded; torch's sampler would repeat some images to make them equal.
    The forward goes through the wrapped model, once on every rank, so that all ranks use the
    BatchNorm statistics of rank 0.
    """
    sampler = fastddp.DistributedSampler(test, shuffle=False, pad="none")
    images, labels = test[list(sampler)]
    model.eval()
    correct = fastddp.gather_unpadded(model(images).argmax(1) == labels)
    model.train()
    return correct.float().mean().item()


def run(epochs: int) -> None:
    torch.manual_seed(0)
    model = fastddp.wrap(make_model())  # on this rank's GPU, if it has one
    train, test = load_data(next(model.parameters()).device)

    sampler = fastddp.DistributedSampler(train)
    loader = DataLoader(train, batch_size=64 // sampler.num_replicas, sampler=sampler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)  # another order each epoch, the same on all ranks
        for images, labels in loader:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        accuracy = accuracy_over_ranks(model, test)
        if sampler.rank == 0:
            print(f"epoch {epoch + 1}: test accuracy {accuracy:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    run(parser.parse_args().epochs)
    if dist.is_initialized():
        dist.barrier()  # a gloo thread still holding the last tensor aborts an ending interpreter
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
