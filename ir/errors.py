"""The three errors of halfbyte. Each reads `where: what is wrong, expected, found; what to do`."""


class HalfbyteError(Exception):
    """Base of the three: what a caller catches who only wants to report and stop."""


class ModelError(HalfbyteError):
    """The user's model, artifact or request is wrong. Names the file and the tensor."""


class TargetError(HalfbyteError):
    """This machine or target cannot do it. Names the feature and the nearest kernel's refusal."""


class IRError(HalfbyteError):
    """A graph of ours is wrong: a bug of halfbyte. A note underlines the failing op in the IR."""
