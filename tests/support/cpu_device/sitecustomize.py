"""Makes mx.cpu MLX's default device in every Python process that has this folder on its PYTHONPATH.

conftest.py puts it there where AGENTMEM_TEST_DEVICE is `cpu`, for the servers that tests start. The
device is set when a process imports MLX, since some never do.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class CPUDeviceFinder:
    """Finds mlx.core where it is, and sets the device as soon as it is loaded."""

    @staticmethod
    def find_spec(name: str, path: list[str] | None, target: object = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == "mlx.core" else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_set_device(module: ModuleType) -> None:
            load(module)
            module.set_default_device(module.cpu)

        spec.loader.exec_module = load_and_set_device  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, CPUDeviceFinder)
