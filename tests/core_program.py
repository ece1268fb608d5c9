"""What works without Flax, orbax and dm-pix, as a program; it prints which of them it loaded."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import export, graph, quantize, sparsity, structured, train, tree


def fn(params, x):
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return hidden @ params["down"]["kernel"]


def main(path: str) -> None:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), "float32")

    params = {"up": {"kernel": normal(4, 8), "bias": normal(8)}, "down": {"kernel": normal(8, 2)}}
    x = normal(5, 4)

    sites = [site.path for site in graph.trace(fn, params, x).sites]
    assert sites == ["up/kernel", "down/kernel"], sites

    mask = sparsity.make_mask(params, sparsity=0.5)
    assert sparsity.sparsity_of(sparsity.apply(params, mask)).total > 0.4

    result = quantize.ptq(fn, params, [x], quantize.presets.int8_static)
    exact, rounded = fn(params, x), jax.jit(quantize.execute(fn))(result.params, x)
    assert 0 < jnp.abs(rounded - exact).max() < 0.1
    assert "up/kernel" in str(result.report)

    groups = structured.groups(fn, params, x)
    scores = structured.importance(groups, params)
    keep = structured.choose(groups, scores, budget=structured.Params(0.5))
    smaller_fn, smaller, certificate = structured.shrink(fn, params, keep, x)
    assert smaller["up"]["kernel"].shape == (4, 4) and "holds" in str(certificate)
    assert smaller_fn(smaller, x).shape == exact.shape

    file = export.save(path, result.params).path
    loaded = export.load(file).params
    assert jnp.array_equal(jax.jit(quantize.execute(fn))(loaded, x), rounded)

    assert list(tree.select(params, quantize.learnable(params))) == tree.paths(params)
    tx = sparsity.sparsify(train.optimizer("adamw", learning_rate=0.1), schedule=0.5, every=1)
    step = train.make_step(lambda params, x, key: (fn(params, x) ** 2).sum(-1), tx)
    state = train.init(params, tx, key=jax.random.key(0))
    data = train.Batches(np.asarray(x), batch_size=5)
    state, rows = train.fit(state, step, data, steps=2, progress=False)
    assert rows[-1]["loss"] > 0

    print(json.dumps(sorted({"flax", "orbax", "dm_pix"} & {n.split(".")[0] for n in sys.modules})))


if __name__ == "__main__":
    main(sys.argv[1])
