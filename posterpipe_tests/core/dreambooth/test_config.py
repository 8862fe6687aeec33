from __future__ import annotations

import errno
import math
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest

from posterpipe.core.dreambooth import config as config_module
from posterpipe.core.dreambooth.config import (
    RunConfig,
    Versions,
    measure_versions,
)
from posterpipe.core.dreambooth.errors import TrainingError
from posterpipe.core.dreambooth.launch import launch_command
from posterpipe.settings import default_root, load_settings
from posterpipe.training_settings import TrainingSettings
from posterpipe_tests.core.dreambooth.conftest import MakeConfig, write_training_set

VERSIONS = Versions(training_set="set", base_model="base")


def test_toml_gives_the_same_config_back(make_config: MakeConfig, tmp_path: Path) -> None:
    odd = tmp_path / 'a "quoted" folder with \u00fc, \\ and \x7f'
    config = make_config(
        parts={"work_dir": odd, "versions": VERSIONS},
        learning_rate=1e-6,
        snr_gamma=5.0,
        seed=-3,
        max_grad_norm=math.inf,
        holdout_every_steps=None,
        sample_prompts=('a "cat"', "a \u00fc"),
    )
    path = config.to_toml(tmp_path / "new" / "run.toml")
    assert RunConfig.from_toml(path) == config
    assert [p.name for p in path.parent.iterdir()] == ["run.toml"]
    path.write_text(path.read_text("utf-8"), "utf-8-sig")  # as Windows' editors do
    assert RunConfig.from_toml(path) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("width = ", "not valid TOML"),
        ("width = 33", "width: Input should be a multiple of 8"),
        ("speed = 3", "speed: Extra inputs"),
        ("[training]\nlearning_rate = 0", "training.learning_rate: Input should be greater than 0"),
        (
            "[training]\nmax_train_steps = true",
            "max_train_steps: Input should not be true or false",
        ),
        ("[sampler]\nscheduler = 'ddim'\nnum_inference_steps = 1001", "sampler: num_inference_st"),
    ],
)
def test_a_wrong_config_names_the_file_and_the_key(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(TrainingError) as caught:
        RunConfig.from_toml(path)
    assert "run.toml" in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("name", ["work_dir", "cache_dir"])
@pytest.mark.parametrize("inside", ["model", "model/cache", "elsewhere/../model/cache"])
def test_a_run_does_not_work_within_the_folder_of_the_finished_model(
    tmp_path: Path, name: str, inside: str
) -> None:
    folders = {"output_dir": "model", "work_dir": "work", name: inside}
    places = "".join(f"{key} = '{folder}'\n" for key, folder in folders.items())
    path = tmp_path / "run.toml"
    path.write_text(f"base_model = 'base'\ntraining_set = 'set'\nwidth = 64\nheight = 64\n{places}")
    with pytest.raises(TrainingError, match=rf"run\.toml: {name}: .* lies in output_dir, model"):
        RunConfig.from_toml(path)


@pytest.mark.parametrize("folder", ["saves", "lowest/model", "samples", "x/../exports/model"])
def test_a_finished_model_does_not_lie_among_the_work_that_is_removed_then(
    tmp_path: Path, folder: str
) -> None:
    places = f"output_dir = 'work/{folder}'\nwork_dir = 'work'\n"
    path = tmp_path / "run.toml"
    path.write_text(f"base_model = 'base'\ntraining_set = 'set'\nwidth = 64\nheight = 64\n{places}")
    with pytest.raises(TrainingError, match=r"run\.toml: output_dir: .* lies in work"):
        RunConfig.from_toml(path)


def guide() -> str:
    return (default_root() / "docs" / "training.md").read_text("utf-8")


def test_the_config_in_the_guide_is_one(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", guide(), re.S)
    (block,) = [block for block in blocks if block.startswith("base_model")]
    path = tmp_path / "run.toml"
    path.write_text(block)
    assert RunConfig.from_toml(path).training.train_batch_size == 8
    path.write_text(re.sub("^# (holdout_set|class_set)", r"\1", block, flags=re.M))
    assert RunConfig.from_toml(path).class_set == Path("my_class")
    (longer,) = [tomllib.loads(block) for block in blocks if "continue_from" in block]
    whole = {**tomllib.loads(path.read_text()), **longer}
    assert RunConfig(**whole).training.max_train_steps == 1600


def test_the_recipes_in_the_guide_are_settings() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", guide(), re.S)
    of_a_run = ("base_model", "continue_from")
    recipes = [
        tomllib.loads(block) for block in blocks if not any(name in block for name in of_a_run)
    ]
    assert len(recipes) == 6
    captioner = load_settings("sd21").captioner.model_dump()
    for recipe in recipes:
        changed = {**captioner, **recipe.get("captioner", {})}
        settings = load_settings("sd21", training=recipe["training"], captioner=changed)
        assert recipe["training"].items() <= settings.training.model_dump().items()


def test_what_the_guide_says_of_settings_is_of_settings_that_there_are() -> None:
    table = guide().split("| you want |")[1].split("## ")[0]
    named = set(re.findall(r"`(?:\w+\.)?([a-z_]+)(?: = [^`]+)?`", table))
    assert named - {"training", "fit"} <= set(TrainingSettings.model_fields)
    assert "early_stop_patience" in named


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"none\.toml.*cannot be read"):
        RunConfig.from_toml(tmp_path / "none.toml")


def test_the_id_follows_what_decides_a_weight_and_nothing_else(make_config: MakeConfig) -> None:
    plain = make_config().checkpoint_id(VERSIONS)
    assert make_config("elsewhere").checkpoint_id(VERSIONS) == plain
    # A layout that a machine chooses names no other checkpoint, as little as the machine does.
    assert make_config(channels_last=True).checkpoint_id(VERSIONS) == plain
    assert make_config(channels_last=False).checkpoint_id(VERSIONS) != plain
    assert make_config(log_every_steps=7, save_every_steps=9).checkpoint_id(VERSIONS) == plain
    assert make_config(sample_every_steps=7, sample_prompts=("a",)).checkpoint_id(VERSIONS) == plain
    others = [
        make_config(seed=1).checkpoint_id(VERSIONS),
        make_config(learning_rate=2e-3).checkpoint_id(VERSIONS),
        make_config(parts={"width": 64}).checkpoint_id(VERSIONS),
        make_config().checkpoint_id(VERSIONS.model_copy(update={"training_set": "new"})),
        make_config().checkpoint_id(VERSIONS.model_copy(update={"base_model": "new"})),
    ]
    assert len({plain, *others}) == 6


def test_several_processes_make_another_checkpoint_than_one(make_config: MakeConfig) -> None:
    # Each takes a batch of its own, so the steps are others. One keeps the name it always had.
    config = make_config()
    names = {config.checkpoint_id(VERSIONS, processes=count) for count in (1, 2, 4)}
    assert len(names) == 3 and config.checkpoint_id(VERSIONS) in names


def test_the_profiles_make_the_checkpoints_that_they_made_before(make_config: MakeConfig) -> None:
    # Other names here are other weights: they come with another TRAINER_VERSION, with settings of a
    # profile that were changed on purpose, or by mistake.
    known = {
        "starter": "79e2c4a6b39ed5aa",
        "sd21": "da5cc609f2d666ab",
        "sd21_768": "08533c371c6cd58d",
    }
    for profile, name in known.items():
        parts = {"training": load_settings(profile).training, "width": 64, "height": 96}
        assert make_config(parts=parts).checkpoint_id(VERSIONS) == name, profile


def test_only_lora_that_stops_a_short_text_encoder_makes_another_checkpoint_than_before(
    make_config: MakeConfig,
) -> None:
    lora = {"method": "lora", "mixed_precision": "bf16"}
    before = {
        "stops": "5c461d10595677c7",
        "in fp32": "6864115505b35758",
        "in full": "efd4a196d32cbba0",
        "never stops": "fa1449b4fe113817",
        "ends before": "becc127d06b9db4b",
    }
    made = {
        "stops": make_config(**lora, text_encoder_stop_step=2),
        "in fp32": make_config(method="lora", text_encoder_stop_step=2),
        "in full": make_config(mixed_precision="bf16", text_encoder_stop_step=2),
        "never stops": make_config(**lora),
        "ends before": make_config(**lora, text_encoder_stop_step=4, max_train_steps=4),
    }
    ids = {name: config.checkpoint_id(VERSIONS) for name, config in made.items()}
    assert ids.pop("stops") != before.pop("stops")
    assert ids == before


def test_class_images_and_held_out_posters_count_only_where_they_decide(
    make_config: MakeConfig,
) -> None:
    other = VERSIONS.model_copy(update={"class_set": "other", "holdout_set": "other"})
    assert make_config().checkpoint_id(other) == make_config().checkpoint_id(VERSIONS)
    assert make_config(holdout_every_steps=7).checkpoint_id(VERSIONS) == make_config(
        class_prompt="a cat"
    ).checkpoint_id(VERSIONS)
    for settings in ({"prior_preservation": True}, {"early_stop_patience": 2}):
        config = make_config(**settings)
        assert config.checkpoint_id(other) != config.checkpoint_id(VERSIONS)
    assert make_config(early_stop_patience=2).checkpoint_id(VERSIONS) != make_config(
        early_stop_patience=2, holdout_every_steps=7
    ).checkpoint_id(VERSIONS)


def test_versions_are_measured_from_the_bytes(make_config: MakeConfig, tmp_path: Path) -> None:
    before = measure_versions(make_config())
    same = write_training_set(tmp_path / "copy")
    assert measure_versions(make_config(parts={"training_set": same})) == before
    with open(same / "training.csv", "a") as file:
        file.write("0000.png,again\n")
    after = measure_versions(make_config(parts={"training_set": same}))
    assert after.training_set != before.training_set
    assert after.base_model == before.base_model


def test_what_lies_beside_the_images_of_a_set_is_no_part_of_it(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    folder = write_training_set(tmp_path / "set")
    config = make_config(parts={"training_set": folder})
    before = measure_versions(config)
    (folder / ".DS_Store").write_bytes(b"?")
    (folder / "work").mkdir()
    (folder / "work" / ".lock").touch()
    assert measure_versions(config) == before


def test_an_input_that_cannot_be_read_is_named(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:  # root, as whom tests may run, can read every file
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(config_module, "sha256_of", refuse)
    with pytest.raises(TrainingError, match=r"0000\.png: cannot be read .* make it readable"):
        measure_versions(make_config())


def test_a_changed_image_counts_however_deep_it_lies(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    folder = write_training_set(tmp_path / "deep")
    config = make_config(parts={"training_set": folder})
    flat = measure_versions(config).training_set
    (folder / "a" / "b" / "c").mkdir(parents=True)
    image = (folder / "0000.png").rename(folder / "a" / "b" / "c" / "0000.png")
    table = folder / "training.csv"
    table.write_text(table.read_text().replace("0000.png", "a/b/c/0000.png"))
    before = measure_versions(config).training_set
    image.write_bytes(image.read_bytes() + b"more")
    assert len({flat, before, measure_versions(config).training_set}) == 3


def test_the_launcher_is_told_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    command = launch_command(Path("run.toml"), module="some.worker", cpu=True)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert command[command.index("--num_cpu_threads_per_process") + 1] == "3"
    assert command[-4:] == ["-m", "some.worker", "--config", "run.toml"]
