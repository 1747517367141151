"""Metrics of anomalib and ADEval on the same arrays, in an interpreter of their own.

Run by ``python -m benchmarks --peers-python PATH``; imports nothing of clipad. Arguments: scores.npy, masks.npy and
the number of threads. Each line on standard input names a peer; the answer is one line of JSON: seconds and values.
Tested with anomalib 2.7 and ADEval 1.1.
"""

import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch


def anomalib_four(scores, masks):
    from anomalib.metrics import AUPR, AUPRO, AUROC, F1Max

    batch = SimpleNamespace(maps=torch.from_numpy(scores), masks=torch.from_numpy(masks).int())
    found = {}
    for name, kind in {"auroc": AUROC, "ap": AUPR, "f1_max": F1Max, "pro": AUPRO}.items():
        metric = kind(fields=["maps", "masks"])
        metric.update(batch)
        found[name] = float(metric.compute())
    return found


def adeval_three(scores, masks):
    import adeval

    if not hasattr(np, "trapz"):  # NumPy 2.4 removed it, ADEval 1.1 calls it
        np.trapz = np.trapezoid  # noqa: NPY201
    auroc, ap, pro = adeval.auroc_aupr_aupro(scores, masks.astype(np.uint8))
    return {"auroc": auroc, "ap": ap, "pro": pro}


PEERS = {"anomalib": anomalib_four, "adeval": adeval_three}


def answer(name, scores, masks):
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        values = PEERS[name](scores, masks)
        return {
            "wall": time.perf_counter() - wall,
            "cpu": time.process_time() - cpu,
            "values": {key: float(value) for key, value in values.items()},
        }
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # what the peers print is no answer
    scores, masks = np.load(sys.argv[1]), np.load(sys.argv[2])
    torch.set_num_threads(int(sys.argv[3]))
    for line in sys.stdin:
        print(json.dumps(answer(line.strip(), scores, masks)), file=answers, flush=True)
