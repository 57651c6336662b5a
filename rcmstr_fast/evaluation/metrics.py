"""Word metrics: accuracy, ED1, 1-NED, CER, WER, and their means over sets."""

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass, fields

from rapidfuzz.distance import Levenshtein


@dataclass(frozen=True)
class Score:
    """Metrics of one set, as fractions.

    Attributes:
        count: words compared (N).
        accuracy: share of words read without an error.
        ed1: share of words within one edit (insertion, deletion or substitution) of the label.
        ned: 1-NED of ICDAR 2019: 1 - mean(edits / length of the longer string); two empty strings have distance 0.
        cer: edits / characters of the labels (at least 1), over the whole set; may exceed 1.
        wer: word edits / white-space separated words of the labels (at least 1), over the whole set.
    """

    count: int
    accuracy: float
    ed1: float
    ned: float
    cer: float
    wer: float


METRICS = tuple(field.name for field in fields(Score))[1:]


def score(labels: Sequence[str], predictions: Sequence[str], unread: Collection[int] = ()) -> Score:
    """Compare predictions with labels, both already normalised.

    Args:
        labels: N strings, at least one.
        predictions: N strings, in the same order.
        unread: positions of words whose picture could not be decoded: misread whatever their label, with a distance of
            1 and all of their characters and words as edits.
    Returns:
        The metrics with N.
    Raises:
        ValueError: the lengths differ or there is no word.
    """
    if len(labels) != len(predictions) or not labels:
        raise ValueError(
            f"score: expected as many predictions as labels, at least one, got {len(labels)} labels "
            f"and {len(predictions)} predictions"
        )
    count = len(labels)
    failed = [i in unread for i in range(count)] if unread else [False] * count
    texts = ["" if lost else text for lost, text in zip(failed, predictions)]
    edits = [Levenshtein.distance(label, text) for label, text in zip(labels, texts)]
    normalised = [
        1.0 if lost else e / max(len(label), len(text), 1) for lost, e, label, text in zip(failed, edits, labels, texts)
    ]
    label_words = [label.split() for label in labels]
    word_edits = sum(Levenshtein.distance(words, text.split()) for words, text in zip(label_words, texts))
    return Score(
        count=count,
        accuracy=sum(e == 0 and not lost for e, lost in zip(edits, failed)) / count,
        ed1=sum(e <= 1 and not lost for e, lost in zip(edits, failed)) / count,
        ned=1 - sum(normalised) / count,
        cer=sum(edits) / max(sum(map(len, labels)), 1),
        wer=word_edits / max(sum(map(len, label_words)), 1),
    )


def mean(scores: Sequence[Score], *, weighted: bool = False) -> Score:
    """Mean of each metric over sets; `count` is the number of words of all sets together.

    Args:
        scores: at least one set.
        weighted: weight each set by its N; otherwise all sets count the same ("Avg" in the papers).
    Raises:
        ValueError: no set.
    """
    if not scores:
        raise ValueError("mean: expected at least one score, got none")
    weights = [s.count if weighted else 1 for s in scores]
    columns = list(zip(*map(astuple, scores)))
    means = [sum(w * v for w, v in zip(weights, column)) / sum(weights) for column in columns[1:]]
    return Score(sum(columns[0]), *means)
