"""Training of the demo model: a small CLIP on pictures of the demo world and true captions about them.

    # two cores, three to four hours
    python -m demo_world.training --output-dir outputs/demo-model --workers 1
    # a GPU and 16 cores, 9 minutes at a time
    python -m demo_world.training --output-dir outputs/demo-model --device cuda --workers 15 --stop-after 9 \\
        --steps 20000 --batch-size 256 --categories-per-batch 8 --width 128 --patch-dropout 0

The same command continues where the last one stopped; a broken and resumed training ends with the weights of an
unbroken one, and with one more number in ``--steps`` a finished one goes on. Model and tokenizer are open_clip's.
Every batch is rendered anew by worker processes, from the seed and the number of the step alone, so no picture is seen
twice. The checkpoint is chosen by image AUROC on the validation rendering (`demo_world.collections`), never on the
shipped collections. What comes out, in ``--output-dir``:

* ``model.safetensors`` (float16), ``open_clip_config.json``, ``training.json``: the best model so far and how it was
  made, ready to be copied to ``data/demo/model``;
* ``log.csv``: a row per validation; ``state.pt``: everything that resuming needs.
"""

import argparse
import io
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import safetensors.torch
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clipad.io.files import write_atomically
from clipad.prompts import CLIP_AD
from demo_world.captions import caption, truth_matrix
from demo_world.collections import GROUPS, VALIDATION_SEED, render_category
from demo_world.renderer import CATEGORIES, DEFECTS, NEVER_DEFECTIVE, SIZE, draw_attribute, render

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
CONTEXT_LENGTH = 32  # tokens; the longest caption has 21
HEAD_WIDTH = 32
WARM_UP = 0.04  # share of a cycle in which the learning rate rises
WHOLE_IMAGES = 0.12  # share of a cycle, at its end, without patch dropout
WEIGHT_DECAY = 0.05
TRAINING_STREAM = (
    1  # first number of every training seed: keeps it apart from the collections' seeds
)
FILE_LIMIT = 15e6  # bytes of the exported weights


@dataclass(frozen=True)
class Settings:
    """What decides the weights. The defaults suit two cores; for a GPU see the module's docstring."""

    steps: tuple[int, ...] = (8_000, 4_000)  # of each cycle; in each the learning rate starts anew
    batch_size: int = 64
    categories_per_batch: int = (
        4  # few, so that captions differ in the state and not only in the object
    )
    learning_rate: float = 1e-3
    width: int = 96  # of the image tower; 128 makes a file of 11.5 MB, 160 one of 14.1 MB
    patch_dropout: float = 0.6
    seed: int = 1

    def __post_init__(self):
        if (
            min(self.steps, default=0) < 1
            or self.batch_size < 1
            or self.learning_rate <= 0
            or self.seed < 0
        ):
            raise ValueError(
                f"steps, batch size and learning rate must be positive, the seed at least 0: {self}"
            )
        if not 1 <= self.categories_per_batch <= len(CATEGORIES) or self.batch_size % (
            2 * self.categories_per_batch
        ):
            raise ValueError(
                f"a batch of {self.batch_size} cannot hold twins of {self.categories_per_batch} categories in equal "
                f"parts; choose at most {len(CATEGORIES)} categories, and a multiple of twice their number"
            )
        if self.width < HEAD_WIDTH or self.width % HEAD_WIDTH:
            raise ValueError(
                f"width {self.width} is no multiple of {HEAD_WIDTH}, the width of an attention head"
            )
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(
                f"patch dropout is a share from 0 to below 1, found {self.patch_dropout}"
            )


def model_config(settings: Settings) -> dict:
    """The architecture as open_clip's `CLIP` takes it."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": SIZE,
            "layers": 12,
            "width": settings.width,
            "head_width": HEAD_WIDTH,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": 49408,  # open_clip's tokenizer, whole: users type words that we did not think of
            "width": 64,
            "heads": 4,
            "layers": 4,
        },
    }


# Batches --------------------------------------------------------------------------------------------------------


def normalised(images: torch.Tensor) -> torch.Tensor:
    """B x S x S x 3 uint8 -> B x 3 x S x S float32, as the model takes it."""
    mean, std = (torch.tensor(values, device=images.device) for values in (MEAN, STD))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


class Batches(Dataset):
    """Item `step` is that step's batch: images B x S x S x 3 uint8, tokens B x 32, B x B bool (caption j is true of
    image i). Pictures come as twins, one without and one with a defect and else alike: their captions differ in the
    state alone, so no other trait of the picture explains them. Where no defect is ever shown, both are normal."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)

    def __getitem__(self, step: int):
        s = self.settings
        rng = np.random.default_rng([TRAINING_STREAM, s.seed, step])
        images, facts = [], []
        for category in rng.choice(list(CATEGORIES), s.categories_per_batch, replace=False):
            for _ in range(s.batch_size // s.categories_per_batch // 2):
                twins, other = rng.integers(2**63, size=2)
                attribute, turns, mirrored = (
                    draw_attribute(rng),
                    rng.integers(4),
                    rng.random() < 0.5,
                )
                defective = twins, list(DEFECTS)[rng.integers(len(DEFECTS))]
                second = (other, None) if category in NEVER_DEFECTIVE else defective
                for seed, defect in ((twins, None), second):
                    rendering = render(np.random.default_rng(seed), category, defect, attribute)
                    turned = np.rot90(rendering.image, turns)
                    images.append(turned[:, ::-1] if mirrored else turned)
                    facts.append(rendering.facts)
        captions = [caption(rng, f) for f in facts]
        tokens = self.tokenizer([c.text for c in captions])
        return (
            torch.from_numpy(np.stack(images)),
            tokens,
            torch.from_numpy(truth_matrix(facts, captions)),
        )


def one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def contrastive_loss(images, texts, scale, true) -> torch.Tensor:
    """CLIP's symmetric cross-entropy, in which a caption that is also true of another image is no negative.

    images, texts: B x C, unit length; true: B x B bool (image x caption).
    """
    own = torch.eye(len(true), dtype=torch.bool, device=true.device)
    logits = (scale * images @ texts.T).masked_fill(true & ~own, -1e4)
    target = torch.arange(len(true), device=true.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# Validation -----------------------------------------------------------------------------------------------------


def rendered(seed: int) -> dict[str, tuple[torch.Tensor, np.ndarray]]:
    """The pictures of `render_category` for every category: images 40 x S x S x 3, labels 40 (1 anomalous)."""
    pictures = {}
    for category in (name for group in GROUPS.values() for name in group):
        renderings = [rendering for _, _, rendering in render_category(category, seed)]
        labels = np.array([int(r.facts.defect is not None) for r in renderings])
        pictures[category] = torch.from_numpy(np.stack([r.image for r in renderings])), labels
    return pictures


@torch.inference_mode()
def anomaly_scores(model, tokenizer, images: torch.Tensor, category: str) -> np.ndarray:
    """Cosine with the anomalous mean vector minus cosine with the normal one, for B x S x S x 3 uint8 images: B.

    The class probability of METHOD.md section 3 is the logistic function of 100 times this, so the AUROC is the same.
    """
    device = next(model.parameters()).device
    normal, anomalous = (
        F.normalize(
            model.encode_text(tokenizer(sentences).to(device), normalize=True).mean(0), dim=0
        )
        for sentences in CLIP_AD.sentences(category)
    )
    features = model.encode_image(normalised(images.to(device)), normalize=True)
    return (features @ (anomalous - normal)).float().cpu().numpy()


def image_aurocs(model, tokenizer, pictures: dict) -> dict[str, float]:
    """Image AUROC of the class probability per category; `pictures` as `rendered` gives them."""
    model.eval()
    return {
        category: float(roc_auc_score(labels, anomaly_scores(model, tokenizer, images, category)))
        for category, (images, labels) in pictures.items()
    }


# Training -------------------------------------------------------------------------------------------------------


def cycle_done(step: int, settings: Settings) -> float:
    """The share of its cycle that is done after a step (which counts from 0 over all cycles).

    >>> [cycle_done(step, Settings(steps=(4, 2))) for step in range(6)]
    [0.25, 0.5, 0.75, 1.0, 0.5, 1.0]
    """
    for length in settings.steps:
        if step < length:
            return (step + 1) / length
        step -= length
    raise IndexError("the training has fewer steps")


def learning_rate(step: int, settings: Settings) -> float:
    """In each cycle a linear warm-up, then half a cosine down to 2 % (warm restarts: Loshchilov & Hutter 2017)."""
    done, warm_up = cycle_done(step, settings), WARM_UP
    if done <= warm_up:
        return settings.learning_rate * done / warm_up
    cosine = 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))
    return settings.learning_rate * (0.02 + 0.98 * cosine)


def make_optimizers(model) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW with CLIP's betas for everything else (embeddings, projections, vectors).

    With Muon, 400 steps came as far in loss and accuracy as 600 with AdamW alone. Its steps are scaled to AdamW's
    size, so that one learning rate serves both.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "resblocks" in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0),
    ]


def train_step(model, optimizers, batch, step: int, settings: Settings) -> torch.Tensor:
    """One update of the weights; returns loss and accuracy (share of images whose nearest caption is true)."""
    images, tokens, true = batch
    model.train()
    torch.manual_seed(settings.seed + step)  # so that patch dropout is the same after a resumption
    if settings.patch_dropout:
        whole = cycle_done(step, settings) > 1 - WHOLE_IMAGES
        model.visual.patch_dropout.prob = 0.0 if whole else settings.patch_dropout
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        image_features = model.encode_image(normalised(images), normalize=True)
        text_features = model.encode_text(tokens, normalize=True)
    image_features, text_features = image_features.float(), text_features.float()
    loss = contrastive_loss(image_features, text_features, model.logit_scale.exp(), true)
    model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))
        nearest = (image_features @ text_features.T).argmax(1, keepdim=True)
        return torch.stack([loss, true.gather(1, nearest).float().mean()])


def export(model, settings: Settings, row: dict, folder: Path) -> None:
    """Write the three files that make a shipped model."""
    weights = {
        name: value.detach().half().cpu().contiguous() for name, value in model.state_dict().items()
    }
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": model_config(settings), "preprocess_cfg": preprocess}
    training = {
        **asdict(settings),
        "chosen": row,
        "never_defective": NEVER_DEFECTIVE,
        "torch": torch.__version__,
    }
    write_atomically(folder / "model.safetensors", safetensors.torch.save(weights))
    for name, content in (("open_clip_config.json", config), ("training.json", training)):
        write_atomically(folder / name, json.dumps(content, indent=2) + "\n")


def load_state(path: Path, settings: Settings, device: str) -> dict | None:
    """What a training wrote into `path`, or None. Raises ValueError if it ran with other settings.

    Further cycles in `settings` are no difference.
    """
    if not path.exists():
        return None
    state = torch.load(path, map_location=device, weights_only=True)
    before, now = state["settings"], asdict(settings)
    comparable = now | {"steps": now["steps"][: len(before["steps"])]}
    differing = [
        f"{name} {before.get(name)} (now {now[name]})"
        for name in now
        if before.get(name) != comparable[name]
    ]
    if differing or state["never_defective"] != list(NEVER_DEFECTIVE):
        what = ", ".join(differing) or "other never-defective categories"
        raise ValueError(
            f"{path.parent} holds a training with {what}: take its settings, or another folder"
        )
    return state


def steps_until(deadline: float, batches: DataLoader, first: int) -> Iterator:
    for step, batch in enumerate(batches, first):
        yield step, batch
        if time.monotonic() > deadline:
            return


def train(
    settings: Settings,
    output_dir: str | Path,
    device: str = "cpu",
    workers: int = 0,
    validate_every: int = 1000,
    stop_after: float = math.inf,
) -> pd.DataFrame:
    """Train, or continue a training, and return the log (a row per validation; fractions).

    `stop_after` is in minutes: the state is then saved and the same call continues. Raises ValueError if `output_dir`
    holds a training with other settings, or if the model's file would exceed 15 MB.
    """
    if validate_every < 1 or workers < 0 or stop_after <= 0:
        raise ValueError("validate_every and stop_after must be positive, workers at least 0")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no GPU: train on the cpu")
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"training needs torch 2.9 or newer for its optimizer Muon, found {torch.__version__}"
        )
    started = time.monotonic()
    output_dir = Path(output_dir)
    torch.manual_seed(settings.seed)
    config = model_config(settings)
    config["vision_cfg"]["patch_dropout"] = settings.patch_dropout
    model = open_clip.CLIP(**config).to(device)
    size = 2 * sum(p.numel() for p in model.parameters())
    if size > FILE_LIMIT:
        raise ValueError(
            f"width {settings.width} makes a file of {size / 1e6:.1f} MB, more than 15: choose a smaller one"
        )
    optimizers = make_optimizers(model)
    state = load_state(output_dir / "state.pt", settings, device)
    log, first, seconds_before = [], 0, 0.0
    if state:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        log, first, seconds_before = state["log"], state["step"], state["seconds"]
    output_dir.mkdir(parents=True, exist_ok=True)
    last = sum(settings.steps)

    dataset = Batches(settings)
    batches = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        worker_init_fn=one_thread,
    )
    pictures = rendered(VALIDATION_SEED)
    recent = []  # what train_step returned since the last validation

    def validate_and_save(step: int) -> None:
        aurocs = image_aurocs(model, dataset.tokenizer, pictures)
        loss, accuracy = torch.stack(recent).mean(0).tolist()
        recent.clear()
        row = {
            "step": step,
            "images": step * settings.batch_size,
            "seconds": round(seconds_before + time.monotonic() - started, 1),
            "loss": loss,
            "accuracy": accuracy,
            "image_auroc": float(np.mean(list(aurocs.values()))),
            "never_defective": float(
                np.mean([aurocs[name] for name in aurocs if name in NEVER_DEFECTIVE])
            ),
            **aurocs,
        }
        if row["image_auroc"] > max((earlier["image_auroc"] for earlier in log), default=-1):
            export(model, settings, row, output_dir)
        log.append(row)
        state = {
            "settings": asdict(settings),
            "never_defective": list(NEVER_DEFECTIVE),
            "step": step,
            "seconds": row["seconds"],
            "log": log,
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }
        torch.save(state, buffer := io.BytesIO())
        write_atomically(output_dir / "state.pt", buffer.getvalue())
        write_atomically(output_dir / "log.csv", pd.DataFrame(log).to_csv(index=False))
        bar.set_postfix(loss=f"{loss:.2f}", image_auroc=f"{row['image_auroc']:.3f}")

    deadline = started + 60 * stop_after
    with tqdm(total=last, initial=first, unit="step") as bar:
        step = first
        for index, batch in steps_until(deadline, batches, first):
            recent.append(
                train_step(model, optimizers, [part.to(device) for part in batch], index, settings)
            )
            step = index + 1
            bar.update()
            if step % validate_every == 0 and step < last:
                validate_and_save(step)
        if recent:
            validate_and_save(step)
    return pd.DataFrame(log)


def main() -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m demo_world.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output-dir", type=Path, required=True, help="a training found there is continued")
    add("--steps", type=int, nargs="+", default=defaults.steps, help="of each cycle; %(default)s")
    add("--batch-size", type=int, default=defaults.batch_size, help="%(default)s")
    add(
        "--categories-per-batch",
        type=int,
        default=defaults.categories_per_batch,
        help="%(default)s",
    )
    add("--learning-rate", type=float, default=defaults.learning_rate, help="its peak; %(default)s")
    add("--width", type=int, default=defaults.width, help="of the image tower; %(default)s")
    add(
        "--patch-dropout",
        type=float,
        default=defaults.patch_dropout,
        help="until the end of a cycle; %(default)s",
    )
    add("--seed", type=int, default=defaults.seed, help="%(default)s")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="%(default)s")
    add("--workers", type=int, default=0, help="processes that render (0: none besides this one)")
    add(
        "--validate-every",
        type=int,
        default=1000,
        help="steps between validations and saved states; %(default)s",
    )
    add(
        "--stop-after",
        type=float,
        default=math.inf,
        metavar="MINUTES",
        help="save and stop; call again to go on",
    )
    arguments = vars(parser.parse_args())
    own = {
        name: arguments.pop(name)
        for name in ("output_dir", "device", "workers", "validate_every", "stop_after")
    }
    try:
        log = train(Settings(**arguments | {"steps": tuple(arguments["steps"])}), **own)
    except ValueError as error:
        parser.error(str(error))
    best = log.loc[log["image_auroc"].idxmax()]
    print(f"best: step {best.step}, image AUROC {best.image_auroc:.3f} on the validation rendering")


if __name__ == "__main__":
    main()
