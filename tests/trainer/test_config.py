"""The trainer's command line: the reference's flags literally, what is refused and how, and configuration files."""

import dataclasses
import json
import re
import shlex

import pytest

from wancore.trainer import optimizers
from wancore.trainer.config import TrainConfig, parse, parser
from wancore.trainer.flags import REFERENCE_FLAGS, REFUSED_FLAGS, ConfigError

SHARED = (
    "--dataset_base_path data/example_video_dataset --dataset_metadata_path data/example_video_dataset/{metadata} "
    "--height 480 --width 832 --num_frames 81 --dataset_repeat 100 "
)
MODELS = (
    '--model_id_with_origin_paths "{id}:diffusion_pytorch_model*.safetensors,{id}:models_t5_umt5-xxl-enc-bf16.pth,'
    '{id}:Wan2.1_VAE.pth" '
)
LORA = (
    '--learning_rate 1e-4 --num_epochs 5 --remove_prefix_in_ckpt "pipe.dit." --output_path "./models/train/x_lora" '
    '--lora_base_model "dit" --lora_target_modules "q,k,v,o,ffn.0,ffn.2" --lora_rank 32 '
)
FULL = (
    '--learning_rate 1e-5 --num_epochs 2 --remove_prefix_in_ckpt "pipe.dit." --output_path "./models/train/x_full" '
    '--trainable_models "dit" '
)
T2V, I2V = "Wan-AI/Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-I2V-14B-480P"
COMMANDS = {
    "lora": (SHARED + MODELS.format(id=T2V) + LORA, {"lora_base_model": "dit", "learning_rate": 1e-4}),
    "full": (SHARED + MODELS.format(id=T2V) + FULL, {"trainable_models": ("dit",), "num_epochs": 2}),
    "i2v": (
        SHARED + MODELS.format(id=I2V) + LORA + "--input_contains_input_image",
        {"extra_inputs": ("input_image",)},
    ),
    "flf2v": (
        SHARED + MODELS.format(id=I2V) + FULL + "--input_contains_input_image --input_contains_end_image",
        {"extra_inputs": ("input_image", "end_image")},
    ),
    "control": (
        SHARED + MODELS.format(id=T2V) + LORA + '--data_file_keys "video,control_video" --input_contains_control_video',
        {"data_file_keys": ("video", "control_video"), "extra_inputs": ("control_video",)},
    ),
    "reference": (
        SHARED + FULL + '--data_file_keys "video,control_video,reference_image" --input_contains_control_video '
        "--input_contains_reference_image",
        {"extra_inputs": ("control_video", "reference_image")},
    ),
    "speed": (
        SHARED + '--trainable_models "motion_controller" --remove_prefix_in_ckpt "pipe.motion_controller." '
        "--input_contains_motion_bucket_id --learning_rate 1e-5",
        {"trainable_models": ("motion_controller",), "extra_inputs": ("motion_bucket_id",)},
    ),
    "vace": (
        SHARED + '--trainable_models "vace" --extra_inputs "vace_video,vace_reference_image" '
        "--input_contains_vace_video --use_gradient_checkpointing_offload",
        {
            "extra_inputs": ("vace_video", "vace_reference_image"),
            "use_gradient_checkpointing_offload": True,
        },
    ),
    "camera": (
        SHARED + '--extra_inputs "input_image,camera_control_direction,camera_control_speed"',
        {"extra_inputs": ("input_image", "camera_control_direction", "camera_control_speed")},
    ),
    "paths": (
        """--model_paths '[["dit-1.safetensors", "dit-2.safetensors"], "t5.pth", "vae.pth"]' --seed 3""",
        {"model_paths": (("dit-1.safetensors", "dit-2.safetensors"), ("t5.pth",), ("vae.pth",)), "seed": 3},
    ),
    "later": (
        "--customized_optimizer bitsandbytes.optim.Adam8bit --dataset_num_workers 2 --weight_decay 0.1 --save_steps 50 "
        "--max_timestep_boundary 0.358 --min_timestep_boundary 0 --use_gradient_checkpointing --max_pixels 400000",
        {"optimizer": "bitsandbytes.optim.Adam8bit", "num_workers": 2, "max_timestep_boundary": 0.358},
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_of_the_reference(name):
    line, expected = COMMANDS[name]
    config = parse(shlex.split(line.format(metadata="metadata.csv")))
    assert {key: getattr(config, key) for key in expected} == expected
    assert TrainConfig.from_mapping(json.loads(json.dumps(config.resolved()))) == config


def test_defaults_are_those_of_the_reference():
    config = parse([])
    assert (config.num_frames, config.learning_rate, config.num_epochs, config.lora_rank) == (81, 1e-4, 1, 32)
    assert (config.data_file_keys, config.dataset_repeat) == (("image", "video"), 1)
    assert (config.output_path, config.remove_prefix_in_ckpt) == ("./models", "pipe.dit.")
    assert config.lora_target_modules == ("q", "k", "v", "o", "ffn.0", "ffn.2")
    assert (config.timestep_shift, config.weight_decay, config.size) == (5, 0.01, None)


REFUSED = {
    "--lora_rnk 3": "--lora_rank",
    "--input_contains_input_images": "--input_contains_input_image",
    "--lora_rank 0": "whole number from 1",
    "--lora_rank three": "'three' cannot be read",
    "--lora_rank": "--lora_rank",
    "--learning_rate nan": "--learning_rate must be",
    "--learning_rate=-1": "--learning_rate must be",
    "--extra_inputs control": "input_image, end_image, control_video",
    "--trainable_models dit,clip": "motion_controller",
    "--height 480": "--width",
    "--min_timestep_boundary 0.5 --max_timestep_boundary 0.5": "below",
    "--task sft:data_process --cache off": "--cache is off",
    "--task sft:data_process --frame_pick random": "inputs change from epoch to epoch",
    "--task direct": "sft:data_process",
    "--task direct_distill": "distillation is not offered",
    "--task direct_distill:data_process": "distillation is not offered",
    "--extra_inputs seed,rand_device,num_inference_steps,cfg_scale --task direct_distill:train": "distillation is not",
    "--lora_base_model text_encoder": "dit, vace",
    "--preset_lora_model clip": "dit, vace",
    "--fp8_models": "--fp8_models",
    "--random_mask --cache off --extra_inputs input_image": "--random_mask takes the place",
    "--extra_inputs camera_control_speed": "camera_control_direction",
    "--validate_steps 10": "--validation_clips",
    "--lora_base_model dit --lora_target_modules=": "--lora_target_modules names no layer",
    "--model_paths [[1]]": "not a valid file name",
    "--model_paths [[]]": "not a valid file name",
    "--optimizer_args betas": "not name=value",
    "--optimizer AdamW": "not one of the optimizers",
    "--optimizer torch.optim.AdamV": "not one of the optimizers",
    "--optimizer transformers.pipeline": "torch.optim.{Adadelta",
    "--optimizer os.system": "not one of the optimizers",
    "--optimizer_args lr=1": "--learning_rate",
    """--optimizer_args '{"betas": {"a": 1}}'""": "list of numbers",
    "--optimizer_args model=/tmp/evil": "short word",
    f"--optimizer_args '{{\"a\": {'[' * 100000}'": "cannot be read",
    "--lora_rank 100000": "5120",
    "--dataset_repeat 1000000000": "1000000",
    "--model_paths [1": "cannot be read",
    "--lora_format peft": "kohya",
    "--config missing.json": "missing.json",
    "clip.mp4": "clip.mp4",
    "--fps 0": "fps",
}


@pytest.mark.parametrize("line", REFUSED)
def test_mistakes_are_refused_with_a_way_out(line):
    with pytest.raises(ConfigError, match="(?s)" + REFUSED[line].replace("[", r"\[").replace(".", r"\.")):
        parse(shlex.split(line))


DIT, T5 = "Wan-AI/W:diffusion_pytorch_model*.safetensors", "Wan-AI/W:models_t5_umt5-xxl-enc-bf16.pth"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--initialize_model_on_cpu", {}),
        (f"--offload_models {T5}", {}),
        (f"--fp8_models {T5},{DIT}", {"fp8_base": True}),
        (f"--fp8_models {T5}", {}),
        (f"--fp8_models {DIT} --no-fp8_base", {}),
        (f"--quant_options {T5}:bitsandbytes_nf4;{DIT}:bitsandbytes_nf4/head,time", {"fp8_base": True}),
        (f"--quant_options {T5}:bitsandbytes_nf4", {}),
        (
            "--enable_model_cpu_offload --enable_optimizer_cpu_offload --cpu_offload_split_threshold 40",
            {"stream_base": True},
        ),
        (
            "--enable_tensorboard_log --enable_wandb_log --wandb_project mine --log_with tensorboard",
            {"log_with": ("tensorboard", "wandb"), "wandb_project": "mine"},
        ),
        ("--enable_csv_log --enable_swanlab_log --swanlab_project mine", {}),
        ("--task sft", {}),
        ("--preset_lora_path a.safetensors --preset_lora_model dit",
         {"preset_lora_path": "a.safetensors", "preset_lora_model": "dit"}),
        ("--resume_from_checkpoint a.safetensors", {"resume_from_checkpoint": "a.safetensors"}),
    ],
)  # fmt: skip
def test_later_flags_of_the_reference_are_taken(line, expected, caplog):
    with caplog.at_level("INFO", "wancore"):
        config = parse(shlex.split(line.replace(";", r"\;")))
    assert config == TrainConfig(**expected)
    given = {f"--{name}" for name in REFERENCE_FLAGS} & set(line.split())
    assert {record.message.partition(":")[0] for record in caplog.records} == given


def test_every_flag_of_the_reference_is_known():
    """Those of its parsers at the commits 62f6ca2b, 9bb51fe8 and the newest one of August 2026."""
    flags = """
        audio_processor_path cpu_offload_split_threshold customized_optimizer data_file_keys
        dataset_base_path dataset_metadata_path dataset_num_workers dataset_repeat enable_csv_log
        enable_lora_hot_loading enable_model_cpu_offload enable_optimizer_cpu_offload enable_swanlab_log
        enable_tensorboard_log enable_wandb_log extra_inputs find_unused_parameters fp8_models
        framewise_decoding gradient_accumulation_steps height initialize_model_on_cpu
        input_contains_control_video input_contains_end_image input_contains_input_image
        input_contains_motion_bucket_id input_contains_reference_image input_contains_vace_reference_image
        input_contains_vace_video learning_rate lora_base_model lora_checkpoint lora_rank
        lora_target_modules max_pixels max_timestep_boundary min_timestep_boundary
        model_id_with_origin_paths model_paths num_epochs num_frames offload_models output_path
        preset_lora_model preset_lora_path quant_options remove_prefix_in_ckpt resume_from_checkpoint
        save_steps swanlab_project task template_model_id_or_path tokenizer_path trainable_models
        use_gradient_checkpointing use_gradient_checkpointing_offload wandb_project weight_decay width
    """
    known = set(re.findall(r"--(\w+)", parser().format_help()))
    assert set(re.findall(r"\w+", flags)) <= known | REFUSED_FLAGS.keys()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("--trainable_models vae", "encoders that are trained"),
        ("--trainable_models dit,text_encoder", "encoders that are trained"),
        ("--frame_pick random", "inputs change"),
        ("--random_mask", "inputs change"),
    ],
)
def test_samples_that_cannot_be_kept_are_not(line, why):
    config = parse(shlex.split(line))
    assert not config.caches and why in config.notices[0]
    off = parse([*shlex.split(line), "--cache", "off"])
    assert not off.caches and not off.notices
    assert parse([]).caches and not parse([]).notices


@pytest.mark.parametrize("name", REFUSED_FLAGS)
def test_flags_of_other_trainers_say_what_to_do(name):
    with pytest.raises(ConfigError, match="not a flag of this trainer") as caught:
        parse([f"--{name}", "1"])
    assert REFUSED_FLAGS[name] in str(caught.value)


def test_a_run_can_be_repeated_from_its_file_and_flags_win(tmp_path):
    first = parse(shlex.split("--lora_rank 8 --fps 16 --input_contains_end_image --optimizer_args eps=0.1"))
    first.save_json(tmp_path / "config.json")
    again = ["--config", str(tmp_path / "config.json")]
    assert parse(again) == first
    changed = parse([*again, "--lora_rank", "4", "--fps", "none", "--input_contains_input_image"])
    assert (changed.lora_rank, changed.fps, changed.extra_inputs) == (4, None, ("end_image", "input_image"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"lora_rnk": 3}', "lora_rank"),
        ('{"lora_rank": "x"}', "lora_rank"),
        ('{"lora_rank": 2.5}', "whole number"),
        ('{"use_gradient_checkpointing": "no"}', "use_gradient_checkpointing"),
        ('{"extra_inputs": 3}', "extra_inputs"),
        ("[1]", "JSON object"),
        ("{", "cannot be read"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse(["--config", str(tmp_path / "c.json")])


def test_a_file_with_a_byte_order_mark_and_lists_as_text(tmp_path):
    (tmp_path / "c.json").write_text('{"extra_inputs": "input_image,end_image", "learning_rate": 1}', "utf-8-sig")
    config = parse(["--config", str(tmp_path / "c.json")])
    assert config.extra_inputs == ("input_image", "end_image") and config.learning_rate == 1


def test_optimizer_arguments():
    assert parse(["--optimizer_args", "eps=1e-6,fused=true,mode=fast"]).optimizer_args == {
        "eps": 1e-6,
        "fused": True,
        "mode": "fast",
    }
    assert parse(["--optimizer_args", '{"betas": [0.8, 0.9]}']).optimizer_args == {"betas": [0.8, 0.9]}


def test_sizes_round_up():
    config = TrainConfig(height=470, width=830, num_frames=80)
    assert (config.size.height, config.size.width, config.size.num_frames, config.clip_frames) == (480, 832, 81, 81)
    assert TrainConfig(num_frames=6).clip_frames == 9


def test_every_setting_is_explained_and_can_be_typed():
    text = parser().format_help()
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name}" in text
        assert len(field.metadata["help"]) > 10 and field.metadata["help"][-1] != "."


def test_an_optimizer_is_looked_up_before_anything_is_imported(monkeypatch):
    """Its name may come from a stranger's settings file."""
    imported = []
    monkeypatch.setattr(optimizers.importlib, "import_module", imported.append)
    for name in ("transformers.pipeline", "antigravity.x", "torch.optim.lr_scheduler.LambdaLR", "", ".", "..AdamW"):
        with pytest.raises(ValueError, match="not one of the optimizers"):
            optimizers.load(name)
    assert not imported


def test_an_optimizer_of_an_absent_package_is_named_with_its_installation():
    with pytest.raises(ValueError, match="pip install -U came-pytorch"):
        optimizers.load("came_pytorch.CAME")
