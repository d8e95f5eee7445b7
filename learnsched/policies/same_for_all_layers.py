"""What policies share that have a formula of progress alone: no state, one setting for all layers."""

from __future__ import annotations

from collections.abc import Sequence

from learnsched.schedule import RunInfo, Setting, Telemetry


class SameForAllLayers:
    """A policy without state whose ``_setting(progress)`` every layer gets."""

    def begin(self, run: RunInfo) -> None:
        """No state."""

    def settings(
        self, run: RunInfo, epoch: int, telemetry: Telemetry, state: None
    ) -> tuple[Sequence[Setting], None]:
        """The setting of the formula at the epoch's progress, the same for every layer."""
        return [self._setting(run.progress(epoch))] * len(run.layers), None

    def _setting(self, progress: float) -> Setting:
        raise NotImplementedError
