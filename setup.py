"""The compiled part of the package; everything else about it stands in setup.cfg.

`optional`: without a compiler, or on another processor than x86-64, the installation succeeds and
images are resized by Pillow, several times slower. A module of its own beside the packages, because
jobs run a copy of the sources: they find it in the environment, like every other compiled module.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "amalia_pixels",
            [f"data_shards/native/{name}.c" for name in ("pixels", "avx2", "avx512")],
            depends=["data_shards/native/pixels.h"],
            # No contraction: a fused multiply-add would round otherwise than Pillow's weights.
            extra_compile_args=["-O3", "-fno-tree-pre", "-ffp-contract=off", "-Wall", "-Wextra"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
