"""Probes of what perplexity hides: how a pruned model writes, and how it chooses.

Perplexity asks how likely a model finds text that somebody else has written. What people use a
model for is something else. *Writing*: the model goes on from its own tokens, so that small errors
add up; a pruned model may begin to loop, or to write noise, at a depth whose perplexity is still
harmless. *Choosing*: only the order of a few given answers counts, which survives pruning that
perplexity calls ruinous. Neither probe needs labels: held-out text has both the prompts and the
true continuations.

The functions here make the probes of token ids and compute their results; whoever runs the model
(:mod:`server.calibration.probes`) measures in between.
"""

from pruning.probes.choosing import Choosing, choices, choosing
from pruning.probes.passages import NUM_CHOICES, Passage, passages
from pruning.probes.pieces import ProbeTextError, pieces
from pruning.probes.probes import Probes
from pruning.probes.repetition import NGRAM, repeated_share
from pruning.probes.writing import Continuations, Writing, writing

__all__ = [
    "NGRAM",
    "NUM_CHOICES",
    "Choosing",
    "Continuations",
    "Passage",
    "ProbeTextError",
    "Probes",
    "Writing",
    "choices",
    "choosing",
    "passages",
    "pieces",
    "repeated_share",
    "writing",
]
