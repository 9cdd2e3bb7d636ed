"""Bad checkpoints of other tools: one clear error, nothing written, no code run; and a fuzzer over all readers."""

import json
import os
import pickle
import random as python_random
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import QuantKitError, convert
from quantkit.checkpoint import INDEX, WEIGHTS
from quantkit.errors import MachineError
from quantkit.formats import open_source
from quantkit.formats.reader import PackedReader

FUZZED_SECONDS = float(os.environ.get("QUANTKIT_FUZZ_SECONDS", "60"))
FIRST_SEED = int(os.environ.get("QUANTKIT_FUZZ_SEED", "0"))
TARGETS = ("gptq", "gptq_v2", "awq", "compressed-tensors", "gguf")
FUZZED = (*TARGETS, "fp8", "bitsandbytes", "hqq", "quantkit")
FIRST = "model.layers.0.mlp.down_proj"


def as_nf4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight as bitsandbytes has it, on a map of sixteen even steps."""
    blocks = weight.float().view(-1, 64)
    absmax, values = blocks.abs().amax(1), torch.linspace(-1, 1, 16)
    codes = (blocks / absmax[:, None] * 7.5 + 7.5).round().to(torch.uint8).view(-1, 2)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    return {
        "weight": (codes[:, 0] << 4 | codes[:, 1])[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": values,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def as_hqq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight as HQQ has it: 4 bits, groups of 32 columns."""
    rows = weight.float().view(-1, 32)
    scale = (rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)) / 15
    zero = -rows.amin(1, keepdim=True) / scale
    codes = (rows / scale + zero).round().to(torch.uint8)
    first, second = codes.chunk(2)
    numbers = {"nbits": 4, "group_size": 32, "axis": 1, "view_as_float": 0}
    return {
        "W_q": first << 4 | second,
        "scale": scale.half(),
        "zero": zero.half(),
        "shape": torch.tensor(weight.shape),
        "packing": torch.tensor(list(b"4bit_u8"), dtype=torch.uint8),
        **{name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()},
    }


HANDMADE = {"bitsandbytes": as_nf4, "hqq": as_hqq}  # which quantkit does not write


def by_hand(source: Path, method: str, folder: Path) -> Path:
    """A plain model's directory with its linears in a format."""
    shutil.copytree(source, folder)
    tensors = {}
    for name, tensor in load_file(source / WEIGHTS).items():
        if "_proj." in name:
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{suffix}": part for suffix, part in HANDMADE[method](tensor).items()}
        else:
            tensors[name] = tensor
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(content | {"quantization_config": {"quant_method": method}})
    )
    return folder


@pytest.fixture(scope="module")
def exported(packed, source, tmp_path_factory):
    """exported(format) -> a directory of a tiny model in it; not to be changed."""
    made: dict[str, Path] = {}
    plain = source

    def export(target: str) -> Path:
        if target in HANDMADE and target not in made:
            made[target] = tmp_path_factory.mktemp(target) / "packed"
            by_hand(plain("llama", tie_word_embeddings=False), target, made[target])
        if target not in made:
            scheme = "fp8-block" if target == "fp8" else "w4a16-g32"
            source = packed("llama", scheme, tie_word_embeddings=False)
            made[target] = tmp_path_factory.mktemp(target) / "packed"
            if target == "quantkit":
                return shutil.copytree(source, made[target])
            convert(source, made[target], target)
        return made[target]

    return export


@pytest.fixture
def bad(exported, tmp_path):
    """bad(format) -> a copy to damage."""
    return lambda target: shutil.copytree(exported(target), tmp_path / "bad")


def refused(folder: Path, *words: str) -> None:
    """Neither loaded nor converted, with the words in one line; nothing is left behind."""
    out = folder.parent / "out"
    to = "compressed-tensors" if "gptq" in (folder / "config.json").read_text() else "gptq_v2"
    for work in (lambda: quantkit.load(folder, "cpu"), lambda: convert(folder, out, to)):
        with pytest.raises(QuantKitError) as error:
            work()
        message = str(error.value)
        assert str(folder) in message, message
        for word in words:
            assert word in message, f"{word!r} is not in: {message}"
        assert not out.exists()
        assert not out.with_name("out.partial").exists()


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_quantization(folder: Path, change) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content["quantization_config"])
    (folder / "config.json").write_text(json.dumps(content))


def edit_header(folder: Path, change) -> None:
    """Rewrites the safetensors header, whatever it then says."""
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


# files


@pytest.mark.parametrize("target", TARGETS[:-1])
def test_a_truncated_shard_is_named(bad, target):
    folder = bad(target)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])
    refused(folder, WEIGHTS, "truncated")


def test_a_header_that_claims_petabytes_is_refused_before_anything_is_allocated(bad):
    folder = bad("gptq")

    def claim(header):
        header[f"{FIRST}.qweight"]["shape"] = [2**40, 2**20]

    edit_header(folder, claim)
    refused(folder, WEIGHTS, "damaged safetensors header", f"{FIRST}.qweight")
    folder = shutil.copytree(folder, folder.parent / "again")

    def stretch(header):
        header[f"{FIRST}.qweight"]["data_offsets"] = [0, 2**62]
        header[f"{FIRST}.qweight"]["shape"] = [2**40, 2**20]

    edit_header(folder, stretch)
    refused(folder, WEIGHTS, "truncated", "its header promises")


@pytest.mark.parametrize("entry", ["../../etc/passwd", "/etc/passwd", "sub/model.safetensors", ".."])
def test_an_index_that_leads_elsewhere_is_refused(bad, entry):
    folder = bad("awq")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": entry}}))
    refused(folder, INDEX, entry, "do not trust")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_nested_without_end_is_refused(bad, run, name):
    folder = bad("gptq")
    (folder / name).write_text('{"weight_map":' + "[" * 100_000 + "]" * 100_000 + "}")
    refused(folder, name, "copy it again")
    code, _, err = run("inspect", folder)
    assert code == 2
    assert err.count("\n") == 1


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["QUANTKIT_TRAP"]),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "qmodel.pt", WEIGHTS])
def test_pickles_are_not_opened(bad, tmp_path, monkeypatch, name):
    monkeypatch.setenv("QUANTKIT_TRAP", str(tmp_path / "sprung"))
    folder = bad("gptq")
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Trap()) + bytes(100))
    refused(folder, WEIGHTS)
    assert not (tmp_path / "sprung").exists()


def test_a_module_of_code_beside_the_model_is_not_run(bad, tmp_path):
    folder = bad("gptq")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass C: pass\n")
    content = json.loads((folder / "config.json").read_text())
    content["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
    (folder / "config.json").write_text(json.dumps(content))
    quantkit.load(folder, "cpu")
    assert not (tmp_path / "sprung").exists()


# configs that lie


@pytest.mark.parametrize("target", ["gptq", "gptq_v2"])
def test_gptq_with_other_bits_than_it_says_is_refused(bad, target):
    folder = bad(target)
    edit_quantization(folder, lambda c: c.update(bits=8))
    refused(folder, f"{FIRST}.", "bits 8")
    edit_quantization(folder, lambda c: c.update(bits=5))
    refused(folder, "bits 5", "2, 3, 4, 8")
    edit_quantization(folder, lambda c: c.update(bits=4, group_size=64))
    refused(folder, f"{FIRST}.scales", "group_size 64")
    edit_quantization(folder, lambda c: c.update(group_size=-1))
    refused(folder, f"{FIRST}.scales", "group_size -1")
    edit_quantization(folder, lambda c: c.update(group_size="32"))
    refused(folder, "group_size '32'", "-1")
    edit_quantization(folder, lambda c: c.update(group_size=32, checkpoint_format="marlin"))
    refused(folder, "'marlin'", "gptq_v2")


def test_awq_that_lies_is_refused(bad):
    folder = bad("awq")
    edit_quantization(folder, lambda c: c.update(group_size=64))
    refused(folder, f"{FIRST}.scales", "group_size 64")
    edit_quantization(folder, lambda c: c.update(group_size=32, bits=3))
    refused(folder, "bits 3")
    edit_quantization(folder, lambda c: c.update(bits=4, version="gemv"))
    refused(folder, "'gemv'", "'gemm'")


def test_compressed_tensors_that_lies_is_refused(bad):
    folder = bad("compressed-tensors")

    def weights(**changes):
        edit_quantization(folder, lambda c: c["config_groups"]["group_0"]["weights"].update(changes))

    weights(num_bits=8)
    refused(folder, f"{FIRST}.weight_packed", "num_bits is 8")
    weights(num_bits=4, group_size=64)
    refused(folder, f"{FIRST}.weight_scale", "group 64")
    weights(group_size=None, strategy="channel")
    refused(folder, f"{FIRST}.weight_scale", "channel")
    weights(strategy="group", group_size=32, symmetric=False)
    refused(folder, f"{FIRST}.weight_zero_point", "missing")
    weights(symmetric=True)
    edit_quantization(folder, lambda c: c["config_groups"]["group_0"].update(targets=["re:("]))
    refused(folder, "'('", "regular expression")
    edit_quantization(folder, lambda c: c["config_groups"]["group_0"].update(targets=["model.layers.7.x"]))
    refused(folder, "no group", FIRST)
    edit_quantization(
        folder, lambda c: c.update(transform_config={"config_groups": {"R3": {"type": "hadamard"}}})
    )
    refused(folder, "transform_config", "quantize the original")
    edit_quantization(folder, lambda c: c.update(config_groups=[]))
    refused(folder, "config_groups")


def test_quantkits_own_are_checked_by_the_same_rules(bad):
    folder = bad("quantkit")
    edit(folder, lambda t: t.update({f"{FIRST}.scales": t[f"{FIRST}.scales"][:, :1].contiguous()}))
    with pytest.raises(QuantKitError, match=rf"{FIRST}\.scales is BF16 \[64, 1\], expected BF16 \[64, 3\]"):
        convert(folder, folder.parent / "out", "gptq")
    assert not (folder.parent / "out").exists()


def test_bitsandbytes_that_lies_is_refused(bad):
    folder, name = bad("bitsandbytes"), f"{FIRST}.weight.quant_state.bitsandbytes__nf4"

    def describe(**changes):
        state = {"blocksize": 64, "shape": [64, 96]} | changes
        data = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        edit(folder, lambda tensors: tensors.update({name: data}))

    for changes, words in (
        ({"shape": [2**40, 2**40]}, (f"{FIRST}.weight", "[1099511627776, 1099511627776]")),
        ({"shape": [64]}, (name, "positive numbers")),
        ({"blocksize": 0}, (name, "blocksize 0")),
        ({"blocksize": 128}, (f"{FIRST}.weight.absmax", "blocksize 128")),
        ({"shape": "x"}, (name, "cannot be read")),
        ({"blocksize": 10**15}, (name, "blocksize 1000000000000000", "at most 4096")),
        ({"blocksize": 2**63}, (name, "at most 4096")),
        ({"nested_blocksize": 10**15}, (name, "nested_blocksize 1000000000000000")),
    ):
        describe(**changes)
        refused(folder, *words)
    deep = torch.tensor(list(b"[" * 60_000), dtype=torch.uint8)
    edit(folder, lambda tensors: tensors.update({name: deep}))
    refused(folder, name, "cannot be read")


def test_hqq_that_lies_is_refused(bad):
    for changes, words in (
        ({"shape": [2**40, 2**20]}, ("W_q", "bytes")),
        ({"axis": 7}, ("axis [7]",)),
        ({"nbits": 3}, ("nbits", "4bit_u8")),
        ({"group_size": 7}, ("group_size: 7", "divisor")),
        ({"group_size": 64}, (f"{FIRST}.scale",)),
        ({"packing": list(b"9bit_u8")}, ("'9bit_u8'",)),
        ({"nbits": float("nan")}, ("nbits", "F32", "a whole number")),
        ({"shape": [64 + 1j, 96]}, ("shape", "C64")),
        ({"group_size": torch.zeros(0, dtype=torch.int32)}, ("group_size: is empty",)),
    ):
        folder = bad("hqq")
        data = {f"{FIRST}.{name}": torch.as_tensor(value) for name, value in changes.items()}
        edit(folder, lambda tensors, data=data: tensors.update(data))
        refused(folder, FIRST, *words)
        shutil.rmtree(folder)
    folder = bad("hqq")
    edit(folder, lambda tensors: tensors.pop(f"{FIRST}.nbits"))
    refused(folder, f"{FIRST}.nbits: missing")


def test_more_layers_than_the_files_hold_are_refused_before_they_are_made(bad, exported, tmp_path):
    folder = bad("gptq")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 10**7}))
    refused(folder, "10000000 layers", "tensors of 2")
    data, key = gguf_bytes(exported("gguf")), b"llama.block_count"
    struct.pack_into("<I", data, data.index(key) + len(key) + 4, 10**7)
    (tmp_path / "bad.gguf").write_bytes(bytes(data))
    with pytest.raises(QuantKitError, match=r"bad\.gguf: .*block_count is 10000000.*tensors of 2"):
        open_source(tmp_path / "bad.gguf")


@pytest.mark.parametrize("method", ["quanto", None, 7])
def test_unknown_methods_are_refused_with_those_that_are_known(bad, method):
    folder = bad("gptq")
    edit_quantization(folder, lambda c: c.update(quant_method=method))
    refused(folder, repr(method), "compressed-tensors")


# tensors


def test_swapped_tensors_are_refused(bad):
    folder = bad("gptq")

    def swap(tensors):
        a, b = f"{FIRST}.qweight", f"{FIRST}.qzeros"
        tensors[a], tensors[b] = tensors[b], tensors[a]

    edit(folder, swap)
    refused(folder, FIRST)
    edit(folder, swap)

    def swap_modules(tensors):
        for suffix in ("qweight", "qzeros", "scales", "g_idx"):
            a, b = f"{FIRST}.{suffix}", f"model.layers.0.self_attn.k_proj.{suffix}"
            tensors[a], tensors[b] = tensors[b], tensors[a]

    edit(folder, swap_modules)
    refused(folder, "belong to different models")


def test_a_missing_part_is_named(bad):
    folder = bad("gptq")
    edit(folder, lambda tensors: tensors.pop(f"{FIRST}.scales"))
    refused(folder, f"{FIRST}.scales: missing")


def test_a_plain_weight_beside_a_packed_one_is_refused(bad):
    folder = bad("gptq")
    edit(folder, lambda tensors: tensors.update({f"{FIRST}.weight": torch.zeros(64, 96)}))
    refused(folder, WEIGHTS, f"{FIRST}.weight", "packed (gptq) as well")


@pytest.mark.parametrize("to", ["quantkit", "awq", "gguf"])
def test_plain_tensors_that_are_not_finite_are_not_converted(bad, tmp_path, to):
    folder = bad("gptq")
    edit(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(QuantKitError, match=rf"{WEIGHTS}: model\.norm\.weight: 64 of 64 values are NaN"):
        convert(folder, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_scales_that_are_not_finite_are_refused(bad):
    for target, suffix in (("gptq", "scales"), ("awq", "scales"), ("compressed-tensors", "weight_scale")):
        folder = bad(target)
        edit(folder, lambda tensors, name=f"{FIRST}.{suffix}": tensors[name][0].fill_(float("nan")))
        refused(folder, f"{FIRST}.{suffix}", "NaN or infinite")
        shutil.rmtree(folder)


def test_groups_out_of_range_are_refused(bad):
    folder = bad("gptq")
    edit(folder, lambda tensors: tensors[f"{FIRST}.g_idx"].add_(10**6))
    refused(folder, f"{FIRST}.g_idx", "expected 0 to 2")


def test_an_order_that_is_none_is_refused(tiny, tmp_path):
    """An index beyond x would read past its end on a GPU."""
    from packed_weights import packed_weight
    from quantkit.hf import QuantKitConfig, install

    weight = packed_weight("w4a16-g32", 96, 64, order=True)
    model = tiny("llama")
    entry = {"scheme": weight.scheme.label, "input_order": True}
    name = "model.layers.0.mlp.up_proj"
    model = install(
        model, {name: weight}, QuantKitConfig({weight.scheme.label: weight.scheme.to_dict()}, {name: entry})
    )
    model.save_pretrained(tmp_path / "ordered")
    assert (
        json.loads((tmp_path / "ordered" / "config.json").read_text())["quantization_config"][
            "format_version"
        ]
        == 3
    )
    quantkit.load(tmp_path / "ordered", "cpu")
    edit(tmp_path / "ordered", lambda tensors: tensors[f"{name}.input_order"].add_(1))
    with pytest.raises(QuantKitError, match=rf"{name}\.input_order: not an order"):
        quantkit.load(tmp_path / "ordered", "cpu")


# GGUF


def gguf_bytes(folder: Path) -> bytearray:
    return bytearray((folder / "model.gguf").read_bytes())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:10], ("not a GGUF file",)),
        (lambda data: data[:300], ("truncated",)),
        (lambda data: data[:-64], ("truncated",)),
        (lambda data: b"GGML" + data[4:], ("not a GGUF file",)),
        (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], ("version 9",)),
        (lambda data: data[:8] + struct.pack("<Q", 2**60) + data[16:], ("damaged",)),
        (lambda data: data[:16] + struct.pack("<Q", 2**60) + data[24:], ("truncated or damaged",)),
        (lambda data: data[:24] + struct.pack("<Q", 2**62) + data[32:], ("truncated or damaged",)),
    ],
)
def test_damaged_gguf_files_are_refused(exported, tmp_path, change, words):
    file = tmp_path / "bad.gguf"
    file.write_bytes(bytes(change(gguf_bytes(exported("gguf")))))
    for work in (lambda: quantkit.load(file, "cpu"), lambda: convert(file, tmp_path / "out", "quantkit")):
        with pytest.raises(QuantKitError) as error:
            work()
        assert all(word in str(error.value) for word in (str(file), *words)), error.value
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.gguf"]


def test_gguf_tensors_of_absurd_sizes_and_types_are_refused(exported, tmp_path):
    data = gguf_bytes(exported("gguf"))
    name = b"blk.0.ffn_down.weight"
    place = data.index(name) + len(name)
    for offset, value, code, words in (
        (0, 99, "<I", "99 dimensions"),
        (4, 2**50, "<Q", "truncated or damaged"),
        (4, 33, "<Q", "whole blocks of 32"),
        (4, 0, "<Q", "whole blocks"),
        (20, 77, "<I", "type 77"),
        (24, 2**60, "<Q", "truncated or damaged"),
        (24, 7, "<Q", "truncated or damaged"),
    ):
        changed = bytearray(data)
        struct.pack_into(code, changed, place + offset, value)
        (tmp_path / "bad.gguf").write_bytes(bytes(changed))
        with pytest.raises(QuantKitError, match=words):
            quantkit.load(tmp_path / "bad.gguf", "cpu")


def test_several_gguf_files_in_a_directory_are_refused(exported, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(exported("gguf") / "model.gguf", tmp_path / name)
    with pytest.raises(QuantKitError, match="2 GGUF files, expected one"):
        quantkit.load(tmp_path, "cpu")


# the fuzzer


def mutated(data: bytes, source: python_random.Random) -> bytes:
    """A few bytes, numbers or stretches of the data changed; mostly in the header, which says how the rest is read."""
    changed = bytearray(data)
    for _ in range(source.randint(1, 4)):
        reach = min(len(changed), 6000) if source.random() < 0.8 else len(changed)
        place = source.randrange(max(reach - 8, 1))
        kind = source.randrange(5)
        if kind == 0:
            changed[place] ^= 1 << source.randrange(8)
        elif kind == 1:
            struct.pack_into("<Q", changed, place, source.choice((0, 1, 2**31, 2**62, 2**64 - 1)))
        elif kind == 2:
            del changed[place : place + source.randint(1, 64)]
        elif kind == 3:
            changed[place:place] = changed[place : place + source.randint(1, 64)]
        else:
            changed[place] = source.choice(b'0123456789-"[]{},:e')
    return bytes(changed)


def mutated_config(text: str, source: python_random.Random) -> str:
    """config.json with one value of quantization_config, or what is in it, replaced."""
    content = json.loads(text)
    place = content["quantization_config"]
    while True:
        key = source.choice(list(place))
        if isinstance(place[key], dict) and place[key] and source.random() < 0.8:
            place = place[key]
        else:
            break
    odd = (None, True, -1, 0, 3, 2**70, 1.5, "", "int", "group", [], [0, 0], {}, {"a": {}}, [[]], "re:*")
    place[key] = source.choice(odd)
    return json.dumps(content)


def read_whole(path: Path) -> None:
    """All that a conversion would read of it."""
    source = open_source(path)
    assert isinstance(source.reader, PackedReader)
    for name in source.reader.tensors:
        if source.reader.module_of(name) is not None:
            source.reader.linear(name).dequantize()
        else:
            source.reader.load_plain([name])


@pytest.mark.parametrize("target", FUZZED)
def test_no_damage_makes_a_reader_fail_otherwise_than_with_its_own_error(exported, tmp_path, target):
    """Damage number 0, 1, ... of each format, the same in every run, as far as the time goes.

    QUANTKIT_FUZZ_SECONDS: for all formats together. QUANTKIT_FUZZ_SEED: the first number; that of a failure stands in its message.
    """
    folder = shutil.copytree(exported(target), tmp_path / "fuzzed")
    file = folder / ("model.gguf" if target == "gguf" else WEIGHTS)
    data, text = file.read_bytes(), (folder / "config.json").read_text() if target != "gguf" else ""
    end = time.monotonic() + FUZZED_SECONDS / len(FUZZED)
    seed = FIRST_SEED
    while time.monotonic() < end:
        source = python_random.Random(seed)
        of_config = target != "gguf" and seed % 2
        file.write_bytes(data if of_config else mutated(data, source))
        if target != "gguf":
            (folder / "config.json").write_text(mutated_config(text, source) if of_config else text)
        try:
            read_whole(folder)
        except MachineError:
            raise
        except QuantKitError:
            pass
        except Exception as error:
            raise AssertionError(f"{target}, seed {seed}: {error!r}") from error
        seed += 1
    assert seed > FIRST_SEED + 5


def test_the_undamaged_are_read(exported):
    for target in FUZZED:
        read_whole(exported(target))
