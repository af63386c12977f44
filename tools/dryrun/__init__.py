"""What `tools.dry_run` is made of: every rank's part of a run, stepped without memory or network.

| file | what |
|---|---|
| `shapes_only.py` | floating-point tensors have a shape and no numbers; integers are real |
| `recording_group.py` | process groups that write down what they are asked to do, and do nothing |
| `batches.py` | micro-batches of the stage's size: heaviest, without images, mixed |
| `sample.py` | which ranks are simulated, and why the others are like them |
| `rank.py` | one rank: the true groups, model, optimizer, schedule and checkpoint |
| `report.py` | what is kept of a rank |
| `collectives.py` | do the ranks' calls fit together? |
| `sharding.py` | does the checkpoint hold every number once? |
| `page.py` | the printed page |
"""
