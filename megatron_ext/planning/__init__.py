"""What a run will cost before it starts. Plain arithmetic, but for `check`, which asks Megatron."""
