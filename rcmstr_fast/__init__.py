"""rcmstr_fast: relational contrastive learning and masked image modelling for scene-text recognition."""

__version__ = "0.1.0"
