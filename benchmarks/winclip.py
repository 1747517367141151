"""P10: our WinCLIP against anomalib's, on the same random weights and images, on one thread of the CPU.

anomalib 2.7 needs open_clip < 2.26.1, clipad a newer one, so anomalib runs as a child process in its own environment:

    python -m venv ENV; ENV/bin/pip install "anomalib==2.7.*" open_clip_torch==2.24.0
    python benchmarks/winclip.py --anomalib ENV/bin/python [--images 16] [--repeats 3]

The two take turns, so that whatever else runs on the machine disturbs both. Prints the ratio of the medians of wall
clock time and of CPU time, the largest difference of scores and maps, and the share of the harmonic aggregation.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

MODEL = "ViT-B-16-plus-240"


def timed(function, *arguments):
    """Result, wall clock seconds, CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*arguments)
    return result, time.perf_counter() - wall, time.process_time() - cpu


def child(folder: Path) -> None:
    """anomalib's side: one forward for each line on stdin, its two times to stdout, scores and maps to a file."""
    from anomalib.models.image.winclip import torch_model
    from safetensors.torch import load_file

    torch_model.PRETRAINED = None
    model = torch_model.WinClipModel()
    model.clip.load_state_dict(load_file(folder / "weights.safetensors"))
    model.eval().setup(class_name="bottle")
    images = torch.from_numpy(np.load(folder / "images.npy"))
    print("ready", flush=True)
    for _ in sys.stdin:
        found, *seconds = timed(model, images)
        np.savez(
            folder / "anomalib.npz", scores=found.pred_score.numpy(), maps=found.anomaly_map.numpy()
        )
        print(*seconds, flush=True)


def main(arguments) -> None:
    from safetensors.torch import save_file

    import clipad
    from clipad.winclip import SIZES, WinCLIP, harmonic_mean, windows

    backbone = clipad.load_backbone(MODEL, device="cpu")
    detector = WinCLIP(backbone)
    images = torch.randn(arguments.images, 3, 240, 240, generator=torch.Generator().manual_seed(0))
    detector.text_vectors("bottle")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(
            {k: v.contiguous() for k, v in backbone.model.state_dict().items()},
            folder / "weights.safetensors",
        )
        np.save(folder / "images.npy", images.numpy())
        command = [arguments.anomalib, __file__, "--child", name]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            while other.stdout.readline().strip() != "ready":
                if other.poll() is not None:
                    raise SystemExit("anomalib's side did not start")
            ours, theirs = [], []
            for _ in range(1 + arguments.repeats):
                prediction, *seconds = timed(detector.predict, images, "bottle")
                ours.append(seconds)
                print("go", file=other.stdin, flush=True)
                theirs.append([float(x) for x in other.stdout.readline().split()])
                print(f"ours {seconds[0]:.2f} s, anomalib {theirs[-1][0]:.2f} s")
            other.stdin.close()
        reference = np.load(folder / "anomalib.npz")
        for key, found in (("scores", prediction.probabilities), ("maps", prediction.maps)):
            low, high = reference[key].min(), reference[key].max()
            difference = np.abs(found.numpy() - reference[key]).max()
            print(f"{key}: from {low:.4f} to {high:.4f}, largest difference {difference:.1e}")
    for kind, column in (("wall clock", 0), ("CPU time", 1)):
        mine, other = (
            median(row[column] for row in rows[1:]) for rows in (ours, theirs)
        )  # the first warms up
        print(
            f"{kind}: ours {mine:.2f} s, anomalib {other:.2f} s for {len(images)} images: {other / mine:.2f}x"
        )
    scores = [torch.rand(len(images), len(windows(15, k))) for k in SIZES]
    aggregation = median(
        timed(lambda: [harmonic_mean(s, 15, k) for s, k in zip(scores, SIZES, strict=True)])[1]
        for _ in range(100)
    )
    share = aggregation / median(row[0] for row in ours[1:])
    print(f"harmonic aggregation: {1000 * aggregation:.2f} ms, {100 * share:.4f} % of the forward")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--anomalib", help="Python of the environment that has anomalib")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    child(Path(given.child)) if given.child else main(given)
