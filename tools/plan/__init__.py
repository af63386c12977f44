"""What a stage will need and cost, before anything is queued: pure functions on a configuration.

docs/planner.md explains the model. Nothing here imports torch but `measured` and `cpu_memory`,
which compare predictions with a real network.
"""
