"""Round trips through the file: QArrays of every format, pruned and whole."""

import base64
import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from round_trips import BITMAP, CAN_PRUNE, FORMATS, KEPT, RNG, qarray, same, same_trees, side_bytes

from jaxcompress import export, numerics
from jaxcompress.errors import ArgumentError, ArgumentTypeError
from jaxcompress.numerics import Format, PerChannel, PerGroup, PerTensor


@pytest.mark.parametrize("name", FORMATS)
def test_codes_take_the_bits_of_their_type(path, name):
    q = qarray(name)
    info = export.save(path, {"w": q})
    same_trees(export.load(path).params, {"w": q})
    assert info.leaves["w"] == FORMATS[name][1] + side_bytes(q)


@pytest.mark.parametrize("name", CAN_PRUNE)
def test_only_kept_codes_are_written(path, name):
    q = qarray(name, kept=KEPT)
    info = export.save(path, {"w": q}, mask={"w": KEPT})
    loaded = export.load(path)
    same_trees(loaded.params, {"w": q})
    np.testing.assert_array_equal(loaded.mask["w"], KEPT)
    dense = FORMATS[name][1]
    assert info.leaves["w"] <= BITMAP + side_bytes(q) + np.ceil(dense * KEPT.mean()) + 1


@pytest.mark.parametrize("name", ["binary", "basis"])
def test_a_type_without_zero_cannot_be_pruned(path, name):
    with pytest.raises(ArgumentError, match=r"`params`: expected .* exactly zero .*'w'"):
        export.save(path, {"w": qarray(name)}, mask={"w": KEPT})
    assert not path.exists()


def test_minus_zero_in_a_pruned_place_comes_back_as_zero(path):
    q = qarray("float8_e4m3fn", kept=KEPT)
    minus = jnp.asarray(np.where(KEPT, np.asarray(q.values), -np.asarray(q.values)))
    export.save(path, {"w": dataclasses.replace(q, values=minus)}, mask={"w": KEPT})
    same(export.load(path).params["w"], q)


def test_codes_that_their_scale_makes_zero_come_back_as_zero(path):
    q, alive = qarray("int8"), np.arange(6) % 2 == 0
    dead = dataclasses.replace(q, scale=jnp.asarray(np.where(alive, q.scale, 0)))
    export.save(path, {"w": dead}, mask={"w": np.tile(alive, (8, 1))})
    loaded = numerics.dequantize(export.load(path).params["w"])
    np.testing.assert_array_equal(loaded, numerics.dequantize(dead))


def test_stacked_qarrays(path):
    """What vmap over layers gives: one more leading axis on values and scale."""
    parts = [qarray("int4 grouped", kept=KEPT) for _ in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    mask = np.stack([KEPT] * 3)
    export.save(path, {"w": stacked}, mask={"w": mask})
    loaded = export.load(path)
    same(loaded.params["w"], stacked)
    np.testing.assert_array_equal(loaded.mask["w"], mask)


def test_what_quantize_gives_dequantizes_to_the_same(path):
    x = jnp.asarray(np.where(KEPT, RNG.normal(size=(8, 6)), 0), jnp.bfloat16)
    q = numerics.quantize(x, Format(numerics.int4, PerChannel()))
    export.save(path, {"w": q}, mask={"w": KEPT})
    loaded = export.load(path).params["w"]
    same(numerics.dequantize(loaded), numerics.dequantize(q))
    assert loaded.dtype == jnp.bfloat16 and loaded.shape == (8, 6)


ACTIVATIONS = {
    "static": (Format(numerics.uint8, symmetric=False), np.float32(0.1), np.float32(3)),
    "stacked": (Format(numerics.int8, range=numerics.Entropy()), np.full((3, 1), 0.2, "f4"), None),
    "dynamic": (Format(numerics.int8, numerics.PerToken()), None, None),
}


@pytest.mark.parametrize("name", ["int8 asymmetric", "nvfp4"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_form_of_activations_comes_back(path, name, kind):
    format, *parts = ACTIVATIONS[kind]
    scale, zero = (None if part is None else jnp.asarray(part) for part in parts)
    activation = numerics.Activation(format=format, scale=scale, zero=zero)
    q = dataclasses.replace(qarray(name, kept=KEPT), activation=activation)
    info = export.save(path, {"v": qarray(name), "w": q}, mask={"v": None, "w": KEPT})
    loaded = export.load(path)
    same(loaded.params["w"], q)
    np.testing.assert_array_equal(loaded.mask["w"], KEPT)
    assert loaded.params["w"].activation.format == format
    assert loaded.params["w"].activation.is_static == (scale is not None)
    assert loaded.params["v"].activation is None
    assert jax.tree.structure(loaded.params["w"]) == jax.tree.structure(q)
    assert sum(info.leaves.values()) == info.bytes


def test_stacked_global_scales_come_back(path):
    x = jnp.asarray(RNG.normal(size=(3, 16, 2)) * np.float32([[[1]], [[9]], [[99]]]), jnp.float32)
    stack = jax.vmap(lambda x: numerics.quantize(x, numerics.nvfp4))(x)
    export.save(path, {"w": stack})
    loaded = export.load(path).params["w"]
    same(loaded, stack)
    np.testing.assert_array_equal(numerics.dequantize(loaded), numerics.dequantize(stack))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_a_global_scale_that_does_not_fit_the_format_is_refused(path, name):
    other = None if name == "nvfp4" else jnp.ones((1, 1, 1))
    with pytest.raises(ArgumentError, match="global scale"):
        export.save(path, {"w": dataclasses.replace(qarray(name), global_scale=other)})


# Written before QArrays had global scales and activations: an int4 array with groups, zero points
# and a mask, a float8 one with bfloat16 scales, and numbers.
OLD_FILE = """
c-oCq&2H2%5MGHFv3x2hmE!zux~sO7!y+Uqaez}2t(;`ircL6l?WNsTK|LWZh}Yl=cm@s?2aZ%c1UI+<<D}azluB4hJb&NJml^
xxy+OCm=yY0x<~i4VI;EpCnwNW^G#ycJhEQw-zMuP?g`RI`A$Z}i@NLHp_%P?;&>u3-^+LzB9RQZ)8wGRO21BInrqrT^kTo~C4
){qX>X`(k2t!9EnwQY%QZx#^RjG9a>(JySZ^lH5<Mo;!2stJ-SBGju7}+F;Fw<j_i5wIu%BmviLK{(vn&^EXl{hA8i6Jggnxkt
(d@=*s#aSff3Wz%<&Ad+0xJlMbDzZ*aL5ln20Z|#R0I6vSfSk@^%40f;VtN!)%eErN@~j{+J2QJsi%M|qI_PCaO>d%^6@^_a>s
{B8M#=g(O#VlX$W4;=x@D#-5mK0R8X{0W(u*1N;*;je*6`YxVp=xZ>oQ^s6k5EtMP*O&W?pew>O~*_4CG@e=CfW?<tbdpszr?l
L6(MJ!7Bx5L-^iR$(>Z~@)IMsxU9RmP0TO-#jg9!a0*`S7R@Tn@J^b~p;1Ei_3mb3c$>LR^BV$75sP$nSrAjCoM3a!ae^FstL5
Cxdagj4S+}&cmb2*YfJuRl391%V``l;|^An497ey3>0yCt@wgNjr@Uqk@`q2dS75Hs*fN-aSmqx#Vz6e)<!{8rCJce$Vv@Pk^U
~s<u>EdF`yuJK%%e=ScWsF(p+xU5SIsQ;z;`8PBJ$?N(e{;3%e1G?O?d`9hKfVo)7O(z$`wf_kdY=
"""


def test_old_files_load(path):
    path.write_bytes(zlib.decompress(base64.b85decode(OLD_FILE.replace("\n", ""))))
    loaded = export.load(path)
    kept = np.arange(48).reshape(8, 6) % 3 > 0
    x = np.where(kept, np.arange(48).reshape(8, 6) % 7 - 3, 0).astype(np.float32)
    a = numerics.quantize(jnp.asarray(x), Format(numerics.int4, PerGroup(4), symmetric=False))
    same(loaded.params["a"], a)
    assert loaded.params["b"].format == Format(numerics.float8_e4m3fn, scale_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(loaded.mask["a"], kept)
    np.testing.assert_array_equal(loaded.params["c"], [0, 1, 2])
    content = path.read_bytes()  # and what they could say is still said in the same bytes
    export.save(path, loaded.params, mask=loaded.mask)
    assert path.read_bytes() == content


@export.allow
@dataclasses.dataclass(frozen=True)
class PerHalf(PerTensor):
    """A granularity of a user's own."""

    note: tuple[str, int] = ("x", 1)


def test_a_class_of_ones_own_must_be_allowed(path):
    mine = dataclasses.replace(qarray("int8"), format=Format(numerics.int8, PerHalf(("y", 2))))
    export.save(path, {"w": mine})
    assert export.load(path).params["w"].format == mine.format

    @dataclasses.dataclass(frozen=True)
    class Secret(PerTensor):
        pass

    hidden = dataclasses.replace(mine, format=Format(numerics.int8, Secret()))
    with pytest.raises(ArgumentTypeError, match=r"Secret.*export\.allow"):
        export.save(path, {"w": hidden})
    with pytest.raises(ArgumentTypeError, match="still free"):
        export.allow(type("PerTensor", (Secret,), {}))
