#!/usr/bin/env bash
# A chat model of any model of the study: two epochs of instructions, MixedIns or OpenHermes-2.5.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"

start_from MODEL "the checkpoint directory of the model to tune"
need_files CHAT_DATA "JSON lines of conversations, one file or several"
tune_chat
