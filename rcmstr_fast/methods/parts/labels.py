"""Fields of methods that learn from labels."""

from dataclasses import dataclass

from rcmstr_fast.fields import number


@dataclass
class LabelSettings:
    """Fields of a method registered with `labels=True`.

    Attributes:
        charset: characters of the labels: 36, 62, 94, or a file of characters; other characters of a label are left out.
        max_length: characters of a label; longer ones are cut.
    """

    charset: str = "94"
    max_length: int = number(25, low=1, high=1000)

    @property
    def needs_labels(self) -> bool:
        """Whether data without a single label teach the method nothing."""
        return True
