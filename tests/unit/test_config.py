import pytest

from megatron_ext.config import ChatConfig, RunConfig, UnlearnConfig
from megatron_ext.exceptions import ConfigError


def test_defaults_are_the_papers():
    config = UnlearnConfig(forget_data_path=["a"])
    assert (config.forget_weight, config.replay_weight, config.mitigation_weight) == (0.01, 1, 1)
    assert config.forget_loss == "bounded"
    assert config.enabled
    assert config.needs_reference


def test_without_text_to_forget_nothing_is_on():
    assert not UnlearnConfig().enabled
    assert not UnlearnConfig().needs_reference


def test_paths_of_one_split_turn_unlearning_on():
    config = UnlearnConfig(forget_valid_data_path=["a"])
    assert config.enabled
    assert config.forget_per_split


def test_no_mitigation_needs_no_reference():
    assert not UnlearnConfig(forget_data_path=["a"], mitigation_weight=0).needs_reference


@pytest.mark.parametrize("name", ["forget_weight", "replay_weight", "mitigation_weight"])
@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), float("-inf")])
def test_weights_that_no_run_can_use(name, value):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"{flag}: expected .*, found {value}"):
        UnlearnConfig(**{name: value})


def test_paths_for_all_splits_and_for_one_exclude_each_other():
    with pytest.raises(ConfigError, match="found both"):
        UnlearnConfig(forget_data_path=["a"], forget_train_data_path=["b"])


@pytest.mark.parametrize(
    ("forget", "batch", "train_batch", "expected"),
    [(None, 16, 16, 8), (12, 16, 16, 12), (12, 8, 16, 6), (1, 64, 32, 2), (None, 4, 32, 2)],
)
def test_validation_batches_keep_the_proportion(forget, batch, train_batch, expected):
    config = UnlearnConfig(forget_data_path=["a"], forget_batch_size=forget)
    assert config.forget_samples(batch, train_global_batch_size=train_batch) == expected


def test_a_proportion_that_gives_no_whole_sample_is_refused():
    config = UnlearnConfig(forget_data_path=["a"], forget_batch_size=12)
    with pytest.raises(ConfigError, match=r"--eval-global-batch-size: .* 12 of every 16 .*found 6"):
        config.forget_samples(6, train_global_batch_size=16)


def test_conversations_turn_chat_tuning_on():
    assert not ChatConfig().enabled
    config = ChatConfig(chat_data_path=["a"])
    assert config.enabled
    assert config.chat_epochs == 2  # the paper's


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chat_epochs": 0}, "--chat-epochs: expected at least 1, found 0"),
        ({"chat_valid_data_path": ["a"]}, "--chat-valid-data-path: .*--chat-data-path"),
    ],
)
def test_chat_settings_that_no_run_can_use(fields, message):
    with pytest.raises(ConfigError, match=message):
        ChatConfig(**fields)


def test_losses_of_datasets_are_logged_at_whole_intervals():
    assert RunConfig().dataset_log_interval is None
    with pytest.raises(ConfigError, match=r"--dataset-log-interval: expected at least 1, found 0"):
        RunConfig(dataset_log_interval=0)
