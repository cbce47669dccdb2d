import argparse
import os
from unittest import mock

import pytest

from megatron_ext.exceptions import ConfigError
from megatron_ext.runtime import compat


def test_another_megatron_core_is_refused():
    with (
        mock.patch.object(compat, "version", return_value="0.20.0"),
        pytest.raises(ConfigError, match=r"expected version 0\.19\.2 .*, found 0\.20\.0"),
    ):
        compat.check_megatron_version()


def test_help_with_a_bare_per_cent_sign_is_repaired_and_others_are_left():
    parser = argparse.ArgumentParser()
    parser.add_argument("--good", default=3, help="50%% by default, %(default)s")
    # argparse checks the text when an argument is added from some releases on, so it is set afterwards.
    parser.add_argument("--bad").help = "between 5% (cold) and 100%"
    compat.repair_help(parser)
    assert "50% by default, 3" in parser.format_help()
    assert "between 5% (cold) and 100%" in parser.format_help()


def test_a_lone_process_meets_itself_and_a_launched_one_is_left_alone():
    with mock.patch.dict(os.environ, {"RANK": "3", "WORLD_SIZE": "8"}, clear=True):
        compat.be_the_only_process()
        assert dict(os.environ) == {"RANK": "3", "WORLD_SIZE": "8"}
    with mock.patch.dict(os.environ, {}, clear=True):
        compat.be_the_only_process()
        assert os.environ["WORLD_SIZE"] == "1"
        assert os.environ["MASTER_PORT"] == "0"
