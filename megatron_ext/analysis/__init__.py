"""Looking at text and models: structural tokens, embeddings, perplexities, and the report of them all."""
