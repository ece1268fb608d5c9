"""The picture of a graph: true widths, folded layers, and text that does not collide."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from zoo import ZOO

from jaxcompress import report
from jaxcompress.errors import ArgumentError
from jaxcompress.graph import summary, trace
from jaxcompress.report._graph_layout import Item, place

MODELS = [
    *("resnet_eval", "unet", "inception", "llama", "llama_scanned", "moe", "encoder_decoder"),
    *("char_lstm", "control_flow"),
]


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def transformer(layers, *, hidden=28, prefix="layers_", odd=None):
    """A decoder without attention scores; layer `odd` has another width."""
    params = {"embed": struct(11, 8), "head": struct(8, 11)}
    for k in range(layers):
        width = hidden + (k == odd)
        params[f"{prefix}{k}"] = {
            **{name: struct(8, 8) for name in ("q", "k", "v", "o")},
            "up": struct(8, width),
            "down": struct(width, 8),
        }

    def fn(params, tokens):
        x = params["embed"][tokens]
        for k in range(layers):
            p = params[f"{prefix}{k}"]
            x += (x @ p["q"] * (x @ p["k"]) + x @ p["v"]) @ p["o"]
            x += jnp.tanh(x @ p["up"]) @ p["down"]
        return x @ params["head"]

    return trace(fn, params, jax.ShapeDtypeStruct((5,), jnp.int32))


def drawn(plot):
    figure = Figure(figsize=plot.size, layout="constrained")
    FigureCanvasAgg(figure)
    plot.draw(figure)
    figure.draw_without_rendering()
    return figure


def bars(figure, axes):
    """The boxes of sites, in pixels: the rectangles below the headings."""
    renderer = figure.canvas.get_renderer()
    return [
        patch.get_window_extent(renderer)
        for patch in axes.patches
        if isinstance(patch, Rectangle) and patch.get_y() > 0.5
    ]


@pytest.mark.parametrize("name", MODELS)
def test_nothing_collides(name):
    fn, params, inputs = ZOO[name].build()
    plot = report.plot_graph(trace(fn, params, *inputs))
    figure = drawn(plot)
    (axes,) = figure.axes
    renderer = figure.canvas.get_renderer()
    texts = [text.get_window_extent(renderer) for text in axes.texts]
    boxes = bars(figure, axes)
    assert len(boxes) == len(plot.data["boxes"])
    for a, b in itertools.combinations([*texts, *boxes], 2):
        assert not a.overlaps(b)
    for box in texts:
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    written = {text.get_text() for text in axes.texts}
    assert {box["label"] for box in plot.data["boxes"]} <= written


@pytest.mark.parametrize("width", ["flops", "params", "bytes"])
def test_widths_are_proportional(width):
    fn, params, inputs = ZOO["resnet_eval"].build()
    plot = report.plot_graph(trace(fn, params, *inputs), width=width)
    figure = drawn(plot)
    found = np.array([box.width for box in bars(figure, figure.axes[0])])
    sizes = np.array([box[width] for box in plot.data["boxes"]], float)
    expected = sizes * found.max() / sizes.max()
    np.testing.assert_allclose(found, np.maximum(expected, 0.03 * figure.dpi), rtol=1e-5)
    shares = [box["share"] for box in plot.data["boxes"]]
    np.testing.assert_allclose(shares, sizes / plot.data["total"][width], rtol=1e-6)


def test_shares_count_every_leaf_and_contraction():
    found = summary(
        lambda p, x: x @ p["w"] + p["b"], {"w": struct(3, 5), "b": struct(5)}, struct(3)
    )
    plot = report.plot_graph(found, width="params")
    (box,) = plot.data["boxes"]
    assert box["share"] == 15 / 20
    written = [text.get_text() for text in drawn(plot).axes[0].texts]
    assert "Widths show 20 params in all, 1 site." in written
    scores = trace(lambda p, x: (x @ p["w"]) @ (x @ p["w"]).T, {"w": struct(3, 5)}, struct(2, 3))
    plot = report.plot_graph(scores)
    assert plot.data["elsewhere"] == {"contractions": 1, "flops": 2 * 2 * 5 * 2}
    text = "Not drawn: 1 contraction without a leaf, 25.0 %."
    assert any(text in t.get_text() for t in drawn(plot).axes[0].texts)


@pytest.mark.parametrize("prefix", ["layers_", "h"])
def test_repeated_layers_are_drawn_once(prefix):
    graph = transformer(24, prefix=prefix)
    plot = report.plot_graph(graph)
    boxes = {box["label"]: box for box in plot.data["boxes"]}
    assert [*boxes] == ["embed", "q", "k", "v", "o", "up", "down", "head"]
    for name in ("q", "up"):
        assert boxes[name]["frame"] == f"{prefix}0 … 23,  × 24"
        assert boxes[name]["sites"] == [f"{prefix}{k}/{name}" for k in range(24)]
    assert boxes["up"]["flops"] == 24 * 2 * 5 * 8 * 28
    assert boxes["head"]["fed_by"] == [f"{prefix}0/down"]
    assert sum(len(box["sites"]) for box in boxes.values()) == len(graph.sites)
    frames = [p for p in drawn(plot).axes[0].patches if isinstance(p, FancyBboxPatch)]
    assert len(frames) == 1
    assert plot.size[1] == report.plot_graph(transformer(3, prefix=prefix)).size[1]
    assert len(report.plot_graph(graph, fold=False).data["boxes"]) == len(graph.sites)


def test_a_layer_that_differs_is_drawn_by_itself():
    plot = report.plot_graph(transformer(9, odd=4))
    frames = {box["frame"] for box in plot.data["boxes"]} - {None}
    assert frames == {"layers_0 … 3,  × 4", "layers_5 … 8,  × 4"}
    assert "layers_4/up" in [box["label"] for box in plot.data["boxes"]]


def test_layers_fed_otherwise_are_not_folded_together():
    """Layer 3 reads what layer 1 gave: the same shapes, another structure."""

    def fn(params, x):
        outputs = [x]
        for k in range(6):
            x = outputs[-2 if k == 3 else -1]
            outputs.append(jnp.tanh(x @ params[f"l{k}"]["up"]) @ params[f"l{k}"]["down"])
        return outputs[-1] + outputs[3]

    params = {f"l{k}": {"up": struct(4, 4), "down": struct(4, 4)} for k in range(6)}
    plot = report.plot_graph(trace(fn, params, struct(2, 4)))
    frames = {box["frame"] for box in plot.data["boxes"]} - {None}
    assert "l0 … 2,  × 3" in frames and not any("l2 … " in frame for frame in frames)


def test_parallel_and_shared_blocks_fold():
    def experts(params, x):
        x = x @ params["router"]
        return sum(jnp.tanh(x @ p["up"]) @ p["down"] for p in params["experts"])

    params = {"router": struct(4, 4), "experts": [{"up": struct(4, 6), "down": struct(6, 4)}] * 8}
    plot = report.plot_graph(trace(experts, params, struct(2, 4)))
    assert [box["times"] for box in plot.data["boxes"]] == [1, 8, 8]
    assert plot.data["boxes"][1]["frame"] == "experts/0 … 7,  × 8"

    def shared(params, x):
        for _ in range(5):
            x = jnp.tanh(x @ params["up"]) @ params["down"]
        return x

    plot = report.plot_graph(trace(shared, {"up": struct(4, 6), "down": struct(6, 4)}, struct(4)))
    assert [(b["label"], b["frame"]) for b in plot.data["boxes"]] == [
        (name, "the same leaves, × 5") for name in ("up", "down")
    ]


def test_jitted_layers_fold_and_branches_do_not():
    def jitted(params, x):
        for k in range(3):
            layer = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
            layer.__name__ = f"layer{k}"
            x = jax.jit(layer)(params[k], x)
        return x

    params = [{"up": struct(4, 6), "down": struct(6, 4)}] * 3
    plot = report.plot_graph(trace(jitted, params, struct(2, 4)))
    assert [box["times"] for box in plot.data["boxes"]] == [3, 3]

    def branches(params, x):
        run = lambda p: lambda x: jnp.tanh(x @ p["up"]) @ p["down"]
        return jax.lax.switch(x[0, 0].astype(int), [run(p) for p in params], x)

    plot = report.plot_graph(trace(branches, params, struct(2, 4)))
    assert [box["times"] for box in plot.data["boxes"]] == [1] * 6


def test_scanned_layers_say_how_often_they_run():
    fn, params, inputs = ZOO["llama_scanned"].build()
    boxes = {b["label"]: b for b in report.plot_graph(trace(fn, params, *inputs)).data["boxes"]}
    assert boxes["layers/gate × 2"]["shape"] == [4, 6]  # of one layer
    assert boxes["layers/gate × 2"]["stack"] == [2]
    assert "embed #1" in boxes


def test_files_and_the_page(tmp_path):
    plot = report.plot_graph(transformer(3), title="Graph")
    path = plot.save(tmp_path / "graph.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    data = json.loads(path.with_suffix(".json").read_text())
    assert data.pop("title") == "Graph" and data == json.loads(json.dumps(plot.data))
    assert plot.render("svg") == report.plot_graph(transformer(3), title="Graph").render("svg")
    section = report.Section(title="The model", parts=(plot,))
    html = report.page(tmp_path / "page.html", [section], title="Report").read_text()
    assert html.count("<svg") == 1 and "http://" not in html.replace("http://www.w3.org", "")


def test_bad_input():
    with pytest.raises(ArgumentError, match="at least one site"):
        report.plot_graph(trace(lambda p, x: x + p["b"], {"b": struct(3)}, struct(3)))
    with pytest.raises(ArgumentError, match="width"):
        report.plot_graph(transformer(1), width="seconds")


@pytest.mark.parametrize("seed", range(6))
def test_layout_of_random_graphs(seed):
    """Rows follow the edges, items keep their distance, and edges pass between items."""
    rng = np.random.default_rng(seed)
    items = [
        Item(key=str(k), width=rng.uniform(0.1, 2), height=rng.uniform(0.2, 1), order=k)
        for k in range(14)
    ]
    pairs = itertools.combinations(range(14), 2)
    edges = [(str(a), str(b)) for a, b in pairs if rng.random() < 0.15]
    placed = place(items, edges)
    at = placed.items
    for a, b in edges:
        assert at[a].y + at[a].height < at[b].y
        assert all(at[a].y < y < at[b].y + 1e-9 for _, y in placed.bends[a, b])
    for a, b in itertools.combinations(items, 2):
        if math.isclose(a.y, b.y):
            assert abs(a.x - b.x) > (a.width + b.width) / 2
        for edge, bends in placed.bends.items():
            for x, y in bends:
                inside = abs(x - a.x) < a.width / 2 and a.y <= y <= a.y + a.height
                assert not inside, (edge, a.key)
    assert min(item.x - item.width / 2 for item in items) >= -1e-9
    assert max(item.x + item.width / 2 for item in items) <= placed.width + 1e-9
