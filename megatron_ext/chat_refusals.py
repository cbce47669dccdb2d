"""Flags that chat tuning refuses, with the reason, and those that it needs; docs/refused.md lists them."""

from __future__ import annotations

from megatron_ext.refusals import Refusal, is_no_single

_ONE_OF_TWO = "a run either unlearns or tunes; unlearn first, then tune the result in a second run"
_OTHER_DATA = "chat tuning reads only the files of --chat-data-path"
_EVERY_TOKEN = "the chat template decides which tokens are in the loss"
_PACKED = (
    "positions run through a packed sequence, or with --dataloader-inter-document-masking through each "
    "conversation"
)
_FIXED = "the number of iterations is computed from a fixed global batch size"
WITH_CHAT: tuple[Refusal, ...] = (
    Refusal("forget_data_path", _ONE_OF_TWO),
    Refusal("forget_train_data_path", _ONE_OF_TWO),
    Refusal("forget_valid_data_path", _ONE_OF_TWO),
    Refusal("forget_test_data_path", _ONE_OF_TWO),
    Refusal("data_path", _OTHER_DATA),
    Refusal("data_args_path", _OTHER_DATA),
    Refusal("per_split_data_args_path", _OTHER_DATA),
    Refusal("train_data_path", _OTHER_DATA),
    Refusal("valid_data_path", _OTHER_DATA),
    Refusal("test_data_path", _OTHER_DATA),
    Refusal("mock_data", _OTHER_DATA),
    Refusal("eod_mask_loss", _EVERY_TOKEN),
    Refusal("reset_position_ids", _PACKED),
    Refusal("step_batch_size_schedule", _FIXED),
    Refusal("decrease_batch_size_if_needed", _FIXED),
    Refusal("phase_transition_iterations", _FIXED),
    Refusal(
        "ddp_average_in_collective",
        "gradients are summed, then divided by the number of tokens in the loss",
    ),
    Refusal(
        "dataloader_type",
        "the order of the conversations follows from --seed and the epoch",
        "single",
        is_no_single,
    ),
)
REQUIRED_WITH_CHAT = ("seq_length", "global_batch_size", "tokenizer_type", "tokenizer_model")
