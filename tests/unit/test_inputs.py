"""Files that globs name: those that the shell would have named, quoted or not."""

import glob

import pytest

from megatron_ext.data.inputs import find_inputs
from megatron_ext.exceptions import ConfigError


@pytest.fixture
def web(tmp_path):
    """A folder with files, and a folder of files."""
    for name in ("a.jsonl", "2023/b.jsonl", "2023/deep/c.jsonl"):
        (tmp_path / "web" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "web" / name).touch()
    return tmp_path / "web"


def names(web, patterns):
    return [str(path.relative_to(web)) for path in find_inputs([str(p) for p in patterns])]


def test_a_quoted_glob_names_what_the_shell_would(web):
    unquoted = names(web, sorted(glob.glob(str(web / "*"))))
    assert names(web, [web / "*"]) == unquoted
    assert unquoted == ["2023/b.jsonl", "2023/deep/c.jsonl", "a.jsonl"]


def test_what_is_in_a_matched_folder_is_not_taken_twice(web):
    assert names(web, [web / "**"]) == ["2023/b.jsonl", "2023/deep/c.jsonl", "a.jsonl"]
    assert names(web, [web / "**" / "*.jsonl"]) == ["2023/b.jsonl", "2023/deep/c.jsonl", "a.jsonl"]
    assert names(web, [web / "*" / "*.jsonl"]) == ["2023/b.jsonl"]


def test_a_link_to_nothing_is_not_left_out(web):
    (web / "z.jsonl").symlink_to(web / "gone.jsonl")
    with pytest.raises(ConfigError, match=r"^--input .*z\.jsonl: .*, found a link to nothing"):
        find_inputs([str(web / "*")])


def test_a_glob_of_nothing_is_named(web):
    with pytest.raises(ConfigError, match=r"^--input .*\*\.txt: no such file"):
        find_inputs([str(web / "*.txt")])
