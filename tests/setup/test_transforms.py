"""The usual transforms for a model and images."""

from __future__ import annotations

from influence_cli.setup.guesses import ModelGuess
from influence_cli.setup.transforms import IMAGENET, Geometry, Pictures, last_resort, plausible, transform_of


def model(**options: object) -> ModelGuess:
    return ModelGuess("a.b", "", {}, "", 3, "m.pt", **options)  # type: ignore[arg-type]


PHOTOS = Pictures(frozenset({(480, 640), (640, 480)}), frozenset({"RGB"}))


def names(guess: ModelGuess, pictures: Pictures = PHOTOS, **settings: object) -> list[list[str]]:
    return [[transform.name for transform in group] for group in plausible(guess, settings, pictures)]


def test_photos_are_cropped_or_squeezed_to_224() -> None:
    groups = names(model())
    assert [group[0] for group in groups] == [
        "Resize 256, CenterCrop 224, ImageNet's mean and std",
        "Resize 224×224, ImageNet's mean and std",
    ]
    assert groups[0][1:] == [
        "Resize 256, CenterCrop 224, values in [0, 1]",
        "Resize 256, CenterCrop 224, mean and std 0.5",
    ]


def test_the_librarys_crops_come_first() -> None:
    assert [group[0].partition(", I")[0] for group in names(model(crops=((342, 299),)))] == [
        "Resize 342, CenterCrop 299",
        "Resize 256, CenterCrop 224",
        "Resize 224×224",
    ]


def test_small_images_of_one_size_stay_as_they_are() -> None:
    digits = Pictures(frozenset({(28, 28)}), frozenset({"L"}))
    groups = names(model(), digits)
    assert groups[0] == [
        "size as it is, values in [0, 1]",
        "size as it is, mean and std 0.5",
        "size as it is, MNIST's mean and std",
    ]


def test_a_size_that_the_model_needs_is_kept() -> None:
    assert [group[0].partition(", I")[0] for group in names(model(sizes=((384, 384),)))] == [
        "Resize 384×384",
        "Resize 439, CenterCrop 384",
    ]
    assert names(model(), img_size=160)[0][0].startswith("Resize 160×160, ")


def test_mean_and_std_that_the_options_name_come_first() -> None:
    first = plausible(model(), {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}, PHOTOS)[0][0]
    assert first.value[-1] == {"Normalize": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    assert names(model(), mean=[0.1], std="x") == names(model())


def test_a_model_of_one_channel_sees_grey() -> None:
    first = plausible(model(channels=1), {}, PHOTOS)[0][0]
    assert first.value[0] == {"Grayscale": {"num_output_channels": 1}}
    grey = Pictures(frozenset({(9, 9)}), frozenset({"L", "RGB"}))
    assert plausible(model(channels=3), {}, grey)[0][0].value[0] == "RGB"


def test_steps_of_a_transform() -> None:
    assert transform_of(Geometry(232, 224, "bicubic"), IMAGENET, 3).value == [
        {"Resize": {"size": 232, "interpolation": "bicubic"}},
        {"CenterCrop": {"size": 224}},
        "ToImage",
        {"ToDtype": {"dtype": "float32", "scale": True}},
        {"Normalize": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}},
    ]
    assert last_resort(model(), PHOTOS)[0][0].name == "Resize 32×32, ImageNet's mean and std"
