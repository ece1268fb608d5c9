"""The side of `shrink_vs_torch_pruning.py` that Torch-Pruning takes; run by it, in PyTorch.

    python benchmarks/torch_pruning_resnet.py WORK RESULT    # an .npz each

The network is that of akamaster/pytorch_resnet_cifar10, with option-A shortcuts.
"""

import copy
import importlib.metadata
import itertools
import json
import math
import sys
import time

import numpy as np
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F  # noqa: N812, as it is known

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
CRITERIA = {
    "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "BatchNorm scale": tp.importance.BNScaleImportance,
    "Taylor": tp.importance.GroupTaylorImportance,
    "FPGM": tp.importance.FPGMImportance,
}
# Isomorphic is the same as global here: what may go is of one kind.
SCOPES = {
    "global": {"global_pruning": True},
    "local": {},
}


class Shortcut(nn.Module):
    """Subsample, and pad channels with zeros on both sides."""

    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def forward(self, x):
        """Map (batch, c, h, w) to half of h and w, and more channels."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if stride == 1 else Shortcut((width - inputs) // 2)

    def forward(self, x):
        """Run the block."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-20 for 32x32 images."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inputs = 16
        for stage, width in enumerate((16, 32, 64), 1):
            blocks = []
            for k in range(3):
                blocks.append(Block(inputs, width, 2 if stage > 1 and k == 0 else 1))
                inputs = width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        """Map images to logits."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def images(pixels):
    """Turn (batch, h, w, 3) pixels into what the network takes."""
    x = (torch.from_numpy(pixels).float() / 255 - MEAN) / STD
    return x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def macs(model):
    return tp.utils.count_ops_and_params(model, torch.zeros(1, 3, 32, 32))[0]


def distance(logits, teacher, temperature):
    p, q = F.log_softmax(teacher / temperature, 1), F.log_softmax(logits / temperature, 1)
    return temperature**2 * (p.exp() * (p - q)).sum(1).mean()


def predict(model, pixels):
    model.eval()
    with torch.no_grad():
        return torch.cat([model(images(part)) for part in np.split(pixels, len(pixels) // 250)])


def reestimate(model, pixels):
    """Average BatchNorm statistics over batches."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    model.train()
    with torch.no_grad():
        for part in np.split(pixels, len(pixels) // 250):
            model(images(part))
    for norm in norms:
        norm.momentum = 0.1


def residual(model):
    """List the convolutions that write to the residual stream, which it does not follow."""
    blocks = [b for stage in (model.layer1, model.layer2, model.layer3) for b in stage]
    return [model.conv1, *(block.conv2 for block in blocks)]


def pruned(dense, target, criterion, scope, hints, work):
    """Prune as little as is needed; its ratios are of channels, so the right one is searched."""
    low, high, best = 0.3, 0.8, None
    for _ in range(7):
        ratio, model = (low + high) / 2, copy.deepcopy(dense)
        if criterion == "Taylor":
            with_gradients(model, work)
        tp.pruner.BasePruner(
            model,
            torch.zeros(1, 3, 32, 32),
            importance=CRITERIA[criterion](),
            pruning_ratio=ratio,
            max_pruning_ratio=0.95,
            ignored_layers=[model.linear, *(residual(model) if hints else [])],
            **SCOPES[scope],
        ).step()
        if macs(model) <= target:
            high, best = ratio, model
        else:
            low = ratio
    return best


def with_gradients(model, work):
    """Sum the gradients of the cross-entropy on the calibration images."""
    parts = (np.split(work[name], 4) for name in ("calibration", "calibration_labels"))
    for part, labels in zip(*parts, strict=True):
        F.cross_entropy(model(images(part)), torch.from_numpy(labels)).backward()


def without_hints(dense, work):
    """Have it remove 4 of 16 channels of a residual stream, 4 of which are zero throughout."""
    model, dead = copy.deepcopy(dense), torch.tensor([1, 5, 9, 14])
    with torch.no_grad():
        streams = [(0, model.layer1), (8, model.layer2), (24, model.layer3)]  # the padding before
        writers = [(0, model.conv1, model.bn1)]
        writers += [(pad, block.conv2, block.bn2) for pad, stage in streams for block in stage]
        for pad, conv, norm in writers:
            for leaf in (conv.weight, norm.weight, norm.bias):
                leaf[dead + pad] = 0
        before = 0
        for pad, stage in streams:
            for k, block in enumerate(stage):
                block.conv1.weight[:, dead + (pad if k else before)] = 0
            before = pad
        model.linear.weight[:, dead + before] = 0
    pruned = copy.deepcopy(model)
    inner = [b.conv1 for stage in (pruned.layer1, pruned.layer2, pruned.layer3) for b in stage]
    tp.pruner.BasePruner(
        pruned,
        torch.zeros(1, 3, 32, 32),
        importance=CRITERIA["magnitude"](),
        pruning_ratio=0.25,
        ignored_layers=[pruned.linear, *inner],
    ).step()
    want, got = (predict(m, work["test"]) for m in (model, pruned))
    return {
        "widths": [m.out_channels for m in pruned.modules() if isinstance(m, nn.Conv2d)],
        "differs_by": float((want - got).abs().max()),
        "largest_output": float(want.abs().max()),
    }


def choose(dense, target, work, settings):
    """Take the criterion and the scope with the least distance, after a short trial, held back."""
    rows = []
    teacher = torch.from_numpy(work["held_teacher"])
    for criterion, scope, hints in itertools.product(CRITERIA, SCOPES, (True, False)):
        model = pruned(dense, target, criterion, scope, hints, work)
        train(model, work, settings, steps=settings["trial"], seed=0)
        reestimate(model, work["calibration"])
        found = float(distance(predict(model, work["held"]), teacher, settings["temperature"]))
        row = {"criterion": criterion, "scope": scope, "hints": hints, "distance": round(found, 3)}
        rows.append(row)
        print("torch-pruning", row, flush=True)
    return rows, min(rows, key=lambda row: row["distance"])


def train(model, work, settings, *, steps, seed):
    """Distil on the pool in the order of the seed."""
    order, size = np.random.default_rng(seed).permutation(len(work["pool"])), settings["batch"]
    optimizer = torch.optim.SGD(
        model.parameters(), settings["learning_rate"], momentum=0.9, nesterov=True
    )
    model.train()
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * (1 + math.cos(math.pi * i / steps)) / 2
        batch = order[i * size : (i + 1) * size]
        logits = model(images(work["pool"][batch]))
        loss = distance(logits, torch.from_numpy(work["teacher"][batch]), settings["temperature"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"])
        optimizer.step()


def main(work_path, result_path):
    """Choose, prune, train and predict."""
    work = dict(np.load(work_path))
    settings = json.loads(str(work["settings"]))
    dense = ResNet()
    weights = {k[6:]: torch.from_numpy(v) for k, v in work.items() if k[:6] == "model/"}
    dense.load_state_dict(weights, strict=False)
    dense = dense.to(memory_format=torch.channels_last).eval()
    target = macs(dense) / settings["ratio"]
    rows, best = choose(dense, target, work, settings)
    runs, logits = [], {}
    for seed in settings["seeds"]:
        model = pruned(dense, target, best["criterion"], best["scope"], best["hints"], work)
        start = time.perf_counter()
        train(model, work, settings, steps=settings["steps"], seed=seed)
        seconds = time.perf_counter() - start
        logits[f"seed{seed}"] = predict(model, work["test"]).numpy()
        widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
        ratio = macs(dense) / macs(model)
        runs.append({"macs": round(ratio, 3), "widths": widths, "seconds": round(seconds, 1)})
        print("torch-pruning", runs[-1], flush=True)
    off = np.abs(predict(dense, work["test"]).numpy() - work["test_teacher"]).max()
    report = {
        "torch_pruning": importlib.metadata.version("torch-pruning"),
        "torch": torch.__version__,
        "dense_logits_differ_by": float(off),
        "without_hints": without_hints(dense, work),
        "with_hints": "the convolutions that write to the residual stream are ignored",
        "tried": rows,
        "chosen": best,
        "runs": runs,
    }
    np.savez(result_path, report=json.dumps(report), **logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
