"""What of a sample is scored and embedded; with a stand-in for the model, which says what it was given."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from megatron_ext.analysis import forward
from megatron_ext.analysis.forward import embed_samples, text_starts
from megatron_ext.analysis.perplexity import score_samples

BOS, EOD, VOCAB, LENGTH = 1, 2, 16, 6
SAMPLES = [[BOS, 5, 6, EOD], [5, 6, EOD], [BOS], [7, BOS, 8], [BOS, 9], [EOD, 5]]


class Model:
    """The state of a token is its one-hot, and the margin of a label its id in hundredths."""

    chunks = (None,)

    def __init__(self):
        self.shapes = []

    def hidden_states(self, _, batches, *, seq_length, micro_batch_size):
        for batch in batches[0]:
            shape = (micro_batch_size, seq_length)
            assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == shape
            assert batch.position_ids.tolist() == [list(range(seq_length))] * micro_batch_size
            self.shapes.append(shape)
        return [torch.eye(VOCAB)[batch.tokens.T] for batch in batches[0]]

    def margins(self, states, labels, *, fp32_logits):
        return labels.T.reshape(-1) / 100


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(forward, "get_forward_backward_func", lambda: None)
    monkeypatch.setattr(parallel_state, "is_pipeline_last_stage", lambda **_: True)
    monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda: 0)
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: 1)


ARGS = Namespace(micro_batch_size=2, seq_length=LENGTH, tensor_model_parallel_size=1)
SETTINGS = {"args": ARGS, "eod": EOD}
ARRAYS = [np.array(sample) for sample in SAMPLES]


@pytest.mark.parametrize(
    ("bos", "texts"),
    [
        (BOS, [[5, 6, EOD], [5, 6, EOD], [BOS], [7, BOS, 8], [9], [EOD, 5]]),
        (None, SAMPLES),
        (EOD, [*SAMPLES[:-1], [5]]),
    ],
)
def test_the_token_that_begins_a_text_is_none_of_it(bos, texts):
    scores = score_samples(Model(), ARRAYS, bos=bos, **SETTINGS)
    expected = [np.mean([math.log1p(math.exp(-t / 100)) for t in text]) for text in texts]
    np.testing.assert_allclose(scores.loss, expected, rtol=1e-6)
    assert scores.tokens.tolist() == [len(text) for text in texts]
    assert scores.tokens.dtype == np.int64
    embedded = embed_samples(Model(), ARRAYS, bos=bos, **SETTINGS)
    expected = [np.eye(VOCAB)[text].mean(axis=0) for text in texts]
    np.testing.assert_allclose(embedded, expected, rtol=1e-6)


def test_a_tokenizer_without_such_a_token_changes_nothing():
    assert text_starts(ARRAYS, bos=None) == [0] * len(SAMPLES)
    scores = [score_samples(Model(), ARRAYS[1:2], bos=bos, **SETTINGS) for bos in (None, BOS)]
    assert scores[0].loss.tobytes() == scores[1].loss.tobytes()


@pytest.mark.parametrize(
    ("longest", "tp", "first", "second"),
    [
        (1000, 1, 960, 64),
        (930, 1, 930, 64),  # the model's own length, whatever it is a multiple of
        (960, 3, 960, 192),  # sequence parallelism splits it
    ],
)
def test_a_short_text_is_not_padded_to_the_length_of_the_model(longest, tp, first, second):
    lengths = [3, 40, 900, 60, 61, 2, 1, 64, 17, 17, 5, 920]
    samples = [np.arange(length) % VOCAB for length in lengths]
    args = Namespace(micro_batch_size=2, seq_length=longest, tensor_model_parallel_size=tp)
    model = Model()
    scores = score_samples(model, samples, args=args, eod=EOD)
    assert scores.tokens.tolist() == lengths
    expected = [np.mean(np.log1p(np.exp(-(sample / 100)))) for sample in samples]
    np.testing.assert_allclose(scores.loss, expected, rtol=1e-6)
    # The four microbatches of a pass through the pipeline have the length of their longest text.
    assert model.shapes == [(2, first)] * 4 + [(2, second)] * 2
