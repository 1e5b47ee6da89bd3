"""Inference on one pool: scheduler, paged cache, prefix cache, device step, and the worker that serves them over HTTP.

Other rooms use:
- `server.run_worker(WorkerOptions)`: a worker process;
- `engine.Engine`, `runner.Runner`, `request.Request`, `request.SamplingParams`: the engine inside this process;
- `prefix.block_hashes`: the names of a prompt's blocks, by which the gateway finds the pool that holds them.
"""
