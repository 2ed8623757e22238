"""An answer's text, written while its tokens are made."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

Decode = Callable[[Sequence[int]], str]
"""The text of token numbers."""


class AnswerStream:
    """A streamer of transformers for one answer, which also notes when each token came.

    The written pieces together are the text that ``decode`` gives of all tokens. (Those of
    transformers' TextStreamer are not: it decodes each line by itself, and with some tokenizers the
    line then loses its first space.)

    Args:
        decode: the text of token numbers.
        write: takes each piece of the text.
    """

    def __init__(self, decode: Decode, write: Callable[[str], None]) -> None:
        self._decode = decode
        self._write = write
        self._prompt_seen = False
        self._context = 0  # the first token that is decoded with those still to be written
        self._written = 0  # tokens whose text is written
        self.tokens: list[int] = []
        self.times: list[float] = []
        """Seconds on `time.perf_counter` at which each token had reached the host."""
        self.text = ""
        """What is written."""

    def put(self, value: Tensor) -> None:
        """Take the prompt in the first call, and then one token a call, (1,) on the host."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self.tokens.append(int(value))
        self._show()

    def end(self) -> None:
        """Write what was held back."""
        self._show(last=True)

    def _show(self, *, last: bool = False) -> None:
        # a token's text may depend on the tokens in front of it, so they are decoded together
        before = self._decode(self.tokens[self._context : self._written])
        text = self._decode(self.tokens[self._context :])
        if text.endswith("\ufffd") and not last:
            return  # the rest of the character is still to come
        if new := text[len(before) :]:
            # noted first, so that it is not written again if the user interrupts the writing
            self.text += new
            self._context, self._written = self._written, len(self.tokens)
            self._write(new)
