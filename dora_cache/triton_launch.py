"""Launch compiled Triton kernels without Triton's search for them."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dora_cache.ambient import raw_stream
from dora_cache.errors import warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Launcher", "broken"]

broken: dict[str, str] = {}
"""What kernels failed with, by their names; they are not launched any more."""

_OPTIONS = {
    "num_warps": 4,
    "enable_fp_fusion": False,  # a fused multiply-add rounds once, not twice
}


class Launcher:
    """Launches one kernel on one device, for tensors of certain dtypes.

    Triton compiles a kernel for each combination of dtypes, of what integers are divisible by, and
    of how pointers are aligned, and finds that out anew at each launch. So what has been compiled
    for aligned pointers is launched past that, at a tenth of the cost.

    Args:
        kernel: a function decorated with ``triton.jit``. Its arguments are pointers, ``sizes``,
            other numbers, and ``constants``.
        device: index of the device.
        across: programs in the second dimension of the grid.
        sizes: integers.
        constants: values of its ``tl.constexpr`` parameters.
        options: of the compiler.
    """

    __slots__ = (
        "_compiled",
        "_constants",
        "_device",
        "_kernel",
        "_known",
        "_options",
        "_sizes",
        "across",
    )

    def __init__(
        self,
        kernel: Any,
        device: int,
        across: int,
        sizes: tuple[int, ...],
        constants: tuple[object, ...],
        **options: object,
    ) -> None:
        self.across = across
        self._kernel = kernel
        self._device = device
        self._sizes = sizes
        self._constants = constants
        self._options = _OPTIONS | options
        self._compiled: Any = None
        self._known = False  # whether it was compiled for aligned pointers

    @property
    def name(self) -> str:
        """The kernel's."""
        return self._kernel.__name__

    def __call__(self, down: int, tensors: Sequence[Tensor], numbers: Sequence[float] = ()) -> bool:
        """Launch the kernel; return whether it was launched, else it will not be any more."""
        if broken and self.name in broken:
            return False
        try:
            self.launch(down, tensors, numbers)
        except Exception as error:  # noqa: BLE001 - it compiles at the first launch, by a compiler
            what = f"{type(error).__name__}: {error}"
            broken[self.name] = what  # for the whole process: the next launch would fail as well
            warn(f"Triton kernel {self.name!r} failed, so PyTorch's operations run: {what}")
            return False
        return True

    def launch(self, down: int, tensors: Sequence[Tensor], numbers: Sequence[float] = ()) -> None:
        """Launch the kernel on the current stream; the device must be the current one.

        Args:
            down: programs in the first dimension of the grid.
            tensors: of the same dtypes at each launch.
            numbers: floats, or integers that the kernel is not specialised for.

        Raises:
            Exception: whatever Triton raises.
        """
        addresses = [tensor.data_ptr() for tensor in tensors]
        if self._compiled is not None and self.relaunch(
            down, addresses, numbers, raw_stream(self._device)
        ):
            return
        compiled = self._kernel[down, self.across, 1](
            *tensors,
            *self._sizes,
            *numbers,
            *self._constants,
            **self._options,
        )
        if not self._known and _aligned(addresses):
            self._known = True
            with suppress(AttributeError):
                self._compiled = _call_of(compiled)

    def relaunch(
        self, down: int, addresses: Sequence[int], numbers: Sequence[float], stream: int
    ) -> bool:
        """Launch what has been compiled for aligned pointers; return whether that could be done.

        Args:
            down: programs in the first dimension of the grid.
            addresses: of the tensors.
            numbers: as in :meth:`launch`.
            stream: the handle of the current CUDA stream.
        """
        compiled = self._compiled
        if compiled is None or not _aligned(addresses):
            return False
        run, given = compiled
        rest = (*given, *addresses, *self._sizes, *numbers, *self._constants)
        try:
            run(down, self.across, 1, stream, *rest)
        except Exception:  # noqa: BLE001 - no public interface: the public one may do
            self._compiled = None
            return False
        return True


def _call_of(compiled: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return what launches a compiled kernel, and what it gets between stream and arguments.

    That is Triton's launcher, or, for versions where it is known, the function in C that it calls
    once it has allocated memory that the kernel wants.

    Raises:
        AttributeError: this Triton has no such launcher.
    """
    import triton

    run, metadata = compiled.run, compiled.packed_metadata
    usual = (metadata, None, None, None)
    known = triton.__version__.startswith("3.6.")
    if known and run.global_scratch_size == run.profile_scratch_size == 0:
        flags = run.launch_cooperative_grid, run.launch_pdl
        return run.launch, (compiled.function, *flags, None, None, *usual)
    return run, (compiled.function, *usual)


def _aligned(addresses: Sequence[int]) -> bool:
    bits = 0
    for address in addresses:
        bits |= address
    return not bits % 16
