"""The weight image of one target, of pieces of an artifact's weight files."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..ir.errors import ModelError
from .artifact import Artifact, Run, WeightsFile

Image = npt.NDArray[np.uint8]


class TargetWeights:
    """The files that a target reads, mapped. Close it when nothing reads `pieces` any more."""

    def __init__(self, artifact: Artifact, target: str) -> None:
        """Raises ModelError: a file is damaged, or shorter than a piece of it."""
        self._files: dict[str, WeightsFile] = {}
        self._where = f"{artifact.folder}: weights for {target}"
        runs = artifact.target(target).image
        try:
            for run in runs:
                if run.file not in self._files:
                    self._files[run.file] = WeightsFile(artifact.path(run.file))
            self.pieces: Sequence[Image] = tuple(map(self._piece, runs))
        except BaseException:
            self.close()
            raise

    def _piece(self, run: Run) -> Image:
        piece = self._files[run.file].image[run.begin : run.begin + run.bytes]
        if len(piece) != run.bytes:
            raise ModelError(f"{self._where}: {run} is beyond its file; compile the model again")
        return piece

    @property
    def whole(self) -> Image:
        """The image where it is one piece. Raises ModelError where it is not."""
        if len(self.pieces) > 1:
            raise ModelError(
                f"{self._where}: {len(self.pieces)} pieces, expected one; compile the model again"
            )
        return self.pieces[0] if self.pieces else np.empty(0, np.uint8)

    def close(self) -> None:
        """Unmaps; every piece dies with it."""
        self.pieces = ()
        for file in self._files.values():
            file.close()
        self._files.clear()
