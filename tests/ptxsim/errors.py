"""What the simulator can object to. Every message says where: kernel, PTX line, source, thread."""

from __future__ import annotations


class PtxSimError(Exception):
    """Base class. `where` carries the location as fields for tests that want more than text."""

    def __init__(self, message: str, **where: object) -> None:
        self.where = where
        tail = "".join(
            f"\n  {key:8} {value}" for key, value in where.items() if value not in (None, "")
        )
        super().__init__(message + tail)


class ParseError(PtxSimError):
    """The PTX text is not understood."""


class OutOfBounds(PtxSimError):
    """An access outside every registered range, or a write to a read-only one."""


class Misaligned(PtxSimError):
    """An address that is not a multiple of the access size."""


class UninitializedShared(PtxSimError):
    """A read of shared memory that nothing has written in this launch."""


class SharedRace(PtxSimError):
    """Two threads of a CTA touch the same shared bytes with no barrier between."""


class GlobalRace(PtxSimError):
    """Two CTAs touch the same global bytes, one of them writing, with nothing to order them."""


class BarrierError(PtxSimError):
    """A barrier or warp-synchronous instruction that diverges, mismatches or never completes."""


class StepLimit(PtxSimError):
    """The launch ran for more steps than it was allowed."""


class UnknownInstruction(PtxSimError):
    """An instruction was reached that the simulator does not implement."""


class LaunchError(PtxSimError):
    """A launch the device would refuse, or a trap or failed assertion inside the kernel."""
