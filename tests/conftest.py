"""What every test runs under: no network, no tokenizer warnings, no measured profile, interpreted Triton kernels.

torch's threads are left as they are.
"""

import atexit
import os
import shutil
import tempfile

from triton_switch import import_triton

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OFFLOAD_CACHE"] = os.path.join(tempfile.gettempdir(), f"offload-tests-{os.getpid()}")  # nothing is in it
atexit.register(shutil.rmtree, os.environ["OFFLOAD_CACHE"], ignore_errors=True)
import_triton()
