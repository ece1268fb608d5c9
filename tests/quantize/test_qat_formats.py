"""What a format means in training: as in `ptq` at a leaf's sites, as in `pack` by its method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import numerics, quantize
from jaxcompress.errors import ArgumentError, ArgumentTypeError
from jaxcompress.numerics import Format, PerChannel, PerGroup, PerTensor, int4, int8
from jaxcompress.quantize import GPTQ, LSQ, ClipSearch, Policy, Rule


def policy(granularity, qtype=int8, **options):
    return Policy((Rule(weights=Format(qtype, granularity), **options),))


def transposed(p, x):
    """An Equinox kernel, `(out, in)`."""
    return x @ p["w"].T


def scanned(p, x):
    return jax.lax.scan(lambda h, w: (jnp.sin(h @ w), None), x, p["w"])[0]


def looked_up(p, tokens):
    return p["w"][tokens]


def tied(p, tokens):
    return p["w"][tokens] @ p["w"].T


def draw(*shape):
    return jax.random.normal(jax.random.key(len(shape)), shape)


X, TOKENS = draw(2, 4), jnp.arange(3)
CASES = {  # fn, input, shape, granularity, what it comes to, shape of the scales
    "out, in": (transposed, X, (6, 4), PerChannel(), PerChannel((-2,)), (6, 1)),
    "out, in, groups": (transposed, X, (6, 4), PerGroup(2), PerGroup(2, -1), (6, 2, 1)),
    "groups of a divisor": (transposed, X, (6, 4), PerGroup(3), PerGroup(2, -1), (6, 2, 1)),
    "axes of its own": (transposed, X, (6, 4), PerChannel((1,)), PerChannel((1,)), (1, 4)),
    "layers": (scanned, X, (3, 4, 4), PerChannel(), PerChannel((-3, -1)), (3, 1, 4)),
    "layers, one each": (scanned, X, (3, 4, 4), PerTensor(), PerChannel((-3,)), (3, 1, 1)),
    "rows": (looked_up, TOKENS, (5, 4), PerChannel(), PerChannel((-2,)), (5, 1)),
    "tied": (tied, TOKENS, (5, 4), PerChannel(), PerChannel((-2,)), (5, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_format_means_what_it_does_in_ptq(name):
    fn, x, shape, granularity, resolved, scales = CASES[name]
    params, rules = {"w": draw(*shape)}, policy(granularity)
    qat = quantize.train(fn, rules)
    expected = Format(int8, resolved)
    assert qat.coverage(params, x).leaves.formats == {"w": expected}
    stored = qat.convert(params, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert stored["w"].format == expected and stored["w"].scale.shape == scales
    after = quantize.ptq(fn, params, [x], rules).params["w"]
    assert after.format == expected
    np.testing.assert_array_equal(numerics.dequantize(stored["w"]), numerics.dequantize(after))
    # Bit for bit: one weight behind both.
    np.testing.assert_array_equal(qat(params, x), fn(quantize.unpack(stored), x))


def test_the_scales_are_those_of_a_loop_over_outputs_and_layers():
    w = np.asarray(draw(6, 4))
    stored = quantize.train(transposed, policy(PerChannel())).convert({"w": w}, X)
    np.testing.assert_allclose(
        stored["w"].scale[:, 0], [np.abs(row).max() / 127 for row in w], rtol=1e-6
    )
    w = np.asarray(draw(3, 4, 4))
    stored = quantize.train(scanned, policy(PerChannel())).convert({"w": w}, X)
    expected = [[np.abs(layer[:, k]).max() / 127 for k in range(4)] for layer in w]
    np.testing.assert_allclose(stored["w"].scale[:, 0], expected, rtol=1e-6)


def test_learned_steps_have_the_shape_of_the_resolved_scales():
    params = {"w": draw(6, 4)}
    qat = quantize.train(transposed, policy(PerChannel(), int4), weights=LSQ())
    variables = qat.init(params, X)
    assert variables["quantizers"]["learned"]["w"]["weights"]["step"].shape == (6, 1)
    out = qat(variables, X)
    np.testing.assert_allclose(
        out, transposed(quantize.unpack(qat.convert(variables, X)), X), rtol=1e-5
    )


def test_what_is_changed_or_has_no_site_is_said():
    def fn(p, x):
        return transposed(p, x) + p["table"].sum()

    params = {"w": draw(6, 4), "table": draw(4, 2)}
    account = quantize.train(fn, policy(PerGroup(3))).coverage(params, X)
    assert account.notes == {"w": "groups of 2, since 3 does not divide 4"}
    assert set(account.leaves.exempt) == {"table"}
    account = quantize.train(fn, policy(PerChannel())).coverage(params, X)
    assert account.elsewhere == ("table",) and not account.notes
    assert account.leaves.formats["table"].granularity == PerChannel()


def test_conversion_asks_for_inputs_where_sites_decide():
    params = {"w": draw(6, 4)}
    with pytest.raises(ArgumentTypeError, match="`inputs`"):
        quantize.train(transposed, policy(PerChannel())).convert(params)
    own = quantize.train(transposed, policy(PerChannel((0,)))).convert(params)
    assert own["w"].scale.shape == (6, 1)


def test_a_method_rounds_as_it_does_on_params_alone():
    params = {"w": draw(4, 6)}
    rules = policy(PerChannel(), int4, method=ClipSearch())
    fn = lambda p, x: x @ p["w"]
    qat = quantize.train(fn, rules)
    rounded = quantize.fake_quant(params, rules)
    plain = quantize.fake_quant(params, policy(PerChannel(), int4))
    assert (rounded["w"] != plain["w"]).any()
    np.testing.assert_array_equal(qat(params, X), fn(rounded, X))
    packed = quantize.pack(params, rules)["w"]
    stored = qat.convert(params, X)["w"]
    np.testing.assert_array_equal(stored.values, packed.values)
    np.testing.assert_array_equal(stored.scale, packed.scale)


def test_a_method_that_needs_data_is_refused_as_on_params_alone():
    params, rules = {"w": draw(4, 6)}, policy(PerChannel(), int4, method=GPTQ())
    qat = quantize.train(lambda p, x: x @ p["w"], rules)
    with pytest.raises(ArgumentError) as alone:
        quantize.fake_quant(params, rules)
    for call in (qat, qat.init, qat.convert, qat.coverage):
        with pytest.raises(ArgumentError) as raised:
            call(params, X)
        assert str(raised.value) == str(alone.value)
