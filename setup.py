"""Lists the packages: offload/ as it lies, and the kernels' two folders under the names they are imported by.

kernels/ itself has no __init__.py and is no package: a top-level package of that name would hide the one that
transformers looks for. A mapping written here reaches wheels and editable installs alike; package discovery from
pyproject.toml drops the mapped part without a word (tests/test_packaging.py watches this).
"""

from setuptools import find_packages, setup

MAPPED = {"offload.kernels.cpu": "kernels/cpu", "offload.kernels.gpu": "kernels/gpu"}

setup(
    packages=[
        *find_packages(include=["offload", "offload.*"]),
        *(
            name
            for root, folder in MAPPED.items()
            for name in (root, *(f"{root}.{inner}" for inner in find_packages(folder)))
        ),
    ],
    package_dir=MAPPED,
    package_data={"offload": ["presets/*.toml"]},
)
