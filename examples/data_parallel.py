"""Train a small network on scikit-learn's handwritten digits in one process, split over devices.

    python examples/data_parallel.py                # all GPUs, or two replicas on the CPU
    python examples/data_parallel.py --replicas 4   # four replicas on the CPU

There are no ranks and there is nothing to launch: it is a script for one device with one more line.
Each batch is split over the replicas, which run in threads at the same time. On the CPU they share
the parameters' memory, and only their forwards run at the same time: autograd runs a backward on
the CPU in one thread. `train_digits.py` trains on the same images with several processes.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastddp


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Returns a fixed random split: 1437 images of 1 x 8 x 8 to train on, 360 to test on."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[360:], order[:360]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """Returns the share of test images classified correctly."""
    images, labels = test[:]
    guesses = model(images).argmax(1)
    return (guesses == labels.to(guesses.device)).float().mean().item()


def run(epochs: int, devices: list[str]) -> None:
    torch.manual_seed(0)
    train, test = load_data()
    model = fastddp.DataParallel(make_model().to(devices[0]), devices)  # the only new line
    print(f"replicas on {', '.join(devices)}")

    loader = DataLoader(train, batch_size=64, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(epochs):
        for images, labels in loader:
            outputs = model(images)  # gathered on the first device, in the batch's order
            F.cross_entropy(outputs, labels.to(outputs.device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: test accuracy {accuracy(model, test):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--replicas", type=int, help="replicas on the CPU, instead of the GPUs")
    options = parser.parse_args()
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    devices = ["cpu"] * options.replicas if options.replicas else gpus or ["cpu", "cpu"]
    run(options.epochs, devices)


if __name__ == "__main__":
    main()
