"""What `tools/preflight.py` asks of the nodes of a run before it starts, and how it judges the answers.

Ranks talk through torch's store, with a limit on every wait, so that one that does not answer is named; only
the measurement of the network uses collectives.
"""
