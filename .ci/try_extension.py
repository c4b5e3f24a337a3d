"""Imports the installed extension, without torch and without a driver.

python .ci/try_extension.py [ARCHITECTURES]: fails unless it holds kernels for them; "" is none.
"""

import importlib.util
import sys

sys.path.insert(0, *importlib.util.find_spec("progtuning_kernels").submodule_search_locations)
import _C

found = _C.cuda_archs if _C.cuda_built else ""
print(f"{_C.__file__}: {_C.compiler}, OpenMP {_C.openmp}, kernels for {found or 'the CPU only'}")
if len(sys.argv) > 1 and found != sys.argv[1]:
    sys.exit(f"kernels for {sys.argv[1] or 'the CPU only'} were to be in it")
