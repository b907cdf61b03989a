"""The classifier of the demo: the model.factory of influence.yaml, and how the checkpoint was trained."""

import torch
from torch import nn


def build(num_classes: int = 10) -> nn.Module:
    """Make a small CNN for 28×28 grey images, about 55,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 32),
        nn.ReLU(),
        nn.Linear(32, num_classes),
    )


def train(model, dataset, *, l2, epochs=12, seed=0, progress=None):
    """Minimise mean cross-entropy + l2/2·‖θ‖² over (input, label) pairs, by Adam with a decaying learning rate."""
    device = next(model.parameters()).device
    inputs = torch.stack([x for x, _ in dataset]).to(device)
    labels = torch.tensor([y for _, y in dataset], device=device)
    order = torch.Generator().manual_seed(seed)
    batches, done = -(-len(labels) // 64), 0
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=order).split(64):
            loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
            loss = loss + l2 / 2 * sum(p.square().sum() for p in model.parameters())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if progress:
                progress(done, epochs * batches)
    return model.eval()
