"""The side of `shrink_vs_torch_pruning.py` that Torch-Pruning takes; run by it, in PyTorch.

    python benchmarks/torch_pruning_resnet.py WORK RESULT    # an .npz each

The network is that of akamaster/pytorch_resnet_cifar10, with option-A shortcuts.
"""

import copy
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
}
SCOPES = {
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
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
    """List the convolutions that write to the residual stream, which it cannot follow."""
    blocks = [b for stage in (model.layer1, model.layer2, model.layer3) for b in stage]
    return [model.conv1, *(block.conv2 for block in blocks)]


def pruner(model, criterion, scope, ignored):
    # Its ratios are of channels: many small steps, until the MACs are met.
    return tp.pruner.BasePruner(
        model,
        torch.zeros(1, 3, 32, 32),
        importance=CRITERIA[criterion](),
        pruning_ratio=1.0,
        max_pruning_ratio=0.95,
        iterative_steps=200,
        ignored_layers=[model.linear, *ignored],
        **SCOPES[scope],
    )


def prune_to(model, target, criterion, scope, work):
    """Prune in its steps until the MACs are within the target."""
    model.eval()
    if criterion == "Taylor":
        model.zero_grad()
        for part, labels in zip(
            np.split(work["calibration"], 4), np.split(work["calibration_labels"], 4), strict=True
        ):
            F.cross_entropy(model(images(part)), torch.from_numpy(labels)).backward()
    steps = pruner(model, criterion, scope, residual(model))
    for _ in range(199):
        if macs(model) <= target:
            break
        steps.step()
    model.zero_grad()


def without_hints(model):
    """Say what happens when nothing is said about the shortcuts."""
    failures = {}
    for scope in SCOPES:
        tried = copy.deepcopy(model)
        try:
            tp.pruner.BasePruner(
                tried,
                torch.zeros(1, 3, 32, 32),
                importance=CRITERIA["magnitude"](),
                pruning_ratio=0.3,
                ignored_layers=[tried.linear],
                **SCOPES[scope],
            ).step()
            tried(torch.zeros(1, 3, 32, 32))
            failures[scope] = None
        except Exception as error:  # whatever it is, it is the finding
            failures[scope] = f"{type(error).__name__}: {error}"
    return failures


def choose(dense, target, work, temperature):
    """Take the criterion and the scope with the least distance on images held back."""
    rows, best = [], None
    for criterion in CRITERIA:
        for scope in SCOPES:
            model = copy.deepcopy(dense)
            prune_to(model, target, criterion, scope, work)
            reestimate(model, work["calibration"])
            logits = predict(model, work["held"])
            found = float(distance(logits, torch.from_numpy(work["held_teacher"]), temperature))
            rows.append({"criterion": criterion, "scope": scope, "distance": round(found, 3)})
            best = min(best or (found, criterion, scope), (found, criterion, scope))
    return rows, best[1:]


def train(dense, criterion, scope, targets, every, work, settings, seed):
    """Prune to each target in turn, `every` steps apart, and train on."""
    model, order = copy.deepcopy(dense), np.random.default_rng(seed).permutation(len(work["pool"]))
    steps, size, optimizer = settings["steps"], settings["batch"], None
    for i in range(steps):
        if i % every == 0 and i // every < len(targets):
            prune_to(model, targets[i // every], criterion, scope, work)
            optimizer = torch.optim.SGD(
                model.parameters(), settings["learning_rate"], momentum=0.9, nesterov=True
            )
            model.train()
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * (1 + math.cos(math.pi * i / steps)) / 2
        batch = np.sort(order[np.arange(i * size, (i + 1) * size) % len(order)])
        logits = model(images(work["pool"][batch]))
        loss = distance(logits, torch.from_numpy(work["teacher"][batch]), settings["temperature"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    return model


def main(work_path, result_path):
    work = dict(np.load(work_path))
    settings = json.loads(str(work["settings"]))
    torch.set_num_threads(settings["threads"])
    dense = ResNet()
    dense.load_state_dict(
        {k[6:]: torch.from_numpy(v) for k, v in work.items() if k[:6] == "model/"}, strict=False
    )
    dense = dense.to(memory_format=torch.channels_last).eval()
    whole = macs(dense)
    rows, (criterion, scope) = choose(
        dense, whole / settings["ratio"], work, settings["temperature"]
    )
    print("torch-pruning", rows, criterion, scope, flush=True)
    found, logits = [], {}
    for schedule, rounds in settings["schedules"].items():
        targets = [whole / settings["ratio"] ** ((k + 1) / rounds) for k in range(rounds)]
        for seed in settings["seeds"]:
            start = time.perf_counter()
            model = train(dense, criterion, scope, targets, settings["every"], work, settings, seed)
            logits[f"{schedule}/{seed}"] = predict(model, work["test"]).numpy()
            widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
            found.append(
                {
                    "schedule": schedule,
                    "seed": seed,
                    "macs": round(whole / macs(model), 3),
                    "widths": widths,
                    "seconds": round(time.perf_counter() - start, 1),
                }
            )
            print("torch-pruning", found[-1], flush=True)
    report = {
        "version": tp.__version__,
        "torch": torch.__version__,
        "dense_logits_differ_by": float(
            np.abs(predict(dense, work["test"]).numpy() - work["test_teacher"]).max()
        ),
        "without_hints": without_hints(dense),
        "hints": "convolutions of the residual stream are ignored",
        "tried": rows,
        "chosen": {"criterion": criterion, "scope": scope},
        "runs": found,
    }
    np.savez(result_path, report=json.dumps(report), **logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
