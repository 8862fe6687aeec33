"""Settings: profiles, environment, and errors that say what to correct."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError

from posterpipe.core.posters.listing import open_place
from posterpipe.setting_types import Group
from posterpipe.setting_words import values_of
from posterpipe.settings import (
    PROFILES,
    ModelRef,
    Settings,
    SettingsError,
    default_root,
    load_settings,
    profile_path,
)
from posterpipe.training_settings import TrainingSettings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("POSTERPIPE_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("profile", sorted(path.stem for path in PROFILES.glob("*.toml")))
def test_every_shipped_profile_loads(profile: str) -> None:
    settings = load_settings(profile)
    assert settings.profile == profile
    assert settings.images.width == settings.sampler.width


def test_the_starter_profile_is_the_default_and_needs_no_hub() -> None:
    settings = load_settings()
    assert settings.profile == "starter"
    for model in (settings.base_model, settings.captioner.model, settings.scorer.model):
        assert model.id.startswith("data/models/starter/")
        assert model.revision is None


def test_the_sd21_profile_holds_the_parameters_of_the_thesis() -> None:
    training = load_settings("sd21").training
    assert training.seed == 777
    assert training.train_batch_size == training.gradient_accumulation_steps == 1
    assert training.max_train_steps == 1000
    assert training.learning_rate == 1e-6
    assert training.lr_warmup_steps == 80
    assert training.train_text_encoder
    assert training.optimizer == "adamw_8bit"
    assert training.mixed_precision == "fp16"
    # It names `constant`, which ignores its warmup; what it meant is this.
    assert training.lr_scheduler == "constant_with_warmup"
    # What it does not name is as it comes: off.
    named = {"seed", "train_batch_size", "gradient_accumulation_steps", "max_train_steps",
             "learning_rate", "lr_scheduler", "lr_warmup_steps", "train_text_encoder", "optimizer",
             "mixed_precision"}  # fmt: skip
    assert training.model_dump(exclude=named) == TrainingSettings().model_dump(exclude=named)
    off = TrainingSettings()
    assert off.method == "full" and not off.prior_preservation and off.ema_decay is None
    assert off.snr_gamma is None and not off.zero_terminal_snr and off.offset_noise == 0
    assert off.caption_dropout == 0 and not off.caption_shuffling
    assert off.early_stop_patience is off.time_limit_minutes is off.sample_every_steps is None


@pytest.mark.parametrize("profile", ["sd21", "sd21_768"])
def test_every_model_of_the_hub_is_pinned_by_revision(profile: str) -> None:
    settings = load_settings(profile)
    for model in (settings.base_model, settings.captioner.model, settings.scorer.model):
        assert model.revision


def test_the_environment_wins_over_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTERPIPE_PROFILE", "sd21")
    monkeypatch.setenv("POSTERPIPE_TRAINING__MAX_TRAIN_STEPS", "7")
    monkeypatch.setenv("POSTERPIPE_CAPTIONER__MODEL__ID", "mine/captioner")
    settings = load_settings()
    assert settings.profile == "sd21"
    assert settings.training.max_train_steps == 7
    assert settings.training.seed == 777
    assert settings.captioner.model.id == "mine/captioner"


def test_the_profile_is_the_one_that_was_loaded_however_its_variable_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("posterpipe_profile", "sd21")
    for asked, name in ((None, "sd21"), ("starter", "starter")):
        settings = load_settings(asked)
        assert settings.profile == name
        assert settings.base_model == load_settings(name).base_model
        assert ("starter" in settings.base_model.id) == (name == "starter")


def test_overrides_win_over_the_profile() -> None:
    assert load_settings("starter", store=Path("elsewhere")).store == Path("elsewhere")


def test_a_profile_may_be_any_toml_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    # With a byte order mark, as Windows' editors write it.
    mine.write_text((PROFILES / "starter.toml").read_text() + "\n", encoding="utf-8-sig")
    assert load_settings(str(mine)).base_model == load_settings("starter").base_model


def test_an_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"POSTERPIPE_PROFILE.*'sd3'.*sd21.*starter"):
        load_settings("sd3")
    with pytest.raises(SettingsError):
        profile_path("missing.toml")


def test_broken_toml_names_file_and_line(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text("[images\nwidth = 64\n")
    with pytest.raises(SettingsError, match=r"mine\.toml: not valid TOML: .*line 1"):
        load_settings(str(mine))
    mine.write_text("images = 64", encoding="utf-16")
    with pytest.raises(SettingsError, match=r"mine\.toml: not valid TOML: .*utf-8"):
        load_settings(str(mine))


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("POSTERPIPE_IMAGES__WIDTH", "65", "images.width: .*multiple of 8"),
        ("POSTERPIPE_TRAINING__LEARNING_RATE", "0", "training.learning_rate: .*greater than 0"),
        ("POSTERPIPE_TRAINING__OPTIMIZER", "sgd", "training.optimizer: .*adamw"),
        ("POSTERPIPE_SAMPLER__STEPS", "5", "POSTERPIPE_SAMPLER__STEPS: there is no such setting"),
        ("POSTERPIPE_SAMPLER__BATCH_SIZE", "many", "sampler.batch_size: .*integer"),
        ("POSTERPIPE_TRAINING__LORA_ALPHA", "inf", "training.lora_alpha: .*finite"),
        ("POSTERPIPE_SAMPLER__GUIDANCE_SCALE", "inf", "sampler.guidance_scale: .*finite"),
        ("POSTERPIPE_TRAINING__SAMPLE_SEED", str(2**64 - 1), "training.sample_seed: .*less than"),
    ],
)
def test_a_wrong_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, problem: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=problem):
        load_settings()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_number_of_the_training_is_finite_unless_a_limit_without_end_means_something(
    value: float,
) -> None:
    endless = {"max_grad_norm", "time_limit_minutes", "snr_gamma"}
    for name, field in TrainingSettings.model_fields.items():
        if float in (field.annotation, *get_args(field.annotation)):
            if name in endless and value == math.inf:
                assert getattr(TrainingSettings(**{name: value}), name) == value
            else:
                with pytest.raises(ValidationError, match=name):
                    TrainingSettings(**{name: value})


def test_true_is_no_number(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    starter = profile_path("starter").read_text("utf-8")
    mine.write_text(re.sub("^max_train_steps = .*", "max_train_steps = true", starter, flags=re.M))
    with pytest.raises(SettingsError, match=r"training\.max_train_steps: .*not be true or false"):
        load_settings(str(mine))
    with pytest.raises(SettingsError, match=r"max_concurrent: .*not be true or false"):
        load_settings(max_concurrent=True)
    for wrong in ({"learning_rate": True}, {"ema_decay": False}, {"holdout_every_steps": True}):
        with pytest.raises(ValidationError, match="not be true or false"):
            TrainingSettings(**wrong)


def test_numbers_and_switches_may_be_written_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTERPIPE_TRAINING__MAX_TRAIN_STEPS", "7")
    monkeypatch.setenv("POSTERPIPE_TRAINING__COMPILE", "1")
    monkeypatch.setenv("POSTERPIPE_SAMPLER__VAE_SLICING", "true")
    settings = load_settings()
    assert settings.training.max_train_steps == 7
    assert settings.training.compile is True and settings.sampler.vae_slicing is True


OPTIONAL = [
    name
    for name, field in TrainingSettings.model_fields.items()
    if values_of(field.annotation).endswith("or none")
]


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_setting_of_the_training_that_may_be_none_is_so_by_that_word(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv(f"POSTERPIPE_TRAINING__{name.upper()}", "none")
    assert getattr(load_settings().training, name) is None
    monkeypatch.undo()
    mine = tmp_path / "mine.toml"
    starter = re.sub(f"^{name} = .*\n", "", profile_path("starter").read_text("utf-8"), flags=re.M)
    mine.write_text(starter.replace("[training]\n", f'[training]\n{name} = "none"\n'))
    assert getattr(load_settings(str(mine)).training, name) is None


def test_none_is_a_word_where_a_setting_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ModelRef(id="owner/name", revision="none").revision == "none"
    assert TrainingSettings(class_prompt="none").class_prompt == "none"
    monkeypatch.setenv("POSTERPIPE_SAMPLER__VAE_SLICING", "none")
    assert load_settings().sampler.vae_slicing is None
    with pytest.raises(ValidationError, match="max_train_steps"):
        TrainingSettings.model_validate({"max_train_steps": "none"})


def test_all_wrong_settings_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTERPIPE_IMAGES__WIDTH", "0")
    monkeypatch.setenv("POSTERPIPE_MAX_CONCURRENT", "none")
    monkeypatch.setenv("POSTERPIPE_IMAGES__HIGHT", "64")
    with pytest.raises(SettingsError, match=r"images\.width") as caught:
        load_settings()
    assert "max_concurrent" in str(caught.value)
    assert str(caught.value).count("HIGHT") == 1 and "images.hight" not in str(caught.value)


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [
        ("POSTERPIPE_LANDNG", "POSTERPIPE_LANDING"),
        ("POSTERPIPE_TRAINNG__LEARNING_RATE", "POSTERPIPE_TRAINING__LEARNING_RATE"),
        ("POSTERPIPE_TRAINING_LEARNING_RATE", "POSTERPIPE_TRAINING__LEARNING_RATE"),
        ("POSTERPIPE_TRAINING__LEARNING_RAT", "POSTERPIPE_TRAINING__LEARNING_RATE"),
        ("POSTERPIPE_EVIDENCE__PIKSCORE__ID", "POSTERPIPE_EVIDENCE__PICKSCORE__ID"),
        ("posterpipe_stor", "POSTERPIPE_STORE"),
        ("POSTERPIPE_WAREHOUS", "POSTERPIPE_WAREHOUSE"),
    ],
)
def test_a_mistyped_variable_is_refused_with_the_name_that_was_meant(
    monkeypatch: pytest.MonkeyPatch, mistyped: str, meant: str
) -> None:
    monkeypatch.setenv(mistyped, "5")
    with pytest.raises(SettingsError, match=rf"^{mistyped}: .*did you mean {meant}\?$"):
        load_settings()


@pytest.mark.parametrize("name", ["POSTERPIPE_QQQQQ", "POSTERPIPE_SAMPLER__STEPS"])
def test_a_variable_like_no_other_is_refused_without_a_guess(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "5")
    with pytest.raises(SettingsError, match=rf"^{name}: .*docs/settings\.md") as caught:
        load_settings()
    assert "did you mean" not in str(caught.value)


def test_variables_that_other_parts_of_the_project_read_are_no_mistakes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = Path(__file__).parents[1]
    read = set()
    for folder in ("posterpipe", "posterpipe_tests", "benchmarks", "docs/tools", "deploy"):
        for path in (root / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            read |= set(re.findall(r"(?:environ|getenv)\W+(?:get\W+)?\"(POSTERPIPE_\w+)", text))
            read |= set(re.findall(r"^[A-Z_]+ = \"(POSTERPIPE_\w+[A-Z])\"$", text, re.M))
    assert {"POSTERPIPE_PROFILE", "POSTERPIPE_PEER_SCRIPT"} <= read
    for name in read - {"POSTERPIPE_PROFILE"}:
        monkeypatch.setenv(name, "5")
    for name in ("POSTERPIPE_WAREHOUSE", "POSTERPIPE_SERVICE_HOST", "POSTERPIPE_PORT_80_TCP"):
        monkeypatch.setenv(name, "5")
    load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("POSTERPIPE_BASE_MODEL", "x/y"),
        ("POSTERPIPE_BASE_MODEL", '"x/y"'),
        ("POSTERPIPE_SCORER", "x/y"),
        ("POSTERPIPE_SCORER__MODEL", "x/y"),
        ("POSTERPIPE_EVIDENCE__PICKSCORE", "x/y"),
        ("POSTERPIPE_EVIDENCE__IMAGE_ENCODERS", "facebook/dinov2-base"),
        ("POSTERPIPE_EVIDENCE__IMAGE_ENCODERS", '["facebook/dinov2-base"]'),
        ("POSTERPIPE_TRAINING__LORA_TARGETS", "to_q,to_k"),
        ("POSTERPIPE_IMAGES", "512"),
    ],
)
def test_a_list_or_group_that_is_written_wrongly_is_answered_with_a_form_that_works(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"{name} has to be JSON") as caught:
        load_settings()
    example = re.search(rf"such as {name}='(.+?)'", str(caught.value))
    assert example is not None
    monkeypatch.setenv(name, example[1])
    load_settings()


@pytest.mark.parametrize(
    "value", ["/data/store ", " /data/store", "/data/store\r", '"/data/store"']
)
def test_a_path_with_blanks_or_quotes_around_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("POSTERPIPE_STORE", value)
    with pytest.raises(SettingsError, match=r"^POSTERPIPE_STORE is .*write /data/store$"):
        load_settings()
    monkeypatch.setenv("POSTERPIPE_STORE", "/data/the 'own'")
    load_settings()


def test_a_store_that_duckdb_could_not_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"`store` \(.*what\?/store\): DuckDB cannot write"):
        load_settings("starter", store=tmp_path / "what?" / "store")


def test_settings_do_not_change_after_loading() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.training.seed = 1  # type: ignore[misc]


def test_relative_paths_start_at_the_root(tmp_path: Path) -> None:
    settings = load_settings("starter", root=tmp_path)
    assert settings.path(Path("data/store")) == tmp_path / "data" / "store"
    assert settings.path(tmp_path / "x") == tmp_path / "x"


def test_the_root_of_a_checkout_is_where_workspace_yaml_lies() -> None:
    checkout = Path(__file__).parents[1]
    expected = checkout if (checkout / "workspace.yaml").exists() else Path.cwd()
    assert default_root() == expected


@pytest.mark.parametrize(
    ("wording", "complaint"),
    [
        ({"template": "{trigger}"}, "name {caption} once"),
        ({"template": "{caption} {caption}"}, "name {caption} once"),
        ({"template": "{caption} {style}"}, "only {trigger} and {caption}"),
        ({"template": "{caption!r}"}, "only {trigger} and {caption}"),
        ({"template": "{caption:>99}"}, "only {trigger} and {caption}"),
        ({"template": "{caption.__class__}"}, "name {caption} once"),
        ({"template": "{caption"}, "write a literal brace twice"),
        ({"template": "a film, {caption}", "trigger": "sks"}, "lacks {trigger}"),
        ({"template": "{trigger}, {caption}"}, "set trigger as well"),
    ],
)
def test_a_caption_template_that_cannot_be_filled_is_refused(
    wording: dict[str, str], complaint: str
) -> None:
    captioner = {"model": {"id": "data/models/starter/captioner"}, **wording}
    with pytest.raises(SettingsError) as caught:
        load_settings("starter", captioner=captioner)
    assert "captioner: " in str(caught.value)
    assert complaint in str(caught.value)


def test_captions_are_bounded_by_what_text_encoders_read() -> None:
    model = {"id": "data/models/starter/captioner"}
    with pytest.raises(SettingsError, match=r"captioner\.max_new_tokens"):
        load_settings("starter", captioner={"model": model, "max_new_tokens": 76})


def test_posters_may_lie_in_a_folder_or_a_bucket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = load_settings(root=tmp_path)
    assert open_place(settings.landing, tmp_path).location == str(tmp_path / "data/raw_posters")
    monkeypatch.setenv("POSTERPIPE_LANDING", "s3://bucket/posters")
    settings = load_settings()
    assert open_place(settings.landing, settings.root).location == "s3://bucket/posters"


@pytest.mark.parametrize("name", ["captions", "holdout", "prompt_suite", "store"])
def test_a_url_where_only_this_machine_is_read_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read as a local path, a bucket of held-out posters would be a folder that is not there, and
    nothing would be held out."""
    with pytest.raises(SettingsError, match=f"{name}: .*s3://bucket/here is a URL"):
        load_settings("starter", **{name: "s3://bucket/here"})
    monkeypatch.setenv(f"POSTERPIPE_{name.upper()}", "s3://bucket/here")
    with pytest.raises(SettingsError, match="only `landing` may be one"):
        load_settings("starter")


def test_every_setting_is_described() -> None:
    def undescribed(group: type[BaseModel], prefix: str = "") -> list[str]:
        missing = []
        for name, field in group.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, Group) and kind is not ModelRef:
                missing += undescribed(kind, f"{prefix}{name}.")
            elif not field.description:
                missing.append(prefix + name)
        return missing

    assert undescribed(Settings) == []


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_settings()
    for name in ("LANDING", "STORE", "IMAGES", "CHECKS__MIN_POSTERS"):
        monkeypatch.setenv(f"POSTERPIPE_{name}", "")
    assert load_settings() == plain


def test_a_tilde_is_the_home_folder_where_no_shell_expands_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("POSTERPIPE_LANDING", "~/posters")
    settings = load_settings(store="~/store")
    assert settings.path(settings.landing) == tmp_path / "posters"
    assert settings.path(settings.store) == tmp_path / "store"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"landing": "data"}, "store"),
        ({"landing": "data/store/blobs"}, "store"),
        ({"holdout": "data/raw_posters"}, "landing"),
        ({"holdout": "data/raw_posters/held_out"}, "landing"),
        ({"holdout": "data/store"}, "store"),
    ],
)
def test_folders_that_lie_in_each_other_are_refused_by_name(
    one: dict[str, str], other: str
) -> None:
    with pytest.raises(SettingsError, match="the same folder or one in the other") as error:
        load_settings(**one)
    for name in (*one, other):
        assert f"`{name}`" in str(error.value)


def test_a_bucket_of_posters_lies_in_no_folder() -> None:
    assert load_settings(landing="s3://bucket/data/store").landing == "s3://bucket/data/store"


def test_a_home_folder_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTERPIPE_LANDING", "~nosuchuser/posters")
    with pytest.raises(SettingsError, match="landing: ~nosuchuser/posters: there is no such home"):
        load_settings()


def test_an_empty_variable_is_not_blamed_beside_a_wrong_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("POSTERPIPE_TRAINING", "")
    monkeypatch.setenv("POSTERPIPE_EVIDENCE__IMAGE_ENCODERS", "x")
    with pytest.raises(SettingsError, match="IMAGE_ENCODERS has to be JSON") as caught:
        load_settings()
    assert "POSTERPIPE_TRAINING" not in str(caught.value)
