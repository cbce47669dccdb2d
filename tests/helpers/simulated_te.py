"""Transformer Engine on the simulated device: its own Python code, over torch's operations.

`make setup` puts its package, which is Python alone, where nothing but this finds it. Its kernels, fp8 and
its fused attention are not seen; its modules, optimizer, argument checks and the formats of tensors are.

`python -m tests.helpers.simulated_te` serves as `forked.py`.
"""

import importlib
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

from tests.helpers import forked, simulated_cuda, te_extension

PACKAGE = Path(sys.prefix) / "transformer-engine"
AVAILABLE = simulated_cuda.AVAILABLE and (PACKAGE / "transformer_engine").is_dir()
NAME = "transformer_engine"


def install() -> None:
    """From now on `import transformer_engine` succeeds."""
    simulated_cuda.install()
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it looks for none of its libraries
    os.environ["NVTE_MASKED_SOFTMAX_FUSION"] = "0"
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"
    sys.path.insert(0, str(PACKAGE))  # before one that is built for this machine
    sys.modules["transformer_engine_torch"] = te_extension.module()
    # Export to ONNX, whose packages nothing else needs.
    onnx = ModuleType(f"{NAME}.pytorch.onnx_extensions")
    onnx.__getattr__ = lambda name: None  # type: ignore[method-assign]
    sys.modules[onnx.__name__] = onnx
    # Its `common` loads the extension while the package is imported: that first, without the package.
    alone = ModuleType(NAME)
    alone.__path__ = [str(PACKAGE / NAME)]
    sys.modules[NAME] = alone
    common = importlib.import_module(f"{NAME}.common")
    common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    del sys.modules[NAME]
    importlib.import_module(f"{NAME}.pytorch")
    sys.modules[NAME].common = common  # type: ignore[attr-defined]


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    install()
    forked.main()
