"""How much of each blend an unlearning run asks for, and which blend is which."""

from argparse import Namespace

from megatron_ext.config import UnlearnConfig
from megatron_ext.data import providers


def test_both_sides_have_enough_for_batches_that_are_begun(monkeypatch):
    """A run that goes on with batches of another size asks for no whole number of them."""
    asked = []
    monkeypatch.setattr(
        providers,
        "_build",
        lambda args, *given: (asked.append(given), ("train", "valid", "test"))[1],
    )
    composed = []
    monkeypatch.setattr(
        providers, "ComposedDataset", lambda *given, **how: composed.append((given, how))
    )
    args = Namespace(global_batch_size=16, eval_global_batch_size=8)
    config = UnlearnConfig(forget_data_path=["qa"], forget_batch_size=12)
    providers._composed(args, config, ((["web"], None), None), (33, 8, None), None)
    assert asked == [
        ("--forget-data-path", (["qa"], None), None, [36, 6, 0], None),
        ("--data-path", (["web"], None), None, [12, 2, 0], None),
    ]
    sizes = [(how["forget_samples"], how["global_batch_size"]) for _, how in composed]
    assert sizes == [(12, 16), (6, 8)]  # nothing of a split that is not read


def test_the_data_of_each_split_stay_its_own():
    config = UnlearnConfig(
        forget_train_data_path=["a"], forget_valid_data_path=["0.3", "b", "0.7", "c"]
    )
    assert providers.forget_blends(config) == (
        None,
        [(["a"], None), (["b", "c"], [0.3, 0.7]), None],
    )
