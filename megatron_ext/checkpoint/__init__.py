"""Checkpoints: what a directory holds, its digest, and exchange with other formats."""
