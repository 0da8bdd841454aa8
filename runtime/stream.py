"""Text out of tokens while they come: whole characters only, and never a piece of a stop string."""

from collections.abc import Callable, Sequence

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoders put for an incomplete UTF-8 sequence
_CONTEXT = 6  # prompt tokens decoded along: a word's leading space depends on what stands before


class Detokenizer:
    """Token by token to text. A character that needs several tokens appears with its last one.

    The pieces and `finish` together equal the decoding of all tokens (of bytes that are no UTF-8,
    only the number of replacement characters may differ). Each step decodes only the
    tokens since the last whole piece, with that piece before them (a decoder may strip or join at
    the start of what it is given).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(prompt[-_CONTEXT:])
        self._lengths: dict[int, int] = {}
        self._shown = len(self._ids)  # tokens whose text is out
        self._known = len(decode(self._ids).rstrip(_BROKEN)) if self._ids else 0

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._decode(self._ids)
        return "" if text.endswith(_BROKEN) else self._take(text)

    def finish(self) -> str:
        """What was held back, with a replacement character for each broken sequence."""
        return self._take(self._decode(self._ids)) if len(self._ids) > self._shown else ""

    def _take(self, text: str) -> str:
        piece = text[self._known :]
        if piece:
            del self._ids[: self._shown]
            self._known = self._length_alone()
        self._shown = len(self._ids)
        return piece

    def _length_alone(self) -> int:
        """Characters of the last piece's tokens decoded by themselves; single tokens recur."""
        if len(self._ids) > 1:
            return len(self._decode(self._ids))
        token = self._ids[0]
        if token not in self._lengths:
            self._lengths[token] = len(self._decode(self._ids))
        return self._lengths[token]


class StopFilter:
    """Passes text on until a stop string is complete; holds back what may be the start of one.

    Of several, the one that is complete first counts (of these the longest), so the result does
    not depend on how the text is cut into tokens.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops: list[str] = [stop for stop in stops if stop]
        self._held: str = ""
        self.stopped: bool = False

    def push(self, text: str) -> str:
        """The text that is safe to show. After a stop string (`stopped`), nothing more."""
        if not self._stops:
            return text
        if self.stopped:
            return ""
        text = f"{self._held}{text}"
        found = [(text.find(stop) + len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, stop = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            self.stopped, self._held = True, ""
            return text[: end - len(stop)]
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and is no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
