"""A truncated, altered or foreign file is refused with the reason; a crafted one runs nothing."""

import hashlib
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxcompress import export, numerics
from jaxcompress.errors import FileError

KEPT = np.arange(48).reshape(8, 6) % 3 == 0


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "model.safetensors"
    x = jnp.asarray(np.where(KEPT, 1.0, 0.0), jnp.float32)
    q = numerics.quantize(x, numerics.Format(numerics.int4, numerics.PerChannel()))
    params = {"q": q, "w": x, "b": jnp.arange(3), "list": [jnp.ones(2, jnp.bfloat16)]}
    mask = {"q": KEPT, "w": KEPT, "b": None, "list": [None]}
    export.save(path, params, mask=mask, metadata={"digest": '{"__metadata__":{"digest":"'})
    return path.read_bytes()


@pytest.fixture
def refuse(tmp_path):
    path = tmp_path / "bad.safetensors"

    def check(content, match):
        path.write_bytes(content)
        with pytest.raises(FileError, match=match):
            export.load(path)

    return check


def test_the_original_is_fine(original, tmp_path):
    (tmp_path / "good").write_bytes(original)
    assert export.load(tmp_path / "good").params["b"].tolist() == [0, 1, 2]


def test_truncation_anywhere(original, refuse):
    for length in range(len(original)):
        refuse(original[:length], "a truncated file" if length >= 36 else "truncated|begin with")


def test_a_changed_byte_anywhere(original, refuse):
    for position in range(len(original)):
        content = bytearray(original)
        content[position] ^= (0x01, 0x20, 0x80)[position % 3]
        refuse(bytes(content), "altered|truncated|does not begin")


def test_swapped_and_added_bytes(original, refuse):
    refuse(original + b"\0", "an altered file: .* where its header says")
    size = 8 + int.from_bytes(original[:8], "little")
    body = original[size:]
    refuse(original[:size] + body[8:] + body[:8], "does not have the digest")


def test_other_files(refuse, tmp_path):
    refuse(b"", "a truncated file of 0 bytes")
    refuse(b"PK\3\4" * 100, "does not begin with the header of export.save")
    refuse(
        safetensors.numpy.save({"x": np.ones(100)}, {"a": "b"}), "does not begin with the header"
    )
    with pytest.raises(FileError, match="cannot be read: No such file"):
        export.load(tmp_path / "absent")
    with pytest.raises(FileError, match="cannot be read: Is a directory"):
        export.load(tmp_path)


def forge(original, change):
    """Change the header of a file as an attacker would, and give it the digest it needs."""
    size = 8 + int.from_bytes(original[:8], "little")
    header = json.loads(original[8:size])
    texts = header["__metadata__"]
    inside = {key: json.loads(texts[key]) for key in ("tree", "formats", "masked", "user")}
    change(inside, header)
    texts |= {key: json.dumps(value) for key, value in inside.items()}
    texts["digest"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    content = len(text).to_bytes(8, "little") + text + original[size:]
    digest = hashlib.sha256(content).hexdigest().encode()
    return content.replace(b"0" * 64, digest, 1)


def test_forging_works(original, tmp_path):
    forged = forge(original, lambda inside, header: inside["user"].update(note="mine"))
    (tmp_path / "forged").write_bytes(forged)
    assert export.load(tmp_path / "forged").metadata["note"] == "mine"


def set_in(*path, to):
    def change(inside, header):
        del header
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = to

    return change


FORGERIES = {
    "class": (
        set_in("formats", 0, to={"os.system": {"command": "id"}}),
        "format class 'os.system'",
    ),
    "builtin": (set_in("formats", 0, to={"eval": ["1"]}), "format class 'eval'"),
    "field": (set_in("formats", 0, to={"Format": {"evil": 1}}), "unexpected keyword"),
    "bits": (
        set_in("formats", 0, "Format", "qtype", to={"Int": {"name": "int4", "bits": 99}}),
        "`bits`",
    ),
    "dtype": (set_in("tree", "b", 1, to="object"), "unknown dtype 'object'"),
    "shape": (set_in("tree", "b", 2, to=[4]), "'int32' ends too early"),
    "huge shape": (set_in("tree", "b", 2, to=[2**40]), "'int32' ends too early"),
    "huge mask": (set_in("tree", "w", 2, to=[2**30, 2**10]), "'bits' ends too early"),
    "negative shape": (set_in("tree", "b", 2, to=[-3]), "the shape"),
    "odd shape": (set_in("tree", "b", 2, to="abc"), "the shape"),
    "left over": (set_in("tree", "b", 2, to=[2]), "hold more than its leaves"),
    "kind": (set_in("tree", "b", to=["x", 1]), r"structure holds"),
    "index": (set_in("tree", "q", 1, to=7), "index out of range"),
    "keys": (set_in("tree", "b", to=["k", "evil", [3]]), "random keys of the unknown kind 'evil'"),
    "scale": (set_in("tree", "q", 3, to=[1, 7]), "cannot be decoded"),
    "qdtype": (set_in("tree", "q", 4, to="object"), "unknown dtype 'object'"),
    "short": (set_in("tree", "b", to=["a"]), "cannot be decoded"),
    "number": (set_in("tree", to=3), "structure holds '3'"),
}


@pytest.mark.parametrize(("change", "match"), FORGERIES.values(), ids=FORGERIES.keys())
def test_a_crafted_file_is_refused(original, refuse, change, match):
    refuse(forge(original, change), match)


def test_deep_nesting_is_refused(original, refuse):
    nested = "[" * 100_000
    content = forge(original, lambda _, header: header["__metadata__"].update(extra=nested))
    refuse(content.replace(b'"extra":"', b'"extra":['), "altered")


def test_another_version_is_named(original, refuse):
    content = forge(
        original, lambda _, header: header["__metadata__"].update(format="jaxcompress 2")
    )
    refuse(content, "'jaxcompress 2', not 'jaxcompress 1'")


def test_no_module_here_can_run_what_it_reads():
    for file in pathlib.Path(export.__file__).parent.glob("*.py"):
        words = file.read_text()
        assert not any(bad in words for bad in ("pickle", "eval(", "exec(", "import_module"))


def test_the_documented_layout_is_enough_to_read_it(original):
    """Decode the pruned int4 leaf by docs/file_format.md, with NumPy and json alone."""
    size = 8 + int.from_bytes(original[:8], "little")
    header = json.loads(original[8:size])
    texts, body = header.pop("__metadata__"), original[size:]
    assert original[35:99].decode() == texts["digest"]
    blanked = original[:35] + b"0" * 64 + original[99:]
    assert hashlib.sha256(blanked).hexdigest() == texts["digest"]
    pools = {name: body[slice(*entry["data_offsets"])] for name, entry in header.items()}
    assert list(json.loads(texts["tree"])) == ["b", "list", "q", "w"]
    kind, index, values, scales, _, masked = json.loads(texts["tree"])["q"]
    assert (kind, values, scales, masked) == ("q", [8, 6], [1, 6], 1)
    assert json.loads(texts["formats"])[index]["Format"]["qtype"]["Int"]["bits"] == 4
    # "q" is the first leaf with entries in `bits` and the first in `float32`.
    bits = np.unpackbits(np.frombuffer(pools["bits"], np.uint8), bitorder="little")
    kept = bits[:48].reshape(8, 6).astype(bool)
    np.testing.assert_array_equal(kept, KEPT)
    nibbles = bits[48 : 48 + 4 * kept.sum()].reshape(-1, 4) @ [1, 2, 4, -8]
    codes = np.zeros((8, 6))
    codes[kept] = nibbles
    scale = np.frombuffer(pools["float32"], "<f4")[:6]
    np.testing.assert_allclose(codes * scale, np.where(KEPT, 1.0, 0.0), rtol=1e-6)
