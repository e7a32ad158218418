"""Dense engines of other runtimes, for processes of `benchmarks.worker`: this file must not import torch.

Each function is given a job and the number of threads, and returns a function that runs the network once on the job's
images. The network is an ONNX file, the norms folded, with the batch as its dimension N.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.worker import Job, Unusable

Run = Callable[[], np.ndarray]


def onnxruntime(job: Job, threads: int) -> Run:
    """ONNX Runtime, every graph optimisation, its threads spinning between operators as is its default."""
    import onnxruntime as ort

    x = np.load(job.images)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_free_dimension_override_by_name("N", len(x))
    session = ort.InferenceSession(job.options["onnx"], options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"images": x})[0]


def openvino(job: Job, threads: int) -> Run:
    """OpenVINO for latency: one request, all threads inside it."""
    return _openvino(job, threads, streams=1)


def openvino_streams(job: Job, threads: int) -> Run:
    """OpenVINO for throughput: the batch in as many requests as there are threads, one thread each."""
    if threads == 1:
        raise Unusable("one thread is one stream")
    streams = min(threads, len(np.load(job.images, mmap_mode="r")))
    if streams == 1:
        raise Unusable("one image cannot be shared by streams")
    return _openvino(job, threads, streams)


def _openvino(job: Job, threads: int, streams: int) -> Run:
    import openvino as ov

    parts = [np.ascontiguousarray(part) for part in np.array_split(np.load(job.images), streams)]
    core = ov.Core()
    precision = {"float32": "f32", "bfloat16": "bf16"}[job.dtype]
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
    }
    compiled = {}
    for size in {len(part) for part in parts}:
        network = core.read_model(job.options["onnx"])
        network.reshape([size, *parts[0].shape[1:]])
        compiled[size] = core.compile_model(network, "CPU", properties)
        used = str(compiled[size].get_property("INFERENCE_PRECISION_HINT"))
        if used != f"<Type: '{'bfloat16' if precision == 'bf16' else 'float32'}'>":
            raise Unusable(f"asked for {precision}, OpenVINO computes in {used} on this machine")
    requests = [compiled[len(part)].create_infer_request() for part in parts]
    for request, part in zip(requests, parts, strict=True):
        request.set_input_tensor(ov.Tensor(part))

    def single() -> np.ndarray:
        requests[0].infer()
        return requests[0].get_output_tensor().data

    def together() -> np.ndarray:
        for request in requests:
            request.start_async()
        for request in requests:
            request.wait()
        return np.concatenate([request.get_output_tensor().data for request in requests])

    return single if streams == 1 else together
