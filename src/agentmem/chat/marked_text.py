"""A rendered chat whose special tokens can be told from what somebody wrote."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MarkedText:
    """A rendered chat, in which names of special tokens that somebody wrote hold a mark."""

    text: str
    mark: str  # one character

    @property
    def plain(self) -> str:
        """The text as the model is to read it."""
        return self.text.replace(self.mark, "")

    def before(self, sentinel: str) -> "MarkedText":
        """Return what comes before the last `sentinel`. LookupError: there is none."""
        before, found, _ = self.text.rpartition(sentinel)
        if not found:
            raise LookupError(sentinel)
        return MarkedText(before, self.mark)
