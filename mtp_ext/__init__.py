"""Kernels for multi-token prediction, as `torch.ops.mtp.*`; documented in `mtp_ext.ops`."""

import importlib
import os

# An OpenMP thread that waits should spin for some 30 us, which bridges the gap to the next
# operator. libgomp's own choice is milliseconds: where cores are shared, it then spins away the
# time of the very thread it waits for. Read once, when torch loads the library.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch

from mtp_ext.version import __version__

_REBUILD = "pip install --no-build-isolation -e ."


def _load_extension():
    """Imports the compiled module, or says what is wrong and which command mends it."""
    try:
        _C = importlib.import_module("mtp_ext._C")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"mtp_ext {__version__}: the extension is not built for this Python. From the "
            f"repository, run:\n    {_REBUILD}\n(or `make build` for an in-place build)"
        ) from error
    except ImportError as error:
        raise ImportError(
            f"mtp_ext {__version__}: the extension does not load under torch "
            f"{torch.__version__}: {error}\nMost often torch was changed after the build. "
            f"Rebuild against the installed one:\n    {_REBUILD}"
        ) from error

    built = _C.build_info()["torch"]
    if built.split("+")[0] != torch.__version__.split("+")[0]:
        raise ImportError(
            f"mtp_ext {__version__}: the extension was built against torch {built}, but torch "
            f"{torch.__version__} is running. Rebuild against it:\n    {_REBUILD}"
        )
    return _C


_C = _load_extension()


def build_info() -> dict[str, str]:
    """Version, commit, torch, CUDA and compiler of the build; compiled and active targets."""
    return _C.build_info()


from mtp_ext import fake as fake  # noqa: E402  (registers fake kernels)
from mtp_ext import ops as ops  # noqa: E402
