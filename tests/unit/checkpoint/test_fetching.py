"""Sources that are fetched, from real servers: what is whole, what is resumed, what is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from model_servers import S3, Files, Hub, Site, serving
from tandem_runtime.checkpoint import headers, objects
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.open import open_checkpoint
from tandem_runtime.checkpoint.source import resolve_source

IN_A_PROCESS = """
import json, sys
from tandem_runtime.checkpoint import headers, hub
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.source import resolve_source
hub.FIRST_PAUSE_S = 0.01
headers.SMALL_BYTES = 100
headers.GGUF_HEADER_BYTES = 40
for uri in sys.argv[1:]:
    headers_only, uri = uri.startswith("headers of "), uri.removeprefix("headers of ")
    try:
        print(json.dumps([str(resolve_source(uri, headers_only=headers_only)), ""]))
    except ModelError as error:
        print(json.dumps([error.reason, error.message]))
assert "torch" not in sys.modules
"""


@pytest.fixture
def site(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Site:
    """A model at team/tiny, with what nobody wants beside it."""
    folder = tmp_path / "site" / "team" / "tiny"
    folder.mkdir(parents=True)
    for file in tiny_checkpoint(num_hidden_layers=1, intermediate_size=64).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"unwanted")
    (folder / "consolidated.safetensors").write_bytes(b"the same once more")
    (folder / "original").mkdir()
    (folder / "original" / "x.safetensors").write_bytes(b"unwanted too")
    (folder / "small.gguf").write_bytes(b"GGUF" * 1000)
    return Site(tmp_path / "site")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEM_MODEL_CACHE", str(tmp_path / "cache"))
    for name in [n for n in os.environ if n.startswith(("AWS_", "HF_"))]:
        monkeypatch.delenv(name)
    return tmp_path / "cache"


def from_hub(*uris: str, **env: str) -> list[tuple[str, str]]:
    """(path, "") or (reason, sentence) of each; the Hub's library reads its settings once."""
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, *uris],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [(said[0], said[1]) for said in map(json.loads, done.stdout.splitlines())]


def refused(uri: str) -> tuple[str, str]:
    with pytest.raises(ModelError) as caught:
        resolve_source(uri)
    return caught.value.reason, caught.value.message


# -- the Hub ---------------------------------------------------------------------------------------
def test_a_repository_is_fetched_once_and_then_needs_no_network(site: Site, cache: Path) -> None:
    with serving(site, Hub):
        [(path, said), (pinned, _), (file, _)] = from_hub(
            "hf://team/tiny",
            "hf://team/tiny@v2",
            "hf://team/tiny@v2/small.gguf",
            HF_ENDPOINT=site.url,
        )
        assert said == ""
        assert open_checkpoint(Path(path)).config.layers == 1
        assert not {"pytorch_model.bin", "consolidated.safetensors", "original"} & {
            entry.name for entry in Path(path).iterdir()
        }
        assert Path(pinned).name == Path(path).name, "one commit, one folder"
        assert Path(file).read_bytes() == b"GGUF" * 1000
        bodies = [r for r in site.requests if r.startswith("GET") and "/resolve/" in r]
        assert len(bodies) == 3, "config, weights and the GGUF, each once"
        assert Path(path).is_relative_to(cache)
    again = from_hub("hf://team/tiny", HF_ENDPOINT=site.url, HF_HUB_OFFLINE="1")
    assert again == [(path, "")]


def without_weights(headers: Path, whole: Path, site: Site) -> None:
    """The headers say the same of the model, but of the weights only which they are."""
    seen, full = open_checkpoint(headers), open_checkpoint(whole)
    assert (seen.config, seen.weights_bytes) == (full.config, full.weights_bytes)
    assert seen.digest() != full.digest()
    assert seen.tensors.keys() == full.tensors.keys()
    asked = [r.split("bytes=0-")[1] for r in site.requests if "model.safetensors bytes=0-" in r]
    size = (headers / "model.safetensors").stat().st_size
    assert asked
    assert all(int(end) < size / 10 for end in asked), "only the header was asked for"


def test_of_a_hubs_large_weights_the_header_is_enough(site: Site, cache: Path) -> None:
    with serving(site, Hub):
        [(path, said), (gguf, _)] = from_hub(
            "headers of hf://team/tiny",
            "headers of hf://team/tiny/small.gguf",
            HF_ENDPOINT=site.url,
        )
        assert said == ""
        without_weights(Path(path), site.root / "team" / "tiny" / "model.safetensors", site)
        assert Path(gguf).read_bytes() == b"GGUF" * 10 + bytes(3960)
        [(whole, _)] = from_hub("hf://team/tiny", HF_ENDPOINT=site.url)
        assert whole != path, "no pod serves from headers"


def test_what_a_hub_refuses_is_said(site: Site, cache: Path) -> None:
    (site.root / "team" / "gguf").mkdir()
    (site.root / "team" / "gguf" / "q4.gguf").write_bytes(b"GGUF")
    with serving(site, Hub):
        said = from_hub(
            "hf://team/none",
            "hf://team/tiny@v9",
            "hf://team/tiny/none.gguf",
            "hf://team/gguf",
            HF_ENDPOINT=site.url,
        )
    assert [reason for reason, _ in said] == [
        "SourceUnauthorized",
        "WeightsMissing",
        "WeightsMissing",
        "WeightsMissing",
    ]
    assert "there is no such repository, or it is private" in said[0][1]
    assert "no such revision" in said[1][1]
    assert "no such file" in said[2][1]
    assert "of GGUF files name one: hf://ORG/NAME/FILE.gguf" in said[3][1]


def test_a_token_is_needed_and_used(site: Site, cache: Path) -> None:
    site.token = "hf_right"
    with serving(site, Hub):
        [(none, sentence)] = from_hub("hf://team/tiny", HF_ENDPOINT=site.url)
        [(wrong, _)] = from_hub("hf://team/tiny", HF_ENDPOINT=site.url, HF_TOKEN="hf_wrong")
        [(header, said), (path, _)] = from_hub(
            "headers of hf://team/tiny",
            "hf://team/tiny",
            HF_ENDPOINT=site.url,
            HF_TOKEN="hf_right",
        )
    assert (none, wrong) == ("SourceUnauthorized", "SourceUnauthorized")
    assert "HF_TOKEN (in the Secret of the source's secretRef)" in sentence
    assert said == ""
    assert all((Path(folder) / "model.safetensors").is_file() for folder in (header, path))


def test_a_hub_that_stumbles_is_asked_again_but_not_for_ever(site: Site, cache: Path) -> None:
    with serving(site, Hub):
        site.failures = 2
        [(path, said)] = from_hub("hf://team/tiny", HF_ENDPOINT=site.url)
        assert said == ""
        assert (Path(path) / "model.safetensors").is_file()
        url = site.url
    offline, gone = (
        from_hub("hf://team/other", HF_ENDPOINT=url, HF_HUB_OFFLINE="1"),
        from_hub("hf://team/other", HF_ENDPOINT=url),
    )
    assert offline[0][0] == gone[0][0] == "SourceUnreachable"
    assert "is not in the cache and HF_HUB_OFFLINE is set" in offline[0][1]
    assert "Check the network" in gone[0][1]


# -- S3 and web servers ----------------------------------------------------------------------------
Source = tuple[Site, str]


@pytest.fixture(params=["s3", "http"])
def source(
    request: pytest.FixtureRequest, site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Source]:
    """A site and the URI of its folder team."""
    handler: Any = S3 if request.param == "s3" else Files
    with serving(site, handler):
        monkeypatch.setenv("AWS_ENDPOINT_URL", site.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield site, "s3://team" if request.param == "s3" else f"{site.url}/team"


def bodies(site: Site) -> list[str]:
    return [r for r in site.requests if "bytes=" in r]


def test_a_folder_is_fetched_once_and_whole(source: Source) -> None:
    site, uri = source
    path = resolve_source(f"{uri}/tiny")
    assert open_checkpoint(path).config.layers == 1
    names = {entry.name for entry in path.iterdir()} - {".lock"}
    assert names == {"config.json", "model.safetensors"}
    assert len(bodies(site)) == 2
    assert resolve_source(f"{uri}/tiny/").joinpath("config.json").is_file()
    site.requests.clear()
    assert resolve_source(f"{uri}/tiny") == path
    assert bodies(site) == []


def test_a_file_is_fetched_with_what_it_needs(source: Source) -> None:
    _, uri = source
    gguf = resolve_source(f"{uri}/tiny/small.gguf")
    assert gguf.read_bytes() == b"GGUF" * 1000
    assert [entry.name for entry in gguf.parent.iterdir() if entry.name != ".lock"] == [gguf.name]
    weights = resolve_source(f"{uri}/tiny/model.safetensors")
    assert open_checkpoint(weights).config.layers == 1


def test_of_large_weights_the_header_is_enough(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, uri = source
    monkeypatch.setattr(headers, "SMALL_BYTES", 100)
    path = resolve_source(f"{uri}/tiny", headers_only=True)
    without_weights(path, site.root / "team" / "tiny" / "model.safetensors", site)
    before = open_checkpoint(path).digest()
    with (site.root / "team" / "tiny" / "model.safetensors").open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"another fine-tune")
    changed = resolve_source(f"{uri}/tiny", headers_only=True)
    assert open_checkpoint(changed).digest() != before
    assert resolve_source(f"{uri}/tiny").parent.name == "objects", "no pod serves from headers"


def test_shards_come_by_their_index(source: Source) -> None:
    site, uri = source
    folder = site.root / "team" / "tiny"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(resolve_source(f"{uri}/tiny")).config.layers == 1


def test_another_version_is_another_folder(source: Source) -> None:
    site, uri = source
    before = resolve_source(f"{uri}/tiny/small.gguf")
    (site.root / "team" / "tiny" / "small.gguf").write_bytes(b"GGUf" * 1000)
    after = resolve_source(f"{uri}/tiny/small.gguf")
    assert before != after
    assert (before.read_bytes()[:4], after.read_bytes()[:4]) == (b"GGUF", b"GGUf")


def test_an_interrupted_fetch_is_no_model_and_goes_on_where_it_stopped(
    source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, uri = source
    monkeypatch.setattr(objects, "PIECE_BYTES", 1500)
    whole = objects._piece
    stops = iter([False, False, True])

    def interrupted(*args: Any) -> bytes:
        if next(stops):
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(objects, "_piece", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve_source(f"{uri}/tiny/small.gguf")
    left = [entry.name for entry in cache.rglob("small.gguf*")]
    assert left == ["small.gguf.part"], "never a file that looks whole"
    monkeypatch.setattr(objects, "_piece", whole)
    site.requests.clear()
    assert resolve_source(f"{uri}/tiny/small.gguf").read_bytes() == b"GGUF" * 1000
    assert [r.split("bytes=")[1] for r in bodies(site)] == ["3000-3999"]


def test_an_answer_that_breaks_off_is_asked_for_again(source: Source) -> None:
    site, uri = source
    site.cut_bytes = 1000
    assert resolve_source(f"{uri}/tiny/small.gguf").read_bytes() == b"GGUF" * 1000
    assert len([r for r in site.requests if "small.gguf" in r and "GET" in r]) <= 2


def test_a_server_that_stumbles_is_asked_again(source: Source) -> None:
    site, uri = source
    site.failures = 2
    assert resolve_source(f"{uri}/tiny/small.gguf").is_file()


def test_what_is_missing_or_refused_is_said(source: Source) -> None:
    site, uri = source
    assert refused(f"{uri}/none") == (
        "WeightsMissing",
        f"there is no .safetensors file at {uri}/none",
    )
    assert refused(f"{uri}/tiny/none.gguf")[1] == f"there is no none.gguf at {uri}/tiny/none.gguf"
    assert refused(f"{uri}-none/tiny/none.gguf")[0] == "WeightsMissing"
    site.token = "another"
    reason, message = refused(f"{uri}/tiny")
    assert reason == "SourceUnauthorized"
    assert "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (in the Secret" in message


def test_an_index_that_leads_elsewhere_is_refused(site: Site, cache: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../../../etc/x.safetensors"}}
    folder = site.root / "team" / "tiny"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with serving(site, Files):
        assert refused(f"{site.url}/team/tiny")[0] == "WeightsCorrupt"


def test_a_server_that_is_gone_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_RETRIES", 0)
    reason, message = refused("http://127.0.0.1:1/model.gguf")
    assert reason == "SourceUnreachable"
    assert message.startswith("http://127.0.0.1:1/model.gguf cannot be fetched: ")
