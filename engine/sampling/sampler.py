"""A step's next tokens: one for each sequence, in the order that is written down here.

1. log-probabilities for who wants them, of the logits as they are (``logprobs.py``);
2. processors change logits: min_tokens, logit_bias, penalties (``processors.py``);
3. temperature, min_p, top_k, top_p, and the draw (``draw.py``).

Each stage touches only the rows that ask for it, all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from engine.logits import Logits
from engine.sampling.draw import draw
from engine.sampling.logprobs import RawLogprobs
from engine.sampling.processors import Processors, apply_all
from engine.sequence import Sampled, Sequence


def sample(logits: Logits, seqs: SequenceOf[Sequence]) -> list[Sampled]:
    """The token after each sequence's last; the sequences are left as they are.

    ``logits``, a row each, are used up: they may be changed.
    """
    params = [seq.sampling for seq in seqs]
    raw = RawLogprobs.of(logits.values, params)
    edits = [(row, processors_of(seq).at(seq.token_ids)) for row, seq in enumerate(seqs)]
    if apply_all(logits.values, edits):
        logits = Logits(logits.values)
    token_ids = draw(logits, params, [seq.num_emitted_tokens for seq in seqs])
    told = raw.of_tokens(token_ids) if raw is not None else {}
    return [
        Sampled(seq, token_id, told.get(row))
        for row, (seq, token_id) in enumerate(zip(seqs, token_ids, strict=True))
    ]


def processors_of(seq: Sequence) -> Processors:
    """Those of its sampling, made with the first token that is sampled here."""
    if seq.processors is None:
        seq.processors = Processors(seq.sampling, seq.token_ids[: seq.num_prompt_tokens])
    return seq.processors
