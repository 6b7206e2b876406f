from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tandem.agent.images import BYTECODE_PATH, Image, NoImage, find_image, image_id, image_paths


def test_our_images_are_this_environment() -> None:
    image = find_image("tandem.dev/runtime:0.1.0")
    assert isinstance(image, Image)
    assert image.env["PATH"].split(":")[0] == str(Path(sys.prefix) / "bin")
    assert image.entrypoint == ()
    assert image_id(image.name) == "tandem://tandem.dev/runtime:0.1.0"
    assert [mount.target for mount in image.caches] == [BYTECODE_PATH]
    operator = find_image("tandem.dev/operator:0.1.0")
    assert isinstance(operator, Image)
    assert operator.entrypoint == ("python", "-m", "tandem_operator")


def test_what_a_program_needs_is_among_the_paths() -> None:
    assert sys.prefix in image_paths()
    assert any(__file__.startswith(path) for path in image_paths())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nginx", "a local cluster runs tandem.dev/operator:0.1.0, tandem.dev/runtime:0.1.0 only"),
        ("docker.io/tandem.dev/runtime:0.1.0", "nothing is pulled"),
        ("tandem.dev/other:0.1.0", "nothing is pulled"),
        ("tandem.dev/runtime:0.2.0", "has another version than this node"),
        ("tandem.dev/runtime", "has another version than this node"),
    ],
)
def test_any_other_is_refused_with_a_sentence(name: str, sentence: str) -> None:
    missing = find_image(name)
    assert isinstance(missing, NoImage)
    assert sentence in missing.sentence
    assert f'"{name}"' in missing.sentence
