"""What can go wrong in training, as one small tree.

    TrainingError                the run cannot begin or go on; the message is for the user
    ├── TrainingCheckpointError  a checkpoint cannot be written, read, or belongs to something else
    └── NonFiniteError           more losses were not finite than the settings allow

Each message says what was got, what was expected, and what to do.
"""

from engines.errors import SanaError

__all__ = ["NonFiniteError", "TrainingCheckpointError", "TrainingError"]


class TrainingError(SanaError):
    """The run cannot begin or go on."""


class TrainingCheckpointError(TrainingError):
    """A checkpoint cannot be written, read, or belongs to something else."""


class NonFiniteError(TrainingError):
    """More losses were not finite than the settings allow."""
