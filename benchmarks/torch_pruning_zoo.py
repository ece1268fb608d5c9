"""The side of `shrink_zoo_torch_pruning.py` that Torch-Pruning takes; run by it, in PyTorch.

python benchmarks/torch_pruning_zoo.py WEIGHTS RESULT    # an .npz, a .json
"""

import copy
import importlib.metadata
import json
import sys
import warnings

import numpy as np
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F  # noqa: N812, as it is known


class Functional(nn.Module):
    """Weights as bare parameters, used by functions."""

    def __init__(self, w):
        super().__init__()
        self.up, self.down = nn.Parameter(w["up"]), nn.Parameter(w["down"])

    def forward(self, x):
        """Map (batch, 16) to (batch, 10)."""
        return F.linear(F.relu(F.linear(x, self.up.T)), self.down.T)


class ChunkedGate(nn.Module):
    """One kernel makes values and gates, which are chunks of its output."""

    def __init__(self, w):
        super().__init__()
        self.up, self.down = linear(w["up"]), linear(w["down"])

    def forward(self, x):
        """Map (batch, 16) to (batch, 10)."""
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * torch.sigmoid(gate))


class GroupedQuery(nn.Module):
    """Attention of 4 query heads that share 2 key heads."""

    def __init__(self, w):
        super().__init__()
        self.q, self.k, self.v, self.o = (linear(w[name]) for name in "qkvo")

    def forward(self, x):
        """Map (batch, time, 16) to the same shape."""
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, -1, 8) for layer in (self.q, self.k, self.v))
        k, v = (y.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for y in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return self.o(out.reshape(b, t, -1))


class Tied(nn.Module):
    """An embedding that is the head, too, around an MLP with a residual."""

    def __init__(self, w):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(w["embed"], freeze=False)
        self.up, self.down = linear(w["up"]), linear(w["down"])

    def forward(self, ids):
        """Map (batch, time) to (batch, time, 20)."""
        x = self.embed(ids)
        return F.linear(x + self.down(F.relu(self.up(x))), self.embed.weight)


def linear(w):
    """Make a layer of an (in, out) kernel."""
    layer = nn.Linear(*w.shape, bias=False)
    layer.weight = nn.Parameter(w.T.contiguous())
    return layer


MODELS = {
    "functional weights": (Functional, ()),
    "chunked gate": (ChunkedGate, ("down",)),
    "grouped queries": (GroupedQuery, ("o",)),
    "tied embedding": (Tied, ()),
}


def attempt(model, x, outputs):
    """Prune half of everything but what makes the outputs, and say what came of it."""
    dense, pruned = copy.deepcopy(model), copy.deepcopy(model)
    count = lambda m: sum(p.numel() for p in m.parameters())
    try:
        tp.pruner.BasePruner(
            pruned,
            x,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=[getattr(pruned, name) for name in outputs],
        ).step()
        with torch.no_grad():
            want, got = dense(x), pruned(x)
    except Exception as error:  # whatever it is, it is the finding
        return {"error": f"{type(error).__name__}: {error}"}
    same = want.shape == got.shape
    return {
        "params": [count(dense), count(pruned)],
        "shapes": {name: list(p.shape) for name, p in pruned.named_parameters()},
        "differs_by": float((want - got).abs().max()) if same else f"shape {tuple(got.shape)}",
    }


def main(weights_path, result_path):
    """Try all models."""
    warnings.simplefilter("ignore")
    arrays, report = np.load(weights_path), {"version": importlib.metadata.version("torch-pruning")}
    for name, (make, outputs) in MODELS.items():
        mine = {k.split("/")[1]: torch.from_numpy(arrays[k]) for k in arrays if k.startswith(name)}
        x = mine.pop("x")
        report[name] = attempt(make(mine).eval(), x, outputs)
    with open(result_path, "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
