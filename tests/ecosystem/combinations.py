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
BUILD, NET = "--model ./model.py:build", "--model ./net.py:build"
# What follows `influence init`. `net.py` has a function that builds a network of a library, where no file says which.
INIT = {
    "plain": f"model.pt train val {BUILD}",
    "safetensors": f"model.safetensors train.tsv val.tsv {BUILD}",
    "old-format": f"model.pth train val {BUILD}",
    "numpy-scalars": f"best.pt list.csv {BUILD}",
    "teacher": f"checkpoint.pth . {BUILD}",
    "composer": f"ep1.pt train/metadata.jsonl val/metadata.jsonl {BUILD}",
    "mmengine": f"epoch_1.pth train.csv val.csv {BUILD}",
    "averaged-model": f"swa.pt train.parquet val.parquet {BUILD}",
    "compiled": f"compiled.pt set {BUILD}",
    "ddp": f"ddp.pt repository {BUILD}",
    "dcp": f"step-10 repository {BUILD}",
    "pickled": f"whole.safetensors shards {BUILD}",
    "torchscript": f"scripted.safetensors . {BUILD}",
    "half": f"half.pt list.csv {BUILD}",
    "bfloat16": f"bf16.safetensors train/metadata.jsonl val/metadata.jsonl {BUILD}",
    "double": f"double.pt train.csv val.csv {BUILD}",
    "medmnist": f"best.pt bloodmnist.npz {BUILD}",
    "one-logit": f"best.pt train val {BUILD}",
    "wide-head": f"model.pt train val {BUILD}",
    "torchvision-reference": f"checkpoint.pth train val {NET}",
    "torchvision-average": f"checkpoint.pth list.csv {NET}",
    "torchvision-compiled": f"compiled.pt train val {NET}",
    "timm": "output/model_best.pth.tar .",
    "timm-average": "output/last.pth.tar list.csv",
    "timm-webdataset": "output/model_best.pth.tar shards",
    "timm-albumentations": f"best.pt train/metadata.jsonl val/metadata.jsonl {NET}",
    "timm-vit-saved": f"compiled.pt set {NET}",
    "timm-convnext-pickled": f"whole.safetensors . {NET}",
    "timm-convnext-swa": f"swa.pt train val {NET}",
    "lightning-module": "last.ckpt . --model lit:Lit",
    "lightning-net": f"last.ckpt list.csv {BUILD}",
    "lightning-objects": f"epoch=0-step=3.ckpt train val {BUILD}",
    "hf-folder": "out train val",
    "hf-itself": "out .",
    "hf-both": "out set",
    "hf-shards": "out list.csv",
    "hf-trainer": "run/checkpoint-2 repository",
    "hf-resnet": "out train val",
    "hf-resnet-itself": "out set",
    "hf-dinov2": "out list.csv",
    "hf-dinov2-shards": "out .",
    "hf-convnext": "out repository",
    "hf-convnext-itself": "out train val",
    "accelerate": f"state/model.safetensors train val {BUILD}",
    "peft": "adapter train val",
    "fastai": f"models/m.pth list.csv {BUILD}",
    "fastai-weights": f"models/m.pth . {BUILD}",
    "fastai-export": f"export.safetensors train val {BUILD}",
    "ultralytics": f"best.safetensors . {BUILD}",
    "ultralytics-csv": f"best.safetensors train.tsv val.tsv {BUILD}",
}
TRANSFORM = "train.transform"
# Lines that no file says: they are set to those of the combination before rows are compared, as l2 is for all.
SET = dict.fromkeys(INIT, (TRANSFORM,)) | {
    # The transform is in the files: its rows are those of the combination.
    **dict.fromkeys(
        (
            "timm", "timm-webdataset", "hf-folder", "hf-itself", "hf-both", "hf-shards", "hf-trainer", "hf-resnet",
            "hf-resnet-itself", "hf-dinov2-shards", "hf-convnext", "hf-convnext-itself", "peft",
        ),
        (),
    ),
    # Two sets of weights fit, and the combination takes the one that is not the first.
    "teacher": ("model.checkpoint", TRANSFORM),
    "torchvision-average": ("model.checkpoint", TRANSFORM),
    "timm-average": ("model.checkpoint",),
    # The model was not trained for the outputs that it is asked about.
    "wide-head": ("train.classes", TRANSFORM),
}  # fmt: skip
