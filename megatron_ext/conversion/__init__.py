"""Released models in and out: Hugging Face folders, their configs, weights and tokenizers."""
