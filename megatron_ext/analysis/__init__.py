"""Looking at text and models: perplexities of samples under a checkpoint."""
