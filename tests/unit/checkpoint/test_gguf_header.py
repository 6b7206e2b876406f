"""Reading GGUF headers: equal to the gguf package on good files, a sentence on bad ones."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.gguf_header import read_gguf_header

CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 96,
    "intermediate_size": 1536,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


@pytest.fixture(scope="module")
def good(tiny_checkpoint: Callable[..., Path], to_gguf: Callable[..., Path]) -> Path:
    return to_gguf(tiny_checkpoint(), CONFIG, gguf.GGMLQuantizationType.Q8_0)


def damaged(good: Path, tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    return path


def test_tensors_are_where_the_gguf_package_finds_them(good: Path) -> None:
    header, oracle = read_gguf_header(good), gguf.GGUFReader(good)
    assert [t.name for t in oracle.tensors] == list(header.tensors)
    for theirs in oracle.tensors:
        ours = header.tensors[theirs.name]
        assert list(ours.shape) == [int(n) for n in theirs.shape][::-1]
        assert (ours.type, ours.nbytes) == (theirs.tensor_type, theirs.n_bytes)
        assert ours.offset == theirs.data_offset


def test_metadata_of_every_kind_is_read(good: Path) -> None:
    metadata = read_gguf_header(good).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 2
    assert metadata["llama.rope.freq_base"] == 10000.0
    assert metadata["tokenizer.ggml.tokens"] == ["a", "b", "ü"]


def test_a_truncated_file_names_the_tensor_and_the_sizes(good: Path, tmp_path: Path) -> None:
    content = good.read_bytes()
    path = damaged(good, tmp_path, content[:-100])
    with pytest.raises(ModelError) as caught:
        read_gguf_header(path)
    assert caught.value.reason == "WeightsCorrupt"
    assert f"is truncated: it has {len(content) - 100} bytes, tensor" in caught.value.message
    assert caught.value.message.endswith("Fetch the file again.")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "has 0 bytes, too few for a GGUF header"),
        (b"PK\x03\x04" + bytes(40), "is no GGUF file: it begins with b'PK"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "is GGUF version 1; versions 2 and 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "versions 2 and 3, little-endian, can be read"),
        (b"GGUF" + struct.pack("<IQQ", 3, 5, 5), "is damaged or cut off"),
        (b"GGUF" + struct.pack("<IQQQIIQ", 3, 0, 1, 0, 9, 9, 1), "a list of lists at byte"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60), "a string of 1152921504606846976 bytes"),
    ],
)
def test_what_is_no_gguf_file_gets_a_sentence(
    good: Path, tmp_path: Path, content: bytes, sentence: str
) -> None:
    with pytest.raises(ModelError) as caught:
        read_gguf_header(damaged(good, tmp_path, content))
    assert caught.value.reason == "WeightsCorrupt"
    assert sentence in caught.value.message


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_damage_to_the_header_is_a_model_error_or_harmless(
    good: Path, tmp_path: Path, data: st.DataObject
) -> None:
    reasons: set[str] = set()
    header = good.read_bytes()[: read_gguf_header(good).data_offset]
    content = bytearray(header + bytes(1 << 16))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    path = damaged(good, tmp_path, bytes(content[: data.draw(st.integers(0, len(content)))]))
    size = path.stat().st_size
    try:
        header_read = read_gguf_header(path)
    except ModelError as error:
        reasons.add(error.reason)
    else:
        assert all(t.offset + t.nbytes <= size for t in header_read.tensors.values())
    assert reasons <= {"WeightsCorrupt"}
