"""What is tried together: a checkpoint, the network it is of, data, and a transform; each as a library writes it."""

from __future__ import annotations

from dataclasses import dataclass

from tests.ecosystem import data as d
from tests.ecosystem import library_checkpoints as lib
from tests.ecosystem import torch_checkpoints as t
from tests.ecosystem import transforms as tr
from tests.ecosystem.checkpoint import Checkpoint
from tests.ecosystem.data import Data
from tests.ecosystem.transforms import Transform


@dataclass(frozen=True)
class Combination:
    """One project.

    Attributes:
        name: of the test.
        checkpoint: its layout.
        network: one of ``NETWORKS``.
        data: its layout.
        transform: what makes inputs of pictures.
        needs: the packages that have to be there.
        quick: whether ``make test`` runs it too, where the packages are there.
    """

    name: str
    checkpoint: Checkpoint
    network: str
    data: Data = d.IMAGE_FOLDER
    transform: Transform = tr.LIST
    needs: tuple[str, ...] = ()
    quick: bool = False


C = Combination
COMBINATIONS = (
    # torch, and loops of one's own
    C("plain", t.PLAIN, "own", d.CONCATENATED),
    C("safetensors", t.SAFETENSORS, "own", d.TSV),
    C("old-format", t.OLD_FORMAT, "own", d.SUBSETS),
    C("numpy-scalars", t.OWN_LOOP, "own", d.CSV, tr.OWN_FUNCTION),
    C("teacher", t.TEACHER, "own", d.FOLDERS),
    C("composer", t.COMPOSER, "own", d.JSONL),
    C("mmengine", t.MMENGINE, "own", d.KAGGLE),
    C("averaged-model", t.AVERAGE, "own", d.PARQUET_LIST),
    C("compiled", t.COMPILED, "own", d.SAVED, needs=("datasets",)),
    C("ddp", t.DISTRIBUTED, "own", d.HUB_PARQUET, needs=("datasets",)),
    C("dcp", t.DISTRIBUTED_CHECKPOINT, "own", d.PARQUET_IMAGES, needs=("datasets",)),
    C("pickled", t.PICKLED, "own", d.WEBDATASET, needs=("webdataset",)),
    C("torchscript", t.TORCHSCRIPT, "own", d.FOLDERS),
    C("half", t.HALF, "own", d.CSV),
    C("bfloat16", t.BFLOAT16, "own", d.JSONL, tr.ALBUMENT, needs=("albumentations",)),
    C("double", t.DOUBLE, "own", d.KAGGLE),
    C("medmnist", t.OWN_LOOP, "own of 8", d.MEDMNIST, needs=("medmnist",), quick=True),
    C("one-logit", t.OWN_LOOP, "one logit", d.TWO_CLASSES),
    C("wide-head", t.PLAIN, "own of 8", d.CHOSEN_OUTPUTS),
    # torchvision
    C("torchvision-reference", t.TORCHVISION, "mobilenet_v2", d.IMAGE_FOLDER, tr.WEIGHTS),
    C("torchvision-average", t.TORCHVISION_EMA, "mobilenet_v2", d.CSV, tr.WEIGHTS),
    C("torchvision-compiled", t.COMPILED, "mobilenet_v2", d.HF_IMAGE_FOLDER, needs=("datasets",)),
    # timm
    C("timm", lib.TIMM, "timm resnet18", d.FOLDERS, tr.TIMM, needs=("timm",), quick=True),
    C("timm-average", lib.TIMM_EMA, "timm resnet18", d.CSV, tr.TIMM, needs=("timm",)),
    C("timm-webdataset", lib.TIMM, "timm resnet18", d.WEBDATASET, tr.TIMM, needs=("timm", "webdataset")),
    C("timm-albumentations", t.OWN_LOOP, "timm vit", d.JSONL, tr.ALBUMENT, needs=("timm", "albumentations")),
    C("timm-vit-saved", t.COMPILED, "timm vit", d.SAVED, tr.TIMM, needs=("timm", "datasets")),
    C("timm-convnext-pickled", t.PICKLED, "timm convnext", d.FOLDERS, tr.TIMM, needs=("timm",)),
    C("timm-convnext-swa", t.AVERAGE, "timm convnext", d.IMAGE_FOLDER, tr.OWN_FUNCTION, needs=("timm",)),
    # Lightning
    C("lightning-module", lib.LIGHTNING_MODULE, "own", d.FOLDERS, needs=("lightning",)),
    C("lightning-net", lib.LIGHTNING_NET, "own", d.CSV, needs=("lightning",)),
    C(
        "lightning-objects", lib.LIGHTNING_OBJECTS, "own", d.IMAGE_FOLDER, tr.ALBUMENT,
        needs=("lightning", "albumentations"), quick=True,
    ),
    # transformers
    C("hf-folder", lib.HF_FOLDER, "ViT", d.HF_IMAGE_FOLDER, tr.PROCESSOR, ("transformers", "datasets"), quick=True),
    C("hf-itself", lib.HF_ITSELF, "ViT", d.FOLDERS, tr.PROCESSOR, ("transformers",)),
    C("hf-both", lib.HF_BOTH, "ViT", d.SAVED, tr.PROCESSOR, ("transformers", "datasets")),
    C("hf-shards", lib.HF_SHARDS, "ViT", d.CSV, tr.PROCESSOR, ("transformers",)),
    C("hf-trainer", lib.HF_TRAINER, "ViT", d.HUB_PARQUET, tr.PROCESSOR, ("transformers", "accelerate", "datasets")),
    C("hf-resnet", lib.HF_FOLDER, "ResNet", d.IMAGE_FOLDER, tr.PROCESSOR, ("transformers",)),
    C("hf-resnet-itself", lib.HF_ITSELF, "ResNet", d.SAVED, tr.PROCESSOR, ("transformers", "datasets")),
    C("hf-dinov2", lib.HF_FOLDER, "Dinov2", d.CSV, tr.LIST, ("transformers",)),
    C("hf-dinov2-shards", lib.HF_SHARDS, "Dinov2", d.FOLDERS, tr.PROCESSOR, ("transformers",)),
    C("hf-convnext", lib.HF_FOLDER, "ConvNext", d.PARQUET_IMAGES, tr.PROCESSOR, ("transformers", "datasets")),
    C("hf-convnext-itself", lib.HF_ITSELF, "ConvNext", d.HF_IMAGE_FOLDER, tr.PROCESSOR, ("transformers", "datasets")),
    C("accelerate", lib.ACCELERATE, "own", d.CONCATENATED, needs=("accelerate",)),
    C("peft", lib.PEFT, "ViT", d.IMAGE_FOLDER, tr.PROCESSOR, ("transformers", "peft")),
    # fastai, ultralytics
    C("fastai", lib.FASTAI, "fastai", d.CSV, tr.LIST, ("fastai",), quick=True),
    C("fastai-weights", lib.FASTAI_WEIGHTS, "fastai", d.FOLDERS, tr.OWN_FUNCTION, ("fastai",)),
    C("fastai-export", lib.FASTAI_EXPORT, "fastai", d.SUBSETS, tr.LIST, ("fastai",)),
    C("ultralytics", lib.ULTRALYTICS, "YOLO", d.FOLDERS, tr.LIST, ("ultralytics",)),
    C("ultralytics-csv", lib.ULTRALYTICS, "YOLO", d.TSV, tr.WEIGHTS, ("ultralytics",)),
)  # fmt: skip
# What follows `influence init` where that writes a config too: of files that say the transform, with the same rows.
INIT_ALIKE = {
    "timm": "output/model_best.pth.tar .",
    "hf-folder": "out train val",
    "hf-shards": "out list.csv",
    "hf-trainer": "run/checkpoint-2 repository",
    "hf-resnet": "out train val",
    "hf-dinov2-shards": "out .",
}
# Of files that do not: a transform is tried out.
INIT = {
    "safetensors": "model.safetensors train.tsv val.tsv --model ./model.py:build",
    "numpy-scalars": "best.pt list.csv --model ./model.py:build",
    "composer": "ep1.pt train/metadata.jsonl val/metadata.jsonl --model ./model.py:build",
    "averaged-model": "swa.pt train.parquet val.parquet --model ./model.py:build",
    "compiled": "compiled.pt set --model ./model.py:build",
    "dcp": "step-10 repository --model ./model.py:build",
    "torchscript": "scripted.safetensors . --model ./model.py:build",
    "half": "half.pt list.csv --model ./model.py:build",
    "one-logit": "best.pt train val --model ./model.py:build",
    "lightning-module": "last.ckpt . --model lit:Lit",
    "lightning-net": "last.ckpt list.csv --model ./model.py:build",
    "lightning-objects": "epoch=0-step=3.ckpt train val --model ./model.py:build",
    "accelerate": "state/model.safetensors train val --model ./model.py:build",
    "fastai": "models/m.pth list.csv --model ./model.py:build",
}
