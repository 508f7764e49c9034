"""The reference pipeline's arguments as settings."""

import pytest
from wancore.wan_core.sampling.call import settings_of_call
from wancore.wan_core.settings import GuidanceSettings, SamplerSettings, TeaCacheSettings, WindowSettings

PLAIN = {"seed": 1, "num_inference_steps": 20, "sigma_shift": 3.0, "cfg_scale": 6.0, "cfg_merge": False}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {}),
        ({"cfg_merge": True}, {"guidance": GuidanceSettings(scale=6.0, mode="batched")}),
        ({"cfg_scale": [6.0, 3.0]}, {"guidance": GuidanceSettings(scale=(6.0, 3.0))}),
        ({"sliding_window_size": 9, "sliding_window_stride": 5}, {"windows": WindowSettings(size=9, stride=5)}),
        (
            {"tea_cache_l1_thresh": 0.05, "recommended_template": "Wan2.1-T2V-14B"},
            {"cache": TeaCacheSettings(threshold=0.05, template="Wan2.1-T2V-14B")},
        ),
        (
            {
                "tea_cache_l1_thresh": 0.05,
                "tea_cache_model_id": "Wan2.1-T2V-1.3B",
                "recommended_template": "Wan2.1-T2V-14B",
            },
            {"cache": TeaCacheSettings(threshold=0.05, template="Wan2.1-T2V-1.3B")},
        ),
        ({"denoising_strength": 0.4, "solver": "unipc"}, {"denoise": 0.4, "solver": "unipc"}),
    ],
)
def test_arguments_become_settings(arguments, expected):
    plain = {"seed": 1, "steps": 20, "shift": 3.0, "guidance": GuidanceSettings(scale=6.0)}
    assert settings_of_call(**(PLAIN | arguments)) == SamplerSettings(**(plain | expected))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sliding_window_size": 9}, "belong together; got 9 and None"),
        ({"tea_cache_l1_thresh": 0.1}, "not a published one"),
        ({"tea_cache_l1_thresh": 0.1, "tea_cache_model_id": "Wan2.2"}, "template must be one of"),
        ({"tea_cache_l1_thresh": -0.1, "tea_cache_model_id": "Wan2.1-T2V-14B"}, "threshold must be from 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        settings_of_call(**(PLAIN | arguments))
