"""Everything that one Hopper GPU can check, by one short command (see `__main__`).

Nothing here imports more than torch, NumPy, megatron-core, Transformer Engine and this project's
models and training step, so that a bare GPU machine can run it.
"""
