"""What `python -m benchmarks.gpu_validate` runs: a stage a module, each a function of a `context.Context`.

`context` holds what the stages share: the device, the clock, the results file. `results` is that file, `table` prints
what it holds. Nothing here needs more than PyTorch, Triton, NumPy and pytest.
"""
