"""What a job's container is given, and what is refused because it would not see it."""

from pathlib import Path

import pytest

from tests.helpers.entry import ROOT
from tests.helpers.recipes import after
from tests.helpers.slurm import SLURM, preflight, stand_ins


@pytest.fixture
def programs(tmp_path) -> str:
    return stand_ins(tmp_path)


def test_pyxis_gets_image_mounts_and_folder(programs, tmp_path):
    (tmp_path / "torch.sqsh").touch()
    container = {
        "CONTAINER_IMAGE": f"{tmp_path}/torch.sqsh",
        "CONTAINER_MOUNTS": "/data:/data,/ckpt:/ckpt",
    }
    words = preflight(programs, OUT="/ckpt", **container).stdout.splitlines()
    srun = words[: words.index("bash")]
    assert after(srun, "--container-image") == [f"{tmp_path}/torch.sqsh"]
    assert after(srun, "--container-mounts") == [f"{ROOT}:{ROOT},/data:/data,/ckpt:/ckpt"]
    assert after(srun, "--container-workdir") == [str(ROOT)]
    assert words[words.index("bash") + 1] == str(SLURM / "node.sh")


def test_an_unknown_runtime_is_refused(programs):
    container = {"CONTAINER_IMAGE": "/images/torch.sif", "CONTAINER_RUNTIME": "docker"}
    result = preflight(programs, OUT="/ckpt", **container)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "CONTAINER_RUNTIME: expected pyxis or apptainer, found docker\n"


@pytest.mark.parametrize(
    ("image", "runtime", "found"),
    [
        ("/none/torch.sqsh", "pyxis", "/none/torch.sqsh"),
        ("./none", "pyxis", f"{ROOT}/none"),
        ("none.sqsh", "pyxis", f"{ROOT}/none.sqsh"),  # Pyxis would look for it in a registry
        ("none", "apptainer", f"{ROOT}/none"),
        ("nvcr.io#nvidia/pytorch:26.01-py3", "pyxis", None),
        ("nvidia/cuda", "pyxis", None),
        ("docker://nvidia/cuda", "apptainer", None),
    ],
)
def test_an_image_that_is_a_path_must_be_there(programs, image, runtime, found):
    container = {"CONTAINER_IMAGE": image, "CONTAINER_RUNTIME": runtime}
    result = preflight(programs, OUT=f"{ROOT}/out", **container)
    if found is None:
        assert result.returncode == 0, result.stderr
        assert image in result.stdout.splitlines()
        return
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"CONTAINER_IMAGE: expected an image, found nothing at {found}\n"


@pytest.fixture
def places(tmp_path) -> Path:
    """Folders of which the first is mounted, with links in it."""
    for name in ("mounted", "other", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "qa.idx").touch()
    (tmp_path / "mounted" / "out").symlink_to(tmp_path / "other")
    (tmp_path / "mounted" / "set.idx").symlink_to(tmp_path / "data" / "set.idx")
    (tmp_path / "mounted" / "back").symlink_to(tmp_path / "mounted")
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"OUT": "{0}/mounted/new"}, None),
        ({"OUT": "{0}/mounted"}, None),
        ({"OUT": "new"}, None),  # in the checkout
        ({"OUT": "{0}/mounted/back/new"}, None),
        ({"OUT": "{0}/mounted2"}, "OUT {0}/mounted2"),
        ({"OUT": "{0}/mounted/../other"}, "OUT {0}/mounted/../other"),
        ({"OUT": "{0}/mounted/out"}, "OUT {0}/mounted/out, which leads to {0}/other"),
        ({"OUT": "new", "REAL": "1 {0}/mounted/x 2 {0}/other/qa"}, "REAL {0}/other/qa"),
        ({"OUT": "new", "TOKENIZER": "/tok.model"}, "TOKENIZER /tok.model"),
        ({"OUT": "new", "TOKENIZER": "a/b", "TOKENIZER_TYPE": "HuggingFaceTokenizer"}, None),
        ({"OUT": "/renamed/new"}, None),
    ],
)
def test_paths_that_a_container_would_not_see_are_refused(programs, places, settings, refused):
    container = {"CONTAINER_IMAGE": "nvidia/cuda"}
    container["CONTAINER_MOUNTS"] = f"{places}/mounted,{places}/data:/renamed:ro"
    settings = {name: value.format(places) for name, value in settings.items()}
    result = preflight(programs, **container, **settings)
    if refused is None:
        assert (result.returncode, result.stderr) == (0, "")
        return
    assert (result.returncode, result.stdout) == (2, "")
    name, found = refused.format(places).split(" ", 1)
    assert result.stderr == (
        f"{name}: expected a path that the container sees, below the checkout or a target of "
        f"CONTAINER_MOUNTS, found {found}\n"
    )
