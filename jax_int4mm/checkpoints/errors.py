"""What goes wrong with a checkpoint, and what a reader does that its user should know."""


class CheckpointError(ValueError):
    """A checkpoint is malformed, incomplete or of a kind that is not read; the message says which."""


class MissingTensorError(CheckpointError, KeyError):
    """The checkpoint holds no tensor of that name."""

    # KeyError would print the sentence as a quoted string.
    __str__ = Exception.__str__


class RequantizedWarning(UserWarning):
    """Weights that int4 with groups of 32 to 256 along k cannot represent are quantised anew when they are read."""
